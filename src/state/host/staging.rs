//! Directories for work under way, removed unless they are moved to their place.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    clock::random_hex,
    disk::{self, Dir},
};

use super::{Error, Inner};

/// The names in staging that somebody is using.
#[derive(Debug, Default)]
pub(super) struct LiveStaging(Mutex<HashSet<String>>);

/// One directory in staging. Dropping removes it, if it is still there.
pub(super) struct Staging {
    inner: Arc<Inner>,
    name: String,
}

// === impl LiveStaging ===

impl LiveStaging {
    /// Returns whether somebody uses this name.
    pub(super) fn contains(&self, name: &[u8]) -> bool {
        let names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::str::from_utf8(name).is_ok_and(|name| names.contains(name))
    }

    fn insert(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    fn remove(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

// === impl Staging ===

impl Staging {
    /// Reserves a name, and makes nothing yet. `what` is `restore`, `checkpoint`, …
    pub(super) fn reserve(inner: &Arc<Inner>, what: &str) -> Self {
        let name = format!("{what}-{}", random_hex(inner.clock.as_ref(), 8));
        inner.live_staging.insert(&name);
        Self { inner: Arc::clone(inner), name }
    }

    /// Reserves a name and makes a directory of it.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn make(inner: &Arc<Inner>, what: &str) -> Result<Self, Error> {
        let staging = Self::reserve(inner, what);
        inner.layout.staging.make_dir(staging.name.as_bytes())?;
        Ok(staging)
    }

    /// Returns the name in the staging directory.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Opens it.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn dir(&self) -> Result<Dir, Error> {
        Ok(self.inner.layout.staging.open_dir(self.name.as_bytes())?)
    }

    /// Removes it now.
    ///
    /// # Errors
    /// [`Error::Disk`]; what is left is removed at the next start.
    pub(super) fn remove(&self) -> Result<(), Error> {
        Ok(disk::remove(&self.inner.layout.staging, self.name.as_bytes())?)
    }
}

impl Drop for Staging {
    /// A dropped claim must not leave gigabytes behind until the next start, and
    /// a destructor on an async worker must not remove them itself: hence a
    /// blocking thread, untracked, whose work the next start would repeat.
    fn drop(&mut self) {
        let (inner, name) = (Arc::clone(&self.inner), std::mem::take(&mut self.name));
        if inner.layout.staging.stat_of(name.as_bytes()).is_err_and(|error| error.is_missing()) {
            inner.live_staging.remove(&name);
            return;
        }
        let remove = move || {
            if let Err(error) = disk::remove(&inner.layout.staging, name.as_bytes()) {
                tracing::warn!(%error, cause = %error.source, "left-over staging is removed at the next start");
            }
            inner.live_staging.remove(&name);
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}
