//! Kernels for the emulator: one shared object per program, kept in a cache under the hash of all that went into it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::cache::{Key, publish};
use super::super::{DeviceError, Program};
use super::EmulatedOptions;

/// Headers of the emulator: name and text.
const EMULATOR: &[(&str, &str)] = &[("emulator.h", include_str!("../emulator/emulator.h"))];

/// Calls g++.
#[derive(Debug)]
pub(super) struct Compiler {
    dir: PathBuf,
    flags: Vec<String>,
    version: String,
}

impl Compiler {
    pub(super) fn new(options: &EmulatedOptions) -> Result<Self, DeviceError> {
        let output = Command::new("g++").arg("--version").output();
        let output = output.map_err(|error| DeviceError::Unsupported(format!("the emulator needs g++: {error}")))?;
        let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned();
        let mut flags: Vec<String> =
            ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-x", "c++"].map(str::to_owned).into();
        if options.sanitize {
            flags.extend(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"].map(str::to_owned));
        }
        let headers = EMULATOR.iter().chain(Program::HEADERS);
        let key = headers.fold(Key::default(), |key, (name, text)| key.part(name).part(text)).hex();
        let dir = options.cache_dir.join(format!("emulated-{}", &key[..16]));
        let compiler = Self { dir, flags, version };
        std::fs::create_dir_all(&compiler.dir).map_err(|error| compiler.failed("emulator", &error.to_string()))?;
        for (name, text) in EMULATOR.iter().chain(Program::HEADERS) {
            compiler.publish(&compiler.dir.join(name), text.as_bytes())?;
        }
        Ok(compiler)
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// The shared object of a program.
    pub(super) fn compile(&self, program: &Program) -> Result<PathBuf, DeviceError> {
        let defines: Vec<String> = program.defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        let key = Key::default().part(program.source.text).part(program.entry).part(&self.version);
        let key = self.flags.iter().chain(&defines).fold(key, Key::part).hex();
        let target = self.dir.join(format!("{}-{}.so", program.entry, &key[..24]));
        if target.exists() {
            return Ok(target);
        }
        let source = self.dir.join(format!("{}-{}.cu", program.entry, &key[..24]));
        self.publish(&source, program.source.text.as_bytes())?;
        let part = self.dir.join(format!("{}.{}.part", &key[..24], std::process::id()));
        let output = Command::new("g++")
            .args(&self.flags)
            .args(&defines)
            .arg("-I")
            .arg(&self.dir)
            .arg(&source)
            .arg("-o")
            .arg(&part)
            .output()
            .map_err(|error| self.failed(program.entry, &error.to_string()))?;
        if !output.status.success() {
            return Err(self.failed(program.entry, &String::from_utf8_lossy(&output.stderr)));
        }
        std::fs::rename(&part, &target).map_err(|error| self.failed(program.entry, &error.to_string()))?;
        Ok(target)
    }

    fn publish(&self, path: &Path, bytes: &[u8]) -> Result<(), DeviceError> {
        publish(path, bytes).map_err(|error| self.failed(&path.display().to_string(), &error.to_string()))
    }

    fn failed(&self, kernel: &str, log: &str) -> DeviceError {
        DeviceError::Compile { kernel: kernel.to_owned(), arch: "emulated".into(), log: log.to_owned() }
    }
}
