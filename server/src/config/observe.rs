//! What the server tells of itself: log lines of requests, metrics by adapter, traces.

use clap::{Args, ValueEnum};
use loramux_router::metrics::AdapterMetrics;
use loramux_router::observe::{AccessLog, OtlpSettings};
use secrecy::SecretString;

use super::{ConfigError, Env};

/// Adapters that may have a label of their own.
const NAMES_MAX: usize = 64;
/// Variables of OpenTelemetry for where traces go: the whole URL, and one that a path is added to.
const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Headers of each message: `name=value` with commas between.
const HEADERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];

#[derive(Args, Debug)]
#[command(next_help_heading = "Observability")]
pub(crate) struct ObserveArgs {
    /// Which requests have a line in the log (target `access`); all: but for health checks and scrapes that went well
    #[arg(long, env = "LORAMUX_ACCESS_LOG", value_enum, default_value = "all", value_name = "WHICH")]
    pub(crate) access_log: AccessLogArg,
    /// What /metrics counts by adapter: nothing, requests and tokens, or queue times and times to the first token too
    #[arg(long, env = "LORAMUX_ADAPTER_METRICS", value_enum, default_value = "counters", value_name = "LEVEL")]
    pub(crate) adapter_metrics: AdapterMetricsArg,
    /// Adapters that have a label of their own from the start, comma-separated, 64 at most; then first come, the rest is `other`
    #[arg(long, env = "LORAMUX_ADAPTER_METRICS_NAMES", value_name = "NAMES", value_delimiter = ',')]
    pub(crate) adapter_metrics_names: Vec<String>,
    /// Give /metrics the names that LoRAX's dashboards look for too
    #[arg(long, env = "LORAMUX_LORAX_METRICS", default_value = "false", value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(crate) lorax_metrics: bool,
    /// OpenTelemetry collector that gets traces (OTLP over HTTP, protobuf), such as http://collector:4318. Default:
    /// OTEL_EXPORTER_OTLP_ENDPOINT; without either there are none
    #[arg(long, alias = "otlp-traces-endpoint", env = "LORAMUX_OTLP_ENDPOINT", value_name = "URL")]
    pub(crate) otlp_endpoint: Option<String>,
    /// Part of the requests without a `traceparent` that is traced, 0..1; where there is one, it decides
    #[arg(long, env = "LORAMUX_OTLP_SAMPLE_RATIO", default_value_t = 1.0, value_name = "RATIO")]
    pub(crate) otlp_sample_ratio: f64,
}

/// `--access-log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AccessLogArg {
    /// None
    Off,
    /// Those that failed, or whose client left
    Errors,
    /// All but probes that went well
    All,
}

/// `--adapter-metrics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AdapterMetricsArg {
    /// Nothing
    Off,
    /// Requests and tokens
    Counters,
    /// Times too
    Full,
}

impl From<AccessLogArg> for AccessLog {
    fn from(typed: AccessLogArg) -> Self {
        match typed {
            AccessLogArg::Off => Self::Off,
            AccessLogArg::Errors => Self::Errors,
            AccessLogArg::All => Self::All,
        }
    }
}

impl From<AdapterMetricsArg> for AdapterMetrics {
    fn from(typed: AdapterMetricsArg) -> Self {
        match typed {
            AdapterMetricsArg::Off => Self::Off,
            AdapterMetricsArg::Counters => Self::Counters,
            AdapterMetricsArg::Full => Self::Full,
        }
    }
}

/// Where traces go, if anywhere.
///
/// # Errors
/// A URL that is none, a ratio out of its range, a header that cannot be read, too many names.
pub(super) fn otlp(args: &ObserveArgs, env: &Env) -> Result<Option<OtlpSettings>, ConfigError> {
    if !(0.0..=1.0).contains(&args.otlp_sample_ratio) {
        let value = args.otlp_sample_ratio.to_string();
        return Err(ConfigError::Range { flag: "otlp-sample-ratio", rule: "0..1", value });
    }
    if args.adapter_metrics_names.len() > NAMES_MAX {
        let value = format!("{} names", args.adapter_metrics_names.len());
        return Err(ConfigError::Range { flag: "adapter-metrics-names", rule: "64 names at most", value });
    }
    let typed = args.otlp_endpoint.as_deref().map(str::trim).filter(|url| !url.is_empty());
    let is_disabled = typed.is_none() && env.is_true("OTEL_SDK_DISABLED");
    let wrong_url = |name: Option<&'static str>| {
        let rule = "a URL such as http://collector:4318, without a user (headers are in OTEL_EXPORTER_OTLP_HEADERS)";
        match name {
            Some(name) => ConfigError::Variable { name, reason: format!("must be {rule}") },
            None => ConfigError::Range { flag: "otlp-endpoint", rule, value: "something else".to_owned() },
        }
    };
    let endpoint = match (typed, env.first(&[TRACES_ENDPOINT]), env.first(&[ENDPOINT])) {
        _ if is_disabled => return Ok(None),
        (Some(base), _, _) => with_path(base).ok_or_else(|| wrong_url(None))?,
        (None, Some(whole), _) => checked(whole).ok_or_else(|| wrong_url(Some(TRACES_ENDPOINT)))?,
        (None, None, Some(base)) => with_path(base).ok_or_else(|| wrong_url(Some(ENDPOINT)))?,
        (None, None, None) => return Ok(None),
    };
    let service_name = env.first(&["OTEL_SERVICE_NAME"]).unwrap_or("loramux").to_owned();
    Ok(Some(OtlpSettings { endpoint, headers: headers(env)?, service_name, sample_ratio: args.otlp_sample_ratio }))
}

/// `url`, if it is one of HTTP without a user: it stands in messages.
fn checked(url: &str) -> Option<String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))?;
    let host = rest.split(['/', '?', '#']).next()?;
    let is_plain = !host.is_empty() && !host.contains('@') && !url.contains(char::is_whitespace);
    is_plain.then(|| url.to_owned())
}

/// `base` with the path that traces are sent to, unless it has it.
fn with_path(base: &str) -> Option<String> {
    let base = checked(base)?;
    let base = base.trim_end_matches('/');
    Some(if base.ends_with("/v1/traces") { base.to_owned() } else { format!("{base}/v1/traces") })
}

fn headers(env: &Env) -> Result<Vec<(String, SecretString)>, ConfigError> {
    let wrong = || ConfigError::Variable { name: HEADERS[1], reason: "must be name=value,name=value".to_owned() };
    let pair = |part: &str| {
        let (name, value) = part.split_once('=').ok_or_else(wrong)?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let name = name.trim();
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(wrong());
        }
        Ok((name.to_ascii_lowercase(), SecretString::from(value.trim())))
    };
    let text = env.first(&HEADERS).unwrap_or("");
    text.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn resolved(typed: &[&str], variables: &[(&str, &str)]) -> Result<Option<OtlpSettings>, ConfigError> {
        let cli = crate::args::Cli::try_parse_from([&["loramux"], typed].concat()).expect("parses");
        otlp(&cli.serve.observe, &Env::of(variables))
    }

    #[test]
    fn the_flag_wins_over_opentelemetry_s_variables() {
        let endpoint = |typed: &[&str], env: &[(&str, &str)]| {
            resolved(typed, env).unwrap().map(|settings| settings.endpoint).unwrap_or_default()
        };
        let both = [(ENDPOINT, "http://base:4318/"), (TRACES_ENDPOINT, "http://whole:1/x")];
        assert_eq!(endpoint(&[], &[]), "");
        assert_eq!(endpoint(&[], &both[..1]), "http://base:4318/v1/traces");
        assert_eq!(endpoint(&[], &both), "http://whole:1/x");
        assert_eq!(endpoint(&["--otlp-endpoint", "https://flag"], &both), "https://flag/v1/traces");
        assert_eq!(endpoint(&["--otlp-endpoint", "http://flag/v1/traces"], &both), "http://flag/v1/traces");
        assert_eq!(endpoint(&[], &[both[0], ("OTEL_SDK_DISABLED", "true")]), "");
        let named = resolved(&[], &[both[0], ("OTEL_SERVICE_NAME", "shop"), (HEADERS[1], "API-Key=a=b, x=1")]).unwrap();
        let named = named.unwrap();
        let names: Vec<&str> = named.headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((named.service_name.as_str(), names), ("shop", vec!["api-key", "x"]));
        assert!(!format!("{named:?}").contains("a=b"));
    }

    #[test]
    fn mistakes_are_named_and_secrets_in_urls_are_not_repeated() {
        let names = (0..65).map(|i| format!("a{i}")).collect::<Vec<_>>().join(",");
        type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);
        let wrong: &[Case<'_>] = &[
            (&["--otlp-endpoint", "collector:4318"], &[], "--otlp-endpoint"),
            (&["--otlp-endpoint", "http://u:secret@host"], &[], "--otlp-endpoint"),
            (&["--otlp-sample-ratio", "1.5"], &[], "--otlp-sample-ratio: must be 0..1; got 1.5"),
            (&["--adapter-metrics-names", &names], &[], "--adapter-metrics-names"),
            (&[], &[(ENDPOINT, "grpc://secret")], ENDPOINT),
            (&[], &[(ENDPOINT, "http://x"), (HEADERS[1], "secret")], HEADERS[1]),
        ];
        for (typed, env, want) in wrong {
            let error = resolved(typed, env).expect_err(want).to_string();
            assert!(error.contains(want) && !error.contains("secret"), "{typed:?}: {error}");
        }
    }
}
