use super::*;
use serde_json::json;

/// Field and value -> (code, param, end of the message).
async fn refused(path: &str, base: Value, field: &str, value: Value) -> (String, String, String) {
    let script = Script::new();
    let mut body = base;
    body[field] = value.clone();
    let (status, reply) = call(&app(&script), path, body).await;
    assert_eq!(status, 400, "{field} = {value}: {reply}");
    assert!(script.inner.seen.lock().unwrap().is_empty(), "nothing invalid reaches the engine");
    let text = |name: &str| reply["error"][name].as_str().unwrap_or("").to_owned();
    assert_eq!(text("type"), "invalid_request_error");
    assert_eq!(reply["error"]["retryable"], false);
    (text("code"), text("param"), text("message"))
}

async fn accepted(path: &str, base: Value, field: &str, value: Value) {
    let mut body = base;
    body[field] = value.clone();
    let (status, reply) = call(&app(&Script::new()), path, body).await;
    assert_eq!(status, 200, "{field} = {value}: {reply}");
}

fn completion() -> Value {
    json!({"prompt": "hi", "max_tokens": 4})
}

fn chat() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4})
}

#[tokio::test]
async fn every_number_is_refused_just_outside_its_range() {
    let huge = json!(1e300);
    let (min, max) = (json!(i64::MIN), json!(i64::MAX));
    let cases = [
        (
            "temperature",
            vec![json!(-0.001), json!(-1), min.clone()],
            vec![json!(0), json!(2.5), json!(1e300), json!(1e-7)],
        ),
        ("top_p", vec![json!(-0.01), json!(1.01), huge.clone()], vec![json!(0), json!(1)]),
        ("min_p", vec![json!(-0.01), json!(1.01)], vec![json!(0), json!(1)]),
        (
            "top_k",
            vec![json!(-2), json!(301), min.clone(), max.clone(), json!(1.5)],
            vec![json!(-1), json!(0), json!(300), json!(2.0)],
        ),
        ("n", vec![json!(0), json!(9), json!(-1), max.clone(), huge.clone()], vec![json!(1), json!(8)]),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(10.01)], vec![json!(1e-300), json!(10)]),
        ("presence_penalty", vec![json!(-2.01), json!(2.01)], vec![json!(-2), json!(2)]),
        ("frequency_penalty", vec![json!(-2.01), json!(2.01)], vec![json!(-2), json!(2)]),
        ("min_tokens", vec![json!(-1), json!(5), json!(129)], vec![json!(0), json!(4)]),
        ("priority", vec![json!(-101), json!(101)], vec![json!(-100), json!(100)]),
        ("prompt_logprobs", vec![json!(-1), json!(21)], vec![json!(0), json!(20)]),
        ("truncate_prompt_tokens", vec![json!(-2), json!(0), json!(129)], vec![json!(-1), json!(1), json!(128)]),
        ("seed", vec![json!(9_223_372_036_854_775_808u64), huge, json!(0.5)], vec![min, max, json!(0), json!(-5)]),
        ("adapter_scale", vec![json!(-8.01), json!(8.01)], vec![json!(-8), json!(8)]),
        ("adapter_load_timeout_ms", vec![json!(-1), json!(30_001)], vec![json!(0), json!(30_000)]),
    ];
    for (field, bad, good) in cases {
        for (path, base) in [("/v1/completions", completion()), ("/v1/chat/completions", chat())] {
            for value in bad.iter().cloned().chain([json!("1"), json!([1]), json!(true)]) {
                let (code, param, message) = refused(path, base.clone(), field, value.clone()).await;
                assert_eq!((code.as_str(), param.as_str()), ("invalid_value", field), "{value}");
                assert!(message.starts_with(&format!("`{field}` must be ")), "{message}");
                assert!(message.contains("; got "), "{message}");
            }
            for value in good.iter().cloned().chain([Value::Null]) {
                accepted(path, base.clone(), field, value).await;
            }
        }
    }
}

#[tokio::test]
async fn fields_of_completions_are_checked() {
    let stops = |n: usize| json!(vec!["x"; n]);
    let bad = [
        ("logprobs", vec![json!(-1), json!(21), json!(true)]),
        ("best_of", vec![json!(0), json!(9)]),
        ("echo", vec![json!(1), json!("true")]),
        ("stop", vec![json!(""), json!([""]), stops(17), json!("x".repeat(257)), json!(5), json!([5])]),
        (
            "prompt",
            vec![
                json!([]),
                json!(""),
                json!(5),
                json!({}),
                json!([[]]),
                json!([true]),
                json!(["a", 1]),
                json!([1, "a"]),
                json!([[1], 2]),
                json!([300]),
                json!([-1]),
                json!([1.5]),
                json!([[4_294_967_296u64]]),
            ],
        ),
        ("stop_token_ids", vec![json!([300]), json!([-1]), json!("1"), json!(vec![1; 257])]),
        ("allowed_token_ids", vec![json!([]), json!([300])]),
        (
            "logit_bias",
            vec![
                json!({"300": 1}),
                json!({"x": 1}),
                json!({"-1": 1}),
                json!({"1": 101}),
                json!({"1": "a"}),
                json!([1]),
                json!({"1": 1, "01": 2}),
            ],
        ),
        ("cache_salt", vec![json!(""), json!("x".repeat(257)), json!(1)]),
        ("request_id", vec![json!("x".repeat(129)), json!(1)]),
        ("stream", vec![json!("yes"), json!(1)]),
        ("adapter_wait", vec![json!("later")]),
        ("adapter_source", vec![json!("ftp")]),
        ("compose", vec![json!([]), json!("a"), json!([1])]),
        ("adapters", vec![json!([]), json!([1])]),
        ("skip_special_tokens", vec![json!("no")]),
        ("model", vec![json!(1)]),
    ];
    for (field, values) in bad {
        for value in values {
            let (code, param, _) = refused("/v1/completions", completion(), field, value.clone()).await;
            assert_eq!(code, "invalid_value", "{field} = {value}");
            assert!(param.starts_with(field), "{param} for {field} = {value}");
        }
    }
}

#[tokio::test]
async fn fields_of_completions_are_accepted_up_to_their_limits() {
    let stops = |n: usize| json!(vec!["x"; n]);
    let good = [
        ("logprobs", json!(0)),
        ("best_of", json!(8)),
        ("stop", json!([])),
        ("stop", stops(16)),
        ("stop", json!("x".repeat(256))),
        ("prompt", json!([299])),
        ("prompt", json!([[1], [2, 3]])),
        ("prompt", json!(["a", "b"])),
        ("allowed_token_ids", json!([1, 1])),
        ("logit_bias", json!({"0": -100, "299": 100})),
        ("suffix", json!("")),
        ("user", json!({"any": 1})),
        ("unknown", json!([1])),
        ("tools", json!([])),
        ("response_format", json!({"type": "text"})),
        ("bad_words", json!([])),
        ("adapters", json!(["base"])),
        ("max_tokens", json!(0)),
        ("stream_options", Value::Null),
        ("logit_bias", json!({})),
    ];
    for (field, value) in good {
        accepted("/v1/completions", completion(), field, value).await;
    }
}

#[tokio::test]
async fn fields_of_chat_are_checked() {
    let message = |message: Value| json!([message]);
    let bad = [
        ("messages", json!([]), "messages"),
        ("messages", json!("hi"), "messages"),
        ("messages", message(json!("hi")), "messages[0]"),
        ("messages", message(json!({"role": "king", "content": "x"})), "messages[0].role"),
        ("messages", message(json!({"role": "user", "content": 1})), "messages[0].content"),
        (
            "messages",
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            "messages[0].content[0].type",
        ),
        ("messages", Value::Array(vec![json!({"role": "user", "content": "x"}); 4097]), "messages"),
        ("max_tokens", json!(0), "max_tokens"),
        ("max_completion_tokens", json!(0), "max_completion_tokens"),
        ("top_logprobs", json!(21), "top_logprobs"),
        ("top_logprobs", json!(1), "top_logprobs"),
        ("logprobs", json!(1), "logprobs"),
        ("chat_template_kwargs", json!([1]), "chat_template_kwargs"),
        ("chat_template_kwargs", json!({"x": "y".repeat(17_000)}), "chat_template_kwargs"),
        ("add_generation_prompt", json!(1), "add_generation_prompt"),
    ];
    for (field, value, param) in bad {
        let (code, at, _) = refused("/v1/chat/completions", chat(), field, value).await;
        assert_eq!((code.as_str(), at.as_str()), ("invalid_value", param));
    }
    for (value, param) in
        [(json!([{"content": "x"}]), "messages[0].role"), (json!([{"role": "user"}]), "messages[0].content")]
    {
        let (code, at, message) = refused("/v1/chat/completions", chat(), "messages", value).await;
        assert_eq!((code.as_str(), at.as_str()), ("missing_field", param));
        assert_eq!(message, format!("`{param}` is required"));
    }
    let good = [
        (
            "messages",
            json!([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
        ),
        ("tool_choice", json!("none")),
        ("tools", json!([])),
        ("top_logprobs", json!(0)),
        ("max_completion_tokens", json!(1)),
        ("continue_final_message", json!(true)),
        ("chat_template_kwargs", json!({"a": 1})),
    ];
    for (field, value) in good {
        accepted("/v1/chat/completions", chat(), field, value).await;
    }
}

#[tokio::test]
async fn what_is_not_served_is_refused_by_name() {
    let both = [
        ("use_beam_search", json!(true)),
        ("prompt_embeds", json!("x")),
        ("kv_transfer_params", json!({})),
        ("adapter_wait", json!("base")),
    ];
    let chat_only = [("chat_template", json!("{{ x }}")), ("functions", json!([1]))];
    for (field, value) in both.iter().chain([("suffix", json!("x"))].iter()) {
        let (code, param, _) = refused("/v1/completions", completion(), field, value.clone()).await;
        assert_eq!((code.as_str(), param.as_str()), ("unsupported_parameter", *field));
    }
    for (field, value) in both.iter().chain(&chat_only) {
        let (code, param, _) = refused("/v1/chat/completions", chat(), field, value.clone()).await;
        assert_eq!((code.as_str(), param.as_str()), ("unsupported_parameter", *field));
    }
}

#[tokio::test]
async fn fields_that_contradict_each_other_are_refused() {
    let cases = [
        (json!({"prompt": "a", "stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"prompt": "a", "stream": true, "prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"prompt": "a", "n": 2, "best_of": 1}), "best_of"),
        (json!({"prompt": "a", "best_of": 2, "stream": true}), "best_of"),
        (json!({"prompt": vec!["a"; 33], "n": 8}), "prompt"),
        (json!({"prompt": vec!["a"; 257]}), "prompt"),
    ];
    for (body, param) in cases {
        let (status, reply) = call(&app(&Script::new()), "/v1/completions", body).await;
        assert_eq!((status.as_u16(), reply["error"]["param"].as_str()), (400, Some(param)), "{reply}");
    }
    let body = json!({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": true, "continue_final_message": true});
    let (_, reply) = call(&app(&Script::new()), "/v1/chat/completions", body).await;
    assert_eq!(reply["error"]["param"], "continue_final_message");
}

#[tokio::test]
async fn messages_have_the_agreed_shapes() {
    let cases = [
        (json!({"prompt": "a", "temperature": -1}), "`temperature` must be a finite number >= 0; got -1"),
        (json!({"prompt": "a", "n": "x"}), "`n` must be an integer; got a string"),
        (json!({"max_tokens": 1}), "`prompt` is required"),
        (json!({"prompt": "a", "stop": vec!["x"; 17]}), "`stop` has 17 strings; this server allows 16"),
        (
            json!({"prompt": vec!["a"; 33], "n": 8}),
            "`prompt` has 264 sequences; this server allows 256 (--max-sequences-per-request)",
        ),
        (
            json!({"prompt": bytes_of("abc"), "max_tokens": 126}),
            "This model's maximum context length is 128 tokens. However, you requested 129 tokens (3 in the prompt, 126 for the completion).",
        ),
        (json!({"prompt": "a", "model": "nope"}), "The model `nope` does not exist or you do not have access to it."),
    ];
    for (body, message) in cases {
        let (_, reply) = call(&app(&Script::new()), "/v1/completions", body).await;
        assert_eq!(reply["error"]["message"], message);
    }
    let long = format!("a{}", "é".repeat(100));
    let (_, reply) =
        call(&app(&Script::new()), "/v1/completions", json!({"prompt": "a", "adapter_source": long})).await;
    let shown = reply["error"]["message"].as_str().unwrap().split("got ").nth(1).unwrap();
    assert!(shown.len() <= 64 + '…'.len_utf8() && shown.starts_with("aéé"), "{shown}");
}

#[tokio::test]
async fn the_context_is_a_hard_border() {
    let script = Script::new();
    let app = app(&script);
    let prompt = |n: usize| vec![50; n];
    for (body, status) in [
        (json!({"prompt": prompt(124), "max_tokens": 4}), 200),
        (json!({"prompt": prompt(125), "max_tokens": 4}), 400),
        (json!({"prompt": prompt(128), "max_tokens": 0}), 200),
        (json!({"prompt": prompt(129), "max_tokens": 0}), 400),
        (json!({"prompt": prompt(127)}), 200),
        (json!({"prompt": prompt(128)}), 400),
        (json!({"prompt": "x".repeat(4_000_000), "max_tokens": 1}), 400),
        (json!({"prompt": "x", "max_tokens": u64::MAX}), 400),
        (json!({"prompt": "x", "max_tokens": 4_294_967_297u64}), 400),
        (json!({"prompt": prompt(500), "truncate_prompt_tokens": -1, "max_tokens": 8}), 200),
        (json!({"prompt": prompt(500), "truncate_prompt_tokens": 3}), 200),
    ] {
        let (got, reply) = call(&app, "/v1/completions", body.clone()).await;
        assert_eq!(got, status, "{body} {reply}");
        if status == 400 && body["max_tokens"] != u64::MAX {
            assert_eq!(reply["error"]["code"], "context_length_exceeded");
        }
    }
    let lengths: Vec<_> = script.inner.seen.lock().unwrap().iter().map(|r| (r.prompt.len(), r.max_tokens)).collect();
    assert_eq!(lengths, [(124, 4), (128, 0), (127, 1), (120, 8), (3, 16)]);
}

#[tokio::test]
async fn bodies_that_are_no_strict_json_are_refused() {
    for body in [
        "",
        "[]",
        "{\"prompt\":\"a\",\"prompt\":\"b\"}",
        "{\"prompt\":NaN}",
        "{\"temperature\":1e999}",
        "{\"prompt\":\"\\ud800\"}",
    ] {
        let response = send(&app(&Script::new()), post("/v1/completions", body)).await;
        assert_eq!(response.status(), 400);
        assert_eq!(json_of(response).await["error"]["code"], "invalid_json", "{body}");
    }
}

/// A small generator, so that a failure is replayed by its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.roll(if depth > 3 { 12 } else { 16 }) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!(0),
            3 => json!(-1),
            4 => json!(i64::MIN),
            5 => json!(u64::MAX),
            6 => json!(1e308),
            7 => json!(0.5),
            8 => json!(""),
            9 => json!("<|im_end|>\u{0}é"),
            10 => json!(self.roll(400)),
            11 => json!("base"),
            12 | 13 => (0..self.roll(4)).map(|_| self.value(depth + 1)).collect(),
            _ => {
                let keys = ["role", "content", "type", "text", "adapter", "weight", "include_usage", "1", "function"];
                let members =
                    (0..self.roll(4)).map(|_| (keys[self.roll(keys.len())].to_owned(), self.value(depth + 1)));
                Value::Object(members.collect())
            }
        }
    }
}

const FIELDS: [&str; 53] = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stop",
    "logprobs",
    "top_logprobs",
    "echo",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stream",
    "stream_options",
    "suffix",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "cache_salt",
    "priority",
    "adapter_scale",
    "compose",
    "adapters",
    "adapter_id",
    "adapter_source",
    "adapter_wait",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "documents",
    "reasoning_effort",
    "include_reasoning",
    "functions",
    "response_format",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
];

#[tokio::test]
async fn no_body_makes_the_server_fail() {
    let dir = adapter_dir(&["a"]);
    let config = RouterConfig { adapter_dirs: vec![dir.path().to_owned()], ..RouterConfig::default() };
    let app = app_with(&Script::new().load("a", Load::Ready(1)), config);
    let mut good = 0;
    for seed in 1..1500u64 {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let (path, mut body) =
            [("/v1/completions", completion()), ("/v1/chat/completions", chat())][dice.roll(2)].clone();
        for _ in 0..=dice.roll(3) {
            body[FIELDS[dice.roll(FIELDS.len())]] = dice.value(0);
        }
        let response = send(&app, post(path, body.to_string())).await;
        let status = response.status().as_u16();
        assert!(matches!(status, 200 | 400 | 404), "seed {seed}: {status} for {body}");
        let text = text_of(response).await;
        assert_eq!(status != 200, text.starts_with("{\"error\":{\"message\":"), "seed {seed}: {text}");
        good += usize::from(status == 200);
    }
    assert!(good > 100, "some of them are valid: {good}");
}
