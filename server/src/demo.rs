//! The built-in model: `models/demo/`, carried inside the binary, so that `loramux` with no arguments serves something.

use std::io;
use std::path::{Path, PathBuf};

/// What clients call it.
pub(crate) const NAME: &str = "demo";

macro_rules! demo_files {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../models/demo/", $path)))),*]
    };
}

/// (path, bytes) of every file.
const FILES: &[(&str, &[u8])] = demo_files![
    "base/config.json",
    "base/generation_config.json",
    "base/model.safetensors",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "adapters/pirate/adapter_config.json",
    "adapters/pirate/adapter_model.safetensors",
    "adapters/haiku/adapter_config.json",
    "adapters/haiku/adapter_model.safetensors",
    "adapters/sql/adapter_config.json",
    "adapters/sql/adapter_model.safetensors",
    "adapters/shout/adapter_config.json",
    "adapters/shout/adapter_model.safetensors",
    "adapters/emoji/adapter_config.json",
    "adapters/emoji/adapter_model.safetensors",
];

/// Where the files lie now.
pub(crate) struct Unpacked {
    pub(crate) model: PathBuf,
    pub(crate) adapters: Vec<(String, PathBuf)>,
}

/// Writes the files below `data_dir` unless they lie there already. Each is written beside its place and renamed, so two
/// servers that start at once do not see half a file.
pub(crate) fn unpack(data_dir: &Path) -> io::Result<Unpacked> {
    let root = data_dir.join(concat!("demo-", env!("CARGO_PKG_VERSION")));
    let mut adapters: Vec<(String, PathBuf)> = Vec::new();
    for (path, bytes) in FILES {
        let file = root.join(path);
        let dir = file.parent().unwrap_or(&root);
        if std::fs::read(&file).ok().as_deref() != Some(*bytes) {
            std::fs::create_dir_all(dir)?;
            let part = dir.join(format!(".{}.part", std::process::id()));
            std::fs::write(&part, bytes)?;
            std::fs::rename(&part, &file)?;
        }
        if path.starts_with("adapters/")
            && let Some(name) = dir.file_name().map(|name| name.to_string_lossy().into_owned())
            && adapters.last().is_none_or(|(last, _)| *last != name)
        {
            adapters.push((name, dir.to_path_buf()));
        }
    }
    Ok(Unpacked { model: root.join("base"), adapters })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_written_again_and_the_whole_stays_below_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let unpacked = unpack(dir.path()).unwrap();
        let config = unpacked.model.join("config.json");
        std::fs::write(&config, "damaged").unwrap();
        unpack(dir.path()).unwrap();
        assert_ne!(std::fs::read(&config).unwrap(), b"damaged");
        let names: Vec<_> = unpacked.adapters.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["pirate", "haiku", "sql", "shout", "emoji"]);
        let bytes: usize = FILES.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(bytes <= 12 << 20, "{bytes}");
    }
}
