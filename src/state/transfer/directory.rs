//! A tree into a directory, confined to it, whoever says what the entries are.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    os::unix::fs::FileExt,
};

use crate::{
    disk::{self, Dir, Kind, Limits, Optional, Time},
    state::snapshot::{Meta, Place, Xattr},
};

use super::{Error, FileHead, Sink, refused};

/// What directories that nobody described are.
const MADE_MODE: u32 = 0o755;

/// Fills an empty directory.
pub(super) struct DirectorySink {
    root: Dir,
    /// Whether owners are kept: only root can give files away.
    keeps_owners: bool,
    /// Whether files keep the set-id bits, which would count on this host.
    keeps_set_id: bool,
    directories: BTreeMap<Vec<u8>, (Meta, Vec<Xattr>)>,
    described: HashSet<Vec<u8>>,
    root_meta: Option<(Meta, Vec<Xattr>)>,
    file: Option<Open>,
    entries: usize,
    path_bytes: usize,
}

/// The file that is being written.
struct Open {
    file: File,
    place: Place,
    holes: Vec<(u64, u64)>,
    bytes: u64,
    meta: Meta,
    xattrs: Vec<Xattr>,
    path: Vec<u8>,
}

// === impl DirectorySink ===

impl DirectorySink {
    pub(super) fn new(root: Dir, keeps_owners: bool, keeps_set_id: bool) -> Self {
        Self {
            root,
            keeps_owners,
            keeps_set_id,
            directories: BTreeMap::new(),
            described: HashSet::new(),
            root_meta: None,
            file: None,
            entries: 0,
            path_bytes: 0,
        }
    }

    /// Returns the root's metadata, once it was said.
    pub(super) fn root_meta(&self) -> Option<&Meta> {
        self.root_meta.as_ref().map(|(meta, _)| meta)
    }

    /// Opens the parent of a new entry, making it where nobody has; checks the path.
    fn parent_of<'p>(&mut self, path: &'p [u8]) -> Result<(Dir, &'p [u8]), Error> {
        disk::relative_path(path).map_err(|problem| refused(path, problem.to_string()))?;
        let limits = Limits::TREE;
        self.entries += 1;
        self.path_bytes += path.len();
        let names = path.split(|byte| *byte == b'/').count();
        for (has, most, what) in [
            (self.entries, limits.entries, "entries"),
            (path.len(), limits.path_bytes, "bytes in one path"),
            (names, limits.depth, "names in one path"),
            (self.path_bytes, limits.total_bytes, "bytes of all paths together"),
        ] {
            if has > most {
                return Err(refused(path, format!("more than {most} {what}")));
            }
        }
        let (above, name) = disk::split_last(path);
        if let Some(parent) =
            self.root.open_dir(above).optional().map_err(|error| below_what(path, &error))?
        {
            return Ok((parent, name));
        }
        let mut at = self.root.open_dir(b"")?;
        let mut end = 0;
        for part in above.split(|byte| *byte == b'/') {
            end += part.len() + usize::from(end > 0);
            at = match at.open_dir(part).optional().map_err(|error| below_what(path, &error))? {
                Some(next) => next,
                None => {
                    at.make_dir(part)?;
                    let now = Time { seconds: 0, nanoseconds: 0 };
                    let meta = self.root_meta().copied();
                    let (uid, gid) = meta.map_or((0, 0), |meta| (meta.uid, meta.gid));
                    let meta =
                        Meta { mode: MADE_MODE, uid, gid, modified: meta.map_or(now, |meta| meta.modified) };
                    self.directories.insert(above[..end].to_vec(), (meta, Vec::new()));
                    at.open_dir(part)?
                }
            };
        }
        Ok((at, name))
    }

    fn owner(&self, meta: &Meta) -> Option<(u32, u32)> {
        self.keeps_owners.then_some((meta.uid, meta.gid))
    }
}

impl Sink for DirectorySink {
    fn root(&mut self, meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error> {
        self.root_meta = Some((*meta, xattrs.to_vec()));
        Ok(())
    }

    fn directory(&mut self, path: &[u8], meta: &Meta, xattrs: &[Xattr]) -> Result<(), Error> {
        let (parent, name) = self.parent_of(path)?;
        match parent.stat_of(name).optional()? {
            None => parent.make_dir(name)?,
            // Made already for what is in it.
            Some(stat) if stat.kind == Kind::Directory && !self.described.contains(path) => {}
            Some(_) => return Err(refused(path, "is there twice")),
        }
        self.described.insert(path.to_vec());
        self.directories.insert(path.to_vec(), (*meta, xattrs.to_vec()));
        Ok(())
    }

    fn symlink(&mut self, path: &[u8], meta: &Meta, target: &[u8]) -> Result<(), Error> {
        let (parent, name) = self.parent_of(path)?;
        parent.make_symlink(name, target).map_err(|error| twice(path, error))?;
        if let Some((uid, gid)) = self.owner(meta) {
            parent.set_owner_of(name, uid, gid)?;
        }
        Ok(parent.set_modified_of(name, meta.modified)?)
    }

    fn hard_link(&mut self, path: &[u8], _meta: &Meta, to: &[u8]) -> Result<(), Error> {
        disk::relative_path(to)
            .map_err(|problem| refused(path, format!("is a link to {}, which {problem}", disk::shown(to))))?;
        let (above, first) = disk::split_last(to);
        let missing =
            || refused(path, format!("is a link to {}, which is no file before it", disk::shown(to)));
        let of_first = self.root.open_dir(above).map_err(|_| missing())?;
        if !of_first.stat_of(first).is_ok_and(|stat| matches!(stat.kind, Kind::File | Kind::Symlink)) {
            return Err(missing());
        }
        let (parent, name) = self.parent_of(path)?;
        of_first.link_to(first, &parent, name).map_err(|error| twice(path, error))
    }

    fn file(&mut self, head: FileHead<'_>) -> Result<(), Error> {
        let FileHead { path, meta, xattrs, bytes, holes } = head;
        let (parent, name) = self.parent_of(path)?;
        let file = parent.create_file(name).map_err(|error| twice(path, error))?;
        file.set_len(bytes).map_err(|error| disk::Error::new("truncate", parent.label(name), error))?;
        let (place, holes, xattrs) = (Place::default(), holes.to_vec(), xattrs.to_vec());
        self.file = Some(Open { file, place, holes, bytes, meta, xattrs, path: path.to_vec() });
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), Error> {
        let Some(open) = &mut self.file else { return Ok(()) };
        let mut rest = data;
        while !rest.is_empty() {
            let (at, bytes) = open.place.next(&open.holes, rest.len() as u64);
            if at + bytes > open.bytes {
                return Err(refused(&open.path, "has more data than its size says"));
            }
            let (run, behind) = rest.split_at(usize::try_from(bytes).unwrap_or(usize::MAX));
            let written = open.file.write_all_at(run, at);
            written.map_err(|error| disk::Error::new("write", disk::shown(&open.path), error))?;
            rest = behind;
        }
        Ok(())
    }

    fn end_file(&mut self) -> Result<(), Error> {
        let Some(open) = self.file.take() else { return Ok(()) };
        let failed = |error| disk::Error::new("set metadata of", disk::shown(&open.path), error);
        let mode = if self.keeps_set_id { open.meta.mode } else { open.meta.mode & !0o6000 };
        // Attributes before the mode, which may forbid them.
        for Xattr(name, value) in &open.xattrs {
            disk::set_attribute(&open.file, &name.0, &value.0).map_err(|error| {
                let of = format!("{} of {}", disk::shown(&name.0), disk::shown(&open.path));
                disk::Error::new("set attribute", of, error)
            })?;
        }
        disk::set_new_file_metadata(&open.file, self.owner(&open.meta), Some(mode)).map_err(failed)?;
        Ok(disk::set_file_modified(&open.file, open.meta.modified).map_err(failed)?)
    }

    fn finish(&mut self) -> Result<(), Error> {
        // What is deeper first: a directory's time holds when nothing is made in it any more.
        for (path, (meta, xattrs)) in std::mem::take(&mut self.directories).into_iter().rev() {
            set(&self.root.open_dir(&path)?, &meta, &xattrs, self.keeps_owners)?;
        }
        if let Some((meta, xattrs)) = self.root_meta.take() {
            set(&self.root, &meta, &xattrs, self.keeps_owners)?;
            self.root_meta = Some((meta, xattrs));
        }
        Ok(())
    }
}

fn set(dir: &Dir, meta: &Meta, xattrs: &[Xattr], keeps_owners: bool) -> Result<(), Error> {
    if keeps_owners {
        dir.set_owner(meta.uid, meta.gid)?;
    }
    for Xattr(name, value) in xattrs {
        dir.set_attribute(&name.0, &value.0)?;
    }
    dir.set_mode(meta.mode)?;
    Ok(dir.set_modified(meta.modified)?)
}

fn twice(path: &[u8], error: disk::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => refused(path, "is there twice"),
        _ => error.into(),
    }
}

fn below_what(path: &[u8], error: &disk::Error) -> Error {
    refused(path, format!("is below something that is no directory ({})", error.source))
}
