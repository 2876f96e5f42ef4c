//! A TCP road to a server, on which a test can lose, slow or cut what passes.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// What becomes of one connection.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    /// It is taken, and nothing ever moves.
    Silent,
    /// After so many bytes towards the server nothing moves in that direction.
    StallUp(usize),
    /// After so many bytes from the server nothing moves in that direction.
    StallDown(usize),
    /// After so many bytes from the server it is cut.
    CutDown(usize),
    /// So many bytes pass from the server in each ten milliseconds.
    Slow(usize),
}

/// A road; connections are open but for those a test has spoilt.
pub struct Road {
    address: SocketAddr,
    ways: Arc<Mutex<VecDeque<Way>>>,
}

impl Road {
    /// Builds a road on loopback to `endpoint` (`http://host:port`).
    pub async fn to(endpoint: &str) -> Self {
        let target = endpoint.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let ways = Arc::new(Mutex::new(VecDeque::new()));
        let next = Arc::clone(&ways);
        tokio::spawn(async move {
            while let Ok((inside, _)) = listener.accept().await {
                let way = next.lock().expect("no panic holds it").pop_front();
                tokio::spawn(pass(inside, target.clone(), way));
            }
        });
        Self { address, ways }
    }

    /// Returns the road's own endpoint.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Spoils the next connections, one way each.
    pub fn spoil(&self, ways: impl IntoIterator<Item = Way>) {
        self.ways.lock().expect("no panic holds it").extend(ways);
    }
}

async fn pass(inside: TcpStream, target: String, way: Option<Way>) {
    if let Some(Way::Silent) = way {
        let _held = inside;
        return std::future::pending().await;
    }
    let Ok(outside) = TcpStream::connect(&target).await else { return };
    let (from_client, to_client) = inside.into_split();
    let (from_server, to_server) = outside.into_split();
    let up = match way {
        Some(Way::StallUp(bytes)) => (Some(bytes), true),
        _ => (None, false),
    };
    let down = match way {
        Some(Way::StallDown(bytes)) => (Some(bytes), true),
        Some(Way::CutDown(bytes)) => (Some(bytes), false),
        _ => (None, false),
    };
    let slow = match way {
        Some(Way::Slow(bytes)) => Some(bytes),
        _ => None,
    };
    // Either end closes both.
    tokio::select! {
        () = copy(from_client, to_server, up, None) => {}
        () = copy(from_server, to_client, down, slow) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    (limit, stalls): (Option<usize>, bool),
    slow: Option<usize>,
) {
    let mut buffer = vec![0; slow.unwrap_or(64 << 10)];
    let mut passed = 0;
    loop {
        let room = limit.map_or(buffer.len(), |limit| (limit - passed).min(buffer.len()));
        if room == 0 {
            if stalls {
                return std::future::pending().await;
            }
            return;
        }
        let Ok(read @ 1..) = from.read(&mut buffer[..room]).await else { return };
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        passed += read;
        if slow.is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
