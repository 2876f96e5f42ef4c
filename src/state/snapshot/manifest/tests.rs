//! Manifests as they are written, and as they must not be.

use super::*;

const META: Meta = Meta { mode: 0o644, uid: 1, gid: 2, modified: Time { seconds: -5, nanoseconds: 7 } };

pub(in crate::state::snapshot) fn key() -> Key {
    Key::new(TenantId::new("t").unwrap(), WorkloadId::new("w").unwrap())
}

/// A manifest with files of these pieces; digests are not looked at here.
pub(in crate::state::snapshot) fn manifest_of(
    objects: Vec<ManifestObject>,
    files: Vec<(&str, Vec<Piece>, u64)>,
) -> Manifest {
    let item = |(path, pieces, bytes): (&str, Vec<Piece>, u64)| Item {
        path: RawText(path.as_bytes().to_vec()),
        meta: META,
        xattrs: Vec::new(),
        node: Node::File { bytes, digest: Digest::of(path.as_bytes()), pieces, holes: Vec::new() },
    };
    Manifest {
        layout: Layout::Snapshot,
        version: MANIFEST_VERSION,
        tenant: key().tenant,
        workload: key().workload,
        epoch: Epoch(3),
        run_as: Owner { uid: 1, gid: 2 },
        objects,
        root: META,
        root_xattrs: Vec::new(),
        items: files.into_iter().map(item).collect(),
    }
}

/// An object stored as its kind is.
pub(in crate::state::snapshot) fn object(name: ObjectName, bytes: u64) -> ManifestObject {
    ManifestObject { name, bytes, content: None, encoding: None, sealed: false }
}

fn pack(bytes: u64) -> ManifestObject {
    object(ObjectName::of(ObjectKind::Pack, Epoch(1), b"p"), bytes)
}

#[test]
fn a_manifest_is_read_as_it_was_written() {
    let mut manifest =
        manifest_of(vec![pack(9)], vec![("a", vec![Piece { object: 0, offset: 2, bytes: 7 }], 7)]);
    let link = Node::Symlink { target: RawText(b"../\xff\n".to_vec()) };
    manifest.items.push(Item {
        path: RawText(b"\xfe".to_vec()),
        meta: META,
        xattrs: Vec::new(),
        node: Node::Directory,
    });
    manifest.items.push(Item {
        path: RawText(b"\xfe/l".to_vec()),
        meta: META,
        xattrs: Vec::new(),
        node: link,
    });
    assert_eq!(Manifest::decode(&manifest.encode().unwrap(), &key()), Ok(manifest));
}

/// Each row is a manifest that would lead a restore outside, or to wrong bytes.
#[test]
fn a_bad_manifest_is_refused_with_its_reason() {
    let piece = |offset, bytes| vec![Piece { object: 0, offset, bytes }];
    let file = |path: &'static str| manifest_of(vec![pack(9)], vec![(path, piece(0, 9), 9)]);
    let mut rows = vec![
        (file("/etc/passwd"), "absolute"),
        (file("../x"), "`..`"),
        (file("a/./b"), "`.`"),
        (file("a/b"), "not in a directory"),
        (manifest_of(vec![pack(9)], vec![("a", piece(0, 9), 9), ("a", piece(0, 9), 9)]), "twice"),
        (manifest_of(vec![pack(9)], vec![("b", piece(0, 9), 9), ("a", piece(0, 9), 9)]), "out of order"),
        (manifest_of(vec![pack(9)], vec![("a", piece(1, 9), 9)]), "beyond"),
        (manifest_of(vec![pack(9)], vec![("a", piece(u64::MAX, 2), 2)]), "without an end"),
        (manifest_of(vec![pack(9)], vec![("a", piece(0, 5), 9)]), "pieces of 5"),
        (manifest_of(vec![], vec![("a", piece(0, 9), 9)]), "not there"),
        (manifest_of(vec![pack(u64::MAX)], vec![]), "at most"),
    ];
    let mut other = file("a");
    other.tenant = TenantId::new("other").unwrap();
    rows.push((other, "other/w"));
    let mut later = file("a");
    later.version = 2;
    rows.push((later, "format version 2"));
    let mut through_link = file("l/x");
    let link = Node::Symlink { target: RawText(b"/etc".to_vec()) };
    through_link
        .items
        .insert(0, Item { path: RawText(b"l".to_vec()), meta: META, xattrs: Vec::new(), node: link });
    rows.push((through_link, "not in a directory"));
    for (manifest, reason) in rows {
        let error = Manifest::decode(&manifest.encode().unwrap(), &key()).unwrap_err();
        assert!(error.contains(reason), "{error:?} does not say {reason:?}");
    }
}

#[test]
fn a_decompression_bomb_is_an_error() {
    let bomb = compress(&vec![0; 10_000_000]).unwrap();
    assert!(bomb.len() < 10_000);
    assert!(decompress(&bomb, 1_000_000, 0).is_err());
    assert_eq!(decompress(&bomb, 10_000_000, 0).unwrap().len(), 10_000_000);
}
