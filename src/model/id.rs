//! Validated identifiers.
//!
//! Tenant and workload ids match `^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`. They are
//! never used raw in a path or an object key; see [`Key::digest`].

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The pattern that tenant and workload ids match.
pub const ID_PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$";

/// Says why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {given:?} does not match {ID_PATTERN}")]
pub struct InvalidId {
    /// `tenant`, `workload` or `slot`.
    pub kind: &'static str,
    /// What was given, cut to 80 characters.
    pub given: String,
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Parses an id.
            ///
            /// # Errors
            /// [`InvalidId`] when it does not match [`ID_PATTERN`].
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                if is_id(&text) {
                    Ok(Self(text))
                } else {
                    Err(InvalidId { kind: $kind, given: text.chars().take(80).collect() })
                }
            }

            /// Returns the id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

id_type!(
    /// Names the tenant whose state it is.
    TenantId,
    "tenant"
);
id_type!(
    /// Names a kind of container.
    WorkloadId,
    "workload"
);
id_type!(
    /// Names a slot; made by the pool, unique for ever within an installation.
    SlotId,
    "slot"
);

/// The number of a claim of one (tenant, workload), rising for ever; the first is 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// The hash of a spec: selects which slots fit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpecHash(pub String);

/// The hash of a spec with its scripts, pinned by each claim.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub String);

/// The engine's own id of a container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ContainerId(pub String);

/// A numeric user and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// What state belongs to: a tenant in a workload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// Whose state it is.
    pub tenant: TenantId,
    /// The workload it is state of.
    pub workload: WorkloadId,
}

fn is_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

// === impl Epoch ===

impl Epoch {
    /// Returns the epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl SpecHash, Revision, ContainerId ===

impl fmt::Display for SpecHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Key ===

impl Key {
    /// Joins a tenant and a workload.
    pub fn new(tenant: TenantId, workload: WorkloadId) -> Self {
        Self { tenant, workload }
    }

    /// Returns 32 hexadecimal characters that stand for this key in paths and
    /// object names: the first half of blake3 over both ids, each ended by a
    /// zero byte (which no id contains).
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [self.tenant.as_str(), self.workload.as_str()] {
            hasher.update(part.as_bytes());
            hasher.update(&[0]);
        }
        hex::encode(&hasher.finalize().as_bytes()[..16])
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tenant, self.workload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_checked() {
        for good in ["a", "A9", "acme.prod_1-x", &"x".repeat(63)] {
            assert!(TenantId::new(good).is_ok(), "{good} is an id");
        }
        for bad in ["", ".", "..", "-a", "_a", "a/b", "a b", "ä", "a\n", "a\0", &"x".repeat(64)] {
            assert!(TenantId::new(bad).is_err(), "{bad:?} is no id");
        }
    }

    #[test]
    fn keys_do_not_run_together() {
        let key =
            |t: &str, w: &str| Key::new(TenantId::new(t).unwrap(), WorkloadId::new(w).unwrap()).digest();
        assert_ne!(key("ab", "c"), key("a", "bc"));
        assert_eq!(key("ab", "c").len(), 32);
    }
}
