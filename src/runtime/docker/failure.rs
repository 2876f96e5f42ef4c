//! What an error of the engine's client means to a caller.

use std::sync::Arc;

use bollard::errors::Error as ClientError;

use crate::runtime::{Cause, Error};

/// One call, for its errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    operation: &'static str,
    target: &'a str,
    changes: bool,
}

/// Says that the engine did not answer in time.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("no answer within {after_ms} ms")]
pub(super) struct Deadline {
    /// The deadline.
    pub(super) after_ms: u64,
}

/// Words of the engine when it lost what it depends on: the outcome is as unknown as
/// when we lose the engine.
const LOST_WORDS: [&str; 5] = [
    "context deadline exceeded",
    "context canceled",
    "transport is closing",
    "connection error",
    "ttrpc: closed",
];

/// Makes an error shareable.
pub(super) fn cause(error: impl std::error::Error + Send + Sync + 'static) -> Cause {
    Arc::new(error)
}

/// Makes a cause of the engine's words.
pub(super) fn words(message: &str) -> Cause {
    cause(std::io::Error::other(message.to_owned()))
}

/// Whether a refused create means that the image is not there.
pub(super) fn is_missing_image(reason: &str) -> bool {
    reason.to_ascii_lowercase().contains("no such image")
}

// === impl Call ===

impl<'a> Call<'a> {
    /// Describes a call that changes nothing.
    pub(super) fn reads(operation: &'static str, target: &'a str) -> Self {
        Self { operation, target, changes: false }
    }

    /// Describes a call that changes something.
    pub(super) fn changes(operation: &'static str, target: &'a str) -> Self {
        Self { operation, target, changes: true }
    }

    /// The call may have been sent and no answer came.
    pub(super) fn lost(&self, cause: Cause) -> Error {
        if self.changes { self.unknown(cause) } else { Error::Unavailable(cause) }
    }

    pub(super) fn unknown(&self, source: Cause) -> Error {
        Error::Unknown { operation: self.operation, target: self.target.to_owned(), source }
    }

    pub(super) fn conflict(&self, reason: &str) -> Error {
        Error::Conflict {
            operation: self.operation,
            target: self.target.to_owned(),
            reason: reason.to_owned(),
        }
    }

    pub(super) fn refused(&self, reason: &str) -> Error {
        Error::Refused {
            operation: self.operation,
            target: self.target.to_owned(),
            reason: reason.to_owned(),
        }
    }

    /// Sorts an error of the client's by what the caller does next.
    pub(super) fn translate(&self, error: ClientError) -> Error {
        match &error {
            ClientError::SocketNotFoundError(_) => Error::Unavailable(cause(error)),
            // Nothing was sent: there was nobody to send it to.
            ClientError::HyperLegacyError { err } if err.is_connect() => Error::Unavailable(cause(error)),
            ClientError::DockerResponseServerError { status_code, message } => {
                self.answered(*status_code, message)
            }
            ClientError::RequestTimeoutError
            | ClientError::HyperLegacyError { .. }
            | ClientError::HyperResponseError { .. }
            | ClientError::IOError { .. } => self.lost(cause(error)),
            // It answered, and not in words we know: it may well have done it.
            ClientError::JsonDataError { .. } | ClientError::JsonSerdeError { .. } if self.changes => {
                self.unknown(cause(error))
            }
            _ => self.refused(&error.to_string()),
        }
    }

    fn answered(&self, status: u16, message: &str) -> Error {
        let message = message.trim();
        match status {
            // Not the container that is missing: a network that its plan names.
            404 if message.starts_with("network ") => self.refused(message),
            404 | 409 => self.conflict(message),
            503 => Error::Unavailable(words(message)),
            500.. if LOST_WORDS.iter().any(|words| message.contains(words)) => self.lost(words(message)),
            // A removal that failed half-way (a busy layer) can be asked for again.
            500.. if self.operation == "remove" => self.conflict(message),
            _ => self.refused(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(error: &Error) -> &'static str {
        match error {
            Error::Unavailable(_) => "unavailable",
            Error::Unknown { .. } => "unknown",
            Error::Timeout { .. } => "timeout",
            Error::Image { .. } => "image",
            Error::Conflict { .. } => "conflict",
            Error::Refused { .. } => "refused",
        }
    }

    #[test]
    fn the_engines_answers_are_sorted_by_what_to_do_next() {
        let (reads, changes) = (Call::reads("inspect", "x"), Call::changes("start", "x"));
        for (call, status, message, expected) in [
            (reads, 404, "No such container: x", "conflict"),
            (changes, 404, "No such container: x", "conflict"),
            (changes, 404, "network apps not found", "refused"),
            (changes, 409, "Container x is paused", "conflict"),
            (changes, 400, "invalid tmpfs option", "refused"),
            (changes, 500, "OCI runtime create failed: exec: \"nope\": not found", "refused"),
            (changes, 500, "context deadline exceeded", "unknown"),
            (changes, 500, "connection error: desc = transport: dial unix containerd.sock", "unknown"),
            (reads, 500, "context canceled", "unavailable"),
            (changes, 503, "shutting down", "unavailable"),
            (Call::changes("remove", "x"), 500, "device or resource busy", "conflict"),
        ] {
            let error = call.translate(ClientError::DockerResponseServerError {
                status_code: status,
                message: message.to_owned(),
            });
            assert_eq!(kind(&error), expected, "{status} {message}: {error}");
        }
    }

    #[test]
    fn a_lost_answer_is_unknown_only_where_something_may_have_changed() {
        let lost = || ClientError::IOError { err: std::io::ErrorKind::ConnectionReset.into() };
        assert_eq!(kind(&Call::changes("start", "x").translate(lost())), "unknown");
        assert_eq!(kind(&Call::reads("list", "x").translate(lost())), "unavailable");
        let gone = ClientError::SocketNotFoundError("/run/d.sock".into());
        assert_eq!(kind(&Call::changes("start", "x").translate(gone)), "unavailable");
        let odd = || ClientError::JsonDataError { message: "odd".into(), column: 1 };
        assert_eq!(kind(&Call::changes("create", "x").translate(odd())), "unknown");
        assert_eq!(kind(&Call::reads("list", "x").translate(odd())), "refused");
    }
}
