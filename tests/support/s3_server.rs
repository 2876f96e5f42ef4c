//! An S3 server in this process: in memory, on a loopback port, with SigV4
//! checked and faults on command.
//!
//! Knows what the store needs: buckets, GET, HEAD, PUT (with `Content-MD5` and
//! `If-None-Match: *`, atomically), DELETE and ListObjectsV2.

#![allow(dead_code, reason = "each test binary uses its own part of the support modules")]

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use base64::Engine as _;
use boilerhouse::{config::Aws, model::Secret};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{
    Body, S3, S3Request, S3Response, S3Result,
    auth::SimpleAuth,
    crypto::{Checksum as _, Md5},
    dto::{
        CreateBucketInput, CreateBucketOutput, DeleteObjectInput, DeleteObjectOutput, ETag, GetObjectInput,
        GetObjectOutput, HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput,
        ListObjectsV2Input, ListObjectsV2Output, Object, PutObjectInput, PutObjectOutput, StreamingBlob,
        Timestamp,
    },
    s3_error,
    service::S3ServiceBuilder,
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The bucket that is there from the start.
pub(crate) const BUCKET: &str = "test";
const ACCESS_KEY: &str = "AKIATESTTESTTEST";
/// The secret that errors must not show.
pub(crate) const SECRET_KEY: &str = "0123secret4567secret89ab";

/// A running server; ends with its drop.
pub(crate) struct S3Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    running: Mutex<Running>,
}

/// What a request meets, after its signature was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// 503 `SlowDown`; nothing happens.
    SlowDown,
    /// 409 `ConditionalRequestConflict`; nothing happens.
    Conflict,
    /// 500; nothing happens.
    FailBefore,
    /// 500; it happens.
    FailAfter,
    /// The connection breaks; nothing happens.
    DropBefore,
    /// The connection breaks; it happens.
    DropAfter,
    /// No answer; nothing happens.
    Hang,
    /// No answer; it happens.
    HangAfter,
    /// A GET announces the whole body, sends half, and the connection breaks.
    BreakBody,
}

/// The requests that faults tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Get,
    Put,
    Delete,
    List,
}

struct Running {
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Shared {
    buckets: Mutex<HashMap<String, BTreeMap<String, Bytes>>>,
    faults: Mutex<Vec<(Request, Fault, u64)>>,
    ignores_conditions: AtomicBool,
    page: AtomicUsize,
    requests: AtomicU64,
    connections: AtomicU64,
    session_token: Mutex<Option<String>>,
}

/// One connection's view: a fault can break it without touching the others.
struct Connection {
    shared: Arc<Shared>,
    broken: CancellationToken,
}

// === impl S3Server ===

impl S3Server {
    /// Starts a server with the empty bucket [`BUCKET`].
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free loopback port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared { page: AtomicUsize::new(1000), ..Shared::default() });
        shared.buckets().insert(BUCKET.to_owned(), BTreeMap::new());
        let running = Mutex::new(Running::serve(listener, &shared));
        Self { shared, address, running }
    }

    /// Returns credentials and place, as the configuration has them.
    pub(crate) fn aws(&self) -> Aws {
        Aws {
            access_key_id: Some(ACCESS_KEY.to_owned()),
            secret_access_key: Some(Secret::new(SECRET_KEY)),
            session_token: None,
            region: "us-east-1".to_owned(),
            endpoint_url: Some(format!("http://{}", self.address)),
        }
    }

    /// Lets the next `times` requests of a kind meet a fault.
    pub(crate) fn fail(&self, request: Request, fault: Fault, times: u64) {
        lock(&self.shared.faults).push((request, fault, times));
    }

    /// Forgets the faults that were not met yet.
    pub(crate) fn heal(&self) {
        lock(&self.shared.faults).clear();
    }

    /// Says whether `If-None-Match` is accepted and ignored.
    pub(crate) fn ignore_conditions(&self, ignores: bool) {
        self.shared.ignores_conditions.store(ignores, Ordering::SeqCst);
    }

    /// Answers at most so many keys a page, whatever was asked for.
    pub(crate) fn set_page(&self, keys: usize) {
        self.shared.page.store(keys, Ordering::SeqCst);
    }

    /// Returns how many requests came in, failed ones included.
    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Returns how many connections were made.
    pub(crate) fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Returns the session token that the last GET was signed with.
    pub(crate) fn session_token(&self) -> Option<String> {
        lock(&self.shared.session_token).clone()
    }

    /// Returns the objects of [`BUCKET`].
    pub(crate) fn objects(&self) -> BTreeMap<String, Bytes> {
        self.shared.buckets()[BUCKET].clone()
    }

    /// Closes the port and all connections; the objects stay.
    pub(crate) async fn stop(&self) {
        let (stop, tasks) = {
            let running = lock(&self.running);
            (running.stop.clone(), running.tasks.clone())
        };
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }

    /// Listens again on the same port.
    pub(crate) async fn resume(&self) {
        let listener = TcpListener::bind(self.address).await.expect("the port of before is free");
        *lock(&self.running) = Running::serve(listener, &self.shared);
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        lock(&self.running).stop.cancel();
    }
}

// === impl Running ===

impl Running {
    fn serve(listener: TcpListener, shared: &Arc<Shared>) -> Self {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (shared, accept_stop, accept_tasks) = (Arc::clone(shared), stop.clone(), tasks.clone());
        tasks.spawn(async move {
            while let Some(accepted) = accept_stop.run_until_cancelled(listener.accept()).await {
                let Ok((stream, _)) = accepted else { continue };
                // A delayed acknowledgement of 40 ms would hide in every figure.
                let _ = stream.set_nodelay(true);
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let broken = accept_stop.child_token();
                let connection = Connection { shared: Arc::clone(&shared), broken: broken.clone() };
                let mut service = S3ServiceBuilder::new(connection);
                service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
                let service = service.build();
                accept_tasks.spawn(async move {
                    let builder = Builder::new(TokioExecutor::new()).http1_only();
                    let connection = builder.serve_connection(TokioIo::new(stream), service);
                    let _ = broken.run_until_cancelled(connection).await;
                });
            }
        });
        Self { stop, tasks }
    }
}

// === impl Shared ===

impl Shared {
    fn buckets(&self) -> MutexGuard<'_, HashMap<String, BTreeMap<String, Bytes>>> {
        lock(&self.buckets)
    }
}

// === impl Connection ===

impl Connection {
    /// Counts a request and returns the fault it meets.
    fn meet(&self, request: Request) -> Option<Fault> {
        self.shared.requests.fetch_add(1, Ordering::SeqCst);
        let mut faults = lock(&self.shared.faults);
        let position = faults.iter().position(|(own, ..)| *own == request)?;
        let (_, fault, times) = &mut faults[position];
        let fault = *fault;
        *times -= 1;
        if *times == 0 {
            faults.remove(position);
        }
        Some(fault)
    }

    /// Runs a request under the fault it meets.
    async fn run<T>(
        &self,
        request: Request,
        work: impl FnOnce() -> S3Result<T>,
    ) -> S3Result<(T, Option<Fault>)> {
        let fault = self.meet(request);
        match fault {
            None | Some(Fault::BreakBody) => Ok((work()?, fault)),
            Some(Fault::SlowDown) => Err(s3_error!(SlowDown)),
            Some(Fault::Conflict) => Err(s3_error!(ConditionalRequestConflict)),
            Some(Fault::FailBefore) => Err(s3_error!(InternalError)),
            Some(Fault::FailAfter) => {
                work()?;
                Err(s3_error!(InternalError))
            }
            Some(Fault::DropBefore) => {
                self.broken.cancel();
                std::future::pending().await
            }
            Some(Fault::DropAfter) => {
                work()?;
                self.broken.cancel();
                std::future::pending().await
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::HangAfter) => {
                work()?;
                std::future::pending().await
            }
        }
    }

    fn with_bucket<T>(
        &self,
        bucket: &str,
        work: impl FnOnce(&mut BTreeMap<String, Bytes>) -> S3Result<T>,
    ) -> S3Result<T> {
        match self.shared.buckets().get_mut(bucket) {
            Some(objects) => work(objects),
            None => Err(s3_error!(NoSuchBucket, "The specified bucket does not exist")),
        }
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<Bytes> {
        self.with_bucket(bucket, |objects| {
            objects.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
        })
    }
}

#[async_trait::async_trait]
impl S3 for Connection {
    async fn create_bucket(
        &self,
        request: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        self.shared.buckets().entry(request.input.bucket).or_default();
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.with_bucket(&request.input.bucket, |_| Ok(S3Response::new(HeadBucketOutput::default())))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let S3Request { input, headers, .. } = request;
        let token = headers.get("x-amz-security-token").and_then(|token| token.to_str().ok());
        *lock(&self.shared.session_token) = token.map(str::to_owned);
        let work = || self.object(&input.bucket, &input.key);
        let (body, fault) = self.run(Request::Get, work).await?;
        let blob = if fault == Some(Fault::BreakBody) {
            let broken = self.broken.clone();
            let half = body.slice(..body.len() / 2);
            let rest = stream::once(async move {
                // The half is on its way before the break, or it tests nothing new.
                tokio::task::yield_now().await;
                broken.cancel();
                Err(std::io::Error::other("injected"))
            });
            StreamingBlob::wrap(stream::once(async move { Ok(half) }).chain(rest))
        } else {
            StreamingBlob::from(Body::from(body.clone()))
        };
        Ok(S3Response::new(GetObjectOutput {
            content_length: i64::try_from(body.len()).ok(),
            e_tag: Some(etag(&body)),
            last_modified: Some(Timestamp::from(SystemTime::now())),
            body: Some(blob),
            ..GetObjectOutput::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let body = self.object(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: i64::try_from(body.len()).ok(),
            e_tag: Some(etag(&body)),
            ..HeadObjectOutput::default()
        }))
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let S3Request { input, .. } = request;
        let mut body = Vec::new();
        if let Some(mut blob) = input.body {
            while let Some(chunk) = blob.next().await {
                body.extend_from_slice(&chunk.map_err(|error| s3_error!(IncompleteBody, "{error}"))?);
            }
        }
        if let Some(expected) = &input.content_md5
            && *expected != base64::engine::general_purpose::STANDARD.encode(Md5::checksum(&body))
        {
            return Err(s3_error!(BadDigest));
        }
        let is_create = match &input.if_none_match {
            None => false,
            Some(condition) if condition.is_any() => !self.shared.ignores_conditions.load(Ordering::SeqCst),
            Some(_) => return Err(s3_error!(NotImplemented)),
        };
        let (body, key) = (Bytes::from(body), input.key);
        let e_tag = Some(etag(&body));
        let work = || {
            self.with_bucket(&input.bucket, |objects| {
                if is_create && objects.contains_key(&key) {
                    return Err(s3_error!(PreconditionFailed));
                }
                objects.insert(key, body);
                Ok(())
            })
        };
        self.run(Request::Put, work).await?;
        Ok(S3Response::new(PutObjectOutput { e_tag, ..PutObjectOutput::default() }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let S3Request { input, .. } = request;
        let work = || {
            self.with_bucket(&input.bucket, |objects| {
                objects.remove(&input.key);
                Ok(())
            })
        };
        self.run(Request::Delete, work).await?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let S3Request { input, .. } = request;
        let prefix = input.prefix.clone().unwrap_or_default();
        let asked = input.max_keys.and_then(|keys| usize::try_from(keys).ok()).unwrap_or(1000);
        let page = asked.min(self.shared.page.load(Ordering::SeqCst));
        let after = input.continuation_token.clone().or(input.start_after.clone());
        let start = match &after {
            Some(after) if *after >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix.as_str()),
        };
        let work = || {
            self.with_bucket(&input.bucket, |objects| {
                let matching = objects.range::<str, _>((start, Bound::Unbounded));
                let mut matching = matching.take_while(|(key, _)| key.starts_with(&prefix));
                let contents: Vec<_> =
                    matching.by_ref().take(page).map(|(key, body)| listed(key, body)).collect();
                Ok((contents, matching.next().is_some()))
            })
        };
        let ((contents, is_truncated), _) = self.run(Request::List, work).await?;
        let next = contents.last().and_then(|object| object.key.clone()).filter(|_| is_truncated);
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(prefix),
            max_keys: i32::try_from(asked).ok(),
            key_count: i32::try_from(contents.len()).ok(),
            is_truncated: Some(is_truncated),
            next_continuation_token: next,
            contents: Some(contents),
            ..ListObjectsV2Output::default()
        }))
    }
}

fn listed(key: &str, body: &Bytes) -> Object {
    Object {
        key: Some(key.to_owned()),
        size: i64::try_from(body.len()).ok(),
        e_tag: Some(etag(body)),
        last_modified: Some(Timestamp::from(SystemTime::now())),
        ..Object::default()
    }
}

fn etag(body: &[u8]) -> ETag {
    ETag::Strong(hex::encode(Md5::checksum(body)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
