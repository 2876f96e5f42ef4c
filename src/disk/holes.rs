//! Where a file has nothing.

use std::{fs::File, io};

use rustix::{fs::SeekFrom, io::Errno};

/// Holes shorter than this are taken for the zeros they read as.
pub const HOLE_BYTES: u64 = 64 * 1024;

/// Finds the holes of at least [`HOLE_BYTES`] in the first `bytes` of a file, as
/// offset and length, in order; stops behind `most` + 1 of them. A file system
/// that knows no holes has none. Space that is reserved but was never written
/// counts as a hole where the kernel says so. Moves the file's position.
///
/// # Errors
/// Whatever the kernel answers.
pub fn holes(file: &File, bytes: u64, most: usize) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes && found.len() <= most {
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(hole) if hole < bytes => hole,
            Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => break,
            Err(errno) => return Err(errno.into()),
        };
        let data = match rustix::fs::seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data.min(bytes),
            // Nothing but a hole is left.
            Err(Errno::NXIO) => bytes,
            Err(errno) => return Err(errno.into()),
        };
        if data - hole.min(data) >= HOLE_BYTES {
            found.push((hole, data - hole));
        }
        // A file that changes under us may answer anything; never stand still.
        at = data.max(hole + 1);
    }
    // Whoever reads from the start finds it there.
    rustix::fs::seek(file, SeekFrom::Start(0))?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn holes_are_found_where_they_are() {
        let file = tempfile::tempfile_in(".").unwrap();
        assert_eq!(holes(&file, 0, 9).unwrap(), []);
        file.set_len(4 * 1024 * 1024 * MIB).unwrap();
        assert_eq!(holes(&file, 4 * 1024 * 1024 * MIB, 9).unwrap(), [(0, 4 * 1024 * 1024 * MIB)]);
        file.set_len(0).unwrap();
        file.write_all_at(&[1; 4_096], MIB).unwrap();
        file.write_all_at(&[1; 4_096], 3 * MIB).unwrap();
        file.set_len(5 * MIB).unwrap();
        let all = [(0, MIB), (MIB + 4_096, 2 * MIB - 4_096), (3 * MIB + 4_096, 2 * MIB - 4_096)];
        assert_eq!(holes(&file, 5 * MIB, 9).unwrap(), all);
        assert_eq!(holes(&file, 5 * MIB, 1).unwrap().len(), 2, "one too many, and no more");
        // Too short to be worth a line.
        file.write_all_at(&[1; 4_096], 4 * MIB).unwrap();
        file.write_all_at(&[1; 4_096], 4 * MIB + 8_192).unwrap();
        assert!(!holes(&file, 5 * MIB, 9).unwrap().contains(&(4 * MIB + 4_096, 4_096)));
    }

    #[test]
    fn a_file_without_holes_has_none() {
        let file = tempfile::tempfile_in(".").unwrap();
        file.write_all_at(&vec![0; 300_000], 0).unwrap();
        assert_eq!(holes(&file, 300_000, 9).unwrap(), []);
    }
}
