//! Confined access to directories whose content somebody else may have made.
//!
//! A state or comm directory is a tenant's: names may be any bytes, paths longer
//! than `PATH_MAX`, links may lead anywhere and change while we look, a FIFO may
//! wait for ever to be opened. Everything here goes by directory descriptor
//! ([`Dir`]) and single names or `openat2` with `RESOLVE_BENEATH |
//! RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV`; no path is
//! ever joined and handed to the kernel as a whole.
//!
//! # Guarantees
//! - P12: no call leaves the directory it was given, follows a link, opens
//!   anything but regular files and directories, or waits for another process.
//! - Depth costs no stack, no descriptors and, for removal, no path length.

mod copy;
mod dir;
mod entries;
mod holes;
mod links;
mod path;
mod removal;
mod stat;
mod usage;
mod xattr;

use std::{io, sync::Arc};

pub use copy::copy_contents;
pub use dir::{Dir, MAX_NAME_BYTES};
pub use entries::{Entry, Limits, ListError, Missing, list};
pub use holes::{HOLE_BYTES, holes};
pub use links::LinkGroups;
pub use path::{InvalidPath, is_name, relative_path, split_last};
pub use removal::{empty, remove};
pub use stat::{Kind, Stat, Time, set_file_metadata, set_file_modified, set_new_file_metadata};
pub use usage::usage;
pub use xattr::{Attributes, attributes, copy_attributes, is_access_list, is_kept_attribute, set_attribute};

/// Says which call on which path the disk refused, and why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{operation} {path}")]
pub struct Error {
    /// The operation, e.g. `open`.
    pub operation: &'static str,
    /// Where; bytes that are not printable ASCII are escaped.
    pub path: String,
    /// Why.
    #[source]
    pub source: Arc<io::Error>,
}

/// Gives `None` for what is not there.
pub trait Optional<T> {
    /// Turns the error "no such file or directory" into `None`.
    ///
    /// # Errors
    /// Every other error.
    fn optional(self) -> Result<Option<T>, Error>;
}

/// Shows bytes of a path in a message: printable ASCII as it is, the rest escaped.
pub fn shown(path: &[u8]) -> String {
    path.escape_ascii().to_string()
}

// === impl Error ===

impl Error {
    /// Names a failed operation.
    pub fn new(operation: &'static str, path: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { operation, path: path.into(), source: Arc::new(source.into()) }
    }

    /// Returns what kind of error it is.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }

    /// Returns whether there is nothing of that name.
    pub fn is_missing(&self) -> bool {
        self.kind() == io::ErrorKind::NotFound
    }

    /// Returns whether the kernel answered `errno`.
    pub fn is(&self, errno: rustix::io::Errno) -> bool {
        self.source.raw_os_error() == Some(errno.raw_os_error())
    }
}

impl<T> Optional<T> for Result<T, Error> {
    fn optional(self) -> Result<Option<T>, Error> {
        match self {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }
}
