//! Listing in byte order over a tree of directories.
//!
//! A directory's entries are sorted by the text that each contributes to its
//! keys: an object's name, or a directory's name with `/`. No such text of a
//! directory begins another's, so walking the entries in this order yields
//! keys in byte order.

use rustix::fs::FileType;

use super::folder::{Fault, Folder, Found, OBJECT_SUFFIX, folder_path, object_path, segment_of};
use crate::store::{Listed, key};

/// What is still to be walked, the next one last.
enum Pending {
    Object(String),
    /// Its text ends with `/`, or is empty for the root.
    Directory(String),
}

// === impl Pending ===

impl Pending {
    fn text(&self) -> &str {
        let (Self::Object(text) | Self::Directory(text)) = self;
        text
    }

    /// Says whether a key below or at this entry can be in the answer.
    fn is_wanted(&self, prefix: &str, after: Option<&str>) -> bool {
        let text = self.text();
        match self {
            Self::Object(_) => text.starts_with(prefix) && after.is_none_or(|after| text > after),
            Self::Directory(_) => {
                let may_match = text.starts_with(prefix) || prefix.starts_with(text);
                // All keys below begin with `text`: they are before `after` when
                // `text` is, unless `after` lies below it too.
                may_match && after.is_none_or(|after| text > after || after.starts_with(text))
            }
        }
    }
}

// === impl Folder ===

impl Folder {
    /// Lists objects as [`crate::store::Store::list`] says.
    ///
    /// Holds the names of one directory for each level in memory.
    pub(super) fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, Fault> {
        let mut listed = Vec::new();
        let start = prefix.rfind('/').map_or(0, |slash| slash + 1);
        let mut pending = vec![Pending::Directory(prefix[..start].to_owned())];
        while listed.len() < limit
            && let Some(next) = pending.pop()
        {
            match next {
                Pending::Object(key) => {
                    // One that was removed meanwhile is not listed.
                    if let Some(Found { file_type: FileType::RegularFile, bytes, modified_ms }) =
                        self.stat(&object_path(&key))?
                    {
                        listed.push(Listed { key, bytes, modified_ms });
                    }
                }
                Pending::Directory(text) => {
                    let mut entries = self.entries(&text)?;
                    entries.retain(|entry| entry.is_wanted(prefix, after));
                    entries.sort_unstable_by(|a, b| b.text().cmp(a.text()));
                    pending.append(&mut entries);
                }
            }
        }
        // A removed directory still opens, and is empty.
        self.check_is_there()?;
        Ok(listed)
    }

    /// Reads one directory; foreign files and names are left out.
    fn entries(&self, text: &str) -> Result<Vec<Pending>, Fault> {
        let mut entries = Vec::new();
        let folder = folder_path(text.trim_end_matches('/'));
        let Some(dir) = self.open_dir(&folder)? else { return Ok(entries) };
        for entry in dir {
            let entry = entry.map_err(|source| Fault::unchanged("read of a directory", source))?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let file_type = match entry.file_type() {
                // Some file systems do not say it here.
                FileType::Unknown => match self.stat(&join(&folder, name))? {
                    Some(found) => found.file_type,
                    None => continue,
                },
                known => known,
            };
            let (segment, is_folder) = match file_type {
                FileType::Directory => (segment_of(name), true),
                FileType::RegularFile => (name.strip_suffix(OBJECT_SUFFIX), false),
                _ => continue,
            };
            let Some(segment) = segment else { continue };
            let name = format!("{text}{segment}");
            // What could be no key's is foreign.
            match key::check_key("list", &name) {
                Ok(()) if is_folder => entries.push(Pending::Directory(format!("{name}/"))),
                Ok(()) => entries.push(Pending::Object(name)),
                Err(_) => {}
            }
        }
        Ok(entries)
    }
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}
