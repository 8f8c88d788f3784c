//! Which adapters a request runs under.

use std::time::Duration;

use serde_json::Value;

use super::validate::{Bounds, Params};
use crate::access::Caller;
use crate::adapters::{Ask, ResolvedAdapter, Wait};
use crate::engine::AdapterUse;
use crate::http::App;
use crate::http::error::{ApiError, Cause, cut};
use crate::http::json::{Fields, type_name};

const SCALE_MAX: f64 = 8.0;

/// What the request says about adapters besides `model`.
#[derive(Clone, Debug)]
pub(crate) struct AdapterAsk {
    pub(crate) adapter_id: Option<String>,
    pub(crate) source: Option<String>,
    pub(crate) scale: f64,
    pub(crate) compose: Option<Vec<(String, f64)>>,
    /// One choice (or n) for each.
    pub(crate) fan_out: Option<Vec<FanOut>>,
    pub(crate) wait: Wait,
}

/// One entry of `adapters`.
#[derive(Clone, Debug)]
pub(crate) struct FanOut {
    label: String,
    parts: Vec<(String, f64)>,
}

/// One way to run the prompts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Variant {
    /// `choices[].adapter`, in a fan-out.
    pub(crate) label: Option<String>,
    pub(crate) uses: Vec<AdapterUse>,
    /// For headers and metrics: names and short content ids, joined by commas.
    pub(crate) names: String,
    pub(crate) contents: String,
}

/// Reads the adapter fields.
///
/// # Errors
/// 400 that names the field.
pub(crate) fn adapter_ask(fields: &Fields<'_>, bounds: &Bounds) -> Result<AdapterAsk, ApiError> {
    let (load_timeout, composed_max) = (bounds.adapter_load_timeout, bounds.limits.composed_max);
    let limit_ms = i64::try_from(load_timeout.as_millis()).unwrap_or(i64::MAX);
    let timeout =
        fields.integer("adapter_load_timeout_ms", &format!("0..{limit_ms}"), |ms| (0..=limit_ms).contains(&ms))?;
    let until = Wait::Until(timeout.map_or(load_timeout, |ms| Duration::from_millis(ms.unsigned_abs())));
    let wait = match fields.string("adapter_wait")? {
        None | Some("wait") => until,
        Some("fail") => Wait::Fail,
        Some("base") => {
            return Err(ApiError::unsupported("adapter_wait", "this version cannot fall back to the base model"));
        }
        Some(other) => return Err(ApiError::invalid("adapter_wait", "one of wait, fail", other)),
    };
    let compose = fields.array("compose")?.map(|parts| compose("compose", parts, composed_max)).transpose()?;
    Ok(AdapterAsk {
        adapter_id: fields.string("adapter_id")?.filter(|id| !id.is_empty()).map(str::to_owned),
        source: source(fields)?,
        scale: scale(fields, "adapter_scale")?.unwrap_or(1.0),
        compose,
        fan_out: fields.array("adapters")?.map(|entries| fan_out(entries, composed_max)).transpose()?,
        wait,
    })
}

fn source(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    match fields.string("adapter_source")? {
        None => Ok(None),
        Some(known @ ("hub" | "s3" | "gcs" | "http" | "local")) => Ok(Some(known.to_owned())),
        Some("pbase") => {
            Err(ApiError::invalid("adapter_source", "one of hub, s3, gcs, http, local (s3 took its place)", "pbase"))
        }
        Some(other) => Err(ApiError::invalid("adapter_source", "one of hub, s3, gcs, http, local", other)),
    }
}

fn scale(fields: &Fields<'_>, name: &str) -> Result<Option<f64>, ApiError> {
    fields.number(name, "a number in -8..8", |s| (-SCALE_MAX..=SCALE_MAX).contains(&s))
}

fn compose(param: &str, parts: &[Value], composed_max: usize) -> Result<Vec<(String, f64)>, ApiError> {
    if parts.is_empty() {
        return Err(ApiError::invalid(param, &format!("a list of 1..{composed_max} adapters"), "an empty list"));
    }
    if parts.len() > composed_max {
        return Err(ApiError::limit(param, parts.len(), "adapters", composed_max, Some("max-composed-adapters")));
    }
    let part = |(i, value): (usize, &Value)| {
        let path = format!("{param}[{i}]");
        let Value::Object(map) = value else { return Err(ApiError::invalid(&path, "an object", type_name(value))) };
        let fields = Fields::nested(map, path.clone());
        let name = fields.string("adapter")?.ok_or_else(|| ApiError::missing(&format!("{path}.adapter")))?;
        let weight = scale(&fields, "weight")?.ok_or_else(|| ApiError::missing(&format!("{path}.weight")))?;
        Ok((name.to_owned(), weight))
    };
    parts.iter().enumerate().map(part).collect()
}

fn fan_out(entries: &[Value], composed_max: usize) -> Result<Vec<FanOut>, ApiError> {
    if !(1..=256).contains(&entries.len()) {
        return Err(ApiError::invalid("adapters", "a list of 1..256 entries", &format!("{} entries", entries.len())));
    }
    let entry = |(i, value): (usize, &Value)| {
        let path = format!("adapters[{i}]");
        match value {
            Value::String(name) if name == "base" => Ok(FanOut { label: name.clone(), parts: Vec::new() }),
            Value::String(name) => Ok(FanOut { label: name.clone(), parts: vec![(name.clone(), 1.0)] }),
            Value::Object(map) => {
                let fields = Fields::nested(map, path.clone());
                if let Some(parts) = fields.array("compose")? {
                    let parts = compose(&format!("{path}.compose"), parts, composed_max)?;
                    let label =
                        parts.iter().map(|(name, weight)| format!("{name}*{weight}")).collect::<Vec<_>>().join("+");
                    return Ok(FanOut { label, parts });
                }
                let name = fields.string("adapter")?.ok_or_else(|| ApiError::missing(&format!("{path}.adapter")))?;
                let scale = scale(&fields, "scale")?.unwrap_or(1.0);
                Ok(FanOut { label: name.to_owned(), parts: vec![(name.to_owned(), scale)] })
            }
            other => Err(ApiError::invalid(&path, "a string or an object", type_name(other))),
        }
    };
    entries.iter().enumerate().map(entry).collect()
}

/// What a name stands for.
enum Target {
    Base,
    Adapter(String),
}

impl App {
    /// The variants a request runs under: one, or one for each entry of `adapters`.
    ///
    /// # Errors
    /// 400 for contradictions, 404 for unknown names, 422 and 503 from loading.
    pub(crate) async fn resolve(&self, params: &Params) -> Result<Vec<Variant>, ApiError> {
        let ask = &params.adapter;
        let model = self.target(&params.model)?;
        let named = match (&model, &ask.adapter_id) {
            (Target::Base, None) => None,
            (Target::Base, Some(id)) => Some(self.adapter_target(id, ask)?),
            (Target::Adapter(name), None) => Some(name.clone()),
            (Target::Adapter(name), Some(id)) if self.adapter_target(id, ask)? == *name => Some(name.clone()),
            (Target::Adapter(name), Some(id)) => {
                let message =
                    format!("`model` names adapter `{}` and `adapter_id` names `{}`; send one", cut(name), cut(id));
                return Err(ApiError::at(Cause::AdapterAmbiguous, "adapter_id", message));
            }
        };
        let exclusive = [
            ("an adapter name", named.is_some()),
            ("`compose`", ask.compose.is_some()),
            ("`adapters`", ask.fan_out.is_some()),
        ];
        let set: Vec<_> = exclusive.iter().filter(|(_, set)| *set).map(|(what, _)| *what).collect();
        if set.len() > 1 {
            let message = format!("{} exclude each other; send one", set.join(" and "));
            return Err(ApiError::at(
                Cause::AdapterAmbiguous,
                if ask.compose.is_some() { "compose" } else { "adapters" },
                message,
            ));
        }
        if let Some(entries) = &ask.fan_out {
            let mut variants = Vec::with_capacity(entries.len());
            for entry in entries {
                let variant = self.variant(&entry.parts, ask).await?;
                variants.push(Variant { label: Some(entry.label.clone()), ..variant });
            }
            return Ok(variants);
        }
        let parts = match (named, &ask.compose) {
            (Some(name), _) => vec![(name, 1.0)],
            (None, Some(parts)) => parts.clone(),
            (None, None) => Vec::new(),
        };
        Ok(vec![self.variant(&parts, ask).await?])
    }

    /// Prepares all parts (at the same time) and adds up those with the same content: `a + a` is `2 a`.
    async fn variant(&self, parts: &[(String, f64)], ask: &AdapterAsk) -> Result<Variant, ApiError> {
        let loads = parts.iter().map(|(name, _)| self.adapter(name, ask));
        let resolved = futures_util::future::try_join_all(loads).await?;
        let mut variant = Variant::default();
        for (adapter, (_, weight)) in resolved.iter().zip(parts) {
            let (content, scale) = (adapter.prepared.content, (weight * ask.scale) as f32);
            match variant.uses.iter_mut().find(|part| part.content == content) {
                Some(part) => part.scale += scale,
                None => variant.uses.push(AdapterUse { content, scale }),
            }
        }
        if let Some(beyond) = variant.uses.iter().find(|part| f64::from(part.scale.abs()) > SCALE_MAX) {
            return Err(ApiError::invalid(
                "adapter_scale",
                "a number in -8..8 for each adapter in all",
                &beyond.scale.to_string(),
            ));
        }
        let join = |text: fn(&ResolvedAdapter) -> String| resolved.iter().map(text).collect::<Vec<_>>().join(",");
        variant.names = join(|adapter| adapter.name.clone());
        variant.contents = join(|adapter| adapter.prepared.content.short());
        Ok(variant)
    }

    async fn adapter(&self, name: &str, ask: &AdapterAsk) -> Result<ResolvedAdapter, ApiError> {
        let target = self.adapter_target(name, ask)?;
        self.registry
            .resolve(&Caller::default(), &Ask::plain(&target, ask.wait))
            .await
            .map_err(|failure| ApiError::adapter(name, &failure))
    }

    /// `model`: a base name, an adapter, or `base:adapter`.
    fn target(&self, name: &str) -> Result<Target, ApiError> {
        if name.is_empty() || self.is_base(name) {
            return Ok(Target::Base);
        }
        if self.registry.is_candidate(&Caller::default(), name, None) {
            return Ok(Target::Adapter(name.to_owned()));
        }
        match name.split_once(':') {
            Some((base, adapter))
                if self.is_base(base) && self.registry.is_candidate(&Caller::default(), adapter, None) =>
            {
                Ok(Target::Adapter(adapter.to_owned()))
            }
            _ => Err(ApiError::model_not_found(name)),
        }
    }

    /// As [`Self::target`] for fields that can only mean an adapter. All adapters of this version are local.
    fn adapter_target(&self, name: &str, ask: &AdapterAsk) -> Result<String, ApiError> {
        let local = ask.source.as_deref().is_none_or(|source| source == "local");
        if self.is_base(name) {
            let message = format!("`{}` is the base model; an adapter is expected here", cut(name));
            return Err(ApiError::at(Cause::NameIsBaseModel, "adapter_id", message));
        }
        if local && self.registry.is_candidate(&Caller::default(), name, None) {
            Ok(name.to_owned())
        } else {
            Err(ApiError::model_not_found(name))
        }
    }

    /// True for every name the base model is served under.
    pub(crate) fn is_base(&self, name: &str) -> bool {
        self.config.served_names.iter().any(|served| served == name)
    }
}
