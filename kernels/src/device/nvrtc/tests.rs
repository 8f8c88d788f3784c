//! The compiler, where it is installed, and what needs none.

use std::path::PathBuf;

use super::*;
use crate::device::testing::nvrtc;
use crate::device::{Elem, KernelSource};

static FILL: KernelSource = KernelSource {
    file: "fill.cu",
    text: "struct Args { float* to; unsigned count; };\n\
           extern \"C\" __global__ void fill(const Args args) {\n\
               __shared__ float tile[64];\n\
               tile[threadIdx.x] = float(VALUE); __syncthreads();\n\
               if (threadIdx.x < args.count) args.to[threadIdx.x] = tile[threadIdx.x ^ 1];\n\
           }\n",
};

/// One thread keeps more values than it has registers.
static SPILLING: KernelSource = KernelSource {
    file: "spilling.cu",
    text: "extern \"C\" __global__ void __launch_bounds__(1024, 2) spilling(float* p) {\n\
               float v[64];\n\
               _Pragma(\"unroll\") for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];\n\
               __syncthreads();\n\
               _Pragma(\"unroll\") for (int i = 0; i < 64; ++i) p[(63 - i) * 1024 + threadIdx.x] = v[i] * v[63 - i];\n\
           }\n",
};

static BROKEN: KernelSource =
    KernelSource { file: "broken.cu", text: "extern \"C\" __global__ void broken() { undeclared(); }\n" };

fn fill() -> Program {
    Program::new::<(u64, u32)>(&FILL, "fill", 64, Elem::Bf16).define("VALUE", 7)
}

fn broken() -> Program {
    Program::new::<u64>(&BROKEN, "broken", 32, Elem::Bf16)
}

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("loramux-nvrtc-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Self(dir)
    }

    fn files(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(&self.0) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_program_becomes_machine_code_for_every_architecture() {
    let Some(nvrtc) = nvrtc() else { return };
    for arch in TESTED_ARCHS {
        let compiled = nvrtc.compile(&fill(), arch).unwrap();
        assert_eq!(&compiled.cubin[..4], b"\x7fELF", "{arch}");
        assert!(compiled.registers > 0 && compiled.spill_bytes == 0, "{arch}: {}", compiled.log);
        // Newer architectures reserve 1 KiB of a block's shared memory; it may be counted here.
        assert!([256, 1280].contains(&compiled.shared_bytes), "{arch}: {}", compiled.log);
    }
}

#[test]
fn a_spill_is_noticed() {
    let Some(nvrtc) = nvrtc() else { return };
    let program = Program::new::<u64>(&SPILLING, "spilling", 1024, Elem::Bf16);
    let compiled = nvrtc.compile(&program, "sm_80").unwrap();
    assert!(compiled.spill_bytes > 0 && compiled.registers <= 32, "{}", compiled.log);
}

#[test]
fn a_mistake_comes_with_the_compilers_words() {
    let Some(nvrtc) = nvrtc() else { return };
    let Err(DeviceError::Compile { kernel, arch, log }) = nvrtc.compile(&broken(), "sm_80") else { panic!("compiled") };
    assert_eq!((kernel.as_str(), arch.as_str()), ("broken", "sm_80"));
    assert!(log.contains("undeclared") && log.contains("broken.cu"), "{log}");
    let unknown = nvrtc.compile(&fill(), "sm_1").unwrap_err().to_string();
    assert!(unknown.contains("architecture") || unknown.contains("option"), "{unknown}");
}

#[test]
fn an_unknown_gpu_gets_the_newest_code_that_its_driver_can_translate() {
    let Some(nvrtc) = nvrtc() else { return };
    assert_eq!(nvrtc.target(9, 0).unwrap(), Target { arch: "sm_90a".into(), note: None });
    assert_eq!(nvrtc.target(8, 9).unwrap().arch, "sm_89");
    assert!(nvrtc.target(7, 5).unwrap_err().to_string().contains("8.0"));
    let target = nvrtc.target(99, 0).unwrap();
    assert!(target.arch.starts_with("compute_") && target.note.is_some_and(|note| note.contains("99.0")));
    let compiled = nvrtc.compile(&fill(), &target.arch).unwrap();
    assert!(String::from_utf8_lossy(&compiled.cubin).contains(".entry fill"));
    assert_eq!(compiled.cubin.last(), Some(&0));
}

#[test]
fn the_cache_serves_what_is_whole_and_compiles_what_is_not() {
    let Some(nvrtc) = nvrtc() else { return };
    let dir = Dir::new("cache");
    let cache = CodeCache::new(Some(dir.0.clone()));
    let first = nvrtc.compile_cached(&fill(), "sm_80", &cache).unwrap();
    let [file] = &dir.files()[..] else { panic!("one file expected: {:?}", dir.files()) };
    let whole = std::fs::read(file).unwrap();
    assert_eq!(nvrtc.compile_cached(&fill(), "sm_80", &cache).unwrap(), first);
    assert_eq!(cache.take_warnings(), [""; 0]);

    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    std::fs::write(file, damaged).unwrap();
    assert_eq!(nvrtc.compile_cached(&fill(), "sm_80", &cache).unwrap(), first);
    assert_eq!(cache.take_warnings().len(), 1);
    assert_eq!(std::fs::read(file).unwrap(), whole, "the file is whole again");

    nvrtc.compile_cached(&fill(), "sm_86", &cache).unwrap();
    nvrtc.compile_cached(&fill().define("OTHER", 1), "sm_86", &cache).unwrap();
    assert_eq!(dir.files().len(), 3, "architecture and constants have files of their own");
}

#[test]
fn many_programs_compile_at_once_and_keep_their_order() {
    let Some(nvrtc) = nvrtc() else { return };
    let programs: Vec<Program> = (0..6).map(|i| fill().define("INDEX", i)).collect();
    let cache = CodeCache::new(None);
    let compiled = compile_all(&nvrtc, &programs, "sm_80", &cache, 4).unwrap();
    assert_eq!(compiled.len(), 6);
    let mixed = [fill(), broken(), fill()];
    assert!(matches!(compile_all(&nvrtc, &mixed, "sm_80", &cache, 2), Err(DeviceError::Compile { .. })));
    assert_eq!(compile_all(&nvrtc, &[], "sm_80", &cache, 4).unwrap(), []);
}

#[test]
fn the_assemblers_report_is_understood() {
    let log = "ptxas info    : 0 bytes gmem\n\
               ptxas info    : Compiling entry function 'f' for 'sm_80'\n\
               ptxas info    : Function properties for f\n    \
                   8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
               ptxas info    : Used 32 registers, used 1 barriers, 8192 bytes smem, 376 bytes cmem[0]\n";
    assert_eq!(Usage::parse(log), Usage { registers: 32, spill_bytes: 28, shared_bytes: 8192 });
    assert_eq!(Usage::parse("nothing"), Usage::default());
}

#[test]
fn what_the_cache_keeps_comes_back() {
    let compiled =
        Compiled { cubin: vec![1, 2, 3], registers: 40, spill_bytes: 4, shared_bytes: 1024, log: "ptxas\n".into() };
    assert_eq!(decode(&encode(&compiled)), Some(compiled));
    assert_eq!(decode(&[0; 15]), None);
    assert_eq!(decode(&[0xff; 20]), None);
}
