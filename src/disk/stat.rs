//! What the disk says about one entry.

use std::{fs::File, io};

use rustix::fs::{FileType, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid};
use serde::{Deserialize, Serialize};

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link; never followed.
    Symlink,
    /// A socket, FIFO or device; never opened.
    Other,
}

/// A point in time as file systems keep it: nanoseconds are counted from the second, upwards.
///
/// Two numbers, because a tenant may set years that do not fit 64 bits of nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "(i64, u32)", into = "(i64, u32)")]
pub struct Time {
    /// Seconds since the Unix epoch.
    pub seconds: i64,
    /// Nanoseconds of that second, below 1 000 000 000.
    pub nanoseconds: u32,
}

/// Type, permissions, owner, size and times of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Its type.
    pub kind: Kind,
    /// Permission bits with set-id and sticky bits: `0o7777` at most.
    pub mode: u32,
    /// Owning user.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
    /// Apparent size in bytes.
    pub bytes: u64,
    /// When the content last changed; anyone who owns it can set this.
    pub modified: Time,
    /// When anything about it last changed; only the kernel sets this.
    pub changed: Time,
    /// The file system it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

/// Gives an open file its owner, permission bits and modification time, in the
/// order in which none undoes another (a new owner takes the set-id bits away).
///
/// # Errors
/// Whatever the kernel answers.
pub fn set_file_metadata(file: &File, (uid, gid): (u32, u32), mode: u32, modified: Time) -> io::Result<()> {
    rustix::fs::fchown(file, Some(Uid::from_raw_unchecked(uid)), Some(Gid::from_raw_unchecked(gid)))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
    rustix::fs::futimens(file, &only_modified(modified))?;
    Ok(())
}

/// Gives a file that was just created an owner and permission bits, as far as it
/// needs them.
///
/// # Errors
/// Whatever the kernel answers.
pub fn set_new_file_metadata(file: &File, owner: Option<(u32, u32)>, mode: Option<u32>) -> io::Result<()> {
    if let Some((uid, gid)) = owner {
        rustix::fs::fchown(file, Some(Uid::from_raw_unchecked(uid)), Some(Gid::from_raw_unchecked(gid)))?;
    }
    if let Some(mode) = mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// Sets an open file's modification time.
///
/// # Errors
/// Whatever the kernel answers.
pub fn set_file_modified(file: &File, modified: Time) -> io::Result<()> {
    Ok(rustix::fs::futimens(file, &only_modified(modified))?)
}

/// Leaves the time of the last access as it is.
pub(super) fn only_modified(time: Time) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds) },
    }
}

// === impl Time ===

impl Time {
    /// Returns milliseconds since the Unix epoch; 0 for times before it.
    pub fn unix_ms(self) -> u64 {
        u64::try_from(self.seconds)
            .unwrap_or(0)
            .saturating_mul(1_000)
            .saturating_add(u64::from(self.nanoseconds) / 1_000_000)
    }

    /// Returns the time that many seconds earlier.
    #[must_use]
    pub fn earlier(self, seconds: i64) -> Self {
        Self { seconds: self.seconds.saturating_sub(seconds), ..self }
    }
}

impl From<(i64, u32)> for Time {
    fn from((seconds, nanoseconds): (i64, u32)) -> Self {
        Self { seconds, nanoseconds }
    }
}

impl From<Time> for (i64, u32) {
    fn from(time: Time) -> Self {
        (time.seconds, time.nanoseconds)
    }
}

// === impl Stat ===

impl Stat {
    /// Says what an open file is.
    ///
    /// # Errors
    /// Whatever the kernel answers.
    pub fn of_file(file: &File) -> io::Result<Self> {
        Ok(Self::from(rustix::fs::fstat(file)?))
    }
}

impl From<rustix::fs::Stat> for Stat {
    fn from(stat: rustix::fs::Stat) -> Self {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File,
            FileType::Symlink => Kind::Symlink,
            _ => Kind::Other,
        };
        Self {
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
            modified: Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 },
            changed: Time { seconds: stat.st_ctime, nanoseconds: stat.st_ctime_nsec as u32 },
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}
