//! Refuses templates that double a value again and again. The engine counts instructions, not bytes: forty doublings are a
//! few hundred instructions and a terabyte.
//!
//! Every `{% set x = .. %}` is read as "x is made of these names, so many times each". A value that is made of itself
//! twice, directly or through others, doubles with each turn; a chain without a circle multiplies along its length.
//!
//! This is a guard against accidents and known bombs, not a proof. Templates come from the model directory that the
//! operator chose; those of requests and adapters are not run.

use std::collections::{HashMap, HashSet};

/// Assignments of one template.
const ASSIGNMENTS_MAX: usize = 1000;
/// How often a value may hold another one, along a chain of assignments.
const COPIES_MAX: u64 = 4096;
/// Marks of an expression that puts values together.
const GROWING: &[&str] = &["~", "+", "%", "join", "format", "replace"];

/// `target` is made of `names`.
struct Assignment {
    target: String,
    names: HashMap<String, u64>,
    /// The names are put together; otherwise the value is (part of) one of them.
    grows: bool,
}

/// Looks at every assignment of `source`.
///
/// # Errors
/// What was found.
pub(super) fn check(source: &str) -> Result<(), String> {
    let assignments: Vec<Assignment> = tags(source).filter_map(assignment).collect();
    if assignments.len() > ASSIGNMENTS_MAX {
        return Err(format!("{} assignments; at most {ASSIGNMENTS_MAX} are accepted", assignments.len()));
    }
    for Assignment { target, names, .. } in assignments.iter().filter(|a| a.grows) {
        let of_itself = names.iter().filter(|(name, _)| depends(&assignments, name, target)).map(|(_, times)| times);
        if of_itself.sum::<u64>() > 1 {
            return Err(format!("`{target}` is joined with itself, which can double it without bound"));
        }
    }
    let mut known = HashMap::new();
    for Assignment { target, .. } in &assignments {
        if copies(&assignments, target, &mut known) > COPIES_MAX {
            return Err(format!("`{target}` may hold more than {COPIES_MAX} copies of another value"));
        }
    }
    Ok(())
}

/// The insides of `{% .. %}`.
fn tags(source: &str) -> impl Iterator<Item = &str> {
    source.split("{%").skip(1).map(|rest| rest.split("%}").next().unwrap_or(rest))
}

/// Reads `set x = ..` and `with x = ..`.
fn assignment(tag: &str) -> Option<Assignment> {
    let code = without_strings(tag);
    let code = code.trim_start_matches(['-', '+']).trim_start();
    let rest = code.strip_prefix("set").or_else(|| code.strip_prefix("with"))?;
    let (target, value) = rest.strip_prefix(char::is_whitespace)?.split_once('=')?;
    let value = value.trim_end().trim_end_matches(['-', '+']); // white space control
    let mut found = HashMap::new();
    for name in names(value) {
        *found.entry(name.to_owned()).or_default() += 1;
    }
    let grows = GROWING.iter().any(|mark| value.contains(mark));
    Some(Assignment { target: target.trim().to_owned(), names: found, grows })
}

/// String literals vanish.
fn without_strings(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut quote = None;
    let mut escaped = false;
    for c in code.chars() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None => out.push(c),
        }
    }
    out
}

/// Dotted names of an expression, each time they occur; filters (`|name`) are none.
fn names(value: &str) -> Vec<&str> {
    let in_name = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
    let mut found = Vec::new();
    let mut rest = value;
    let mut after_pipe = false;
    while let Some(first) = rest.chars().next() {
        let bytes = if in_name(first) { rest.find(|c| !in_name(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        let (word, next) = rest.split_at(bytes);
        if (first.is_alphabetic() || first == '_') && !after_pipe {
            // `x.method(..)` is made of x, `function(..)` of its arguments.
            let value = if next.starts_with('(') { word.rsplit_once('.').map(|(value, _)| value) } else { Some(word) };
            found.extend(value);
        }
        after_pipe = first == '|' || (after_pipe && first.is_whitespace());
        rest = next;
    }
    found
}

/// True if `name` is `target` or is made of it, through any number of assignments.
fn depends(assignments: &[Assignment], name: &str, target: &str) -> bool {
    let mut seen = HashSet::new();
    let mut open = vec![name];
    while let Some(name) = open.pop() {
        if name == target {
            return true;
        }
        if seen.insert(name) {
            let made_here = assignments.iter().filter(|a| a.target == name);
            open.extend(made_here.flat_map(|a| a.names.keys().map(String::as_str)));
        }
    }
    false
}

/// Copies of any other value that `name` may hold. A circle counts once: its growth was checked before.
fn copies<'a>(assignments: &'a [Assignment], name: &'a str, known: &mut HashMap<&'a str, u64>) -> u64 {
    if let Some(&copies) = known.get(name) {
        return copies;
    }
    known.insert(name, 1);
    let mut most = 1;
    for made in assignments.iter().filter(|a| a.target == name) {
        let parts = made.names.iter().map(|(part, times)| times.saturating_mul(copies(assignments, part, known)));
        let here = if made.grows { parts.fold(0, u64::saturating_add) } else { parts.max().unwrap_or(1) };
        most = most.max(here);
    }
    known.insert(name, most);
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_double_are_refused() {
        let chain =
            |join: &str| (1..40).map(|i| format!("{{% set a{i} = a{0} {join} a{0} %}}", i - 1)).collect::<String>();
        let bombs = [
            "{% set s = s ~ s %}".to_owned(),
            "{%- set s = s+s -%}".to_owned(),
            "{% set ns.s = ns.s ~ 'x' ~ ns.s %}".to_owned(),
            "{% set s = [s, s]|join %}".to_owned(),
            "{% set s = '{}{}'.format(s, s) %}".to_owned(),
            "{% set s = '%s%s' % (s, s) %}".to_owned(),
            "{% set s = s.replace('x', s) %}".to_owned(),
            "{% set a = b ~ b %}{% set b = a %}".to_owned(),
            "{% set a = b ~ c %}{% set b = a %}{% set c = a %}".to_owned(),
            "{% set a = ns.s ~ ns.s %}{% set ns.s = a %}".to_owned(),
            "{% with s = s ~ s %}{% endwith %}".to_owned(),
            chain("~"),
            chain("+"),
        ];
        for bomb in bombs {
            assert!(check(&bomb).is_err(), "{bomb:.80}");
        }
    }

    #[test]
    fn what_real_templates_do_is_accepted() {
        let fine = [
            "{% set ns.text = ns.text ~ message.content ~ '\\n' %}",
            "{%- set ns.i = ns.i + 1 -%}",
            "{% set content = '<' + name + '>' + content + '</' + name + '>' %}",
            "{% set s = 's ~ s' ~ s %}",
            "{% set content = content.split('</think>')[-1].lstrip('\\n') %}",
            "{% set content = content | replace('a', 'b') | trim %}",
            "{% set x = x if x is defined else y %}",
            "{% set ns.a = ns.a and ns.b %}{% set ns.b = ns.a or ns.b %}",
            "{% set total = total + count %}{% set count = count + 1 %}",
            "{% set ns = namespace(a='', b='') %}{% set ns.a = ns.a ~ ns.b %}",
            "{% if a == b %}{% for x in a + a %}{% endfor %}{% endif %}",
        ];
        for template in fine {
            assert_eq!(check(template), Ok(()), "{template}");
        }
    }
}
