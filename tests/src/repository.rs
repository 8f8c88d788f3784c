//! Where the files are.

use std::path::{Path, PathBuf};

/// The crates, by folder.
pub const CRATES: [&str; 6] = ["proto", "router", "kernels", "models", "server", "tests"];

/// The repository's root.
///
/// # Panics
/// If this crate does not lie in a folder of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent").to_path_buf()
}

/// A file's text.
///
/// # Panics
/// If it cannot be read as UTF-8: these are our own files.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files under `folder` with this extension, sorted, with paths from the root. Build output is left out.
///
/// # Panics
/// If a folder cannot be read.
pub fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let root = root();
    let (mut found, mut open) = (Vec::new(), vec![root.join(folder)]);
    while let Some(folder) = open.pop() {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for entry in entries.map(|entry| entry.expect("a readable folder").path()) {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if entry.is_dir() && name != "target" && !name.starts_with('.') {
                open.push(entry);
            } else if entry.extension().is_some_and(|found| found == extension) {
                found.push(entry.strip_prefix(&root).expect("under the root").to_path_buf());
            }
        }
    }
    found.sort();
    found
}

/// All Rust files of all crates.
pub fn rust_files() -> Vec<PathBuf> {
    CRATES.iter().flat_map(|folder| files(folder, "rs")).collect()
}

/// Whether a file is a test, by its place.
pub fn is_test(path: &Path) -> bool {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem == "tests" || stem.ends_with("_tests") || path.components().any(|part| part.as_os_str() == "tests")
}
