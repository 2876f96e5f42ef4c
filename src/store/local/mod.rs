//! A directory as an object store: the embedded default.
//!
//! # Layout
//! The object `t/1/a` is the file `t/1/a.OBJ` below the directory, so that `a`
//! and `a/b` may both exist; new objects are written in `.TMP` first. The
//! directory of a segment that ends with `.OBJ`, or is `.TMP`, has a `%` after
//! it, which is outside the alphabet of keys, therefore nothing collides. Files
//! without `.OBJ` are not objects and are left alone. The file system must tell
//! upper case from lower.
//!
//! # Guarantees
//! - An object appears under its name complete and synced, or not at all.
//! - `put` and `create` return when the object and the directories above it
//!   would survive a power loss.
//! - Everything is relative to the directory that was opened: one that is
//!   unmounted, moved or replaced under its path is never taken for an empty one.
//!
//! # Cancel safety
//! A dropped call still runs to its end on its blocking thread, once it began.

mod folder;
mod listing;

use std::{io::Write as _, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::{Semaphore, mpsc};

use self::folder::{Fault, Folder};
use super::{Creation, Error, Listed, Parts, Store, Versioning, key, probe};
use crate::clock::SystemClock;

/// So many calls do their work at a time; more wait for their turn.
const MAX_CALLS: usize = 32;

/// So many objects are written by parts at a time. They wait for their sources,
/// which may read from this store: they have turns of their own.
const MAX_WRITERS: usize = 8;

/// A call waits no longer than this, its turn included: a network file system
/// can hang.
const CALL_MS: u64 = 60_000;

/// Keeps objects as files below one directory.
pub struct LocalStore {
    folder: Arc<Folder>,
    permits: Arc<Semaphore>,
    writers: Arc<Semaphore>,
}

// === impl LocalStore ===

impl LocalStore {
    /// Opens a directory as a store, makes it when it is missing, and removes
    /// what writers that died more than an hour ago left in `.TMP`.
    ///
    /// Blocks for the time of a few system calls.
    ///
    /// # Errors
    /// [`Error::Refused`] with the path, when it cannot be made, read or written.
    pub fn open(dir: PathBuf) -> Result<Self, Error> {
        let folder = Folder::open(&dir).map_err(|source| {
            Error::refused("open", &dir.display().to_string(), format!("cannot use this directory: {source}"))
        })?;
        Ok(Self {
            folder: Arc::new(folder),
            permits: Arc::new(Semaphore::new(MAX_CALLS)),
            writers: Arc::new(Semaphore::new(MAX_WRITERS)),
        })
    }

    /// Runs `work` on a blocking thread, in its turn, within the deadline.
    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &str,
        work: impl FnOnce(&Folder) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Error> {
        let deadline = tokio::time::Instant::now() + Duration::from_millis(CALL_MS);
        let permit = match tokio::time::timeout_at(deadline, Arc::clone(&self.permits).acquire_owned()).await
        {
            Ok(permit) => permit.expect("the semaphore is never closed"),
            Err(_) => return Err(Error::unavailable(operation, key, "too many calls are waiting")),
        };
        let folder = Arc::clone(&self.folder);
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&folder)
        });
        let fault = match tokio::time::timeout_at(deadline, task).await {
            Ok(Ok(Ok(answer))) => return Ok(answer),
            Ok(Ok(Err(fault))) => fault,
            Ok(Err(_)) => Fault::Unsettled("the call was interrupted".to_owned()),
            Err(_) => Fault::Unsettled(format!("no answer from the file system within {CALL_MS} ms")),
        };
        Err(fault.into_error(operation, key))
    }
}

#[async_trait]
impl Store for LocalStore {
    async fn probe(&self) -> Result<(), Error> {
        probe::probe_create(self, &SystemClock).await
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, Error> {
        key::check_key("get", key)?;
        let name = key.to_owned();
        self.run("get", key, move |folder| folder.read(&name)).await
    }

    async fn put(&self, key: &str, body: Bytes) -> Result<(), Error> {
        key::check_key("put", key)?;
        key::check_body("put", key, body.len())?;
        let name = key.to_owned();
        self.run("put", key, move |folder| folder.replace(&name, &body)).await
    }

    async fn create(&self, key: &str, body: Bytes) -> Result<Creation, Error> {
        key::check_key("create", key)?;
        key::check_body("create", key, body.len())?;
        let name = key.to_owned();
        self.run("create", key, move |folder| folder.create(&name, &body)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Error> {
        key::check_list(prefix, after, limit)?;
        let (owned, after) = (prefix.to_owned(), after.map(str::to_owned));
        self.run("list", prefix, move |folder| folder.list(&owned, after.as_deref(), limit)).await
    }

    async fn delete(&self, key: &str) -> Result<(), Error> {
        key::check_key("delete", key)?;
        let name = key.to_owned();
        self.run("delete", key, move |folder| folder.remove(&name)).await
    }

    async fn copy(&self, from: &str, to: &str) -> Result<bool, Error> {
        key::check_key("copy", from)?;
        key::check_key("copy", to)?;
        let names = (from.to_owned(), to.to_owned());
        self.run("copy", to, move |folder| folder.copy(&names.0, &names.1)).await
    }

    async fn get_range(&self, key: &str, offset: u64, bytes: u64) -> Result<Option<Bytes>, Error> {
        key::check_key("get_range", key)?;
        key::check_range(key, offset, bytes)?;
        let name = key.to_owned();
        self.run("get_range", key, move |folder| folder.read_range(&name, offset, bytes)).await
    }

    async fn put_parts(&self, key: &str, mut parts: Parts) -> Result<(), Error> {
        key::check_key("put_parts", key)?;
        let (tx, mut rx) = mpsc::channel::<Option<Bytes>>(1);
        let name = key.to_owned();
        // The deadline is for each part: an object may be as large as it likes.
        let folder = Arc::clone(&self.folder);
        let permit =
            tokio::time::timeout(Duration::from_millis(CALL_MS), Arc::clone(&self.writers).acquire_owned());
        let Ok(permit) = permit.await else {
            return Err(Error::unavailable("put_parts", key, "too many calls are waiting"));
        };
        let permit = permit.expect("the semaphore is never closed");
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let (temporary, mut file) = folder.temporary()?;
            loop {
                match rx.blocking_recv() {
                    Some(Some(part)) => {
                        file.write_all(&part).map_err(|source| Fault::unchanged("write", source))?;
                    }
                    Some(None) => break,
                    // The caller gave up, or its source did.
                    None => return Err(Fault::Unchanged("the parts ended early".to_owned())),
                }
            }
            file.sync_all().map_err(|source| Fault::unchanged("sync", source))?;
            folder.rename(temporary, &name)
        });
        let given = give(key, &mut parts, tx).await;
        // Also when the parts ended early: then the task removes what it wrote.
        let ended = tokio::time::timeout(Duration::from_millis(CALL_MS), task).await;
        given?;
        match ended {
            Ok(Ok(outcome)) => outcome.map_err(|fault| fault.into_error("put_parts", key)),
            Ok(Err(_)) => Err(Error::unknown("put_parts", key, "the call was interrupted")),
            Err(_) => Err(Error::unknown(
                "put_parts",
                key,
                format!("no answer from the file system within {CALL_MS} ms"),
            )),
        }
    }

    async fn versioning(&self) -> Result<Versioning, Error> {
        Ok(Versioning::Off)
    }

    async fn abort_uploads(&self, before_ms: u64) -> Result<u64, Error> {
        self.run("abort_uploads", "", move |folder| folder.sweep_before(before_ms)).await
    }
}

/// Hands parts to the task that writes them, and after the last one the word
/// that it was; a task that ended early says why itself.
async fn give(key: &str, parts: &mut Parts, tx: mpsc::Sender<Option<Bytes>>) -> Result<(), Error> {
    loop {
        let part = parts.next().await.transpose().map_err(|error| Error::source(key, &error))?;
        let is_last = part.is_none();
        if let Some(part) = &part {
            key::check_body("put_parts", key, part.len())?;
        }
        match tokio::time::timeout(Duration::from_millis(CALL_MS), tx.send(part)).await {
            Ok(Ok(())) if !is_last => {}
            Ok(_) => return Ok(()),
            Err(_) => {
                let reason = "the file system does not take the parts";
                return Err(Error::unavailable("put_parts", key, reason));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::SystemTime};

    use super::*;

    fn body(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn open() -> (tempfile::TempDir, LocalStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(dir.path().join("deep/store")).unwrap();
        (dir, store)
    }

    #[tokio::test]
    async fn objects_survive_a_new_opening_and_leave_no_temporary_files() {
        let (dir, store) = open();
        store.put("t/1/a", body("1")).await.unwrap();
        store.put("t/1/a", body("2")).await.unwrap();
        store.create("t/1/b", body("3")).await.unwrap();
        store.create("t/1/b", body("4")).await.unwrap();
        drop(store);
        let root = dir.path().join("deep/store");
        assert_eq!(fs::read_dir(root.join(".TMP")).unwrap().count(), 0);
        let store = LocalStore::open(root).unwrap();
        assert_eq!(store.get("t/1/a").await.unwrap(), Some(body("2")));
        assert_eq!(store.get("t/1/b").await.unwrap(), Some(body("3")));
    }

    #[tokio::test]
    async fn the_last_delete_leaves_no_directory() {
        let (dir, store) = open();
        for key in ["t/1/m/a", "t/1/b"] {
            store.put(key, body("1")).await.unwrap();
        }
        store.delete("t/1/m/a").await.unwrap();
        let root = dir.path().join("deep/store");
        assert!(!root.join("t/1/m").exists() && root.join("t/1/b.OBJ").exists());
        store.delete("t/1/b").await.unwrap();
        assert!(!root.join("t").exists());
    }

    #[tokio::test]
    async fn writers_and_deleters_of_one_directory_do_not_disturb_each_other() {
        let (_dir, store) = open();
        let store = Arc::new(store);
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let store = Arc::clone(&store);
                tokio::spawn(async move {
                    let key = format!("t/deep/{task}");
                    for _ in 0..20 {
                        store.put(&key, body("1")).await.unwrap();
                        assert_eq!(store.get(&key).await.unwrap(), Some(body("1")));
                        store.delete(&key).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(store.list("", None, 10).await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_directory_that_is_gone_is_not_an_empty_store() {
        let (dir, store) = open();
        store.put("a", body("1")).await.unwrap();
        let root = dir.path().join("deep/store");
        // Moved, with another in its place: the one that was opened still answers.
        fs::rename(&root, dir.path().join("moved")).unwrap();
        fs::create_dir(&root).unwrap();
        assert_eq!(store.get("a").await.unwrap(), Some(body("1")));
        fs::remove_dir_all(dir.path().join("moved")).unwrap();
        for error in [
            store.get("a").await.unwrap_err(),
            store.list("", None, 10).await.unwrap_err(),
            store.put("a", body("2")).await.unwrap_err(),
            store.delete("a").await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        }
    }

    #[tokio::test]
    async fn what_is_not_an_object_is_left_alone() {
        let (dir, store) = open();
        let root = dir.path().join("deep/store");
        store.put("t/a", body("1")).await.unwrap();
        fs::write(root.join("t/notes.txt"), "foreign").unwrap();
        fs::write(root.join("t/plus+.OBJ"), "foreign").unwrap();
        std::os::unix::fs::symlink(root.join("t/a.OBJ"), root.join("t/link.OBJ")).unwrap();
        let listed = store.list("", None, 10).await.unwrap();
        assert_eq!(listed.iter().map(|object| object.key.as_str()).collect::<Vec<_>>(), ["t/a"]);
        assert!(matches!(store.get("t/link").await, Err(Error::Unavailable { .. })));
        store.delete("t/a").await.unwrap();
        assert!(root.join("t/notes.txt").exists());
    }

    #[test]
    fn only_old_temporary_files_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        LocalStore::open(dir.path().to_owned()).unwrap();
        let (old, young) = (dir.path().join(".TMP/old"), dir.path().join(".TMP/young"));
        for path in [&old, &young] {
            fs::write(path, "half").unwrap();
        }
        let file = fs::File::options().write(true).open(&old).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
        LocalStore::open(dir.path().to_owned()).unwrap();
        assert!(!old.exists() && young.exists());
    }

    #[test]
    fn a_path_that_cannot_be_a_store_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let Err(error) = LocalStore::open(file.path().to_owned()) else { panic!("a file was opened") };
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        assert!(error.to_string().contains(&file.path().display().to_string()), "{error}");
    }
}
