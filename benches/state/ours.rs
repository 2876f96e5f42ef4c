//! State as the server moves it: the public port, with a real store behind it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use boilerhouse::{
    clock::{SystemClock, random_hex},
    config::Aws,
    model::{
        Epoch, Key, Owner, Secret, SlotId, TenantId, WorkloadId,
        spec::{Layout, Persist, Volume, VolumeMode, Volumes},
    },
    state::{
        Base, Fill, FillFrom, Save, SaveTree, SlotFiles as _,
        fence::Author,
        host::{HostDirs, HostFiles},
    },
    store::{S3Store, SharedStore, s3::Limits},
};

use crate::Place;

/// The program's user; the trees are made by root, as rclone and the others see them.
const RUN_AS: Owner = Owner { uid: 0, gid: 0 };

/// One node with directories of its own.
pub(crate) struct Node {
    files: HostFiles,
    dir: PathBuf,
    key: Key,
    epoch: u64,
    slot: Option<SlotId>,
}

fn shown(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Connects to the server as the configuration would.
pub(crate) fn store(place: &Place, prefix: &str) -> Result<SharedStore, String> {
    let aws = Aws {
        access_key_id: Some(place.access_key.clone()),
        secret_access_key: Some(Secret::new(place.secret_key.clone())),
        region: place.region.clone(),
        endpoint_url: Some(place.endpoint.clone()),
        ..Aws::default()
    };
    let clock = Arc::new(SystemClock);
    let store = S3Store::connect(&place.bucket, prefix, &aws, Limits::default(), clock);
    Ok(Arc::new(store.map_err(|error| shown(&error))?))
}

// === impl Node ===

impl Node {
    /// Opens a node below `dir`; what an earlier one left there is found again.
    pub(crate) fn open(dir: &Path, store: SharedStore, epoch: u64) -> Result<Self, String> {
        let dirs = HostDirs {
            state_dir: dir.join("state"),
            secrets_dir: dir.join("secrets"),
            socket_dir: dir.join("sockets"),
        };
        let files = HostFiles::open(dirs, store, Arc::new(SystemClock)).map_err(|error| shown(&error))?;
        let tenant = TenantId::new("bench").map_err(|error| shown(&error))?;
        let workload = WorkloadId::new("bench").map_err(|error| shown(&error))?;
        Ok(Self { files, dir: dir.to_owned(), key: Key::new(tenant, workload), epoch, slot: None })
    }

    /// Returns the number of the last claim.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Makes a new slot with nothing in it; not measured, for it waits in the pool.
    pub(crate) async fn prepare(&mut self) -> Result<(), String> {
        self.epoch += 1;
        let slot = SlotId::new(format!("slot-{}", self.epoch)).map_err(|error| shown(&error))?;
        let volume = Some(Volume { container_path: "/data".into(), mode: VolumeMode::Rw });
        let volumes = Volumes { state: volume, secrets: None, comm: None };
        self.files.prepare(&slot, &volumes).await.map_err(|error| shown(&error))?;
        self.slot = Some(slot);
        Ok(())
    }

    /// Returns where the program would see its state.
    pub(crate) fn state(&self) -> Result<PathBuf, String> {
        Ok(self.dir.join("state/slots").join(self.slot()?.as_str()).join("state"))
    }

    fn slot(&self) -> Result<&SlotId, String> {
        self.slot.as_ref().ok_or_else(|| "no slot is prepared".to_owned())
    }

    /// Fills the slot with nothing.
    pub(crate) async fn fill_empty(&self) -> Result<(), String> {
        self.fill(FillFrom::Empty).await
    }

    /// Fills the slot from the node's cache.
    pub(crate) async fn fill_cached(&self) -> Result<(), String> {
        self.fill(FillFrom::Cache).await
    }

    /// Asks the store for the newest snapshot and fills the slot with it.
    pub(crate) async fn fill_newest(&self) -> Result<Duration, String> {
        let begun = Instant::now();
        let newest = self.files.newest(&self.key).await.map_err(|error| shown(&error))?;
        let newest = newest.ok_or("the store has no snapshot")?;
        self.fill(FillFrom::Snapshot(newest)).await?;
        Ok(begun.elapsed())
    }

    /// Asks the store what it has, as a claim must that knows nothing, and takes the cached tree.
    pub(crate) async fn fill_asked(&self) -> Result<Duration, String> {
        let begun = Instant::now();
        let newest = self.files.newest(&self.key).await.map_err(|error| shown(&error))?;
        newest.ok_or("the store has no snapshot")?;
        self.fill(FillFrom::Cache).await?;
        Ok(begun.elapsed())
    }

    async fn fill(&self, from: FillFrom) -> Result<(), String> {
        let fill = Fill {
            slot: self.slot()?.clone(),
            key: self.key.clone(),
            epoch: Epoch(self.epoch),
            from,
            run_as: RUN_AS,
            previous_owner: None,
        };
        self.files.fill(&fill).await.map(|_| ()).map_err(|error| shown(&error))
    }

    /// Captures the slot and saves the tree: committed and read back when it returns.
    pub(crate) async fn release(&self) -> Result<Duration, String> {
        let save = Save {
            key: self.key.clone(),
            epoch: Epoch(self.epoch),
            nonce: random_hex(&SystemClock, 16),
            tree: SaveTree::Cache,
            run_as: RUN_AS,
            failed_claim: false,
            persist: Persist {
                on_release: true,
                every_ms: 0,
                exclude: Vec::new(),
                keep_last: 10,
                keep_days: 0,
                max_pause_ms: 1_000,
                layout: Layout::Snapshot,
            },
            max_bytes: None,
            author: Author { server: "bench".to_owned(), term: None },
            is_last: true,
            base: Base::Any,
        };
        let begun = Instant::now();
        self.files.capture(self.slot()?, &self.key).await.map_err(|error| shown(&error))?;
        self.files.save(&save).await.map_err(|error| shown(&error))?;
        let elapsed = begun.elapsed();
        self.files.wipe(self.slot()?).await.map_err(|error| shown(&error))?;
        Ok(elapsed)
    }
}
