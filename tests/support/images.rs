//! Local images for the tests, built from the machine's own static busybox, so that no
//! registry is needed.
//!
//! An image is imported when the engine has none with the same content; the import is
//! guarded by a file lock, so that test binaries may run side by side.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use boilerhouse::model::Owner;
use bollard::{Docker, body_full, query_parameters::CreateImageOptionsBuilder};
use futures_util::TryStreamExt;
use tokio::sync::Mutex;

/// `/bin/sh` and busybox's other applets, running as root.
pub const BUSYBOX: &str = "boilerhouse-test/busybox:1";
/// The same, running as the user `app`.
pub const APP: &str = "boilerhouse-test/app:1";
/// The same as [`APP`], with `/bin/probe` (see `probe.c`) and `/bin/probe-suid`, its copy
/// that belongs to root and is setuid.
pub const PROBE: &str = "boilerhouse-test/probe:1";
/// What the user `app` is in numbers.
pub const APP_OWNER: Owner = Owner { uid: 1000, gid: 1000 };

const BUSYBOX_PATHS: [&str; 3] = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];
const CONTENT_LABEL: &str = "boilerhouse.test.content";
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\n";
const GROUP: &str = "root:x:0:\napp:x:1000:\nstaff:x:50:app\n";

/// One import at a time within this test binary.
static IMPORT: Mutex<()> = Mutex::const_new(());

/// Makes sure that the engine has [`BUSYBOX`] and [`APP`].
pub async fn ensure(docker: &Docker) {
    let archive = tokio::task::spawn_blocking(|| archive(None)).await.expect("packing does not panic");
    import(docker, BUSYBOX, "", &archive).await;
    import(docker, APP, "USER app", &archive).await;
}

/// Makes sure that the engine has [`PROBE`].
pub async fn ensure_probe(docker: &Docker) {
    let archive = tokio::task::spawn_blocking(|| archive(Some(&compile_probe())));
    import(docker, PROBE, "USER app", &archive.await.expect("the probe compiles")).await;
}

/// Imports an archive under a name, with a `Dockerfile`'s lines about its configuration,
/// unless the engine has it.
pub(super) async fn import(docker: &Docker, image: &str, change: &str, archive: &[u8]) {
    let content = blake3::hash(&[archive, change.as_bytes()].concat()).to_hex().to_string();
    if has(docker, image, &content).await {
        return;
    }
    let _in_here = IMPORT.lock().await;
    let _anywhere = tokio::task::spawn_blocking(lock).await.expect("locking does not panic");
    if has(docker, image, &content).await {
        return;
    }
    let (repo, tag) = image.rsplit_once(':').expect("the names above have tags");
    let changes = format!("CMD [\"sleep\", \"infinity\"]\nLABEL {CONTENT_LABEL}={content}\n{change}");
    let options =
        CreateImageOptionsBuilder::default().from_src("-").repo(repo).tag(tag).changes(vec![changes]);
    let body = body_full(archive.to_vec().into());
    docker
        .create_image(Some(options.build()), Some(body), None)
        .try_for_each(|_| async { Ok(()) })
        .await
        .unwrap_or_else(|error| panic!("importing {image}: {error}"));
    assert!(has(docker, image, &content).await, "{image} was imported, and the engine does not have it");
}

async fn has(docker: &Docker, image: &str, content: &str) -> bool {
    let found = match docker.inspect_image(image).await {
        Ok(found) => found,
        Err(bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }) => return false,
        Err(error) => {
            panic!("these tests need a Docker engine (DOCKER_HOST or {}): {error}", super::engine::SOCKET)
        }
    };
    let labels = found.config.and_then(|config| config.labels).unwrap_or_default();
    labels.get(CONTENT_LABEL).is_some_and(|label| label == content)
}

/// Held until the file is closed.
fn lock() -> File {
    let path = std::env::temp_dir().join("boilerhouse-test-images.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    file.lock().unwrap_or_else(|error| panic!("locking {}: {error}", path.display()));
    file
}

/// The root file system as a tar archive; the same bytes each time.
fn archive(probe: Option<&Path>) -> Vec<u8> {
    let mut root = Root::with_busybox(PASSWD, GROUP);
    if let Some(probe) = probe {
        let probe = fs::read(probe).expect("the probe was compiled");
        root.add("bin/probe", tar::EntryType::Regular, 0o755, &probe);
        root.add("bin/probe-suid", tar::EntryType::Regular, 0o4755, &probe);
    }
    root.finish()
}

/// Compiles `probe.c`. It needs no C library, so the compiler that Rust links with is enough.
fn compile_probe() -> PathBuf {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/probe.c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("probe-{}", std::process::id()));
    let flags = [
        "-static",
        "-nostdlib",
        "-ffreestanding",
        "-fno-stack-protector",
        "-O1",
        "-Wl,--build-id=none",
        "-o",
    ];
    let output = Command::new(&compiler).args(flags).arg(&program).arg(&source).output();
    let output = output.unwrap_or_else(|error| {
        panic!("the isolation tests compile a small C program with {compiler:?} (or $CC): {error}; apt-get install gcc")
    });
    assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
    program
}

/// A root file system in the making; entries belong to root and have no times.
pub(super) struct Root(tar::Builder<Vec<u8>>);

impl Root {
    /// Begins with busybox's applets in `/bin`, the usual directories and these accounts.
    pub(super) fn with_busybox(passwd: &str, group: &str) -> Self {
        let busybox = BUSYBOX_PATHS.iter().map(PathBuf::from).find(|path| path.exists()).unwrap_or_else(|| {
            panic!(
                "these tests need a static busybox at one of {BUSYBOX_PATHS:?}: apt-get install busybox-static"
            )
        });
        let applets = Command::new(&busybox).arg("--list").output().expect("busybox runs");
        let applets = String::from_utf8(applets.stdout).expect("applets have plain names");
        let mut root = Self(tar::Builder::new(Vec::new()));
        for (directory, mode) in [
            ("bin", 0o755),
            ("etc", 0o755),
            ("dev", 0o755),
            ("proc", 0o755),
            ("sys", 0o755),
            ("run", 0o755),
            ("root", 0o700),
            ("tmp", 0o1777),
        ] {
            root.add(directory, tar::EntryType::Directory, mode, b"");
        }
        root.add("etc/passwd", tar::EntryType::Regular, 0o644, passwd.as_bytes());
        root.add("etc/group", tar::EntryType::Regular, 0o644, group.as_bytes());
        root.add(
            "bin/busybox",
            tar::EntryType::Regular,
            0o755,
            &fs::read(&busybox).expect("busybox can be read"),
        );
        for applet in applets.lines().filter(|applet| *applet != "busybox" && !applet.contains('/')) {
            root.link(&format!("bin/{applet}"), "busybox");
        }
        root
    }

    /// Returns the archive.
    pub(super) fn finish(self) -> Vec<u8> {
        self.0.into_inner().expect("a vector takes every byte")
    }

    pub(super) fn add(&mut self, path: &str, kind: tar::EntryType, mode: u32, content: &[u8]) {
        let mut header = Self::header(kind, mode);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content).expect("a vector takes every byte");
    }

    pub(super) fn link(&mut self, path: &str, target: &str) {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777);
        self.0.append_link(&mut header, path, target).expect("a vector takes every byte");
    }

    fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        header
    }
}
