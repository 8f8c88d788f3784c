//! References that nobody registered: resolved for each caller with the caller's own credential (rules R5 and R6).
//!
//! Nothing here looks at whether somebody else has the same bytes: first the source says yes to this caller, then the
//! content is loaded or found.

use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};

use super::contents::Until;
use super::resolve::revision_of;
use super::*;
use crate::adapters::authorise::UNANSWERED;
use crate::adapters::{Tenant, is_valid_name};

/// Where a name may lie, and in whose name to look there.
pub(super) struct Place {
    pub(super) reference: AdapterRef,
    credential: Credential,
}

impl Registry {
    pub(super) async fn dynamic(
        &self,
        caller: &Caller,
        ask: &Ask<'_>,
        until: Until,
    ) -> Result<ResolvedAdapter, AdapterFailure> {
        let mut places = self.places(ask.name, ask.source, ask.token);
        if !self.counts_by_name(ask.source) {
            places.retain(|place| caller.may_use_adapter(&place.reference.to_string()));
        }
        if let Some(place) = places.iter().find(|place| !caller.may_use_source(place.reference.source)) {
            let source = place.reference.source.name();
            return Err(failure("source_forbidden", format!("this key may not name adapters of source `{source}`")));
        }
        let at = if let Until::At(at) = until { Some(at) } else { None };
        for Place { reference, credential } in places {
            let resolved = match self.inner.authoriser.ask(&reference, &credential, at).await {
                Ok(resolved) => resolved,
                Err(SourceError::Absent) => continue,
                Err(SourceError::Permanent { code, message, .. }) => return Err(failure(code, message)),
                Err(SourceError::Retryable { message, retry_after, .. }) => {
                    // Whoever does not wait is told to come back, whatever the source will say.
                    let goes_on = ask.wait == Wait::Fail && message == UNANSWERED;
                    let code = if goes_on { "adapter_loading" } else { "adapter_auth_unavailable" };
                    if !goes_on {
                        self.inner.contents.count_failure(reference.source, code);
                    }
                    return Err(AdapterFailure {
                        retry_after: Some(retry_after.unwrap_or(Duration::from_secs(1))),
                        state: goes_on.then_some(AdapterState::Resolving.name()),
                        ..failure(code, message)
                    });
                }
            };
            let wanted = self.wanted_of(resolved, &credential, Tenant::from(caller));
            let usable = self.inner.contents.usable(&wanted, &Arc::default(), until).await.map_err(|failed| {
                // Also when it went between two answers of its source.
                if failed.code == "model_not_found" { not_found(ask.name) } else { failed }
            })?;
            return Ok(self.served(ask.name, &revision_of(&wanted), &wanted, 1.0, usable));
        }
        Err(not_found(ask.name))
    }

    /// A list that has `acme/*` means the default source: the same text is somebody else's place at another one.
    fn counts_by_name(&self, source: Option<SourceKind>) -> bool {
        source.is_none_or(|source| source == self.inner.settings.default_source)
    }

    /// Where `name` may lie, in the order of looking. Follows from the text and the settings alone.
    pub(super) fn places(&self, name: &str, source: Option<SourceKind>, token: Option<&SecretString>) -> Vec<Place> {
        let Some(supply) = &self.inner.supply else { return Vec::new() };
        let settings = &self.inner.settings;
        let mut references = Vec::new();
        if is_valid_name(name.split_once('@').map_or(name, |(id, _)| id)) {
            let below = |prefix: &String| AdapterRef::parse(&format!("{prefix}{name}")).ok();
            references.extend(self.inner.prefixes.iter().filter_map(below));
        }
        let asked = match source {
            Some(source) => AdapterRef::with_source(name, source, &settings.source_defaults),
            None => match AdapterRef::parse(name) {
                Ok(reference) if reference.source != SourceKind::Hub || name.contains("://") => Ok(reference),
                // A bare `org/repo`.
                Ok(reference) if settings.default_source == SourceKind::Hub => Ok(reference),
                _ => AdapterRef::with_source(name, settings.default_source, &settings.source_defaults),
            },
        };
        references.extend(
            asked.ok().filter(|reference| {
                source.is_some() || reference.source != SourceKind::Hub || names_a_repository(name)
            }),
        );
        let by_name = self.counts_by_name(source);
        let is_open = |reference: &AdapterRef| {
            source.is_none_or(|source| source == reference.source)
                && supply.kinds.contains(&reference.source)
                && settings
                    .allowed
                    .as_ref()
                    .is_none_or(|globs| (by_name && globs.is_match(name)) || globs.is_match(reference.to_string()))
        };
        references.retain(is_open);
        references.dedup();
        let place = |reference: AdapterRef| Place { credential: self.credential_for(&reference, token), reference };
        references.into_iter().map(place).collect()
    }

    /// What lies below a prefix of the operator is for every key of this server, whatever token comes along. Elsewhere the
    /// caller's own token whenever there is one: the server's never answers where that was refused. Directories know no
    /// tokens; what the operator named by `--adapter` is the server's alone, and not found by its path.
    fn credential_for(&self, reference: &AdapterRef, token: Option<&SecretString>) -> Credential {
        let printed = format!("{reference}/");
        let is_operators = self.inner.prefixes.iter().any(|prefix| is_below(&printed, prefix));
        let is_shared = self.inner.settings.share_hub_token && reference.source == SourceKind::Hub;
        // Clients send their hub token with every request; it is nobody else's business.
        let is_for = |token: &SecretString| match reference.source {
            SourceKind::Hub => true,
            SourceKind::Local => false,
            _ => !token.expose_secret().starts_with("hf_"),
        };
        match token {
            _ if is_operators => Credential::Server,
            Some(token) if is_for(token) => Credential::Token(token.clone()),
            _ if is_shared && token.is_none() => Credential::Server,
            _ => Credential::Anonymous,
        }
    }
}

/// `printed`, with a `/` at its end, lies below `prefix`, which has one too.
fn is_below(printed: &str, prefix: &str) -> bool {
    printed.starts_with(prefix) && printed.len() > prefix.len()
}

/// `org/repo`, `org/repo@revision` or a reference with its scheme: a bare word is no repository of the default source.
fn names_a_repository(name: &str) -> bool {
    name.contains('/')
}
