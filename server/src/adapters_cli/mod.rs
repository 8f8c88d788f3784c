//! `loramux adapters`: a running server's adapters from the command line, and a check without a server.
//!
//! Exit codes: 0 done, 2 refused, 3 nobody to ask.

pub(crate) mod args;
mod client;
mod table;
mod validate;

use std::process::ExitCode;

use anyhow::Context;
use reqwest::Method;
use serde_json::{Value, json};

use args::{AdaptersArgs, AdaptersCommand, AliasArgs, LoadArgs, Namespace, ValidateArgs};
use client::{CallError, Client};

const REFUSED: u8 = 2;
const UNREACHABLE: u8 = 3;
/// Adapters asked for at once.
const PAGE: &str = "1000";

pub(crate) fn main(args: AdaptersArgs) -> anyhow::Result<ExitCode> {
    if let AdaptersCommand::Validate(asked) = &args.command
        && args.url.is_none()
    {
        return validate::main(asked, args.json);
    }
    let client = Client::new(args.url.as_deref(), args.key)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    let shown = match runtime.block_on(run(&client, &args.command)) {
        Ok(shown) => shown,
        Err(error) => {
            eprintln!("error: {error}");
            if let CallError::Refused { code, body, .. } = &error {
                if args.json {
                    println!("{body:#}");
                } else if let Some(report) = body.get("report") {
                    print!("{}", table::report(report));
                }
                tracing::debug!(code, "refused");
                return Ok(ExitCode::from(REFUSED));
            }
            if matches!(error, CallError::Typed(_)) {
                return Ok(ExitCode::from(REFUSED));
            }
            return Ok(ExitCode::from(UNREACHABLE));
        }
    };
    if args.json {
        println!("{:#}", shown.value);
    } else {
        print!("{}", (shown.page)(&shown.value));
    }
    let refused = shown.value.get("ok") == Some(&Value::Bool(false));
    Ok(if refused { ExitCode::from(REFUSED) } else { ExitCode::SUCCESS })
}

/// An answer, and how people read it.
struct Shown {
    value: Value,
    page: fn(&Value) -> String,
}

async fn run(client: &Client, command: &AdaptersCommand) -> Result<Shown, CallError> {
    match command {
        AdaptersCommand::List { state, prefix, namespace } => {
            list(client, state.as_deref(), prefix.as_deref(), namespace).await
        }
        AdaptersCommand::Get { name, namespace } => {
            one(client, Method::GET, &["adapters", name], &of(namespace), None).await
        }
        AdaptersCommand::Load(asked) => load(client, asked).await,
        AdaptersCommand::Unload { name, now, purge, namespace } => {
            let mut query = of(namespace);
            query.extend(now.then_some(("mode", "now")));
            query.extend(purge.then_some(("purge", "true")));
            let value = client.call(Method::DELETE, &["adapters", name], &query, None).await?;
            Ok(Shown { value, page: table::unloaded })
        }
        AdaptersCommand::Pin { name, residency, namespace } => {
            let body = json!({"residency": residency.name()});
            one(client, Method::POST, &["adapters", name, "pin"], &of(namespace), Some(&body)).await
        }
        AdaptersCommand::Unpin { name, namespace } => {
            one(client, Method::POST, &["adapters", name, "unpin"], &of(namespace), None).await
        }
        AdaptersCommand::Alias(asked) => alias(client, asked).await,
        AdaptersCommand::Validate(asked) => validate_there(client, asked).await,
    }
}

fn of(namespace: &Namespace) -> Vec<(&str, &str)> {
    namespace.namespace.as_deref().map(|namespace| ("namespace", namespace)).into_iter().collect()
}

async fn one(
    client: &Client,
    method: Method,
    path: &[&str],
    query: &[(&str, &str)],
    body: Option<&Value>,
) -> Result<Shown, CallError> {
    Ok(Shown { value: client.call(method, path, query, body).await?, page: table::adapter })
}

async fn list(
    client: &Client,
    state: Option<&str>,
    prefix: Option<&str>,
    namespace: &Namespace,
) -> Result<Shown, CallError> {
    let mut all = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let mut query = of(namespace);
        query.push(("limit", PAGE));
        query.extend(state.map(|state| ("state", state)));
        query.extend(prefix.map(|prefix| ("prefix", prefix)));
        query.extend(after.as_deref().map(|after| ("after", after)));
        let mut page = client.call(Method::GET, &["adapters"], &query, None).await?;
        if let Some(Value::Array(data)) = page.get_mut("data").map(Value::take) {
            all.extend(data);
        }
        match page.get("next").and_then(Value::as_str) {
            Some(next) => after = Some(next.to_owned()),
            None => return Ok(Shown { value: json!({"data": all}), page: table::adapters }),
        }
    }
}

/// A folder of this machine as the server finds it too; anything else as it was typed. What is a folder here is never asked
/// for at the hub: somebody may own that name there.
fn absolute(typed: &str) -> Result<String, CallError> {
    if typed.contains("://") {
        return Ok(typed.to_owned());
    }
    let is_path = typed.starts_with(['/', '.', '~']);
    match std::path::absolute(typed).ok().and_then(|path| if is_path { path.canonicalize().ok() } else { Some(path) }) {
        Some(path) if path.is_dir() => match path.to_str() {
            Some(path) => Ok(path.to_owned()),
            None => Err(CallError::Typed(format!("{}: a path is UTF-8 here", path.display()))),
        },
        _ if is_path && !typed.starts_with('/') => Err(CallError::Typed(format!(
            "{typed}: no such folder here; of the server's folders, write the absolute path"
        ))),
        _ => Ok(typed.to_owned()),
    }
}

async fn load(client: &Client, asked: &LoadArgs) -> Result<Shown, CallError> {
    let mut body = json!({"ref": absolute(&asked.reference)?});
    let fields = [
        ("revision", asked.revision.as_ref().map(|text| json!(text))),
        ("scale", asked.scale.map(|scale| json!(scale))),
        ("pinned", asked.pinned.then_some(Value::Bool(true))),
        ("if_content_id", asked.if_content_id.as_ref().map(|text| json!(text))),
        ("namespace", asked.namespace.namespace.as_ref().map(|text| json!(text))),
    ];
    if let Some(body) = body.as_object_mut() {
        body.extend(fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    }
    one(client, Method::PUT, &["adapters", &asked.name], &[("wait", &asked.wait)], Some(&body)).await
}

async fn alias(client: &Client, asked: &AliasArgs) -> Result<Shown, CallError> {
    if asked.name.is_empty() {
        if asked.delete || asked.rollback {
            return Err(CallError::Typed("name the alias that is meant".into()));
        }
        let value = client.call(Method::GET, &["aliases"], &[], None).await?;
        return Ok(Shown { value, page: table::aliases });
    }
    let (path, query) = (["aliases", asked.name.as_str()], of(&asked.namespace));
    let value = if asked.delete {
        let expected = asked.expected_version.map(|version| version.to_string());
        let mut query = query;
        query.extend(expected.as_deref().map(|version| ("expected_version", version)));
        let value = client.call(Method::DELETE, &path, &query, None).await?;
        return Ok(Shown { value, page: table::deleted });
    } else if asked.rollback {
        client.call(Method::POST, &["aliases", &asked.name, "rollback"], &query, None).await?
    } else if asked.versions.is_empty() {
        client.call(Method::GET, &path, &query, None).await?
    } else {
        let version = |typed: &String| match typed.split_once('=') {
            Some((adapter, weight)) => {
                json!({"adapter": adapter, "weight": weight.parse::<f64>().map_or_else(|_| json!(weight), |w| json!(w))})
            }
            None => json!({"adapter": typed, "weight": 1}),
        };
        let versions: Vec<Value> = asked.versions.iter().map(version).collect();
        let mut body = json!({"versions": versions, "sticky_by": asked.sticky_by.name()});
        if let (Some(body), Some(version)) = (body.as_object_mut(), asked.expected_version) {
            body.insert("expected_version".into(), json!(version));
        }
        client.call(Method::PUT, &path, &query, Some(&body)).await?
    };
    Ok(Shown { value, page: table::alias })
}

async fn validate_there(client: &Client, asked: &ValidateArgs) -> Result<Shown, CallError> {
    let mut body = json!({"ref": absolute(&asked.reference)?});
    if let (Some(body), Some(revision)) = (body.as_object_mut(), &asked.revision) {
        body.insert("revision".into(), json!(revision));
    }
    let value = client.call(Method::POST, &["adapters", "validate"], &[], Some(&body)).await?;
    Ok(Shown { value, page: table::report })
}
