//! From a tree at rest to a manifest and the objects it needs.
//!
//! One thread reads; others hash, compress and seal what it read, while what they
//! made is on its way to the store.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::Scope,
};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use crate::{
    disk::{self, Attributes, Dir, Entry, Kind, Limits, LinkGroups, Missing, Stat},
    model::{Epoch, Key, Owner, spec::Layout},
};

use super::{
    Error, Save,
    budget::{Budget, Held},
    restore::Parents,
    snapshot::{
        ATTRIBUTE_BYTES, CHUNK_BYTES, Digest, FILE_BYTES, Item, MANIFEST_VERSION, Manifest, Meta, Node,
        ObjectCodec, ObjectName, PACK_BYTES, PACKED_FILE_BYTES, Packer, Piece, Place, RawText, Reuse, Sealer,
        StoredObject, TREE_HOLES, Work, Xattr,
    },
};

/// How often a file may change while it is read before that is an error.
const READS: u32 = 3;
/// Threads that make objects of what is read. Each holds at most two objects, the
/// reader one.
const SEALERS: usize = 2;
/// Files smaller than this are taken as they are, holes or not.
const SPARSE_FILE_BYTES: u64 = disk::HOLE_BYTES;

/// A tree, ready to be committed.
pub(super) struct Collected {
    /// The manifest's name.
    pub(super) manifest: ObjectName,
    /// The manifest as an object, unless it is the newest snapshot's.
    pub(super) body: Option<StoredObject>,
    /// What each entry of the manifest was when it was looked at.
    #[allow(dead_code, reason = "what has not changed is told by it")]
    pub(super) stats: Vec<(Vec<u8>, Stat)>,
    /// Regular files.
    pub(super) files: u64,
    /// Their bytes.
    pub(super) bytes: u64,
    /// Sockets, FIFOs and devices.
    pub(super) skipped: u64,
}

/// What there is to collect.
pub(super) struct Walk {
    /// The root.
    pub(super) root: Stat,
    /// Everything below it that is kept, sorted by path.
    pub(super) entries: Vec<Entry>,
    /// Whether files are read from a copy, whose stats say nothing.
    pub(super) is_copy: bool,
}

/// What is asked of a collection.
pub(super) struct Request {
    pub(super) key: Key,
    pub(super) epoch: Epoch,
    pub(super) run_as: Owner,
    pub(super) max_bytes: Option<u64>,
    pub(super) reuse: Arc<Reuse>,
    pub(super) codec: ObjectCodec,
    /// The newest snapshot's manifest, the one in `reuse`.
    pub(super) newest: Option<ObjectName>,
    /// What objects of all saves may take in memory.
    pub(super) memory: Budget,
}

/// Answers what the newest snapshot has of an entry that has not changed since.
pub(super) type Known<'a> = dyn Fn(&[u8]) -> Option<&'a Item> + 'a;

/// Takes an object to the store, with its room in memory.
pub(super) type Give<'a> = dyn Fn(StoredObject, Held) -> Result<(), Error> + Sync + 'a;

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

/// Lists the tree below `root` without what is excluded.
///
/// # Errors
/// [`Error::Limit`], [`Error::Disk`].
pub(super) fn walk(root: &Dir, key: &Key, exclude: &GlobSet) -> Result<Walk, Error> {
    let is_kept = |path: &[u8], _: &Stat| !is_excluded(exclude, path);
    let entries = disk::list(root, &Limits::TREE, Missing::Error, is_kept)
        .map_err(|error| Error::of_list(key, error))?;
    Ok(Walk { root: root.stat()?, entries, is_copy: false })
}

/// Returns whether `persist.exclude` names this very path.
pub(super) fn is_excluded(exclude: &GlobSet, path: &[u8]) -> bool {
    use std::os::unix::ffi::OsStrExt;
    exclude.is_match(std::ffi::OsStr::from_bytes(path))
}

/// Reads what is not known of the tree below `root`, gives every object that the
/// store needs to `send`, and answers the manifest. Of objects, as many are in memory
/// as [`Request::memory`] has room for.
///
/// # Errors
/// [`Error::Limit`], [`Error::Disk`], and what `send` answers.
pub(super) fn collect(
    root: &Dir,
    walk: Walk,
    known: &Known<'_>,
    request: Request,
    send: &Give<'_>,
) -> Result<Collected, Error> {
    check_bytes(root, &walk, &request.key, request.max_bytes)?;
    let reuse = Arc::clone(&request.reuse);
    let sealer = Sealer::new(request.codec.clone(), request.epoch, Arc::clone(&reuse));
    let failed = Mutex::new(None);
    let found = std::thread::scope(|scope| {
        let sealers = Sealers { scope, sealer: &sealer, send, failed: &failed, work: None };
        let mut collector = Collector::new(&request, root, sealers);
        let found = collector.tree(walk, known);
        found.and_then(|found| collector.finish().map(|packer| (found, packer)))
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let (mut found, packer) = found?;
    let objects = packer.finish(sealer, &mut found.items);
    let key = request.key;
    let manifest = Manifest {
        layout: Layout::Snapshot,
        version: MANIFEST_VERSION,
        tenant: key.tenant.clone(),
        workload: key.workload.clone(),
        epoch: request.epoch,
        run_as: request.run_as,
        objects,
        root: found.root,
        root_xattrs: found.root_xattrs,
        items: found.items,
    };
    let (files, bytes) = manifest.totals();
    let (stats, skipped) = (found.stats, found.skipped);
    if let Some(name) = request.newest
        && reuse.is_same_tree(&manifest)
    {
        return Ok(Collected { manifest: name, body: None, stats, files, bytes, skipped });
    }
    let body = request.codec.encode_manifest(&manifest).map_err(|reason| Error::Limit { key, reason })?;
    Ok(Collected { manifest: body.name, body: Some(body), stats, files, bytes, skipped })
}

/// What a tree has, as far as the reader knows it.
struct Found {
    root: Meta,
    root_xattrs: Vec<Xattr>,
    items: Vec<Item>,
    stats: Vec<(Vec<u8>, Stat)>,
    skipped: u64,
}

struct Collector<'a, 'scope, 'env> {
    request: &'a Request,
    root: &'a Dir,
    packer: Packer,
    sealers: Sealers<'scope, 'env>,
    /// Room for the open pack.
    pack: Option<Held>,
    attribute_bytes: usize,
    holes: usize,
}

/// What was read of one file.
struct Content {
    digest: Digest,
    pieces: Vec<Piece>,
    holes: Vec<(u64, u64)>,
}

// === impl Collector ===

impl<'a, 'scope, 'env> Collector<'a, 'scope, 'env> {
    fn new(request: &'a Request, root: &'a Dir, sealers: Sealers<'scope, 'env>) -> Self {
        let packer = Packer::new(Arc::clone(&request.reuse));
        Self { request, root, packer, sealers, pack: None, attribute_bytes: 0, holes: 0 }
    }

    fn tree(&mut self, walk: Walk, known: &Known<'_>) -> Result<Found, Error> {
        let root_xattrs = self.xattrs(self.root.attributes()?, b"")?;
        let mut found = Found {
            root: Meta::from(&walk.root),
            root_xattrs,
            items: Vec::with_capacity(walk.entries.len()),
            stats: Vec::with_capacity(walk.entries.len()),
            skipped: 0,
        };
        let mut parents = Parents::new(self.root);
        let mut links = LinkGroups::default();
        for entry in walk.entries {
            if entry.stat.kind == Kind::Other {
                found.skipped += 1;
                continue;
            }
            let mut stat = entry.stat;
            let mut is_recorded = true;
            let first = links.first_of(found.items.len(), &stat).and_then(|first| found.items.get(first));
            let (meta, xattrs, node) = match (stat.kind, first) {
                (_, Some(first)) => (first.meta, Vec::new(), Node::HardLink { to: first.path.clone() }),
                (Kind::Directory, None) => {
                    let of_dir = self.root.open_dir(&entry.path)?.attributes()?;
                    (Meta::from(&stat), self.xattrs(of_dir, &entry.path)?, Node::Directory)
                }
                (Kind::Symlink | Kind::Other, None) => {
                    let target = RawText(entry.target.unwrap_or_default());
                    (Meta::from(&stat), Vec::new(), Node::Symlink { target })
                }
                (Kind::File, None) => match self.again(known(&entry.path), &stat, &entry.path)? {
                    Some((xattrs, node)) => {
                        // The next checkpoint copies it, and then it is packed anew.
                        is_recorded = !known(&entry.path).is_some_and(|item| self.is_worn(item));
                        (Meta::from(&stat), xattrs, node)
                    }
                    None => {
                        let (parent, name) = parents.of(&entry.path)?;
                        let (read, xattrs, content) = self.file(parent, name, &entry.path)?;
                        if !walk.is_copy {
                            stat = read;
                        }
                        let Content { digest, pieces, holes } = content;
                        let node = Node::File { bytes: read.bytes, digest, pieces, holes };
                        (Meta::from(&read), xattrs, node)
                    }
                },
            };
            if is_recorded {
                found.stats.push((entry.path.clone(), stat));
            }
            found.items.push(Item { path: RawText(entry.path), meta, xattrs, node });
        }
        Ok(found)
    }

    /// Takes what the newest snapshot has of a file, from the objects where it is.
    fn again(
        &mut self,
        item: Option<&Item>,
        stat: &Stat,
        path: &[u8],
    ) -> Result<Option<(Vec<Xattr>, Node)>, Error> {
        let Some(item) = item else { return Ok(None) };
        let Node::File { bytes, digest, pieces, holes } = &item.node else { return Ok(None) };
        if *bytes != stat.bytes {
            return Ok(None);
        }
        let Some(pieces) = self.packer.carry(pieces) else { return Ok(None) };
        self.count(holes.len(), path)?;
        let (digest, holes) = (*digest, holes.clone());
        Ok(Some((item.xattrs.clone(), Node::File { bytes: *bytes, digest, pieces, holes })))
    }

    /// Returns whether the newest snapshot has a file in a pack that should be written anew.
    fn is_worn(&self, item: &Item) -> bool {
        let Node::File { pieces, .. } = &item.node else { return false };
        pieces.iter().any(|piece| self.request.reuse.is_worn(piece))
    }

    /// Reads one file. The tree is at rest; should it change all the same, the
    /// file is read again, and an error in the end: never a mixture.
    fn file(&mut self, parent: &Dir, name: &[u8], path: &[u8]) -> Result<(Stat, Vec<Xattr>, Content), Error> {
        let failed = |error| disk::Error::new("read", parent.label(name), error);
        for _ in 0..READS {
            let (file, before) = parent.open_file(name)?;
            let of_file = disk::attributes(&file).map_err(failed)?;
            let holes = self.holes(&file, before.bytes, path).map_err(|error| error.named(parent, name))?;
            let data = before.bytes - holes.iter().map(|(_, length)| length).sum::<u64>();
            self.count(holes.len(), path)?;
            let read = if data < PACKED_FILE_BYTES {
                self.small(&file, data, &holes)
            } else {
                self.large(&file, data, &holes)
            };
            let read = read.map_err(|error| error.named(parent, name))?;
            if let Some((digest, pieces)) = read
                && Stat::of_file(&file).map_err(failed)? == before
            {
                let xattrs = self.xattrs(of_file, path)?;
                return Ok((before, xattrs, Content { digest, pieces, holes }));
            }
            self.holes -= holes.len();
        }
        let error = std::io::Error::other("it changes while it is read, though nothing should run");
        Err(failed(error).into())
    }

    /// Reads the data of a small file; `None` when it ends early.
    fn small(
        &mut self,
        file: &File,
        data: u64,
        holes: &[(u64, u64)],
    ) -> Result<Option<(Digest, Vec<Piece>)>, ReadError> {
        let mut content = vec![0; usize::try_from(data).unwrap_or(0)];
        if !read_data(file, &mut Place::default(), holes, &mut content)? {
            return Ok(None);
        }
        let digest = Digest::of(&content);
        if content.is_empty() {
            return Ok(Some((digest, Vec::new())));
        }
        let room = || self.request.memory.hold_blocking(making(PACK_BYTES as u64 + PACKED_FILE_BYTES));
        let held = self.pack.take().unwrap_or_else(room);
        let (pieces, full) = self.packer.small(digest, &content);
        match full {
            Some(work) => self.sealers.submit(work, held).map_err(ReadError::Send)?,
            None => self.pack = Some(held),
        }
        Ok(Some((digest, pieces)))
    }

    /// Reads the data of a large file chunk by chunk; `None` when it ends early. The
    /// digest is known when its chunks are.
    fn large(
        &mut self,
        file: &File,
        data: u64,
        holes: &[(u64, u64)],
    ) -> Result<Option<(Digest, Vec<Piece>)>, ReadError> {
        let mut pieces = Vec::new();
        let mut place = Place::default();
        let mut left = data;
        while left > 0 {
            let length = left.min(CHUNK_BYTES as u64);
            let held = self.request.memory.hold_blocking(making(length));
            let mut content = vec![0; usize::try_from(length).unwrap_or(CHUNK_BYTES)];
            if !read_data(file, &mut place, holes, &mut content)? {
                return Ok(None);
            }
            let (piece, work) = self.packer.chunk(content);
            pieces.push(piece);
            self.sealers.submit(work, held).map_err(ReadError::Send)?;
            left -= length;
        }
        Ok(Some((Digest([0; 32]), pieces)))
    }

    fn holes(&self, file: &File, bytes: u64, path: &[u8]) -> Result<Vec<(u64, u64)>, ReadError> {
        if bytes > FILE_BYTES {
            let reason = format!("{} has {bytes} bytes, at most {FILE_BYTES} are allowed", disk::shown(path));
            return Err(ReadError::Send(self.limit(reason)));
        }
        if bytes < SPARSE_FILE_BYTES {
            return Ok(Vec::new());
        }
        disk::holes(file, bytes, TREE_HOLES - self.holes).map_err(ReadError::Read)
    }

    /// Counts what a file has against the limits of its tree.
    fn count(&mut self, holes: usize, path: &[u8]) -> Result<(), Error> {
        self.holes += holes;
        if self.holes > TREE_HOLES {
            let path = disk::shown(path);
            return Err(
                self.limit(format!("the files have more than {TREE_HOLES} holes together, at {path}"))
            );
        }
        Ok(())
    }

    fn xattrs(&mut self, attributes: Attributes, path: &[u8]) -> Result<Vec<Xattr>, Error> {
        let bytes: usize = attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.attribute_bytes += bytes;
        if self.attribute_bytes > ATTRIBUTE_BYTES {
            let path = disk::shown(path);
            return Err(self.limit(format!(
                "the entries have more than {ATTRIBUTE_BYTES} bytes of extended attributes together, at {path}"
            )));
        }
        Ok(attributes.into_iter().map(|(name, value)| Xattr(RawText(name), RawText(value))).collect())
    }

    fn limit(&self, reason: String) -> Error {
        Error::Limit { key: self.request.key.clone(), reason }
    }

    /// Hands the last pack on and waits for everything that was.
    fn finish(mut self) -> Result<Packer, Error> {
        if let (Some(work), Some(held)) = (self.packer.close(), self.pack.take()) {
            self.sealers.last(work, held)?;
        }
        Ok(self.packer)
    }
}

/// Returns what content takes in memory while it is made an object: itself, and what comes
/// of compressing it.
fn making(bytes: u64) -> u64 {
    bytes * 2
}

/// Reads data from where it is between holes; `false` when the file ends early.
fn read_data(
    file: &File,
    place: &mut Place,
    holes: &[(u64, u64)],
    content: &mut [u8],
) -> Result<bool, ReadError> {
    let mut rest = content;
    while !rest.is_empty() {
        let (at, bytes) = place.next(holes, rest.len() as u64);
        let (run, behind) = rest.split_at_mut(usize::try_from(bytes).unwrap_or(usize::MAX));
        match file.read_exact_at(run, at) {
            Ok(()) => rest = behind,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(ReadError::Read(error)),
        }
    }
    Ok(true)
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

/// Threads that make objects and send them, begun with the first work there is.
struct Sealers<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    sealer: &'env Sealer,
    send: &'env Give<'env>,
    failed: &'env Mutex<Option<Error>>,
    work: Option<mpsc::SyncSender<(Work, Held)>>,
}

// === impl Sealers ===

impl Sealers<'_, '_> {
    /// Hands work to a thread; waits while all are busy.
    ///
    /// # Errors
    /// What a thread answered earlier.
    fn submit(&mut self, work: Work, held: Held) -> Result<(), Error> {
        let threads = match &self.work {
            Some(threads) => threads,
            None => self.work.insert(self.begin()),
        };
        let is_sent = threads.send((work, held)).is_ok();
        match self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(error) => Err(error),
            // Their panic is the scope's, which tells it to whoever waits for the save.
            None if !is_sent => Err(disk::Error::new(
                "make",
                "objects",
                std::io::Error::other("the threads that make objects are gone"),
            )
            .into()),
            None => Ok(()),
        }
    }

    /// Makes the last object; a tree with one pack needs no thread.
    fn last(&mut self, work: Work, held: Held) -> Result<(), Error> {
        if self.work.is_some() {
            return self.submit(work, held);
        }
        make(self.sealer, self.send, self.failed, work, held);
        Ok(())
    }

    fn begin(&self) -> mpsc::SyncSender<(Work, Held)> {
        // No queue: what waits is in memory.
        let (work, waiting) = mpsc::sync_channel::<(Work, Held)>(0);
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..SEALERS {
            let waiting = Arc::clone(&waiting);
            let (sealer, send, failed) = (self.sealer, self.send, self.failed);
            self.scope.spawn(move || {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((work, held)) = next else { return };
                    make(sealer, send, failed, work, held);
                }
            });
        }
        work
    }
}

/// Makes an object and sends it; after a failure nothing is made any more.
fn make(sealer: &Sealer, send: &Give<'_>, failed: &Mutex<Option<Error>>, work: Work, mut held: Held) {
    if failed.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
        return;
    }
    let made = sealer.seal(work).map_err(|error| disk::Error::new("compress", "an object", error).into());
    let sent = made.and_then(|object| {
        let Some(object) = object else { return Ok(()) };
        held.shrink(object.body.len() as u64);
        send(object, held)
    });
    if let Err(error) = sent {
        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Checks the data of all files against what the workload allows, before anything
/// is sent. Holes cost nothing, but files are opened to find them only when
/// their sizes alone would be too much.
pub(super) fn check_bytes(root: &Dir, walk: &Walk, key: &Key, max_bytes: Option<u64>) -> Result<(), Error> {
    let Some(most) = max_bytes else { return Ok(()) };
    let mut links = LinkGroups::default();
    let is_counted =
        |entry: &&Entry| entry.stat.kind == Kind::File && links.first_of(0, &entry.stat).is_none();
    let files: Vec<&Entry> = walk.entries.iter().filter(is_counted).collect();
    let sum = files.iter().fold(0_u64, |sum, entry| sum.saturating_add(entry.stat.bytes));
    if sum <= most {
        return Ok(());
    }
    let mut parents = Parents::new(root);
    let mut data = 0_u64;
    for entry in files {
        let mut bytes = entry.stat.bytes;
        if (SPARSE_FILE_BYTES..=FILE_BYTES).contains(&bytes) {
            let (parent, name) = parents.of(&entry.path)?;
            let (file, _) = parent.open_file(name)?;
            let holes = disk::holes(&file, bytes, TREE_HOLES)
                .map_err(|error| disk::Error::new("read", parent.label(name), error))?;
            bytes -= holes.iter().map(|(_, length)| length).sum::<u64>();
        }
        data = data.saturating_add(bytes);
    }
    if data <= most {
        return Ok(());
    }
    let reason = format!("the files have {data} bytes together, at most {most} are allowed");
    Err(Error::Limit { key: key.clone(), reason })
}
