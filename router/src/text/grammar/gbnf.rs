//! llama.cpp's grammars (GBNF) in Lark's notation.
//!
//! There, a rule ranges over characters; here, over words that a lexer cuts greedily. One word for each character makes both
//! the same: `"ab"` becomes `"a" "b"`.

use std::collections::HashMap;
use std::fmt::Write;

use super::GrammarError;
use super::regex::quoted;

/// Groups inside groups.
const DEPTH_MAX: usize = 64;
/// Times that something may be repeated by number.
const REPEAT_MAX: u32 = 10_000;

/// True if `text` is written in this notation: a line begins with a rule's name and `::=`.
pub(in crate::text) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| line.trim_start().trim_start_matches(name_char).trim_start().starts_with("::="))
}

fn name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

/// Translates a grammar; `root` is where it starts.
///
/// # Errors
/// What is malformed or not covered, and where.
pub(super) fn lark_of_gbnf(text: &str) -> Result<String, GrammarError> {
    let mut reader = Reader { text, at: 0, depth: 0, names: HashMap::new() };
    let mut rules: Vec<(String, String)> = Vec::new();
    reader.skip_blank();
    while reader.at < text.len() {
        let name = reader.name().ok_or_else(|| reader.fail("a rule's name is expected"))?.to_owned();
        reader.skip_blank();
        if !reader.eat("::=") {
            return Err(reader.fail("`::=` is expected"));
        }
        reader.skip_blank();
        let body = reader.alternatives()?;
        if rules.iter().any(|(known, _)| *known == name) {
            return Err(GrammarError(format!("the rule `{name}` is defined twice")));
        }
        rules.push((name, body));
    }
    if !rules.iter().any(|(name, _)| name == "root") {
        return Err(GrammarError("a rule `root` is required".into()));
    }
    if let Some(missing) = reader.names.keys().find(|used| !rules.iter().any(|(name, _)| name == *used)) {
        return Err(GrammarError(format!("the rule `{missing}` is used and not defined")));
    }
    let mut out = String::new();
    for (name, body) in &rules {
        let name = reader.lark_name(name);
        writeln!(out, "{name}: {body}").unwrap_or(()); // a string takes everything
    }
    Ok(out)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
    /// Names that were used, and what they are called there.
    names: HashMap<String, String>,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn eat(&mut self, word: &str) -> bool {
        let hit = self.rest().starts_with(word);
        self.at += if hit { word.len() } else { 0 };
        hit
    }

    fn next_char(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn fail(&self, what: &str) -> GrammarError {
        let line = self.text.get(..self.at).unwrap_or("").matches('\n').count() + 1;
        GrammarError(format!("line {line} of the grammar: {what}"))
    }

    /// Space, line ends and comments.
    fn skip_blank(&mut self) {
        loop {
            let rest = self.rest();
            let blank = rest.len() - rest.trim_start().len();
            self.at += blank;
            if self.peek() == Some('#') {
                self.at += self.rest().find('\n').unwrap_or(self.rest().len());
            } else if blank == 0 {
                return;
            }
        }
    }

    fn name(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let len = rest.find(|c| !name_char(c)).unwrap_or(rest.len());
        self.at += len;
        rest.get(..len).filter(|name| !name.is_empty())
    }

    /// Of a name at this place: is it the head of the next rule?
    fn at_rule(&self) -> bool {
        let rest = self.rest();
        let tail = rest.trim_start_matches(name_char);
        tail.len() < rest.len() && tail.trim_start().starts_with("::=")
    }

    fn lark_name(&mut self, name: &str) -> String {
        let fresh = if name == "root" { "start".to_owned() } else { format!("r{}", self.names.len()) };
        self.names.entry(name.to_owned()).or_insert(fresh).clone()
    }

    fn alternatives(&mut self) -> Result<String, GrammarError> {
        let mut out = self.sequence()?;
        while self.eat("|") {
            self.skip_blank();
            out.push_str(" | ");
            out.push_str(&self.sequence()?);
        }
        Ok(out)
    }

    fn sequence(&mut self) -> Result<String, GrammarError> {
        let mut items = Vec::new();
        while !self.at_rule() {
            let Some(item) = self.item()? else { break };
            items.push(item + &self.repetition()?);
            self.skip_blank();
        }
        Ok(if items.is_empty() { "\"\"".to_owned() } else { items.join(" ") })
    }

    fn item(&mut self) -> Result<Option<String>, GrammarError> {
        match self.peek() {
            Some('"') => self.literal().map(Some),
            Some('[') => self.class().map(Some),
            Some('.') => {
                self.at += 1;
                Ok(Some("/(?s:.)/".to_owned()))
            }
            Some('(') => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    return Err(self.fail("too many groups inside each other"));
                }
                self.at += 1;
                self.skip_blank();
                let inside = self.alternatives()?;
                if !self.eat(")") {
                    return Err(self.fail("`)` is expected"));
                }
                self.depth -= 1;
                Ok(Some(format!("({inside})")))
            }
            Some('<' | '!') => Err(self.fail("tokens by name or number are not supported; write their text")),
            Some(c) if name_char(c) => {
                let name = self.name().unwrap_or("");
                Ok(Some(self.lark_name(name)))
            }
            None | Some(')' | '|') => Ok(None),
            Some(c) => Err(self.fail(&format!("`{c}` is not expected"))),
        }
    }

    /// `*`, `+`, `?`, `{2}`, `{2,}`, `{2,5}`.
    fn repetition(&mut self) -> Result<String, GrammarError> {
        match self.peek() {
            Some(c @ ('*' | '+' | '?')) => {
                self.at += 1;
                Ok(c.to_string())
            }
            Some('{') => {
                let rest = self.rest();
                let inside =
                    rest.find('}').and_then(|end| rest.get(1..end)).ok_or_else(|| self.fail("`}` is expected"))?;
                self.at += inside.len() + 2;
                let number = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n <= REPEAT_MAX);
                let bad = || self.fail(&format!("a repetition is {{m}}, {{m,}} or {{m,n}}, up to {REPEAT_MAX}"));
                let (least, most) = inside.split_once(',').unwrap_or((inside, inside));
                let least = number(least).ok_or_else(bad)?;
                if most.trim().is_empty() {
                    return Ok(format!("{{{least},}}"));
                }
                let most = number(most).filter(|most| *most >= least.max(1)).ok_or_else(bad)?;
                Ok(format!("{{{least},{most}}}"))
            }
            _ => Ok(String::new()),
        }
    }

    fn literal(&mut self) -> Result<String, GrammarError> {
        self.at += 1;
        let mut words = Vec::new();
        while self.peek() != Some('"') {
            let c = self.character()?;
            words.push(quoted(c.encode_utf8(&mut [0; 4])));
        }
        self.at += 1;
        Ok(match words.as_slice() {
            [] => "\"\"".to_owned(),
            [word] => word.clone(),
            words => format!("({})", words.join(" ")),
        })
    }

    fn class(&mut self) -> Result<String, GrammarError> {
        self.at += 1;
        let mut out = String::from(if self.eat("^") { "/[^" } else { "/[" });
        let mut empty = true;
        while self.peek() != Some(']') {
            empty = false;
            let first = self.character()?;
            let range = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let last = if range {
                self.at += 1;
                self.character()?
            } else {
                first
            };
            if last < first {
                return Err(self.fail("a range of characters is upside down"));
            }
            write!(out, "\\u{{{:x}}}-\\u{{{:x}}}", u32::from(first), u32::from(last)).unwrap_or(());
        }
        self.at += 1;
        if empty { Err(self.fail("a class of characters is empty")) } else { Ok(out + "]/") }
    }

    /// One character of a literal or a class, with its escape.
    fn character(&mut self) -> Result<char, GrammarError> {
        let end = "a literal or a class is not closed";
        match self.next_char().ok_or_else(|| self.fail(end))? {
            '\\' => match self.next_char().ok_or_else(|| self.fail(end))? {
                'n' => Ok('\n'),
                'r' => Ok('\r'),
                't' => Ok('\t'),
                'x' => self.hex(2),
                'u' => self.hex(4),
                'U' => self.hex(8),
                c @ ('"' | '\\' | '[' | ']' | '-' | '^' | '/' | '\'') => Ok(c),
                c => Err(self.fail(&format!("the escape `\\{c}` is unknown"))),
            },
            '\n' => Err(self.fail(end)),
            c => Ok(c),
        }
    }

    fn hex(&mut self, digits: usize) -> Result<char, GrammarError> {
        let code =
            self.rest().get(..digits).and_then(|text| u32::from_str_radix(text, 16).ok()).and_then(char::from_u32);
        let code = code.ok_or_else(|| self.fail("an escape needs hexadecimal digits of a character"))?;
        self.at += digits;
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grammar_keeps_its_meaning_in_the_other_notation() {
        let lark = lark_of_gbnf(
            "# a list\nroot ::= item (\", \" item){0,3} end?\nitem ::= [a-z\\]]+ |\n  \"x\\n\"\nend ::= .\n",
        );
        let expected = "start: r0 ((\",\" \" \") r0){0,3} r1?\nr0: /[\\u{61}-\\u{7a}\\u{5d}-\\u{5d}]/+ | (\"x\" \"\\u000a\")\nr1: /(?s:.)/\n";
        // `root` is named when its rule is written, after the names it uses.
        assert_eq!(lark.unwrap(), expected);
        assert!(is_gbnf("  root ::= \"a\""));
        assert!(!is_gbnf("start: \"::=\"\nA: /x/"));
    }

    #[test]
    fn what_is_not_covered_is_named() {
        for (text, part) in [
            ("a ::= \"x\"", "`root`"),
            ("root ::= b", "`b` is used"),
            ("root ::= \"a\"\nroot ::= \"b\"", "twice"),
            ("root ::= <think>", "tokens by name"),
            ("root ::= \"a", "not closed"),
            ("root ::= [z-a]", "upside down"),
            ("root ::= (\"a\"", "`)`"),
            ("root ::= \"a\"{5,2}", "repetition"),
            ("root ::= \"a\"{99999}", "repetition"),
            ("root : \"a\"", "`::=`"),
            ("root ::= []", "empty"),
            ("root ::= \"\\q\"", "escape"),
            ("root ::= \"a\"\n= x", "line 2"),
        ] {
            let error = lark_of_gbnf(text).unwrap_err().0;
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(lark_of_gbnf(&format!("root ::= {}", "(".repeat(10_000))).is_err());
    }
}
