//! Running a command in a container.
//!
//! The engine can start a command and say how it ended, but cannot end it. Past its
//! deadline we do: through the host's process table when the engine's processes are
//! in ours (see `processes`), else by a second command in the container that kills
//! what carries our marker in its environment (this needs a shell and `grep` in the
//! image, so that it fails in the barest of images, and says so).

use std::time::Duration;

use bollard::{
    container::LogOutput,
    exec::StartExecResults,
    models::{ExecConfig, ExecInspectResponse},
};
use futures_util::{
    StreamExt,
    future::{self, Either},
};
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    DockerRuntime, POLL_MS, QUICK_MS, bounded,
    failure::{Call, words},
    processes,
};
use crate::{
    clock::{self, SystemClock},
    model::ContainerId,
    runtime::{Error, ExecOutput, ExecRequest},
};

/// In the environment of each command, so that it can be found again.
const MARKER: &str = "BOILERHOUSE_EXEC";
/// From a command's deadline to its end, when it must be killed.
const END_MS: u64 = 10_000;
/// Kills what carries the marker given as first argument.
const KILL_SCRIPT: &str = r#"for process in /proc/[0-9]*; do
    grep -q "$1" "$process/environ" 2>/dev/null && kill -KILL "${process#/proc/}"
done"#;

/// Runs a command to its end, or to its deadline.
pub(super) async fn run(
    docker: &DockerRuntime,
    id: &ContainerId,
    request: ExecRequest,
) -> Result<ExecOutput, Error> {
    let until = Instant::now() + request.timeout;
    let marker = format!("{MARKER}={}", clock::random_hex(&SystemClock, 16));
    let config = ExecConfig {
        attach_stdin: Some(request.stdin.is_some()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        env: Some(environment(&request.env, &marker)),
        cmd: Some(request.argv.clone()),
        ..Default::default()
    };
    // Nothing runs yet, so a lost answer is no unknown outcome.
    let call = Call::reads("exec", &id.0);
    let exec = bounded(&call, QUICK_MS, docker.client().await?.create_exec(&id.0, config)).await?.id;
    match timeout_at(until, attached(docker, id, &exec, &request)).await {
        Ok(output) => output,
        Err(_) => {
            end(docker, id, &exec, &marker).await?;
            let after_ms = u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX);
            Err(Error::Timeout { target: id.0.clone(), after_ms })
        }
    }
}

fn environment(env: &[(String, String)], marker: &str) -> Vec<String> {
    let theirs = env.iter().map(|(name, value)| format!("{name}={value}"));
    theirs.chain([marker.to_owned()]).collect()
}

/// Starts the command, feeds it, and reads what it writes until it has ended.
async fn attached(
    docker: &DockerRuntime,
    id: &ContainerId,
    exec: &str,
    request: &ExecRequest,
) -> Result<ExecOutput, Error> {
    let call = Call::changes("exec", &id.0);
    let mut stdout = Capture::new(request.output_cap_bytes);
    let mut stderr = Capture::new(request.output_cap_bytes);
    match docker.client().await?.start_exec(exec, None).await.map_err(|error| call.translate(error)) {
        Ok(StartExecResults::Attached { mut output, mut input }) => {
            let feed = async {
                if let Some(stdin) = &request.stdin {
                    // A command that does not read to the end is no error of ours.
                    let _ = input.write_all(stdin.expose()).await;
                    let _ = input.shutdown().await;
                }
            };
            // Everything is read, also beyond the cap: a full pipe would stop the command.
            let read = async {
                while let Some(frame) = output.next().await {
                    match frame? {
                        LogOutput::StdOut { message } => stdout.take(&message),
                        // Without a terminal, a console's line is the engine's own.
                        LogOutput::StdErr { message } | LogOutput::Console { message } => {
                            stderr.take(&message)
                        }
                        LogOutput::StdIn { .. } => {}
                    }
                }
                Ok(())
            };
            let read = match future::select(Box::pin(feed), Box::pin(read)).await {
                Either::Left(((), read)) => read.await,
                Either::Right((read, _)) => read,
            };
            read.map_err(|error| call.translate(error))?;
        }
        Ok(StartExecResults::Detached) => return Err(call.unknown(words("the engine did not attach"))),
        Err(Error::Refused { operation, target, reason }) => {
            let Some(status) = unrunnable(&reason) else {
                return Err(Error::Refused { operation, target, reason });
            };
            stderr.take(reason.as_bytes());
            return Ok(output(status, stdout, stderr));
        }
        Err(error) => return Err(error),
    }
    // The output ends a moment before the engine has noted the end.
    loop {
        let state = look(docker, id, exec).await.map_err(|error| call.unknown(words(&error.to_string())))?;
        match (state.running, state.exit_code) {
            (Some(false), Some(status)) => return Ok(corrected(output(status, stdout, stderr))),
            _ => sleep(Duration::from_millis(POLL_MS)).await,
        }
    }
}

fn output(status: i64, stdout: Capture, stderr: Capture) -> ExecOutput {
    ExecOutput { status, truncated: stdout.cut || stderr.cut, stdout: stdout.bytes, stderr: stderr.bytes }
}

async fn look(docker: &DockerRuntime, id: &ContainerId, exec: &str) -> Result<ExecInspectResponse, Error> {
    let call = Call::reads("exec", &id.0);
    bounded(&call, QUICK_MS, docker.client().await?.inspect_exec(exec)).await
}

/// Kills a command and waits until the engine has seen its end.
///
/// # Errors
/// [`Error::Unknown`] when it may still run.
async fn end(docker: &DockerRuntime, id: &ContainerId, exec: &str, marker: &str) -> Result<(), Error> {
    let call = Call::changes("exec", &id.0);
    match timeout(Duration::from_millis(END_MS), kill_until_ended(docker, id, exec, marker)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            Err(call.unknown(words(&format!("past its deadline, and killing it failed: {error}"))))
        }
        Err(_) => Err(call.unknown(words("past its deadline, and it could not be killed"))),
    }
}

async fn kill_until_ended(
    docker: &DockerRuntime,
    id: &ContainerId,
    exec: &str,
    marker: &str,
) -> Result<(), Error> {
    loop {
        // A container that went away took its commands along.
        let state = match look(docker, id, exec).await {
            Err(Error::Conflict { .. }) => return Ok(()),
            other => other?,
        };
        let ended = state.running == Some(false) && state.exit_code.is_some();
        let pid = state.pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        // Also when it has ended: what it left in the background holds its output open.
        if pid > 0 && !kill_on_host(pid, id).await {
            match kill_inside(docker, id, marker).await {
                Err(error) if !ended => return Err(error),
                _ => {}
            }
        }
        if ended {
            return Ok(());
        }
        sleep(Duration::from_millis(POLL_MS)).await;
    }
}

/// Returns whether anything was killed.
async fn kill_on_host(pid: i32, id: &ContainerId) -> bool {
    let container = id.0.clone();
    let killed = tokio::task::spawn_blocking(move || processes::kill_session(pid, &container)).await;
    killed.is_ok_and(|killed| killed > 0)
}

async fn kill_inside(docker: &DockerRuntime, id: &ContainerId, marker: &str) -> Result<(), Error> {
    let call = Call::changes("exec", &id.0);
    let config = ExecConfig {
        cmd: Some(["sh", "-c", KILL_SCRIPT, "sh", marker].map(str::to_owned).into()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        ..Default::default()
    };
    let client = docker.client().await?;
    let exec = bounded(&call, QUICK_MS, client.create_exec(&id.0, config)).await?.id;
    let drained = async {
        if let StartExecResults::Attached { mut output, input: _input } =
            client.start_exec(&exec, None).await?
        {
            while let Some(frame) = output.next().await {
                frame?;
            }
        }
        Ok(())
    };
    bounded(&call, QUICK_MS, drained).await
}

/// Engines of the 20.10 line write why a command cannot be run to its output, and give
/// 126 whatever the reason.
fn corrected(mut output: ExecOutput) -> ExecOutput {
    if matches!(output.status, 126 | 127) && output.stderr.is_empty() {
        let words = String::from_utf8_lossy(&output.stdout);
        if let Some(status) =
            words.starts_with("OCI runtime exec failed").then(|| unrunnable(&words)).flatten()
        {
            output.status = status;
            output.stderr = std::mem::take(&mut output.stdout);
        }
    }
    output
}

/// The status of a command that the engine could not run, when its words say that.
fn unrunnable(reason: &str) -> Option<i64> {
    let of_the_command = reason.contains("exec failed") || reason.contains("starting container process");
    match reason {
        _ if !of_the_command => None,
        _ if reason.contains("executable file not found") || reason.contains("no such file or directory") => {
            Some(127)
        }
        _ if reason.contains("permission denied") => Some(126),
        _ => None,
    }
}

/// What a command wrote, up to a cap.
struct Capture {
    bytes: Vec<u8>,
    cap: usize,
    cut: bool,
}

impl Capture {
    fn new(cap: usize) -> Self {
        Self { bytes: Vec::new(), cap, cut: false }
    }

    fn take(&mut self, more: &[u8]) {
        let room = self.cap - self.bytes.len();
        self.bytes.extend_from_slice(&more[..more.len().min(room)]);
        self.cut |= more.len() > room;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_kept_up_to_the_cap() {
        let mut capture = Capture::new(5);
        for (more, kept, cut) in
            [("abc", "abc", false), ("de", "abcde", false), ("", "abcde", false), ("f", "abcde", true)]
        {
            capture.take(more.as_bytes());
            assert_eq!((capture.bytes.as_slice(), capture.cut), (kept.as_bytes(), cut));
        }
    }

    #[test]
    fn an_old_engines_words_are_no_output() {
        let given = |status, stdout: &str| {
            let stdout = stdout.as_bytes().to_vec();
            let output = corrected(ExecOutput { status, stdout, stderr: Vec::new(), truncated: false });
            (output.status, output.stdout.is_empty())
        };
        let words =
            "OCI runtime exec failed: exec failed: exec: \"x\": executable file not found in $PATH\r\n";
        assert_eq!(given(126, words), (127, true));
        assert_eq!(given(0, words), (0, false), "a command may print what it likes");
        assert_eq!(given(126, "sh: x: Permission denied"), (126, false));
    }

    #[test]
    fn a_marked_process_is_found_and_no_other() {
        let sleep =
            |marker: &str| std::process::Command::new("sleep").arg("60").env(MARKER, marker).spawn().unwrap();
        let id = std::process::id();
        let (mut marked, mut other) = (sleep(&format!("{id}-a")), sleep(&format!("{id}-b")));
        let script = ["-c", KILL_SCRIPT, "sh", &format!("{MARKER}={id}-a")];
        std::process::Command::new("sh").args(script).status().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&marked.wait().unwrap()), Some(9));
        assert!(other.try_wait().unwrap().is_none(), "it was killed");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_command_that_cannot_run_has_a_shells_status() {
        let failed = "OCI runtime exec failed: exec failed: unable to start container process: ";
        for (reason, status) in [
            (format!("{failed}exec: \"nope\": executable file not found in $PATH: unknown"), Some(127)),
            (format!("{failed}exec: \"/x\": stat /x: no such file or directory: unknown"), Some(127)),
            (format!("{failed}exec: \"/etc\": permission denied: unknown"), Some(126)),
            (format!("{failed}error adding pid 7 to cgroups"), None),
            ("dial unix: permission denied".to_owned(), None),
        ] {
            assert_eq!(unrunnable(&reason), status, "{reason}");
        }
    }
}
