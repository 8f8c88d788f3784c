//! Rules against texts: what a rule lets through, token by token.

use std::sync::Arc;

use serde_json::{Value as Json, json};
use tokio::sync::{Semaphore, oneshot};

use super::{CompileError, GrammarSpec, JsonSpace};
use crate::engine::{Allowed, Grammar};
use crate::text::TextModel;
use crate::text::testing::{IM_END, byte_level, bytes_of};

fn compile(spec: GrammarSpec) -> Result<Arc<dyn Grammar>, String> {
    compile_on(&byte_level(), spec)
}

fn compile_on(text: &TextModel, spec: GrammarSpec) -> Result<Arc<dyn Grammar>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(text.compile_grammar(spec)).map_err(|error| error.to_string())
}

fn has(set: &[u32], token: u32) -> bool {
    set.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// How a text fares: at which byte it leaves the rule, or whether it may end after the last one.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    LeavesAt(usize),
    Unfinished,
    Complete,
}

fn fate(grammar: &Arc<dyn Grammar>, text: &str) -> Fate {
    let mut state = grammar.start();
    for (at, token) in bytes_of(text).into_iter().enumerate() {
        match state.next().unwrap() {
            Allowed::Tokens(set) if has(&set, token) => state.accept(token).unwrap(),
            _ => return Fate::LeavesAt(at),
        }
    }
    match state.next().unwrap() {
        Allowed::End => Fate::Complete,
        Allowed::Tokens(set) if has(&set, IM_END) => Fate::Complete,
        Allowed::Tokens(_) => Fate::Unfinished,
    }
}

fn check(spec: GrammarSpec, complete: &[&str], refused: &[&str]) {
    let grammar = compile(spec.clone()).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
    for text in complete {
        assert_eq!(fate(&grammar, text), Fate::Complete, "{spec:?} and {text}");
    }
    for text in refused {
        assert_ne!(fate(&grammar, text), Fate::Complete, "{spec:?} and {text}");
    }
}

fn schema(schema: Json) -> GrammarSpec {
    GrammarSpec::JsonSchema(schema)
}

#[test]
fn each_kind_of_rule_lets_its_texts_through_and_no_others() {
    check(
        GrammarSpec::JsonObject,
        &["{}", r#"{"a": 1}"#, r#"{"a": [1, "x", null], "b": {"c": -2.5e3}}"#],
        &["[]", "1", "{", r#"{"a":1}"#, " {}", "{} ", "{\n}", r#"{"a": 01}"#],
    );
    check(GrammarSpec::Regex("[a-c]+[0-9]{2}".into()), &["a12", "abc99"], &["a1", "a123", "12", ""]);
    check(GrammarSpec::Regex(r"^\d+$|^x/y$".into()), &["1", "99", "x/y"], &["x", "1x", "٣"]);
    check(
        GrammarSpec::Choice(vec!["yes".into(), "yes, sir".into(), "n\"o\n".into()]),
        &["yes", "yes, sir", "n\"o\n"],
        &["ye", "no"],
    );
    check(GrammarSpec::Lark("start: \"a\" b+\nb: /[xy]/".into()), &["ax", "axyx"], &["a", "b"]);
    check(GrammarSpec::grammar("root ::= [a-z]+ | \"xyz!\"\n"), &["xya", "xyz", "xyz!", "a"], &["xyz!a", "", "A"]);
}

#[test]
fn the_end_is_allowed_where_the_text_may_end_and_forced_where_nothing_else_can_follow() {
    let grammar = compile(GrammarSpec::Regex("ab?".into())).unwrap();
    let mut state = grammar.start();
    let Allowed::Tokens(set) = state.next().unwrap() else { panic!() };
    assert!(!has(&set, IM_END));
    state.accept(bytes_of("a")[0]).unwrap();
    let Allowed::Tokens(set) = state.next().unwrap() else { panic!() };
    assert!(has(&set, IM_END) && has(&set, bytes_of("b")[0]) && !has(&set, bytes_of("a")[0]));
    let mut other = grammar.start();
    state.accept(bytes_of("b")[0]).unwrap();
    assert_eq!(state.next().unwrap(), Allowed::End);
    // States are apart, and an end token ends one.
    other.accept(bytes_of("a")[0]).unwrap();
    other.accept(IM_END).unwrap();
    assert_eq!(other.next().unwrap(), Allowed::End);
    assert!(other.accept(IM_END).is_err());
    assert!(grammar.start().accept(bytes_of("b")[0]).is_err());
}

#[test]
fn special_tokens_are_never_text() {
    let grammar = compile(GrammarSpec::Regex("(?s:.*)".into())).unwrap();
    let Allowed::Tokens(set) = grammar.start().next().unwrap() else { panic!() };
    assert!(has(&set, bytes_of("<")[0]));
    assert!(!has(&set, 0) && !has(&set, 1), "<|endoftext|> and <|im_start|> would be text");
    assert!(has(&set, IM_END), "the empty text may end");
}

#[test]
fn white_space_is_fixed_unless_the_request_frees_it() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"], "additionalProperties": false});
    let spaced = |space| GrammarSpec::JsonSpaced { schema: schema.clone(), space };
    let fixed = r#"{"a": [1, 2]}"#;
    let tight = r#"{"a":[1,2]}"#;
    let wide = "{ \"a\" :\n [ 1 ,2 ] }";
    check(spaced(JsonSpace::Fixed), &[fixed], &[tight, wide]);
    check(spaced(JsonSpace::Free), &[fixed, tight, wide], &[]);
    check(spaced(JsonSpace::Pattern("[ ]?".into())), &[fixed, tight], &[wide, r#"{"a":  [1]}"#]);
    assert!(compile(spaced(JsonSpace::Pattern(".*".into()))).is_err());
}

#[test]
fn what_the_library_would_ignore_or_get_wrong_is_refused_by_name() {
    let cases = [
        (json!({"not": {}}), "`/not`"),
        (json!({"properties": {"a": {"items": {"if": {}}}}}), "`/properties/a/items/if`"),
        (json!({"uniqueItems": true}), "`/uniqueItems`"),
        (json!({"anyOf": [{}, {"dependencies": {}}]}), "`/anyOf/1/dependencies`"),
        (json!({"type": "string", "format": "iri"}), "`iri`"),
        (json!({"const": 9_007_199_254_740_993_u64}), "9007199254740993"),
        (json!({"enum": []}), "`/enum`"),
        (json!({"minProperties": 2}), "`/minProperties`"),
        (json!({"multipleOf": 0}), "`/multipleOf`"),
        (json!({"allOf": 5}), "`/allOf`"),
        (json!({"items": 5}), "`/items`"),
        (json!({"$ref": "https://example.com/x"}), "example.com"),
        (json!({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "`oneOf`"),
        (json!({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (json!({"type": "integer", "minimum": 2, "maximum": 1}), "minimum"),
        (json!(false), "an object"),
        (json!({"$ref": "#"}), "no text"),
    ];
    for (rule, part) in cases {
        let error = compile(schema(rule.clone())).map(|_| ()).unwrap_err();
        assert!(error.contains(part), "{rule}: {error}");
        let inside = GrammarSpec::Lark(format!("start: \"a\" value // %json \nvalue: %json {rule}"));
        assert!(compile(inside).is_err(), "{rule} inside a grammar");
    }
}

#[test]
fn schemas_inside_a_grammar_are_held_as_elsewhere() {
    let rule = json!({"type": "object", "properties": {"d": {"type": "string", "format": "date"}}, "required": ["d"], "additionalProperties": false,
                      "x-guidance": {"whitespace_flexible": true}});
    let lark = format!("start: \"%json{{\" call /%json/\ncall: %json {rule}");
    check(
        GrammarSpec::Lark(lark),
        &[r#"%json{{"d": "2024-02-29"}%json"#],
        &[r#"%json{{"d":"2024-02-29"}%json"#, r#"%json{{"d": "2023-02-29"}%json"#, r#"%json{{"d": "0000-01-01"}%json"#],
    );
    check(schema(rule), &[r#"{"d": "2000-02-29"}"#], &[r#"{"d": "1900-02-29"}"#, r#"{"d": "2024-04-31"}"#]);
}

#[test]
fn a_key_has_one_spelling() {
    let rule =
        json!({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "null"}});
    check(schema(rule), &[r#"{"a": 1, "b": null}"#, r#"{"b": null}"#], &[r#"{"\u0061": null}"#, r#"{"a": null}"#]);
}

#[test]
fn a_rule_is_compiled_once_and_a_refusal_remembered() {
    let text = byte_level();
    let rule = |first: &str, second: &str| {
        schema(
            json!({"type": "object", "properties": {first: {"type": "null"}, second: {"type": "null"}}, "required": ["a", "b"], "additionalProperties": false}),
        )
    };
    let one = compile_on(&text, rule("a", "b")).unwrap();
    assert!(Arc::ptr_eq(&one, &compile_on(&text, rule("a", "b")).unwrap()));
    let other = compile_on(&text, rule("b", "a")).unwrap();
    assert!(!Arc::ptr_eq(&one, &other), "the order of properties is part of a rule");
    assert_eq!(fate(&other, r#"{"b": null, "a": null}"#), Fate::Complete);
    let bad = || compile_on(&text, GrammarSpec::Regex("[".into())).map(|_| ()).unwrap_err();
    assert_eq!(bad(), bad());
}

#[tokio::test]
async fn a_rule_waits_for_a_thread_for_a_second_and_no_longer() {
    let text = byte_level();
    let rule = |count: u32| GrammarSpec::Regex(format!("a{{{count}}}"));
    text.compile_grammar(rule(1)).await.unwrap();
    let workers = &text.inner.grammars.workers;
    let all = workers.available_permits();
    let taken = workers.acquire_many(all as u32).await.unwrap();
    assert_eq!(text.compile_grammar(rule(2)).await.map(|_| ()).unwrap_err(), CompileError::Busy);
    text.compile_grammar(rule(1)).await.unwrap(); // known: needs no thread
    drop(taken);
    text.compile_grammar(rule(2)).await.unwrap();
    assert_eq!(workers.available_permits(), all);
}

#[tokio::test]
async fn a_thread_that_is_late_gives_its_place_to_others_as_long_as_few_are_late() {
    let (workers, late) = (Arc::new(Semaphore::new(2)), Arc::new(Semaphore::new(1)));
    let mut threads = Vec::new();
    let mut waits = Vec::new();
    for _ in 0..2 {
        let (answer, answered) = oneshot::channel();
        threads.push(answer);
        let permit = Arc::clone(&workers).acquire_owned().await.unwrap();
        waits.push(super::in_time(answered, permit, Arc::clone(&late)));
    }
    for wait in waits {
        assert!(wait.await.unwrap_err().0.contains("one second"));
    }
    assert_eq!((workers.available_permits(), late.available_permits()), (1, 0));
    drop(threads);
    while (workers.available_permits(), late.available_permits()) != (2, 1) {
        tokio::task::yield_now().await;
    }
}

#[test]
fn what_would_take_gigabytes_or_for_ever_is_refused_by_its_limit() {
    let patterns: Vec<Json> = (b'a'..=b'z').map(|c| json!({"pattern": format!(".*{}.{{5}}.*", c as char)})).collect();
    let error = |spec| compile(spec).map(|_| ()).unwrap_err();
    assert!(error(schema(json!({"type": "string", "allOf": patterns}))).contains("more than 8 patterns"));
    let options = vec![json!({"$ref": "#/$defs/a"}); 40];
    let rule = json!({"oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}], "$defs": {"a": {"anyOf": options}}});
    assert!(!error(schema(rule)).contains("one second"));
    for (operator, first) in [(" & ", "/a/"), (" | ~", "~/a/")] {
        let terms = |count: usize| vec!["/[a-z]+/"; count].join(operator);
        let rule = |count| GrammarSpec::Lark(format!("start: T\nT: {first}{operator}{}", terms(count)));
        assert!(error(rule(20)).contains("more than 8 `&` and `~`"), "{operator}");
    }
    check(
        GrammarSpec::Lark("start: T ~ 2..3 /&~&~&~&~&~&~/?\nT: /[a-z]/ & ~/x/".into()),
        &["ab", "abc&~&~&~&~&~&~"],
        &["ax"],
    );
}

#[test]
fn a_refusal_says_where_and_why() {
    let within = |member: Json| schema(json!({"type": "object", "properties": {"a": member}, "required": ["a"]}));
    let regex = |text: &str| GrammarSpec::Regex(text.into());
    for (spec, message) in [
        (
            within(json!({"type": "int"})),
            "`/properties/a/type`: `int` is no type; the types are string, number, integer, boolean, object, array, null",
        ),
        (
            within(json!({"type": "string", "minLength": "5"})),
            "`/properties/a/minLength` must be a whole number, 0 or more",
        ),
        (
            within(json!({"pattern": "(?!x)a"})),
            "`/properties/a/pattern`: look-around, including look-ahead and look-behind, is not supported",
        ),
        (regex("[a"), "this regular expression cannot be used: unclosed character class"),
    ] {
        assert_eq!(compile(spec).map(|_| ()).unwrap_err(), message);
    }
    let unsatisfiable = within(json!({"type": "integer", "exclusiveMinimum": 4, "maximum": 1}));
    let error = compile(unsatisfiable).map(|_| ()).unwrap_err();
    assert_eq!(error.matches("nsatisfiable schema").count(), 1, "{error}");
    for (text, read_as_lark) in [("root := \"a\"", true), ("start: \"a", false)] {
        let error = compile(GrammarSpec::grammar(text)).map(|_| ()).unwrap_err();
        assert_eq!(error.contains("(read as Lark"), read_as_lark, "{error}");
    }
}
