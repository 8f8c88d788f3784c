//! Kernel sources and what they are compiled into.

use super::Elem;

/// One `.cu` file. It includes headers of [`Program::HEADERS`] and nothing else.
#[derive(Debug)]
pub struct KernelSource {
    /// File name, for messages.
    pub file: &'static str,
    /// CUDA C++.
    pub text: &'static str,
}

/// A kernel for certain shapes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// The file, by address.
    pub source: &'static KernelSource,
    /// Entry point, as `KERNEL_ENTRY` names it.
    pub entry: &'static str,
    /// Threads of a block, as `KERNEL_ENTRY` has them.
    pub threads: u32,
    /// `size_of` the argument struct.
    pub args_bytes: usize,
    /// `-D` constants, in order.
    pub defines: Vec<(&'static str, String)>,
    /// Most dynamic shared memory a launch will ask for, bytes.
    pub shared_bytes_max: u32,
}

impl PartialEq for KernelSource {
    fn eq(&self, other: &Self) -> bool {
        self.file == other.file
    }
}

impl Eq for KernelSource {}

impl std::hash::Hash for KernelSource {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.file.hash(state);
    }
}

impl Program {
    /// A program whose arguments are `Args`, for the model's type `elem`.
    #[must_use]
    pub fn new<Args>(source: &'static KernelSource, entry: &'static str, threads: u32, elem: Elem) -> Self {
        let defines = match elem {
            Elem::Bf16 => Vec::new(),
            Elem::F16 => vec![("ELEM_F16", "1".to_owned())],
        };
        Self { source, entry, threads, args_bytes: size_of::<Args>(), defines, shared_bytes_max: 0 }
    }

    /// Adds `-Dname=value`.
    #[must_use]
    pub fn define(mut self, name: &'static str, value: usize) -> Self {
        self.defines.push((name, value.to_string()));
        self
    }

    /// Sets the dynamic shared memory.
    #[must_use]
    pub const fn shared(mut self, bytes: u32) -> Self {
        self.shared_bytes_max = bytes;
        self
    }

    /// The headers that sources may include: name and text.
    pub const HEADERS: &[(&str, &str)] = &[
        ("portable.cuh", include_str!("portable.cuh")),
        ("step.cuh", include_str!("step.cuh")),
        ("kv.cuh", include_str!("kv.cuh")),
        ("lora.cuh", include_str!("lora.cuh")),
        ("norm.cuh", include_str!("../norm/norm.cuh")),
        ("rope.cuh", include_str!("../rope/rope.cuh")),
        ("silu.cuh", include_str!("../activation/silu.cuh")),
    ];
}
