//! Where adapters may come from, and with which credentials: our flags, and the variables that other programs read.

use std::path::{Path, PathBuf};

use loramux_router::adapters::sources::{
    GcsCredentials, GcsSettings, HttpHeader, HttpSettings, HubSettings, LocalSettings, S3Credentials, S3Settings,
};
use loramux_router::adapters::{AdapterRef, SourceDefaults, SourceKind, SourceSettings};
use secrecy::{ExposeSecret, SecretString};

use super::adapters::directories;
use super::{ConfigError, Env};
use crate::args::SourceArgs;

/// Everything a source needs to know.
pub(super) fn settings(
    source: &SourceArgs,
    env: &Env,
    adapters: &[(String, AdapterRef)],
    adapter_dirs: &[PathBuf],
    data_dir: &Path,
) -> Result<SourceSettings, ConfigError> {
    let network = |text: &String| {
        let range = |_| ConfigError::Range {
            flag: "adapter-http-networks",
            rule: "networks such as 10.1.0.0/16",
            value: text.clone(),
        };
        text.trim().parse().map_err(range)
    };
    Ok(SourceSettings {
        hub: hub(source, env),
        s3: s3(source, env),
        gcs: gcs(source, env)?,
        http: HttpSettings {
            hosts: source.adapter_http_hosts.clone(),
            headers: source.adapter_http_header.iter().map(header).collect::<Result<_, _>>()?,
        },
        local: local(source, env, adapters, adapter_dirs, data_dir)?,
        networks: source.adapter_http_networks.iter().map(network).collect::<Result<_, _>>()?,
        ..SourceSettings::default()
    })
}

/// Where names without a bucket lie.
pub(super) fn defaults(env: &Env) -> SourceDefaults {
    let text = |names: &[&str]| env.first(names).map(str::to_owned);
    SourceDefaults {
        bucket: text(&["LORAMUX_S3_BUCKET", "PREDIBASE_MODEL_BUCKET"]),
        folder: text(&["LORAMUX_S3_PREFIX", "PREDIBASE_MODEL_FOLDER"]),
    }
}

fn hub(args: &SourceArgs, env: &Env) -> HubSettings {
    let home = env
        .first(&["HF_HOME"])
        .map(PathBuf::from)
        .or_else(|| env.first(&["XDG_CACHE_HOME"]).map(|cache| Path::new(cache).join("huggingface")))
        .or_else(|| env.first(&["HOME"]).map(|home| Path::new(home).join(".cache/huggingface")));
    let token_file =
        env.first(&["HF_TOKEN_PATH"]).map(PathBuf::from).or_else(|| home.as_ref().map(|dir| dir.join("token")));
    let in_file = || {
        let text = std::fs::read_to_string(token_file?).ok()?;
        Some(text.trim()).filter(|token| !token.is_empty()).map(SecretString::from)
    };
    let token = env.first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"]).map(SecretString::from);
    let cache = env
        .first(&["WEIGHTS_CACHE_OVERRIDE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"])
        .map(PathBuf::from)
        .or_else(|| home.as_ref().map(|dir| dir.join("hub")));
    let mut settings = HubSettings {
        token: token.or_else(in_file),
        is_offline: env.is_true("HF_HUB_OFFLINE"),
        cache_dirs: cache.into_iter().filter(|dir| dir.is_dir()).collect(),
        ..HubSettings::default()
    };
    if let Some(endpoint) = env.first(&["HF_ENDPOINT"]) {
        settings.endpoint = endpoint.trim_end_matches('/').to_owned();
    }
    settings.hosts.extend(args.hub_hosts.iter().cloned());
    settings
}

fn s3(args: &SourceArgs, env: &Env) -> S3Settings {
    let r2 = env.first(&["R2_ACCOUNT_ID"]).map(|account| format!("https://{account}.r2.cloudflarestorage.com"));
    let endpoint = env.first(&["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]).map(str::to_owned).or(r2);
    S3Settings {
        endpoint,
        region: env.first(&["AWS_REGION", "AWS_DEFAULT_REGION"]).map(str::to_owned),
        is_virtual_hosted: env.is_true("AWS_VIRTUAL_HOSTED_STYLE_REQUEST"),
        credentials: s3_credentials(args, env),
    }
}

/// In the order that Amazon's own programs look.
fn s3_credentials(args: &SourceArgs, env: &Env) -> S3Credentials {
    let text = |name: &str| env.first(&[name]).map(str::to_owned);
    if let (Some(key_id), Some(secret)) = (text("AWS_ACCESS_KEY_ID"), text("AWS_SECRET_ACCESS_KEY")) {
        let session_token = text("AWS_SESSION_TOKEN").map(SecretString::from);
        return S3Credentials::Static { key_id, secret: secret.into(), session_token };
    }
    if let (Some(token_file), Some(role_arn)) = (text("AWS_WEB_IDENTITY_TOKEN_FILE"), text("AWS_ROLE_ARN")) {
        return S3Credentials::WebIdentity {
            token_file: token_file.into(),
            role_arn,
            session_name: text("AWS_ROLE_SESSION_NAME"),
            sts_endpoint: text("AWS_ENDPOINT_URL_STS"),
        };
    }
    let pod = (text("AWS_CONTAINER_CREDENTIALS_FULL_URI"), text("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"));
    if let (Some(uri), Some(token_file)) = pod {
        return S3Credentials::PodIdentity { uri, token_file: token_file.into() };
    }
    if args.instance_credentials { S3Credentials::Instance } else { S3Credentials::None }
}

fn gcs(args: &SourceArgs, env: &Env) -> Result<GcsSettings, ConfigError> {
    let credentials = match env.first(&["GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"]) {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Variable {
                name: "GOOGLE_APPLICATION_CREDENTIALS",
                reason: format!("cannot read {path}: {error}"),
            })?;
            GcsCredentials::ServiceAccount(text.into())
        }
        None if args.instance_credentials => GcsCredentials::Instance,
        None => GcsCredentials::None,
    };
    Ok(GcsSettings { endpoint: env.first(&["GCS_ENDPOINT_URL"]).map(str::to_owned), credentials })
}

/// `HOST=Name:Value`. Errors do not repeat the value.
fn header(typed: &SecretString) -> Result<HttpHeader, ConfigError> {
    let parts = typed.expose_secret().split_once('=').and_then(|(host, header)| {
        let (name, value) = header.split_once(':')?;
        Some((host.trim(), name.trim(), value.trim()))
    });
    match parts {
        Some((host, name, value)) if !host.is_empty() && !name.is_empty() && !value.is_empty() => {
            Ok(HttpHeader { host: host.to_owned(), name: name.to_owned(), value: value.into() })
        }
        _ => {
            let (rule, value) = ("HOST=NAME:VALUE", "something else".to_owned());
            Err(ConfigError::Range { flag: "adapter-http-header", rule, value })
        }
    }
}

fn local(
    args: &SourceArgs,
    env: &Env,
    adapters: &[(String, AdapterRef)],
    adapter_dirs: &[PathBuf],
    data_dir: &Path,
) -> Result<LocalSettings, ConfigError> {
    let mut roots = directories("adapter-root", &args.adapter_root)?;
    let aliases = ["VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES"];
    if roots.is_empty() {
        let from_env = aliases.iter().flat_map(|name| env.list(name)).map(PathBuf::from).collect::<Vec<_>>();
        roots = from_env.iter().filter_map(|dir| dir.canonicalize().ok()).filter(|dir| dir.is_dir()).collect();
    }
    if roots.is_empty() {
        roots.extend(data_dir.join("adapters").canonicalize().ok().filter(|dir| dir.is_dir()));
    }
    roots.extend(adapter_dirs.iter().cloned());
    let named = adapters.iter().filter(|(_, reference)| reference.source == SourceKind::Local);
    Ok(LocalSettings { roots, named: named.map(|(_, reference)| PathBuf::from(&reference.locator)).collect() })
}
