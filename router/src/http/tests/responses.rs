//! `/v1/responses`, from the body to the events.

use super::*;
use serde_json::json;

const PATH: &str = "/v1/responses";

async fn streamed(script: &Script, body: Value) -> Vec<Value> {
    let response = send(&app(script), post(PATH, body.to_string())).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let text = text_of(response).await;
    assert!(!text.contains("[DONE]"), "Responses end with their last event");
    named_events(&text)
}

fn kinds(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

/// Ids and times are not the same twice.
fn without_ids(mut response: Value) -> Value {
    for name in ["id", "created_at", "completed_at"] {
        response[name] = json!(0);
    }
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = json!(0);
    }
    response
}

#[tokio::test]
async fn a_whole_response_has_the_agreed_shape() {
    let script = Script::new();
    let (status, reply) = call(&app(&script), PATH, json!({"input": "hi"})).await;
    assert_eq!(status, 200, "{reply}");
    assert!(reply["id"].as_str().unwrap().starts_with("resp_"));
    assert!(reply["output"][0]["id"].as_str().unwrap().starts_with("msg_"));
    assert!(reply["completed_at"].as_u64() >= reply["created_at"].as_u64());
    let prompt = script.last().prompt;
    assert_eq!(byte_level().decode(&prompt, false), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    let expected = json!({
        "id": 0, "object": "response", "created_at": 0, "status": "completed", "background": false, "completed_at": 0,
        "error": null, "incomplete_details": null, "instructions": null, "max_output_tokens": null, "metadata": {}, "model": "base",
        "output": [{"type": "message", "id": 0, "status": "completed", "role": "assistant",
                    "content": [{"type": "output_text", "text": "hello é😀", "annotations": [], "logprobs": []}]}],
        "parallel_tool_calls": true, "previous_response_id": null, "reasoning": {"effort": null, "summary": null},
        "service_tier": "default", "store": false, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
        "tools": [], "top_p": 1.0, "truncation": "disabled",
        "usage": {"input_tokens": prompt.len(), "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 2},
                  "output_tokens": 13, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt.len() + 13},
        "user": null,
    });
    assert_eq!(without_ids(reply), expected);
}

#[tokio::test]
async fn what_was_asked_for_is_repeated_and_reaches_the_engine() {
    let script = Script::new();
    let body = json!({
        "model": "base", "instructions": "Be brief", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "max_output_tokens": 4, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": 7, "metadata": {"a": "b"}, "user": "u",
        "store": true, "truncation": "disabled", "service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k",
        "max_tool_calls": 2, "text": {"verbosity": "low"}, "stream_options": {"include_obfuscation": false},
    });
    let (status, reply) = call(&app(&script), PATH, body).await;
    assert_eq!(status, 200, "{reply}");
    for (name, value) in [
        ("instructions", json!("Be brief")),
        ("max_output_tokens", json!(4)),
        ("temperature", json!(0.5)),
        ("top_p", json!(0.25)),
        ("metadata", json!({"a": "b"})),
        ("user", json!("u")),
        ("store", json!(false)),
        ("safety_identifier", json!("s")),
        ("prompt_cache_key", json!("k")),
        ("max_tool_calls", json!(2)),
        ("text", json!({"format": {"type": "text"}, "verbosity": "low"})),
        ("status", json!("incomplete")),
        ("incomplete_details", json!({"reason": "max_output_tokens"})),
    ] {
        assert_eq!(reply[name], value, "{name}");
    }
    assert_eq!(reply["output"][0]["status"], "incomplete");
    assert!(reply.get("completed_at").is_none(), "it was not completed");
    let request = script.last();
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed), (0.5, 0.25, 3, 7));
    assert_eq!(request.max_tokens, 4);
    let text = byte_level().decode(&request.prompt, false);
    assert!(text.starts_with("<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>"), "{text}");
}

#[tokio::test]
async fn events_come_in_order_and_say_what_the_whole_says() {
    for (limit, last) in [(64, "response.completed"), (3, "response.incomplete")] {
        let body = |stream: bool| json!({"input": "hi", "max_output_tokens": limit, "stream": stream});
        let events = streamed(&Script::new(), body(true)).await;
        let mut all = kinds(&events);
        let deltas = all.iter().filter(|kind| **kind == "response.output_text.delta").count();
        assert!(deltas > 1);
        all.dedup();
        let expected = [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            last,
        ];
        assert_eq!(all, expected);
        for (number, event) in events.iter().enumerate() {
            assert_eq!(event["sequence_number"], number);
        }
        let text: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
        let (_, whole) = call(&app(&Script::new()), PATH, body(false)).await;
        assert_eq!(text, whole["output"][0]["content"][0]["text"]);
        let response = events.last().unwrap()["response"].clone();
        assert_eq!(without_ids(response.clone()), without_ids(whole));
        let item = &response["output"][0];
        for event in &events[2..events.len() - 1] {
            let id = event.get("item_id").unwrap_or(&event["item"]["id"]);
            assert_eq!(*id, item["id"], "{event}");
            assert_eq!(event["output_index"], 0);
        }
        assert_eq!(events[0]["response"]["output"], json!([]));
        assert_eq!(events[2]["item"]["content"], json!([]));
        assert_eq!(events[events.len() - 2]["item"], *item);
        assert_eq!(events[events.len() - 4]["text"], text);
    }
}

#[tokio::test]
async fn logprobs_of_the_text_are_given_where_include_asks() {
    let body = |stream: bool| json!({"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1, "stream": stream});
    let script = || Script::new().reply_tokens([bytes_of("aé"), vec![IM_END]].concat());
    let (_, whole) = call(&app(&script()), PATH, body(false)).await;
    let logprobs = &whole["output"][0]["content"][0]["logprobs"];
    assert_eq!(logprobs.as_array().unwrap().len(), 3, "a, and the two bytes of é; the end shows nothing: {whole}");
    assert_eq!(
        logprobs[0],
        json!({"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -0.25, "bytes": [97]}]})
    );
    let events = streamed(&script(), body(true)).await;
    let joined: Vec<_> = events
        .iter()
        .filter(|e| e["type"] == "response.output_text.delta")
        .flat_map(|e| e["logprobs"].as_array().unwrap().clone())
        .collect();
    assert_eq!(json!(joined), *logprobs);
    let done = events.iter().find(|e| e["type"] == "response.output_text.done").unwrap();
    assert_eq!(done["logprobs"], *logprobs);
}

#[tokio::test]
async fn an_empty_answer_is_an_empty_message() {
    let script = Script::new().reply_tokens(vec![IM_END]);
    let (_, reply) = call(&app(&script), PATH, json!({"input": "hi"})).await;
    assert_eq!(reply["output"][0]["content"][0]["text"], "");
    let events = streamed(&script, json!({"input": "hi", "stream": true})).await;
    assert_eq!(kinds(&events).len(), 8, "no delta: {:?}", kinds(&events));
}

#[tokio::test]
async fn a_failure_in_a_stream_ends_it_with_failed_and_error() {
    let script = Script::new();
    *script.inner.fail_after.lock().unwrap() = Some((4, Failure::ShardFault));
    let events = streamed(&script, json!({"input": "hi", "stream": true})).await;
    let [.., failed, error] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((failed["type"].as_str(), error["type"].as_str()), (Some("response.failed"), Some("error")));
    assert_eq!(failed["response"]["status"], "failed");
    assert_eq!(failed["response"]["error"]["code"], "server_error");
    assert_eq!(failed["response"]["output"][0]["status"], "incomplete");
    assert_eq!(error["code"], "shard_fault");
    assert_eq!(error["sequence_number"], events.len() - 1);
    script.until_none_is_open().await;
    let script = Script::new();
    *script.inner.fail_after.lock().unwrap() = Some((0, Failure::DeadlineExceeded));
    for stream in [false, true] {
        let (status, reply) = call(&app(&script), PATH, json!({"input": "hi", "stream": stream})).await;
        assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (504, Some("deadline_exceeded")));
    }
}

#[tokio::test]
async fn a_client_that_leaves_or_stalls_cancels_and_a_drain_ends() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let body = json!({"input": "hi", "stream": true}).to_string();
    drop(send(&app(&script), post(PATH, body.clone())).await);
    script.until_none_is_open().await;
    let app_of_drain = app(&script);
    let response = send(&app_of_drain, post(PATH, body.clone())).await;
    let whole = tokio::spawn({
        let app = app_of_drain.clone();
        async move { call(&app, PATH, json!({"input": "hi"})).await }
    });
    while script.open() < 2 {
        tokio::task::yield_now().await;
    }
    app_of_drain.begin_drain();
    app_of_drain.end_requests();
    assert_eq!(named_events(&text_of(response).await).last().unwrap()["code"], "draining");
    assert_eq!(whole.await.unwrap().0, 503);
    script.until_none_is_open().await;
    let script = Script::new().reply(&"x".repeat(100));
    let mut config = RouterConfig::default();
    (config.limits.stalled_events, config.limits.stalled_timeout) = (4, Duration::from_millis(50));
    let app = app_with(&script, config);
    let response = send(&app, post(PATH, body)).await;
    script.until_none_is_open().await;
    assert!(!kinds(&named_events(&text_of(response).await)).contains(&"response.completed"));
}

/// Field, value, and the code and place of the refusal.
type Case = (&'static str, Value, &'static str, &'static str);

async fn are_refused(cases: Vec<Case>) {
    for (field, value, code, param) in cases {
        let script = Script::new();
        let mut body = json!({"input": "hi"});
        body[field] = value.clone();
        let (status, reply) = call(&app(&script), PATH, body).await;
        let error = &reply["error"];
        assert_eq!(
            (status.as_u16(), error["code"].as_str(), error["param"].as_str()),
            (400, Some(code), Some(param)),
            "{value}: {reply}"
        );
        assert!(
            code == "context_length_exceeded" || error["message"].as_str().unwrap().contains(&format!("`{param}`")),
            "{reply}"
        );
        assert!(script.inner.seen.lock().unwrap().is_empty(), "nothing invalid reaches the engine");
    }
}

#[tokio::test]
async fn bad_input_is_a_400_that_names_the_place() {
    are_refused(vec![
        ("input", Value::Null, "missing_field", "input"),
        ("input", json!(1), "invalid_value", "input"),
        ("input", json!([]), "invalid_value", "input"),
        ("input", json!([1]), "invalid_value", "input[0]"),
        ("input", json!([{}]), "missing_field", "input[0].type"),
        ("input", json!([{"type": "computer_call"}]), "invalid_value", "input[0].type"),
        ("input", json!([{"type": "item_reference", "id": "x"}]), "unsupported_parameter", "input[0]"),
        ("input", json!([{"role": "tool", "content": "x"}]), "invalid_value", "input[0].role"),
        ("input", json!([{"type": "message", "content": "x"}]), "missing_field", "input[0].role"),
        ("input", json!([{"role": "user"}]), "missing_field", "input[0].content"),
        (
            "input",
            json!([{"role": "user", "content": [{"type": "input_text"}]}]),
            "missing_field",
            "input[0].content[0].text",
        ),
        (
            "input",
            json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
            "invalid_value",
            "input[0].content[0].type",
        ),
        (
            "input",
            json!([{"type": "function_call", "name": "f", "arguments": "{}"}]),
            "missing_field",
            "input[0].call_id",
        ),
        ("input", json!([{"type": "function_call_output", "call_id": "c"}]), "missing_field", "input[0].output"),
    ])
    .await;
}

#[tokio::test]
async fn a_bad_setting_is_a_400_that_names_it() {
    are_refused(vec![
        ("instructions", json!(["x"]), "invalid_value", "instructions"),
        ("previous_response_id", json!("resp_1"), "unsupported_parameter", "previous_response_id"),
        ("conversation", json!("conv_1"), "unsupported_parameter", "conversation"),
        ("prompt", json!({"id": "p"}), "unsupported_parameter", "prompt"),
        ("background", json!(true), "unsupported_parameter", "background"),
        ("store", json!("yes"), "invalid_value", "store"),
        ("max_output_tokens", json!(0), "invalid_value", "max_output_tokens"),
        ("max_output_tokens", json!("1"), "invalid_value", "max_output_tokens"),
        ("max_output_tokens", json!(1000), "context_length_exceeded", "max_output_tokens"),
        ("temperature", json!(-1), "invalid_value", "temperature"),
        ("top_p", json!(1.5), "invalid_value", "top_p"),
        ("stream", json!("true"), "invalid_value", "stream"),
        ("truncation", json!("middle"), "invalid_value", "truncation"),
        ("include", json!(["everything"]), "invalid_value", "include[0]"),
        ("include", json!("message.output_text.logprobs"), "invalid_value", "include"),
        ("top_logprobs", json!(21), "invalid_value", "top_logprobs"),
        ("metadata", json!({"a": 1}), "invalid_value", "metadata"),
        ("metadata", json!({"a": "x".repeat(513)}), "invalid_value", "metadata"),
    ])
    .await;
    let (status, _) = call(&app(&Script::new()), PATH, json!({"input": "hi", "model": "nobody"})).await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn bad_reasoning_text_or_tools_are_a_400_that_names_the_place() {
    let tool = json!({"type": "function", "name": "f", "parameters": {"type": "object"}});
    are_refused(vec![
        ("reasoning", json!("high"), "invalid_value", "reasoning"),
        ("reasoning", json!({"effort": 3}), "invalid_value", "reasoning.effort"),
        ("text", json!({"format": {"type": "xml"}}), "invalid_value", "text.format.type"),
        ("text", json!({"format": {"type": "json_schema", "schema": {}}}), "missing_field", "text.format.name"),
        ("text", json!({"format": {"type": "json_schema", "name": "x"}}), "missing_field", "text.format.schema"),
        ("text", json!({"verbosity": "huge"}), "invalid_value", "text.verbosity"),
        ("tools", json!([{"type": "web_search"}]), "unsupported_parameter", "tools[0].type"),
        ("tools", json!([tool, {"type": "function"}]), "missing_field", "tools[1].name"),
        ("tool_choice", json!("maybe"), "invalid_value", "tool_choice"),
        ("tool_choice", json!({"type": "mcp"}), "invalid_value", "tool_choice.type"),
        ("tool_choice", json!({"type": "function"}), "missing_field", "tool_choice.name"),
        ("tool_choice", json!({"type": "allowed_tools", "tools": [{"name": "g"}]}), "invalid_value", "tool_choice"),
        ("n", json!(2), "invalid_value", "n"),
        ("adapters", json!(["a"]), "unsupported_parameter", "adapters"),
        ("top_k", json!(-2), "invalid_value", "top_k"),
    ])
    .await;
}

#[tokio::test]
async fn a_field_that_nobody_reads_is_named_or_refused() {
    let mut body = json!({"input": "hi"});
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
