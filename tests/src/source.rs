//! Enough of Rust's grammar to find functions and attributes without being fooled by strings and comments.

/// A function: where it starts and how many lines it has, its signature and closing brace included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The line of `fn`, from 1.
    pub line: usize,
    /// Lines from `fn` to its closing brace.
    pub lines: usize,
}

/// The source with the insides of comments, strings and character literals replaced by spaces. Lines stay where they are.
pub fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => line_end(bytes, at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'r' if !follows_word(bytes, at) => raw_string_end(bytes, at).unwrap_or(at),
            b'\'' => character_end(source, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            at += 1;
            continue;
        }
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(out).unwrap_or_default() // whole tokens were replaced by ASCII
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |length| at + length)
}

fn block_comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'/', Some(b'*')) => (at, depth) = (at + 2, depth + 1),
            (b'*', Some(b'/')) => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of `r".."` or `r#".."#`; `None` if this `r` starts something else.
fn raw_string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let hashes = bytes[start + 1..].iter().take_while(|&&byte| byte == b'#').count();
    let open = start + 1 + hashes;
    (bytes.get(open) == Some(&b'"')).then_some(())?;
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let length = bytes[open + 1..].windows(close.len()).position(|window| window == close)?;
    Some(open + 1 + length + close.len())
}

/// The end of `'x'` or `'\n'`; `None` for a lifetime.
fn character_end(source: &str, start: usize) -> Option<usize> {
    let rest = &source[start + 1..];
    let first = rest.chars().next()?;
    if first == '\\' {
        return rest[2..].find('\'').map(|length| start + 3 + length + 1);
    }
    let after = first.len_utf8();
    rest[after..].starts_with('\'').then_some(start + 1 + after + 1)
}

fn follows_word(bytes: &[u8], at: usize) -> bool {
    // `b"` and `br"` are strings too; any other letter before means that `r` ends a word.
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') && bytes[at - 1] != b'b'
}

/// Every function with a body, nested ones too.
pub fn functions(source: &str) -> Vec<Function> {
    let code = code_only(source);
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let starts_word = at == 0 || !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
        let name: String = code[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if !starts_word || name.is_empty() {
            continue; // a function type, such as `fn (u32)`, has no name
        }
        if let Some(end) = body_end(&code[at..]) {
            let line = code[..at].matches('\n').count() + 1;
            let lines = code[at..at + end].matches('\n').count() + 1;
            found.push(Function { name, line, lines });
        }
    }
    found
}

/// Bytes from `fn` to the end of its body; `None` for a declaration without one.
fn body_end(code: &str) -> Option<usize> {
    let (mut brackets, mut braces) = (0_i32, 0_i32);
    for (at, byte) in code.bytes().enumerate() {
        match byte {
            b'(' | b'[' => brackets += 1,
            b')' | b']' => brackets -= 1,
            b'{' => braces += 1,
            b'}' => {
                braces -= 1;
                if braces == 0 {
                    return Some(at + 1);
                }
            }
            b';' if brackets == 0 && braces == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Every attribute of this name, inner or outer, as written: line and text between the brackets.
pub fn attributes(source: &str, name: &str) -> Vec<(usize, String)> {
    let code = code_only(source);
    let mut found = Vec::new();
    for (at, _) in code.match_indices("#[").chain(code.match_indices("#![")) {
        let open = at + code[at..].find('[').unwrap_or(0);
        let inside = code[open + 1..].trim_start();
        let is_other = |rest: &str| rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        if inside.strip_prefix(name).is_none_or(is_other) {
            continue;
        }
        let mut depth = 0;
        let end = code[open..].bytes().position(|byte| {
            depth += i32::from(byte == b'[') - i32::from(byte == b']');
            depth == 0
        });
        let text = end.and_then(|end| source.get(open + 1..open + end)).unwrap_or_default();
        found.push((source[..at].matches('\n').count() + 1, text.to_owned()));
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r##"
/// fn not_this() { "
#[allow(dead_code, reason = "a [b]")]
fn one<'a>(x: &'a str) -> char {
    let _ = "fn nor_this() {"; // }
    let _ = r#"{ " {"#;
    /* { /* nested */ */
    '{'
}

trait T {
    fn declared(&self, f: fn(u32) -> [u8; 2]);
    fn given(&self) { '\''; }
}

#[test]
#[ignore = "#[allow(x)]"]
fn outer() {
    fn inner() {
    }
    b"}\"";
}
"##;

    #[test]
    fn functions_are_measured_whatever_their_strings_hold() {
        let found: Vec<_> = functions(SAMPLE).into_iter().map(|f| (f.name, f.line, f.lines)).collect();
        let expected = [("one", 4, 6), ("given", 13, 1), ("outer", 18, 5), ("inner", 19, 2)];
        assert_eq!(found, expected.map(|(name, line, lines)| (name.to_owned(), line, lines)));
    }

    #[test]
    fn attributes_are_found_with_their_reasons() {
        assert_eq!(attributes(SAMPLE, "allow"), [(3, "allow(dead_code, reason = \"a [b]\")".to_owned())]);
        assert_eq!(attributes(SAMPLE, "ignore").len(), 1);
        assert_eq!(attributes("#![allow(x)]\n#[allowed]", "allow"), [(1, "allow(x)".to_owned())]);
    }

    #[test]
    fn blanking_keeps_every_line() {
        let code = code_only(SAMPLE);
        assert_eq!(code.lines().count(), SAMPLE.lines().count());
        assert_eq!(code.matches('{').count(), code.matches('}').count());
        assert!(!code.contains("not_this") && !code.contains("nested"));
    }
}
