//! The alphabet of keys: what every adapter checks before a call.
//!
//! An HTTP library folds `s/../t` into `t`, and a file system does so too; a
//! key that cannot hold such a segment cannot leave its prefix.
//!
//! # The one exception
//! Behind `t/<32 hexadecimal digits>/f/` lie tenants' files as plain objects (the
//! layout `mirror`, see `state::mirror`). There a segment may also have other
//! characters: everything printable but `%` and `\`, which an HTTP library or
//! the local store could read as something else, and no space at its ends, which
//! readers of listings cut off. `state` escapes the rest. Where *others* have
//! written, in a prefix that is only read ([`Names::Foreign`]), those two and
//! longer keys are allowed as well.

use bytes::Bytes;

use super::{Error, MAX_KEY_BYTES, MAX_LIST_KEYS, MAX_OBJECT_BYTES, MAX_SEGMENT_BYTES};

/// Who made the names in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// This program.
    Own,
    /// Anybody; they are only read.
    Foreign,
}

/// The length of `t/<32 hexadecimal digits>/f/`.
const MIRROR_PREFIX_BYTES: usize = 37;
/// What S3 allows in a key.
const MAX_FOREIGN_KEY_BYTES: usize = 1024;

/// Refuses a key outside the port's alphabet.
pub(super) fn check_key(operation: &'static str, key: &str) -> Result<(), Error> {
    check_key_of(Names::Own, operation, key)
}

/// Refuses a key that whoever made the names could not have made, or that something
/// on the way would alter.
pub(super) fn check_key_of(names: Names, operation: &'static str, key: &str) -> Result<(), Error> {
    let fault = match names {
        Names::Own => fault_of_key(key),
        Names::Foreign => fault_of_foreign(key),
    };
    fault.map_or(Ok(()), |fault| Err(refused(operation, "key", key, &fault)))
}

/// Says whether a plain object may have this character in its name as it is.
pub fn is_mirror_char(c: char) -> bool {
    is_printable(c) && !matches!(c, '%' | '\\')
}

/// Says whether a segment of a plain object's name begins and ends as it may.
pub fn has_mirror_ends(segment: &str) -> bool {
    !segment.starts_with(' ') && !segment.ends_with(' ')
}

/// No space but the common one, nothing that controls, and nothing that XML cannot hold.
fn is_printable(c: char) -> bool {
    let is_nonchar = (c as u32) & 0xfffe == 0xfffe || ('\u{fdd0}'..='\u{fdef}').contains(&c);
    !is_nonchar && !c.is_control() && (c == ' ' || !c.is_whitespace())
}

/// Refuses an object that is too large.
pub(super) fn check_body(operation: &'static str, key: &str, bytes: usize) -> Result<(), Error> {
    if bytes > MAX_OBJECT_BYTES {
        let reason = format!("an object of {bytes} bytes; at most {MAX_OBJECT_BYTES} are allowed");
        return Err(Error::refused(operation, key, reason));
    }
    Ok(())
}

/// Refuses a range that is too long to hold.
pub(super) fn check_range(key: &str, offset: u64, bytes: u64) -> Result<(), Error> {
    if bytes > MAX_OBJECT_BYTES as u64 || offset.checked_add(bytes).is_none() {
        let reason = format!("{bytes} bytes from {offset}; at most {MAX_OBJECT_BYTES} are allowed");
        return Err(Error::refused("get_range", key, reason));
    }
    Ok(())
}

/// Returns the part of `body` that a range asks for.
pub(super) fn cut(body: &Bytes, offset: u64, bytes: u64) -> Bytes {
    let length = body.len() as u64;
    let (start, end) = (offset.min(length), offset.saturating_add(bytes).min(length));
    // Both are at most the length, which is a `usize`.
    body.slice(start as usize..end as usize)
}

/// Refuses a listing that no key could answer, or that asks for too much.
pub(super) fn check_list(prefix: &str, after: Option<&str>, limit: usize) -> Result<(), Error> {
    check_list_of(Names::Own, prefix, after, limit)
}

/// As [`check_list`], among names that others may have made.
pub(super) fn check_list_of(
    names: Names,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<(), Error> {
    const OPERATION: &str = "list";
    // The last segment of a prefix may be cut anywhere; those before it are whole.
    let whole = prefix.rsplit_once('/').map(|(folder, _)| folder);
    let fault = fault_of_text(prefix).or_else(|| whole.and_then(fault_of_key));
    if let Some(fault) = fault {
        return Err(refused(OPERATION, "prefix", prefix, &fault));
    }
    // Behind what others have written, anything that a listing answered may stand.
    let after = after.filter(|_| names == Names::Own);
    if let Some((after, fault)) = after.and_then(|after| Some((after, fault_of_text(after)?))) {
        return Err(refused(OPERATION, "after", after, &fault));
    }
    if limit > MAX_LIST_KEYS {
        let fault = format!("limit is {limit}; at most {MAX_LIST_KEYS} is allowed");
        return Err(Error::refused(OPERATION, prefix, fault));
    }
    Ok(())
}

fn refused(operation: &'static str, field: &str, value: &str, fault: &str) -> Error {
    let shown: String = value.chars().take(MAX_KEY_BYTES).collect();
    let reason = format!(
        "{field} {shown:?} {fault}; allowed are a-z, A-Z, 0-9, '-', '.', '_', '=' and '/' between segments of at most \
         {MAX_SEGMENT_BYTES} bytes, {MAX_KEY_BYTES} in all"
    );
    Error::refused(operation, "", reason)
}

fn fault_of_key(key: &str) -> Option<String> {
    if let Some(fault) = fault_of_text(key) {
        return Some(fault);
    }
    key.split('/').find_map(|segment| match segment {
        "" => Some("has an empty segment".to_owned()),
        "." | ".." => Some(format!("has the segment {segment:?}")),
        _ if segment.len() > MAX_SEGMENT_BYTES => Some(format!("has a segment of {} bytes", segment.len())),
        _ => None,
    })
}

fn fault_of_text(text: &str) -> Option<String> {
    if text.len() > MAX_KEY_BYTES {
        return Some(format!("has {} bytes", text.len()));
    }
    let is_strict = |c: &char| matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '.' | '_' | '=' | '/');
    let (strict, plain) = split_mirror(text);
    let fault =
        strict.chars().find(|c| !is_strict(c)).or_else(|| plain.chars().find(|c| !is_mirror_char(*c)));
    fault.map(|c| format!("has the character {c:?}")).or_else(|| {
        let segment = plain.split('/').find(|segment| !has_mirror_ends(segment));
        segment.map(|_| "has a segment with a space at an end".to_owned())
    })
}

/// Returns what of a key is this program's name, and what a tenant's file's.
fn split_mirror(text: &str) -> (&str, &str) {
    let is_hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    match text.split_at_checked(MIRROR_PREFIX_BYTES) {
        Some((prefix, rest))
            if prefix.starts_with("t/")
                && prefix.ends_with("/f/")
                && prefix.bytes().skip(2).take(32).all(is_hex) =>
        {
            (prefix, rest)
        }
        _ => (text, ""),
    }
}

fn fault_of_foreign(key: &str) -> Option<String> {
    if key.len() > MAX_FOREIGN_KEY_BYTES {
        return Some(format!("has {} bytes", key.len()));
    }
    if let Some(c) = key.chars().find(|c| !is_printable(*c)) {
        return Some(format!("has the character {c:?}"));
    }
    key.split('/').find_map(|segment| match segment {
        "" => Some("has an empty segment".to_owned()),
        "." | ".." => Some(format!("has the segment {segment:?}")),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_to_their_alphabet() {
        let long = "k".repeat(MAX_SEGMENT_BYTES);
        for key in ["a", "a/b", "m/0001.json", "t/a-b_c/..d", "Read=20Me.TXT", long.as_str()] {
            assert!(check_key("get", key).is_ok(), "{key} was refused");
        }
        let (too_long, too_deep) = ("k".repeat(MAX_SEGMENT_BYTES + 1), "k/".repeat(300) + "k");
        for key in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "a/../b",
            "a/.",
            "a b",
            "a\0",
            "ä",
            "a%2e",
            "a\\b",
            too_long.as_str(),
            too_deep.as_str(),
        ] {
            let error = check_key("get", key).expect_err(key);
            assert!(matches!(error, Error::Refused { .. }), "{key}: {error}");
        }
    }

    #[test]
    fn only_plain_objects_of_the_mirror_have_other_characters() {
        let prefix = format!("t/{}/f/", "0a".repeat(16));
        for name in ["my file (1).txt", "ä/ö.md", "a+b&c<d>'\"?#.x", "=20a", "日本/語"] {
            assert!(check_key("put", &format!("{prefix}{name}")).is_ok(), "{name} was refused");
            assert!(check_list(&prefix, Some(&format!("{prefix}{name}")), 1).is_ok(), "{name}");
        }
        let other = prefix.replace("/f/", "/m/");
        let upper = prefix.replace('a', "A");
        for (prefix, name) in [
            (&prefix, "a%2e"),
            (&prefix, "a\\b"),
            (&prefix, "a\tb"),
            (&prefix, "a\u{a0}b"),
            (&prefix, "\u{ffff}"),
            (&prefix, " a"),
            (&prefix, "a /b"),
            (&prefix, "../b"),
            (&prefix, "a//b"),
            (&prefix, ""),
            (&other, "a b"),
            (&upper, "a b"),
        ] {
            assert!(check_key("put", &format!("{prefix}{name}")).is_err(), "{prefix}{name} was taken");
        }
        let foreign = |key: &str| check_key_of(Names::Foreign, "get", key);
        for key in ["a%2e b", "a\\b", "x/ y "] {
            assert!(foreign(key).is_ok() && check_key("get", key).is_err(), "{key}");
        }
        for key in ["a/../b", "a//b", "a\nb", &"k".repeat(1025)] {
            assert!(foreign(key).is_err(), "{key}");
        }
    }

    #[test]
    fn a_listing_may_end_inside_a_segment() {
        for prefix in ["", "a", "a/", "a/b", "a/.", "t/x-"] {
            assert!(check_list(prefix, None, 1000).is_ok(), "{prefix} was refused");
        }
        for prefix in ["/", "/a", "a//", "a/../b", "../", "a b"] {
            assert!(check_list(prefix, None, 1).is_err(), "{prefix} was taken");
        }
        assert!(check_list("", Some("a/"), 0).is_ok());
        assert!(check_list("", Some("a b"), 1).is_err());
        assert!(check_list("", None, 1001).is_err());
    }

    #[test]
    fn a_refusal_names_the_field_and_what_is_allowed() {
        let text = check_key("put", "tenant+1").expect_err("a plus").to_string();
        for part in ["put", "key", "\"tenant+1\"", "'+'", "a-z"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
