use super::*;
use serde_json::json;

#[tokio::test]
async fn a_completion_stream_adds_up_to_the_whole_reply() {
    let body = |stream: bool| json!({"prompt": "a", "max_tokens": 64, "stop": ["é😀x"], "stream": stream});
    let whole = complete(&app(&Script::new()), body(false)).await;
    let events = events_of(&app(&Script::new()), "/v1/completions", body(true)).await;
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last, "[DONE]");
    let text: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["choices"][0]["text"]);
    let (end, before) = chunks.split_last().unwrap();
    assert_eq!(end["choices"][0]["finish_reason"], "stop");
    assert!(before.iter().all(|c| c["choices"][0]["finish_reason"].is_null() && c.get("usage").is_none()));
    assert!(chunks.iter().all(|c| c["id"] == chunks[0]["id"] && c["object"] == "text_completion"));
}

#[tokio::test]
async fn a_chat_stream_says_role_content_and_end() {
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}});
    let events = events_of(&app(&Script::new()), "/v1/chat/completions", body).await;
    let deltas: Vec<_> = events[..4].iter().map(|e| e["choices"][0]["delta"].clone()).collect();
    assert_eq!(
        deltas,
        [json!({"role": "assistant", "content": ""}), json!({"content": "h"}), json!({"content": "e"}), json!({})]
    );
    assert_eq!(events[3]["choices"][0]["finish_reason"], "length");
    assert!(events[..4].iter().all(|e| e.get("usage") == Some(&Value::Null)), "null until the last");
    assert_eq!(events[4]["choices"], json!([]));
    assert_eq!(events[4]["usage"]["completion_tokens"], 2);
    assert_eq!(events[5], "[DONE]");
    assert_eq!(events.len(), 6);
}

#[tokio::test]
async fn the_last_chat_chunk_has_an_empty_delta_and_the_end_tokens_logprob() {
    for logprobs in [false, true] {
        let body = json!({"messages": [{"role": "user", "content": "x"}], "logprobs": logprobs, "stream": true});
        let script = Script::new().reply_tokens([bytes_of("é"), vec![IM_END]].concat());
        let events = events_of(&app(&script), "/v1/chat/completions", body).await;
        let deltas: Vec<_> = events.iter().map(|e| e["choices"][0]["delta"].clone()).collect();
        assert_eq!(deltas[1..3], [json!({"content": "é"}), json!({})]);
        assert_eq!(events.len(), 4);
        let tokens = |event: &Value| event["choices"][0]["logprobs"]["content"].as_array().map(Vec::len);
        let expected = if logprobs { (Some(2), Some(1)) } else { (None, None) };
        assert_eq!((tokens(&events[1]), tokens(&events[2])), expected);
        assert_eq!(events[2]["choices"][0]["finish_reason"], "stop");
        let refusal = events[1]["choices"][0]["logprobs"].get("refusal");
        assert_eq!(refusal, logprobs.then_some(&Value::Null));
    }
}

#[tokio::test]
async fn continuous_usage_is_on_every_chunk() {
    let body =
        json!({"prompt": "a", "max_tokens": 2, "stream": true, "stream_options": {"continuous_usage_stats": true}});
    let events = events_of(&app(&Script::new()), "/v1/completions", body).await;
    let counts: Vec<_> = events.iter().filter_map(|e| e["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(counts, [1, 2, 2]);
}

#[tokio::test]
async fn a_stop_string_across_chunks_is_never_shown() {
    let script = Script::new().reply("one TWO three");
    let body = json!({"prompt": "a", "max_tokens": 13, "stop": ["TWO"], "stream": true});
    let events = events_of(&app(&script), "/v1/completions", body).await;
    let text: String = events.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "one ");
    assert_eq!(events[events.len() - 2]["choices"][0]["stop_reason"], "TWO");
    script.until_none_is_open().await;
}

#[tokio::test]
async fn streamed_logprobs_and_ids_are_all_there() {
    let body = |stream: bool| json!({"prompt": "xy", "max_tokens": 64, "logprobs": 1, "stream": stream, "echo": true, "return_token_ids": true});
    let whole = complete(&app(&Script::new()), body(false)).await;
    let events = events_of(&app(&Script::new()), "/v1/completions", body(true)).await;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let joined: Vec<_> =
            events.iter().filter_map(|c| c["choices"][0]["logprobs"][list].as_array()).flatten().cloned().collect();
        assert_eq!(Value::Array(joined), whole["choices"][0]["logprobs"][list], "{list}");
    }
    let ids: Vec<_> =
        events.iter().filter_map(|c| c["choices"][0]["token_ids"].as_array()).flatten().cloned().collect();
    assert_eq!(Value::Array(ids), whole["choices"][0]["token_ids"]);
    let text: String = events.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["text"]);
}

#[tokio::test]
async fn choices_of_several_prompts_keep_their_index() {
    let script = Script::new().reply("abcdef");
    script.inner.stagger.store(1, Ordering::SeqCst);
    let body = json!({"prompt": ["x", "y"], "n": 2, "max_tokens": 3, "stream": true});
    let events = events_of(&app(&script), "/v1/completions", body).await;
    for (index, text) in [(0, "abc"), (1, "bcd"), (2, "abc"), (3, "bcd")] {
        let of: Vec<_> = events.iter().filter(|e| e["choices"][0]["index"] == index).collect();
        let joined: String = of.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(joined, text);
        assert_eq!(of.last().unwrap()["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn a_failure_before_admission_is_a_status() {
    for (failure, status, code) in [
        (Failure::QueueFull { waiting: 9, limit: 9 }, 429, "queue_full"),
        (Failure::Draining, 503, "draining"),
        (Failure::TooLarge { needed: 9, total: 1 }, 400, "context_length_exceeded"),
    ] {
        let script = Script::new();
        *script.inner.refuse.lock().unwrap() = Some(failure);
        let (got, reply) = call(&app(&script), "/v1/completions", json!({"prompt": "a", "stream": true})).await;
        assert_eq!((got.as_u16(), reply["error"]["code"].as_str()), (status, Some(code)));
    }
    for stream in [false, true] {
        for (failure, status, code) in [
            (Failure::DeadlineExceeded, 504, "deadline_exceeded"),
            (Failure::ShardFault, 500, "shard_fault"),
            (Failure::Numerics("logits".into()), 500, "adapter_numerics"),
            (Failure::AdapterGone("a".into(), "b".into()), 503, "adapter_load_failed"),
        ] {
            let script = Script::new();
            *script.inner.fail_after.lock().unwrap() = Some((0, failure));
            let (got, reply) = call(&app(&script), "/v1/completions", json!({"prompt": "a", "stream": stream})).await;
            assert_eq!((got.as_u16(), reply["error"]["code"].as_str()), (status, Some(code)), "stream {stream}");
        }
    }
}

#[tokio::test]
async fn a_failure_in_a_stream_is_one_event_and_no_done() {
    let script = Script::new();
    *script.inner.fail_after.lock().unwrap() = Some((3, Failure::ShardFault));
    let events = events_of(&app(&script), "/v1/completions", json!({"prompt": "a", "stream": true})).await;
    assert_eq!(events.len(), 3);
    assert_eq!(events[2]["error"]["code"], "shard_fault");
    assert_eq!(events[2]["error"]["retryable"], true);
    assert_eq!(events[2]["error"]["request_id"].as_str().unwrap().len(), 32);
    script.until_none_is_open().await;
}

#[tokio::test]
async fn dropping_the_body_cancels_the_request() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let response =
        send(&app(&script), post("/v1/completions", json!({"prompt": "a", "stream": true}).to_string())).await;
    assert_eq!((response.status().as_u16(), script.open()), (200, 1));
    drop(response);
    script.until_none_is_open().await;
}

#[tokio::test]
async fn dropping_the_handler_cancels_the_request() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let app = app(&script);
    let waiting =
        tokio::spawn(
            async move { send(&app, post("/v1/completions", json!({"prompt": "a", "n": 3}).to_string())).await },
        );
    while script.open() == 0 {
        tokio::task::yield_now().await;
    }
    waiting.abort();
    script.until_none_is_open().await;
}

#[tokio::test]
async fn a_reader_that_stalls_is_cancelled() {
    let script = Script::new().reply(&"x".repeat(100));
    let mut config = RouterConfig::default();
    (config.limits.stalled_events, config.limits.stalled_timeout) = (4, Duration::from_millis(50));
    let app = app_with(&script, config);
    let response =
        send(&app, post("/v1/completions", json!({"prompt": "a", "max_tokens": 100, "stream": true}).to_string()))
            .await;
    script.until_none_is_open().await;
    let events = parse_events(&text_of(response).await);
    assert!(events.len() <= 5, "{} events", events.len());
    assert!(!events.contains(&json!("[DONE]")));
    let page = text_of(send(&app, Request::get("/metrics").body(Body::empty()).unwrap()).await).await;
    assert!(page.contains("loramux_stream_stalls_total 1\n"));
}

#[tokio::test]
async fn a_quiet_stream_is_pinged() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let mut config = RouterConfig::default();
    config.limits.ping_every = Duration::from_millis(20);
    let app = app_with(&script, config);
    let response =
        send(&app, post("/v1/completions", json!({"prompt": "a", "max_tokens": 1, "stream": true}).to_string())).await;
    let mut body = response.into_body();
    loop {
        let frame = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.unwrap().unwrap().unwrap();
        if frame.into_data().unwrap() == ": ping\n\n" {
            break;
        }
    }
}

#[tokio::test]
async fn a_drain_that_runs_out_ends_streams_with_an_error() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let app = app(&script);
    let response = send(&app, post("/v1/completions", json!({"prompt": "a", "stream": true}).to_string())).await;
    let other = tokio::spawn({
        let app = app.clone();
        async move { call(&app, "/v1/completions", json!({"prompt": "a"})).await }
    });
    while script.open() < 2 {
        tokio::task::yield_now().await;
    }
    app.begin_drain();
    app.end_requests();
    let events = parse_events(&text_of(response).await);
    assert_eq!(events.last().unwrap()["error"]["code"], "draining");
    let (status, reply) = other.await.unwrap();
    assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (503, Some("draining")));
    script.until_none_is_open().await;
}

#[tokio::test]
async fn an_interval_makes_chunks_of_so_many_tokens() {
    let app = app(&Script::new().reply("0123456789"));
    let texts = async |interval: Value| -> Vec<String> {
        let body = json!({"prompt": "x", "max_tokens": 10, "stream": true, "stream_interval": interval});
        let events = events_of(&app, "/v1/completions", body).await;
        let text = |event: &Value| event["choices"][0]["text"].as_str().map(str::to_owned);
        events.iter().filter_map(text).filter(|text| !text.is_empty()).collect()
    };
    assert_eq!(texts(json!(4)).await, ["0", "123", "4567", "89"]);
    assert_eq!(texts(Value::Null).await.len(), 10);
    for bad in [json!(0), json!(1025), json!("x")] {
        let (status, _) = call(&app, "/v1/completions", json!({"prompt": "x", "stream_interval": bad})).await;
        assert_eq!(status, 400);
    }
}
