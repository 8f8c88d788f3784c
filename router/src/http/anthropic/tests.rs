//! Requests as chats, and every order of blocks and events.

use serde_json::{Map, Value, json};

use super::events::Events;
use super::reply::{Head, whole};
use super::request::{INNER_NAMES, NAMES, Purpose, translate};
use crate::http::error::ApiError;
use crate::http::json::Fields;
use crate::http::openai::message::MessageDelta;
use crate::http::turn::{Narrator, Translated, TurnStop, TurnUsage, WholeTurn};

fn translated(body: &Value) -> Translated {
    let Value::Object(map) = body else { panic!("an object") };
    translate(&Fields::new(map), Purpose::Reply).unwrap()
}

fn chat(body: &Value) -> Map<String, Value> {
    translated(body).chat
}

fn text(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

fn with_messages(messages: Value) -> Value {
    json!({"model": "m", "max_tokens": 9, "messages": messages})
}

#[test]
fn messages_of_blocks_are_a_chat() {
    let mut body = with_messages(json!([
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "let me see"},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1, "a": 2}}, {"type": "tool_use", "id": "t2", "name": "g", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "two"}], "is_error": true},
            {"type": "tool_result", "tool_use_id": "t3"},
            {"type": "text", "text": "and now?"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t4", "name": "f", "input": {}}]},
    ]));
    body["system"] = json!([{"type": "text", "text": "s1"}, {"type": "text", "text": "s2"}]);
    let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let expected = json!([
        {"role": "system", "content": [text("s1"), text("s2")]},
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": [text("let me see")], "tool_calls": [call("t1", "f", "{\"x\":1,\"a\":2}"), call("t2", "g", "{}")],
         "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "t1", "content": [text("one")]},
        {"role": "tool", "tool_call_id": "t2", "content": [text("Error:"), text("two")]},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": [text("and now?")]},
        {"role": "assistant", "content": null, "tool_calls": [call("t4", "f", "{}")]},
    ]);
    let chat = chat(&body);
    assert_eq!(chat["messages"], expected);
    assert!(chat.get("continue_final_message").is_none(), "a call is not continued");
}

#[test]
fn fields_have_the_names_of_chat_completions() {
    let mut body = with_messages(json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "I"}]));
    for (name, value) in [
        ("temperature", json!(0.5)),
        ("top_p", json!(0.5)),
        ("top_k", json!(4)),
        ("stream", json!(true)),
        ("stop_sequences", json!(["a", "b"])),
        ("adapter_id", json!("p")),
        ("thinking", json!({"type": "enabled", "budget_tokens": 2000})),
        ("tools", json!([{"name": "f", "description": "d", "input_schema": {"type": "object"}}])),
        ("tool_choice", json!({"type": "tool", "name": "f", "disable_parallel_tool_use": true})),
        ("output_config", json!({"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "low"})),
        ("metadata", json!({"user_id": "u"})),
        ("service_tier", json!("auto")),
    ] {
        body[name] = value;
    }
    let expected = json!({
        "model": "m", "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 4, "stream": true, "stop": ["a", "b"],
        "adapter_id": "p", "continue_final_message": true, "add_generation_prompt": false,
        "messages": [{"role": "user", "content": [text("x")]}, {"role": "assistant", "content": [text("I")]}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
        "chat_template_kwargs": {"enable_thinking": true}, "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "output", "strict": true, "schema": {"type": "object"}}},
    });
    assert_eq!(Value::Object(chat(&body)), expected);
    for (choice, of_chat) in [("auto", "auto"), ("any", "required"), ("none", "none")] {
        body["tool_choice"] = json!({"type": choice});
        assert_eq!(chat(&body)["tool_choice"], of_chat);
    }
    body["thinking"] = json!({"type": "disabled"});
    let chat = chat(&body);
    assert_eq!(chat["chat_template_kwargs"], json!({"enable_thinking": false}));
    assert_eq!(chat["include_reasoning"], false);
}

#[test]
fn an_error_of_the_chat_names_the_field_of_the_request() {
    let mut body = with_messages(
        json!([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]),
    );
    body["system"] = json!("s");
    let translated = translated(&body);
    for (of_chat, here) in [
        ("messages[2].content", "messages[2].content"),
        ("messages[0].content", "system"),
        ("max_completion_tokens", "max_tokens"),
        ("stop", "stop_sequences"),
        ("stop_token_ids", "stop_token_ids"),
        ("tools[1].function.parameters", "tools[1].input_schema"),
        ("tools[1].function.name", "tools[1].name"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("continue_final_message", "messages"),
    ] {
        let error = translated.renamed(ApiError::invalid(of_chat, "right", "wrong"), NAMES, INNER_NAMES);
        assert_eq!(error.param.as_deref(), Some(here));
        assert!(error.message.starts_with(&format!("`{here}` must be")), "{}", error.message);
    }
}

fn call(index: usize) -> MessageDelta {
    MessageDelta::CallStart { index, id: format!("call_{index}"), name: "f".into() }
}

fn arguments(index: usize, text: &str) -> MessageDelta {
    MessageDelta::CallArguments { index, text: text.into() }
}

/// Everything that can be in a message, some of it in two pieces.
fn every_kind() -> Vec<MessageDelta> {
    vec![
        MessageDelta::Reasoning("hm".into()),
        MessageDelta::Content("he".into()),
        MessageDelta::Content("llo".into()),
        call(0),
        arguments(0, "{\"b\""),
        arguments(0, ":1.0,\"a\":2}"),
        call(1),
        call(2),
        arguments(2, "{\"cut"),
    ]
}

#[test]
fn every_kind_of_block_starts_grows_and_stops_in_order() {
    let mut events = Events::new(Head::new("m".into()));
    let usage = TurnUsage { prompt_tokens: 5, cached_tokens: 2, ..TurnUsage::default() };
    let mut out = events.begin(usage);
    out.extend(every_kind().into_iter().map(|delta| events.delta(delta, Vec::new())));
    out += &events.end(&TurnStop::ToolCalls, TurnUsage { completion_tokens: 7, ..usage });
    let data: Vec<Value> = out
        .split_terminator("\n\n")
        .map(|block| serde_json::from_str(block.split_once("\ndata: ").unwrap().1).unwrap())
        .collect();
    let expected = [
        json!({"type": "ping"}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}),
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}}),
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}}),
        json!({"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "he"}}),
        json!({"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "llo"}}),
        json!({"type": "content_block_stop", "index": 1}),
        json!({"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "toolu_0", "name": "f", "input": {}}}),
        json!({"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "{\"b\""}}),
        json!({"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ":1.0,\"a\":2}"}}),
        json!({"type": "content_block_stop", "index": 2}),
        json!({"type": "content_block_start", "index": 3, "content_block": {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}}),
        json!({"type": "content_block_stop", "index": 3}),
        json!({"type": "content_block_start", "index": 4, "content_block": {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}}}),
        json!({"type": "content_block_delta", "index": 4, "delta": {"type": "input_json_delta", "partial_json": "{\"cut"}}),
        json!({"type": "content_block_stop", "index": 4}),
        json!({"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null},
               "usage": {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 7}}),
        json!({"type": "message_stop"}),
    ];
    assert_eq!(data[0]["message"]["usage"]["input_tokens"], 3);
    assert_eq!(data[1..], expected);
}

#[test]
fn a_whole_message_holds_the_same_blocks() {
    let deltas = every_kind().into_iter().map(|delta| (delta, Vec::new())).collect();
    let turn = WholeTurn { deltas, stop: TurnStop::Length, usage: TurnUsage::default() };
    let body = String::from_utf8(whole(&Head::new("m".into()), turn)).unwrap();
    assert!(body.contains(r#""input":{"b":1.0,"a":2}"#), "arguments as the model wrote them: {body}");
    let message: Value = serde_json::from_str(&body).unwrap();
    let expected = json!([
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "hello"},
        {"type": "tool_use", "id": "toolu_0", "name": "f", "input": {"b": 1.0, "a": 2}},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
        {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
    ]);
    assert_eq!(message["content"], expected);
    assert_eq!(message["stop_reason"], "max_tokens");
}
