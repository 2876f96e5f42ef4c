//! Names and relative paths, as bytes.

use super::MAX_NAME_BYTES;

/// Says why a relative path is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// It is empty.
    #[error("is empty")]
    Empty,
    /// It begins with a slash.
    #[error("is absolute; paths are relative to the state directory")]
    Absolute,
    /// A part of it is empty, `.` or `..`.
    #[error("has an empty, `.` or `..` part")]
    Dots,
    /// It contains a zero byte.
    #[error("contains a zero byte")]
    Zero,
    /// A part of it is longer than [`MAX_NAME_BYTES`].
    #[error("has a part of more than 255 bytes")]
    LongName,
}

/// Returns whether `name` can be the name of one entry.
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

/// Checks that `path` is one or more names joined by single slashes.
///
/// # Errors
/// [`InvalidPath`] says what is wrong.
pub fn relative_path(path: &[u8]) -> Result<&[u8], InvalidPath> {
    if path.is_empty() {
        return Err(InvalidPath::Empty);
    }
    if path.starts_with(b"/") {
        return Err(InvalidPath::Absolute);
    }
    if path.contains(&0) {
        return Err(InvalidPath::Zero);
    }
    for part in path.split(|byte| *byte == b'/') {
        if part.is_empty() || part == b"." || part == b".." {
            return Err(InvalidPath::Dots);
        }
        if part.len() > MAX_NAME_BYTES {
            return Err(InvalidPath::LongName);
        }
    }
    Ok(path)
}

/// Splits a checked path into its parent (empty at the top) and its last name.
pub fn split_last(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// Cuts a checked path at slashes into pieces of at most `most` bytes (a single
/// name may be longer), so that each fits one system call.
pub(super) fn pieces(path: &[u8], most: usize) -> impl Iterator<Item = &[u8]> {
    let mut rest = path;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        if rest.len() <= most {
            return Some(std::mem::take(&mut rest));
        }
        let cut = rest[..most]
            .iter()
            .rposition(|byte| *byte == b'/')
            .or_else(|| rest.iter().position(|byte| *byte == b'/'));
        let Some(cut) = cut else { return Some(std::mem::take(&mut rest)) };
        let piece = &rest[..cut];
        rest = &rest[cut + 1..];
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below() {
        for good in [&b"a"[..], b"a/b", b"..evil", b"-rf", b"a\nb", b"\xff/\xfe", b"a\\b"] {
            assert_eq!(relative_path(good), Ok(good));
        }
        let long = vec![b'x'; 256];
        for (bad, why) in [
            (&b""[..], InvalidPath::Empty),
            (b"/etc", InvalidPath::Absolute),
            (b"..", InvalidPath::Dots),
            (b"a/../b", InvalidPath::Dots),
            (b"a//b", InvalidPath::Dots),
            (b"a/", InvalidPath::Dots),
            (b"./a", InvalidPath::Dots),
            (b"a\0", InvalidPath::Zero),
            (&long, InvalidPath::LongName),
        ] {
            assert_eq!(relative_path(bad), Err(why), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn pieces_join_to_the_whole() {
        let path = ["x".repeat(250).as_str(); 41].join("/").into_bytes();
        for most in [1, 255, 256, 4_000, 100_000] {
            let cut: Vec<&[u8]> = pieces(&path, most).collect();
            assert_eq!(cut.join(&b'/'), path);
            assert!(cut.iter().all(|piece| piece.len() <= most.max(250)));
        }
        assert_eq!(pieces(b"", 10).count(), 0);
    }
}
