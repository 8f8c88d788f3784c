//! Aliases: set, removed and rolled back in one step each.

use std::sync::Arc;

use super::names::{Key, Made, NAMES_MAX};
use super::*;
use crate::adapters::alias::{Alias, Versions};

impl Registry {
    /// One alias.
    pub fn alias(&self, namespace: &str, name: &str) -> Option<AliasView> {
        self.names().alias(namespace, name).map(|alias| view(namespace, name, alias))
    }

    /// All aliases, by (namespace, name).
    pub fn aliases(&self) -> Vec<AliasView> {
        self.names().aliases().map(|(space, name, alias)| view(space, name, alias)).collect()
    }

    /// Makes or changes an alias in one step.
    ///
    /// # Errors
    /// `invalid_value`, `name_is_base_model`, `adapter_exists` (it would hide an adapter), `precondition_failed`; `disk_full` and its kin if it could not be written
    /// (it is in force until a restart).
    pub async fn set_alias(&self, ask: AliasAsk) -> Result<AliasView, AdapterFailure> {
        self.check_name(&ask.name)?;
        let set = Versions { versions: ask.versions, sticky_by: ask.sticky_by };
        set.check().map_err(|message| failure("invalid_value", message))?;
        let key: Key = (Arc::from(ask.namespace.as_str()), Arc::from(ask.name.as_str()));
        let view = {
            let mut names = self.names();
            let known = |name: &str| names.meant(&key.0, name).is_some() || self.may_be_folder(&names, name);
            if let Some(missing) = set.versions.iter().find(|version| !known(&version.adapter)) {
                let message = format!("`versions` names `{}`, which is not registered; load it first", missing.adapter);
                return Err(failure("invalid_value", message));
            }
            if names.aliases().count() >= NAMES_MAX {
                return Err(failure("invalid_value", format!("this server keeps {NAMES_MAX} aliases at most")));
            }
            let before = names.alias(&key.0, &key.1).cloned();
            check_version(&ask.name, before.as_ref(), ask.expected_version)?;
            let hidden = names.get(&key.0, &key.1).filter(|entry| before.is_none() && entry.made != Made::Folder);
            if let Some(hidden) = hidden {
                let message = format!(
                    "the name is taken by the adapter {}, which the alias would hide; unload it, or load it under another name \
                     and let the alias stand for that",
                    hidden.reference
                );
                return Err(failure("adapter_exists", message));
            }
            let version = before.as_ref().map_or(0, |before| before.version) + 1;
            let alias = Alias { version, set, previous: before.map(|before| before.set) };
            let view = view(&key.0, &key.1, &alias);
            names.put_alias(&key, Some(alias));
            view
        };
        self.write_alias(&key).await?;
        Ok(view)
    }

    /// Takes an alias away.
    ///
    /// # Errors
    /// `model_not_found`, `precondition_failed`.
    pub async fn delete_alias(
        &self,
        namespace: &str,
        name: &str,
        expected_version: Option<u64>,
    ) -> Result<AliasView, AdapterFailure> {
        let key: Key = (Arc::from(namespace), Arc::from(name));
        let removed = {
            let mut names = self.names();
            check_version(name, names.alias(namespace, name), expected_version)?;
            names.put_alias(&key, None).ok_or_else(|| not_found(name))?
        };
        self.write_alias(&key).await?;
        Ok(view(namespace, name, &removed))
    }

    /// The versions before the last change come back, under a new version number; doing it twice changes nothing.
    ///
    /// # Errors
    /// `model_not_found`, `precondition_failed` (there is no version before).
    pub async fn rollback_alias(&self, namespace: &str, name: &str) -> Result<AliasView, AdapterFailure> {
        let key: Key = (Arc::from(namespace), Arc::from(name));
        let view = {
            let mut names = self.names();
            let now = names.alias(namespace, name).ok_or_else(|| not_found(name))?.clone();
            let none = || failure("precondition_failed", format!("alias `{name}` has no version before this one"));
            let set = now.previous.ok_or_else(none)?;
            let alias = Alias { version: now.version + 1, set, previous: Some(now.set) };
            let view = view(namespace, name, &alias);
            names.put_alias(&key, Some(alias));
            view
        };
        self.write_alias(&key).await?;
        Ok(view)
    }
}

fn check_version(name: &str, now: Option<&Alias>, expected: Option<u64>) -> Result<(), AdapterFailure> {
    let now = now.map_or(0, |alias| alias.version);
    match expected {
        Some(expected) if expected != now => {
            let message = format!("alias `{name}` has version {now} now, not {expected}; read it again");
            Err(failure("precondition_failed", message))
        }
        _ => Ok(()),
    }
}

fn view(namespace: &str, name: &str, alias: &Alias) -> AliasView {
    AliasView {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        version: alias.version,
        versions: alias.set.versions.clone(),
        sticky_by: alias.set.sticky_by,
    }
}
