//! From contents of files to objects, reusing what the newest snapshot has.
//!
//! [`Packer`] belongs to the one who reads and decides where contents go;
//! [`Sealer`] is shared by those who hash, encode and seal meanwhile. They meet
//! again in [`Packer::finish`], where every object has its name.

use std::{
    collections::{HashMap, HashSet, hash_map},
    io,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;

use crate::model::{Epoch, spec::Layout};

use super::{
    PACK_BYTES,
    codec::ObjectCodec,
    manifest::{Item, Manifest, ManifestObject, Node, Piece},
    name::{Digest, ObjectKind, ObjectName},
    retention::worn_packs,
};

/// An object to be written.
#[derive(Debug, Clone)]
pub(in crate::state) struct StoredObject {
    /// Its name.
    pub(in crate::state) name: ObjectName,
    /// Its bytes.
    pub(in crate::state) body: Bytes,
}

/// What the newest snapshot has that may be referred to: contents by their blake3.
#[derive(Debug, Default)]
pub(in crate::state) struct Reuse {
    manifest: Option<Arc<Manifest>>,
    may_reuse: Vec<bool>,
    /// Packs of which little is needed still, and that may be referred to all the same
    /// by who has nothing else of a file.
    worn: HashSet<u32>,
    files: HashMap<Digest, Piece>,
    chunks: HashMap<Digest, u32>,
}

/// Content that will be an object.
#[derive(Debug)]
pub(in crate::state) struct Work {
    slot: u32,
    kind: ObjectKind,
    content: Vec<u8>,
}

/// Puts contents into objects to be. Small contents wait in one open pack.
///
/// Its [`Piece`]s name slots, which [`Packer::finish`] turns into objects.
#[derive(Debug)]
pub(in crate::state) struct Packer {
    reuse: Arc<Reuse>,
    slots: u32,
    /// Slots of objects of the newest snapshot, by their number there.
    carried: HashMap<u32, u32>,
    small: HashMap<Digest, Piece>,
    open: Option<(u32, Vec<u8>)>,
}

/// Makes objects of [`Work`], on any thread.
#[derive(Debug)]
pub(in crate::state) struct Sealer {
    codec: ObjectCodec,
    epoch: Epoch,
    reuse: Arc<Reuse>,
    made: Mutex<Made>,
}

#[derive(Debug, Default)]
struct Made {
    objects: HashMap<u32, ManifestObject>,
    /// Slots whose content another slot has.
    same: HashMap<u32, u32>,
    chunks: HashMap<Digest, u32>,
}

// === impl Reuse ===

impl Reuse {
    /// Collects what a manifest refers to, as far as `codec` would store it that way.
    /// `is_partial`: not every file that the manifest has can be read again.
    pub(in crate::state) fn of(manifest: Arc<Manifest>, codec: &ObjectCodec, is_partial: bool) -> Self {
        if manifest.layout != Layout::Snapshot {
            return Self::default();
        }
        // What is mostly dead is written anew, so that the rest of it can go.
        let mut worn = worn_packs(&manifest);
        let may_reuse = |(number, object)| codec.may_reuse(object) && !worn.contains(&number);
        let may_reuse = (0..).zip(&manifest.objects).map(may_reuse).collect();
        let is_kept = |number: &u32| {
            let object = manifest.objects.get(*number as usize);
            is_partial && object.is_some_and(|object| codec.may_reuse(object))
        };
        worn.retain(is_kept);
        let mut reuse = Self { may_reuse, worn, ..Self::default() };
        for (number, object) in (0..).zip(&manifest.objects) {
            if object.name.kind == ObjectKind::Chunk && reuse.may_reuse(number) {
                reuse.chunks.insert(object.content(), number);
            }
        }
        for item in &manifest.items {
            let Node::File { digest, pieces, .. } = &item.node else { continue };
            if let [piece] = pieces.as_slice()
                && manifest.is_packed(pieces)
                && reuse.may_reuse(piece.object)
            {
                reuse.files.insert(*digest, *piece);
            }
        }
        reuse.manifest = Some(manifest);
        reuse
    }

    /// Returns whether a tree is the same as the one whose objects these are, where
    /// it lies in the store, too. One without objects never is: nothing would tell
    /// whether it is sealed as it should be.
    pub(in crate::state) fn is_same_tree(&self, tree: &Manifest) -> bool {
        let Some(own) = &self.manifest else { return false };
        let parts = |manifest: &Manifest| (manifest.version, manifest.run_as, manifest.root);
        parts(own) == parts(tree)
            && !own.objects.is_empty()
            && own.objects == tree.objects
            && own.root_xattrs == tree.root_xattrs
            && own.items == tree.items
    }

    fn may_reuse(&self, object: u32) -> bool {
        self.may_reuse.get(object as usize).copied().unwrap_or(false)
    }

    /// Returns whether a piece is of a pack that should be written anew.
    pub(in crate::state) fn is_worn(&self, piece: &Piece) -> bool {
        self.worn.contains(&piece.object)
    }

    fn object(&self, number: u32) -> Option<&ManifestObject> {
        self.manifest.as_ref()?.objects.get(number as usize)
    }
}

// === impl Packer ===

impl Packer {
    /// Begins with no objects.
    pub(in crate::state) fn new(reuse: Arc<Reuse>) -> Self {
        Self { reuse, slots: 0, carried: HashMap::new(), small: HashMap::new(), open: None }
    }

    /// Takes the whole data of a small file; answers where it will be, and the
    /// pack that is full now.
    pub(in crate::state) fn small(&mut self, digest: Digest, content: &[u8]) -> (Vec<Piece>, Option<Work>) {
        if content.is_empty() {
            return (Vec::new(), None);
        }
        if let Some(piece) = self.small.get(&digest) {
            return (vec![*piece], None);
        }
        if let Some(piece) = self.reuse.files.get(&digest).copied() {
            let piece = Piece { object: self.carry_object(piece.object), ..piece };
            self.small.insert(digest, piece);
            return (vec![piece], None);
        }
        let (slot, pack) = match &mut self.open {
            Some((slot, pack)) => (*slot, pack),
            none => {
                self.slots += 1;
                let (slot, pack) = none.insert((self.slots - 1, Vec::new()));
                (*slot, pack)
            }
        };
        let piece = Piece { object: slot, offset: pack.len() as u64, bytes: content.len() as u64 };
        pack.extend_from_slice(content);
        let is_full = pack.len() >= PACK_BYTES;
        self.small.insert(digest, piece);
        (vec![piece], if is_full { self.close() } else { None })
    }

    /// Takes one chunk of a large file; answers where it will be.
    pub(in crate::state) fn chunk(&mut self, content: Vec<u8>) -> (Piece, Work) {
        self.slots += 1;
        let slot = self.slots - 1;
        let piece = Piece { object: slot, offset: 0, bytes: content.len() as u64 };
        (piece, Work { slot, kind: ObjectKind::Chunk, content })
    }

    /// Refers to pieces of the newest snapshot; `None` when they may not be.
    pub(in crate::state) fn carry(&mut self, pieces: &[Piece]) -> Option<Vec<Piece>> {
        if !pieces.iter().all(|piece| self.reuse.may_reuse(piece.object) || self.reuse.is_worn(piece)) {
            return None;
        }
        let carried = pieces.iter().map(|piece| Piece { object: self.carry_object(piece.object), ..*piece });
        Some(carried.collect())
    }

    /// Closes the open pack.
    pub(in crate::state) fn close(&mut self) -> Option<Work> {
        let (slot, content) = self.open.take()?;
        Some(Work { slot, kind: ObjectKind::Pack, content })
    }

    /// Puts the objects' numbers into `items`, and the digests of files in chunks;
    /// answers the objects that anything refers to, in the order in which it does.
    pub(in crate::state) fn finish(self, sealer: Sealer, items: &mut [Item]) -> Vec<ManifestObject> {
        let made = sealer.made.into_inner().unwrap_or_else(PoisonError::into_inner);
        let by_slot: HashMap<u32, u32> = self.carried.iter().map(|(number, slot)| (*slot, *number)).collect();
        let mut objects: Vec<ManifestObject> = Vec::new();
        let mut numbers: HashMap<ObjectName, u32> = HashMap::new();
        for item in items {
            let Node::File { digest, pieces, .. } = &mut item.node else { continue };
            let mut chunks = blake3::Hasher::new();
            let mut is_in_chunks = false;
            for piece in pieces {
                let slot = made.same.get(&piece.object).unwrap_or(&piece.object);
                let carried = by_slot.get(slot).and_then(|number| self.reuse.object(*number));
                let object =
                    made.objects.get(slot).or(carried).expect("every slot is sealed, carried, or the same");
                piece.object = *numbers.entry(object.name).or_insert_with(|| {
                    objects.push(object.clone());
                    u32::try_from(objects.len() - 1)
                        .expect("there are fewer objects than bytes in a manifest")
                });
                if object.name.kind == ObjectKind::Chunk {
                    is_in_chunks = true;
                    chunks.update(&object.content().0);
                }
            }
            if is_in_chunks {
                *digest = Digest(*chunks.finalize().as_bytes());
            }
        }
        objects
    }

    fn carry_object(&mut self, number: u32) -> u32 {
        match self.carried.entry(number) {
            hash_map::Entry::Occupied(slot) => *slot.get(),
            hash_map::Entry::Vacant(place) => {
                self.slots += 1;
                *place.insert(self.slots - 1)
            }
        }
    }
}

// === impl Sealer ===

impl Sealer {
    /// Begins with no objects.
    pub(in crate::state) fn new(codec: ObjectCodec, epoch: Epoch, reuse: Arc<Reuse>) -> Self {
        Self { codec, epoch, reuse, made: Mutex::default() }
    }

    /// Makes an object; `None` when the store has it, or will have it by another slot's work.
    ///
    /// # Errors
    /// Only when memory is short.
    pub(in crate::state) fn seal(&self, work: Work) -> io::Result<Option<StoredObject>> {
        let Work { slot, kind, content } = work;
        let digest = Digest::of(&content);
        if kind == ObjectKind::Chunk {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(first) = made.chunks.get(&digest).copied() {
                made.same.insert(slot, first);
                return Ok(None);
            }
            made.chunks.insert(digest, slot);
            let known = self.reuse.chunks.get(&digest).and_then(|number| self.reuse.object(*number));
            if let Some(object) = known {
                made.objects.insert(slot, object.clone());
                return Ok(None);
            }
        }
        let (object, stored) = self.codec.encode(kind, self.epoch, content, digest)?;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).objects.insert(slot, object);
        Ok(Some(stored))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{codec::Encryption, manifest::tests},
        *,
    };
    use crate::{clock::SystemClock, model::Owner};

    fn codec() -> ObjectCodec {
        Encryption::off(Arc::new(SystemClock)).codec(&tests::key())
    }

    fn items(files: Vec<(&str, Vec<Piece>, u64)>) -> Manifest {
        let mut manifest = tests::manifest_of(Vec::new(), files);
        manifest.run_as = Owner { uid: 1, gid: 2 };
        manifest
    }

    #[test]
    fn equal_contents_are_stored_once_and_packs_close_when_full() {
        let mut packer = Packer::new(Arc::default());
        let sealer = Sealer::new(codec(), Epoch(1), Arc::default());
        let content = vec![1; 1_000];
        let (first, _) = packer.small(Digest::of(&content), &content);
        let (again, _) = packer.small(Digest::of(&content), &content);
        assert_eq!(first, again);
        let mut files = vec![("a", first, 1_000), ("b", again, 1_000)];
        let mut closed = Vec::new();
        for n in 0..25_u32 {
            let content = [n.to_le_bytes().to_vec(), vec![0; 900 * 1024]].concat();
            let (pieces, work) = packer.small(Digest::of(&content), &content);
            files.push(("c", pieces, content.len() as u64));
            closed.extend(work);
        }
        assert_eq!(closed.len(), 2, "about 8 MiB go into a pack");
        closed.extend(packer.close());
        for work in closed {
            assert!(sealer.seal(work).unwrap().is_some());
        }
        assert_eq!(packer.finish(sealer, &mut items(files).items).len(), 3);
    }

    #[test]
    fn equal_chunks_and_those_of_the_newest_snapshot_are_sent_once() {
        let mut first = Packer::new(Arc::default());
        let sealer = Sealer::new(codec(), Epoch(1), Arc::default());
        let (piece, work) = first.chunk(b"content".to_vec());
        let (same, again) = first.chunk(b"content".to_vec());
        let name = sealer.seal(work).unwrap().unwrap().name;
        assert!(sealer.seal(again).unwrap().is_none(), "it was sent already");
        let mut manifest = items(vec![("f", vec![piece, same], 14)]);
        manifest.objects = first.finish(sealer, &mut manifest.items);
        assert_eq!(manifest.objects.len(), 1);
        manifest.check().unwrap();

        let reuse = Arc::new(Reuse::of(Arc::new(manifest.clone()), &codec(), false));
        let mut second = Packer::new(Arc::clone(&reuse));
        let sealer = Sealer::new(codec(), Epoch(2), Arc::clone(&reuse));
        let (piece, work) = second.chunk(b"content".to_vec());
        assert!(sealer.seal(work).unwrap().is_none());
        let Node::File { pieces, .. } = &manifest.items[0].node else { panic!() };
        let carried = second.carry(pieces).unwrap();
        let (other, work) = second.chunk(b"other".to_vec());
        assert!(sealer.seal(work).unwrap().is_some());
        let mut next = items(vec![("f", vec![piece], 7), ("g", carried, 14), ("h", vec![other], 5)]);
        next.objects = second.finish(sealer, &mut next.items);
        assert_eq!((next.objects.len(), next.objects[0].name), (2, name));
        next.check().unwrap();
    }
}
