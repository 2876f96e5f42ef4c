//! Objects of tenants' state at rest: sealed in place, with a key per tenant and workload.
//!
//! # Format
//! ```text
//! "bhs" | version (1 byte: 1) | key id (8) | nonce (24) | XChaCha20-Poly1305 ciphertext | tag (16)
//! ```
//! The cipher's key is `keyed_hash(derive_key("boilerhouse 2026-11 tenant state",
//! master key), context([tenant, workload]))` of blake3, see [`super::context`].
//! The key id is the master key's, the same as in sealed secrets. Authenticated
//! with the ciphertext are the first 4 bytes and the *role*: what the object is
//! and whose. The nonce is random.

use chacha20poly1305::{
    Tag, XChaCha20Poly1305, XNonce,
    aead::{AeadInOut, KeyInit},
};
use zeroize::Zeroizing;

use super::{KEY_ID_BYTES, MasterKey, NONCE_BYTES, OpenError, TAG_BYTES, authenticated, context};
use crate::clock::Clock;

const MAGIC: &[u8; 3] = b"bhs";
const VERSION: u8 = 1;
const KEY_ID_AT: usize = MAGIC.len() + 1;
const NONCE_AT: usize = KEY_ID_AT + KEY_ID_BYTES;

/// What stands before the content of a sealed body.
pub const HEAD_BYTES: usize = NONCE_AT + NONCE_BYTES;
/// What stands behind it.
pub const TAIL_BYTES: usize = TAG_BYTES;

/// Seals and opens the state of one tenant and workload.
pub struct StateKey {
    cipher: XChaCha20Poly1305,
    id: [u8; KEY_ID_BYTES],
    shown_id: String,
}

/// Returns the id of the master key that sealed a body, in hexadecimal; `None` when
/// the body is not sealed in this format.
pub fn sealed_by(body: &[u8]) -> Option<String> {
    let is_sealed = body.starts_with(MAGIC) && body.len() >= HEAD_BYTES + TAIL_BYTES;
    is_sealed.then(|| hex::encode(&body[KEY_ID_AT..NONCE_AT]))
}

// === impl MasterKey ===

impl MasterKey {
    /// Derives the key of one tenant's state under one workload.
    pub fn state_key(&self, tenant: &str, workload: &str) -> StateKey {
        let whose = context(&[tenant, workload]);
        let key = Zeroizing::new(*blake3::keyed_hash(&self.state_root, &whose).as_bytes());
        let cipher = XChaCha20Poly1305::new_from_slice(&*key).expect("the derived key has 32 bytes");
        StateKey { cipher, id: self.id, shown_id: self.id() }
    }

    /// Returns the id that sealed bodies carry, in hexadecimal.
    pub fn id(&self) -> String {
        hex::encode(self.id)
    }
}

// === impl StateKey ===

impl StateKey {
    /// Returns the id that sealed bodies carry, in hexadecimal.
    pub fn id(&self) -> &str {
        &self.shown_id
    }

    /// Seals `content` for `role`.
    pub fn seal(&self, role: &[u8], content: &[u8], clock: &dyn Clock) -> Vec<u8> {
        let mut body = Vec::with_capacity(HEAD_BYTES + content.len() + TAIL_BYTES);
        body.extend_from_slice(MAGIC);
        body.push(VERSION);
        body.extend_from_slice(&self.id);
        let mut nonce = [0; NONCE_BYTES];
        clock.fill_random(&mut nonce);
        body.extend_from_slice(&nonce);
        body.extend_from_slice(content);
        let inner = &mut body[HEAD_BYTES..];
        let tag = self
            .cipher
            .encrypt_inout_detached(&XNonce::from(nonce), &authenticated_role(role), inner.into())
            .expect("an object is far below the cipher's 256 GiB");
        body.extend_from_slice(&tag);
        body
    }

    /// Opens a body in place; its content lies between [`HEAD_BYTES`] and
    /// [`TAIL_BYTES`] then.
    ///
    /// # Errors
    /// [`OpenError`] says whether the key, the format or the bytes do not fit; the
    /// content is worth nothing then.
    pub fn open(&self, role: &[u8], body: &mut [u8]) -> Result<(), OpenError> {
        if !body.starts_with(MAGIC) || body.len() < HEAD_BYTES + TAIL_BYTES {
            return Err(OpenError::Damaged);
        }
        if body[MAGIC.len()] != VERSION {
            return Err(OpenError::Version(body[MAGIC.len()]));
        }
        if body[KEY_ID_AT..NONCE_AT] != self.id {
            return Err(OpenError::OtherKey);
        }
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&body[NONCE_AT..HEAD_BYTES]);
        let end = body.len() - TAIL_BYTES;
        let (inner, tail) = body[HEAD_BYTES..].split_at_mut(end - HEAD_BYTES);
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(tail);
        self.cipher
            .decrypt_inout_detached(
                &XNonce::from(nonce),
                &authenticated_role(role),
                inner.into(),
                &Tag::from(tag),
            )
            .map_err(|_| OpenError::Damaged)
    }
}

impl std::fmt::Debug for StateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StateKey(***)")
    }
}

fn authenticated_role(role: &[u8]) -> Vec<u8> {
    [MAGIC.as_slice(), &authenticated(VERSION, role)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{SeededClock, SystemClock};

    fn key(byte: u8) -> StateKey {
        MasterKey::new(&[byte; 32]).state_key("acme", "work")
    }

    #[test]
    fn a_body_opens_for_its_role_and_its_tenant_only() {
        let sealed = key(1).seal(b"p", b"content", &SystemClock);
        assert_eq!(sealed.len(), 7 + HEAD_BYTES + TAIL_BYTES);
        assert_eq!(sealed_by(&sealed), Some(MasterKey::new(&[1; 32]).id()));
        let open = |key: &StateKey, role: &[u8]| {
            let mut body = sealed.clone();
            key.open(role, &mut body).map(|()| body[HEAD_BYTES..body.len() - TAIL_BYTES].to_vec())
        };
        assert_eq!(open(&key(1), b"p").unwrap(), b"content");
        assert_eq!(open(&key(1), b"c"), Err(OpenError::Damaged));
        assert_eq!(open(&key(2), b"p"), Err(OpenError::OtherKey));
        for (tenant, workload) in [("acme2", "work"), ("acme", "work2"), ("acmew", "ork")] {
            let other = MasterKey::new(&[1; 32]).state_key(tenant, workload);
            assert_eq!(open(&other, b"p"), Err(OpenError::Damaged));
        }
        assert!(!sealed.windows(7).any(|window| window == b"content"));
        assert_eq!(format!("{:?}", key(1)), "StateKey(***)");
    }

    #[test]
    fn every_changed_bit_and_every_cut_of_a_body_is_noticed() {
        let sealed = key(1).seal(b"p", b"content", &SystemClock);
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut changed = sealed.clone();
                changed[at] ^= 1 << bit;
                assert!(key(1).open(b"p", &mut changed).is_err(), "byte {at}, bit {bit}");
            }
            assert!(key(1).open(b"p", &mut sealed[..at].to_vec()).is_err(), "cut at {at}");
        }
        let mut newer = sealed.clone();
        newer[3] = 2;
        assert_eq!(key(1).open(b"p", &mut newer), Err(OpenError::Version(2)));
        assert_eq!(sealed_by(b"bhs\x01 too short"), None);
    }

    #[test]
    fn the_format_of_a_body_is_what_it_was() {
        let sealed = key(7).seal(b"p", b"content", &SeededClock::new(1));
        assert_eq!(
            hex::encode(sealed),
            "62687301b0f33356518ef2b9c15c0289ec2d0a9167ec8e65a18debbe5e5532fbeea293f8751665d9145263695a878a25a20e8cb6d8394148a1fc1b"
        );
    }
}
