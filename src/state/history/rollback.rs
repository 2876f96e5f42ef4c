//! What there is of a history, and back to an old tree.

use serde::Serialize;

use crate::{
    model::{Epoch, Key, spec::Layout},
    state::snapshot::{
        Manifest, Record, RecordKind, RecordTree, damaged, list_all, newest_record, object_key,
        read_manifest, read_record, record_number, records_prefix,
    },
};

use super::{Committed, Error, History, Rollback, StateError, committed};

/// Records that one page looks at; opens and closes among them are not shown.
const PAGE_RECORDS: usize = 2_000;

/// One snapshot of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Names it.
    pub number: u64,
    /// The claim that wrote it.
    pub epoch: Epoch,
    /// When, milliseconds since the epoch.
    pub created_ms: u64,
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Sockets, FIFOs and devices that were left out.
    pub skipped: u64,
    /// Whether the claim that left it failed.
    pub failed_claim: bool,
    /// The snapshot whose tree it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restored_from: Option<u64>,
    /// How it came about.
    pub kind: EntryKind,
    /// Whether the next claim begins with it.
    pub current: bool,
}

/// How a snapshot came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A tree was saved.
    Snapshot,
    /// An old one became the newest again.
    Restore,
}

/// A part of a history, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// The snapshots.
    pub snapshots: Vec<Entry>,
    /// More are before this number; none: that was all.
    pub next: Option<u64>,
}

// === impl History ===

impl History {
    /// Lists at most `limit` snapshots older than `before`, newest first.
    ///
    /// # Errors
    /// [`Error::State`]
    pub async fn list(&self, key: &Key, before: Option<u64>, limit: usize) -> Result<Page, Error> {
        let key_digest = key.digest();
        let Some(newest) = newest_record(&*self.store, key, &key_digest).await? else {
            return Ok(Page::default());
        };
        let current = newest.tree.as_ref().map(|tree| tree.snapshot);
        let mut page = Page::default();
        let mut looked_at = 0;
        for number in self.numbers(key).await? {
            if before.is_some_and(|before| number >= before) {
                continue;
            }
            if page.snapshots.len() >= limit || looked_at >= PAGE_RECORDS {
                page.next = Some(number + 1);
                break;
            }
            looked_at += 1;
            // Gone since it was listed: collected.
            let Some(record) = read_record(&*self.store, key, &key_digest, number).await? else { continue };
            if let Some((kind, tree)) = shown(&record)
                && (number != 1 || self.has_tree(key, tree).await?)
            {
                page.snapshots.push(entry(&record, kind, tree, current == Some(number)));
            }
        }
        Ok(page)
    }

    /// Checks that a snapshot can be restored.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::State`].
    pub async fn check(&self, key: &Key, number: u64) -> Result<(), Error> {
        self.tree_of(key, number).await.map(drop)
    }

    /// Makes an old tree the newest, with a record of its own. The caller keeps
    /// claims of the key away and has nothing unsaved.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::ClaimedElsewhere`], [`Error::State`]. Repeated
    /// with the same nonce it commits at most once.
    pub async fn restore(&self, rollback: &Rollback) -> Result<Committed, Error> {
        let (store, key) = (&*self.store, &rollback.key);
        let key_digest = key.digest();
        let newest = newest_record(store, key, &key_digest).await?;
        let Some(newest) = newest else { return Err(self.unknown(key, rollback.snapshot).await) };
        if newest.nonce == rollback.nonce {
            let record = self.append(key, Some(newest.clone()), |_| Ok(newest.clone())).await?;
            return committed(key, &record, rollback.snapshot);
        }
        self.must_be_ours(key, &newest).await?;
        let (tree, manifest) = self.tree_of(key, rollback.snapshot).await?;
        self.must_be_whole(key, &manifest).await?;
        let epoch = rollback.epoch.max(newest.epoch.next());
        let tree = RecordTree { restored_from: Some(rollback.snapshot), ..tree };
        let record = self.append(key, Some(newest.clone()), |now| {
            now.map_or(Ok(()), |now| self.must_stay_ours(key, now, &newest))?;
            Ok(self.record(key, now, epoch, &rollback.nonce, Some(tree.clone())))
        });
        committed(key, &record.await?, rollback.snapshot)
    }

    /// Reads a snapshot's tree.
    pub(in crate::state) async fn tree_of(
        &self,
        key: &Key,
        number: u64,
    ) -> Result<(RecordTree, Manifest), Error> {
        let key_digest = key.digest();
        let record = match number {
            0 => None,
            number => read_record(&*self.store, key, &key_digest, number).await?,
        };
        let tree = record.as_ref().and_then(shown).map(|(_, tree)| tree.clone());
        let Some(tree) = tree else { return Err(self.unknown(key, number).await) };
        if tree.manifest.kind.layout() == Some(Layout::Mirror) {
            let newest = newest_record(&*self.store, key, &key_digest).await?;
            let newest = newest.and_then(|newest| newest.tree);
            if newest.as_ref().map(|newest| newest.manifest) != Some(tree.manifest) {
                let newest = newest.map(|newest| newest.snapshot);
                return Err(Error::Mirrored { key: key.clone(), asked: number, newest });
            }
        }
        match read_manifest(&*self.store, key, &key_digest, &tree.manifest, &self.encryption.codec(key))
            .await?
        {
            Some(manifest) => Ok((tree, manifest)),
            // Record 1 stays when its tree does not.
            None if number == 1 => Err(self.unknown(key, number).await),
            None => Err(damaged(key, format!("the manifest of snapshot {number} is not there")).into()),
        }
    }

    /// Says which snapshots there are instead of `asked`.
    pub(super) async fn unknown(&self, key: &Key, asked: u64) -> Error {
        match self.ends(key).await {
            Ok((oldest, newest)) => Error::Unknown { key: key.clone(), asked, oldest, newest },
            Err(error) => error,
        }
    }

    /// Returns the oldest and the newest snapshot that can be restored.
    async fn ends(&self, key: &Key) -> Result<(Option<u64>, Option<u64>), Error> {
        let key_digest = key.digest();
        let mut found = (None, None);
        let numbers = self.numbers(key).await?;
        for number in numbers.iter().copied() {
            let record = read_record(&*self.store, key, &key_digest, number).await?;
            if let Some(tree) = record.and_then(|record| record.tree) {
                found.1 = Some(tree.snapshot);
                break;
            }
        }
        for number in numbers.into_iter().rev() {
            let Some(record) = read_record(&*self.store, key, &key_digest, number).await? else { continue };
            if let Some((_, tree)) = shown(&record)
                && (number != 1 || self.has_tree(key, tree).await?)
            {
                found.0 = Some(number);
                break;
            }
        }
        Ok(found)
    }

    async fn numbers(&self, key: &Key) -> Result<Vec<u64>, Error> {
        let key_digest = key.digest();
        let listed = list_all(&*self.store, &records_prefix(&key_digest)).await;
        let listed = listed.map_err(|source| StateError::Store { key: key.clone(), source })?;
        Ok(listed.iter().filter_map(|listed| record_number(&key_digest, &listed.key)).collect())
    }

    async fn has_tree(&self, key: &Key, tree: &RecordTree) -> Result<bool, Error> {
        let name = object_key(&key.digest(), &tree.manifest);
        let found = self.store.list(&name, None, 1).await;
        let found = found.map_err(|source| StateError::Store { key: key.clone(), source })?;
        Ok(!found.is_empty())
    }
}

/// Returns a record's tree when the record is a snapshot of the history.
fn shown(record: &Record) -> Option<(EntryKind, &RecordTree)> {
    let kind = match record.kind {
        RecordKind::Snapshot => EntryKind::Snapshot,
        RecordKind::Restore => EntryKind::Restore,
        RecordKind::Open | RecordKind::Close => return None,
    };
    Some((kind, record.tree.as_ref()?))
}

fn entry(record: &Record, kind: EntryKind, tree: &RecordTree, current: bool) -> Entry {
    Entry {
        number: record.number,
        epoch: record.epoch,
        created_ms: record.created_ms,
        files: tree.files,
        bytes: tree.bytes,
        skipped: tree.skipped,
        failed_claim: tree.failed_claim,
        restored_from: tree.restored_from,
        kind,
        current,
    }
}
