//! Keys of clients and of the operator, and where the operator's listener is.

use std::net::ToSocketAddrs;
use std::path::Path;

use loramux_router::http::{KeySpec, keys_of_lines, keys_of_toml};
use secrecy::{ExposeSecret, SecretString};

use super::{AdminListen, ConfigError, Env};
use crate::args::NetworkArgs;

/// All keys, from flags, files and the environment. The files are read at each call.
pub(crate) fn read_keys(args: &NetworkArgs, env: &Env) -> Result<Vec<KeySpec>, ConfigError> {
    let mut typed = args.api_key.clone();
    if typed.is_empty() {
        if env.is_blank("VLLM_API_KEY") {
            let reason = "it is set and empty, and without a key the server would be open; unset it, or set a key";
            return Err(ConfigError::Variable { name: "VLLM_API_KEY", reason: reason.to_owned() });
        }
        typed.extend(env.first(&["VLLM_API_KEY"]).map(SecretString::from));
    }
    if let Some(path) = &args.api_key_file {
        let lines = keys_of_lines(&read("api-key-file", path)?);
        if lines.is_empty() {
            return Err(file("api-key-file", path, "it holds no key, and without one the server would be open"));
        }
        typed.extend(lines);
    }
    let mut keys =
        typed.iter().map(|key| checked("api-key", key).map(KeySpec::plain)).collect::<Result<Vec<_>, _>>()?;
    if let Some(path) = &args.keys_file {
        let more =
            keys_of_toml(&read("keys-file", path)?).map_err(|error| file("keys-file", path, &error.to_string()))?;
        if more.is_empty() {
            return Err(file("keys-file", path, "it holds no key, and without one the server would be open"));
        }
        keys.extend(more);
    }
    for key in &args.admin_key {
        let admin = KeySpec::admin(checked("admin-key", key)?);
        if keys.iter().any(|other| other.hash == admin.hash && !other.is_admin) {
            let rule = "another key than every API key";
            return Err(ConfigError::Range { flag: "admin-key", rule, value: "one of them".into() });
        }
        keys.push(admin);
    }
    Ok(keys)
}

/// Keys that open `/metrics` and nothing else.
pub(super) fn metrics_keys(args: &NetworkArgs) -> Result<Vec<KeySpec>, ConfigError> {
    args.metrics_key.iter().map(|key| checked("metrics-key", key).map(KeySpec::plain)).collect()
}

/// At the start: whoever gives a file of keys does not mean an open server. A later reload may take every key away, and then
/// nobody gets in.
pub(super) fn refuse_open_by_file(args: &NetworkArgs, keys: &[KeySpec]) -> Result<(), ConfigError> {
    match &args.keys_file {
        Some(path) if keys.iter().all(|key| key.is_admin) => {
            Err(file("keys-file", path, "it holds admin keys alone, and without an API key the server would be open"))
        }
        _ => Ok(()),
    }
}

fn checked<'a>(flag: &'static str, key: &'a SecretString) -> Result<&'a SecretString, ConfigError> {
    if key.expose_secret().trim().is_empty() {
        return Err(ConfigError::Range { flag, rule: "a key that is not empty", value: "an empty one".into() });
    }
    Ok(key)
}

fn read(flag: &'static str, path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| file(flag, path, &error.to_string()))
}

fn file(flag: &'static str, path: &Path, reason: &str) -> ConfigError {
    ConfigError::File { flag, path: path.display().to_string(), reason: reason.to_owned() }
}

/// Where the admin API listens. An address that others reach needs an admin key.
pub(super) fn admin_listen(args: &NetworkArgs, keys: &[KeySpec]) -> Result<AdminListen, ConfigError> {
    let range = |rule, value: &str| Err(ConfigError::Range { flag: "admin-listen", rule, value: value.to_owned() });
    let address = match args.admin_listen.as_deref().map(str::trim) {
        None => return Ok(AdminListen::Default),
        Some("off" | "") => return Ok(AdminListen::Off),
        Some(typed) => typed,
    };
    if let Some(path) = address.strip_prefix("unix:") {
        if path.is_empty() {
            return range("unix:/path", address);
        }
        return Ok(AdminListen::Unix(path.into()));
    }
    let Ok(mut addresses) = address.to_socket_addrs() else {
        return range("HOST:PORT, unix:/path or off", address);
    };
    let is_local = addresses.all(|address| address.ip().is_loopback());
    if !is_local && !keys.iter().any(|key| key.is_admin) {
        return range("an address of this machine alone, unless --admin-key is set", address);
    }
    Ok(AdminListen::Address(address.to_owned()))
}
