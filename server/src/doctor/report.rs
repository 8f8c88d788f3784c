//! What doctor found, as a page for people and as JSON.

use serde_json::{Map, Value, json};

/// How a line of the page turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// A check that passed.
    Ok,
    /// A check that failed.
    Failed,
    /// Worth knowing; no check.
    Info,
    /// Not as it should be, and not an error.
    Warning,
}

impl Status {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::Info => "",
            Self::Warning => "note",
        }
    }

    const fn key(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Info => "info",
            Self::Warning => "warning",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) status: Status,
    /// For people.
    pub(crate) text: String,
    /// The same in numbers, for programs.
    pub(crate) fields: Map<String, Value>,
}

/// Lines under one heading.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    title: &'static str,
    lines: Vec<Line>,
}

impl Section {
    pub(crate) const fn new(title: &'static str) -> Self {
        Self { title, lines: Vec::new() }
    }

    /// Adds a line; gives it back for fields.
    pub(crate) fn push(&mut self, status: Status, name: impl Into<String>, text: impl Into<String>) -> &mut Line {
        let line = Line { name: name.into(), status, text: text.into(), fields: Map::new() };
        self.lines.push(line);
        let last = self.lines.len() - 1;
        &mut self.lines[last]
    }

    pub(crate) fn failures(&self) -> usize {
        self.lines.iter().filter(|line| line.status == Status::Failed).count()
    }
}

impl Line {
    /// Adds a value for programs.
    pub(crate) fn field(&mut self, name: &str, value: impl Into<Value>) -> &mut Self {
        self.fields.insert(name.to_owned(), value.into());
        self
    }
}

/// The whole of it.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// Which command made it.
    pub(crate) kind: &'static str,
    /// As typed.
    pub(crate) device: String,
    /// Whether the host emulator stood in for a GPU: then its times say nothing about speed.
    pub(crate) is_emulated: bool,
    /// What a figure depends on: model, seed, revision, library versions, clocks. Empty for checks.
    pub(crate) setup: Map<String, Value>,
    pub(crate) sections: Vec<Section>,
    /// In plain words: what works, and what to do if something does not.
    pub(crate) verdict: String,
}

impl Report {
    pub(crate) fn failures(&self) -> usize {
        self.sections.iter().map(Section::failures).sum()
    }

    pub(crate) fn is_ok(&self) -> bool {
        self.failures() == 0
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let line = |line: &Line| {
            let mut object = line.fields.clone();
            object.insert("name".into(), line.name.clone().into());
            object.insert("status".into(), line.status.key().into());
            object.insert("text".into(), line.text.clone().into());
            Value::Object(object)
        };
        let section = |section: &Section| json!({ "title": section.title, "lines": section.lines.iter().map(line).collect::<Vec<_>>() });
        json!({
            "kind": self.kind,
            "version": env!("CARGO_PKG_VERSION"),
            "device": self.device,
            "is_emulated": self.is_emulated,
            "ok": self.is_ok(),
            "setup": self.setup,
            "sections": self.sections.iter().map(section).collect::<Vec<_>>(),
            "verdict": self.verdict,
        })
    }

    /// For people.
    pub(crate) fn page(&self) -> String {
        let mut page = format!("\n  loramux {} {}, device {}\n", env!("CARGO_PKG_VERSION"), self.kind, self.device);
        for section in &self.sections {
            page.push_str(&format!("\n  {}\n", section.title));
            let width = section.lines.iter().map(|line| line.name.chars().count()).max().unwrap_or(0).min(36);
            for line in &section.lines {
                let mut rows = line.text.lines().flat_map(|row| wrap(row, PAGE_WIDTH)).collect::<Vec<_>>().into_iter();
                let first = rows.next().unwrap_or_default();
                let row = format!("    {:<width$}  {:<6}  {first}", line.name, line.status.word());
                page.push_str(row.trim_end());
                page.push('\n');
                for row in rows {
                    page.push_str(&format!("    {:<width$}  {:<6}  {row}\n", "", ""));
                }
            }
        }
        page.push_str(&format!("\n  {}\n", self.verdict.replace('\n', "\n  ")));
        page
    }
}

/// Longest text beside a name. Tables are narrower, so only prose is broken.
const PAGE_WIDTH: usize = 110;

/// Breaks a row that is too long between words.
fn wrap(row: &str, width: usize) -> Vec<String> {
    if row.chars().count() <= width {
        return vec![row.to_owned()];
    }
    let mut rows: Vec<String> = Vec::new();
    for word in row.split_whitespace() {
        match rows.last_mut().filter(|last| last.chars().count() + 1 + word.chars().count() <= width) {
            Some(last) => {
                last.push(' ');
                last.push_str(word);
            }
            None => rows.push(word.to_owned()),
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_and_the_json_say_the_same() {
        let mut section = Section::new("ops");
        section.push(Status::Ok, "norm", "12 cases").field("cases", 12);
        section.push(Status::Failed, "rope", "row 3\nis wrong");
        let report = Report {
            kind: "doctor",
            device: "cpu".into(),
            is_emulated: false,
            setup: Map::new(),
            sections: vec![section],
            verdict: "One thing\nfailed".into(),
        };
        assert_eq!(report.failures(), 1);
        let json = report.json();
        assert_eq!(json["ok"], false);
        assert_eq!(json["sections"][0]["lines"][0]["cases"], 12);
        assert_eq!(json["sections"][0]["lines"][1]["status"], "failed");
        let page = report.page();
        assert_eq!(wrap("a  b", 10), ["a  b"]);
        assert_eq!(wrap("one two  three /a/long/word", 9), ["one two", "three", "/a/long/word"]);
        for part in ["norm  ok      12 cases", "rope  FAILED  row 3", "is wrong", "  One thing\n  failed"] {
            assert!(page.contains(part), "{part:?} in {page}");
        }
    }
}
