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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser;
    use std::collections::HashMap;

    fn read(typed: &[&str], variables: &[(&str, &str)]) -> Result<SourceSettings, ConfigError> {
        let cli = Cli::try_parse_from([&["loramux"], typed].concat()).expect("parses");
        settings(&cli.serve.sources, &env(variables), &[], &[], Path::new("/nonexistent"))
    }

    fn env(variables: &[(&str, &str)]) -> Env {
        let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Env(variables.iter().map(pair).collect::<HashMap<_, _>>())
    }

    #[test]
    fn variables_of_other_programs_say_where_and_with_what() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
        let home = dir.path().to_str().unwrap();
        let token = |variables: &[(&str, &str)]| {
            let token = read(&[], variables).unwrap().hub.token;
            token.map(|token| token.expose_secret().to_owned())
        };
        assert_eq!(token(&[]), None);
        assert_eq!(token(&[("HF_HOME", home)]).as_deref(), Some("from-file"));
        assert_eq!(token(&[("HF_HOME", home), ("HUGGING_FACE_HUB_TOKEN", "b")]).as_deref(), Some("b"));
        assert_eq!(token(&[("HF_TOKEN", "a"), ("HUGGING_FACE_HUB_TOKEN", "b")]).as_deref(), Some("a"));
        let hub = read(&["--hub-hosts", "cdn.example"], &[("HF_ENDPOINT", "http://h:1/"), ("HF_HUB_OFFLINE", "YES")]);
        let hub = hub.unwrap().hub;
        assert_eq!((hub.endpoint.as_str(), hub.is_offline), ("http://h:1", true));
        assert!(hub.hosts.contains(&"cdn.example".to_owned()) && hub.hosts.len() == 3);

        let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "hunter2")];
        let s3 = read(&[], &[&keys[..], &[("R2_ACCOUNT_ID", "acc"), ("AWS_REGION", "auto")]].concat()).unwrap().s3;
        assert_eq!(s3.endpoint.as_deref(), Some("https://acc.r2.cloudflarestorage.com"));
        assert!(matches!(&s3.credentials, S3Credentials::Static { key_id, .. } if key_id == "id"));
        assert!(!format!("{s3:?}").contains("hunter2"));
        let s3 = read(&[], &[("S3_ENDPOINT_URL", "http://s"), ("R2_ACCOUNT_ID", "acc"), keys[0]]).unwrap().s3;
        assert_eq!(s3.endpoint.as_deref(), Some("http://s"));
        assert!(matches!(s3.credentials, S3Credentials::None), "half a pair is none");
        let role = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn")];
        assert!(matches!(read(&[], &role).unwrap().s3.credentials, S3Credentials::WebIdentity { .. }));
        let machine = read(&["--instance-credentials"], &[]).unwrap();
        assert!(matches!(machine.s3.credentials, S3Credentials::Instance));
        assert!(matches!(machine.gcs.credentials, GcsCredentials::Instance));
        assert!(read(&[], &[("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent")]).is_err());
        let defaults = defaults(&env(&[("PREDIBASE_MODEL_BUCKET", "b"), ("PREDIBASE_MODEL_FOLDER", "f")]));
        assert_eq!((defaults.bucket.as_deref(), defaults.folder.as_deref()), (Some("b"), Some("f")));
        let roots = read(&[], &[("VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES", home)]).unwrap().local.roots;
        assert_eq!(roots, [dir.path().canonicalize().unwrap()]);
    }

    #[test]
    fn headers_and_networks_are_read_and_mistakes_do_not_repeat_secrets() {
        let http = read(&["--adapter-http-header", "h.example=Authorization: Bearer hunter2"], &[]).unwrap().http;
        let header = &http.headers[0];
        assert_eq!((header.host.as_str(), header.name.as_str()), ("h.example", "Authorization"));
        assert_eq!(header.value.expose_secret(), "Bearer hunter2");
        for bad in ["hunter2", "h=hunter2", "=a:hunter2", "h=:hunter2", "h=hunter2:"] {
            let error = read(&["--adapter-http-header", bad], &[]).unwrap_err().to_string();
            assert!(!error.contains("hunter2") && error.contains("--adapter-http-header"), "{error}");
        }
        assert_eq!(read(&["--adapter-http-networks", "127.0.0.0/8,10.1.0.0/16"], &[]).unwrap().networks.len(), 2);
        assert!(read(&["--adapter-http-networks", "10.1.0.0/33"], &[]).is_err());
    }
}
