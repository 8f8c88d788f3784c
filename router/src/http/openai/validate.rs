//! What the two generation routes have in common: every number is range-checked here, before anything is allocated.

use std::sync::Arc;
use std::time::Duration;

use loramux_proto::{LogitBias, Sampling};
use serde_json::Value;

use super::resolve::{AdapterAsk, adapter_ask};
use crate::engine::Grammar;
use crate::http::config::HttpLimits;
use crate::http::error::{ApiError, Cause};
use crate::http::json::{Fields, type_name, whole};
use crate::text::GenerationDefaults;

const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const STOP_TOKENS_MAX: usize = 256;
const BAD_WORDS_MAX: usize = 256;
const BAD_WORD_BYTES_MAX: usize = 256;
/// Entries of `logit_bias`.
pub(crate) const LOGIT_BIAS_MAX: usize = 1024;
/// Tokens of one chunk of a stream.
pub(crate) const STREAM_INTERVAL_MAX: i64 = 1024;
/// Most alternatives with a logprob.
pub(crate) const LOGPROBS_MAX: i64 = 20;
/// Below this, temperature means greedy.
pub(crate) const GREEDY_BELOW: f64 = 1e-5;

/// Numbers that the model and the server set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Token ids are below this.
    pub(crate) vocab: u32,
    /// Prompt and completion together.
    pub(crate) context_tokens: u32,
    pub(crate) limits: HttpLimits,
    pub(crate) defaults: GenerationDefaults,
    pub(crate) adapter_load_timeout: Duration,
    /// A request may prefer the base model to waiting.
    pub(crate) allow_base_fallback: bool,
    /// A request may bring its own `chat_template`.
    pub(crate) trust_request_chat_template: bool,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    /// Tokens of a chunk, at least; 0 and 1 mean as they come.
    pub(crate) interval: u32,
}

/// What a route calls the two fields that share the context.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ContextFields {
    pub(crate) prompt: &'static str,
    pub(crate) max_tokens: &'static str,
}

impl ContextFields {
    /// Says which of the two has to give way.
    pub(crate) fn over(self, context_tokens: usize, prompt_tokens: usize, completion_tokens: usize) -> ApiError {
        let param = if prompt_tokens >= context_tokens { self.prompt } else { self.max_tokens };
        ApiError {
            param: Some(param.into()),
            ..ApiError::context_length(context_tokens, prompt_tokens, completion_tokens)
        }
    }
}

/// A generation request without its prompt, in range.
#[derive(Clone, Debug)]
pub(crate) struct Params {
    /// As sent; empty = the first served name.
    pub(crate) model: String,
    /// Without end tokens, seed and logprobs.
    pub(crate) sampling: Sampling,
    /// What may be generated. Compiled after the fields were read.
    pub(crate) grammar: Option<Arc<dyn Grammar>>,
    /// Texts that must not be generated.
    pub(crate) bad_words: Vec<String>,
    pub(crate) seed: Option<u64>,
    pub(crate) n: u32,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) context_fields: ContextFields,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) stream: Option<StreamOptions>,
    pub(crate) skip_special: bool,
    /// Special tokens that are text all the same.
    pub(crate) shown_special: Arc<[u32]>,
    pub(crate) include_stop: bool,
    pub(crate) add_special: Option<bool>,
    /// -1 = what fits.
    pub(crate) truncate: Option<i64>,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_ids: bool,
    pub(crate) cache_salt: Option<String>,
    pub(crate) priority: i32,
    pub(crate) adapter: AdapterAsk,
}

/// Reads the common fields.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn params(fields: &Fields<'_>, bounds: &Bounds) -> Result<Params, ApiError> {
    let interval = small(fields, "stream_interval", 1, STREAM_INTERVAL_MAX)?.unwrap_or(1);
    let stream = stream(fields)?.map(|options| StreamOptions { interval, ..options });
    let prompt_logprobs = small(fields, "prompt_logprobs", 0, LOGPROBS_MAX)?;
    if prompt_logprobs.is_some() && stream.is_some() {
        return Err(ApiError::invalid("prompt_logprobs", "absent when `stream` is true", "both"));
    }
    labels(fields)?;
    fields.boolean("spaces_between_special_tokens")?; // only slow tokenizers look at it, and there are none here
    let context = i64::from(bounds.context_tokens);
    Ok(Params {
        model: fields.string("model")?.unwrap_or("").to_owned(),
        sampling: sampling(fields, bounds)?,
        grammar: None,
        bad_words: bad_words(fields)?,
        seed: fields.integer("seed", "an integer of 64 bits", |_| true)?.map(|seed| seed as u64),
        n: small(fields, "n", 1, i64::from(bounds.limits.n_max))?.unwrap_or(1),
        max_tokens: None,
        context_fields: ContextFields { prompt: "prompt", max_tokens: "max_tokens" },
        stop: stops(fields, STOPS_MAX, None)?,
        stop_tokens: token_list(fields, "stop_token_ids", STOP_TOKENS_MAX, bounds.vocab)?,
        ignore_eos: fields.boolean("ignore_eos")?.or(fields.boolean("ignore_eos_token")?).unwrap_or(false),
        prompt_logprobs,
        stream,
        skip_special: fields.boolean("skip_special_tokens")?.unwrap_or(true),
        shown_special: Arc::default(),
        include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        add_special: fields.boolean("add_special_tokens")?,
        truncate: fields.integer("truncate_prompt_tokens", &format!("-1 or 1..{context}"), |k| {
            k == -1 || (1..=context).contains(&k)
        })?,
        return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
        tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
        cache_salt: bounded_text(fields, "cache_salt", 1, 256)?,
        priority: fields.integer("priority", "-100..100", |p| (-100..=100).contains(&p))?.unwrap_or(0) as i32,
        adapter: adapter_ask(fields, bounds)?,
    })
}

/// Fields that are checked and otherwise unused.
fn labels(fields: &Fields<'_>) -> Result<(), ApiError> {
    bounded_text(fields, "request_id", 0, 128)?;
    Ok(())
}

fn sampling(fields: &Fields<'_>, bounds: &Bounds) -> Result<Sampling, ApiError> {
    let defaults = bounds.defaults;
    let unit = |name: &str| fields.number(name, "a number in 0..1", |p| (0.0..=1.0).contains(&p));
    let penalty = |name: &str| fields.number(name, "a number in -2..2", |p| (-2.0..=2.0).contains(&p));
    let temperature =
        fields.number("temperature", "a finite number >= 0", |t| t >= 0.0)?.or(defaults.temperature).unwrap_or(1.0);
    let vocab = i64::from(bounds.vocab);
    let top_k = fields.integer("top_k", &format!("-1, 0 or 1..{vocab}"), |k| (-1..=vocab).contains(&k))?;
    let repetition = fields.number("repetition_penalty", "a number > 0 and <= 10", |p| p > 0.0 && p <= 10.0)?;
    Ok(Sampling {
        temperature: if temperature < GREEDY_BELOW { 0.0 } else { temperature.min(f64::from(f32::MAX)) as f32 },
        top_k: top_k.or(defaults.top_k.map(|k| k.min(vocab))).unwrap_or(0).max(0) as u32,
        top_p: unit("top_p")?.or(defaults.top_p).unwrap_or(1.0) as f32,
        min_p: unit("min_p")?.or(defaults.min_p).unwrap_or(0.0) as f32,
        // The smallest f32 above zero is still a valid penalty; zero is not.
        repetition_penalty: (repetition.or(defaults.repetition_penalty).unwrap_or(1.0) as f32).max(f32::MIN_POSITIVE),
        presence_penalty: penalty("presence_penalty")?.unwrap_or(0.0) as f32,
        frequency_penalty: penalty("frequency_penalty")?.unwrap_or(0.0) as f32,
        min_tokens: fields
            .integer("min_tokens", &format!("0..{}", bounds.context_tokens), |m| {
                (0..=i64::from(bounds.context_tokens)).contains(&m)
            })?
            .unwrap_or(0) as u32,
        logit_bias: logit_bias(fields, bounds.vocab)?,
        allowed_tokens: allowed_tokens(fields, bounds.vocab)?,
        ..Sampling::default()
    })
}

fn allowed_tokens(fields: &Fields<'_>, vocab: u32) -> Result<Vec<u32>, ApiError> {
    let mut ids = token_list(fields, "allowed_token_ids", vocab as usize, vocab)?;
    if ids.is_empty() && fields.get("allowed_token_ids").is_some() {
        return Err(ApiError::invalid("allowed_token_ids", "a list of at least one id", "an empty list"));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn stream(fields: &Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let wanted = fields.boolean("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    let read = |options: &Fields<'_>| -> Result<StreamOptions, ApiError> {
        let continuous_usage = options.boolean("continuous_usage_stats")?.unwrap_or(false);
        let include_usage = options.boolean("include_usage")?.unwrap_or(false);
        Ok(StreamOptions { include_usage, continuous_usage, ..StreamOptions::default() })
    };
    match (wanted, options) {
        (false, Some(_)) => Err(ApiError::invalid("stream_options", "absent unless `stream` is true", "an object")),
        (false, None) => Ok(None),
        (true, None) => Ok(Some(StreamOptions::default())),
        (true, Some(options)) => read(&options).map(Some),
    }
}

/// An integer in `min..=max`.
pub(crate) fn small(fields: &Fields<'_>, name: &str, min: i64, max: i64) -> Result<Option<u32>, ApiError> {
    let value = fields.integer(name, &format!("{min}..{max}"), |v| (min..=max).contains(&v))?;
    Ok(value.and_then(|v| u32::try_from(v).ok()))
}

/// `max_tokens` and its kin: `min..=context`.
///
/// # Errors
/// 400; a number beyond the context is a context error, as clients expect.
pub(crate) fn max_tokens(fields: &Fields<'_>, name: &str, min: i64) -> Result<Option<u32>, ApiError> {
    let value = fields.integer(name, &format!("an integer >= {min}"), |v| v >= min)?;
    Ok(value.map(|v| u32::try_from(v).unwrap_or(u32::MAX)))
}

/// `stop`: at most `stops_max` strings, a number that `flag` may change.
///
/// # Errors
/// 400 at `stop`.
pub(crate) fn stops(fields: &Fields<'_>, stops_max: usize, flag: Option<&str>) -> Result<Vec<String>, ApiError> {
    let check = |value: &Value| match value {
        Value::String(text) if (1..=STOP_BYTES_MAX).contains(&text.len()) => Ok(text.clone()),
        Value::String(text) => {
            Err(ApiError::invalid("stop", "strings of 1..256 bytes", &format!("one of {} bytes", text.len())))
        }
        other => Err(ApiError::invalid("stop", "a string or an array of strings", type_name(other))),
    };
    match fields.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) if values.len() > stops_max => {
            Err(ApiError::limit("stop", values.len(), "strings", stops_max, flag))
        }
        Some(Value::Array(values)) => values.iter().map(check).collect(),
        Some(value) => check(value).map(|text| vec![text]),
    }
}

/// Words that are not blank.
fn bad_words(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "bad_words";
    let Some(values) = fields.array(NAME)? else { return Ok(Vec::new()) };
    if values.len() > BAD_WORDS_MAX {
        return Err(ApiError::limit(NAME, values.len(), "strings", BAD_WORDS_MAX, None));
    }
    let check = |value: &Value| match value {
        Value::String(text) if text.len() <= BAD_WORD_BYTES_MAX && !text.trim().is_empty() => Ok(text.clone()),
        Value::String(text) => {
            let rule = "strings of 1..256 bytes that are not blank";
            Err(ApiError::invalid(NAME, rule, &format!("one of {} bytes", text.len())))
        }
        other => Err(ApiError::invalid(NAME, "an array of strings", type_name(other))),
    };
    values.iter().map(check).collect()
}

/// A list of at most `len_max` token ids.
fn token_list(fields: &Fields<'_>, name: &str, len_max: usize, vocab: u32) -> Result<Vec<u32>, ApiError> {
    let Some(values) = fields.array(name)? else { return Ok(Vec::new()) };
    if values.len() > len_max {
        return Err(ApiError::limit(name, values.len(), "ids", len_max, None));
    }
    values.iter().map(|value| token_id(name, value, vocab)).collect()
}

/// One token id.
///
/// # Errors
/// 400 at `param` unless it is an integer in `0..vocab`.
pub(crate) fn token_id(param: &str, value: &Value, vocab: u32) -> Result<u32, ApiError> {
    let Value::Number(number) = value else {
        return Err(ApiError::invalid(param, "token ids (integers)", type_name(value)));
    };
    let id = whole(number).and_then(|id| u32::try_from(id).ok()).filter(|id| *id < vocab);
    id.ok_or_else(|| ApiError::invalid(param, &format!("token ids in 0..{vocab}"), &number.to_string()))
}

fn logit_bias(fields: &Fields<'_>, vocab: u32) -> Result<Vec<LogitBias>, ApiError> {
    const NAME: &str = "logit_bias";
    let Some(value) = fields.get(NAME) else { return Ok(Vec::new()) };
    let Value::Object(map) = value else { return Err(ApiError::invalid(NAME, "an object", type_name(value))) };
    if map.len() > LOGIT_BIAS_MAX {
        return Err(ApiError::limit(NAME, map.len(), "entries", LOGIT_BIAS_MAX, None));
    }
    let one = |(key, value): (&String, &Value)| {
        let id = key.parse::<u32>().ok().filter(|id| *id < vocab && !key.starts_with('+'));
        let token = id.ok_or_else(|| ApiError::invalid(NAME, &format!("a map from token ids in 0..{vocab}"), key))?;
        let Value::Number(number) = value else {
            return Err(ApiError::invalid(NAME, "a map to numbers in -100..100", type_name(value)));
        };
        let bias = number.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| ApiError::invalid(NAME, "a map to numbers in -100..100", &number.to_string()))?;
        Ok(LogitBias { token, bias: bias as f32 })
    };
    let mut biases = map.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    biases.sort_unstable_by_key(|bias| bias.token);
    if let Some(twice) = biases.windows(2).find(|pair| pair.first().map(|b| b.token) == pair.last().map(|b| b.token)) {
        let token = twice.first().map_or(0, |bias| bias.token);
        return Err(ApiError::invalid(NAME, "a map with each id once", &format!("{token} twice")));
    }
    Ok(biases)
}

fn bounded_text(fields: &Fields<'_>, name: &str, min: usize, max: usize) -> Result<Option<String>, ApiError> {
    let Some(text) = fields.string(name)? else { return Ok(None) };
    if (min..=max).contains(&text.len()) {
        return Ok(Some(text.to_owned()));
    }
    Err(ApiError::invalid(name, &format!("a string of {min}..{max} bytes"), &format!("{} bytes", text.len())))
}

/// Fits a prompt and its completion into the context. Returns the tokens to generate at most.
///
/// # Errors
/// `context_length_exceeded`, or `invalid_value` for `min_tokens` beyond `max_tokens`.
pub(crate) fn fit(
    prompt_tokens: usize,
    wanted: Option<u32>,
    default: Option<u32>,
    params: &Params,
    bounds: &Bounds,
) -> Result<u32, ApiError> {
    let context = bounds.context_tokens as usize;
    let over = |completion: usize| params.context_fields.over(context, prompt_tokens, completion);
    let left = context.saturating_sub(prompt_tokens);
    let max_tokens = match wanted {
        Some(wanted) if wanted as usize > left || prompt_tokens > context => return Err(over(wanted as usize)),
        Some(wanted) => wanted,
        None if left == 0 => return Err(over(1)),
        None => default.unwrap_or(u32::MAX).min(left as u32),
    };
    if params.sampling.min_tokens > max_tokens {
        let given = params.sampling.min_tokens.to_string();
        return Err(ApiError::invalid("min_tokens", &format!("at most max_tokens ({max_tokens})"), &given));
    }
    Ok(max_tokens)
}

/// Refuses a request with more sequences than one may have.
pub(crate) fn check_sequences(param: &str, sequences: usize, limits: &HttpLimits) -> Result<(), ApiError> {
    if sequences > limits.sequences_max {
        return Err(ApiError::limit(
            param,
            sequences,
            "sequences",
            limits.sequences_max,
            Some("max-sequences-per-request"),
        ));
    }
    Ok(())
}

/// `best_of` goes with `n` and not with streams.
pub(crate) fn best_of(fields: &Fields<'_>, params: &Params, limits: &HttpLimits) -> Result<u32, ApiError> {
    let best_of = small(fields, "best_of", 1, i64::from(limits.n_max))?.unwrap_or(params.n);
    if best_of < params.n {
        return Err(ApiError::invalid("best_of", &format!("at least n ({})", params.n), &best_of.to_string()));
    }
    if best_of > params.n && params.stream.is_some() {
        let message = "`best_of` must be equal to n when `stream` is true: the best is known only at the end";
        return Err(ApiError::at(Cause::InvalidValue, "best_of", message));
    }
    Ok(best_of)
}
