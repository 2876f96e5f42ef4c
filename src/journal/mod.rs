//! The durable record: SQLite in WAL mode, one writer with group commit.
//!
//! The journal is the truth of *intent*; the engine's labels and the disk are
//! observed truth, and `tenancy` makes them meet at start. Rows are written as
//! they change and read once, at start: no claim waits for a read, except of
//! stored secrets ([`Journal::secrets`]) of a tenant that has some.
//!
//! # Durability
//! A batch with a [`Durability::Hard`] operation is committed with
//! `synchronous=FULL`; a batch of only soft ones with `NORMAL`, which survives
//! kill -9 of the server but not a power loss. The log is one file, written in
//! order: a hard commit makes every soft one before it hard too.
//!
//! # One writer
//! ```text
//! commit() ──▶ queue ──▶ writer: all that is queued, at most 256, in one
//! commit() ──▶   │                transaction; if it fails, each alone
//! commit() ──▶   ▼                └─▶ every caller gets its own answer
//! ```
//! A writer that fails opens the file again for the next commit; until that
//! works, commits are answered with an error and nothing is acknowledged.

mod database;
mod encode;
mod error;
mod load;
mod schema;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    future::Future,
    path::Path,
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

pub use self::error::Error;
use self::{
    database::{Database, Readers},
    writer::{Group, Writer},
};

use crate::model::{
    ClaimSource, ClaimState, ContainerId, Epoch, Key, Owner, Revision, SlotId, SlotPhase, SnapshotRef,
    SpecHash, StateSource, TenantId, WorkloadId,
};

/// Commits that may wait for the writer; one more is answered with [`Error::Overloaded`].
pub const QUEUE_COMMITS: usize = 16_384;

/// How long a commit waits for the writer's answer, in milliseconds.
pub const ANSWER_WAIT_MS: u64 = 30_000;

/// The durable record of one state directory. Clones share it.
///
/// When the last clone is dropped the writer commits what is queued and closes
/// the file; [`Journal::open`] waits for that, so a node can be dropped and
/// built again at once.
#[derive(Clone)]
pub struct Journal {
    inner: Arc<Inner>,
}

/// Where commits are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// On a thread of the journal's own, in groups. Under a paused clock the
    /// deadline of a commit passes at once: tests on virtual time use `Inline`.
    Threaded,
    /// On the calling task, one by one, before [`Journal::commit`] returns.
    Inline,
}

/// How surely a commit must be on disk before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Survives kill -9.
    Soft,
    /// Survives a power loss.
    Hard,
}

/// One change. Operations given together are committed together or not at all.
#[derive(Debug, Clone)]
pub enum Op {
    /// Writes a slot's row.
    PutSlot(SlotRow),
    /// Removes a slot's row.
    DropSlot(SlotId),
    /// Writes a claim's row.
    PutClaim(Box<ClaimRow>),
    /// Removes a claim that never had a side effect.
    DropClaim(Key, Epoch),
    /// Writes what is known of a key's tree.
    PutTree(TreeRow),
    /// Forgets a key's tree (the epoch is kept).
    DropTree(Key),
    /// Writes a tenant's metadata.
    PutTenant(TenantId, serde_json::Map<String, serde_json::Value>),
    /// Writes a sealed secret of a tenant.
    PutSecret(TenantId, String, Vec<u8>),
    /// Removes a secret of a tenant.
    DropSecret(TenantId, String),
    /// Keeps the spec and sources of a revision, as JSON, for claims that outlive a restart.
    PutRevision(Revision, String),
    /// Forgets a revision that no slot or claim refers to.
    DropRevision(Revision),
    /// Notes that everything of a tenant is being removed.
    BeginErasure(TenantId),
    /// Removes every row of a tenant, the note of its erasure too.
    EndErasure(TenantId),
    /// Writes a fact of the installation, e.g. `boot_id`.
    PutFact(&'static str, String),
}

/// A slot as the journal knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRow {
    /// The slot.
    pub slot: SlotId,
    /// Its pool.
    pub workload: WorkloadId,
    /// The spec it was made from.
    pub spec_hash: SpecHash,
    /// The revision whose spec it was made from.
    pub revision: Revision,
    /// Where it stands.
    pub phase: SlotPhase,
    /// The engine's id, once created.
    pub container: Option<ContainerId>,
    /// The container's name.
    pub name: String,
    /// Its address, if it has one.
    pub address: Option<String>,
    /// Who its program runs as, once created.
    pub run_as: Option<Owner>,
    /// When it was made, milliseconds since the epoch.
    pub created_ms: u64,
}

/// A claim as the journal knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClaimRow {
    /// Whose it is.
    pub key: Key,
    /// Its number.
    pub epoch: Epoch,
    /// Where it stands.
    pub state: ClaimState,
    /// The slot; gone once the claim is dirty or later.
    pub slot: Option<SlotId>,
    /// The revision it runs to its end.
    pub revision: Revision,
    /// Who the program runs as.
    pub run_as: Owner,
    /// Where the slot came from.
    pub source: ClaimSource,
    /// Where the state came from.
    pub state_source: StateSource,
    /// The snapshot it began with, or the newest it has saved.
    pub snapshot: Option<SnapshotRef>,
    /// The nonce of a save that may be under way.
    pub nonce: Option<String>,
    /// Whether the claim failed after the tenant's code may have run.
    pub failed: bool,
    /// The later claim that took over this one's unsaved tree.
    pub superseded_by: Option<Epoch>,
    /// The term of the store's ownership under which it began; none: before there were any.
    pub term: Option<u64>,
    /// Whether the store has the record that it began.
    pub opened: bool,
    /// Whether nothing of it is to be saved, and only its end is to be written to the store.
    pub close: bool,
    /// The store's newest record, by number, when an operator decided that this claim's tree
    /// replaces what the store has; 0: there was none. None: nothing was decided.
    pub decided_on: Option<u64>,
    /// What the request asked for and what it was answered, as JSON of `tenancy`'s own.
    pub detail: serde_json::Value,
    /// When it began, milliseconds since the epoch.
    pub created_ms: u64,
    /// Last sign of use, milliseconds since the epoch.
    pub active_ms: u64,
}

/// What is known of a key's tree on this node. At most one a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeRow {
    /// Whose tree.
    pub key: Key,
    /// The last epoch given out for this key.
    pub epoch: Epoch,
    /// Whether the cache holds a tree (or, while claimed, the slot does).
    pub cached: bool,
    /// The snapshot that equals the cached tree; `None`: the tree is the only copy.
    pub saved: Option<SnapshotRef>,
    /// Who the program ran as.
    pub owner: Option<Owner>,
    /// The term under which the key was last opened in the store.
    pub opened: Option<u64>,
}

/// Everything that was in the journal at start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Slots.
    pub slots: Vec<SlotRow>,
    /// Claims that are not clean and superseded ones that are not settled; of clean
    /// ones the newest per key.
    pub claims: Vec<ClaimRow>,
    /// Trees.
    pub trees: Vec<TreeRow>,
    /// Tenants' metadata.
    pub tenants: Vec<(TenantId, serde_json::Map<String, serde_json::Value>)>,
    /// Tenants that have stored secrets.
    pub with_secrets: Vec<TenantId>,
    /// Tenants whose erasure was begun.
    pub erasures: Vec<TenantId>,
    /// Revisions kept: the revision and its JSON.
    pub revisions: Vec<(Revision, String)>,
    /// Facts of the installation.
    pub facts: std::collections::BTreeMap<String, String>,
}

struct Inner {
    lane: Lane,
    readers: Readers,
}

enum Lane {
    Threaded(mpsc::SyncSender<writer::Commit>),
    Inline(Mutex<Writer>),
}

/// The answer to a commit, on its way.
enum Answer {
    Here(Result<(), Error>),
    Coming(oneshot::Receiver<Result<(), Error>>),
}

// === impl Journal ===

impl Journal {
    /// Opens the journal at `path`, creating it (mode 0600) or bringing it up to
    /// this version's schema, and reads what it holds.
    ///
    /// The directory must be there. A file `<path>.lock` beside it keeps a second
    /// server away; a lock that is held is waited for, at most 5 s. Blocks.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Newer`], [`Error::Corrupt`] (nothing is deleted
    /// or repaired), [`Error::Unavailable`].
    pub fn open(path: &Path, mode: Mode) -> Result<(Self, Loaded), Error> {
        let (database, connection) = Database::open(path)?;
        let loaded = load::load(&connection).map_err(|error| load::error(path, error))?;
        let database = Arc::new(database);
        let readers = Readers::new(Arc::clone(&database));
        let writer = Writer::new(database, connection);
        let lane = match mode {
            Mode::Inline => Lane::Inline(Mutex::new(writer)),
            Mode::Threaded => {
                let (sender, receiver) = mpsc::sync_channel(QUEUE_COMMITS);
                std::thread::Builder::new()
                    .name("journal".to_owned())
                    .spawn(move || writer.run(&receiver))
                    .map_err(|error| Error::unavailable(path, format!("cannot start its thread: {error}")))?;
                Lane::Threaded(sender)
            }
        };
        Ok((Self { inner: Arc::new(Inner { lane, readers }) }, loaded))
    }

    /// Commits `ops` together or not at all, after everything that was given
    /// before. The order is that of the calls, not of the polls.
    ///
    /// Each `Put` is an upsert, so a commit whose outcome is unknown may be given
    /// again. Committing a claim as clean also drops the rows it settles: older
    /// clean claims of its key, and dirty ones superseded by it or before it.
    ///
    /// # Cancel safety
    /// The operations are queued by the call itself: dropping the future, even
    /// before its first poll, takes nothing back.
    ///
    /// # Errors
    /// [`Error::AlreadyLive`] and [`Error::Refused`] concern these operations only,
    /// and nothing of them was written. After [`Error::Overloaded`] and
    /// [`Error::Unavailable`] nothing is acknowledged; a crash may still show
    /// what an unavailable disk had half taken. [`Error::Unknown`] says that the
    /// answer never came.
    pub fn commit(
        &self,
        ops: Vec<Op>,
        durability: Durability,
    ) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let answer = match Group::new(ops, durability) {
            Ok(group) => self.enqueue(group),
            Err(error) => Answer::Here(Err(error)),
        };
        async move {
            match answer {
                Answer::Here(result) => result,
                Answer::Coming(receiver) => {
                    match tokio::time::timeout(Duration::from_millis(ANSWER_WAIT_MS), receiver).await {
                        Ok(Ok(result)) => result,
                        Ok(Err(_)) | Err(_) => Err(Error::Unknown),
                    }
                }
            }
        }
    }

    /// Waits until everything that was given before has been carried out; called
    /// last at shutdown.
    ///
    /// # Errors
    /// As [`Journal::commit`].
    pub fn flush(&self) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        self.commit(Vec::new(), Durability::Soft)
    }

    /// Reads the sealed secrets of a tenant, ordered by name. Sees every commit
    /// that was acknowledged before the call; takes microseconds, on the calling
    /// task, and does not wait for the writer.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub fn secrets(&self, tenant: &TenantId) -> Result<Vec<(String, Vec<u8>)>, Error> {
        self.inner.readers.with(|connection| load::secrets(connection, tenant))
    }

    fn enqueue(&self, group: Group) -> Answer {
        match &self.inner.lane {
            Lane::Inline(writer) => {
                let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
                Answer::Here(writer.commit(&[&group]).pop().unwrap_or(Err(Error::Unknown)))
            }
            Lane::Threaded(sender) => {
                let (reply, answer) = oneshot::channel();
                match sender.try_send(writer::Commit { group, reply }) {
                    Ok(()) => Answer::Coming(answer),
                    Err(mpsc::TrySendError::Full(_)) => Answer::Here(Err(Error::Overloaded)),
                    Err(mpsc::TrySendError::Disconnected(_)) => Answer::Here(Err(Error::Unknown)),
                }
            }
        }
    }
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").finish_non_exhaustive()
    }
}
