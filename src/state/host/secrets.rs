//! Secrets as files: 0400 of the program's user, replaced at once, never half.

use std::{collections::BTreeMap, io::Write};

use crate::{
    clock::random_hex,
    disk::{self, Dir, Optional},
    model::{Owner, Secret, SlotId},
};

use super::{Error, Inner};

/// What names of secrets match.
const NAME_PATTERN: &str = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,126}$";

/// Returns whether `name` matches [`NAME_PATTERN`]: never a path, never hidden.
pub(in crate::state) fn is_secret_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= 127
        && bytes.first().is_some_and(|first| first.is_ascii_alphanumeric() || *first == b'_')
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

// === impl Inner ===

impl Inner {
    /// Writes secrets into a slot. Nothing is written when any name is wrong.
    ///
    /// # Errors
    /// [`Error::File`] names the secret that has a wrong name, or for which the
    /// slot has no place; [`Error::Disk`].
    pub(super) fn put_secrets(
        &self,
        slot: &SlotId,
        run_as: Owner,
        files: &BTreeMap<String, Secret>,
    ) -> Result<(), Error> {
        let Some(first) = files.keys().next() else { return Ok(()) };
        if let Some(name) = files.keys().find(|name| !is_secret_name(name)) {
            let reason = format!("a secret's name matches {NAME_PATTERN}");
            return Err(Error::File { path: name.chars().take(200).collect(), reason });
        }
        let Some(secrets) = self.layout.secrets.open_dir(slot.as_str().as_bytes()).optional()? else {
            let reason = "the workload has no secrets volume".to_owned();
            return Err(Error::File { path: first.clone(), reason });
        };
        for (name, secret) in files {
            self.put_secret(&secrets, run_as, name, secret)?;
        }
        secrets.set_owner(run_as.uid, run_as.gid)?;
        Ok(secrets.set_mode(0o500)?)
    }

    /// Writes one file aside, on the same file system, and renames it into place.
    fn put_secret(&self, secrets: &Dir, run_as: Owner, name: &str, secret: &Secret) -> Result<(), Error> {
        let staging = &self.layout.secrets_staging;
        let staged = random_hex(self.clock.as_ref(), 16).into_bytes();
        let put = || -> Result<(), Error> {
            let failed =
                |operation| move |error| disk::Error::new(operation, secrets.label(name.as_bytes()), error);
            let mut file = staging.create_file(&staged)?;
            file.write_all(secret.expose()).map_err(failed("write"))?;
            let now = disk::Stat::of_file(&file).map_err(failed("stat"))?.modified;
            disk::set_file_metadata(&file, (run_as.uid, run_as.gid), 0o400, now)
                .map_err(failed("set metadata of"))?;
            Ok(staging.replace(&staged, secrets, name.as_bytes())?)
        };
        let result = put();
        if result.is_err() {
            staging.remove_file(&staged).optional()?;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_names_are_no_paths() {
        for good in ["a", "_x", "API_KEY", "tls.crt", &"x".repeat(127)] {
            assert!(is_secret_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "ä", "a\n", &"x".repeat(128)] {
            assert!(!is_secret_name(bad), "{bad:?}");
        }
    }
}
