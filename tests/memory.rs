//! How much memory a process takes to save and restore states of gigabytes: measured on
//! processes of their own, by what the kernel says was the most they ever had.
//!
//! One that saves and one that restores: what an allocator keeps of the first would hide
//! what the second takes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{
    io::{Read, Write},
    os::unix::fs::chown,
    path::{Path, PathBuf},
    sync::Arc,
};

use boilerhouse::{
    clock::{SharedClock, SystemClock},
    config::Aws,
    model::{
        Epoch, Key, Owner, SlotId, TenantId, WorkloadId,
        spec::{Layout, Persist, Volume, VolumeMode, Volumes},
    },
    state::{
        Base, Fill, FillFrom, Save, SaveTree, SlotFiles as _,
        fence::Author,
        host::{HostDirs, HostFiles},
    },
    store::{S3Store, SharedStore, s3::Limits},
};
use support::s3_server::{BUCKET, S3Server};

const MIB: u64 = 1 << 20;
/// What all states together may add to what the process takes anyway.
const MOST: u64 = 256 * MIB;
const APP: Owner = Owner { uid: 1_000, gid: 1_000 };
/// What a measured process is to do, and where it finds the store and the disk.
const STEP: &str = "TEST_MEMORY_STEP";
const PORT: &str = "TEST_MEMORY_PORT";
const FOLDER: &str = "TEST_MEMORY_FOLDER";
/// Tenants at a time.
const TENANTS: u64 = 4;
const ITSELF: &str = "two_gibibytes_are_saved_and_restored_in_bounded_memory";

/// Files of one tenant, 512 MiB: one that is larger than every budget, some that make chunks,
/// and many that make packs.
fn files() -> Vec<(String, u64)> {
    let large = std::iter::once(("large".to_owned(), 320 * MIB));
    let chunks = (0..40).map(|n| (format!("chunks/{n}"), 4 * MIB));
    let packed = (0..4_096).map(|n| (format!("packed/{}/{n}", n % 16), 8 << 10));
    large.chain(chunks).chain(packed).collect()
}

/// Gives bytes that nothing can compress, by pieces.
fn each_piece(seed: u64, bytes: u64, mut piece: impl FnMut(&[u8])) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let (mut content, mut left) = (hasher.finalize_xof(), bytes);
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let length = left.min(buffer.len() as u64) as usize;
        content.fill(&mut buffer[..length]);
        piece(&buffer[..length]);
        left -= length as u64;
    }
}

fn write_state(state: &Path, tenant: u64) {
    for (n, (name, bytes)) in (0..).zip(files()) {
        let path = state.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = std::fs::File::create(&path).unwrap();
        each_piece(tenant << 32 | n, bytes, |piece| file.write_all(piece).unwrap());
        chown(&path, Some(APP.uid), Some(APP.gid)).unwrap();
    }
}

fn check_state(state: &Path, tenant: u64) {
    let mut found = vec![0; 64 << 10];
    for (n, (name, bytes)) in (0..).zip(files()) {
        let mut file = std::fs::File::open(state.join(&name)).unwrap();
        each_piece(tenant << 32 | n, bytes, |piece| {
            file.read_exact(&mut found[..piece.len()]).unwrap();
            assert!(found[..piece.len()] == *piece, "{name} came back with another content");
        });
        assert_eq!(file.read(&mut found).unwrap(), 0, "{name} came back longer");
    }
}

/// Returns the most memory that this process ever had.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

/// The disk and the store of a measured process.
struct Node {
    files: HostFiles,
    folder: PathBuf,
}

impl Node {
    fn open(folder: PathBuf, port: u16) -> Self {
        let aws = Aws { endpoint_url: Some(format!("http://127.0.0.1:{port}")), ..S3Server::keys() };
        let clock: SharedClock = Arc::new(SystemClock);
        let store = S3Store::connect(BUCKET, "memory", &aws, Limits::default(), Arc::clone(&clock)).unwrap();
        let path = |name: &str| folder.join(name);
        let dirs =
            HostDirs { state_dir: path("states"), secrets_dir: path("secrets"), socket_dir: path("sockets") };
        let store: SharedStore = Arc::new(store);
        Self { files: HostFiles::open(dirs, store, clock).unwrap(), folder }
    }

    /// Fills a slot of a tenant; returns where its state is.
    async fn fill(&self, tenant: u64, from: FillFrom) -> PathBuf {
        let slot = slot(tenant);
        let volume = Volume { container_path: "/data".to_owned(), mode: VolumeMode::Rw };
        let volumes = Volumes { state: Some(volume), ..Volumes::default() };
        self.files.prepare(&slot, &volumes).await.unwrap();
        let fill = Fill {
            slot: slot.clone(),
            key: key(tenant),
            epoch: Epoch(1),
            from,
            run_as: APP,
            previous_owner: None,
        };
        let filled = self.files.fill(&fill).await.unwrap();
        assert!(fill.from == FillFrom::Empty || filled.fetched_bytes >= 512 * MIB, "{filled:?}");
        self.folder.join("states/slots").join(slot.as_str()).join("state")
    }

    async fn save(&self, tenant: u64) {
        let persist = Persist {
            on_release: true,
            every_ms: 0,
            exclude: Vec::new(),
            keep_last: 10,
            keep_days: 0,
            max_pause_ms: 1_000,
            layout: Layout::Snapshot,
        };
        let save = Save {
            key: key(tenant),
            epoch: Epoch(1),
            nonce: format!("nonce-{tenant}"),
            tree: SaveTree::Cache,
            base: Base::Any,
            run_as: APP,
            failed_claim: false,
            author: Author::default(),
            is_last: true,
            persist,
            max_bytes: None,
        };
        self.files.save(&save).await.unwrap();
    }
}

fn slot(tenant: u64) -> SlotId {
    SlotId::new(format!("slot-{tenant}")).unwrap()
}

fn key(tenant: u64) -> Key {
    Key::new(TenantId::new(format!("t{tenant}")).unwrap(), WorkloadId::new("w").unwrap())
}

async fn save_all(node: Node) {
    for tenant in 0..TENANTS {
        let state = node.fill(tenant, FillFrom::Empty).await;
        write_state(&state, tenant);
        node.files.capture(&slot(tenant), &key(tenant)).await.unwrap();
    }
    println!("idle {}", peak());
    futures_util::future::join_all((0..TENANTS).map(|tenant| node.save(tenant))).await;
    println!("most {}", peak());
}

async fn restore_all(node: Node) {
    println!("idle {}", peak());
    let fills = (0..TENANTS).map(async |tenant| {
        let newest = node.files.newest(&key(tenant)).await.unwrap().expect("it was saved");
        node.fill(tenant, FillFrom::Snapshot(newest)).await
    });
    let states = futures_util::future::join_all(fills).await;
    println!("most {}", peak());
    for (tenant, state) in (0..).zip(&states) {
        check_state(state, tenant);
    }
}

/// Runs this test once more as a process that does one step; returns how much more memory it
/// took at most than before.
async fn measure(step: &'static str, server: &S3Server) -> u64 {
    let folder = tempfile::Builder::new().prefix("boilerhouse-memory-").tempdir().unwrap();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", ITSELF, "--nocapture", "--test-threads=1"]);
    child.env(STEP, step).env(PORT, server.port().to_string()).env(FOLDER, folder.path());
    let output = tokio::task::spawn_blocking(move || child.output()).await.unwrap().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{step}: {text}\n{errors}");
    let bytes = |name: &str| {
        let (_, rest) = text.split_once(name).unwrap_or_else(|| panic!("{step}: no {name} in {text}"));
        rest.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    println!("{step}: {} MiB idle, {} MiB at most", bytes("idle ") / MIB, bytes("most ") / MIB);
    bytes("most ") - bytes("idle ")
}

/// Four tenants' states of together 2 GiB, saved at a time and restored at a time.
#[tokio::test(flavor = "multi_thread")]
async fn two_gibibytes_are_saved_and_restored_in_bounded_memory() {
    if let Some(step) = std::env::var_os(STEP) {
        let node = Node::open(
            std::env::var_os(FOLDER).unwrap().into(),
            std::env::var(PORT).unwrap().parse().unwrap(),
        );
        return if step == "save" { save_all(node).await } else { restore_all(node).await };
    }
    assert_eq!(files().iter().map(|(_, bytes)| bytes).sum::<u64>() * TENANTS, 2_048 * MIB);
    let server = S3Server::start().await;
    for step in ["save", "restore"] {
        let more = measure(step, &server).await;
        assert!(more <= MOST, "{step}: {} MiB more than before", more / MIB);
    }
}
