//! The workload that is there when nobody wrote one.

use super::source::SourceFile;

/// Its id.
pub(super) const ID: &str = "default";

/// Its script. The command outlives any image that has a shell: it waits in the
/// background, so that the trap answers a signal at once.
const TEXT: &str = r#"//! The built-in workload: the default image, kept up, with the tenant's state in /data.
fn workload() {
    #{
        id: "default",
        name: "Default",
        image: IMAGE,
        command: ["sh", "-c", "trap 'kill $! 2>/dev/null; exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"],
        volumes: #{
            state: #{ container_path: "/data", mode: "rw" },
            secrets: #{ container_path: "/secrets", mode: "ro" },
            comm: #{ container_path: "/comm", mode: "rw" },
        },
    }
}
"#;

/// Writes the built-in workload for an image.
pub(super) fn source(image: &str) -> SourceFile {
    let quoted: String = image
        .chars()
        .flat_map(|c| {
            let escape = matches!(c, '"' | '\\').then_some('\\');
            escape.into_iter().chain([if c.is_control() { ' ' } else { c }])
        })
        .collect();
    SourceFile::new("(built-in) default.rhai", TEXT.replacen("IMAGE", &format!("\"{quoted}\""), 1))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::process::CommandExt,
        process::{Child, Command, Stdio},
        time::{Duration, Instant},
    };

    use crate::script::{LoadOptions, Set, Sources};

    /// Ends all of a process group, however the test ends.
    struct Group(Child);

    impl Group {
        fn kill(&self, signal: &str, whom: &str) {
            let kill = format!("kill -s {signal} -- {whom}{}", self.0.id());
            Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status().unwrap();
        }

        /// Waits until the shell has started its `sleep`: before, it has no trap yet.
        fn settle(&self) {
            let children = format!("/proc/{0}/task/{0}/children", self.0.id());
            within(|| {
                let child = fs::read_to_string(&children).ok()?.split_whitespace().next()?.to_owned();
                (fs::read_to_string(format!("/proc/{child}/comm")).ok()?.trim() == "sleep").then_some(())
            });
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            self.kill("KILL", "-");
            let _ = self.0.wait();
        }
    }

    fn within<T>(mut condition: impl FnMut() -> Option<T>) -> T {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(met) = condition() {
                return met;
            }
            assert!(Instant::now() < until, "the condition is met in time");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    #[test]
    fn its_command_stays_up_and_ends_at_once_on_a_signal() {
        let set = Set::load(&Sources::default(), &LoadOptions::default()).unwrap();
        let command = set.only().unwrap().spec.command.clone().unwrap();
        for signal in ["TERM", "INT"] {
            // A shell cannot trap what was ignored when it began, and a job in the
            // background is begun with SIGINT ignored.
            let mut shell = Command::new("env");
            shell
                .arg("--default-signal=INT")
                .args(&command)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            let mut group = Group(shell.process_group(0).spawn().unwrap());
            group.settle();
            assert!(group.0.try_wait().unwrap().is_none(), "it stays up");
            group.kill(signal, "");
            let status = within(|| group.0.try_wait().unwrap());
            assert!(status.success(), "{signal}: {status:?}");
        }
    }

    #[test]
    fn an_image_cannot_break_out_of_its_text() {
        let options = LoadOptions { default_image: "a\", id: \"x\\".to_owned(), ..LoadOptions::default() };
        let errors = Set::load(&Sources::default(), &options).unwrap_err();
        assert_eq!(errors[0].field.as_deref(), Some("image"), "{errors:?}");
    }
}
