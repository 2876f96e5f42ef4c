//! Names of objects: made here, parsed here.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::{Epoch, Key, TenantId, WorkloadId, spec::Layout};

/// A blake3 hash; 64 lower-case hexadecimal digits in JSON and names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(in crate::state) struct Digest(pub(in crate::state) [u8; 32]);

/// The kinds of objects that a manifest or record names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::state) enum ObjectKind {
    /// Small files together.
    Pack,
    /// A piece of a large file.
    Chunk,
    /// A manifest.
    Manifest,
    /// The manifest of a mirror, whose contents are plain objects.
    Mirror,
    /// What a plain object was before a save put another in its place.
    Kept,
}

/// The name of an object below `t/<digest of the key>/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(in crate::state) struct ObjectName {
    /// What it is.
    pub(in crate::state) kind: ObjectKind,
    /// Who wrote it.
    pub(in crate::state) epoch: Epoch,
    /// The blake3 of its bytes as stored.
    pub(in crate::state) digest: Digest,
}

/// Returns the prefix of everything of one key.
pub(in crate::state) fn key_prefix(key_digest: &str) -> String {
    format!("t/{key_digest}/")
}

/// Returns the prefix of a key's plain objects.
pub(in crate::state) fn plain_prefix(key_digest: &str) -> String {
    format!("t/{key_digest}/f/")
}

/// Returns the prefix of the objects of one kind.
pub(in crate::state) fn kind_prefix(key_digest: &str, kind: ObjectKind) -> String {
    format!("t/{key_digest}/{}/", kind.letter())
}

/// Returns the prefix of a key's records.
pub(in crate::state) fn records_prefix(key_digest: &str) -> String {
    format!("t/{key_digest}/r/")
}

/// Returns the object that holds record `number`.
pub(in crate::state) fn record_key(key_digest: &str, number: u64) -> String {
    format!("t/{key_digest}/r/{:016x}", u64::MAX - number)
}

/// Returns the number in a record's key.
pub(in crate::state) fn record_number(key_digest: &str, key: &str) -> Option<u64> {
    let hex = key.strip_prefix(&records_prefix(key_digest))?;
    let number = u64::MAX - parse_hex_u64(hex)?;
    (number > 0).then_some(number)
}

/// Returns the prefix of the names of a tenant's workloads.
pub(in crate::state) fn tenant_prefix(tenant: &TenantId) -> String {
    format!("k/{}/", hex::encode(&blake3::hash(tenant.as_str().as_bytes()).as_bytes()[..16]))
}

/// Returns the object that says that a tenant may have state of a workload.
pub(in crate::state) fn workload_key(key: &Key) -> String {
    format!("{}{}", tenant_prefix(&key.tenant), hex::encode(key.workload.as_str()))
}

/// Returns the workload in a name of [`workload_key`].
pub(in crate::state) fn workload_in(tenant: &TenantId, name: &str) -> Option<WorkloadId> {
    let bytes = hex::decode(name.strip_prefix(&tenant_prefix(tenant))?).ok()?;
    WorkloadId::new(String::from_utf8(bytes).ok()?).ok()
}

/// Returns the key of an object in the store.
pub(in crate::state) fn object_key(key_digest: &str, name: &ObjectName) -> String {
    format!("t/{key_digest}/{name}")
}

fn parse_hex_u64(text: &str) -> Option<u64> {
    let is_hex = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    is_hex.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

// === impl Digest ===

impl Digest {
    /// Hashes bytes.
    pub(in crate::state) fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let mut bytes = [0; 32];
        let lower = !text.bytes().any(|byte| byte.is_ascii_uppercase());
        match hex::decode_to_slice(&text, &mut bytes) {
            Ok(()) if lower => Ok(Self(bytes)),
            _ => Err(format!(
                "{:?} is no blake3 hash in hexadecimal",
                text.chars().take(80).collect::<String>()
            )),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

// === impl ObjectKind ===

impl ObjectKind {
    /// All kinds.
    pub(in crate::state) const ALL: [Self; 5] =
        [Self::Pack, Self::Chunk, Self::Manifest, Self::Mirror, Self::Kept];

    /// Those of which each object is some snapshot's for ever.
    pub(in crate::state) const OF_SNAPSHOTS: [Self; 4] =
        [Self::Pack, Self::Chunk, Self::Manifest, Self::Mirror];

    /// Returns the letter in names.
    pub(in crate::state) fn letter(self) -> &'static str {
        match self {
            Self::Pack => "p",
            Self::Chunk => "c",
            Self::Manifest => "m",
            Self::Mirror => "i",
            Self::Kept => "o",
        }
    }

    /// Returns the kind of the manifests of a layout.
    pub(in crate::state) fn of_manifest(layout: Layout) -> Self {
        match layout {
            Layout::Snapshot => Self::Manifest,
            Layout::Mirror => Self::Mirror,
        }
    }

    /// Returns the layout of whose trees these are the manifests.
    pub(in crate::state) fn layout(self) -> Option<Layout> {
        [Layout::Snapshot, Layout::Mirror].into_iter().find(|layout| Self::of_manifest(*layout) == self)
    }
}

// === impl ObjectName ===

impl ObjectName {
    /// Names the object that `epoch` writes with these bytes.
    pub(in crate::state) fn of(kind: ObjectKind, epoch: Epoch, body: &[u8]) -> Self {
        Self { kind, epoch, digest: Digest::of(body) }
    }

    /// Parses the part of a store key behind [`key_prefix`].
    pub(in crate::state) fn parse(text: &str) -> Option<Self> {
        let (letter, rest) = text.split_once('/')?;
        let kind = ObjectKind::ALL.into_iter().find(|kind| kind.letter() == letter)?;
        let (epoch, digest) = rest.split_once('-')?;
        let epoch = Epoch(parse_hex_u64(epoch)?);
        Some(Self { kind, epoch, digest: Digest::try_from(digest.to_owned()).ok()? })
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:016x}-{}", self.kind.letter(), self.epoch.0, self.digest)
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
            .ok_or_else(|| format!("{:?} is no object name", text.chars().take(120).collect::<String>()))
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_as_they_are_made() {
        let name = ObjectName::of(ObjectKind::Chunk, Epoch(0x1f), b"x");
        assert_eq!(ObjectName::parse(&name.to_string()), Some(name));
        for bad in ["", "c/1-2", "x/000000000000001f-00", "../c", &name.to_string().to_uppercase()] {
            assert_eq!(ObjectName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_tenants_workloads_are_found_by_the_tenant_alone() {
        let tenant = TenantId::new("Acme.1").unwrap();
        let key = Key::new(tenant.clone(), WorkloadId::new("Web-2".to_owned()).unwrap());
        let name = workload_key(&key);
        assert_eq!(workload_in(&tenant, &name), Some(key.workload));
        assert_eq!(workload_in(&TenantId::new("acme.1").unwrap(), &name), None);
        assert_eq!(workload_in(&tenant, &format!("{}zz", tenant_prefix(&tenant))), None);
    }

    #[test]
    fn the_newest_record_is_listed_first() {
        let digest = "d".repeat(32);
        let keys: Vec<String> = [9, 8, 2, 1].map(|number| record_key(&digest, number)).to_vec();
        assert!(keys.is_sorted(), "{keys:?}");
        assert_eq!(record_number(&digest, &keys[0]), Some(9));
        assert_eq!(record_number(&digest, &format!("t/{digest}/r/ffffffffffffffff")), None);
        assert_eq!(record_number(&digest, &format!("t/{digest}/r/zz")), None);
    }
}
