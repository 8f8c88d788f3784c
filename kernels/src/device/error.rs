//! What can go wrong with a device.

/// Why a device could not do something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// A library is missing.
    #[error("{library} was not found; looked in {}", looked.join(", "))]
    Library {
        /// File name without version.
        library: String,
        /// Where it was looked for.
        looked: Vec<String>,
    },
    /// The driver knows no device that can be used.
    #[error("no usable GPU: {0}")]
    NoDevice(String),
    /// The driver or a library refused a call.
    #[error("{call} failed: {message} (code {code})")]
    Call {
        /// The function.
        call: &'static str,
        /// Its code.
        code: i32,
        /// The code in words.
        message: String,
    },
    /// Not enough memory.
    #[error("{bytes} bytes of {place} memory are not free")]
    OutOfMemory {
        /// `device` or `page-locked host`.
        place: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A kernel did not compile.
    #[error("kernel {kernel} did not compile for {arch}:\n{log}")]
    Compile {
        /// Entry point.
        kernel: String,
        /// Architecture.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// An argument struct is not of the kernel's size.
    #[error("an argument struct has {got} bytes, the kernel takes {want}")]
    Arguments {
        /// `size_of` the struct.
        got: usize,
        /// What the kernel takes.
        want: usize,
    },
    /// The device cannot do this.
    #[error("{0}")]
    Unsupported(String),
    /// The emulator found a fault in a kernel or in how it was used.
    #[error("emulator: {0}")]
    Emulated(String),
}
