//! What an answer of an S3 server means, decided without I/O.
//!
//! Only a code and a message are taken from an error document: a
//! `SignatureDoesNotMatch` also carries the signature and the string that was
//! signed.

use std::error::Error as _;

use s3::error::S3Error;

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
    },
}

/// Decides what an error of the library means.
pub(super) fn judge(error: S3Error) -> Finding {
    match error {
        S3Error::HttpFailWithBody(status, body) => judge_status(status, &body),
        S3Error::Reqwest(error) => {
            let (is_connect, is_builder) = (error.is_connect(), error.is_builder());
            // The URL says nothing that the key does not, and an operator may
            // have put more into the endpoint than belongs there.
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
                _ => Finding::Failed { reason, may_have_happened: true },
            }
        }
        S3Error::SerdeXml(source) => Finding::Refused(format!(
            "the answer is not a listing ({source}): does AWS_ENDPOINT_URL lead to an S3 server?"
        )),
        // What is left fails before anything is sent: a header, a URL, a time.
        other => Finding::Refused(format!("the request could not be made: {other}")),
    }
}

/// Decides what an error status and its document mean.
fn judge_status(status: u16, body: &str) -> Finding {
    let code = element(body, "Code").unwrap_or_default();
    let reason = match (code, element(body, "Message").unwrap_or_default()) {
        ("", _) => format!("status {status} without an S3 error code"),
        (code, "") => format!("status {status} {code}"),
        (code, message) => format!("status {status} {code}: {message}"),
    };
    match status {
        404 if code == "NoSuchKey" => Finding::Absent,
        404 if code.is_empty() => {
            Finding::Refused(format!("{reason}: does AWS_ENDPOINT_URL lead to an S3 server?"))
        }
        412 => Finding::Precondition,
        409 => Finding::Failed { reason, may_have_happened: false },
        301 | 307 | 308 => Finding::Refused(format!("{reason}: is AWS_REGION the bucket's region?")),
        501 | 505 => Finding::Refused(reason),
        408 | 429 | 500.. => Finding::Failed { reason, may_have_happened: true },
        _ if TRANSIENT_CODES.contains(&code) => Finding::Failed { reason, may_have_happened: false },
        _ => Finding::Refused(reason),
    }
}

/// Says whether a body has the length that the server announced for it; none
/// announced is a chunked body, whose end the HTTP library proves.
pub(super) fn check_length(announced: Option<&str>, got: usize) -> Result<(), Finding> {
    match announced {
        Some(announced) if announced.parse() != Ok(got) => Err(Finding::Failed {
            reason: format!("read {got} of {announced} bytes"),
            may_have_happened: false,
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
        assert_eq!(judge_status(404, &document("NoSuchKey")), Finding::Absent);
        for body in
            [document("NoSuchBucket"), document("NoSuchUpload"), String::new(), "not found".to_owned()]
        {
            let finding = judge_status(404, &body);
            assert!(matches!(finding, Finding::Refused(_)), "{body}: {finding:?}");
        }
        // The same code under another status proves nothing.
        assert!(matches!(judge_status(500, &document("NoSuchKey")), Finding::Failed { .. }));
        assert!(matches!(judge_status(403, &document("NoSuchKey")), Finding::Refused(_)));
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
            match judge_status(status, &document(code)) {
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
            let finding = judge_status(status, &document(code));
            assert!(matches!(finding, Finding::Refused(_)), "{status} {code}: {finding:?}");
        }
        assert_eq!(judge_status(412, ""), Finding::Precondition);
    }

    #[test]
    fn a_reason_holds_the_code_and_the_words_and_nothing_that_was_signed() {
        let Finding::Refused(reason) = judge_status(403, &document("SignatureDoesNotMatch")) else {
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
        assert_eq!(check_length(Some("5"), 5), Ok(()));
        assert_eq!(check_length(None, 5), Ok(()));
        assert!(check_length(Some("6"), 5).is_err());
        assert!(check_length(Some("five"), 5).is_err());
    }
}
