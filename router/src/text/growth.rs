//! Refuses templates that double a value in place. The engine counts instructions, not bytes: forty doublings are a few
//! hundred instructions and a terabyte.
//!
//! This is a guard against accidents and known bombs, not a proof. Templates come from the model directory that the
//! operator chose; those of requests and adapters are not run.

/// Looks at every `{% set x = .. %}`.
///
/// # Errors
/// What was found: a right-hand side that concatenates its own target with itself, or inserts it into itself.
pub(super) fn check(source: &str) -> Result<(), String> {
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let tag = rest.get(at + 2..).unwrap_or("");
        let end = tag.find("%}").unwrap_or(tag.len());
        let (inside, after) = tag.split_at(end);
        check_tag(inside)?;
        rest = after;
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), String> {
    let code = without_strings(tag);
    let code = code.trim_matches(['-', '+', ' ', '\n', '\t', '\r']);
    let Some(assignment) = code.strip_prefix("set").filter(|rest| rest.starts_with(char::is_whitespace)) else {
        return Ok(());
    };
    let Some((target, value)) = assignment.split_once('=') else { return Ok(()) };
    let target = target.trim();
    let grows = value.contains(['~', '+']) && occurrences(value, target) > 1;
    let inserts = value.contains("replace") && occurrences(value, target) > 1;
    if grows || inserts {
        return Err(format!("`{target}` is joined with itself, which can double it without bound"));
    }
    Ok(())
}

/// String literals become empty ones.
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

/// How often `name` stands in `code` as a whole word (`a.b` is one word, and `a.b.c` starts with it).
fn occurrences(code: &str, name: &str) -> usize {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let hits = code.match_indices(name).filter(|(at, _)| {
        let before = code.get(..*at).and_then(|s| s.chars().next_back());
        let after = code.get(at + name.len()..).and_then(|s| s.chars().next());
        !before.is_some_and(|c| word(c) || c == '.') && !after.is_some_and(word)
    });
    hits.count()
}
