//! The directories below the three that were configured.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    clock::{Clock, random_hex},
    disk::{self, Dir, Optional},
    model::SlotId,
};

use super::{Error, HostDirs, UNCLAIMED};

/// The last server may take this long to let go.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Below the secrets directory: secrets on their way, on the same file system. No
/// slot has this name, for no id begins with a dot.
const SECRETS_STAGING: &[u8] = b".staging";

/// Holds our directories open.
#[derive(Debug)]
pub(super) struct Layout {
    /// Locked while we live.
    _root: Dir,
    pub(super) slots: Dir,
    pub(super) cache: Dir,
    pub(super) staging: Dir,
    pub(super) set_aside: Dir,
    pub(super) secrets: Dir,
    pub(super) secrets_staging: Dir,
    pub(super) sockets: Dir,
    state_path: String,
    secrets_path: String,
    socket_path: String,
}

// === impl Layout ===

impl Layout {
    /// Makes, locks and tries out the directories.
    ///
    /// # Errors
    /// [`Error::Disk`] names the directory and what it cannot do.
    pub(super) fn open(dirs: &HostDirs, clock: &dyn Clock) -> Result<Self, Error> {
        let (root, state_path) = root(&dirs.state_dir)?;
        lock(&root, &state_path)?;
        let (secrets, secrets_path) = root_of_slots(&dirs.secrets_dir)?;
        let (sockets, socket_path) = root_of_slots(&dirs.socket_dir)?;
        let private = |parent: &Dir, name: &[u8]| -> Result<Dir, Error> {
            let dir = parent.ensure_dir(name).map_err(needs_openat2)?;
            dir.set_mode(0o700)?;
            Ok(dir)
        };
        let layout = Self {
            slots: private(&root, b"slots")?,
            cache: private(&root, b"cache")?,
            staging: private(&root, b"staging")?,
            set_aside: private(&root, b"set_aside")?,
            secrets_staging: private(&secrets, SECRETS_STAGING)?,
            _root: root,
            secrets,
            sockets,
            state_path,
            secrets_path,
            socket_path,
        };
        disk::empty(&layout.secrets_staging)?;
        layout.try_out(clock)?;
        Ok(layout)
    }

    /// Returns what works but should be better, for the log.
    pub(super) fn warnings(&self) -> Vec<String> {
        let path = &self.secrets_path;
        match self.secrets.is_in_memory() {
            Ok(true) => Vec::new(),
            Ok(false) => vec![format!(
                "BOILERHOUSE_SECRETS_DIR ({path}) is not on a tmpfs: tenants' secrets are written to a disk while \
                 they are claimed; mount a tmpfs there, e.g. mount -t tmpfs -o mode=0711,size=64m tmpfs {path}"
            )],
            Err(error) => vec![format!(
                "BOILERHOUSE_SECRETS_DIR ({path}): whether it is on a tmpfs cannot be found out: {error}"
            )],
        }
    }

    /// Returns where a slot's state directory is.
    pub(super) fn state_path(&self, slot: &SlotId) -> String {
        format!("{}/slots/{slot}/state", self.state_path)
    }

    /// Returns where a slot's secrets are.
    pub(super) fn secrets_path(&self, slot: &SlotId) -> String {
        format!("{}/{slot}", self.secrets_path)
    }

    /// Returns where a slot's comm directory would be.
    pub(super) fn comm_target(&self, slot: &SlotId) -> String {
        format!("{}/{slot}", self.socket_path)
    }

    /// Returns where a slot's comm directory is, if it has one.
    pub(super) fn comm_path(&self, slot: &SlotId) -> Option<String> {
        let is_there = self.sockets.stat_of(slot.as_str().as_bytes()).is_ok();
        is_there.then(|| self.comm_target(slot))
    }

    /// Returns where something that was set aside is.
    pub(super) fn set_aside_path(&self, name: &str) -> String {
        format!("{}/set_aside/{name}", self.state_path)
    }

    /// Proves by doing it: a directory can be given away, and moved between slots,
    /// cache, staging and set_aside.
    fn try_out(&self, clock: &dyn Clock) -> Result<(), Error> {
        let name = format!(".probe-{}", random_hex(clock, 8)).into_bytes();
        self.staging.make_dir(&name)?;
        let result = self.try_out_with(&name);
        for dir in [&self.staging, &self.slots, &self.cache, &self.set_aside] {
            dir.remove_dir(&name).optional()?;
        }
        result
    }

    fn try_out_with(&self, name: &[u8]) -> Result<(), Error> {
        let probe = self.staging.open_dir(name)?;
        probe.set_owner(UNCLAIMED.uid, UNCLAIMED.gid).map_err(|error| Error::Disk {
            operation: "chown (the server runs as root, or with CAP_CHOWN, CAP_FOWNER and CAP_DAC_OVERRIDE)",
            path: error.path,
            source: error.source,
        })?;
        let ways = [&self.staging, &self.slots, &self.cache, &self.set_aside, &self.staging];
        for way in ways.windows(2) {
            way[0].move_to(name, way[1], name).map_err(|error| Error::Disk {
                operation: "rename (slots, cache, staging and set_aside must be on one file system)",
                path: format!("{} to {}", error.path, way[1].label(b"")),
                source: error.source,
            })?;
        }
        Ok(())
    }
}

/// Opens a configured directory by its real, absolute path.
fn root(path: &Path) -> Result<(Dir, String), Error> {
    let refuse = |reason: String| Error::Disk {
        operation: "use",
        path: path.display().to_string(),
        source: Arc::new(io::Error::other(reason)),
    };
    Dir::ensure(path)?;
    let real: PathBuf = path.canonicalize().map_err(|error| refuse(error.to_string()))?;
    let text = real.to_str().ok_or_else(|| refuse("a container engine needs a path in UTF-8".into()))?;
    if text.contains(':') {
        return Err(refuse("a container engine cannot bind a path with a colon".into()));
    }
    Ok((Dir::open(&real)?, text.to_owned()))
}

/// Opens a directory that holds slots' directories directly: it must not be one
/// that others write to, such as `/tmp`.
fn root_of_slots(path: &Path) -> Result<(Dir, String), Error> {
    let (dir, text) = root(path)?;
    let stat = dir.stat()?;
    if stat.mode & 0o022 != 0 {
        return Err(Error::Disk {
            operation: "use",
            path: text,
            source: Arc::new(io::Error::other(format!(
                "others may write to it (mode {:04o}); give a directory of our own, mode 0700",
                stat.mode
            ))),
        });
    }
    Ok((dir, text))
}

fn lock(root: &Dir, path: &str) -> Result<(), Error> {
    let deadline = Instant::now() + LOCK_WAIT;
    while !root.try_lock()? {
        if Instant::now() >= deadline {
            return Err(Error::Disk {
                operation: "lock",
                path: path.to_owned(),
                source: Arc::new(io::Error::other("another server uses this state directory")),
            });
        }
        std::thread::sleep(LOCK_POLL);
    }
    Ok(())
}

fn needs_openat2(error: disk::Error) -> Error {
    let is_refused = error.is(rustix::io::Errno::NOSYS) || error.is(rustix::io::Errno::PERM);
    let operation = if is_refused && error.operation == "open" {
        "openat2 (needs Linux 5.6, and a seccomp profile that allows it)"
    } else {
        error.operation
    };
    Error::Disk { operation, path: error.path, source: error.source }
}
