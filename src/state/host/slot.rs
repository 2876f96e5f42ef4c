//! A slot's directories: made, listed, set aside, removed.

use std::{os::unix::fs::FileExt, sync::Arc};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::{
    disk::{self, Dir, Limits, Missing, Optional},
    model::{
        Epoch, Key, SlotId, TenantId, WorkloadId,
        spec::{Volume, VolumeMode, Volumes},
    },
    runtime::plan::Mount,
};

use super::{Error, Inner, Survey, UNCLAIMED, fill::remove_shell, staging::Staging};

/// The state directory in a slot's own.
pub(super) const STATE: &[u8] = b"state";
/// Whose tree a slot holds.
const OWNER_NOTE: &[u8] = b"owner.json";
const OWNER_NOTE_NEW: &[u8] = b"owner.json.new";
/// In what was set aside.
const ASIDE_NOTE: &[u8] = b"note.json";
const NOTE_BYTES: u64 = 64 * 1024;
/// How far the search for the last change goes.
const CHANGE_ENTRIES: usize = 20_000;

/// Says whose tree a slot holds; `owner.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OwnerNote {
    /// Whose.
    pub(super) tenant: TenantId,
    /// Of which workload.
    pub(super) workload: WorkloadId,
    /// The claim that it was filled for.
    pub(super) epoch: Epoch,
    /// The manifest of the snapshot that the tree was restored from, if it was.
    pub(super) manifest: Option<String>,
}

#[derive(Serialize)]
struct AsideNote<'a> {
    slot: &'a str,
    reason: &'a str,
    set_aside_ms: u64,
    owner: Option<OwnerNote>,
}

// === impl OwnerNote ===

impl OwnerNote {
    /// Reads a slot's note; one that cannot be understood is as good as none.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn read(slot_dir: &Dir) -> Result<Option<Self>, Error> {
        let Some((file, stat)) = slot_dir.open_file(OWNER_NOTE).optional()? else { return Ok(None) };
        if stat.bytes > NOTE_BYTES {
            return Ok(None);
        }
        Ok(serde_json::from_reader(std::io::BufReader::new(file)).ok())
    }

    /// Returns whether there is a note that cannot be understood.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn is_torn(slot_dir: &Dir) -> Result<bool, Error> {
        let is_there = slot_dir.stat_of(OWNER_NOTE).optional()?.is_some();
        Ok(is_there && Self::read(slot_dir)?.is_none())
    }

    /// Makes the file that the first note will be written to: making a file is
    /// most of what writing a note costs, and a claim waits for it.
    ///
    /// # Errors
    /// [`Error::Disk`]
    fn make_room(slot_dir: &Dir) -> Result<(), Error> {
        match slot_dir.create_file(OWNER_NOTE_NEW) {
            Err(error) if !error.is(Errno::EXIST) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Writes a slot's note, replacing the one before.
    ///
    /// # Errors
    /// [`Error::Disk`]
    pub(super) fn write(&self, slot_dir: &Dir) -> Result<(), Error> {
        let json = serde_json::to_vec(self).expect("a note has only text keys");
        let failed = |error| disk::Error::new("write", slot_dir.label(OWNER_NOTE_NEW), error);
        let file = match slot_dir.open_file_for_writing(OWNER_NOTE_NEW).optional()? {
            Some(file) => file,
            None => slot_dir.create_file(OWNER_NOTE_NEW)?,
        };
        // What a crash left in it may be longer.
        file.set_len(0).and_then(|()| file.write_all_at(&json, 0)).map_err(failed)?;
        Ok(slot_dir.replace(OWNER_NOTE_NEW, slot_dir, OWNER_NOTE)?)
    }

    /// Returns whether the tree is `key`'s.
    pub(super) fn is_of(&self, key: &Key) -> bool {
        self.tenant == key.tenant && self.workload == key.workload
    }
}

/// Reads whose it is that was set aside, as far as the note says.
fn owner_aside(dir: &Dir) -> Result<Option<TenantId>, Error> {
    #[derive(Deserialize)]
    struct Aside {
        owner: Option<OwnerNote>,
    }
    let Some((file, stat)) = dir.open_file(ASIDE_NOTE).optional()? else { return Ok(None) };
    if stat.bytes > NOTE_BYTES {
        return Ok(None);
    }
    let note: Option<Aside> = serde_json::from_reader(std::io::BufReader::new(file)).ok();
    Ok(note.and_then(|note| note.owner).map(|owner| owner.tenant))
}

/// Writes a new file of ours, 0600.
///
/// # Errors
/// [`Error::Disk`]
pub(super) fn write_new(dir: &Dir, name: &[u8], content: &[u8]) -> Result<(), Error> {
    use std::io::Write;
    let mut file = dir.create_file(name)?;
    file.write_all(content).map_err(|error| disk::Error::new("write", dir.label(name), error))?;
    Ok(())
}

// === impl Inner ===

impl Inner {
    /// Makes a slot's directories: state, secrets and comm as far as the spec has
    /// them, so that an absent one says for ever that this slot has none.
    pub(super) fn prepare(&self, slot: &SlotId, volumes: &Volumes) -> Result<Vec<Mount>, Error> {
        let name = slot.as_str().as_bytes();
        let slot_dir = self.layout.slots.ensure_dir(name)?;
        // A slot that was filled once is not made blank by a repeated call.
        let is_blank = OwnerNote::read(&slot_dir)?.is_none();
        if is_blank {
            OwnerNote::make_room(&slot_dir)?;
        }
        let mut mounts = Vec::new();
        let mut add = |volume: &Option<Volume>, parent: &Dir, name: &[u8], source: String| {
            let Some(volume) = volume else { return Ok(()) };
            let dir = parent.ensure_dir(name)?;
            if is_blank {
                close(&dir)?;
            }
            let (target, read_only) = (volume.container_path.clone(), volume.mode == VolumeMode::Ro);
            mounts.push(Mount { source, target, read_only });
            Ok::<(), Error>(())
        };
        add(&volumes.state, &slot_dir, STATE, self.layout.state_path(slot))?;
        add(&volumes.secrets, &self.layout.secrets, name, self.layout.secrets_path(slot))?;
        add(&volumes.comm, &self.layout.sockets, name, self.layout.comm_target(slot))?;
        Ok(mounts)
    }

    /// Opens a slot's own directory.
    pub(super) fn slot_dir(&self, slot: &SlotId) -> Result<Dir, Error> {
        Ok(self.layout.slots.open_dir(slot.as_str().as_bytes())?)
    }

    /// Opens a slot's state directory, if the slot is there and has one.
    pub(super) fn state_of(&self, slot: &SlotId) -> Result<Option<Dir>, Error> {
        let Some(slot_dir) = self.layout.slots.open_dir(slot.as_str().as_bytes()).optional()? else {
            return Ok(None);
        };
        Ok(slot_dir.open_dir(STATE).optional()?)
    }

    /// Removes a slot's directories; refuses while there is state in it.
    pub(super) fn wipe(&self, slot: &SlotId) -> Result<(), Error> {
        let name = slot.as_str().as_bytes();
        let slot_dir = self.layout.slots.open_dir(name).optional()?;
        if let Some(slot_dir) = &slot_dir {
            // `rmdir` is test and removal in one; nothing can get in between.
            match slot_dir.remove_dir(STATE).optional() {
                Ok(_) => {}
                Err(error) if error.is(Errno::NOTEMPTY) => {
                    return Err(Error::NotEmpty { slot: slot.clone() });
                }
                Err(error) => return Err(error.into()),
            }
        }
        disk::remove(&self.layout.secrets, name)?;
        disk::remove(&self.layout.sockets, name)?;
        if let Some(slot_dir) = slot_dir {
            let no_notes = self.syncs.hold();
            remove_shell(&slot_dir)?;
            drop(no_notes);
            slot_dir.remove_file(OWNER_NOTE_NEW).optional()?;
            slot_dir.remove_file(OWNER_NOTE).optional()?;
            self.layout.slots.remove_dir(name).optional()?;
        }
        Ok(())
    }

    /// Empties a slot's state directory and closes it.
    pub(super) fn discard_slot_state(&self, slot: &SlotId) -> Result<(), Error> {
        let Some(state) = self.state_of(slot)? else { return Ok(()) };
        close(&state)?;
        disk::empty(&state)?;
        Ok(())
    }

    /// Moves a slot's state directory to `set_aside`. Repeated, it answers where
    /// the first call moved it.
    pub(super) fn set_aside(&self, slot: &SlotId, reason: &str) -> Result<String, Error> {
        let prefix = format!("{slot}.");
        let slot_dir = self.slot_dir(slot).map(Some).or_else(|error| match error {
            Error::Disk { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            error => Err(error),
        })?;
        let has_state = match &slot_dir {
            None => false,
            Some(dir) => {
                dir.open_dir(STATE).optional()?.map(|state| state.is_empty()).transpose()? == Some(false)
            }
        };
        let Some(slot_dir) = slot_dir.filter(|_| has_state) else {
            let names = self.layout.set_aside.names(usize::MAX)?;
            let earlier = names.into_iter().filter(|name| name.starts_with(prefix.as_bytes())).max();
            return match earlier {
                Some(name) => Ok(self.layout.set_aside_path(&String::from_utf8_lossy(&name))),
                None => Err(disk::Error::new("set aside", self.layout.state_path(slot), Errno::NOENT).into()),
            };
        };
        let name = format!("{prefix}{}", self.clock.unix_ms());
        let aside = self.layout.set_aside.ensure_dir(name.as_bytes())?;
        let note = AsideNote {
            slot: slot.as_str(),
            reason,
            set_aside_ms: self.clock.unix_ms(),
            owner: OwnerNote::read(&slot_dir)?,
        };
        let json = serde_json::to_vec_pretty(&note).expect("a note has only text keys");
        aside.remove_file(ASIDE_NOTE).optional()?;
        write_new(&aside, ASIDE_NOTE, &json)?;
        slot_dir.move_to(STATE, &aside, STATE)?;
        Ok(self.layout.set_aside_path(&name))
    }

    /// Moves a cached tree that nobody asked for out of the way.
    pub(super) fn set_cached_aside(&self, key_digest: &str, reason: &str) -> Result<String, Error> {
        let name = format!("{key_digest}.{}", self.clock.unix_ms());
        self.layout.cache.move_to(key_digest.as_bytes(), &self.layout.set_aside, name.as_bytes())?;
        let path = self.layout.set_aside_path(&name);
        tracing::warn!(path, reason, "a cached tree was set aside");
        Ok(path)
    }

    /// Removes what was set aside of a tenant, as the notes beside it and the names of
    /// cached trees say.
    pub(super) fn remove_set_aside(
        &self,
        tenant: &TenantId,
        digests: &[String],
    ) -> Result<Vec<String>, Error> {
        let aside = &self.layout.set_aside;
        let mut removed = Vec::new();
        for name in aside.names(usize::MAX)? {
            let Some(dir) = aside.open_dir(&name).optional()? else { continue };
            let shown = String::from_utf8_lossy(&name).into_owned();
            let is_theirs = match shown.split_once('.') {
                Some((digest, _)) if digests.iter().any(|known| known == digest) => true,
                _ => owner_aside(&dir)?.is_some_and(|owner| owner == *tenant),
            };
            if is_theirs {
                disk::remove(aside, &name)?;
                removed.push(self.layout.set_aside_path(&shown));
            }
        }
        Ok(removed)
    }

    /// Removes a cached tree: out of the cache at once, then for good.
    pub(super) fn discard(self: &Arc<Self>, key: &Key) -> Result<(), Error> {
        let staging = Staging::reserve(self, "discard");
        self.moves.forget(&key.digest());
        self.syncs.forget(&key.digest());
        let moved = self.layout.cache.move_to(
            key.digest().as_bytes(),
            &self.layout.staging,
            staging.name().as_bytes(),
        );
        match moved.optional()? {
            Some(()) => staging.remove(),
            None => Ok(()),
        }
    }

    /// Lists slots and cached trees; removes staging that nobody uses.
    pub(super) fn survey(self: &Arc<Self>) -> Result<Survey, Error> {
        let layout = &self.layout;
        for name in layout.staging.names(usize::MAX)? {
            if !self.live_staging.contains(&name) {
                disk::remove(&layout.staging, &name)?;
            }
        }
        let mut slots = std::collections::BTreeMap::new();
        // A slot may be half made or half wiped, and then be only in one of these.
        for parent in [&layout.slots, &layout.secrets, &layout.sockets] {
            for name in parent.names(usize::MAX)? {
                match std::str::from_utf8(&name).ok().and_then(|text| SlotId::new(text).ok()) {
                    Some(slot) => drop(slots.insert(slot, false)),
                    None if name.starts_with(b".") => {}
                    None => tracing::warn!(path = parent.label(&name), "this is not ours, and stays"),
                }
            }
        }
        for (slot, has_state) in &mut slots {
            *has_state = self.state_of(slot)?.map(|state| state.is_empty()).transpose()? == Some(false);
        }
        let mut cached = Vec::new();
        for name in layout.cache.names(usize::MAX)? {
            let dir = layout.cache.open_dir(&name)?;
            match (dir.open_dir(super::fill::TREE).optional()?, String::from_utf8(name)) {
                (Some(_), Ok(name)) => cached.push(name),
                // A crash between the two directories' making or removal.
                (None, Ok(name)) => disk::remove(&layout.cache, name.as_bytes())?,
                (_, Err(_)) => tracing::warn!(path = dir.label(b""), "this is not ours, and stays"),
            }
        }
        cached.sort_unstable();
        Ok(Survey { slots: slots.into_iter().collect(), cached })
    }

    /// Finds the newest change below a slot's state directory.
    ///
    /// By ctime, which the kernel alone sets: every change of content or metadata
    /// moves it, while an mtime can be set to any year, and archives do.
    pub(super) fn last_change_ms(&self, slot: &SlotId) -> Result<Option<u64>, Error> {
        let Some(state) = self.state_of(slot)? else { return Ok(None) };
        let mut newest = state.stat()?.changed;
        let limits = Limits { entries: CHANGE_ENTRIES, ..Limits::TREE };
        let bounded = disk::list(&state, &limits, Missing::Skip, |_, stat| {
            newest = newest.max(stat.changed);
            true
        });
        match bounded {
            Ok(_) | Err(disk::ListError::Limit(_)) => Ok(Some(newest.unix_ms())),
            Err(disk::ListError::Disk(error)) => Err(error.into()),
        }
    }
}

/// Takes a directory from whoever had it: nothing in a container can write to it.
pub(super) fn close(dir: &Dir) -> Result<(), Error> {
    // The mode first: no moment in which the next owner has a wider one.
    dir.set_mode(0o755)?;
    Ok(dir.set_owner(UNCLAIMED.uid, UNCLAIMED.gid)?)
}
