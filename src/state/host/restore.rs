//! From a snapshot in the store to a verified tree in the cache.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::{
    disk::{self, Dir, Optional},
    model::{Key, Owner, SnapshotRef},
};

use super::{
    Error, Fill, HostFiles, Inner, Lane,
    fill::{TREE, map_owner},
    slot::write_new,
    snapshot::{
        Digest, Fetch, Manifest, Meta, Node, ObjectKind, ObjectName, Part, damaged, decompress, key_prefix,
        object_key, plan,
    },
    staging::Staging,
};

/// In a key's directory of the cache: which snapshot the tree is.
pub(super) const FROM_NOTE: &[u8] = b"from.json";
/// Objects of one restore under way together; those of all are bounded by `Inner::fetches`.
const FETCHES: usize = 8;
/// Zeros are written as holes in pieces of this size.
const HOLE_BYTES: usize = 4_096;

#[derive(Serialize, Deserialize)]
struct FromNote {
    manifest: String,
}

/// One restore: what is restored, for whom, and where.
struct Restore {
    key: Key,
    key_digest: String,
    manifest: Manifest,
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
        let key_digest = fill.key.digest();
        let name = snapshot.manifest.strip_prefix(&key_prefix(&key_digest)).and_then(ObjectName::parse);
        let name = name
            .filter(|name| name.kind == ObjectKind::Manifest)
            .ok_or_else(|| damaged(&fill.key, format!("{:?} is no manifest of it", snapshot.manifest)))?;
        let body = self.object(&fill.key, &key_digest, &name).await?;
        let mut fetched = body.len() as u64;
        let restore = {
            let fill = fill.clone();
            self.run(Lane::Restore, move |inner| Restore::begin(inner, &fill, &key_digest, &name, &body))
                .await?
        };
        let restore = Arc::new(restore);
        let objects = stream::iter(plan(&restore.manifest))
            .map(|fetch| self.fetch(Arc::clone(&restore), fetch))
            .buffer_unordered(FETCHES);
        fetched += objects.try_fold(0, async |sum: u64, bytes: u64| Ok(sum + bytes)).await?;
        let manifest = snapshot.manifest.clone();
        self.run(Lane::Restore, move |inner| restore.finish(inner, &manifest)).await?;
        Ok(fetched)
    }

    /// Reads an object that must be there.
    async fn object(&self, key: &Key, key_digest: &str, name: &ObjectName) -> Result<bytes::Bytes, Error> {
        let store_key = object_key(key_digest, name);
        match self.inner.store.get(&store_key).await {
            Ok(Some(body)) => Ok(body),
            Ok(None) => Err(damaged(key, format!("{store_key} is not there"))),
            Err(source) => Err(Error::Store { key: key.clone(), source }),
        }
    }

    async fn fetch(&self, restore: Arc<Restore>, fetch: Fetch) -> Result<u64, Error> {
        let place = Arc::clone(&self.inner.fetches).acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        let body = self.object(&restore.key, &restore.key_digest, &fetch.object.name).await?;
        let bytes = body.len() as u64;
        self.run(Lane::Restore, move |_| {
            let _place = place;
            restore.put_object(&fetch, &body)
        })
        .await?;
        Ok(bytes)
    }
}

// === impl Restore ===

impl Restore {
    /// Checks the manifest; makes directories, empty files, and large ones at their size.
    fn begin(
        inner: &Arc<Inner>,
        fill: &Fill,
        key_digest: &str,
        name: &ObjectName,
        body: &[u8],
    ) -> Result<Self, Error> {
        let of_manifest = |problem: String| damaged(&fill.key, format!("{name}: {problem}"));
        if Digest::of(body) != name.digest {
            return Err(of_manifest("does not have the bytes of its name".into()));
        }
        let manifest = Manifest::decode(body, &fill.key).map_err(of_manifest)?;
        let staging = Staging::make(inner, "restore")?;
        let tree = staging.dir()?.ensure_dir(TREE)?;
        let restore = Self {
            key: fill.key.clone(),
            key_digest: key_digest.to_owned(),
            previous: [Some(manifest.run_as), fill.previous_owner],
            manifest,
            run_as: fill.run_as,
            tree,
            staging,
        };
        let mut parents = Parents::new(&restore.tree);
        for item in &restore.manifest.items {
            let (parent, name) = parents.of(&item.path.0)?;
            match &item.node {
                Node::Directory => parent.make_dir(name)?,
                Node::Symlink { .. } => {}
                Node::File { pieces, .. } if restore.is_packed(pieces.first()) => {}
                Node::File { bytes, .. } => {
                    let file = parent.create_file(name)?;
                    file.set_len(*bytes).map_err(|e| disk::Error::new("truncate", parent.label(name), e))?;
                }
            }
        }
        Ok(restore)
    }

    /// Verifies an object and puts its parts into their files.
    fn put_object(&self, fetch: &Fetch, body: &[u8]) -> Result<(), Error> {
        let name = fetch.object.name;
        if Digest::of(body) != name.digest {
            return Err(self.damaged(format!("{name} does not have the bytes of its name")));
        }
        let unpacked;
        let content = if name.kind == ObjectKind::Pack {
            let most = usize::try_from(fetch.object.bytes).unwrap_or(usize::MAX);
            unpacked = decompress(body, most).map_err(|error| self.damaged(format!("{name}: {error}")))?;
            unpacked.as_slice()
        } else {
            body
        };
        if content.len() as u64 != fetch.object.bytes {
            return Err(self.damaged(format!("{name} has {} bytes", content.len())));
        }
        let mut parents = Parents::new(&self.tree);
        for part in &fetch.parts {
            self.put_part(&mut parents, part, content, name.kind)?;
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
        let out_of_range = || self.damaged(format!("{} is cut off", disk::shown(&item.path.0)));
        let start = usize::try_from(part.offset).map_err(|_| out_of_range())?;
        let length = usize::try_from(part.bytes).map_err(|_| out_of_range())?;
        let content = content.get(start..).and_then(|rest| rest.get(..length)).ok_or_else(out_of_range)?;
        let (parent, name) = parents.of(&item.path.0)?;
        let failed = |operation| move |error| disk::Error::new(operation, parent.label(name), error);
        if kind == ObjectKind::Chunk {
            let file = parent.open_file_for_writing(name)?;
            return Ok(write_sparsely(&file, content, part.file_offset).map_err(failed("write"))?);
        }
        if let Node::File { digest, .. } = &item.node
            && Digest::of(content) != *digest
        {
            return Err(self.damaged(format!("{} has another content", disk::shown(&item.path.0))));
        }
        let file = parent.create_file(name)?;
        file.write_all_at(content, 0).map_err(failed("write"))?;
        self.set_file(&file, &item.meta).map_err(failed("set metadata of"))?;
        Ok(())
    }

    /// Verifies large files, makes links, sets what is left of the metadata, and
    /// moves the tree into the cache when it is on disk.
    fn finish(&self, inner: &Inner, manifest: &str) -> Result<(), Error> {
        let mut parents = Parents::new(&self.tree);
        for item in &self.manifest.items {
            let (parent, name) = parents.of(&item.path.0)?;
            let failed = |operation| move |error| disk::Error::new(operation, parent.label(name), error);
            match &item.node {
                Node::File { pieces, .. } if self.is_packed(pieces.first()) => {}
                Node::File { digest, .. } => {
                    let (file, _) = parent.open_file(name)?;
                    let mut hasher = blake3::Hasher::new();
                    hasher.update_reader(&file).map_err(failed("read"))?;
                    if hasher.finalize() != digest.0 {
                        return Err(
                            self.damaged(format!("{} has another content", disk::shown(&item.path.0)))
                        );
                    }
                    self.set_file(&file, &item.meta).map_err(failed("set metadata of"))?;
                }
                Node::Symlink { target } => {
                    let (uid, gid) = self.owner(&item.meta);
                    parent.make_symlink(name, &target.0)?;
                    parent.set_owner_of(name, uid, gid)?;
                    parent.set_modified_of(name, item.meta.modified)?;
                }
                Node::Directory => {}
            }
        }
        // Nothing is made in any directory from here on: their times hold.
        for item in &self.manifest.items {
            if item.node == Node::Directory {
                self.set_dir(&self.tree.open_dir(&item.path.0)?, &item.meta)?;
            }
        }
        self.set_dir(&self.tree, &self.manifest.root)?;
        self.publish(inner, manifest)
    }

    fn publish(&self, inner: &Inner, manifest: &str) -> Result<(), Error> {
        let staged = self.staging.dir()?;
        let note = FromNote { manifest: manifest.to_owned() };
        write_new(&staged, FROM_NOTE, &serde_json::to_vec(&note).expect("a note has only text keys"))?;
        staged.sync_file_system()?;
        match inner.cached_tree(&self.key)? {
            Some(tree) if !tree.is_empty()? => {
                inner.set_cached_aside(&self.key_digest, "a snapshot was restored in its place")?;
            }
            _ => disk::remove(&inner.layout.cache, self.key_digest.as_bytes())?,
        }
        let name = self.staging.name().as_bytes();
        Ok(inner.layout.staging.move_to(name, &inner.layout.cache, self.key_digest.as_bytes())?)
    }

    fn is_packed(&self, piece: Option<&super::snapshot::Piece>) -> bool {
        piece
            .and_then(|piece| self.manifest.objects.get(piece.object as usize))
            .is_some_and(|object| object.name.kind == ObjectKind::Pack)
    }

    fn owner(&self, meta: &Meta) -> (u32, u32) {
        let previous = self.previous.iter().flatten();
        let mapped = previous
            .map(|previous| map_owner((meta.uid, meta.gid), *previous, self.run_as))
            .find(|mapped| *mapped != (meta.uid, meta.gid));
        mapped.unwrap_or((meta.uid, meta.gid))
    }

    fn set_file(&self, file: &File, meta: &Meta) -> std::io::Result<()> {
        disk::set_file_metadata(file, self.owner(meta), meta.mode, meta.modified)
    }

    fn set_dir(&self, dir: &Dir, meta: &Meta) -> Result<(), Error> {
        let (uid, gid) = self.owner(meta);
        dir.set_owner(uid, gid)?;
        dir.set_mode(meta.mode)?;
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
