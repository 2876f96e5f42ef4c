//! From a snapshot in the store to a verified tree in the cache.

mod mirror;

use std::{borrow::Cow, fs::File, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::{
    disk::{self, Dir, Optional},
    model::{Key, Owner, SnapshotRef, spec::Layout},
};

use super::{
    Error, Fill, HostFiles, Inner, Lane,
    budget::bytes_of,
    fill::{TREE, map_access_list, map_owner},
    slot::write_new,
    snapshot::{
        Digest, Fetch, Item, Manifest, Meta, Node, ObjectCodec, ObjectKind, ObjectName, Part, Piece, Place,
        Xattr, damaged, key_prefix, object_key, plan,
    },
    staging::Staging,
};

/// In a key's directory of the cache: which snapshot the tree is.
pub(super) const FROM_NOTE: &[u8] = b"from.json";
/// Objects of one restore under way together; what those of all take in memory is
/// bounded by `Inner::fetching`.
const FETCHES: usize = 8;
/// Zeros are written as holes in pieces of this size.
const HOLE_BYTES: usize = 4_096;

#[derive(Serialize, Deserialize)]
struct FromNote {
    manifest: String,
}

/// Whose the restored files are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whom {
    /// Those of the program that saved them.
    AsSaved,
    /// Those of the program that runs as this owner, in place of that one and of another
    /// that it ran as before.
    For(Owner, Option<Owner>),
}

/// One restore: what is restored, for whom, and where.
pub(super) struct Restore {
    key: Key,
    key_digest: String,
    codec: ObjectCodec,
    manifest: Manifest,
    /// Permission bits that a new file does not get.
    umask: u32,
    /// Who owns a new file.
    creator: (u32, u32),
    previous: [Option<Owner>; 2],
    run_as: Owner,
    tree: Dir,
    // Dropped last: removes what is left.
    staging: Staging,
}

/// Returns the manifest of the snapshot that a key's cached tree is.
pub(super) fn restored_from(cached: &Dir) -> Result<Option<String>, Error> {
    let Some((file, _)) = cached.open_file(FROM_NOTE).optional()? else { return Ok(None) };
    let note: Option<FromNote> = serde_json::from_reader(std::io::BufReader::new(file)).ok();
    Ok(note.map(|note| note.manifest))
}

// === impl HostFiles ===

impl HostFiles {
    /// Restores a snapshot into staging, verifies every byte, and moves it into
    /// the cache; answers the bytes fetched. What was cached for this key is set
    /// aside, unless it is empty.
    ///
    /// # Cancel safety
    /// Dropped, it leaves nothing behind but staging that is being removed.
    ///
    /// # Errors
    /// [`Error::Damaged`] when anything is missing or not what its name says;
    /// [`Error::Store`], [`Error::Disk`]. The cache is not touched then.
    pub(super) async fn restore(&self, fill: &Fill, snapshot: &SnapshotRef) -> Result<u64, Error> {
        let whom = Whom::For(fill.run_as, fill.previous_owner);
        let (restore, fetched) = self.restore_aside(&fill.key, whom, snapshot).await?;
        let manifest = snapshot.manifest.clone();
        let holder = self.run(Lane::Restore, move |inner| restore.publish(inner, &manifest)).await?;
        self.inner.syncs.restored(&fill.key.digest(), holder, snapshot.manifest.clone());
        Ok(fetched)
    }

    /// Restores a snapshot into staging and verifies every byte; answers the bytes
    /// fetched, too. Dropped, what was restored goes.
    ///
    /// # Errors
    /// As [`HostFiles::restore`].
    pub(super) async fn restore_aside(
        &self,
        key: &Key,
        whom: Whom,
        snapshot: &SnapshotRef,
    ) -> Result<(Arc<Restore>, u64), Error> {
        let key_digest = key.digest();
        let name = snapshot.manifest.strip_prefix(&key_prefix(&key_digest)).and_then(ObjectName::parse);
        let name = name
            .filter(|name| name.kind.layout().is_some())
            .ok_or_else(|| damaged(key, format!("{:?} is no manifest of it", snapshot.manifest)))?;
        let body = self.object(key, &key_digest, &name, None).await?;
        let mut fetched = body.len() as u64;
        let restore = {
            let key = key.clone();
            self.run(Lane::Restore, move |inner| Restore::begin(inner, key, whom, key_digest, &name, body))
                .await?
        };
        let restore = Arc::new(restore);
        if restore.manifest.layout == Layout::Mirror {
            fetched += self.fetch_mirror(&restore).await?;
        }
        let objects = stream::iter(plan(&restore.manifest))
            .map(|fetch| self.fetch(Arc::clone(&restore), fetch))
            .buffer_unordered(FETCHES);
        fetched += objects.try_fold(0, async |sum: u64, bytes: u64| Ok(sum + bytes)).await?;
        let finishing = Arc::clone(&restore);
        self.run(Lane::Restore, move |_| finishing.finish()).await?;
        Ok((restore, fetched))
    }

    /// Reads an object that must be there; of one that has more than `most` bytes, one
    /// more than that, which is no object. Without `most` the store's own limit holds.
    async fn object(
        &self,
        key: &Key,
        key_digest: &str,
        name: &ObjectName,
        most: Option<u64>,
    ) -> Result<Bytes, Error> {
        let store_key = object_key(key_digest, name);
        let store = &self.inner.store;
        let read = match most {
            Some(most) => store.get_range(&store_key, 0, most + 1).await,
            None => store.get(&store_key).await,
        };
        match read {
            Ok(Some(body)) => Ok(body),
            Ok(None) => Err(damaged(key, format!("{store_key} is not there"))),
            Err(source) => Err(Error::Store { key: key.clone(), source }),
        }
    }

    async fn fetch(&self, restore: Arc<Restore>, fetch: Fetch) -> Result<u64, Error> {
        let place = self.inner.fetching.hold(bytes_of(&fetch.object)).await;
        let most = Some(fetch.object.stored_bytes());
        let body = self.object(&restore.key, &restore.key_digest, &fetch.object.name, most).await?;
        let bytes = body.len() as u64;
        self.run(Lane::Restore, move |_| {
            let _place = place;
            restore.put_object(&fetch, body)
        })
        .await?;
        Ok(bytes)
    }
}

// === impl Restore ===

impl Restore {
    /// Checks the manifest; makes directories, and files that are not in one pack at
    /// their size.
    fn begin(
        inner: &Arc<Inner>,
        key: Key,
        whom: Whom,
        key_digest: String,
        name: &ObjectName,
        body: Bytes,
    ) -> Result<Self, Error> {
        let codec = inner.encryption.codec(&key);
        let manifest = codec.decode_manifest(name, body).map_err(|error| Error::of_codec(&key, error))?;
        let (run_as, previous_owner) = match whom {
            Whom::AsSaved => (manifest.run_as, None),
            Whom::For(run_as, previous_owner) => (run_as, previous_owner),
        };
        let staging = Staging::make(inner, "restore")?;
        let dir = staging.dir()?;
        check_room(&dir, &manifest)?;
        let (umask, creator) = creation(&dir)?;
        let restore = Self {
            key,
            key_digest,
            codec,
            previous: [Some(manifest.run_as), previous_owner],
            manifest,
            umask,
            creator,
            run_as,
            tree: dir.ensure_dir(TREE)?,
            staging,
        };
        let mut parents = Parents::new(&restore.tree);
        for item in &restore.manifest.items {
            match &item.node {
                Node::Symlink { .. } | Node::HardLink { .. } => {}
                Node::Directory => {
                    let (parent, name) = parents.of(&item.path.0)?;
                    parent.make_dir(name)?;
                }
                Node::File { pieces, .. } if restore.manifest.is_packed(pieces) => {}
                Node::File { bytes, pieces, .. } => {
                    let (parent, name) = parents.of(&item.path.0)?;
                    let file = restore.create(parent, name, item)?;
                    if *bytes > 0 {
                        file.set_len(*bytes)
                            .map_err(|error| disk::Error::new("truncate", parent.label(name), error))?;
                    }
                    if pieces.is_empty() && (*bytes == 0 || restore.manifest.layout == Layout::Snapshot) {
                        restore.set_file(&file, item, parent, name)?;
                    }
                }
            }
        }
        Ok(restore)
    }

    /// Verifies an object and puts its parts into their files.
    fn put_object(&self, fetch: &Fetch, body: Bytes) -> Result<(), Error> {
        let content =
            self.codec.decode(&fetch.object, body).map_err(|error| Error::of_codec(&self.key, error))?;
        let mut parents = Parents::new(&self.tree);
        for part in &fetch.parts {
            self.put_part(&mut parents, part, &content, fetch.object.name.kind)?;
        }
        Ok(())
    }

    fn put_part(
        &self,
        parents: &mut Parents<'_>,
        part: &Part,
        content: &[u8],
        kind: ObjectKind,
    ) -> Result<(), Error> {
        let item = &self.manifest.items[part.item];
        let Node::File { bytes, digest, holes, .. } = &item.node else { return Ok(()) };
        let out_of_range = || self.damaged(format!("{} is cut off", disk::shown(&item.path.0)));
        let start = usize::try_from(part.offset).map_err(|_| out_of_range())?;
        let length = usize::try_from(part.bytes).map_err(|_| out_of_range())?;
        let content = content.get(start..).and_then(|rest| rest.get(..length)).ok_or_else(out_of_range)?;
        let (parent, name) = parents.of(&item.path.0)?;
        let failed = |error| disk::Error::new("write", parent.label(name), error);
        if kind == ObjectKind::Chunk {
            let file = parent.open_file_for_writing(name)?;
            return Ok(write_data(&file, content, part.place, holes).map_err(failed)?);
        }
        if Digest::of(content) != *digest {
            return Err(self.damaged(format!("{} has another content", disk::shown(&item.path.0))));
        }
        let file = self.create(parent, name, item)?;
        if holes.is_empty() {
            file.write_all_at(content, 0).map_err(failed)?;
        } else {
            file.set_len(*bytes).map_err(failed)?;
            write_data(&file, content, part.place, holes).map_err(failed)?;
        }
        self.set_file(&file, item, parent, name)
    }

    /// Returns whose files they are.
    pub(super) fn run_as(&self) -> Owner {
        self.run_as
    }

    /// Returns the restored tree.
    pub(super) fn tree(&self) -> &Dir {
        &self.tree
    }

    /// Makes links, and sets what is left of the metadata.
    fn finish(&self) -> Result<(), Error> {
        let mut parents = Parents::new(&self.tree);
        for item in &self.manifest.items {
            match &item.node {
                Node::File { pieces, .. } if pieces.is_empty() || self.manifest.is_packed(pieces) => {}
                Node::File { digest, pieces, .. } => {
                    let (parent, name) = parents.of(&item.path.0)?;
                    let (file, _) = parent.open_file(name)?;
                    self.check_chunks(&file, item, *digest, pieces)?;
                    self.set_file(&file, item, parent, name)?;
                }
                Node::Symlink { target } => {
                    let (uid, gid) = self.owner(&item.meta);
                    let (parent, name) = parents.of(&item.path.0)?;
                    parent.make_symlink(name, &target.0)?;
                    parent.set_owner_of(name, uid, gid)?;
                    parent.set_modified_of(name, item.meta.modified)?;
                }
                Node::HardLink { to } => {
                    let (of_first, first) = disk::split_last(&to.0);
                    let of_first = self.tree.open_dir(of_first)?;
                    let (parent, name) = parents.of(&item.path.0)?;
                    of_first.link_to(first, parent, name)?;
                }
                Node::Directory => {}
            }
        }
        // Nothing is made in any directory from here on: their times hold.
        for item in &self.manifest.items {
            if item.node == Node::Directory {
                self.set_dir(&self.tree.open_dir(&item.path.0)?, &item.meta, &item.xattrs)?;
            }
        }
        self.set_dir(&self.tree, &self.manifest.root, &self.manifest.root_xattrs)
    }

    /// Reads a file of version 0 again: only its whole content had a digest then.
    /// Since, each chunk has been verified, and the manifest says which they are.
    fn check_chunks(&self, file: &File, item: &Item, digest: Digest, pieces: &[Piece]) -> Result<(), Error> {
        if self.manifest.version > 0 || pieces.is_empty() {
            return Ok(());
        }
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader(file)
            .map_err(|error| disk::Error::new("read", disk::shown(&item.path.0), error))?;
        if hasher.finalize() == digest.0 {
            Ok(())
        } else {
            Err(self.damaged(format!("{} has another content", disk::shown(&item.path.0))))
        }
    }

    /// Moves the tree into the cache; answers its directory there. Nobody waits for the
    /// disk: see `syncs`.
    pub(super) fn publish(&self, inner: &Inner, manifest: &str) -> Result<Dir, Error> {
        let staged = self.staging.dir()?;
        let note = FromNote { manifest: manifest.to_owned() };
        write_new(&staged, FROM_NOTE, &serde_json::to_vec(&note).expect("a note has only text keys"))?;
        inner.record_restored(&self.key_digest, &staged, &self.tree, manifest)?;
        match inner.cached_tree(&self.key)? {
            Some(tree) if !tree.is_empty()? => {
                inner.set_cached_aside(&self.key_digest, "a snapshot was restored in its place")?;
            }
            _ => disk::remove(&inner.layout.cache, self.key_digest.as_bytes())?,
        }
        let name = self.staging.name().as_bytes();
        inner.layout.staging.move_to(name, &inner.layout.cache, self.key_digest.as_bytes())?;
        Ok(staged)
    }

    fn owner(&self, meta: &Meta) -> (u32, u32) {
        let previous = self.previous.iter().flatten();
        let mapped = previous
            .map(|previous| map_owner((meta.uid, meta.gid), *previous, self.run_as))
            .find(|mapped| *mapped != (meta.uid, meta.gid));
        mapped.unwrap_or((meta.uid, meta.gid))
    }

    /// Returns the value that an attribute gets: who is named in an access list changes as
    /// owners do.
    fn value<'a>(&self, name: &[u8], value: &'a [u8]) -> Cow<'a, [u8]> {
        let previous = self.previous.iter().flatten();
        previous.fold(Cow::Borrowed(value), |value, previous| {
            map_access_list(name, &value, *previous, self.run_as).map_or(value, Cow::Owned)
        })
    }

    /// Returns the mode that a file gets: set-id bits would give its owner's rights to
    /// whoever can run it, on this host as well. A program inside has no use for them.
    fn mode(item: &Item) -> u32 {
        item.meta.mode & !0o6000
    }

    fn create(&self, parent: &Dir, name: &[u8], item: &Item) -> Result<File, Error> {
        Ok(parent.create_file_with_mode(name, Self::mode(item))?)
    }

    /// Gives a file that was created here what it does not have yet.
    fn set_file(&self, file: &File, item: &Item, parent: &Dir, name: &[u8]) -> Result<(), Error> {
        let owner = Some(self.owner(&item.meta)).filter(|owner| *owner != self.creator);
        let mode = Some(Self::mode(item)).filter(|mode| mode & self.umask != 0);
        disk::set_new_file_metadata(file, owner, mode)
            .map_err(|error| disk::Error::new("set metadata of", parent.label(name), error))?;
        for Xattr(attribute, value) in &item.xattrs {
            let value = self.value(&attribute.0, &value.0);
            disk::set_attribute(file, &attribute.0, &value).map_err(|error| {
                let path = format!("{} of {}", disk::shown(&attribute.0), parent.label(name));
                disk::Error::new("set attribute", path, error)
            })?;
        }
        disk::set_file_modified(file, item.meta.modified)
            .map_err(|error| disk::Error::new("utimens", parent.label(name), error).into())
    }

    fn set_dir(&self, dir: &Dir, meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error> {
        let (uid, gid) = self.owner(meta);
        dir.set_owner(uid, gid)?;
        dir.set_mode(meta.mode)?;
        for Xattr(name, value) in xattrs {
            dir.set_attribute(&name.0, &self.value(&name.0, &value.0))?;
        }
        Ok(dir.set_modified(meta.modified)?)
    }

    fn damaged(&self, reason: String) -> Error {
        damaged(&self.key, reason)
    }
}

/// Opens parents of paths that come in order: the last one is kept open.
pub(super) struct Parents<'a> {
    root: &'a Dir,
    last: Option<(Vec<u8>, Dir)>,
}

impl<'a> Parents<'a> {
    pub(super) fn new(root: &'a Dir) -> Self {
        Self { root, last: None }
    }

    /// Opens the parent of `path`; answers it with the path's last name.
    pub(super) fn of<'p>(&mut self, path: &'p [u8]) -> Result<(&Dir, &'p [u8]), Error> {
        let (parent, name) = disk::split_last(path);
        let is_open = self.last.as_ref().is_some_and(|(last, _)| last == parent);
        let opened = if is_open { None } else { Some((parent.to_vec(), self.root.open_dir(parent)?)) };
        if let Some(opened) = opened {
            self.last = Some(opened);
        }
        let (_, dir) = self.last.as_ref().expect("it was set above unless it was there");
        Ok((dir, name))
    }
}

/// Finds out which permission bits a new file does not get, and whose it is.
fn creation(dir: &Dir) -> Result<(u32, (u32, u32)), Error> {
    const PROBE: &[u8] = b"probe";
    let file = dir.create_file_with_mode(PROBE, 0o777)?;
    let stat =
        disk::Stat::of_file(&file).map_err(|error| disk::Error::new("stat", dir.label(PROBE), error))?;
    dir.remove_file(PROBE)?;
    Ok((!stat.mode & 0o777, (stat.uid, stat.gid)))
}

/// Refuses a tree that the file system has no room for, before any of it is made: a
/// small object can be many large files.
fn check_room(dir: &Dir, manifest: &Manifest) -> Result<(), Error> {
    let entries = (manifest.items.len() as u64).saturating_mul(HOLE_BYTES as u64);
    let needed = manifest.data_bytes().saturating_add(entries);
    let free = dir.free_bytes()?;
    if needed <= free {
        return Ok(());
    }
    let problem = format!("the tree needs {needed} bytes, and {free} are free");
    let error = std::io::Error::new(std::io::ErrorKind::StorageFull, problem);
    Err(disk::Error::new("restore into", dir.label(b""), error).into())
}

/// Writes data between holes.
fn write_data(file: &File, content: &[u8], mut place: Place, holes: &[(u64, u64)]) -> std::io::Result<()> {
    let mut rest = content;
    while !rest.is_empty() {
        let (at, bytes) = place.next(holes, rest.len() as u64);
        let (run, behind) = rest.split_at(usize::try_from(bytes).unwrap_or(usize::MAX));
        write_sparsely(file, run, at)?;
        rest = behind;
    }
    Ok(())
}

/// Writes into a file of zeros, leaving out what is zero anyway.
fn write_sparsely(file: &File, content: &[u8], offset: u64) -> std::io::Result<()> {
    let mut start = 0;
    while start < content.len() {
        let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let blocks = content[start..].chunks(HOLE_BYTES);
        let zeros: usize = blocks.take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
        start += zeros;
        let blocks = content[start..].chunks(HOLE_BYTES);
        let data: usize = blocks.take_while(|block| !is_zero(block)).map(<[u8]>::len).sum();
        file.write_all_at(&content[start..start + data], offset + start as u64)?;
        start += data;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_become_holes_and_everything_else_is_written() {
        let mut content = vec![0; 5 * HOLE_BYTES + 17];
        content[HOLE_BYTES + 5] = 1;
        content[5 * HOLE_BYTES + 16] = 2;
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 + content.len() as u64).unwrap();
        write_sparsely(&file, &content, 3).unwrap();
        let mut back = vec![9; content.len()];
        file.read_exact_at(&mut back, 3).unwrap();
        assert_eq!(back, content);
    }
}
