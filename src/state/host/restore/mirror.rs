//! Files of a mirror: from plain objects into their places.

use futures_util::FutureExt;

use crate::state::mirror::{PIECE_BYTES, PlainObjects, data_of};

use super::*;

/// Files under way together.
const FILES: usize = 16;

// === impl HostFiles ===

impl HostFiles {
    /// Reads every file of a mirror and verifies it; answers the bytes that came.
    ///
    /// # Errors
    /// [`Error::Damaged`] names the first object that is not of the newest snapshot.
    pub(super) async fn fetch_mirror(&self, restore: &Arc<Restore>) -> Result<u64, Error> {
        let objects = PlainObjects::new(&*self.inner.store, &restore.key);
        let files = restore.manifest.items.iter().enumerate().filter_map(|(number, item)| match &item.node {
            Node::File { bytes, digest, .. } if *bytes > 0 => Some((number, *bytes, *digest)),
            _ => None,
        });
        let files = stream::iter(files.collect::<Vec<_>>())
            .map(|file| self.fetch_plain(Arc::clone(restore), &objects, file))
            .buffer_unordered(FILES);
        files.try_fold(0, async |sum: u64, bytes: u64| Ok(sum + bytes)).await
    }

    async fn fetch_plain(
        &self,
        restore: Arc<Restore>,
        objects: &PlainObjects<'_>,
        (number, bytes, digest): (usize, u64, Digest),
    ) -> Result<u64, Error> {
        // Of all claims together, pieces in memory are bounded.
        let _held = self.inner.fetching.hold(bytes.min(PIECE_BYTES)).await;
        let path = &restore.manifest.items[number].path.0;
        let (files, into) = (self.clone(), Arc::clone(&restore));
        let write = move |at: u64, piece: Bytes| {
            let (files, into) = (files.clone(), Arc::clone(&into));
            async move { files.run(Lane::Restore, move |_| into.put_plain(number, at, &piece)).await }.boxed()
        };
        objects.read(path, bytes, digest, &write).await?;
        let finishing = Arc::clone(&restore);
        self.run(Lane::Restore, move |_| finishing.set_plain(number)).await?;
        Ok(bytes)
    }
}

// === impl Restore ===

impl Restore {
    /// Writes a piece between the holes that the manifest has.
    fn put_plain(&self, number: usize, at: u64, piece: &[u8]) -> Result<(), Error> {
        debug_assert!(piece.len() as u64 <= PIECE_BYTES);
        let item = &self.manifest.items[number];
        let Node::File { holes, .. } = &item.node else { return Ok(()) };
        let mut parents = Parents::new(&self.tree);
        let (parent, name) = parents.of(&item.path.0)?;
        let file = parent.open_file_for_writing(name)?;
        let failed = |error| disk::Error::new("write", parent.label(name), error);
        for (start, end) in data_of(holes, at, at + piece.len() as u64) {
            let from = usize::try_from(start - at).unwrap_or(usize::MAX);
            let to = usize::try_from(end - at).unwrap_or(usize::MAX);
            let run = piece.get(from..to).expect("the run is cut to the piece");
            file.write_all_at(run, start).map_err(failed)?;
        }
        Ok(())
    }

    fn set_plain(&self, number: usize) -> Result<(), Error> {
        let item = &self.manifest.items[number];
        let mut parents = Parents::new(&self.tree);
        let (parent, name) = parents.of(&item.path.0)?;
        let file = parent.open_file_for_writing(name)?;
        self.set_file(&file, item, parent, name)
    }
}
