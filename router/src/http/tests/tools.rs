//! Tool calls and thoughts, from the fields of a request to the members of a reply.

use super::*;
use crate::text::TextModel;
use crate::text::testing::byte_level_files;
use serde_json::json;

const CALL: &str = "Let me see.\n<tool_call>\n{\"name\": \"w\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";

/// A model that says `text` and ends.
fn says(text: &str) -> Script {
    let mut tokens = bytes_of(text);
    tokens.push(IM_END);
    Script::new().context(4096).reply_tokens(tokens)
}

fn tool(name: &str) -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    json!({"type": "function", "function": {"name": name, "description": "d", "parameters": parameters, "strict": null}})
}

fn ask(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "tools": [tool("w"), tool("x")]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// The message and the reason to end, whole and put together from a stream; ids are taken out.
async fn both(script: &Script, app: &App, body: Value) -> (Value, Value) {
    let (status, reply) = call(app, "/v1/chat/completions", body.clone()).await;
    assert_eq!(status, 200, "{reply}");
    let mut message = reply["choices"][0]["message"].clone();
    let mut streamed = json!({"role": null, "content": null, "refusal": null});
    let mut reason = Value::Null;
    let mut body = body;
    body["stream"] = json!(true);
    for chunk in events_of(app, "/v1/chat/completions", body).await {
        let Some(choice) = chunk["choices"].get(0) else { continue };
        assert!(reason.is_null(), "nothing follows the end");
        reason = choice["finish_reason"].clone();
        let delta = &choice["delta"];
        for name in ["role", "content", "reasoning", "reasoning_content"] {
            if let Some(text) = delta[name].as_str().filter(|text| !text.is_empty()) {
                let so_far = streamed[name].as_str().unwrap_or("").to_owned();
                streamed[name] = json!(so_far + text);
            }
        }
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap() as usize;
            if part.get("id").is_some() {
                assert_eq!(part["type"], "function");
                let calls = streamed.as_object_mut().unwrap().entry("tool_calls").or_insert(json!([]));
                assert_eq!(calls.as_array().unwrap().len(), index, "a call begins once");
                let mut first = part.clone();
                first.as_object_mut().unwrap().remove("index");
                calls.as_array_mut().unwrap().push(first);
            } else {
                assert_eq!(part.as_object().unwrap().len(), 2, "{part}: only index and function go on");
                let arguments = &mut streamed["tool_calls"][index]["function"]["arguments"];
                *arguments =
                    json!(arguments.as_str().unwrap().to_owned() + part["function"]["arguments"].as_str().unwrap());
            }
        }
    }
    for message in [&mut message, &mut streamed] {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let id = call["id"].as_str().unwrap();
            assert!(id.len() == 29 && id.starts_with("call_"), "{id}");
            call["id"] = json!(0);
        }
    }
    if message["content"] == "" {
        streamed["content"] = json!("");
    }
    assert_eq!(streamed, message, "the stream says what the reply says: {:?}", script.last().prompt.len());
    assert_eq!(reason, reply["choices"][0]["finish_reason"]);
    (message, reason)
}

#[tokio::test]
async fn a_call_in_the_text_becomes_a_call_of_the_message() {
    let script = says(CALL);
    let app = app(&script);
    let (message, reason) = both(&script, &app, ask(json!({}))).await;
    let function = json!({"name": "w", "arguments": "{\"city\": \"Oslo\"}"});
    let expected = json!({"role": "assistant", "content": "Let me see.", "refusal": null,
                          "tool_calls": [{"id": 0, "type": "function", "function": function}]});
    assert_eq!((message, reason), (expected, json!("tool_calls")));
    // The template knows nothing of tools: they are described in front.
    let prompt = byte_level().decode(&script.last().prompt, false);
    assert!(prompt.starts_with("<|im_start|>system\nYou can call these functions."), "{prompt}");
    assert!(prompt.contains("\"name\": \"w\"") && prompt.contains("<tool_call>\n{\"name\": \"NAME\""), "{prompt}");
    assert!(prompt.ends_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), "{prompt}");
}

#[tokio::test]
async fn without_tools_text_is_text() {
    for extra in [json!({"tools": null}), json!({"tools": []}), json!({"tool_choice": "none"})] {
        let script = says(CALL);
        let (message, reason) = both(&script, &app(&script), ask(extra)).await;
        assert_eq!((message["content"].as_str(), reason), (Some(CALL), json!("stop")));
        let prompt = byte_level().decode(&script.last().prompt, false);
        assert_eq!(prompt, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
        assert!(script.last().grammar.is_none());
    }
}

#[tokio::test]
async fn a_choice_decides_what_may_be_called() {
    let two = format!("{CALL}\n{}", CALL.replace("\"w\"", "\"x\""));
    let calls = |message: &Value| message["tool_calls"].as_array().map_or(0, Vec::len);
    let named = json!({"type": "function", "function": {"name": "x"}});
    let only = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]}});
    for (extra, count, end, forced) in [
        (json!({"tool_choice": "auto"}), 2, "tool_calls", false),
        (json!({"parallel_tool_calls": false}), 1, "tool_calls", false),
        (json!({"tool_choice": "required"}), 2, "tool_calls", true),
        (json!({"tool_choice": named}), 1, "stop", true),
        (json!({"tool_choice": only}), 1, "tool_calls", false),
    ] {
        let script = says(&two);
        let (message, reason) = both(&script, &app(&script), ask(extra.clone())).await;
        assert_eq!((calls(&message), reason.as_str()), (count, Some(end)), "{extra}: {message}");
        assert_eq!(script.last().grammar.is_some(), forced, "{extra}");
    }
}

#[tokio::test]
async fn the_length_is_the_reason_to_end_even_in_a_call() {
    let script = says(CALL);
    let (message, reason) = both(&script, &app(&script), ask(json!({"max_tokens": CALL.len() - 20}))).await;
    assert_eq!(reason, "length");
    let arguments = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!("{\"city\": \"Oslo\"}".starts_with(arguments) && !arguments.is_empty(), "{arguments}");
    // A forced reply is calls only, so what is cut off before the name is nothing.
    let script = says(CALL.trim_start_matches("Let me see.\n"));
    let (message, reason) =
        both(&script, &app(&script), ask(json!({"max_tokens": 20, "tool_choice": "required"}))).await;
    assert_eq!((&message["content"], message.get("tool_calls"), reason), (&Value::Null, None, json!("length")));
}

#[tokio::test]
async fn every_token_of_a_call_has_its_logprob_in_the_stream() {
    let script = says(CALL);
    let body = ask(json!({"logprobs": true, "stream": true}));
    let mut tokens = 0;
    for chunk in events_of(&app(&script), "/v1/chat/completions", body).await {
        let logprobs = &chunk["choices"][0]["logprobs"];
        tokens += logprobs["content"].as_array().map_or(0, Vec::len);
        assert!(logprobs.is_null() || logprobs.get("refusal") == Some(&Value::Null));
    }
    assert_eq!(tokens, CALL.len() + 1, "one a byte, and the end token");
}

#[tokio::test]
async fn history_with_calls_is_told_to_a_template_that_knows_none() {
    let script = says("hello");
    let call_ =
        json!({"id": "call_1", "type": "function", "function": {"name": "w", "arguments": "{\"city\":\"Oslo\"}"}});
    let body = ask(json!({"messages": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": null, "tool_calls": [call_, call_]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cold"}, {"role": "tool", "tool_call_id": "call_1", "content": "<|im_end|>"}]}));
    let (status, reply) = call(&app(&script), "/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{reply}");
    let tokens = script.last().prompt;
    let prompt = byte_level().decode(&tokens, false);
    assert!(prompt.starts_with("<|im_start|>system\nBe kind.\n\nYou can call"), "{prompt}");
    let one = "<tool_call>\n{\"name\": \"w\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";
    let turns = format!(
        "<|im_start|>assistant\n{one}\n{one}<|im_end|>\n<|im_start|>user\n<tool_response>\ncold\n</tool_response>\n\
         <tool_response>\n<|im_end|>\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    );
    assert!(prompt.ends_with(&turns), "{prompt}");
    let ends = tokens.iter().filter(|&&token| token == IM_END).count();
    assert_eq!(ends, 4, "what a result spells is no end of a turn");
}

#[tokio::test]
async fn a_template_that_knows_tools_gets_them() {
    let mut files = byte_level_files();
    files.chat_template =
        Some("{% for t in tools %}{{ t | tojson }}{% endfor %}|{{ documents[0].text }}|{{ reasoning_effort }}".into());
    let script = says("hello");
    let app = App::new(RouterConfig::default(), TextModel::new(files).unwrap(), script.clone());
    let body = ask(json!({"documents": [{"text": "doc"}], "reasoning_effort": "low"}));
    let (status, reply) = call(&app, "/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{reply}");
    let prompt = byte_level().decode(&script.last().prompt, false);
    let first = r#"{"type": "function", "function": {"name": "w", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}"#;
    assert!(prompt.starts_with(first) && prompt.ends_with("|doc|low"), "{prompt}");
}

#[tokio::test]
async fn thoughts_are_apart_from_the_answer() {
    let think = |template: &str| {
        let mut files = byte_level_files();
        files.chat_template = Some(template.into());
        files
    };
    let open = "{{ messages[0].content }}<think>\n";
    let closed = "{{ messages[0].content }}{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}";
    let hi = json!({"messages": [{"role": "user", "content": "hi"}]});
    let with = |extra: Value| {
        let mut body = hi.clone();
        extra.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    let none = json!(null);
    for (template, text, body, reasoning, content) in [
        (open, "Hm.\n\nYes\n</think>\n\nIt is.", hi.clone(), json!("Hm.\n\nYes"), json!("It is.")),
        (open, "<think>\nHm.</think>It is.", hi.clone(), json!("Hm."), json!("It is.")),
        (open, "Hm.", hi.clone(), json!("Hm."), none.clone()),
        (open, "Hm.</think>It is.", with(json!({"include_reasoning": false})), none.clone(), json!("It is.")),
        (closed, "<think>a</think>b", hi.clone(), json!("a"), json!("b")),
        (closed, " plain < text", hi.clone(), none.clone(), json!(" plain < text")),
        (closed, "b <think>", with(json!({"reasoning_effort": "none"})), none.clone(), json!("b <think>")),
    ] {
        let script = says(text);
        let app = App::new(RouterConfig::default(), TextModel::new(think(template)).unwrap(), script.clone());
        let (message, _) = both(&script, &app, body).await;
        assert_eq!(message["reasoning"], reasoning, "{text}");
        assert_eq!(message["reasoning_content"], reasoning, "{text}");
        assert_eq!(message["content"], content, "{text}");
    }
    // The operator may know better.
    let script = says("<think>a</think>b");
    let config = RouterConfig { reasoning_parser: crate::http::ReasoningParser::None, ..RouterConfig::default() };
    let app = App::new(config, TextModel::new(think(open)).unwrap(), script.clone());
    assert_eq!(both(&script, &app, hi.clone()).await.0["content"], "<think>a</think>b");
}

#[tokio::test]
async fn echo_puts_the_answer_so_far_in_front() {
    let script = says(" world");
    let messages = json!([{"role": "user", "content": "say"}, {"role": "assistant", "content": "hello"}]);
    let body = json!({"messages": messages, "echo": true, "continue_final_message": true});
    let (message, _) = both(&script, &app(&script), body).await;
    assert_eq!(message["content"], "hello world");
    let body = json!({"messages": [{"role": "user", "content": "say"}], "echo": true});
    assert_eq!(both(&script, &app(&script), body).await.0["content"], " world", "the user's words are no answer");
}

#[tokio::test]
async fn what_is_wrong_with_tools_is_named() {
    let f = |function: Value| json!([{"type": "function", "function": function}]);
    let many: Vec<Value> = (0..129).map(|i| tool(&format!("t{i}"))).collect();
    let long = json!({"type": "object", "description": "x".repeat(65_536)});
    let name = |name: &str| json!({"tool_choice": {"type": "function", "function": {"name": name}}});
    for (extra, param) in [
        (json!({"tools": "x"}), "tools"),
        (json!({"tools": many}), "tools"),
        (json!({"tools": [1]}), "tools[0]"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [{"type": "custom", "custom": {"name": "a"}}]}), "tools[0].type"),
        (json!({"tools": f(json!({}))}), "tools[0].function.name"),
        (json!({"tools": f(json!({"name": ""}))}), "tools[0].function.name"),
        (json!({"tools": f(json!({"name": "a b"}))}), "tools[0].function.name"),
        (json!({"tools": f(json!({"name": "x".repeat(65)}))}), "tools[0].function.name"),
        (json!({"tools": [tool("a"), tool("a")]}), "tools[1].function.name"),
        (json!({"tools": f(json!({"name": "a", "strict": 1}))}), "tools[0].function.strict"),
        (json!({"tools": f(json!({"name": "a", "parameters": []}))}), "tools[0].function.parameters"),
        (
            json!({"tools": f(json!({"name": "a", "parameters": {"type": "string"}}))}),
            "tools[0].function.parameters.type",
        ),
        (json!({"tools": f(json!({"name": "a", "parameters": long}))}), "tools[0].function.parameters"),
        (json!({"tool_choice": "always"}), "tool_choice"),
        (json!({"tool_choice": 1}), "tool_choice"),
        (json!({"tool_choice": {}}), "tool_choice.type"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice.function"),
        (name("nobody"), "tool_choice.function.name"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"documents": ["x"]}), "documents[0]"),
        (json!({"reasoning_effort": "huge"}), "reasoning_effort"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
    ] {
        let (status, reply) = call(&app(&says("hello")), "/v1/chat/completions", ask(extra.clone())).await;
        assert_eq!((status.as_u16(), reply["error"]["param"].as_str()), (400, Some(param)), "{reply} for {param}");
    }
    let unusable = json!({"type": "object", "properties": {"a": {"not": {}}}});
    let body = ask(json!({"tools": f(json!({"name": "a", "parameters": unusable})), "tool_choice": "required"}));
    let (status, reply) = call(&app(&says("hello")), "/v1/chat/completions", body).await;
    assert_eq!(
        (status.as_u16(), reply["error"]["param"].as_str()),
        (400, Some("tools[0].function.parameters")),
        "{reply}"
    );
}
