//! What a snapshot's manifest and record say, in JSON.

use std::{
    collections::HashSet,
    io::{self, Write},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

use crate::{
    disk::{self, Time},
    model::{Epoch, Key, Owner, SnapshotRef, TenantId, WorkloadId},
};

use super::{
    CHUNK_BYTES, MANIFEST_BYTES, PACK_BYTES, PACKED_FILE_BYTES, VERSION,
    name::{Digest, ObjectKind, ObjectName},
};

const COMPRESSION_LEVEL: i32 = 1;

/// The content of a record; its existence is the snapshot's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Record {
    /// [`VERSION`].
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
    /// The manifest's name, which has its blake3.
    pub(in crate::state) manifest: ObjectName,
    /// When, milliseconds since the epoch.
    pub(in crate::state) created_ms: u64,
    /// Regular files.
    pub(in crate::state) files: u64,
    /// Their bytes.
    pub(in crate::state) bytes: u64,
    /// Sockets, FIFOs and devices that were left out.
    pub(in crate::state) skipped: u64,
    /// Whether the claim that left this tree failed.
    pub(in crate::state) failed_claim: bool,
}

/// A tree: the root, everything below it, and where the contents are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Manifest {
    /// [`VERSION`].
    pub(in crate::state) version: u32,
    /// Whose state.
    pub(in crate::state) tenant: TenantId,
    /// Of which workload.
    pub(in crate::state) workload: WorkloadId,
    /// The claim that wrote it.
    pub(in crate::state) epoch: Epoch,
    /// Who the program ran as.
    pub(in crate::state) run_as: Owner,
    /// The objects with contents; [`Piece`]s count from 0 here.
    pub(in crate::state) objects: Vec<ManifestObject>,
    /// The state directory itself.
    pub(in crate::state) root: Meta,
    /// Everything below it, sorted by the bytes of the path.
    pub(in crate::state) items: Vec<Item>,
}

/// An object that holds contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct ManifestObject {
    /// Its name.
    pub(in crate::state) name: ObjectName,
    /// Its size once decompressed.
    pub(in crate::state) bytes: u64,
}

/// Permissions, owner and time of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Meta {
    /// Permission bits with set-id and sticky bits, as a number.
    pub(in crate::state) mode: u32,
    /// Owning user.
    pub(in crate::state) uid: u32,
    /// Owning group.
    pub(in crate::state) gid: u32,
    /// Modification time: seconds since the epoch, nanoseconds of the second.
    pub(in crate::state) modified: Time,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Item {
    /// Names joined by slashes, relative to the root.
    pub(in crate::state) path: RawText,
    /// Permissions, owner and time.
    pub(in crate::state) meta: Meta,
    /// What it is.
    pub(in crate::state) node: Node,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(in crate::state) enum Node {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its size.
        bytes: u64,
        /// The blake3 of its content.
        digest: Digest,
        /// Where its content is, in order; none for an empty file.
        pieces: Vec<Piece>,
    },
    /// A symbolic link and where it says it leads.
    Symlink {
        /// Any bytes but zero.
        target: RawText,
    },
}

/// A part of an object: `[object, offset, bytes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64, u64)", into = "(u32, u64, u64)")]
pub(in crate::state) struct Piece {
    /// Which of [`Manifest::objects`].
    pub(in crate::state) object: u32,
    /// Where it begins in the decompressed object.
    pub(in crate::state) offset: u64,
    /// How long it is.
    pub(in crate::state) bytes: u64,
}

/// Bytes that are mostly text: a JSON string, or `{"base64": "…"}` when not UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "RawTextJson", into = "RawTextJson")]
pub(in crate::state) struct RawText(pub(in crate::state) Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum RawTextJson {
    Text(String),
    Raw { base64: String },
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
        check_version(body)?;
        let record: Self = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if record.tenant != key.tenant || record.workload != key.workload {
            return Err(format!("it is of {}/{}", record.tenant, record.workload));
        }
        if record.number != number {
            return Err(format!("its number is {}", record.number));
        }
        if record.manifest.kind != ObjectKind::Manifest {
            return Err(format!("its manifest is named {}", record.manifest));
        }
        Ok(record)
    }

    /// Describes the snapshot.
    pub(in crate::state) fn snapshot(&self, key_digest: &str) -> SnapshotRef {
        SnapshotRef {
            number: self.number,
            epoch: self.epoch,
            nonce: self.nonce.clone(),
            manifest: super::name::object_key(key_digest, &self.manifest),
            created_ms: self.created_ms,
            files: self.files,
            bytes: self.bytes,
        }
    }
}

// === impl Manifest ===

impl Manifest {
    /// Writes the manifest as compressed JSON.
    ///
    /// # Errors
    /// When the JSON is larger than [`MANIFEST_BYTES`].
    pub(in crate::state) fn encode(&self) -> Result<Vec<u8>, String> {
        let failed = |error: io::Error| error.to_string();
        let encoder = zstd::stream::Encoder::new(Vec::new(), COMPRESSION_LEVEL).map_err(failed)?;
        let mut writer = io::BufWriter::new(Capped { inner: encoder, left: MANIFEST_BYTES });
        serde_json::to_writer(&mut writer, self).map_err(|error| error.to_string())?;
        let capped = writer.into_inner().map_err(|error| error.to_string())?;
        capped.inner.finish().map_err(failed)
    }

    /// Reads a manifest and checks every rule of the format.
    ///
    /// # Errors
    /// Names the first entry at fault and how.
    pub(in crate::state) fn decode(body: &[u8], key: &Key) -> Result<Self, String> {
        let json = decompress(body, MANIFEST_BYTES).map_err(|error| error.to_string())?;
        check_version(&json)?;
        let manifest: Self = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
        if manifest.tenant != key.tenant || manifest.workload != key.workload {
            return Err(format!("it is of {}/{}", manifest.tenant, manifest.workload));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Returns the number of regular files and of their bytes.
    pub(in crate::state) fn totals(&self) -> (u64, u64) {
        self.items.iter().fold((0, 0), |(files, total), item| match item.node {
            Node::File { bytes, .. } => (files + 1, total + bytes),
            _ => (files, total),
        })
    }

    fn check(&self) -> Result<(), String> {
        for object in &self.objects {
            let most = match object.name.kind {
                ObjectKind::Pack => (PACK_BYTES as u64).saturating_add(PACKED_FILE_BYTES),
                ObjectKind::Chunk => CHUNK_BYTES as u64,
                ObjectKind::Manifest => return Err(format!("{} holds no content", object.name)),
            };
            if object.bytes == 0 || object.bytes > most {
                return Err(format!(
                    "{} has {} bytes, at most {most} are allowed",
                    object.name, object.bytes
                ));
            }
        }
        self.root.check().map_err(|problem| format!("the root {problem}"))?;
        let mut directories: HashSet<&[u8]> = HashSet::from([&b""[..]]);
        let mut last: Option<&RawText> = None;
        for item in &self.items {
            self.check_item(item, &directories, last)
                .map_err(|problem| format!("{} {problem}", disk::shown(&item.path.0)))?;
            if item.node == Node::Directory {
                directories.insert(&item.path.0);
            }
            last = Some(&item.path);
        }
        Ok(())
    }

    fn check_item(
        &self,
        item: &Item,
        directories: &HashSet<&[u8]>,
        last: Option<&RawText>,
    ) -> Result<(), String> {
        let path = disk::relative_path(&item.path.0).map_err(|problem| problem.to_string())?;
        if last.is_some_and(|last| *last >= item.path) {
            return Err("is there twice, or out of order".into());
        }
        if !directories.contains(disk::split_last(path).0) {
            return Err("is not in a directory".into());
        }
        item.meta.check()?;
        match &item.node {
            Node::Directory => Ok(()),
            Node::Symlink { target }
                if target.0.is_empty() || target.0.contains(&0) || target.0.len() > 4_095 =>
            {
                Err("is a link that leads nowhere".into())
            }
            Node::Symlink { .. } => Ok(()),
            Node::File { bytes, pieces, .. } => self.check_pieces(*bytes, pieces),
        }
    }

    fn check_pieces(&self, bytes: u64, pieces: &[Piece]) -> Result<(), String> {
        let mut sum = 0_u64;
        for piece in pieces {
            let object =
                self.objects.get(piece.object as usize).ok_or("names an object that is not there")?;
            let end = piece.offset.checked_add(piece.bytes).ok_or("has a piece without an end")?;
            let is_whole = piece.offset == 0 && piece.bytes == object.bytes;
            if piece.bytes == 0 || end > object.bytes || (object.name.kind == ObjectKind::Chunk && !is_whole)
            {
                return Err(format!("has a piece beyond {}", object.name));
            }
            if object.name.kind == ObjectKind::Pack && pieces.len() > 1 {
                return Err("is packed in more than one piece".into());
            }
            sum = sum.checked_add(piece.bytes).ok_or("is too large")?;
        }
        if sum == bytes { Ok(()) } else { Err(format!("has {bytes} bytes, but pieces of {sum}")) }
    }
}

impl Meta {
    fn check(&self) -> Result<(), String> {
        if self.mode > 0o7777 {
            return Err(format!("has mode {:o}", self.mode));
        }
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err("has an owner that is none".into());
        }
        if self.modified.nanoseconds >= 1_000_000_000 {
            return Err("has a time with too many nanoseconds".into());
        }
        Ok(())
    }
}

impl From<&disk::Stat> for Meta {
    fn from(stat: &disk::Stat) -> Self {
        Self { mode: stat.mode, uid: stat.uid, gid: stat.gid, modified: stat.modified }
    }
}

// === impl Piece ===

impl From<(u32, u64, u64)> for Piece {
    fn from((object, offset, bytes): (u32, u64, u64)) -> Self {
        Self { object, offset, bytes }
    }
}

impl From<Piece> for (u32, u64, u64) {
    fn from(piece: Piece) -> Self {
        (piece.object, piece.offset, piece.bytes)
    }
}

// === impl RawText ===

impl TryFrom<RawTextJson> for RawText {
    type Error = String;
    fn try_from(json: RawTextJson) -> Result<Self, String> {
        match json {
            RawTextJson::Text(text) => Ok(Self(text.into_bytes())),
            RawTextJson::Raw { base64 } => {
                STANDARD.decode(base64).map(Self).map_err(|error| format!("base64: {error}"))
            }
        }
    }
}

impl From<RawText> for RawTextJson {
    fn from(text: RawText) -> Self {
        match String::from_utf8(text.0) {
            Ok(text) => Self::Text(text),
            Err(error) => Self::Raw { base64: STANDARD.encode(error.as_bytes()) },
        }
    }
}

/// Decompresses one zstd frame of at most `most` bytes.
///
/// # Errors
/// Damage, or more bytes than allowed.
pub(in crate::state) fn decompress(body: &[u8], most: usize) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut bytes = Vec::new();
    let decoder = zstd::stream::Decoder::new(body)?;
    decoder.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(io::Error::other(format!("more than {most} bytes")));
    }
    Ok(bytes)
}

/// Compresses bytes into one zstd frame.
///
/// # Errors
/// Only when memory is short.
pub(in crate::state) fn compress(bytes: &[u8]) -> io::Result<Vec<u8>> {
    zstd::bulk::compress(bytes, COMPRESSION_LEVEL)
}

/// A later version may have fields of its own: it is named before they are complained about.
fn check_version(json: &[u8]) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version } = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if version == VERSION {
        Ok(())
    } else {
        Err(format!("it has format version {version}, this server reads {VERSION}"))
    }
}

struct Capped<W> {
    inner: W,
    left: usize,
}

impl<W: Write> Write for Capped<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.left = self
            .left
            .checked_sub(buffer.len())
            .ok_or_else(|| io::Error::other(format!("the manifest is larger than {MANIFEST_BYTES} bytes")))?;
        self.inner.write_all(buffer)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const META: Meta = Meta { mode: 0o644, uid: 1, gid: 2, modified: Time { seconds: -5, nanoseconds: 7 } };

    fn key() -> Key {
        Key::new(TenantId::new("t").unwrap(), WorkloadId::new("w").unwrap())
    }

    /// A manifest with files of these pieces; digests are not looked at here.
    pub(in crate::state::snapshot) fn manifest_of(
        objects: Vec<ManifestObject>,
        files: Vec<(&str, Vec<Piece>, u64)>,
    ) -> Manifest {
        let item = |(path, pieces, bytes): (&str, Vec<Piece>, u64)| Item {
            path: RawText(path.as_bytes().to_vec()),
            meta: META,
            node: Node::File { bytes, digest: Digest::of(path.as_bytes()), pieces },
        };
        Manifest {
            version: VERSION,
            tenant: key().tenant,
            workload: key().workload,
            epoch: Epoch(3),
            run_as: Owner { uid: 1, gid: 2 },
            objects,
            root: META,
            items: files.into_iter().map(item).collect(),
        }
    }

    fn pack(bytes: u64) -> ManifestObject {
        ManifestObject { name: ObjectName::of(ObjectKind::Pack, Epoch(1), b"p"), bytes }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let mut manifest =
            manifest_of(vec![pack(9)], vec![("a", vec![Piece { object: 0, offset: 2, bytes: 7 }], 7)]);
        let link = Node::Symlink { target: RawText(b"../\xff\n".to_vec()) };
        manifest.items.push(Item { path: RawText(b"\xfe".to_vec()), meta: META, node: Node::Directory });
        manifest.items.push(Item { path: RawText(b"\xfe/l".to_vec()), meta: META, node: link });
        assert_eq!(Manifest::decode(&manifest.encode().unwrap(), &key()), Ok(manifest));
    }

    /// Each row is a manifest that would lead a restore outside, or to wrong bytes.
    #[test]
    fn a_bad_manifest_is_refused_with_its_reason() {
        let piece = |offset, bytes| vec![Piece { object: 0, offset, bytes }];
        let file = |path: &'static str| manifest_of(vec![pack(9)], vec![(path, piece(0, 9), 9)]);
        let mut rows = vec![
            (file("/etc/passwd"), "absolute"),
            (file("../x"), "`..`"),
            (file("a/./b"), "`.`"),
            (file("a/b"), "not in a directory"),
            (manifest_of(vec![pack(9)], vec![("a", piece(0, 9), 9), ("a", piece(0, 9), 9)]), "twice"),
            (manifest_of(vec![pack(9)], vec![("b", piece(0, 9), 9), ("a", piece(0, 9), 9)]), "out of order"),
            (manifest_of(vec![pack(9)], vec![("a", piece(1, 9), 9)]), "beyond"),
            (manifest_of(vec![pack(9)], vec![("a", piece(u64::MAX, 2), 2)]), "without an end"),
            (manifest_of(vec![pack(9)], vec![("a", piece(0, 5), 9)]), "pieces of 5"),
            (manifest_of(vec![], vec![("a", piece(0, 9), 9)]), "not there"),
            (manifest_of(vec![pack(u64::MAX)], vec![]), "at most"),
        ];
        let mut other = file("a");
        other.tenant = TenantId::new("other").unwrap();
        rows.push((other, "other/w"));
        let mut later = file("a");
        later.version = 1;
        rows.push((later, "format version 1"));
        let mut through_link = file("l/x");
        let link = Node::Symlink { target: RawText(b"/etc".to_vec()) };
        through_link.items.insert(0, Item { path: RawText(b"l".to_vec()), meta: META, node: link });
        rows.push((through_link, "not in a directory"));
        for (manifest, reason) in rows {
            let error = Manifest::decode(&manifest.encode().unwrap(), &key()).unwrap_err();
            assert!(error.contains(reason), "{error:?} does not say {reason:?}");
        }
    }

    #[test]
    fn a_decompression_bomb_is_an_error() {
        let bomb = compress(&vec![0; 10_000_000]).unwrap();
        assert!(bomb.len() < 10_000);
        assert!(decompress(&bomb, 1_000_000).is_err());
        assert_eq!(decompress(&bomb, 10_000_000).unwrap().len(), 10_000_000);
    }
}
