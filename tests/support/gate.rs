//! A TCP gate in front of a server, which a test can shut and reopen.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// Passes connections through while it is open; cuts and refuses them while shut.
pub struct Gate {
    address: SocketAddr,
    open: Arc<AtomicBool>,
    cut: watch::Sender<()>,
}

impl Gate {
    /// Opens a gate on loopback in front of `endpoint` (`http://host:port`).
    pub async fn open(endpoint: &str) -> Self {
        let target = endpoint.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("a bound listener has an address");
        let open = Arc::new(AtomicBool::new(true));
        let cut = watch::Sender::new(());
        let (passing, cuts) = (Arc::clone(&open), cut.clone());
        tokio::spawn(async move {
            while let Ok((mut inside, _)) = listener.accept().await {
                if !passing.load(Ordering::SeqCst) {
                    continue; // Dropped: the client sees its connection closed.
                }
                let (target, mut cut) = (target.clone(), cuts.subscribe());
                tokio::spawn(async move {
                    let Ok(mut outside) = TcpStream::connect(&target).await else { return };
                    tokio::select! {
                        _ = cut.changed() => {}
                        _ = tokio::io::copy_bidirectional(&mut inside, &mut outside) => {}
                    }
                });
            }
        });
        Self { address, open, cut }
    }

    /// Returns the gate's own endpoint.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Cuts what passes and lets nothing more through.
    pub fn shut(&self) {
        self.open.store(false, Ordering::SeqCst);
        self.cut.send_replace(());
    }

    /// Lets connections through again.
    pub fn reopen(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}
