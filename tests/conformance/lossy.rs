//! A proxy before the engine that loses an answer when told to.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

/// Forwards connections of one request each to the engine's socket.
pub struct Lossy {
    socket: PathBuf,
    lose: Arc<Mutex<Option<&'static str>>>,
    task: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl Lossy {
    pub fn start(engine: PathBuf) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("engine.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let lose = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&lose);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (engine, lose) = (engine.clone(), Arc::clone(&shared));
                tokio::spawn(async move { forward(client, &engine, &lose).await });
            }
        });
        Self { socket, lose, task, _directory: directory }
    }

    pub fn host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Loses the answer to the next request whose first line contains `words`.
    pub fn lose_next(&self, words: &'static str) {
        *self.lose.lock().unwrap() = Some(words);
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(mut client: UnixStream, engine: &Path, lose: &Mutex<Option<&'static str>>) {
    let Ok(mut engine) = UnixStream::connect(engine).await else { return };
    let mut head = vec![0; 64 * 1024];
    let Ok(read) = client.read(&mut head).await else { return };
    if engine.write_all(&head[..read]).await.is_err() {
        return;
    }
    let line = String::from_utf8_lossy(&head[..read.min(512)]).lines().next().unwrap_or_default().to_owned();
    let is_lost = lose.lock().unwrap().take_if(|words| line.contains(*words)).is_some();
    if !is_lost {
        let _ = copy_bidirectional(&mut client, &mut engine).await;
        return;
    }
    // The engine has done it when it answers; nobody hears.
    let (mut from_client, _to_client) = client.split();
    let (mut from_engine, mut to_engine) = engine.split();
    let mut first = [0];
    tokio::select! {
        _ = copy(&mut from_client, &mut to_engine) => { let _ = from_engine.read(&mut first).await; }
        _ = from_engine.read(&mut first) => {}
    }
}
