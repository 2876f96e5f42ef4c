//! Plain objects in the store: read against their digests, copied, and cleaned up.

use std::{
    collections::{HashMap, HashSet},
    sync::OnceLock,
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, future::BoxFuture, stream};

use crate::{
    model::Key,
    state::{
        Error,
        snapshot::{
            Digest, Manifest, ObjectKind, ObjectName, Record, damaged, kind_prefix, list_all, newest_record,
            object_key, plain_prefix,
        },
    },
    store::{self, Listed, MAX_LIST_KEYS, SharedStore, Store},
};

use super::{LOOK_MS, escape, files};

/// Larger objects are read in pieces of this size.
pub(in crate::state) const PIECE_BYTES: u64 = 8 * 1024 * 1024;
/// Stores copy no larger object in one call.
const COPY_BYTES: u64 = 4 * 1024 * 1024 * 1024;
/// Removals under way together.
const REMOVALS: usize = 16;

/// Reads plain objects of one key.
pub(in crate::state) struct PlainObjects<'a> {
    store: &'a dyn Store,
    key: &'a Key,
    key_digest: String,
    /// What is in `o/`: listed when an object is not what it should be.
    kept: OnceLock<Vec<Listed>>,
}

/// Takes a piece of an object, and its place.
pub(in crate::state) type Write<'w> =
    dyn Fn(u64, Bytes) -> BoxFuture<'w, Result<(), Error>> + Send + Sync + 'w;

/// How the reading of one object ended.
enum Outcome {
    Same,
    Differs,
    Missing,
}

// === impl PlainObjects ===

impl<'a> PlainObjects<'a> {
    pub(in crate::state) fn new(store: &'a dyn Store, key: &'a Key) -> Self {
        Self { store, key, key_digest: key.digest(), kept: OnceLock::new() }
    }

    /// Reads a file's object, or what a save that did not end has left of it, and gives
    /// it to `write` piece by piece with the place of each. Only when this returns is
    /// what was written the file: of several candidates, each is written over the last.
    /// Content of at most [`PIECE_BYTES`] is compared before it is written.
    ///
    /// # Errors
    /// [`Error::Damaged`] names the object; [`Error::Store`]; those of `write`.
    pub(in crate::state) async fn read(
        &self,
        path: &[u8],
        bytes: u64,
        digest: Digest,
        write: &Write<'_>,
    ) -> Result<(), Error> {
        self.find(path, bytes, digest, write).await.map(|_| ())
    }

    /// As [`PlainObjects::read`]; answers the object that has the file.
    ///
    /// # Errors
    /// As there.
    pub(in crate::state) async fn find(
        &self,
        path: &[u8],
        bytes: u64,
        digest: Digest,
        write: &Write<'_>,
    ) -> Result<String, Error> {
        let plain = plain_key(&self.key_digest, path);
        let found = self.read_one(&plain, bytes, digest, write).await?;
        if matches!(found, Outcome::Same) {
            return Ok(plain);
        }
        for listed in self.kept().await?.iter().filter(|listed| listed.bytes == bytes) {
            if matches!(self.read_one(&listed.key, bytes, digest, write).await?, Outcome::Same) {
                return Ok(listed.key.clone());
            }
        }
        let problem = match found {
            Outcome::Missing => "is not there",
            Outcome::Same | Outcome::Differs => "has another content than the newest snapshot says",
        };
        Err(damaged(
            self.key,
            format!(
                "the plain object {plain} {problem}: another program has changed it; put it back, or take over \
                 what is there with `boilerhouse state import --mirror --replace`"
            ),
        ))
    }

    async fn read_one(
        &self,
        name: &str,
        bytes: u64,
        digest: Digest,
        write: &Write<'_>,
    ) -> Result<Outcome, Error> {
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        loop {
            // One byte more than there should be shows an object that is too long.
            let wanted = PIECE_BYTES.min(bytes - at + 1);
            let piece = self.store.get_range(name, at, wanted).await.map_err(|error| self.failed(error))?;
            let Some(piece) = piece else { return Ok(Outcome::Missing) };
            let length = piece.len() as u64;
            if at + length > bytes || (length < wanted && at + length < bytes) {
                return Ok(Outcome::Differs);
            }
            hasher.update(&piece);
            if bytes <= PIECE_BYTES && at + length == bytes && hasher.finalize() != digest.0 {
                return Ok(Outcome::Differs);
            }
            if !piece.is_empty() {
                write(at, piece).await?;
            }
            at += length;
            if length < wanted {
                let is_same = hasher.finalize() == digest.0;
                return Ok(if is_same { Outcome::Same } else { Outcome::Differs });
            }
        }
    }

    async fn kept(&self) -> Result<&Vec<Listed>, Error> {
        let prefix = kind_prefix(&self.key_digest, ObjectKind::Kept);
        if let Some(kept) = self.kept.get() {
            return Ok(kept);
        }
        let listed = list_all(self.store, &prefix).await.map_err(|error| self.failed(error))?;
        Ok(self.kept.get_or_init(|| listed))
    }

    fn failed(&self, source: store::Error) -> Error {
        Error::Store { key: self.key.clone(), source }
    }
}

/// Returns the key of a file's plain object.
pub(in crate::state) fn plain_key(key_digest: &str, path: &[u8]) -> String {
    format!("{}{}", plain_prefix(key_digest), escape(path))
}

/// Names the place to which one attempt copies what a plain object was.
pub(in crate::state) fn kept_name(
    key_digest: &str,
    epoch: crate::model::Epoch,
    nonce: &str,
    path: &[u8],
) -> String {
    let of = [nonce.as_bytes(), &[0], path].concat();
    object_key(key_digest, &ObjectName::of(ObjectKind::Kept, epoch, &of))
}

/// Copies an object of this size within a store; `false`: it is not there.
///
/// # Errors
/// The store's.
pub(in crate::state) async fn copy_object(
    store: &SharedStore,
    from: &str,
    to: &str,
    bytes: u64,
) -> Result<bool, store::Error> {
    if bytes <= COPY_BYTES {
        return store.copy(from, to).await;
    }
    if store.get_range(from, 0, 1).await?.is_none() {
        return Ok(false);
    }
    let (reading, from) = (store.clone(), from.to_owned());
    let parts = stream::try_unfold(0, move |at| {
        let (reading, from) = (reading.clone(), from.clone());
        async move {
            let piece = reading.get_range(&from, at, PIECE_BYTES).await.map_err(std::io::Error::other)?;
            let piece = piece.ok_or_else(|| std::io::Error::other("it is gone"))?;
            let next = at + piece.len() as u64;
            Ok((!piece.is_empty()).then_some((piece, next)))
        }
    });
    store.put_parts(to, parts.boxed()).await.map(|()| true)
}

/// Checks that every object that a mirror needs is there at its size, and that no save
/// that did not end has left anything.
///
/// # Errors
/// [`Error::Damaged`] names the object; [`Error::Store`].
pub(in crate::state) async fn must_be_whole(
    store: &dyn Store,
    key: &Key,
    manifest: &Manifest,
) -> Result<(), Error> {
    let key_digest = key.digest();
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let kept = kind_prefix(&key_digest, ObjectKind::Kept);
    if !store.list(&kept, None, 1).await.map_err(failed)?.is_empty() {
        let reason = "a save of the mirror did not end; claim and release the tenant first";
        return Err(damaged(key, reason.to_owned()));
    }
    let listed = list_plain(store, &key_digest).await.map_err(failed)?;
    let there: HashMap<String, u64> = listed.into_iter().map(|listed| (listed.key, listed.bytes)).collect();
    for (path, bytes) in files(manifest) {
        let plain = plain_key(&key_digest, path);
        match there.get(&plain) {
            Some(found) if *found == bytes => {}
            Some(_) => return Err(damaged(key, format!("the plain object {plain} has another size"))),
            None => return Err(damaged(key, format!("the plain object {plain} is not there"))),
        }
    }
    Ok(())
}

/// Lists every plain object of a key: as many as a tree has entries, and more.
///
/// # Errors
/// The store's.
pub(in crate::state) async fn list_plain(
    store: &dyn Store,
    key_digest: &str,
) -> Result<Vec<Listed>, store::Error> {
    let prefix = plain_prefix(key_digest);
    let mut all: Vec<Listed> = Vec::new();
    loop {
        let after = all.last().map(|listed| listed.key.as_str());
        let page = store.list(&prefix, after, MAX_LIST_KEYS).await?;
        let is_last = page.len() < MAX_LIST_KEYS;
        all.extend(page);
        if is_last {
            return Ok(all);
        }
    }
}

/// Removes the plain objects that the committed mirror does not name, and then what was
/// copied aside: `aside`, listed before the save, and its own.
///
/// # Errors
/// [`Error::Fenced`] when `committed` is not the newest record any more; [`Error::Store`].
/// What is left then makes the next save write everything, and remove it.
pub(in crate::state) async fn settle(
    store: &dyn Store,
    key: &Key,
    committed: &Record,
    manifest: &Manifest,
    aside: Vec<String>,
) -> Result<(), Error> {
    let key_digest = key.digest();
    let failed = |source: store::Error| Error::Store { key: key.clone(), source };
    let needed: HashSet<String> = files(manifest).map(|(path, _)| plain_key(&key_digest, path)).collect();
    let listed = list_plain(store, &key_digest).await.map_err(failed)?;
    // What no name of ours is, the store would refuse to remove.
    let extra = listed.into_iter().map(|listed| listed.key).filter(|name| !needed.contains(name));
    let extra: Vec<String> = extra.filter(|name| is_ours(&key_digest, name)).collect();
    for names in [extra, aside] {
        let mut looked: Option<tokio::time::Instant> = None;
        for some in names.chunks(REMOVALS) {
            if looked.is_none_or(|at| at.elapsed().as_millis() >= u128::from(LOOK_MS)) {
                must_be_newest(store, key, committed).await?;
                looked = Some(tokio::time::Instant::now());
            }
            let removals = stream::iter(some.to_vec())
                .map(|name| async move { store.delete(&name).await })
                .buffer_unordered(REMOVALS);
            removals.try_collect::<Vec<()>>().await.map_err(failed)?;
        }
    }
    Ok(())
}

/// Refuses when another tree is the newest by now, or another server may be writing one.
/// A claim that began here since changes nothing.
async fn must_be_newest(store: &dyn Store, key: &Key, committed: &Record) -> Result<(), Error> {
    let of = |record: &Record| (record.server.clone(), record.tree.as_ref().map(|tree| tree.nonce.clone()));
    match newest_record(store, key, &key.digest()).await? {
        Some(newest) if of(&newest) == of(committed) => Ok(()),
        newest => {
            let newest = newest.map_or(committed.epoch, |newest| newest.epoch);
            Err(Error::Fenced { key: key.clone(), own: committed.epoch, newest })
        }
    }
}

fn is_ours(key_digest: &str, name: &str) -> bool {
    let name = name.strip_prefix(&plain_prefix(key_digest));
    name.is_some_and(|name| super::unescape(name).is_some() || name.starts_with("=H/"))
}
