//! The commit point: one create-only record after the other.

use bytes::Bytes;

use crate::{
    model::{Epoch, Key},
    state::{
        Base, Error,
        fence::{self, Author, Closing, Link, Standing},
    },
    store::{self, Creation, Store},
};

use super::{
    RECORD_BYTES,
    name::{Digest, ObjectName, object_key, record_key, record_number, records_prefix},
    record::{Holder, RECORD_VERSION, Record, RecordKind, RecordTree},
};

/// How often a commit may find its number taken. Numbers are only taken by late
/// attempts of our own or by a server that is about to be fenced.
const ATTEMPTS: u32 = 8;
/// How often the newest record is looked for when listing and reading do not agree.
const LOOKS: u32 = 3;
/// How many of the newest records are searched for one that builds on a save.
const SEARCHED: usize = 100;

/// What a new record says.
#[derive(Debug, Clone)]
pub(in crate::state) struct Commit<'a> {
    /// Whose state.
    pub(in crate::state) key: &'a Key,
    /// Its digest.
    pub(in crate::state) key_digest: &'a str,
    /// The claim.
    pub(in crate::state) epoch: Epoch,
    /// The attempt.
    pub(in crate::state) nonce: &'a str,
    /// The manifest, already in the store.
    pub(in crate::state) manifest: ObjectName,
    /// Now.
    pub(in crate::state) created_ms: u64,
    /// Regular files.
    pub(in crate::state) files: u64,
    /// Their bytes.
    pub(in crate::state) bytes: u64,
    /// Entries left out.
    pub(in crate::state) skipped: u64,
    /// Whether the claim failed.
    pub(in crate::state) failed_claim: bool,
    /// Who writes.
    pub(in crate::state) author: &'a Author,
    /// Whether the claim ends with it; else its holder is carried on.
    pub(in crate::state) is_last: bool,
    /// What it may come after.
    pub(in crate::state) base: Base,
}

/// A record that changes whose claim is open, and no tree.
#[derive(Debug, Clone)]
pub(in crate::state) struct Turn<'a> {
    /// Whose state.
    pub(in crate::state) key: &'a Key,
    /// Its digest.
    pub(in crate::state) key_digest: &'a str,
    /// The claim.
    pub(in crate::state) epoch: Epoch,
    /// The attempt.
    pub(in crate::state) nonce: &'a str,
    /// Who writes.
    pub(in crate::state) author: &'a Author,
    /// Now.
    pub(in crate::state) created_ms: u64,
}

/// Decides what the newest record means for a save of this nonce.
pub(in crate::state) fn standing(
    newest: Option<&Record>,
    server: &str,
    (epoch, nonce): (Epoch, &str),
    base: Base,
) -> Standing {
    let link = newest.map(Record::link);
    match base {
        Base::Any | Base::Chain => fence::standing(link.as_ref(), server, epoch, nonce),
        Base::Decided(after) => {
            fence::standing_after(newest.map(|newest| newest.number).zip(link.as_ref()), after, nonce)
        }
    }
}

/// Reads the newest record; `None` is proof that there is none: the listing is
/// empty *and* record 1, which stays for ever, is not there.
///
/// Listing and reading are two calls: a record that another server makes or removes
/// between them is looked for again before the store is said to be damaged.
///
/// # Errors
/// [`Error::Store`], and [`Error::Damaged`] for what is no record.
pub(in crate::state) async fn newest_record(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
) -> Result<Option<Record>, Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let mut problem = String::new();
    for _ in 0..LOOKS {
        let listed = store.list(&records_prefix(key_digest), None, 1).await.map_err(failed)?;
        let Some(listed) = listed.into_iter().next() else {
            let first = record_key(key_digest, 1);
            match get_record(store, &first).await.map_err(failed)? {
                None => return Ok(None),
                Some(_) => problem = format!("{first} is there but is not listed"),
            }
            continue;
        };
        let number = record_number(key_digest, &listed.key)
            .ok_or_else(|| damaged(key, format!("{} is no record's name", listed.key)))?;
        let Some(body) = get_record(store, &listed.key).await.map_err(failed)? else {
            problem = format!("{} is listed but not there", listed.key);
            continue;
        };
        return Record::decode(&body, key, number)
            .map(Some)
            .map_err(|problem| damaged(key, format!("record {}: {problem}", listed.key)));
    }
    Err(damaged(key, problem))
}

/// Reads a record's object; of one that is too large, one byte more than it may have.
pub(super) async fn get_record(store: &dyn Store, name: &str) -> Result<Option<Bytes>, store::Error> {
    store.get_range(name, 0, RECORD_BYTES + 1).await
}

/// Creates the next record after `newest` and reads everything back.
///
/// # Errors
/// [`Error::Fenced`] when another claim has written, also at the very last
/// moment; [`Error::Damaged`] when the store does not give back what it took;
/// [`Error::Store`] when it is not known or not done: the same nonce may be tried again.
pub(in crate::state) async fn commit(
    store: &dyn Store,
    commit: &Commit<'_>,
    newest: Option<Record>,
) -> Result<Record, Error> {
    let attempt = (commit.epoch, commit.nonce);
    let by_standing = |newest: Option<&Record>| standing(newest, &commit.author.server, attempt, commit.base);
    let next = |newest: Option<&Record>| commit.record(newest);
    append(store, (commit.key, commit.key_digest, commit.epoch), newest, by_standing, next).await
}

/// Writes that a claim began, as the very next record after `on_top_of` (0: the first), or
/// after one of the same server's earlier claims that came meanwhile: the end of one, with
/// the same `tree` still, or the save of this node's tree by `saving`.
///
/// # Errors
/// As [`commit`]; [`Error::Fenced`] when anybody was faster.
pub(in crate::state) async fn open(
    store: &dyn Store,
    turn: &Turn<'_>,
    on_top_of: u64,
    (tree, saving): (Option<&str>, Option<&str>),
) -> Result<Record, Error> {
    let by_place = |newest: Option<&Record>| match newest {
        Some(record) if record.nonce == turn.nonce => Standing::Committed,
        None if on_top_of == 0 => Standing::Open,
        Some(record) if record.number == on_top_of => Standing::Open,
        Some(record)
            if record.server.as_deref() == Some(turn.author.server.as_str())
                && record.epoch < turn.epoch
                && (record.tree.as_ref().map(|tree| tree.nonce.as_str()) == tree
                    || saving == Some(record.nonce.as_str())) =>
        {
            Standing::Open
        }
        newest => Standing::Fenced(newest.map_or(Epoch(0), |record| record.epoch)),
    };
    let next = |newest: Option<&Record>| Record {
        holder: Some(Holder { server: turn.author.server.clone(), epoch: turn.epoch }),
        ..turn.record(RecordKind::Open, newest)
    };
    let newest = newest_record(store, turn.key, turn.key_digest).await?;
    append(store, (turn.key, turn.key_digest, turn.epoch), newest, by_place, next).await
}

/// Writes that a claim ended and left nothing to save, unless nothing of it can be open:
/// where a chain was and is none (`has_chain`), its `open` is gone with all the rest.
///
/// # Errors
/// As [`commit`], but a claim that is fenced has ended.
pub(in crate::state) async fn close(
    store: &dyn Store,
    turn: &Turn<'_>,
    has_chain: bool,
) -> Result<(), Error> {
    let newest = newest_record(store, turn.key, turn.key_digest).await?;
    let server = &turn.author.server;
    if newest.is_none() && has_chain {
        tracing::error!(key = %turn.key, "the store has no record of this key any more, and it had one");
        return Ok(());
    }
    if fence::close(newest.as_ref().map(Record::link).as_ref(), server, turn.epoch) == Closing::Done {
        return Ok(());
    }
    let attempt = (turn.epoch, turn.nonce);
    let by_standing = |newest: Option<&Record>| standing(newest, server, attempt, Base::Any);
    let next = |newest: Option<&Record>| turn.record(RecordKind::Close, newest);
    match append(store, (turn.key, turn.key_digest, turn.epoch), newest, by_standing, next).await {
        Ok(_) | Err(Error::Fenced { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Creates the next record after `newest`, as far as `standing` allows, and reads
/// everything back.
async fn append(
    store: &dyn Store,
    (key, key_digest, own): (&Key, &str, Epoch),
    mut newest: Option<Record>,
    standing: impl Fn(Option<&Record>) -> Standing,
    next: impl Fn(Option<&Record>) -> Record,
) -> Result<Record, Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    for _ in 0..ATTEMPTS {
        match standing(newest.as_ref()) {
            Standing::Open => {}
            Standing::Fenced(newest) => return Err(Error::Fenced { key: key.clone(), own, newest }),
            Standing::Committed => {
                let Some(record) = newest else { break };
                verify(store, key, key_digest, own, &record).await?;
                return Ok(record);
            }
        }
        let record = next(newest.as_ref());
        let name = record_key(key_digest, record.number);
        let unknown = match store.create(&name, Bytes::from(record.encode())).await {
            Ok(Creation::Created) => {
                verify(store, key, key_digest, own, &record).await?;
                return Ok(record);
            }
            Ok(Creation::Exists) => None,
            Err(error @ store::Error::Unknown { .. }) => Some(error),
            Err(error) => return Err(failed(error)),
        };
        match (get_record(store, &name).await.map_err(failed)?, unknown) {
            (None, Some(error)) => return Err(failed(error)),
            // Also one that was there and is not any more: a later one is.
            (None, None) | (Some(_), _) => newest = newest_record(store, key, key_digest).await?,
        }
    }
    Err(failed(store::Error::Unavailable {
        operation: "create",
        key: records_prefix(key_digest),
        reason: format!("the next record was taken {ATTEMPTS} times in a row"),
    }))
}

/// Reads record and manifest back, and asks whether the newest listed record is ours (P2).
pub(in crate::state) async fn verify(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    own: Epoch,
    record: &Record,
) -> Result<(), Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let name = record_key(key_digest, record.number);
    let body = get_record(store, &name).await.map_err(failed)?;
    // Compared as read, for an older version of this server may have written it.
    let read = body.as_deref().map(|body| Record::decode(body, key, record.number));
    if read.as_ref() != Some(&Ok(record.clone())) {
        return Err(damaged(key, format!("{name} reads back differently than it was written")));
    }
    if let Some(tree) = &record.tree {
        let manifest = object_key(key_digest, &tree.manifest);
        match store.get(&manifest).await.map_err(failed)? {
            Some(body) if Digest::of(&body) == tree.manifest.digest => {}
            Some(_) => {
                return Err(damaged(key, format!("{manifest} reads back differently than it was written")));
            }
            None => return Err(damaged(key, format!("{manifest} is not there after it was written"))),
        }
    }
    match newest_record(store, key, key_digest).await? {
        Some(newest) if newest == *record => Ok(()),
        Some(newest) => Err(Error::Fenced { key: key.clone(), own, newest: newest.epoch }),
        None => Err(damaged(key, format!("{name} is not listed after it was written"))),
    }
}

// === impl Commit ===

impl Commit<'_> {
    fn record(&self, newest: Option<&Record>) -> Record {
        let number = newest.map_or(1, |newest| newest.number + 1);
        let holder = newest.and_then(|newest| newest.holder.clone()).filter(|_| !self.is_last);
        let tree = RecordTree {
            snapshot: number,
            epoch: self.epoch,
            nonce: self.nonce.to_owned(),
            manifest: self.manifest,
            created_ms: self.created_ms,
            files: self.files,
            bytes: self.bytes,
            skipped: self.skipped,
            failed_claim: self.failed_claim,
            restored_from: None,
        };
        Record {
            version: RECORD_VERSION,
            number,
            tenant: self.key.tenant.clone(),
            workload: self.key.workload.clone(),
            epoch: self.epoch,
            nonce: self.nonce.to_owned(),
            created_ms: self.created_ms,
            kind: RecordKind::Snapshot,
            server: Some(self.author.server.clone()),
            term: self.author.term,
            holder,
            tree: Some(tree),
        }
    }
}

// === impl Turn ===

impl Turn<'_> {
    fn record(&self, kind: RecordKind, newest: Option<&Record>) -> Record {
        Record {
            version: RECORD_VERSION,
            number: newest.map_or(1, |newest| newest.number + 1),
            tenant: self.key.tenant.clone(),
            workload: self.key.workload.clone(),
            epoch: self.epoch,
            nonce: self.nonce.to_owned(),
            created_ms: self.created_ms,
            kind,
            server: Some(self.author.server.clone()),
            term: self.author.term,
            holder: None,
            tree: newest.and_then(|newest| newest.tree.clone()),
        }
    }
}

// === impl Record: for the fence ===

impl Record {
    /// Returns what decisions of the fence need.
    pub(in crate::state) fn link(&self) -> Link {
        Link {
            epoch: self.epoch,
            nonce: self.nonce.clone(),
            server: self.server.clone(),
            term: self.term,
            holder: self.holder.as_ref().map(|holder| (holder.server.clone(), holder.epoch)),
            tree: self.tree.as_ref().map(|tree| tree.nonce.clone()),
        }
    }
}

/// Finds a record that builds on the tree that attempt `nonce` of claim `epoch` saved: the
/// proof that it counts, when others have gone on since.
///
/// # Errors
/// [`Error::Store`] and [`Error::Damaged`].
pub(in crate::state) async fn built_on(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
    epoch: Epoch,
    nonce: &str,
) -> Result<Option<Record>, Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let listed = store.list(&records_prefix(key_digest), None, SEARCHED).await.map_err(failed)?;
    for listed in listed {
        let Some(number) = record_number(key_digest, &listed.key) else { continue };
        // Removed meanwhile, it proves nothing any more.
        let Some(body) = store.get(&listed.key).await.map_err(failed)? else { continue };
        let record = Record::decode(&body, key, number)
            .map_err(|problem| damaged(key, format!("record {}: {problem}", listed.key)))?;
        if record.epoch < epoch {
            break;
        }
        if fence::builds_on(&record.link(), nonce) {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

/// Says that the store holds what it should not.
pub(in crate::state) fn damaged(key: &Key, reason: String) -> Error {
    Error::Damaged { key: key.clone(), reason }
}
