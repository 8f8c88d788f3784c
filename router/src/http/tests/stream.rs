use std::future::Future;

use hyper::body::Body as HttpBody;
use serde_json::json;

use super::*;
use crate::http::openai::sse::EventSender;

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

#[tokio::test]
async fn every_chunk_has_the_members_of_the_last_in_their_order() {
    let reply = "a\"b\\\n\u{1}é\u{7f}😀";
    for (path, mut body) in [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})),
    ] {
        for usage in [false, true] {
            (body["max_tokens"], body["stream"]) = (json!(bytes_of(reply).len()), json!(true));
            body["stream_options"] = json!({"include_usage": usage});
            let app = app(&Script::new().reply(reply));
            let text = text_of(send(&app, post(path, body.to_string())).await).await;
            // The first chunk of a chat and the last of both are written in full.
            let full =
                text.split("\n\n").find(|event| event.contains("assistant") || event.contains("length")).unwrap();
            let mut read = String::new();
            for event in text.split("\n\n").filter(|event| event.contains("fingerprint") && !event.contains("[]")) {
                let choice = &parse_events(event)[0]["choices"][0];
                let piece = choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or("");
                read.push_str(piece);
                if piece.is_empty() {
                    continue;
                }
                let piece = serde_json::to_string(piece).unwrap();
                let expected = match path {
                    "/v1/completions" => {
                        full.replace("\"length\"", "null").replace("\"text\":\"\"", &format!("\"text\":{piece}"))
                    }
                    _ => full.replace("\"role\":\"assistant\",\"content\":\"\"", &format!("\"content\":{piece}")),
                };
                assert_eq!(event, expected);
            }
            assert_eq!(read, reply);
        }
    }
}

/// A stream of `app` with a producer of the test's own.
fn stream_of<P: Future<Output = ()> + Send + 'static>(app: &App, producer: impl FnOnce(EventSender) -> P) -> Body {
    let (events, stream) = EventSender::channel(app, None);
    stream.response(producer(events)).into_body()
}

async fn frame(body: &mut Body) -> Option<Result<String, String>> {
    let frame = tokio::time::timeout(Duration::from_secs(20), body.frame()).await.expect("a frame in time")?;
    Some(frame.map(|data| String::from_utf8(data.into_data().unwrap().to_vec()).unwrap()).map_err(|e| e.to_string()))
}

#[tokio::test]
async fn what_is_there_goes_out_in_one_piece_and_the_end_with_it() {
    let (go, told) = tokio::sync::oneshot::channel();
    let mut body = stream_of(&app(&Script::new()), async move |events: EventSender| {
        for event in ["a", "b"] {
            assert!(events.send(event).await.is_ok());
        }
        told.await.unwrap();
        assert!(events.send("c").await.is_ok());
    });
    assert_eq!(frame(&mut body).await.unwrap(), Ok("ab".into()));
    assert!(!HttpBody::is_end_stream(&body));
    go.send(()).unwrap();
    assert_eq!(frame(&mut body).await.unwrap(), Ok("c".into()));
    assert!(HttpBody::is_end_stream(&body), "so the last chunk and the end of the body are one write");
    assert!(frame(&mut body).await.is_none());
}

#[tokio::test]
async fn a_producer_that_panics_breaks_its_stream_alone() {
    let mut body = stream_of(&app(&Script::new()), async |events: EventSender| {
        assert!(events.send("a").await.is_ok());
        panic!("scripted");
    });
    assert_eq!(frame(&mut body).await.unwrap(), Ok("a".into()));
    assert!(frame(&mut body).await.unwrap().is_err(), "not an end that looks like one");
}

#[tokio::test]
async fn a_reader_that_comes_back_in_time_misses_nothing() {
    let mut config = RouterConfig::default();
    (config.limits.stalled_events, config.limits.stalled_timeout) = (4, Duration::from_secs(4));
    let sent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&sent);
    let mut body = stream_of(&app_with(&Script::new(), config), async move |events: EventSender| {
        for at in 0..40 {
            tokio::task::yield_now().await;
            assert!(events.send(at.to_string()).await.is_ok());
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    // Twice: a watch that took over has to give way, and to take over again.
    let mut read = String::new();
    for _ in 0..2 {
        let before = sent.load(Ordering::SeqCst);
        while sent.load(Ordering::SeqCst) < before + 4 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        read += &frame(&mut body).await.unwrap().unwrap();
    }
    while let Some(more) = frame(&mut body).await {
        read += &more.unwrap();
    }
    assert_eq!(read, (0..40).map(|at| at.to_string()).collect::<String>());
}
