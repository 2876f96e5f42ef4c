//! The alphabet of keys: what every adapter checks before a call.
//!
//! An HTTP library folds `s/../t` into `t`, and a file system does so too; a
//! key that cannot hold such a segment cannot leave its prefix.

use super::{Error, MAX_KEY_BYTES, MAX_LIST_KEYS, MAX_OBJECT_BYTES, MAX_SEGMENT_BYTES};

/// Refuses a key outside the port's alphabet.
pub(super) fn check_key(operation: &'static str, key: &str) -> Result<(), Error> {
    fault_of_key(key).map_or(Ok(()), |fault| Err(refused(operation, "key", key, &fault)))
}

/// Refuses an object that is too large.
pub(super) fn check_body(operation: &'static str, key: &str, bytes: usize) -> Result<(), Error> {
    if bytes > MAX_OBJECT_BYTES {
        let reason = format!("an object of {bytes} bytes; at most {MAX_OBJECT_BYTES} are allowed");
        return Err(Error::refused(operation, key, reason));
    }
    Ok(())
}

/// Refuses a listing that no key could answer, or that asks for too much.
pub(super) fn check_list(prefix: &str, after: Option<&str>, limit: usize) -> Result<(), Error> {
    const OPERATION: &str = "list";
    // The last segment of a prefix may be cut anywhere; those before it are whole.
    let whole = prefix.rsplit_once('/').map(|(folder, _)| folder);
    let fault = fault_of_text(prefix).or_else(|| whole.and_then(fault_of_key));
    if let Some(fault) = fault {
        return Err(refused(OPERATION, "prefix", prefix, &fault));
    }
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
        "{field} {shown:?} {fault}; allowed are a-z, 0-9, '-', '.', '_' and '/' between segments of at most \
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
    let is_allowed = |c: &char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.' | '_' | '/');
    text.chars().find(|c| !is_allowed(c)).map(|c| format!("has the character {c:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_to_their_alphabet() {
        let long = "k".repeat(MAX_SEGMENT_BYTES);
        for key in ["a", "a/b", "m/0001.json", "t/a-b_c/..d", long.as_str()] {
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
            "A",
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
    fn a_listing_may_end_inside_a_segment() {
        for prefix in ["", "a", "a/", "a/b", "a/.", "t/x-"] {
            assert!(check_list(prefix, None, 1000).is_ok(), "{prefix} was refused");
        }
        for prefix in ["/", "/a", "a//", "a/../b", "../", "A"] {
            assert!(check_list(prefix, None, 1).is_err(), "{prefix} was taken");
        }
        assert!(check_list("", Some("a/"), 0).is_ok());
        assert!(check_list("", Some("a b"), 1).is_err());
        assert!(check_list("", None, 1001).is_err());
    }

    #[test]
    fn a_refusal_names_the_field_and_what_is_allowed() {
        let text = check_key("put", "Tenant").expect_err("an upper-case key").to_string();
        for part in ["put", "key", "\"Tenant\"", "'T'", "a-z"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
