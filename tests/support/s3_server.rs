//! An S3 server in this process: in memory, on a loopback port, with SigV4
//! checked and faults on command.
//!
//! Knows what the store needs: buckets and their versioning, GET (also of
//! ranges), HEAD, PUT (with `Content-MD5` and `If-None-Match: *`, atomically),
//! DELETE, copies, ListObjectsV2 and multipart uploads. Speaks TLS when asked to, and
//! takes the bucket by path or by host name.

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
        AbortMultipartUploadInput, AbortMultipartUploadOutput, BucketVersioningStatus,
        CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CopyObjectInput, CopyObjectOutput,
        CopyObjectResult, CopyPartResult, CopySource, CreateBucketInput, CreateBucketOutput,
        CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput, DeleteObjectOutput, ETag,
        GetBucketVersioningInput, GetBucketVersioningOutput, GetObjectInput, GetObjectOutput,
        HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListMultipartUploadsInput,
        ListMultipartUploadsOutput, ListObjectsV2Input, ListObjectsV2Output, Metadata, MultipartUpload,
        Object, PutObjectInput, PutObjectOutput, StorageClass, StreamingBlob, Timestamp, UploadPartCopyInput,
        UploadPartCopyOutput, UploadPartInput, UploadPartOutput,
    },
    host::SingleDomain,
    s3_error,
    service::S3ServiceBuilder,
};
use tokio::net::TcpListener;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The bucket that is there from the start.
pub(crate) const BUCKET: &str = "test";
/// Below this name, a bucket is its host's first part; no name server knows it.
pub(crate) const DOMAIN: &str = "s3.test";
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
    /// The same with a `Retry-After` of so many seconds.
    SlowDownFor(u32),
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
    Copy,
    Head,
    Begin,
    Part,
    CopyPart,
    Complete,
}

/// One object.
#[derive(Clone)]
struct Stored {
    body: Bytes,
    written: SystemTime,
    metadata: Option<Metadata>,
}

type Objects = BTreeMap<String, Stored>;

/// One multipart upload that is not complete.
struct Upload {
    bucket: String,
    key: String,
    began: SystemTime,
    parts: BTreeMap<i32, Bytes>,
    metadata: Option<Metadata>,
}

struct Running {
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Shared {
    buckets: Mutex<HashMap<String, Objects>>,
    uploads: Mutex<BTreeMap<String, Upload>>,
    begun: AtomicU64,
    versioning: Mutex<Option<BucketVersioningStatus>>,
    faults: Mutex<Vec<(Request, Fault, u64)>>,
    ignores_conditions: AtomicBool,
    page: AtomicUsize,
    requests: AtomicU64,
    connections: AtomicU64,
    session_token: Mutex<Option<String>>,
    /// The keys of all GETs.
    reads: Mutex<Vec<String>>,
    /// The header of the last GET that says who signed, and what.
    authorization: Mutex<Option<String>>,
    tls: Option<TlsAcceptor>,
    /// The most bytes that one request copies; 0: any.
    copy_limit: AtomicUsize,
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
        Self::start_with(None).await
    }

    /// Starts a server that speaks TLS as 127.0.0.1; returns the certificate, in PEM, of the
    /// authority that vouches for it, and that no other machine knows.
    pub(crate) async fn start_tls() -> (Self, String) {
        let mut of_authority = rcgen::CertificateParams::new([]).expect("no names are valid names");
        of_authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        of_authority.distinguished_name.push(rcgen::DnType::CommonName, "an authority of our own");
        let key = rcgen::KeyPair::generate().expect("a key");
        let authority = rcgen::CertifiedIssuer::self_signed(of_authority, key).expect("a certificate");
        let of_server = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate = of_server.signed_by(&key, &authority).expect("a certificate");
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the usual versions")
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .expect("they belong together");
        let server = Self::start_with(Some(TlsAcceptor::from(Arc::new(config)))).await;
        (server, authority.pem())
    }

    async fn start_with(tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free loopback port");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared { page: AtomicUsize::new(1000), tls, ..Shared::default() });
        shared.buckets().insert(BUCKET.to_owned(), BTreeMap::new());
        let running = Mutex::new(Running::serve(listener, &shared));
        Self { shared, address, running }
    }

    /// Returns credentials and place, as the configuration has them.
    pub(crate) fn aws(&self) -> Aws {
        Aws { endpoint_url: Some(format!("{}://{}", self.scheme(), self.address)), ..Self::keys() }
    }

    /// Returns the credentials of every such server, also for another process.
    pub(crate) fn keys() -> Aws {
        Aws {
            access_key_id: Some(ACCESS_KEY.to_owned()),
            secret_access_key: Some(Secret::new(SECRET_KEY)),
            region: "us-east-1".to_owned(),
            ..Aws::default()
        }
    }

    /// Returns the port.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    fn scheme(&self) -> &'static str {
        if self.shared.tls.is_some() { "https" } else { "http" }
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

    /// Returns the keys of all GETs, in order.
    pub(crate) fn reads(&self) -> Vec<String> {
        lock(&self.shared.reads).clone()
    }

    /// Returns the headers that the signature of the last GET covers.
    pub(crate) fn signed_headers(&self) -> Vec<String> {
        let authorization = lock(&self.shared.authorization).clone().unwrap_or_default();
        let names = authorization.split("SignedHeaders=").nth(1).and_then(|rest| rest.split(',').next());
        names.unwrap_or_default().split(';').map(str::to_owned).collect()
    }

    /// Refuses to copy more than so many bytes in one request, as S3 refuses more than 5 GiB.
    pub(crate) fn set_copy_limit(&self, bytes: usize) {
        self.shared.copy_limit.store(bytes, Ordering::SeqCst);
    }

    /// Returns the objects of [`BUCKET`].
    pub(crate) fn objects(&self) -> BTreeMap<String, Bytes> {
        let buckets = self.shared.buckets();
        buckets[BUCKET].iter().map(|(key, stored)| (key.clone(), stored.body.clone())).collect()
    }

    /// Returns how many uploads are begun and neither complete nor aborted.
    pub(crate) fn uploads(&self) -> usize {
        lock(&self.shared.uploads).len()
    }

    /// Says what a bucket's versioning is: `Enabled`, `Suspended` or none.
    pub(crate) fn set_versioning(&self, status: Option<&'static str>) {
        *lock(&self.shared.versioning) = status.map(BucketVersioningStatus::from_static);
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
                service.set_host(SingleDomain::new(DOMAIN).expect("a domain"));
                let service = service.build();
                let tls = shared.tls.clone();
                accept_tasks.spawn(async move {
                    let builder = Builder::new(TokioExecutor::new()).http1_only();
                    let serve = async {
                        match tls {
                            None => drop(builder.serve_connection(TokioIo::new(stream), service).await),
                            Some(tls) => {
                                // One that does not trust us goes away.
                                let Ok(stream) = tls.accept(stream).await else { return };
                                drop(builder.serve_connection(TokioIo::new(stream), service).await);
                            }
                        }
                    };
                    let _ = broken.run_until_cancelled(serve).await;
                });
            }
        });
        Self { stop, tasks }
    }
}

// === impl Shared ===

impl Shared {
    fn buckets(&self) -> MutexGuard<'_, HashMap<String, Objects>> {
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
            Some(Fault::SlowDownFor(seconds)) => {
                let mut error = s3_error!(SlowDown);
                error.set_headers([(hyper::header::RETRY_AFTER, seconds.into())].into_iter().collect());
                Err(error)
            }
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

    fn with_bucket<T>(&self, bucket: &str, work: impl FnOnce(&mut Objects) -> S3Result<T>) -> S3Result<T> {
        match self.shared.buckets().get_mut(bucket) {
            Some(objects) => work(objects),
            None => Err(s3_error!(NoSuchBucket, "The specified bucket does not exist")),
        }
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<Bytes> {
        self.stored(bucket, key).map(|stored| stored.body)
    }

    fn stored(&self, bucket: &str, key: &str) -> S3Result<Stored> {
        self.with_bucket(bucket, |objects| {
            let stored = objects.get(key).cloned();
            stored.ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
        })
    }

    /// Checks what one request may copy.
    fn check_copy(&self, bytes: usize) -> S3Result<()> {
        match self.shared.copy_limit.load(Ordering::SeqCst) {
            limit if limit > 0 && bytes > limit => Err(s3_error!(
                InvalidRequest,
                "The specified copy source is larger than the maximum allowable size for a copy source"
            )),
            _ => Ok(()),
        }
    }

    /// Runs `work` on an upload of this key.
    fn with_upload<T>(
        &self,
        (bucket, key, id): (&str, &str, &str),
        work: impl FnOnce(&mut Upload) -> S3Result<T>,
    ) -> S3Result<T> {
        match lock(&self.shared.uploads).get_mut(id) {
            Some(upload) if upload.bucket == bucket && upload.key == key => work(upload),
            _ => Err(s3_error!(NoSuchUpload, "The specified upload does not exist")),
        }
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
        let text = |name: &str| headers.get(name).and_then(|text| text.to_str().ok()).map(str::to_owned);
        lock(&self.shared.reads).push(input.key.clone());
        *lock(&self.shared.authorization) = text("authorization");
        let work = || self.object(&input.bucket, &input.key);
        let (whole, fault) = self.run(Request::Get, work).await?;
        let range = match &input.range {
            Some(range) => Some(range.check(whole.len() as u64).map_err(|_| s3_error!(InvalidRange))?),
            None => None,
        };
        let body = match &range {
            Some(range) => whole.slice(range.start as usize..range.end as usize),
            None => whole.clone(),
        };
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
            content_range: range
                .map(|range| format!("bytes {}-{}/{}", range.start, range.end - 1, whole.len())),
            e_tag: Some(etag(&whole)),
            last_modified: Some(Timestamp::from(SystemTime::now())),
            body: Some(blob),
            ..GetObjectOutput::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let S3Request { input, .. } = request;
        let work = || self.stored(&input.bucket, &input.key);
        let (stored, _) = self.run(Request::Head, work).await?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: i64::try_from(stored.body.len()).ok(),
            e_tag: Some(etag(&stored.body)),
            metadata: stored.metadata,
            ..HeadObjectOutput::default()
        }))
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let S3Request { input, .. } = request;
        let body = read(input.body, input.content_md5.as_deref()).await?;
        let is_create = match &input.if_none_match {
            None => false,
            Some(condition) if condition.is_any() => !self.shared.ignores_conditions.load(Ordering::SeqCst),
            Some(_) => return Err(s3_error!(NotImplemented)),
        };
        let key = input.key;
        let e_tag = Some(etag(&body));
        let work = || {
            self.with_bucket(&input.bucket, |objects| {
                if is_create && objects.contains_key(&key) {
                    return Err(s3_error!(PreconditionFailed));
                }
                objects.insert(key, Stored::new(body, None));
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
                    matching.by_ref().take(page).map(|(key, stored)| listed(key, stored)).collect();
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

    async fn copy_object(
        &self,
        request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let S3Request { input, .. } = request;
        let CopySource::Bucket { bucket, key: from, .. } = &input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let work = || {
            let Stored { body, metadata, .. } = self.stored(bucket, from)?;
            self.check_copy(body.len())?;
            let e_tag = etag(&body);
            self.with_bucket(&input.bucket, |objects| {
                objects.insert(input.key.clone(), Stored::new(body, metadata));
                Ok(e_tag)
            })
        };
        let (e_tag, _) = self.run(Request::Copy, work).await?;
        let last_modified = Some(Timestamp::from(SystemTime::now()));
        let result = CopyObjectResult { e_tag: Some(e_tag), last_modified, ..CopyObjectResult::default() };
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(result),
            ..CopyObjectOutput::default()
        }))
    }

    async fn get_bucket_versioning(
        &self,
        request: S3Request<GetBucketVersioningInput>,
    ) -> S3Result<S3Response<GetBucketVersioningOutput>> {
        self.with_bucket(&request.input.bucket, |_| Ok(()))?;
        let status = lock(&self.shared.versioning).clone();
        Ok(S3Response::new(GetBucketVersioningOutput { status, ..GetBucketVersioningOutput::default() }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let CreateMultipartUploadInput { bucket, key, metadata, .. } = request.input;
        let work = || {
            self.with_bucket(&bucket, |_| Ok(()))?;
            let id = format!("upload-{}", self.shared.begun.fetch_add(1, Ordering::SeqCst));
            let (bucket, key, began) = (bucket.clone(), key.clone(), SystemTime::now());
            let upload = Upload { bucket, key, began, parts: BTreeMap::new(), metadata };
            lock(&self.shared.uploads).insert(id.clone(), upload);
            Ok(id)
        };
        let (id, _) = self.run(Request::Begin, work).await?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(bucket),
            key: Some(key),
            upload_id: Some(id),
            ..CreateMultipartUploadOutput::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let S3Request { input, .. } = request;
        let body = read(input.body, input.content_md5.as_deref()).await?;
        let e_tag = Some(etag(&body));
        let work = || {
            self.with_upload((&input.bucket, &input.key, &input.upload_id), |upload| {
                upload.parts.insert(input.part_number, body);
                Ok(())
            })
        };
        self.run(Request::Part, work).await?;
        Ok(S3Response::new(UploadPartOutput { e_tag, ..UploadPartOutput::default() }))
    }

    async fn upload_part_copy(
        &self,
        request: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        let S3Request { input, .. } = request;
        let CopySource::Bucket { bucket, key: from, .. } = &input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let range = input.copy_source_range.as_deref().and_then(|range| range.strip_prefix("bytes="));
        let range = range.and_then(|range| range.split_once('-'));
        let range = range.and_then(|(start, end)| Some((start.parse().ok()?, end.parse::<usize>().ok()?)));
        let Some((start, end)) = range else { return Err(s3_error!(InvalidArgument)) };
        let work = || {
            let whole = self.object(bucket, from)?;
            let is_wanted = input.copy_source_if_match.as_ref().is_none_or(|wanted| {
                wanted.as_etag().is_some_and(|wanted| wanted.value() == etag(&whole).value())
            });
            if !is_wanted {
                return Err(s3_error!(PreconditionFailed));
            }
            if start > end || end >= whole.len() {
                return Err(s3_error!(InvalidRange));
            }
            let part = whole.slice(start..=end);
            self.check_copy(part.len())?;
            let e_tag = etag(&part);
            self.with_upload((&input.bucket, &input.key, &input.upload_id), |upload| {
                upload.parts.insert(input.part_number, part);
                Ok(e_tag)
            })
        };
        let (e_tag, _) = self.run(Request::CopyPart, work).await?;
        let last_modified = Some(Timestamp::from(SystemTime::now()));
        let result = CopyPartResult { e_tag: Some(e_tag), last_modified, ..CopyPartResult::default() };
        Ok(S3Response::new(UploadPartCopyOutput {
            copy_part_result: Some(result),
            ..UploadPartCopyOutput::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        const MIN_PART_BYTES: usize = 5 << 20;
        let CompleteMultipartUploadInput { bucket, key, upload_id, multipart_upload, .. } = request.input;
        let named = multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let work = || {
            let (body, metadata) = self.with_upload((&bucket, &key, &upload_id), |upload| {
                let mut body = Vec::new();
                for (n, part) in named.iter().enumerate() {
                    let number = part.part_number.ok_or_else(|| s3_error!(MalformedXML))?;
                    let found = upload.parts.get(&number).ok_or_else(|| s3_error!(InvalidPart))?;
                    if part.e_tag != Some(etag(found)) {
                        return Err(s3_error!(InvalidPart));
                    }
                    if n + 1 < named.len() && found.len() < MIN_PART_BYTES {
                        return Err(s3_error!(EntityTooSmall));
                    }
                    body.extend_from_slice(found);
                }
                Ok((Bytes::from(body), upload.metadata.clone()))
            })?;
            lock(&self.shared.uploads).remove(&upload_id);
            let e_tag = etag(&body);
            self.with_bucket(&bucket, |objects| {
                objects.insert(key.clone(), Stored::new(body, metadata));
                Ok(e_tag)
            })
        };
        let (e_tag, _) = self.run(Request::Complete, work).await?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(bucket),
            key: Some(key),
            e_tag: Some(e_tag),
            ..CompleteMultipartUploadOutput::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let AbortMultipartUploadInput { bucket, key, upload_id, .. } = request.input;
        self.with_upload((&bucket, &key, &upload_id), |_| Ok(()))?;
        lock(&self.shared.uploads).remove(&upload_id);
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let S3Request { input, .. } = request;
        let prefix = input.prefix.clone().unwrap_or_default();
        let page = self.shared.page.load(Ordering::SeqCst);
        let after = input.key_marker.clone().zip(input.upload_id_marker.clone());
        let uploads = lock(&self.shared.uploads);
        let ours = uploads.iter().filter(|(_, upload)| upload.bucket == input.bucket);
        let ours = ours.filter(|(_, upload)| upload.key.starts_with(&prefix));
        let mut ours: Vec<_> = ours.map(|(id, upload)| ((upload.key.clone(), id.clone()), upload)).collect();
        ours.retain(|(place, _)| after.as_ref().is_none_or(|after| place > after));
        ours.sort_by(|(a, _), (b, _)| a.cmp(b));
        let is_truncated = ours.len() > page;
        ours.truncate(page);
        let last = ours.last().map(|(place, _)| place.clone()).filter(|_| is_truncated);
        let found = ours.into_iter().map(|((key, id), upload)| MultipartUpload {
            key: Some(key),
            upload_id: Some(id),
            initiated: Some(Timestamp::from(upload.began)),
            storage_class: Some(StorageClass::from_static(StorageClass::STANDARD)),
            ..MultipartUpload::default()
        });
        let (next_key_marker, next_upload_id_marker) = last.unzip();
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            is_truncated: Some(is_truncated),
            next_key_marker,
            next_upload_id_marker,
            uploads: Some(found.collect()),
            ..ListMultipartUploadsOutput::default()
        }))
    }
}

// === impl Stored ===

impl Stored {
    fn new(body: Bytes, metadata: Option<Metadata>) -> Self {
        Self { body, written: SystemTime::now(), metadata }
    }
}

/// Reads a body and checks its digest.
async fn read(blob: Option<StreamingBlob>, md5: Option<&str>) -> S3Result<Bytes> {
    let mut body = Vec::new();
    if let Some(mut blob) = blob {
        while let Some(chunk) = blob.next().await {
            body.extend_from_slice(&chunk.map_err(|error| s3_error!(IncompleteBody, "{error}"))?);
        }
    }
    if let Some(expected) = md5
        && expected != base64::engine::general_purpose::STANDARD.encode(Md5::checksum(&body))
    {
        return Err(s3_error!(BadDigest));
    }
    Ok(body.into())
}

fn listed(key: &str, stored: &Stored) -> Object {
    Object {
        key: Some(key.to_owned()),
        size: i64::try_from(stored.body.len()).ok(),
        e_tag: Some(etag(&stored.body)),
        last_modified: Some(Timestamp::from(stored.written)),
        ..Object::default()
    }
}

fn etag(body: &[u8]) -> ETag {
    ETag::Strong(hex::encode(Md5::checksum(body)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
