//! The numbers that a container's program runs as, from the image's own passwd and group.
//!
//! The engine resolves names when the container starts; we need the numbers before, to
//! give the slot's directories to them. The rules are those of runc's `user.GetExecUser`.

use std::{
    collections::HashMap,
    io::Read,
    sync::{Mutex, PoisonError},
};

use bollard::query_parameters::DownloadFromContainerOptionsBuilder;
use futures_util::StreamExt;

use super::{DockerRuntime, QUICK_MS, bounded, failure::Call};
use crate::{
    model::{ContainerId, Owner},
    runtime::{Error, plan::ContainerPlan},
};

/// The largest passwd or group file that is read.
const MAX_FILE_BYTES: usize = 1024 * 1024;
/// How many symbolic links to such a file are followed.
const MAX_LINKS: usize = 4;
/// How many (image, user) pairs are remembered.
const MAX_KNOWN: usize = 256;

/// Remembers the numbers by image id and user: an image of an id never changes.
#[derive(Debug, Default)]
pub(super) struct Identities(Mutex<HashMap<(String, String), Owner>>);

/// Finds the numbers for a created container.
///
/// # Errors
/// [`Error::Refused`] when the image knows no such user or group; the errors of a look
/// when the engine does not answer.
pub(super) async fn resolve(
    docker: &DockerRuntime,
    id: &ContainerId,
    plan: &ContainerPlan,
) -> Result<Owner, Error> {
    let call = Call::reads("create", &plan.name);
    let found = docker.look(&id.0).await?.ok_or_else(|| call.conflict("the new container is gone"))?;
    warn_of_volumes(plan, &found);
    let user = found.config.and_then(|config| config.user).unwrap_or_default();
    let key = (found.image.unwrap_or_default(), user);
    if let Some(known) = docker.identities.get(&key) {
        return Ok(known);
    }
    let passwd = image_file(docker, &call, id, "/etc/passwd").await?;
    let group = image_file(docker, &call, id, "/etc/group").await?;
    let owner = numbers(&key.1, &passwd, &group).map_err(|reason| call.refused(&reason))?;
    docker.identities.insert(key, owner);
    Ok(owner)
}

/// A volume that the image declares and no mount covers is a writable directory on the
/// host's disk, without a limit.
fn warn_of_volumes(plan: &ContainerPlan, found: &bollard::models::ContainerInspectResponse) {
    let mounts = found.mounts.as_deref().unwrap_or_default();
    for mount in mounts.iter().filter(|mount| mount.name.is_some()) {
        let path = mount.destination.as_deref().unwrap_or_default();
        tracing::warn!(
            workload = plan.labels.workload.as_str(),
            path,
            "image declares a volume that the spec does not cover; a tmpfs or the state volume there would"
        );
    }
}

/// Reads a file of a container's; empty when there is none.
async fn image_file(
    docker: &DockerRuntime,
    call: &Call<'_>,
    id: &ContainerId,
    path: &str,
) -> Result<String, Error> {
    let mut path = path.to_owned();
    for _ in 0..=MAX_LINKS {
        let archive = match download(docker, call, id, &path).await {
            Ok(archive) => archive,
            Err(Error::Conflict { .. }) => return Ok(String::new()),
            Err(error) => return Err(error),
        };
        match first_entry(&archive).map_err(|error| call.refused(&format!("{path}: {error}")))? {
            Entry::File(text) => return Ok(text),
            Entry::Link(target) if target.starts_with('/') => path = target,
            Entry::Link(target) => path = format!("/etc/{target}"),
        }
    }
    Err(call.refused(&format!("{path}: more than {MAX_LINKS} symbolic links")))
}

async fn download(
    docker: &DockerRuntime,
    call: &Call<'_>,
    id: &ContainerId,
    path: &str,
) -> Result<Vec<u8>, Error> {
    let options = DownloadFromContainerOptionsBuilder::default().path(path).build();
    let mut stream = docker.client().await?.download_from_container(&id.0, Some(options)).boxed();
    let whole = async {
        let mut archive = Vec::new();
        while let Some(chunk) = stream.next().await {
            archive.extend_from_slice(&chunk?);
            // The parser finds it cut and says so.
            if archive.len() > 2 * MAX_FILE_BYTES {
                break;
            }
        }
        Ok(archive)
    };
    bounded(call, QUICK_MS, whole).await
}

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    File(String),
    Link(String),
}

/// Reads the first entry of an archive.
fn first_entry(archive: &[u8]) -> Result<Entry, String> {
    let unreadable = |error: std::io::Error| format!("the engine's archive cannot be read: {error}");
    let mut archive = tar::Archive::new(archive);
    let entry = archive.entries().map_err(unreadable)?.next().ok_or("the engine's archive is empty")?;
    let mut entry = entry.map_err(unreadable)?;
    if let Some(target) = entry.link_name().map_err(unreadable)? {
        return Ok(Entry::Link(target.to_string_lossy().into_owned()));
    }
    if !entry.header().entry_type().is_file() {
        return Err("it is not a file".into());
    }
    if entry.size() > MAX_FILE_BYTES as u64 {
        return Err(format!("it is larger than {MAX_FILE_BYTES} bytes"));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 != entry.size() {
        return Err("the engine's archive is cut".into());
    }
    Ok(Entry::File(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Resolves `user[:group]` by the files' text.
fn numbers(user: &str, passwd: &str, group: &str) -> Result<Owner, String> {
    let (user, group_name) = user.split_once(':').unwrap_or((user, ""));
    let user = if user.is_empty() { "0" } else { user };
    // A name that looks like a number is looked up as both, in the order of the file.
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.len() >= 4)
        .find(|fields| fields[0] == user || number(user).is_some_and(|uid| number(fields[2]) == Some(uid)));
    let (uid, own_gid) = match &entry {
        Some(fields) => (number(fields[2]), number(fields[3])),
        None => (number(user), Some(0)),
    };
    let (Some(uid), Some(own_gid)) = (uid, own_gid) else {
        return Err(match entry {
            Some(_) => format!("user {user:?} has no valid numbers in the image's /etc/passwd"),
            None => {
                format!("user {user:?} is not in the image's /etc/passwd, and is no number up to 2147483647")
            }
        });
    };
    if group_name.is_empty() {
        return Ok(Owner { uid, gid: own_gid });
    }
    let entry = group
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.len() >= 3)
        .find(|fields| {
            fields[0] == group_name || number(group_name).is_some_and(|gid| number(fields[2]) == Some(gid))
        });
    match entry.map_or_else(|| number(group_name), |fields| number(fields[2])) {
        Some(gid) => Ok(Owner { uid, gid }),
        None => Err(format!(
            "group {group_name:?} is not in the image's /etc/group, and is no number up to 2147483647"
        )),
    }
}

fn number(text: &str) -> Option<u32> {
    text.trim().parse().ok().filter(|id| *id <= i32::MAX as u32)
}

// === impl Identities ===

impl Identities {
    fn get(&self, key: &(String, String)) -> Option<Owner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    fn insert(&self, key: (String, String), owner: Owner) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(key, owner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# a comment\napp:x:1000:1001::/:/bin/sh\n7:x:8:9::/:\nbroken:x:none:0::/:\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:app\n7:x:70:\n";

    #[test]
    fn users_resolve_as_the_engine_resolves_them() {
        for (user, uid, gid) in [
            ("", 0, 0),
            ("root", 0, 0),
            ("app", 1000, 1001),
            ("1000", 1000, 1001),
            ("4242", 4242, 0),
            ("app:staff", 1000, 50),
            ("app:4711", 1000, 4711),
            ("1000:0", 1000, 0),
            ("4242:staff", 4242, 50),
            (":staff", 0, 50),
            ("app:", 1000, 1001),
            ("7", 8, 9),
            ("7:7", 8, 70),
        ] {
            assert_eq!(numbers(user, PASSWD, GROUP), Ok(Owner { uid, gid }), "{user:?}");
        }
        assert_eq!(numbers("", "", ""), Ok(Owner { uid: 0, gid: 0 }), "an image without the files");
    }

    #[test]
    fn a_user_that_is_nowhere_is_named() {
        for (user, words) in [
            ("nobody", "user \"nobody\" is not in the image's /etc/passwd"),
            ("4294967296", "user \"4294967296\" is not in"),
            ("2147483648", "user \"2147483648\" is not in"),
            ("app:wheel", "group \"wheel\" is not in the image's /etc/group"),
            ("broken", "user \"broken\" has no valid numbers"),
        ] {
            let error = numbers(user, PASSWD, GROUP).unwrap_err();
            assert!(error.starts_with(words), "{user:?}: {error}");
        }
    }

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            if *kind == tar::EntryType::Symlink {
                header.set_size(0);
                builder.append_link(&mut header, path, content).unwrap();
            } else {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, path, content.as_bytes()).unwrap();
            }
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn an_archive_gives_its_first_entry() {
        let file =
            archive(&[("passwd", tar::EntryType::Regular, PASSWD), ("b", tar::EntryType::Regular, "b")]);
        assert_eq!(first_entry(&file), Ok(Entry::File(PASSWD.to_owned())));
        let link = archive(&[("passwd", tar::EntryType::Symlink, "../nix/passwd")]);
        assert_eq!(first_entry(&link), Ok(Entry::Link("../nix/passwd".to_owned())));
        let directory = archive(&[("passwd", tar::EntryType::Directory, "")]);
        assert_eq!(first_entry(&directory), Err("it is not a file".to_owned()));
        let large = archive(&[("passwd", tar::EntryType::Regular, &"x".repeat(MAX_FILE_BYTES + 1))]);
        assert!(first_entry(&large).unwrap_err().contains("larger"));
        assert!(first_entry(&file[..550]).unwrap_err().contains("archive"), "the content is cut");
        assert!(first_entry(&file[..300]).unwrap_err().contains("archive"), "the header is cut");
        assert!(first_entry(&[]).is_err());
    }
}
