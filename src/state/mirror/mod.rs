//! The layout `mirror`: one plain object a file, for people who need plain objects.
//!
//! A tree's files lie under `t/<d>/f/<name>`, each as the file's very bytes, as a tool
//! that copies directories would leave them. What such an object cannot say (mode,
//! owner, times, attributes, links, holes, and which files belong together) is in the
//! mirror's manifest, `t/<d>/i/…`, and the manifest is named by a record of the same
//! chain that every layout has: the record is the commit point and the fence here, too.
//! Directories, links and further names of a file have no object.
//!
//! # Names
//! The name is the path, escaped:
//! - `=`, `%`, `\`, control characters, spaces other than the common one, what XML
//!   cannot hold, and bytes that are no UTF-8 become `=XX`, two upper-case hexadecimal
//!   digits a byte; so does a space at an end of a segment, and the dots of `.` and `..`.
//! - A name of more than 192 bytes, escaped, is cut into several segments, each but the
//!   last with `=-` behind it.
//! - A path that does not fit into a key (475 bytes) is `=H/` and the blake3 of the
//!   path, in hexadecimal; only the manifest has the path.
//!
//! Nothing else has an `=` in it, so that every name but the last kind can be read back
//! without a manifest, and no two paths have the same.
//!
//! # A save
//! Plain names are overwritten in place, so that a reader of the bucket may see files of
//! two saves beside each other. For whoever goes by the record, it is still all or
//! nothing:
//!
//! 1. What a save is about to overwrite is copied aside by the store, to `t/<d>/o/…`,
//!    unless an earlier attempt of the same save has done so.
//! 2. The plain objects are written, then the manifest, then the record.
//! 3. Only then, and only while that record is the newest, objects that the manifest
//!    does not name are removed (a deletion is mirrored after the save that has it, never
//!    because a tree came up empty: what was not filled and captured is not saved), and
//!    what was copied aside before the save goes last.
//!
//! A fill compares each object with the digest in the committed manifest. What differs
//! is looked for in `o/`: until the record is written that is where a save that did not
//! end has left it. So a save that was cut off anywhere leaves the committed tree
//! whole, and its repetition, from the tree kept on its server, goes on. While anything
//! is in `o/`, a save trusts no object there is, and writes them all.
//!
//! # What is not promised
//! - A server that was cut off from the store in the middle of a save, and whose place
//!   was taken, may still overwrite or remove objects until it looks at the chain again,
//!   after `LOOK_MS`. What it overwrites is aside, and is found; what it removes is not.
//! - A write that was given up, and that the store carries out after a later one of the
//!   same name, is found by the digest, and what it replaced is on the server that wrote
//!   it only. Names that are written once, as in the other layout, do not know this.
//! - Only the newest snapshot can be restored or forked, however many are listed.
//! - Holes cost their zeros in the store.
//!
//! # Objects that others change
//! The bucket is for reading. An object that a foreign tool changed or removed is not
//! the committed one: the next fill refuses it as damaged and names it. To take over what
//! is there as it is, import it (`boilerhouse state import --mirror`). An object
//! that a foreign tool added is no file of the tenant's, and is removed with the next
//! save that changes anything; one whose name is none of ours (with `%` in it, say) is
//! left, and an erasure says so.
//!
//! # Encryption
//! Plain objects cannot be sealed. Where `BOILERHOUSE_STATE_ENCRYPTION` is `on`, a server
//! does not start with a workload of this layout; should one be loaded later, its saves
//! are refused, and the trees kept.
//!
//! # Another layout
//! The first save after `persist.layout` was changed writes everything anew in the other
//! layout. Plain objects go when a record without a mirror is the newest and
//! they are older than the grace period of a collection.

mod name;
mod objects;

pub(super) use name::{escape, unescape};
pub(super) use objects::{
    PIECE_BYTES, PlainObjects, copy_object, kept_name, list_plain, must_be_whole, plain_key, settle,
};

use crate::model::{Epoch, spec::Layout};

use super::snapshot::{Manifest, Node, Record};

/// How often a save looks whether its place was taken.
pub(super) const LOOK_MS: u64 = 5_000;

/// The largest plain object: what one upload in parts can hold.
pub(super) const OBJECT_BYTES: u64 = 256 * 1024 * 1024 * 1024;

/// Returns whether the newest tree of a chain is a mirror.
pub(super) fn is_mirror(record: Option<&Record>) -> bool {
    let tree = record.and_then(|record| record.tree.as_ref());
    tree.and_then(|tree| tree.manifest.kind.layout()) == Some(Layout::Mirror)
}

/// Returns the files of a mirror that have objects, with their sizes.
pub(super) fn files(manifest: &Manifest) -> impl Iterator<Item = (&[u8], u64)> {
    manifest.items.iter().filter_map(|item| match &item.node {
        Node::File { bytes, .. } => Some((item.path.0.as_slice(), *bytes)),
        _ => None,
    })
}

/// Returns whether two mirrors are of the same tree, whoever wrote them.
pub(super) fn is_same_tree(one: &Manifest, other: &Manifest) -> bool {
    let with_epoch = |manifest: &Manifest, epoch: Epoch| (epoch, manifest.layout, manifest.run_as);
    with_epoch(one, Epoch(0)) == with_epoch(other, Epoch(0))
        && (one.version, one.root) == (other.version, other.root)
        && one.root_xattrs == other.root_xattrs
        && one.items == other.items
}

/// Returns what of a range is data, as `start..end`.
pub(super) fn data_of(holes: &[(u64, u64)], start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut runs = Vec::new();
    let mut at = start;
    for (offset, length) in holes {
        let (from, to) = ((*offset).clamp(start, end), (offset + length).clamp(start, end));
        if from > at {
            runs.push((at, from));
        }
        at = at.max(to);
    }
    if at < end {
        runs.push((at, end));
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_what_no_hole_covers() {
        let holes = [(10, 5), (20, 10), (40, 1)];
        for (start, end, expected) in [
            (0, 50, vec![(0, 10), (15, 20), (30, 40), (41, 50)]),
            (12, 22, vec![(15, 20)]),
            (10, 15, vec![]),
            (22, 35, vec![(30, 35)]),
            (0, 10, vec![(0, 10)]),
        ] {
            assert_eq!(data_of(&holes, start, end), expected, "{start}..{end}");
        }
        assert_eq!(data_of(&[], 3, 4), [(3, 4)]);
    }
}
