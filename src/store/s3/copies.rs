//! Copies within the store, of objects of any size.
//!
//! S3 copies at most 5 GiB in one request, and a server answers such a request
//! when all of it is copied: no deadline fits it. What is larger than
//! [`Limits::copy_part_bytes`] is copied by parts, each with a deadline of its own.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::Method;
use s3::serde_types::Part;
use serde::Deserialize;

use super::{
    Answer, Attempt, Error, Finding, Limits, S3Store, Size, answer,
    parts::{MAX_PARTS, Upload},
    unasked_condition,
};

/// So many parts of one copy are under way at a time; no byte of them comes here.
const COPIES_AHEAD: usize = 4;

/// What a HEAD says of an object.
pub(super) struct Seen {
    pub(super) bytes: u64,
    /// Without its quotes, which some servers take for a part of it in a condition.
    etag: String,
    /// The mark of the upload that wrote it.
    pub(super) mark: Option<String>,
}

/// The answer to the copy of one part.
#[derive(Deserialize)]
struct CopiedPart {
    #[serde(rename = "ETag")]
    etag: String,
}

// === impl S3Store ===

impl S3Store {
    /// Copies an object; see [`crate::store::Store::copy`].
    pub(super) async fn copy_object(&self, from: &str, to: &str) -> Result<bool, Error> {
        let source = self.full_key(from);
        // Of one that is not seen, only the answer to a copy proves the absence.
        let seen = self.look("copy", from, &source).await?;
        match seen {
            Some(seen) if seen.bytes > self.limits.copy_part_bytes => {
                self.copy_by_parts(&source, to, &seen).await
            }
            seen => self.copy_whole(&source, to, seen.map_or(0, |seen| seen.bytes)).await,
        }
    }

    /// Asks for what is known of an object without its body; `None` proves nothing.
    pub(super) async fn look(
        &self,
        operation: &'static str,
        key: &str,
        path: &str,
    ) -> Result<Option<Seen>, Error> {
        let ask = &self.ask(Method::HEAD, path);
        let answer = self
            .call(operation, key, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                match self.wire.send(ask, &self.limits, attempt.until).await {
                    Ok(reply) => Ok(Some(Seen {
                        bytes: reply.announced.unwrap_or(0),
                        etag: reply.header("etag").unwrap_or_default().trim_matches('"').to_owned(),
                        mark: reply.header(super::parts::MARK_HEADER).map(str::to_owned),
                    })),
                    // The answer to a HEAD has no document that says more.
                    Err(Finding::Refused(reason)) if reason.starts_with("status 404 ") => Ok(None),
                    Err(finding) => Err(finding.harmless()),
                }
            })
            .await?;
        match answer {
            Answer::Done(seen) => Ok(seen),
            Answer::Absent => Ok(None),
            Answer::Precondition => Err(unasked_condition(operation, key)),
        }
    }

    fn source(&self, path: &str) -> (&'static str, String) {
        ("x-amz-copy-source", format!("{}/{}", self.bucket, s3::signing::uri_encode(path, false)))
    }

    async fn copy_whole(&self, source: &str, to: &str, bytes: u64) -> Result<bool, Error> {
        let path = self.full_key(to);
        let mut ask = self.ask(Method::PUT, &path);
        ask.headers.push(self.source(source));
        let ask = &ask;
        let answer = self
            .call("copy", to, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                // The server answers when it has copied.
                let until = attempt.until + self.limits.time_of(bytes);
                let document = self.wire.ask(ask, &self.limits, until).await?;
                answer::check_success(&document, "CopyObjectResult")
            })
            .await?;
        match answer {
            Answer::Done(()) => Ok(true),
            Answer::Absent => Ok(false),
            Answer::Precondition => Err(unasked_condition("copy", to)),
        }
    }

    async fn copy_by_parts(&self, source: &str, to: &str, seen: &Seen) -> Result<bool, Error> {
        let path = self.full_key(to);
        let upload = self.begin_upload("copy", to, &path).await?;
        let (upload, path) = (&upload, &path);
        let parts = stream::iter(ranges(seen.bytes, &self.limits).zip(1..))
            .map(|(range, number)| self.copy_part((source, seen), to, path, upload, number, range))
            .buffer_unordered(COPIES_AHEAD)
            .try_collect::<Vec<_>>();
        let copied = match parts.await.map(|parts| parts.into_iter().collect::<Option<Vec<_>>>()) {
            Ok(Some(parts)) => {
                self.complete_upload("copy", to, path, upload, parts, seen.bytes).await.map(|()| true)
            }
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        };
        if !matches!(copied, Ok(true) | Err(Error::Unknown { .. })) {
            self.give_up_upload(to, path, upload).await;
        }
        copied
    }

    /// Copies one part; `None`: the object is gone.
    async fn copy_part(
        &self,
        (source, seen): (&str, &Seen),
        to: &str,
        path: &str,
        upload: &Upload,
        number: u32,
        (start, end): (u64, u64),
    ) -> Result<Option<Part>, Error> {
        let mut ask = self.ask(Method::PUT, path);
        ask.query.push(("partNumber", number.to_string()));
        ask.query.push(("uploadId", upload.id.clone()));
        ask.headers.push(self.source(source));
        ask.headers.push(("x-amz-copy-source-range", format!("bytes={start}-{}", end - 1)));
        // All parts are of one version of the object.
        ask.headers.push(("x-amz-copy-source-if-match", seen.etag.clone()));
        let ask = &ask;
        let answer = self
            .call("copy", to, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                let until = attempt.until + self.limits.time_of(end - start);
                // A part that arrived changes no object.
                let document = self.wire.ask(ask, &self.limits, until).await.map_err(Finding::harmless)?;
                answer::check_success(&document, "CopyPartResult").map_err(Finding::harmless)?;
                answer::parse::<CopiedPart>(&document)
            })
            .await?;
        match answer {
            Answer::Done(copied) => Ok(Some(Part { etag: copied.etag, part_number: number })),
            Answer::Absent => Ok(None),
            Answer::Precondition => {
                Err(Error::unavailable("copy", to, "the object was replaced while it was copied"))
            }
        }
    }
}

/// Cuts an object into ranges, as few as the part's size and S3 allow; ends are exclusive.
fn ranges(bytes: u64, limits: &Limits) -> impl Iterator<Item = (u64, u64)> + use<> {
    let part = limits.copy_part_bytes.max(bytes.div_ceil(u64::from(MAX_PARTS))).max(1);
    (0..bytes.div_ceil(part)).map(move |n| (n * part, ((n + 1) * part).min(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_an_object_without_gap_and_are_few_enough() {
        const GIB: u64 = 1 << 30;
        let limits = |copy_part_bytes| Limits { copy_part_bytes, ..Limits::default() };
        for (bytes, part, expected) in
            [(10, 4, vec![(0, 4), (4, 8), (8, 10)]), (8, 4, vec![(0, 4), (4, 8)]), (3, 4, vec![(0, 3)])]
        {
            assert_eq!(ranges(bytes, &limits(part)).collect::<Vec<_>>(), expected);
        }
        // The largest object that S3 has, by parts that would be too many.
        for part in [5 << 20, Limits::default().copy_part_bytes] {
            let all: Vec<_> = ranges(5 << 40, &limits(part)).collect();
            assert!(all.len() <= MAX_PARTS as usize, "{} parts", all.len());
            assert!(all.windows(2).all(|pair| pair[0].1 == pair[1].0));
            assert_eq!((all[0].0, all[all.len() - 1].1), (0, 5 << 40));
            assert!(all.iter().all(|(start, end)| end - start <= 5 * GIB), "S3 copies no larger part");
        }
    }
}
