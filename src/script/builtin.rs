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
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    use rustix::process::{Pid, Signal, kill_process};

    use crate::script::{LoadOptions, Set, Sources};

    #[test]
    fn its_command_ends_at_once_on_term() {
        let set = Set::load(&Sources::default(), &LoadOptions::default()).unwrap();
        let command = set.only().unwrap().spec.command.clone().unwrap();
        for signal in [Signal::TERM, Signal::INT] {
            let mut child =
                Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).spawn().unwrap();
            let pid = Pid::from_child(&child);
            // Until its trap is set, the shell would die of the signal itself.
            let until = Instant::now() + Duration::from_secs(10);
            let status = loop {
                kill_process(pid, signal).unwrap();
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                assert!(Instant::now() < until, "it ends on {signal:?}");
                std::thread::sleep(Duration::from_millis(20));
            };
            assert!(status.success() || status.code().is_none(), "{status:?}");
        }
    }

    #[test]
    fn an_image_cannot_break_out_of_its_text() {
        let options = LoadOptions { default_image: "a\", id: \"x\\".to_owned(), ..LoadOptions::default() };
        let errors = Set::load(&Sources::default(), &options).unwrap_err();
        assert_eq!(errors[0].field.as_deref(), Some("image"), "{errors:?}");
    }
}
