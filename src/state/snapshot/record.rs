//! Records: the chain of create-only objects in which every step of a key is one link.

use serde::{Deserialize, Serialize};

use crate::model::{Epoch, Key, SnapshotRef, TenantId, WorkloadId};

use super::{
    RECORD_BYTES,
    name::{ObjectName, object_key},
};

/// The version this code writes; it reads 0, too.
pub(in crate::state) const RECORD_VERSION: u32 = 1;

/// One link of a key's chain. Each says what the newest tree is after it, so that
/// the newest record alone answers everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Record {
    /// [`RECORD_VERSION`].
    pub(in crate::state) version: u32,
    /// Rising by one from 1, also in the record's key.
    pub(in crate::state) number: u64,
    /// Whose state.
    pub(in crate::state) tenant: TenantId,
    /// Of which workload.
    pub(in crate::state) workload: WorkloadId,
    /// The claim that wrote it.
    pub(in crate::state) epoch: Epoch,
    /// The attempt that wrote it.
    pub(in crate::state) nonce: String,
    /// When, milliseconds since the epoch.
    pub(in crate::state) created_ms: u64,
    /// What was done.
    pub(in crate::state) kind: RecordKind,
    /// The identity of the server that wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) server: Option<String>,
    /// The number of the ownership of the store under which it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) term: Option<u64>,
    /// Whose claim is open after this record; none: nobody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) holder: Option<Holder>,
    /// The newest tree after this record; none: there is none yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) tree: Option<RecordTree>,
}

/// What a record stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::state) enum RecordKind {
    /// A tree was saved; the end of its claim, too, when no holder is named.
    Snapshot,
    /// An old tree was made the newest again.
    Restore,
    /// A claim began.
    Open,
    /// A claim ended and left nothing to save.
    Close,
}

/// Whose claim is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Holder {
    /// The identity of its server.
    pub(in crate::state) server: String,
    /// The claim.
    pub(in crate::state) epoch: Epoch,
}

/// A tree, as every record that has it carries it on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct RecordTree {
    /// The record that made it the newest.
    pub(in crate::state) snapshot: u64,
    /// The claim that wrote that record.
    pub(in crate::state) epoch: Epoch,
    /// The attempt that wrote that record.
    pub(in crate::state) nonce: String,
    /// The manifest's name, which has its blake3.
    pub(in crate::state) manifest: ObjectName,
    /// When that record was written, milliseconds since the epoch.
    pub(in crate::state) created_ms: u64,
    /// Regular files.
    pub(in crate::state) files: u64,
    /// Their bytes.
    pub(in crate::state) bytes: u64,
    /// Sockets, FIFOs and devices that were left out.
    pub(in crate::state) skipped: u64,
    /// Whether the claim that left this tree failed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::state) failed_claim: bool,
    /// The snapshot that was made the newest again with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) restored_from: Option<u64>,
}

/// A record of version 0: always a snapshot.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordV0 {
    #[serde(rename = "version")]
    _version: u32,
    number: u64,
    tenant: TenantId,
    workload: WorkloadId,
    epoch: Epoch,
    nonce: String,
    manifest: ObjectName,
    created_ms: u64,
    files: u64,
    bytes: u64,
    skipped: u64,
    failed_claim: bool,
}

// === impl Record ===

impl Record {
    /// Writes the record as JSON.
    pub(in crate::state) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a record has only text keys")
    }

    /// Reads a record and checks that it is `number` of `key`.
    ///
    /// # Errors
    /// Says in what way it is not.
    pub(in crate::state) fn decode(body: &[u8], key: &Key, number: u64) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        if body.len() as u64 > RECORD_BYTES {
            return Err(format!("it has more than {RECORD_BYTES} bytes"));
        }
        // A later version may have fields of its own: it is named before they are complained about.
        let Versioned { version } = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let record: Self = match version {
            0 => serde_json::from_slice::<RecordV0>(body).map_err(|error| error.to_string())?.into(),
            RECORD_VERSION => serde_json::from_slice(body).map_err(|error| error.to_string())?,
            _ => {
                return Err(format!(
                    "it has format version {version}, this server reads 0 to {RECORD_VERSION}"
                ));
            }
        };
        if record.tenant != key.tenant || record.workload != key.workload {
            return Err(format!("it is of {}/{}", record.tenant, record.workload));
        }
        if record.number != number {
            return Err(format!("its number is {}", record.number));
        }
        let Some(tree) = &record.tree else {
            return match record.kind {
                RecordKind::Open | RecordKind::Close => Ok(record),
                RecordKind::Snapshot | RecordKind::Restore => Err("it has no tree".into()),
            };
        };
        if tree.manifest.kind.layout().is_none() {
            return Err(format!("its manifest is named {}", tree.manifest));
        }
        let is_own = matches!(record.kind, RecordKind::Snapshot | RecordKind::Restore);
        if tree.snapshot > number || is_own != (tree.snapshot == number) {
            return Err(format!("its tree is of record {}", tree.snapshot));
        }
        Ok(record)
    }

    /// Describes the newest tree after this record, if there is one.
    pub(in crate::state) fn snapshot(&self, key_digest: &str) -> Option<SnapshotRef> {
        let tree = self.tree.as_ref()?;
        Some(SnapshotRef {
            number: tree.snapshot,
            epoch: tree.epoch,
            nonce: tree.nonce.clone(),
            manifest: object_key(key_digest, &tree.manifest),
            created_ms: tree.created_ms,
            files: tree.files,
            bytes: tree.bytes,
        })
    }
}

impl From<RecordV0> for Record {
    fn from(old: RecordV0) -> Self {
        let tree = RecordTree {
            snapshot: old.number,
            epoch: old.epoch,
            nonce: old.nonce.clone(),
            manifest: old.manifest,
            created_ms: old.created_ms,
            files: old.files,
            bytes: old.bytes,
            skipped: old.skipped,
            failed_claim: old.failed_claim,
            restored_from: None,
        };
        Self {
            version: RECORD_VERSION,
            number: old.number,
            tenant: old.tenant,
            workload: old.workload,
            epoch: old.epoch,
            nonce: old.nonce,
            created_ms: old.created_ms,
            kind: RecordKind::Snapshot,
            server: None,
            term: None,
            holder: None,
            tree: Some(tree),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::name::ObjectKind, *};

    fn key() -> Key {
        Key::new(TenantId::new("t").unwrap(), WorkloadId::new("w").unwrap())
    }

    fn snapshot(number: u64) -> Record {
        let manifest = ObjectName::of(ObjectKind::Manifest, Epoch(7), b"m");
        let nonce = "n".to_owned();
        Record {
            version: RECORD_VERSION,
            number,
            tenant: key().tenant,
            workload: key().workload,
            epoch: Epoch(7),
            nonce: nonce.clone(),
            created_ms: 5,
            kind: RecordKind::Snapshot,
            server: Some("host-a".to_owned()),
            term: Some(2),
            holder: Some(Holder { server: "host-a".to_owned(), epoch: Epoch(7) }),
            tree: Some(RecordTree {
                snapshot: number,
                epoch: Epoch(7),
                nonce,
                manifest,
                created_ms: 5,
                files: 1,
                bytes: 2,
                skipped: 3,
                failed_claim: true,
                restored_from: None,
            }),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let saved = snapshot(3);
        let open = Record { number: 4, kind: RecordKind::Open, ..saved.clone() };
        let first = Record { number: 1, kind: RecordKind::Open, tree: None, holder: None, ..saved.clone() };
        for record in [saved, open, first] {
            assert_eq!(Record::decode(&record.encode(), &key(), record.number), Ok(record));
        }
    }

    #[test]
    fn version_0_is_read() {
        let manifest = ObjectName::of(ObjectKind::Manifest, Epoch(7), b"m");
        let body = format!(
            r#"{{"version":0,"number":3,"tenant":"t","workload":"w","epoch":7,"nonce":"n","manifest":"{manifest}",
            "created_ms":5,"files":1,"bytes":2,"skipped":3,"failed_claim":true}}"#
        );
        let read = Record::decode(body.as_bytes(), &key(), 3).unwrap();
        assert_eq!(read, Record { server: None, term: None, holder: None, ..snapshot(3) });
    }

    #[test]
    fn a_bad_record_is_refused_with_its_reason() {
        let good = snapshot(3);
        let other = Key::new(TenantId::new("o").unwrap(), key().workload);
        let tree = |change: &dyn Fn(&mut RecordTree)| {
            let mut tree = good.tree.clone().unwrap();
            change(&mut tree);
            Record { tree: Some(tree), ..good.clone() }
        };
        let pack = ObjectName::of(ObjectKind::Pack, Epoch(7), b"m");
        let rows = [
            (good.clone(), &other, 3, "of t/w"),
            (good.clone(), &key(), 4, "number is 3"),
            (Record { version: 9, ..good.clone() }, &key(), 3, "format version 9"),
            (Record { tree: None, ..good.clone() }, &key(), 3, "no tree"),
            (Record { kind: RecordKind::Open, ..good.clone() }, &key(), 3, "tree is of record 3"),
            (tree(&|tree| tree.snapshot = 2), &key(), 3, "tree is of record 2"),
            (tree(&|tree| tree.manifest = pack), &key(), 3, "manifest is named"),
        ];
        for (record, key, number, reason) in rows {
            let error = Record::decode(&record.encode(), key, number).unwrap_err();
            assert!(error.contains(reason), "{error:?} does not say {reason:?}");
        }
    }
}
