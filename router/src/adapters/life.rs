//! When a failed load is tried again, on a clock that tests can set.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;

/// The time, and chance. Tests put a clock of their own in its place, so that they do not sleep.
pub(super) trait Clock: Send + Sync + 'static {
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;
    /// Unix seconds.
    fn unix_seconds(&self) -> u64;
    /// Resolves after this time.
    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()>;
    /// 0..1, uniform.
    fn random(&self) -> f64;
}

/// The real one. It may run faster, so that a black-box test sees a day of retries.
pub(super) struct SystemClock {
    start: Instant,
    speed: f64,
}

impl SystemClock {
    /// A second passes in `scale` seconds.
    pub(super) fn scaled(scale: f64) -> Self {
        Self { start: Instant::now(), speed: scale.clamp(1e-6, 1.0).recip() }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.start.elapsed().mul_f64(self.speed)
    }

    fn unix_seconds(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(time.div_f64(self.speed)))
    }

    fn random(&self) -> f64 {
        unit(u64::from_le_bytes(std::array::from_fn(|i| uuid::Uuid::new_v4().as_bytes().get(i).copied().unwrap_or(0))))
    }
}

/// The upper 53 bits as a fraction of 1.
pub(super) fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// Longest pause before the n-th retry; the real one is drawn between 1 s and this.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(40),
    Duration::from_secs(80),
];
/// After the last of them nothing is tried for this long.
const CIRCUIT_OPEN: Duration = Duration::from_secs(300);
/// What a source may ask for with `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// An explicit load tries at once, but not more often than this.
pub(super) const EXPLICIT_EVERY: Duration = Duration::from_secs(5);

/// Failures in a row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retry {
    pub(super) failures: u32,
}

impl Retry {
    /// How long to wait after one more failure: full jitter, at least 1 s; what the source asked for comes first.
    pub(super) fn after_failure(&mut self, clock: &dyn Clock, retry_after: Option<Duration>) -> Duration {
        let nth = self.failures as usize;
        self.failures = self.failures.saturating_add(1);
        match (retry_after, PAUSES.get(nth)) {
            (Some(asked), _) => asked.clamp(Duration::from_secs(1), RETRY_AFTER_MAX),
            (None, Some(longest)) => longest.mul_f64(clock.random()).max(Duration::from_secs(1)),
            (None, None) => CIRCUIT_OPEN,
        }
    }

    /// All retries were used up.
    pub(super) fn is_open(self) -> bool {
        self.failures as usize > PAUSES.len()
    }
}

/// True for failures that may go away by themselves.
pub(super) fn is_retryable(code: &str) -> bool {
    matches!(
        code,
        "adapter_load_failed"
            | "adapter_loading"
            | "adapter_auth_unavailable"
            | "disk_full"
            | "quota_exceeded"
            | "not_ready"
            | "draining"
    )
}

#[cfg(test)]
pub(super) mod testing {
    use std::sync::Mutex;

    use tokio::sync::watch;

    use super::*;

    /// Stands still until it is moved.
    pub(crate) struct TestClock {
        now: watch::Sender<Duration>,
        /// What [`Clock::random`] gives, over and over.
        random: Mutex<f64>,
    }

    impl Default for TestClock {
        fn default() -> Self {
            Self { now: watch::Sender::new(Duration::from_secs(1000)), random: Mutex::new(0.5) }
        }
    }

    impl TestClock {
        pub(crate) fn advance(&self, time: Duration) {
            self.now.send_modify(|now| *now += time);
        }

        pub(crate) fn set_random(&self, random: f64) {
            *self.random.lock().unwrap() = random;
        }
    }

    impl Clock for TestClock {
        fn now(&self) -> Duration {
            *self.now.borrow()
        }
        fn unix_seconds(&self) -> u64 {
            1_763_600_000 + self.now().as_secs()
        }
        fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
            let (mut now, until) = (self.now.subscribe(), self.now() + time);
            Box::pin(async move {
                let _ = now.wait_for(|now| *now >= until).await;
            })
        }
        fn random(&self) -> f64 {
            *self.random.lock().unwrap()
        }
    }

    #[test]
    fn pauses_double_with_full_jitter_and_then_the_circuit_is_open() {
        let clock = TestClock::default();
        for (random, expected) in [(0.0, [1, 1, 1, 1, 1]), (0.5, [2, 5, 10, 20, 40]), (0.999, [4, 9, 19, 39, 79])] {
            clock.set_random(random);
            let mut retry = Retry::default();
            for seconds in expected {
                assert!(!retry.is_open());
                assert_eq!(retry.after_failure(&clock, None).as_secs(), seconds, "{random}");
            }
            for _ in 0..3 {
                assert_eq!(retry.after_failure(&clock, None), CIRCUIT_OPEN);
                assert!(retry.is_open());
            }
        }
        let asked = |seconds| Retry::default().after_failure(&clock, Some(Duration::from_secs(seconds))).as_secs();
        assert_eq!((asked(17), asked(0), asked(1_000_000)), (17, 1, 3600));
    }
}
