//! From a manifest to what must be fetched and where it goes, as a pure plan.

use super::manifest::{Manifest, ManifestObject, Node};

/// One object, and what of it goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::state) struct Fetch {
    /// The object.
    pub(in crate::state) object: ManifestObject,
    /// Its parts, in the order of the items.
    pub(in crate::state) parts: Vec<Part>,
}

/// A part of an object that is a part of a file's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::state) struct Part {
    /// Which of [`Manifest::items`].
    pub(in crate::state) item: usize,
    /// Where it begins in the decompressed object.
    pub(in crate::state) offset: u64,
    /// Where it goes in the file.
    pub(in crate::state) place: Place,
    /// How long it is.
    pub(in crate::state) bytes: u64,
}

/// A place in a file between its holes: where data goes next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::state) struct Place {
    /// Bytes from the start of the file; a hole may begin here.
    pub(in crate::state) at: u64,
    /// The number of the first hole that is not before it.
    pub(in crate::state) hole: usize,
}

// === impl Place ===

impl Place {
    /// Takes the next run of at most `left` bytes of data; answers where it goes
    /// and how long it is.
    pub(in crate::state) fn next(&mut self, holes: &[(u64, u64)], left: u64) -> (u64, u64) {
        while let Some((_, length)) = holes.get(self.hole).filter(|(offset, _)| *offset == self.at) {
            self.at += length;
            self.hole += 1;
        }
        let room = holes.get(self.hole).map_or(left, |(offset, _)| offset - self.at);
        let (at, bytes) = (self.at, room.min(left));
        self.at += bytes;
        (at, bytes)
    }
}

/// Plans one fetch for each object that holds anything of this manifest, which was checked.
pub(in crate::state) fn plan(manifest: &Manifest) -> Vec<Fetch> {
    let mut parts: Vec<Vec<Part>> = vec![Vec::new(); manifest.objects.len()];
    for (number, item) in manifest.items.iter().enumerate() {
        let Node::File { pieces, holes, .. } = &item.node else { continue };
        let mut place = Place::default();
        for piece in pieces {
            if let Some(of_object) = parts.get_mut(piece.object as usize) {
                of_object.push(Part { item: number, offset: piece.offset, place, bytes: piece.bytes });
            }
            let mut left = piece.bytes;
            while left > 0 {
                left -= place.next(holes, left).1;
            }
        }
    }
    let objects = manifest.objects.iter().cloned().zip(parts);
    objects.filter(|(_, parts)| !parts.is_empty()).map(|(object, parts)| Fetch { object, parts }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_goes_between_the_holes() {
        let holes = [(0, 10), (15, 5), (30, 70)];
        let mut place = Place::default();
        let runs: Vec<_> = [3, 2, 20, 1].map(|left| place.next(&holes, left)).to_vec();
        assert_eq!(runs, [(10, 3), (13, 2), (20, 10), (100, 1)]);
        assert_eq!(Place::default().next(&[], 7), (0, 7));
    }
}
