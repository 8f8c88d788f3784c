//! Tool calls as text: how models write them, how they are found in what a model writes, and grammars that make it write
//! one.

mod forced;
#[cfg(test)]
mod grammar_tests;
mod held;
mod object;
pub(super) mod plain;
mod reader;
#[cfg(test)]
mod tests;

pub(crate) use forced::{Thought, grammar};
pub(crate) use held::{Held, Match};
pub(crate) use reader::{ToolDelta, ToolReader};

use serde_json::Value as Json;

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Function {
    pub(crate) name: String,
    /// The JSON schema of its arguments, an object.
    pub(crate) parameters: Json,
}

impl Function {
    /// The schema as a forced call is held to it.
    pub(crate) fn closed_parameters(&self) -> Json {
        forced::closed(&self.parameters)
    }
}

/// How a model writes its calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": .., "arguments": ..}</tool_call>`, one after the other. Hermes, Qwen, and any model without a
    /// format of its own.
    #[default]
    Hermes,
    /// `{"name": .., "parameters": ..}` as the whole reply or behind `<|python_tag|>`, several separated by `;`. Llama 3.1
    /// and later.
    LlamaJson,
    /// `[TOOL_CALLS][{"name": .., "arguments": ..}, ..]`. Mistral up to 2024.
    Mistral,
    /// `[TOOL_CALLS]name[ARGS]{..}`, one after the other. Mistral since 2025.
    MistralArgs,
}

impl ToolFormat {
    pub(crate) const HERMES_START: &str = "<tool_call>";
    pub(crate) const HERMES_END: &str = "</tool_call>";
    pub(crate) const LLAMA_START: &str = "<|python_tag|>";
    pub(crate) const MISTRAL_START: &str = "[TOOL_CALLS]";
    pub(crate) const MISTRAL_ARGS: &str = "[ARGS]";

    /// The format that a chat template speaks of; the first one if it speaks of none.
    pub(crate) fn of_template(source: &str) -> Self {
        if source.contains(Self::MISTRAL_START) {
            if source.contains(Self::MISTRAL_ARGS) { Self::MistralArgs } else { Self::Mistral }
        } else if source.contains(Self::HERMES_START) {
            Self::Hermes
        } else if source.contains(Self::LLAMA_START) || (source.contains("ipython") && source.contains("parameters")) {
            Self::LlamaJson
        } else {
            Self::Hermes
        }
    }

    /// What a call begins with. None of them has blank space in it.
    fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[Self::HERMES_START],
            Self::LlamaJson => &[Self::LLAMA_START],
            Self::Mistral | Self::MistralArgs => &[Self::MISTRAL_START],
        }
    }

    /// Texts of this format that a tokenizer may have as special tokens. They have to be seen, although special tokens are
    /// no text.
    pub(crate) fn token_texts(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &[Self::HERMES_START, Self::HERMES_END],
            Self::LlamaJson => &[Self::LLAMA_START],
            Self::Mistral | Self::MistralArgs => &[Self::MISTRAL_START, Self::MISTRAL_ARGS, "[CALL_ID]"],
        }
    }

    /// A reply that is an object may be a call without any mark.
    fn bare_objects(self) -> bool {
        self == Self::LlamaJson
    }

    /// Calls as the model would have written them: names and arguments as JSON.
    fn write(self, calls: impl Iterator<Item = (String, String)>) -> String {
        let key = if self == Self::LlamaJson { "parameters" } else { "arguments" };
        let calls = calls.map(|(name, arguments)| match self {
            Self::MistralArgs => format!("{}{name}{}{arguments}", Self::MISTRAL_START, Self::MISTRAL_ARGS),
            _ => format!("{{\"name\": {}, \"{key}\": {arguments}}}", Json::from(name)),
        });
        match self {
            Self::Hermes => {
                let calls = calls.map(|call| format!("{}\n{call}\n{}", Self::HERMES_START, Self::HERMES_END));
                calls.collect::<Vec<_>>().join("\n")
            }
            Self::LlamaJson => calls.collect::<Vec<_>>().join("; "),
            Self::Mistral => format!("{} [{}]", Self::MISTRAL_START, calls.collect::<Vec<_>>().join(", ")),
            Self::MistralArgs => calls.collect(),
        }
    }
}
