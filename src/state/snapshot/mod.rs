//! Snapshots in the store: the format, written down so that another program can read it.
//!
//! # Objects
//! For a [`Key`](crate::model::Key) with digest `<d>` (the first 16 bytes of the blake3 of
//! the tenant's id, a zero byte, the workload's id and a zero byte, in hexadecimal) the
//! store holds, with `<e>` the epoch that wrote an object as 16 lower-case hexadecimal
//! digits and `<b>` the blake3 of the object's bytes as stored (64 of them):
//!
//! | object | content |
//! |---|---|
//! | `t/<d>/p/<e>-<b>` | a *pack*: the data of files with less than 1 MiB of it, one after the other, at most 9 MiB |
//! | `t/<d>/c/<e>-<b>` | a *chunk*: at most 16 MiB of the data of one larger file |
//! | `t/<d>/m/<e>-<b>` | a [`manifest::Manifest`]: JSON of at most 512 MiB, one zstd frame |
//! | `t/<d>/i/<e>-<b>` | the manifest of a *mirror*, as any other but for `"layout": "mirror"` |
//! | `t/<d>/f/<name>` | a file of the newest mirror as a plain object; see `state::mirror` for its name |
//! | `t/<d>/o/<e>-<b>` | what a plain object was before a save put another in its place; `<b>` is any |
//! | `k/<t>/<w>` | nothing: tenant `<t>` (the first 16 bytes of the blake3 of its id, in hexadecimal) may have state of workload `<w>` (its id, in hexadecimal); so that everything of a tenant is found, also of workloads that are gone |
//! | `t/<d>/r/<n>` | a [`record::Record`]: JSON; `<n>` is `u64::MAX` − number, 16 hexadecimal digits, so the newest is listed first |
//!
//! A snapshot exists when its record does. Records are only ever *created*
//! (If-None-Match), one number after the other from 1: creating one is both the
//! commit point and the fence. Record 1 stays for ever, so that numbers never
//! begin again and absence can be proven by one GET; its tree ages like any other.
//! The objects that a manifest names may be older than it: a save writes again
//! only what the newest snapshot does not have.
//!
//! # Record, version 1
//! ```json
//! {"version": 1, "number": 3, "tenant": "acme", "workload": "work", "epoch": 7,
//!  "nonce": "…", "created_ms": 1795000000000, "kind": "snapshot",
//!  "server": "host-a", "term": 2, "holder": {"server": "host-a", "epoch": 7},
//!  "tree": {"snapshot": 3, "epoch": 7, "nonce": "…", "manifest": "m/<e>-<b>",
//!           "created_ms": 1795000000000, "files": 4, "bytes": 70005, "skipped": 0,
//!           "failed_claim": true, "restored_from": 1}}
//! ```
//! - `kind` is `open` (a claim began), `snapshot` (a tree was saved), `restore` (an old
//!   tree is the newest again) or `close` (a claim ended and left nothing to save).
//! - `tree` is the newest tree after this record, whoever wrote it: a reader needs the
//!   newest record and what it names, nothing else. Its `snapshot` is the number of the
//!   record that made it the newest: this one's of `snapshot` and `restore`, an earlier
//!   one's of `open` and `close`, which carry it on. Left out, there is no tree yet.
//! - `server` wrote it, under the `term` under which it owned the store; `holder` is whose
//!   claim is open. `failed_claim` (false when left out) marks a tree that a failed claim
//!   left, `restored_from` the snapshot that a `restore` brought back. All of these may be
//!   left out. Times are milliseconds since the Unix epoch.
//!
//! Records and manifests say their version, sealed bodies have one of their own.
//! Packs and chunks have no structure: all that describes them, and with it the
//! version, is in the manifest that names them.
//!
//! # Manifest, version 1
//! ```json
//! {"version": 1, "tenant": "acme", "workload": "work", "epoch": 7,
//!  "run_as": {"uid": 1000, "gid": 1000},
//!  "objects": [{"name": "p/<e>-<b>", "bytes": 5},
//!              {"name": "c/<e>-<b>", "bytes": 16777216, "content": "<blake3>", "encoding": "zstd", "sealed": true}],
//!  "root": {"mode": 448, "uid": 1000, "gid": 1000, "modified": [1795000000, 5]},
//!  "root_xattrs": [["user.x", "text"]],
//!  "items": [
//!   {"path": "dir", "meta": {…}, "node": "directory"},
//!   {"path": "dir/file", "meta": {…}, "xattrs": [["user.y", {"base64": "/w=="}]],
//!    "node": {"file": {"bytes": 70005, "digest": "<blake3>", "pieces": [[0, 0, 5]], "holes": [[5, 70000]]}}},
//!   {"path": "link", "meta": {…}, "node": {"symlink": {"target": "../any/bytes"}}},
//!   {"path": "same", "meta": {…}, "node": {"hard_link": {"to": "dir/file"}}}]}
//! ```
//! - Paths, targets and attributes are bytes: a JSON string where they are UTF-8,
//!   `{"base64": "…"}` (standard alphabet, padded) where not. Items are sorted by the
//!   bytes of their paths, each after the directory it is in; names are joined by
//!   single slashes and are never empty, `.` or `..`.
//! - `mode` has the permission, set-id and sticky bits as a number; `modified` is
//!   seconds since the Unix epoch and nanoseconds upwards from there.
//! - A *piece* is `[object, offset, bytes]`: which of `objects`, counted from 0, and
//!   where in what it holds. A file's data is its pieces one after the other: one
//!   piece of a pack, or whole chunks. `holes` are `[offset, bytes]` in the file,
//!   sorted, apart from each other; the data fills what is left of `bytes`.
//! - `digest` of a file in a pack is the blake3 of its data (an empty file's, of
//!   nothing); of a file in chunks the blake3 of its chunks' digests, 32 bytes each.
//!   A chunk's digest is the blake3 of what it holds: `content`, or without that
//!   the one in its name.
//! - `encoding` is `plain` or `zstd` (one frame); left out, a pack is `zstd` and a
//!   chunk `plain`. `bytes` of an object is what it holds, decoded.
//! - A hard link's `to` is the path of an earlier item that is no hard link; `meta`
//!   is the same, and attributes stand there only.
//! - Attributes are those of [`crate::disk::is_kept_attribute`], sorted by name, of
//!   files and directories only. What cannot be set at a fill fails it with the
//!   attribute's name: a tree that lost one silently would be saved without it.
//! - `run_as` is who the program ran as. A fill for another user gives it what was
//!   `run_as`'s, user and group each by itself, also where access lists name them.
//! - Sockets, FIFOs and devices are left out, and counted in the record.
//! - A fill does not restore the set-id bits of files; directories keep theirs,
//!   which only say whose new entries are.
//!
//! As stored an object has at most the bytes that it holds, with zstd 1/128 of them and
//! 1 KiB more, sealed 52 more; a manifest has at most 64 MiB, a record 64 KiB. No reader
//! takes more of it into memory, nor more out of a zstd frame than it is to hold.
//!
//! Limits, at a capture and again at a fill before anything is made: 1 000 000
//! entries, paths of 32 KiB, 2 000 names in one and 128 MiB of all, files of
//! 16 TiB, 1 000 000 holes, attributes of 64 KiB and 64 MiB of all, and the room on
//! the disk. A tree that breaks one is kept where it is.
//!
//! # Mirror
//! The manifest of a mirror has `"layout": "mirror"`, no `objects` and no `pieces`.
//! `digest` of a file is the blake3 of all its bytes, holes as zeros, which are the
//! plain object of its path; a hard link has no object of its own.
//!
//! # Version 0
//! Without `root_xattrs`, `xattrs`, `holes`, `hard_link`, and in objects without
//! `content`, `encoding` and `sealed`; `digest` of a file in chunks is the blake3
//! of its data. Hard links were files of their own and holes zeros.
//!
//! Its records are all snapshots, and have `manifest`, `files`, `bytes`, `skipped` and
//! `failed_claim` beside `version`, `number`, `tenant`, `workload`, `epoch`, `nonce` and
//! `created_ms`, without `kind` and `tree`.
//!
//! # Sealed objects
//! With encryption on, packs, chunks and manifests are sealed after they were
//! encoded ([`crate::seal`] has the bytes); the *role* is the letter of the object's
//! name and `<d>`, each as its length in 8 bytes, little-endian, and its bytes.
//! Names are of the sealed bytes, which begin at random: they tell nothing of the
//! content. The id of the master key stands in the head of each sealed body, in plain:
//! with another key, or none, a reader says which one it needs. A manifest is sealed when it begins with `bhs`, which no zstd frame
//! does; of packs and chunks the manifest says so, for a plain chunk may begin with
//! anything. A save refers to older objects only when they are sealed as new ones
//! would be.

mod codec;
mod commit;
mod manifest;
mod name;
mod pack;
mod record;
mod retention;
mod rules;
mod unpack;

pub use codec::Encryption;
pub(super) use codec::{CodecError, ObjectCodec};
pub(super) use commit::{
    Commit, Turn, built_on, close, commit, damaged, newest_record, open, standing, verify,
};
pub(super) use manifest::{Encoding, Item, Manifest, ManifestObject, Meta, Node, Piece, RawText, Xattr};
pub(super) use name::{
    Digest, ObjectKind, ObjectName, key_prefix, kind_prefix, object_key, plain_prefix, record_key,
    record_number, records_prefix, tenant_prefix, workload_in, workload_key,
};
pub(super) use pack::{Packer, Reuse, Sealer, StoredObject, Work};
pub(super) use record::{Holder, RECORD_VERSION, Record, RecordKind, RecordTree};
pub use retention::{Collected, Keep};
pub(super) use retention::{list_all, read_manifest, read_record, retain};
pub(super) use unpack::{Fetch, Part, Place, plan};

/// The version of manifests that this code writes; it reads 0, too.
pub(super) const MANIFEST_VERSION: u32 = 1;
/// Files with less data than this are packed together.
pub(super) const PACKED_FILE_BYTES: u64 = 1024 * 1024;
/// A pack is closed when it holds this much.
pub(super) const PACK_BYTES: usize = 8 * 1024 * 1024;
/// The data of larger files is cut into pieces of this size.
pub(super) const CHUNK_BYTES: usize = 16 * 1024 * 1024;
/// The most a manifest may be, before compression.
pub(super) const MANIFEST_BYTES: usize = 512 * 1024 * 1024;
/// The most a record may be.
pub(super) const RECORD_BYTES: u64 = 64 * 1024;
/// The most a file may have, holes and all.
pub(super) const FILE_BYTES: u64 = 16 * 1024 * 1024 * 1024 * 1024;
/// The most holes that the files of one tree may have together.
pub(super) const TREE_HOLES: usize = 1_000_000;
/// The most that the extended attributes of one tree may have together, names and values.
pub(super) const ATTRIBUTE_BYTES: usize = 64 * 1024 * 1024;
