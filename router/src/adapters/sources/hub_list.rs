//! What else a repository holds, for the operator who named one that cannot be served.
//!
//! This is what `hf-hub` is used for: one call through our own client, which follows no redirect, for the server alone. Its
//! downloads and its cache are never used, and nothing that it returns becomes a path.

use std::time::Duration;

use hf_hub::HFClient;
use secrecy::ExposeSecret;

use super::hub::Hub;
use crate::adapters::name::is_valid_segment;
use crate::adapters::types::Credential;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Names of plain files at the top of `repo`, sorted; `None` if they cannot be had.
pub(super) async fn names(hub: &Hub, repo: &str, revision: &str) -> Option<Vec<String>> {
    let (owner, name) = repo.split_once('/')?;
    let mut builder = HFClient::builder()
        .endpoint(hub.endpoint().as_str().trim_end_matches('/'))
        .client(hub.client()?)
        .cache_enabled(false)
        .retry_max_attempts(0);
    // Without one, the crate takes HF_TOKEN or a token file: `main` has turned that off for this process.
    if let Some(token) = hub.token(&Credential::Server) {
        builder = builder.token(token.expose_secret());
    }
    let client = builder.build().ok()?;
    let model = client.model(owner, name);
    let asked = model.info().revision(revision).send();
    let info = tokio::time::timeout(TIMEOUT, asked).await.ok()?.ok()?;
    let mut names: Vec<String> = info.siblings?.into_iter().map(|file| file.rfilename).collect();
    names.retain(|name| is_valid_segment(name));
    names.sort_unstable();
    Some(names)
}
