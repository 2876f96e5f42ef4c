//! The HTTP/1.1 server: connections, their limits, and the graceful end.

use std::{pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// How long a client may take to send a request's head, and how long a
/// connection may stand idle between two requests.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// Bytes of a request's head at most.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Connections at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 4096;

/// How long requests may go on after the shutdown began. What they wait for
/// goes on in its own task.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// How long to wait after a failed accept (no file descriptors left) before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` until `shutdown`, then lets the requests that have begun
/// finish, within 30 s.
///
/// # Cancel safety
/// Dropping the future ends every connection at once.
pub async fn serve(listener: TcpListener, router: Router, shutdown: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Owned here, so that dropping this future ends them all.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accept = async {
            let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, permit)
        };
        // Shutdown first: a steady stream of connections must not delay it.
        let (accepted, permit) = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let connection = connection(stream, router.clone(), shutdown.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained =
        tokio::time::timeout(DRAIN_LIMIT, async { while connections.join_next().await.is_some() {} });
    if drained.await.is_err() {
        tracing::warn!(
            late = connections.len(),
            "connections are cut: their requests did not finish in time"
        );
    }
}

/// Serves one connection to its end.
async fn connection(stream: TcpStream, router: Router, shutdown: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let result = tokio::select! {
        biased;
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{body::Bytes, routing::post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Sends the beginning of a request and returns what comes until the server
    /// ends the connection. Time is paused: it moves on when nothing else does.
    async fn send_and_wait(beginning: &str) -> String {
        let routes = Router::new().route("/", post(|_: Bytes| async { "read" }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let mut server = JoinSet::new();
        server.spawn(serve(listener, routes, shutdown));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        tokio::time::timeout(2 * HEAD_DEADLINE, read).await.expect("the server hangs up").unwrap();
        answer
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_end_its_head_is_hung_up_on() {
        assert_eq!(send_and_wait("POST / HTTP/1.1\r\nHost: lo").await, "");
        assert_eq!(send_and_wait("").await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_is_hung_up_on() {
        let answer = send_and_wait("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").await;
        assert!(answer.ends_with("\r\n\r\nread"), "{answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_a_size() {
        let head = format!("POST / HTTP/1.1\r\nHost: localhost\r\nX: {}", "x".repeat(MAX_HEAD_BYTES));
        let answer = send_and_wait(&head).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
}
