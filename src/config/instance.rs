//! The identity of an installation.

use std::{fs, os::unix::ffi::OsStrExt};

use super::{Config, load};

/// Returns what this installation's containers carry as a label: what
/// `BOILERHOUSE_INSTANCE` says, else 12 hexadecimal characters derived from the
/// machine and the state directory, so that it survives an emptied directory.
///
/// The directory counts by its real path. It should exist: a symbolic link that
/// is put in its place later changes the identity.
pub fn instance(config: &Config, machine_id: &str) -> String {
    if let Some(given) = &config.instance {
        return given.clone();
    }
    let directory = load::resolved(&config.state_dir);
    let mut hasher = blake3::Hasher::new();
    for part in [machine_id.as_bytes(), directory.as_os_str().as_bytes()] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex()[..12].to_owned()
}

/// Returns the machine's id from `/etc/machine-id`, else its host name.
///
/// In a container the host name is that of the container and changes with it:
/// there `BOILERHOUSE_INSTANCE` should be set, or the host's `/etc/machine-id`
/// be mounted.
pub fn machine_id() -> String {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    match id.trim() {
        // systemd writes the latter into images, to be replaced at the first boot.
        "" | "uninitialized" => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        id => id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(directory: &std::path::Path, machine: &str) -> String {
        let config = Config::load([("BOILERHOUSE_STATE_DIR", directory)]).unwrap();
        instance(&config, machine)
    }

    #[test]
    fn it_follows_the_machine_and_the_real_directory() {
        let root = tempfile::tempdir().unwrap();
        let (states, link) = (root.path().join("states"), root.path().join("link"));
        let before = of(&states, "m1");
        assert!(before.len() == 12 && before.chars().all(|c| c.is_ascii_hexdigit()), "{before}");
        fs::create_dir(&states).unwrap();
        assert_eq!(of(&states, "m1"), before, "it changed when the directory was made");
        std::os::unix::fs::symlink(&states, &link).unwrap();
        assert_eq!(of(&link, "m1"), before);
        assert_eq!(of(&root.path().join("x/../states"), "m1"), before);
        assert_ne!(of(&states, "m2"), before);
        assert_ne!(of(&root.path().join("other"), "m1"), before);
    }

    #[test]
    fn what_is_given_wins() {
        let config = Config::load([("BOILERHOUSE_INSTANCE", "blue-1")]).unwrap();
        assert_eq!(instance(&config, "m1"), "blue-1");
        assert!(!machine_id().is_empty());
    }
}
