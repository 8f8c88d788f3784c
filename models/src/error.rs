//! What can be wrong with a base model's files, and the stable code of each case.

use loramux_kernels::OpError;
use loramux_kernels::device::DeviceError;
use std::path::PathBuf;

/// Why a base model was not loaded, or why a batch was refused. The text says what was found and what is accepted.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The path does not exist, or holds no model.
    #[error("{}: {reason}", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// The operating system refused a read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file is malformed.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file, by name.
        file: String,
        /// What was found and what is wanted.
        reason: String,
    },
    /// A file is well formed and asks for something this version does not do.
    #[error("{file}: {what} is not supported: {reason}")]
    Unsupported {
        /// The file, by name.
        file: String,
        /// The feature, by the name it has in the file.
        what: String,
        /// What is accepted instead.
        reason: String,
    },
    /// A file or an extent passes a limit that protects the process.
    #[error("{file}: {what} is {found}, the limit is {limit}")]
    TooLarge {
        /// The file, by name.
        file: String,
        /// Which extent.
        what: String,
        /// The value found.
        found: u64,
        /// The value accepted.
        limit: u64,
    },
    /// The model needs tensors that no file holds.
    #[error("{file}: {} tensors are missing: {}", names.len(), list(names))]
    MissingTensors {
        /// The file or directory.
        file: String,
        /// Every missing name, sorted.
        names: Vec<String>,
    },
    /// A file holds tensors that the model does not read, so the model is not what its config says.
    #[error("{file}: {} tensors match nothing in this model: {}", names.len(), list(names))]
    UnreadTensors {
        /// The file or directory.
        file: String,
        /// Every unread name, sorted.
        names: Vec<String>,
    },
    /// A kernel refused its arguments.
    #[error(transparent)]
    Op(#[from] OpError),
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl ModelError {
    /// The stable code of this cause, for logs, exit messages and tests.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "model_not_found",
            Self::Io { .. } => "model_load_failed",
            Self::Invalid { .. } | Self::MissingTensors { .. } | Self::UnreadTensors { .. } => "model_invalid",
            Self::Unsupported { .. } => "model_unsupported",
            Self::TooLarge { .. } => "model_too_large",
            Self::Op(_) | Self::Device(_) => "internal_error",
        }
    }

    pub(crate) fn invalid(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { file: file.into(), reason: reason.into() }
    }

    pub(crate) fn unsupported(file: impl Into<String>, what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { file: file.into(), what: what.into(), reason: reason.into() }
    }
}

/// Names for a message: the first few in full, then how many more. The full list stays in the error's field.
pub(crate) fn list(names: &[String]) -> String {
    const SHOWN: usize = 16;
    let mut out = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        out.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    out
}
