//! Trees to move about: how they are made, changed and compared.

use std::{
    fs, io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::Command,
};

/// Files of the `mix`.
const MIX_FILES: usize = 30_000;

/// One file of a tree.
pub(crate) struct SourceFile {
    /// Relative to the root.
    pub(crate) path: PathBuf,
    /// What is in it.
    pub(crate) content: Vec<u8>,
}

/// A tree in memory, from which all copies are made.
pub(crate) struct Source {
    /// Its files, sorted by path.
    pub(crate) files: Vec<SourceFile>,
}

/// What random bytes are drawn from: splitmix64 of a fixed seed.
struct Bytes(u64);

// === impl Bytes ===

impl Bytes {
    fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut taken = Vec::with_capacity(bytes + 8);
        while taken.len() < bytes {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            taken.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
        }
        taken.truncate(bytes);
        taken
    }
}

// === impl Source ===

impl Source {
    /// Makes `count` files of `bytes` random bytes in 50 directories.
    pub(crate) fn small(count: usize, bytes: usize) -> Self {
        let mut random = Bytes(1);
        let file = |n: usize| SourceFile {
            path: format!("d{:02}/f{n:05}", n % 50).into(),
            content: random.take(bytes),
        };
        let mut files: Vec<_> = (0..count).map(file).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Self { files }
    }

    /// Makes one file of random bytes.
    pub(crate) fn big(bytes: usize) -> Self {
        Self { files: vec![SourceFile { path: "big.bin".into(), content: Bytes(2).take(bytes) }] }
    }

    /// Reads a git checkout of this repository and sources beside which it is built,
    /// as they are on this machine: names and contents unchanged, regular files only,
    /// for not every tool under comparison keeps links.
    pub(crate) fn mix(repository: &Path, clone: &Path, most: usize) -> io::Result<Self> {
        let git = Command::new("git")
            .args(["clone", "-q", "--no-hardlinks"])
            .arg(repository)
            .arg(clone)
            .status()?;
        if !git.success() {
            return Err(io::Error::other(format!("git clone ended with {git}")));
        }
        let mut roots = vec![("checkout", clone.to_owned())];
        let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
        let cargo = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
        roots.push(("crates", cargo.join("registry/src")));
        for (name, path) in
            [("include", "/usr/include"), ("lib", "/usr/lib/python3"), ("share", "/usr/share")]
        {
            roots.push((name, path.into()));
        }
        let most = most.min(MIX_FILES);
        let mut files = Vec::new();
        for (name, root) in roots {
            let mut open = vec![PathBuf::new()];
            while let Some(folder) = open.pop() {
                let Ok(entries) = fs::read_dir(root.join(&folder)) else { continue };
                let mut entries = entries.collect::<io::Result<Vec<_>>>()?;
                entries.sort_by_key(fs::DirEntry::file_name);
                for entry in entries {
                    let (kind, path) = (entry.file_type()?, folder.join(entry.file_name()));
                    if kind.is_dir() {
                        open.push(path);
                    } else if kind.is_file() && files.len() < most {
                        let Ok(content) = fs::read(root.join(&path)) else { continue };
                        files.push(SourceFile { path: Path::new(name).join(path), content });
                    }
                }
                if files.len() >= most {
                    break;
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { files })
    }

    /// Returns all contents, one after the other.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.files.iter().flat_map(|file| file.content.iter().copied()).collect()
    }

    /// Returns the sum of all sizes.
    pub(crate) fn bytes(&self) -> usize {
        self.files.iter().map(|file| file.content.len()).sum()
    }

    /// Writes all files below `root`, from memory, on one thread.
    pub(crate) fn write(&self, root: &Path) -> io::Result<()> {
        let mut made = PathBuf::new();
        fs::create_dir_all(root)?;
        for file in &self.files {
            let parent = file.path.parent().unwrap_or(Path::new(""));
            if parent != made {
                fs::create_dir_all(root.join(parent))?;
                parent.clone_into(&mut made);
            }
            fs::write(root.join(&file.path), &file.content)?;
        }
        Ok(())
    }

    /// Gives each hundredth file other bytes, here and below `root`.
    pub(crate) fn change_one_percent(&self, root: &Path, round: usize) -> Result<Vec<SourceFile>, String> {
        let mut random = Bytes(1_000 + round as u64);
        let mut changed = Vec::new();
        for file in self.files.iter().step_by(100) {
            let content = random.take(file.content.len());
            let path = root.join(&file.path);
            fs::write(&path, &content).map_err(|error| format!("{}: {error}", path.display()))?;
            changed.push(SourceFile { path: file.path.clone(), content });
        }
        Ok(changed)
    }

    /// Compares a tree below `root` with this one, `changed` files laid over it.
    ///
    /// # Errors
    /// Names the first file that is missing, different, or too many.
    pub(crate) fn compare(&self, root: &Path, changed: &[SourceFile]) -> Result<(), String> {
        let mut count = 0;
        let mut open = vec![root.to_owned()];
        let shown = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(&folder).map_err(|error| shown(&folder, error))? {
                let entry = entry.map_err(|error| shown(&folder, error))?;
                match entry.file_type().map_err(|error| shown(&folder, error))? {
                    kind if kind.is_dir() => open.push(entry.path()),
                    _ => count += 1,
                }
            }
        }
        if count != self.files.len() {
            return Err(format!("{} has {count} files, not {}", root.display(), self.files.len()));
        }
        for file in &self.files {
            let path = root.join(&file.path);
            let own = changed.iter().find(|other| other.path == file.path).unwrap_or(file);
            if fs::read(&path).map_err(|error| shown(&path, error))? != own.content {
                return Err(format!("{} has another content", path.display()));
            }
        }
        Ok(())
    }
}

/// Compares modes, owners and modification times, to the nanosecond, of two trees.
///
/// # Errors
/// Names the first entry that differs.
pub(crate) fn compare_metadata(source: &Path, copy: &Path) -> Result<(), String> {
    let mut open = vec![PathBuf::new()];
    while let Some(path) = open.pop() {
        let (one, other) = (source.join(&path), copy.join(&path));
        let shown = |error: io::Error| format!("{}: {error}", other.display());
        let (a, b) = (one.symlink_metadata().map_err(shown)?, other.symlink_metadata().map_err(shown)?);
        let of = |meta: &fs::Metadata| (meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
        // The root is handed to whoever runs the program.
        if !path.as_os_str().as_bytes().is_empty() && of(&a) != of(&b) {
            return Err(format!("{}: {:?} has become {:?}", other.display(), of(&a), of(&b)));
        }
        if a.is_dir() {
            for entry in fs::read_dir(&one).map_err(shown)? {
                open.push(path.join(entry.map_err(shown)?.file_name()));
            }
        }
    }
    Ok(())
}
