//! The dependencies of a `Cargo.toml`, as far as this repository writes them: one a line, in a section.

/// Which of the three kinds a dependency is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `[dependencies]`, also under `[target.…]`.
    Normal,
    /// `[dev-dependencies]`.
    Dev,
    /// `[build-dependencies]`.
    Build,
}

/// Name and kind of every dependency of a manifest.
pub fn dependencies(manifest: &str) -> Vec<(String, Kind)> {
    let (mut found, mut section) = (Vec::new(), None);
    for line in manifest.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let (inside, last) = name.rsplit_once("dependencies.").map_or((name, None), |(_, crate_name)| {
                (name.strip_suffix(crate_name).unwrap_or(name).trim_end_matches('.'), Some(crate_name))
            });
            section = kind(inside);
            if let (Some(kind), Some(crate_name)) = (section, last) {
                found.push((crate_name.trim_matches('"').to_owned(), kind));
                section = None;
            }
        } else if let Some(kind) = section {
            let end = line.find(['.', '=', ' ']).unwrap_or(line.len());
            found.push((line[..end].trim_matches('"').to_owned(), kind));
        }
    }
    found
}

fn kind(section: &str) -> Option<Kind> {
    match section.rsplit('.').next() {
        Some("dependencies") if !section.starts_with("workspace") => Some(Kind::Normal),
        Some("dev-dependencies") => Some(Kind::Dev),
        Some("build-dependencies") => Some(Kind::Build),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_write_a_dependency_is_read() {
        let manifest = "[package]\nname = \"x\"\n[workspace.dependencies]\nnot = \"1\"\n# no = 1\n[dependencies]\na.workspace = true\n\
                        b = { version = \"1\" }\n\n[target.'cfg(unix)'.dependencies]\nc=\"1\"\n[dependencies.d]\nversion = \"1\"\n\
                        [dev-dependencies]\ne = \"1\"\n[build-dependencies]\nf.workspace = true\n[lints]\nworkspace = true\n";
        let names: Vec<_> = dependencies(manifest);
        let expected = [
            ("a", Kind::Normal),
            ("b", Kind::Normal),
            ("c", Kind::Normal),
            ("d", Kind::Normal),
            ("e", Kind::Dev),
            ("f", Kind::Build),
        ];
        assert_eq!(names, expected.map(|(name, kind)| (name.to_owned(), kind)));
    }
}
