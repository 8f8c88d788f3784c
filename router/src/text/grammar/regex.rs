//! Regular expressions, choices and white space in the library's notation.

use std::fmt::Write;

use llguidance::regex_to_lark;

use super::GrammarError;

/// A grammar whose whole text matches `pattern`. `\d` and `\w` are ASCII, as in JSON schemas.
///
/// # Errors
/// Nothing is left of it.
pub(super) fn lark_of_regex(pattern: &str) -> Result<String, GrammarError> {
    let whole = without_anchors(pattern);
    if whole.is_empty() {
        return Err(GrammarError("the regular expression matches nothing but the empty text".into()));
    }
    Ok(format!("start: /{}/", regex_to_lark(&whole, "dw")))
}

/// The whole text matches anyway, so `^` in front of an alternative and `$` behind it say nothing; the library has neither.
fn without_anchors(pattern: &str) -> String {
    let mut parts = Vec::new();
    let mut rest = pattern;
    loop {
        let end = top_level_bar(rest);
        let (part, more) = rest.split_at(end.unwrap_or(rest.len()));
        let part = part.strip_prefix('^').unwrap_or(part);
        parts.push(part.strip_suffix('$').filter(|front| !ends_in_escape(front)).unwrap_or(part));
        match more.strip_prefix('|') {
            Some(more) => rest = more,
            None => return parts.join("|"),
        }
    }
}

/// An odd number of backslashes escapes what follows.
fn ends_in_escape(text: &str) -> bool {
    text.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1
}

/// The first `|` that is in no group and no class.
fn top_level_bar(pattern: &str) -> Option<usize> {
    let (mut depth, mut class, mut escaped) = (0usize, false, false);
    for (at, byte) in pattern.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'[' => class = true,
            b']' => class = false,
            b'(' if !class => depth += 1,
            b')' if !class => depth = depth.saturating_sub(1),
            b'|' if !class && depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

/// A grammar of exactly these texts.
///
/// # Errors
/// There are none, or one is empty.
pub(super) fn lark_of_choices(choices: &[String]) -> Result<String, GrammarError> {
    if choices.is_empty() || choices.iter().any(String::is_empty) {
        return Err(GrammarError("choices must be texts of at least one character, and at least one of them".into()));
    }
    let texts: Vec<String> = choices.iter().map(|choice| quoted(choice)).collect();
    Ok(format!("start: CHOICE\nCHOICE: {}", texts.join(" | ")))
}

/// `text` as a string of a grammar.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\0'..='\x1f' | '\x7f' => write!(out, "\\u{:04x}", u32::from(c)).unwrap_or(()), // a string takes everything
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A pattern for the space between parts of JSON that can match nothing but spaces, tabs and line ends.
///
/// # Errors
/// It is empty or has anything else.
pub(super) fn white_space(pattern: &str) -> Result<String, GrammarError> {
    const SPACES: &str = " \\n\\r\\t";
    let (mut out, mut class, mut count) = (String::new(), false, false);
    let mut chars = pattern.chars();
    let mut spaces = 0;
    while let Some(c) = chars.next() {
        let plain = matches!(c, ' ' | '\n' | '\r' | '\t');
        spaces += usize::from(plain || c == '\\');
        match c {
            '\\' => match chars.next() {
                Some('s') if class => out.push_str(SPACES),
                Some('s') => write!(out, "[{SPACES}]").unwrap_or(()),
                Some(c @ ('n' | 'r' | 't')) => out.extend(['\\', c]),
                _ => return Err(no_white_space()),
            },
            '0'..='9' | ',' if count => out.push(c),
            '{' | '}' => {
                count = c == '{';
                out.push(c);
            }
            '[' | ']' => {
                class = c == '[';
                out.push(c);
            }
            '(' | ')' | '*' | '+' | '?' | '|' => out.push(c),
            _ if plain => out.push(c),
            _ => return Err(no_white_space()),
        }
    }
    if spaces == 0 { Err(no_white_space()) } else { Ok(out) }
}

fn no_white_space() -> GrammarError {
    GrammarError(
        "`whitespace_pattern` must be made of spaces, \\n, \\r, \\t and \\s, with [], (), |, *, +, ? and {}".into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_at_the_ends_of_alternatives_say_nothing() {
        let cases = [
            ("^a$", "a"),
            ("^a$|^b$", "a|b"),
            (r"^a\$", r"a\$"),
            (r"^a\\$", r"a\\"),
            ("^(a|b$)$", "(a|b$)"),
            (r"[|^$]|\|$", r"[|^$]|\|"),
            ("a", "a"),
        ];
        for (pattern, whole) in cases {
            assert_eq!(without_anchors(pattern), whole, "{pattern}");
        }
    }

    #[test]
    fn white_space_is_nothing_else() {
        assert_eq!(white_space(r"[\n\t ]*").unwrap(), r"[\n\t ]*");
        assert_eq!(white_space(r"\s{0,2}").unwrap(), r"[ \n\r\t]{0,2}");
        assert_eq!(white_space(r"[\s]?").unwrap(), r"[ \n\r\t]?");
        for bad in ["", ".*", "[^a]", "a", r"\S", r"\d", "5", "()", r"\"] {
            assert!(white_space(bad).is_err(), "{bad}");
        }
    }
}
