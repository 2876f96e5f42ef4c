//! A save: fence, read, send, commit, read back, and only then forget.

mod mirror;

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;

use globset::GlobSet;

use crate::{
    disk::{self, Dir, Stat},
    model::{Key, spec::Layout},
};

use super::{
    Error, HostFiles, Inner, Lane, Save, Saved,
    budget::Held,
    checkpoint::Frozen,
    collect::{Collected, Request, Walk, collect, excludes, walk},
    fill::TREE,
    index::{Index, Known, Times, racy_since},
    snapshot::{
        CodecError, Commit, Keep, Manifest, ObjectCodec, Record, Reuse, StoredObject, built_on, commit,
        damaged, newest_record, object_key, retain, standing, verify, workload_key,
    },
};
use crate::state::{Base, SaveTree, fence::Standing};

/// Objects of one save under way together.
const PUTS: usize = 2;
/// Retention is best effort; the next save goes on where it stopped.
const RETENTION_LIMIT: Duration = Duration::from_secs(60);

/// The tree of a save, and what lies beside it.
struct Source {
    tree: Dir,
    /// Where the index is.
    holder: Dir,
    frozen: Option<Arc<Frozen>>,
}

/// What a save is about to read.
struct Plan {
    source: Arc<Source>,
    exclude: GlobSet,
    /// The newest snapshot's.
    manifest: Option<Arc<Manifest>>,
    /// As the store names it.
    name: Option<String>,
}

// === impl HostFiles ===

impl HostFiles {
    /// Saves a tree as the newest snapshot; see [`crate::state::SlotFiles::save`].
    ///
    /// A nonce stands for one attempt to save one version of a tree: when the
    /// newest record carries it already, nothing is read and nothing sent.
    pub(super) async fn save_tree(&self, save: &Save) -> Result<Saved, Error> {
        let outcome = self.save_once(save).await;
        let Err(Error::Fenced { .. }) = &outcome else { return outcome };
        // It may have been committed and not heard of it, and another server gone on from it.
        let (store, key_digest) = (self.inner.store.as_ref(), save.key.digest());
        match built_on(store, &save.key, &key_digest, save.epoch, &save.nonce).await? {
            Some(record) => saved(save, &record, &key_digest, 0),
            None => outcome,
        }
    }

    async fn save_once(&self, save: &Save) -> Result<Saved, Error> {
        let store = self.inner.store.as_ref();
        let key_digest = save.key.digest();
        let exclude = excludes(save)?;
        let newest = newest_record(store, &save.key, &key_digest).await?;
        if newest.is_none() && save.base == Base::Chain {
            let reason = "the store has no record of it any more, and it had; nothing is written beside that";
            return Err(damaged(&save.key, reason.into()));
        }
        let attempt = (save.epoch, save.nonce.as_str());
        match (standing(newest.as_ref(), &save.author.server, attempt, save.base), &newest) {
            (Standing::Fenced(epoch), _) => {
                return Err(Error::Fenced { key: save.key.clone(), own: save.epoch, newest: epoch });
            }
            (Standing::Committed, Some(record)) => {
                verify(store, &save.key, &key_digest, save.epoch, record).await?;
                return saved(save, record, &key_digest, 0);
            }
            (Standing::Open | Standing::Committed, _) => {}
        }
        // Opened before anything is sent: no tree is an error, not an empty one.
        let source = Arc::new(self.source(save)?);
        let codec = self.inner.encryption.codec(&save.key);
        let manifest = self.newest_manifest(&save.key, &key_digest, newest.as_ref(), &codec).await?;
        let newest_name = newest.as_ref().and_then(|record| record.tree.as_ref()).map(|tree| tree.manifest);
        let newest_name = newest_name.filter(|_| manifest.is_some());
        let stored_as = newest_name.map(|name| object_key(&key_digest, &name));
        let aside = self.aside(save, &codec, newest.as_ref()).await?;
        // Another layout, or objects that cannot be trusted: there is nothing to refer to.
        let in_place = manifest.clone();
        let is_base = |manifest: &Arc<Manifest>| manifest.layout == save.persist.layout && aside.is_empty();
        let manifest = manifest.filter(is_base);
        let newest_name = newest_name.filter(|_| manifest.is_some());
        let name = stored_as.clone().filter(|_| manifest.is_some());
        if let Source { frozen: Some(frozen), holder, .. } = &*source
            && !frozen.rests_on(name.as_deref())
        {
            // What was not copied is not in the store as it was: the next checkpoint copies all.
            self.inner.record(holder, &key_digest, String::new(), &[], None)?;
            let error = std::io::Error::other("the snapshot that it rests on is not the newest any more");
            return Err(disk::Error::new("save checkpoint of", save.key.to_string(), error).into());
        }
        let is_decided = matches!(save.base, Base::Decided(_));
        if let (None, Some(name), false) = (&source.frozen, &stored_as, is_decided)
            && self.inner.may_be_torn(&source.holder, Some(name))?
            && let Some(snapshot) = newest.as_ref().and_then(|record| record.snapshot(&key_digest))
        {
            self.mend(&save.key, save.run_as, &snapshot).await?;
        }
        let is_partial = source.frozen.is_some();
        let request = Request {
            key: save.key.clone(),
            epoch: save.epoch,
            run_as: save.run_as,
            max_bytes: save.max_bytes,
            reuse: Arc::new(
                manifest.as_ref().map(|it| Reuse::of(Arc::clone(it), &codec, is_partial)).unwrap_or_default(),
            ),
            codec: codec.clone(),
            newest: newest_name,
            memory: self.inner.saving.clone(),
        };
        let now = self.inner.file_time()?;
        // Of what was decided as it is, all is read: the index may vouch for what the power took.
        let name = name.filter(|_| !is_decided);
        let plan = Plan { source: Arc::clone(&source), exclude, manifest, name };
        let mirroring = mirror::Mirroring { newest: newest.as_ref(), in_place, aside };
        let collected = match save.persist.layout {
            Layout::Snapshot => self.send_tree(save, &key_digest, plan, request).await,
            Layout::Mirror => self.mirror_tree(save, &mirroring, plan, request).await,
        };
        if let (Err(Error::Disk { .. }), Some(_)) = (&collected, &source.frozen) {
            // What was not copied may be stored otherwise now: the next checkpoint copies all.
            self.inner.record(&source.holder, &key_digest, String::new(), &[], None)?;
        }
        let (mut collected, mut sent) = collected?;
        let is_new = collected.body.is_some();
        if let Some(body) = collected.body.take() {
            sent += self.put(save, &key_digest, body).await?;
        }
        if newest.as_ref().is_none_or(|newest| newest.tree.is_none()) {
            // Before the first record with a tree: no state is there that an erasure does not find.
            let name = workload_key(&save.key);
            let noted = store.put(&name, bytes::Bytes::new()).await;
            noted.map_err(|source| Error::Store { key: save.key.clone(), source })?;
        }
        let next = Commit {
            key: &save.key,
            key_digest: &key_digest,
            epoch: save.epoch,
            nonce: &save.nonce,
            manifest: collected.manifest,
            created_ms: self.inner.clock.unix_ms(),
            files: collected.files,
            bytes: collected.bytes,
            skipped: collected.skipped,
            failed_claim: save.failed_claim,
            author: &save.author,
            is_last: save.is_last,
            base: save.base,
        };
        let aside = mirroring.aside;
        let record = commit(store, &next, newest).await?;
        if save.persist.layout == Layout::Mirror && is_new {
            self.settle_mirror(save, &record, &codec, aside).await;
        }
        let name = object_key(&key_digest, &collected.manifest);
        self.record(&save.key, source, name, collected.stats, now).await;
        let keep = Keep { last: save.persist.keep_last, days: save.persist.keep_days };
        let retained = retain(store, &save.key, &record, keep, self.inner.clock.unix_ms(), &codec, false);
        match tokio::time::timeout(RETENTION_LIMIT, retained).await {
            Ok(Ok(removed)) => tracing::debug!(key = %save.key, ?removed, "old snapshots were removed"),
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(key = %save.key, %error, cause, "old snapshots stay for now");
            }
            Err(_) => {
                tracing::warn!(key = %save.key, "removing old snapshots takes long, the rest stays for now")
            }
        }
        saved(save, &record, &key_digest, sent)
    }

    /// Opens the tree and what lies beside it.
    fn source(&self, save: &Save) -> Result<Source, Error> {
        if let SaveTree::Checkpoint(id) = &save.tree {
            let frozen = self.frozen(id, &save.key)?;
            let (tree, holder) = (frozen.tree.open_dir(b"")?, frozen.holder.open_dir(b"")?);
            return Ok(Source { tree, holder, frozen: Some(frozen) });
        }
        let key_digest = save.key.digest();
        let holder = self.inner.layout.cache.open_dir(key_digest.as_bytes())?;
        Ok(Source { tree: holder.open_dir(TREE)?, holder, frozen: None })
    }

    /// Reads the newest snapshot's manifest. A damaged one cannot be reused, and
    /// must not keep the next from being saved.
    ///
    /// # Errors
    /// [`Error::Store`], and [`Error::Sealed`] when the key is missing: then nothing
    /// is saved, for a snapshot without it would hide those that need it.
    async fn newest_manifest(
        &self,
        key: &Key,
        key_digest: &str,
        newest: Option<&Record>,
        codec: &ObjectCodec,
    ) -> Result<Option<Arc<Manifest>>, Error> {
        let Some(tree) = newest.and_then(|record| record.tree.as_ref()) else { return Ok(None) };
        let name = object_key(key_digest, &tree.manifest);
        let failed = |source| Error::Store { key: key.clone(), source };
        let problem = match self.inner.store.get(&name).await.map_err(failed)? {
            None => "it is not there".to_owned(),
            Some(body) => {
                let (codec, name) = (codec.clone(), tree.manifest);
                let decoded = self.run(Lane::Save, move |_| Ok(codec.decode_manifest(&name, body)));
                match decoded.await? {
                    Ok(manifest) => return Ok(Some(Arc::new(manifest))),
                    Err(error @ CodecError::Sealed(_)) => return Err(Error::of_codec(key, error)),
                    Err(CodecError::Damaged(problem)) => problem,
                }
            }
        };
        tracing::error!(%key, manifest = name, problem, "the newest snapshot is damaged; saving all anew");
        Ok(None)
    }

    /// Records what the saved tree was, for the next save. Best effort: without an
    /// index everything is read.
    async fn record(
        &self,
        key: &Key,
        source: Arc<Source>,
        manifest: String,
        stats: Vec<(Vec<u8>, Stat)>,
        now: disk::Time,
    ) {
        let key_digest = key.digest();
        let recorded = self.run(Lane::Save, move |inner| {
            let since = match &source.frozen {
                Some(frozen) => frozen.since,
                None => racy_since(inner.times, now, false),
            };
            inner.record(&source.holder, &key_digest, manifest.clone(), &stats, since)?;
            if inner.times != Times::Untrusted {
                inner.syncs.saved(&key_digest, source.holder.open_dir(b"")?, manifest);
            }
            Ok(())
        });
        if let Err(error) = recorded.await {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%key, %error, cause, "no index is kept; the next save reads the whole tree");
        }
    }

    /// Reads the tree on a blocking thread and sends its objects meanwhile.
    async fn send_tree(
        &self,
        save: &Save,
        key_digest: &str,
        plan: Plan,
        request: Request,
    ) -> Result<(Collected, u64), Error> {
        let (objects, mut waiting) = mpsc::channel::<(StoredObject, Held)>(1);
        let key = save.key.clone();
        let collecting = self.run(Lane::Save, move |inner| {
            // The receiver is gone when a put failed or the save was dropped.
            let gone = |_| damaged(&key, "the save was given up".into());
            let tree = plan.source.tree.open_dir(b"")?;
            let (walk, known) = plan.carry_out(inner, &key)?;
            let send = |object, held| objects.blocking_send((object, held)).map_err(gone);
            collect(&tree, walk, &|path| known.item(path), request, &send)
        });
        let sending = async move {
            let sent = stream::poll_fn(|context| waiting.poll_recv(context))
                .map(|(object, held)| async move {
                    // Until it is sent, or the save is dropped.
                    let _held = held;
                    self.put(save, key_digest, object).await
                })
                .buffer_unordered(PUTS)
                .try_fold(0, async |sum: u64, bytes: u64| Ok(sum + bytes))
                .await;
            // Before the other side is waited for: it may be waiting to send.
            drop(waiting);
            sent
        };
        let (collected, sent) = tokio::join!(collecting, sending);
        let sent = sent?;
        Ok((collected?, sent))
    }

    async fn put(&self, save: &Save, key_digest: &str, object: StoredObject) -> Result<u64, Error> {
        let bytes = object.body.len() as u64;
        let name = object_key(key_digest, &object.name);
        match self.inner.store.put(&name, object.body).await {
            Ok(()) => Ok(bytes),
            Err(source) => Err(Error::Store { key: save.key.clone(), source }),
        }
    }
}

// === impl Plan ===

impl Plan {
    /// Walks the tree, and says what of it need not be read.
    fn carry_out(self, inner: &Inner, key: &Key) -> Result<(Walk, Known), Error> {
        if let Some(frozen) = &self.source.frozen {
            let walk = frozen.walk(&self.exclude);
            let known = Known::of(self.manifest, &walk.entries, |entry| frozen.is_vouched(&entry.path));
            return Ok((walk, known));
        }
        let walk = walk(&self.source.tree, key, &self.exclude)?;
        let index = inner.index_of(&self.source.holder);
        let index = index.filter(|index| self.name.as_ref() == Some(&index.manifest));
        let chains = inner.moves.of(&key.digest());
        let is_vouched = |entry: &disk::Entry| {
            index.as_ref().is_some_and(|index| index.vouches(&entry.path, &entry.stat, &chains))
        };
        let known = Known::of(self.manifest, &walk.entries, is_vouched);
        Ok((walk, known))
    }
}

// === impl Inner: index ===

impl Inner {
    /// Reads an index, where stats are worth anything.
    pub(super) fn index_of(&self, holder: &Dir) -> Option<Index> {
        if self.times == Times::Untrusted { None } else { Index::read(holder) }
    }

    /// Writes an index, where stats are worth anything.
    pub(super) fn record(
        &self,
        holder: &Dir,
        key_digest: &str,
        manifest: String,
        stats: &[(Vec<u8>, Stat)],
        since: Option<disk::Time>,
    ) -> Result<(), Error> {
        if self.times == Times::Untrusted {
            return Ok(());
        }
        let entries = stats.iter().map(|(path, stat)| (path.as_slice(), stat));
        let index = Index::of(manifest, self.boot.clone(), entries, since);
        index.write(holder)?;
        self.moves.settle(key_digest, &index);
        Ok(())
    }

    /// Records a tree that was restored, before anybody can write to it.
    pub(super) fn record_restored(
        &self,
        key_digest: &str,
        holder: &Dir,
        tree: &Dir,
        manifest: &str,
    ) -> Result<(), Error> {
        if self.times == Times::Untrusted {
            return Ok(());
        }
        let now = self.file_time()?;
        let listed = disk::list(tree, &disk::Limits::TREE, disk::Missing::Error, |_, _| true);
        let entries = listed.map_err(|error| match error {
            disk::ListError::Disk(error) => error,
            disk::ListError::Limit(reason) => {
                disk::Error::new("list", tree.label(b""), std::io::Error::other(reason))
            }
        })?;
        let stats: Vec<_> = entries.into_iter().map(|entry| (entry.path, entry.stat)).collect();
        self.moves.forget(key_digest);
        self.record(holder, key_digest, manifest.to_owned(), &stats, racy_since(self.times, now, false))
    }

    /// Asks the file system's own clock, which is the one that stamps files.
    pub(super) fn file_time(&self) -> Result<disk::Time, Error> {
        let name = format!(".time-{}", crate::clock::random_hex(self.clock.as_ref(), 8)).into_bytes();
        self.layout.staging.make_dir(&name)?;
        let stat = self.layout.staging.stat_of(&name);
        self.layout.staging.remove_dir(&name)?;
        Ok(stat?.changed)
    }
}

fn saved(save: &Save, record: &Record, key_digest: &str, sent_bytes: u64) -> Result<Saved, Error> {
    match (record.snapshot(key_digest), &record.tree) {
        (Some(snapshot), Some(tree)) => Ok(Saved { snapshot, sent_bytes, skipped: tree.skipped }),
        _ => Err(damaged(&save.key, format!("record {} has no tree, and this save wrote it", record.number))),
    }
}
