//! State out of the store and into it: directories, archives, and trees of plain objects.
//!
//! Both ways everything goes through a `Sink`: an export fills a directory or an
//! archive, an import a scratch directory, which is then saved as any tree is. Only one
//! object is decoded at a time (and a few packs are kept), so memory does not grow with
//! the state.
//!
//! # Archives
//! A tar in the POSIX format, compressed by zstd: times in nanoseconds (`mtime`), extended
//! attributes (`SCHILY.xattr.…`), long names, large sizes, and holes (`GNU.sparse.*` 1.0)
//! as GNU tar and bsdtar read and write them. Names are bytes. What an archive says is not
//! believed: a path that is absolute or has `..`, a hard link to what is not in it, an
//! entry below a link and one that comes twice end the import; a symbolic link is data,
//! wherever it leads; devices, FIFOs and sockets are skipped and counted.
//!
//! # Guarantees
//! - An import is a new record on top of the chain, under an epoch of its own: whatever a
//!   server still has unsaved of the tenant is fenced, and becomes a conflict (P1, P2).
//! - What is imported is saved and read back as any other state; until its record is
//!   there, nothing has happened.
//! - An export has been compared with the digests of the snapshot, byte for byte.

mod archive;
mod directory;
mod export;
mod import;

pub use export::{Export, Exported, export};
pub use import::{Import, Imported, Source, import};

use super::{
    Error as StateError, history,
    snapshot::{Meta, Xattr},
};
use crate::disk;

/// How far a transfer is, for whoever watches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Entries that were carried.
    pub entries: u64,
    /// Entries there are, as far as is known.
    pub of: u64,
    /// Bytes of files that were carried.
    pub bytes: u64,
}

/// Is told how far a transfer is.
pub type Watch<'w> = dyn FnMut(Progress) + Send + 'w;

/// Says why state was not carried.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The store, or what is in it.
    #[error(transparent)]
    State(#[from] StateError),
    /// The history of the tenant.
    #[error(transparent)]
    History(#[from] history::Error),
    /// The disk, or the archive's other end.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// What is to be imported is not what it should be.
    #[error("{what}: {reason}")]
    Refused {
        /// Which entry or source.
        what: String,
        /// Why.
        reason: String,
    },
    /// There is state already.
    #[error("{key} has state already (snapshot {newest}); --replace makes what is imported the newest")]
    Exists {
        /// Whose state.
        key: crate::model::Key,
        /// The newest there is.
        newest: u64,
    },
    /// A claim is open, or was not ended in order.
    #[error("{key} is claimed on server {server} (epoch {epoch}); release it first")]
    Claimed {
        /// Whose state.
        key: crate::model::Key,
        /// Where.
        server: String,
        /// Which.
        epoch: u64,
    },
}

/// Takes a tree, each directory before what is in it.
trait Sink: Send {
    /// Takes the state directory itself, first of all.
    fn root(&mut self, meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error>;
    fn directory(&mut self, path: &[u8], meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error>;
    fn symlink(&mut self, path: &[u8], meta: &Meta, target: &[u8]) -> Result<(), Error>;
    /// Takes one more name of an entry that came before.
    fn hard_link(&mut self, path: &[u8], meta: &Meta, to: &[u8]) -> Result<(), Error>;
    /// Begins a file; its data follows.
    fn file(&mut self, file: FileHead<'_>) -> Result<(), Error>;
    /// Takes the next bytes between the holes of the file that was begun.
    fn data(&mut self, data: &[u8]) -> Result<(), Error>;
    /// Ends the file that was begun.
    fn end_file(&mut self) -> Result<(), Error>;
    /// Ends the tree.
    fn finish(&mut self) -> Result<(), Error>;
}

/// What is known of a file before its data.
struct FileHead<'a> {
    path: &'a [u8],
    meta: Meta,
    xattrs: &'a [Xattr],
    bytes: u64,
    holes: &'a [(u64, u64)],
}

fn refused(path: &[u8], reason: impl Into<String>) -> Error {
    Error::Refused { what: disk::shown(path), reason: reason.into() }
}
