//! What an answer of an S3 server means, decided without I/O.
//!
//! Only a code and a message are taken from an error document: a
//! `SignatureDoesNotMatch` also carries the signature and the string that was
//! signed.

use std::{error::Error as _, time::Duration};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use time::{
    OffsetDateTime,
    format_description::well_known::{Rfc2822, Rfc3339},
};

use crate::store::Versioning;

/// No reason is longer, in characters.
const MAX_REASON_CHARS: usize = 400;

/// Codes of status 4xx that say a request was damaged or late on its way.
const TRANSIENT_CODES: [&str; 5] =
    ["RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"];

/// What an attempt that did not succeed says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// 404 `NoSuchKey`: the only proof of absence.
    Absent,
    /// 412: the condition does not hold.
    Precondition,
    /// The server will say the same again.
    Refused(String),
    /// No connection: nothing was sent.
    Unreachable(String),
    /// Another attempt may succeed.
    Failed {
        /// Why.
        reason: String,
        /// Says whether a write may have happened nevertheless.
        may_have_happened: bool,
        /// The server has too much to do, and asks for this long to itself.
        pressure: Option<Duration>,
    },
}

// === impl Finding ===

impl Finding {
    /// The same of a request that changes no object, whatever becomes of it.
    pub(super) fn harmless(self) -> Self {
        match self {
            Self::Failed { reason, pressure, .. } => {
                Self::Failed { reason, may_have_happened: false, pressure }
            }
            other => other,
        }
    }

    /// No answer, or none that says what became of the request, in time.
    pub(super) fn late(reason: &str) -> Self {
        let pressure = Some(Duration::ZERO);
        Self::Failed { reason: reason.to_owned(), may_have_happened: true, pressure }
    }
}

/// Reads a time as listings write it.
pub(super) fn unix_ms(text: &str) -> Option<u64> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    u64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok()
}

/// Reads a `Retry-After`: seconds, or a date, of which one that has passed asks for nothing.
pub(super) fn retry_after(text: &str, now: OffsetDateTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = OffsetDateTime::parse(text, &Rfc2822).ok()?;
    Some(Duration::try_from(then - now).unwrap_or_default())
}

/// Reads the answer to a question for a bucket's versioning.
pub(super) fn versioning(document: &[u8]) -> Versioning {
    let document = String::from_utf8_lossy(document);
    let Some((_, rest)) = document.split_once("<VersioningConfiguration") else { return Versioning::Unknown };
    match rest.split_once("<Status>").and_then(|(_, rest)| rest.split_once("</Status>")) {
        Some(("Enabled", _)) => Versioning::On,
        // What was kept while it was enabled is still there.
        Some(("Suspended", _)) => Versioning::Unknown,
        Some(_) => Versioning::Unknown,
        // Never switched on.
        None => Versioning::Off,
    }
}

/// A range that begins past the end of an object has no bytes; that the object
/// is there is said by the refusal.
pub(super) fn past_the_end(finding: Finding) -> Result<Bytes, Finding> {
    match finding {
        Finding::Refused(reason) if reason.starts_with("status 416 ") => Ok(Bytes::new()),
        other => Err(other),
    }
}

/// Decides what an error of the HTTP client means.
pub(super) fn judge_transport(error: reqwest::Error) -> Finding {
    let (is_connect, is_builder) = (error.is_connect(), error.is_builder());
    // The URL says nothing that the key does not, and an operator may have put
    // more into the endpoint than belongs there.
    let error = error.without_url();
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        reason.push_str(": ");
        reason.push_str(&cause.to_string());
        source = cause.source();
    }
    match (is_connect, is_builder) {
        (true, _) => Finding::Unreachable(reason),
        (_, true) => Finding::Refused(reason),
        _ => Finding::Failed { reason, may_have_happened: true, pressure: None },
    }
}

/// Decides what an error status and its document mean.
pub(super) fn judge_status(status: u16, body: &str, retry_after: Option<Duration>) -> Finding {
    let code = element(body, "Code").unwrap_or_default();
    let reason = match (code, element(body, "Message").unwrap_or_default()) {
        ("", _) => format!("status {status} without an S3 error code"),
        (code, "") => format!("status {status} {code}"),
        (code, message) => format!("status {status} {code}: {message}"),
    };
    let pressure = Some(retry_after.unwrap_or_default());
    match status {
        404 if code == "NoSuchKey" => Finding::Absent,
        404 if code.is_empty() => {
            Finding::Refused(format!("{reason}: does AWS_ENDPOINT_URL lead to an S3 server?"))
        }
        412 => Finding::Precondition,
        409 => Finding::Failed { reason, may_have_happened: false, pressure: retry_after },
        301 | 307 | 308 => Finding::Refused(format!("{reason}: is AWS_REGION the bucket's region?")),
        501 | 505 => Finding::Refused(reason),
        408 | 429 | 500.. => Finding::Failed { reason, may_have_happened: true, pressure },
        _ if TRANSIENT_CODES.contains(&code) => {
            Finding::Failed { reason, may_have_happened: false, pressure: retry_after }
        }
        _ => Finding::Refused(reason),
    }
}

/// Checks a document that came with a status of success: some servers find out
/// that they failed when the status is on its way.
pub(super) fn check_success(document: &[u8], root: &str) -> Result<(), Finding> {
    let text = String::from_utf8_lossy(document);
    if text.contains(&format!("<{root}")) && !text.contains("<Error>") {
        return Ok(());
    }
    match judge_status(500, &text, None) {
        Finding::Failed { reason, .. } if element(&text, "Code").is_some() => Err(Finding::late(&reason)),
        _ => Err(Finding::late(&format!("the answer is no {root}"))),
    }
}

/// Reads a document.
pub(super) fn parse<T: DeserializeOwned>(document: &[u8]) -> Result<T, Finding> {
    quick_xml::de::from_reader(document).map_err(|source| {
        Finding::Refused(format!(
            "the answer is not what was asked for ({source}): does AWS_ENDPOINT_URL lead to an S3 server?"
        ))
    })
}

/// Says whether a body has the length that the server announced for it; none
/// announced is a chunked body, whose end the HTTP library proves.
pub(super) fn check_length(announced: Option<usize>, got: usize) -> Result<(), Finding> {
    match announced {
        Some(announced) if announced != got => Err(Finding::Failed {
            reason: format!("read {got} of {announced} bytes"),
            may_have_happened: false,
            pressure: None,
        }),
        _ => Ok(()),
    }
}

/// Makes a reason fit to be shown: one line, of bounded length, without any of
/// `secrets`.
pub(super) fn presentable<'a>(reason: &str, secrets: impl IntoIterator<Item = &'a str>) -> String {
    let mut text = reason.to_owned();
    for secret in secrets {
        if !secret.is_empty() {
            text = text.replace(secret, "***");
        }
    }
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_REASON_CHARS).collect()
}

/// Returns the text of the first element of this name in an error document.
fn element<'a>(document: &'a str, name: &str) -> Option<&'a str> {
    let (_, error) = document.split_once("<Error")?;
    let (_, rest) = error.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(code: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>words</Message>\
             <StringToSign>AWS4-HMAC-SHA256</StringToSign><SignatureProvided>feed</SignatureProvided></Error>"
        )
    }

    #[test]
    fn only_no_such_key_is_absence() {
        assert_eq!(judge_status(404, &document("NoSuchKey"), None), Finding::Absent);
        for body in
            [document("NoSuchBucket"), document("NoSuchUpload"), String::new(), "not found".to_owned()]
        {
            let finding = judge_status(404, &body, None);
            assert!(matches!(finding, Finding::Refused(_)), "{body}: {finding:?}");
        }
        // The same code under another status proves nothing.
        assert!(matches!(judge_status(500, &document("NoSuchKey"), None), Finding::Failed { .. }));
        assert!(matches!(judge_status(403, &document("NoSuchKey"), None), Finding::Refused(_)));
    }

    #[test]
    fn statuses_say_what_to_do_next() {
        for (status, code, may_have_happened) in [
            (409, "ConditionalRequestConflict", false),
            (408, "", true),
            (429, "", true),
            (500, "InternalError", true),
            (502, "", true),
            (503, "SlowDown", true),
            (400, "RequestTimeout", false),
            (400, "BadDigest", false),
        ] {
            match judge_status(status, &document(code), None) {
                Finding::Failed { may_have_happened: got, .. } => {
                    assert_eq!(got, may_have_happened, "{status}")
                }
                other => panic!("{status} {code}: {other:?}"),
            }
        }
        for (status, code) in [
            (400, "InvalidArgument"),
            (403, "AccessDenied"),
            (403, "SignatureDoesNotMatch"),
            (403, "RequestTimeTooSkewed"),
            (301, "PermanentRedirect"),
            (405, "MethodNotAllowed"),
            (501, "NotImplemented"),
        ] {
            let finding = judge_status(status, &document(code), None);
            assert!(matches!(finding, Finding::Refused(_)), "{status} {code}: {finding:?}");
        }
        assert_eq!(judge_status(412, "", None), Finding::Precondition);
    }

    #[test]
    fn a_reason_holds_the_code_and_the_words_and_nothing_that_was_signed() {
        let Finding::Refused(reason) = judge_status(403, &document("SignatureDoesNotMatch"), None) else {
            panic!("a wrong signature is not refused")
        };
        assert_eq!(reason, "status 403 SignatureDoesNotMatch: words");
    }

    #[test]
    fn reasons_are_made_presentable() {
        assert_eq!(presentable("key AKIA\nand hunter2", ["hunter2", "", "AKIA"]), "key *** and ***");
        assert_eq!(presentable(&"x".repeat(10_000), []).len(), MAX_REASON_CHARS);
    }

    #[test]
    fn a_short_body_is_not_an_object() {
        assert_eq!(check_length(Some(5), 5), Ok(()));
        assert_eq!(check_length(None, 5), Ok(()));
        assert!(check_length(Some(6), 5).is_err());
    }

    #[test]
    fn a_server_with_too_much_to_do_is_left_alone_for_as_long_as_it_asks() {
        let pressure = |status, code, asked| match judge_status(status, &document(code), asked) {
            Finding::Failed { pressure, .. } => pressure,
            other => panic!("{status} {code}: {other:?}"),
        };
        let two = Some(Duration::from_secs(2));
        assert_eq!(pressure(503, "SlowDown", two), two);
        assert_eq!(pressure(429, "", two), two);
        assert_eq!(pressure(503, "SlowDown", None), Some(Duration::ZERO));
        assert_eq!(pressure(409, "ConditionalRequestConflict", None), None);
    }

    #[test]
    fn success_is_what_was_asked_for_and_no_error_in_its_place() {
        let good = b"<?xml version=\"1.0\"?><CopyObjectResult><ETag>x</ETag></CopyObjectResult>";
        assert_eq!(check_success(good, "CopyObjectResult"), Ok(()));
        for bad in [document("InternalError"), String::new(), "<html>".to_owned()] {
            let finding = check_success(bad.as_bytes(), "CopyObjectResult").unwrap_err();
            assert!(matches!(finding, Finding::Failed { may_have_happened: true, .. }), "{finding:?}");
        }
    }

    #[test]
    fn versioning_is_off_only_where_it_was_never_on() {
        let with =
            |inner: &str| format!("<VersioningConfiguration xmlns=\"x\">{inner}</VersioningConfiguration>");
        for (document, expected) in [
            (with(""), Versioning::Off),
            ("<VersioningConfiguration/>".to_owned(), Versioning::Off),
            (with("<Status>Enabled</Status>"), Versioning::On),
            (with("<Status>Suspended</Status>"), Versioning::Unknown),
            (with("<Status>Later</Status>"), Versioning::Unknown),
            (String::new(), Versioning::Unknown),
        ] {
            assert_eq!(versioning(document.as_bytes()), expected, "{document}");
        }
    }

    #[test]
    fn a_server_may_say_when_to_come_again_in_seconds_or_by_a_date() {
        let now = OffsetDateTime::parse("2015-10-21T07:28:00Z", &Rfc3339).unwrap();
        for (text, expected) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("Wed, 21 Oct 2015 07:28:09 GMT", Some(9)),
            ("Wed, 21 Oct 2015 07:27:00 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(text, now), expected.map(Duration::from_secs), "{text:?}");
        }
    }

    #[test]
    fn times_of_listings_are_read() {
        assert_eq!(unix_ms("2009-10-12T17:50:30.000Z"), Some(1_255_369_830_000));
        assert_eq!(unix_ms("1970-01-01T00:00:00.25Z"), Some(250));
        assert_eq!(unix_ms("yesterday"), None);
    }
}
