//! What can be wrong with an adapter's files, and the wire code of each case.

use crate::error::list;
use loramux_kernels::OpError;
use std::path::PathBuf;

/// Why an adapter was refused. The text names the file, the field or tensor, what was found and what is accepted.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The directory does not exist.
    #[error("adapter directory {} does not exist", path.display())]
    NotFound {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system refused a read.
    #[error("cannot read {file}: {source}")]
    Io {
        /// The file.
        file: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file is malformed, or the files disagree.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file.
        file: &'static str,
        /// What was found and what is wanted.
        reason: String,
    },
    /// The adapter uses a PEFT feature that this version does not serve.
    #[error("{file}: {feature} is not supported: {reason}")]
    Unsupported {
        /// The file.
        file: &'static str,
        /// The feature, by its PEFT name.
        feature: String,
        /// What is accepted.
        reason: String,
    },
    /// The CPU serves the feature, and this device's kernels do not.
    #[error("{}: {feature} is not served on {device}; use --device cpu for this adapter", CONFIG_FILE)]
    OnDevice {
        /// The feature, as in [`PeftAdapter::features`](super::PeftAdapter).
        feature: &'static str,
        /// The device's name.
        device: String,
    },
    /// Tensors name modules that the base model does not have.
    #[error(
        "{}: {} tensors match no module of this base model: {}; was the adapter trained on another base?",
        WEIGHTS_FILE, names.len(), list(names)
    )]
    UnmatchedTensors {
        /// Every such name, sorted.
        names: Vec<String>,
    },
    /// A tensor's width is not the base model's.
    #[error(
        "{}: tensor `{tensor}` has shape {found:?}, this base model wants {want:?}; was the adapter trained on another base?",
        WEIGHTS_FILE
    )]
    BaseShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits.
        want: Vec<usize>,
    },
    /// A file or an extent passes a limit.
    #[error("{file}: {what} is {found}, the limit is {limit}")]
    TooLarge {
        /// The file.
        file: &'static str,
        /// Which extent.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The value accepted.
        limit: u64,
    },
    /// A rank is above the admission limit.
    #[error("{}: {field} is {rank}; this server admits ranks up to {limit} (--max-lora-rank)", CONFIG_FILE)]
    RankLimit {
        /// The config field.
        field: String,
        /// The rank found.
        rank: u64,
        /// The largest rank admitted.
        limit: usize,
    },
    /// The adapter changes the base's weights by what they are, and they cannot be read.
    #[error("cannot read the base model's weights, which the adapter's {feature} needs: {reason}")]
    Base {
        /// The feature, by its PEFT name.
        feature: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// The adapter does not fit the device pages.
    #[error("cannot lay out the adapter in pages: {0}")]
    Pack(#[source] OpError),
}

/// The config file of a PEFT adapter.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
/// The weights file of a PEFT adapter.
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";

impl AdapterError {
    /// The one table from cause to the stable code on the wire.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "model_not_found",
            Self::Io { .. } | Self::Base { .. } => "adapter_load_failed",
            Self::Invalid { .. } => "adapter_invalid",
            Self::Unsupported { .. } | Self::OnDevice { .. } => "adapter_unsupported",
            Self::UnmatchedTensors { .. } | Self::BaseShape { .. } => "adapter_base_mismatch",
            Self::TooLarge { .. } | Self::Pack(_) => "adapter_too_large",
            Self::RankLimit { .. } => "adapter_rank_limit",
        }
    }

    pub(crate) fn config(reason: impl Into<String>) -> Self {
        Self::Invalid { file: CONFIG_FILE, reason: reason.into() }
    }

    pub(crate) fn weights(reason: impl Into<String>) -> Self {
        Self::Invalid { file: WEIGHTS_FILE, reason: reason.into() }
    }

    pub(crate) fn unsupported(file: &'static str, feature: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { file, feature: feature.into(), reason: reason.into() }
    }
}
