//! A save: fence, read, send, commit, read back, and only then forget.

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;

use crate::disk::{self, Dir};

use super::{
    Error, HostFiles, Lane, Save, Saved,
    collect::{Collected, Request, collect, excludes},
    snapshot::{
        Commit, Digest, Manifest, Record, Reuse, Standing, StoredObject, commit, damaged, newest_record,
        object_key, retain, standing, verify,
    },
};
use crate::state::SaveTree;

/// Objects of one save under way together. With one being made and one waiting,
/// a save holds at most some 64 MiB.
const PUTS: usize = 2;
/// Retention is best effort; the next save goes on where it stopped.
const RETENTION_LIMIT: Duration = Duration::from_secs(60);

// === impl HostFiles ===

impl HostFiles {
    /// Saves a tree as the newest snapshot; see [`crate::state::SlotFiles::save`].
    ///
    /// A nonce stands for one attempt to save one version of a tree: when the
    /// newest record carries it already, nothing is read and nothing sent.
    pub(super) async fn save_tree(&self, save: &Save) -> Result<Saved, Error> {
        let store = self.inner.store.as_ref();
        let key_digest = save.key.digest();
        let exclude = excludes(save)?;
        let newest = newest_record(store, &save.key, &key_digest).await?;
        match (standing(newest.as_ref(), save.epoch, &save.nonce), &newest) {
            (Standing::Fenced(epoch), _) => {
                return Err(Error::Fenced { key: save.key.clone(), own: save.epoch, newest: epoch });
            }
            (Standing::Committed, Some(record)) => {
                verify(store, &save.key, &key_digest, save.epoch, record).await?;
                return Ok(saved(record, &key_digest, 0));
            }
            (Standing::Open | Standing::Committed, _) => {}
        }
        // Opened before anything is sent: no tree is an error, not an empty one.
        let (tree, skipped_before) = self.tree_of(save)?;
        let reuse = self.reuse(save, &key_digest, newest.as_ref()).await?;
        let request = Request {
            key: save.key.clone(),
            epoch: save.epoch,
            run_as: save.run_as,
            exclude,
            max_bytes: save.max_bytes,
            reuse,
        };
        let (collected, mut sent) = self.send_tree(save, &key_digest, tree, request).await?;
        let manifest = collected.manifest;
        sent += manifest.body.len() as u64;
        self.put(save, &key_digest, manifest.clone()).await?;
        let next = Commit {
            key: &save.key,
            key_digest: &key_digest,
            epoch: save.epoch,
            nonce: &save.nonce,
            manifest: manifest.name,
            created_ms: self.inner.clock.unix_ms(),
            files: collected.files,
            bytes: collected.bytes,
            skipped: collected.skipped + skipped_before,
            failed_claim: save.failed_claim,
        };
        let record = commit(store, &next, newest).await?;
        let retained = retain(store, &save.key, &record, save.persist.keep_last);
        match tokio::time::timeout(RETENTION_LIMIT, retained).await {
            Ok(Ok(removed)) => tracing::debug!(key = %save.key, removed, "old snapshots were removed"),
            Ok(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(key = %save.key, %error, cause, "old snapshots stay for now");
            }
            Err(_) => {
                tracing::warn!(key = %save.key, "removing old snapshots takes long, the rest stays for now")
            }
        }
        Ok(saved(&record, &key_digest, sent))
    }

    /// Opens the tree; answers, too, how many entries a checkpoint left out.
    fn tree_of(&self, save: &Save) -> Result<(Dir, u64), Error> {
        match &save.tree {
            SaveTree::Checkpoint(id) => self.frozen_tree(id, &save.key),
            SaveTree::Cache => match self.inner.cached_tree(&save.key)? {
                Some(tree) => Ok((tree, 0)),
                None => {
                    let path = self.inner.layout.cache.label(save.key.digest().as_bytes());
                    Err(disk::Error::new("open", path, rustix::io::Errno::NOENT).into())
                }
            },
        }
    }

    /// Reads what the newest snapshot has. A damaged one cannot be reused, and
    /// must not keep the next from being saved.
    async fn reuse(&self, save: &Save, key_digest: &str, newest: Option<&Record>) -> Result<Reuse, Error> {
        let Some(record) = newest else { return Ok(Reuse::default()) };
        let name = object_key(key_digest, &record.manifest);
        let failed = |source| Error::Store { key: save.key.clone(), source };
        let problem = match self.inner.store.get(&name).await.map_err(failed)? {
            None => "it is not there".to_owned(),
            Some(body) if Digest::of(&body) != record.manifest.digest => "it has other bytes".to_owned(),
            Some(body) => {
                let key = save.key.clone();
                let decoded = self.run(Lane::Save, move |_| {
                    Ok(Manifest::decode(&body, &key).map(|manifest| Reuse::of(&manifest)))
                });
                match decoded.await? {
                    Ok(reuse) => return Ok(reuse),
                    Err(problem) => problem,
                }
            }
        };
        tracing::error!(key = %save.key, manifest = name, problem, "the newest snapshot is damaged; saving all anew");
        Ok(Reuse::default())
    }

    /// Reads the tree on a blocking thread and sends its objects meanwhile.
    async fn send_tree(
        &self,
        save: &Save,
        key_digest: &str,
        tree: Dir,
        request: Request,
    ) -> Result<(Collected, u64), Error> {
        let (objects, mut waiting) = mpsc::channel::<StoredObject>(1);
        let key = save.key.clone();
        let collecting = self.run(Lane::Save, move |_| {
            // The receiver is gone when a put failed or the save was dropped.
            let gone = |_| damaged(&key, "the save was given up".into());
            collect(&tree, request, &mut |object| objects.blocking_send(object).map_err(gone))
        });
        let sending = async move {
            let sent = stream::poll_fn(|context| waiting.poll_recv(context))
                .map(|object| self.put(save, key_digest, object))
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

fn saved(record: &Record, key_digest: &str, sent_bytes: u64) -> Saved {
    Saved { snapshot: record.snapshot(key_digest), sent_bytes, skipped: record.skipped }
}
