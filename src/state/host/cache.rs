//! The cache as a place: what comes into it ahead of a claim, and what goes for want of room.

use std::sync::{MutexGuard, PoisonError};

use crate::{
    clock::random_hex,
    disk::{self, Limits, Optional},
    model::{Key, SnapshotRef},
};

use super::{Error, HostFiles, Inner, Lane, Prefetched, fill::TREE, restore::Whom};

// === impl HostFiles ===

impl HostFiles {
    /// Restores a snapshot into the cache as it was saved: whose files they are is for
    /// the claim to change. See [`crate::state::SlotFiles::prefetch`].
    pub(super) async fn restore_ahead(&self, key: &Key, snapshot: &SnapshotRef) -> Result<Prefetched, Error> {
        if let Some(cached) = self.inner.layout.cache.open_dir(key.digest().as_bytes()).optional()?
            && super::restore::restored_from(&cached)?.as_deref() == Some(&snapshot.manifest)
        {
            // What a claim that failed has left: the owner that it gave the files is in no note.
            let key = key.clone();
            self.run(Lane::Bulk, move |inner| inner.discard(&key)).await?;
        }
        let (restore, fetched_bytes) = self.restore_aside(key, Whom::AsSaved, snapshot).await?;
        let (owner, manifest) = (restore.run_as(), snapshot.manifest.clone());
        let holder = self.run(Lane::Restore, move |inner| restore.publish(inner, &manifest)).await?;
        self.inner.syncs.restored(&key.digest(), holder, snapshot.manifest.clone());
        Ok(Prefetched { fetched_bytes, owner })
    }
}

// === impl Inner ===

impl Inner {
    /// Takes a tree out of the cache: one rename, whatever its size.
    pub(super) fn evict(&self, key: &Key) -> Result<(), Error> {
        let key_digest = key.digest();
        let name = format!("evict-{}", random_hex(self.clock.as_ref(), 8));
        let moved = self
            .layout
            .cache
            .move_to(key_digest.as_bytes(), &self.layout.staging, name.as_bytes())
            .optional()?;
        if moved.is_some() {
            self.moves.forget(&key_digest);
            self.evicted().push(name);
        }
        Ok(())
    }

    /// Returns whether anything was taken out of the cache that is not removed yet.
    pub(super) fn has_evicted(&self) -> bool {
        !self.evicted().is_empty()
    }

    /// Removes what was taken out of the cache.
    pub(super) fn remove_evicted(&self) -> Result<(), Error> {
        loop {
            // A statement of its own: the lock is not held while it is removed.
            let next = self.evicted().pop();
            let Some(name) = next else { return Ok(()) };
            disk::remove(&self.layout.staging, name.as_bytes())?;
        }
    }

    fn evicted(&self) -> MutexGuard<'_, Vec<String>> {
        self.evicted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what a tree in the cache takes on the disk.
    pub(super) fn cached_bytes(&self, key: &Key) -> Result<Option<u64>, Error> {
        let Some(cached) = self.layout.cache.open_dir(key.digest().as_bytes()).optional()? else {
            return Ok(None);
        };
        let Some(tree) = cached.open_dir(TREE).optional()? else { return Ok(None) };
        disk::usage(&tree, &Limits::TREE).map(Some).map_err(|error| Error::of_list(key, error))
    }
}
