//! What the container-engine port promises, held by the fake engine and by a real
//! Docker engine alike. What only a real one can show is in `tests/isolation.rs`.

#![allow(unreachable_pub, reason = "the parts of a test share what they need")]
#![allow(clippy::unwrap_used, reason = "a test ends where it is surprised")]

mod conformance {
    pub mod lossy;
    pub mod rows;
    pub mod subject;
}
mod support;

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::{FutureExt, StreamExt, stream};

use self::{
    conformance::{rows::ROWS, subject::Subject},
    support::engine::{instance, with_engine},
};

/// Rows that run side by side on a real engine.
const AT_ONCE: usize = 4;

#[tokio::test(start_paused = true)]
async fn the_fake_engine_conforms() {
    check(ROWS.len(), |_| Subject::fake(instance())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn docker_conforms() {
    with_engine(|engine| async move {
        let engine = Arc::new(engine);
        check(AT_ONCE, |row| Subject::docker(&engine, row)).await;
    })
    .await;
}

/// Runs every row on a subject of its own and reports all that failed.
async fn check(at_once: usize, subject: impl Fn(&'static str) -> Subject) {
    let runs = ROWS.iter().map(|(name, row)| {
        let run = row(subject(name));
        async move { AssertUnwindSafe(run).catch_unwind().await.err().map(|_| *name) }
    });
    let failed: Vec<&str> =
        stream::iter(runs).buffer_unordered(at_once).filter_map(std::future::ready).collect().await;
    assert!(failed.is_empty(), "rows that failed, their reasons above: {failed:#?}");
}
