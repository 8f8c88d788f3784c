//! What LoRAX's routes read: `inputs` and `parameters`, range-checked before anything is allocated.

use loramux_proto::Sampling;
use serde_json::{Map, Value};

use super::Form;
use super::merged::merged_adapters;
use crate::adapters::MergeSpec;
use crate::http::error::{ApiError, Cause};
use crate::http::json::{Fields, type_name};
use crate::http::openai::format::{Format, native_format};
use crate::http::openai::resolve::adapter_ask;
use crate::http::openai::submit::{Wanted, random_seed};
use crate::http::openai::validate::{
    Bounds, ContextFields, GREEDY_BELOW, LOGPROBS_MAX, Params, StreamOptions, max_tokens, small, stops,
};

/// Seeds of our own choice stay below this: readers that hold numbers as f64 show them exactly.
const OWN_SEED_BITS: u32 = 53;

/// A request to one of LoRAX's routes, in range.
#[derive(Clone, Debug)]
pub(super) struct NativeRequest {
    pub(super) inputs: String,
    pub(super) params: Params,
    /// Not greedy: the seed means something.
    pub(super) sampled: bool,
    /// `inputs` is a user's message.
    pub(super) apply_chat_template: bool,
    pub(super) details: bool,
    /// Show the prompt's tokens too.
    pub(super) prefill: bool,
    pub(super) best_of: u32,
    /// `return_k_alternatives`.
    pub(super) alternatives: Option<u32>,
    /// `top_n_tokens`.
    pub(super) top_tokens: Option<u32>,
    /// Put `inputs` in front of the text.
    pub(super) full_text: bool,
    pub(super) merged: Option<MergeSpec>,
    /// What the text must look like.
    pub(super) format: Option<Format>,
}

impl NativeRequest {
    /// What the engine has to report.
    pub(super) fn wanted(&self) -> Wanted {
        let shown = self.details || self.params.stream.is_some() || self.best_of > 1;
        let top = self.alternatives.max(self.top_tokens);
        Wanted {
            sequences: self.best_of,
            logprobs: shown.then_some(top.unwrap_or(0)),
            prompt_logprobs: self.prefill.then_some(0),
        }
    }
}

/// Reads a whole body.
///
/// # Errors
/// Names the field.
pub(super) fn native_request(body: &Fields<'_>, form: Form, bounds: &Bounds) -> Result<NativeRequest, ApiError> {
    let inputs = body.string("inputs")?.ok_or_else(|| ApiError::missing("inputs"))?;
    if inputs.is_empty() {
        return Err(ApiError::invalid("inputs", "a string that is not empty", "an empty string"));
    }
    let asked_stream = body.boolean("stream")?.unwrap_or(false);
    let stream = match form {
        Form::Compat => asked_stream,
        Form::Whole => false,
        Form::Stream => true,
    };
    let none = Map::new();
    let fields = match body.get("parameters") {
        None => Fields::new(&none),
        // Names in messages are the parameters' own, as LoRAX spells them.
        Some(Value::Object(map)) => Fields::new(map),
        Some(other) => return Err(ApiError::invalid("parameters", "an object", type_name(other))),
    };
    unsupported(&fields)?;
    let sampled = is_sampled(&fields)?;
    let best_of = best_of(&fields, sampled, stream, bounds)?;
    let prefill = fields.boolean("decoder_input_details")?.unwrap_or(false);
    if prefill && stream {
        return Err(ApiError::invalid("decoder_input_details", "false in a stream", "true"));
    }
    let merged = merged_adapters(&fields)?;
    let params = params(&fields, sampled, stream, bounds)?;
    if merged.is_some() && params.adapter.names_any() {
        let message = "`merged_adapters` and `adapter_id` exclude each other; send one";
        return Err(ApiError::at(Cause::AdapterAmbiguous, "merged_adapters", message));
    }
    Ok(NativeRequest {
        inputs: inputs.to_owned(),
        sampled,
        apply_chat_template: fields.boolean("apply_chat_template")?.unwrap_or(false),
        details: fields.boolean("details")?.unwrap_or(false) || prefill,
        prefill,
        best_of,
        alternatives: small(&fields, "return_k_alternatives", 1, LOGPROBS_MAX)?,
        top_tokens: small(&fields, "top_n_tokens", 0, LOGPROBS_MAX)?.filter(|n| *n > 0),
        full_text: fields.boolean("return_full_text")?.unwrap_or(false),
        merged,
        format: native_format(&fields)?,
        params,
    })
}

/// Refused by name: a text that ignores them would not be what was asked for.
fn unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    const NOT_YET: &str = "this version does not have it yet";
    if fields.boolean("watermark")?.unwrap_or(false) {
        return Err(ApiError::unsupported("watermark", "this server does not mark its texts"));
    }
    let typical = fields.number("typical_p", "a number > 0 and < 1", |p| p > 0.0 && p < 1.0)?;
    if typical.is_some() {
        return Err(ApiError::unsupported("typical_p", NOT_YET));
    }
    if fields.get("adapters").is_some() {
        return Err(ApiError::unsupported("adapters", "a reply of this route has one text; /v1/completions fans out"));
    }
    Ok(())
}

/// LoRAX samples if it is asked to, or if any number that shapes the distribution is set.
fn is_sampled(fields: &Fields<'_>) -> Result<bool, ApiError> {
    let shaped = ["temperature", "top_k", "top_p", "typical_p"].iter().any(|name| fields.get(name).is_some());
    Ok(fields.boolean("do_sample")?.unwrap_or(false) || shaped)
}

fn best_of(fields: &Fields<'_>, sampled: bool, stream: bool, bounds: &Bounds) -> Result<u32, ApiError> {
    let best_of = small(fields, "best_of", 1, i64::from(bounds.limits.n_max))?.unwrap_or(1);
    if best_of == 1 {
        return Ok(1);
    }
    let given = best_of.to_string();
    if stream {
        return Err(ApiError::invalid("best_of", "1 in a stream: the best is known only at the end", &given));
    }
    if !sampled {
        let rule = "1 without sampling (set do_sample, temperature, top_k or top_p)";
        return Err(ApiError::invalid("best_of", rule, &given));
    }
    if fields.get("seed").is_some() {
        return Err(ApiError::invalid("seed", "absent when `best_of` is above 1", "both"));
    }
    Ok(best_of)
}

fn params(fields: &Fields<'_>, sampled: bool, stream: bool, bounds: &Bounds) -> Result<Params, ApiError> {
    let context = i64::from(bounds.context_tokens);
    let seed = seed(fields)?.unwrap_or_else(|| random_seed() >> (u64::BITS - OWN_SEED_BITS));
    Ok(Params {
        model: String::new(),
        grammar: None,
        bad_words: Vec::new(),
        sampling: sampling(fields, sampled, bounds)?,
        seed: Some(seed),
        n: 1,
        max_tokens: max_tokens(fields, "max_new_tokens", 1)?,
        context_fields: ContextFields { prompt: "inputs", max_tokens: "max_new_tokens" },
        stop: stop_sequences(fields, bounds)?,
        stop_tokens: Vec::new(),
        ignore_eos: fields.boolean("ignore_eos_token")?.unwrap_or(false),
        prompt_logprobs: None,
        stream: stream.then(StreamOptions::default),
        skip_special: true,
        shown_special: std::sync::Arc::default(),
        // A stop sequence is part of LoRAX's text; clients that do not want it cut it off.
        include_stop: true,
        add_special: Some(true),
        truncate: fields.integer("truncate", &format!("1..{context}"), |k| (1..=context).contains(&k))?,
        return_token_ids: false,
        tokens_as_ids: false,
        cache_salt: None,
        priority: 0,
        adapter: adapter_ask(fields, bounds)?,
    })
}

fn stop_sequences(fields: &Fields<'_>, bounds: &Bounds) -> Result<Vec<String>, ApiError> {
    if let Some(value) = fields.get("stop").filter(|value| !value.is_array()) {
        return Err(ApiError::invalid("stop", "an array of strings", type_name(value)));
    }
    stops(fields, bounds.limits.native_stops_max, Some("max-stop-sequences"))
}

fn seed(fields: &Fields<'_>) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.get("seed") else { return Ok(None) };
    match value.as_u64() {
        Some(seed) => Ok(Some(seed)),
        None if value.is_number() => {
            Err(ApiError::invalid("seed", &format!("an integer in 0..={}", u64::MAX), &value.to_string()))
        }
        None => Err(ApiError::invalid("seed", "an integer", type_name(value))),
    }
}

/// No defaults of the model's: LoRAX has none, and `do_sample` alone means temperature 1.
fn sampling(fields: &Fields<'_>, sampled: bool, bounds: &Bounds) -> Result<Sampling, ApiError> {
    let temperature = fields.number("temperature", "a finite number >= 0", |t| t >= 0.0)?;
    let penalty = |name: &str| fields.number(name, "a number in -2..2", |p| (-2.0..=2.0).contains(&p));
    let top_k = fields.integer("top_k", "an integer > 0", |k| k > 0)?;
    let top_p = fields.number("top_p", "a number > 0 and <= 1", |p| p > 0.0 && p <= 1.0)?;
    let repetition = fields.number("repetition_penalty", "a number > 0", |p| p > 0.0)?;
    let temperature = if sampled { temperature.unwrap_or(1.0) } else { 0.0 };
    Ok(Sampling {
        temperature: if temperature < GREEDY_BELOW { 0.0 } else { temperature.min(f64::from(f32::MAX)) as f32 },
        top_k: top_k.map_or(0, |k| k.min(i64::from(bounds.vocab)) as u32),
        top_p: top_p.unwrap_or(1.0) as f32,
        // Still a valid penalty at both ends of f32.
        repetition_penalty: (repetition.unwrap_or(1.0) as f32).clamp(f32::MIN_POSITIVE, f32::MAX),
        presence_penalty: penalty("presence_penalty")?.unwrap_or(0.0) as f32,
        frequency_penalty: penalty("frequency_penalty")?.unwrap_or(0.0) as f32,
        ..Sampling::default()
    })
}
