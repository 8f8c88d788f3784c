//! What can be typed behind `loramux bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use secrecy::SecretString;

use super::workload::Lengths;
use crate::args::{parse_seconds, parse_secret};

const AFTER_HELP: &str = "\
Workloads (16 requests at a time, prompts of 128 tokens, replies of 64, unless it says otherwise):
  base                     no adapter
  one                      the first adapter
  distinct                 the adapters take turns
  uniform                  each request draws an adapter, all as likely
  zipf                     the k-th adapter has a weight of 1/k
  identical                one adapter for a round, another for the next
  skewed                   four of five requests use the first adapter
  prefill, prefill-one     4 at a time, prompts of 1024, replies of 1; without and with an adapter
  shared-prefix            prompts of 512, of which 448 are common to all
  churn                    4 at a time, replies of 16: for more adapters than fit
  long-prefill-intruder    8 streams of 256 tokens, and one prompt of 2048 in their middle
A workload changes by NAME:KEY=VALUE, with the keys concurrency (c), rate, requests, prompt,
output, prefix, intruder, popularity and label. A key wins over a flag, and a flag over what the
workload says itself.

Examples:
  loramux bench                                           the built-in demo model
  loramux bench --adapters 16 --workloads base,one,distinct -- --model-id ./SmolLM2-135M
  loramux bench --workloads base:c=1,base --json ours.json --plot ours.svg -- --model-id ./model
  loramux bench --url http://localhost:8000 --models 'a{0..15}' --name vllm --json vllm.json
  loramux bench --url http://localhost:8080 --lora-ids 0..15 --name llama.cpp --json llama.json
  loramux bench --adapters 64 --workloads churn -- --model-id ./model --max-loras 8
  loramux bench report ours.json vllm.json llama.json --markdown report.md --plot report.svg

Exit codes: 0 done, 1 requests failed or nothing could be measured, 130 interrupted (what was measured is printed).";

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, after_help = AFTER_HELP)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(super) command: Option<BenchCommand>,
    #[command(flatten)]
    pub(super) run: RunArgs,
}

#[derive(Subcommand, Debug)]
pub(super) enum BenchCommand {
    /// Put the JSON files of several runs, of one server or of several, side by side
    Report(ReportArgs),
}

#[derive(Args, Debug)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub(super) server: ServerArgs,
    #[command(flatten)]
    pub(super) load: LoadArgs,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    /// Flags of the server that is started where there is no --url, as for `loramux serve`
    #[arg(last = true, value_name = "SERVER FLAGS", conflicts_with = "url", allow_hyphen_values = true)]
    pub(super) server_flags: Vec<String>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Server")]
pub(super) struct ServerArgs {
    /// A running OpenAI-compatible server, such as http://localhost:8000. Default: start one
    #[arg(long, value_name = "URL")]
    pub(super) url: Option<String>,
    /// API key of the server
    #[arg(long, env = "LORAMUX_API_KEY", hide_env_values = true, value_parser = parse_secret, value_name = "KEY")]
    pub(super) api_key: Option<SecretString>,
    /// What the server calls its base model. Default: the first of /v1/models
    #[arg(long, value_name = "NAME")]
    pub(super) model: Option<String>,
    /// What it calls its adapters: a0,a1 or 'a{0..15}'. Default: those that /v1/models lists
    #[arg(long, value_name = "NAMES", conflicts_with_all = ["lora_ids", "adapters"])]
    pub(super) models: Option<String>,
    /// Ask for adapters by `lora: [{"id": .., "scale": ..}]` as llama.cpp's server does: 0,1 or 0..15
    #[arg(long, value_name = "IDS", conflicts_with = "adapters")]
    pub(super) lora_ids: Option<String>,
    /// JSON object whose fields each request gets; null takes a field away
    #[arg(long, value_name = "JSON")]
    pub(super) extra_body: Option<String>,
    /// Process of a server that runs on this machine: its time and memory are measured, with those that it started
    #[arg(long, value_name = "PID", requires = "url")]
    pub(super) server_pid: Option<u32>,
    /// Random adapters to make for the server that is started; they are called a0, a1, ..
    #[arg(long, value_name = "N", conflicts_with = "url", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) adapters: Option<u32>,
    /// Their rank
    #[arg(long, default_value = "16", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub(super) rank: u32,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Load")]
pub(super) struct LoadArgs {
    /// What to send: names, comma-separated, each as NAME or NAME:KEY=VALUE. Default: base, with adapters also one and distinct
    #[arg(long, value_name = "WORKLOADS", value_delimiter = ',')]
    pub(super) workloads: Vec<String>,
    /// Requests at a time (closed loop)
    #[arg(long, value_name = "N", conflicts_with = "rate")]
    pub(super) concurrency: Option<usize>,
    /// Requests a second, arriving as a Poisson process (open loop)
    #[arg(long, value_name = "R")]
    pub(super) rate: Option<f64>,
    /// Requests of a round. Default: 4 for each at a time
    #[arg(long, value_name = "N")]
    pub(super) requests: Option<usize>,
    /// Tokens of a prompt: N, or MIN-MAX
    #[arg(long, value_name = "N")]
    pub(super) prompt_tokens: Option<Lengths>,
    /// Tokens of a reply: N, or MIN-MAX
    #[arg(long, value_name = "N")]
    pub(super) output_tokens: Option<Lengths>,
    /// Rounds of each workload; the workloads take turns, and the medians count
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) repeats: u32,
    /// Requests before the first round of each workload that are not measured. Default: as many as run at a time
    #[arg(long, value_name = "N")]
    pub(super) warmup: Option<usize>,
    /// Measure the first load of each adapter too, in place of asking once for each before
    #[arg(long)]
    pub(super) cold_adapters: bool,
    /// Lengths, prompts, popularity and arrivals are drawn from it. Default: another one for each run, so that no server has its
    /// prompts in a cache; the record has it
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// Prompts are random token ids below this, not of its first eighth
    #[arg(long, value_name = "N", default_value = "2048", value_parser = clap::value_parser!(u32).range(8..))]
    pub(super) vocabulary: u32,
    /// How long a request may take, such as 300s
    #[arg(long, default_value = "300", value_parser = parse_seconds)]
    pub(super) timeout: Duration,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Output")]
pub(super) struct OutputArgs {
    /// What reports call the server
    #[arg(long, default_value = "loramux")]
    pub(super) name: String,
    /// Source revision of the server, for the record
    #[arg(long, value_name = "REVISION")]
    pub(super) commit: Option<String>,
    /// Write everything that was measured to this file (docs/benchmarking.md has its fields)
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Draw tokens a second and time to first token of each workload
    #[arg(long, value_name = "FILE.svg")]
    pub(super) plot: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Files of the same name and workload are rounds of one server; medians are taken over all of them. The first file's server is
held against the best of the others. With --markdown, a file that exists must have the lines
`<!-- loramux bench report -->` and `<!-- end of report -->`; what is around them stays.

Example:
  loramux bench report loramux-1.json vllm-1.json loramux-2.json vllm-2.json --markdown docs/performance.md")]
pub(super) struct ReportArgs {
    /// What `loramux bench --json` wrote
    #[arg(required = true, value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// Write the tables to this file. Default: print them
    #[arg(long, value_name = "FILE.md")]
    pub(super) markdown: Option<PathBuf>,
    /// Draw tokens a second and time to first token of each workload and server
    #[arg(long, value_name = "FILE.svg")]
    pub(super) plot: Option<PathBuf>,
}
