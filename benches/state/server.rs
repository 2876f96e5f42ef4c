//! The S3 server of the measurements, in a process of its own: in memory, SigV4
//! checked, with everything that the tools under comparison ask for (metadata,
//! ranges, multipart uploads, delimiters, batch removal).
//!
//! It is not the server of the tests: that one knows faults, this one is quick.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{
    Body, S3, S3Request, S3Response, S3Result,
    auth::SimpleAuth,
    crypto::{Checksum as _, Md5},
    dto::{
        AbortMultipartUploadInput, AbortMultipartUploadOutput, CommonPrefix, CompleteMultipartUploadInput,
        CompleteMultipartUploadOutput, CopyObjectInput, CopyObjectOutput, CopyObjectResult, CopySource,
        CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput, DeleteObjectOutput,
        DeleteObjectsInput, DeleteObjectsOutput, DeletedObject, ETag, GetBucketLocationInput,
        GetBucketLocationOutput, GetObjectInput, GetObjectOutput, HeadBucketInput, HeadBucketOutput,
        HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, Metadata, Object,
        PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp, UploadPartInput, UploadPartOutput,
    },
    s3_error,
    service::S3ServiceBuilder,
};
use tokio::net::TcpListener;

/// The only bucket.
pub(crate) const BUCKET: &str = "bench";
/// What requests are signed with.
pub(crate) const ACCESS_KEY: &str = "AKIABENCHBENCHBE";
/// What requests are signed with.
pub(crate) const SECRET_KEY: &str = "0123bench4567bench89";

#[derive(Clone)]
struct Stored {
    body: Bytes,
    etag: String,
    modified: SystemTime,
    metadata: Option<Metadata>,
}

#[derive(Default)]
struct Shared {
    objects: Mutex<BTreeMap<String, Stored>>,
    uploads: Mutex<HashMap<String, Upload>>,
    next_upload: AtomicU64,
}

struct Upload {
    metadata: Option<Metadata>,
    parts: BTreeMap<i32, (Bytes, String)>,
}

#[derive(Clone)]
struct Server(Arc<Shared>);

/// Serves on a free port of the loopback, says where on standard output, and ends
/// when standard input does.
pub(crate) async fn serve() -> Result<(), String> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.map_err(|error| error.to_string())?;
    println!("http://{}", listener.local_addr().map_err(|error| error.to_string())?);
    let server = Server(Arc::default());
    let accepting = async {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let _ = stream.set_nodelay(true);
            let mut service = S3ServiceBuilder::new(server.clone());
            service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
            let service = service.build();
            tokio::spawn(async move {
                let builder = Builder::new(TokioExecutor::new()).http1_only();
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    };
    let parent_is_gone =
        tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    tokio::select! {
        biased;
        _ = parent_is_gone => Ok(()),
        () = accepting => Ok(()),
    }
}

// === impl Server ===

impl Server {
    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Stored>> {
        lock(&self.0.objects)
    }

    fn uploads(&self) -> MutexGuard<'_, HashMap<String, Upload>> {
        lock(&self.0.uploads)
    }

    fn object(&self, bucket: &str, key: &str) -> S3Result<Stored> {
        of_bucket(bucket)?;
        self.objects()
            .get(key)
            .cloned()
            .ok_or_else(|| s3_error!(NoSuchKey, "The specified key does not exist."))
    }

    fn insert(&self, key: String, stored: Stored, is_create: bool) -> S3Result<()> {
        let mut objects = self.objects();
        if is_create && objects.contains_key(&key) {
            return Err(s3_error!(PreconditionFailed));
        }
        objects.insert(key, stored);
        Ok(())
    }
}

fn of_bucket(bucket: &str) -> S3Result<()> {
    if bucket == BUCKET {
        Ok(())
    } else {
        Err(s3_error!(NoSuchBucket, "The specified bucket does not exist"))
    }
}

async fn read(body: Option<StreamingBlob>, content_md5: Option<&str>) -> S3Result<(Bytes, String)> {
    let mut chunks = Vec::new();
    if let Some(mut blob) = body {
        while let Some(chunk) = blob.next().await {
            chunks.push(chunk.map_err(|error| s3_error!(IncompleteBody, "{error}"))?);
        }
    }
    let mut md5 = Md5::new();
    let mut body = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
    for chunk in &chunks {
        md5.update(chunk);
        body.extend_from_slice(chunk);
    }
    let digest = md5.finalize();
    if content_md5.is_some_and(|own| own != base64::engine::general_purpose::STANDARD.encode(digest)) {
        return Err(s3_error!(BadDigest));
    }
    Ok((body.freeze(), hex::encode(digest)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn length(bytes: usize) -> Option<i64> {
    i64::try_from(bytes).ok()
}

#[async_trait::async_trait]
impl S3 for Server {
    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        of_bucket(&request.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        request: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        of_bucket(&request.input.bucket)?;
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let stored = self.object(&input.bucket, &input.key)?;
        let (body, content_range) = match input.range {
            None => (stored.body.clone(), None),
            Some(range) => {
                let all = stored.body.len();
                let range = range.check(all as u64).map_err(|_| s3_error!(InvalidRange))?;
                let said = format!("bytes {}-{}/{all}", range.start, range.end - 1);
                let at = |position| usize::try_from(position).unwrap_or(all);
                (stored.body.slice(at(range.start)..at(range.end)), Some(said))
            }
        };
        Ok(S3Response::new(GetObjectOutput {
            content_length: length(body.len()),
            content_range,
            accept_ranges: Some("bytes".to_owned()),
            e_tag: Some(ETag::Strong(stored.etag)),
            last_modified: Some(Timestamp::from(stored.modified)),
            metadata: stored.metadata,
            body: Some(StreamingBlob::from(Body::from(body))),
            ..GetObjectOutput::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let stored = self.object(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: length(stored.body.len()),
            accept_ranges: Some("bytes".to_owned()),
            e_tag: Some(ETag::Strong(stored.etag)),
            last_modified: Some(Timestamp::from(stored.modified)),
            metadata: stored.metadata,
            ..HeadObjectOutput::default()
        }))
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        of_bucket(&input.bucket)?;
        let is_create = input.if_none_match.as_ref().is_some_and(|condition| condition.is_any());
        let (body, etag) = read(input.body, input.content_md5.as_deref()).await?;
        let e_tag = Some(ETag::Strong(etag.clone()));
        let stored = Stored { body, etag, modified: SystemTime::now(), metadata: input.metadata };
        self.insert(input.key, stored, is_create)?;
        Ok(S3Response::new(PutObjectOutput { e_tag, ..PutObjectOutput::default() }))
    }

    async fn copy_object(
        &self,
        request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = request.input;
        of_bucket(&input.bucket)?;
        let CopySource::Bucket { bucket, key, .. } = &input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let mut stored = self.object(bucket, key)?;
        stored.modified = SystemTime::now();
        if input.metadata_directive.as_ref().is_some_and(|directive| directive.as_str() == "REPLACE") {
            stored.metadata = input.metadata;
        }
        let result = CopyObjectResult {
            e_tag: Some(ETag::Strong(stored.etag.clone())),
            last_modified: Some(Timestamp::from(stored.modified)),
            ..CopyObjectResult::default()
        };
        self.insert(input.key, stored, false)?;
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(result),
            ..CopyObjectOutput::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        of_bucket(&input.bucket)?;
        let id = format!("upload-{}", self.0.next_upload.fetch_add(1, Ordering::Relaxed));
        let upload = Upload { metadata: input.metadata, parts: BTreeMap::new() };
        self.uploads().insert(id.clone(), upload);
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..CreateMultipartUploadOutput::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        let (body, etag) = read(input.body, input.content_md5.as_deref()).await?;
        let mut uploads = self.uploads();
        let upload = uploads.get_mut(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        upload.parts.insert(input.part_number, (body, etag.clone()));
        let e_tag = Some(ETag::Strong(etag));
        Ok(S3Response::new(UploadPartOutput { e_tag, ..UploadPartOutput::default() }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let upload = self.uploads().remove(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        let mut body = BytesMut::with_capacity(upload.parts.values().map(|(part, _)| part.len()).sum());
        let mut md5 = Md5::new();
        for (part, etag) in upload.parts.values() {
            body.extend_from_slice(part);
            md5.update(&hex::decode(etag).unwrap_or_default());
        }
        let etag = format!("{}-{}", hex::encode(md5.finalize()), upload.parts.len());
        let is_create = input.if_none_match.as_ref().is_some_and(|condition| condition.is_any());
        let e_tag = Some(ETag::Strong(etag.clone()));
        let stored =
            Stored { body: body.freeze(), etag, modified: SystemTime::now(), metadata: upload.metadata };
        self.insert(input.key.clone(), stored, is_create)?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag,
            ..CompleteMultipartUploadOutput::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.uploads().remove(&request.input.upload_id);
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        of_bucket(&request.input.bucket)?;
        self.objects().remove(&request.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        of_bucket(&request.input.bucket)?;
        let mut deleted = Vec::new();
        for object in request.input.delete.objects {
            self.objects().remove(&object.key);
            deleted.push(DeletedObject { key: Some(object.key), ..DeletedObject::default() });
        }
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), ..DeleteObjectsOutput::default() }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        of_bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone().filter(|delimiter| !delimiter.is_empty());
        let asked = input.max_keys.and_then(|keys| usize::try_from(keys).ok()).unwrap_or(1000).min(1000);
        let after = input.continuation_token.clone().or(input.start_after.clone());
        let start = match &after {
            Some(after) if *after >= prefix => Bound::Excluded(after.as_str()),
            _ => Bound::Included(prefix.as_str()),
        };
        let objects = self.objects();
        let (mut contents, mut folders) = (Vec::new(), BTreeSet::new());
        let (mut last, mut is_truncated) = (None, false);
        let matching = objects.range::<str, _>((start, Bound::Unbounded));
        for (key, stored) in matching.take_while(|(key, _)| key.starts_with(&prefix)) {
            let folder = delimiter.as_ref().and_then(|delimiter| {
                let end = key[prefix.len()..].find(delimiter.as_str())? + prefix.len() + delimiter.len();
                Some(&key[..end])
            });
            if folder.is_some_and(|folder| folders.contains(folder)) {
                last = Some(key.clone());
                continue;
            }
            if contents.len() + folders.len() == asked {
                is_truncated = true;
                break;
            }
            match folder {
                Some(folder) => drop(folders.insert(folder.to_owned())),
                None => contents.push(listed(key, stored)),
            }
            last = Some(key.clone());
        }
        let folders: Vec<_> =
            folders.into_iter().map(|folder| CommonPrefix { prefix: Some(folder) }).collect();
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(prefix),
            delimiter,
            max_keys: i32::try_from(asked).ok(),
            key_count: i32::try_from(contents.len() + folders.len()).ok(),
            is_truncated: Some(is_truncated),
            next_continuation_token: last.filter(|_| is_truncated),
            contents: Some(contents),
            common_prefixes: Some(folders),
            ..ListObjectsV2Output::default()
        }))
    }
}

fn listed(key: &str, stored: &Stored) -> Object {
    Object {
        key: Some(key.to_owned()),
        size: length(stored.body.len()),
        e_tag: Some(ETag::Strong(stored.etag.clone())),
        last_modified: Some(Timestamp::from(stored.modified)),
        ..Object::default()
    }
}
