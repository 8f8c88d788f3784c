//! The server that is measured: its address, what it calls its models, and what it says about itself.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};
use url::Url;

use super::client::innermost;
use super::sse::message_of;

const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// How requests ask for an adapter.
#[derive(Clone, Debug)]
pub(super) enum Adapters {
    /// By `model`.
    Names(Vec<String>),
    /// By `lora: [{id, scale}]`, as llama.cpp's server does; all ids of the list are in each request.
    LoraIds(Vec<u32>),
}

impl Adapters {
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Names(names) => names.len(),
            Self::LoraIds(ids) => ids.len(),
        }
    }

    /// How people call one.
    pub(super) fn name(&self, index: usize) -> String {
        match self {
            Self::Names(names) => names.get(index).cloned().unwrap_or_default(),
            Self::LoraIds(ids) => ids.get(index).map(|id| format!("lora {id}")).unwrap_or_default(),
        }
    }
}

/// Where requests go and what they call their model.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) base_url: Url,
    pub(super) completions: Url,
    pub(super) authorization: Option<HeaderValue>,
    pub(super) base_model: String,
    pub(super) adapters: Adapters,
    pub(super) extra_body: Map<String, Value>,
}

/// What was typed about a server.
#[derive(Debug, Default)]
pub(super) struct Asked<'a> {
    pub(super) url: &'a str,
    pub(super) api_key: Option<&'a SecretString>,
    pub(super) base_model: Option<&'a str>,
    pub(super) adapters: Option<Adapters>,
    pub(super) extra_body: Map<String, Value>,
}

impl Target {
    /// Asks the server for its models; those that were not typed are taken from its answer.
    pub(super) async fn probe(http: &reqwest::Client, asked: Asked<'_>) -> anyhow::Result<Self> {
        let base_url = parse_url(asked.url)?;
        let authorization = match asked.api_key {
            Some(key) => {
                let value = HeaderValue::from_str(&format!("Bearer {}", key.expose_secret()));
                let mut value = value.map_err(|_| anyhow!("--api-key: has a character that no header takes"))?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let mut target = Self {
            completions: join(&base_url, "v1/completions")?,
            base_url,
            authorization,
            base_model: asked.base_model.unwrap_or_default().to_owned(),
            adapters: Adapters::Names(Vec::new()),
            extra_body: asked.extra_body,
        };
        let models = target.get(http, "v1/models").await?;
        let entries = models["data"].as_array().cloned().unwrap_or_default();
        let is_adapter = |entry: &&Value| entry["parent"].as_str().is_some_and(|parent| !parent.is_empty());
        let id = |entry: &Value| entry["id"].as_str().map(str::to_owned);
        if target.base_model.is_empty() {
            let base = entries.iter().find(|entry| !is_adapter(entry)).or(entries.first()).and_then(id);
            target.base_model = base.context("the server lists no models at /v1/models; name one with --model")?;
        }
        let listed = || Adapters::Names(entries.iter().filter(is_adapter).filter_map(id).collect());
        target.adapters = asked.adapters.unwrap_or_else(listed);
        Ok(target)
    }

    /// `GET path` as JSON.
    pub(super) async fn get(&self, http: &reqwest::Client, path: &str) -> anyhow::Result<Value> {
        let mut request = http.get(join(&self.base_url, path)?).timeout(PROBE_TIMEOUT);
        if let Some(authorization) = &self.authorization {
            request = request.header(reqwest::header::AUTHORIZATION, authorization.clone());
        }
        let base = &self.base_url;
        let gone = |error: &reqwest::Error| {
            anyhow!("{base} does not answer: {}; is the server running there? (--url)", innermost(error))
        };
        let answer = request.send().await.map_err(|error| gone(&error))?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| gone(&error))?;
        if !status.is_success() {
            bail!("{base} answered GET /{path} with {}: {}", status.as_u16(), message_of(&text));
        }
        serde_json::from_str(&text)
            .with_context(|| format!("{base}: GET /{path} is not JSON; is it an OpenAI-compatible server?"))
    }

    /// What the server says it is, as far as it does: `version` of GET /version, or llama.cpp's build.
    pub(super) async fn version(&self, http: &reqwest::Client) -> Option<String> {
        if let Ok(value) = self.get(http, "version").await
            && let Some(version) = value["version"].as_str()
        {
            return Some(version.to_owned());
        }
        let props = self.get(http, "props").await.ok()?;
        props["build_info"].as_str().map(str::to_owned)
    }

    /// Writes what makes a request one for `adapter`, or for the base.
    pub(super) fn name_model(&self, adapter: Option<usize>, body: &mut Map<String, Value>) {
        let mut model = &self.base_model;
        match &self.adapters {
            Adapters::Names(names) => {
                if let Some(name) = adapter.and_then(|index| names.get(index)) {
                    model = name;
                }
            }
            Adapters::LoraIds(ids) => {
                let scale = |index: usize| if Some(index) == adapter { 1.0 } else { 0.0 };
                let list = ids.iter().enumerate().map(|(index, id)| json!({"id": id, "scale": scale(index)}));
                body.insert("lora".into(), list.collect());
            }
        }
        body.insert("model".into(), json!(model));
    }

    #[cfg(test)]
    pub(super) fn for_tests(adapters: Adapters) -> Self {
        let base_url = parse_url("http://localhost:1").unwrap();
        let completions = join(&base_url, "v1/completions").unwrap();
        Self { base_url, completions, authorization: None, base_model: "base".into(), adapters, extra_body: Map::new() }
    }
}

fn parse_url(typed: &str) -> anyhow::Result<Url> {
    let url = Url::parse(typed).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let mut url =
        url.with_context(|| format!("--url {typed}: must be http://host:port, such as http://localhost:8000"))?;
    // People paste the base URL of an OpenAI client too.
    let path = url.path().trim_end_matches('/').trim_end_matches("/v1").to_owned();
    url.set_path(&format!("{path}/"));
    Ok(url)
}

fn join(base: &Url, path: &str) -> anyhow::Result<Url> {
    base.join(path).with_context(|| format!("--url {base}: cannot hold a path"))
}

/// Reads `a,b` and `a{0..15}`, also together.
pub(super) fn expand(typed: &str) -> Result<Vec<String>, String> {
    const NAMES_MAX: usize = 100_000;
    let mut names = Vec::new();
    for part in typed.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let Some((before, rest)) = part.split_once('{') else {
            names.push(part.to_owned());
            continue;
        };
        let range = rest.split_once('}').and_then(|(range, after)| {
            let (first, last) = range.split_once("..")?;
            Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?, after))
        });
        match range {
            Some((first, last, after)) if first <= last && last - first < NAMES_MAX => {
                names.extend((first..=last).map(|i| format!("{before}{i}{after}")));
            }
            _ => return Err(format!("`{part}`: a range looks like a{{0..15}} (quote it for the shell)")),
        }
    }
    if names.is_empty() { Err("names nothing".into()) } else { Ok(names) }
}

/// Reads `0,1`, `0..15` and `{0..15}`.
pub(super) fn expand_ids(typed: &str) -> Result<Vec<u32>, String> {
    let mut ids = Vec::new();
    for part in typed.split(',').map(str::trim) {
        let part = if part.contains("..") && !part.contains('{') { format!("{{{part}}}") } else { part.to_owned() };
        for name in expand(&part)? {
            ids.push(name.parse().map_err(|_| format!("`{name}` is no id: write 0,1 or 0..15"))?);
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lists_and_ranges() {
        assert_eq!(expand("a{0..2},b").unwrap(), ["a0", "a1", "a2", "b"]);
        assert_eq!(expand("x{9..10}y").unwrap(), ["x9y", "x10y"]);
        for typed in ["", ",", "a{", "a{1}", "a{3..1}", "a{0..999999}"] {
            assert!(expand(typed).is_err(), "{typed}");
        }
        assert_eq!(expand_ids("0..2,7").unwrap(), [0, 1, 2, 7]);
        assert_eq!(expand_ids("{0..1}").unwrap(), [0, 1]);
        assert!(expand_ids("a").is_err() && expand_ids("").is_err());
    }

    #[test]
    fn an_adapter_is_a_model_name_or_one_id_of_all_with_a_scale() {
        let mut body = Map::new();
        let names = Target::for_tests(Adapters::Names(vec!["a0".into(), "a1".into()]));
        names.name_model(Some(1), &mut body);
        assert_eq!(Value::Object(body.clone()), json!({"model": "a1"}));
        names.name_model(None, &mut body);
        assert_eq!(body["model"], "base");
        let ids = Target::for_tests(Adapters::LoraIds(vec![3, 5]));
        ids.name_model(Some(1), &mut body);
        assert_eq!(body["lora"], json!([{"id": 3, "scale": 0.0}, {"id": 5, "scale": 1.0}]));
        ids.name_model(None, &mut body);
        assert_eq!(body["lora"], json!([{"id": 3, "scale": 0.0}, {"id": 5, "scale": 0.0}]));
        assert_eq!(body["model"], "base");
    }

    #[test]
    fn urls_are_those_of_servers_with_or_without_v1() {
        for typed in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            assert_eq!(parse_url(typed).unwrap().as_str(), "http://h:1/", "{typed}");
        }
        assert_eq!(join(&parse_url("https://h/x/v1").unwrap(), "v1/models").unwrap().as_str(), "https://h/x/v1/models");
        for typed in ["h:1", "ftp://h", "localhost", "unix:/x"] {
            assert!(parse_url(typed).unwrap_err().to_string().contains("http://localhost:8000"), "{typed}");
        }
    }
}
