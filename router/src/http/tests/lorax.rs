use super::*;
use crate::http::KeySpec;
use secrecy::SecretString;
use serde_json::json;

async fn native(app: &App, path: &str, body: Value) -> (StatusCode, Value) {
    call(app, path, body).await
}

/// A reply of `/generate` that must be 200.
async fn generate(app: &App, parameters: Value) -> Value {
    let (status, reply) = native(app, "/generate", json!({"inputs": "hi", "parameters": parameters})).await;
    assert_eq!(status, 200, "{reply}");
    reply
}

/// An error of `/generate`, checked for its shape.
async fn refused(app: &App, body: Value) -> (u16, String, String) {
    let (status, reply) = native(app, "/generate", body).await;
    let keys: Vec<_> = reply.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["error", "error_type", "code"], "{reply}");
    let text = |name: &str| reply[name].as_str().unwrap().to_owned();
    (status.as_u16(), text("error_type"), text("error"))
}

fn token_texts(details: &Value) -> String {
    let tokens = details["tokens"].as_array().unwrap();
    tokens.iter().filter(|t| t["special"] == false).map(|t| t["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_reply_has_the_text_and_its_details() {
    let script = Script::new();
    let app = app(&script);
    assert_eq!(generate(&app, json!({})).await, json!({"generated_text": "hello é😀"}));
    let reply = generate(&app, json!({"details": true, "return_k_alternatives": 2, "top_n_tokens": 1})).await;
    let details = &reply["details"];
    assert_eq!(details["finish_reason"], "eos_token");
    assert_eq!(details["prompt_tokens"], 2);
    assert_eq!(details["seed"], Value::Null, "greedy: no seed was used");
    assert_eq!(details["prefill"], json!([]));
    assert_eq!(token_texts(details), "hello é😀", "texts of tokens add up");
    let tokens = details["tokens"].as_array().unwrap();
    assert_eq!(details["generated_tokens"], tokens.len());
    let last = tokens.last().unwrap();
    assert_eq!((&last["special"], &last["text"]), (&json!(true), &json!("<|im_end|>")));
    for token in tokens {
        assert_eq!(token["alternative_tokens"].as_array().unwrap().len(), 2, "{token}");
        assert_eq!((&token["skipped"], &token["logprob"]), (&json!(false), &json!(-0.25)));
    }
    let top = details["top_tokens"].as_array().unwrap();
    assert!(top.len() == tokens.len() && top.iter().all(|of| of.as_array().unwrap().len() == 1));
    let sampling = script.last().sampling;
    assert_eq!((sampling.temperature, sampling.logprobs), (0.0, Some(2)), "greedy unless asked otherwise");
}

#[tokio::test]
async fn prefill_full_text_and_template() {
    let script = Script::new();
    let app = app(&script);
    let reply = generate(&app, json!({"decoder_input_details": true, "return_full_text": true})).await;
    assert_eq!(reply["generated_text"], "hihello é😀");
    let prefill = reply["details"]["prefill"].as_array().unwrap();
    assert_eq!(prefill.len(), 2);
    assert_eq!((&prefill[0]["logprob"], &prefill[1]["logprob"]), (&Value::Null, &json!(-0.5)));
    assert_eq!((&prefill[0]["text"], &prefill[1]["text"]), (&json!("h"), &json!("i")));
    let plain = script.last().prompt.to_vec();
    generate(&app, json!({"apply_chat_template": true})).await;
    let chat = script.last().prompt.to_vec();
    assert!(chat.len() > plain.len() && chat.windows(2).any(|w| w == plain), "the input is a message: {chat:?}");
    generate(&app, json!({"truncate": 1})).await;
    assert_eq!(script.last().prompt.to_vec(), plain[1..], "the last tokens stay");
}

#[tokio::test]
async fn sampling_is_on_if_anything_asks_for_it() {
    let script = Script::new();
    let app = app(&script);
    for (parameters, temperature) in [
        (json!({"do_sample": true}), 1.0),
        (json!({"temperature": 0.5}), 0.5),
        (json!({"temperature": 0}), 0.0),
        (json!({"top_k": 3}), 1.0),
        (json!({"top_p": 0.5}), 1.0),
        (json!({"repetition_penalty": 1.2, "frequency_penalty": -2}), 0.0),
    ] {
        generate(&app, parameters.clone()).await;
        assert_eq!(script.last().sampling.temperature, temperature, "{parameters}");
    }
    let reply = generate(&app, json!({"do_sample": true, "seed": u64::MAX, "details": true})).await;
    assert_eq!(reply["details"]["seed"], u64::MAX);
    assert_eq!(script.last().sampling.seed, u64::MAX);
    let reply = generate(&app, json!({"do_sample": true, "details": true})).await;
    assert_eq!(reply["details"]["seed"], script.last().sampling.seed, "a seed of our own is told");
}

#[tokio::test]
async fn best_of_gives_the_best_and_the_others() {
    let script = Script::new();
    let app = app(&script);
    script.inner.stagger.store(2, Ordering::SeqCst);
    let reply = generate(&app, json!({"best_of": 3, "do_sample": true, "details": true})).await;
    assert_eq!(script.last().n, 3);
    assert_eq!(reply["generated_text"], "hello é😀", "the scripted logprobs fall with the index");
    let others = reply["details"]["best_of_sequences"].as_array().unwrap();
    let texts: Vec<_> = others.iter().map(|o| o["generated_text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["llo é😀", "o é😀"]);
    let seed = reply["details"]["seed"].as_u64().unwrap();
    assert_eq!(others[1]["seed"], seed + 2, "sequence i draws with seed + i");
    assert_eq!(token_texts(&others[0]), "llo é😀");
}

#[tokio::test]
async fn a_stop_sequence_ends_the_text_and_is_part_of_it() {
    let app = app(&Script::new().reply("one. two. three"));
    let reply = generate(&app, json!({"stop": [". t"], "details": true})).await;
    assert_eq!(reply["generated_text"], "one. t");
    assert_eq!(reply["details"]["finish_reason"], "stop_sequence");
    assert_eq!(token_texts(&reply["details"]), "one. t");
    let reply = generate(&app, json!({"max_new_tokens": 4, "details": true})).await;
    assert_eq!((&reply["generated_text"], &reply["details"]["finish_reason"]), (&json!("one."), &json!("length")));
}

#[tokio::test]
async fn a_stream_has_an_event_for_each_token_and_no_mark_at_the_end() {
    let script = Script::new();
    let app = app(&script);
    for (text, parameters, reason) in [
        (None, json!({}), "eos_token"),
        (None, json!({"max_new_tokens": 5}), "length"),
        (Some("one. two. three"), json!({"stop": [". t"]}), "stop_sequence"),
        (Some("one. x"), json!({"stop": [". t"], "max_new_tokens": 5}), "length"),
    ] {
        if let Some(text) = text {
            *script.inner.reply.lock().unwrap() = bytes_of(text);
        }
        let body = json!({"inputs": "hi", "parameters": parameters});
        let events = events_of(&app, "/generate_stream", body.clone()).await;
        let (status, whole) = native(&app, "/generate", body).await;
        assert_eq!(status, 200);
        let last = events.last().unwrap();
        assert_eq!(last["generated_text"], whole["generated_text"], "{reason}");
        assert_eq!(last["details"]["finish_reason"], reason);
        assert_eq!(last["details"]["generated_tokens"], events.len(), "one event for each token");
        let texts: String = events
            .iter()
            .filter(|event| event["token"]["special"] == false)
            .map(|event| event["token"]["text"].as_str().unwrap())
            .collect();
        assert_eq!(texts, whole["generated_text"].as_str().unwrap());
        for event in &events[..events.len() - 1] {
            assert_eq!((&event["generated_text"], &event["details"]), (&Value::Null, &Value::Null));
        }
    }
}

#[tokio::test]
async fn an_incomplete_character_at_the_end_is_in_the_last_token() {
    let mut tokens = bytes_of("aé");
    tokens.truncate(1);
    tokens.extend(bytes_of("é").first().map(|_| crate::text::testing::FIRST_BYTE + 0xC3));
    tokens.push(IM_END);
    let app = app(&Script::new().reply_tokens(tokens));
    let events = events_of(&app, "/generate_stream", json!({"inputs": "hi"})).await;
    let texts: Vec<_> = events.iter().map(|e| e["token"]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a", "\u{FFFD}", "<|im_end|>"]);
    assert_eq!(events[2]["generated_text"], "a\u{FFFD}");
}

#[tokio::test]
async fn the_compatible_route_answers_a_list_or_a_stream() {
    let app = app(&Script::new());
    let (status, reply) = native(&app, "/", json!({"inputs": "hi"})).await;
    assert_eq!((status.as_u16(), &reply), (200, &json!([{"generated_text": "hello é😀"}])));
    let events = events_of(&app, "/", json!({"inputs": "hi", "stream": true})).await;
    assert_eq!(events.last().unwrap()["generated_text"], "hello é😀");
    let (status, reply) = native(&app, "/generate", json!({"inputs": "hi", "stream": true})).await;
    assert!(status == 200 && reply.is_object(), "{reply}");
}

#[tokio::test]
async fn invocations_go_by_the_body() {
    let app = app(&Script::new());
    let (_, reply) = native(&app, "/invocations", json!({"inputs": "hi"})).await;
    assert!(reply.is_array(), "{reply}");
    let (_, reply) = native(&app, "/invocations", json!({"prompt": "hi"})).await;
    assert_eq!(reply["object"], "text_completion");
    let (_, reply) = native(&app, "/invocations", json!({"messages": [{"role": "user", "content": "hi"}]})).await;
    assert_eq!(reply["object"], "chat.completion");
    let (status, reply) = native(&app, "/invocations", json!({"prompt": "hi", "temperature": -1})).await;
    assert_eq!((status.as_u16(), &reply["error"]["param"]), (400, &json!("temperature")), "OpenAI's shape");
    let (status, reply) = native(&app, "/invocations", json!({"parameters": {}})).await;
    assert_eq!((status.as_u16(), &reply["error_type"]), (422, &json!("validation")), "{reply}");
}

#[tokio::test]
async fn errors_have_loraxs_shape_and_statuses() {
    let script = Script::new().load("bad", Load::Fails("adapter_rank_limit")).load("slow", Load::Slow(3, SLOW));
    let dir = adapter_dir(&["bad", "slow"]);
    let config = RouterConfig {
        adapter_dirs: vec![dir.path().to_owned()],
        adapter_load_timeout: Duration::from_millis(20),
        ..RouterConfig::default()
    };
    let app = app_with(&script, config);
    for parameters in [
        json!({"temperature": -1}),
        json!({"top_k": 0}),
        json!({"top_p": 0}),
        json!({"top_p": 1.5}),
        json!({"typical_p": 0.5}),
        json!({"typical_p": 1}),
        json!({"repetition_penalty": 0}),
        json!({"presence_penalty": 2.1}),
        json!({"max_new_tokens": 0}),
        json!({"max_new_tokens": 100_000}),
        json!({"stop": ["a", "b", "c", "d", "e"]}),
        json!({"stop": "a"}),
        json!({"truncate": 0}),
        json!({"watermark": true}),
        json!({"return_k_alternatives": 21}),
        json!({"return_k_alternatives": 0}),
        json!({"seed": -1}),
        json!({"seed": 1.5}),
        json!({"best_of": 0}),
        json!({"best_of": 9, "do_sample": true}),
        json!({"best_of": 2}),
        json!({"best_of": 2, "do_sample": true, "seed": 1}),
        json!({"response_format": {"type": "json_object", "schema": {"not": {}}}}),
        json!({"grammar": {"type": "json"}}),
        json!({"adapters": ["bad"]}),
        json!({"adapter_id": "base"}),
        json!({"adapter_source": "ftp"}),
        json!([]),
    ] {
        let (status, kind, text) = refused(&app, json!({"inputs": "hi", "parameters": parameters})).await;
        assert_eq!((status, kind.as_str()), (422, "validation"), "{parameters}: {text}");
        assert!(text.starts_with("Input validation error: "), "{text}");
    }
    for body in [json!({}), json!({"inputs": ""}), json!({"inputs": 1})] {
        assert_eq!(refused(&app, body).await.0, 422);
    }
    for (adapter, code) in [("nope", "model_not_found"), ("bad", "adapter_rank_limit"), ("slow", "adapter_loading")] {
        let body = json!({"inputs": "hi", "parameters": {"adapter_id": adapter}});
        let (status, reply) = native(&app, "/generate", body).await;
        assert_eq!((status.as_u16(), &reply["error_type"], &reply["code"]), (424, &json!("generation"), &json!(code)));
        assert!(reply["error"].as_str().unwrap().starts_with("Request failed during generation: "));
    }
    let response = send(&app, post("/generate", "{")).await;
    assert_eq!(response.status(), 422, "malformed JSON");
    assert_eq!(json_of(response).await["code"], "invalid_json");
    *script.inner.refuse.lock().unwrap() = Some(Failure::QueueFull { waiting: 2, limit: 1 });
    let response = send(&app, post("/generate", json!({"inputs": "hi"}).to_string())).await;
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (429, &"1".parse().unwrap()));
    let reply = json_of(response).await;
    assert_eq!((&reply["error"], &reply["error_type"]), (&json!("Model is overloaded"), &json!("overloaded")));
    script.inner.ready.store(false, Ordering::SeqCst);
    let (status, kind, _) = refused(&app, json!({"inputs": "hi"})).await;
    assert_eq!((status, kind.as_str()), (503, "healthcheck"));
}

const SLOW: Duration = Duration::from_secs(20);

#[tokio::test]
async fn an_error_in_a_stream_is_its_last_event() {
    let script = Script::new();
    let app = app(&script);
    *script.inner.fail_after.lock().unwrap() = Some((4, Failure::ShardFault));
    let events = events_of(&app, "/generate_stream", json!({"inputs": "hi"})).await;
    let last = events.last().unwrap();
    assert_eq!((&last["error_type"], &last["code"]), (&json!("generation"), &json!("shard_fault")), "{last}");
    assert!(events.len() > 1 && events[0]["token"].is_object());
    *script.inner.fail_after.lock().unwrap() = Some((0, Failure::ShardFault));
    let (status, reply) = native(&app, "/generate_stream", json!({"inputs": "hi"})).await;
    assert_eq!(
        (status.as_u16(), &reply["code"]),
        (424, &json!("shard_fault")),
        "a status of its own before the stream"
    );
    script.until_none_is_open().await;
}

#[tokio::test]
async fn a_key_is_needed_for_every_route_that_generates() {
    let key = SecretString::from("secret");
    let app = app_with(&Script::new(), RouterConfig { keys: vec![KeySpec::plain(&key)], ..RouterConfig::default() });
    for path in ["/", "/generate", "/generate_stream", "/invocations"] {
        let (status, reply) = native(&app, path, json!({"inputs": "hi"})).await;
        assert_eq!((status.as_u16(), &reply["error_type"]), (401, &json!("authentication")), "{path}");
    }
    let info = Request::get("/info").body(Body::empty()).unwrap();
    assert_eq!(send(&app, info).await.status(), 401);
    let mut request = post("/", json!({"inputs": "hi"}).to_string());
    request.headers_mut().insert("authorization", "Bearer secret".parse().unwrap());
    assert_eq!(send(&app, request).await.status(), 200);
    assert_eq!(send(&app, Request::get("/").body(Body::empty()).unwrap()).await.status(), 200, "health stays open");
}

#[tokio::test]
async fn headers_say_how_long_it_took_and_what_answered() {
    let script = Script::new().load("sql", Load::Ready(1));
    let dir = adapter_dir(&["sql"]);
    let app = app_with(&script, RouterConfig { adapter_dirs: vec![dir.path().to_owned()], ..RouterConfig::default() });
    let body = json!({"inputs": "hé", "parameters": {"adapter_id": "sql", "adapter_source": "local"}});
    let response = send(&app, post("/generate", body.to_string())).await;
    let headers = response.headers();
    for name in [
        "x-compute-time",
        "x-total-time",
        "x-prompt-tokens",
        "x-generated-tokens",
        "x-skipped-tokens",
        "x-total-tokens",
        "x-validation-time",
        "x-queue-time",
        "x-inference-time",
        "x-time-per-token",
        "x-time-to-first-token",
        "x-time-per-output-token",
    ] {
        assert!(headers[name].to_str().unwrap().parse::<u64>().is_ok(), "{name}");
    }
    let generated = headers["x-generated-tokens"].to_str().unwrap().parse::<u64>().unwrap();
    let prompt = headers["x-prompt-tokens"].to_str().unwrap().parse::<u64>().unwrap();
    assert_eq!(headers["x-total-tokens"].to_str().unwrap().parse::<u64>().unwrap(), prompt + generated);
    assert_eq!(
        (&headers["x-compute-characters"], &headers["x-model-id"]),
        (&"2".parse().unwrap(), &"base".parse().unwrap())
    );
    assert_eq!(
        (&headers["x-adapter-id"], &headers["x-adapter-source"]),
        (&"sql".parse().unwrap(), &"local".parse().unwrap())
    );
    let response = send(&app, post("/generate_stream", body.to_string())).await;
    assert!(response.headers().contains_key("x-compute-characters") && response.headers().contains_key("x-adapter-id"));
}

#[tokio::test]
async fn a_merge_is_checked_at_the_edge() {
    let script = Script::new().load("a", Load::Ready(1)).load("b", Load::Ready(2));
    let dir = adapter_dir(&["a", "b"]);
    let app = app_with(&script, RouterConfig { adapter_dirs: vec![dir.path().to_owned()], ..RouterConfig::default() });
    let merge = |merge: Value| json!({"inputs": "hi", "parameters": {"merged_adapters": merge}});
    for bad in [
        json!({}),
        json!({"ids": []}),
        json!({"ids": ["a", "b"], "weights": [1.0]}),
        json!({"ids": ["a", "b"], "weights": [1.0, "x"]}),
        json!({"ids": ["a", "b"], "weights": [1.0, 1e9]}),
        json!({"ids": ["a"], "merge_strategy": "magic"}),
        json!({"ids": ["a"], "merge_strategy": "ties"}),
        json!({"ids": ["a"], "merge_strategy": "dare_ties", "density": 0}),
        json!({"ids": ["a"], "merge_strategy": "dare_linear", "density": 1.1}),
        json!({"ids": ["a"], "majority_sign_method": "most"}),
        json!({"ids": ["a", "base"], "weights": [1, 1]}),
        json!({"ids": ["a", "a b"], "weights": [1, 1]}),
        json!({"ids": vec!["a"; 9]}),
        json!("a"),
    ] {
        let (status, kind, text) = refused(&app, merge(bad.clone())).await;
        assert_eq!((status, kind.as_str()), (422, "validation"), "{bad}: {text}");
    }
    let both = json!({"inputs": "hi", "parameters": {"adapter_id": "a", "merged_adapters": {"ids": ["b"]}}});
    let (status, _, text) = refused(&app, both).await;
    assert!(status == 422 && text.contains("exclude each other"), "{text}");
    assert_eq!(script.inner.load_count.load(Ordering::SeqCst), 0, "nothing was loaded");
}

#[tokio::test]
async fn info_says_what_is_served() {
    let app = app(&Script::new());
    let response = send(&app, Request::get("/info").body(Body::empty()).unwrap()).await;
    let info = json_of(response).await;
    assert_eq!((&info["model_id"], &info["max_total_tokens"]), (&json!("base"), &json!(CONTEXT)));
    assert_eq!((&info["max_input_length"], &info["max_best_of"]), (&json!(CONTEXT - 1), &json!(8)));
    assert_eq!(info.as_object().unwrap().len(), 20);
}

#[tokio::test]
async fn a_dropped_stream_ends_its_run() {
    let script = Script::new();
    script.inner.hang.store(true, Ordering::SeqCst);
    let app = app(&script);
    let response = send(&app, post("/generate_stream", json!({"inputs": "hi"}).to_string())).await;
    assert_eq!((response.status().as_u16(), script.open()), (200, 1));
    drop(response);
    script.until_none_is_open().await;
}

#[tokio::test]
async fn tokens_come_before_the_end_is_known() {
    let script = Script::new().reply("abc");
    script.inner.hang.store(true, Ordering::SeqCst); // and no end comes
    let app = app(&script);
    let body = json!({"inputs": "hi", "parameters": {"max_new_tokens": 3}});
    let response = send(&app, post("/generate_stream", body.to_string())).await;
    let mut stream = response.into_body();
    for text in ["a", "b"] {
        let frame = tokio::time::timeout(Duration::from_secs(5), stream.frame()).await.expect("a token comes at once");
        let data = frame.unwrap().unwrap().into_data().unwrap();
        let event: Value = serde_json::from_slice(data.strip_prefix(b"data: ").unwrap()).unwrap();
        assert_eq!(event["token"]["text"], text);
    }
}

#[tokio::test]
async fn the_base_answers_for_a_cold_adapter_if_both_sides_want_that() {
    let script = Script::new().load("slow", Load::Slow(3, SLOW)).load("bad", Load::Fails("adapter_rank_limit"));
    let dir = adapter_dir(&["slow", "bad"]);
    let config = |allow_base_fallback| RouterConfig {
        adapter_dirs: vec![dir.path().to_owned()],
        allow_base_fallback,
        ..RouterConfig::default()
    };
    let app = app_with(&script, config(true));
    let asked = |adapter: &str| json!({"model": adapter, "prompt": "hi", "adapter_wait": "base"}).to_string();
    let response = send(&app, post("/v1/completions", asked("slow"))).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-adapter-fallback"]),
        (200, &"base".parse().unwrap())
    );
    assert!(!response.headers().contains_key("x-adapter-id"), "no adapter answered");
    assert!(script.last().adapters.is_empty());
    let body = json!({"inputs": "hi", "parameters": {"adapter_id": "slow", "adapter_wait": "base"}});
    assert_eq!(send(&app, post("/generate", body.to_string())).await.headers()["x-adapter-fallback"], "base");
    assert_eq!(script.inner.load_count.load(Ordering::SeqCst), 1, "the load goes on, once");
    for adapter in ["nope", "base:nope"] {
        let response = send(&app, post("/v1/completions", asked(adapter))).await;
        assert_eq!(response.status().as_u16(), 404, "no fallback for what is not there");
    }
    let (status, reply) = call(&app, "/v1/completions", json!({"model": "bad", "prompt": "hi"})).await;
    assert_eq!(status, 422, "{reply}");
    let response = send(&app, post("/v1/completions", asked("bad"))).await;
    assert_eq!(response.status(), 422, "nor for what can never be served");
    let closed = app_with(&script, config(false));
    let (status, reply) = call(&closed, "/v1/completions", serde_json::from_str(&asked("slow")).unwrap()).await;
    assert_eq!((status.as_u16(), &reply["error"]["code"]), (400, &json!("unsupported_parameter")));
}

#[tokio::test]
async fn routes_of_encoders_say_in_loraxs_form_that_this_model_is_none() {
    let app = app(&Script::new());
    for path in ["/embed", "/classify", "/classify_batch"] {
        let (status, reply) = call(&app, path, json!({"inputs": "x"})).await;
        assert_eq!((status.as_u16(), &reply["error_type"]), (422, &json!("validation")), "{path}: {reply}");
    }
}
