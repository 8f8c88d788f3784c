use super::*;
use serde_json::json;

#[tokio::test]
async fn a_completion_has_the_agreed_shape() {
    let script = Script::new();
    let mut reply = complete(&app(&script), json!({"prompt": "hello wor", "max_tokens": 64})).await;
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(reply["id"].as_str().unwrap().len(), 5 + 32);
    assert!(reply["created"].as_u64().unwrap() > 1_700_000_000);
    let fingerprint = format!("loramux-{}-9c2e11d0", env!("CARGO_PKG_VERSION"));
    (reply["id"], reply["created"]) = (json!(0), json!(0));
    let expected = json!({
        "id": 0, "object": "text_completion", "created": 0, "model": "base",
        "choices": [{"index": 0, "text": "hello é😀", "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 13, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 2}},
        "system_fingerprint": fingerprint,
    });
    assert_eq!(reply, expected);
    let request = script.last();
    assert_eq!(request.sampling.end_tokens, [IM_END]);
    assert_eq!((request.sampling.temperature, request.sampling.top_p, request.sampling.top_k), (1.0, 1.0, 0));
    assert_eq!((request.n, request.max_tokens, request.sampling.logprobs), (1, 64, None));
}

#[tokio::test]
async fn sampling_goes_to_the_engine_as_sent() {
    let script = Script::new();
    let body = json!({
        "prompt": "a", "temperature": 0.000001, "top_p": 0.5, "top_k": -1, "min_p": 0.25, "seed": -1, "n": 2, "min_tokens": 3,
        "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"7": -100}, "stop_token_ids": [9],
        "allowed_token_ids": [9, 5, 9], "priority": -3, "cache_salt": "s", "ignore_eos": true, "max_tokens": 5
    });
    complete(&app(&script), body).await;
    let request = script.last();
    let s = request.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.0, 0.5, 0, 0.25), "below 1e-5 is greedy");
    assert_eq!((s.seed, s.min_tokens, s.end_tokens, s.allowed_tokens), (u64::MAX, 3, vec![9], vec![5, 9]));
    assert_eq!((s.repetition_penalty, s.presence_penalty, s.frequency_penalty), (1.5, -1.0, 2.0));
    assert_eq!(s.logit_bias.iter().map(|b| (b.token, b.bias)).collect::<Vec<_>>(), [(7, -100.0)]);
    assert_eq!((request.n, request.priority, request.cache_salt.as_deref()), (2, -3, Some("s")));
}

#[tokio::test]
async fn a_stop_string_cuts_the_text_and_tells_the_engine() {
    for (include, text) in [(false, "hello"), (true, "hello é")] {
        let script = Script::new();
        let body =
            json!({"prompt": "a", "max_tokens": 64, "stop": [" é", "zz"], "include_stop_str_in_output": include});
        let reply = complete(&app(&script), body).await;
        let choice = &reply["choices"][0];
        assert_eq!(
            (&choice["text"], &choice["finish_reason"], &choice["stop_reason"]),
            (&json!(text), &json!("stop"), &json!(" é"))
        );
        assert_eq!(*script.inner.finished.lock().unwrap(), [0]);
        assert_eq!(reply["usage"]["completion_tokens"], 8);
    }
}

#[tokio::test]
async fn a_stop_token_of_the_request_is_reported_and_not_shown() {
    for (include, text) in [(false, "ab"), (true, "abX")] {
        let script = Script::new().reply("abXcd");
        let stop = bytes_of("X")[0];
        let body = json!({"prompt": "a", "stop_token_ids": [stop], "include_stop_str_in_output": include});
        let reply = complete(&app(&script), body).await;
        let choice = &reply["choices"][0];
        assert_eq!(
            (&choice["text"], &choice["finish_reason"], &choice["stop_reason"]),
            (&json!(text), &json!("stop"), &json!(stop))
        );
    }
}

#[tokio::test]
async fn min_tokens_also_holds_off_stop_strings() {
    let script = Script::new().reply("XaXbc");
    let reply = complete(&app(&script), json!({"prompt": "a", "stop": "X", "min_tokens": 2})).await;
    assert_eq!(reply["choices"][0]["text"], "Xa");
}

#[tokio::test]
async fn half_a_character_at_the_end_becomes_a_replacement_character() {
    let script = Script::new().reply_tokens(bytes_of("a😀")[..3].to_vec());
    let reply = complete(&app(&script), json!({"prompt": "a", "max_tokens": 3})).await;
    assert_eq!(reply["choices"][0]["text"], "a\u{FFFD}");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn logprobs_are_four_lists_of_one_length() {
    let script = Script::new().reply("é!");
    let body = json!({"prompt": "a", "max_tokens": 3, "logprobs": 2});
    let reply = complete(&app(&script), body.clone()).await;
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["\u{FFFD}", "\u{FFFD}", "!"]));
    assert_eq!(logprobs["token_logprobs"], json!([-0.25, -0.25, -0.25]));
    assert_eq!(logprobs["text_offset"], json!([0, 0, 1]));
    assert_eq!(logprobs["top_logprobs"][2], json!({"!": -0.25, "\"": -0.5}));
    let mut body = body;
    body["return_tokens_as_token_ids"] = json!(true);
    body["return_token_ids"] = json!(true);
    let reply = complete(&app(&script), body).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["logprobs"]["tokens"], json!(["token:198", "token:172", "token:36"]));
    assert_eq!(choice["logprobs"]["top_logprobs"][0], json!({"token:198": -0.25, "token:199": -0.5}));
    assert_eq!((&choice["token_ids"], &choice["prompt_token_ids"]), (&json!([198, 172, 36]), &json!(bytes_of("a"))));
}

#[tokio::test]
async fn tokens_that_a_stop_string_cut_off_have_no_logprobs() {
    // Of "aab" the second a is held back while the first one is shown.
    for (reply, stop, include, text, tokens) in [
        ("aaab", "ab", false, "aa", vec!["a", "a"]),
        ("aaab", "ab", true, "aaab", vec!["a", "a", "a", "b"]),
        ("xé!", "é", false, "x", vec!["x"]),
        ("XYZ", "XYZ", false, "", vec![]),
        ("xXYx", "XYZ", false, "xXYx", vec!["x", "X", "Y", "x"]),
    ] {
        let body = |stream: bool| {
            let max = if text == reply { reply.len() } else { 64 };
            json!({"prompt": "p", "max_tokens": max, "stop": stop, "include_stop_str_in_output": include, "logprobs": 1,
                   "echo": true, "return_token_ids": true, "stream": stream})
        };
        let whole = complete(&app(&Script::new().reply(reply)), body(false)).await;
        let choice = &whole["choices"][0];
        let what = format!("{reply:?} until {stop:?}: {choice}");
        assert_eq!(choice["text"], format!("p{text}"), "{what}");
        let offsets: Vec<usize> = (0..=tokens.len()).collect();
        assert_eq!(choice["logprobs"]["tokens"], json!([vec!["p"], tokens].concat()), "{what}");
        assert_eq!(choice["logprobs"]["text_offset"], json!(offsets), "{what}");
        let ids = choice["token_ids"].as_array().map_or(0, Vec::len);
        assert_eq!(whole["usage"]["completion_tokens"], ids, "ids are of all tokens that were generated");
        let events = events_of(&app(&Script::new().reply(reply)), "/v1/completions", body(true)).await;
        let joined = |list: &str| -> Vec<Value> {
            events.iter().filter_map(|c| c["choices"][0]["logprobs"][list].as_array()).flatten().cloned().collect()
        };
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(json!(joined(list)), choice["logprobs"][list], "{list}, streamed: {what}");
        }
    }
}

#[test]
fn of_two_tokens_with_one_text_the_better_logprob_stays() {
    use crate::http::openai::types::LogprobMap;
    for logprobs in [[-1.0, -2.0], [-2.0, -1.0]] {
        let mut map = LogprobMap::default();
        logprobs.iter().for_each(|&logprob| map.insert("\u{FFFD}".into(), logprob));
        map.insert("a".into(), -3.0);
        assert_eq!(json!(map), json!({"\u{FFFD}": -1.0, "a": -3.0}));
    }
}

#[tokio::test]
async fn echo_with_logprobs_scores_the_prompt() {
    let script = Script::new();
    let body = json!({"prompt": "xyé", "max_tokens": 0, "echo": true, "logprobs": 1});
    let reply = complete(&app(&script), body).await;
    let choice = &reply["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("xyé"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["x", "y", "é"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    assert_eq!(choice["logprobs"]["top_logprobs"][0], json!(null));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
    assert_eq!(reply["usage"]["completion_tokens"], 0);
    assert_eq!(script.last().sampling.prompt_logprobs, Some(1));
    let body = json!({"prompt": [bytes_of("xy")], "max_tokens": 1, "echo": true, "logprobs": 0});
    let reply = complete(&app(&Script::new()), body).await;
    assert_eq!(reply["choices"][0]["text"], "xyh", "ids are echoed as text");
    assert_eq!(reply["choices"][0]["logprobs"]["text_offset"], json!([0, 1, 2]));
    assert_eq!(
        reply["choices"][0]["logprobs"]["top_logprobs"][2],
        json!({"h": -0.25}),
        "the chosen one is always there"
    );
}

#[tokio::test]
async fn prompt_logprobs_are_maps_by_token_id() {
    let reply = complete(&app(&Script::new()), json!({"prompt": "xy", "max_tokens": 1, "prompt_logprobs": 1})).await;
    let y = bytes_of("y")[0].to_string();
    let expected = json!([null, {y: {"logprob": -0.25, "rank": 1, "decoded_token": "y"}}]);
    assert_eq!(reply["choices"][0]["prompt_logprobs"], expected);
}

#[tokio::test]
async fn choices_are_prompt_major() {
    let script = Script::new().reply("abc");
    script.inner.stagger.store(1, Ordering::SeqCst);
    let reply = complete(&app(&script), json!({"prompt": ["x", "yy"], "n": 2, "max_tokens": 1})).await;
    let shown: Vec<_> =
        reply["choices"].as_array().unwrap().iter().map(|c| (c["index"].clone(), c["text"].clone())).collect();
    assert_eq!(shown, [(json!(0), json!("a")), (json!(1), json!("b")), (json!(2), json!("a")), (json!(3), json!("b"))]);
    assert_eq!(reply["usage"]["prompt_tokens"], 3);
    assert_eq!(reply["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn best_of_keeps_the_best_by_mean_logprob() {
    let script = Script::new().reply("abcdef");
    script.inner.stagger.store(1, Ordering::SeqCst);
    let reply = complete(&app(&script), json!({"prompt": "x", "n": 1, "best_of": 3, "max_tokens": 2})).await;
    assert_eq!(reply["choices"].as_array().unwrap().len(), 1);
    assert_eq!(reply["choices"][0]["text"], "ab", "the scripted logprobs fall with the index");
    assert_eq!(reply["choices"][0]["logprobs"], Value::Null);
    assert_eq!((script.last().n, script.last().sampling.logprobs), (3, Some(0)));
    assert_eq!(reply["usage"]["completion_tokens"], 6, "all of them cost");
}

#[tokio::test]
async fn defaults_of_the_model_apply_unless_turned_off() {
    let mut files = crate::text::testing::byte_level_files();
    files.generation_config = Some(r#"{"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25}"#.into());
    for (on, expected) in [(true, (0.5, 20, 1.25)), (false, (1.0, 0, 1.0))] {
        let script = Script::new();
        let config = RouterConfig { use_generation_config: on, ..RouterConfig::default() };
        let app = App::new(config, crate::text::TextModel::new(files.clone()).unwrap(), script.clone());
        complete(&app, json!({"prompt": "a"})).await;
        let s = script.last().sampling;
        assert_eq!((s.temperature, s.top_k, s.repetition_penalty), expected);
    }
}

#[tokio::test]
async fn special_tokens_in_a_raw_prompt_are_tokens_and_skipped_in_the_reply() {
    let mut reply = bytes_of("a");
    reply.extend([1, IM_END]);
    for (skip, text) in [(true, "a"), (false, "a<|im_start|>")] {
        let script = Script::new().reply_tokens(reply.clone());
        let body = json!({"prompt": "<|im_start|>x", "skip_special_tokens": skip});
        assert_eq!(complete(&app(&script), body).await["choices"][0]["text"], text);
        assert_eq!(script.last().prompt.first(), Some(&1));
    }
}

#[tokio::test]
async fn bad_words_reach_the_engine_as_a_rule() {
    use crate::engine::Allowed;
    let script = Script::new();
    complete(&app(&script), json!({"prompt": "x", "max_tokens": 2, "bad_words": ["b", "cd"]})).await;
    let grammar = script.last().grammar.expect("a rule");
    let mut state = grammar.start();
    let allows = |state: &mut dyn crate::engine::GrammarState, text: &str| {
        let Ok(Allowed::Tokens(mask)) = state.next() else { panic!("an end") };
        let token = bytes_of(text)[0] as usize;
        mask[token / 32] >> (token % 32) & 1 == 1
    };
    assert!(!allows(&mut *state, "b") && allows(&mut *state, "c") && allows(&mut *state, "d"));
    state.accept(bytes_of("c")[0]).unwrap();
    assert!(!allows(&mut *state, "d") && allows(&mut *state, "c"));
    complete(&app(&script), json!({"prompt": "x", "max_tokens": 2, "bad_words": []})).await;
    assert!(script.last().grammar.is_none());
}

#[tokio::test]
async fn no_tokens_are_completed_where_none_are_asked_for() {
    let script = Script::new();
    let reply = complete(&app(&script), json!({"prompt": "hi", "max_tokens": 0})).await;
    assert_eq!(script.last().max_tokens, 0);
    assert_eq!((&reply["choices"][0]["text"], &reply["usage"]["completion_tokens"]), (&json!(""), &json!(0)));
}
