//! Out of the store.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures_util::FutureExt as _;

use crate::{
    clock::{SystemClock, random_hex},
    disk::{self, Dir},
    model::{Key, spec::Layout},
    state::{
        history::History,
        mirror::{PIECE_BYTES, PlainObjects, data_of},
        snapshot::{
            CodecError, Digest, Item, Manifest, ManifestObject, Node, ObjectCodec, ObjectKind, damaged,
            newest_record, object_key,
        },
    },
};

use super::{
    Error, FileHead, Progress, Sink, StateError, Watch, archive::ArchiveSink, directory::DirectorySink,
};

/// Packs that are kept decoded: files of one directory lie in few.
const PACKS: usize = 12;
/// Fast, and about as small as slower ones.
const LEVEL: i32 = 3;

/// Where a tree goes.
pub enum Export {
    /// Into a directory that is not there yet, or is empty.
    Directory(PathBuf),
    /// Into a file that is not there yet, as `.tar.zst`.
    Archive(PathBuf),
    /// Into a stream, as `.tar.zst`.
    Stream(Box<dyn Write + Send>),
}

/// What was exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// The snapshot.
    pub snapshot: u64,
    /// Entries.
    pub entries: u64,
    /// Regular files.
    pub files: u64,
    /// Their bytes, holes with them.
    pub bytes: u64,
}

/// Exports a snapshot, the newest when none is named. Nothing is at the target before
/// all of it has been read and compared, but for a stream.
///
/// # Errors
/// [`Error`]; a stream has a part then, and no end mark.
pub async fn export(
    history: &History,
    key: &Key,
    snapshot: Option<u64>,
    to: Export,
    watch: &mut Watch<'_>,
) -> Result<Exported, Error> {
    let number = match snapshot {
        Some(number) => number,
        None => {
            let newest = newest_record(&**history.store(), key, &key.digest()).await?;
            newest.and_then(|newest| newest.tree).map_or(0, |tree| tree.snapshot)
        }
    };
    let (tree, manifest) = history.tree_of(key, number).await?;
    let codec = history.encryption().codec(key);
    let mut carrier = Carrier { history, key, manifest: &manifest, codec, packs: VecDeque::new(), watch };
    match to {
        Export::Directory(path) => {
            let aside = beside(&path, "a directory")?;
            if path.is_dir() && std::fs::read_dir(&path).is_ok_and(|mut names| names.next().is_some()) {
                return Err(exists(&path, "is not empty"));
            }
            let is_root = rustix::process::geteuid().is_root();
            let dir = Dir::ensure(&aside)?;
            let mut sink = DirectorySink::new(dir, is_root, false);
            let carried = carrier.all(&mut sink).await;
            put(carried, &aside, &path, |path| std::fs::remove_dir_all(path))?;
        }
        Export::Archive(path) => {
            let aside = beside(&path, "a file")?;
            if path.symlink_metadata().is_ok() {
                return Err(exists(&path, "is there already"));
            }
            let failed = |error| disk::Error::new("create", aside.display().to_string(), error);
            let file = File::create_new(&aside).map_err(failed)?;
            let carried = archive(&mut carrier, BufWriter::new(file), &aside).await.and_then(|file| {
                let file = file.into_inner().map_err(|error| error.into_error());
                let synced = file.and_then(|file| file.sync_all());
                synced.map_err(|error| disk::Error::new("write", aside.display().to_string(), error).into())
            });
            put(carried, &aside, &path, |path| std::fs::remove_file(path))?;
        }
        Export::Stream(stream) => {
            let mut stream = archive(&mut carrier, stream, Path::new("-")).await?;
            stream.flush().map_err(|error| disk::Error::new("write", "-", error))?;
        }
    }
    let entries = manifest.items.len() as u64;
    Ok(Exported { snapshot: number, entries, files: tree.files, bytes: tree.bytes })
}

async fn archive<W: Write + Send>(carrier: &mut Carrier<'_, '_>, to: W, name: &Path) -> Result<W, Error> {
    let name = name.display().to_string();
    let failed = |error| Error::from(disk::Error::new("write", name.clone(), error));
    let mut encoder = zstd::Encoder::new(to, LEVEL).map_err(failed)?;
    encoder.include_checksum(true).map_err(failed)?;
    let mut sink = ArchiveSink::new(encoder, name.clone());
    carrier.all(&mut sink).await?;
    sink.into_inner().finish().map_err(failed)
}

/// Names a place beside the target, on the same file system.
fn beside(path: &Path, what: &str) -> Result<PathBuf, Error> {
    let name = path.file_name().ok_or_else(|| exists(path, &format!("is no name for {what}")))?;
    let mut aside = std::ffi::OsString::from(".");
    aside.push(name);
    aside.push(format!(".{}", random_hex(&SystemClock, 8)));
    Ok(path.with_file_name(aside))
}

/// Gives what was carried its name, or removes it.
fn put(
    carried: Result<(), Error>,
    aside: &Path,
    path: &Path,
    remove: impl Fn(&Path) -> std::io::Result<()>,
) -> Result<(), Error> {
    let named = carried.and_then(|()| {
        let renamed = std::fs::rename(aside, path);
        renamed.map_err(|error| disk::Error::new("rename", path.display().to_string(), error).into())
    });
    if named.is_err() {
        // Best effort: the error says what matters.
        let _ = remove(aside);
    }
    named
}

fn exists(path: &Path, reason: &str) -> Error {
    Error::Refused { what: path.display().to_string(), reason: reason.to_owned() }
}

/// Carries one snapshot into a sink.
struct Carrier<'a, 'w> {
    history: &'a History,
    key: &'a Key,
    manifest: &'a Manifest,
    codec: ObjectCodec,
    packs: VecDeque<(u32, Bytes)>,
    watch: &'a mut Watch<'w>,
}

// === impl Carrier ===

impl Carrier<'_, '_> {
    async fn all(&mut self, sink: &mut dyn Sink) -> Result<(), Error> {
        let manifest = self.manifest;
        sink.root(&manifest.root, &manifest.root_xattrs)?;
        let mut progress = Progress { of: manifest.items.len() as u64, ..Progress::default() };
        for item in &manifest.items {
            let path = item.path.0.as_slice();
            match &item.node {
                Node::Directory => sink.directory(path, &item.meta, &item.xattrs)?,
                Node::Symlink { target } => sink.symlink(path, &item.meta, &target.0)?,
                Node::HardLink { to } => sink.hard_link(path, &item.meta, &to.0)?,
                Node::File { bytes, holes, .. } => {
                    let (meta, xattrs) = (item.meta, item.xattrs.as_slice());
                    sink.file(FileHead { path, meta, xattrs, bytes: *bytes, holes })?;
                    self.contents(item, sink).await?;
                    sink.end_file()?;
                    progress.bytes += bytes;
                }
            }
            progress.entries += 1;
            (self.watch)(progress);
        }
        sink.finish()
    }

    async fn contents(&mut self, item: &Item, sink: &mut dyn Sink) -> Result<(), Error> {
        let Node::File { bytes, digest, pieces, holes } = &item.node else { return Ok(()) };
        if self.manifest.layout == Layout::Mirror {
            return self.plain(&item.path.0, *bytes, *digest, holes, sink).await;
        }
        let other = || damaged(self.key, format!("{} has another content", disk::shown(&item.path.0)));
        let mut whole = blake3::Hasher::new();
        let is_packed = self.manifest.is_packed(pieces);
        for piece in pieces {
            let object = self.manifest.objects.get(piece.object as usize).ok_or_else(other)?;
            let content = self.object(piece.object, object).await?;
            let range =
                usize::try_from(piece.offset).ok().zip(usize::try_from(piece.offset + piece.bytes).ok());
            let data = range.and_then(|(from, to)| content.get(from..to)).ok_or_else(other)?;
            // A chunk of today was compared when it was decoded.
            if is_packed || self.manifest.version == 0 {
                whole.update(data);
            }
            if is_packed && whole.finalize() != digest.0 {
                return Err(other().into());
            }
            sink.data(data)?;
        }
        if !is_packed && !pieces.is_empty() && self.manifest.version == 0 && whole.finalize() != digest.0 {
            return Err(other().into());
        }
        Ok(())
    }

    async fn object(&mut self, number: u32, object: &ManifestObject) -> Result<Bytes, Error> {
        if let Some((_, content)) = self.packs.iter().find(|(pack, _)| *pack == number) {
            return Ok(content.clone());
        }
        let name = object_key(&self.key.digest(), &object.name);
        let body = self.history.store().get(&name).await;
        let body = body.map_err(|source| StateError::Store { key: self.key.clone(), source })?;
        let body = body.ok_or_else(|| damaged(self.key, format!("{name} is not there")))?;
        let content = self.codec.decode(object, body);
        let content = content.map_err(|error: CodecError| StateError::of_codec(self.key, error))?;
        if object.name.kind == ObjectKind::Pack {
            if self.packs.len() >= PACKS {
                self.packs.pop_front();
            }
            self.packs.push_back((number, content.clone()));
        }
        Ok(content)
    }

    /// Reads a plain object. A large one is read twice: what is written cannot be taken back.
    async fn plain(
        &self,
        path: &[u8],
        bytes: u64,
        digest: Digest,
        holes: &[(u64, u64)],
        sink: &mut dyn Sink,
    ) -> Result<(), Error> {
        let store = &**self.history.store();
        let objects = PlainObjects::new(store, self.key);
        let name = objects.find(path, bytes, digest, &|_, _| async { Ok(()) }.boxed()).await?;
        let (mut at, mut hasher) = (0, blake3::Hasher::new());
        while at < bytes {
            let piece = store.get_range(&name, at, PIECE_BYTES.min(bytes - at)).await;
            let piece = piece.map_err(|source| StateError::Store { key: self.key.clone(), source })?;
            let piece = piece.filter(|piece| !piece.is_empty());
            let piece =
                piece.ok_or_else(|| damaged(self.key, format!("{name} became shorter while it was read")))?;
            hasher.update(&piece);
            for (start, end) in data_of(holes, at, at + piece.len() as u64) {
                let run = usize::try_from(start - at).ok().zip(usize::try_from(end - at).ok());
                sink.data(run.and_then(|(from, to)| piece.get(from..to)).unwrap_or_default())?;
            }
            at += piece.len() as u64;
        }
        if bytes > 0 && hasher.finalize() != digest.0 {
            return Err(damaged(self.key, format!("{name} changed while it was read")).into());
        }
        Ok(())
    }
}
