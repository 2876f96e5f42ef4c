//! The object-store port.
//!
//! Keys are made by us alone: lower-case ASCII letters, digits, `/`, `-`, `.` and
//! `_`, without empty or dot segments. Adapters add their prefix.
//!
//! # Guarantees
//! - [`Store::get`] answers `None` only when the store *proves* absence (P3): an
//!   error, a timeout or a missing bucket is never `None`.
//! - [`Store::create`] is atomic: of any number of racing calls for one key, one
//!   answers [`Creation::Created`].
//! - An adapter retries what is safe to retry, with jitter, within the call's
//!   deadline; what is then unknown is [`Error::Unknown`].

pub mod fault;
mod key;
pub mod local;
pub mod memory;
mod probe;
pub mod s3;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

pub use self::{fault::FaultStore, local::LocalStore, memory::MemoryStore, s3::S3Store};

/// The longest key, in bytes, without the adapter's prefix.
pub const MAX_KEY_BYTES: usize = 512;

/// The longest segment of a key, in bytes: a file name below the local store.
pub const MAX_SEGMENT_BYTES: usize = 200;

/// The largest object, in bytes. Objects are held in memory, whole.
pub const MAX_OBJECT_BYTES: usize = 64 << 20;

/// The most keys that one [`Store::list`] answers.
pub const MAX_LIST_KEYS: usize = 1000;

/// Shares a store between components.
pub type SharedStore = Arc<dyn Store>;

/// Keeps objects.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Tests that the store can be reached and honours [`Store::create`]'s condition.
    async fn probe(&self) -> Result<(), Error>;

    /// Reads an object, whole.
    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error>;

    /// Writes an object, replacing what was there.
    async fn put(&self, key: &str, body: Bytes) -> Result<(), Error>;

    /// Writes an object only if there is none under this key.
    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, Error>;

    /// Lists keys that begin with `prefix`, in ascending byte order, after `after`
    /// (exclusive), at most `limit` (≤ 1000).
    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Error>;

    /// Removes an object. Absent is success.
    async fn delete(&self, key: &str) -> Result<(), Error>;
}

/// One listed object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its key, without the adapter's prefix.
    pub key: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// The outcome of a create-only write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Creation {
    /// This call made the object.
    Created,
    /// There was one already; it may be an earlier attempt of this very call.
    Exists,
}

/// Says what to do about a call that did not succeed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The store cannot be reached or is overloaded; nothing was written. Try again later.
    #[error("store is unavailable: {operation} {key}: {reason}")]
    Unavailable {
        /// The call.
        operation: &'static str,
        /// The key concerned.
        key: String,
        /// Why, without credentials.
        reason: String,
    },
    /// The write may or may not have happened: read it back.
    #[error("outcome of {operation} {key} is unknown: {reason}")]
    Unknown {
        /// The call.
        operation: &'static str,
        /// The key concerned.
        key: String,
        /// Why, without credentials.
        reason: String,
    },
    /// The store refuses: credentials, permissions, a missing bucket. An operator must act.
    #[error("store refuses {operation} {key}: {reason}")]
    Refused {
        /// The call.
        operation: &'static str,
        /// The key concerned.
        key: String,
        /// The store's code and words, without credentials.
        reason: String,
    },
}

// === impl Error ===

impl Error {
    /// Makes an [`Error::Unavailable`].
    pub(crate) fn unavailable(operation: &'static str, key: &str, reason: impl Into<String>) -> Self {
        Self::Unavailable { operation, key: key.to_owned(), reason: reason.into() }
    }

    /// Makes an [`Error::Unknown`].
    pub(crate) fn unknown(operation: &'static str, key: &str, reason: impl Into<String>) -> Self {
        Self::Unknown { operation, key: key.to_owned(), reason: reason.into() }
    }

    /// Makes an [`Error::Refused`].
    pub(crate) fn refused(operation: &'static str, key: &str, reason: impl Into<String>) -> Self {
        Self::Refused { operation, key: key.to_owned(), reason: reason.into() }
    }
}
