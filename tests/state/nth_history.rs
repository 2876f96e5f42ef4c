//! The n-th call of a collection and of an erasure fails, is lost, comes late, comes
//! twice, waits, or is cut short: on every store there is. The newest tree is whole
//! throughout, nobody gets half an erased one, and the repetition ends what was begun.

use std::{collections::BTreeSet, sync::Arc};

use boilerhouse::{
    model::Epoch,
    state::{
        FillFrom,
        history::{History, Keep},
    },
    store::{
        FaultStore, SharedStore, Store as _,
        fault::{Fault, Rule},
    },
};

use crate::{
    nth::{AnyNode, faults},
    places::Place,
    radosgw::Radosgw,
    s3_server::S3Server,
    support::{Later, Tree, key, slot, write},
};

const NEWEST: Keep = Keep { last: 1, days: 0 };

fn history(store: &Arc<FaultStore>) -> History {
    History::new(Arc::<FaultStore>::clone(store), Arc::new(Later), "node".to_owned())
}

/// Three snapshots of a tree, and something that no record names.
async fn three(store: &Arc<FaultStore>, tenant: &str) -> Tree {
    let (node, key) = (AnyNode::in_memory(store), key(tenant));
    let mut newest = Tree::new();
    for epoch in 1..=3 {
        let slot = slot(&format!("slot-{epoch}"));
        let from = if epoch == 1 { FillFrom::Empty } else { FillFrom::Cache };
        node.claim(&slot, &key, epoch, from).await.unwrap();
        if epoch == 1 {
            write(&node.state(&slot), "dir/kept", b"kept");
            write(&node.state(&slot), "large", &[7; 1_100_000]);
        }
        write(&node.state(&slot), "f", epoch.to_string().as_bytes());
        newest = node.release(&slot, &key, epoch).await;
    }
    let orphan = format!("t/{}/p/{:016x}-{}", key.digest(), 1, "0".repeat(64));
    store.put(&orphan, bytes::Bytes::from_static(b"x")).await.unwrap();
    newest
}

async fn names(store: &FaultStore, prefix: &str) -> Vec<String> {
    let listed = store.list(prefix, None, 1_000).await.unwrap();
    listed.into_iter().map(|listed| listed.key).collect()
}

/// Strikes each call of a collection in turn.
async fn collections(name: &str, store: SharedStore, faults: &[Fault]) {
    let store = FaultStore::new(store);
    for (kind, fault) in faults.iter().enumerate() {
        let mut struck = 0;
        for nth in 1.. {
            let when = format!("{name}, {fault:?}, call {nth}");
            let key = key(&format!("c{kind}-{nth}"));
            let expected = three(&store, key.tenant.as_str()).await;
            let before = store.all_calls();
            store.add(Rule::next(fault.clone()).nth(nth));
            let first = history(&store).collect(&key, NEWEST).await;
            store.clear();
            let is_struck = store.all_calls() - before >= nth;
            if nth % 2 == 0 {
                store.land().await.unwrap();
            }
            let found = AnyNode::in_memory(&store).restored(&slot("between"), &key, 4).await;
            assert_eq!(found.unwrap_or_else(|error| panic!("{when}: {error:?}")), expected, "{when}");
            history(&store).collect(&key, NEWEST).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            store.land().await.unwrap();
            let found = AnyNode::in_memory(&store).restored(&slot("after"), &key, 4).await.unwrap();
            assert_eq!(found, expected, "{when}");
            let report = history(&store).verify(std::slice::from_ref(&key), &mut |_| {}).await.unwrap();
            assert!(report.is_sound() && report.orphaned.is_empty(), "{when}: {report:?}");
            let manifests = names(&store, &format!("t/{}/m/", key.digest())).await;
            assert_eq!(manifests.len(), 1, "{when}: what nobody needs is left");
            if !is_struck {
                let collected = first.unwrap_or_else(|error| panic!("{when}, not struck: {error:?}"));
                assert!(collected.objects >= 3, "{when}: {collected:?}");
                break;
            }
            struck += 1;
        }
        assert!(struck >= 10, "{name}, {fault:?}: only {struck} calls of collections");
    }
}

/// Strikes each call of an erasure in turn.
async fn erasures(name: &str, store: SharedStore, faults: &[Fault]) {
    let store = FaultStore::new(store);
    let nobody_knows = BTreeSet::new();
    for (kind, fault) in faults.iter().enumerate() {
        let mut struck = 0;
        for nth in 1.. {
            let when = format!("{name}, {fault:?}, call {nth}");
            let key = key(&format!("e{kind}-{nth}"));
            let whole = three(&store, key.tenant.as_str()).await;
            let before = store.all_calls();
            store.add(Rule::next(fault.clone()).nth(nth));
            let first = history(&store).erase(&key.tenant, &nobody_knows, |_| Epoch(3), "e").await;
            store.clear();
            let is_struck = store.all_calls() - before >= nth;
            // Whole, or not there: never a part.
            let node = AnyNode::in_memory(&store);
            if node.newest(&key).await.is_some() {
                assert_eq!(node.restored(&slot("between"), &key, 4).await.unwrap(), whole, "{when}");
                assert!(first.is_err(), "{when}: it says that it is done");
            }
            // An attempt's late calls end before the next attempt: each has a deadline.
            store.land().await.unwrap();
            let again = history(&store).erase(&key.tenant, &nobody_knows, |_| Epoch(3), "e").await;
            again.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            for prefix in [format!("t/{}/", key.digest()), "k/".to_owned()] {
                assert_eq!(names(&store, &prefix).await, Vec::<String>::new(), "{when}");
            }
            assert_eq!(AnyNode::in_memory(&store).newest(&key).await, None, "{when}");
            if !is_struck {
                let erased = first.unwrap_or_else(|error| panic!("{when}, not struck: {error:?}"));
                assert!(erased.workloads == [key.workload] && erased.objects >= 8, "{when}: {erased:?}");
                break;
            }
            struck += 1;
        }
        assert!(struck >= 12, "{name}, {fault:?}: only {struck} calls of erasures");
    }
}

/// What a server's own answers may change the meaning of; each call costs more there.
fn some_faults() -> [Fault; 3] {
    [Fault::FailAfter, Fault::Hold, Fault::Repeat]
}

async fn campaign(name: &str, place: &Place, faults: &[Fault]) {
    collections(name, place.shared(), faults).await;
    erasures(name, place.shared(), faults).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_fault_at_any_call_of_a_collection_and_an_erasure_is_survived_on_a_local_store() {
    campaign("local", &Place::in_memory(), &faults()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_fault_at_any_call_of_a_collection_and_an_erasure_is_survived_on_an_s3_server_in_process() {
    campaign("S3 in process", &Place::InProcess(S3Server::start().await), &some_faults()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_fault_at_any_call_of_a_collection_and_an_erasure_is_survived_on_radosgw() {
    campaign("radosgw", &Place::Radosgw(Box::new(Radosgw::find())), &some_faults()).await;
}
