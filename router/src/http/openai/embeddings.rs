//! `POST /v1/embeddings`: the decoder's final hidden states of each input, pooled.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use loramux_proto::Sampling;
use serde::Serialize;
use serde_json::{Map, Value};

use super::prompt::{Prompt, prompts};
use super::reply::name_the_source;
use super::resolve::Variant;
use super::submit::{Asker, fit_prompt};
use super::validate::{Bounds, ContextFields, Params, check_sequences, params};
use crate::engine::{GenerateEvent, GenerateRequest, Pooling};
use crate::http::body::json_object;
use crate::http::error::{ApiError, Cause};
use crate::http::json::Fields;
use crate::http::{App, Events, known_fields};
use crate::metrics::{Finished, RequestClock, RequestStart};

/// More than any model's hidden states have.
const DIMENSIONS_MAX: i64 = 1 << 16;

struct EmbeddingRequest {
    params: Params,
    inputs: Vec<Prompt>,
    pooling: Pooling,
    normalize: bool,
    dimensions: Option<u32>,
    base64: bool,
}

#[derive(Serialize)]
struct Reply<'a> {
    object: &'static str,
    data: Vec<Datum>,
    model: &'a str,
    usage: Usage,
}

#[derive(Serialize)]
struct Datum {
    object: &'static str,
    index: usize,
    embedding: Embedding,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Embedding {
    Floats(Vec<f32>),
    /// Little-endian f32.
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// One input in the engine. Dropping it cancels it.
struct Waiting {
    events: Box<dyn Events>,
    clock: RequestClock,
    prompt_tokens: usize,
}

/// The handler.
pub(crate) async fn embeddings(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.embed(&parts, &body).await
}

fn validate(fields: &Fields<'_>, bounds: &Bounds, pooling: Pooling) -> Result<EmbeddingRequest, ApiError> {
    let mut params = params(fields, bounds)?;
    params.context_fields = ContextFields { prompt: "input", max_tokens: "input" };
    for (name, set) in [("stream", params.stream.is_some()), ("adapters", params.adapter.fan_out.is_some())] {
        if set {
            return Err(ApiError::unsupported(name, "embeddings come one for each input, in one reply"));
        }
    }
    let inputs = prompts(fields, "input", bounds.vocab)?;
    check_sequences("input", inputs.len(), &bounds.limits)?;
    Ok(EmbeddingRequest {
        inputs,
        params,
        pooling: match fields.string("pooling")? {
            None => pooling,
            Some("mean") => Pooling::Mean,
            Some("last") => Pooling::Last,
            Some(other) => return Err(ApiError::invalid("pooling", "one of mean, last", other)),
        },
        normalize: fields.boolean("normalize")?.unwrap_or(true),
        dimensions: dimensions(fields)?,
        base64: match fields.string("encoding_format")? {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => return Err(ApiError::invalid("encoding_format", "one of float, base64", other)),
        },
    })
}

/// `dimensions`. The model's own width is known with the result; then it is held to that.
fn dimensions(fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let rule = "at least 1 and at most the width of the model's embeddings";
    let value = fields.integer("dimensions", rule, |value| (1..=DIMENSIONS_MAX).contains(&value))?;
    Ok(value.and_then(|value| u32::try_from(value).ok()))
}

impl App {
    async fn embed(&self, parts: &Parts, body: &Map<String, Value>) -> Result<Response, ApiError> {
        let bounds = self.bounds()?;
        let asker = self.asker(parts)?;
        let asked = validate(&Fields::new(body), &bounds, self.config.pooling)?;
        let ignored = self.ignored_fields(known_fields::Body::Embeddings, body)?;
        let variants = self.resolve(&asked.params, &asker).await?;
        let [variant] = variants.as_slice() else {
            return Err(ApiError::new(Cause::InternalError, "an embedding has one adapter set"));
        };
        let mut prompts = Vec::with_capacity(asked.inputs.len());
        for input in asked.inputs {
            let prompt = match input {
                Prompt::Text(text) => self.encode_input(text, &asked.params, &bounds).await?,
                Prompt::Tokens(tokens) => tokens,
            };
            prompts.push(fit_prompt(prompt, Some(0), None, &asked.params, &bounds)?.tokens);
        }
        let waiting = prompts
            .into_iter()
            .map(|prompt| self.submit_input(prompt, variant, asked.pooling, &asked.params, &asker))
            .collect::<Result<Vec<_>, _>>()?;
        let prompt_tokens = waiting.iter().map(|input| input.prompt_tokens).sum();
        let mut ending = self.ending();
        let embeddings = tokio::select! {
            embeddings = futures_util::future::try_join_all(waiting.into_iter().map(Waiting::end)) => embeddings?,
            _ = ending.wait_for(|ending| *ending) => {
                return Err(ApiError::new(Cause::Draining, "the server is shutting down"));
            }
        };
        let mut data = Vec::with_capacity(embeddings.len());
        for (index, values) in embeddings.into_iter().enumerate() {
            let values = shape(values, asked.dimensions, asked.normalize)?;
            let embedding = if asked.base64 { Embedding::Base64(base64(&values)) } else { Embedding::Floats(values) };
            data.push(Datum { object: "embedding", index, embedding });
        }
        let model = if asked.params.model.is_empty() { self.base_name() } else { &asked.params.model };
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens };
        let mut response = Json(Reply { object: "list", data, model, usage }).into_response();
        name_the_source(&mut response, self, &variants);
        ignored.name_in(&mut response);
        Ok(response)
    }

    async fn encode_input(&self, text: String, params: &Params, bounds: &Bounds) -> Result<Vec<u32>, ApiError> {
        let least = self.text.tokens_at_least(text.len());
        if least > bounds.context_tokens as usize && params.truncate.is_none() {
            return Err(params.context_fields.over(bounds.context_tokens as usize, least, 0));
        }
        Ok(self.text.encode(text, params.add_special.unwrap_or(true)).await?)
    }

    fn submit_input(
        &self,
        prompt: Vec<u32>,
        variant: &Variant,
        pooling: Pooling,
        params: &Params,
        asker: &Asker,
    ) -> Result<Waiting, ApiError> {
        let prompt: Arc<[u32]> = prompt.into();
        let prompt_tokens = prompt.len();
        let start = RequestStart {
            n: 1,
            max_tokens: 0,
            prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
            meter: asker.metered.as_ref().map(|metered| Arc::clone(&metered.0)),
            adapter: (!variant.adapters.is_empty()).then(|| self.metrics_label(variant, &asker.caller)),
            record: asker.record.clone(),
        };
        let events = self.engine.submit(GenerateRequest {
            prompt,
            n: 1,
            max_tokens: 0,
            sampling: Sampling::default(),
            grammar: None,
            pooling: Some(pooling),
            adapters: variant.uses.clone(),
            tenant: asker.caller.tenant,
            cache_salt: params.cache_salt.clone(),
            priority: params.priority,
            deadline_ms: asker.deadline_ms,
        })?;
        Ok(Waiting { events, clock: self.metrics.request(&start), prompt_tokens })
    }
}

impl Waiting {
    /// Waits for the embedding.
    async fn end(mut self) -> Result<Vec<f32>, ApiError> {
        let mut embedding = None;
        loop {
            match std::future::poll_fn(|cx| self.events.poll_recv(cx)).await {
                Some(GenerateEvent::Admitted { cached_tokens }) => self.clock.admitted(cached_tokens),
                Some(GenerateEvent::Embedding { values }) => embedding = Some(values),
                Some(GenerateEvent::Failed(failure)) => return Err(failure.into()),
                Some(GenerateEvent::Finished { .. }) if embedding.is_some() => break,
                Some(GenerateEvent::Token { .. } | GenerateEvent::PromptLogprobs { .. }) => {}
                Some(GenerateEvent::Finished { .. }) | None => {
                    return Err(ApiError::new(Cause::InternalError, "the engine ended before the embedding came"));
                }
            }
        }
        self.clock.finished(Finished::Stop);
        Ok(embedding.unwrap_or_default())
    }
}

/// The first `dimensions` values, of length one if `normalize`.
fn shape(mut values: Vec<f32>, dimensions: Option<u32>, normalize: bool) -> Result<Vec<f32>, ApiError> {
    if let Some(wanted) = dimensions {
        if wanted as usize > values.len() {
            return Err(ApiError::invalid("dimensions", &format!("1..{}", values.len()), &wanted.to_string()));
        }
        values.truncate(wanted as usize);
    }
    if values.iter().any(|value| !value.is_finite()) {
        let message = "the model produced a non-finite embedding; its adapter's weights are the likely cause";
        return Err(ApiError::new(Cause::AdapterNumerics, message));
    }
    let length = values.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    if normalize && length > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    Ok(values)
}

fn base64(values: &[f32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embeddings_are_cut_before_they_are_normalised() {
        assert_eq!(shape(vec![3.0, 4.0, 100.0], Some(2), true).unwrap(), [0.6, 0.8]);
        assert_eq!(shape(vec![3.0, 4.0], None, false).unwrap(), [3.0, 4.0]);
        assert_eq!(shape(vec![0.0, 0.0], None, true).unwrap(), [0.0, 0.0]);
        assert!(shape(vec![1.0], Some(2), true).is_err());
        assert!(shape(vec![1.0, f32::NAN], None, true).is_err());
        assert_eq!(base64(&[1.0, -2.0]), "AACAPwAAAMA=");
    }
}
