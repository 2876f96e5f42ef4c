//! What can go wrong with the journal.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use crate::model::Key;

/// Says why a journal was not opened or a commit not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The key has another live claim (P1); the operations were refused.
    #[error("{key} already has a live claim")]
    AlreadyLive {
        /// Whose claim.
        key: Key,
    },
    /// The operations contradict the journal and will do so again.
    #[error("the journal refuses {what}: {reason}")]
    Refused {
        /// The operation.
        what: String,
        /// Why.
        reason: String,
    },
    /// Too many commits wait for the writer; nothing was written, try again later.
    #[error("too many commits wait for the journal")]
    Overloaded,
    /// The disk is full or failing; nothing is acknowledged, try again later.
    #[error("journal {}: {reason}", path.display())]
    Unavailable {
        /// The journal.
        path: PathBuf,
        /// What the database says.
        reason: String,
    },
    /// The writer did not answer: the operations may be written or not. They may
    /// be given again.
    #[error("the journal did not answer whether it committed")]
    Unknown,
    /// Another server has the journal open.
    #[error("journal {} is in use by another server", path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// A newer version wrote the journal.
    #[error(
        "journal {} has version {found}, and this build knows up to {known}: it was written by a newer \
         boilerhouse, which must open it, or restore a copy from before",
        path.display()
    )]
    Newer {
        /// The journal.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that this build knows.
        known: u32,
    },
    /// The file is not a sound journal. It was left as it is.
    #[error("journal {} is damaged: {reason}; nothing was changed: restore a copy, or move it away", path.display())]
    Corrupt {
        /// The journal.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

// === impl Error ===

impl Error {
    pub(super) fn unavailable(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unavailable { path: path.to_owned(), reason: reason.into() }
    }

    pub(super) fn corrupt(path: &Path, reason: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), reason: reason.into() }
    }

    /// Says what an error of the database under `path` means to its user.
    pub(super) fn database(path: &Path, error: &rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::corrupt(path, error.to_string())
            }
            _ => Self::unavailable(path, error.to_string()),
        }
    }
}
