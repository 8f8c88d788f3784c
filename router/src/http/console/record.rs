//! What the last five minutes looked like, one point a second: so that a page that is opened now has something to plot.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::engine::{EngineCounters, EngineStatus};
use crate::http::App;
use crate::metrics::{Counts, Metrics};

/// Between two points.
const EVERY: Duration = Duration::from_secs(1);
/// Points that are kept: five minutes.
pub(super) const POINTS_MAX: usize = 300;
/// Over which the quantiles of "the last minute" are taken.
const SNAPSHOTS_MAX: usize = 61;
/// Snapshots back to which a point's own quantiles reach: single seconds have too few tokens.
const POINT_SPAN: usize = 10;
/// Snapshots back to which rates reach.
const RATE_SPAN: usize = 3;

/// Takes a point each second. All its memory is bounded.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    snapshots: VecDeque<Snapshot>,
    points: VecDeque<Point>,
    next: u64,
}

#[derive(Debug)]
struct Snapshot {
    at: Instant,
    counters: EngineCounters,
    first_token: Counts,
    inter_token: Counts,
}

/// One second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    /// Counts up by one; see `since`.
    pub(super) seq: u64,
    /// Unix time, ms.
    pub(super) time_ms: u64,
    pub(super) running: u32,
    pub(super) waiting: u32,
    /// Of the last three seconds.
    #[serde(flatten)]
    pub(super) rates: Rates,
    /// p50 and p99 of the last ten seconds, s.
    pub(super) first_token: Option<[f64; 2]>,
    pub(super) inter_token: Option<[f64; 2]>,
}

/// Per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    pub(super) prompt_tokens_per_s: f64,
    pub(super) generation_tokens_per_s: f64,
    pub(super) steps_per_s: f64,
}

/// Quantiles, s; absent where nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Quantiles {
    pub(super) count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p50: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p90: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p99: Option<f64>,
}

impl Quantiles {
    fn of(counts: &Counts) -> Self {
        let at = |share| counts.quantile(share);
        Self { count: counts.total(), p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

/// What is known of the last minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Minute {
    /// How much of it there is yet, s.
    pub(super) window_s: f64,
    pub(super) first_token: Quantiles,
    pub(super) inter_token: Quantiles,
}

impl Recorder {
    /// Adds a point. `now` does not go back.
    pub(super) fn tick(&self, now: Instant, time_ms: u64, status: &EngineStatus, metrics: &Metrics) {
        let snapshot = Snapshot {
            at: now,
            counters: status.counters,
            first_token: metrics.recent_first_token.counts(),
            inter_token: metrics.recent_inter_token.counts(),
        };
        let mut state = self.lock();
        let pair = |new: fn(&Snapshot) -> &Counts, old: &Snapshot| {
            let counts = new(&snapshot).since(new(old));
            Some([counts.quantile(0.5)?, counts.quantile(0.99)?])
        };
        let back = state.back(POINT_SPAN);
        let first_token = back.and_then(|old| pair(|of| &of.first_token, old));
        let inter_token = back.and_then(|old| pair(|of| &of.inter_token, old));
        let rates = state.back(RATE_SPAN).map(|old| snapshot.rates_since(old)).unwrap_or_default();
        let (running, waiting, seq) = (status.running, status.waiting, state.next);
        state.next += 1;
        state.points.push_back(Point { seq, time_ms, running, waiting, rates, first_token, inter_token });
        state.snapshots.push_back(snapshot);
        while state.points.len() > POINTS_MAX {
            state.points.pop_front();
        }
        while state.snapshots.len() > SNAPSHOTS_MAX {
            state.snapshots.pop_front();
        }
    }

    /// Points from number `since` on.
    pub(super) fn points(&self, since: u64) -> Vec<Point> {
        self.lock().points.iter().filter(|point| point.seq >= since).copied().collect()
    }

    /// The last minute, as of at most a second ago.
    pub(super) fn minute(&self) -> Minute {
        let state = self.lock();
        let (Some(oldest), Some(newest)) = (state.snapshots.front(), state.snapshots.back()) else {
            return Minute::default();
        };
        Minute {
            window_s: (newest.at - oldest.at).as_secs_f64(),
            first_token: Quantiles::of(&newest.first_token.since(&oldest.first_token)),
            inter_token: Quantiles::of(&newest.inter_token.since(&oldest.inter_token)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The snapshot `span` before the next one, or the oldest.
    fn back(&self, span: usize) -> Option<&Snapshot> {
        self.snapshots.get(self.snapshots.len().saturating_sub(span))
    }
}

impl Snapshot {
    fn rates_since(&self, old: &Self) -> Rates {
        let seconds = (self.at - old.at).as_secs_f64().max(1e-3);
        let rate = |of: fn(&EngineCounters) -> u64| {
            // Three digits behind the point are plenty, and keep the text short.
            let rate = of(&self.counters).saturating_sub(of(&old.counters)) as f64 / seconds;
            (rate * 1e3).round() / 1e3
        };
        Rates {
            prompt_tokens_per_s: rate(|of| of.prompt_tokens),
            generation_tokens_per_s: rate(|of| of.generation_tokens),
            steps_per_s: rate(|of| of.steps),
        }
    }
}

impl App {
    /// Starts to take points, until the last handle on this server is dropped. Needs a tokio runtime.
    pub(crate) fn record(&self) {
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(EVERY);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let Some(app) = inner.upgrade() else { return };
                app.recorder.tick(Instant::now(), super::live::unix_ms(), &app.engine.status(), &app.metrics);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(generated: u64, running: u32) -> EngineStatus {
        let counters =
            EngineCounters { generation_tokens: generated, steps: generated / 4, ..EngineCounters::default() };
        EngineStatus { counters, running, ..EngineStatus::default() }
    }

    #[test]
    fn points_are_bounded_and_rates_are_of_the_last_seconds() {
        let (recorder, metrics, start) = (Recorder::default(), Metrics::default(), Instant::now());
        for second in 0..400u64 {
            // 100 tokens a second, then none.
            let generated = second.min(350) * 100;
            recorder.tick(start + Duration::from_secs(second), second * 1000, &status(generated, 2), &metrics);
        }
        let points = recorder.points(0);
        assert_eq!((points.len(), points[0].seq, points[299].seq), (POINTS_MAX, 100, 399));
        assert_eq!(recorder.points(398).len(), 2);
        assert!(recorder.points(400).is_empty());
        let at = |seq: usize| points[seq - 100].rates;
        assert_eq!((at(300).generation_tokens_per_s, at(300).steps_per_s), (100.0, 25.0));
        assert_eq!(at(399).generation_tokens_per_s, 0.0);
        assert!(at(351).generation_tokens_per_s > 0.0, "a rate reaches three seconds back");
    }

    #[test]
    fn a_minute_old_time_is_forgotten_and_a_new_one_is_seen_at_once() {
        let (recorder, metrics, start) = (Recorder::default(), Arc::new(Metrics::default()), Instant::now());
        let tick = |second: u64| {
            recorder.tick(start + Duration::from_secs(second), second * 1000, &EngineStatus::default(), &metrics);
        };
        tick(0);
        assert_eq!(recorder.minute(), Minute::default());
        let start_of = crate::metrics::RequestStart {
            n: 1,
            max_tokens: 4,
            prompt_tokens: 7,
            adapter: None,
            meter: None,
            record: None,
        };
        let mut clock = metrics.request(&start_of);
        clock.token(0);
        clock.token(0);
        tick(1);
        let minute = recorder.minute();
        assert_eq!((minute.first_token.count, minute.inter_token.count, minute.window_s), (1, 1, 1.0));
        assert!(minute.first_token.p50.is_some_and(|p50| p50 < 60.0));
        assert!(recorder.points(1)[0].inter_token.is_some());
        for second in 2..=61 {
            tick(second);
        }
        assert_eq!(recorder.minute().first_token.count, 0);
        assert_eq!(recorder.points(30)[0].first_token, None, "a point looks ten seconds back");
    }
}
