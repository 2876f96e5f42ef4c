//! Extended attributes: which belong to a tree, and how they are read and written.
//!
//! Kept are those that a program can set on what it owns and that mean the same
//! wherever the tree is: `user.*` and POSIX access lists. Left alone are
//!
//! - `security.*`: labels (SELinux, IMA) are the host's, not the tree's, and
//!   `security.capability` gives rights as set-id bits do;
//! - `trusted.*`, which only the host's root can set or see;
//! - anything else of `system.*`, which file systems invent for themselves.
//!
//! Only regular files and directories have any of these: the kernel refuses
//! `user.*` and access lists on links.

use std::{io, os::fd::AsFd};

use rustix::{fs::XattrFlags, io::Errno};

/// Attributes of one entry by name, sorted.
pub type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// The kernel's bound for a list of names and for a value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MOST_BYTES: usize = 64 * 1024;
const ACCESS_LISTS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// Says whether an attribute of this name belongs to a tree.
pub fn is_kept_attribute(name: &[u8]) -> bool {
    let is_user = name.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty());
    (is_user || ACCESS_LISTS.contains(&name)) && name.len() <= 255 && !name.contains(&0)
}

/// Says whether an attribute of this name says who may do what.
pub fn is_access_list(name: &[u8]) -> bool {
    ACCESS_LISTS.contains(&name)
}

/// Reads the kept attributes of an open file or directory; none where the file
/// system has no such thing.
///
/// # Errors
/// Whatever the kernel answers.
pub fn attributes(of: impl AsFd) -> io::Result<Attributes> {
    // Nearly every entry has none, or one or two of the host's.
    let mut short = [0; 256];
    let names = match rustix::fs::flistxattr(&of, &mut short[..]) {
        Ok(length) => short[..length].to_vec(),
        Err(Errno::RANGE) => {
            let mut long = vec![0; MOST_BYTES];
            let length = rustix::fs::flistxattr(&of, &mut long[..])?;
            long.truncate(length);
            long
        }
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let mut found = Vec::new();
    let mut value = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| is_kept_attribute(name)) {
        value.resize(MOST_BYTES, 0);
        match rustix::fs::fgetxattr(&of, name, &mut value[..]) {
            Ok(length) => found.push((name.to_vec(), value[..length].to_vec())),
            // Removed since it was listed.
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Sets an attribute of an open file or directory.
///
/// # Errors
/// Whatever the kernel answers; `EOPNOTSUPP` where the file system has no such thing.
pub fn set_attribute(of: impl AsFd, name: &[u8], value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(of, name, value, XattrFlags::empty())?)
}

/// Gives the kept attributes of `from` to `to`, which loses those it has alone.
///
/// # Errors
/// Whatever the kernel answers.
pub fn copy_attributes(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let (wanted, had) = (attributes(&from)?, attributes(&to)?);
    for (name, _) in had.iter().filter(|(name, _)| !wanted.iter().any(|(kept, _)| kept == name)) {
        rustix::fs::fremovexattr(&to, name.as_slice())?;
    }
    for (name, value) in wanted.iter().filter(|pair| !had.contains(pair)) {
        set_attribute(&to, name, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn attributes_of_programs_are_kept_and_those_of_the_host_are_not() {
        for kept in [&b"user.x"[..], b"user.\xff", b"system.posix_acl_access", b"system.posix_acl_default"] {
            assert!(is_kept_attribute(kept), "{}", kept.escape_ascii());
        }
        let long = [b"user.".as_slice(), &[b'x'; 251]].concat();
        for left in [
            &b"user."[..],
            b"",
            b"users.x",
            b"trusted.overlay.opaque",
            b"security.capability",
            b"security.selinux",
            b"system.nfs4_acl",
            b"user.a\0b",
            &long,
        ] {
            assert!(!is_kept_attribute(left), "{}", left.escape_ascii());
        }
    }

    #[test]
    fn a_copy_has_exactly_the_attributes_of_its_source() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| File::create(dir.path().join(name)).unwrap());
        let large = vec![b'v'; 2_000];
        set_attribute(&from, b"user.empty", b"").unwrap();
        set_attribute(&from, b"user.same", b"1").unwrap();
        set_attribute(&from, b"user.large", &large).unwrap();
        for (name, value) in [(&b"user.same"[..], b"2"), (b"user.alone", b"3")] {
            set_attribute(&to, name, value).unwrap();
        }
        copy_attributes(&from, &to).unwrap();
        let expected: Attributes = vec![
            (b"user.empty".to_vec(), Vec::new()),
            (b"user.large".to_vec(), large),
            (b"user.same".to_vec(), b"1".to_vec()),
        ];
        assert_eq!(attributes(&from).unwrap(), expected);
        assert_eq!(attributes(&to).unwrap(), expected);
    }

    #[test]
    fn many_names_are_all_found() {
        let file = tempfile::tempfile_in(".").unwrap();
        // More than the first buffer takes; as many as every file system takes in one block.
        for n in 0..40 {
            set_attribute(&file, format!("user.number-{n:02}").as_bytes(), b"").unwrap();
        }
        assert_eq!(attributes(&file).unwrap().len(), 40);
    }
}
