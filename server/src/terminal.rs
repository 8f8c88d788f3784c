//! What a person at the terminal sees: log lines, a bar while weights load, a summary when the server is ready.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use loramux_proto::{Info, Loading};
use tracing_subscriber::EnvFilter;

use crate::args::LogFormat;

/// Log lines go to standard error, so that standard output stays free for whoever pipes it.
pub(crate) fn init_logs(format: LogFormat, level: &str) -> Result<(), String> {
    let filter = checked_filter(level).map_err(|e| {
        format!("--log-level {level}: {e}; use error, warn, info, debug, trace, or a filter such as info,loramux_router=debug")
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Json => builder.json().flatten_event(true).with_span_list(false).init(),
        LogFormat::Text => builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).compact().init(),
    }
    Ok(())
}

/// A word that is no level would be read as the name of a module, and nothing would be logged.
fn checked_filter(text: &str) -> Result<EnvFilter, String> {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    let text = text.to_ascii_lowercase().replace("warning", "warn");
    for part in text.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level).trim();
        if !LEVELS.iter().any(|known| level.eq_ignore_ascii_case(known)) {
            return Err(format!("`{level}` is no level"));
        }
    }
    EnvFilter::try_new(text).map_err(|error| error.to_string())
}

/// A bar on a terminal, a line now and then in a log.
#[derive(Default)]
pub(crate) struct LoadProgress {
    state: Mutex<ProgressState>,
}

#[derive(Default)]
struct ProgressState {
    bar: Option<ProgressBar>,
    quarter: u64,
}

impl LoadProgress {
    pub(crate) fn show(&self, loading: &Loading) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::io::stderr().is_terminal() {
            let quarter = loading.done.saturating_mul(4) / loading.total.max(1);
            if quarter != state.quarter && quarter > 0 {
                state.quarter = quarter;
                tracing::info!(percent = quarter * 25, what = loading.what, "loading");
            }
            return;
        }
        let bar = state.bar.get_or_insert_with(|| new_bar(loading.total));
        bar.set_length(loading.total);
        bar.set_position(loading.done);
        bar.set_message(loading.what.clone());
        if loading.done >= loading.total {
            bar.finish_and_clear();
            state.bar = None;
        }
    }

    /// Removes the bar, so that what is printed next starts on its own line.
    pub(crate) fn clear(&self) {
        if let Some(bar) = self.state.lock().unwrap_or_else(PoisonError::into_inner).bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let style = "  {msg:<24} [{bar:32}] {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// What is running and how to talk to it.
pub(crate) struct Summary<'a> {
    pub(crate) info: &'a Info,
    pub(crate) names: &'a [String],
    pub(crate) adapters: &'a [String],
    pub(crate) adapter_dirs: &'a [String],
    pub(crate) sources: &'a str,
    pub(crate) address: &'a str,
    pub(crate) admin: Option<&'a str>,
    pub(crate) keys: usize,
    pub(crate) took: Duration,
}

impl Summary<'_> {
    /// For people.
    pub(crate) fn text(&self) -> String {
        let info = self.info;
        let blocks = u64::from(info.pages_total) * u64::from(info.blocks_per_page);
        let kv_tokens = blocks * u64::from(info.block_tokens);
        let arena = info.page_bytes * u64::from(info.pages_total);
        let mut adapters =
            if self.adapters.is_empty() { "none registered".to_owned() } else { self.adapters.join(", ") };
        for dir in self.adapter_dirs {
            adapters.push_str(&format!("; any folder of {dir}"));
        }
        let key = if self.keys == 0 { "open to everyone who can reach it (set --api-key)" } else { "API key required" };
        format!(
            "\n  loramux {version}, ready in {took:.1} s\n\
             \n    model     {name} ({arch}, {params:.1} M parameters, {dtype}, {weights})\
             \n    device    {device}, {kernels}\
             \n    memory    {arena}: {pages} pages of {page}, room for {kv_tokens} tokens of context shared with adapters\
             \n    context   {context} tokens, {step} a step, {seqs} sequences\
             \n    adapters  {adapters}\
             \n    sources   {sources}\
             \n    access    {key}\
             \n    address   http://{address}/v1\
             \n    admin     {admin}\n",
            version = env!("CARGO_PKG_VERSION"),
            took = self.took.as_secs_f32(),
            name = self.names.join(", "),
            arch = info.architecture,
            params = info.parameters as f64 / 1e6,
            dtype = info.dtype,
            weights = HumanBytes(info.weight_bytes),
            device = info.device,
            kernels = info.kernel_path,
            arena = HumanBytes(arena),
            pages = info.pages_total,
            page = HumanBytes(info.page_bytes),
            context = info.context_tokens,
            step = info.step_tokens_max,
            seqs = info.seqs_max,
            address = self.address,
            sources = self.sources,
            admin = self.admin.unwrap_or("off"),
        )
    }
}
