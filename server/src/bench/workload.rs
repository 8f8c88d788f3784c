//! What is sent: named workloads, and how `NAME:KEY=VALUE` changes one.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::popularity::Popularity;

/// Requests of a workload that says nothing about their number, for each one that runs at a time.
const REQUESTS_PER_WORKER: usize = 4;
const REQUESTS_MIN: usize = 8;
/// Tokens of a prompt or a reply at most.
const TOKENS_MAX: usize = 1 << 20;
/// Requests of a round, and of those at a time, at most.
const REQUESTS_MAX: usize = 1 << 20;

/// A number of tokens, or a range that each request draws from: `128` or `64-256`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lengths {
    /// Smallest.
    pub(crate) min: usize,
    /// Largest.
    pub(crate) max: usize,
}

impl Lengths {
    const fn of(tokens: usize) -> Self {
        Self { min: tokens, max: tokens }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|n| (1..=TOKENS_MAX).contains(n));
        match (number(min), number(max)) {
            (Some(min), Some(max)) if min <= max => Ok(Self { min, max }),
            _ => Err(format!("`{text}` is no number of tokens: write 128, or 64-256 (1 to {TOKENS_MAX})")),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max { write!(f, "{}", self.min) } else { write!(f, "{}-{}", self.min, self.max) }
    }
}

/// What flags say about every workload of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Overrides {
    pub(super) concurrency: Option<usize>,
    pub(super) rate_per_s: Option<f64>,
    pub(super) requests: Option<usize>,
    pub(super) prompt_tokens: Option<Lengths>,
    pub(super) output_tokens: Option<Lengths>,
}

/// One kind of load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Workload {
    /// How tables call it: what was typed, unless `label=` says otherwise.
    pub(crate) label: String,
    /// The named workload that it began as.
    pub(crate) name: String,
    /// Which adapters its requests use.
    pub(crate) popularity: Popularity,
    /// Requests that run at a time (closed loop). Not used where there is a rate.
    pub(crate) concurrency: usize,
    /// Requests a second, arriving as a Poisson process (open loop).
    pub(crate) rate_per_s: Option<f64>,
    /// Requests of a round.
    pub(crate) requests: usize,
    /// Tokens of a prompt, prefix included.
    pub(crate) prompt_tokens: Lengths,
    /// Tokens that each reply must have.
    pub(crate) output_tokens: Lengths,
    /// Leading tokens that all prompts of a round share.
    pub(crate) prefix_tokens: usize,
    /// Tokens of one long prompt that is sent while the others stream; 0 = none.
    pub(crate) intruder_tokens: usize,
}

/// Named workloads and what they are, for `--help`.
pub(super) const NAMES: [&str; 12] = [
    "base",
    "one",
    "distinct",
    "uniform",
    "zipf",
    "identical",
    "skewed",
    "prefill",
    "prefill-one",
    "shared-prefix",
    "churn",
    "long-prefill-intruder",
];

impl Workload {
    /// A named workload as it is when nobody changes it. `requests` 0 = by the concurrency.
    fn named(name: &str) -> Option<Self> {
        let mut workload = Self {
            label: name.to_owned(),
            name: name.to_owned(),
            popularity: Popularity::parse(name).unwrap_or(Popularity::Base),
            concurrency: 16,
            rate_per_s: None,
            requests: 0,
            prompt_tokens: Lengths::of(128),
            output_tokens: Lengths::of(64),
            prefix_tokens: 0,
            intruder_tokens: 0,
        };
        match name {
            "prefill" | "prefill-one" => {
                workload.popularity = if name == "prefill" { Popularity::Base } else { Popularity::One };
                workload.concurrency = 4;
                workload.prompt_tokens = Lengths::of(1024);
                workload.output_tokens = Lengths::of(1);
            }
            "shared-prefix" => {
                workload.prompt_tokens = Lengths::of(512);
                workload.prefix_tokens = 448;
            }
            "churn" => {
                workload.popularity = Popularity::Distinct;
                workload.concurrency = 4;
                workload.requests = 64;
                workload.output_tokens = Lengths::of(16);
            }
            "long-prefill-intruder" => {
                workload.concurrency = 8;
                workload.requests = 8;
                workload.prompt_tokens = Lengths::of(32);
                workload.output_tokens = Lengths::of(256);
                workload.intruder_tokens = 2048;
            }
            _ if Popularity::parse(name).is_some() => {}
            _ => return None,
        }
        Some(workload)
    }

    /// Reads `NAME[:KEY=VALUE]..`. The name's own settings give way to the flags, and those to the keys.
    pub(super) fn parse(typed: &str, flags: &Overrides) -> Result<Self, String> {
        let mut parts = typed.split(':');
        let name = parts.next().unwrap_or_default();
        let mut workload = Self::named(name)
            .ok_or_else(|| format!("--workloads: `{name}` is no workload; known: {}", NAMES.join(", ")))?;
        workload.label = typed.to_owned();
        workload.concurrency = flags.concurrency.unwrap_or(workload.concurrency);
        workload.rate_per_s = flags.rate_per_s;
        workload.requests = flags.requests.unwrap_or(workload.requests);
        workload.prompt_tokens = flags.prompt_tokens.unwrap_or(workload.prompt_tokens);
        workload.output_tokens = flags.output_tokens.unwrap_or(workload.output_tokens);
        for part in parts {
            workload.set(part).map_err(|reason| format!("--workloads {typed}: {reason}"))?;
        }
        if workload.requests == 0 {
            workload.requests = (REQUESTS_PER_WORKER * workload.concurrency).max(REQUESTS_MIN);
        }
        workload.check().map_err(|reason| format!("--workloads {typed}: {reason}"))?;
        Ok(workload)
    }

    fn set(&mut self, part: &str) -> Result<(), String> {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}` is not KEY=VALUE"))?;
        let number = || {
            let read = value.parse::<usize>().ok().filter(|n| *n <= REQUESTS_MAX);
            read.ok_or_else(|| format!("{key}={value}: not a whole number up to {REQUESTS_MAX}"))
        };
        match key {
            "concurrency" | "c" => self.concurrency = number()?,
            "requests" => self.requests = number()?,
            "rate" => {
                self.rate_per_s = Some(value.parse().map_err(|_| format!("rate={value}: not a number a second"))?);
            }
            "prompt" => self.prompt_tokens = value.parse()?,
            "output" => self.output_tokens = value.parse()?,
            "prefix" => self.prefix_tokens = number()?,
            "intruder" => self.intruder_tokens = number()?,
            "label" => value.clone_into(&mut self.label),
            "popularity" => {
                let known = || Popularity::NAMES.map(|(name, _)| name).join(", ");
                self.popularity = Popularity::parse(value).ok_or_else(|| format!("{part}: known are {}", known()))?;
            }
            _ => {
                return Err(format!(
                    "unknown key `{key}`; known: concurrency (c), rate, requests, prompt, output, prefix, intruder, \
                     popularity, label"
                ));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=REQUESTS_MAX).contains(&self.concurrency) || !(1..=REQUESTS_MAX).contains(&self.requests) {
            return Err(format!("concurrency and requests must be 1 to {REQUESTS_MAX}"));
        }
        // Slower ones would not end in a lifetime; a faster one is a closed loop.
        if self.rate_per_s.is_some_and(|rate| !(1e-3..=1e6).contains(&rate)) {
            return Err("a rate is 0.001 to 1000000 requests a second".into());
        }
        if self.prefix_tokens >= self.prompt_tokens.min {
            let (prefix, prompt) = (self.prefix_tokens, self.prompt_tokens);
            return Err(format!("a common prefix of {prefix} tokens leaves no token of a prompt of {prompt}"));
        }
        if self.intruder_tokens > 0 && self.output_tokens.min < 8 {
            return Err("streams must have 8 tokens or more, or they end before the long prompt comes".into());
        }
        Ok(())
    }

    /// Whether requests ask for adapters.
    pub(super) fn uses_adapters(&self) -> bool {
        self.popularity != Popularity::Base
    }

    /// Whether the two differ in nothing but the adapters, so that a ratio of their speeds says what those cost.
    pub(crate) fn is_same_load(&self, other: &Self) -> bool {
        let load = |workload: &Self| {
            let Self { concurrency, rate_per_s, prompt_tokens, output_tokens, prefix_tokens, intruder_tokens, .. } =
                workload;
            (*concurrency, *rate_per_s, *prompt_tokens, *output_tokens, *prefix_tokens, *intruder_tokens)
        };
        load(self) == load(other)
    }

    /// For people: how many at a time, and how long.
    pub(crate) fn summary(&self) -> String {
        let load = match self.rate_per_s {
            Some(rate) => format!("{rate} requests/s (Poisson)"),
            None => format!("{} at a time", self.concurrency),
        };
        let prefix = if self.prefix_tokens == 0 { String::new() } else { format!(" ({} shared)", self.prefix_tokens) };
        let intruder =
            if self.intruder_tokens == 0 { String::new() } else { format!(", one prompt of {}", self.intruder_tokens) };
        let (prompt, output) = (self.prompt_tokens, self.output_tokens);
        format!("{load}, prompts {prompt}{prefix}, outputs {output}{intruder}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_workload_that_can_run() {
        for name in NAMES {
            let workload = Workload::parse(name, &Overrides::default()).unwrap();
            assert_eq!((workload.label.as_str(), workload.name.as_str()), (name, name));
            assert!(workload.requests >= REQUESTS_MIN, "{name}");
        }
    }

    #[test]
    fn keys_win_over_flags_and_flags_over_the_name() {
        let flags = Overrides { concurrency: Some(3), output_tokens: Some(Lengths::of(5)), ..Overrides::default() };
        let workload = Workload::parse("prefill:prompt=64-256:c=2:popularity=zipf:label=x", &flags).unwrap();
        assert_eq!(workload.prompt_tokens, Lengths { min: 64, max: 256 });
        assert_eq!((workload.concurrency, workload.output_tokens), (2, Lengths::of(5)));
        assert_eq!((workload.popularity, workload.label.as_str()), (Popularity::Zipf, "x"));
        assert_eq!(workload.requests, 8);
        assert_eq!(Workload::parse("one", &flags).unwrap().requests, 12);
    }

    #[test]
    fn mistakes_say_what_is_known() {
        for (typed, want) in [
            ("bas", "known: base, one"),
            ("base:x=1", "unknown key `x`"),
            ("base:c", "not KEY=VALUE"),
            ("base:c=0", "1 to"),
            ("base:c=-1", "whole number"),
            ("base:rate=0", "0.001 to"),
            ("base:rate=nan", "0.001 to"),
            ("base:prompt=9-3", "64-256"),
            ("base:prompt=0", "64-256"),
            ("base:prefix=128", "leaves no token"),
            ("base:popularity=x", "known are base"),
            ("long-prefill-intruder:output=2", "8 tokens"),
        ] {
            let error = Workload::parse(typed, &Overrides::default()).unwrap_err();
            assert!(error.contains(want), "{typed}: {error}");
        }
    }

    #[test]
    fn only_loads_that_are_alike_are_compared() {
        let parse = |typed: &str| Workload::parse(typed, &Overrides::default()).unwrap();
        assert!(parse("base").is_same_load(&parse("distinct:requests=3")));
        assert!(!parse("base").is_same_load(&parse("base:c=1")));
        assert!(!parse("base").is_same_load(&parse("prefill")));
        assert!(parse("prefill").is_same_load(&parse("prefill-one")));
    }
}
