//! Into the store, as a new snapshot on top of the chain.

use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use bytes::Bytes;

use crate::{
    clock::{SharedClock, random_hex},
    disk::{self, Dir, Kind, Limits, LinkGroups, Missing, Time},
    model::{Epoch, Key, Owner, SnapshotRef, spec::Persist},
    state::{
        Base, Encryption, Open, Save, SaveTree, SlotFiles as _,
        fence::Author,
        history::History,
        host::{HostDirs, HostFiles},
        mirror::{self, PIECE_BYTES, list_plain, plain_key, unescape},
        snapshot::{Meta, Node, RawText, Record, Xattr, newest_record, plain_prefix},
    },
    store::{Listed, MAX_LIST_KEYS, SharedStore},
};

use super::{
    Error, FileHead, Progress, Sink, StateError, Watch,
    archive::{Unpacked, unpack},
    directory::DirectorySink,
    refused,
};

/// What a store's objects, which say nothing of it, become.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;
/// Files are read in pieces of this size.
const READ_BYTES: usize = 1024 * 1024;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Where a tree comes from.
pub enum Source {
    /// A directory.
    Directory(PathBuf),
    /// A tar, compressed by zstd or not.
    Archive(Box<dyn Read + Send>),
    /// Plain objects, one a file, as copying tools leave them.
    Objects(SharedStore),
    /// The tenant's own plain objects of the layout `mirror`, whatever they are by now.
    Mirror,
}

/// What an import needs.
pub struct Import {
    /// The store, held for this import.
    pub store: SharedStore,
    /// Time and randomness.
    pub clock: SharedClock,
    /// What objects are sealed with.
    pub encryption: Encryption,
    /// The identity of the server whose place this takes.
    pub server: String,
    /// Whose state.
    pub key: Key,
    /// How it is saved.
    pub persist: Persist,
    /// The most bytes of files allowed.
    pub max_bytes: Option<u64>,
    /// Who owns what names no owner, and runs the program; else the owner of the root.
    pub owner: Option<Owner>,
    /// Whether state that is there already may become history.
    pub replace: bool,
    /// Where the tree is put together; a directory that is there.
    pub scratch: PathBuf,
}

/// What was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The new snapshot.
    pub snapshot: SnapshotRef,
    /// Sockets, FIFOs and devices that were left out.
    pub skipped: u64,
    /// Extended attributes that no tree has, and that were left out.
    pub attributes: u64,
}

/// A scratch directory, removed in the end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the scratch directory stays");
        }
    }
}

/// Imports a tree. Until its record is written, nothing has happened.
///
/// # Errors
/// [`Error::Exists`], [`Error::Claimed`], [`Error::Refused`] and others.
pub async fn import(import: &Import, source: Source, watch: &mut Watch<'_>) -> Result<Imported, Error> {
    let Import { store, key, .. } = import;
    let server = format!("{}-import", import.server);
    let key_digest = key.digest();
    let newest = newest_record(&**store, key, &key_digest).await?;
    import.check(newest.as_ref(), &server)?;
    let scratch =
        Scratch(import.scratch.join(format!("boilerhouse-import-{}", random_hex(&*import.clock, 8))));
    let dir = Dir::ensure(&scratch.0)?;
    dir.set_mode(0o700)?;
    let path = |name: &str| scratch.0.join(name);
    let dirs =
        HostDirs { state_dir: path("state"), secrets_dir: path("secrets"), socket_dir: path("sockets") };
    let files =
        HostFiles::open_encrypted(dirs, store.clone(), import.clock.clone(), import.encryption.clone())?;
    let tree = Dir::ensure(&scratch.0.join("state/cache").join(&key_digest).join("tree"))?;
    let mut sink = DirectorySink::new(tree.open_dir(b"")?, true, true);
    let found = import.collect(source, &mut sink, watch).await?;
    sink.finish()?;
    let root = tree.stat()?;
    let run_as = import.owner.unwrap_or(Owner { uid: root.uid, gid: root.gid });

    // Anybody may have come meanwhile.
    let newest = newest_record(&**store, key, &key_digest).await?;
    import.check(newest.as_ref(), &server)?;
    let author = Author { server, term: None };
    let epoch = newest.as_ref().map_or(Epoch(0), |newest| newest.epoch).next();
    let nonce = || format!("import-{}", random_hex(&*import.clock, 16));
    files
        .open(&Open {
            key: key.clone(),
            epoch,
            nonce: nonce(),
            author: author.clone(),
            on_top_of: newest.as_ref().map_or(0, |newest| newest.number),
            tree: newest.and_then(|newest| newest.tree).map(|tree| tree.nonce),
            saving: None,
        })
        .await?;
    let saved = files
        .save(&Save {
            base: Base::Chain,
            key: key.clone(),
            epoch,
            nonce: nonce(),
            tree: SaveTree::Cache,
            run_as,
            failed_claim: false,
            author,
            is_last: true,
            persist: import.persist.clone(),
            max_bytes: import.max_bytes,
        })
        .await?;
    Ok(Imported {
        snapshot: saved.snapshot,
        skipped: found.skipped + saved.skipped,
        attributes: found.attributes,
    })
}

// === impl Import ===

impl Import {
    fn check(&self, newest: Option<&Record>, server: &str) -> Result<(), Error> {
        let Some(newest) = newest else { return Ok(()) };
        // An import that did not end has left nothing but its own claim.
        if let Some(holder) = newest.holder.as_ref().filter(|holder| holder.server != server) {
            let (key, server, epoch) = (self.key.clone(), holder.server.clone(), holder.epoch.0);
            return Err(Error::Claimed { key, server, epoch });
        }
        match &newest.tree {
            Some(tree) if !self.replace => {
                Err(Error::Exists { key: self.key.clone(), newest: tree.snapshot })
            }
            _ => Ok(()),
        }
    }

    /// Puts a source's tree into the sink.
    async fn collect(
        &self,
        source: Source,
        sink: &mut DirectorySink,
        watch: &mut Watch<'_>,
    ) -> Result<Unpacked, Error> {
        match source {
            Source::Directory(path) => copy(&path, sink, watch),
            Source::Archive(from) => self.archive(from, sink, watch),
            Source::Objects(store) => self.objects(&store, sink, watch).await,
            Source::Mirror => self.mirror(sink, watch).await,
        }
    }

    fn archive(
        &self,
        from: Box<dyn Read + Send>,
        sink: &mut DirectorySink,
        watch: &mut Watch<'_>,
    ) -> Result<Unpacked, Error> {
        let failed = |error| disk::Error::new("read", "the archive", error);
        let mut from = BufReader::new(from);
        let is_compressed = from.fill_buf().map_err(failed)?.starts_with(&ZSTD_MAGIC);
        sink.root(&self.meta(DIRECTORY_MODE, self.clock.unix_ms()), &[])?;
        let mut show = |done: Unpacked| {
            watch(Progress { entries: done.entries, of: done.entries, bytes: done.bytes });
        };
        if is_compressed {
            let decoder = zstd::Decoder::with_buffer(from).map_err(failed)?;
            return unpack(BufReader::new(decoder), sink, &mut show);
        }
        unpack(from, sink, &mut show)
    }

    /// Copies what lies in a bucket.
    async fn objects(
        &self,
        store: &SharedStore,
        sink: &mut DirectorySink,
        watch: &mut Watch<'_>,
    ) -> Result<Unpacked, Error> {
        let failed = |source| Error::State(StateError::Store { key: self.key.clone(), source });
        sink.root(&self.meta(DIRECTORY_MODE, self.clock.unix_ms()), &[])?;
        let mut done = Unpacked::default();
        let mut after: Option<String> = None;
        loop {
            let page = store.list("", after.as_deref(), MAX_LIST_KEYS).await.map_err(failed)?;
            let is_last = page.len() < MAX_LIST_KEYS;
            for listed in &page {
                let path = listed.key.as_bytes();
                let meta = self.meta(FILE_MODE, listed.modified_ms);
                if let Some(path) = path.strip_suffix(b"/").filter(|_| listed.bytes == 0) {
                    // What some tools leave for a directory.
                    sink.directory(path, &self.meta(DIRECTORY_MODE, listed.modified_ms), &[])?;
                } else {
                    self.object(store, &listed.key, (path, meta, &[]), listed.bytes, sink).await?;
                }
                done.entries += 1;
                done.bytes += listed.bytes;
                watch(Progress { entries: done.entries, of: done.entries, bytes: done.bytes });
            }
            after = page.last().map(|listed| listed.key.clone()).or(after);
            if is_last {
                break;
            }
        }
        if done.entries == 0 {
            let reason = "there is no object; a state without files is imported from an empty directory";
            return Err(Error::Refused { what: "the prefix".to_owned(), reason: reason.to_owned() });
        }
        Ok(done)
    }

    /// Takes over the plain objects of the mirror as they are, with all that its manifest
    /// says of entries that are still there, but their holes: somebody may have filled them.
    async fn mirror(&self, sink: &mut DirectorySink, watch: &mut Watch<'_>) -> Result<Unpacked, Error> {
        let key_digest = self.key.digest();
        let newest = newest_record(&*self.store, &self.key, &key_digest).await?;
        let number = newest.as_ref().and_then(|newest| newest.tree.as_ref()).map_or(0, |tree| tree.snapshot);
        if !mirror::is_mirror(newest.as_ref()) {
            let reason = "its newest snapshot is not in the layout \"mirror\"".to_owned();
            return Err(Error::Refused { what: self.key.to_string(), reason });
        }
        let history = History::new(self.store.clone(), self.clock.clone(), self.server.clone());
        let history = history.with_encryption(self.encryption.clone());
        let (_, manifest) = history.tree_of(&self.key, number).await?;
        let failed = |source| StateError::Store { key: self.key.clone(), source };
        let prefix = plain_prefix(&key_digest);
        let listed = list_plain(&*self.store, &key_digest).await.map_err(failed)?;
        let known: HashMap<String, &[u8]> =
            mirror::files(&manifest).map(|(path, _)| (plain_key(&key_digest, path), path)).collect();
        let mut there: BTreeMap<Vec<u8>, &Listed> = BTreeMap::new();
        for object in &listed {
            let name = object.key.strip_prefix(&prefix).unwrap_or_default();
            let path = known.get(&object.key).map(|path| path.to_vec()).or_else(|| unescape(name));
            let path =
                path.ok_or_else(|| refused(name.as_bytes(), "is no name of a mirror; rename or remove it"))?;
            there.insert(path, object);
        }
        let mut done = Unpacked::default();
        let of = (there.len() + manifest.items.len()) as u64;
        let mut step = |done: &mut Unpacked, bytes: u64| {
            done.entries += 1;
            done.bytes += bytes;
            watch(Progress { entries: done.entries, of, bytes: done.bytes });
        };
        sink.root(&manifest.root, &manifest.root_xattrs)?;
        let mut metas: HashMap<&[u8], (Meta, &[Xattr])> = HashMap::new();
        for item in &manifest.items {
            match &item.node {
                Node::Directory => {
                    sink.directory(&item.path.0, &item.meta, &item.xattrs)?;
                    step(&mut done, 0);
                }
                Node::File { .. } => {
                    metas.insert(&item.path.0, (item.meta, &item.xattrs));
                }
                Node::Symlink { .. } | Node::HardLink { .. } => {}
            }
        }
        for (path, object) in &there {
            let owner = (manifest.root.uid, manifest.root.gid);
            let new = self.meta_of(FILE_MODE, object.modified_ms, owner);
            let (meta, xattrs) = metas.get(path.as_slice()).copied().unwrap_or((new, &[]));
            self.object(&self.store, &object.key, (path, meta, xattrs), object.bytes, sink).await?;
            step(&mut done, object.bytes);
        }
        for item in &manifest.items {
            match &item.node {
                Node::Symlink { target } => sink.symlink(&item.path.0, &item.meta, &target.0)?,
                Node::HardLink { to } if there.contains_key(&to.0) => {
                    sink.hard_link(&item.path.0, &item.meta, &to.0)?;
                }
                _ => continue,
            }
            step(&mut done, 0);
        }
        Ok(done)
    }

    /// Copies one object into a file.
    async fn object(
        &self,
        store: &SharedStore,
        name: &str,
        (path, meta, xattrs): (&[u8], Meta, &[Xattr]),
        bytes: u64,
        sink: &mut dyn Sink,
    ) -> Result<(), Error> {
        sink.file(FileHead { path, meta, xattrs, bytes, holes: &[] })?;
        let mut at = 0;
        while at < bytes {
            let piece = store.get_range(name, at, PIECE_BYTES.min(bytes - at)).await;
            let piece = piece.map_err(|source| StateError::Store { key: self.key.clone(), source })?;
            let piece = piece.filter(|piece: &Bytes| !piece.is_empty());
            let piece = piece.ok_or_else(|| refused(path, "changed in the bucket while it was read"))?;
            sink.data(&piece)?;
            at += piece.len() as u64;
        }
        sink.end_file()
    }

    fn meta(&self, mode: u32, modified_ms: u64) -> Meta {
        let owner = self.owner.unwrap_or(Owner { uid: 0, gid: 0 });
        self.meta_of(mode, modified_ms, (owner.uid, owner.gid))
    }

    fn meta_of(&self, mode: u32, modified_ms: u64, (uid, gid): (u32, u32)) -> Meta {
        let seconds = i64::try_from(modified_ms / 1_000).unwrap_or(0);
        let nanoseconds = u32::try_from(modified_ms % 1_000).unwrap_or(0) * 1_000_000;
        Meta { mode, uid, gid, modified: Time { seconds, nanoseconds } }
    }
}

/// Copies a directory's tree.
fn copy(path: &Path, sink: &mut dyn Sink, watch: &mut Watch<'_>) -> Result<Unpacked, Error> {
    let root = Dir::open(path)?;
    let listed =
        disk::list(&root, &Limits::TREE, Missing::Error, |_, _| true).map_err(|error| match error {
            disk::ListError::Disk(error) => Error::Disk(error),
            disk::ListError::Limit(reason) => Error::Refused { what: path.display().to_string(), reason },
        })?;
    sink.root(&Meta::from(&root.stat()?), &xattrs(root.attributes()?))?;
    let mut done = Unpacked::default();
    let mut links = LinkGroups::default();
    let mut firsts: Vec<Vec<u8>> = Vec::new();
    let of = listed.len() as u64;
    for entry in listed {
        let (meta, at) = (Meta::from(&entry.stat), entry.path.as_slice());
        let first = links.first_of(firsts.len(), &entry.stat).and_then(|first| firsts.get(first));
        match (entry.stat.kind, first) {
            (Kind::Other, _) => done.skipped += 1,
            (_, Some(first)) => sink.hard_link(at, &meta, first)?,
            (Kind::Directory, None) => {
                let of_dir = root.open_dir(at)?.attributes()?;
                sink.directory(at, &meta, &xattrs(of_dir))?;
            }
            (Kind::Symlink, None) => sink.symlink(at, &meta, entry.target.as_deref().unwrap_or_default())?,
            (Kind::File, None) => done.bytes += copy_file(&root, at, sink)?,
        }
        firsts.push(entry.path);
        done.entries += 1;
        watch(Progress { entries: done.entries, of, bytes: done.bytes });
    }
    Ok(done)
}

fn copy_file(root: &Dir, path: &[u8], sink: &mut dyn Sink) -> Result<u64, Error> {
    let (above, name) = disk::split_last(path);
    let parent = root.open_dir(above)?;
    let (file, stat) = parent.open_file(name)?;
    let failed = |error| disk::Error::new("read", parent.label(name), error);
    let of_file = xattrs(disk::attributes(&file).map_err(failed)?);
    let holes = match stat.bytes >= disk::HOLE_BYTES {
        true => disk::holes(&file, stat.bytes, crate::state::snapshot::TREE_HOLES).map_err(failed)?,
        false => Vec::new(),
    };
    sink.file(FileHead {
        path,
        meta: Meta::from(&stat),
        xattrs: &of_file,
        bytes: stat.bytes,
        holes: &holes,
    })?;
    let mut buffer = vec![0; READ_BYTES.min(usize::try_from(stat.bytes).unwrap_or(READ_BYTES))];
    for (start, end) in mirror::data_of(&holes, 0, stat.bytes) {
        let mut at = start;
        while at < end {
            let length = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let piece = &mut buffer[..length];
            std::os::unix::fs::FileExt::read_exact_at(&file, piece, at).map_err(failed)?;
            sink.data(piece)?;
            at += length as u64;
        }
    }
    sink.end_file()?;
    let now = disk::Stat::of_file(&file).map_err(failed)?;
    if now != stat {
        return Err(refused(path, "changed while it was read"));
    }
    Ok(stat.bytes)
}

fn xattrs(attributes: disk::Attributes) -> Vec<Xattr> {
    attributes.into_iter().map(|(name, value)| Xattr(RawText(name), RawText(value))).collect()
}
