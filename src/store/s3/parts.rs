//! Objects of any size: multipart uploads, of which nothing is visible before
//! they are complete.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use reqwest::Method;
use s3::serde_types::{
    CompleteMultipartUploadData, InitiateMultipartUploadResponse, ListMultipartUploadsResult, Part,
};

use super::{
    Answer, Ask, Attempt, Error, Finding, Parts, Payload, S3Store, Size, answer, gate, unasked_condition,
};
use crate::{clock::random_hex, store::key};

/// The least size of a part, in bytes; S3 wants 5 MiB of each but the last.
const PART_BYTES: usize = 16 << 20;

/// S3 allows no more parts of one object.
pub(super) const MAX_PARTS: u32 = 10_000;

/// Carries the mark of an upload, which its object keeps: by it, an object whose
/// completion was answered by nothing is known again.
pub(super) const MARK_HEADER: &str = "x-amz-meta-boilerhouse-upload";

/// So many parts have one size; the next are larger by [`PART_BYTES`].
const PARTS_OF_ONE_SIZE: u32 = 2_500;

/// So many parts of one object are under way at a time.
const PARTS_AHEAD: usize = 3;

/// One page of uploads has no more.
const MAX_UPLOADS: usize = 1000;

/// An upload that is begun.
pub(super) struct Upload {
    /// The server's name for it.
    pub(super) id: String,
    /// Our own.
    mark: String,
}

/// Cuts what a source gives into parts of the sizes that S3 takes.
struct Cutter {
    source: Parts,
    given: VecDeque<Bytes>,
    is_over: bool,
}

// === impl Cutter ===

impl Cutter {
    /// Collects the next part of `wanted` bytes; shorter only at the end.
    async fn next(&mut self, key: &str, wanted: usize) -> Result<Bytes, Error> {
        let mut part = BytesMut::new();
        while part.len() < wanted {
            let Some(first) = self.given.front_mut() else {
                if self.is_over {
                    break;
                }
                match self.source.next().await {
                    Some(Ok(given)) => {
                        key::check_body("put_parts", key, given.len())?;
                        self.given.push_back(given);
                    }
                    Some(Err(error)) => return Err(Error::source(key, &error)),
                    None => self.is_over = true,
                }
                continue;
            };
            let room = wanted - part.len();
            if part.is_empty() && first.len() == wanted {
                // The whole part, as it was given.
                return Ok(self.given.pop_front().unwrap_or_default());
            }
            part.extend_from_slice(&first.split_to(first.len().min(room)));
            if first.is_empty() {
                self.given.pop_front();
            }
        }
        Ok(part.freeze())
    }
}

// === impl S3Store ===

impl S3Store {
    /// Writes an object from parts; one that fits into one part is a plain write.
    pub(super) async fn write_parts(&self, key: &str, source: Parts) -> Result<(), Error> {
        let mut cutter = Cutter { source, given: VecDeque::new(), is_over: false };
        let held = self.gate.reserve_part(PART_BYTES as u64).await;
        let first = cutter.next(key, PART_BYTES).await?;
        if first.len() < PART_BYTES {
            return match self.write("put_parts", key, first, false).await? {
                Answer::Done(()) => Ok(()),
                Answer::Absent | Answer::Precondition => Err(unasked_condition("put_parts", key)),
            };
        }
        let path = self.full_key(key);
        let upload = self.begin_upload("put_parts", key, &path).await?;
        let written = self.write_upload(key, &path, &upload, (first, held), cutter).await;
        if let Err(error) = &written
            && !matches!(error, Error::Unknown { .. })
        {
            self.give_up_upload(key, &path, &upload).await;
        }
        written
    }

    /// Aborts an upload, best effort: what stays is swept by `abort_uploads`.
    pub(super) async fn give_up_upload(&self, key: &str, path: &str, upload: &Upload) {
        if let Err(error) = self.abort_upload(path, &upload.id).await {
            tracing::debug!(key, %error, "an upload is left for the sweep");
        }
    }

    pub(super) async fn begin_upload(
        &self,
        operation: &'static str,
        key: &str,
        path: &str,
    ) -> Result<Upload, Error> {
        let mark = random_hex(&*self.clock, 16);
        let mut ask = self.ask(Method::POST, path);
        ask.query.push(("uploads", String::new()));
        ask.headers.push((MARK_HEADER, mark.clone()));
        let ask = &ask;
        let answer = self
            .call(operation, key, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                // An upload of which we know nothing changes no object.
                let document = self.wire.ask(ask, &self.limits, attempt.until).await;
                let document = document.map_err(Finding::harmless)?;
                answer::parse::<InitiateMultipartUploadResponse>(&document)
            })
            .await?;
        match answer {
            Answer::Done(begun) => Ok(Upload { id: begun.upload_id, mark }),
            Answer::Absent | Answer::Precondition => Err(unasked_condition(operation, key)),
        }
    }

    async fn write_upload(
        &self,
        key: &str,
        path: &str,
        upload: &Upload,
        first: (Bytes, gate::Bytes),
        mut cutter: Cutter,
    ) -> Result<(), Error> {
        let mut under_way: FuturesUnordered<BoxFuture<'_, Result<Part, Error>>> = FuturesUnordered::new();
        let (mut ready, mut done, mut total) = (Some(first), Vec::new(), 0);
        for number in 1.. {
            while under_way.len() >= PARTS_AHEAD {
                done.extend(under_way.try_next().await?);
            }
            let (part, held) = match ready.take() {
                Some(ready) => ready,
                None => {
                    let next = self.next_part(key, number, &mut cutter);
                    tokio::pin!(next);
                    loop {
                        tokio::select! {
                            biased;
                            // What is under way goes on while the source has nothing.
                            Some(part) = under_way.next() => done.push(part?),
                            next = &mut next => break next?,
                        }
                    }
                }
            };
            if part.is_empty() {
                break;
            }
            if number > MAX_PARTS {
                return Err(Error::refused("put_parts", key, format!("more than {MAX_PARTS} parts")));
            }
            total += part.len() as u64;
            under_way.push(Box::pin(async move {
                let _held = held;
                self.write_part(key, path, upload, number, part).await
            }));
        }
        while let Some(part) = under_way.next().await {
            done.push(part?);
        }
        self.complete_upload("put_parts", key, path, upload, done, total).await
    }

    /// Puts parts together to the object. What becomes of a request that was not
    /// answered, the object itself says (P8): the server may know the upload no more.
    pub(super) async fn complete_upload(
        &self,
        operation: &'static str,
        key: &str,
        path: &str,
        upload: &Upload,
        mut parts: Vec<Part>,
        total: u64,
    ) -> Result<(), Error> {
        parts.sort_by_key(|part| part.part_number);
        let document = CompleteMultipartUploadData { parts }.to_string();
        let payload = Payload::new(document.into()).await;
        let mut ask = Ask { payload: &payload, ..self.ask(Method::POST, path) };
        ask.query.push(("uploadId", upload.id.clone()));
        ask.headers.push(("content-type", "application/xml".to_owned()));
        let ask = &ask;
        let outcome = self
            .call(operation, key, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                // Servers may put the parts together before they answer.
                let until = attempt.until + self.limits.time_of(total);
                let document = self.wire.ask(ask, &self.limits, until).await?;
                answer::check_success(&document, "CompleteMultipartUploadResult")
            })
            .await;
        match outcome {
            Ok(Answer::Done(())) => Ok(()),
            Ok(Answer::Absent | Answer::Precondition) => Err(unasked_condition(operation, key)),
            Err(unknown @ Error::Unknown { .. }) => match self.look(operation, key, path).await {
                Ok(Some(seen)) if seen.mark.as_ref() == Some(&upload.mark) && seen.bytes == total => Ok(()),
                _ => Err(unknown),
            },
            Err(error) => Err(error),
        }
    }

    async fn next_part(
        &self,
        key: &str,
        number: u32,
        cutter: &mut Cutter,
    ) -> Result<(Bytes, gate::Bytes), Error> {
        let wanted = PART_BYTES * (1 + (number / PARTS_OF_ONE_SIZE) as usize);
        let held = self.gate.reserve_part(wanted as u64).await;
        Ok((cutter.next(key, wanted).await?, held))
    }

    async fn write_part(
        &self,
        key: &str,
        path: &str,
        upload: &Upload,
        number: u32,
        body: Bytes,
    ) -> Result<Part, Error> {
        let payload = Payload::new(body).await;
        let mut ask = Ask { payload: &payload, ..self.ask(Method::PUT, path) };
        ask.query.push(("partNumber", number.to_string()));
        ask.query.push(("uploadId", upload.id.clone()));
        let ask = &ask;
        let answer = self
            .call("put_parts", key, Size::Reserved, async |attempt: Attempt| {
                let _turn = attempt.turn;
                // A part that arrived changes no object.
                self.wire.write(ask, &self.limits, attempt.until).await.map_err(Finding::harmless)
            })
            .await?;
        match answer {
            Answer::Done(etag) => Ok(Part { etag, part_number: number }),
            Answer::Absent | Answer::Precondition => Err(unasked_condition("put_parts", key)),
        }
    }

    async fn abort_upload(&self, path: &str, upload: &str) -> Result<(), Error> {
        let mut ask = self.ask(Method::DELETE, path);
        ask.query.push(("uploadId", upload.to_owned()));
        let ask = &ask;
        let answer = self
            .call("abort_uploads", path, Size::Small, async |attempt: Attempt| {
                let _turn = attempt.turn;
                match self.wire.ask(ask, &self.limits, attempt.until).await {
                    Err(Finding::Refused(reason)) if reason.contains("NoSuchUpload") => Ok(()),
                    outcome => outcome.map(|_| ()),
                }
            })
            .await?;
        match answer {
            Answer::Done(()) | Answer::Absent => Ok(()),
            Answer::Precondition => Err(unasked_condition("abort_uploads", path)),
        }
    }

    /// Gives up the uploads below our prefix that began before a time.
    pub(super) async fn abort_parts(&self, before_ms: u64) -> Result<u64, Error> {
        const OPERATION: &str = "abort_uploads";
        let (mut aborted, mut marker) = (0, (None::<String>, None::<String>));
        loop {
            let mut ask = self.ask(Method::GET, "");
            ask.query.push(("uploads", String::new()));
            ask.query.push(("prefix", self.prefix.clone()));
            ask.query.push(("max-uploads", MAX_UPLOADS.to_string()));
            ask.query.extend(marker.0.clone().map(|key| ("key-marker", key)));
            ask.query.extend(marker.1.clone().map(|id| ("upload-id-marker", id)));
            let ask = &ask;
            let answer = self
                .call(OPERATION, "", Size::Small, async |attempt: Attempt| {
                    let _turn = attempt.turn;
                    let document = self.wire.ask(ask, &self.limits, attempt.until).await?;
                    answer::parse::<ListMultipartUploadsResult>(&document)
                })
                .await?;
            let Answer::Done(page) = answer else { return Err(unasked_condition(OPERATION, "")) };
            for upload in &page.uploads {
                // Of a time that we cannot read, nothing is known: it stays.
                let began = answer::unix_ms(&upload.initiated);
                if upload.key.starts_with(&self.prefix) && began.is_some_and(|began| began < before_ms) {
                    self.abort_upload(&upload.key, &upload.id).await?;
                    aborted += 1;
                }
            }
            let next = (page.next_marker, page.next_upload_id_marker);
            if !page.is_truncated || next.0.is_none() || next == marker {
                return Ok(aborted);
            }
            marker = next;
        }
    }
}
