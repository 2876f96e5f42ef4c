//! Local images with the content of public ones, for the shipped workloads: busybox and
//! programs of this machine, installed from Debian's packages, with the shared libraries
//! that they load. Their configuration (entrypoint, volume, working directory) is that of
//! the public images. No registry is needed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use bollard::Docker;

use super::images::{self, Root};

/// As `redis:7-alpine`: Redis and its client, busybox, the user `redis`.
pub const REDIS: &str = "boilerhouse-test/redis:1";
/// As `python:3.12-alpine`: Python with its standard library, busybox, the user `nobody`.
pub const PYTHON: &str = "boilerhouse-test/python:1";

/// The server and its checker are one program, which goes by the name that it is called by.
const REDIS_SERVER: &str = "/usr/bin/redis-check-rdb";
const REDIS_CLI: &str = "/usr/bin/redis-cli";
const REDIS_PACKAGE: &str = "redis-tools";
const PYTHON_PROGRAM: &str = "/usr/bin/python3";
const PYTHON_PACKAGE: &str = "python3";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n\
                      redis:x:999:1000:redis:/home/redis:/bin/sh\n";
const GROUP: &str = "root:x:0:\nnobody:x:65534:\nredis:x:1000:\n";

/// What the public image's entrypoint does for a user that is not root.
const REDIS_ENTRYPOINT: &str = "#!/bin/sh\nset -e\numask 0077\nexec \"$@\"\n";
const REDIS_CONFIG: &str = "ENV PATH=/usr/local/bin:/usr/bin:/bin\nENTRYPOINT [\"docker-entrypoint.sh\"]\n\
                            VOLUME /data\nWORKDIR /data\nEXPOSE 6379";
const PYTHON_CONFIG: &str = "ENV PATH=/usr/local/bin:/usr/bin:/bin\nENV LANG=C.UTF-8";

/// Left out of Python's library: what is for building and testing, and what was compiled.
const NOT_NEEDED: [&str; 5] = ["__pycache__", "ensurepip", "idlelib", "lib2to3", "test"];
const NOT_NEEDED_PREFIX: &str = "config-";

/// Makes sure that the engine has [`REDIS`].
pub async fn ensure_redis(docker: &Docker) {
    let archive = tokio::task::spawn_blocking(redis).await.expect("Redis is installed");
    images::import(docker, REDIS, REDIS_CONFIG, &archive).await;
}

/// Makes sure that the engine has [`PYTHON`].
pub async fn ensure_python(docker: &Docker) {
    let archive = tokio::task::spawn_blocking(python).await.expect("Python is installed");
    images::import(docker, PYTHON, PYTHON_CONFIG, &archive).await;
}

fn redis() -> Vec<u8> {
    let [server, client] = [REDIS_SERVER, REDIS_CLI].map(|path| installed(path, REDIS_PACKAGE));
    let mut tree = Tree::new();
    tree.file("/usr/local/bin/redis-server", 0o755, &read(&server));
    tree.file("/usr/local/bin/redis-cli", 0o755, &read(&client));
    tree.file("/usr/local/bin/docker-entrypoint.sh", 0o755, REDIS_ENTRYPOINT.as_bytes());
    tree.libraries(&[server, client]);
    tree.root.finish()
}

fn python() -> Vec<u8> {
    let link = installed(PYTHON_PROGRAM, PYTHON_PACKAGE);
    let question = "import http.server, sysconfig; print(sysconfig.get_path('stdlib'))";
    let library = PathBuf::from(output(Command::new(&link).args(["-I", "-S", "-c", question])).trim_end());
    let program = fs::canonicalize(&link).expect("it was found just now");
    let mut tree = Tree::new();
    tree.file(&program.display().to_string(), 0o755, &read(&program));
    tree.directory("/usr/local/bin");
    tree.root.link("usr/local/bin/python", &program.display().to_string());
    let mut loading = vec![program];
    for path in needed_below(&library) {
        tree.file(&path.display().to_string(), 0o644, &read(&path));
        if path.extension().is_some_and(|extension| extension == "so") {
            loading.push(path);
        }
    }
    tree.libraries(&loading);
    tree.root.finish()
}

/// Lists a library's files, sorted; links are followed, and those that lead nowhere left out.
fn needed_below(library: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut left = vec![library.to_owned()];
    while let Some(dir) = left.pop() {
        let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        for entry in entries {
            let entry = entry.expect("a directory can be listed");
            let name = entry.file_name().to_string_lossy().into_owned();
            if NOT_NEEDED.contains(&name.as_str()) || name.starts_with(NOT_NEEDED_PREFIX) {
                continue;
            }
            match fs::metadata(entry.path()) {
                Ok(meta) if meta.is_dir() => left.push(entry.path()),
                Ok(meta) if meta.is_file() => {
                    found.insert(entry.path());
                }
                _ => {}
            }
        }
    }
    found
}

fn installed(path: &str, package: &str) -> PathBuf {
    let found = PathBuf::from(path);
    assert!(
        found.exists(),
        "the shipped workloads are tested with this machine's programs, and {path} is missing: \
         apt-get install --no-install-recommends {package} (or `make setup`)"
    );
    found
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("paths are plain text")
}

/// A root file system to which files are added by their absolute paths.
struct Tree {
    root: Root,
    /// Those that were added, relative.
    directories: BTreeSet<String>,
}

impl Tree {
    fn new() -> Self {
        Self { root: Root::with_busybox(PASSWD, GROUP), directories: BTreeSet::from(["bin".to_owned()]) }
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.root.add(path.trim_start_matches('/'), tar::EntryType::Regular, mode, content);
    }

    fn directory(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        if path.is_empty() || !self.directories.insert(path.to_owned()) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.root.add(path, tar::EntryType::Directory, 0o755, b"");
    }

    /// Adds every shared library that these load, where they look for it.
    fn libraries(&mut self, programs: &[PathBuf]) {
        let listed = output(Command::new("ldd").args(programs));
        assert!(!listed.contains("not found"), "a library is missing:\n{listed}");
        for path in listed.lines().filter_map(library).collect::<BTreeSet<_>>() {
            self.file(path, 0o755, &read(Path::new(path)));
        }
    }
}

/// Finds the path in a line of `ldd`: `libm.so.6 => /lib/libm.so.6 (0x…)`, or without the arrow.
fn library(line: &str) -> Option<&str> {
    // A line without an indent is the name of the program that follows.
    let line = line.strip_prefix('\t')?;
    let path = line.split_once(" => ").map_or(line, |(_, path)| path);
    path.starts_with('/').then(|| path.split(' ').next().unwrap_or(path))
}
