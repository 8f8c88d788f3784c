//! How much a key may ask for, and how often an address may guess keys.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::error::{ApiError, Cause};
use crate::access::KeyPolicy;

/// Wrong keys that one address may send in a minute before it is answered 429.
const WRONG_KEYS_PER_MINUTE: f64 = 30.0;
/// Addresses whose wrong keys are counted; more share one count.
const ADDRESSES_MAX: usize = 4096;
/// A caller over its limit of concurrent requests is told to come back after this.
const CONCURRENT_RETRY: Duration = Duration::from_secs(1);

/// Fills up evenly to one minute's worth. What is charged after the fact may bring it below zero.
#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    level: f64,
    since: Instant,
}

impl Bucket {
    fn full(per_minute: f64, now: Instant) -> Self {
        Self { per_minute, level: per_minute, since: now }
    }

    fn fill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.since).as_secs_f64() * self.per_minute / 60.0;
        self.level = (self.level + gained).min(self.per_minute);
        self.since = now;
    }

    /// Takes `amount` if at least `needed` is there.
    ///
    /// # Errors
    /// How long until it is.
    fn take(&mut self, amount: f64, needed: f64, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        if self.level >= needed {
            self.level -= amount;
            return Ok(());
        }
        let seconds = (needed - self.level) * 60.0 / self.per_minute.max(f64::MIN_POSITIVE);
        Err(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(3600)))
    }
}

/// What one key has used. Shared by all its requests.
#[derive(Debug)]
pub struct Meter {
    concurrent_max: Option<u32>,
    running: AtomicU32,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
}

impl Meter {
    /// Nothing used yet.
    pub(crate) fn new(policy: &KeyPolicy) -> Self {
        let now = Instant::now();
        let bucket = |per_minute: f64| Mutex::new(Bucket::full(per_minute, now));
        Self {
            concurrent_max: policy.concurrent_max,
            running: AtomicU32::new(0),
            requests: policy.requests_per_minute.map(|n| bucket(f64::from(n))),
            tokens: policy.tokens_per_minute.map(|n| bucket(n as f64)),
        }
    }

    /// Lets one request in. It counts as running until the permit is dropped.
    ///
    /// # Errors
    /// 429 `rate_limited` with the time to wait.
    pub(crate) fn admit(self: &Arc<Self>) -> Result<Permit, ApiError> {
        let limited = |what: String, wait| ApiError::new(Cause::RateLimited, what).after(Some(wait));
        let admitted = self.running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |running| {
            self.concurrent_max.is_none_or(|max| running < max).then(|| running.saturating_add(1))
        });
        if admitted.is_err() {
            let max = self.concurrent_max.unwrap_or(0);
            return Err(limited(format!("this key may have {max} requests at once"), CONCURRENT_RETRY));
        }
        let permit = Permit(Arc::clone(self));
        let now = Instant::now();
        if let Some(tokens) = &self.tokens {
            let mut tokens = lock(tokens);
            let text = format!("this key may use {} tokens a minute", tokens.per_minute);
            tokens.take(0.0, 1.0, now).map_err(|wait| limited(text, wait))?;
        }
        if let Some(requests) = &self.requests {
            let mut requests = lock(requests);
            let text = format!("this key may send {} requests a minute", requests.per_minute);
            requests.take(1.0, 1.0, now).map_err(|wait| limited(text, wait))?;
        }
        Ok(permit)
    }

    /// Tokens that were read or generated.
    pub(crate) fn charge_tokens(&self, tokens: u64) {
        if let Some(bucket) = &self.tokens {
            lock(bucket).level -= tokens as f64;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One running request of a key.
#[derive(Debug)]
pub(crate) struct Permit(Arc<Meter>);

impl Permit {
    /// Keeps the permit until the response is sent or dropped.
    pub(crate) fn hold(self, body: Body) -> Body {
        Body::new(HeldBody { body, _permit: self })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

struct HeldBody {
    body: Body,
    _permit: Permit,
}

impl HttpBody for HeldBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Wrong keys by address. Right keys always pass: clients behind one proxy share its address, and a guesser among them
/// must not lock the others out.
#[derive(Debug, Default)]
pub(crate) struct WrongKeys {
    by_address: Mutex<HashMap<IpAddr, Bucket>>,
}

impl WrongKeys {
    /// Counts one.
    ///
    /// # Errors
    /// Too many lately: how long to wait.
    pub(crate) fn count(&self, address: IpAddr) -> Result<(), Duration> {
        self.count_at(address, Instant::now())
    }

    fn count_at(&self, address: IpAddr, now: Instant) -> Result<(), Duration> {
        let mut known = lock(&self.by_address);
        let mut address = network_of(address);
        if !known.contains_key(&address) && known.len() >= ADDRESSES_MAX {
            known.retain(|_, bucket| {
                bucket.fill(now);
                bucket.level < bucket.per_minute
            });
            if known.len() >= ADDRESSES_MAX {
                address = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            }
        }
        known.entry(address).or_insert_with(|| Bucket::full(WRONG_KEYS_PER_MINUTE, now)).take(1.0, 1.0, now)
    }
}

/// What one person controls: an IPv4 address, or a /64 of IPv6.
pub(crate) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_a_minutes_worth_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::full(60.0, start);
        for _ in 0..60 {
            assert!(bucket.take(1.0, 1.0, start).is_ok());
        }
        let wait = bucket.take(1.0, 1.0, start).unwrap_err();
        assert!((wait.as_secs_f64() - 1.0).abs() < 1e-6, "{wait:?}");
        assert!(bucket.take(1.0, 1.0, start + wait).is_ok());
        assert!(bucket.take(1.0, 1.0, start + wait).is_err());
        let later = start + Duration::from_secs(3600);
        bucket.fill(later);
        assert!(bucket.level <= 60.0, "an idle hour saves up one minute");
    }

    #[test]
    fn tokens_are_charged_after_the_fact_and_paid_back() {
        let policy = KeyPolicy { tokens_per_minute: Some(600), ..KeyPolicy::default() };
        let meter = Arc::new(Meter::new(&policy));
        assert!(meter.admit().is_ok());
        meter.charge_tokens(900);
        let error = meter.admit().unwrap_err();
        assert_eq!(error.cause, Cause::RateLimited);
        assert!((29..=31).contains(&error.retry_after_s()), "300 tokens of debt at 10 a second: {error:?}");
    }

    #[test]
    fn concurrent_requests_are_counted_until_their_bodies_end() {
        let policy = KeyPolicy { concurrent_max: Some(2), ..KeyPolicy::default() };
        let meter = Arc::new(Meter::new(&policy));
        let (first, second) = (meter.admit().unwrap(), meter.admit().unwrap());
        assert_eq!(meter.admit().unwrap_err().cause, Cause::RateLimited);
        let body = first.hold(Body::from("x"));
        assert_eq!(body.size_hint().exact(), Some(1), "the length is still known");
        assert!(meter.admit().is_err());
        drop(body);
        assert!(meter.admit().is_ok());
        drop(second);
        assert_eq!(meter.running.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn wrong_keys_are_limited_by_address_in_bounded_memory() {
        let (wrong, now) = (WrongKeys::default(), Instant::now());
        let from = |n: u32| IpAddr::V4(n.into());
        for _ in 0..30 {
            assert!(wrong.count_at(from(1), now).is_ok());
        }
        assert!(wrong.count_at(from(1), now).is_err());
        assert!(wrong.count_at(from(2), now).is_ok(), "another address is not concerned");
        for n in 0..100_000 {
            let _ = wrong.count_at(from(n), now);
        }
        assert!(lock(&wrong.by_address).len() <= ADDRESSES_MAX + 1);
        let later = now + Duration::from_secs(61);
        assert!(wrong.count_at(from(1), later).is_ok());
        let (a, b) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        assert_eq!(network_of(a), network_of(b), "a host may have many addresses of its network");
        assert_eq!(network_of("::ffff:1.2.3.4".parse().unwrap()), IpAddr::V4([1, 2, 3, 4].into()));
    }
}
