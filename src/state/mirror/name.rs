//! Names of plain objects: a file's path, escaped so that nothing on its way alters it.

use crate::store::{MAX_KEY_BYTES, MAX_SEGMENT_BYTES, has_mirror_ends, is_mirror_char};

/// The length of `t/<d>/f/`.
const PREFIX_BYTES: usize = 37;
/// What is left for the name.
const NAME_BYTES: usize = MAX_KEY_BYTES - PREFIX_BYTES;
/// A longer name of a path is cut; the mark and an escaped space fit behind it.
const PIECE_BYTES: usize = MAX_SEGMENT_BYTES - 8;
/// At the end of a segment: the name of the path goes on in the next.
const GOES_ON: &str = "=-";
/// Before the blake3 of a path that does not fit at all.
const HASHED: &str = "=H/";

/// Returns the name of a file's plain object, without `t/<d>/f/`.
pub(in crate::state) fn escape(path: &[u8]) -> String {
    let names: Vec<String> = path.split(|byte| *byte == b'/').map(escape_name).collect();
    let joined = names.join("/");
    if joined.len() <= NAME_BYTES {
        return joined;
    }
    format!("{HASHED}{}", hex::encode(blake3::hash(path).as_bytes()))
}

/// Returns the path of which this is the name; `None` when it is of none, or when only
/// a manifest knows it.
pub(in crate::state) fn unescape(name: &str) -> Option<Vec<u8>> {
    let mut path = Vec::with_capacity(name.len());
    let joined = name.replace(&format!("{GOES_ON}/"), "");
    let mut rest = joined.as_bytes();
    while let Some((byte, behind)) = rest.split_first() {
        rest = behind;
        if *byte != b'=' {
            path.push(*byte);
            continue;
        }
        let (digits, behind) = rest.split_at_checked(2)?;
        path.push(*hex::decode(digits).ok()?.first()?);
        rest = behind;
    }
    // Other spellings of the same path are no names of ours.
    (escape(&path) == name).then_some(path)
}

fn escape_name(name: &[u8]) -> String {
    let mut tokens: Vec<String> = Vec::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c != '=' && c != '/' && is_mirror_char(c) {
                tokens.push(c.to_string());
            } else {
                let mut bytes = [0; 4];
                tokens.extend(c.encode_utf8(&mut bytes).bytes().map(escaped));
            }
        }
        tokens.extend(chunk.invalid().iter().copied().map(escaped));
    }
    let mut segments: Vec<Vec<String>> = vec![Vec::new()];
    let mut bytes = 0;
    for token in tokens {
        if bytes + token.len() > PIECE_BYTES {
            segments.push(Vec::new());
            bytes = 0;
        }
        bytes += token.len();
        segments.last_mut().expect("there is always one").push(token);
    }
    let segments: Vec<String> = segments.into_iter().map(safe_segment).collect();
    segments.join(&format!("{GOES_ON}/"))
}

/// Escapes what is altered only where it stands: spaces at an end, and dots alone.
fn safe_segment(mut tokens: Vec<String>) -> String {
    let joined = tokens.concat();
    if matches!(joined.as_str(), "." | "..") {
        return tokens.iter().flat_map(|token| token.bytes()).map(escaped).collect();
    }
    if !has_mirror_ends(&joined) {
        let last = tokens.len() - 1;
        for at in [0, last] {
            if let Some(token) = tokens.get_mut(at).filter(|token| token.as_str() == " ") {
                *token = escaped(b' ');
            }
        }
    }
    tokens.concat()
}

fn escaped(byte: u8) -> String {
    format!("={byte:02X}")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_stay_plain_where_they_can() {
        let long = "x".repeat(255);
        for (path, name) in [
            (&b"a.txt"[..], "a.txt".to_owned()),
            (b"dir/my file (1).txt", "dir/my file (1).txt".to_owned()),
            ("\u{e4}/\u{65e5}.md".as_bytes(), "\u{e4}/\u{65e5}.md".to_owned()),
            (b"100%", "100=25".to_owned()),
            (b"a=b", "a=3Db".to_owned()),
            (b"a\\b\n", "a=5Cb=0A".to_owned()),
            (b"\xff/x", "=FF/x".to_owned()),
            (b"\xc2\xa0", "=C2=A0".to_owned()),
            (b" a ", "=20a=20".to_owned()),
            (b" ", "=20".to_owned()),
            (b"=H/x", "=3DH/x".to_owned()),
            (long.as_bytes(), format!("{}=-/{}", "x".repeat(192), "x".repeat(63))),
        ] {
            assert_eq!(escape(path), name);
            assert_eq!(unescape(&name).as_deref(), Some(path), "{name}");
        }
        // No path of a tree has them; a name must still not leave its prefix.
        assert_eq!(escape(b"../."), "=2E=2E/=2E");
        let deep = ["y".repeat(200).as_str(); 5].join("/");
        assert!(escape(deep.as_bytes()).starts_with(HASHED));
    }

    #[test]
    fn what_is_no_name_of_ours_has_no_path() {
        for name in ["a=3d", "a=", "=H/00", "=41", "a=-", " a", "..", "a=-/b", "=-/a", "a%b", "a=GG"] {
            assert_eq!(unescape(name), None, "{name}");
        }
    }

    /// Bytes that make trouble more often than others.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(b"a".to_vec()),
            Just(b" ".to_vec()),
            Just(b".".to_vec()),
            Just(b"=".to_vec()),
            Just(b"=-".to_vec()),
            Just(b"%2F".to_vec()),
            Just("\u{e4}".as_bytes().to_vec()),
            Just("\u{2028}".as_bytes().to_vec()),
            Just(vec![b'x'; 97]),
            any::<u8>().prop_map(|byte| vec![byte]),
        ];
        let name = prop::collection::vec(piece, 1..12).prop_map(|pieces| pieces.concat());
        let name = name.prop_map(|mut name| {
            name.retain(|byte| !matches!(byte, 0 | b'/'));
            name.truncate(255);
            if matches!(name.as_slice(), b"" | b"." | b"..") { b"n".to_vec() } else { name }
        });
        prop::collection::vec(name, 1..5).prop_map(|names| names.join(&b'/'))
    }

    proptest! {
        #[test]
        fn escaping_is_reversible_and_no_two_paths_share_a_name(
            paths in prop::collection::vec(bytes(), 1..40)
        ) {
            let mut names = HashMap::new();
            for path in paths {
                let name = escape(&path);
                prop_assert!(name.len() <= NAME_BYTES, "{name} is too long");
                for segment in name.split('/') {
                    let is_safe = !matches!(segment, "" | "." | "..") && segment.len() <= MAX_SEGMENT_BYTES;
                    prop_assert!(is_safe && has_mirror_ends(segment), "{segment:?}");
                }
                prop_assert!(name.chars().all(is_mirror_char), "{name:?}");
                if !name.starts_with(HASHED) {
                    prop_assert_eq!(unescape(&name), Some(path.clone()), "{}", name);
                }
                if let Some(before) = names.insert(name, path.clone()) {
                    prop_assert_eq!(before, path);
                }
            }
        }
    }
}
