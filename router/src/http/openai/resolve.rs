//! Which adapters a request runs under.

use std::sync::Arc;
use std::time::{Duration, Instant};

use secrecy::SecretString;
use serde_json::Value;

use super::submit::Asker;
use super::validate::{Bounds, Params};
use crate::access::Caller;
use crate::adapters::{Ask, MergeSpec, ResolvedAdapter, SourceKind, Wait};
use crate::engine::{AdapterFailure, AdapterUse};
use crate::http::App;
use crate::http::auth::upstream_token;
use crate::http::error::{ApiError, Cause, shown};
use crate::http::json::{Fields, type_name};
use crate::observe::Load;

const SCALE_MAX: f64 = 8.0;
/// `adapter_id` of LoRAX for the base model itself.
const BASE_MODEL: &str = "__base_model__";
/// What clients of text-generation-inference and huggingface_hub send as `model` when they were told none.
const NAMES_OF_NOTHING: [&str; 2] = ["tgi", "dummy"];

/// What the request says about adapters besides `model`.
#[derive(Clone, Debug)]
pub(crate) struct AdapterAsk {
    pub(crate) adapter_id: Option<String>,
    pub(crate) source: Option<SourceKind>,
    /// `api_token`: the caller's own, for the adapter's source.
    pub(crate) token: Option<SecretString>,
    /// `user`: what an alias that is sticky by user goes by.
    pub(crate) user: Option<String>,
    pub(crate) scale: f64,
    pub(crate) compose: Option<Vec<(String, f64)>>,
    /// One choice (or n) for each.
    pub(crate) fan_out: Option<Vec<FanOut>>,
    pub(crate) wait: Wait,
    /// `adapter_wait: base`: an adapter that is not ready is no reason to wait.
    pub(crate) or_base: bool,
}

impl AdapterAsk {
    /// True if any field says which adapter is wanted.
    pub(crate) fn names_any(&self) -> bool {
        self.adapter_id.is_some() || self.compose.is_some() || self.fan_out.is_some()
    }

    /// What the registry is asked about `name`. The token of the body wins over that of the header.
    fn about<'a>(&'a self, name: &'a str, asker: &'a Asker) -> Ask<'a> {
        Ask {
            name,
            source: self.source,
            wait: if self.or_base { Wait::Fail } else { self.wait },
            token: self.token.as_ref().or(asker.token.as_ref()),
            sticky: self.user.as_deref(),
        }
    }
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
    /// Held until the last token: the engine and the disk keep what they have of them.
    pub(crate) adapters: Arc<[ResolvedAdapter]>,
    /// The base answers because the adapter is not ready.
    pub(crate) fallback: bool,
}

impl Variant {
    /// What `show` says of each part, joined by commas.
    pub(crate) fn join(&self, show: impl Fn(&ResolvedAdapter) -> String) -> String {
        self.adapters.iter().map(show).collect::<Vec<_>>().join(",")
    }
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
    let (wait, or_base) = match fields.string("adapter_wait")? {
        None | Some("wait") => (until, false),
        Some("fail") => (Wait::Fail, false),
        Some("base") if bounds.allow_base_fallback => (Wait::Fail, true),
        Some("base") => {
            let why = "`base` needs a server with --allow-base-fallback";
            return Err(ApiError::unsupported("adapter_wait", why));
        }
        Some(other) => return Err(ApiError::invalid("adapter_wait", "one of wait, fail, base", other)),
    };
    let compose = fields.array("compose")?.map(|parts| compose("compose", parts, composed_max)).transpose()?;
    let token = fields.string("api_token")?.map(|token| upstream_token("api_token", token)).transpose()?.flatten();
    Ok(AdapterAsk {
        adapter_id: fields.string("adapter_id")?.filter(|id| !id.is_empty()).map(str::to_owned),
        source: source(fields)?,
        token,
        // Other clients put other things there; those say nothing.
        user: fields.get("user").and_then(Value::as_str).filter(|user| !user.is_empty()).map(str::to_owned),
        scale: scale(fields, "adapter_scale")?.unwrap_or(1.0),
        compose,
        fan_out: fields.array("adapters")?.map(|entries| fan_out(entries, composed_max)).transpose()?,
        wait,
        or_base,
    })
}

fn source(fields: &Fields<'_>) -> Result<Option<SourceKind>, ApiError> {
    let Some(name) = fields.string("adapter_source")?.filter(|name| !name.is_empty()) else { return Ok(None) };
    let kind = match name {
        "hub" => SourceKind::Hub,
        // Predibase's adapters lie in a bucket by their names, where bare names of `s3` are looked for.
        "s3" | "pbase" => SourceKind::S3,
        "gcs" => SourceKind::Gcs,
        "http" => SourceKind::Http,
        "local" => SourceKind::Local,
        other => {
            return Err(ApiError::invalid("adapter_source", "one of hub, s3, gcs, http, local, pbase", other));
        }
    };
    Ok(Some(kind))
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
    pub(crate) async fn resolve(&self, params: &Params, asker: &Asker) -> Result<Vec<Variant>, ApiError> {
        let ask = &params.adapter;
        let is_nothing = NAMES_OF_NOTHING.contains(&params.model.as_str());
        let model = match self.target(&params.model, ask, asker) {
            Err(_) if is_nothing => Target::Base,
            found => found?,
        };
        let named = match (&model, &ask.adapter_id) {
            (Target::Base, None) => self.config.default_adapter.clone().filter(|_| !ask.names_any()),
            (Target::Base, Some(id)) if id == BASE_MODEL => None,
            (Target::Base, Some(id)) => Some(self.adapter_target(id, ask, asker)?),
            (Target::Adapter(name), None) => Some(name.clone()),
            (Target::Adapter(name), Some(id)) if self.adapter_target(id, ask, asker)? == *name => Some(name.clone()),
            (Target::Adapter(name), Some(id)) => {
                let message =
                    format!("`model` names adapter `{}` and `adapter_id` names `{}`; send one", shown(name), shown(id));
                return Err(ApiError::at(Cause::AdapterAmbiguous, "adapter_id", message));
            }
        };
        check_one_way(named.as_deref(), ask)?;
        if let Some(entries) = &ask.fan_out {
            let variants = entries.iter().map(|entry| async {
                let variant = self.variant(&entry.parts, ask, asker).await?;
                Ok(Variant { label: Some(entry.label.clone()), ..variant })
            });
            return futures_util::future::try_join_all(variants).await;
        }
        let parts = match (named, &ask.compose) {
            (Some(name), _) => vec![(name, 1.0)],
            (None, Some(parts)) => parts.clone(),
            (None, None) => Vec::new(),
        };
        match self.variant(&parts, ask, asker).await {
            Err(error) if error.cause == Cause::ModelNotFound && is_nothing && ask.adapter_id.is_none() => {
                Ok(vec![self.variant(&[], ask, asker).await?])
            }
            found => Ok(vec![found?]),
        }
    }

    /// The adapter that several become, as one variant.
    ///
    /// # Errors
    /// As [`Self::resolve`]; 422 for what cannot be merged.
    pub(crate) async fn resolve_merged(
        &self,
        merged: &MergeSpec,
        ask: &AdapterAsk,
        asker: &Asker,
    ) -> Result<Variant, ApiError> {
        let known = |id: &String| self.registry.is_candidate(&asker.caller, id, ask.source);
        for id in &merged.ids {
            if self.is_base(id) {
                let message = format!("`{}` is the base model; only adapters can be merged", shown(id));
                return Err(ApiError::at(Cause::NameIsBaseModel, "merged_adapters.ids", message));
            }
            if !known(id) {
                return Err(ApiError::invalid(
                    "merged_adapters.ids",
                    "names of adapters you have access to",
                    &shown(id),
                ));
            }
        }
        let names = merged.ids.join(",");
        let started = Instant::now();
        let found = self.registry.merge(&asker.caller, merged, &ask.about(&names, asker)).await;
        self.record_load(started, found.as_ref(), asker);
        found_or_base(found.map(|adapter| vec![(adapter, 1.0)]), &names, ask)
    }

    /// Prepares all parts (at the same time) and adds up those with the same content: `a + a` is `2 a`.
    async fn variant(&self, parts: &[(String, f64)], ask: &AdapterAsk, asker: &Asker) -> Result<Variant, ApiError> {
        let mut targets = Vec::with_capacity(parts.len());
        for (name, weight) in parts {
            targets.push((self.adapter_target(name, ask, asker)?, *weight));
        }
        let loads = targets.iter().map(|(name, weight)| async {
            let started = Instant::now();
            let found = self.registry.resolve(&asker.caller, &ask.about(name, asker)).await;
            self.record_load(started, found.as_ref(), asker);
            found.map(|adapter| (adapter, *weight)).map_err(|failure| (name.as_str(), failure))
        });
        match futures_util::future::try_join_all(loads).await {
            Ok(found) => found_or_base(Ok(found), "", ask),
            Err((name, failure)) => found_or_base(Err(failure), name, ask),
        }
    }

    fn record_load(&self, started: Instant, found: Result<&ResolvedAdapter, &AdapterFailure>, asker: &Asker) {
        let Some(record) = &asker.record else { return };
        let adapter = found.ok();
        record.loaded(Load {
            name: adapter.and_then(|adapter| self.public_name(adapter, &asker.caller)),
            content: adapter.map(|adapter| adapter.prepared.content.short()),
            source: adapter.map(|adapter| adapter.source.name()),
            started,
            ended: Instant::now(),
            failed: found.err().map(|failure| failure.code.clone()),
        });
    }

    /// `model`: a base name, an adapter, or `base:adapter`.
    fn target(&self, name: &str, ask: &AdapterAsk, asker: &Asker) -> Result<Target, ApiError> {
        if name.is_empty() || self.is_base(name) {
            return Ok(Target::Base);
        }
        let adapter = self.without_base(name);
        if self.registry.is_candidate(&asker.caller, adapter, ask.source) {
            return Ok(Target::Adapter(adapter.to_owned()));
        }
        Err(ApiError::model_not_found(name))
    }

    /// As [`Self::target`] for fields that can only mean an adapter.
    fn adapter_target(&self, name: &str, ask: &AdapterAsk, asker: &Asker) -> Result<String, ApiError> {
        match self.target(name, ask, asker)? {
            Target::Adapter(name) => Ok(name),
            Target::Base => {
                let message = format!("`{}` is the base model; an adapter is expected here", shown(name));
                Err(ApiError::at(Cause::NameIsBaseModel, "adapter_id", message))
            }
        }
    }

    /// `base:adapter` is `adapter`. A scheme is no base, whatever the base is called.
    fn without_base<'a>(&self, name: &'a str) -> &'a str {
        match name.split_once(':') {
            Some((base, adapter)) if self.is_base(base) && !adapter.starts_with("//") => adapter,
            _ => name,
        }
    }

    /// True for every name the base model is served under.
    pub(crate) fn is_base(&self, name: &str) -> bool {
        self.config.served_names.iter().any(|served| served == name)
    }

    /// For routes that take `model` and use only the base model's text: base and adapter names are both fine.
    ///
    /// # Errors
    /// 404 for a name that is neither.
    pub(crate) fn check_model(&self, caller: &Caller, name: &str) -> Result<(), ApiError> {
        let known =
            name.is_empty() || self.is_base(name) || self.registry.is_candidate(caller, self.without_base(name), None);
        if known { Ok(()) } else { Err(ApiError::model_not_found(name)) }
    }
}

/// An adapter can be named in one way only.
fn check_one_way(named: Option<&str>, ask: &AdapterAsk) -> Result<(), ApiError> {
    let ways = [
        ("an adapter name", named.is_some()),
        ("`compose`", ask.compose.is_some()),
        ("`adapters`", ask.fan_out.is_some()),
    ];
    let set: Vec<_> = ways.iter().filter(|(_, set)| *set).map(|(what, _)| *what).collect();
    if set.len() <= 1 {
        return Ok(());
    }
    let message = format!("{} exclude each other; send one", set.join(" and "));
    let param = if ask.compose.is_some() { "compose" } else { "adapters" };
    Err(ApiError::at(Cause::AdapterAmbiguous, param, message))
}

/// The variant of what the registry gave, or of the base model if the request prefers that to waiting.
fn found_or_base(
    found: Result<Vec<(ResolvedAdapter, f64)>, AdapterFailure>,
    name: &str,
    ask: &AdapterAsk,
) -> Result<Variant, ApiError> {
    let parts = match found {
        Ok(parts) => parts,
        Err(failure) => {
            let error = ApiError::adapter(name, &failure);
            let cold = matches!(error.cause, Cause::AdapterLoading | Cause::AdapterLoadFailed);
            return if cold && ask.or_base { Ok(Variant { fallback: true, ..Variant::default() }) } else { Err(error) };
        }
    };
    let mut uses: Vec<AdapterUse> = Vec::with_capacity(parts.len());
    for (adapter, weight) in &parts {
        let (content, scale) = (adapter.prepared.content, (weight * ask.scale * f64::from(adapter.scale)) as f32);
        match uses.iter_mut().find(|part| part.content == content) {
            Some(part) => part.scale += scale,
            None => uses.push(AdapterUse { content, scale }),
        }
    }
    if let Some(beyond) = uses.iter().find(|part| f64::from(part.scale.abs()) > SCALE_MAX) {
        let rule = "a number in -8..8 for each adapter in all";
        return Err(ApiError::invalid("adapter_scale", rule, &beyond.scale.to_string()));
    }
    let adapters = parts.into_iter().map(|(adapter, _)| adapter).collect();
    Ok(Variant { label: None, uses, adapters, fallback: false })
}
