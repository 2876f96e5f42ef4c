//! From a manifest to what must be fetched, as a pure plan.

use super::manifest::{Manifest, ManifestObject, Node};

/// One object, and what of it goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::state) struct Fetch {
    /// The object.
    pub(in crate::state) object: ManifestObject,
    /// Its parts, in the order of the items.
    pub(in crate::state) parts: Vec<Part>,
}

/// A part of an object that is a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::state) struct Part {
    /// Which of [`Manifest::items`].
    pub(in crate::state) item: usize,
    /// Where it begins in the decompressed object.
    pub(in crate::state) offset: u64,
    /// Where it goes in the file.
    pub(in crate::state) file_offset: u64,
    /// How long it is.
    pub(in crate::state) bytes: u64,
}

/// Plans one fetch for each object that holds anything of this manifest.
pub(in crate::state) fn plan(manifest: &Manifest) -> Vec<Fetch> {
    let mut parts: Vec<Vec<Part>> = vec![Vec::new(); manifest.objects.len()];
    for (number, item) in manifest.items.iter().enumerate() {
        let Node::File { pieces, .. } = &item.node else { continue };
        let mut file_offset = 0;
        for piece in pieces {
            if let Some(of_object) = parts.get_mut(piece.object as usize) {
                of_object.push(Part { item: number, offset: piece.offset, file_offset, bytes: piece.bytes });
            }
            file_offset += piece.bytes;
        }
    }
    let objects = manifest.objects.iter().cloned().zip(parts);
    objects.filter(|(_, parts)| !parts.is_empty()).map(|(object, parts)| Fetch { object, parts }).collect()
}
