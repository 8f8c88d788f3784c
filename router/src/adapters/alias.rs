//! Names that stand for other names: weighted versions for canaries, sticky by key or user, changed in one step.

use serde::{Deserialize, Serialize};

use super::life::unit;
use super::registry::{StickyBy, Weighted};

/// Versions of one alias.
pub(super) const VERSIONS_MAX: usize = 16;

/// One alias as it is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Alias {
    /// Counts up with every change.
    pub(super) version: u64,
    pub(super) set: Versions,
    /// What it was before the last change.
    pub(super) previous: Option<Versions>,
}

/// What an alias stands for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Versions {
    pub(super) versions: Vec<Weighted>,
    pub(super) sticky_by: StickyBy,
}

impl Versions {
    /// Checks numbers; names are checked by who knows them.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(super) fn check(&self) -> Result<(), String> {
        if !(1..=VERSIONS_MAX).contains(&self.versions.len()) {
            return Err(format!("`versions` must be 1..{VERSIONS_MAX} entries; got {}", self.versions.len()));
        }
        if let Some(bad) = self.versions.iter().find(|v| !(v.weight.is_finite() && v.weight > 0.0)) {
            return Err(format!("`weight` must be a finite number above 0; got {}", bad.weight));
        }
        let twice =
            |(i, one): (usize, &Weighted)| self.versions.iter().take(i).any(|other| other.adapter == one.adapter);
        match self.versions.iter().enumerate().find(|one| twice(*one)) {
            Some((_, one)) => Err(format!("`versions` names `{}` twice", one.adapter)),
            None => Ok(()),
        }
    }

    /// The version for one request: of all requests each gets its share of the weights; requests with the same `sticky`
    /// get the same one while the versions stay. `draw` is 0..1, for requests that are not sticky.
    pub(super) fn pick(&self, alias: &str, sticky: Option<&str>, draw: f64) -> Option<&Weighted> {
        let point = match sticky {
            Some(value) => {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&(alias.len() as u64).to_le_bytes()).update(alias.as_bytes()).update(value.as_bytes());
                let hash = hasher.finalize();
                unit(hash.as_bytes().iter().take(8).fold(0, |bits, byte| bits << 8 | u64::from(*byte)))
            }
            None => draw,
        };
        let total: f64 = self.versions.iter().map(|version| version.weight).sum();
        let mut left = point * total;
        for version in &self.versions {
            if left < version.weight {
                return Some(version);
            }
            left -= version.weight;
        }
        self.versions.last() // rounding
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(weights: &[f64], sticky_by: StickyBy) -> Versions {
        let version = |(i, weight): (usize, &f64)| Weighted { adapter: format!("v{i}"), weight: *weight };
        Versions { versions: weights.iter().enumerate().map(version).collect(), sticky_by }
    }

    #[test]
    fn weights_are_respected_for_sticky_users_and_for_draws() {
        let weights = [0.5, 9.0, 90.5];
        let versions = versions(&weights, StickyBy::User);
        let n = 40_000;
        for sticky in [true, false] {
            let mut counts = [0_u32; 3];
            for i in 0..n {
                let user = format!("user-{i}");
                let sticky = sticky.then_some(user.as_str());
                let picked = versions.pick("sql", sticky, f64::from(i) / f64::from(n)).unwrap();
                counts[picked.adapter[1..].parse::<usize>().unwrap()] += 1;
            }
            for (count, weight) in counts.iter().zip(weights) {
                let expected = weight / 100.0 * f64::from(n);
                // Five standard deviations of a binomial count.
                let room = 5.0 * (expected * (1.0 - weight / 100.0)).sqrt();
                assert!((f64::from(*count) - expected).abs() <= room, "{counts:?}");
            }
        }
    }

    #[test]
    fn a_user_stays_with_a_version_and_two_aliases_draw_apart() {
        let versions = versions(&[1.0, 1.0], StickyBy::User);
        let pick = |alias: &str, user: &str| versions.pick(alias, Some(user), 0.0).unwrap().adapter.clone();
        let mut differ = 0;
        for i in 0..1000 {
            let user = format!("u{i}");
            assert_eq!(pick("a", &user), pick("a", &user));
            differ += u32::from(pick("a", &user) != pick("b", &user));
        }
        assert!((400..600).contains(&differ), "{differ}");
    }

    #[test]
    fn versions_that_cannot_be_meant_are_refused() {
        for good in [&[1.0][..], &[1e-300, 1e300], &[1.0; VERSIONS_MAX]] {
            assert_eq!(versions(good, StickyBy::None).check(), Ok(()));
        }
        for bad in [&[][..], &[0.0], &[-1.0], &[f64::NAN], &[f64::INFINITY], &[1.0; VERSIONS_MAX + 1]] {
            assert!(versions(bad, StickyBy::None).check().is_err(), "{bad:?}");
        }
        let mut twice = versions(&[1.0, 1.0], StickyBy::None);
        twice.versions[1].adapter = "v0".into();
        assert!(twice.check().unwrap_err().contains("twice"));
    }
}
