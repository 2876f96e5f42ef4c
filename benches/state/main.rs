//! How fast state moves, beside the tools that people use today.
//!
//! `tools/bench-state.sh` runs it, and installs those tools. All work is done
//! through the public port of `state` over the real S3 adapter, with digests,
//! metadata, retries and syncs as the server has them. In each round every tool
//! does the whole set of cases, in an order that moves on from round to round;
//! the first round warms up and is shown, but does not count. What was fetched
//! is compared with its source outside the time measured.
//!
//! Every tool's download to a disk ends in one `syncfs`, measured with it, so that
//! all leave the same thing behind. `raw` is the server's own limit: the same bytes
//! as one object in one stream, and for a download to a disk the creation of the
//! same files from memory, ending in that `syncfs`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that reports")]

mod ours;
mod raw;
mod report;
mod server;
mod tools;
mod trees;

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use raw::Raw;
use report::Results;
use tools::{Foreign, Programs};
use trees::Source;

const USAGE: &str = "usage: state [--quick] [--rounds N] [--servers memory,radosgw] [--on tmpfs,disk] \
[--sets small,big,mix] [--tools boilerhouse,rclone,s5cmd,restic,raw] [--collect COMMAND] | --readme | serve";

/// A tool under comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tool {
    Boilerhouse,
    Rclone,
    S5cmd,
    Restic,
    Raw,
}

/// A group of cases over one tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Set {
    Small,
    Big,
    Mix,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Memory,
    Radosgw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum On {
    Tmpfs,
    Disk,
}

/// Where a bucket is and what opens it.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) endpoint: String,
    pub(crate) bucket: String,
    pub(crate) access_key: String,
    pub(crate) secret_key: String,
    pub(crate) region: String,
}

struct Plan {
    is_quick: bool,
    rounds: usize,
    servers: Vec<Server>,
    on: Vec<On>,
    sets: Vec<Set>,
    tools: Vec<Tool>,
    /// Run after each removal, for servers that keep removed objects for a while.
    collect: Option<String>,
}

/// The in-process server's process; ends with its drop.
struct OwnServer(Child);

/// What one tool does in one round.
struct Turn<'a> {
    place: &'a Place,
    programs: &'a Programs,
    set: Set,
    source: &'a Source,
    tool: Tool,
    round: usize,
    on: On,
    /// Empty, on the file system in question.
    folder: PathBuf,
    prefix: String,
}

type Figures = Vec<(&'static str, Duration)>;

// === impl of the names ===

impl Tool {
    pub(crate) const ALL: [Self; 5] = [Self::Boilerhouse, Self::Rclone, Self::S5cmd, Self::Restic, Self::Raw];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Boilerhouse => "boilerhouse",
            Self::Rclone => "rclone",
            Self::S5cmd => "s5cmd",
            Self::Restic => "restic",
            Self::Raw => "raw",
        }
    }
}

impl Set {
    const ALL: [Self; 3] = [Self::Small, Self::Big, Self::Mix];

    fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Big => "big",
            Self::Mix => "mix",
        }
    }

    fn up(self) -> &'static str {
        match self {
            Self::Small => "up",
            Self::Big => "big-up",
            Self::Mix => "mix-up",
        }
    }

    fn down(self) -> &'static str {
        match self {
            Self::Small => "down",
            Self::Big => "big-down",
            Self::Mix => "mix-down",
        }
    }

    fn source(self, is_quick: bool, scratch: &Path) -> Result<Source, String> {
        let part = if is_quick { 10 } else { 1 };
        match self {
            Self::Small => Ok(Source::small(5_000 / part, 4_096)),
            Self::Big => Ok(Source::big((512 << 20) / part)),
            Self::Mix => Source::mix(Path::new(env!("CARGO_MANIFEST_DIR")), scratch, 30_000 / part)
                .map_err(|error| format!("the mix cannot be read: {error}")),
        }
    }
}

impl Server {
    const ALL: [Self; 2] = [Self::Memory, Self::Radosgw];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Radosgw => "radosgw",
        }
    }
}

impl On {
    const ALL: [Self; 2] = [Self::Tmpfs, Self::Disk];

    fn name(self) -> &'static str {
        match self {
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
        }
    }

    fn folder(self) -> PathBuf {
        match self {
            Self::Tmpfs => format!("/dev/shm/boilerhouse-bench-{}", std::process::id()).into(),
            Self::Disk => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench/work"),
        }
    }
}

// === impl Plan ===

impl Plan {
    fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut plan = Self {
            is_quick: false,
            rounds: 5,
            servers: Server::ALL.to_vec(),
            on: On::ALL.to_vec(),
            sets: Set::ALL.to_vec(),
            tools: Tool::ALL.to_vec(),
            collect: None,
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value; {USAGE}"));
            match argument.as_str() {
                // What `cargo bench` adds.
                "--bench" => {}
                "--quick" => (plan.is_quick, plan.rounds) = (true, 1),
                "--rounds" => {
                    let value = value()?;
                    let rounds = value.parse().ok().filter(|rounds| (1..=100).contains(rounds));
                    plan.rounds =
                        rounds.ok_or_else(|| format!("--rounds {value:?}: a number from 1 to 100"))?;
                }
                "--servers" => plan.servers = chosen(&argument, &value()?, &Server::ALL, Server::name)?,
                "--on" => plan.on = chosen(&argument, &value()?, &On::ALL, On::name)?,
                "--sets" => plan.sets = chosen(&argument, &value()?, &Set::ALL, Set::name)?,
                "--tools" => plan.tools = chosen(&argument, &value()?, &Tool::ALL, Tool::name)?,
                "--collect" => plan.collect = Some(value()?),
                _ => return Err(format!("unknown argument {argument:?}; {USAGE}")),
            }
        }
        Ok(plan)
    }
}

fn chosen<T: Copy>(flag: &str, text: &str, all: &[T], name: fn(T) -> &'static str) -> Result<Vec<T>, String> {
    let allowed = || all.iter().map(|one| name(*one)).collect::<Vec<_>>().join(", ");
    let one = |word: &str| {
        let found = all.iter().copied().find(|one| name(*one) == word);
        found.ok_or_else(|| format!("{flag}: unknown {word:?}; allowed are {}", allowed()))
    };
    text.split(',').map(one).collect()
}

// === impl OwnServer ===

impl OwnServer {
    fn start() -> Result<(Self, Place), String> {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(own);
        command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("the server does not start: {error}"))?;
        let mut endpoint = String::new();
        let output = child.stdout.take().ok_or("the server has no output")?;
        BufReader::new(output).read_line(&mut endpoint).map_err(|error| error.to_string())?;
        let place = Place {
            endpoint: endpoint.trim().to_owned(),
            bucket: server::BUCKET.to_owned(),
            access_key: server::ACCESS_KEY.to_owned(),
            secret_key: server::SECRET_KEY.to_owned(),
            region: "us-east-1".to_owned(),
        };
        Ok((Self(child), place))
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Finds the real server in the file that `TEST_S3_ENV` names.
fn radosgw() -> Result<Place, String> {
    let path = std::env::var("TEST_S3_ENV").map_err(|_| "TEST_S3_ENV names no file: use make bench-state")?;
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let value = |name: &str| {
        let found = text.lines().filter_map(|line| line.split_once('=')).find(|(own, _)| *own == name);
        found.map(|(_, value)| value.to_owned()).ok_or_else(|| format!("{path} has no {name}"))
    };
    Ok(Place {
        endpoint: value("AWS_ENDPOINT_URL")?,
        bucket: value("TEST_S3_BUCKET")?,
        access_key: value("AWS_ACCESS_KEY_ID")?,
        secret_key: value("AWS_SECRET_ACCESS_KEY")?,
        region: value("AWS_REGION")?,
    })
}

// === impl Turn ===

impl Turn<'_> {
    async fn run(&self) -> Result<Figures, String> {
        match self.tool {
            Tool::Boilerhouse => self.ours().await,
            Tool::Raw => self.raw().await,
            _ => self.foreign(),
        }
    }

    async fn ours(&self) -> Result<Figures, String> {
        let store = || ours::store(self.place, &self.prefix);
        let mut figures = Figures::new();
        let mut node = ours::Node::open(&self.folder.join("node"), store()?, 0)?;
        node.prepare().await?;
        node.fill_empty().await?;
        let copy = self.folder.join("source");
        self.write(&node.state()?)?;
        figures.push((self.set.up(), node.release().await?));
        {
            let mut other = ours::Node::open(&self.folder.join("other"), store()?, 100)?;
            other.prepare().await?;
            let filled = other.fill_newest().await?;
            let begun = std::time::Instant::now();
            raw::sync(&other.state()?)?;
            figures.push((self.set.down(), filled + begun.elapsed()));
            self.source.compare(&other.state()?, &[])?;
            node.prepare().await?;
            node.fill_cached().await?;
            trees::compare_metadata(&node.state()?, &other.state()?)?;
        }
        remove(&self.folder.join("other"))?;
        if self.set == Set::Small {
            raw::sync(&self.folder)?;
            figures.push(("unchanged", node.release().await?));
            node.prepare().await?;
            node.fill_cached().await?;
            let changed = self.source.change_one_percent(&node.state()?, self.round)?;
            raw::sync(&self.folder)?;
            figures.push(("one-percent", node.release().await?));
            let mut other = ours::Node::open(&copy, store()?, 200)?;
            other.prepare().await?;
            other.fill_newest().await?;
            self.source.compare(&other.state()?, &changed)?;
            drop(other);
            // A server that has just started, and must ask the store before it trusts its cache.
            let epoch = node.epoch();
            drop(node);
            let mut node = ours::Node::open(&self.folder.join("node"), store()?, epoch)?;
            node.prepare().await?;
            let asked = node.fill_asked().await?;
            figures.push(("unchanged-cold", asked + node.release().await?));
        }
        Ok(figures)
    }

    fn foreign(&self) -> Result<Figures, String> {
        let (source, target) = (self.folder.join("source"), self.folder.join("target"));
        let tool = Foreign {
            programs: self.programs,
            place: self.place,
            tool: self.tool,
            set: self.set,
            prefix: &self.prefix,
            cache: &self.folder.join("cache"),
        };
        let mut figures = Figures::new();
        self.write(&source)?;
        tool.prepare()?;
        figures.push((self.set.up(), tool.up(&source)?));
        let fetch = |changed: &[trees::SourceFile]| {
            std::fs::create_dir_all(&target).map_err(|error| error.to_string())?;
            let mut elapsed = tool.down(&target)?;
            let begun = std::time::Instant::now();
            raw::sync(&target)?;
            elapsed += begun.elapsed();
            self.source
                .compare(&target, changed)
                .map_err(|error| format!("{}: {error}", self.tool.name()))?;
            remove(&target)?;
            Ok::<_, String>(elapsed)
        };
        figures.push((self.set.down(), fetch(&[])?));
        if self.set == Set::Small {
            raw::sync(&self.folder)?;
            figures.push(("unchanged", tool.again(&source)?));
            let changed = self.source.change_one_percent(&source, self.round)?;
            raw::sync(&self.folder)?;
            figures.push(("one-percent", tool.again(&source)?));
            fetch(&changed)?;
        }
        Ok(figures)
    }

    async fn raw(&self) -> Result<Figures, String> {
        let raw = Raw::new(self.place.clone())?;
        let key = format!("{}/raw", self.prefix);
        let body = bytes::Bytes::from(self.source.contents());
        let mut figures = Figures::new();
        figures.push((self.set.up(), raw.put(&key, body).await?));
        let (got, bytes) = raw.get(&key).await?;
        if bytes != self.source.bytes() {
            return Err(format!("{key} came back with {bytes} bytes"));
        }
        let down = match self.on {
            On::Tmpfs => got,
            On::Disk => raw::create_files(self.source, &self.folder.join("created"))?,
        };
        figures.push((self.set.down(), down));
        if self.set == Set::Small {
            let part = self.source.files.len().div_ceil(100) * self.source.files[0].content.len();
            let body = bytes::Bytes::from(self.source.contents()).slice(..part);
            figures.push(("one-percent", raw.put(&key, body).await?));
        }
        Ok(figures)
    }

    /// Writes the tree and waits until it is on the disk, so that nobody measures that.
    fn write(&self, root: &Path) -> Result<(), String> {
        self.source.write(root).map_err(|error| format!("{}: {error}", root.display()))?;
        raw::sync(root)
    }
}

fn remove(path: &Path) -> Result<(), String> {
    // What was just closed may still note behind its answer that all is on the disk.
    for _ in 0..100 {
        match std::fs::remove_dir_all(path) {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", path.display()));
            }
            _ => return Ok(()),
        }
    }
    Err(format!("{}: something still writes there", path.display()))
}

/// Removes what a turn left at the server; not measured.
fn clean(programs: &Programs, place: &Place, prefix: &str, collect: Option<&str>) -> Result<(), String> {
    let mut command = Command::new(&programs.s5cmd);
    command.args(["--endpoint-url", &place.endpoint, "--log", "error", "rm"]);
    command.arg(format!("s3://{}/{prefix}/*", place.bucket));
    command.env("AWS_ACCESS_KEY_ID", &place.access_key).env("AWS_SECRET_ACCESS_KEY", &place.secret_key);
    command.env("AWS_REGION", &place.region);
    let output = command.output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(format!("s5cmd rm: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let Some(collect) = collect else { return Ok(()) };
    let status =
        Command::new("sh").args(["-c", collect]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("--collect {collect:?}: {other:?}")),
    }
}

async fn measure(plan: &Plan, results: &mut Results, json: &Path) -> Result<(), String> {
    let programs = Programs::find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench/venv/bin"))?;
    let (_own, memory) = OwnServer::start()?;
    let scratch = On::Disk.folder().join("checkout");
    for &set in &plan.sets {
        remove(&scratch)?;
        let source = set.source(plan.is_quick, &scratch)?;
        println!("{}: {} files, {} bytes", set.name(), source.files.len(), source.bytes());
        for &server in &plan.servers {
            let place = match server {
                Server::Memory => memory.clone(),
                Server::Radosgw => radosgw()?,
            };
            let collect = plan.collect.as_deref().filter(|_| server == Server::Radosgw);
            for &on in &plan.on {
                for round in 0..=plan.rounds {
                    for at in 0..plan.tools.len() {
                        let tool = plan.tools[(at + round) % plan.tools.len()];
                        let turn = Turn {
                            place: &place,
                            programs: &programs,
                            set,
                            source: &source,
                            tool,
                            round,
                            on,
                            folder: on.folder().join("turn"),
                            prefix: format!(
                                "bench-{}-{}-{round}-{}",
                                std::process::id(),
                                set.name(),
                                tool.name()
                            ),
                        };
                        remove(&turn.folder)?;
                        std::fs::create_dir_all(&turn.folder).map_err(|error| error.to_string())?;
                        let figures = turn.run().await?;
                        clean(&programs, &place, &turn.prefix, collect)?;
                        for (case, elapsed) in figures {
                            let seconds = elapsed.as_secs_f64();
                            let (server, on) = (server.name(), on.name());
                            let note = if round == 0 { " (warming up, does not count)" } else { "" };
                            println!("{round} {server} {on} {case} {}: {seconds:.3} s{note}", tool.name());
                            if round > 0 {
                                results.add(case, server, on, tool, seconds);
                            }
                        }
                        remove(&turn.folder)?;
                    }
                }
                results.write(json)?;
            }
        }
        remove(&scratch)?;
    }
    Ok(())
}

fn run() -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let json = root.join("target/bench/state.json");
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => return runtime.block_on(server::serve()),
        ["--readme"] => return Results::read(&json)?.put_into(&root.join("README.md")),
        _ => {}
    }
    let plan = Plan::parse(arguments)?;
    let mut results = Results::default();
    let measured = runtime.block_on(measure(&plan, &mut results, &json));
    for on in On::ALL {
        remove(&on.folder())?;
    }
    measured?;
    let (cold, listed): (Vec<_>, Vec<_>) =
        results.0.into_iter().partition(|row| row.case == "unchanged-cold");
    let results = Results(listed);
    results.write(&json)?;
    println!("\nMedians; in brackets how many times ours.\n{}", results.table());
    if !cold.is_empty() {
        println!(
            "\nunchanged, when a server that has just started asks the store first:\n{}",
            Results(cold).table()
        );
    }
    println!("\nwritten to {}", json.display());
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-state: {error}");
            ExitCode::FAILURE
        }
    }
}
