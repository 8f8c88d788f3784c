//! `/v1/messages` and `/v1/messages/count_tokens`, from the body to the events, and the errors that layers raise there.

use super::*;
use crate::access::KeyPolicy;
use crate::http::KeySpec;
use serde_json::json;

const PATH: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn hello() -> Value {
    json!({"model": "base", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]})
}

fn with(field: &str, value: Value) -> Value {
    let mut body = hello();
    body[field] = value;
    body
}

async fn streamed(script: &Script, mut body: Value) -> Vec<Value> {
    body["stream"] = json!(true);
    let response = send(&app(script), post(PATH, body.to_string())).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(response.headers()["request-id"], response.headers()["x-request-id"]);
    let text = text_of(response).await;
    assert!(!text.contains("[DONE]"));
    named_events(&text)
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_whole_message_has_the_agreed_shape() {
    let script = Script::new();
    let response = send(&app(&script), post(PATH, hello().to_string())).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["request-id"], response.headers()["x-request-id"]);
    assert_eq!(response.headers()["x-model-id"], "base");
    let mut reply = json_of(response).await;
    assert!(reply["id"].as_str().unwrap().starts_with("msg_"));
    reply["id"] = json!(0);
    let prompt = script.last().prompt;
    assert_eq!(byte_level().decode(&prompt, false), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    let expected = json!({
        "id": 0, "type": "message", "role": "assistant", "model": "base", "content": [{"type": "text", "text": "hello é😀"}],
        "stop_reason": "end_turn", "stop_sequence": null,
        "usage": {"input_tokens": prompt.len() - 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 13},
    });
    assert_eq!(reply, expected);
}

#[tokio::test]
async fn why_a_message_ended() {
    for (body, reason, sequence, text) in [
        (hello(), "end_turn", Value::Null, "hello é😀"),
        (with("max_tokens", json!(3)), "max_tokens", Value::Null, "hel"),
        (with("stop_sequences", json!(["x", "lo"])), "stop_sequence", json!("lo"), "hel"),
    ] {
        let (_, reply) = call(&app(&Script::new()), PATH, body.clone()).await;
        assert_eq!((&reply["stop_reason"], &reply["stop_sequence"]), (&json!(reason), &sequence));
        assert_eq!(reply["content"][0]["text"], text);
        let events = streamed(&Script::new(), body).await;
        let delta = &events[events.len() - 2];
        assert_eq!(delta["delta"], json!({"stop_reason": reason, "stop_sequence": sequence}));
        assert_eq!(delta["usage"]["output_tokens"], reply["usage"]["output_tokens"]);
    }
}

#[tokio::test]
async fn events_come_in_order_and_say_what_the_whole_says() {
    let events = streamed(&Script::new(), hello()).await;
    let mut all = kinds(&events);
    assert!(all.iter().filter(|kind| **kind == "content_block_delta").count() > 1);
    all.dedup();
    let expected = [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ];
    assert_eq!(all, expected);
    let message = &events[0]["message"];
    assert_eq!(message["content"], json!([]));
    assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&Value::Null, &Value::Null));
    assert!(message["usage"]["input_tokens"].as_u64().unwrap() > 0);
    assert_eq!(events[2]["content_block"], json!({"type": "text", "text": ""}));
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, "hello é😀");
    assert!(events.iter().filter_map(|event| event.get("index")).all(|index| *index == 0));
}

#[tokio::test]
async fn a_failure_in_a_stream_is_an_error_event() {
    let script = Script::new();
    *script.inner.fail_after.lock().unwrap() = Some((4, Failure::ShardFault));
    let events = streamed(&script, hello()).await;
    let error = events.last().unwrap();
    assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert_eq!(error["error"]["code"], "shard_fault");
    assert_eq!(error["request_id"].as_str().unwrap().len(), 32);
    assert!(!kinds(&events).contains(&"message_stop"));
    script.until_none_is_open().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_and_a_drain_ends() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let body = with("stream", json!(true)).to_string();
    drop(send(&app(&script), post(PATH, body.clone())).await);
    script.until_none_is_open().await;
    let app = app(&script);
    let response = send(&app, post(PATH, body)).await;
    app.begin_drain();
    app.end_requests();
    let events = named_events(&text_of(response).await);
    assert_eq!(events.last().unwrap()["error"]["type"], "overloaded_error");
    script.until_none_is_open().await;
}

#[tokio::test]
async fn errors_of_every_layer_have_anthropics_body() {
    let mut config = RouterConfig { keys: vec![KeySpec::plain(&"user".into())], ..RouterConfig::default() };
    config.limits.body_bytes = 300;
    let app = app_with(&Script::new(), config);
    let ask = |method: &str, path: &str, key: &str, body: String| {
        Request::builder().method(method).uri(path).header("x-api-key", key).body(Body::from(body)).unwrap()
    };
    let big = with("metadata", json!({"user_id": "x".repeat(400)})).to_string();
    for (request, status, kind) in [
        (ask("POST", PATH, "wrong", hello().to_string()), 401, "authentication_error"),
        (ask("POST", COUNT, "", hello().to_string()), 401, "authentication_error"),
        (ask("GET", PATH, "user", String::new()), 405, "invalid_request_error"),
        (ask("POST", "/v1/messages/batches", "user", String::new()), 404, "not_found_error"),
        (ask("POST", PATH, "user", with("model", json!("nobody")).to_string()), 404, "not_found_error"),
        (ask("POST", COUNT, "user", with("model", json!("nobody")).to_string()), 404, "not_found_error"),
        (ask("POST", PATH, "user", big), 413, "request_too_large"),
        (ask("POST", PATH, "user", "{".into()), 400, "invalid_request_error"),
    ] {
        let what = format!("{} {}", request.method(), request.uri());
        let response = send(&app, request).await;
        assert_eq!(response.status().as_u16(), status, "{what}");
        let id = response.headers()["request-id"].clone();
        let body = json_of(response).await;
        assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!(kind)), "{what}: {body}");
        assert_eq!(body["request_id"], id.to_str().unwrap());
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
    }
    for (failure, status, kind) in [
        (Failure::QueueFull { waiting: 9, limit: 9 }, 429, "rate_limit_error"),
        (Failure::Draining, 503, "overloaded_error"),
    ] {
        let script = Script::new();
        *script.inner.refuse.lock().unwrap() = Some(failure);
        let response = send(&super::app(&script), post(PATH, hello().to_string())).await;
        assert_eq!(response.status().as_u16(), status);
        assert!(response.headers().contains_key("retry-after"));
        assert_eq!(json_of(response).await["error"]["type"], kind);
    }
}

#[tokio::test]
async fn the_key_may_come_as_x_api_key_here_and_only_here() {
    let limited = KeyPolicy { requests_per_minute: Some(2), ..KeyPolicy::default() };
    let mut key = KeySpec::plain(&"user".into());
    key.policy = limited;
    let app = app_with(&Script::new(), RouterConfig { keys: vec![key], ..RouterConfig::default() });
    let ask = |path: &str, name: &str, value: &str| {
        let body = if path == PATH { hello() } else { json!({"prompt": "a", "max_tokens": 1}) };
        Request::post(path)
            .header(name, value)
            .header("anthropic-version", "2023-06-01")
            .body(Body::from(body.to_string()))
            .unwrap()
    };
    assert_eq!(send(&app, ask("/v1/completions", "x-api-key", "user")).await.status(), 401);
    assert_eq!(send(&app, ask("/v1/chat/completions", "x-api-key", "user")).await.status(), 401);
    assert_eq!(send(&app, ask(PATH, "x-api-key", "other")).await.status(), 401);
    assert_eq!(send(&app, ask(PATH, "x-api-key", "user")).await.status(), 200);
    assert_eq!(send(&app, ask(PATH, "authorization", "Bearer user")).await.status(), 200);
    let third = send(&app, ask(PATH, "x-api-key", "user")).await;
    assert_eq!(third.status(), 429, "it is the same key, with the same limits");
}

#[tokio::test]
async fn counted_tokens_are_those_of_the_prompt() {
    for body in [
        hello(),
        with("system", json!("Be brief")),
        with("messages", json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}])),
    ] {
        let script = Script::new();
        let (status, reply) = call(&app(&script), PATH, body.clone()).await;
        assert_eq!(status, 200, "{reply}");
        let mut counted = body;
        counted.as_object_mut().unwrap().remove("max_tokens");
        let (status, count) = call(&app(&script), COUNT, counted).await;
        assert_eq!((status.as_u16(), count), (200, json!({"input_tokens": script.last().prompt.len()})));
        assert_eq!(script.inner.seen.lock().unwrap().len(), 1, "counting asks the engine nothing");
    }
}

#[tokio::test]
async fn a_last_message_of_the_assistant_is_continued() {
    let script = Script::new();
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]);
    let (status, reply) = call(&app(&script), PATH, with("messages", messages)).await;
    assert_eq!(status, 200, "{reply}");
    let text = byte_level().decode(&script.last().prompt, false);
    assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nI am");
}

/// Field, value, and the code and place of the refusal.
type Case = (&'static str, Value, &'static str, &'static str);

async fn are_refused(cases: Vec<Case>) {
    for (field, value, code, param) in cases {
        let script = Script::new();
        let (status, reply) = call(&app(&script), PATH, with(field, value.clone())).await;
        let error = &reply["error"];
        assert_eq!(
            (status.as_u16(), error["code"].as_str(), error["param"].as_str()),
            (400, Some(code), Some(param)),
            "{value}: {reply}"
        );
        assert_eq!(error["type"], "invalid_request_error");
        assert!(
            code == "context_length_exceeded" || error["message"].as_str().unwrap().contains(&format!("`{param}`")),
            "{reply}"
        );
        assert!(script.inner.seen.lock().unwrap().is_empty(), "nothing invalid reaches the engine");
    }
}

#[tokio::test]
async fn bad_messages_are_a_400_that_names_the_place() {
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    are_refused(vec![
        ("model", Value::Null, "missing_field", "model"),
        ("max_tokens", Value::Null, "missing_field", "max_tokens"),
        ("max_tokens", json!(0), "invalid_value", "max_tokens"),
        ("max_tokens", json!(1000), "context_length_exceeded", "max_tokens"),
        ("messages", Value::Null, "missing_field", "messages"),
        ("messages", json!([]), "invalid_value", "messages"),
        ("messages", json!("hi"), "invalid_value", "messages"),
        ("messages", json!([{"role": "tool", "content": "x"}]), "invalid_value", "messages[0].role"),
        ("messages", json!([{"role": "user"}]), "missing_field", "messages[0].content"),
        ("messages", user(json!(1)), "invalid_value", "messages[0].content"),
        ("messages", user(json!([{"text": "x"}])), "missing_field", "messages[0].content[0].type"),
        ("messages", user(json!([{"type": "text"}])), "missing_field", "messages[0].content[0].text"),
        ("messages", user(json!([{"type": "image", "source": {}}])), "invalid_value", "messages[0].content[0].type"),
        ("messages", user(json!([{"type": "tool_use"}])), "invalid_value", "messages[0].content[0].type"),
        ("messages", user(json!([{"type": "tool_result"}])), "missing_field", "messages[0].content[0].tool_use_id"),
        (
            "messages",
            json!([{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]),
            "missing_field",
            "messages[0].content[0].id",
        ),
        ("system", json!(1), "invalid_value", "system"),
        ("system", json!([{"type": "image"}]), "invalid_value", "system[0].type"),
    ])
    .await;
}

#[tokio::test]
async fn a_bad_setting_is_a_400_that_names_it() {
    let tool = json!({"name": "f", "input_schema": {"type": "object"}});
    are_refused(vec![
        ("temperature", json!(1.01), "invalid_value", "temperature"),
        ("temperature", json!(-0.01), "invalid_value", "temperature"),
        ("top_p", json!(1.01), "invalid_value", "top_p"),
        ("top_k", json!(-1), "invalid_value", "top_k"),
        ("stop_sequences", json!("x"), "invalid_value", "stop_sequences"),
        ("stop_sequences", json!([1]), "invalid_value", "stop_sequences"),
        ("stop_sequences", json!([""]), "invalid_value", "stop_sequences"),
        ("stop_sequences", json!(vec!["x"; 17]), "invalid_value", "stop_sequences"),
        ("stream", json!(1), "invalid_value", "stream"),
        ("metadata", json!("me"), "invalid_value", "metadata"),
        ("container", json!("c"), "unsupported_parameter", "container"),
        ("mcp_servers", json!([{}]), "unsupported_parameter", "mcp_servers"),
        (
            "tools",
            json!([{"type": "web_search_20250305", "name": "web_search"}]),
            "unsupported_parameter",
            "tools[0].type",
        ),
        ("tools", json!([tool, {"name": "g"}]), "missing_field", "tools[1].input_schema"),
        ("tool_choice", json!("auto"), "invalid_value", "tool_choice"),
        ("tool_choice", json!({"type": "required"}), "invalid_value", "tool_choice.type"),
        ("tool_choice", json!({"type": "tool"}), "missing_field", "tool_choice.name"),
        ("thinking", json!({"type": "enabled"}), "missing_field", "thinking.budget_tokens"),
        ("thinking", json!({"type": "enabled", "budget_tokens": 10}), "invalid_value", "thinking.budget_tokens"),
        ("thinking", json!({"type": "deep"}), "invalid_value", "thinking.type"),
        ("output_config", json!({"effort": "utmost"}), "invalid_value", "output_config.effort"),
        ("output_config", json!({"format": {"type": "text"}}), "invalid_value", "output_config.format.type"),
        ("output_config", json!({"format": {"type": "json_schema"}}), "missing_field", "output_config.format.schema"),
        ("n", json!(2), "invalid_value", "n"),
        ("adapters", json!(["a"]), "unsupported_parameter", "adapters"),
    ])
    .await;
}

#[tokio::test]
async fn a_field_that_nobody_reads_is_named_or_refused() {
    let mut body = hello();
    (body["top_k"], body["surprise"]) = (json!(3), json!(1));
    let response = send(&app(&Script::new()), post(PATH, body.to_string())).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-ignored-fields"]),
        (200, &"surprise".parse().unwrap())
    );
    let strict = app_with(&Script::new(), RouterConfig { strict_fields: true, ..RouterConfig::default() });
    let (status, reply) = call(&strict, PATH, body).await;
    assert_eq!((status.as_u16(), &reply["error"]["param"]), (400, &json!("surprise")));
}
