//! How long adapters take to load, by source and phase.

use std::fmt::Write;
use std::time::Duration;

use super::histogram::Histogram;
use crate::adapters::SourceKind;

/// Seconds.
const BOUNDS: &[f64] = &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const SOURCES: [SourceKind; 6] =
    [SourceKind::Hub, SourceKind::S3, SourceKind::Gcs, SourceKind::Http, SourceKind::Local, SourceKind::Merge];

/// A part of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadPhase {
    /// From a resolved reference to files on this machine.
    Fetch,
    /// From files to an image in host memory.
    Prepare,
}

impl LoadPhase {
    const ALL: [Self; 2] = [Self::Fetch, Self::Prepare];

    fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Prepare => "prepare",
        }
    }
}

/// `loramux_adapter_load_seconds`. A source that never loaded anything has no series.
#[derive(Debug)]
pub struct LoadTimes {
    by_source: [[Histogram; 2]; 6],
}

impl Default for LoadTimes {
    fn default() -> Self {
        Self { by_source: std::array::from_fn(|_| std::array::from_fn(|_| Histogram::new(BOUNDS))) }
    }
}

impl LoadTimes {
    /// A phase ended well.
    pub fn observe(&self, source: SourceKind, phase: LoadPhase, took: Duration) {
        let histogram = SOURCES
            .iter()
            .position(|known| *known == source)
            .and_then(|at| self.by_source.get(at))
            .and_then(|phases| phases.get(usize::from(phase == LoadPhase::Prepare)));
        if let Some(histogram) = histogram {
            histogram.observe(took.as_secs_f64());
        }
    }

    pub(super) fn render(&self, out: &mut String) {
        let name = "loramux_adapter_load_seconds";
        let _ = writeln!(out, "# HELP {name} Time to load adapters, by source and phase.\n# TYPE {name} histogram");
        for (source, phases) in SOURCES.iter().zip(&self.by_source) {
            for (phase, histogram) in LoadPhase::ALL.iter().zip(phases) {
                if histogram.count() > 0 {
                    let labels = format!("source=\"{}\",phase=\"{}\"", source.name(), phase.name());
                    histogram.series(name, &labels, out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_and_phase_has_its_series_once_it_loaded_something() {
        let times = LoadTimes::default();
        times.observe(SourceKind::S3, LoadPhase::Fetch, Duration::from_millis(300));
        times.observe(SourceKind::S3, LoadPhase::Prepare, Duration::from_millis(20));
        times.observe(SourceKind::S3, LoadPhase::Prepare, Duration::from_millis(30));
        let mut page = String::new();
        times.render(&mut page);
        for line in [
            "loramux_adapter_load_seconds_bucket{source=\"s3\",phase=\"fetch\",le=\"0.25\"} 0",
            "loramux_adapter_load_seconds_bucket{source=\"s3\",phase=\"fetch\",le=\"0.5\"} 1",
            "loramux_adapter_load_seconds_sum{source=\"s3\",phase=\"prepare\"} 0.05",
            "loramux_adapter_load_seconds_count{source=\"s3\",phase=\"prepare\"} 2",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
        }
        assert!(!page.contains("hub"));
        assert_eq!(page.matches("# TYPE").count(), 1);
    }
}
