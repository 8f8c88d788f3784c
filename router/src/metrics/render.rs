//! The text of `/metrics`. Serialised at most every 50 ms, whatever the number of scrapers.

use std::fmt::Write;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Finished, Metrics};
use crate::adapters::Registry;
use crate::engine::{EngineStatus, Tier};

/// How long one text serves.
const RENDER_EVERY: Duration = Duration::from_millis(50);
/// Names in each list of `vllm:lora_requests_info`.
const LORA_NAMES_MAX: usize = 256;
/// Bytes of each list.
const LORA_BYTES_MAX: usize = 2048;

/// What the text is made of besides the counters.
pub struct Snapshot<'a> {
    /// First base name.
    pub model: &'a str,
    /// The engine's numbers.
    pub status: &'a EngineStatus,
    /// For names and states.
    pub registry: &'a Registry,
    /// Spans exported and lost; `None` where none are made.
    pub spans: Option<(u64, u64)>,
    /// LoRAX's names too.
    pub lorax_names: bool,
}

/// The last lists of `vllm:lora_requests_info` and when they changed.
#[derive(Debug, Default)]
pub(super) struct LoraSets {
    running: String,
    waiting: String,
    changed: f64,
}

impl Metrics {
    /// The whole page.
    pub fn render(&self, snapshot: &Snapshot<'_>) -> String {
        let mut rendered = self.rendered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, text)) = rendered.as_ref().filter(|(at, _)| at.elapsed() < RENDER_EVERY) {
            let _ = at;
            return text.clone();
        }
        let text = self.render_now(snapshot);
        *rendered = Some((Instant::now(), text.clone()));
        text
    }

    pub(super) fn render_now(&self, snapshot: &Snapshot<'_>) -> String {
        let labels = format!("model_name=\"{}\",engine=\"0\"", escape(snapshot.model));
        let mut page = Page { out: String::with_capacity(32 * 1024), labels };
        self.vllm_gauges(snapshot, &mut page);
        self.vllm_counters(snapshot, &mut page);
        self.vllm_histograms(&mut page);
        snapshot.status.meters.render_vllm(&page.labels, &mut page.out);
        self.lora_info(snapshot, &mut page);
        self.adapters().render(&mut page.out);
        snapshot.status.meters.render(&mut page.out);
        self.loramux_requests(snapshot, &mut page);
        self.loramux_engine(snapshot, &mut page);
        if snapshot.lorax_names {
            self.render_lorax(snapshot, &mut page.out);
        }
        page.out
    }

    fn vllm_gauges(&self, snapshot: &Snapshot<'_>, page: &mut Page) {
        let status = snapshot.status;
        page.one("vllm:num_requests_running", "gauge", "Sequences that hold device memory.", f64::from(status.running));
        page.one("vllm:num_requests_waiting", "gauge", "Sequences that wait for it.", f64::from(status.waiting));
        let used = f64::from(status.blocks_used) / f64::from(status.blocks_total.max(1));
        page.one("vllm:kv_cache_usage_perc", "gauge", "KV blocks in use; 1 means all.", used);
        page.one("vllm:gpu_cache_usage_perc", "gauge", "As vllm:kv_cache_usage_perc.", used);
        page.one("vllm:cpu_cache_usage_perc", "gauge", "Always 0: nothing is swapped.", 0.0);
        page.one("vllm:engine_sleep_state", "gauge", "Always 0: this server does not sleep.", 0.0);
        let block = format!("block_size=\"{}\",num_gpu_blocks=\"{}\"", status.shard.block_tokens, status.blocks_total);
        page.family("vllm:cache_config_info", "gauge", "Shape of the KV cache.");
        page.line("vllm:cache_config_info", &block, 1.0);
    }

    fn vllm_counters(&self, snapshot: &Snapshot<'_>, page: &mut Page) {
        let counters = &snapshot.status.counters;
        let rows = [
            ("vllm:prompt_tokens_total", "Prompt tokens of admitted requests.", counters.prompt_tokens),
            ("vllm:generation_tokens_total", "Tokens generated.", counters.generation_tokens),
            ("vllm:num_preemptions_total", "Sequences that gave their memory back.", counters.preemptions),
            (
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
                counters.prefix_queries,
            ),
            ("vllm:prefix_cache_hits_total", "Prompt tokens found there.", counters.prefix_hits),
        ];
        for (name, help, value) in rows {
            page.one(name, "counter", help, value as f64);
        }
        page.family("vllm:request_success_total", "counter", "Requests by the way they ended.");
        for (how, count) in Finished::ALL.iter().zip(&self.finished) {
            let label = format!("finished_reason=\"{}\"", how.label());
            page.line("vllm:request_success_total", &label, count.load(Ordering::Relaxed) as f64);
        }
    }

    fn vllm_histograms(&self, page: &mut Page) {
        let rows = [
            (&self.first_token, "time_to_first_token_seconds", "From submission to the first token."),
            (&self.inter_token, "inter_token_latency_seconds", "Between two tokens of a sequence."),
            (
                &self.per_output_token,
                "time_per_output_token_seconds",
                "Mean time per token after the first, per request.",
            ),
            (&self.per_output_token, "request_time_per_output_token_seconds", "The same under its newer name."),
            (&self.end_to_end, "e2e_request_latency_seconds", "From submission to the end."),
            (&self.queue, "request_queue_time_seconds", "From submission to admission."),
            (&self.inference, "request_inference_time_seconds", "From admission to the end."),
            (&self.prefill, "request_prefill_time_seconds", "From admission to the first token."),
            (&self.decode, "request_decode_time_seconds", "From the first token to the end."),
            (&self.prompt_tokens, "request_prompt_tokens", "Prompt tokens of a request."),
            (&self.generation_tokens, "request_generation_tokens", "Tokens a request generated."),
            (&self.params_n, "request_params_n", "n of a request."),
            (&self.params_max_tokens, "request_params_max_tokens", "max_tokens of a request."),
        ];
        for (histogram, name, help) in rows {
            histogram.render(&format!("vllm:{name}"), help, &page.labels, &mut page.out);
        }
    }

    /// Exactly one series, whatever adapters come and go: orchestrators read the newest by value.
    fn lora_info(&self, snapshot: &Snapshot<'_>, page: &mut Page) {
        let status = snapshot.status;
        let names = |ids: &[crate::engine::ContentId]| {
            list(&snapshot.registry.names_of(ids.get(..LORA_NAMES_MAX).unwrap_or(ids)))
        };
        let (running, waiting) = (names(&status.resident), names(&status.waiting_for_load));
        let mut sets = self.lora.lock().unwrap_or_else(PoisonError::into_inner);
        if sets.changed == 0.0 || sets.running != running || sets.waiting != waiting {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
            *sets = LoraSets { running, waiting, changed: now };
        }
        page.family(
            "vllm:lora_requests_info",
            "gauge",
            "Adapters on the device and waiting for it; time of the last change.",
        );
        let _ = writeln!(
            page.out,
            "vllm:lora_requests_info{{max_lora=\"{}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"}} {}",
            status.shard.slots_max.max(1),
            escape(&sets.running),
            escape(&sets.waiting),
            sets.changed
        );
    }

    /// What the HTTP side counts of requests, by kinds that are few.
    fn loramux_requests(&self, snapshot: &Snapshot<'_>, page: &mut Page) {
        let families = [
            ("loramux_rejected_total", "code", "Requests answered with an error, by code.", &self.rejected),
            ("loramux_structured_requests_total", "kind", "Requests held to a schema or grammar.", &self.structured),
            ("loramux_tool_requests_total", "choice", "Chats with tools, by tool_choice.", &self.tools),
        ];
        for (name, label, help, counts) in families {
            page.family(name, "counter", help);
            for (value, n) in counts.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                page.bare(name, label, value, *n as f64);
            }
        }
        let Some((exported, dropped)) = snapshot.spans else { return };
        let name = "loramux_trace_spans_total";
        page.family(name, "counter", "Spans that the collector took, and spans that were lost.");
        page.bare(name, "outcome", "exported", exported as f64);
        page.bare(name, "outcome", "dropped", dropped as f64);
    }

    fn loramux_engine(&self, snapshot: &Snapshot<'_>, page: &mut Page) {
        let status = snapshot.status;
        page.family("loramux_adapters", "gauge", "Adapters by state.");
        for (state, n) in snapshot.registry.states() {
            page.bare("loramux_adapters", "state", state.name(), n as f64);
        }
        page.family("loramux_adapter_residency", "gauge", "Adapters by where their bytes are.");
        page.bare("loramux_adapter_residency", "residency", "device", status.resident.len() as f64);
        page.bare("loramux_adapter_residency", "residency", "host", f64::from(status.host_adapters));
        let on_disk = status.contents.values().filter(|content| content.tier == Tier::Disk).count();
        page.bare("loramux_adapter_residency", "residency", "disk", on_disk as f64);
        page.family("loramux_adapter_load_failures_total", "counter", "Failed loads.");
        for (source, code, n) in snapshot.registry.failures_by_source() {
            let (source, code) = (source.name(), escape(&code));
            let _ =
                writeln!(page.out, "loramux_adapter_load_failures_total{{source=\"{source}\",code=\"{code}\"}} {n}");
        }
        snapshot.registry.load_times().render(&mut page.out);
        page.family("loramux_adapter_evictions_total", "counter", "Adapters that lost their place.");
        page.bare("loramux_adapter_evictions_total", "from", "device", status.counters.adapter_evictions as f64);
        let name = "loramux_adapter_upload_bytes_total";
        page.family(name, "counter", "Bytes of adapters copied to the device, in whole pages.");
        let bytes = status.counters.adapter_upload_pages.saturating_mul(status.shard.page_bytes);
        let _ = writeln!(page.out, "{name} {bytes}");
        page.family("loramux_arena_pages", "gauge", "Pages of the arena by use.");
        for (used_by, n) in [("kv", status.pages_kv), ("adapter", status.pages_adapters), ("free", status.pages_free)] {
            page.bare("loramux_arena_pages", "use", used_by, f64::from(n));
        }
        let counters = [
            ("loramux_steps_total", "Steps executed.", status.counters.steps),
            (
                "loramux_wasted_positions_total",
                "Positions computed for sequences that had ended.",
                status.counters.wasted_positions,
            ),
            ("loramux_shard_restarts_total", "Shards started after the first.", status.counters.shard_restarts),
            ("loramux_replayed_requests_total", "Requests that survived a shard.", status.counters.replayed),
            ("loramux_stream_stalls_total", "Streams cut for not reading.", self.stream_stalls.load(Ordering::Relaxed)),
        ];
        for (name, help, value) in counters {
            page.family(name, "counter", help);
            let _ = writeln!(page.out, "{name} {value}");
        }
        page.family("loramux_build_info", "gauge", "Version of this server.");
        page.bare("loramux_build_info", "version", env!("CARGO_PKG_VERSION"), 1.0);
    }
}

struct Page {
    out: String,
    /// On every `vllm:` series but the adapter one.
    labels: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        let _ = writeln!(self.out, "{name}{{{}}} {value}", self.labels);
    }

    fn line(&mut self, name: &str, extra: &str, value: f64) {
        let _ = writeln!(self.out, "{name}{{{},{extra}}} {value}", self.labels);
    }

    fn bare(&mut self, name: &str, label: &str, value: &str, number: f64) {
        let _ = writeln!(self.out, "{name}{{{label}=\"{}\"}} {number}", escape(value));
    }
}

/// Names joined by commas, as many as fit.
fn list(names: &[String]) -> String {
    let mut text = String::new();
    for name in names {
        if text.len() + name.len() >= LORA_BYTES_MAX {
            break;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(name);
    }
    text
}

/// A label value: backslash, quote and line feed are escaped.
pub(super) fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
