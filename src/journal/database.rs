//! The file: its lock, its permissions, its connections.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rusqlite::{Connection, OpenFlags, config::DbConfig};

use super::{
    error::Error,
    schema::{self, MIGRATIONS, Obstacle},
};

/// How long a lock that another server holds is waited for, in milliseconds.
const LOCK_WAIT_MS: u64 = 5_000;

/// How often it is tried, in milliseconds.
const LOCK_RETRY_MS: u64 = 20;

/// How long a connection waits for another one of this process, in milliseconds.
const BUSY_WAIT_MS: u64 = 5_000;

/// Idle read connections that are kept.
const READERS_KEPT: usize = 4;

/// Prepared statements that a connection keeps.
const STATEMENTS_KEPT: usize = 32;

/// The writer's page cache, in KiB.
const CACHE_KIB: i64 = 32 << 10;

/// Pages in the log before it is put into the database (SQLite's own default is
/// 1,000). A page that changes often is then written there once for many times
/// in the log. After a crash the 64 MB are read once.
const LOG_PAGES: i64 = 16_000;

/// SQLite's page size.
const PAGE_BYTES: i64 = 4_096;

/// The file of a journal, locked against other servers as long as this lives.
pub(super) struct Database {
    path: PathBuf,
    _lock: File,
}

/// Connections that read beside the writer.
pub(super) struct Readers {
    database: Arc<Database>,
    idle: Mutex<Vec<Connection>>,
}

// === impl Database ===

impl Database {
    /// Locks, creates, checks and migrates the file; gives its writing connection.
    pub(super) fn open(path: &Path) -> Result<(Self, Connection), Error> {
        let lock = lock(path)?;
        create(path)?;
        let database = Self { path: path.to_owned(), _lock: lock };
        let wrong = |error: rusqlite::Error| Error::database(path, &error);
        let refused = |obstacle: Obstacle| match obstacle {
            Obstacle::Newer { found, known } => Error::Newer { path: path.to_owned(), found, known },
            Obstacle::Foreign => Error::corrupt(path, "it is a database, but not one of boilerhouse's"),
            Obstacle::Database(error) => Error::database(path, &error),
        };
        let mut connection = database.connect().map_err(wrong)?;
        // Until the file is known to be ours and sound, not even its log may be
        // put into it, which closing a connection does.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(wrong)?;
        sound(path, &connection)?;
        schema::examine(&connection, MIGRATIONS).map_err(refused)?;
        configure(&connection).map_err(wrong)?;
        schema::migrate(&mut connection, MIGRATIONS).map_err(refused)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map_err(wrong)?;
        Ok((database, connection))
    }

    /// Opens the file again after a failure.
    ///
    /// What the log holds is first put into the database and both are synced:
    /// after a failed fsync the kernel calls pages clean that it never wrote, so
    /// a later fsync of the log would vouch for a log with a hole in it.
    pub(super) fn reopen(&self) -> Result<Connection, Error> {
        let wrong = |error: rusqlite::Error| Error::database(&self.path, &error);
        let connection = self.connect().map_err(wrong)?;
        configure(&connection).map_err(wrong)?;
        let found = schema::version(&connection).map_err(wrong)?;
        if found as usize != MIGRATIONS.len() {
            return Err(Error::corrupt(&self.path, format!("its version has become {found}")));
        }
        let busy: i64 =
            connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0)).map_err(wrong)?;
        if busy != 0 {
            return Err(Error::unavailable(&self.path, "its log is busy"));
        }
        Ok(connection)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a connection for writing. Never creates the file: one that has
    /// vanished is an error, not a new journal.
    fn connect(&self) -> Result<Connection, rusqlite::Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.busy_timeout(Duration::from_millis(BUSY_WAIT_MS))?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
        Ok(connection)
    }
}

/// Sets a writing connection up, with `synchronous=FULL`.
fn configure(connection: &Connection) -> Result<(), rusqlite::Error> {
    let mode: String = connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
    if mode != "wal" {
        return Err(rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
            Some(format!("its file system has no write-ahead log (journal mode {mode})")),
        ));
    }
    for (name, value) in [
        ("synchronous", 2),
        ("cache_size", -CACHE_KIB),
        ("wal_autocheckpoint", LOG_PAGES),
        ("journal_size_limit", LOG_PAGES * PAGE_BYTES),
        ("trusted_schema", 0),
        ("cell_size_check", 1),
    ] {
        connection.pragma_update(None, name, value)?;
    }
    Ok(())
}

/// Keeps other servers away from the journal. The kernel drops the lock with the
/// process; the file is left behind, since removing it would race.
fn lock(path: &Path) -> Result<File, Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&name)
        .map_err(|error| Error::unavailable(path, format!("cannot open its lock: {error}")))?;
    let until = Instant::now() + Duration::from_millis(LOCK_WAIT_MS);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(LOCK_RETRY_MS));
            }
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => {
                return Err(Error::unavailable(path, format!("cannot be locked: {error}")));
            }
        }
    }
}

/// Creates the file if there is none, and makes it readable to its owner only.
///
/// The file is opened here only while no connection to it is: closing any file
/// descriptor of it would drop the locks that SQLite holds through others.
fn create(path: &Path) -> Result<(), Error> {
    let wrong = |what: &str, error: &io::Error| Error::unavailable(path, format!("{what}: {error}"));
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let bytes = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(Error::unavailable(path, "is no regular file")),
        Ok(metadata) => Some(metadata.len()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(wrong("cannot be looked at", &error)),
    };
    if bytes.unwrap_or(0) == 0 && fs::metadata(&log).is_ok_and(|metadata| metadata.len() > 0) {
        // SQLite would take the database for a new one and delete the log.
        return Err(Error::corrupt(path, "it is gone or empty while its log (-wal) is not"));
    }
    if bytes.is_some() {
        return fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(|error| wrong("cannot be made private", &error));
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|file| file.sync_all())
        .map_err(|error| wrong("cannot be created", &error))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| wrong("its directory cannot be synced", &error))
}

/// Checks the structure of the whole file; about 100 MB a second or more.
fn sound(path: &Path, connection: &Connection) -> Result<(), Error> {
    let verdict: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(|error| Error::database(path, &error))?;
    if verdict == "ok" { Ok(()) } else { Err(Error::corrupt(path, verdict)) }
}

// === impl Readers ===

impl Readers {
    pub(super) fn new(database: Arc<Database>) -> Self {
        Self { database, idle: Mutex::default() }
    }

    /// Runs `read` on a connection that no one else uses meanwhile. One that
    /// failed is closed.
    pub(super) fn with<T>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, Error> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let run = || {
            let connection = match idle {
                Some(connection) => connection,
                None => self.connect()?,
            };
            let value = read(&connection)?;
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < READERS_KEPT {
                idle.push(connection);
            }
            Ok(value)
        };
        run().map_err(|error| Error::database(self.database.path(), &error))
    }

    fn connect(&self) -> Result<Connection, rusqlite::Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(self.database.path(), flags)?;
        connection.busy_timeout(Duration::from_millis(BUSY_WAIT_MS))?;
        Ok(connection)
    }
}
