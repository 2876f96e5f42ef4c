//! Single files of a state directory, for scripts. The container may be running.

use std::{
    io::{Read, Write},
    sync::Arc,
};

use rustix::io::Errno;

use crate::{
    disk::{self, Dir, Kind, Optional},
    model::{Owner, Secret, SlotId},
};

use super::{Error, FileAction, FileAnswer, Inner, staging::Staging};

const PATH_BYTES: usize = 4_095;
const LIST_NAMES: usize = 10_000;

/// Of files that were not there before; a script may write secrets.
const FILE_MODE: u32 = 0o600;
const DIR_MODE: u32 = 0o755;

// === impl Inner ===

impl Inner {
    /// Acts on one path; see [`FileAction`].
    ///
    /// # Errors
    /// [`Error::File`] for what the script can help, [`Error::Disk`] for the rest.
    pub(super) fn state_file(
        self: &Arc<Self>,
        slot: &SlotId,
        run_as: Owner,
        action: FileAction,
    ) -> Result<FileAnswer, Error> {
        let path = match &action {
            FileAction::Read(path, _)
            | FileAction::Write(path, _)
            | FileAction::List(path)
            | FileAction::Exists(path)
            | FileAction::Remove(path) => path.clone(),
        };
        let done = self.act(slot, run_as, action);
        done.map_err(|error| match error {
            Error::Disk { source, .. } if is_scripts_fault(&source) => {
                Error::File { path, reason: reason(&source) }
            }
            error => error,
        })
    }

    fn act(self: &Arc<Self>, slot: &SlotId, run_as: Owner, action: FileAction) -> Result<FileAnswer, Error> {
        let state = self.state_of(slot)?;
        let in_state = |path: &str| match &state {
            Some(state) => Ok(state),
            None => Err(refused(path, "the workload has no state volume")),
        };
        match action {
            FileAction::Read(path, most) => {
                let (parent, name) = checked(&path)?;
                read(&in_state(&path)?.open_dir(parent)?, name, &path, most).map(FileAnswer::Bytes)
            }
            FileAction::Write(path, content) => {
                let (parent, name) = checked(&path)?;
                let parent = make_parents(in_state(&path)?, parent, run_as)?;
                self.write(&parent, name, run_as, &content)?;
                Ok(FileAnswer::Done)
            }
            FileAction::List(path) => {
                let state = in_state(&path)?;
                let dir = match path.as_str() {
                    "" | "." => state.open_dir(b"")?,
                    _ => state.open_dir(whole(&path)?)?,
                };
                list(&dir, &path).map(FileAnswer::Names)
            }
            FileAction::Exists(path) => {
                let (parent, name) = checked(&path)?;
                let parent = match in_state(&path)?.open_dir(parent) {
                    Err(error) if error.is(Errno::NOTDIR) => None,
                    opened => opened.optional()?,
                };
                let found = parent.map(|parent| parent.stat_of(name).optional()).transpose()?;
                Ok(FileAnswer::There(found.flatten().is_some()))
            }
            FileAction::Remove(path) => {
                let (parent, name) = checked(&path)?;
                if let Some(parent) = in_state(&path)?.open_dir(parent).optional()? {
                    self.remove(&parent, name)?;
                }
                Ok(FileAnswer::Done)
            }
        }
    }

    /// Writes aside and renames: a program never sees half a file, and a link or
    /// FIFO that has the name is replaced, not followed or opened.
    fn write(
        self: &Arc<Self>,
        parent: &Dir,
        name: &[u8],
        run_as: Owner,
        content: &Secret,
    ) -> Result<(), Error> {
        let mode = match parent.stat_of(name).optional()? {
            Some(stat) if stat.kind == Kind::File => stat.mode & 0o777,
            _ => FILE_MODE,
        };
        let staging = Staging::reserve(self, "write");
        let staged = staging.name().as_bytes();
        let failed = |operation| move |error| disk::Error::new(operation, parent.label(name), error);
        let mut file = self.layout.staging.create_file(staged)?;
        file.write_all(content.expose()).map_err(failed("write"))?;
        let now = disk::Stat::of_file(&file).map_err(failed("stat"))?.modified;
        disk::set_file_metadata(&file, (run_as.uid, run_as.gid), mode, now)
            .map_err(failed("set metadata of"))?;
        Ok(self.layout.staging.replace(staged, parent, name)?)
    }

    /// Moves the entry out of the tree first: from then on the program cannot add to it.
    fn remove(self: &Arc<Self>, parent: &Dir, name: &[u8]) -> Result<(), Error> {
        let staging = Staging::reserve(self, "remove");
        match parent.move_to(name, &self.layout.staging, staging.name().as_bytes()).optional()? {
            Some(()) => staging.remove(),
            None => Ok(()),
        }
    }
}

fn whole(path: &str) -> Result<&[u8], Error> {
    if path.len() > PATH_BYTES {
        let start: String = path.chars().take(200).collect();
        return Err(refused(&start, "is longer than 4095 bytes"));
    }
    disk::relative_path(path.as_bytes()).map_err(|problem| refused(path, &problem.to_string()))
}

fn checked(path: &str) -> Result<(&[u8], &[u8]), Error> {
    whole(path).map(disk::split_last)
}

fn refused(path: &str, reason: &str) -> Error {
    Error::File { path: path.to_owned(), reason: reason.to_owned() }
}

fn read(parent: &Dir, name: &[u8], path: &str, most: usize) -> Result<Vec<u8>, Error> {
    let (file, stat) = parent.open_file(name)?;
    let too_large = |bytes: u64| refused(path, &format!("has {bytes} bytes, at most {most} can be read"));
    if stat.bytes > most as u64 {
        return Err(too_large(stat.bytes));
    }
    let mut content = Vec::new();
    let read = file.take(most as u64 + 1).read_to_end(&mut content);
    read.map_err(|error| disk::Error::new("read", parent.label(name), error))?;
    if content.len() > most { Err(too_large(content.len() as u64)) } else { Ok(content) }
}

fn list(dir: &Dir, path: &str) -> Result<Vec<String>, Error> {
    let names = dir.names(LIST_NAMES + 1)?;
    if names.len() > LIST_NAMES {
        return Err(refused(path, &format!("has more than {LIST_NAMES} entries")));
    }
    let mut names: Vec<String> =
        names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    names.sort_unstable();
    Ok(names)
}

/// Opens a directory, making what is missing as the program's own.
fn make_parents(state: &Dir, path: &[u8], run_as: Owner) -> Result<Dir, Error> {
    let mut at = state.open_dir(b"")?;
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        at = match at.open_dir(name).optional()? {
            Some(dir) => dir,
            None => {
                let dir = at.ensure_dir(name)?;
                dir.set_owner(run_as.uid, run_as.gid)?;
                dir.set_mode(DIR_MODE)?;
                dir
            }
        };
    }
    Ok(at)
}

const FAULTS: [(Errno, &str); 6] = [
    (Errno::NOENT, "is not there"),
    (Errno::LOOP, "has a symbolic link in it, which is not followed"),
    (Errno::NOTDIR, "has a part that is not a directory"),
    (Errno::ISDIR, "is a directory"),
    (Errno::INVAL, "is not a regular file"),
    (Errno::XDEV, "leads to another file system"),
];

fn is_scripts_fault(error: &std::io::Error) -> bool {
    FAULTS.iter().any(|(errno, _)| error.raw_os_error() == Some(errno.raw_os_error()))
}

fn reason(error: &std::io::Error) -> String {
    let known = FAULTS.iter().find(|(errno, _)| error.raw_os_error() == Some(errno.raw_os_error()));
    known.map_or_else(|| error.to_string(), |(_, reason)| (*reason).to_owned())
}
