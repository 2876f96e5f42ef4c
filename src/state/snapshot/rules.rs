//! The rules of a manifest, all of which a reader checks before it makes anything.

use std::collections::HashMap;

use crate::{
    disk::{self, Limits},
    model::spec::Layout,
    seal::{HEAD_BYTES, TAIL_BYTES},
};

use super::{
    ATTRIBUTE_BYTES, CHUNK_BYTES, FILE_BYTES, MANIFEST_VERSION, PACK_BYTES, PACKED_FILE_BYTES, TREE_HOLES,
    manifest::{Encoding, Item, Manifest, ManifestObject, Meta, Node, Piece, RawText, Xattr},
    name::{Digest, ObjectKind},
};

const ATTRIBUTE_VALUE_BYTES: usize = 64 * 1024;

/// What has been seen of a manifest so far.
#[derive(Default)]
struct Seen<'a> {
    /// Directories are `None`; what a hard link may lead to is the entry itself.
    entries: HashMap<&'a [u8], Option<&'a Item>>,
    last: Option<&'a RawText>,
    path_bytes: usize,
    attribute_bytes: usize,
    holes: usize,
}

impl Manifest {
    /// Checks every rule that does not need the objects.
    ///
    /// # Errors
    /// Names the first object or entry at fault and how.
    pub(in crate::state) fn check(&self) -> Result<(), String> {
        for object in &self.objects {
            object.check(self.version).map_err(|problem| format!("{} {problem}", object.name))?;
        }
        let mut seen = Seen { entries: HashMap::from([(&b""[..], None)]), ..Seen::default() };
        self.root.check().map_err(|problem| format!("the root {problem}"))?;
        seen.attributes(&self.root_xattrs).map_err(|problem| format!("the root {problem}"))?;
        if self.layout == Layout::Mirror && !self.objects.is_empty() {
            return Err("it names objects, which a mirror has not".into());
        }
        if self.items.len() > Limits::TREE.entries {
            return Err(format!("it has more than {} entries", Limits::TREE.entries));
        }
        for item in &self.items {
            self.check_item(item, &mut seen)
                .map_err(|problem| format!("{} {problem}", disk::shown(&item.path.0)))?;
            seen.last = Some(&item.path);
        }
        Ok(())
    }

    fn check_item<'a>(&self, item: &'a Item, seen: &mut Seen<'a>) -> Result<(), String> {
        let path = disk::relative_path(&item.path.0).map_err(|problem| problem.to_string())?;
        seen.path(path)?;
        if seen.last.is_some_and(|last| *last >= item.path) {
            return Err("is there twice, or out of order".into());
        }
        if seen.entries.get(disk::split_last(path).0) != Some(&None) {
            return Err("is not in a directory".into());
        }
        item.meta.check()?;
        seen.attributes(&item.xattrs)?;
        let is_old = self.version < MANIFEST_VERSION;
        if is_old && !item.xattrs.is_empty() {
            return Err("has attributes, which version 0 has not".into());
        }
        match &item.node {
            Node::Directory => {
                seen.entries.insert(path, None);
                return Ok(());
            }
            Node::Symlink { target }
                if target.0.is_empty() || target.0.contains(&0) || target.0.len() > 4_095 =>
            {
                return Err("is a link that leads nowhere".into());
            }
            Node::Symlink { .. } if item.xattrs.is_empty() => {}
            Node::File { bytes, digest, pieces, holes } => {
                if is_old && !holes.is_empty() {
                    return Err("has holes, which version 0 has not".into());
                }
                seen.holes(*bytes, holes)?;
                if self.layout == Layout::Mirror {
                    if !pieces.is_empty() {
                        return Err("has pieces, which a mirror has not".into());
                    }
                    seen.entries.insert(path, Some(item));
                    return Ok(());
                }
                self.check_pieces(*bytes, *digest, pieces, holes)?;
            }
            Node::HardLink { .. } if is_old => {
                return Err("is a hard link, which version 0 has not".into());
            }
            Node::HardLink { to } if item.xattrs.is_empty() => {
                return match seen.entries.get(to.0.as_slice()) {
                    Some(Some(first)) if first.meta == item.meta => Ok(()),
                    Some(Some(_)) => Err("differs from what it is the same as".into()),
                    _ => Err("is a hard link to nothing that comes earlier".into()),
                };
            }
            Node::Symlink { .. } | Node::HardLink { .. } => {
                return Err("has attributes, which a link has not".into());
            }
        }
        seen.entries.insert(path, Some(item));
        Ok(())
    }

    fn check_pieces(
        &self,
        bytes: u64,
        digest: Digest,
        pieces: &[Piece],
        holes: &[(u64, u64)],
    ) -> Result<(), String> {
        let mut sum = 0_u64;
        let mut chunks = blake3::Hasher::new();
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
            chunks.update(&object.content().0);
            sum = sum.checked_add(piece.bytes).ok_or("is too large")?;
        }
        let is_in_chunks = !pieces.is_empty() && !self.is_packed(pieces);
        if self.version > 0 && is_in_chunks && chunks.finalize() != digest.0 {
            return Err("has another digest than its chunks".into());
        }
        let data = bytes - holes.iter().map(|(_, length)| length).sum::<u64>();
        if sum == data { Ok(()) } else { Err(format!("has {data} bytes of data, but pieces of {sum}")) }
    }
}

impl ManifestObject {
    fn check(&self, version: u32) -> Result<(), String> {
        let most = match self.name.kind {
            ObjectKind::Pack => (PACK_BYTES as u64).saturating_add(PACKED_FILE_BYTES),
            ObjectKind::Chunk => CHUNK_BYTES as u64,
            ObjectKind::Manifest | ObjectKind::Mirror | ObjectKind::Kept => {
                return Err("holds no content".into());
            }
        };
        if self.bytes == 0 || self.bytes > most {
            return Err(format!("has {} bytes, at most {most} are allowed", self.bytes));
        }
        let is_old = self.content.is_none() && self.encoding.is_none() && !self.sealed;
        if version == 0 && !is_old {
            return Err("says more than version 0 has".into());
        }
        let is_as_named = !self.sealed && self.encoding() == Encoding::Plain;
        if self.name.kind == ObjectKind::Chunk && self.content.is_some() == is_as_named {
            return Err("needs a digest of its content exactly when its name is another".into());
        }
        Ok(())
    }

    /// Returns the most bytes that it may have in the store: what zstd makes of content
    /// that it cannot compress, and a seal. Nobody reads more of it.
    pub(in crate::state) fn stored_bytes(&self) -> u64 {
        let encoded = match self.encoding() {
            Encoding::Plain => self.bytes,
            Encoding::Zstd => self.bytes.saturating_add(self.bytes / 128 + 1_024),
        };
        if self.sealed { encoded.saturating_add((HEAD_BYTES + TAIL_BYTES) as u64) } else { encoded }
    }

    /// Returns how it stores what it holds.
    pub(in crate::state) fn encoding(&self) -> Encoding {
        self.encoding.unwrap_or(match self.name.kind {
            ObjectKind::Chunk => Encoding::Plain,
            ObjectKind::Pack | ObjectKind::Manifest | ObjectKind::Mirror | ObjectKind::Kept => Encoding::Zstd,
        })
    }

    /// Returns the blake3 of what a chunk holds.
    pub(in crate::state) fn content(&self) -> Digest {
        self.content.unwrap_or(self.name.digest)
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

impl Seen<'_> {
    fn path(&mut self, path: &[u8]) -> Result<(), String> {
        let limits = Limits::TREE;
        self.path_bytes += path.len();
        let names = path.split(|byte| *byte == b'/').count();
        for (has, most, what) in [
            (path.len(), limits.path_bytes, "bytes in one path"),
            (names, limits.depth, "names in one path"),
            (self.path_bytes, limits.total_bytes, "bytes of all paths together"),
        ] {
            if has > most {
                return Err(format!("has more than {most} {what}"));
            }
        }
        Ok(())
    }

    fn attributes(&mut self, xattrs: &[Xattr]) -> Result<(), String> {
        if !xattrs.is_sorted_by(|one, next| one.0 < next.0) {
            return Err("has an attribute twice, or out of order".into());
        }
        for Xattr(name, value) in xattrs {
            if !disk::is_kept_attribute(&name.0) {
                return Err(format!("has the attribute {}", disk::shown(&name.0)));
            }
            if value.0.len() > ATTRIBUTE_VALUE_BYTES {
                return Err(format!("has an attribute of more than {ATTRIBUTE_VALUE_BYTES} bytes"));
            }
            self.attribute_bytes += name.0.len() + value.0.len();
        }
        if self.attribute_bytes > ATTRIBUTE_BYTES {
            return Err(format!("has more than {ATTRIBUTE_BYTES} bytes of attributes, with those before it"));
        }
        Ok(())
    }

    fn holes(&mut self, bytes: u64, holes: &[(u64, u64)]) -> Result<(), String> {
        if bytes > FILE_BYTES {
            return Err(format!("has more than {FILE_BYTES} bytes"));
        }
        self.holes += holes.len();
        if self.holes > TREE_HOLES {
            return Err(format!("has more than {TREE_HOLES} holes, with those before it"));
        }
        let mut end = None;
        for (offset, length) in holes {
            // Data lies between two holes, or they were one.
            if *length == 0 || end.is_some_and(|end| *offset <= end) {
                return Err("has holes that overlap or are out of order".into());
            }
            end =
                offset.checked_add(*length).filter(|end| *end <= bytes).map(Some).ok_or("ends in a hole")?;
        }
        Ok(())
    }
}
