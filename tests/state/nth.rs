//! The n-th call of a save and of a fill fails, is lost, comes late, comes twice,
//! waits, or is cut short: for each n until none is met, on every store there is.
//! Never a torn or lost state, never an empty one by mistake (P2, P3, P8), and once
//! the faults stop, the repetition succeeds.

use std::{path::PathBuf, sync::Arc, time::Duration};

use boilerhouse::{
    clock::SystemClock,
    model::{Key, SlotId, SnapshotRef},
    state::{
        Error, FillFrom, SlotFiles as _,
        host::{HostDirs, HostFiles},
    },
    store::{
        FaultStore, SharedStore,
        fault::{Fault, Rule},
    },
};

use crate::{
    places::Place,
    radosgw::Radosgw,
    s3_server::S3Server,
    support::{Tree, fill, key, save, slot, some_tree, tree, volumes, without_root_time, write},
};

pub(crate) fn faults() -> [Fault; 7] {
    [
        Fault::FailBefore,
        Fault::FailAfter,
        Fault::Lose,
        Fault::Hold,
        Fault::Repeat,
        Fault::Delay(Duration::from_millis(20)),
        Fault::Truncate(7),
    ]
}

/// A node on a store of any kind.
pub(crate) struct AnyNode {
    pub(crate) files: HostFiles,
    dir: tempfile::TempDir,
}

impl AnyNode {
    pub(crate) fn new(store: &Arc<FaultStore>) -> Self {
        Self::open(tempfile::tempdir().unwrap(), store)
    }

    /// As [`AnyNode::new`], on a file system in memory.
    pub(crate) fn in_memory(store: &Arc<FaultStore>) -> Self {
        Self::open(tempfile::tempdir_in("/dev/shm").unwrap(), store)
    }

    fn open(dir: tempfile::TempDir, store: &Arc<FaultStore>) -> Self {
        let path = |name: &str| dir.path().join(name);
        let dirs =
            HostDirs { state_dir: path("state"), secrets_dir: path("secrets"), socket_dir: path("sockets") };
        let store: SharedStore = Arc::<FaultStore>::clone(store);
        let files = HostFiles::open(dirs, store, Arc::new(SystemClock)).unwrap();
        Self { files, dir }
    }

    pub(crate) fn state(&self, slot: &SlotId) -> PathBuf {
        self.dir.path().join("state/slots").join(slot.as_str()).join("state")
    }

    pub(crate) async fn claim(
        &self,
        slot: &SlotId,
        key: &Key,
        epoch: u64,
        from: FillFrom,
    ) -> Result<(), Error> {
        self.files.prepare(slot, &volumes()).await.unwrap();
        self.files.fill(&fill(slot, key, epoch, from)).await.map(|_| ())
    }

    /// Leaves one snapshot in the store and a newer tree, not saved, in the cache.
    async fn with_unsaved_tree(&self, key: &Key) -> Tree {
        let (one, two) = (slot("one"), slot("two"));
        self.claim(&one, key, 1, FillFrom::Empty).await.unwrap();
        write(&self.state(&one), "old", b"old");
        self.files.capture(&one, key).await.unwrap();
        self.files.save(&save(key, 1, "n1")).await.unwrap();
        self.files.wipe(&one).await.unwrap();
        self.claim(&two, key, 2, FillFrom::Cache).await.unwrap();
        some_tree(&self.state(&two));
        let expected = without_root_time(tree(&self.state(&two)));
        self.files.capture(&two, key).await.unwrap();
        self.files.wipe(&two).await.unwrap();
        expected
    }

    /// Captures, saves and wipes; answers the tree.
    pub(crate) async fn release(&self, slot: &SlotId, key: &Key, epoch: u64) -> Tree {
        let found = without_root_time(tree(&self.state(slot)));
        self.files.capture(slot, key).await.unwrap();
        self.files.save(&save(key, epoch, &format!("n{epoch}"))).await.unwrap();
        self.files.wipe(slot).await.unwrap();
        found
    }

    pub(crate) async fn newest(&self, key: &Key) -> Option<SnapshotRef> {
        self.files.newest(key).await.unwrap()
    }

    /// Asks for the newest snapshot and fills a slot with it.
    pub(crate) async fn restored(&self, slot: &SlotId, key: &Key, epoch: u64) -> Result<Tree, Error> {
        self.files.prepare(slot, &volumes()).await.unwrap();
        let newest = self.files.newest(key).await?;
        let newest =
            newest.unwrap_or_else(|| panic!("{key} was saved, and the store's proof says it was not"));
        self.claim(slot, key, epoch, FillFrom::Snapshot(newest)).await?;
        Ok(without_root_time(tree(&self.state(slot))))
    }
}

/// Runs the campaign on one store.
async fn campaign(name: &str, store: SharedStore) {
    let store = FaultStore::new(store);
    for (kind, fault) in faults().into_iter().enumerate() {
        let (mut saves, mut fills) = (0, 0);
        for nth in 1.. {
            let when = format!("{name}, {fault:?}, call {nth}");
            let key = key(&format!("t{kind}-{nth}"));
            let node = AnyNode::new(&store);
            let expected = node.with_unsaved_tree(&key).await;
            let mut saving = save(&key, 2, "n2");
            saving.persist.keep_last = 1;

            let before = store.all_calls();
            store.add(Rule::next(fault.clone()).nth(nth));
            let first = node.files.save(&saving).await;
            store.clear();
            let struck_save = store.all_calls() - before >= nth;
            // What comes late may come before the repetition, or after it.
            if nth % 2 == 0 {
                store.land().await.unwrap();
            }
            let second = node.files.save(&saving).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            if let Ok(first) = &first {
                assert_eq!(first.snapshot, second.snapshot, "{when}: one nonce, one snapshot");
            }
            store.land().await.unwrap();
            let third = node.files.save(&saving).await.unwrap();
            assert_eq!(second.snapshot, third.snapshot, "{when}: it was committed once");

            let other = AnyNode::new(&store);
            let three = slot("three");
            let before = store.all_calls();
            store.add(Rule::next(fault.clone()).nth(nth));
            let filled = other.restored(&three, &key, 3).await;
            store.clear();
            let struck_fill = store.all_calls() - before >= nth;
            match filled {
                Ok(filled) => assert_eq!(filled, expected, "{when}"),
                Err(Error::Store { .. } | Error::Damaged { .. }) => {
                    assert!(struck_fill, "{when}: nothing was struck");
                    let left = tree(&other.state(&three)).len();
                    assert_eq!(left, 1, "{when}: a fill that failed left something in the slot");
                    let again = other.restored(&three, &key, 3).await;
                    assert_eq!(again.unwrap_or_else(|error| panic!("{when}: {error:?}")), expected, "{when}");
                }
                Err(error) => panic!("{when}: {error:?}"),
            }
            saves += u64::from(struck_save);
            fills += u64::from(struck_fill);
            if !struck_save && !struck_fill {
                first.unwrap_or_else(|error| panic!("{when}, not struck: {error:?}"));
                break;
            }
        }
        assert!(saves >= 5 && fills >= 3, "{name}, {fault:?}: only {saves} calls of saves, {fills} of fills");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_p3_any_fault_at_any_call_is_survived_on_a_local_store() {
    let place = Place::local();
    campaign("local", place.shared()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_p3_any_fault_at_any_call_is_survived_on_an_s3_server_in_process() {
    let place = Place::InProcess(S3Server::start().await);
    campaign("S3 in process", place.shared()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_p3_any_fault_at_any_call_is_survived_on_radosgw() {
    campaign("radosgw", Place::Radosgw(Box::new(Radosgw::find())).shared()).await;
}
