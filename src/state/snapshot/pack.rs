//! From contents of files to objects, reusing what the newest snapshot has.

use std::collections::HashMap;

use bytes::Bytes;

use crate::model::Epoch;

use super::{
    PACK_BYTES,
    manifest::{Manifest, ManifestObject, Node, Piece, compress},
    name::{Digest, ObjectKind, ObjectName},
};

/// An object to be written.
#[derive(Debug, Clone)]
pub(in crate::state) struct StoredObject {
    /// Its name.
    pub(in crate::state) name: ObjectName,
    /// Its bytes.
    pub(in crate::state) body: Bytes,
}

/// What the newest snapshot has: contents by their blake3.
#[derive(Debug, Default)]
pub(in crate::state) struct Reuse {
    files: HashMap<Digest, (ManifestObject, u64, u64)>,
    chunks: HashMap<Digest, ManifestObject>,
}

/// Puts contents into objects. Small contents wait in one open pack; no more than
/// that pack and one object are in memory here.
#[derive(Debug)]
pub(in crate::state) struct Packer {
    epoch: Epoch,
    reuse: Reuse,
    objects: Vec<Option<ManifestObject>>,
    numbers: HashMap<ObjectName, u32>,
    small: HashMap<Digest, Piece>,
    open: Option<(u32, Vec<u8>)>,
}

// === impl Reuse ===

impl Reuse {
    /// Collects what a manifest refers to.
    pub(in crate::state) fn of(manifest: &Manifest) -> Self {
        let mut reuse = Self::default();
        for object in manifest.objects.iter().filter(|object| object.name.kind == ObjectKind::Chunk) {
            reuse.chunks.insert(object.name.digest, object.clone());
        }
        for item in &manifest.items {
            let Node::File { digest, pieces, .. } = &item.node else { continue };
            let [piece] = pieces.as_slice() else { continue };
            let Some(object) = manifest.objects.get(piece.object as usize) else { continue };
            if object.name.kind == ObjectKind::Pack {
                reuse.files.insert(*digest, (object.clone(), piece.offset, piece.bytes));
            }
        }
        reuse
    }
}

// === impl Packer ===

impl Packer {
    /// Begins with no objects.
    pub(in crate::state) fn new(epoch: Epoch, reuse: Reuse) -> Self {
        Self { epoch, reuse, objects: Vec::new(), numbers: HashMap::new(), small: HashMap::new(), open: None }
    }

    /// Takes the whole content of a small file; answers where it will be, and the
    /// pack that is full now.
    ///
    /// # Errors
    /// Only when memory is short.
    pub(in crate::state) fn small(
        &mut self,
        digest: Digest,
        content: &[u8],
    ) -> std::io::Result<(Vec<Piece>, Option<StoredObject>)> {
        if content.is_empty() {
            return Ok((Vec::new(), None));
        }
        if let Some(piece) = self.small.get(&digest) {
            return Ok((vec![*piece], None));
        }
        if let Some((object, offset, bytes)) = self.reuse.files.get(&digest).cloned() {
            let piece = Piece { object: self.number_of(object), offset, bytes };
            self.small.insert(digest, piece);
            return Ok((vec![piece], None));
        }
        let (number, pack) = match &mut self.open {
            Some((number, pack)) => (*number, pack),
            none => {
                let number = u32::try_from(self.objects.len()).unwrap_or(u32::MAX);
                self.objects.push(None);
                let (number, pack) = none.insert((number, Vec::new()));
                (*number, pack)
            }
        };
        let piece = Piece { object: number, offset: pack.len() as u64, bytes: content.len() as u64 };
        pack.extend_from_slice(content);
        let is_full = pack.len() >= PACK_BYTES;
        self.small.insert(digest, piece);
        let full = if is_full { self.close()? } else { None };
        Ok((vec![piece], full))
    }

    /// Takes one chunk of a large file; answers where it is, and the object unless
    /// the store has it.
    pub(in crate::state) fn chunk(&mut self, content: Vec<u8>) -> (Piece, Option<StoredObject>) {
        let digest = Digest::of(&content);
        let bytes = content.len() as u64;
        let piece = |object| Piece { object, offset: 0, bytes };
        let own = ObjectName { kind: ObjectKind::Chunk, epoch: self.epoch, digest };
        if let Some(number) = self.numbers.get(&own) {
            return (piece(*number), None);
        }
        if let Some(object) = self.reuse.chunks.get(&digest).cloned() {
            return (piece(self.number_of(object)), None);
        }
        let number = self.number_of(ManifestObject { name: own, bytes });
        (piece(number), Some(StoredObject { name: own, body: Bytes::from(content) }))
    }

    /// Closes the open pack; answers it, and the objects of the manifest.
    ///
    /// # Errors
    /// Only when memory is short.
    pub(in crate::state) fn finish(mut self) -> std::io::Result<(Option<StoredObject>, Vec<ManifestObject>)> {
        let last = self.close()?;
        Ok((last, self.objects.into_iter().flatten().collect()))
    }

    fn close(&mut self) -> std::io::Result<Option<StoredObject>> {
        let Some((number, pack)) = self.open.take() else { return Ok(None) };
        let body = Bytes::from(compress(&pack)?);
        let name = ObjectName::of(ObjectKind::Pack, self.epoch, &body);
        if let Some(object) = self.objects.get_mut(number as usize) {
            *object = Some(ManifestObject { name, bytes: pack.len() as u64 });
        }
        Ok(Some(StoredObject { name, body }))
    }

    fn number_of(&mut self, object: ManifestObject) -> u32 {
        if let Some(number) = self.numbers.get(&object.name) {
            return *number;
        }
        let number = u32::try_from(self.objects.len()).unwrap_or(u32::MAX);
        self.numbers.insert(object.name, number);
        self.objects.push(Some(object));
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_contents_are_stored_once_and_packs_close_when_full() {
        let mut packer = Packer::new(Epoch(1), Reuse::default());
        let content = vec![1; 1_000];
        let (first, _) = packer.small(Digest::of(&content), &content).unwrap();
        let (again, _) = packer.small(Digest::of(&content), &content).unwrap();
        assert_eq!(first, again);
        let mut closed = 0;
        for n in 0..25_u32 {
            let content = [n.to_le_bytes().to_vec(), vec![0; 900 * 1024]].concat();
            closed += usize::from(packer.small(Digest::of(&content), &content).unwrap().1.is_some());
        }
        assert_eq!(closed, 2, "about 8 MiB go into a pack");
        let (last, objects) = packer.finish().unwrap();
        assert!(last.is_some());
        assert_eq!(objects.len(), 3);
    }

    #[test]
    fn chunks_of_the_newest_snapshot_are_not_sent_again() {
        let mut first = Packer::new(Epoch(1), Reuse::default());
        let (piece, sent) = first.chunk(b"content".to_vec());
        let name = sent.unwrap().name;
        let manifest = super::super::manifest::tests::manifest_of(
            first.finish().unwrap().1,
            vec![("f", vec![piece], 7)],
        );
        let mut second = Packer::new(Epoch(2), Reuse::of(&manifest));
        assert!(second.chunk(b"content".to_vec()).1.is_none());
        assert!(second.chunk(b"other".to_vec()).1.is_some());
        assert_eq!(second.finish().unwrap().1[0].name, name);
    }
}
