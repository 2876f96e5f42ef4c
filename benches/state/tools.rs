//! The tools that people use today, called as their manuals say for many small
//! files, and for one large one.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{Place, Set, Tool};

/// Where the programs are.
pub(crate) struct Programs {
    pub(crate) rclone: PathBuf,
    pub(crate) s5cmd: PathBuf,
    pub(crate) restic: PathBuf,
}

/// One tool at one server.
pub(crate) struct Foreign<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) place: &'a Place,
    pub(crate) tool: Tool,
    pub(crate) set: Set,
    /// Below which its objects are.
    pub(crate) prefix: &'a str,
    /// Where restic may keep its cache: the same for all of one round, to its advantage.
    pub(crate) cache: &'a Path,
}

// === impl Programs ===

impl Programs {
    /// Finds the programs in the folder that `tools/bench-state.sh` fills, and restic in `PATH`.
    pub(crate) fn find(folder: &Path) -> Result<Self, String> {
        let of_folder = |name: &str| {
            let path = folder.join(name);
            if path.exists() {
                Ok(path)
            } else {
                Err(format!("{} is not there: use make bench-state", path.display()))
            }
        };
        Ok(Self { rclone: of_folder("rclone")?, s5cmd: of_folder("s5cmd")?, restic: "restic".into() })
    }
}

// === impl Foreign ===

impl Foreign<'_> {
    /// What has to be there before the first upload; not measured.
    pub(crate) fn prepare(&self) -> Result<(), String> {
        match self.tool {
            Tool::Restic => self.run(None, &["init"]).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Sends a tree to where there is nothing yet.
    pub(crate) fn up(&self, source: &Path) -> Result<Duration, String> {
        let from = source.display();
        match self.tool {
            Tool::Rclone => self.run(None, &["copy", &from.to_string(), &self.remote()]),
            Tool::S5cmd => self.run(None, &["cp", &format!("{from}/"), &self.remote()]),
            _ => self.run(Some(source), &["backup", "-q", "."]),
        }
    }

    /// Sends what has changed since.
    pub(crate) fn again(&self, source: &Path) -> Result<Duration, String> {
        let from = source.display();
        match self.tool {
            Tool::Rclone => self.run(None, &["sync", &from.to_string(), &self.remote()]),
            Tool::S5cmd => self.run(None, &["sync", &format!("{from}/"), &self.remote()]),
            _ => self.run(Some(source), &["backup", "-q", "."]),
        }
    }

    /// Fetches the tree into an empty directory.
    pub(crate) fn down(&self, target: &Path) -> Result<Duration, String> {
        let to = target.display();
        match self.tool {
            Tool::Rclone => self.run(None, &["copy", &self.remote(), &to.to_string()]),
            Tool::S5cmd => self.run(None, &["cp", &format!("{}*", self.remote()), &format!("{to}/")]),
            _ => self.run(None, &["restore", "-q", "latest", "--target", &to.to_string()]),
        }
    }

    fn remote(&self) -> String {
        match self.tool {
            Tool::Rclone => format!("bench:{}/{}", self.place.bucket, self.prefix),
            _ => format!("s3://{}/{}/", self.place.bucket, self.prefix),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let Place { endpoint, bucket, access_key, secret_key, region } = self.place;
        let is_big = self.set == Set::Big;
        let mut command = match self.tool {
            Tool::Rclone => {
                let mut command = Command::new(&self.programs.rclone);
                command.args(arguments).args(["--transfers", "32", "--checkers", "32", "--fast-list"]);
                command.arg("--s3-no-check-bucket");
                if is_big {
                    command.args(["--s3-upload-concurrency", "8", "--s3-chunk-size", "16M"]);
                    command.args(["--multi-thread-streams", "8"]);
                }
                let remote = [
                    ("TYPE", "s3"),
                    ("PROVIDER", "Other"),
                    // The pages that servers are fast at, and the only ones of our own.
                    ("LIST_VERSION", "2"),
                    ("ENDPOINT", endpoint),
                    ("REGION", region),
                    ("ACCESS_KEY_ID", access_key),
                    ("SECRET_ACCESS_KEY", secret_key),
                ];
                command.env("RCLONE_CONFIG", "/dev/null");
                command.envs(remote.map(|(name, value)| (format!("RCLONE_CONFIG_BENCH_{name}"), value)));
                command
            }
            Tool::S5cmd => {
                let mut command = Command::new(&self.programs.s5cmd);
                command.args([
                    "--endpoint-url",
                    endpoint,
                    "--numworkers",
                    "64",
                    "--log",
                    "error",
                    arguments[0],
                ]);
                if is_big {
                    command.args(["--concurrency", "8", "--part-size", "16"]);
                }
                command.args(&arguments[1..]);
                command
            }
            _ => {
                let mut command = Command::new(&self.programs.restic);
                command.args([
                    "-r",
                    &format!("s3:{endpoint}/{bucket}/{}", self.prefix),
                    "-o",
                    "s3.connections=32",
                ]);
                command.args(arguments).env("RESTIC_PASSWORD", "bench").env("RESTIC_CACHE_DIR", self.cache);
                command
            }
        };
        command.env("AWS_ACCESS_KEY_ID", access_key).env("AWS_SECRET_ACCESS_KEY", secret_key);
        command.env("AWS_REGION", region).env("AWS_DEFAULT_REGION", region);
        command.env_remove("http_proxy").env_remove("HTTP_PROXY");
        command
    }

    /// Runs it; answers how long it took from its start to its end.
    fn run(&self, folder: Option<&Path>, arguments: &[&str]) -> Result<Duration, String> {
        let mut command = self.command(arguments);
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        command.stdin(Stdio::null());
        let begun = Instant::now();
        let output = command.output().map_err(|error| format!("{}: {error}", self.tool.name()))?;
        let elapsed = begun.elapsed();
        if output.status.success() {
            return Ok(elapsed);
        }
        let words = String::from_utf8_lossy(&output.stderr);
        Err(format!("{} {} ended with {}: {}", self.tool.name(), arguments[0], output.status, words.trim()))
    }
}
