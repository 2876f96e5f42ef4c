//! The same checks on every store there is.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use boilerhouse::{
    clock::{SystemClock, random_hex},
    store::{LocalStore, S3Store, SharedStore, s3::Limits},
};

use crate::{
    changes, checkpoints, edits, histories,
    radosgw::Radosgw,
    roundtrip,
    s3_server::{BUCKET, S3Server},
    support::MemoryStore,
};

/// Where stores are made.
pub(crate) enum Place {
    Memory,
    Local(tempfile::TempDir),
    InProcess(S3Server),
    Radosgw(Box<Radosgw>),
}

impl Place {
    pub(crate) fn local() -> Self {
        Self::Local(tempfile::tempdir().unwrap())
    }

    /// A local store on a file system in memory: its syncs cost nothing.
    pub(crate) fn in_memory() -> Self {
        Self::Local(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    /// Makes an empty store in memory, or over one in this place.
    pub(crate) fn store(&self) -> Arc<MemoryStore> {
        match self {
            Self::Memory => Arc::default(),
            _ => Arc::new(MemoryStore::over(self.shared())),
        }
    }

    /// Makes an empty store.
    pub(crate) fn shared(&self) -> SharedStore {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let s3 = |bucket: &str, prefix: &str, aws| {
            S3Store::connect(bucket, prefix, aws, Limits::default(), Arc::new(SystemClock)).unwrap()
        };
        match self {
            Self::Memory => Arc::new(MemoryStore::default()),
            Self::Local(dir) => Arc::new(LocalStore::open(dir.path().join(number.to_string())).unwrap()),
            Self::InProcess(server) => Arc::new(s3(BUCKET, &format!("state-{number}"), &server.aws())),
            Self::Radosgw(server) => {
                let prefix = format!("state-{}", random_hex(&SystemClock, 8));
                Arc::new(s3(&server.bucket, &prefix, &server.aws))
            }
        }
    }
}

async fn suite(place: &Place) {
    roundtrip::some_trees_come_back(place).await;
    changes::no_change_hides(place).await;
    changes::only_what_changed_is_copied(place).await;
    checkpoints::it_is_the_tree_under_pause(place).await;
    checkpoints::names_are_one_file(place).await;
    histories::back_and_forth(place).await;
    histories::a_fork_lives_alone(place).await;
    histories::a_rolled_back_tree_is_kept(place).await;
    edits::some_histories_come_back(place).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_is_kept_on_a_local_store() {
    suite(&Place::local()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_is_kept_on_an_s3_server_in_process() {
    suite(&Place::InProcess(S3Server::start().await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn state_is_kept_on_radosgw() {
    suite(&Place::Radosgw(Box::new(Radosgw::find()))).await;
}
