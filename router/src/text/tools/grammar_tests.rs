//! Forced calls: what the grammar lets through, the reader reads as calls of the functions that were offered.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::{Function, Thought, ToolDelta, ToolFormat, ToolReader, grammar};
use crate::engine::{Allowed, Grammar};
use crate::text::grammar::GrammarSpec;
use crate::text::testing::{IM_END, byte_level, bytes_of};

fn functions() -> Vec<Function> {
    let city = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let sum = json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]});
    [("get_weather", city), ("add", sum)]
        .map(|(name, parameters)| Function { name: name.to_owned(), parameters })
        .into()
}

fn compile(format: ToolFormat, calls_max: usize, thought: Thought) -> Arc<dyn Grammar> {
    let text = grammar(format, &functions(), calls_max, thought, &|_| None);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let compiled = runtime.block_on(byte_level().compile_grammar(GrammarSpec::Lark(text.clone())));
    compiled.unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Does the grammar take `text` as a whole?
fn takes(grammar: &Arc<dyn Grammar>, text: &str) -> bool {
    let mut state = grammar.start();
    let has = |set: &[u32], token: u32| set.get(token as usize / 32).is_some_and(|w| w >> (token % 32) & 1 == 1);
    for token in bytes_of(text) {
        match state.next().unwrap() {
            Allowed::Tokens(set) if has(&set, token) => state.accept(token).unwrap(),
            _ => return false,
        }
    }
    match state.next().unwrap() {
        Allowed::End => true,
        Allowed::Tokens(set) => has(&set, IM_END),
    }
}

fn written(format: ToolFormat, calls: &[(&str, &str)]) -> String {
    format.write(calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())))
}

const FORMATS: [ToolFormat; 4] =
    [ToolFormat::Hermes, ToolFormat::LlamaJson, ToolFormat::Mistral, ToolFormat::MistralArgs];

#[test]
fn the_grammar_takes_calls_as_they_are_written_and_the_reader_reads_them() {
    let good = [("get_weather", r#"{"city": "Oslo"}"#), ("add", r#"{"a": 1, "b": -2}"#)];
    for format in FORMATS {
        let many = compile(format, usize::MAX, Thought::Never);
        let one = compile(format, 1, Thought::Never);
        for calls in [&good[..1], &good[1..], &good[..], &[good[0], good[0], good[1]]] {
            let text = written(format, calls);
            assert!(takes(&many, &text), "{format:?}: {text}");
            assert_eq!(takes(&one, &text), calls.len() == 1, "{format:?}: {text}");
            let names: Arc<[String]> = functions().into_iter().map(|function| function.name).collect();
            let mut reader = ToolReader::new(format, names, usize::MAX);
            let mut deltas = Vec::new();
            reader.push(&text, &mut deltas);
            reader.finish(&mut deltas);
            assert!(!deltas.iter().any(|delta| matches!(delta, ToolDelta::Text(_))), "{format:?}: {deltas:?}");
            assert_eq!(reader.whole_calls(), calls.len(), "{format:?}: {text}");
        }
        let bad = [
            ("get_weather", "{}"),
            ("get_weather", r#"{"city": 5}"#),
            ("get_weather", r#"{"city": "x", "more": 1}"#),
            ("add", r#"{"city": "Oslo"}"#),
            ("other", r#"{"a": 1}"#),
            ("add", r#"{ "a": 1}"#),
        ];
        for call in bad {
            assert!(!takes(&many, &written(format, &[call])), "{format:?}: {call:?}");
        }
        for text in ["", "Sure!", "{}"] {
            assert!(!takes(&many, text), "{format:?}: {text}");
        }
    }
}

#[test]
fn a_thought_may_come_before_a_forced_call() {
    for format in FORMATS {
        let call = written(format, &[("add", r#"{"a": 1}"#)]);
        let begun = compile(format, 1, Thought::Begun);
        let possible = compile(format, 1, Thought::Possible);
        let thought = format!("Hm, <b> 1 + 1?\nyes</think>\n\n{call}");
        assert!(takes(&begun, &thought), "{format:?}");
        assert!(!takes(&begun, &call), "the thought has to end first");
        assert!(takes(&possible, &format!("<think>{thought}")) && takes(&possible, &call), "{format:?}");
        assert!(!takes(&begun, &format!("Hm</think> Sure {call}")), "{format:?}");
    }
}

#[test]
fn marks_that_are_special_tokens_are_named_by_their_id() {
    let special = |text: &str| (text == ToolFormat::MISTRAL_START).then_some(5);
    let text = grammar(ToolFormat::Mistral, &functions(), 1, Thought::Never, &special);
    assert!(text.starts_with("start: <[5]> "), "{text}");
    let special = |text: &str| (text == "</think>").then_some(7);
    let text = grammar(ToolFormat::Hermes, &functions(), 1, Thought::Begun, &special);
    assert!(text.contains("<[7]>"), "{text}");
}

#[test]
fn what_the_schema_leaves_open_is_closed_unless_it_says_otherwise() {
    let closed = |schema: Json| super::forced::closed(&schema).get("additionalProperties").cloned();
    assert_eq!(closed(json!({"type": "object", "properties": {}})), Some(json!(false)));
    assert_eq!(closed(json!({"type": "object", "properties": {}, "additionalProperties": true})), Some(json!(true)));
    assert_eq!(closed(json!({"type": "object"})), None);
    assert_eq!(closed(json!({"type": "object", "properties": {}, "anyOf": [{}]})), None);
}
