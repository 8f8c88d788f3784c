//! Compiles kernels at run time for the GPU's real architecture, with the CUDA run-time compiler. Needs no GPU, no driver
//! and no toolkit.
//!
//! The few functions are bound here and not through the bindings that the rest uses: their loader takes a library by
//! name, and this one must be the file that was found and reported.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cache::{CodeCache, Key};
use super::libraries::{LibraryPaths, open_nvrtc};
use super::{DeviceError, FoundLibrary, Program};

/// The architectures that every kernel is compiled for in our tests.
pub const TESTED_ARCHS: [&str; 5] = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100"];

/// What programs are compiled for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As the compiler calls it: `sm_90a` gives machine code, `compute_120` code that the driver translates.
    pub arch: String,
    /// Why it is not the GPU's own architecture.
    pub note: Option<String>,
}

/// A compiled program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// A cubin; for a `compute_` target PTX, which ends with NUL.
    pub cubin: Vec<u8>,
    /// Registers of a thread; 0 for PTX, as all below.
    pub registers: u32,
    /// Bytes of a thread's registers that are stored to memory and loaded back.
    pub spill_bytes: u32,
    /// Static shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// What the compiler said.
    pub log: String,
}

type Handle = *mut c_void;

/// The functions, with codes as plain numbers: a newer library may return some that are not known here.
#[derive(Clone, Copy, Debug)]
struct Api {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    archs_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ptx_size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
}

/// The compiler. Threads may compile at once.
#[derive(Clone, Debug)]
pub struct Nvrtc {
    api: Api,
    library: FoundLibrary,
    archs: Vec<u32>,
}

impl Nvrtc {
    /// Finds the library.
    ///
    /// # Errors
    /// [`DeviceError::Library`] with every place that was looked at; [`DeviceError::Unsupported`] if it is too old.
    pub fn find(paths: &LibraryPaths) -> Result<Self, DeviceError> {
        let open = open_nvrtc(paths)?;
        // SAFETY: the signatures are those of nvrtc.h, the same in all major versions that `libraries` accepts.
        let api = unsafe {
            Api {
                version: open.symbol("nvrtcVersion")?,
                error_string: open.symbol("nvrtcGetErrorString")?,
                archs_count: open.symbol("nvrtcGetNumSupportedArchs")?,
                archs: open.symbol("nvrtcGetSupportedArchs")?,
                create: open.symbol("nvrtcCreateProgram")?,
                destroy: open.symbol("nvrtcDestroyProgram")?,
                compile: open.symbol("nvrtcCompileProgram")?,
                log_size: open.symbol("nvrtcGetProgramLogSize")?,
                log: open.symbol("nvrtcGetProgramLog")?,
                cubin_size: open.symbol("nvrtcGetCUBINSize")?,
                cubin: open.symbol("nvrtcGetCUBIN")?,
                ptx_size: open.symbol("nvrtcGetPTXSize")?,
                ptx: open.symbol("nvrtcGetPTX")?,
            }
        };
        let mut library = open.found;
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: the pointers are to our own numbers; `archs` gets as many as the library said it has.
        let archs = unsafe {
            api.check("nvrtcVersion", (api.version)(&raw mut major, &raw mut minor))?;
            api.check("nvrtcGetNumSupportedArchs", (api.archs_count)(&raw mut count))?;
            let mut archs = vec![0 as c_int; usize::try_from(count).unwrap_or(0)];
            api.check("nvrtcGetSupportedArchs", (api.archs)(archs.as_mut_ptr()))?;
            archs
        };
        // The file name says more (13.0.88) where it is a full one.
        if !library.version.starts_with(&format!("{major}.{minor}.")) {
            library.version = format!("{major}.{minor}");
        }
        let archs = archs.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect();
        Ok(Self { api, library, archs })
    }

    /// Where it is and which version.
    #[must_use]
    pub const fn library(&self) -> &FoundLibrary {
        &self.library
    }

    /// What to compile for on a GPU of compute capability `major.minor`.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] for a GPU older than 8.0, whose matrix units the kernels need.
    pub fn target(&self, major: u32, minor: u32) -> Result<Target, DeviceError> {
        let capability = major * 10 + minor;
        if capability < 80 {
            let text = format!("this GPU has compute capability {major}.{minor}; the kernels need 8.0");
            return Err(DeviceError::Unsupported(text));
        }
        if self.archs.contains(&capability) {
            // Hopper's own instructions are only in the `a` form.
            let suffix = if capability == 90 { "a" } else { "" };
            return Ok(Target { arch: format!("sm_{capability}{suffix}"), note: None });
        }
        let best = self.archs.iter().copied().filter(|&arch| arch <= capability).max();
        let best = best.ok_or_else(|| {
            DeviceError::Unsupported(format!(
                "{} compiles for no GPU up to {major}.{minor}",
                self.library.path.display()
            ))
        })?;
        let note = format!(
            "{} {} does not know compute capability {major}.{minor}: the driver translates code for compute_{best}",
            self.library.name, self.library.version
        );
        Ok(Target { arch: format!("compute_{best}"), note: Some(note) })
    }

    /// Compiles a program.
    ///
    /// # Errors
    /// [`DeviceError::Compile`] with the log; [`DeviceError::Call`] if the library fails otherwise.
    pub fn compile(&self, program: &Program, arch: &str) -> Result<Compiled, DeviceError> {
        let failed = |log: String| DeviceError::Compile { kernel: program.entry.into(), arch: arch.into(), log };
        let text = |text: &str| CString::new(text).map_err(|_| failed("the source has a NUL byte".into()));
        let source = text(program.source.text)?;
        let file = text(program.source.file)?;
        let headers = Program::HEADERS.iter().map(|(_, header)| text(header)).collect::<Result<Vec<_>, _>>()?;
        let names = Program::HEADERS.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>, _>>()?;
        let options = options(program, arch).iter().map(|option| text(option)).collect::<Result<Vec<_>, _>>()?;
        let (headers, names, options) = (pointers(&headers), pointers(&names), pointers(&options));

        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: all strings end with NUL and outlive the calls; the library copies what it keeps.
        let code = unsafe {
            let count = headers.len() as c_int;
            (self.api.create)(&raw mut handle, source.as_ptr(), file.as_ptr(), count, headers.as_ptr(), names.as_ptr())
        };
        self.api.check("nvrtcCreateProgram", code)?;
        let unit = Unit { api: self.api, handle };
        // SAFETY: the handle is a program; the strings outlive the call.
        let code = unsafe { (self.api.compile)(handle, options.len() as c_int, options.as_ptr()) };
        let log = unit.log()?;
        if code != 0 {
            let words = self.api.words(code);
            return Err(failed(if log.trim().is_empty() { words } else { log }));
        }
        let cubin = if arch.starts_with("compute_") {
            unit.bytes("nvrtcGetPTX", self.api.ptx_size, self.api.ptx)?
        } else {
            unit.bytes("nvrtcGetCUBIN", self.api.cubin_size, self.api.cubin)?
        };
        let usage = Usage::parse(&log);
        Ok(Compiled {
            cubin,
            registers: usage.registers,
            spill_bytes: usage.spill_bytes,
            shared_bytes: usage.shared_bytes,
            log,
        })
    }

    /// The same from the cache, or compiled and put there.
    ///
    /// # Errors
    /// See [`Nvrtc::compile`].
    pub fn compile_cached(&self, program: &Program, arch: &str, cache: &CodeCache) -> Result<Compiled, DeviceError> {
        let key = self.key(program, arch);
        if let Some(compiled) = cache.get(&key).as_deref().and_then(decode) {
            return Ok(compiled);
        }
        let compiled = self.compile(program, arch)?;
        cache.put(&key, &encode(&compiled));
        Ok(compiled)
    }

    /// Whether [`Nvrtc::compile_cached`] would find the program in the cache.
    #[must_use]
    pub fn is_cached(&self, program: &Program, arch: &str, cache: &CodeCache) -> bool {
        cache.get(&self.key(program, arch)).as_deref().and_then(decode).is_some()
    }

    fn key(&self, program: &Program, arch: &str) -> String {
        let mut key = Key::default().part(&self.library.version).part(program.source.text).part(program.entry);
        for (name, header) in Program::HEADERS {
            key = key.part(name).part(header);
        }
        for option in options(program, arch) {
            key = key.part(option);
        }
        key.hex()
    }
}

/// Compiles programs on `threads` threads, through the cache. The results are in the programs' order.
///
/// # Errors
/// The first program's that does not compile.
pub fn compile_all(
    nvrtc: &Nvrtc,
    programs: &[Program],
    arch: &str,
    cache: &CodeCache,
    threads: usize,
) -> Result<Vec<Compiled>, DeviceError> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(program) = programs.get(at) else { return done };
            done.push((at, nvrtc.compile_cached(program, arch, cache)));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.clamp(1, programs.len().max(1))).map(|_| scope.spawn(worker)).collect();
        let mut done = Vec::new();
        for worker in workers {
            // A panic of ours goes on here instead of being lost.
            done.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, compiled)| compiled).collect()
}

fn options(program: &Program, arch: &str) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    if !arch.starts_with("compute_") {
        options.push("--ptxas-options=-v".to_owned()); // for registers and spills in the log
    }
    options.extend(program.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

impl Api {
    fn words(&self, code: c_int) -> String {
        // SAFETY: takes any number; the text is the library's own and lives as long as it.
        unsafe {
            let text = (self.error_string)(code);
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        if code == 0 { Ok(()) } else { Err(DeviceError::Call { call, code, message: self.words(code) }) }
    }
}

/// A program inside the compiler.
struct Unit {
    api: Api,
    handle: Handle,
}

impl Unit {
    fn log(&self) -> Result<String, DeviceError> {
        let bytes = self.bytes("nvrtcGetProgramLog", self.api.log_size, self.api.log)?;
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        let text = String::from_utf8_lossy(&bytes[..end]);
        // Without the times the same program gives the same log.
        let lines = text.lines().filter(|line| !line.contains("Compile time ="));
        Ok(lines.flat_map(|line| [line, "\n"]).collect())
    }

    fn bytes(
        &self,
        call: &'static str,
        size: unsafe extern "C" fn(Handle, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Handle, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, DeviceError> {
        let mut count = 0;
        // SAFETY: the handle is a program; the buffer has the size that the library asked for.
        unsafe {
            self.api.check(call, size(self.handle, &raw mut count))?;
            let mut bytes = vec![0u8; count];
            self.api.check(call, get(self.handle, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: made by `create` and not destroyed yet. A failure would leave memory behind and nothing else.
        unsafe { (self.api.destroy)(&raw mut self.handle) };
    }
}

/// What `ptxas -v` says of an entry point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    registers: u32,
    spill_bytes: u32,
    shared_bytes: u32,
}

impl Usage {
    fn parse(log: &str) -> Self {
        let mut usage = Self::default();
        for part in log.lines().flat_map(|line| line.split([',', ':'])).map(str::trim) {
            let words: Vec<&str> = part.split_whitespace().collect();
            match words[..] {
                [bytes, "bytes", "spill", "stores" | "loads"] => usage.spill_bytes += bytes.parse().unwrap_or(0),
                ["Used", registers, "registers"] => usage.registers = registers.parse().unwrap_or(0),
                [bytes, "bytes", "smem"] => usage.shared_bytes = bytes.parse().unwrap_or(0),
                _ => {}
            }
        }
        usage
    }
}

/// For the cache: three numbers and the log's length, the log, the code.
fn encode(compiled: &Compiled) -> Vec<u8> {
    let numbers = [compiled.registers, compiled.spill_bytes, compiled.shared_bytes, compiled.log.len() as u32];
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    bytes.extend(compiled.log.as_bytes());
    bytes.extend(&compiled.cubin);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Compiled> {
    let (numbers, rest) = bytes.split_at_checked(16)?;
    let number = |at: usize| numbers.as_chunks::<4>().0.get(at).map(|bytes| u32::from_le_bytes(*bytes));
    let (log, cubin) = rest.split_at_checked(number(3)? as usize)?;
    Some(Compiled {
        cubin: cubin.to_vec(),
        registers: number(0)?,
        spill_bytes: number(1)?,
        shared_bytes: number(2)?,
        log: String::from_utf8(log.to_vec()).ok()?,
    })
}

#[cfg(test)]
mod tests;
