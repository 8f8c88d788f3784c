//! `loramux warm-kernels`: compiles the programs of models into the disk cache, where the shard looks for them. Needs the
//! run-time compiler, and neither a GPU nor its driver.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use loramux_kernels::cuda::programs;
use loramux_kernels::device::{CodeCache, Elem, ModelShape, Nvrtc, Program, compile_all};
use loramux_models::{CpuStore, DecoderSpec, LoadFormat, LoadOptions, ModelError, load_into};

use super::args::WarmArgs;
use crate::config;
use crate::shard::launch;

/// Compiles and says what.
pub(crate) fn main(args: &WarmArgs) -> anyhow::Result<()> {
    let elem = launch::elem(args.dtype)?;
    let shapes = shapes(args, elem)?;
    let paths = config::cuda_paths(&args.cuda.cuda_libraries).libraries();
    let nvrtc = Nvrtc::find(&paths).map_err(|error| {
        anyhow!(
            "{error}\n  `pip install nvidia-cuda-nvrtc` brings the compiler; --cuda-libraries names a folder that has it"
        )
    })?;
    let dir = config::kernel_cache_dir(args.cuda.kernel_cache.as_deref());
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let cache = CodeCache::new(Some(dir.clone()));
    let programs = programs(&shapes);
    let names: Vec<&str> = shapes.iter().map(|shape| shape.name.as_str()).collect();
    let library = nvrtc.library();
    println!("compiler  {} {}", library.path.display(), library.version);
    println!("models    {}", names.join(", "));
    println!("cache     {}", dir.display());
    let started = Instant::now();
    let mut compiled = 0;
    for arch in &args.arch {
        compiled += warm(&nvrtc, &programs, arch, &cache, threads)?;
    }
    let total = programs.len() * args.arch.len();
    let seconds = started.elapsed().as_secs_f64();
    println!("{compiled} compiled, {} were there already, {seconds:.1} s", total - compiled);
    // A cache that keeps nothing is no error for a server, and all there is to this command.
    match cache.take_warnings().first() {
        Some(warning) => bail!("{warning}"),
        None => Ok(()),
    }
}

/// Compiles what is missing for one architecture; how many that were.
fn warm(nvrtc: &Nvrtc, programs: &[Program], arch: &str, cache: &CodeCache, threads: usize) -> anyhow::Result<usize> {
    let missing: Vec<Program> =
        programs.iter().filter(|program| !nvrtc.is_cached(program, arch, cache)).cloned().collect();
    let _ = cache.take_warnings(); // of files that are damaged: they are compiled again below
    let done = compile_all(nvrtc, &missing, arch, cache, threads)?;
    for (program, done) in missing.iter().zip(&done) {
        let defines: Vec<String> = program.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        println!(
            "{arch:<8} {:<20} {:>3} registers {:>6} bytes  {}",
            program.entry,
            done.registers,
            done.cubin.len(),
            defines.join(" ")
        );
    }
    Ok(missing.len())
}

fn shapes(args: &WarmArgs, elem: Elem) -> anyhow::Result<Vec<ModelShape>> {
    if let Some(path) = &args.model_id {
        let name = path.display().to_string();
        return Ok(vec![model_shape(name, &read_spec(path)?, elem)]);
    }
    let known: Vec<ModelShape> = ModelShape::tested().into_iter().chain([demo_shape()]).collect();
    let mut shapes = Vec::new();
    for wanted in &args.shape {
        let all = wanted.eq_ignore_ascii_case("all");
        let found = known.iter().filter(|shape| all || shape.name.eq_ignore_ascii_case(wanted));
        let before = shapes.len();
        shapes.extend(found.map(|shape| ModelShape { elem, ..shape.clone() }));
        if shapes.len() == before {
            let names: Vec<&str> = known.iter().map(|shape| shape.name.as_str()).collect();
            bail!("--shape {wanted}: known are {}, or all; --model-id takes any model", names.join(", "));
        }
    }
    if shapes.is_empty() {
        bail!("say for which models: --model-id PATH, or --shape NAME");
    }
    Ok(shapes)
}

/// The widths of the built-in model.
pub(crate) fn demo_shape() -> ModelShape {
    ModelShape {
        name: "demo".to_owned(),
        hidden: 192,
        intermediate: 512,
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
        vocab: 2048,
        elem: Elem::Bf16,
    }
}

/// What kernels care about in a model.
pub(crate) fn model_shape(name: String, spec: &DecoderSpec, elem: Elem) -> ModelShape {
    ModelShape {
        name,
        hidden: spec.hidden,
        intermediate: spec.intermediate,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        vocab: spec.vocab,
        elem,
    }
}

/// Reads a model's widths without its weights.
fn read_spec(path: &Path) -> anyhow::Result<DecoderSpec> {
    let config = path.join("config.json");
    if config.is_file() {
        let text = std::fs::read_to_string(&config).with_context(|| config.display().to_string())?;
        return Ok(DecoderSpec::from_config(&text)?);
    }
    let mut spec = None;
    let load = LoadOptions { dtype: None, format: LoadFormat::Auto, seed: 0 };
    // The store is asked for when the header is read: refusing it then ends the load before any weight.
    let ended = load_into::<CpuStore>(path, &load, &mut |_| {}, |read, _| {
        spec = Some(read.clone());
        Err(ModelError::Invalid { file: path.display().to_string(), reason: "only its header was asked for".into() })
    });
    match (spec, ended) {
        (Some(spec), _) => Ok(spec),
        (None, Err(error)) => Err(error).with_context(|| format!("--model-id {}", path.display())),
        (None, Ok(_)) => bail!("--model-id {}: no model was found", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_shape_is_that_of_the_built_in_model() {
        let dir = tempfile::tempdir().unwrap();
        let unpacked = crate::demo::unpack(dir.path()).unwrap();
        let spec = read_spec(&unpacked.model).unwrap();
        assert_eq!(model_shape("demo".into(), &spec, Elem::Bf16), demo_shape());
    }
}
