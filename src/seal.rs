//! Secrets at rest, and state where asked for: sealed with the operator's master key.
//!
//! # Format
//! ```text
//! version (1 byte: 1) | key id (8) | nonce (24) | XChaCha20-Poly1305 ciphertext and tag
//! ```
//! The cipher's key and the key id are each derived from the master key with
//! blake3's `derive_key`. The version and the *context*, which says what the
//! secret is (see [`context`]), are authenticated with it, so that a blob that
//! was moved to another tenant or name does not open. The nonce is random; 24
//! bytes of it do not repeat in practice.

mod body;

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use base64::Engine as _;
use chacha20poly1305::{
    XChaCha20Poly1305, XNonce,
    aead::{Aead, KeyInit, Payload},
};
use zeroize::Zeroizing;

use crate::{clock::Clock, model::Secret};

pub use body::{HEAD_BYTES, StateKey, TAIL_BYTES, sealed_by};

const VERSION: u8 = 1;
const KEY_BYTES: usize = 32;
const KEY_ID_BYTES: usize = 8;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
const HEADER_BYTES: usize = 1 + KEY_ID_BYTES + NONCE_BYTES;

/// A key file larger than this is not read to its end.
const KEY_FILE_MAX_BYTES: u64 = 1_024;

/// What is allowed in a key file, for errors and documentation.
const ALLOWED: &str = "32 bytes, as they are, as 64 hexadecimal characters, or as base64 \
     (e.g. made by: openssl rand -base64 32)";

/// The key that stored secrets are sealed with, and, where asked for, stored state.
#[derive(Clone)]
pub struct MasterKey {
    cipher: XChaCha20Poly1305,
    state_root: Zeroizing<[u8; KEY_BYTES]>,
    id: [u8; KEY_ID_BYTES],
}

/// Says why a master key cannot be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("master key file {} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than its owner may read or write the file.
    #[error(
        "master key file {} has mode {mode:04o}: others than its owner can reach it; allowed is 0600 \
         or less (chmod 600)",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The content is no key.
    #[error("master key file {} holds {found}; allowed are {ALLOWED}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it holds, without any of it.
        found: String,
    },
}

/// Says why sealed bytes were not opened. None of these tells anything of the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A newer version sealed it.
    #[error("it was sealed in format {0}, and this build knows 1")]
    Version(u8),
    /// It was sealed with another master key.
    #[error("it was sealed with another master key")]
    OtherKey,
    /// It was cut, changed, or moved here from another tenant or name.
    #[error("it was changed or moved since it was sealed")]
    Damaged,
}

/// Joins the parts that say what a secret is (e.g. tenant and name) so that no
/// two lists of parts give the same context.
pub fn context(parts: &[&str]) -> Vec<u8> {
    let mut joined = Vec::new();
    for part in parts {
        joined.extend_from_slice(&(part.len() as u64).to_le_bytes());
        joined.extend_from_slice(part.as_bytes());
    }
    joined
}

// === impl MasterKey ===

impl MasterKey {
    /// Reads the key from a file: 32 bytes, raw or as hexadecimal or base64 text.
    ///
    /// # Errors
    /// [`KeyError`]; a file that group or others can reach is refused.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Read { path: path.to_owned(), source };
        // Opening a FIFO would otherwise wait for its writer.
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "is no regular file")));
        }
        let mode = metadata.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let content = content(&file).map_err(failed)?;
        match key_bytes(&content) {
            Ok(key) => Ok(Self::new(&key)),
            Err(found) => Err(KeyError::Format { path: path.to_owned(), found }),
        }
    }

    /// Takes the key's bytes.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        let cipher_key =
            Zeroizing::new(blake3::derive_key("boilerhouse 2026-01 tenant secrets XChaCha20-Poly1305", key));
        let id_key = Zeroizing::new(blake3::derive_key("boilerhouse 2026-01 tenant secrets key id", key));
        let state_root = Zeroizing::new(blake3::derive_key("boilerhouse 2026-11 tenant state", key));
        let mut id = [0; KEY_ID_BYTES];
        id.copy_from_slice(&id_key[..KEY_ID_BYTES]);
        let cipher = XChaCha20Poly1305::new_from_slice(&*cipher_key).expect("the derived key has 32 bytes");
        Self { cipher, state_root, id }
    }

    /// Seals `plain` for `context`; the result is 49 bytes longer.
    pub fn seal(&self, context: &[u8], plain: &Secret, clock: &dyn Clock) -> Vec<u8> {
        let mut sealed = vec![0; HEADER_BYTES];
        sealed[0] = VERSION;
        sealed[1..=KEY_ID_BYTES].copy_from_slice(&self.id);
        let mut nonce = [0; NONCE_BYTES];
        clock.fill_random(&mut nonce);
        sealed[1 + KEY_ID_BYTES..].copy_from_slice(&nonce);
        let payload = Payload { msg: plain.expose(), aad: &authenticated(VERSION, context) };
        let body = self
            .cipher
            .encrypt(&XNonce::from(nonce), payload)
            .expect("a secret in memory is far below the cipher's 256 GiB");
        sealed.extend_from_slice(&body);
        sealed
    }

    /// Opens what was sealed for `context`.
    ///
    /// # Errors
    /// [`OpenError`] says whether the key, the format or the bytes do not fit.
    pub fn open(&self, context: &[u8], sealed: &[u8]) -> Result<Secret, OpenError> {
        let version = *sealed.first().ok_or(OpenError::Damaged)?;
        if version != VERSION {
            return Err(OpenError::Version(version));
        }
        if sealed.len() < HEADER_BYTES + TAG_BYTES {
            return Err(OpenError::Damaged);
        }
        let (header, body) = sealed.split_at(HEADER_BYTES);
        if header[1..=KEY_ID_BYTES] != self.id {
            return Err(OpenError::OtherKey);
        }
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&header[1 + KEY_ID_BYTES..]);
        let payload = Payload { msg: body, aad: &authenticated(version, context) };
        let plain = self.cipher.decrypt(&XNonce::from(nonce), payload).map_err(|_| OpenError::Damaged)?;
        Ok(Secret::new(plain))
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey(***)")
    }
}

fn authenticated(version: u8, context: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + context.len());
    bytes.push(version);
    bytes.extend_from_slice(context);
    bytes
}

fn content(file: &File) -> io::Result<Zeroizing<Vec<u8>>> {
    // With room for all of it from the start: a vector that grew would leave a
    // copy of the key behind.
    let mut content = Zeroizing::new(Vec::with_capacity(KEY_FILE_MAX_BYTES as usize + 1));
    file.take(KEY_FILE_MAX_BYTES + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Finds the key in a file's content; else says what the content is.
fn key_bytes(content: &[u8]) -> Result<Zeroizing<[u8; KEY_BYTES]>, String> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    if content.len() == KEY_BYTES {
        key.copy_from_slice(content);
        return Ok(key);
    }
    if content.len() as u64 > KEY_FILE_MAX_BYTES {
        return Err(format!("more than {KEY_FILE_MAX_BYTES} bytes"));
    }
    let text = content.trim_ascii();
    if text.is_empty() {
        return Err("nothing".to_owned());
    }
    if hex::decode_to_slice(text, &mut *key).is_ok() {
        return Ok(key);
    }
    let engine = base64::engine::GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        base64::engine::GeneralPurposeConfig::new()
            .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
    );
    match engine.decode(text).map(Zeroizing::new) {
        Ok(bytes) if bytes.len() == KEY_BYTES => {
            key.copy_from_slice(&bytes);
            Ok(key)
        }
        Ok(bytes) => Err(format!("text of {} bytes", bytes.len())),
        Err(_) => Err(format!("{} bytes that are no hexadecimal or base64 text", content.len())),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;
    use crate::clock::{SeededClock, SystemClock};

    const KEY: [u8; 32] = *b"0123456789abcdef0123456789ABCDEF";

    fn read(content: &[u8], mode: u32) -> Result<MasterKey, KeyError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        MasterKey::read(&path)
    }

    #[test]
    fn what_was_sealed_opens_for_its_context_only() {
        let key = MasterKey::new(&KEY);
        let here = context(&["acme", "token"]);
        for plain in ["", "hunter2", &"x".repeat(100_000)] {
            let sealed = key.seal(&here, &Secret::new(plain), &SystemClock);
            assert_eq!(sealed.len(), plain.len() + 49);
            assert_eq!(key.open(&here, &sealed).unwrap().expose(), plain.as_bytes());
            for other in [context(&["acme", "token2"]), context(&["acmet", "oken"]), context(&[]), Vec::new()]
            {
                assert_eq!(key.open(&other, &sealed), Err(OpenError::Damaged));
            }
        }
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_noticed() {
        let key = MasterKey::new(&KEY);
        let sealed = key.seal(b"here", &Secret::new("hunter2"), &SystemClock);
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut changed = sealed.clone();
                changed[at] ^= 1 << bit;
                assert!(key.open(b"here", &changed).is_err(), "byte {at}, bit {bit}");
            }
            assert!(key.open(b"here", &sealed[..at]).is_err(), "cut at {at}");
        }
        let mut longer = sealed.clone();
        longer.push(0);
        assert_eq!(key.open(b"here", &longer), Err(OpenError::Damaged));
    }

    #[test]
    fn another_key_and_another_format_are_told_from_damage() {
        let sealed = MasterKey::new(&KEY).seal(b"here", &Secret::new("hunter2"), &SystemClock);
        assert_eq!(MasterKey::new(&[7; 32]).open(b"here", &sealed), Err(OpenError::OtherKey));
        let mut newer = sealed;
        newer[0] = 2;
        assert_eq!(MasterKey::new(&KEY).open(b"here", &newer), Err(OpenError::Version(2)));
    }

    #[test]
    fn nothing_of_the_secret_or_the_key_shows() {
        let key = MasterKey::new(&KEY);
        let seal = || key.seal(b"here", &Secret::new("hunter2hunter2"), &SystemClock);
        let sealed = seal();
        assert!(!sealed.windows(7).any(|window| window == b"hunter2"));
        assert!(!sealed.windows(8).any(|window| KEY.windows(8).any(|part| part == window)));
        assert_ne!(sealed, seal(), "the nonce repeats");
        assert_eq!(format!("{key:?}"), "MasterKey(***)");
    }

    /// Stored blobs must open in every later version.
    #[tokio::test]
    async fn the_format_is_what_it_was() {
        let sealed = MasterKey::new(&KEY).seal(b"here", &Secret::new("hunter2"), &SeededClock::new(1));
        assert_eq!(
            hex::encode(sealed),
            "015c8850fc88e55564c15c0289ec2d0a9167ec8e65a18debbe5e5532fbeea293f8adcb25ccf3ec6fe00aedd860293a9bb5eb477569e43de5"
        );
    }

    #[test]
    fn a_key_is_read_in_each_of_its_forms() {
        let hex = hex::encode(KEY);
        let base64 = base64::engine::general_purpose::STANDARD.encode(KEY);
        let sealed = MasterKey::new(&KEY).seal(b"here", &Secret::new("x"), &SystemClock);
        for content in [
            KEY.to_vec(),
            hex.clone().into_bytes(),
            hex.to_uppercase().into_bytes(),
            format!("{hex}\n").into_bytes(),
            base64.clone().into_bytes(),
            format!(" {base64}\r\n").into_bytes(),
            base64.trim_end_matches('=').as_bytes().to_vec(),
        ] {
            let key = read(&content, 0o600).unwrap_or_else(|error| panic!("{content:?}: {error}"));
            assert!(key.open(b"here", &sealed).is_ok(), "{content:?}");
        }
        assert!(read(&KEY, 0o400).is_ok());
    }

    #[test]
    fn what_is_no_key_is_refused_and_never_shown() {
        for (content, words) in [
            (b"".as_slice(), "holds nothing"),
            (b"\n", "holds nothing"),
            (b"swordfish swordfish", "holds 19 bytes that are no hexadecimal or base64 text"),
            (b"c3dvcmRmaXNo", "holds text of 9 bytes"),
            (&[b'a'; 63], "holds"),
            (&[b'x'; 2_000], "more than 1024 bytes"),
        ] {
            let error = read(content, 0o600).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.contains("allowed are 32 bytes"), "{error}");
            assert!(!error.contains("swordfish"), "{error}");
        }
        for mode in [0o640, 0o604, 0o644, 0o620, 0o610] {
            let error = read(&KEY, mode).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {mode:04o}")), "{error}");
        }
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(MasterKey::read(directory.path()), Err(KeyError::Read { .. })));
        assert!(matches!(MasterKey::read(&directory.path().join("none")), Err(KeyError::Read { .. })));
    }
}
