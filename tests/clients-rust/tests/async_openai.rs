//! The `async-openai` crate against a running server: what its documentation shows, for each feature that is served.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionMessageToolCalls, ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs, FinishReason, Prompt,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use async_openai::types::embeddings::{CreateEmbeddingRequest, CreateEmbeddingRequestArgs, EncodingFormat};
use async_openai::types::responses::{CreateResponseArgs, ResponseStreamEvent};
use futures_util::StreamExt;
use serde_json::{Value, json};

const QUESTION: &str = "Tell me about the sea.";

/// Where `tests/python/test_public_clients.py` serves the built-in model.
fn client() -> Client<OpenAIConfig> {
    let url = std::env::var("LORAMUX_URL").expect("LORAMUX_URL: test_public_clients.py sets it");
    Client::with_config(OpenAIConfig::new().with_api_base(format!("{url}/v1")).with_api_key("EMPTY"))
}

fn chat(model: &str, max_tokens: u32) -> CreateChatCompletionRequestArgs {
    let user = ChatCompletionRequestUserMessageArgs::default().content(QUESTION).build().unwrap();
    let mut request = CreateChatCompletionRequestArgs::default();
    request.model(model).messages([user.into()]).temperature(0.0).max_completion_tokens(max_tokens);
    request
}

fn api_error(error: OpenAIError) -> (u16, Option<String>) {
    match error {
        OpenAIError::ApiError(error) => (error.status_code.as_u16(), error.api_error.code),
        other => panic!("not an answer of the API: {other}"),
    }
}

#[tokio::test]
async fn chats_whole_streamed_and_by_adapter() {
    let client = client();
    let mut texts = Vec::new();
    for model in ["demo", "pirate", "shout"] {
        let whole = client.chat().create(chat(model, 20).build().unwrap()).await.unwrap();
        assert_eq!((whole.model.as_str(), whole.choices.len()), (model, 1));
        let mut stream = client.chat().create_stream(chat(model, 20).build().unwrap()).await.unwrap();
        let mut text = String::new();
        let mut finished = None;
        while let Some(chunk) = stream.next().await {
            let choice = chunk.unwrap().choices.remove(0);
            text.push_str(choice.delta.content.as_deref().unwrap_or(""));
            finished = choice.finish_reason.or(finished);
        }
        assert_eq!(
            (Some(&text), finished),
            (whole.choices[0].message.content.as_ref(), whole.choices[0].finish_reason)
        );
        texts.push(text);
    }
    assert!(texts[0] != texts[1] && texts[2] == texts[2].to_uppercase(), "each adapter has its own voice");
    let drawn = chat("demo", 6).temperature(1.3).seed(7).n(2).logprobs(true).top_logprobs(2).build().unwrap();
    let first = client.chat().create(drawn.clone()).await.unwrap();
    assert_eq!(first.choices, client.chat().create(drawn).await.unwrap().choices);
    let logprobs = first.choices[1].logprobs.as_ref().unwrap().content.as_ref().unwrap();
    assert!(logprobs.iter().all(|entry| entry.top_logprobs.len() == 2));
}

#[tokio::test]
async fn completions_of_text_and_token_ids() {
    let client = client();
    let ask = |prompt: Prompt| {
        let mut request = CreateCompletionRequestArgs::default();
        request.model("sql").prompt(prompt).temperature(0.0).max_tokens(8_u32);
        request
    };
    let text = || Prompt::String(QUESTION.to_owned());
    let alone = client.completions().create(ask(text()).build().unwrap()).await.unwrap();
    let several = Prompt::StringArray(vec!["Describe coffee.".to_owned(), QUESTION.to_owned()]);
    let several = client.completions().create(ask(several).build().unwrap()).await.unwrap();
    assert_eq!(several.choices[1].text, alone.choices[0].text);
    let ids = Prompt::ArrayOfIntegerArray(vec![vec![100, 200, 300], vec![100, 200, 300]]);
    let ids = client.completions().create(ask(ids).logprobs(2_u8).echo(true).build().unwrap()).await.unwrap();
    assert_eq!((&ids.choices[0].text, ids.usage.unwrap().prompt_tokens), (&ids.choices[1].text, 6));
    let mut stream = client.completions().create_stream(ask(text()).build().unwrap()).await.unwrap();
    let mut streamed = String::new();
    while let Some(chunk) = stream.next().await {
        streamed.push_str(&chunk.unwrap().choices[0].text);
    }
    assert_eq!(streamed, alone.choices[0].text);
}

#[tokio::test]
async fn models_and_errors() {
    let client = client();
    let listed = client.models().list().await.unwrap();
    assert!(listed.data.iter().any(|model| model.id == "haiku"));
    assert_eq!(client.models().retrieve("demo").await.unwrap().id, "demo");
    let unknown = client.models().retrieve("nobody").await.unwrap_err();
    assert_eq!(api_error(unknown), (404, Some("model_not_found".to_owned())));
    let unknown = client.chat().create(chat("nobody", 4).build().unwrap()).await.unwrap_err();
    assert_eq!(api_error(unknown), (404, Some("model_not_found".to_owned())));
    let wrong = client.chat().create(chat("demo", 4).temperature(-1.0).build().unwrap()).await.unwrap_err();
    assert_eq!(api_error(wrong), (400, Some("invalid_value".to_owned())));
    let long = client.chat().create(chat("demo", 1_000_000).build().unwrap()).await.unwrap_err();
    assert_eq!(api_error(long), (400, Some("context_length_exceeded".to_owned())));
}

/// A request as the crate's types read it from JSON: what they send is what they understood.
fn from_json(changes: Value) -> CreateChatCompletionRequest {
    let mut request = json!({
        "model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_completion_tokens": 100,
    });
    request.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    serde_json::from_value(request).unwrap()
}

fn weather() -> Value {
    json!({"type": "object", "properties": {"city": {"enum": ["Oslo", "Paris"]}}, "required": ["city"], "additionalProperties": false})
}

#[tokio::test]
async fn structured_output() {
    let client = client();
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "weather", "schema": weather(), "strict": true}});
    let reply = client.chat().create(from_json(json!({"response_format": format}))).await.unwrap();
    let value: Value = serde_json::from_str(reply.choices[0].message.content.as_deref().unwrap()).unwrap();
    assert!(value["city"] == "Oslo" || value["city"] == "Paris", "{value}");
}

#[tokio::test]
async fn tools_that_must_be_called() {
    let client = client();
    let tool = json!({"type": "function", "function": {"name": "get_weather", "parameters": weather()}});
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "get_weather"}})] {
        let request = from_json(json!({"tools": [tool], "tool_choice": choice, "parallel_tool_calls": false}));
        let reply = client.chat().create(request.clone()).await.unwrap();
        let calls = reply.choices[0].message.tool_calls.as_ref().unwrap();
        let ChatCompletionMessageToolCalls::Function(call) = &calls[0] else { panic!("{calls:?}") };
        assert_eq!(call.function.name, "get_weather");
        let mut stream = client.chat().create_stream(request).await.unwrap();
        let (mut arguments, mut finished) = (String::new(), None);
        while let Some(chunk) = stream.next().await {
            let choice = chunk.unwrap().choices.remove(0);
            for part in choice.delta.tool_calls.unwrap_or_default() {
                arguments.push_str(part.function.and_then(|function| function.arguments).as_deref().unwrap_or(""));
            }
            finished = choice.finish_reason.or(finished);
        }
        assert_eq!((arguments.as_str(), finished), (call.function.arguments.as_str(), reply.choices[0].finish_reason));
        assert!(matches!(finished, Some(FinishReason::ToolCalls | FinishReason::Stop)));
    }
}

#[tokio::test]
async fn embeddings() {
    let client = client();
    let request =
        CreateEmbeddingRequestArgs::default().model("demo").input([QUESTION, "Describe coffee."]).build().unwrap();
    let reply = client.embeddings().create(request.clone()).await.unwrap();
    let packed = CreateEmbeddingRequest { encoding_format: Some(EncodingFormat::Base64), ..request };
    let packed = client.embeddings().create_base64(packed).await.unwrap();
    assert_eq!(reply.data.len(), 2);
    let unpacked: Vec<f32> = packed.data[0].embedding.clone().into();
    assert!(reply.data[0].embedding.iter().zip(&unpacked).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[tokio::test]
async fn responses() {
    let client = client();
    let request = CreateResponseArgs::default()
        .model("pirate")
        .input(QUESTION)
        .temperature(0.0)
        .max_output_tokens(20_u32)
        .build()
        .unwrap();
    let reply = client.responses().create(request.clone()).await.unwrap();
    let mut stream = client.responses().create_stream(request).await.unwrap();
    let mut text = String::new();
    while let Some(event) = stream.next().await {
        if let ResponseStreamEvent::ResponseOutputTextDelta(delta) = event.unwrap() {
            text.push_str(&delta.delta);
        }
    }
    assert_eq!(Some(text), reply.output_text());
}
