//! A save in the layout `mirror`: what changed becomes plain objects, then comes the
//! manifest. See `state::mirror` for why in this order.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    os::unix::fs::FileExt,
};

use bytes::Bytes;
use tokio::{sync::Mutex, time::Instant};

use crate::{
    disk::LinkGroups,
    state::{
        host::{collect::check_bytes, restore::Parents},
        mirror::{self, LOOK_MS, OBJECT_BYTES, PIECE_BYTES, copy_object, kept_name, plain_key},
        snapshot::{
            Digest, Item, MANIFEST_VERSION, Meta, Node, ObjectKind, PACKED_FILE_BYTES, RawText, TREE_HOLES,
            Xattr, kind_prefix, list_all,
        },
    },
};

use super::*;

/// Small files under way together; each is in memory, whole.
const SMALL_UPLOADS: usize = 16;
/// How often a file may change while it is read before that is an error.
const READS: u32 = 3;

/// What a save in this layout knows of the store.
pub(super) struct Mirroring<'a> {
    /// The newest record.
    pub(super) newest: Option<&'a Record>,
    /// Its manifest, in whatever layout.
    pub(super) in_place: Option<Arc<Manifest>>,
    /// What saves that did not end have copied aside.
    pub(super) aside: Vec<String>,
}

/// A tree as far as a walk shows it.
struct Scan {
    root: Meta,
    root_xattrs: Vec<Xattr>,
    items: Vec<Item>,
    stats: Vec<(Vec<u8>, Stat)>,
    /// Numbers of the items that are to be read.
    unread: Vec<usize>,
    skipped: u64,
    is_copy: bool,
}

/// What was read of one file.
struct Content {
    stat: Stat,
    xattrs: Vec<Xattr>,
    holes: Vec<(u64, u64)>,
    digest: Digest,
}

/// One save on its way.
struct Upload<'a> {
    files: &'a HostFiles,
    save: &'a Save,
    key_digest: String,
    source: Arc<Source>,
    /// What of the newest mirror is the content of which file; of any other layout nothing.
    in_place: HashMap<&'a [u8], (u64, Digest)>,
    /// Whether objects in place are what the manifest says.
    is_trusted: bool,
    /// Whether all that may be in place must be copied aside.
    keeps_all: bool,
    aside: HashSet<&'a str>,
    looked: Mutex<Instant>,
}

// === impl HostFiles ===

impl HostFiles {
    /// Lists what earlier saves in this layout have copied aside and not removed.
    ///
    /// # Errors
    /// [`Error::Limit`] where objects would have to be sealed; [`Error::Store`].
    pub(super) async fn aside(
        &self,
        save: &Save,
        codec: &ObjectCodec,
        newest: Option<&Record>,
    ) -> Result<Vec<String>, Error> {
        if save.persist.layout != Layout::Mirror {
            return Ok(Vec::new());
        }
        if codec.seals() {
            let reason = "persist.layout is \"mirror\", whose plain objects cannot be sealed, and \
                          BOILERHOUSE_STATE_ENCRYPTION is on; allowed: layout \"snapshot\", or no encryption";
            return Err(Error::Limit { key: save.key.clone(), reason: reason.to_owned() });
        }
        if newest.is_none() {
            return Ok(Vec::new());
        }
        let prefix = kind_prefix(&save.key.digest(), ObjectKind::Kept);
        let listed = list_all(&*self.inner.store, &prefix).await;
        let listed = listed.map_err(|source| Error::Store { key: save.key.clone(), source })?;
        Ok(listed.into_iter().map(|listed| listed.key).collect())
    }

    /// Writes the plain objects of what changed; answers the manifest, and the bytes sent.
    pub(super) async fn mirror_tree(
        &self,
        save: &Save,
        mirroring: &Mirroring<'_>,
        plan: Plan,
        request: Request,
    ) -> Result<(Collected, u64), Error> {
        let base = plan.manifest.clone();
        let source = Arc::clone(&plan.source);
        let scan = {
            let (key, most) = (save.key.clone(), request.max_bytes);
            self.run(Lane::Save, move |inner| {
                let tree = plan.source.tree.open_dir(b"")?;
                let (walk, known) = plan.carry_out(inner, &key)?;
                check_bytes(&tree, &walk, &key, most)?;
                scan(&tree, walk, &known, &key)
            })
            .await?
        };
        let is_mirror = mirror::is_mirror(mirroring.newest);
        let in_place = mirroring.in_place.as_ref().filter(|_| is_mirror);
        let files =
            in_place.iter().flat_map(|manifest| &manifest.items).filter_map(|item| match &item.node {
                Node::File { bytes, digest, .. } => Some((item.path.0.as_slice(), (*bytes, *digest))),
                _ => None,
            });
        let upload = Upload {
            files: self,
            save,
            key_digest: save.key.digest(),
            source,
            in_place: files.collect(),
            is_trusted: base.is_some(),
            keeps_all: is_mirror && in_place.is_none(),
            aside: mirroring.aside.iter().map(String::as_str).collect(),
            looked: Mutex::new(Instant::now()),
        };
        let (mut scan, sent) = upload.all(scan).await?;
        same_links(&mut scan.items);
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            tenant: save.key.tenant.clone(),
            workload: save.key.workload.clone(),
            epoch: save.epoch,
            run_as: save.run_as,
            layout: Layout::Mirror,
            objects: Vec::new(),
            root: scan.root,
            root_xattrs: scan.root_xattrs,
            items: scan.items,
        };
        let limit = |reason| Error::Limit { key: save.key.clone(), reason };
        manifest.check().map_err(limit)?;
        let (files, bytes) = manifest.totals();
        let (stats, skipped) = (scan.stats, scan.skipped);
        if let (Some(base), Some(name)) = (&base, request.newest)
            && mirror::is_same_tree(base, &manifest)
        {
            return Ok((Collected { manifest: name, body: None, stats, files, bytes, skipped }, sent));
        }
        let body = request.codec.encode_manifest(&manifest).map_err(limit)?;
        Ok((Collected { manifest: body.name, body: Some(body), stats, files, bytes, skipped }, sent))
    }

    /// Mirrors deletions, and removes what was copied aside. Best effort: what is left
    /// makes the next save write everything.
    pub(super) async fn settle_mirror(
        &self,
        save: &Save,
        record: &Record,
        codec: &ObjectCodec,
        mut aside: Vec<String>,
    ) {
        let settled = async {
            let key_digest = save.key.digest();
            let manifest = self.newest_manifest(&save.key, &key_digest, Some(record), codec).await?;
            let Some(manifest) = manifest else { return Ok(()) };
            let store = &*self.inner.store;
            let of_epoch = format!("{}{:016x}-", kind_prefix(&key_digest, ObjectKind::Kept), save.epoch.0);
            let listed = list_all(store, &of_epoch).await;
            let listed = listed.map_err(|source| Error::Store { key: save.key.clone(), source })?;
            aside.extend(listed.into_iter().map(|listed| listed.key));
            aside.sort_unstable();
            aside.dedup();
            mirror::settle(store, &save.key, record, &manifest, aside).await
        };
        let outcome: Result<(), Error> = settled.await;
        if let Err(error) = outcome {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(key = %save.key, %error, cause, "plain objects that are gone from the tree stay for now");
        }
    }
}

// === impl Upload ===

impl Upload<'_> {
    /// Reads and sends every file that is to be; puts what was read into the scan.
    async fn all(&self, mut scan: Scan) -> Result<(Scan, u64), Error> {
        let mut sent = 0;
        let unread = std::mem::take(&mut scan.unread);
        let bytes_of = |number: &usize| scan.stats.get(*number).map_or(0, |(_, stat)| stat.bytes);
        let (small, large): (Vec<usize>, Vec<usize>) =
            unread.into_iter().partition(|number| bytes_of(number) < PACKED_FILE_BYTES);
        let mut read: Vec<(usize, Content)> = Vec::new();
        let small: Vec<(usize, Vec<u8>)> =
            small.into_iter().map(|number| (number, scan.items[number].path.0.clone())).collect();
        let mut uploads = stream::iter(small)
            .map(|(number, path)| async move {
                let (content, bytes) = self.small(&path).await?;
                Ok::<_, Error>((number, content, bytes))
            })
            .buffer_unordered(SMALL_UPLOADS);
        while let Some((number, content, bytes)) = uploads.try_next().await? {
            sent += bytes;
            read.push((number, content));
        }
        drop(uploads);
        for number in large {
            let (content, bytes) = self.large(&scan.items[number].path.0).await?;
            sent += bytes;
            read.push((number, content));
        }
        for (number, content) in read {
            let Content { stat, xattrs, holes, digest } = content;
            let item = &mut scan.items[number];
            item.meta = Meta::from(&stat);
            item.xattrs = xattrs;
            item.node = Node::File { bytes: stat.bytes, digest, pieces: Vec::new(), holes };
            if !scan.is_copy {
                scan.stats[number].1 = stat;
            }
        }
        Ok((scan, sent))
    }

    /// Reads and sends a file that fits into memory.
    async fn small(&self, path: &[u8]) -> Result<(Content, u64), Error> {
        let (source, of_file) = (Arc::clone(&self.source), path.to_vec());
        let read = self.files.run(Lane::Save, move |_| read_small(&source.tree, &of_file)).await?;
        let (content, body) = read;
        let found = (content.stat.bytes, content.digest);
        if self.in_place.get(path) == Some(&found) && self.is_trusted {
            return Ok((content, 0));
        }
        self.look().await?;
        self.keep(path, Some(found)).await?;
        let name = plain_key(&self.key_digest, path);
        let bytes = body.len() as u64;
        self.files.inner.store.put(&name, body).await.map_err(|error| self.failed(error))?;
        Ok((content, bytes))
    }

    /// Reads and sends a file piece by piece.
    async fn large(&self, path: &[u8]) -> Result<(Content, u64), Error> {
        let name = plain_key(&self.key_digest, path);
        self.keep(path, None).await?;
        let mut sent = 0;
        for _ in 0..READS {
            self.look().await?;
            let (pieces, mut waiting) = mpsc::channel::<std::io::Result<Bytes>>(1);
            let (source, of_file) = (Arc::clone(&self.source), path.to_vec());
            let reading = self.files.run(Lane::Save, move |_| read_large(&source.tree, &of_file, &pieces));
            let parts = stream::poll_fn(move |context| waiting.poll_recv(context)).boxed();
            let sending = self.files.inner.store.put_parts(&name, parts);
            let (read, written) = tokio::join!(reading, sending);
            // What the reader met tells more than that its parts ended early.
            let content = read?;
            written.map_err(|error| self.failed(error))?;
            if let Some(content) = content {
                sent += content.stat.bytes;
                return Ok((content, sent));
            }
        }
        Err(changes(path))
    }

    /// Copies aside what is about to be overwritten, unless it is the same or was copied.
    async fn keep(&self, path: &[u8], new: Option<(u64, Digest)>) -> Result<(), Error> {
        let bytes = match self.in_place.get(path) {
            Some(found) if Some(*found) == new => return Ok(()),
            Some((bytes, _)) => *bytes,
            None if self.keeps_all => OBJECT_BYTES,
            None => return Ok(()),
        };
        let aside = kept_name(&self.key_digest, self.save.epoch, &self.save.nonce, path);
        if self.aside.contains(aside.as_str()) {
            return Ok(());
        }
        let store = &self.files.inner.store;
        let copied = copy_object(store, &plain_key(&self.key_digest, path), &aside, bytes).await;
        // What is not there cannot be lost; a fill has refused it.
        copied.map(|_| ()).map_err(|error| self.failed(error))
    }

    /// Looks now and then whether this server's place was taken.
    async fn look(&self) -> Result<(), Error> {
        let mut looked = self.looked.lock().await;
        if looked.elapsed().as_millis() < u128::from(LOOK_MS) {
            return Ok(());
        }
        let Save { key, epoch, nonce, author, base, .. } = self.save;
        let newest = newest_record(&*self.files.inner.store, key, &self.key_digest).await?;
        if let Standing::Fenced(newest) =
            standing(newest.as_ref(), &author.server, (*epoch, nonce.as_str()), *base)
        {
            return Err(Error::Fenced { key: key.clone(), own: *epoch, newest });
        }
        *looked = Instant::now();
        Ok(())
    }

    fn failed(&self, source: crate::store::Error) -> Error {
        Error::Store { key: self.save.key.clone(), source }
    }
}

/// Makes items of what a walk found; files that are not known are left for reading.
fn scan(root: &Dir, walk: Walk, known: &Known, key: &Key) -> Result<Scan, Error> {
    let mut found = Scan {
        root: Meta::from(&walk.root),
        root_xattrs: xattrs(root.attributes()?),
        items: Vec::with_capacity(walk.entries.len()),
        stats: Vec::with_capacity(walk.entries.len()),
        unread: Vec::new(),
        skipped: 0,
        is_copy: walk.is_copy,
    };
    let mut links = LinkGroups::default();
    for entry in walk.entries {
        let stat = entry.stat;
        if stat.kind == disk::Kind::Other {
            found.skipped += 1;
            continue;
        }
        let first = links.first_of(found.items.len(), &stat).and_then(|first| found.items.get(first));
        let (attributes, node) = match (stat.kind, first) {
            (_, Some(first)) => (Vec::new(), Node::HardLink { to: first.path.clone() }),
            (disk::Kind::Directory, None) => {
                (xattrs(root.open_dir(&entry.path)?.attributes()?), Node::Directory)
            }
            (disk::Kind::File, None) => match known.item(&entry.path) {
                Some(Item { xattrs, node: node @ Node::File { bytes, .. }, .. }) if *bytes == stat.bytes => {
                    (xattrs.clone(), node.clone())
                }
                _ if stat.bytes > OBJECT_BYTES => {
                    let path = disk::shown(&entry.path);
                    let reason = format!(
                        "{path} has {} bytes, at most {OBJECT_BYTES} are allowed in the layout \"mirror\"",
                        stat.bytes
                    );
                    return Err(Error::Limit { key: key.clone(), reason });
                }
                _ => {
                    found.unread.push(found.items.len());
                    let (digest, pieces, holes) = (Digest([0; 32]), Vec::new(), Vec::new());
                    (Vec::new(), Node::File { bytes: stat.bytes, digest, pieces, holes })
                }
            },
            (disk::Kind::Symlink | disk::Kind::Other, None) => {
                (Vec::new(), Node::Symlink { target: RawText(entry.target.unwrap_or_default()) })
            }
        };
        found.stats.push((entry.path.clone(), stat));
        found.items.push(Item {
            path: RawText(entry.path),
            meta: Meta::from(&stat),
            xattrs: attributes,
            node,
        });
    }
    Ok(found)
}

/// Gives each further name of a file what was read of its first.
fn same_links(items: &mut [Item]) {
    let metas: HashMap<Vec<u8>, Meta> = items.iter().map(|item| (item.path.0.clone(), item.meta)).collect();
    for item in items {
        if let Node::HardLink { to } = &item.node
            && let Some(meta) = metas.get(&to.0)
        {
            item.meta = *meta;
        }
    }
}

fn xattrs(attributes: disk::Attributes) -> Vec<Xattr> {
    attributes.into_iter().map(|(name, value)| Xattr(RawText(name), RawText(value))).collect()
}

/// Opens a file; answers what is known of it before it is read.
fn open(tree: &Dir, path: &[u8]) -> Result<(File, Content), Error> {
    let mut parents = Parents::new(tree);
    let (parent, name) = parents.of(path)?;
    let (file, stat) = parent.open_file(name)?;
    let failed = |error| disk::Error::new("read", parent.label(name), error);
    let of_file = disk::attributes(&file).map_err(failed)?;
    let is_sparse = stat.bytes >= disk::HOLE_BYTES;
    let holes =
        if is_sparse { disk::holes(&file, stat.bytes, TREE_HOLES).map_err(failed)? } else { Vec::new() };
    let content = Content { stat, xattrs: xattrs(of_file), holes, digest: Digest([0; 32]) };
    Ok((file, content))
}

fn is_as_it_was(file: &File, stat: &Stat, path: &[u8]) -> Result<bool, Error> {
    let now = Stat::of_file(file).map_err(|error| disk::Error::new("stat", disk::shown(path), error))?;
    Ok(now == *stat)
}

/// Reads a small file, again should it change meanwhile.
fn read_small(tree: &Dir, path: &[u8]) -> Result<(Content, Bytes), Error> {
    for _ in 0..READS {
        let (file, mut content) = open(tree, path)?;
        let mut body = vec![0; usize::try_from(content.stat.bytes).unwrap_or(0)];
        let read = file.read_exact_at(&mut body, 0);
        if read.is_ok() && is_as_it_was(&file, &content.stat, path)? {
            content.digest = Digest::of(&body);
            return Ok((content, Bytes::from(body)));
        }
    }
    Err(changes(path))
}

/// Reads a file piece by piece; `None`: it changed meanwhile.
fn read_large(
    tree: &Dir,
    path: &[u8],
    pieces: &mpsc::Sender<std::io::Result<Bytes>>,
) -> Result<Option<Content>, Error> {
    let (file, mut content) = open(tree, path)?;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < content.stat.bytes {
        let length = PIECE_BYTES.min(content.stat.bytes - at);
        let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
        if let Err(error) = file.read_exact_at(&mut piece, at) {
            let kind = error.kind();
            _ = pieces.blocking_send(Err(std::io::Error::from(kind)));
            return Err(disk::Error::new("read", disk::shown(path), error).into());
        }
        hasher.update(&piece);
        at += length;
        if pieces.blocking_send(Ok(Bytes::from(piece))).is_err() {
            break; // The write has failed, and says why.
        }
    }
    content.digest = Digest(*hasher.finalize().as_bytes());
    Ok(is_as_it_was(&file, &content.stat, path)?.then_some(content))
}

fn changes(path: &[u8]) -> Error {
    let error = std::io::Error::other("it changes while it is read, though nothing should run");
    disk::Error::new("read", disk::shown(path), error).into()
}
