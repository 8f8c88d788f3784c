//! From a validated request to runs in the engine.

use std::sync::Arc;

use loramux_proto::Sampling;
use secrecy::SecretString;

use super::resolve::Variant;
use super::run::Run;
use super::sequence::{SequenceText, TextRules};
use super::validate::{Bounds, Params, fit};
use crate::access::Caller;
use crate::adapters::ResolvedAdapter;
use crate::engine::GenerateRequest;
use crate::http::App;
use crate::http::auth::Metered;
use crate::http::error::{ApiError, Cause};
use crate::metrics::{OTHER, RequestStart};
use crate::observe::RequestRecord;

/// A prompt ready to run.
pub(crate) struct EncodedPrompt {
    pub(crate) tokens: Vec<u32>,
    /// The prompt as text, if it is to be echoed.
    pub(crate) echo: Option<String>,
    pub(crate) max_tokens: u32,
}

/// What the two routes decide differently.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Sequences per prompt: n, or best_of.
    pub(crate) sequences: u32,
    /// Alternatives to report per generated token.
    pub(crate) logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub(crate) prompt_logprobs: Option<u32>,
}

/// Who asks, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) caller: Caller,
    /// What its key's use is charged to.
    pub(crate) metered: Option<Metered>,
    /// Its own token for an adapter's source, from a header.
    pub(crate) token: Option<SecretString>,
    pub(crate) deadline_ms: Option<u64>,
    /// Where it is written down what the request did.
    pub(crate) record: Option<Arc<RequestRecord>>,
}

/// Cuts a prompt down if the request asks for it, and fits it into the context.
///
/// # Errors
/// 400 for an empty prompt or one that does not fit.
pub(crate) fn fit_prompt(
    mut tokens: Vec<u32>,
    wanted_tokens: Option<u32>,
    default_tokens: Option<u32>,
    params: &Params,
    bounds: &Bounds,
) -> Result<EncodedPrompt, ApiError> {
    if let Some(keep) = params.truncate {
        let completion = wanted_tokens.or(default_tokens).unwrap_or(1);
        let fits = bounds.context_tokens.saturating_sub(completion).max(1);
        let keep = usize::try_from(keep).unwrap_or(fits as usize);
        tokens.drain(..tokens.len().saturating_sub(keep));
    }
    if tokens.is_empty() {
        return Err(ApiError::invalid(
            params.context_fields.prompt,
            "at least one token long (this tokenizer adds no BOS)",
            "an empty prompt",
        ));
    }
    let max_tokens = fit(tokens.len(), wanted_tokens, default_tokens, params, bounds)?;
    Ok(EncodedPrompt { tokens, echo: None, max_tokens })
}

/// `min_tokens` forbids the end tokens at first; something else must be allowed then.
fn check_something_may_come(sampling: &Sampling, end_tokens: &[u32]) -> Result<(), ApiError> {
    let allowed = &sampling.allowed_tokens;
    let contradiction =
        sampling.min_tokens > 0 && !allowed.is_empty() && allowed.iter().all(|t| end_tokens.contains(t));
    if contradiction {
        let rule = "a list with a token that does not end the text, because `min_tokens` forbids the others";
        return Err(ApiError::invalid("allowed_token_ids", rule, &format!("{allowed:?}")));
    }
    Ok(())
}

impl App {
    /// Adds `bad_words` to the rule for what may be generated.
    ///
    /// # Errors
    /// The tokenizer cannot read a word.
    pub(crate) async fn forbid_words(&self, params: &mut Params, bounds: &Bounds) -> Result<(), ApiError> {
        if params.bad_words.is_empty() {
            return Ok(());
        }
        let (words, allowed) = (std::mem::take(&mut params.bad_words), params.sampling.allowed_tokens.clone());
        let grammar = self.text.without_words(words, allowed, bounds.vocab, params.grammar.take()).await;
        params.grammar =
            Some(grammar.map_err(|error| ApiError::at(Cause::InvalidValue, "bad_words", error.to_string()))?);
        Ok(())
    }

    /// `/metrics` needs no key: it names what is registered for all, and nothing that one caller has or named.
    pub(crate) fn metrics_label(&self, variant: &Variant, caller: &Caller) -> String {
        match &*variant.adapters {
            [one] => self.public_name(one, caller).unwrap_or_else(|| OTHER.to_owned()),
            _ => OTHER.to_owned(),
        }
    }

    /// The name of an adapter that is registered for all; not one that a caller has or named.
    pub(crate) fn public_name(&self, adapter: &ResolvedAdapter, caller: &Caller) -> Option<String> {
        let is_public = caller.namespace.is_empty() && self.registry.is_shared_name(&adapter.name);
        is_public.then(|| adapter.name.clone())
    }

    /// Hands prompts x variants to the engine, prompt-major. An error drops (and so cancels) what was handed over.
    ///
    /// # Errors
    /// 429, 503, or what the engine finds at once.
    pub(crate) fn submit(
        &self,
        prompts: Vec<EncodedPrompt>,
        variants: &[Variant],
        params: &Params,
        wanted: Wanted,
        asker: Asker,
    ) -> Result<Vec<Run>, ApiError> {
        let model_ends = if params.ignore_eos { &[] } else { self.text.end_tokens() };
        let mut end_tokens: Vec<u32> = model_ends.iter().chain(&params.stop_tokens).copied().collect();
        end_tokens.sort_unstable();
        end_tokens.dedup();
        check_something_may_come(&params.sampling, &end_tokens)?;
        let rules = Arc::new(text_rules(params, &end_tokens));
        let mut runs = Vec::with_capacity(prompts.len() * variants.len());
        for prompt in prompts {
            let tokens: Arc<[u32]> = prompt.tokens.into();
            for variant in variants {
                let sampling = Sampling {
                    seed: params.seed.unwrap_or_else(random_seed),
                    end_tokens: end_tokens.clone(),
                    logprobs: wanted.logprobs,
                    prompt_logprobs: wanted.prompt_logprobs,
                    ..params.sampling.clone()
                };
                let start = RequestStart {
                    n: wanted.sequences,
                    max_tokens: prompt.max_tokens,
                    prompt_tokens: u32::try_from(tokens.len()).unwrap_or(u32::MAX),
                    meter: asker.metered.as_ref().map(|metered| Arc::clone(&metered.0)),
                    adapter: (!variant.adapters.is_empty()).then(|| self.metrics_label(variant, &asker.caller)),
                    record: asker.record.clone(),
                };
                let events = self.engine.submit(GenerateRequest {
                    prompt: Arc::clone(&tokens),
                    n: wanted.sequences,
                    max_tokens: prompt.max_tokens,
                    sampling,
                    grammar: params.grammar.clone(),
                    pooling: None,
                    adapters: variant.uses.clone(),
                    tenant: asker.caller.tenant,
                    cache_salt: params.cache_salt.clone(),
                    priority: params.priority,
                    deadline_ms: asker.deadline_ms,
                })?;
                let sequences =
                    (0..wanted.sequences).map(|_| SequenceText::new(Arc::clone(&rules), &self.text)).collect();
                runs.push(Run {
                    events,
                    clock: self.metrics.request(&start),
                    sequences,
                    first_choice: runs.len() * params.n as usize,
                    label: variant.label.clone(),
                    adapters: Arc::clone(&variant.adapters),
                    prompt: Arc::clone(&tokens),
                    echo: prompt.echo.clone(),
                    prompt_logprobs: Vec::new(),
                    cached_tokens: 0,
                    admitted: false,
                    all_stopped: true,
                });
            }
        }
        Ok(runs)
    }
}

/// Where the text of a sequence ends, and what of it is shown.
fn text_rules(params: &Params, end_tokens: &[u32]) -> TextRules {
    TextRules {
        stop: params.stop.clone(),
        end_tokens: end_tokens.to_vec(),
        stop_tokens: params.stop_tokens.clone(),
        include_stop: params.include_stop,
        skip_special: params.skip_special,
        shown_special: Arc::clone(&params.shown_special),
        min_tokens: params.sampling.min_tokens,
    }
}

/// For a request that names none.
pub(crate) fn random_seed() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high.rotate_left(32) ^ low
}
