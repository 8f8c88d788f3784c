//! How replies are read (tool calls and thoughts), and how embeddings are made.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use clap::ValueEnum;
use loramux_router::engine::Pooling;
use loramux_router::http::ReasoningParser;
use loramux_router::text::ToolFormat;

/// `--tool-call-parser`. The aliases are vLLM's names for the same formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ToolCallParser {
    /// As the chat template says
    Auto,
    /// <tool_call>{"name", "arguments"}</tool_call>: Hermes, Qwen
    #[value(alias = "qwen25", alias = "qwen3")]
    Hermes,
    /// {"name", "parameters"}: Llama 3.1 and later
    #[value(name = "llama3_json", alias = "llama3-json", alias = "llama4_json")]
    Llama3Json,
    /// A list of {"name", "arguments"} behind a token TOOL_CALLS
    Mistral,
    /// Tokens TOOL_CALLS and ARGS with the name between them
    #[value(name = "mistral_args", alias = "mistral-args")]
    MistralArgs,
}

/// `--cpu-isa`: what the machine has.
pub(crate) fn parse_isa(text: &str) -> Result<String, String> {
    let names = loramux_kernels::isa_names();
    if names.contains(&text) { Ok(text.to_owned()) } else { Err(format!("this machine has {}", names.join(", "))) }
}

impl ToolCallParser {
    /// The format, or none to ask the template.
    pub(crate) fn format(self) -> Option<ToolFormat> {
        match self {
            Self::Auto => None,
            Self::Hermes => Some(ToolFormat::Hermes),
            Self::Llama3Json => Some(ToolFormat::LlamaJson),
            Self::Mistral => Some(ToolFormat::Mistral),
            Self::MistralArgs => Some(ToolFormat::MistralArgs),
        }
    }
}

/// `--reasoning-parser`. The aliases are vLLM's names of parsers that look for the same marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReasoningParserArg {
    /// As the chat template says
    Auto,
    /// Thoughts are part of the answer
    None,
    /// <think>..</think>
    #[value(alias = "deepseek_r1", alias = "qwen3")]
    Think,
}

impl From<ReasoningParserArg> for ReasoningParser {
    fn from(arg: ReasoningParserArg) -> Self {
        match arg {
            ReasoningParserArg::Auto => Self::Auto,
            ReasoningParserArg::None => Self::None,
            ReasoningParserArg::Think => Self::Think,
        }
    }
}

/// `--pooling`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PoolingArg {
    /// As the model's files say, else the last position
    Auto,
    /// The mean over all positions
    Mean,
    /// The last position
    Last,
}

/// Bytes of a pooling configuration; those in use have a few hundred.
const POOLING_BYTES_MAX: u64 = 64 << 10;

impl PoolingArg {
    /// The pooling of the model in `dir`; sentence-transformers' configuration says it.
    pub(crate) fn of_model(self, dir: &Path) -> Pooling {
        match self {
            Self::Mean => Pooling::Mean,
            Self::Last => Pooling::Last,
            Self::Auto => {
                let mut text = String::new();
                let read = File::open(dir.join("1_Pooling/config.json"))
                    .and_then(|file| file.take(POOLING_BYTES_MAX).read_to_string(&mut text));
                let config: serde_json::Value =
                    read.ok().and_then(|_| serde_json::from_str(&text).ok()).unwrap_or_default();
                let means = config.get("pooling_mode_mean_tokens").and_then(serde_json::Value::as_bool);
                if means == Some(true) { Pooling::Mean } else { Pooling::Last }
            }
        }
    }
}
