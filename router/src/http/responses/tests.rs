//! Requests as chats, and every order of items and events.

use serde_json::{Map, Value, json};

use super::events::Events;
use super::reply::Echo;
use super::request::{Asked, INNER_NAMES, NAMES, translate};
use crate::http::error::{ApiError, Cause};
use crate::http::json::Fields;
use crate::http::openai::message::MessageDelta;
use crate::http::turn::{Narrator, TurnStop, TurnUsage};

fn asked(body: &Value) -> Asked {
    let Value::Object(map) = body else { panic!("an object") };
    translate(&Fields::new(map)).unwrap()
}

fn chat(body: Value) -> Map<String, Value> {
    asked(&body).translated.chat
}

fn weather() -> Value {
    json!({"type": "function", "name": "get_weather", "description": "d", "parameters": {"type": "object"}, "strict": true})
}

#[test]
fn a_conversation_of_items_is_a_chat() {
    let input = json!([
        {"role": "developer", "content": "Be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "let me see", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{\"x\":1}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
    ]);
    let function = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let text = |text: &str| json!({"type": "text", "text": text});
    let expected = json!([
        {"role": "system", "content": "Short"},
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": [text("let me see")], "tool_calls": [function("c1", "f", "{\"x\":1}"), function("c2", "g", "{}")]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": [text("two")]},
        {"role": "assistant", "content": null, "tool_calls": [function("c3", "f", "{}")]},
    ]);
    assert_eq!(chat(json!({"input": input, "instructions": "Short"}))["messages"], expected);
}

#[test]
fn fields_have_the_names_of_chat_completions() {
    let schema = json!({"type": "object"});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let body = json!({
        "input": "x", "max_output_tokens": 5, "temperature": 0.5, "top_p": 0.5, "stream": true, "parallel_tool_calls": false,
        "text": {"format": format}, "reasoning": {"effort": "low", "summary": "auto"}, "truncation": "auto", "tools": [weather()],
        "adapter_id": "a", "seed": 3, "stream_options": {"include_obfuscation": false}, "store": true, "unknown": 1,
        "include": ["reasoning.encrypted_content"],
    });
    let function = json!({"name": "get_weather", "description": "d", "parameters": {"type": "object"}, "strict": true});
    let expected = json!({
        "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.5, "stream": true,
        "parallel_tool_calls": false, "reasoning_effort": "low", "truncate_prompt_tokens": -1, "adapter_id": "a", "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}},
        "tools": [{"type": "function", "function": function}],
    });
    assert_eq!(Value::Object(chat(body.clone())), expected);
    let asked = asked(&body);
    assert_eq!(asked.text, json!({"format": format}), "repeated as it came");
    assert_eq!(asked.tools, json!([weather()]));
    assert_eq!(asked.reasoning, json!({"effort": "low", "summary": null}));
}

#[test]
fn a_choice_of_tools_is_a_chats_choice() {
    let named = json!({"type": "function", "function": {"name": "other"}});
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}});
    for (choice, of_chat) in [
        (json!("none"), json!("none")),
        (json!("required"), json!("required")),
        (json!({"type": "function", "name": "other"}), named),
        (
            json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}),
            allowed,
        ),
    ] {
        let asked = asked(&json!({"input": "x", "tools": [weather()], "tool_choice": choice}));
        assert_eq!(asked.translated.chat["tool_choice"], of_chat);
        assert_eq!(asked.tool_choice, choice, "repeated as it came");
    }
}

#[test]
fn an_error_of_the_chat_names_the_field_of_the_request() {
    let body =
        json!({"instructions": "i", "input": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]});
    let translated = asked(&body).translated;
    for (of_chat, here) in [
        ("messages[0].content", "instructions"),
        ("messages[2].content[0].type", "input[1].content[0].type"),
        ("messages", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("reasoning_effort", "reasoning.effort"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format", "text.format"),
        ("tools[1].function.parameters", "tools[1].parameters"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("tool_choice.allowed_tools.tools[0].function.name", "tool_choice.tools[0].name"),
        ("temperature", "temperature"),
        ("messages[9]", "input[9]"),
    ] {
        let error = translated.renamed(ApiError::invalid(of_chat, "right", "wrong"), NAMES, INNER_NAMES);
        assert_eq!(error.param.as_deref(), Some(here));
        assert_eq!(error.message, format!("`{here}` must be right; got wrong"));
    }
    let plain = ApiError::new(Cause::QueueFull, "full");
    assert_eq!(translated.renamed(plain.clone(), NAMES, INNER_NAMES), plain);
}

fn call(index: usize) -> MessageDelta {
    MessageDelta::CallStart { index, id: format!("call_{index}"), name: "get_weather".into() }
}

fn arguments(index: usize, text: &str) -> MessageDelta {
    MessageDelta::CallArguments { index, text: text.into() }
}

/// Everything that can be in a message, each in two pieces.
fn every_kind() -> Vec<MessageDelta> {
    vec![
        MessageDelta::Reasoning("hm".into()),
        MessageDelta::Reasoning("m".into()),
        MessageDelta::Content("he".into()),
        MessageDelta::Content("llo".into()),
        call(0),
        arguments(0, "{\"a\""),
        arguments(0, ":1}"),
        call(1),
        arguments(1, "{}"),
    ]
}

fn events(deltas: Vec<MessageDelta>, stop: &TurnStop) -> Vec<Value> {
    let mut events = Events::new(Echo::default());
    let mut text = events.begin(TurnUsage::default());
    text.extend(deltas.into_iter().map(|delta| events.delta(delta, Vec::new())));
    text +=
        &events.end(stop, TurnUsage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 9, reasoning_tokens: 2 });
    let data = |block: &str| serde_json::from_str(block.split_once("\ndata: ").unwrap().1).unwrap();
    text.split_terminator("\n\n").map(data).collect()
}

#[test]
fn every_kind_of_item_opens_grows_and_closes_in_order() {
    let events = events(every_kind(), &TurnStop::ToolCalls);
    let shown: Vec<_> = events
        .iter()
        .map(|event| {
            let kind = event["type"].as_str().unwrap().trim_start_matches("response.");
            let index = event.get("output_index").map_or(String::new(), |index| format!(" {index}"));
            let text = ["delta", "text", "arguments"].iter().find_map(|name| event[*name].as_str());
            format!("{kind}{index}{}", text.map_or(String::new(), |text| format!(" {text}")))
        })
        .collect();
    let expected = [
        "created",
        "in_progress",
        "output_item.added 0",
        "content_part.added 0",
        "reasoning_text.delta 0 hm",
        "reasoning_text.delta 0 m",
        "reasoning_text.done 0 hmm",
        "content_part.done 0",
        "output_item.done 0",
        "output_item.added 1",
        "content_part.added 1",
        "output_text.delta 1 he",
        "output_text.delta 1 llo",
        "output_text.done 1 hello",
        "content_part.done 1",
        "output_item.done 1",
        "output_item.added 2",
        "function_call_arguments.delta 2 {\"a\"",
        "function_call_arguments.delta 2 :1}",
        "function_call_arguments.done 2 {\"a\":1}",
        "output_item.done 2",
        "output_item.added 3",
        "function_call_arguments.delta 3 {}",
        "function_call_arguments.done 3 {}",
        "output_item.done 3",
        "completed",
    ];
    assert_eq!(shown, expected);
    let response = &events.last().unwrap()["response"];
    let output = response["output"].as_array().unwrap();
    let prefixes: Vec<_> = output.iter().map(|item| item["id"].as_str().unwrap().split('_').next().unwrap()).collect();
    assert_eq!(prefixes, ["rs", "msg", "fc", "fc"]);
    assert!(output.iter().all(|item| item["status"] == "completed"));
    let call = json!({"type": "function_call", "id": output[2]["id"], "call_id": "call_0", "name": "get_weather", "arguments": "{\"a\":1}", "status": "completed"});
    assert_eq!(output[2], call);
    let reasoning = json!({"type": "reasoning", "id": output[0]["id"], "summary": [], "content": [{"type": "reasoning_text", "text": "hmm"}], "status": "completed"});
    assert_eq!(output[0], reasoning);
    assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 2);
    // Whatever is said to be added is empty, and whatever is said to be done is what the response holds.
    for event in &events {
        let index = event["output_index"].as_u64().unwrap_or(0) as usize;
        match event["type"].as_str().unwrap() {
            "response.output_item.added" => {
                assert_eq!(event["item"]["status"], "in_progress");
                assert!(
                    matches!(event["item"].get("content").or(event["item"].get("arguments")), Some(v) if *v == json!([]) || *v == "")
                );
            }
            "response.output_item.done" => assert_eq!(event["item"], output[index]),
            "response.content_part.done" => assert_eq!(event["part"], output[index]["content"][0]),
            _ => {}
        }
    }
}

#[test]
fn what_the_limit_cut_off_is_incomplete() {
    let mut deltas = every_kind();
    deltas.truncate(6);
    let events = events(deltas, &TurnStop::Length);
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["incomplete_details"]["reason"], "max_output_tokens");
    let statuses: Vec<_> =
        last["response"]["output"].as_array().unwrap().iter().map(|item| item["status"].clone()).collect();
    assert_eq!(statuses, ["completed", "completed", "incomplete"]);
}
