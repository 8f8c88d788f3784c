//! The machine that was measured on, as a record says it.

use std::fs;

use serde::{Deserialize, Serialize};

/// Instruction sets that matter to the kernels, as Linux names them.
const INSTRUCTION_SETS: [&str; 12] = [
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
];

/// What a figure depends on beside the program.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Name of the processor; "unknown" where the system does not tell.
    pub(crate) cpu: String,
    /// Processors that this process may use.
    pub(crate) cpus: usize,
    /// Those of the instruction sets that the kernels ask for.
    pub(crate) instruction_sets: Vec<String>,
    /// All memory; 0 where the system does not tell.
    pub(crate) memory_bytes: u64,
    /// Operating system and architecture.
    pub(crate) os: String,
}

impl Machine {
    /// This one.
    pub(super) fn here() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (cpuinfo, meminfo) = (text("/proc/cpuinfo"), text("/proc/meminfo"));
        let kernel = text("/proc/sys/kernel/osrelease");
        let flags = field(&cpuinfo, "flags").or(field(&cpuinfo, "Features")).unwrap_or_default();
        let has = |name: &&str| flags.split_ascii_whitespace().any(|flag| flag == *name);
        let memory_kib = field(&meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
        let os = format!("{} {} {}", std::env::consts::OS, kernel.trim(), std::env::consts::ARCH);
        Self {
            cpu: field(&cpuinfo, "model name").unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            instruction_sets: INSTRUCTION_SETS.iter().filter(|name| has(name)).map(|name| (*name).to_owned()).collect(),
            memory_bytes: memory_kib.unwrap_or_default().saturating_mul(1024),
            os: os.split_ascii_whitespace().collect::<Vec<_>>().join(" "),
        }
    }

    /// One line for people.
    pub(crate) fn summary(&self) -> String {
        let gib = self.memory_bytes as f64 / f64::from(1 << 30);
        format!("{} x {} ({}), {gib:.0} GiB, {}", self.cpus, self.cpu, self.instruction_sets.join(" "), self.os)
    }
}

/// The value of the first `name : value` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.split_once(':').filter(|(key, _)| key.trim() == name).map(|(_, value)| value);
    text.lines().find_map(value).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 17\nmodel name\t: AMD X\nflags\t: fma avx2\nMemTotal:  1024 kB\n";
        assert_eq!(field(text, "model name"), Some("AMD X"));
        assert_eq!(field(text, "model"), Some("17"));
        assert_eq!(field(text, "Features"), None);
        assert!(Machine::here().cpus >= 1);
    }
}
