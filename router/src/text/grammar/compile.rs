//! From a rule to a compiled one.

use std::fmt::Display;

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::json;

use super::state::Compiled;
use super::{GrammarError, GrammarSpec, JsonSpace, gbnf, keywords, limits, regex, schema};

/// Compiles `spec` and computes what may come first.
///
/// # Errors
/// As [`crate::text::TextModel::compile_grammar`].
pub(super) fn compile(factory: &ParserFactory, spec: &GrammarSpec) -> Result<Compiled, GrammarError> {
    let parser = factory.create_parser(grammar(spec)?).map_err(|error| refused(spec, &error))?;
    let mut start = Matcher::new(Ok(parser));
    if let Some(warning) = start.grammar_warnings().first() {
        return Err(GrammarError(format!("the rule would be followed in part only: {warning}")));
    }
    let first = start.compute_mask().map_err(|error| refused(spec, &error))?;
    if first.is_zero() {
        return Err(nothing_matches());
    }
    try_out(&start).map_err(|error| refused(spec, &error))?;
    Ok(Compiled::new(start, factory.tok_env().tok_trie().eos_tokens().into()))
}

/// Goes a few tokens into the rule: most rules that are too large to be followed fail there, and the caller still hears why.
fn try_out(start: &Matcher) -> Result<(), impl Display + use<>> {
    let mut matcher = start.deep_clone();
    for _ in 0..limits::TRIED_TOKENS {
        if matcher.is_stopped() {
            break;
        }
        let step = matcher.compute_mask().and_then(|set| match set.first_bit_set() {
            Some(token) => matcher.consume_token(token as u32),
            None => Ok(()),
        });
        if step.is_err() && matcher.is_error() {
            return step;
        }
    }
    Ok(())
}

fn grammar(spec: &GrammarSpec) -> Result<TopLevelGrammar, GrammarError> {
    match spec {
        GrammarSpec::JsonObject => json_schema(&json!({"type": "object"}), &JsonSpace::Fixed),
        GrammarSpec::JsonSchema(schema) => json_schema(schema, &JsonSpace::Fixed),
        GrammarSpec::JsonSpaced { schema, space } => json_schema(schema, space),
        GrammarSpec::Regex(text) => Ok(TopLevelGrammar::from_lark(regex::lark_of_regex(text)?)),
        GrammarSpec::Choice(choices) => Ok(TopLevelGrammar::from_lark(regex::lark_of_choices(choices)?)),
        GrammarSpec::Lark(text) => Ok(TopLevelGrammar::from_lark(schema::prepare_in_lark(text)?)),
        GrammarSpec::Gbnf(text) => Ok(TopLevelGrammar::from_lark(gbnf::lark_of_gbnf(text)?)),
    }
}

fn json_schema(schema: &serde_json::Value, space: &JsonSpace) -> Result<TopLevelGrammar, GrammarError> {
    Ok(TopLevelGrammar::from_json_schema(schema::prepare(schema, space)?))
}

/// The library's error in our words.
fn refused(spec: &GrammarSpec, error: &impl Display) -> GrammarError {
    let text = plain(error);
    if text.contains("oneOf constraints are not supported") {
        let message = "`oneOf` is supported where no value can match two of its schemas (different types, or a required \
                       property with different constants); use `anyOf`";
        return GrammarError(message.into());
    }
    if text.contains("NoExtensionBias") || text.contains("Unsatisfiable schema") && text.len() < 24 {
        return nothing_matches();
    }
    if let Some(reason) = regex_reason(spec, &text) {
        return GrammarError(reason);
    }
    let text = once(text);
    let kind = match spec {
        GrammarSpec::JsonObject | GrammarSpec::JsonSchema(_) | GrammarSpec::JsonSpaced { .. } => "schema",
        GrammarSpec::Regex(_) => "regular expression",
        GrammarSpec::Choice(_) => "list of choices",
        GrammarSpec::Lark(_) | GrammarSpec::Gbnf(_) => "grammar",
    };
    // Of a text that the server wrote, a place in it says nothing.
    let own = matches!(spec, GrammarSpec::Lark(_));
    let text = if own { text.as_str() } else { without_place(&text) };
    let hint = match spec {
        GrammarSpec::Lark(written) if written.contains(":=") || !written.contains("start") => {
            " (read as Lark; the lines of a GBNF grammar begin with `name ::=`)"
        }
        _ => "",
    };
    GrammarError(format!("this {kind} cannot be used: {text}{hint}"))
}

/// What is wrong with a regular expression and where it is, if that is what the library complains about.
fn regex_reason(spec: &GrammarSpec, text: &str) -> Option<String> {
    const START: &str = "regex parse error:; ";
    const END: &str = "; error: ";
    let (front, rest) = text.split_once(START)?;
    let (pattern, reason) = rest.rsplit_once(END)?;
    Some(match spec {
        GrammarSpec::JsonSchema(schema) | GrammarSpec::JsonSpaced { schema, .. } => {
            match keywords::path_of_pattern(schema, pattern, "") {
                Some(path) => format!("`{path}`: {reason}"),
                None => format!("the pattern {pattern}: {reason}"),
            }
        }
        GrammarSpec::Lark(_) => {
            format!("this grammar cannot be used: {}{reason}", front.replace("(in regex)", "").replace(" :", ":"))
        }
        _ => format!("this regular expression cannot be used: {reason}"),
    })
}

/// The library wraps an error in another one that begins the same.
fn once(text: String) -> String {
    const OPENING: &str = "Unsatisfiable schema: ";
    match text.strip_prefix(OPENING) {
        Some(rest) => format!("{OPENING}{}", rest.replace(OPENING, "")),
        None => text,
    }
}

/// Without `at 4(14): `.
fn without_place(text: &str) -> &str {
    let is_place = |place: &str| place.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'(' | b')'));
    let rest = text.strip_prefix("at ").unwrap_or(text);
    match rest.split_once(": ") {
        Some((place, rest)) if is_place(place) => rest,
        _ => text,
    }
}

fn nothing_matches() -> GrammarError {
    GrammarError("no text can match this rule".into())
}

/// A line that is empty, points at a column, or repeats a line of the grammar (which is not the caller's own text).
fn is_picture(line: &str) -> bool {
    let repeated = line.split_once(" | ").is_some_and(|(number, _)| number.bytes().all(|byte| byte.is_ascii_digit()));
    repeated || line.bytes().all(|byte| matches!(byte, b'^' | b' '))
}

/// The library's message without its appendices.
pub(super) fn plain(error: &impl Display) -> String {
    let text = format!("{error:#}");
    let text = text.split("<non-verbose/>").next().unwrap_or("").split("<backtrace>").next().unwrap_or("");
    if text.starts_with("panic: ") {
        return "it is beyond what this server can compile".into();
    }
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !is_picture(line)).collect();
    let mut text = lines.join("; ");
    if text.len() > limits::MESSAGE_BYTES_MAX {
        let end = (0..=limits::MESSAGE_BYTES_MAX).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}
