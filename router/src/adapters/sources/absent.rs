//! What may be behind "not found", for the operator who named the reference. Callers of the main port get one answer for all
//! of it (rule R6).

use std::path::{Path, PathBuf};

use super::{PICKLE, Sources};
use crate::adapters::types::{AdapterRef, Credential, FileName, SourceKind};

impl Sources {
    /// See `Source::why_absent`.
    pub(super) async fn absence(&self, reference: &AdapterRef, credential: &Credential) -> String {
        match reference.source {
            SourceKind::Local => {
                let (path, roots) = (PathBuf::from(&reference.locator), self.local.roots().to_vec());
                let is_open = self.local.is_open(&path, credential);
                let looked = tokio::task::spawn_blocking(move || of_directory(&path, is_open, &roots)).await;
                looked.unwrap_or_else(|_| format!("{reference}: not found"))
            }
            SourceKind::Hub => self.of_repository(reference, credential).await,
            SourceKind::S3 | SourceKind::Gcs => {
                let who = match credential {
                    Credential::Anonymous => "it is not public",
                    Credential::Server => "the server's credentials may not read it",
                    Credential::Token(_) => "this token may not read it",
                };
                let place = self.buckets.endpoint(reference.source);
                format!("{reference}: {place} has no {} there, or {who}", FileName::Config.as_str())
            }
            SourceKind::Http => {
                let who = match credential {
                    Credential::Token(_) => "this token may not read it",
                    _ => "it wants a credential (--adapter-http-header)",
                };
                format!("{reference}: the host has no {} there, or {who}", FileName::Config.as_str())
            }
            SourceKind::Merge => format!("{reference}: not found"),
        }
    }

    async fn of_repository(&self, reference: &AdapterRef, credential: &Credential) -> String {
        let config = FileName::Config.as_str();
        if self.hub.is_offline() {
            return format!("{reference}: not in the hub's cache on this machine, and HF_HUB_OFFLINE is set");
        }
        if let Some(revision) = &reference.revision
            && let Ok(Some(_)) = self.hub.head(&reference.locator, "main", config, credential).await
        {
            return format!(
                "hf://{} has no revision `{revision}`, or that revision has no {config}",
                reference.locator
            );
        }
        let has_token = !matches!(credential, Credential::Anonymous) && self.hub.token(credential).is_some();
        if has_token
            && let Ok(Some(_)) = self.hub.head(&reference.locator, "main", config, &Credential::Anonymous).await
        {
            let whose = if matches!(credential, Credential::Server) { "the server's HF_TOKEN" } else { "this token" };
            return format!("{reference} is public, but the hub refuses {whose}: it is wrong or has expired");
        }
        let who = match credential {
            Credential::Anonymous => "it is not public",
            Credential::Server if self.hub.token(credential).is_none() => {
                "it is private and the server has no HF_TOKEN"
            }
            Credential::Server => "the server's HF_TOKEN may not read it",
            Credential::Token(_) => "this token may not read it",
        };
        let place = super::cause::place(self.hub.endpoint());
        format!("{reference}: {place} has no such repository, it has no {config}, or {who}")
    }
}

/// Looks at a directory as the operator does. One that is not open is not looked into.
fn of_directory(path: &Path, is_open: bool, roots: &[PathBuf]) -> String {
    let shown = path.display();
    if !is_open {
        let roots: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
        let roots = if roots.is_empty() { String::new() } else { format!(" ({})", roots.join(", ")) };
        return format!("{shown} is not below an --adapter-root{roots}");
    }
    match path.metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            format!("{shown}: this server may not read it")
        }
        Err(_) => format!("{shown}: no such folder"),
        Ok(found) if !found.is_dir() => format!("{shown} is no folder"),
        Ok(_) if path.join(FileName::Config.as_str()).exists() => {
            format!("{shown}: its {} cannot be read, or is a link out of the root", FileName::Config.as_str())
        }
        Ok(_) if path.join(FileName::Weights.as_str()).exists() || path.join(PICKLE).exists() => {
            format!("{shown} has weights, but no {}", FileName::Config.as_str())
        }
        Ok(_) => format!("{shown} has no {}", FileName::Config.as_str()),
    }
}
