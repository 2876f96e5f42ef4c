//! What a snapshot's manifest says, in JSON.

use std::io::{self, Write};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

use crate::{
    disk::{self, Time},
    model::{Epoch, Key, Owner, TenantId, WorkloadId, spec::Layout},
};

use super::{
    MANIFEST_BYTES, MANIFEST_VERSION,
    name::{Digest, ObjectKind, ObjectName},
};

const COMPRESSION_LEVEL: i32 = 1;

/// A tree: the root, everything below it, and where the contents are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct Manifest {
    /// 0 or [`MANIFEST_VERSION`].
    pub(in crate::state) version: u32,
    /// Whose state.
    pub(in crate::state) tenant: TenantId,
    /// Of which workload.
    pub(in crate::state) workload: WorkloadId,
    /// The claim that wrote it.
    pub(in crate::state) epoch: Epoch,
    /// Who the program ran as.
    pub(in crate::state) run_as: Owner,
    /// How its contents lie in the store.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(in crate::state) layout: Layout,
    /// The objects with contents; [`Piece`]s count from 0 here.
    pub(in crate::state) objects: Vec<ManifestObject>,
    /// The state directory itself.
    pub(in crate::state) root: Meta,
    /// Its extended attributes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(in crate::state) root_xattrs: Vec<Xattr>,
    /// Everything below it, sorted by the bytes of the path.
    pub(in crate::state) items: Vec<Item>,
}

/// An object that holds contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::state) struct ManifestObject {
    /// Its name.
    pub(in crate::state) name: ObjectName,
    /// The size of what it holds.
    pub(in crate::state) bytes: u64,
    /// The blake3 of what a chunk holds, where that is not the one in its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) content: Option<Digest>,
    /// How that is stored; left out: a pack as [`Encoding::Zstd`], a chunk as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::state) encoding: Option<Encoding>,
    /// Whether it is sealed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::state) sealed: bool,
}

/// How an object stores what it holds, before it is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::state) enum Encoding {
    /// As it is.
    Plain,
    /// As one zstd frame.
    Zstd,
}

/// An extended attribute: `[name, value]`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(in crate::state) struct Xattr(pub(in crate::state) RawText, pub(in crate::state) RawText);

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
    /// Extended attributes, sorted by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(in crate::state) xattrs: Vec<Xattr>,
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
        /// Of a file in one pack: the blake3 of its data. Of one in chunks: the blake3
        /// of its chunks' digests, 32 bytes each, one after the other; in version 0
        /// of its data.
        digest: Digest,
        /// Where its data is, in order; none for a file without any.
        pieces: Vec<Piece>,
        /// Where it has no data, as `[offset, bytes]`, in order. The data fills the rest.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        holes: Vec<(u64, u64)>,
    },
    /// A symbolic link and where it says it leads.
    Symlink {
        /// Any bytes but zero.
        target: RawText,
    },
    /// One more name of a file or symbolic link that comes earlier.
    HardLink {
        /// The path of that entry, which is no hard link itself.
        to: RawText,
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

    /// Reads a manifest that is not sealed and checks every rule of the format.
    ///
    /// # Errors
    /// Names the first entry at fault and how.
    pub(in crate::state) fn decode(body: &[u8], key: &Key) -> Result<Self, String> {
        let json = decompress(body, MANIFEST_BYTES, 0).map_err(|error| error.to_string())?;
        check_version(&json)?;
        let manifest: Self = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
        if manifest.tenant != key.tenant || manifest.workload != key.workload {
            return Err(format!("it is of {}/{}", manifest.tenant, manifest.workload));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Returns the number of regular files and of their bytes, holes with them; a
    /// file with several names counts once.
    pub(in crate::state) fn totals(&self) -> (u64, u64) {
        self.items.iter().fold((0, 0), |(files, total): (u64, u64), item| match item.node {
            Node::File { bytes, .. } => (files + 1, total.saturating_add(bytes)),
            _ => (files, total),
        })
    }

    /// Returns the bytes that a restore writes.
    pub(in crate::state) fn data_bytes(&self) -> u64 {
        if self.layout == Layout::Mirror {
            let data = self.items.iter().map(|item| match &item.node {
                Node::File { bytes, holes, .. } => {
                    bytes - holes.iter().map(|(_, length)| length).sum::<u64>()
                }
                _ => 0,
            });
            return data.fold(0, u64::saturating_add);
        }
        let pieces = self.items.iter().filter_map(|item| match &item.node {
            Node::File { pieces, .. } => Some(pieces.iter().map(|piece| piece.bytes)),
            _ => None,
        });
        pieces.flatten().fold(0, u64::saturating_add)
    }

    /// Returns whether these pieces are of a file in one pack.
    pub(in crate::state) fn is_packed(&self, pieces: &[Piece]) -> bool {
        pieces
            .first()
            .and_then(|piece| self.objects.get(piece.object as usize))
            .is_some_and(|object| object.name.kind == ObjectKind::Pack)
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

fn is_default(layout: &Layout) -> bool {
    *layout == Layout::default()
}

/// Decompresses one zstd frame of at most `most` bytes, into a buffer that has room
/// for `expected` from the start.
///
/// # Errors
/// Damage, or more bytes than allowed.
pub(in crate::state) fn decompress(body: &[u8], most: usize, expected: usize) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut bytes = Vec::with_capacity(expected.min(most) + 1);
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
    if version <= MANIFEST_VERSION {
        Ok(())
    } else {
        Err(format!("it has format version {version}, this server reads 0 to {MANIFEST_VERSION}"))
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
pub(super) mod tests;
