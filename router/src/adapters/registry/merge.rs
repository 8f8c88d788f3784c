//! Several adapters as one: a content made here, known by the contents it was made of.

use std::sync::Arc;

use super::contents::{From, Merge, Usable, Wanted};
use super::*;
use crate::adapters::Tenant;
use crate::engine::{MajoritySign, MergeAsk, MergeStrategy};

/// Adapters of one merge.
const PARTS_MAX: usize = 8;

impl Registry {
    /// Several adapters as one. Each is resolved for this caller first; the merge is kept by their contents.
    ///
    /// # Errors
    /// `invalid_value`; as [`Self::resolve`]; `adapter_unsupported` for what cannot be merged.
    pub async fn merge(
        &self,
        caller: &Caller,
        spec: &MergeSpec,
        ask: &Ask<'_>,
    ) -> Result<ResolvedAdapter, AdapterFailure> {
        check(spec)?;
        let until = self.until(ask.wait);
        let parts = spec.ids.iter().map(|name| async move {
            let part = Ask { name, ..*ask };
            self.resolve(caller, &part).await
        });
        let parts: Vec<ResolvedAdapter> = futures_util::future::try_join_all(parts).await?;
        let identity = identity_of(spec, &parts);
        let mut usables = Vec::with_capacity(parts.len());
        for part in &parts {
            usables.push(self.with_files(part, until).await?);
        }
        let dirs = usables.iter().filter_map(|usable| usable.files.as_ref().map(|files| files.dir.clone())).collect();
        let seed = u64::from_le_bytes(std::array::from_fn(|i| identity.as_bytes().get(i).copied().unwrap_or(0)));
        let name = format!("merge:{}", identity.to_hex().get(..32).unwrap_or_default());
        let merge = MergeAsk {
            dirs,
            weights: parts.iter().zip(&spec.weights).map(|(part, weight)| part.scale * *weight as f32).collect(),
            strategy: spec.strategy,
            density: spec.density.map(|density| density as f32),
            majority_sign: spec.sign,
            seed,
            out_dir: self.inner.merged.join(identity.to_hex().as_str()),
        };
        let wanted = Wanted {
            identity: Arc::from(name.as_str()),
            source: SourceKind::Merge,
            from: From::Merge(Arc::new(Merge { ask: merge, parts: usables })),
            credential: Credential::Server,
            mac: self.inner.authoriser.mac(&Credential::Server),
            tenant: Tenant::from(caller),
            is_explicit: false,
            needs_files: false,
        };
        let usable = self.inner.contents.usable(&wanted, &Arc::default(), until).await?;
        Ok(self.served(&name, &Arc::from(""), &wanted, 1.0, usable))
    }

    /// The same part with its directory, which a part that serves from memory may have lost.
    async fn with_files(
        &self,
        part: &ResolvedAdapter,
        until: super::contents::Until,
    ) -> Result<Usable, AdapterFailure> {
        let wanted = Wanted { needs_files: true, ..Wanted::clone(&part.wanted) };
        let usable = self.inner.contents.usable(&wanted, &Arc::default(), until).await?;
        if usable.files.is_none() || usable.prepared.content != part.prepared.content {
            let message = format!("service unavailable: the files of `{}` changed meanwhile; try again", part.name);
            return Err(failure("adapter_load_failed", message));
        }
        Ok(usable)
    }
}

fn check(spec: &MergeSpec) -> Result<(), AdapterFailure> {
    let invalid = |message: String| Err(failure("invalid_value", message));
    let n = spec.ids.len();
    if !(1..=PARTS_MAX).contains(&n) || spec.weights.len() != n {
        return invalid(format!("`merged_adapters` needs 1..{PARTS_MAX} ids and as many weights"));
    }
    if spec.weights.iter().any(|weight| !weight.is_finite() || weight.abs() > 1e6) {
        return invalid("`weights` must be finite numbers".into());
    }
    let density = spec.density.is_some_and(|density| density > 0.0 && density <= 1.0);
    if spec.strategy != MergeStrategy::Linear && !density {
        return invalid("`density` must be in (0, 1]".into());
    }
    Ok(())
}

/// The same contents, merged the same way, are the same merge.
fn identity_of(spec: &MergeSpec, parts: &[ResolvedAdapter]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let (strategy, sign) = match spec.strategy {
        MergeStrategy::Linear => (0, 0),
        MergeStrategy::Ties => (1, sign_code(spec.sign)),
        MergeStrategy::DareLinear => (2, 0),
        MergeStrategy::DareTies => (3, sign_code(spec.sign)),
    };
    let density = spec.density.filter(|_| spec.strategy != MergeStrategy::Linear).unwrap_or(1.0);
    hasher.update(b"loramux merge 1").update(&[strategy, sign]).update(&density.to_le_bytes());
    for (part, weight) in parts.iter().zip(&spec.weights) {
        hasher.update(&part.prepared.content.0).update(&(f64::from(part.scale) * weight).to_le_bytes());
    }
    hasher.finalize()
}

fn sign_code(sign: MajoritySign) -> u8 {
    match sign {
        MajoritySign::Total => 0,
        MajoritySign::Frequency => 1,
    }
}
