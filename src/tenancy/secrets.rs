//! Secrets of tenants: stored ones sealed in the journal, and the files of a claim.

use std::collections::BTreeMap;

use super::{Error, Inner, registry::Live};
use crate::{
    journal::{Durability, Op},
    model::{Key, Secret, TenantId},
};

/// What a secret's name must match, for people.
const NAME_PATTERN: &str = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,126}$";
/// The largest secret, in bytes.
const MAX_SECRET_BYTES: usize = 64 << 10;

/// Checks the name of a secret, which becomes a file name.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let bytes = name.as_bytes();
    let first = bytes.first().is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    let rest = bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if first && rest && bytes.len() <= 127 {
        Ok(())
    } else {
        Err(format!("{name:?} is not a name for a secret; allowed: {NAME_PATTERN}"))
    }
}

// === impl Inner ===

impl Inner {
    pub(super) async fn put_secret(
        &self,
        tenant: &TenantId,
        name: &str,
        secret: &Secret,
    ) -> Result<(), Error> {
        check_name(name).map_err(|problem| Error::Invalid { field: "name".to_owned(), problem })?;
        self.not_being_erased(tenant)?;
        if secret.expose().len() > MAX_SECRET_BYTES {
            let problem =
                format!("{} bytes are too many; allowed: up to {MAX_SECRET_BYTES}", secret.expose().len());
            return Err(Error::Invalid { field: "value".to_owned(), problem });
        }
        let master = self.parts.master_key.as_ref().ok_or(Error::NoMasterKey)?;
        let sealed = master.seal(&context(tenant, name), secret, &*self.parts.clock);
        self.commit(vec![Op::PutSecret(tenant.clone(), name.to_owned(), sealed)], Durability::Hard).await?;
        self.with_secrets.insert(tenant.clone());
        Ok(())
    }

    pub(super) fn secret_names(&self, tenant: &TenantId) -> Result<Vec<String>, Error> {
        Ok(self.sealed_secrets(tenant)?.into_iter().map(|(name, _)| name).collect())
    }

    pub(super) async fn delete_secret(&self, tenant: &TenantId, name: &str) -> Result<(), Error> {
        if !self.sealed_secrets(tenant)?.iter().any(|(stored, _)| stored == name) {
            return Err(Error::UnknownSecret { name: name.to_owned() });
        }
        self.commit(vec![Op::DropSecret(tenant.clone(), name.to_owned())], Durability::Hard).await
    }

    /// Returns one stored secret.
    pub(super) fn stored_secret(&self, tenant: &TenantId, name: &str) -> Result<Option<Secret>, Error> {
        for (stored, sealed) in self.sealed_secrets(tenant)? {
            if stored == name {
                return self.open_secret(tenant, name, &sealed).map(Some);
            }
        }
        Ok(None)
    }

    /// Writes a claim's secrets into its slot: the tenant's stored ones, overlaid by the request's.
    pub(super) async fn put_claim_secrets(
        &self,
        key: &Key,
        live: &Live,
        given: Option<&BTreeMap<String, Secret>>,
    ) -> Result<(), Error> {
        if live.workload.spec.volumes.secrets.is_none() {
            return Ok(());
        }
        let mut files = BTreeMap::new();
        for (name, sealed) in self.sealed_secrets(&key.tenant)? {
            let secret = self.open_secret(&key.tenant, &name, &sealed)?;
            files.insert(name, secret);
        }
        files.extend(given.cloned().unwrap_or_default());
        if files.is_empty() {
            return Ok(());
        }
        let put = self.parts.files.put_secrets(&live.slot, live.made.run_as, &files).await;
        put.map_err(|error| self.state_error(key, &error))
    }

    fn sealed_secrets(&self, tenant: &TenantId) -> Result<Vec<(String, Vec<u8>)>, Error> {
        if !self.with_secrets.contains(tenant) {
            return Ok(Vec::new());
        }
        self.parts.journal.secrets(tenant).map_err(|error| self.journal_failed(&error))
    }

    fn open_secret(&self, tenant: &TenantId, name: &str, sealed: &[u8]) -> Result<Secret, Error> {
        let master = self.parts.master_key.as_ref().ok_or(Error::NoMasterKey)?;
        master.open(&context(tenant, name), sealed).map_err(|error| {
            self.internal(&error, "a stored secret cannot be opened; is the master key another one?")
        })
    }
}

fn context(tenant: &TenantId, name: &str) -> Vec<u8> {
    format!("secret\0{tenant}\0{name}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_become_files_so_they_are_checked() {
        for good in ["token", "_x", "a.b-c", "API_KEY", &"x".repeat(127)] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "ü", "a\0", &"x".repeat(128)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
