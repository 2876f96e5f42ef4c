//! Between what objects hold and what the store has of them: encoding and sealing.

use std::{fmt, io, sync::Arc};

use bytes::Bytes;

use crate::{
    clock::SharedClock,
    model::{Epoch, Key},
    seal::{self, HEAD_BYTES, MasterKey, OpenError, StateKey, TAIL_BYTES},
    state::Error,
    store::MAX_OBJECT_BYTES,
};

use super::{
    StoredObject,
    manifest::{Encoding, Manifest, ManifestObject, compress, decompress},
    name::{Digest, ObjectKind, ObjectName},
};

/// A sample of this much, from four places, says whether content is worth compressing.
const SAMPLE_BYTES: usize = 64 * 1024;

/// Whether state is sealed, and with what.
#[derive(Clone)]
pub struct Encryption {
    master: Option<Arc<MasterKey>>,
    seals: bool,
    clock: SharedClock,
}

/// Encodes and seals the objects of one key, and opens them again.
#[derive(Debug, Clone)]
pub(in crate::state) struct ObjectCodec {
    inner: Arc<Inner>,
}

struct Inner {
    key: Key,
    key_digest: String,
    state_key: Option<StateKey>,
    seals: bool,
    clock: SharedClock,
}

/// Says why an object cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::state) enum CodecError {
    /// It is not what its name or manifest says.
    #[error("{0}")]
    Damaged(String),
    /// It is sealed with a key that is not here, or not readable by this build.
    #[error("{0}")]
    Sealed(String),
}

impl Error {
    /// Names why an object of this key cannot be had.
    pub(in crate::state) fn of_codec(key: &Key, error: CodecError) -> Self {
        match error {
            CodecError::Damaged(reason) => Self::Damaged { key: key.clone(), reason },
            CodecError::Sealed(reason) => Self::Sealed { key: key.clone(), reason },
        }
    }
}

// === impl Encryption ===

impl Encryption {
    /// Takes the master key, if there is one; with `seals`, new objects are sealed.
    /// Objects that are sealed already are opened in any case.
    ///
    /// # Errors
    /// Without a key nothing can be sealed.
    pub fn new(
        master: Option<Arc<MasterKey>>,
        seals: bool,
        clock: SharedClock,
    ) -> Result<Self, &'static str> {
        if seals && master.is_none() {
            return Err("state cannot be sealed without a master key");
        }
        Ok(Self { master, seals, clock })
    }

    /// Neither seals nor opens.
    pub fn off(clock: SharedClock) -> Self {
        Self { master: None, seals: false, clock }
    }

    /// Derives what the objects of `key` are sealed with.
    pub(in crate::state) fn codec(&self, key: &Key) -> ObjectCodec {
        let master = self.master.as_ref();
        let state_key = master.map(|master| master.state_key(key.tenant.as_str(), key.workload.as_str()));
        ObjectCodec {
            inner: Arc::new(Inner {
                key: key.clone(),
                key_digest: key.digest(),
                state_key,
                seals: self.seals,
                clock: Arc::clone(&self.clock),
            }),
        }
    }
}

impl fmt::Debug for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encryption")
            .field("master", &self.master)
            .field("seals", &self.seals)
            .finish_non_exhaustive()
    }
}

// === impl ObjectCodec ===

impl ObjectCodec {
    /// Returns whether an object of an older snapshot is stored as this codec would
    /// store it, so that a new one may refer to it.
    pub(in crate::state) fn may_reuse(&self, object: &ManifestObject) -> bool {
        object.sealed == self.inner.seals
    }

    /// Returns whether new objects are sealed.
    pub(in crate::state) fn seals(&self) -> bool {
        self.inner.seals
    }

    /// Makes an object of content whose digest is `content_digest`.
    ///
    /// # Errors
    /// Only when memory is short.
    pub(in crate::state) fn encode(
        &self,
        kind: ObjectKind,
        epoch: Epoch,
        content: Vec<u8>,
        content_digest: Digest,
    ) -> io::Result<(ManifestObject, StoredObject)> {
        let bytes = content.len() as u64;
        let mut encoding = Encoding::Plain;
        let mut body = content;
        if is_compressible(&body)? {
            let compressed = compress(&body)?;
            if compressed.len() < body.len() {
                (encoding, body) = (Encoding::Zstd, compressed);
            }
        }
        let is_as_content = !self.inner.seals && encoding == Encoding::Plain;
        let stored = if is_as_content {
            StoredObject { name: ObjectName { kind, epoch, digest: content_digest }, body: Bytes::from(body) }
        } else {
            self.store(kind, epoch, body)
        };
        let object = ManifestObject {
            name: stored.name,
            bytes,
            content: (kind == ObjectKind::Chunk && !is_as_content).then_some(content_digest),
            encoding: None,
            sealed: self.inner.seals,
        };
        let is_default = object.encoding() == encoding;
        Ok((ManifestObject { encoding: (!is_default).then_some(encoding), ..object }, stored))
    }

    /// Makes an object of a manifest.
    ///
    /// # Errors
    /// When it is larger than allowed.
    pub(in crate::state) fn encode_manifest(&self, manifest: &Manifest) -> Result<StoredObject, String> {
        let stored = self.store(ObjectKind::of_manifest(manifest.layout), manifest.epoch, manifest.encode()?);
        let bytes = stored.body.len();
        if bytes > MAX_OBJECT_BYTES {
            let most = MAX_OBJECT_BYTES;
            return Err(format!("the manifest has {bytes} bytes compressed, at most {most} are allowed"));
        }
        Ok(stored)
    }

    /// Verifies an object as the store has it and answers what it holds, exactly
    /// [`ManifestObject::bytes`] of it.
    ///
    /// # Errors
    /// [`CodecError`] names the object.
    pub(in crate::state) fn decode(&self, object: &ManifestObject, body: Bytes) -> Result<Bytes, CodecError> {
        let name = &object.name;
        let damaged = |problem: String| CodecError::Damaged(format!("{name} {problem}"));
        let most = object.stored_bytes();
        if body.len() as u64 > most {
            return Err(damaged(format!("has more bytes in the store than the {most} that it may have")));
        }
        let body = self.open(name, body, object.sealed)?;
        let content = match object.encoding() {
            Encoding::Plain => body,
            Encoding::Zstd => {
                let most = usize::try_from(object.bytes).unwrap_or(usize::MAX);
                let content = decompress(&body, most, most)
                    .map_err(|error| damaged(format!("cannot be read: {error}")))?;
                Bytes::from(content)
            }
        };
        if content.len() as u64 != object.bytes {
            return Err(damaged(format!("has {} bytes", content.len())));
        }
        if object.content.is_some_and(|digest| digest != Digest::of(&content)) {
            return Err(damaged("has another content".into()));
        }
        Ok(content)
    }

    /// Verifies and reads a manifest as the store has it.
    ///
    /// # Errors
    /// [`CodecError`] names the manifest.
    pub(in crate::state) fn decode_manifest(
        &self,
        name: &ObjectName,
        body: Bytes,
    ) -> Result<Manifest, CodecError> {
        // A plain manifest begins as a zstd frame does, never as a sealed body.
        let is_sealed = seal::sealed_by(&body).is_some();
        let body = self.open(name, body, is_sealed)?;
        let manifest = Manifest::decode(&body, &self.inner.key)
            .map_err(|problem| CodecError::Damaged(format!("{name}: {problem}")))?;
        if name.kind.layout() != Some(manifest.layout) {
            return Err(CodecError::Damaged(format!("{name} has another layout than its name says")));
        }
        Ok(manifest)
    }

    fn store(&self, kind: ObjectKind, epoch: Epoch, body: Vec<u8>) -> StoredObject {
        let body = match self.inner.state_key.as_ref().filter(|_| self.inner.seals) {
            Some(key) => key.seal(&self.role(kind), &body, self.inner.clock.as_ref()),
            None => body,
        };
        StoredObject { name: ObjectName::of(kind, epoch, &body), body: Bytes::from(body) }
    }

    fn open(&self, name: &ObjectName, body: Bytes, is_sealed: bool) -> Result<Bytes, CodecError> {
        if Digest::of(&body) != name.digest {
            return Err(CodecError::Damaged(format!("{name} does not have the bytes of its name")));
        }
        if !is_sealed {
            return Ok(body);
        }
        let other = seal::sealed_by(&body);
        let by = || other.as_deref().unwrap_or("an unknown id").to_owned();
        let Some(key) = &self.inner.state_key else {
            return Err(CodecError::Sealed(format!(
                "{name} is sealed with master key {}, and there is none here: set BOILERHOUSE_MASTER_KEY_FILE",
                by()
            )));
        };
        // No copy when nobody else holds it.
        let mut body = Vec::from(body);
        match key.open(&self.role(name.kind), &mut body) {
            Ok(()) => {
                let end = body.len() - TAIL_BYTES;
                Ok(Bytes::from(body).slice(HEAD_BYTES..end))
            }
            Err(OpenError::OtherKey) => Err(CodecError::Sealed(format!(
                "{name} is sealed with master key {}, the one here is {}",
                by(),
                key.id()
            ))),
            Err(error @ OpenError::Version(_)) => Err(CodecError::Sealed(format!("{name}: {error}"))),
            Err(OpenError::Damaged) => {
                Err(CodecError::Damaged(format!("{name} was changed or moved since it was sealed")))
            }
        }
    }

    /// What an object is and whose.
    fn role(&self, kind: ObjectKind) -> Vec<u8> {
        seal::context(&[kind.letter(), &self.inner.key_digest])
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("key", &self.key).field("seals", &self.seals).finish_non_exhaustive()
    }
}

/// Decides by a sample whether compressing saves at least an eighth.
fn is_compressible(content: &[u8]) -> io::Result<bool> {
    let part = SAMPLE_BYTES / 4;
    let sample = if content.len() <= SAMPLE_BYTES {
        content.to_vec()
    } else {
        let last = content.len() - part;
        (0..4).flat_map(|n| content[last / 3 * n..].iter().take(part)).copied().collect()
    };
    Ok(compress(&sample)?.len() < sample.len() - sample.len() / 8)
}

#[cfg(test)]
mod tests {
    use super::{
        super::manifest::{RawText, Xattr},
        *,
    };
    use crate::{
        clock::SeededClock,
        model::{TenantId, WorkloadId},
    };

    fn codec(master: Option<u8>, seals: bool, tenant: &str) -> ObjectCodec {
        let master = master.map(|byte| Arc::new(MasterKey::new(&[byte; 32])));
        let key = Key::new(TenantId::new(tenant).unwrap(), WorkloadId::new("w").unwrap());
        Encryption::new(master, seals, Arc::new(SeededClock::new(1))).unwrap().codec(&key)
    }

    fn random(bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        content
    }

    #[test]
    fn objects_come_back_whatever_they_hold_and_however_they_are_stored() {
        for seals in [false, true] {
            let codec = codec(Some(1), seals, "t");
            for kind in [ObjectKind::Pack, ObjectKind::Chunk] {
                let contents = [
                    (vec![7; 300_000], true),
                    (random(300_000), false),
                    (random(1), false),
                    (vec![0; 100], true),
                ];
                for (content, is_uniform) in contents {
                    let digest = Digest::of(&content);
                    let (object, stored) = codec.encode(kind, Epoch(3), content.clone(), digest).unwrap();
                    assert_eq!(stored.name, object.name);
                    assert_eq!(stored.name.digest, Digest::of(&stored.body));
                    assert_eq!(object.encoding() == Encoding::Zstd, is_uniform, "{} bytes", content.len());
                    assert!(!is_uniform || stored.body.len() < content.len(), "{}", stored.body.len());
                    if seals {
                        assert_ne!(stored.name.digest, digest, "a sealed name tells the content");
                    }
                    assert_eq!(codec.decode(&object, stored.body).unwrap(), content);
                }
            }
        }
    }

    #[test]
    fn a_missing_or_another_key_is_told_from_damage() {
        let (object, stored) = codec(Some(1), true, "t")
            .encode(ObjectKind::Chunk, Epoch(3), vec![1; 10], Digest::of(&[1; 10]))
            .unwrap();
        let open = |codec: ObjectCodec, body: Bytes| codec.decode(&object, body).unwrap_err();
        let missing = open(codec(None, false, "t"), stored.body.clone());
        assert!(matches!(&missing, CodecError::Sealed(why) if why.contains("BOILERHOUSE_MASTER_KEY_FILE")));
        let other = open(codec(Some(2), false, "t"), stored.body.clone());
        let CodecError::Sealed(why) = other else { panic!("{other:?}") };
        for byte in [1, 2] {
            assert!(why.contains(&MasterKey::new(&[byte; 32]).id()), "{why}");
        }
        let moved = open(codec(Some(1), true, "u"), stored.body.clone());
        assert!(matches!(moved, CodecError::Damaged(_)), "{moved:?}");
        let cut = open(codec(Some(1), true, "t"), stored.body.slice(..20));
        assert!(matches!(cut, CodecError::Damaged(_)), "{cut:?}");
    }

    #[test]
    fn what_begins_like_a_sealed_body_is_a_tenants_content_all_the_same() {
        let codec = codec(None, false, "t");
        let content = [b"bhs\x01".as_slice(), &random(1_000)].concat();
        let digest = Digest::of(&content);
        let (object, stored) = codec.encode(ObjectKind::Chunk, Epoch(1), content.clone(), digest).unwrap();
        assert_eq!(codec.decode(&object, stored.body).unwrap(), content);
    }

    #[test]
    fn sealing_needs_a_key() {
        assert!(Encryption::new(None, true, Arc::new(SeededClock::new(1))).is_err());
    }

    #[test]
    fn a_manifest_that_the_store_would_not_take_is_a_limit() {
        let noise = random(MAX_OBJECT_BYTES);
        let mut manifest = super::super::manifest::tests::manifest_of(Vec::new(), Vec::new());
        let value = |bytes: &[u8]| Xattr(RawText(b"user.x".to_vec()), RawText(bytes.to_vec()));
        manifest.root_xattrs = vec![value(&noise)];
        let error = codec(None, false, "t").encode_manifest(&manifest).unwrap_err();
        assert!(error.contains("at most 67108864 are allowed"), "{error}");
        manifest.root_xattrs = vec![value(&noise[..1_000_000])];
        assert!(codec(None, false, "t").encode_manifest(&manifest).is_ok());
    }
}
