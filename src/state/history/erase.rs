//! Everything of a tenant out of the store, with proof.
//!
//! 1. A *fence* is appended to each of the tenant's chains: a record of a later epoch,
//!    without a tree, held by this server. From then on a save of another server is
//!    fenced, and a claim there finds the key claimed elsewhere.
//! 2. Everything else below the key goes, then the fence, then the name of the
//!    workload (`k/…`). Everything is listed again: only an empty listing ends it.
//!
//! Interrupted at any call it is repeated from the beginning: either the fence is
//! still the newest record, or nothing of the chain is left. A chain whose fence is
//! there has no tree, so that nobody ever takes half an erased state for a state.
//!
//! # Why numbers may begin again
//! Once the chain is gone, the key is as one that never was: absence is proven, and
//! the next claim begins with record 1 and epoch 1. A late write of an old server
//! cannot bring anything back: its claim was over or fenced before the first removal
//! (tenancy erases only what is at rest, and a claim of another server is refused
//! here), and a save commits only on top of a chain that its claim has seen (an `open`
//! comes before every first save under an ownership, and where the chain is gone the save
//! fails). What can still land is an object
//! that was on its way when its server lost the store: no record names it, so nobody
//! ever reads it; a collection or a repeated erasure removes it.
//!
//! A bucket that keeps older versions keeps what was erased; the answer says so.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::{
    model::{Epoch, Key, TenantId, WorkloadId},
    state::snapshot::{
        Holder, Record, RecordKind, key_prefix, list_all, newest_record, record_key, tenant_prefix,
        workload_in, workload_key,
    },
    store::Versioning,
};

use super::{Error, History, Mode, StateError};

/// How often everything is removed before a prefix that does not get empty is reported.
const ROUNDS: u32 = 5;

/// What an erasure removed from the store, and how sure it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erased {
    /// The workloads that the tenant had state of.
    pub workloads: Vec<WorkloadId>,
    /// Objects removed.
    pub objects: u64,
    /// What shows that they are gone.
    pub proof: Proof,
}

/// What shows that an erasure is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// The store lists nothing any more, and keeps no older versions.
    EmptyListing,
    /// The store lists nothing any more, and keeps older versions or does not say
    /// whether it does.
    VersionedBucket,
}

// === impl History ===

impl History {
    /// Removes everything of a tenant: of the workloads given, and of all that the
    /// store knows. The caller keeps claims of the tenant away until it succeeds.
    ///
    /// # Errors
    /// [`Error::ClaimedElsewhere`], before anything is removed; [`Error::State`] and
    /// [`Error::NotEmpty`]: to be repeated.
    pub async fn erase(
        &self,
        tenant: &TenantId,
        workloads: &BTreeSet<WorkloadId>,
        epoch: impl Fn(&Key) -> Epoch + Sync,
        nonce: &str,
    ) -> Result<Erased, Error> {
        let keys = self.keys_of(tenant, workloads).await?;
        let mut erased = Erased { workloads: Vec::new(), objects: 0, proof: Proof::EmptyListing };
        let mut fences = Vec::new();
        for key in &keys {
            fences.push(self.fence(key, epoch(key), nonce).await?);
        }
        for (key, fence) in keys.iter().zip(fences) {
            let removed = self.remove_all(key, fence.as_deref()).await?;
            if removed > 0 {
                erased.workloads.push(key.workload.clone());
            }
            erased.objects += removed;
            self.delete(key, &workload_key(key)).await?;
        }
        let prefix = tenant_prefix(tenant);
        let left = list_all(&*self.store, &prefix).await.map_err(Error::Store)?;
        if !left.is_empty() {
            return Err(Error::NotEmpty { prefix, rounds: 1 });
        }
        let versioning = self.store.versioning().await.map_err(Error::Store)?;
        if versioning != Versioning::Off {
            erased.proof = Proof::VersionedBucket;
        }
        Ok(erased)
    }

    /// Checks that an erasure would not be refused, so that none is begun in vain. Alone on
    /// its store, a server has nobody to ask.
    ///
    /// # Errors
    /// [`Error::ClaimedElsewhere`], and the store's.
    pub async fn check_erasable(
        &self,
        tenant: &TenantId,
        workloads: &BTreeSet<WorkloadId>,
    ) -> Result<(), Error> {
        if self.mode == Mode::Exclusive {
            return Ok(());
        }
        for key in self.keys_of(tenant, workloads).await? {
            if let Some(newest) = newest_record(&*self.store, &key, &key.digest()).await? {
                self.must_be_ours(&key, &newest).await?;
            }
        }
        Ok(())
    }

    /// Returns the keys of a tenant: of the workloads given, and of all that the store knows.
    async fn keys_of(
        &self,
        tenant: &TenantId,
        workloads: &BTreeSet<WorkloadId>,
    ) -> Result<BTreeSet<Key>, Error> {
        let known = self.workloads_of(tenant).await?;
        let all = workloads.iter().cloned().chain(known);
        Ok(all.map(|workload| Key::new(tenant.clone(), workload)).collect())
    }

    /// Returns the workloads that the store knows a tenant may have state of.
    ///
    /// # Errors
    /// [`Error::State`]
    pub async fn workloads_of(&self, tenant: &TenantId) -> Result<Vec<WorkloadId>, Error> {
        let listed = list_all(&*self.store, &tenant_prefix(tenant)).await.map_err(Error::Store)?;
        // What names no workload is not ours; an erasure says that something is left.
        Ok(listed.iter().filter_map(|listed| workload_in(tenant, &listed.key)).collect())
    }

    /// Makes sure that the newest record of a chain is a fence of this server; answers
    /// its name, or `None` when there is no chain.
    async fn fence(&self, key: &Key, epoch: Epoch, nonce: &str) -> Result<Option<String>, Error> {
        let key_digest = key.digest();
        let Some(newest) = newest_record(&*self.store, key, &key_digest).await? else { return Ok(None) };
        self.must_be_ours(key, &newest).await?;
        let epoch = epoch.max(newest.epoch).next();
        let fence = if is_fence(&newest, nonce) {
            newest
        } else {
            let fence = self.append(key, Some(newest.clone()), |now| {
                now.map_or(Ok(()), |now| self.must_stay_ours(key, now, &newest))?;
                let record = self.record(key, now, epoch, nonce, None);
                let holder = Holder { server: self.server.clone(), epoch };
                Ok(Record { kind: RecordKind::Open, holder: Some(holder), ..record })
            });
            fence.await?
        };
        Ok(Some(record_key(&key_digest, fence.number)))
    }

    /// Removes everything below a key, its fence last, until the listing is empty.
    async fn remove_all(&self, key: &Key, fence: Option<&str>) -> Result<u64, Error> {
        let prefix = key_prefix(&key.digest());
        let mut removed = 0;
        for _ in 0..ROUNDS {
            let listed = list_all(&*self.store, &prefix).await.map_err(|source| failed(key, source))?;
            if listed.is_empty() {
                return Ok(removed);
            }
            for name in listed.iter().map(|listed| listed.key.as_str()) {
                if Some(name) != fence {
                    self.delete(key, name).await?;
                    removed += 1;
                }
            }
            if let Some(fence) = fence
                && listed.iter().any(|listed| listed.key == fence)
            {
                self.delete(key, fence).await?;
                removed += 1;
            }
        }
        Err(Error::NotEmpty { prefix, rounds: ROUNDS })
    }

    async fn delete(&self, key: &Key, name: &str) -> Result<(), Error> {
        Ok(self.store.delete(name).await.map_err(|source| failed(key, source))?)
    }
}

/// A fence of an earlier attempt does as well: it has no tree and is held by us.
fn is_fence(newest: &Record, nonce: &str) -> bool {
    newest.nonce == nonce && newest.tree.is_none() && newest.holder.is_some()
}

fn failed(key: &Key, source: crate::store::Error) -> StateError {
    StateError::Store { key: key.clone(), source }
}
