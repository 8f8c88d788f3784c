//! Every text is read whole and under every cut; both must give the same.

use std::sync::Arc;

use proptest::prelude::*;

use super::{ToolDelta, ToolFormat, ToolReader};

fn names() -> Arc<[String]> {
    ["get_weather", "add", "a-b_C9"].map(str::to_owned).into()
}

/// What a reader makes of pieces: its text and its calls.
fn read(format: ToolFormat, pieces: &[&str], calls_max: usize) -> (String, Vec<(String, String)>, usize) {
    let mut reader = ToolReader::new(format, names(), calls_max);
    let mut deltas = Vec::new();
    for piece in pieces {
        let mut out = Vec::new();
        reader.push(piece, &mut out);
        deltas.extend(out);
    }
    reader.finish(&mut deltas);
    let (mut text, mut calls) = (String::new(), Vec::<(String, String)>::new());
    for delta in deltas {
        match delta {
            ToolDelta::Text(more) => text.push_str(&more),
            ToolDelta::Start { index, name } => {
                assert_eq!(index, calls.len(), "calls are counted from 0");
                calls.push((name, String::new()));
            }
            ToolDelta::Arguments { index, text } => calls[index].1.push_str(&text),
        }
    }
    (text, calls, reader.whole_calls())
}

#[track_caller]
fn check(format: ToolFormat, whole: &str, text: &str, calls: &[(&str, &str)]) {
    let expected: Vec<(String, String)> = calls.iter().map(|(n, a)| ((*n).to_owned(), (*a).to_owned())).collect();
    let got = read(format, &[whole], usize::MAX);
    assert_eq!((got.0.as_str(), &got.1), (text, &expected), "{whole}");
    for (at, _) in whole.char_indices() {
        let (head, tail) = whole.split_at(at);
        assert_eq!(read(format, &[head, tail], usize::MAX), got, "cut at {at}: {whole}");
    }
    let one_by_one: Vec<String> = whole.chars().map(String::from).collect();
    let pieces: Vec<&str> = one_by_one.iter().map(String::as_str).collect();
    assert_eq!(read(format, &pieces, usize::MAX), got, "one by one: {whole}");
}

const OSLO: (&str, &str) = ("get_weather", r#"{"city": "Oslo"}"#);

#[test]
fn hermes_calls_are_found() {
    use ToolFormat::Hermes;
    let one = r#"<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>"#;
    check(Hermes, one, "", &[OSLO]);
    check(Hermes, &format!("Let me see.\n{one}\n{one}\n"), "Let me see.", &[OSLO, OSLO]);
    check(Hermes, &format!("{one} And done. "), "And done. ", &[OSLO]);
    check(Hermes, &format!("First,\n{one}\n then"), "First,\n then", &[OSLO]);
    // The order of the members, other members, and arguments as text or absent.
    check(Hermes, r#"<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>"#, "", &[OSLO]);
    check(Hermes, r#"<tool_call>{"id":7,"name":"add","arguments":"{\"a\": 1}"}"#, "", &[("add", r#"{"a": 1}"#)]);
    check(Hermes, r#"<tool_call>{"name":"a-b_C9"}</tool_call>"#, "", &[("a-b_C9", "{}")]);
    check(Hermes, r#"<tool_call>{"name":"add","parameters":null}</tool_call>"#, "", &[("add", "{}")]);
    // Braces, quotes and marks inside strings are no structure.
    let nasty = r#"{"s": "}\"{</tool_call>\\", "n": [{"x": "]"}], "é": "日本"}"#;
    check(Hermes, &format!(r#"<tool_call>{{"name": "add", "arguments": {nasty}}}</tool_call>"#), "", &[("add", nasty)]);
    // Cut off by the length: what is there is given.
    check(Hermes, r#"<tool_call>{"name": "add", "arguments": {"a": "x"#, "", &[("add", r#"{"a": "x"#)]);
    assert_eq!(read(Hermes, &[r#"<tool_call>{"name": "add", "arguments": {"a": "x"#], 9).2, 0, "it is not whole");
    let cut = r#"<tool_call>{"name": "add", "arguments": {}}
</tool_c"#;
    check(Hermes, cut, "", &[("add", "{}")]);
    // A forgotten brace is no reason to lose the call.
    check(Hermes, r#"<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>"#, "", &[("add", r#"{"a": 1}"#)]);
}

#[test]
fn what_is_no_call_comes_out_unchanged() {
    use ToolFormat::{Hermes, LlamaJson, Mistral, MistralArgs};
    for text in [
        "",
        "  \n",
        "plain",
        "a < b <tool",
        "<tool_call>",
        "<tool_call>\nhello</tool_call>",
        " <tool_call>{}</tool_call> ",
        r#"<tool_call>{"name": "unknown", "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": 5, "arguments": {}}</tool_call>"#,
        r#"<tool_call>{"name": "add", "arguments": [1]}</tool_call>"#,
        r#"<tool_call>{"name": "add", "arguments": "no json"}</tool_call>"#,
        r#"<tool_call>{name: "add"}</tool_call>"#,
        r#"<tool_call>{"name": "add", "arguments""#,
        "<|python_tag|>print(1)",
        r#"{"name": "unknown", "parameters": {}}"#,
        r#"{"answer": [1, 2]}"#,
        r#"{"name": "add", "parameters": 3}"#,
        "[TOOL_CALLS]",
        "[TOOL_CALLS] unknown[ARGS]{}",
        r#"[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]"#,
        "[TOOL_CALLS]add[ARG]{}",
        "[1] is a list",
    ] {
        for format in [Hermes, LlamaJson, Mistral, MistralArgs] {
            check(format, text, text, &[]);
        }
    }
    check(Hermes, r#"<tool_call><tool_call>{"name":"add"}</tool_call>"#, "<tool_call>", &[("add", "{}")]);
    let fenced = "Use it so:\n```\n{\"name\": \"add\", \"parameters\": {}}\n```";
    check(LlamaJson, fenced, fenced, &[]);
}

#[test]
fn llama_calls_are_found() {
    use ToolFormat::LlamaJson;
    let one = r#"{"name": "get_weather", "parameters": {"city": "Oslo"}}"#;
    check(LlamaJson, one, "", &[OSLO]);
    check(LlamaJson, &format!(" \n{one}"), "", &[OSLO]);
    check(LlamaJson, &format!("<|python_tag|>{one}; {one};{one}"), "", &[OSLO, OSLO, OSLO]);
    check(LlamaJson, &format!("Well, <|python_tag|>{one}"), "Well,", &[OSLO]);
    let typed = r#"{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}"#;
    check(LlamaJson, typed, "", &[OSLO]);
    check(LlamaJson, &format!("{one}\nDone"), "Done", &[OSLO]);
}

#[test]
fn mistral_calls_are_found_in_both_forms() {
    use ToolFormat::{Mistral, MistralArgs};
    for format in [Mistral, MistralArgs] {
        let one = r#"{"name": "get_weather", "arguments": {"city": "Oslo"}}"#;
        check(format, &format!("[TOOL_CALLS] [{one}]"), "", &[OSLO]);
        check(format, &format!("Hm. [TOOL_CALLS][{one}, {one}]"), "Hm.", &[OSLO, OSLO]);
        check(format, &format!("[TOOL_CALLS][{one}] and more"), "and more", &[OSLO]);
        check(format, r#"[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}"#, "", &[OSLO]);
        check(format, r#"[TOOL_CALLS]get_weather{"city": "Oslo"}[TOOL_CALLS]add{}"#, "", &[OSLO, ("add", "{}")]);
        check(format, r#"[TOOL_CALLS] get_weather[CALL_ID]abc12[ARGS] {"city": "Oslo"}"#, "", &[OSLO]);
    }
}

#[test]
fn one_call_at_most_when_calls_may_not_be_parallel() {
    let one = r#"<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>"#;
    let (text, calls, _) = read(ToolFormat::Hermes, &[one, one, "x"], 1);
    assert_eq!((text.as_str(), calls.len()), ("x", 1));
}

#[test]
fn the_format_is_read_from_the_template() {
    for (source, format) in [
        ("{{ messages }}", ToolFormat::Hermes),
        ("..<tool_call>\n..", ToolFormat::Hermes),
        ("{{- \"<|python_tag|>\" + x }}", ToolFormat::LlamaJson),
        ("Environment: ipython .. \"parameters\": dictionary", ToolFormat::LlamaJson),
        ("{{ '[TOOL_CALLS] [' }}", ToolFormat::Mistral),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", ToolFormat::MistralArgs),
    ] {
        assert_eq!(ToolFormat::of_template(source), format, "{source}");
    }
}

#[test]
fn long_runs_are_read_in_time_linear_in_their_length() {
    let started = std::time::Instant::now();
    for unit in [" ", "<tool_call>", "<tool_call>{", "<tool_call>{\"a\":1,", "[TOOL_CALLS]["] {
        let text = unit.repeat(400_000 / unit.len());
        read(ToolFormat::Hermes, &[&text], 4);
        read(ToolFormat::Mistral, &[&text], 4);
    }
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

proptest! {
    #[test]
    fn a_text_gives_the_same_message_under_every_cut(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<tool_call>", "</tool_call>", "\n", " ", "{", "}", "\"name\"", ":", "\"add\"", ",", "\"arguments\"",
            "{\"a\": \"}\"}", "[TOOL_CALLS]", "[", "]", "[ARGS]", "add", "<|python_tag|>", ";", "text", "<", "é", "\\\"",
            "{\"name\": \"add\", \"parameters\": {\"x\": 1}}", "{\"name\": \"add\", \"arguments\": ",
        ]), 0..14),
        format in prop::sample::select(vec![
            ToolFormat::Hermes, ToolFormat::LlamaJson, ToolFormat::Mistral, ToolFormat::MistralArgs,
        ]),
        seed in any::<u64>(),
    ) {
        let whole = parts.concat();
        let expected = read(format, &[&whole], 2);
        // Cuts at random characters.
        let mut random = seed;
        let mut pieces = vec![String::new()];
        for c in whole.chars() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if random >> 62 == 0 {
                pieces.push(String::new());
            }
            pieces.last_mut().unwrap().push(c);
        }
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        prop_assert_eq!(read(format, &pieces, 2), expected.clone());
        // Where there is no call, nothing is lost.
        if expected.1.is_empty() {
            prop_assert_eq!(expected.0, whole);
        }
    }
}
