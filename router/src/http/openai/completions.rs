//! `POST /v1/completions`.

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::http::request::Parts;
use axum::response::Response;
use serde_json::{Map, Value};

use super::prompt::{Prompt, prompts};
use super::reply::{Kind, Shape};
use super::submit::{EncodedPrompt, Wanted, fit_prompt};
use super::unsupported;
use super::validate::{Bounds, LOGPROBS_MAX, Params, best_of, check_sequences, max_tokens, params, small};
use crate::http::App;
use crate::http::body::json_object;
use crate::http::error::ApiError;
use crate::http::json::Fields;
use crate::http::known_fields;

/// OpenAI's default; clients rely on it being small.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The request beyond what both routes share.
struct CompletionRequest {
    params: Params,
    prompts: Vec<Prompt>,
    logprobs: Option<u32>,
    echo: bool,
    best_of: u32,
}

/// The handler.
pub(crate) async fn completions(State(app): State<App>, request: Request<Body>) -> Result<Response, ApiError> {
    let (parts, body) = json_object(request, &app.config.limits).await?;
    app.completion(&parts, &body).await
}

fn validate(fields: &Fields<'_>, bounds: &Bounds) -> Result<CompletionRequest, ApiError> {
    unsupported::check_completions(fields)?;
    let mut params = params(fields, bounds)?;
    params.max_tokens = max_tokens(fields, "max_tokens", 0)?;
    let prompts = prompts(fields, "prompt", bounds.vocab)?;
    let best_of = best_of(fields, &params, &bounds.limits)?;
    check_sequences("prompt", prompts.len() * best_of as usize, &bounds.limits)?;
    Ok(CompletionRequest {
        logprobs: small(fields, "logprobs", 0, LOGPROBS_MAX)?,
        echo: fields.boolean("echo")?.unwrap_or(false),
        best_of,
        prompts,
        params,
    })
}

impl App {
    /// Completes prompts.
    ///
    /// # Errors
    /// Whatever stands in its way.
    pub(crate) async fn completion(&self, parts: &Parts, body: &Map<String, Value>) -> Result<Response, ApiError> {
        let bounds = self.bounds()?;
        let asker = self.asker(parts)?;
        let mut asked = validate(&Fields::new(body), &bounds)?;
        let ignored = self.ignored_fields(known_fields::Body::Completion, body)?;
        asked.params.grammar = self.reply_grammar(body).await?;
        let variants = self.resolve(&asked.params, &asker).await?;
        let sequences = asked.prompts.len() * variants.len() * asked.best_of as usize;
        check_sequences("prompt", sequences, &bounds.limits)?;
        let mut prompts = Vec::with_capacity(asked.prompts.len());
        for prompt in asked.prompts {
            prompts.push(self.encode_prompt(prompt, &asked.params, asked.echo, &bounds).await?);
        }
        let mut shape = Shape::new(self, Kind::Completion, &asked.params);
        (shape.logprobs, shape.echo) = (asked.logprobs, asked.echo);
        let ranked = asked.best_of > asked.params.n;
        let wanted = Wanted {
            sequences: asked.best_of,
            logprobs: asked.logprobs.or(ranked.then_some(0)),
            prompt_logprobs: asked.params.prompt_logprobs.max(asked.logprobs.filter(|_| asked.echo)),
        };
        self.forbid_words(&mut asked.params, &bounds).await?;
        let runs = self.submit(prompts, &variants, &asked.params, wanted, asker)?;
        let mut response = self.answer(shape, runs, &asked.params, &variants, parts).await?;
        ignored.name_in(&mut response);
        Ok(response)
    }

    async fn encode_prompt(
        &self,
        prompt: Prompt,
        params: &Params,
        echo: bool,
        bounds: &Bounds,
    ) -> Result<EncodedPrompt, ApiError> {
        let (tokens, text) = match prompt {
            Prompt::Text(text) => {
                let least = self.text.tokens_at_least(text.len());
                if least > bounds.context_tokens as usize && params.truncate.is_none() {
                    // Megabytes take seconds to encode; these cannot fit.
                    let wanted = params.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS) as usize;
                    return Err(params.context_fields.over(bounds.context_tokens as usize, least, wanted));
                }
                let tokens = self.text.encode(text.clone(), params.add_special.unwrap_or(true)).await?;
                (tokens, Some(text))
            }
            Prompt::Tokens(tokens) => (tokens, None),
        };
        let len_tokens = tokens.len();
        let mut prompt = fit_prompt(tokens, params.max_tokens, Some(DEFAULT_MAX_TOKENS), params, bounds)?;
        if echo {
            // A prompt that was cut is echoed as it was used.
            let whole = text.filter(|_| prompt.tokens.len() == len_tokens);
            prompt.echo = Some(whole.unwrap_or_else(|| self.text.decode(&prompt.tokens, true)));
        }
        Ok(prompt)
    }
}
