//! The text of scripts, read once.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::diagnostic::Diagnostic;

/// The largest script, in bytes.
pub(super) const MAX_FILE_BYTES: u64 = 256 * 1024;
/// The most scripts of one kind.
const MAX_FILES: usize = 4096;
/// The most folders below each other in `scripts/`.
const MAX_DEPTH: usize = 16;
/// The extension of scripts.
pub(super) const EXTENSION: &str = "rhai";

/// One script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its path as people know it, e.g. `workloads/redis.rhai`.
    pub name: String,
    /// Its text.
    #[serde(serialize_with = "as_text", deserialize_with = "from_text")]
    pub text: Arc<str>,
}

/// Everything that a [`Set`](super::Set) is made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// By the file's stem, which is the workload's id.
    pub workloads: BTreeMap<String, SourceFile>,
    /// By the path that `import` uses, e.g. `lib/motd`.
    pub scripts: BTreeMap<String, SourceFile>,
    /// Directories that do not exist; they read as empty.
    pub missing: Vec<PathBuf>,
}

fn as_text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

fn from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
    String::deserialize(deserializer).map(Arc::from)
}

// === impl SourceFile ===

impl SourceFile {
    /// Takes a text under a name.
    pub fn new(name: impl Into<String>, text: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), text: text.into() }
    }

    /// Returns a line without its end, counted from 1.
    pub(super) fn line(&self, number: usize) -> Option<&str> {
        self.text.lines().nth(number.checked_sub(1)?)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// A diagnostic when it cannot be read, is too large or is not UTF-8.
    pub(super) fn read(path: &Path) -> Result<Self, Box<Diagnostic>> {
        let name = path.display().to_string();
        let refuse = |message: String| Err(Box::new(Diagnostic::whole(name.clone(), message)));
        match fs::metadata(path) {
            // A FIFO or a device would block or never end.
            Ok(metadata) if !metadata.is_file() => return refuse("is not a file".to_owned()),
            Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
                return refuse(format!(
                    "is {} bytes long; at most {MAX_FILE_BYTES} are read",
                    metadata.len()
                ));
            }
            Ok(_) => {}
            Err(error) => return refuse(format!("cannot be read: {error}")),
        }
        match fs::read(path).map(String::from_utf8) {
            Ok(Ok(text)) => Ok(Self::new(name, text)),
            Ok(Err(error)) => refuse(format!("is not UTF-8 text: {error}")),
            Err(error) => refuse(format!("cannot be read: {error}")),
        }
    }
}

// === impl Sources ===

impl Sources {
    /// Reads `workloads/*.rhai` and `scripts/**/*.rhai` of the two directories.
    ///
    /// Names that begin with a dot are left alone (editors and ConfigMaps keep
    /// theirs there), as are files of another extension.
    ///
    /// # Errors
    /// One diagnostic for each thing that could not be read.
    pub fn read(workloads: &Path, scripts: &Path) -> Result<Self, Vec<Diagnostic>> {
        let mut sources = Self::default();
        let mut errors = Vec::new();
        for (directory, depth) in [(workloads, 0), (scripts, MAX_DEPTH)] {
            let mut paths = Vec::new();
            match list(directory, depth, &mut paths) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && !directory.exists() => {
                    sources.missing.push(directory.to_owned());
                }
                Err(error) => errors.push(Diagnostic::whole(
                    directory.display().to_string(),
                    format!("cannot be read: {error}"),
                )),
            }
            paths.sort();
            let into = if depth == 0 { &mut sources.workloads } else { &mut sources.scripts };
            for path in paths {
                let Some(key) = key_of(&path, directory) else {
                    errors
                        .push(Diagnostic::whole(path.display().to_string(), "has a name that is not UTF-8"));
                    continue;
                };
                match SourceFile::read(&path) {
                    Ok(file) => drop(into.insert(key, file)),
                    Err(error) => errors.push(*error),
                }
            }
        }
        if errors.is_empty() { Ok(sources) } else { Err(errors) }
    }
}

/// Returns a script's key: its path below `directory`, with slashes, without its extension.
pub(super) fn key_of(path: &Path, directory: &Path) -> Option<String> {
    let relative = path.strip_prefix(directory).ok()?.with_extension("");
    let parts: Option<Vec<_>> = relative.iter().map(|part| part.to_str()).collect();
    Some(parts?.join("/"))
}

/// Lists scripts, `depth` folders deep. Symlinks to files are followed (ConfigMaps
/// are made of them); symlinked folders are not, so that there is no loop.
fn list(directory: &Path, depth: usize, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            if depth > 0 {
                list(&path, depth - 1, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == EXTENSION) {
            if files.len() >= MAX_FILES {
                return Err(io::Error::other(format!("holds more than {MAX_FILES} scripts")));
            }
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directories_are_read_once() {
        let root = tempfile::tempdir().unwrap();
        let (workloads, scripts) = (root.path().join("workloads"), root.path().join("scripts"));
        fs::create_dir_all(scripts.join("lib/deep")).unwrap();
        fs::create_dir_all(workloads.join("sub")).unwrap();
        for (path, text) in [
            ("workloads/a.rhai", "A"),
            ("workloads/.hidden.rhai", "no"),
            ("workloads/notes.txt", "no"),
            ("workloads/sub/b.rhai", "no"),
            ("scripts/x.rhai", "X"),
            ("scripts/lib/deep/y.rhai", "Y"),
        ] {
            fs::write(root.path().join(path), text).unwrap();
        }
        let sources = Sources::read(&workloads, &scripts).unwrap();
        assert_eq!(sources.workloads.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(sources.scripts.keys().collect::<Vec<_>>(), ["lib/deep/y", "x"]);
        assert!(sources.missing.is_empty());
        assert_eq!(&*sources.scripts["x"].text, "X");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("big.rhai"), vec![b' '; 300 * 1024]).unwrap();
        fs::write(root.path().join("raw.rhai"), [0xff, 0xfe]).unwrap();
        let errors = Sources::read(root.path(), &root.path().join("none")).unwrap_err();
        let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert!(text[0].contains("262144") && text[0].contains("big.rhai"), "{text:?}");
        assert!(text[1].contains("not UTF-8") && text[1].contains("raw.rhai"), "{text:?}");

        let sources = Sources::read(&root.path().join("none"), &root.path().join("none2")).unwrap();
        assert_eq!(sources.missing.len(), 2);
    }
}
