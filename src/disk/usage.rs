//! What a tree takes on the disk.

use std::{collections::VecDeque, ops::ControlFlow};

use rustix::fs::{AtFlags, FileType};

use super::{Dir, Error, Limits, ListError};

/// `st_blocks` counts in these, whatever the file system's own are.
const BLOCK_BYTES: u64 = 512;
/// What an inode takes beside its blocks, as file systems commonly have it.
const INODE_BYTES: u64 = 256;

/// Adds up what is below `root` and `root` itself: the blocks that are there, so that a
/// hole counts nothing; of a file with several names, each counts its share.
///
/// # Errors
/// [`ListError::Limit`], as [`super::list`]; [`ListError::Disk`], also when anything
/// moves meanwhile.
pub fn usage(root: &Dir, limits: &Limits) -> Result<u64, ListError> {
    let (mut total, mut entries) = (INODE_BYTES, 0_usize);
    let mut open: VecDeque<(Vec<u8>, usize)> = VecDeque::from([(Vec::new(), 1)]);
    while let Some((parent, depth)) = open.pop_back() {
        let dir = root.open_dir(&parent)?;
        let mut failed: Option<ListError> = None;
        dir.each_name(|name| match looked(&dir, name) {
            Err(error) => {
                failed = Some(error.into());
                ControlFlow::Break(())
            }
            Ok((bytes, is_directory)) => {
                total = total.saturating_add(bytes);
                entries += 1;
                if is_directory {
                    let slash: &[u8] = if parent.is_empty() { b"" } else { b"/" };
                    open.push_back(([parent.as_slice(), slash, name].concat(), depth + 1));
                }
                let is_over = entries > limits.entries
                    || depth > limits.depth
                    || parent.len() + name.len() > limits.path_bytes;
                if is_over {
                    failed = Some(ListError::Limit("more than a tree may have".to_owned()));
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
    }
    Ok(total)
}

/// Returns what an entry takes, and whether it is a directory.
fn looked(dir: &Dir, name: &[u8]) -> Result<(u64, bool), Error> {
    let stat = rustix::fs::statat(dir.fd(), name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| Error::new("stat", dir.label(name), errno))?;
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    // Of a directory the links are its own and its subdirectories'.
    let names = if is_directory { 1 } else { u64::from(stat.st_nlink as u32).max(1) };
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    Ok(((blocks.saturating_mul(BLOCK_BYTES) + INODE_BYTES) / names, is_directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_count_holes_do_not_and_a_second_name_adds_nothing() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = |name: &str| folder.path().join(name);
        let dir = Dir::open(folder.path()).unwrap();
        let used = || usage(&dir, &Limits::TREE).unwrap();
        let empty = used();
        std::fs::create_dir_all(path("a/b")).unwrap();
        std::fs::write(path("a/b/file"), vec![7; 1 << 20]).unwrap();
        let file = std::fs::File::open(path("a/b/file")).unwrap();
        // Until then, some file systems have given it no blocks.
        file.sync_all().unwrap();
        let one = used();
        assert!(one >= empty + (1 << 20) && one < empty + (2 << 20), "{empty}, then {one}");
        std::fs::hard_link(path("a/b/file"), path("again")).unwrap();
        assert!(used().abs_diff(one) <= 8_192, "{one}, then {}", used());
        std::fs::File::create(path("sparse")).unwrap().set_len(1 << 40).unwrap();
        std::os::unix::fs::symlink("/", path("link")).unwrap();
        assert!(used().abs_diff(one) <= 16_384, "{one}, then {}", used());
        let few = Limits { entries: 3, ..Limits::TREE };
        assert!(matches!(usage(&dir, &few), Err(ListError::Limit(_))));
    }
}
