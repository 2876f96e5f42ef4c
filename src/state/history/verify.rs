//! Reading back and hashing everything that the store should hold.
//!
//! Works on the store alone and writes nothing, also while a server works on it: what
//! is gone because its snapshot was collected meanwhile, and what is being written
//! now, is no finding.

use std::collections::{HashMap, HashSet};

use futures_util::FutureExt as _;
use serde::{Deserialize, Serialize};

use crate::{
    model::{Key, TenantId, WorkloadId, spec::Layout},
    state::{
        mirror::{self, PlainObjects},
        snapshot::{
            CodecError, Digest, Encryption, Manifest, ManifestObject, Node, ObjectCodec, ObjectKind,
            ObjectName, Record, key_prefix, kind_prefix, list_all, newest_record, object_key, plain_prefix,
            read_manifest, read_record, record_number,
        },
    },
    store::Store,
};

use super::{Error, History, StateError};

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Keys looked at: a tenant's state of a workload.
    pub keys: u64,
    /// Snapshots that are kept.
    pub snapshots: u64,
    /// Objects read back and hashed.
    pub objects: u64,
    /// Their bytes as stored.
    pub bytes: u64,
    /// Files whose contents were put together and hashed.
    pub files: u64,
    /// Objects that a kept snapshot needs and that are not there.
    pub missing: Vec<Finding>,
    /// Objects that are not what their name says, or do not hold what a snapshot says.
    pub damaged: Vec<Finding>,
    /// Objects that nothing needs: waste, which a collection removes.
    pub orphaned: Vec<String>,
}

/// One object that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The object's key in the store.
    pub object: String,
    /// Whose it is, as far as is known.
    pub of: String,
    /// What is wrong.
    pub problem: String,
}

/// How far a verification is, for whoever watches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Objects that were read.
    pub objects: u64,
    /// Objects that are known to have to be read.
    pub of: u64,
    /// Bytes that were read.
    pub bytes: u64,
}

/// Verifies one key after the other.
struct Verifier<'a> {
    store: &'a dyn Store,
    encryption: &'a Encryption,
    report: Report,
    known: u64,
    watch: &'a mut (dyn FnMut(Progress) + Send),
}

/// What of one key is known to be sound.
#[derive(Default)]
struct Seen {
    manifests: HashSet<ObjectName>,
    objects: HashMap<ObjectName, bool>,
    files: HashSet<Digest>,
}

// === impl Report ===

impl Report {
    /// Returns whether everything that is needed is there and sound.
    pub fn is_sound(&self) -> bool {
        self.missing.is_empty() && self.damaged.is_empty()
    }
}

// === impl History ===

impl History {
    /// Verifies these keys.
    ///
    /// # Errors
    /// [`Error::State`] when the store does not answer: nothing is known then.
    pub async fn verify(
        &self,
        keys: &[Key],
        watch: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Report, Error> {
        let mut verifier = Verifier {
            store: &*self.store,
            encryption: &self.encryption,
            report: Report::default(),
            known: 0,
            watch,
        };
        for key in keys {
            verifier.key(key).await?;
        }
        Ok(verifier.report)
    }

    /// Verifies every key there is in the store.
    ///
    /// # Errors
    /// As [`History::verify`].
    pub async fn verify_all(&self, watch: &mut (dyn FnMut(Progress) + Send)) -> Result<Report, Error> {
        let mut verifier = Verifier {
            store: &*self.store,
            encryption: &self.encryption,
            report: Report::default(),
            known: 0,
            watch,
        };
        let mut after: Option<String> = None;
        loop {
            let listed = self.store.list("t/", after.as_deref(), 1).await.map_err(Error::Store)?;
            let Some(first) = listed.into_iter().next() else { return Ok(verifier.report) };
            let Some(digest) = first.key.split('/').nth(1).map(str::to_owned) else {
                return Ok(verifier.report);
            };
            match self.key_of(&digest).await? {
                Some(key) => verifier.key(&key).await?,
                None => verifier.nobodys(&digest).await?,
            }
            // Behind everything of this key: its kinds are single letters up to `r`.
            after = Some(format!("{}z", key_prefix(&digest)));
        }
    }

    /// Finds out whose a digest is, from any of its records.
    async fn key_of(&self, digest: &str) -> Result<Option<Key>, Error> {
        #[derive(Deserialize)]
        struct Owner {
            tenant: TenantId,
            workload: WorkloadId,
        }
        let listed =
            self.store.list(&format!("{}r/", key_prefix(digest)), None, 1).await.map_err(Error::Store)?;
        let Some(first) = listed.into_iter().next() else { return Ok(None) };
        let Some(body) = self.store.get(&first.key).await.map_err(Error::Store)? else { return Ok(None) };
        let owner = serde_json::from_slice::<Owner>(&body).ok();
        let key = owner.map(|owner| Key::new(owner.tenant, owner.workload));
        Ok(key.filter(|key| key.digest() == digest))
    }
}

// === impl Verifier ===

impl Verifier<'_> {
    async fn key(&mut self, key: &Key) -> Result<(), Error> {
        let digest = key.digest();
        let prefix = key_prefix(&digest);
        self.report.keys += 1;
        // Listed before the records are read: what is written after it is in no listing.
        let failed = |source| Error::State(StateError::Store { key: key.clone(), source });
        let listed = list_all(self.store, &prefix).await.map_err(failed)?;
        let there: HashSet<ObjectName> = listed
            .iter()
            .filter_map(|listed| listed.key.strip_prefix(&prefix).and_then(ObjectName::parse))
            .collect();
        let Some(newest) = self.newest(key).await? else {
            self.orphans(&digest, &there, None);
            return Ok(());
        };
        let mut seen = Seen::default();
        let mut needed = HashSet::new();
        if !mirror::is_mirror(Some(&newest)) {
            let plain = [plain_prefix(&digest), kind_prefix(&digest, ObjectKind::Kept)];
            let orphans = listed.iter().filter(|listed| plain.iter().any(|it| listed.key.starts_with(it)));
            self.report.orphaned.extend(orphans.map(|listed| listed.key.clone()));
        }
        for number in listed.iter().filter_map(|listed| record_number(&digest, &listed.key)) {
            let record = match read_record(self.store, key, &digest, number).await {
                Ok(Some(record)) => record,
                // Collected since it was listed.
                Ok(None) => continue,
                Err(error) => {
                    self.damaged(key, format!("{prefix}r/ number {number}"), problem(error)?);
                    continue;
                }
            };
            let Some(tree) = record.tree.as_ref().filter(|tree| {
                // Opens and closes carry on what another record keeps; only the newest counts.
                tree.snapshot == record.number || record.number == newest.number
            }) else {
                continue;
            };
            let is_anchor = record.number == 1 && !there.contains(&tree.manifest) && newest.number > 1;
            needed.insert(tree.manifest);
            let is_mirror = tree.manifest.kind.layout() == Some(Layout::Mirror);
            if is_mirror && newest.tree.as_ref().is_none_or(|newest| newest.manifest != tree.manifest) {
                // Its plain objects have become the newest one's.
                continue;
            }
            if is_anchor || !seen.manifests.insert(tree.manifest) {
                continue;
            }
            self.snapshot(key, &record, &tree.manifest.clone(), &mut seen, &mut needed).await?;
        }
        // What was copied aside is said above, or belongs to a save that did not end.
        needed
            .extend(there.iter().filter(|name| name.epoch >= newest.epoch || name.kind == ObjectKind::Kept));
        self.orphans(&digest, &there, Some(&needed));
        Ok(())
    }

    /// A key without a record: what a first save left that did not end.
    async fn nobodys(&mut self, digest: &str) -> Result<(), Error> {
        let prefix = key_prefix(digest);
        let listed = list_all(self.store, &prefix).await.map_err(Error::Store)?;
        for listed in listed {
            if listed.key.starts_with(&format!("{prefix}r/")) {
                let of = "nobody known".to_owned();
                let problem = "is no record that can be read".to_owned();
                self.report.damaged.push(Finding { object: listed.key, of, problem });
            } else {
                self.report.orphaned.push(listed.key);
            }
        }
        Ok(())
    }

    async fn newest(&mut self, key: &Key) -> Result<Option<Record>, Error> {
        match newest_record(self.store, key, &key.digest()).await {
            Ok(newest) => Ok(newest),
            Err(error) => {
                self.damaged(key, key_prefix(&key.digest()), problem(error)?);
                Ok(None)
            }
        }
    }

    /// Verifies one snapshot: the manifest, its objects, and each file put together.
    async fn snapshot(
        &mut self,
        key: &Key,
        record: &Record,
        name: &ObjectName,
        seen: &mut Seen,
        needed: &mut HashSet<ObjectName>,
    ) -> Result<(), Error> {
        let digest = key.digest();
        let codec = self.encryption.codec(key);
        self.report.snapshots += 1;
        let manifest = match read_manifest(self.store, key, &digest, name, &codec).await {
            Ok(Some(manifest)) => manifest,
            Ok(None) => return self.missing(key, record, name).await,
            Err(error) => {
                self.damaged(key, object_key(&digest, name), problem(error)?);
                return Ok(());
            }
        };
        self.report.objects += 1;
        if manifest.layout == Layout::Mirror {
            return self.plain_files(key, record, &manifest).await;
        }
        needed.extend(manifest.objects.iter().map(|object| object.name));
        self.known +=
            manifest.objects.iter().filter(|object| !seen.objects.contains_key(&object.name)).count() as u64;
        let unseen: HashSet<usize> = manifest
            .items
            .iter()
            .filter_map(|item| match &item.node {
                Node::File { digest, pieces, .. } if !seen.files.contains(digest) => pieces.first(),
                _ => None,
            })
            .map(|piece| piece.object as usize)
            .collect();
        for (number, object) in manifest.objects.iter().enumerate() {
            if object.name.kind != ObjectKind::Pack {
                continue;
            }
            let is_seen = seen.objects.get(&object.name).copied();
            if is_seen == Some(false) || (is_seen == Some(true) && !unseen.contains(&number)) {
                continue;
            }
            // Sound already, it may have files that no snapshot before this had.
            let plain = self.object(key, record, object, &codec, seen).await?;
            if let Some(plain) = plain {
                self.packed_files(key, &manifest, number, &plain, seen);
            }
        }
        self.chunked_files(key, record, &manifest, &codec, seen).await
    }

    /// Reads the plain object of each file, and notes those that no file has.
    async fn plain_files(&mut self, key: &Key, record: &Record, manifest: &Manifest) -> Result<(), Error> {
        let digest = key.digest();
        let failed = |source| Error::State(StateError::Store { key: key.clone(), source });
        let listed = mirror::list_plain(self.store, &digest).await.map_err(failed)?;
        let mut others: HashSet<String> = listed.into_iter().map(|listed| listed.key).collect();
        let objects = PlainObjects::new(self.store, key);
        self.known += mirror::files(manifest).count() as u64;
        for item in &manifest.items {
            let Node::File { bytes, digest: content, .. } = &item.node else { continue };
            let name = mirror::plain_key(&digest, &item.path.0);
            let is_listed = others.remove(&name);
            let read = objects.read(&item.path.0, *bytes, *content, &|_, _| async { Ok(()) }.boxed()).await;
            match read {
                Ok(()) => {}
                Err(StateError::Damaged { reason, .. }) => {
                    // Saved anew since: nothing of this is the newest any more.
                    let newest = newest_record(self.store, key, &digest).await?;
                    if newest.and_then(|newest| newest.tree).map(|tree| tree.manifest)
                        != record.tree.as_ref().map(|tree| tree.manifest)
                    {
                        return Ok(());
                    }
                    let finding = Finding { object: name, of: key.to_string(), problem: reason };
                    match is_listed {
                        true => self.report.damaged.push(finding),
                        false => self.report.missing.push(finding),
                    }
                }
                Err(error) => return Err(error.into()),
            }
            self.report.files += 1;
            self.report.objects += 1;
            self.report.bytes += bytes;
            let Report { objects, bytes, .. } = self.report;
            (self.watch)(Progress { objects, of: self.known, bytes });
        }
        let mut others: Vec<String> = others.into_iter().collect();
        others.sort_unstable();
        self.report.orphaned.extend(others);
        Ok(())
    }

    /// Hashes the files that lie in one pack.
    fn packed_files(&mut self, key: &Key, manifest: &Manifest, number: usize, plain: &[u8], seen: &mut Seen) {
        for item in &manifest.items {
            let Node::File { digest, pieces, .. } = &item.node else { continue };
            let [piece] = pieces.as_slice() else { continue };
            if piece.object as usize != number || !seen.files.insert(*digest) {
                continue;
            }
            self.report.files += 1;
            let range =
                usize::try_from(piece.offset).ok().zip(usize::try_from(piece.offset + piece.bytes).ok());
            let content = range.and_then(|(from, to)| plain.get(from..to));
            if content.map(Digest::of) != Some(*digest) {
                let name =
                    manifest.objects.get(number).map_or_else(String::new, |object| object.name.to_string());
                let path = String::from_utf8_lossy(&item.path.0).into_owned();
                self.damaged(
                    key,
                    format!("{}{name}", key_prefix(&key.digest())),
                    format!("the file {path:?} in it has another content"),
                );
            }
        }
    }

    /// Reads the files that are cut into chunks, chunk by chunk. Their digest is of
    /// their chunks' digests; in version 0 of their data.
    async fn chunked_files(
        &mut self,
        key: &Key,
        record: &Record,
        manifest: &Manifest,
        codec: &ObjectCodec,
        seen: &mut Seen,
    ) -> Result<(), Error> {
        for item in &manifest.items {
            let Node::File { digest, pieces, .. } = &item.node else { continue };
            if pieces.is_empty() || manifest.is_packed(pieces) || !seen.files.insert(*digest) {
                continue;
            }
            let mut hasher = blake3::Hasher::new();
            let mut is_whole = true;
            for piece in pieces {
                let Some(object) = manifest.objects.get(piece.object as usize) else { continue };
                let is_known = manifest.version > 0 && seen.objects.get(&object.name) == Some(&true);
                let content = match is_known {
                    true => None,
                    false => self.object(key, record, object, codec, seen).await?,
                };
                match (content, is_known) {
                    (_, true) => _ = hasher.update(&object.content().0),
                    (Some(_), false) if manifest.version > 0 => _ = hasher.update(&object.content().0),
                    (Some(content), false) => _ = hasher.update(&content),
                    (None, false) => is_whole = false,
                }
            }
            self.report.files += 1;
            if is_whole && Digest(*hasher.finalize().as_bytes()) != *digest {
                let path = String::from_utf8_lossy(&item.path.0).into_owned();
                let object = manifest
                    .objects
                    .get(pieces[0].object as usize)
                    .map_or_else(String::new, |object| object_key(&key.digest(), &object.name));
                self.damaged(key, object, format!("the file {path:?} that begins in it has another content"));
            }
        }
        Ok(())
    }

    /// Reads an object, compares it with its name, opens and decodes it; `None`: it is
    /// not as it should be, which is noted once.
    async fn object(
        &mut self,
        key: &Key,
        record: &Record,
        object: &ManifestObject,
        codec: &ObjectCodec,
        seen: &mut Seen,
    ) -> Result<Option<bytes::Bytes>, Error> {
        let name = object_key(&key.digest(), &object.name);
        if seen.objects.get(&object.name) == Some(&false) {
            return Ok(None);
        }
        let failed = |source| StateError::Store { key: key.clone(), source };
        let Some(body) = self.store.get(&name).await.map_err(failed)? else {
            seen.objects.insert(object.name, false);
            self.missing(key, record, &object.name).await?;
            return Ok(None);
        };
        let stored = body.len() as u64;
        let decoded = codec.decode(object, body);
        if seen.objects.insert(object.name, decoded.is_ok()).is_none() {
            self.report.objects += 1;
            self.report.bytes += stored;
            let Report { objects, bytes, .. } = self.report;
            (self.watch)(Progress { objects, of: self.known, bytes });
        }
        match decoded {
            Ok(content) => Ok(Some(content)),
            Err(CodecError::Damaged(problem)) => {
                self.damaged(key, name, problem);
                Ok(None)
            }
            // Nothing can be said of it without its key.
            Err(error @ CodecError::Sealed(_)) => Err(StateError::of_codec(key, error).into()),
        }
    }

    /// Notes a missing object, unless its snapshot is gone by now.
    async fn missing(&mut self, key: &Key, record: &Record, name: &ObjectName) -> Result<(), Error> {
        if read_record(self.store, key, &key.digest(), record.number).await?.is_none() {
            return Ok(());
        }
        let object = object_key(&key.digest(), name);
        let problem = format!("snapshot {} needs it, and it is not there", record.number);
        self.report.missing.push(Finding { object, of: key.to_string(), problem });
        Ok(())
    }

    fn damaged(&mut self, key: &Key, object: String, problem: String) {
        self.report.damaged.push(Finding { object, of: key.to_string(), problem });
    }

    /// Notes what is in no use; `needed` none: nothing is.
    fn orphans(&mut self, digest: &str, there: &HashSet<ObjectName>, needed: Option<&HashSet<ObjectName>>) {
        let mut orphaned: Vec<String> = there
            .iter()
            .filter(|name| needed.is_none_or(|needed| !needed.contains(*name)))
            .map(|name| object_key(digest, name))
            .collect();
        orphaned.sort_unstable();
        self.report.orphaned.extend(orphaned);
    }
}

/// Returns what is wrong with what was read; a store that does not answer is an error.
fn problem(error: StateError) -> Result<String, Error> {
    match error {
        StateError::Damaged { reason, .. } => Ok(reason),
        error => Err(error.into()),
    }
}
