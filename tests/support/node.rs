//! A whole node over an engine in memory and a store in memory, with real
//! directories, a real journal and real scripts. It can crash and start again.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use boilerhouse::{
    app::{Node, NodeParts},
    clock::{SharedClock, SystemClock},
    journal::{self, Journal},
    lifecycle::CrashPoints,
    model::{Owner, TenantId, spec::SpecDefaults},
    runtime::{
        SharedRuntime,
        fake::{FakeImage, FakeRuntime},
    },
    script::{LoadOptions, Runner, RunnerOptions, Set, Sources},
    seal::MasterKey,
    state::{
        Encryption,
        fence::Mode,
        host::{HostDirs, HostFiles},
    },
    store::{fault::FaultStore, memory::MemoryStore},
    tenancy::{CacheLimits, ClaimAnswer, ClaimRequest, Error, ReleaseAnswer, ReleaseRequest, TenantStatus},
};

/// The identity of the installation under test.
pub const INSTANCE: &str = "test";
/// The image that workloads of these tests name.
pub const IMAGE: &str = "app:1";
/// Who its program runs as.
pub const APP: Owner = Owner { uid: 1000, gid: 1000 };

/// What outlives a crash: the engine, the store, the disk.
pub struct World {
    pub runtime: Arc<FakeRuntime>,
    pub store: Arc<FaultStore>,
    pub objects: Arc<MemoryStore>,
    pub dir: tempfile::TempDir,
    pub max_containers: u32,
    pub idle_timeout_ms: u64,
    pub cache: CacheLimits,
    pub boot_id: String,
    pub master_key: bool,
    /// Whether state is sealed; needs the master key.
    pub sealed: bool,
    pub store_mode: Mode,
    pub instance: String,
}

/// A running node and the switch that crashes it.
pub struct TestNode {
    pub node: Node,
    pub crash: CrashPoints,
    dir: PathBuf,
}

// === impl World ===

impl World {
    /// Makes a world with these workloads, by id.
    pub fn new(workloads: &[(&str, &str)]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests chown, so they run as root");
        let dir =
            tempfile::Builder::new().prefix("boilerhouse-node-").tempdir().expect("a temporary directory");
        for folder in ["workloads", "scripts"] {
            std::fs::create_dir(dir.path().join(folder)).expect("a fresh directory");
        }
        for (id, script) in workloads {
            std::fs::write(dir.path().join(format!("workloads/{id}.rhai")), script).expect("a workload file");
        }
        let runtime = Arc::new(FakeRuntime::new());
        runtime.add_image(IMAGE, FakeImage { run_as: APP, ends_after: Some(Duration::ZERO) });
        let objects = Arc::new(MemoryStore::new());
        Self {
            runtime,
            store: FaultStore::new(objects.clone()),
            objects,
            dir,
            max_containers: 50,
            idle_timeout_ms: 0,
            cache: CacheLimits::default(),
            boot_id: "boot-1".to_owned(),
            master_key: true,
            sealed: false,
            store_mode: Mode::Exclusive,
            instance: INSTANCE.to_owned(),
        }
    }

    /// Makes another server with a disk and an engine of its own, on the same store.
    pub fn beside(&self, instance: &str, workloads: &[(&str, &str)]) -> Self {
        let objects = Arc::clone(&self.objects);
        let store = FaultStore::new(objects.clone());
        let store_mode = self.store_mode;
        Self { objects, store, store_mode, instance: instance.to_owned(), ..Self::new(workloads) }
    }

    /// Starts a node and waits until it serves.
    pub async fn start(&self) -> TestNode {
        let node = self.launch();
        wait_for("the node serves", || node.node.tenancy.readiness().status != "starting").await;
        node
    }

    /// Starts a node.
    pub fn launch(&self) -> TestNode {
        self.launch_in(self.dir.path())
    }

    /// Starts a node in another directory than this world's own.
    pub fn launch_in(&self, dir: &Path) -> TestNode {
        let clock: SharedClock = Arc::new(SystemClock);
        let path = |name: &str| dir.join(name);
        let dirs =
            HostDirs { state_dir: path("states"), secrets_dir: path("secrets"), socket_dir: path("sockets") };
        let master_key = self.master_key.then(|| MasterKey::new(&[7; 32]));
        let encryption = Encryption::new(master_key.clone().map(Arc::new), self.sealed, Arc::clone(&clock))
            .expect("there is a master key");
        let store = self.store.clone();
        let files =
            HostFiles::open_in_boot(dirs, store, Arc::clone(&clock), encryption.clone(), &self.boot_id)
                .expect("the directories can be used");
        let (journal, loaded) = Journal::open(&path("states").join("journal.db"), journal::Mode::Threaded)
            .expect("the journal opens");
        let options = LoadOptions {
            defaults: SpecDefaults { min_idle: 1, max: self.max_containers },
            default_image: IMAGE.to_owned(),
        };
        let sources = Sources::read(&path("workloads"), &path("scripts")).expect("the scripts can be read");
        let set = Set::load(&sources, &options).unwrap_or_else(|errors| panic!("{errors:#?}"));
        let crash = CrashPoints::default();
        let runtime: SharedRuntime = self.runtime.clone();
        let node = Node::start(NodeParts {
            clock,
            runtime,
            store: self.store.clone(),
            store_mode: self.store_mode,
            files: Arc::new(files),
            journal,
            loaded,
            set,
            runner: Runner::new(RunnerOptions::default()),
            master_key,
            encryption,
            instance: self.instance.clone(),
            boot_id: self.boot_id.clone(),
            store_name: "memory".to_owned(),
            max_containers: self.max_containers,
            idle_timeout_ms: self.idle_timeout_ms,
            cache: self.cache,
            crash: crash.clone(),
        })
        .expect("the node starts");
        TestNode { node, crash, dir: dir.to_owned() }
    }

    /// Returns the names of this installation's containers, running or not.
    pub fn containers(&self) -> Vec<String> {
        let all = self.runtime.all();
        all.into_iter()
            .filter(|container| {
                container.labels.as_ref().is_some_and(|labels| labels.instance == self.instance)
            })
            .map(|container| container.name)
            .collect()
    }
}

// === impl TestNode ===

impl TestNode {
    /// Claims for a tenant of the only workload.
    pub async fn claim(&self, tenant: &str) -> Result<ClaimAnswer, Error> {
        self.claim_with(tenant, ClaimRequest::default()).await
    }

    pub async fn claim_with(&self, tenant: &str, request: ClaimRequest) -> Result<ClaimAnswer, Error> {
        self.node.tenancy.claim(TenantId::new(tenant).expect("an id"), request).await
    }

    pub async fn release(&self, tenant: &str) -> Result<ReleaseAnswer, Error> {
        let request = ReleaseRequest::default();
        self.node.tenancy.release(TenantId::new(tenant).expect("an id"), request).await
    }

    pub async fn status(&self, tenant: &str) -> TenantStatus {
        let tenant = TenantId::new(tenant).expect("an id");
        self.node.tenancy.status(tenant).await.expect("a status")
    }

    /// Returns the host's side of a claim's state directory.
    pub fn state(&self, claim: &ClaimAnswer) -> PathBuf {
        self.dir.join("states/slots").join(claim.slot.as_str()).join("state")
    }

    /// Writes a file as the claim's program would.
    pub fn write(&self, claim: &ClaimAnswer, name: &str, content: &str) {
        write_in(&self.state(claim), name, content);
    }

    /// Reads a file of the claim's state.
    pub fn read(&self, claim: &ClaimAnswer, name: &str) -> Option<String> {
        std::fs::read_to_string(self.state(claim).join(name)).ok()
    }

    /// Ends the node as kill -9 would: everything stops where it stands.
    pub async fn crash(self) {
        self.node.tasks.abort();
        let left = self.node.tasks.wait(Duration::from_secs(20)).await;
        assert!(left.is_empty(), "tasks outlive the crash: {left:?}");
    }

    /// Ends the node in order.
    pub async fn stop(self) {
        self.node.stop().await;
    }

    /// Returns every slot's phase, sorted.
    pub fn phases(&self) -> Vec<&'static str> {
        let mut phases: Vec<_> = self.node.tenancy.slots().into_iter().map(|slot| slot.phase).collect();
        phases.sort_unstable();
        phases
    }

    /// Waits until every slot is ready or claimed, and as many are ready as are wanted.
    pub async fn settle(&self) {
        let began = std::time::Instant::now();
        loop {
            let (pools, phases) = (self.node.tenancy.pools(), self.phases());
            if pools.iter().all(|pool| pool.ready >= pool.target)
                && phases.iter().all(|phase| matches!(*phase, "ready" | "claimed"))
            {
                return;
            }
            let is_late = began.elapsed() >= Duration::from_secs(60);
            assert!(!is_late, "waited in vain until the pools are settled: {phases:?}, {pools:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Checks that every container, directory and row has an owner: P7.
    pub async fn check_no_leaks(&self, world: &World) {
        self.settle().await;
        let slots = self.node.tenancy.slots();
        let mut names: Vec<_> = slots.iter().map(|slot| slot.container.clone()).collect();
        let mut ids: Vec<_> = slots.iter().map(|slot| slot.slot.clone()).collect();
        names.sort_unstable();
        ids.sort_unstable();
        let mut containers = world.containers();
        containers.sort_unstable();
        assert_eq!(containers, names, "containers");
        assert_eq!(folders(&self.dir.join("states/slots")), ids, "slot directories");
        assert_eq!(folders(&self.dir.join("states/staging")), Vec::<String>::new(), "staging");
        assert_eq!(folders(&self.dir.join("states/set_aside")), Vec::<String>::new(), "set aside");
        for folder in ["secrets", "sockets"] {
            for name in folders(&self.dir.join(folder)) {
                assert!(ids.contains(&name), "{folder}/{name} has no slot");
            }
        }
    }
}

/// Writes a file below a state directory as the program would.
pub fn write_in(state: &Path, name: &str, content: &str) {
    let path = state.join(name);
    std::fs::write(&path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    std::os::unix::fs::chown(&path, Some(APP.uid), Some(APP.gid)).expect("root may chown");
}

/// Waits for a condition; panics with its name when it does not come within 30 s.
pub async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn folders(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort_unstable();
    names
}
