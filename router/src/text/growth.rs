//! Refuses templates that double a value again and again. The engine counts instructions, not bytes: forty doublings are a
//! few hundred instructions and a terabyte.
//!
//! Every `{% set x = .. %}` is read as "x is made of these names, so many times each". A value that is made of itself
//! twice, directly or through others, doubles with each turn; a chain without a circle multiplies along its length.
//!
//! Of templates that are not the operator's, what loops and macro calls hand on counts as an assignment too, and a value
//! may hold fewer copies of another. This is a guard against accidents and known bombs, not a proof.

use std::collections::{HashMap, HashSet};

use super::template::Trust;

/// Assignments of one template.
const ASSIGNMENTS_MAX: usize = 1000;
/// How often a value may hold another one, along a chain of assignments.
const COPIES_MAX: u64 = 4096;
/// The same in a stranger's template.
const STRANGER_COPIES_MAX: u64 = 32;
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
pub(super) fn check(source: &str, trust: Trust) -> Result<(), String> {
    let mut assignments: Vec<Assignment> = tags(source).filter_map(assignment).collect();
    let mut copies_max = COPIES_MAX;
    if trust == Trust::Stranger {
        if tags(source).chain(prints(source)).any(|code| without_strings(code).contains('*')) {
            return Err("`*` repeats values, which this server does not do for this template".into());
        }
        assignments.extend(tags(source).filter_map(loop_variable));
        assignments.extend(arguments(source));
        assignments.extend(tags(source).filter_map(literal));
        by_root(&mut assignments);
        copies_max = STRANGER_COPIES_MAX;
    }
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
        if copies(&assignments, target, &mut known) > copies_max {
            return Err(format!("`{target}` may hold more than {copies_max} copies of another value"));
        }
    }
    Ok(())
}

/// The insides of `{% .. %}`.
fn tags(source: &str) -> impl Iterator<Item = &str> {
    source.split("{%").skip(1).map(|rest| rest.split("%}").next().unwrap_or(rest))
}

/// A part of a value counts as the value: `x.a` as `x`. Namespaces are the exception, because templates write to their parts.
fn by_root(assignments: &mut [Assignment]) {
    let namespaces: HashSet<String> =
        assignments.iter().filter_map(|a| a.target.split_once('.')).map(|(root, _)| root.to_owned()).collect();
    for assignment in assignments {
        let mut names: HashMap<String, u64> = HashMap::new();
        for (name, times) in assignment.names.drain() {
            let root = name.split('.').next().unwrap_or("");
            let name = if namespaces.contains(root) { name.as_str() } else { root };
            *names.entry(name.to_owned()).or_default() += times;
        }
        assignment.names = names;
    }
}

/// The insides of `{{ .. }}`.
fn prints(source: &str) -> impl Iterator<Item = &str> {
    source.split("{{").skip(1).map(|rest| rest.split("}}").next().unwrap_or(rest))
}

/// Reads `set x = ..` and `with x = ..`.
fn assignment(tag: &str) -> Option<Assignment> {
    let code = without_strings(tag);
    let code = code.trim_start_matches(['-', '+']).trim_start();
    let rest = code.strip_prefix("set").or_else(|| code.strip_prefix("with"))?;
    let (target, value) = rest.strip_prefix(char::is_whitespace)?.split_once('=')?;
    let value = value.trim_end().trim_end_matches(['-', '+']); // white space control
    Some(made_of(target.trim(), value, false))
}

/// `target` is `value`.
fn made_of(target: &str, value: &str, is_list: bool) -> Assignment {
    let mut found = HashMap::new();
    for name in names(value) {
        *found.entry(name.to_owned()).or_default() += 1;
    }
    let grows = is_list || GROWING.iter().any(|mark| value.contains(mark));
    Assignment { target: target.to_owned(), names: found, grows }
}

/// `set x = [..]`: a list that holds itself twice is small, and printed it is not.
fn literal(tag: &str) -> Option<Assignment> {
    let Assignment { target, .. } = assignment(tag)?;
    let code = without_strings(tag);
    let (_, value) = code.split_once('=')?;
    let value = value.trim();
    value.starts_with(['[', '{', '(']).then(|| made_of(&target, value, true))
}

/// Reads `for x in ..`.
fn loop_variable(tag: &str) -> Option<Assignment> {
    let code = without_strings(tag);
    let rest = code.trim_start_matches(['-', '+']).trim_start().strip_prefix("for")?;
    let (target, value) = rest.strip_prefix(char::is_whitespace)?.split_once(" in ")?;
    Some(made_of(target.trim(), value, value.trim_start().starts_with(['[', '('])))
}

/// What calls of the template's own macros hand to their parameters, and those of recursive loops.
fn arguments(source: &str) -> Vec<Assignment> {
    let code = without_strings(source);
    let mut found = Vec::new();
    for head in code.split("macro ").skip(1) {
        let Some((name, rest)) = head.split_once('(') else { continue };
        let name = name.trim();
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
        if !is_name {
            continue;
        }
        let parameters: Vec<String> =
            parts(rest).iter().map(|part| part.split('=').next().unwrap_or("").trim().to_owned()).collect();
        for call in code.split(&format!("{name}(")).skip(1) {
            for (i, argument) in parts(call).into_iter().enumerate() {
                let named = argument.split_once('=').filter(|(name, value)| {
                    !value.starts_with('=') && parameters.iter().any(|parameter| parameter == name.trim())
                });
                let (target, value) = match (&named, parameters.get(i)) {
                    (Some((name, value)), _) => (name.trim(), *value),
                    (None, Some(parameter)) => (parameter.as_str(), argument.as_str()),
                    (None, None) => continue,
                };
                if value.trim() != target {
                    found.push(made_of(target, value, value.trim_start().starts_with(['[', '{', '('])));
                }
            }
        }
    }
    found
}

/// The arguments up to the bracket that closes the call.
fn parts(call: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0_u32);
    for c in call.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' if depth == 0 => break,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
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
            assert!(check(&bomb, Trust::Operator).is_err(), "{bomb:.80}");
        }
    }

    #[test]
    fn bombs_of_strangers_that_hide_in_calls_and_lists_are_refused() {
        let lists = (1..40).map(|i| format!("{{% set a{i} = [a{0}, a{0}] %}}", i - 1)).collect::<String>();
        let bombs = [
            "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ f('xxxx', 40) }}".to_owned(),
            "{% macro f(x, n) %}{{ f(n=n - 1, x=[x, x]) }}{% endmacro %}{{ f('xxxx', 40) }}".to_owned(),
            "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(y) %}{{ f(y + y) }}{% endmacro %}{{ f('x') }}"
                .to_owned(),
            "{% macro f(x) %}{{ f({'a': x.a ~ x.a}) }}{% endmacro %}{{ f({'a': 'xxxx'}) }}".to_owned(),
            "{% for s in [s ~ s] %}{% set s = s %}{% endfor %}".to_owned(),
            format!("{lists}{{{{ a39 | tojson }}}}"),
        ];
        for bomb in bombs {
            assert!(check(&bomb, Trust::Stranger).is_err(), "{bomb:.80}");
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
            for trust in [Trust::Operator, Trust::Stranger] {
                assert_eq!(check(template, trust), Ok(()), "{template}");
            }
        }
    }
}
