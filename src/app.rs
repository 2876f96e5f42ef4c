//! Wires a node together, runs it, and takes it down in order.

mod transfer;
mod verify;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tracing::{error, info, warn};

pub use self::transfer::{ImportFrom, Importing, TransferProgress, export, import};
pub use self::verify::{Finding, Progress, Report, Scope, verify};
pub use crate::state::transfer::{Export, Exported, Imported};
use crate::{
    api::{self, ApiState, Auth},
    clock::{Clock as _, SharedClock, SystemClock, random_hex},
    config::{self, Config, StoreLocation},
    journal::{self, Journal, Loaded},
    lifecycle::{CrashPoints, Tasks},
    model::spec::{Layout, SpecDefaults},
    pool::{PoolParts, PoolStatus, Pools, capacity::Capacity},
    runtime::{self, SharedRuntime, docker::DockerRuntime},
    script::{Diagnostic, LoadOptions, Runner, RunnerOptions, Set, Sources},
    seal::{self, MasterKey},
    state::{
        self, Encryption, SharedFiles,
        fence::{
            Mode,
            owner::{self, OwnerRecord, Tenure},
        },
        host::{HostDirs, HostFiles},
    },
    store::{
        self, SharedStore,
        local::LocalStore,
        s3::{Limits, S3Store},
    },
    telemetry::{Metrics, PoolSample, chain},
    tenancy::{CacheLimits, Parts, Tenancy},
    upkeep::Upkeep,
};

/// How long saves and releases that run may take at shutdown.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// How long the start of a server that shares its store waits for the store's probe.
const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// How long aborted tasks may take to end.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// Everything a node is made of; the ports may be real or fake.
pub struct NodeParts {
    /// Time and randomness.
    pub clock: SharedClock,
    /// The container engine.
    pub runtime: SharedRuntime,
    /// The object store, for its health, its owner record and histories: state goes through `files`.
    pub store: SharedStore,
    /// Whether other servers use the store, too.
    pub store_mode: Mode,
    /// The slots' directories and the store behind them.
    pub files: SharedFiles,
    /// The durable record.
    pub journal: Journal,
    /// What was in it.
    pub loaded: Loaded,
    /// The workloads.
    pub set: Set,
    /// Runs hooks.
    pub runner: Runner,
    /// Seals stored secrets.
    pub master_key: Option<MasterKey>,
    /// Opens and seals state, as `files` does.
    pub encryption: Encryption,
    /// This installation's identity.
    pub instance: String,
    /// Identifies this boot of the machine.
    pub boot_id: String,
    /// Names the store, to notice when it is another one.
    pub store_name: String,
    /// `BOILERHOUSE_MAX_CONTAINERS`
    pub max_containers: u32,
    /// `BOILERHOUSE_IDLE_TIMEOUT_MS`
    pub idle_timeout_ms: u64,
    /// `BOILERHOUSE_CACHE_MAX_MB` and `BOILERHOUSE_CACHE_MIN_FREE_MB`
    pub cache: CacheLimits,
    /// Where a test may stop the node.
    pub crash: CrashPoints,
}

/// A running node, without its listener.
pub struct Node {
    /// Claims and releases.
    pub tenancy: Tenancy,
    /// Pools.
    pub pools: Pools,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Everything that runs.
    pub tasks: Tasks,
    journal: Journal,
    /// Work that time asks for; started by [`Node::start_upkeep`], or called by hand in tests.
    pub upkeep: Upkeep,
}

/// Says why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or the listener cannot be used.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The workloads or scripts have errors; all of them.
    #[error("{0}")]
    Scripts(String),
    /// A folder of scripts that the configuration names is not there.
    #[error("{origin}: there is no folder {}", path.display())]
    NoFolder {
        /// The variable or the place in the file that names it.
        origin: String,
        /// What it names.
        path: PathBuf,
    },
    /// The journal cannot be opened.
    #[error("journal cannot be opened")]
    Journal(#[source] journal::Error),
    /// The directories cannot be used.
    #[error("state directories cannot be used")]
    State(#[source] state::Error),
    /// The store's configuration is wrong.
    #[error("store cannot be used")]
    Store(#[source] store::Error),
    /// The store cannot be asked for what is in it.
    #[error("state in the store cannot be read")]
    History(#[source] state::history::Error),
    /// The store was to be shared, and would let two servers write the same record.
    #[error("BOILERHOUSE_STORE_SHARED is true, and this store cannot be shared")]
    NotShareable(#[source] store::Error),
    /// State cannot be exported or imported.
    #[error("state cannot be carried")]
    Transfer(#[source] Box<state::transfer::Error>),
    /// What is asked for has to be said more exactly, or is not there.
    #[error("{0}")]
    Unclear(String),
    /// The store's owner cannot be found out or changed.
    #[error("store's owner cannot be changed")]
    Owner(#[source] owner::Error),
    /// It must be said which server runs no more.
    #[error("say with --from which server runs no more; the store is held by {0}")]
    TakeWhom(String),
    /// The engine's configuration is wrong.
    #[error("container engine cannot be used")]
    Runtime(#[source] runtime::Error),
    /// The engine answers and cannot serve us.
    #[error("container engine cannot be used: {0}")]
    Engine(String),
    /// The master key cannot be read.
    #[error("master key cannot be used")]
    MasterKey(#[source] seal::KeyError),
    /// The tokens cannot be read; all errors.
    #[error("tokens cannot be used:\n{0}")]
    Tokens(String),
    /// The state directory belongs to another store.
    #[error(
        "this state directory's journal belongs to the store {before}, and BOILERHOUSE_STORE is {now}; \
         use another state directory, or the store it belongs to"
    )]
    OtherStore {
        /// Which it belongs to.
        before: String,
        /// Which was given.
        now: String,
    },
    /// The scheduler cannot be set up.
    #[error("scheduler cannot be set up: {0}")]
    Scheduler(String),
}

// === impl Node ===

impl Node {
    /// Starts a node: it adopts what survived and then serves.
    ///
    /// # Errors
    /// [`Error::OtherStore`].
    pub fn start(parts: NodeParts) -> Result<Self, Error> {
        if let Err(before) = Tenancy::check_store(&parts.loaded, &parts.store_name) {
            return Err(Error::OtherStore { before, now: parts.store_name });
        }
        let tasks = Tasks::new();
        let journal = parts.journal.clone();
        let metrics = Arc::new(Metrics::new());
        let pools = Pools::new(PoolParts {
            instance: parts.instance.clone(),
            clock: Arc::clone(&parts.clock),
            runtime: Arc::clone(&parts.runtime),
            files: Arc::clone(&parts.files),
            journal: parts.journal.clone(),
            tasks: tasks.clone(),
            crash: parts.crash.clone(),
            capacity: Capacity::new(parts.max_containers),
        });
        let tenancy = Tenancy::new(
            Parts {
                clock: Arc::clone(&parts.clock),
                runtime: Arc::clone(&parts.runtime),
                files: parts.files,
                store: Arc::clone(&parts.store),
                journal: parts.journal,
                runner: parts.runner,
                scripts: Arc::new(ArcSwap::from_pointee(parts.set)),
                pools: pools.clone(),
                metrics: Arc::clone(&metrics),
                tasks: tasks.clone(),
                crash: parts.crash,
                master_key: parts.master_key,
                encryption: parts.encryption,
                instance: parts.instance.clone(),
                mode: parts.store_mode,
                cache: parts.cache,
            },
            &parts.loaded,
        );
        let adopting = tenancy.clone();
        tasks.spawn("adopt", async move {
            adopting.adopt(parts.loaded, &parts.boot_id, &parts.store_name).await;
        });
        let holding = tenancy.clone();
        tasks.spawn("hold store", async move { holding.hold_store().await });
        let upkeep = Upkeep {
            tenancy: tenancy.clone(),
            pools: pools.clone(),
            runtime: parts.runtime,
            store: parts.store,
            clock: parts.clock,
            tasks: tasks.clone(),
            instance: parts.instance,
            idle_timeout_ms: parts.idle_timeout_ms,
        };
        Ok(Self { tenancy, pools, metrics, tasks, journal, upkeep })
    }

    /// Starts the scheduler and the engine's event stream.
    ///
    /// # Errors
    /// [`Error::Scheduler`].
    pub async fn start_upkeep(&self) -> Result<(), Error> {
        self.upkeep.clone().start().await.map_err(|error| Error::Scheduler(error.to_string()))
    }

    /// Stops taking work, lets what runs end, and names what is late.
    pub async fn stop(&self) {
        self.tasks.drain();
        // Actors and listeners live as long as the node; only work is waited for.
        let late = self.wait_for_work(DRAIN_LIMIT).await;
        if !late.is_empty() {
            warn!(?late, "tasks did not end in time; the next start goes on with them");
        }
        // While this server can still be asked about: nobody else claims before it is done.
        self.tenancy.release_store().await;
        self.tasks.abort();
        let left = self.tasks.wait(ABORT_LIMIT).await;
        if !left.is_empty() {
            warn!(tasks = ?left, "tasks did not end when aborted");
        }
        if let Err(error) = self.journal.flush().await {
            error!(error = &error as &dyn std::error::Error, "journal could not be flushed");
        }
    }

    async fn wait_for_work(&self, limit: Duration) -> Vec<&'static str> {
        const SERVICES: [&str; 5] = ["pool", "watch slot", "engine events", "scheduler", "hold store"];
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let mut work = self.tasks.live();
            work.retain(|name| !SERVICES.contains(name));
            if work.is_empty() || tokio::time::Instant::now() >= deadline {
                return work;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// What an operator's takeover of the store would do.
pub struct Takeover {
    store: SharedStore,
    mode: Mode,
    /// The store, as `BOILERHOUSE_STORE` names it.
    pub store_name: String,
    /// Who is to have it.
    pub server: String,
    /// Whose it is now; none: there is nothing to take over.
    pub from: Vec<OwnerRecord>,
}

impl Takeover {
    /// Does it.
    ///
    /// # Errors
    /// [`Error::Owner`]; it may be done in part, and repeated.
    pub async fn carry_out(&self) -> Result<(), Error> {
        let nonce = random_hex(&SystemClock, 16);
        let (store, now_ms) = (self.store.as_ref(), SystemClock.unix_ms());
        owner::take_over(store, &self.from, &self.server, self.mode, &nonce, now_ms)
            .await
            .map_err(Error::Owner)
    }
}

/// Finds out what a takeover of the configured store by the configured server would do;
/// `from` names one of several servers that share it.
///
/// # Errors
/// [`Error::Store`] and [`Error::Owner`]; [`Error::TakeWhom`] when it must be said whose place is taken.
pub async fn plan_takeover(config: &Config, from: Option<&str>) -> Result<Takeover, Error> {
    let clock: SharedClock = Arc::new(SystemClock);
    let (store, store_name) = open_store(config, &clock)?;
    let server = config::instance(config, &config::machine_id());
    let mode = if config.store_shared { Mode::Shared } else { Mode::Exclusive };
    let records = owner::read(store.as_ref()).await.map_err(Error::Owner)?;
    let mut others: Vec<OwnerRecord> = match owner::tenure(&records) {
        Tenure::Free => Vec::new(),
        Tenure::Exclusive(owner) => vec![owner],
        Tenure::Shared(all) => all.into_values().collect(),
    };
    others.retain(|owner| owner.server != server);
    let known: Vec<String> = others.iter().map(|owner| format!("{:?}", owner.server)).collect();
    match from {
        Some(from) => others.retain(|owner| owner.server == from),
        None if mode == Mode::Shared && others.len() > 1 => return Err(Error::TakeWhom(known.join(", "))),
        None => {}
    }
    if let Some(from) = from.filter(|_| others.is_empty()) {
        return Err(Error::TakeWhom(format!("{}; {from:?} is not among them", known.join(", "))));
    }
    Ok(Takeover { store, store_name, server, mode, from: others })
}

/// Runs the server until a signal ends it.
///
/// # Errors
/// [`Error`], before the server serves.
pub async fn serve(config: Config) -> Result<(), Error> {
    let clock: SharedClock = Arc::new(SystemClock);
    let set = load_workloads(&config)?;
    let auth = config.api_tokens_file.as_deref().map(Auth::read).transpose();
    let auth = auth.map_err(|errors| Error::Tokens(errors.to_string()))?.unwrap_or_else(Auth::loopback);
    let master_key =
        config.master_key_file.as_deref().map(MasterKey::read).transpose().map_err(Error::MasterKey)?;
    let instance = config::instance(&config, &config::machine_id());
    make_dir(&config.state_dir)?;
    let (store, store_name) = open_store(&config, &clock)?;
    if config.store_shared {
        check_conditions(&store).await?;
    }
    let dirs = HostDirs {
        state_dir: config.state_dir.clone(),
        secrets_dir: config.secrets_dir.clone(),
        socket_dir: config.socket_dir.clone(),
    };
    let key_of_state = master_key.clone().map(Arc::new);
    let encryption = Encryption::new(key_of_state, config.state_encryption, Arc::clone(&clock))
        .expect("the configuration was refused without a key");
    let files = HostFiles::open_encrypted(dirs, Arc::clone(&store), Arc::clone(&clock), encryption.clone())
        .map_err(Error::State)?;
    for warning in files.warnings() {
        warn!(warning, "directories");
    }
    let files: SharedFiles = Arc::new(files);
    let (journal, loaded) = Journal::open(&config.state_dir.join("journal.db"), journal::Mode::Threaded)
        .map_err(Error::Journal)?;
    let runtime: SharedRuntime =
        Arc::new(DockerRuntime::connect(config.docker_host.as_deref()).map_err(Error::Runtime)?);
    check_engine(&runtime).await?;
    let listener = listen(SocketAddr::new(config.api_host, config.api_port)).await?;
    let address = listener
        .local_addr()
        .map_err(|source| Error::Io { what: "listener has no address".to_owned(), source })?;
    let node = Node::start(NodeParts {
        clock,
        runtime,
        store,
        store_mode: if config.store_shared { Mode::Shared } else { Mode::Exclusive },
        files,
        journal,
        loaded,
        set,
        runner: Runner::new(RunnerOptions::default()),
        master_key,
        encryption,
        instance: instance.clone(),
        boot_id: read_trimmed("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        store_name,
        max_containers: config.max_containers,
        idle_timeout_ms: config.idle_timeout_ms,
        cache: cache_limits(&config),
        crash: crash_points(&config),
    })?;
    node.tasks.spawn("probe store", check_store(Arc::clone(&node.upkeep.store), node.tenancy.clone()));
    node.start_upkeep().await?;
    info!(%address, instance, version = env!("CARGO_PKG_VERSION"), "listening");
    let text = metrics_text(&node);
    let router = api::router(ApiState::new(node.tenancy.clone(), auth, Arc::clone(&node.metrics), text));
    node.tasks.spawn("api", api::serve(listener, router, node.tasks.draining()));
    wait_for_signal().await;
    info!("draining; a second signal aborts");
    node.tasks.drain();
    tokio::select! {
        biased;
        () = wait_for_signal() => {
            warn!("aborting; the next start finishes what was under way");
            node.tasks.abort();
        }
        () = node.stop() => {}
    }
    info!("stopped");
    Ok(())
}

/// Returns what specs take from the configuration where they say nothing.
pub fn load_options(config: &Config) -> LoadOptions {
    LoadOptions {
        defaults: SpecDefaults { min_idle: config.pool_size, max: config.max_containers },
        default_image: config.default_image.clone(),
    }
}

/// Checks that the folders of scripts are there where the configuration names them: a
/// misspelt one would look like one without workloads. The defaults may be absent.
///
/// # Errors
/// [`Error::NoFolder`].
pub fn check_folders(config: &Config) -> Result<(), Error> {
    for (key, path) in [("workloads_dir", &config.workloads_dir), ("scripts_dir", &config.scripts_dir)] {
        let origin = config.origins.of(key);
        if origin != "default" && !path.is_dir() {
            return Err(Error::NoFolder { origin: origin.to_owned(), path: path.clone() });
        }
    }
    Ok(())
}

fn load_workloads(config: &Config) -> Result<Set, Error> {
    check_folders(config)?;
    let options = load_options(config);
    let render = |diagnostics: Vec<Diagnostic>| {
        Error::Scripts(diagnostics.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    };
    let sources = Sources::read(&config.workloads_dir, &config.scripts_dir).map_err(render)?;
    if sources.workloads.is_empty() {
        let (folder, image) = (config.workloads_dir.display(), &config.default_image);
        info!(%folder, image, "no workload files; the built-in workload `default` is served");
    }
    let set = Set::load(&sources, &options).map_err(render)?;
    let mirrored = set.iter().find(|workload| workload.spec.persist.layout == Layout::Mirror);
    match mirrored.filter(|_| config.state_encryption) {
        Some(workload) => Err(Error::Scripts(format!(
            "error: {}: persist.layout: \"mirror\" has plain objects, which cannot be sealed, and BOILERHOUSE_STATE_ENCRYPTION is \
             on (allowed: \"snapshot\", or no encryption)",
            workload.spec.id
        ))),
        None => Ok(set),
    }
}

fn open_store(config: &Config, clock: &SharedClock) -> Result<(SharedStore, String), Error> {
    match &config.store {
        StoreLocation::Directory(path) => {
            let store = LocalStore::open(path.clone()).map_err(Error::Store)?;
            Ok((Arc::new(store), config.store.to_string()))
        }
        StoreLocation::S3 { bucket, prefix } => {
            let store = S3Store::connect(bucket, prefix, &config.aws, Limits::default(), Arc::clone(clock))
                .map_err(Error::Store)?;
            Ok((Arc::new(store), config.store.to_string()))
        }
    }
}

fn cache_limits(config: &Config) -> CacheLimits {
    let bytes = |mb: u64| mb.saturating_mul(1 << 20);
    CacheLimits {
        max_bytes: (config.cache_max_mb > 0).then(|| bytes(config.cache_max_mb)),
        min_free_bytes: bytes(config.cache_min_free_mb),
    }
}

/// Gives `/metrics` its text, with the pools and the cache as they are at that moment.
fn metrics_text(node: &Node) -> impl Fn() -> String + Send + Sync + use<> {
    let (metrics, pools, tenancy) = (Arc::clone(&node.metrics), node.pools.clone(), node.tenancy.clone());
    move || {
        let cache = tenancy.cache_size();
        metrics.set_cache(cache.trees, cache.bytes);
        let samples: Vec<_> = pools.status().into_iter().map(pool_sample).collect();
        metrics.encode(&samples)
    }
}

fn pool_sample(pool: PoolStatus) -> PoolSample {
    let phases = vec![
        ("creating", pool.creating),
        ("warming", pool.warming),
        ("ready", pool.ready),
        ("claimed", pool.claimed),
        ("releasing", pool.releasing),
        ("parked", pool.parked),
        ("stranded", pool.stranded),
        ("lost", pool.lost),
        ("retiring", pool.retiring),
    ];
    PoolSample { workload: pool.workload, target: pool.target, slots: phases }
}

/// Refuses an engine that answers and cannot serve; one that does not answer is waited for.
async fn check_engine(runtime: &SharedRuntime) -> Result<(), Error> {
    match runtime.probe().await {
        Ok(engine) => {
            for warning in &engine.warnings {
                warn!(engine = engine.version, warning, "engine");
            }
            if engine.refusals.is_empty() {
                return Ok(());
            }
            Err(Error::Engine(engine.refusals.join("; ")))
        }
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "engine does not answer yet");
            Ok(())
        }
    }
}

/// Refuses to share a store that answers and ignores conditions. One that does not answer is
/// probed again before it is taken.
async fn check_conditions(store: &SharedStore) -> Result<(), Error> {
    match tokio::time::timeout(PROBE_LIMIT, store.probe()).await {
        Ok(Err(error)) if error.is_unconditional() => Err(Error::NotShareable(error)),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Probes the store beside everything else: one that is down does not keep the server down.
async fn check_store(store: SharedStore, tenancy: Tenancy) {
    if let Err(error) = store.probe().await {
        if error.is_unconditional() {
            // Without a second writer nothing of ours meets itself: one server can use it.
            warn!(
                error = &error as &dyn std::error::Error,
                "store ignores conditions; nothing but this server may ever write to it"
            );
            return;
        }
        error!(
            error = &error as &dyn std::error::Error,
            "store does not work yet; claims that need it fail until it does"
        );
        tenancy.set_health("store", Some(chain(&error)));
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address)
        .await
        .map_err(|source| Error::Io { what: format!("cannot listen on {address}"), source })
}

fn make_dir(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path)
        .map_err(|source| Error::Io { what: format!("cannot make the directory {}", path.display()), source })
}

fn read_trimmed(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(feature = "crash_points")]
fn crash_points(config: &Config) -> CrashPoints {
    let points = CrashPoints::default();
    if let Some((name, nth)) = &config.crash_point {
        points.arm(name, *nth, crate::lifecycle::CrashAction::Kill);
    }
    points
}

#[cfg(not(feature = "crash_points"))]
fn crash_points(_: &Config) -> CrashPoints {
    CrashPoints::default()
}

async fn wait_for_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        error!("signals cannot be waited for; only SIGKILL ends this server");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
