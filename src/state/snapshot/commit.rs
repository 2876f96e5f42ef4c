//! The commit point: one create-only record after the other.

use bytes::Bytes;

use crate::{
    model::{Epoch, Key},
    state::Error,
    store::{self, Creation, Store},
};

use super::{
    VERSION,
    manifest::Record,
    name::{Digest, ObjectName, object_key, record_key, record_number, records_prefix},
};

/// How often a commit may find its number taken. Numbers are only taken by late
/// attempts of our own or by a server that is about to be fenced.
const ATTEMPTS: u32 = 8;

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
}

/// What the newest record means for an attempt to save.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::state) enum Standing {
    /// The next record may be written on top of it.
    Open,
    /// This very attempt is committed.
    Committed,
    /// A later claim has written.
    Fenced(Epoch),
}

/// Decides what the newest record means for `nonce` of `epoch`.
pub(in crate::state) fn standing(newest: Option<&Record>, epoch: Epoch, nonce: &str) -> Standing {
    match newest {
        Some(record) if record.nonce == nonce => Standing::Committed,
        Some(record) if record.epoch > epoch => Standing::Fenced(record.epoch),
        _ => Standing::Open,
    }
}

/// Reads the newest record; `None` is proof that there is none: the listing is
/// empty *and* record 1, which stays for ever, is not there.
///
/// # Errors
/// [`Error::Store`], and [`Error::Damaged`] for what is no record.
pub(in crate::state) async fn newest_record(
    store: &dyn Store,
    key: &Key,
    key_digest: &str,
) -> Result<Option<Record>, Error> {
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let listed = store.list(&records_prefix(key_digest), None, 1).await.map_err(failed)?;
    let Some(listed) = listed.into_iter().next() else {
        let first = record_key(key_digest, 1);
        return match store.get(&first).await.map_err(failed)? {
            None => Ok(None),
            Some(_) => Err(damaged(key, format!("{first} is there but is not listed"))),
        };
    };
    let number = record_number(key_digest, &listed.key)
        .ok_or_else(|| damaged(key, format!("{} is no record's name", listed.key)))?;
    let body = store.get(&listed.key).await.map_err(failed)?;
    let body = body.ok_or_else(|| damaged(key, format!("{} is listed but not there", listed.key)))?;
    Record::decode(&body, key, number)
        .map(Some)
        .map_err(|problem| damaged(key, format!("record {}: {problem}", listed.key)))
}

/// Creates the next record after `newest` and reads everything back.
///
/// # Errors
/// [`Error::Fenced`] when a later claim has written, also at the very last
/// moment; [`Error::Damaged`] when the store does not give back what it took;
/// [`Error::Store`] when it is not known or not done: the same nonce may be tried again.
pub(in crate::state) async fn commit(
    store: &dyn Store,
    commit: &Commit<'_>,
    mut newest: Option<Record>,
) -> Result<Record, Error> {
    let key = commit.key;
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    for _ in 0..ATTEMPTS {
        match standing(newest.as_ref(), commit.epoch, commit.nonce) {
            Standing::Open => {}
            Standing::Fenced(epoch) => return Err(fenced(commit, epoch)),
            Standing::Committed => {
                let Some(record) = newest else { break };
                verify(store, key, commit.key_digest, commit.epoch, &record).await?;
                return Ok(record);
            }
        }
        let record = commit.record(newest.as_ref().map_or(1, |record| record.number + 1));
        let name = record_key(commit.key_digest, record.number);
        let unknown = match store.create(&name, Bytes::from(record.encode())).await {
            Ok(Creation::Created) => {
                verify(store, key, commit.key_digest, commit.epoch, &record).await?;
                return Ok(record);
            }
            Ok(Creation::Exists) => None,
            Err(error @ store::Error::Unknown { .. }) => Some(error),
            Err(error) => return Err(failed(error)),
        };
        match (store.get(&name).await.map_err(failed)?, unknown) {
            (None, Some(error)) => return Err(failed(error)),
            (None, None) => return Err(damaged(key, format!("{name} exists but is not there"))),
            (Some(_), _) => newest = newest_record(store, key, commit.key_digest).await?,
        }
    }
    Err(failed(store::Error::Unavailable {
        operation: "create",
        key: records_prefix(commit.key_digest),
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
    if store.get(&name).await.map_err(failed)?.as_deref() != Some(&record.encode()) {
        return Err(damaged(key, format!("{name} reads back differently than it was written")));
    }
    let manifest = object_key(key_digest, &record.manifest);
    match store.get(&manifest).await.map_err(failed)? {
        Some(body) if Digest::of(&body) == record.manifest.digest => {}
        Some(_) => {
            return Err(damaged(key, format!("{manifest} reads back differently than it was written")));
        }
        None => return Err(damaged(key, format!("{manifest} is not there after it was written"))),
    }
    match newest_record(store, key, key_digest).await? {
        Some(newest) if newest == *record => Ok(()),
        Some(newest) => Err(Error::Fenced { key: key.clone(), own, newest: newest.epoch }),
        None => Err(damaged(key, format!("{name} is not listed after it was written"))),
    }
}

// === impl Commit ===

impl Commit<'_> {
    fn record(&self, number: u64) -> Record {
        Record {
            version: VERSION,
            number,
            tenant: self.key.tenant.clone(),
            workload: self.key.workload.clone(),
            epoch: self.epoch,
            nonce: self.nonce.to_owned(),
            manifest: self.manifest,
            created_ms: self.created_ms,
            files: self.files,
            bytes: self.bytes,
            skipped: self.skipped,
            failed_claim: self.failed_claim,
        }
    }
}

fn fenced(commit: &Commit<'_>, newest: Epoch) -> Error {
    Error::Fenced { key: commit.key.clone(), own: commit.epoch, newest }
}

/// Says that the store holds what it should not.
pub(in crate::state) fn damaged(key: &Key, reason: String) -> Error {
    Error::Damaged { key: key.clone(), reason }
}
