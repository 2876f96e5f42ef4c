//! From a tree at rest to a manifest and the objects it needs.

use std::{fs::File, io::Read, os::unix::fs::FileExt};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::{
    disk::{self, Dir, Entry, Kind, Limits, Missing, Stat},
    model::{Epoch, Key, Owner},
};

use super::{
    Error, Save,
    restore::Parents,
    snapshot::{
        CHUNK_BYTES, Digest, Item, Manifest, Meta, Node, ObjectKind, ObjectName, PACKED_FILE_BYTES, Packer,
        Piece, RawText, Reuse, StoredObject, VERSION,
    },
};

/// How often a file may change while it is read before that is an error.
const READS: u32 = 3;

/// A tree, ready to be committed.
pub(super) struct Collected {
    /// The manifest as an object.
    pub(super) manifest: StoredObject,
    /// Regular files.
    pub(super) files: u64,
    /// Their bytes.
    pub(super) bytes: u64,
    /// Sockets, FIFOs and devices.
    pub(super) skipped: u64,
}

/// What is asked of a collection.
pub(super) struct Request {
    pub(super) key: Key,
    pub(super) epoch: Epoch,
    pub(super) run_as: Owner,
    pub(super) exclude: GlobSet,
    pub(super) max_bytes: Option<u64>,
    pub(super) reuse: Reuse,
}

/// Compiles the globs of `persist.exclude`: relative to the state directory, `*`
/// and `?` stay within one name, `**` does not; an excluded directory is excluded
/// with all that is in it.
///
/// # Errors
/// [`Error::File`] names the glob.
pub(super) fn excludes(save: &Save) -> Result<GlobSet, Error> {
    let refused = |glob: &str, error: globset::Error| Error::File {
        path: glob.to_owned(),
        reason: format!("no glob: {}", error.kind()),
    };
    let mut set = GlobSetBuilder::new();
    for glob in &save.persist.exclude {
        let built = GlobBuilder::new(glob).literal_separator(true).backslash_escape(true).build();
        set.add(built.map_err(|error| refused(glob, error))?);
    }
    set.build().map_err(|error| refused("persist.exclude", error))
}

/// Reads the tree below `root`, gives every object that the store needs to
/// `send`, and answers the manifest. At most two objects are in memory here.
///
/// # Errors
/// [`Error::Limit`], [`Error::Disk`], and what `send` answers.
pub(super) fn collect(
    root: &Dir,
    request: Request,
    send: &mut dyn FnMut(StoredObject) -> Result<(), Error>,
) -> Result<Collected, Error> {
    use std::os::unix::ffi::OsStrExt;
    let key = request.key;
    let is_kept = |path: &[u8], _: &Stat| !request.exclude.is_match(std::ffi::OsStr::from_bytes(path));
    let entries = disk::list(root, &Limits::TREE, Missing::Error, is_kept)
        .map_err(|error| Error::of_list(&key, error))?;
    check_bytes(&key, &entries, request.max_bytes)?;
    let mut collector = Collector { packer: Packer::new(request.epoch, request.reuse), send };
    let mut items = Vec::with_capacity(entries.len());
    let mut skipped = 0;
    let mut parents = Parents::new(root);
    for entry in entries {
        let (meta, node) = match entry.stat.kind {
            Kind::Other => {
                skipped += 1;
                continue;
            }
            Kind::Directory => (Meta::from(&entry.stat), Node::Directory),
            Kind::Symlink => {
                let target = RawText(entry.target.unwrap_or_default());
                (Meta::from(&entry.stat), Node::Symlink { target })
            }
            Kind::File => {
                let (parent, name) = parents.of(&entry.path)?;
                collector.file(parent, name)?
            }
        };
        items.push(Item { path: RawText(entry.path), meta, node });
    }
    let objects = collector.finish()?;
    let manifest = Manifest {
        version: VERSION,
        tenant: key.tenant.clone(),
        workload: key.workload.clone(),
        epoch: request.epoch,
        run_as: request.run_as,
        objects,
        root: Meta::from(&root.stat()?),
        items,
    };
    let (files, bytes) = manifest.totals();
    let body = manifest.encode().map_err(|reason| Error::Limit { key, reason })?;
    let name = ObjectName::of(ObjectKind::Manifest, request.epoch, &body);
    Ok(Collected { manifest: StoredObject { name, body: body.into() }, files, bytes, skipped })
}

fn check_bytes(key: &Key, entries: &[Entry], max_bytes: Option<u64>) -> Result<(), Error> {
    let files = entries.iter().filter(|entry| entry.stat.kind == Kind::File);
    let sum = files.fold(0_u64, |sum, entry| sum.saturating_add(entry.stat.bytes));
    match max_bytes {
        Some(most) if sum > most => Err(Error::Limit {
            key: key.clone(),
            reason: format!("the files have {sum} bytes together, at most {most} are allowed"),
        }),
        _ => Ok(()),
    }
}

struct Collector<'a> {
    packer: Packer,
    send: &'a mut dyn FnMut(StoredObject) -> Result<(), Error>,
}

impl Collector<'_> {
    /// Reads one file. The tree is at rest; should it change all the same, the
    /// file is read again, and an error in the end: never a mixture.
    fn file(&mut self, parent: &Dir, name: &[u8]) -> Result<(Meta, Node), Error> {
        let failed = |error| disk::Error::new("read", parent.label(name), error);
        for _ in 0..READS {
            let (file, before) = parent.open_file(name)?;
            let (digest, pieces) = if before.bytes < PACKED_FILE_BYTES {
                let mut content = Vec::with_capacity(usize::try_from(before.bytes).unwrap_or(0) + 1);
                (&file).take(PACKED_FILE_BYTES).read_to_end(&mut content).map_err(failed)?;
                if content.len() as u64 != before.bytes || Stat::of_file(&file).map_err(failed)? != before {
                    continue;
                }
                self.small(&content)?
            } else {
                match self.large(&file, before.bytes).map_err(|error| error.named(parent, name))? {
                    Some(stored) if Stat::of_file(&file).map_err(failed)? == before => stored,
                    _ => continue,
                }
            };
            return Ok((Meta::from(&before), Node::File { bytes: before.bytes, digest, pieces }));
        }
        let error = std::io::Error::other("it changes while it is read, though nothing should run");
        Err(failed(error).into())
    }

    fn small(&mut self, content: &[u8]) -> Result<(Digest, Vec<Piece>), Error> {
        let digest = Digest::of(content);
        let (pieces, full) = self
            .packer
            .small(digest, content)
            .map_err(|error| disk::Error::new("compress", "a pack", error))?;
        if let Some(object) = full {
            (self.send)(object)?;
        }
        Ok((digest, pieces))
    }

    /// Reads a large file chunk by chunk; `None` when it ends early.
    fn large(&mut self, file: &File, bytes: u64) -> Result<Option<(Digest, Vec<Piece>)>, ReadError> {
        let mut hasher = blake3::Hasher::new();
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < bytes {
            let length = (bytes - at).min(CHUNK_BYTES as u64);
            let mut content = vec![0; usize::try_from(length).unwrap_or(CHUNK_BYTES)];
            match file.read_exact_at(&mut content, at) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(ReadError::Read(error)),
            }
            hasher.update(&content);
            let (piece, object) = self.packer.chunk(content);
            pieces.push(piece);
            if let Some(object) = object {
                (self.send)(object).map_err(ReadError::Send)?;
            }
            at += length;
        }
        Ok(Some((Digest(*hasher.finalize().as_bytes()), pieces)))
    }

    fn finish(self) -> Result<Vec<super::snapshot::ManifestObject>, Error> {
        let (last, objects) =
            self.packer.finish().map_err(|error| disk::Error::new("compress", "a pack", error))?;
        if let Some(object) = last {
            (self.send)(object)?;
        }
        Ok(objects)
    }
}

enum ReadError {
    Read(std::io::Error),
    Send(Error),
}

impl ReadError {
    fn named(self, parent: &Dir, name: &[u8]) -> Error {
        match self {
            Self::Read(error) => disk::Error::new("read", parent.label(name), error).into(),
            Self::Send(error) => error,
        }
    }
}
