//! The rules that a compiler cannot hold. A failure says which file and what to do.

use loramux_tests::manifest::{Kind, dependencies};
use loramux_tests::repository::{CRATES, files, is_test, read, root, rust_files};
use loramux_tests::source::{attributes, code_only, functions};
use std::path::Path;

/// Longest file and function without a listed reason, lines.
const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;

/// Files over the limit, and why that is better than splitting them.
const LONG_FILES: &[(&str, &str)] = &[];

/// Functions over the limit: file, name, why.
const LONG_FUNCTIONS: &[(&str, &str, &str)] = &[
    ("models/tests/hostile_adapter.rs", "tensors_that_do_not_fit_are_refused_with_name_and_shapes", "a table of cases"),
    ("models/tests/hostile_adapter.rs", "malformed_safetensors_files_are_refused", "a table of cases"),
    ("models/tests/hostile_base.rs", "gguf_files_with_wrong_metadata_or_tensors_are_refused", "a table of cases"),
];

/// An op that is one loop may be one file, up to this many lines, with its tests in it.
const ONE_FILE_OP_LINES_MAX: usize = 120;

/// Files of an op's form for a device: what launches its kernel, and what checks its results.
const DEVICE_FILES: [&str; 2] = ["cuda", "check"];

/// Folders of `kernels/src` that are no op, or lack a file of one: folder, file it lacks, why.
const INCOMPLETE_OPS: &[(&str, &str, &str)] = &[
    ("device", "cpu.rs", "no op: what the ops' forms for a device launch through, and the emulator"),
    ("device", "tests.rs", "tests lie beside what they test, in the same folder's files"),
    ("lora", "cpu.rs", "no op: how adapters are packed and found; the arithmetic is in lora_shrink and lora_expand"),
    (
        "projection",
        "cpu.rs",
        "no arithmetic of its own: linear, lora_gain_shift, lora_shrink and lora_expand in fewer regions",
    ),
    ("sampler", "cpu.rs", "runs on the CPU whatever the device; one file for each stage"),
    ("simd", "cpu.rs", "no op: the vector primitives that the ops share, one file for each instruction set"),
];

/// Our own crates that a crate may use.
const OWN: [(&str, &[&str]); 6] = [
    ("proto", &[]),
    ("router", &["loramux-proto"]),
    ("kernels", &[]),
    ("models", &["loramux-kernels"]),
    ("server", &["loramux-router", "loramux-models", "loramux-kernels", "loramux-proto"]),
    ("tests", &["loramux-router", "loramux-models", "loramux-kernels", "loramux-proto", "loramux"]),
];

/// Outside crates that live in one place: crate (or `prefix-*`), the crates of ours that may use it. Dev-dependencies are free.
const OUTSIDE: [(&str, &[&str]); 23] = [
    ("axum", &["router"]),
    ("hyper", &["router"]),
    ("hyper-util", &["router"]),
    ("http-body-util", &["router"]),
    ("tower", &["router"]),
    ("tokenizers", &["router"]),
    ("minijinja", &["router"]),
    ("minijinja-contrib", &["router"]),
    ("llguidance", &["router"]),
    ("hf-hub", &["router"]),
    ("object_store", &["router"]),
    ("opentelemetry", &["router"]),
    ("opentelemetry-*", &["router"]),
    ("opentelemetry_sdk", &["router"]),
    ("tower-http", &["router"]),
    ("utoipa", &["router"]),
    ("candle-core", &["models", "kernels"]),
    ("candle-*", &[]),
    ("cudarc", &["kernels", "server"]),
    ("libloading", &["kernels", "server"]),
    ("prost", &["proto"]),
    ("prost-*", &["proto"]),
    ("clap", &["server"]),
];

#[track_caller]
fn assert_none(found: Vec<String>, rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

#[test]
fn crates_depend_on_what_the_architecture_allows() {
    let mut found = Vec::new();
    for (folder, allowed) in OWN {
        for (name, kind) in dependencies(&read(&root().join(folder).join("Cargo.toml"))) {
            if name.starts_with("loramux") {
                if !allowed.contains(&name.as_str()) {
                    found.push(format!("{folder} uses {name}"));
                }
                continue;
            }
            let matches = |pattern: &str| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == pattern,
            };
            let place = OUTSIDE.iter().find(|(pattern, _)| matches(pattern));
            if kind != Kind::Dev && place.is_some_and(|(_, allowed)| !allowed.contains(&folder)) {
                found.push(format!("{folder} uses {name}"));
            }
        }
    }
    assert_none(found, "dependencies that architecture does not allow");
}

#[test]
fn every_crate_of_the_workspace_is_in_these_tables() {
    let workspace = read(&root().join("Cargo.toml"));
    let members = workspace.lines().find(|line| line.starts_with("members")).expect("a list of members on one line");
    let mut listed: Vec<&str> = members.split('"').skip(1).step_by(2).collect();
    let mut known: Vec<&str> = CRATES.to_vec();
    listed.sort_unstable();
    known.sort_unstable();
    assert_eq!(listed, known);
    assert_eq!(OWN.len(), CRATES.len());
}

/// Whether a file belongs to an op's form for a device: `cuda.rs`, `check.rs`, or one of their variants (`cuda_lora.rs`).
fn is_device_file(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    DEVICE_FILES.iter().any(|name| stem == *name || stem.starts_with(&format!("{name}_")))
}

/// Files that an op's folder must have beside `mod.rs`.
fn files_of_op(folder: &Path) -> Vec<&'static str> {
    let (name, mod_rs) = (folder.to_string_lossy(), read(&root().join(folder).join("mod.rs")));
    let is_one_file = files(&name, "rs").iter().all(|path| path.ends_with("mod.rs") || is_device_file(path))
        && mod_rs.lines().count() <= ONE_FILE_OP_LINES_MAX
        && mod_rs.contains("#[cfg(test)]");
    let mut wanted = if is_one_file { Vec::new() } else { vec!["cpu.rs", "tests.rs"] };
    if files(&name, "cu").iter().any(|path| path.parent() == Some(folder)) {
        wanted.extend(["cuda.rs", "check.rs"]);
    }
    wanted
}

#[test]
fn op_folders_are_complete() {
    let (mut found, mut folders) = (Vec::new(), 0);
    for path in files("kernels/src", "rs").iter().filter(|path| path.ends_with("mod.rs")) {
        let folder = path.parent().expect("a file has a folder");
        let op = folder.file_name().expect("not the root").to_string_lossy();
        folders += 1;
        for file in files_of_op(folder) {
            let excused = INCOMPLETE_OPS.iter().any(|(name, lacks, _)| *name == op && *lacks == file);
            if excused == root().join(folder).join(file).exists() {
                let fault = if excused { "there, and excused" } else { "missing" };
                found.push(format!("{}: {file} is {fault}", folder.display()));
            }
        }
    }
    assert!(folders > 3, "ops have moved; this test looks at nothing");
    assert_none(
        found,
        "an op is mod.rs (definition and checks), cpu.rs and tests.rs in one folder, with cuda.rs and check.rs if it has a \
         kernel; a short one is one file with its tests, beside those of its kernel",
    );
}

/// Files that may read the environment, and why.
const ENVIRONMENT_READERS: &[(&str, &str)] = &[
    ("server/src/config.rs", "the one place; all others are given values"),
    ("kernels/src/device/testing.rs", "compiled for tests only"),
];

#[test]
fn the_environment_is_read_in_one_file() {
    let mut found = Vec::new();
    let may_read = |path: &Path| ENVIRONMENT_READERS.iter().any(|(file, _)| path == Path::new(file));
    for path in rust_files().iter().filter(|path| !is_test(path) && !may_read(path)) {
        let in_build_script = path.ends_with("build.rs"); // cargo speaks to build scripts through variables
        let code = code_only(&read(&root().join(path)));
        for (at, line) in code.lines().enumerate().filter(|_| !in_build_script) {
            if ["env::var", "env::vars", "env::set_var"].iter().any(|call| line.contains(call)) {
                found.push(format!("{}:{}", path.display(), at + 1));
            }
        }
    }
    assert_none(found, "only server/src/config.rs reads the environment; pass the value on");
}

#[test]
fn files_and_functions_are_short() {
    let mut found = Vec::new();
    for path in rust_files() {
        let (name, source) = (path.to_string_lossy().replace('\\', "/"), read(&root().join(&path)));
        let lines = source.lines().count();
        let excused = LONG_FILES.iter().any(|(file, _)| *file == name);
        if (lines > FILE_LINES_MAX) != excused {
            found.push(format!(
                "{name}: {lines} lines, limit {FILE_LINES_MAX}{}",
                if excused { ", and excused" } else { "" }
            ));
        }
        for function in functions(&source) {
            let excused =
                LONG_FUNCTIONS.iter().any(|(file, function_name, _)| *file == name && *function_name == function.name);
            if (function.lines > FUNCTION_LINES_MAX) != excused {
                let (function, line, lines) = (function.name, function.line, function.lines);
                found.push(format!("{name}:{line}: fn {function} has {lines} lines, limit {FUNCTION_LINES_MAX}"));
            }
        }
    }
    assert_none(found, "split it, or list it in tests/tests/tidy.rs with the reason");
}

#[test]
fn every_exception_to_a_lint_has_a_reason() {
    let mut found = Vec::new();
    for path in rust_files() {
        let source = read(&root().join(&path));
        for name in ["allow", "expect"] {
            for (line, text) in attributes(&source, name) {
                if !text.contains("reason") {
                    found.push(format!("{}:{line}: #[{text}]", path.display()));
                }
            }
        }
    }
    assert_none(found, "add `reason = \"..\"`");
}

#[test]
fn no_test_is_ignored() {
    let mut found = Vec::new();
    for path in rust_files() {
        let ignored = attributes(&read(&root().join(&path)), "ignore");
        found.extend(ignored.into_iter().map(|(line, _)| format!("{}:{line}", path.display())));
    }
    assert_none(found, "a test runs, or says at run time why it cannot");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut found = Vec::new();
    let top = std::fs::read_dir(root()).expect("the root is readable").map(|entry| entry.expect("an entry").path());
    let top = top.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let documents: Vec<_> = top.chain(files("docs", "md").iter().map(|path| root().join(path))).collect();
    assert!(documents.len() >= 3, "README, ARCHITECTURE and CHANGELOG at least");
    for document in documents {
        for link in links(&read(&document)) {
            let target = link.split('#').next().unwrap_or_default();
            let is_outside = link.contains("://") || link.starts_with("mailto:") || target.is_empty();
            if !is_outside && !document.parent().unwrap_or(Path::new("")).join(target).exists() {
                found.push(format!("{}: {link}", document.strip_prefix(root()).unwrap_or(&document).display()));
            }
        }
    }
    assert_none(found, "links to files that do not exist");
}

/// Targets of `[text](target)`, outside code blocks.
fn links(markdown: &str) -> Vec<String> {
    let prose: String = markdown.split("```").step_by(2).collect();
    prose.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned()).collect()
}

#[test]
fn the_changelog_has_this_version() {
    let version = env!("CARGO_PKG_VERSION");
    let changelog = read(&root().join("CHANGELOG.md"));
    let heading = changelog.lines().find(|line| line.starts_with("## ")).unwrap_or_default();
    assert!(
        heading.contains(version),
        "the first section of CHANGELOG.md is `{heading}`, the workspace is at {version}"
    );
}
