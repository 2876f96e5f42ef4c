//! The file-system calls of the local store, all relative to one open directory.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{
    clock::{SystemClock, random_hex},
    store::{Creation, Error, MAX_OBJECT_BYTES},
};

/// What an object's file ends with.
pub(super) const OBJECT_SUFFIX: &str = ".OBJ";

/// What the directory of a segment ends with that would otherwise be taken for
/// an object's file or for [`TEMPORARY`]: no key has this character.
const ESCAPE: char = '%';

/// Where objects are written before they get their name.
pub(super) const TEMPORARY: &str = ".TMP";

/// A writer that is older than this is dead.
const TEMPORARY_MAX_AGE: Duration = Duration::from_secs(3600);

/// A parent directory may be removed by a `delete` as often as this between its
/// making and its use.
const PLACE_ATTEMPTS: u32 = 16;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// An open directory that holds objects.
pub(super) struct Folder {
    root: OwnedFd,
}

/// What stands at a path.
pub(super) struct Found {
    pub(super) file_type: FileType,
    pub(super) bytes: u64,
    pub(super) modified_ms: u64,
}

/// Why a call failed, by what the caller must believe afterwards.
#[derive(Debug)]
pub(super) enum Fault {
    /// Nothing was changed; it may work later.
    Unchanged(String),
    /// Nothing was changed; an operator must act.
    Refused(String),
    /// The change may or may not be there, or may not survive a power loss.
    Unsettled(String),
}

/// A file in `.TMP` that is removed when it is dropped.
pub(super) struct Temporary<'a> {
    root: &'a OwnedFd,
    path: String,
}

// === impl Fault ===

impl Fault {
    /// Makes the port's error of it: a read has no unknown outcome.
    pub(super) fn into_error(self, operation: &'static str, key: &str) -> Error {
        let is_write = matches!(operation, "put" | "create" | "delete" | "copy" | "put_parts");
        match self {
            Self::Unsettled(reason) if is_write => Error::unknown(operation, key, reason),
            Self::Unchanged(reason) | Self::Unsettled(reason) => Error::unavailable(operation, key, reason),
            Self::Refused(reason) => Error::refused(operation, key, reason),
        }
    }

    /// Classifies an error of a call that changed nothing under an object's name.
    pub(super) fn unchanged(step: &str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let reason = format!("{step}: {source}");
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::Refused(reason),
            _ => Self::Unchanged(reason),
        }
    }

    fn unsettled(step: &str, source: impl Into<io::Error>) -> Self {
        Self::Unsettled(format!("{step}: {}", source.into()))
    }
}

// === impl Temporary ===

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        // Best effort: what stays is swept at a later start.
        let _ = rustix::fs::unlinkat(self.root, self.path.as_str(), AtFlags::empty());
    }
}

// === impl Folder ===

impl Folder {
    /// Opens `path`, makes it and `.TMP` when they are missing, and sweeps `.TMP`.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        if path.symlink_metadata().is_err() {
            make_durably(path)?;
            rustix::fs::chmod(path, Mode::RWXU)?;
        }
        // The path itself may be a symbolic link of the operator's.
        let root = rustix::fs::open(path, DIRECTORY.difference(OFlags::NOFOLLOW), Mode::empty())?;
        let folder = Self { root };
        match rustix::fs::mkdirat(&folder.root, TEMPORARY, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(source.into()),
        }
        folder.sweep()?;
        rustix::fs::fsync(&folder.root)?;
        Ok(folder)
    }

    /// Reads an object.
    pub(super) fn read(&self, key: &str) -> Result<Option<Bytes>, Fault> {
        let Some((file, length)) = self.open_object(key)? else { return Ok(None) };
        if length > MAX_OBJECT_BYTES as u64 {
            return Err(Fault::Refused(format!(
                "not an object of at most {MAX_OBJECT_BYTES} bytes: {length} bytes"
            )));
        }
        let body = read_exactly(&file, length)?;
        Ok(Some(body))
    }

    /// Reads a part of an object.
    pub(super) fn read_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, Fault> {
        let Some((mut file, length)) = self.open_object(key)? else { return Ok(None) };
        let start = offset.min(length);
        let end = offset.saturating_add(bytes).min(length);
        file.seek(SeekFrom::Start(start)).map_err(|source| Fault::unchanged("seek", source))?;
        read_exactly(&file, end - start).map(Some)
    }

    /// Copies an object, in the kernel where the file system can share blocks;
    /// answers `false` when there is none.
    pub(super) fn copy(&self, from: &str, to: &str) -> Result<bool, Fault> {
        let Some((source, length)) = self.open_object(from)? else { return Ok(false) };
        let (temporary, file) = self.temporary()?;
        let copied = io::copy(&mut (&source).take(length), &mut &file)
            .and_then(|copied| file.sync_all().map(|()| copied))
            .map_err(|source| Fault::unchanged("copy", source))?;
        if copied != length {
            return Err(Fault::Unchanged(format!("copied {copied} of {length} bytes")));
        }
        self.rename(temporary, to).map(|()| true)
    }

    /// Opens an object; returns it with its length, none when it is not there.
    fn open_object(&self, key: &str) -> Result<Option<(File, u64)>, Fault> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.root, object_path(key), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return self.check_is_there().map(|()| None),
            Err(source) => return Err(Fault::unchanged("open", source)),
        };
        let metadata = file.metadata().map_err(|source| Fault::unchanged("stat", source))?;
        if !metadata.is_file() {
            return Err(Fault::Refused("not an object: not a file".to_owned()));
        }
        Ok(Some((file, metadata.len())))
    }

    /// Writes an object under its name, whatever is there.
    pub(super) fn replace(&self, key: &str, body: &[u8]) -> Result<(), Fault> {
        let temporary = self.write(body)?;
        self.rename(temporary, key)
    }

    /// Gives a complete and synced file its name, whatever is there.
    pub(super) fn rename(&self, temporary: Temporary<'_>, key: &str) -> Result<(), Fault> {
        let path = object_path(key);
        self.place(key, || {
            rustix::fs::renameat(&self.root, temporary.path.as_str(), &self.root, path.as_str())
        })
        .map_err(|source| Fault::unchanged("rename", source))?;
        self.sync_above(key).map_err(|source| Fault::unsettled("sync of the directory", source))
    }

    /// Writes an object under its name if there is none.
    ///
    /// A hard link of the complete file either makes the name or fails; unlike
    /// `renameat2` it does so on network file systems too.
    pub(super) fn create(&self, key: &str, body: &[u8]) -> Result<Creation, Fault> {
        // Most creates that lose find the winner's object; this spares them the write.
        if rustix::fs::statat(&self.root, object_path(key), AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return self.exists(key);
        }
        let temporary = self.write(body)?;
        let (from, to) = (temporary.path.as_str(), object_path(key));
        let link = || rustix::fs::linkat(&self.root, from, &self.root, to.as_str(), AtFlags::empty());
        match self.place(key, link) {
            Ok(()) => {}
            Err(Errno::EXIST) => return self.exists(key),
            Err(source) => return Err(Fault::unchanged("link", source)),
        }
        self.sync_above(key).map_err(|source| Fault::unsettled("sync of the directory", source))?;
        Ok(Creation::Created)
    }

    /// Removes an object, and the directories above it that are empty then.
    pub(super) fn remove(&self, key: &str) -> Result<(), Fault> {
        match rustix::fs::unlinkat(&self.root, object_path(key), AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT) => return self.check_is_there(),
            Err(source) => return Err(Fault::unchanged("unlink", source)),
        }
        self.sync_above(key).map_err(|source| Fault::unsettled("sync of the directory", source))?;
        // Best effort: an empty directory is not an object. One that a writer
        // filled meanwhile is not empty, and one that it is about to fill it
        // makes again.
        let path = object_path(key);
        let mut rest = path.as_str();
        while let Some((folder, _)) = rest.rsplit_once('/') {
            if rustix::fs::unlinkat(&self.root, folder, AtFlags::REMOVEDIR).is_err() {
                break;
            }
            rest = folder;
        }
        Ok(())
    }

    /// Opens a directory of the tree; none when it is not there.
    pub(super) fn open_dir(&self, path: &str) -> Result<Option<Dir>, Fault> {
        let path = if path.is_empty() { "." } else { path };
        let opened = rustix::fs::openat(&self.root, path, DIRECTORY, Mode::empty()).and_then(Dir::new);
        match opened {
            Ok(dir) => Ok(Some(dir)),
            Err(Errno::NOENT | Errno::NOTDIR) => self.check_is_there().map(|()| None),
            Err(source) => Err(Fault::unchanged("open of a directory", source)),
        }
    }

    /// Returns what stands at `path`; none when it is not there.
    pub(super) fn stat(&self, path: &str) -> Result<Option<Found>, Fault> {
        match rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
                Ok(Some(Found {
                    file_type: FileType::from_raw_mode(stat.st_mode),
                    bytes: u64::try_from(stat.st_size).unwrap_or(0),
                    modified_ms: seconds.saturating_mul(1000)
                        + u64::from(stat.st_mtime_nsec as u32) / 1_000_000,
                }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(source) => Err(Fault::unchanged("stat", source)),
        }
    }

    /// Says that an object was there first. Its maker may not have synced its
    /// name yet, and the caller will act on it.
    fn exists(&self, key: &str) -> Result<Creation, Fault> {
        match self.sync_above(key) {
            Ok(()) => Ok(Creation::Exists),
            Err(source) => Err(Fault::unsettled("sync of the directory", source)),
        }
    }

    /// Proves that a missing name is missing from a store that is there: in a
    /// directory that was itself removed, every name is missing.
    pub(super) fn check_is_there(&self) -> Result<(), Fault> {
        match rustix::fs::fstat(&self.root) {
            Ok(stat) if stat.st_nlink > 0 => Ok(()),
            Ok(_) => Err(Fault::Unchanged("the store's directory was removed".to_owned())),
            Err(source) => Err(Fault::unchanged("stat of the store's directory", source)),
        }
    }

    /// Writes and syncs a temporary file.
    fn write(&self, body: &[u8]) -> Result<Temporary<'_>, Fault> {
        let (temporary, mut file) = self.temporary()?;
        file.write_all(body)
            .and_then(|()| file.sync_all())
            .map_err(|source| Fault::unchanged("write", source))?;
        Ok(temporary)
    }

    /// Makes an empty temporary file.
    pub(super) fn temporary(&self) -> Result<(Temporary<'_>, File), Fault> {
        let path = format!("{TEMPORARY}/{}", random_hex(&SystemClock, 16));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.root, path.as_str(), flags, Mode::RUSR | Mode::WUSR)
            .map_err(|source| Fault::unchanged("making a temporary file", source))?;
        Ok((Temporary { root: &self.root, path }, File::from(file)))
    }

    /// Gives a file its name by `step`, making the directories above it when
    /// they are missing.
    fn place(&self, key: &str, step: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
        for _ in 0..PLACE_ATTEMPTS {
            match step() {
                Err(Errno::NOENT) => self.make_above(key)?,
                outcome => return outcome,
            }
        }
        step()
    }

    fn make_above(&self, key: &str) -> Result<(), Errno> {
        let path = object_path(key);
        for (end, _) in path.match_indices('/') {
            match rustix::fs::mkdirat(&self.root, &path[..end], Mode::RWXU) {
                // A `delete` may remove an upper one again: the next attempt makes it.
                Ok(()) | Err(Errno::EXIST | Errno::NOENT) => {}
                Err(source) => return Err(source),
            }
        }
        Ok(())
    }

    /// Syncs the directories above a key, from the nearest to the root.
    ///
    /// All of them, also those that were there: another writer may have made
    /// one a moment ago and not synced it yet. A clean one costs microseconds.
    fn sync_above(&self, key: &str) -> Result<(), Errno> {
        let path = object_path(key);
        let mut rest = path.as_str();
        while let Some((folder, _)) = rest.rsplit_once('/') {
            match rustix::fs::openat(&self.root, folder, DIRECTORY, Mode::empty()) {
                Ok(dir) => rustix::fs::fsync(dir)?,
                // Removed meanwhile, with the object: there is nothing to sync.
                Err(Errno::NOENT) => {}
                Err(source) => return Err(source),
            }
            rest = folder;
        }
        rustix::fs::fsync(&self.root)
    }

    /// Removes temporary files whose writers died. Another server's are younger.
    fn sweep(&self) -> io::Result<()> {
        self.remove_temporary(SystemTime::now() - TEMPORARY_MAX_AGE).map(|_| ())
    }

    /// Removes temporary files that were last written before a time.
    pub(super) fn sweep_before(&self, before_ms: u64) -> Result<u64, Fault> {
        let before = SystemTime::UNIX_EPOCH + Duration::from_millis(before_ms);
        self.remove_temporary(before).map_err(|source| Fault::unchanged("sweep", source))
    }

    fn remove_temporary(&self, before: SystemTime) -> io::Result<u64> {
        let dir = rustix::fs::openat(&self.root, TEMPORARY, DIRECTORY, Mode::empty())?;
        let mut removed = 0;
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let written =
                SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            if written < before && is_file && rustix::fs::unlinkat(&dir, name, AtFlags::empty()).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Reads `length` bytes from where a file stands.
fn read_exactly(file: &File, length: u64) -> Result<Bytes, Fault> {
    let mut body = Vec::with_capacity(usize::try_from(length).unwrap_or(MAX_OBJECT_BYTES));
    file.take(length).read_to_end(&mut body).map_err(|source| Fault::unchanged("read", source))?;
    // A file is complete before it has its name, and never written again.
    if body.len() as u64 != length {
        return Err(Fault::Unchanged(format!("read {} of {length} bytes", body.len())));
    }
    Ok(body.into())
}

/// Makes a directory and those above it, so that their names survive a power loss.
fn make_durably(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let missing: Vec<_> = path.ancestors().take_while(|dir| dir.symlink_metadata().is_err()).collect();
    std::fs::create_dir_all(&path)?;
    for dir in missing {
        if let Some(parent) = dir.parent() {
            File::open(parent)?.sync_all()?;
        }
    }
    Ok(())
}

pub(super) fn object_path(key: &str) -> String {
    match key.rsplit_once('/') {
        Some((folder, name)) => format!("{}/{name}{OBJECT_SUFFIX}", folder_path(folder)),
        None => format!("{key}{OBJECT_SUFFIX}"),
    }
}

/// Returns the directory of the keys below `folder` (without a `/` at its end).
pub(super) fn folder_path(folder: &str) -> String {
    let mut path = String::with_capacity(folder.len());
    for (n, segment) in folder.split('/').enumerate() {
        if n > 0 {
            path.push('/');
        }
        path.push_str(segment);
        if segment.ends_with(OBJECT_SUFFIX) || segment == TEMPORARY {
            path.push(ESCAPE);
        }
    }
    path
}

/// Returns the segment of which `name` is the directory; none when it is of no
/// segment.
pub(super) fn segment_of(name: &str) -> Option<&str> {
    match name.strip_suffix(ESCAPE) {
        Some(segment) if folder_path(segment) == name => Some(segment),
        None if folder_path(name) == name => Some(name),
        _ => None,
    }
}
