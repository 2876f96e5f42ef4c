//! A directory by its descriptor, and everything that is done by name within it.

use std::{
    fs::File,
    io,
    ops::ControlFlow,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, FlockOperation, Gid, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, SeekFrom, Uid},
    io::Errno,
};

use super::{Error, Kind, Stat, Time, path::pieces, shown, stat::only_modified};

/// The longest name the kernel takes, in bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// Below `PATH_MAX` (4096) with room to spare.
const MAX_CALL_PATH_BYTES: usize = 3_800;
/// `openat2` may answer EAGAIN when a rename elsewhere races the lookup.
const OPEN_ATTEMPTS: u32 = 64;
const NAMES_BUFFER_BYTES: usize = 32 * 1024;
/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

const CONFINED: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Holds a directory open; all names are looked up in it and never beyond it.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    /// For messages only.
    shown: String,
}

// === impl Dir: opening ===

impl Dir {
    /// Opens a directory by a path of ours; links in it are followed.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let label = shown(path.as_os_str().as_bytes());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, shown: label }),
            Err(errno) => Err(Error::new("open", label, errno)),
        }
    }

    /// Returns its descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens a directory by a path of ours, making it and its parents (0700) when absent.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn ensure(path: &Path) -> Result<Self, Error> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| Error::new("mkdir", shown(path.as_os_str().as_bytes()), source))?;
        Self::open(path)
    }

    /// Opens the directory at a relative path of any length; an empty one is this
    /// directory again, with a read position of its own.
    ///
    /// # Errors
    /// `ELOOP` where a link is in the way, `ENOTDIR`, `ENOENT`, `EXDEV` at a mount.
    pub fn open_dir(&self, path: &[u8]) -> Result<Self, Error> {
        // No O_NOFOLLOW: it would turn the ELOOP of RESOLVE_NO_SYMLINKS into ENOTDIR.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let label = self.label(path);
        if path.is_empty() {
            let fd = confined(self.fd.as_fd(), b".", flags).map_err(|e| Error::new("open", &label, e))?;
            return Ok(Self { fd, shown: label });
        }
        let mut at: Option<OwnedFd> = None;
        for piece in pieces(path, MAX_CALL_PATH_BYTES) {
            let from = at.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
            at = Some(confined(from, piece, flags).map_err(|e| Error::new("open", &label, e))?);
        }
        let fd = at.ok_or_else(|| Error::new("open", &label, Errno::NOENT))?;
        Ok(Self { fd, shown: label })
    }

    /// Opens the regular file `name` for reading; answers what it is, too.
    ///
    /// The type is looked at first, so that no device is ever opened, and once
    /// more afterwards, when it cannot change; a FIFO swapped in between does
    /// not block.
    ///
    /// # Errors
    /// `ELOOP` for a link, `EINVAL` for anything else that is not a regular file.
    pub fn open_file(&self, name: &[u8]) -> Result<(File, Stat), Error> {
        let fail = |errno: Errno| Error::new("open", self.label(name), errno);
        match self.stat_of(name)?.kind {
            Kind::File => {}
            Kind::Symlink => return Err(fail(Errno::LOOP)),
            Kind::Directory => return Err(fail(Errno::ISDIR)),
            Kind::Other => return Err(fail(Errno::INVAL)),
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = confined(self.fd.as_fd(), name, flags).map_err(fail)?;
        let stat = Stat::from(rustix::fs::fstat(&fd).map_err(fail)?);
        if stat.kind != Kind::File {
            return Err(fail(Errno::INVAL));
        }
        Ok((File::from(fd), stat))
    }

    /// Opens the regular file `name` for writing, for restoring a part of it.
    ///
    /// # Errors
    /// As [`Dir::open_file`].
    pub fn open_file_for_writing(&self, name: &[u8]) -> Result<File, Error> {
        let fail = |errno: Errno| Error::new("open", self.label(name), errno);
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = confined(self.fd.as_fd(), name, flags).map_err(fail)?;
        if Stat::from(rustix::fs::fstat(&fd).map_err(fail)?).kind != Kind::File {
            return Err(fail(Errno::INVAL));
        }
        Ok(File::from(fd))
    }

    /// Creates the regular file `name`, mode 0600.
    ///
    /// # Errors
    /// `EEXIST` when anything has this name.
    pub fn create_file(&self, name: &[u8]) -> Result<File, Error> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o600))
            .map(File::from)
            .map_err(|errno| self.error("create", name, errno))
    }

    /// Creates the regular file `name` for writing, with this mode as far as the
    /// process's umask lets it.
    ///
    /// # Errors
    /// `EEXIST` when anything has this name.
    pub fn create_file_with_mode(&self, name: &[u8], mode: u32) -> Result<File, Error> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(mode))
            .map(File::from)
            .map_err(|errno| self.error("create", name, errno))
    }

    /// Opens the directory `name`, making it (0700) when absent.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn ensure_dir(&self, name: &[u8]) -> Result<Self, Error> {
        match self.open_dir(name) {
            Err(error) if error.is_missing() => {}
            opened => return opened,
        }
        match self.make_dir(name) {
            Err(error) if !error.is(Errno::EXIST) => Err(error),
            _ => self.open_dir(name),
        }
    }
}

// === impl Dir: entries by name ===

impl Dir {
    /// Makes the directory `name`, mode 0700.
    ///
    /// # Errors
    /// `EEXIST` when anything has this name.
    pub fn make_dir(&self, name: &[u8]) -> Result<(), Error> {
        rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(0o700))
            .map_err(|errno| self.error("mkdir", name, errno))
    }

    /// Makes the symbolic link `name`; the target is data.
    ///
    /// # Errors
    /// `EEXIST` when anything has this name.
    pub fn make_symlink(&self, name: &[u8], target: &[u8]) -> Result<(), Error> {
        rustix::fs::symlinkat(target, &self.fd, name).map_err(|errno| self.error("symlink", name, errno))
    }

    /// Makes `new_name` in another directory one more name of the entry `name`; of a
    /// link itself.
    ///
    /// # Errors
    /// `EEXIST` when anything has the new name, `EMLINK` when there are too many.
    pub fn link_to(&self, name: &[u8], to: &Dir, new_name: &[u8]) -> Result<(), Error> {
        rustix::fs::linkat(&self.fd, name, &to.fd, new_name, AtFlags::empty())
            .map_err(|errno| self.error("link", name, errno))
    }

    /// Reads the target of the symbolic link `name`.
    ///
    /// # Errors
    /// `EINVAL` when it is none.
    pub fn read_link(&self, name: &[u8]) -> Result<Vec<u8>, Error> {
        rustix::fs::readlinkat(&self.fd, name, Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(|errno| self.error("readlink", name, errno))
    }

    /// Says what `name` is; a link is itself.
    ///
    /// # Errors
    /// `ENOENT` when there is nothing.
    pub fn stat_of(&self, name: &[u8]) -> Result<Stat, Error> {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
            .map(Stat::from)
            .map_err(|errno| self.error("stat", name, errno))
    }

    /// Removes the entry `name` unless it is a directory.
    ///
    /// # Errors
    /// `EISDIR` for a directory, `ENOENT` when there is nothing.
    pub fn remove_file(&self, name: &[u8]) -> Result<(), Error> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())
            .map_err(|errno| self.error("unlink", name, errno))
    }

    /// Removes the empty directory `name`.
    ///
    /// # Errors
    /// `ENOTEMPTY` while it holds anything, `ENOENT` when there is nothing.
    pub fn remove_dir(&self, name: &[u8]) -> Result<(), Error> {
        rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR)
            .map_err(|errno| self.error("rmdir", name, errno))
    }

    /// Moves the entry `name` into another directory of the same file system.
    ///
    /// # Errors
    /// `EEXIST` when the new name is taken: nothing is ever replaced.
    pub fn move_to(&self, name: &[u8], to: &Dir, new_name: &[u8]) -> Result<(), Error> {
        rustix::fs::renameat_with(&self.fd, name, &to.fd, new_name, RenameFlags::NOREPLACE)
            .map_err(|errno| self.error("rename", name, errno))
    }

    /// Moves the file `name` into another directory, replacing what has that name there.
    ///
    /// # Errors
    /// `EISDIR` when a directory has the new name.
    pub fn replace(&self, name: &[u8], to: &Dir, new_name: &[u8]) -> Result<(), Error> {
        rustix::fs::renameat(&self.fd, name, &to.fd, new_name)
            .map_err(|errno| self.error("rename", name, errno))
    }

    /// Gives the entry `name` to an owner; a link itself, not where it leads.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn set_owner_of(&self, name: &[u8], uid: u32, gid: u32) -> Result<(), Error> {
        let (uid, gid) = (Uid::from_raw_unchecked(uid), Gid::from_raw_unchecked(gid));
        rustix::fs::chownat(&self.fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.error("chown", name, errno))
    }

    /// Sets the modification time of the entry `name`; of a link itself.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn set_modified_of(&self, name: &[u8], time: Time) -> Result<(), Error> {
        rustix::fs::utimensat(&self.fd, name, &only_modified(time), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.error("utimens", name, errno))
    }
}

// === impl Dir: the directory itself ===

impl Dir {
    /// Says what this directory is.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn stat(&self) -> Result<Stat, Error> {
        rustix::fs::fstat(&self.fd).map(Stat::from).map_err(|errno| self.error("stat", b"", errno))
    }

    /// Gives this directory to an owner.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn set_owner(&self, uid: u32, gid: u32) -> Result<(), Error> {
        let (uid, gid) = (Uid::from_raw_unchecked(uid), Gid::from_raw_unchecked(gid));
        rustix::fs::fchown(&self.fd, Some(uid), Some(gid)).map_err(|errno| self.error("chown", b"", errno))
    }

    /// Sets this directory's permission bits.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn set_mode(&self, mode: u32) -> Result<(), Error> {
        rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(mode)).map_err(|e| self.error("chmod", b"", e))
    }

    /// Sets this directory's modification time.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn set_modified(&self, time: Time) -> Result<(), Error> {
        rustix::fs::futimens(&self.fd, &only_modified(time)).map_err(|e| self.error("utimens", b"", e))
    }

    /// Returns the names in this directory, in the file system's order, at most `most`.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn names(&self, most: usize) -> Result<Vec<Vec<u8>>, Error> {
        let mut names = Vec::new();
        self.each_name(|name| {
            if names.len() >= most {
                return ControlFlow::Break(());
            }
            names.push(name.to_vec());
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }

    /// Returns whether there is nothing in this directory.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn is_empty(&self) -> Result<bool, Error> {
        Ok(self.names(1)?.is_empty())
    }

    /// Shows every name in this directory to `visit` until it breaks.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn each_name(&self, mut visit: impl FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), Error> {
        rustix::fs::seek(&self.fd, SeekFrom::Start(0)).map_err(|e| self.error("seek", b"", e))?;
        let mut buffer = Vec::with_capacity(NAMES_BUFFER_BYTES);
        let mut entries = RawDir::new(&self.fd, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|errno| self.error("getdents", b"", errno))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." && visit(name).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Writes everything of this file system that is not on disk yet to disk.
    ///
    /// # Errors
    /// Whatever the kernel answers; then nothing is known to be on disk.
    pub fn sync_file_system(&self) -> Result<(), Error> {
        rustix::fs::syncfs(&self.fd).map_err(|errno| self.error("syncfs", b"", errno))
    }

    /// Returns whether the file system is in memory only, a tmpfs or ramfs: nothing of
    /// it is written back to a disk.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn is_in_memory(&self) -> Result<bool, Error> {
        rustix::fs::fstatfs(&self.fd)
            .map(|statfs| IN_MEMORY.contains(&(statfs.f_type as u64)))
            .map_err(|errno| self.error("statfs", b"", errno))
    }

    /// Returns how many bytes its file system has room for.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn free_bytes(&self) -> Result<u64, Error> {
        rustix::fs::fstatvfs(&self.fd)
            .map(|statvfs| statvfs.f_bavail.saturating_mul(statvfs.f_frsize))
            .map_err(|errno| self.error("statvfs", b"", errno))
    }

    /// Reads this directory's extended attributes; see [`super::attributes`].
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn attributes(&self) -> Result<super::Attributes, Error> {
        super::attributes(&self.fd).map_err(|source| Error::new("listxattr", self.label(b""), source))
    }

    /// Sets one of this directory's extended attributes.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn set_attribute(&self, name: &[u8], value: &[u8]) -> Result<(), Error> {
        super::set_attribute(&self.fd, name, value)
            .map_err(|source| Error::new("setxattr", self.label(b""), source))
    }

    /// Gives this directory's extended attributes to another; see [`super::copy_attributes`].
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn copy_attributes_to(&self, to: &Dir) -> Result<(), Error> {
        super::copy_attributes(&self.fd, &to.fd)
            .map_err(|source| Error::new("copy attributes of", self.label(b""), source))
    }

    /// Locks this directory against every other holder of such a lock, without waiting;
    /// answers whether it is ours. The lock ends with the descriptor.
    ///
    /// # Errors
    /// Whatever the kernel answers, except that somebody else holds it.
    pub fn try_lock(&self) -> Result<bool, Error> {
        match rustix::fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(self.error("flock", b"", errno)),
        }
    }

    /// Returns how `name` in this directory is shown in messages.
    pub fn label(&self, name: &[u8]) -> String {
        if name.is_empty() { self.shown.clone() } else { format!("{}/{}", self.shown, shown(name)) }
    }

    fn error(&self, operation: &'static str, name: &[u8], errno: Errno) -> Error {
        Error::new(operation, self.label(name), io::Error::from(errno))
    }
}

fn confined(at: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut attempt = 0;
    loop {
        match rustix::fs::openat2(at, path, flags, Mode::empty(), CONFINED) {
            Err(Errno::AGAIN | Errno::INTR) if attempt < OPEN_ATTEMPTS => attempt += 1,
            other => return other,
        }
    }
}
