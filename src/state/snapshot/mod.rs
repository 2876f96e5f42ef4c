//! Snapshots in the store, format version 0.
//!
//! For a [`Key`](crate::model::Key) with digest `<d>` ([`Key::digest`](crate::model::Key::digest)) the store holds, with `<e>`
//! the epoch that wrote an object as 16 hexadecimal digits and `<b>` the blake3
//! of the object's bytes as stored (64 hexadecimal digits):
//!
//! | object | content |
//! |---|---|
//! | `t/<d>/p/<e>-<b>` | a *pack*: contents of files below 1 MiB, one after the other, about 8 MiB before compression; one zstd frame |
//! | `t/<d>/c/<e>-<b>` | a *chunk*: at most 16 MiB of one larger file, as it is |
//! | `t/<d>/m/<e>-<b>` | a [`manifest::Manifest`]: JSON, one zstd frame |
//! | `t/<d>/r/<n>` | a [`manifest::Record`]: JSON; `<n>` is `u64::MAX` − number, 16 hexadecimal digits, so the newest is listed first |
//!
//! A snapshot exists when its record does. Records are only ever *created*
//! (If-None-Match), one number after the other from 1: creating one is both the
//! commit point and the fence. Record 1 stays for ever, so that numbers never
//! begin again and absence can be proven by one GET; its tree ages like any other.
//! The objects that a manifest names may be older than it: a save writes again
//! only what the newest snapshot does not have.
//!
//! Version 0 stores a hard link as a file of its own, a hole as zeros, and no
//! extended attributes. Sockets, FIFOs and devices are counted and left out.

mod commit;
mod manifest;
mod name;
mod pack;
mod retention;
mod unpack;

pub(super) use commit::{Commit, Standing, commit, damaged, newest_record, standing, verify};
pub(super) use manifest::{Item, Manifest, ManifestObject, Meta, Node, Piece, RawText, Record, decompress};
pub(super) use name::{Digest, ObjectKind, ObjectName, key_prefix, object_key};
pub(super) use pack::{Packer, Reuse, StoredObject};
pub(super) use retention::retain;
pub(super) use unpack::{Fetch, Part, plan};

/// The version this code writes, and the only one it reads.
pub(super) const VERSION: u32 = 0;
/// Files below this are packed together.
pub(super) const PACKED_FILE_BYTES: u64 = 1024 * 1024;
/// A pack is closed when it holds this much.
pub(super) const PACK_BYTES: usize = 8 * 1024 * 1024;
/// Larger files are cut into pieces of this size.
pub(super) const CHUNK_BYTES: usize = 16 * 1024 * 1024;
/// The most a manifest may be, before compression.
pub(super) const MANIFEST_BYTES: usize = 512 * 1024 * 1024;
