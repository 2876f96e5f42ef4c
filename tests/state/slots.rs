//! A slot's directories: who owns them when, what is listed, what is removed.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use boilerhouse::{
    clock::SystemClock,
    model::{Owner, Secret, spec::Volumes},
    runtime::plan::Mount,
    state::{
        Error, FillFrom, SlotFiles, Survey,
        host::{HostDirs, HostFiles, UNCLAIMED},
    },
};

use crate::support::{
    MemoryStore, Node, RUN_AS, fill, key, mode_and_owner, open, save, slot, tree, volumes, write,
};

fn node() -> Node {
    Node::new(&Arc::new(MemoryStore::default()))
}

/// Secrets on a disk are warned about, by the variable's name; on a tmpfs they are not.
#[test]
fn secrets_on_a_disk_are_warned_about() {
    let shm = Path::new("/dev/shm");
    for parent in [shm, Path::new(env!("CARGO_TARGET_TMPDIR")), &std::env::temp_dir()] {
        let stat = std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(parent).output().unwrap();
        let kind = String::from_utf8(stat.stdout).unwrap();
        let is_in_memory = matches!(kind.trim(), "tmpfs" | "ramfs");
        assert!(is_in_memory || parent != shm, "/dev/shm is a {kind}");
        let (dir, state) = (tempfile::tempdir_in(parent).unwrap(), tempfile::tempdir().unwrap());
        let dirs = HostDirs {
            state_dir: state.path().join("state"),
            secrets_dir: dir.path().join("secrets"),
            socket_dir: state.path().join("sockets"),
        };
        let store = Arc::new(MemoryStore::default());
        let warnings = HostFiles::open(dirs, store, Arc::new(SystemClock)).unwrap().warnings();
        assert_eq!(warnings.is_empty(), is_in_memory, "{}: {warnings:?}", parent.display());
        assert!(warnings.iter().all(|warning| warning.contains("BOILERHOUSE_SECRETS_DIR")), "{warnings:?}");
    }
}

fn secrets(pairs: &[(&str, &str)]) -> BTreeMap<String, Secret> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), Secret::new(*value))).collect()
}

#[tokio::test]
async fn directories_are_closed_until_they_are_handed_over() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    let mounts = node.files.prepare(&one, &volumes()).await.unwrap();
    let real = node.dir.path().canonicalize().unwrap();
    let mount = |source: &str, target: &str, read_only| Mount {
        source: real.join(source).to_str().unwrap().to_owned(),
        target: target.into(),
        read_only,
    };
    assert_eq!(
        mounts,
        [
            mount("state/slots/one/state", "/data", false),
            mount("secrets/one", "/secrets", true),
            mount("sockets/one", "/comm", false),
        ]
    );
    let all = [node.state_path(&one), node.secrets_path(&one), node.comm_path(&one)];
    for path in &all {
        assert_eq!(mode_and_owner(path), (0o755, UNCLAIMED.uid, UNCLAIMED.gid), "{path:?}");
    }
    assert_eq!(node.files.comm_path(&one).as_deref(), Some(mounts[2].source.as_str()));
    node.files.fill(&fill(&one, &key, 1, FillFrom::Empty)).await.unwrap();
    let modes = all.each_ref().map(|path| mode_and_owner(path));
    assert_eq!(modes, [0o700, 0o500, 0o700].map(|mode| (mode, RUN_AS.uid, RUN_AS.gid)));
    // A repeated call does not take them back.
    node.prepare(&one).await;
    assert_eq!(all.each_ref().map(|path| mode_and_owner(path)), modes);
    for name in ["slots", "cache", "staging", "set_aside"] {
        assert_eq!(mode_and_owner(&node.dir.path().join("state").join(name)), (0o700, 0, 0));
    }
    let owner = std::fs::read_to_string(node.dir.path().join("state/slots/one/owner.json")).unwrap();
    let owner: serde_json::Value = serde_json::from_str(&owner).unwrap();
    assert_eq!(
        (&owner["tenant"], &owner["workload"], &owner["epoch"]),
        (&"t".into(), &"work".into(), &1.into())
    );
}

#[tokio::test]
async fn a_slot_without_volumes_has_none() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    let only_comm = Volumes { state: None, secrets: None, ..volumes() };
    let mounts = node.files.prepare(&one, &only_comm).await.unwrap();
    assert_eq!(mounts.len(), 1);
    let filled = node.files.fill(&fill(&one, &key, 1, FillFrom::Empty)).await.unwrap();
    assert_eq!(filled.entries, 0);
    assert_eq!(mode_and_owner(&node.comm_path(&one)), (0o700, RUN_AS.uid, RUN_AS.gid));
    let error = node.files.put_secrets(&one, RUN_AS, &secrets(&[("a", "x")])).await.unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error:?}");
    node.files.put_secrets(&one, RUN_AS, &BTreeMap::new()).await.unwrap();
    node.files.capture(&one, &key).await.unwrap();
    assert_eq!(node.files.last_change_ms(&one).await.unwrap(), None);
    node.files.wipe(&one).await.unwrap();
    assert_eq!(node.files.survey().await.unwrap(), Survey::default());
    assert_eq!(node.files.comm_path(&one), None);
}

#[tokio::test]
async fn secrets_are_the_programs_alone_and_gone_after_the_wipe() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    let path = node.secrets_path(&one);
    node.files.put_secrets(&one, RUN_AS, &secrets(&[("a", "first"), ("tls.key", "second")])).await.unwrap();
    assert_eq!(mode_and_owner(&path), (0o500, RUN_AS.uid, RUN_AS.gid));
    for (name, value) in [("a", "first"), ("tls.key", "second")] {
        assert_eq!(std::fs::read_to_string(path.join(name)).unwrap(), value);
        assert_eq!(mode_and_owner(&path.join(name)), (0o400, RUN_AS.uid, RUN_AS.gid));
    }
    // Replaced as a whole: whoever has the old file open still reads the old one.
    let before = std::fs::File::open(path.join("a")).unwrap();
    node.files.put_secrets(&one, RUN_AS, &secrets(&[("a", "changed")])).await.unwrap();
    assert_eq!(std::io::read_to_string(before).unwrap(), "first");
    assert_eq!(std::fs::read_to_string(path.join("a")).unwrap(), "changed");
    for bad in ["../a", ".hidden", "a/b", ""] {
        let mut files = secrets(&[("good", "x")]);
        files.insert(bad.to_owned(), Secret::new("x"));
        let error = node.files.put_secrets(&one, RUN_AS, &files).await.unwrap_err();
        assert!(matches!(&error, Error::File { path, .. } if path == bad), "{error:?}");
        assert!(!path.join("good").exists(), "all or nothing");
    }
    let staging = node.dir.path().join("secrets/.staging");
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0);
    node.release(&one, &key, 1, "n").await;
    assert!(!path.exists());
    for body in node.store.objects.lock().unwrap().values() {
        let body = zstd::stream::decode_all(&body[..]).unwrap_or_else(|_| body.to_vec());
        assert!(!body.windows(7).any(|part| part == b"changed"), "P11: no secret in a snapshot");
    }
    // What a crash left on its way is gone at the next start.
    std::fs::write(staging.join("left"), b"secret").unwrap();
    node.restart();
    assert!(!staging.join("left").exists());
}

#[tokio::test]
async fn state_is_never_wiped() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "f", b"mine");
    node.files.put_secrets(&one, RUN_AS, &secrets(&[("a", "x")])).await.unwrap();
    let error = node.files.wipe(&one).await.unwrap_err();
    assert!(matches!(error, Error::NotEmpty { .. }), "{error:?}");
    assert_eq!(std::fs::read(node.state_path(&one).join("f")).unwrap(), b"mine");
    node.files.discard_slot_state(&one).await.unwrap();
    assert_eq!(mode_and_owner(&node.state_path(&one)), (0o755, UNCLAIMED.uid, UNCLAIMED.gid));
    node.files.wipe(&one).await.unwrap();
    node.files.wipe(&one).await.unwrap();
    for path in [node.state_path(&one), node.secrets_path(&one), node.comm_path(&one)] {
        assert!(!path.exists(), "{path:?}");
    }
}

#[tokio::test]
async fn what_nobody_accounts_for_is_set_aside() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 7, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "f", b"mine");
    let expected = tree(&node.state_path(&one));
    let aside = node.files.set_aside(&one, "no row").await.unwrap();
    assert_eq!(tree(std::path::Path::new(&aside).join("state").as_path()), expected);
    let note = std::fs::read_to_string(format!("{aside}/note.json")).unwrap();
    let note: serde_json::Value = serde_json::from_str(&note).unwrap();
    assert_eq!((&note["reason"], &note["owner"]["tenant"]), (&"no row".into(), &"t".into()));
    assert_eq!(note["owner"]["epoch"], 7);
    assert_eq!(node.files.set_aside(&one, "again").await.unwrap(), aside, "a repetition finds it");
    node.files.wipe(&one).await.unwrap();
    assert!(std::path::Path::new(&aside).join("state/f").exists());
    assert!(node.files.set_aside(&slot("none"), "x").await.is_err());
}

#[tokio::test]
async fn a_cached_tree_in_the_way_of_a_restore_is_set_aside() {
    let node = node();
    let (key, one, two) = (key("t"), slot("one"), slot("two"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "f", b"saved");
    let saved = node.release(&one, &key, 1, "n").await;
    write(&node.cache_path(&key).join("tree"), "f", b"unsaved");
    node.claim(&two, &key, 2, FillFrom::Snapshot(saved.snapshot)).await.unwrap();
    assert_eq!(std::fs::read(node.state_path(&two).join("f")).unwrap(), b"saved");
    let aside: Vec<_> = std::fs::read_dir(node.dir.path().join("state/set_aside")).unwrap().collect();
    let aside = aside[0].as_ref().unwrap().path();
    assert_eq!(std::fs::read(aside.join("tree/f")).unwrap(), b"unsaved");
}

#[tokio::test]
async fn a_survey_lists_what_is_there_and_sweeps_staging() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "f", b"x");
    node.release(&one, &key, 1, "n").await;
    node.claim(&slot("two"), &super::support::key("u"), 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&slot("two")), "f", b"x");
    node.prepare(&slot("three")).await;
    // Half wiped: only the comm directory is left.
    std::fs::create_dir(node.comm_path(&slot("four"))).unwrap();
    let staging = node.dir.path().join("state/staging");
    std::fs::create_dir_all(staging.join("restore-x/tree/deep")).unwrap();
    std::fs::write(staging.join("write-x"), b"x").unwrap();
    let survey = node.files.survey().await.unwrap();
    let slots = [("four", false), ("three", false), ("two", true)].map(|(name, full)| (slot(name), full));
    assert_eq!(survey, Survey { slots: slots.to_vec(), cached: vec![key.digest()] });
    assert_eq!(node.staging(), Vec::<String>::new());
    node.files.wipe(&slot("four")).await.unwrap();
    assert!(!node.comm_path(&slot("four")).exists());
}

#[tokio::test]
async fn the_last_change_is_seen_in_any_depth() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "a/b/c", b"x");
    let before = node.files.last_change_ms(&one).await.unwrap().unwrap();
    let mut after = before;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while after <= before {
        assert!(std::time::Instant::now() < deadline);
        std::fs::write(node.state_path(&one).join("a/b/c"), b"y").unwrap();
        after = node.files.last_change_ms(&one).await.unwrap().unwrap();
    }
    // A time that the tenant sets says nothing.
    let file = std::fs::File::open(node.state_path(&one).join("a/b/c")).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(1_000_000)).unwrap();
    let now = node.files.last_change_ms(&one).await.unwrap().unwrap();
    assert!(now < after + 900_000_000, "{now} is far in the future of {after}");
    assert_eq!(node.files.last_change_ms(&slot("none")).await.unwrap(), None);
}

#[tokio::test]
async fn two_servers_do_not_share_a_state_directory() {
    let node = node();
    let error = open(node.dir.path(), &node.store).unwrap_err();
    let Error::Disk { operation, source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*operation, "lock");
    assert!(source.to_string().contains("another server"), "{source}");
}

#[tokio::test]
async fn directories_that_cannot_work_are_refused_with_the_reason() {
    let store = Arc::new(MemoryStore::default());
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sockets")).unwrap();
    std::fs::set_permissions(dir.path().join("sockets"), PermissionsExt::from_mode(0o1777)).unwrap();
    let error = open(dir.path(), &store).unwrap_err();
    let Error::Disk { path, source, .. } = &error else { panic!("{error:?}") };
    assert!(path.ends_with("sockets") && source.to_string().contains("mode 1777"), "{path}: {source}");
    // Another file system below the state directory.
    let tmpfs = std::path::Path::new("/dev/shm");
    if tmpfs.is_dir() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir_in(tmpfs).unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("state/cache")).unwrap();
        let error = open(dir.path(), &store).unwrap_err();
        assert!(matches!(&error, Error::Disk { path, .. } if path.ends_with("cache")), "{error:?}");
    }
}

/// A slot may be parked: captured under pause, and filled again in place.
#[tokio::test]
async fn a_parked_slot_is_filled_again_in_place() {
    let node = node();
    let (key, one) = (key("t"), slot("one"));
    node.claim(&one, &key, 1, FillFrom::Empty).await.unwrap();
    write(&node.state_path(&one), "f", b"x");
    let expected = tree(&node.state_path(&one));
    node.files.capture(&one, &key).await.unwrap();
    node.files.save(&save(&key, 1, "n")).await.unwrap();
    assert_eq!(mode_and_owner(&node.state_path(&one)), (0o755, UNCLAIMED.uid, UNCLAIMED.gid));
    let mut filling = fill(&one, &key, 2, FillFrom::Cache);
    filling.previous_owner = Some(RUN_AS);
    assert_eq!(node.files.fill(&filling).await.unwrap().entries, 1);
    assert_eq!(tree(&node.state_path(&one)), expected);
    assert_ne!(RUN_AS, Owner { uid: 0, gid: 0 });
}
