//! The format as it is written down: stores made by hand, from JSON and bytes, are read.

use std::{collections::BTreeMap, os::unix::fs::MetadataExt, sync::Arc};

use boilerhouse::{
    clock::SystemClock,
    model::Key,
    seal::{self, MasterKey},
    state::{Encryption, Error, FillFrom, SlotFiles},
};
use bytes::Bytes;

use crate::support::{MemoryStore, Node, RUN_AS, Tree, key, slot, tree};

pub(crate) const MASTER: [u8; 32] = [7; 32];

/// A store under construction, as the documentation of the format says.
pub(crate) struct Written {
    key: Key,
    objects: BTreeMap<String, Bytes>,
    is_sealed: bool,
}

impl Written {
    pub(crate) fn new(is_sealed: bool) -> Self {
        Self { key: key("t"), objects: BTreeMap::new(), is_sealed }
    }

    /// Puts an object of epoch 3; answers its name.
    pub(crate) fn object(&mut self, letter: &str, body: &[u8]) -> String {
        let digest = self.key.digest();
        let mut body = body.to_vec();
        if self.is_sealed {
            let role = seal::context(&[letter, &digest]);
            body = MasterKey::new(&MASTER).state_key("t", "work").seal(&role, &body, &SystemClock);
        }
        let name = format!("{letter}/0000000000000003-{}", blake3::hash(&body));
        self.objects.insert(format!("t/{digest}/{name}"), body.into());
        name
    }

    pub(crate) fn manifest(&mut self, json: &str) -> String {
        self.object("m", &zstd::encode_all(json.as_bytes(), 3).unwrap())
    }

    pub(crate) fn record(&mut self, json: String) {
        let name = format!("t/{}/r/fffffffffffffffe", self.key.digest());
        self.objects.insert(name, json.into_bytes().into());
    }

    pub(crate) fn store(self) -> Arc<MemoryStore> {
        let store = MemoryStore::default();
        *store.objects.lock().unwrap() = self.objects;
        Arc::new(store)
    }
}

fn check_tree(found: &Tree, expected: &[(&str, u32, &[u8])]) {
    let paths: Vec<_> = found.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(paths, expected.iter().map(|(path, ..)| (*path).to_owned()).collect::<Vec<_>>());
    for (path, mode, content) in expected {
        let entry = &found[path.as_bytes()];
        assert_eq!((entry.mode, entry.content.as_slice()), (*mode, *content), "{path}");
        assert_eq!(entry.owner, (RUN_AS.uid, RUN_AS.gid), "{path}");
    }
}

fn meta(mode: u32, seconds: i64) -> String {
    format!(r#"{{"mode":{mode},"uid":1,"gid":2,"modified":[{seconds},500]}}"#)
}

/// A large file of version 0: two chunks, and one digest of all of it.
#[tokio::test]
async fn a_store_of_version_0_is_read() {
    let mut written = Written::new(false);
    let (first, second) = (vec![1; 16 * 1024 * 1024], vec![2; 10]);
    let large = [first.clone(), second.clone()].concat();
    let pack = written.object("p", &zstd::encode_all(&b"alphabeta"[..], 3).unwrap());
    let (one, two) = (written.object("c", &first), written.object("c", &second));
    let json = format!(
        r#"{{"version":0,"tenant":"t","workload":"work","epoch":3,"run_as":{{"uid":1,"gid":2}},
        "objects":[{{"name":"{pack}","bytes":9}},{{"name":"{one}","bytes":16777216}},{{"name":"{two}","bytes":10}}],
        "root":{root},"items":[
        {{"path":"a","meta":{file},"node":{{"file":{{"bytes":5,"digest":"{alpha}","pieces":[[0,0,5]]}}}}}},
        {{"path":"d","meta":{dir},"node":"directory"}},
        {{"path":"d/b","meta":{file},"node":{{"file":{{"bytes":4,"digest":"{beta}","pieces":[[0,5,4]]}}}}}},
        {{"path":"large","meta":{file},"node":{{"file":{{"bytes":16777226,"digest":"{all}","pieces":[[1,0,16777216],[2,0,10]]}}}}}},
        {{"path":"link","meta":{link},"node":{{"symlink":{{"target":"d/b"}}}}}}]}}"#,
        root = meta(0o700, 9),
        file = meta(0o644, -5),
        dir = meta(0o2750, 8),
        link = meta(0o777, 7),
        alpha = blake3::hash(b"alpha"),
        beta = blake3::hash(b"beta"),
        all = blake3::hash(&large),
    );
    let manifest = written.manifest(&json);
    written.record(format!(
        r#"{{"version":0,"number":1,"tenant":"t","workload":"work","epoch":3,"nonce":"n",
        "manifest":"{manifest}","created_ms":1,"files":3,"bytes":16777235,"skipped":0,"failed_claim":false}}"#
    ));
    let node = Node::new(&written.store());
    let found = node.restored(&slot("one"), &key("t"), 4).await;
    check_tree(
        &found,
        &[
            ("", 0o40700, b""),
            ("a", 0o100644, b"alpha"),
            ("d", 0o42750, b""),
            ("d/b", 0o100644, b"beta"),
            ("large", 0o100644, &large),
            ("link", 0o120777, b"d/b"),
        ],
    );
    assert_eq!(found[&b"a"[..]].modified, (-5, 500));
    // Saved again it is of version 1, and refers to the old objects.
    let saved = node.release(&slot("one"), &key("t"), 4, "n4").await;
    assert!(saved.sent_bytes < 5_000, "{} bytes were sent", saved.sent_bytes);
    let other = Node::new(&node.store);
    assert_eq!(other.restored(&slot("one"), &key("t"), 5).await, found);
}

fn version_1(is_sealed: bool) -> Written {
    let mut written = Written::new(is_sealed);
    let seals = if is_sealed { r#","sealed":true"# } else { "" };
    let large = vec![3; 2 * 1024 * 1024];
    let pack = written.object("p", b"alphadata");
    let chunk = written.object("c", &zstd::encode_all(&large[..], 3).unwrap());
    let content = blake3::hash(&large);
    let json = format!(
        r#"{{"version":1,"tenant":"t","workload":"work","epoch":3,"run_as":{{"uid":1,"gid":2}},
        "objects":[{{"name":"{pack}","bytes":9,"encoding":"plain"{seals}}},
        {{"name":"{chunk}","bytes":2097152,"content":"{content}","encoding":"zstd"{seals}}}],
        "root":{root},"root_xattrs":[["user.r","root"]],"items":[
        {{"path":"a","meta":{file},"xattrs":[["user.x",{{"base64":"/w=="}}]],
        "node":{{"file":{{"bytes":5,"digest":"{alpha}","pieces":[[0,0,5]]}}}}}},
        {{"path":"empty","meta":{file},"node":{{"file":{{"bytes":0,"digest":"{nothing}","pieces":[]}}}}}},
        {{"path":"large","meta":{file},"node":{{"file":{{"bytes":2097152,"digest":"{digest}","pieces":[[1,0,2097152]]}}}}}},
        {{"path":"same","meta":{file},"node":{{"hard_link":{{"to":"a"}}}}}},
        {{"path":"sparse","meta":{file},"node":{{"file":{{"bytes":200004,"digest":"{data}","pieces":[[0,5,4]],
        "holes":[[0,100000],[100004,100000]]}}}}}}]}}"#,
        root = meta(0o700, 9),
        file = meta(0o6755, 8),
        alpha = blake3::hash(b"alpha"),
        nothing = blake3::hash(b""),
        data = blake3::hash(b"data"),
        digest = blake3::hash(content.as_bytes()),
    );
    let manifest = written.manifest(&json);
    written.record(format!(
        r#"{{"version":1,"number":1,"tenant":"t","workload":"work","epoch":3,"nonce":"n","created_ms":1,
        "kind":"snapshot","tree":{{"snapshot":1,"epoch":3,"nonce":"n","manifest":"{manifest}","created_ms":1,
        "files":4,"bytes":2297161,"skipped":0}}}}"#
    ));
    written
}

async fn check_version_1(node: &Node) {
    let one = slot("one");
    let found = node.restored(&one, &key("t"), 4).await;
    let large = vec![3; 2 * 1024 * 1024];
    let sparse = [vec![0; 100_000], b"data".to_vec(), vec![0; 100_000]].concat();
    check_tree(
        &found,
        &[
            ("", 0o40700, b""),
            ("a", 0o100755, b"alpha"),
            ("empty", 0o100755, b""),
            ("large", 0o100755, &large),
            ("same", 0o100755, b"alpha"),
            ("sparse", 0o100755, &sparse),
        ],
    );
    assert_eq!(found[&b""[..]].attributes[&b"user.r"[..]], b"root");
    assert_eq!(found[&b"a"[..]].attributes[&b"user.x"[..]], [0xff]);
    assert_eq!(found[&b"same"[..]].same_as.as_deref(), Some(&b"a"[..]));
    let blocks = node.state_path(&one).join("sparse").metadata().unwrap().blocks();
    assert!(blocks <= 16, "{blocks} blocks for four bytes of data");
}

#[tokio::test]
async fn a_store_of_version_1_is_read() {
    check_version_1(&Node::new(&version_1(false).store())).await;
}

pub(crate) fn encryption(master: Option<[u8; 32]>, seals: bool) -> Encryption {
    let master = master.map(|key| Arc::new(MasterKey::new(&key)));
    Encryption::new(master, seals, Arc::new(SystemClock)).unwrap()
}

#[tokio::test]
async fn a_sealed_store_of_version_1_is_read_with_its_key_only() {
    let store = version_1(true).store();
    check_version_1(&Node::with_encryption(&store, encryption(Some(MASTER), false))).await;
    for (master, words) in [(None, "BOILERHOUSE_MASTER_KEY_FILE"), (Some([8; 32]), "the one here is")] {
        let node = Node::with_encryption(&store, encryption(master, false));
        let newest = node.files.newest(&key("t")).await.unwrap().unwrap();
        let error = node.claim(&slot("one"), &key("t"), 4, FillFrom::Snapshot(newest)).await.unwrap_err();
        let Error::Sealed { reason, .. } = &error else { panic!("{error:?}") };
        assert!(reason.contains(words) && reason.contains(&MasterKey::new(&MASTER).id()), "{reason}");
    }
}

/// Plain snapshots from before, sealed ones after, plain ones again.
#[tokio::test]
async fn a_store_may_be_plain_and_sealed_in_turn() {
    let store = Arc::new(MemoryStore::default());
    let (key, one) = (key("t"), slot("one"));
    let secret = b"the tenant's own secret, which nobody may read";
    let mut expected = None;
    let mut sealed_bytes = 0;
    for (epoch, seals) in [(1, false), (2, true), (3, true), (4, false)] {
        let node = Node::with_encryption(&store, encryption(Some(MASTER), seals));
        if let Some(expected) = &expected {
            assert_eq!(node.restored(&one, &key, epoch).await, *expected, "epoch {epoch}");
        } else {
            node.claim(&one, &key, epoch, FillFrom::Empty).await.unwrap();
            std::fs::write(node.state_path(&one).join("secret"), secret).unwrap();
            std::fs::write(node.state_path(&one).join("large"), vec![5; 3 * 1024 * 1024]).unwrap();
        }
        expected = Some(tree(&node.state_path(&one)));
        let saved = node.release(&one, &key, epoch, &format!("n{epoch}")).await;
        let of_epoch: Vec<Bytes> = {
            let objects = store.objects.lock().unwrap();
            let part = format!("/{epoch:016x}-");
            objects.iter().filter(|(name, _)| name.contains(&part)).map(|(_, body)| body.clone()).collect()
        };
        for body in of_epoch {
            assert_eq!(body.starts_with(b"bhs"), seals, "epoch {epoch}");
            let shown = zstd::decode_all(&body[..]).unwrap_or_else(|_| body.to_vec());
            let is_told =
                [&shown, &body.to_vec()].iter().any(|b| b.windows(secret.len()).any(|w| w == secret));
            assert!(!seals || !is_told, "a sealed object tells its content");
        }
        match epoch {
            2 => sealed_bytes = saved.sent_bytes,
            3 => assert!(saved.sent_bytes < sealed_bytes, "what is sealed already was sent again"),
            _ => {}
        }
    }
}
