//! Kernels for the emulator: one shared object per program, kept in a cache under the hash of all that went into it. The
//! flags and what they are for are explained at the top of `emulator.h`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::cache::{Key, part_of};
use super::super::{DeviceError, Program};
use super::EmulatedOptions;

/// The emulator's files, in the folder `emulator` beside the kernels' headers.
const EMULATOR: &[(&str, &str)] = &[
    ("emulator/emulator.cpp", include_str!("../emulator/emulator.cpp")),
    ("emulator/emulator.h", include_str!("../emulator/emulator.h")),
    ("emulator/fiber.h", include_str!("../emulator/fiber.h")),
    ("emulator/machine.h", include_str!("../emulator/machine.h")),
    ("emulator/names.h", include_str!("../emulator/names.h")),
    ("emulator/races.h", include_str!("../emulator/races.h")),
];

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",
];
const RACES: &[&str] =
    &["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"];
const SANITIZE: &[&str] = &["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
const RUNTIME: &str = "libemu.so";

/// Calls g++.
#[derive(Debug)]
pub(super) struct Compiler {
    /// Everything of one version of the emulator, in one mode.
    dir: PathBuf,
    races: bool,
    sanitize: bool,
    version: String,
}

impl Compiler {
    pub(super) fn new(options: &EmulatedOptions) -> Result<Self, DeviceError> {
        let output = Command::new("g++").arg("--version").output();
        let output = output.map_err(|error| DeviceError::Unsupported(format!("the emulator needs g++: {error}")))?;
        let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned();
        let files = || EMULATOR.iter().chain(Program::HEADERS);
        let key = hash(files().flat_map(|(name, text)| [*name, *text]).chain([version.as_str()]));
        let mode = if options.sanitize { "-sanitize" } else { "" };
        let dir = options.cache_dir.join(format!("emulated-{}{mode}", &key[..16]));
        let (races, sanitize) = (options.races && !options.sanitize, options.sanitize);
        let compiler = Self { dir, races, sanitize, version };
        let emulator = compiler.dir.join("emulator");
        std::fs::create_dir_all(&emulator).map_err(|error| compiler.failed("emulator", &error.to_string()))?;
        for (name, text) in files() {
            compiler.publish(&compiler.dir.join(name), text.as_bytes())?;
        }
        compiler.compile_runtime()?;
        Ok(compiler)
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// The part of the emulator that all kernels share.
    fn compile_runtime(&self) -> Result<(), DeviceError> {
        let target = self.dir.join(RUNTIME);
        if target.exists() {
            return Ok(());
        }
        let mut command = self.command();
        command.args(if self.sanitize { SANITIZE } else { &["-O3"] });
        command.arg("-shared").arg(self.dir.join("emulator/emulator.cpp"));
        self.run(command, "emulator", &target)
    }

    /// The shared object of a program.
    pub(super) fn compile(&self, program: &Program) -> Result<PathBuf, DeviceError> {
        let defines: Vec<String> = program.defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        let mode = if self.races { "races" } else { "plain" };
        let key =
            hash([program.source.text, program.entry, mode].into_iter().chain(defines.iter().map(String::as_str)));
        let target = self.dir.join(format!("{}-{}.so", program.entry, &key[..24]));
        if target.exists() {
            return Ok(target);
        }
        let source = self.dir.join(format!("{}-{}.cu", program.entry, &key[..24]));
        self.publish(&source, program.source.text.as_bytes())?;
        let mut command = self.command();
        command.args(if self.sanitize { SANITIZE } else { &["-O2"] }).args(&defines);
        if self.races {
            command.args(RACES);
        }
        command.args(["-shared", "-x", "c++"]).arg(&source).args(["-x", "none"]);
        if self.races {
            command.arg("-nodefaultlibs");
        }
        command.arg(self.dir.join(RUNTIME));
        if self.races {
            command.args(["-lm", "-lgcc", "-lc"]);
        }
        command.arg("-Wl,-rpath,$ORIGIN");
        self.run(command, program.entry, &target)?;
        Ok(target)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("g++");
        command.args(FLAGS).arg("-w").arg("-I").arg(&self.dir);
        command
    }

    /// Runs the compiler; others see the target whole or not at all.
    fn run(&self, mut command: Command, what: &str, target: &Path) -> Result<(), DeviceError> {
        let part = part_of(target);
        let output = command.arg("-o").arg(&part).output().map_err(|error| self.failed(what, &error.to_string()))?;
        if !output.status.success() {
            return Err(self.failed(what, &String::from_utf8_lossy(&output.stderr)));
        }
        std::fs::rename(&part, target).map_err(|error| self.failed(what, &error.to_string()))
    }

    /// Writes a file that others see whole or not at all. Not synced: what a power cut loses here is made again by a test.
    fn publish(&self, path: &Path, bytes: &[u8]) -> Result<(), DeviceError> {
        let part = part_of(path);
        let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
        written.map_err(|error| self.failed(&path.display().to_string(), &error.to_string()))
    }

    fn failed(&self, kernel: &str, log: &str) -> DeviceError {
        DeviceError::Compile { kernel: kernel.to_owned(), arch: "emulated".into(), log: log.to_owned() }
    }
}

fn hash<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    parts.into_iter().fold(Key::default(), Key::part).hex()
}
