//! The history of a key in the store: what there is of it, back to an old tree, a copy
//! for another tenant, collection, erasure, verification.
//!
//! Everything here is between this server and the store; no slot is needed. Whoever
//! calls holds the guard of the key: a restore, a fork and an erasure are refused
//! while the tenant is claimed, and a collection runs beside nothing but a save.
//!
//! # Guarantees
//! - A rollback and a fork are one create-only record each, after everything that it
//!   needs was seen in the store; until then nothing has happened (P2).
//! - Collection removes nothing that a kept record needs (see `snapshot::retention`).
//! - Of an erasure, each call may be the last one: repeated, it goes on. See [`erase`].

pub mod erase;
mod fork;
mod rollback;
pub mod verify;

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

use crate::{
    clock::SharedClock,
    model::{Epoch, Key, SnapshotRef, spec::Layout},
    store::{self, Creation, SharedStore},
};

pub use super::snapshot::{Collected, Keep};
use super::{
    Encryption, Error as StateError,
    fence::{self, Link, Mode, Standing, owner},
    mirror,
    snapshot::{
        Manifest, ObjectKind, ObjectName, RECORD_VERSION, Record, RecordKind, RecordTree, damaged,
        key_prefix, list_all, newest_record, object_key, record_key, records_prefix, retain,
        verify as read_back,
    },
};
pub use erase::{Erased, Proof};
pub use rollback::{Entry, EntryKind, Page};

/// Decides what the newest record means: whose server wrote it does not matter here, for
/// nothing is written from a tree of this node.
fn standing(newest: Option<&Record>, epoch: Epoch, nonce: &str) -> Standing {
    let link = newest.map(|newest| Link { server: None, ..newest.link() });
    fence::standing(link.as_ref(), "", epoch, nonce)
}

/// How often an append may find its number taken.
const ATTEMPTS: u32 = 8;
/// A write in parts that began before this is nobody's any more.
const STALE_UPLOAD_MS: u64 = 24 * 60 * 60 * 1_000;

/// Works on histories in one store. Clones share it.
#[derive(Clone)]
pub struct History {
    store: SharedStore,
    clock: SharedClock,
    server: String,
    mode: Mode,
    encryption: Encryption,
}

/// What a rollback needs.
#[derive(Debug, Clone)]
pub struct Rollback {
    /// Whose state.
    pub key: Key,
    /// The snapshot whose tree becomes the newest.
    pub snapshot: u64,
    /// The epoch of the rollback, unless the store knows a later one: as a claim's, it
    /// fences everything before it.
    pub epoch: Epoch,
    /// Names this attempt for ever.
    pub nonce: String,
}

/// What a fork needs.
#[derive(Debug, Clone)]
pub struct Fork {
    /// Whose snapshot.
    pub from: Key,
    /// Whose it becomes; has no state.
    pub to: Key,
    /// Which; the newest when left out.
    pub snapshot: Option<u64>,
    /// Names this attempt for ever.
    pub nonce: String,
}

/// What became the newest tree of a key, and under which epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The tree.
    pub snapshot: SnapshotRef,
    /// The epoch of the record; claims go on after it.
    pub epoch: Epoch,
    /// The snapshot that it came from.
    pub from: u64,
}

/// Says why something was not done to a history.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The store or what is in it.
    #[error(transparent)]
    State(StateError),
    /// The store, about nobody in particular.
    #[error("store cannot be asked")]
    Store(#[source] store::Error),
    /// There is no such snapshot (any more).
    #[error("{key} has no snapshot {asked}: {}", range(*.oldest, *.newest))]
    Unknown {
        /// Whose state.
        key: Key,
        /// What was asked for.
        asked: u64,
        /// The oldest there is.
        oldest: Option<u64>,
        /// The newest there is.
        newest: Option<u64>,
    },
    /// It was a mirror, and its plain objects have become another's since.
    #[error(
        "snapshot {asked} of {key} was saved in the layout \"mirror\", of which only the newest can be had; \
         {}", newest_is(*.newest)
    )]
    Mirrored {
        /// Whose state.
        key: Key,
        /// What was asked for.
        asked: u64,
        /// The newest there is.
        newest: Option<u64>,
    },
    /// There is state already.
    #[error("{key} has state already")]
    Exists {
        /// Whose state.
        key: Key,
    },
    /// Another server has the tenant claimed.
    #[error("{key} is claimed on server {server}")]
    ClaimedElsewhere {
        /// Whose state.
        key: Key,
        /// The server's identity.
        server: String,
    },
    /// Something else is in the store's place for this tenant, again and again.
    #[error("{prefix} in the store is not empty after {rounds} rounds of removal")]
    NotEmpty {
        /// Where.
        prefix: String,
        /// How often everything was removed.
        rounds: u32,
    },
}

// === impl History ===

impl History {
    /// Works on `store` as the server of this identity, which is its only one.
    pub fn new(store: SharedStore, clock: SharedClock, server: String) -> Self {
        let encryption = Encryption::off(Arc::clone(&clock));
        Self { store, clock, server, mode: Mode::Exclusive, encryption }
    }

    /// As [`History::new`], for a store that may have several servers: claims of the
    /// others are heeded.
    #[must_use]
    pub fn in_mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// As [`History::new`], with the keys that what the store holds is sealed with.
    #[must_use]
    pub fn with_encryption(self, encryption: Encryption) -> Self {
        Self { encryption, ..self }
    }

    /// Returns where the histories are.
    pub(in crate::state) fn store(&self) -> &SharedStore {
        &self.store
    }

    /// Returns what opens the objects.
    pub(in crate::state) fn encryption(&self) -> &Encryption {
        &self.encryption
    }

    /// Removes what `keep` does not keep and what nothing needs; see
    /// `snapshot::retention`. The caller keeps claims of the key away.
    ///
    /// # Errors
    /// [`Error::State`]; what was removed stays removed, the rest waits.
    pub async fn collect(&self, key: &Key, keep: Keep) -> Result<Collected, Error> {
        let store = &*self.store;
        let Some(newest) = newest_record(store, key, &key.digest()).await? else {
            return Ok(Collected::default());
        };
        let codec = self.encryption.codec(key);
        Ok(retain(store, key, &newest, keep, self.clock.unix_ms(), &codec, true).await?)
    }

    /// Gives up writes in parts that a crash has left, older than a day; answers how many.
    ///
    /// # Errors
    /// The store's.
    pub async fn abort_uploads(&self) -> Result<u64, store::Error> {
        self.store.abort_uploads(self.clock.unix_ms().saturating_sub(STALE_UPLOAD_MS)).await
    }

    /// Creates the record that `make` makes to come after the newest, and reads it back.
    async fn append(
        &self,
        key: &Key,
        mut newest: Option<Record>,
        make: impl Fn(Option<&Record>) -> Result<Record, Error>,
    ) -> Result<Record, Error> {
        let store = &*self.store;
        let key_digest = key.digest();
        let failed = |source| Error::State(StateError::Store { key: key.clone(), source });
        for _ in 0..ATTEMPTS {
            let record = make(newest.as_ref())?;
            match (standing(newest.as_ref(), record.epoch, &record.nonce), newest) {
                (Standing::Committed, Some(committed)) => {
                    read_back(store, key, &key_digest, record.epoch, &committed).await?;
                    return Ok(committed);
                }
                (Standing::Fenced(newest), _) => {
                    return Err(StateError::Fenced { key: key.clone(), own: record.epoch, newest }.into());
                }
                (Standing::Open | Standing::Committed, _) => {}
            }
            let name = record_key(&key_digest, record.number);
            match store.create(&name, Bytes::from(record.encode())).await {
                Ok(Creation::Created) => {
                    read_back(store, key, &key_digest, record.epoch, &record).await?;
                    return Ok(record);
                }
                Ok(Creation::Exists) => {}
                Err(error @ store::Error::Unknown { .. }) => {
                    if store.get(&name).await.map_err(failed)?.is_none() {
                        return Err(failed(error));
                    }
                }
                Err(error) => return Err(failed(error)),
            }
            newest = newest_record(store, key, &key_digest).await?;
        }
        let taken = format!("the next record was taken {ATTEMPTS} times in a row");
        Err(failed(store::Error::unavailable("create", &records_prefix(&key_digest), taken)))
    }

    /// Returns the objects with contents of a key that are in the store, with their sizes.
    async fn contents(&self, key: &Key) -> Result<HashMap<ObjectName, u64>, Error> {
        let prefix = key_prefix(&key.digest());
        let mut found = HashMap::new();
        for kind in [ObjectKind::Pack, ObjectKind::Chunk] {
            let listed = list_all(&*self.store, &format!("{prefix}{}/", kind.letter())).await;
            let listed = listed.map_err(|source| StateError::Store { key: key.clone(), source })?;
            found.extend(listed.into_iter().filter_map(|listed| {
                Some((listed.key.strip_prefix(&prefix).and_then(ObjectName::parse)?, listed.bytes))
            }));
        }
        Ok(found)
    }

    /// Checks that every object that a tree needs is in the store.
    async fn must_be_whole(&self, key: &Key, manifest: &Manifest) -> Result<(), Error> {
        if manifest.layout == Layout::Mirror {
            return Ok(mirror::must_be_whole(&*self.store, key, manifest).await?);
        }
        let there = self.contents(key).await?;
        match manifest.objects.iter().find(|object| !there.contains_key(&object.name)) {
            None => Ok(()),
            Some(object) => {
                let name = object_key(&key.digest(), &object.name);
                Err(damaged(key, format!("{name} is not there, and a kept snapshot needs it")).into())
            }
        }
    }

    /// Makes the record that comes after `newest`.
    fn record(
        &self,
        key: &Key,
        newest: Option<&Record>,
        epoch: Epoch,
        nonce: &str,
        tree: Option<RecordTree>,
    ) -> Record {
        let number = newest.map_or(1, |newest| newest.number + 1);
        let now_ms = self.clock.unix_ms();
        let kind = match &tree {
            Some(tree) if tree.restored_from.is_some() => RecordKind::Restore,
            Some(_) => RecordKind::Snapshot,
            None => RecordKind::Close,
        };
        Record {
            version: RECORD_VERSION,
            number,
            tenant: key.tenant.clone(),
            workload: key.workload.clone(),
            epoch,
            nonce: nonce.to_owned(),
            created_ms: now_ms,
            kind,
            server: Some(self.server.clone()),
            term: None,
            holder: None,
            tree: tree.map(|tree| RecordTree {
                snapshot: number,
                epoch,
                nonce: nonce.to_owned(),
                created_ms: now_ms,
                ..tree
            }),
        }
    }

    /// Refuses while the newest record says that another server has the key claimed. A
    /// claim of a server from which the store has passed on is none: whoever works alone
    /// holds the store, and among several the owner records tell.
    async fn must_be_ours(&self, key: &Key, newest: &Record) -> Result<(), Error> {
        let Some(holder) = newest.holder.as_ref().filter(|holder| holder.server != self.server) else {
            return Ok(());
        };
        let is_void = match self.mode {
            Mode::Exclusive => true,
            Mode::Shared => {
                let records = owner::read(&*self.store).await.map_err(|error| of_owner(key, error))?;
                owner::is_void(&records, &holder.server, newest.term)
            }
        };
        if is_void { Ok(()) } else { Err(elsewhere(key, &holder.server)) }
    }

    /// Refuses when a claim of another server came since `looked_at` was found to be ours.
    fn must_stay_ours(&self, key: &Key, newest: &Record, looked_at: &Record) -> Result<(), Error> {
        match &newest.holder {
            Some(holder) if holder.server != self.server && newest.holder != looked_at.holder => {
                Err(elsewhere(key, &holder.server))
            }
            _ => Ok(()),
        }
    }
}

fn committed(key: &Key, record: &Record, from: u64) -> Result<Committed, Error> {
    let snapshot = record.snapshot(&key.digest());
    let snapshot = snapshot.ok_or_else(|| damaged(key, format!("record {} has no tree", record.number)))?;
    Ok(Committed { snapshot, epoch: record.epoch, from })
}

fn elsewhere(key: &Key, server: &str) -> Error {
    Error::ClaimedElsewhere { key: key.clone(), server: server.to_owned() }
}

fn of_owner(key: &Key, error: owner::Error) -> Error {
    match error {
        owner::Error::Store(source) => Error::Store(source),
        error @ (owner::Error::Damaged(_) | owner::Error::Elsewhere(_)) => {
            damaged(key, error.to_string()).into()
        }
    }
}

// === impl Error ===

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Self::State(error)
    }
}

fn newest_is(newest: Option<u64>) -> String {
    newest.map_or_else(|| "there is none".to_owned(), |newest| format!("the newest is {newest}"))
}

fn range(oldest: Option<u64>, newest: Option<u64>) -> String {
    match (oldest, newest) {
        (Some(oldest), Some(newest)) => format!("there are {oldest} to {newest}"),
        _ => "there is none".to_owned(),
    }
}
