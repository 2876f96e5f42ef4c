//! A new tenant from another's snapshot.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::{
    model::{Epoch, spec::Layout},
    state::{
        mirror,
        snapshot::{
            Digest, Manifest, ManifestObject, ObjectName, RecordTree, damaged, newest_record, object_key,
            workload_key,
        },
    },
};

use super::{Committed, Error, Fork, History, StateError, committed};

/// Copies under way together.
const COPIES: usize = 8;
/// The new tenant's first epoch.
const FIRST: Epoch = Epoch(1);

// === impl History ===

impl History {
    /// Copies a snapshot to a key that has no state: the objects by the store itself,
    /// a manifest that says whose it is now, then record 1. The copies are of the new
    /// key's first epoch, whichever claim of the old one wrote them.
    ///
    /// The source may be collected meanwhile: what was copied is looked at before the
    /// record, and a copy that came too late is an error with nothing committed.
    /// Interrupted, it leaves objects without a record; a repetition overwrites them.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Exists`], [`Error::State`].
    pub async fn fork(&self, fork: &Fork) -> Result<Committed, Error> {
        let (store, to) = (&*self.store, &fork.to);
        let (from_digest, to_digest) = (fork.from.digest(), to.digest());
        if let Some(newest) = newest_record(store, to, &to_digest).await?
            && newest.nonce != fork.nonce
        {
            return Err(Error::Exists { key: to.clone() });
        }
        let newest = newest_record(store, &fork.from, &from_digest).await?;
        let newest = newest.and_then(|newest| newest.tree).map(|tree| tree.snapshot);
        let number = fork.snapshot.or(newest).unwrap_or(0);
        let (tree, manifest) = self.tree_of(&fork.from, number).await?;
        let failed = |source| StateError::Store { key: to.clone(), source };
        let noted = store.put(&workload_key(to), Bytes::new()).await;
        noted.map_err(failed)?;
        let objects: Vec<ManifestObject> = stream::iter(manifest.objects.clone())
            .map(|object| self.fork_object(fork, object))
            .buffered(COPIES)
            .try_collect()
            .await?;
        if manifest.layout == Layout::Mirror {
            self.fork_plain(fork, &manifest).await?;
            // No save has begun to overwrite what was copied.
            self.tree_of(&fork.from, number).await?;
            self.must_be_whole(&fork.from, &manifest).await?;
        }
        let manifest = Manifest {
            tenant: to.tenant.clone(),
            workload: to.workload.clone(),
            epoch: FIRST,
            objects,
            ..manifest
        };
        let codec = self.encryption.codec(to);
        let stored = codec.encode_manifest(&manifest).map_err(|problem| damaged(to, problem))?;
        store.put(&object_key(&to_digest, &stored.name), stored.body).await.map_err(failed)?;
        self.must_be_whole(to, &manifest).await?;
        let tree = RecordTree { manifest: stored.name, failed_claim: false, restored_from: None, ..tree };
        let record = self.append(to, None, |newest| match newest {
            // Somebody else's record 1: the new tenant was claimed meanwhile.
            Some(newest) if newest.nonce != fork.nonce => Err(Error::Exists { key: to.clone() }),
            _ => Ok(self.record(to, None, FIRST, &fork.nonce, Some(tree.clone()))),
        });
        let record = record.await?;
        committed(to, &record, number)
    }

    /// Copies the plain objects of a mirror, under the same names.
    async fn fork_plain(&self, fork: &Fork, manifest: &Manifest) -> Result<(), Error> {
        if self.encryption.codec(&fork.to).seals() {
            let reason = "its snapshot is a mirror, whose plain objects cannot be sealed, and \
                          BOILERHOUSE_STATE_ENCRYPTION is on";
            return Err(StateError::Limit { key: fork.from.clone(), reason: reason.to_owned() }.into());
        }
        self.must_be_whole(&fork.from, manifest).await?;
        let (from_digest, to_digest) = (fork.from.digest(), fork.to.digest());
        let names: Vec<(String, String, u64)> = mirror::files(manifest)
            .map(|(path, bytes)| {
                (mirror::plain_key(&from_digest, path), mirror::plain_key(&to_digest, path), bytes)
            })
            .collect();
        stream::iter(names)
            .map(|(from, to, bytes)| async move {
                let copied = mirror::copy_object(&self.store, &from, &to, bytes).await;
                match copied.map_err(|source| StateError::Store { key: fork.to.clone(), source })? {
                    true => Ok(()),
                    false => Err(Error::from(damaged(&fork.from, format!("{from} is not there any more")))),
                }
            })
            .buffer_unordered(COPIES)
            .try_collect()
            .await
    }

    /// Copies one object: by the store where nothing but its place changes, else anew
    /// under the new tenant's key.
    async fn fork_object(&self, fork: &Fork, object: ManifestObject) -> Result<ManifestObject, Error> {
        let (store, to) = (&*self.store, &fork.to);
        let failed = |source| StateError::Store { key: to.clone(), source };
        let source = object_key(&fork.from.digest(), &object.name);
        let missing = || damaged(&fork.from, format!("{source} is not there, and a snapshot needs it"));
        let codec = self.encryption.codec(to);
        if !object.sealed && codec.may_reuse(&object) {
            let object = ManifestObject { name: ObjectName { epoch: FIRST, ..object.name }, ..object };
            let target = object_key(&to.digest(), &object.name);
            return match store.copy(&source, &target).await.map_err(failed)? {
                true => Ok(object),
                false => Err(missing().into()),
            };
        }
        let body = store.get(&source).await.map_err(failed)?.ok_or_else(missing)?;
        let content = self.encryption.codec(&fork.from).decode(&object, body);
        let content = content.map_err(|error| StateError::of_codec(&fork.from, error))?;
        let digest = Digest::of(&content);
        let encoded = codec.encode(object.name.kind, FIRST, content.to_vec(), digest);
        let (object, stored) = encoded.map_err(|error| damaged(to, error.to_string()))?;
        store.put(&object_key(&to.digest(), &stored.name), stored.body).await.map_err(failed)?;
        Ok(object)
    }
}
