//! The object-store port.
//!
//! Keys are made by us alone: ASCII letters, digits, `/`, `-`, `.`, `_` and `=`,
//! without empty or dot segments; below one prefix more (see `key`). Adapters add their prefix.
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
use futures_util::stream::BoxStream;

pub use self::key::{has_mirror_ends, is_mirror_char};
pub use self::{fault::FaultStore, local::LocalStore, memory::MemoryStore, s3::S3Store};

/// The longest key, in bytes, without the adapter's prefix.
pub const MAX_KEY_BYTES: usize = 512;

/// The longest segment of a key, in bytes: a file name below the local store.
pub const MAX_SEGMENT_BYTES: usize = 200;

/// The largest object that [`Store::get`], [`Store::put`] and [`Store::create`]
/// take, in bytes: they hold it in memory, whole. Also the longest range and the
/// longest part.
pub const MAX_OBJECT_BYTES: usize = 64 << 20;

/// The most keys that one [`Store::list`] answers.
pub const MAX_LIST_KEYS: usize = 1000;

/// The operation of the errors that [`Store::probe`] makes itself.
const PROBE: &str = "probe";

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

    /// Copies an object within the store, without moving its bytes through this
    /// host where the store can, replacing what was at `to`. Answers `false` when
    /// `from` is proven absent; then nothing is written.
    async fn copy(&self, from: &str, to: &str) -> Result<bool, Error>;

    /// Reads at most `bytes` (≤ [`MAX_OBJECT_BYTES`]) bytes of an object from
    /// `offset` on; past its end, what there is, which may be nothing. `None` only
    /// when the object is proven absent.
    ///
    /// Two calls may see two versions of an object that is replaced meanwhile.
    async fn get_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, Error>;

    /// Writes an object of any size from parts that come in order, replacing what
    /// was there. Nothing is visible before the last part is in; a part that is an
    /// error ends the call, and nothing was written.
    ///
    /// Holds a bounded number of parts in memory, each of at most
    /// [`MAX_OBJECT_BYTES`] bytes.
    async fn put_parts(&self, key: &str, parts: Parts) -> Result<(), Error>;

    /// Says whether the store keeps objects that were removed or replaced.
    async fn versioning(&self) -> Result<Versioning, Error>;

    /// Gives up writes of [`Store::put_parts`] in this store that began before
    /// `before_ms` (milliseconds since the Unix epoch) and never ended, and answers
    /// how many: what a crash leaves of them costs room and is in no listing.
    async fn abort_uploads(&self, before_ms: u64) -> Result<u64, Error>;
}

/// The parts of an object, in order; an error among them is the source's, and
/// ends the write.
pub type Parts = BoxStream<'static, std::io::Result<Bytes>>;

/// Says whether removed and replaced objects stay in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Versioning {
    /// They stay, as older versions.
    On,
    /// They are gone.
    Off,
    /// The store does not say.
    Unknown,
}

/// One listed object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its key, without the adapter's prefix.
    pub key: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was written, in milliseconds since the Unix epoch by the store's
    /// clock; 0 when the store does not say.
    pub modified_ms: u64,
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
    /// Returns whether [`Store::probe`] has seen that create-only writes are not kept: no
    /// repetition changes that.
    pub fn is_unconditional(&self) -> bool {
        matches!(self, Self::Refused { operation: PROBE, .. })
    }

    /// Makes an [`Error::Unavailable`].
    pub(crate) fn unavailable(operation: &'static str, key: &str, reason: impl Into<String>) -> Self {
        Self::Unavailable { operation, key: key.to_owned(), reason: reason.into() }
    }

    /// Makes the error of a part that its source could not give.
    pub(crate) fn source(key: &str, error: &std::io::Error) -> Self {
        Self::unavailable("put_parts", key, format!("the parts ended early: {error}"))
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
