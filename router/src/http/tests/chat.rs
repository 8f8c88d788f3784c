use super::*;
use serde_json::json;

fn hello() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}]})
}

#[tokio::test]
async fn a_chat_reply_has_the_agreed_shape() {
    let script = Script::new();
    let (status, mut reply) = call(&app(&script), "/v1/chat/completions", hello()).await;
    assert_eq!(status, 200);
    assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-"));
    (reply["id"], reply["created"]) = (json!(0), json!(0));
    let prompt = script.last().prompt;
    let expected = json!({
        "id": 0, "object": "chat.completion", "created": 0, "model": "base",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello é😀", "refusal": null}, "logprobs": null, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt.len(), "completion_tokens": 13, "total_tokens": prompt.len() + 13,
                  "prompt_tokens_details": {"cached_tokens": 2}},
        "system_fingerprint": format!("loramux-{}-9c2e11d0", env!("CARGO_PKG_VERSION")),
    });
    assert_eq!(reply, expected);
    let text = byte_level().decode(&prompt, false);
    assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(script.last().max_tokens as usize, CONTEXT as usize - prompt.len(), "the rest of the context");
}

#[tokio::test]
async fn chat_logprobs_carry_bytes() {
    let script = Script::new().reply("é");
    let mut body = hello();
    (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["return_token_ids"]) =
        (json!(true), json!(1), json!(2), json!(true));
    let (_, reply) = call(&app(&script), "/v1/chat/completions", body).await;
    let first = &reply["choices"][0]["logprobs"]["content"][0];
    let expected = json!({"token": "\u{FFFD}", "logprob": -0.25, "bytes": [0xC3],
                          "top_logprobs": [{"token": "\u{FFFD}", "logprob": -0.25, "bytes": [0xC3]}]});
    assert_eq!(*first, expected);
    assert_eq!(reply["choices"][0]["logprobs"].get("refusal"), Some(&Value::Null));
    assert_eq!(reply["choices"][0]["token_ids"], json!(bytes_of("é")));
    assert_eq!(reply["prompt_token_ids"], json!(script.last().prompt.to_vec()));
}

#[tokio::test]
async fn the_newer_name_of_max_tokens_wins() {
    let script = Script::new();
    let mut body = hello();
    (body["max_tokens"], body["max_completion_tokens"]) = (json!(9), json!(2));
    let (_, reply) = call(&app(&script), "/v1/chat/completions", body).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "he");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_template_that_refuses_says_so() {
    let mut files = crate::text::testing::byte_level_files();
    files.chat_template = Some("{{ raise_exception('only poems') }}".into());
    let refusing =
        App::new(RouterConfig::default(), crate::text::TextModel::new(files.clone()).unwrap(), Script::new());
    let (status, reply) = call(&refusing, "/v1/chat/completions", hello()).await;
    assert_eq!(status, 400);
    assert_eq!(reply["error"]["message"], "the chat template refused these messages: only poems");
    assert_eq!(reply["error"]["param"], "messages");
    (files.chat_template, files.tokenizer_config) = (None, None);
    let without = App::new(RouterConfig::default(), crate::text::TextModel::new(files).unwrap(), Script::new());
    let (status, reply) = call(&without, "/v1/chat/completions", hello()).await;
    assert_eq!((status.as_u16(), reply["error"]["code"].as_str()), (400, Some("unsupported_parameter")));
}

#[tokio::test]
async fn earlier_tool_calls_reach_the_template() {
    let mut files = crate::text::testing::byte_level_files();
    files.chat_template = Some("{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{{ m.content is none }}{% endif %}{% if m.role == 'tool' %}[{{ m.content }}]{% endif %}{% endfor %}".into());
    let script = Script::new();
    let app = App::new(RouterConfig::default(), crate::text::TextModel::new(files).unwrap(), script.clone());
    let call_ =
        json!({"id": "call_1", "type": "function", "function": {"name": "w", "arguments": "{\"city\":\"Oslo\"}"}});
    let body = json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [call_]},
                                   {"role": "tool", "tool_call_id": "call_1", "content": "cold"}]});
    let (status, reply) = call(&app, "/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{reply}");
    assert_eq!(byte_level().decode(&script.last().prompt, false), "OsloTrue[cold]");
}
