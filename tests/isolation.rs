//! What a container cannot do, tried from inside real ones. Each hardening default of
//! `runtime::plan` has a row that fails when the default is gone.

#![allow(clippy::unwrap_used, reason = "a test ends where it is surprised")]

mod support;

use std::collections::BTreeMap;

use boilerhouse::{
    model::{ContainerId, WorkloadSpec},
    runtime::{ContainerStatus, ExecOutput, Runtime, plan::Mount},
};

use self::support::{
    engine::{TestEngine, eventually, with_engine},
    images,
    specs::{command, plan_of, spec},
};

/// A container to try things in.
struct Inside<'a> {
    engine: &'a TestEngine,
    id: ContainerId,
}

/// What a system call is to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// EPERM from the filter.
    Denied,
    /// ENOSYS.
    Missing,
    /// Anything but EPERM and ENOSYS: the filter lets it through.
    Reached,
    /// Success.
    Works,
}

impl<'a> Inside<'a> {
    async fn start(engine: &'a TestEngine, slot: &str, spec: &WorkloadSpec, mounts: Vec<Mount>) -> Self {
        let created = engine.runtime.create(&plan_of(&engine.instance, slot, spec, mounts)).await.unwrap();
        engine.runtime.start(&created.id).await.unwrap();
        Self { engine, id: created.id }
    }

    async fn run(&self, argv: &[&str]) -> ExecOutput {
        self.engine.runtime.exec(&self.id, command(argv)).await.unwrap()
    }

    /// Runs a shell command and returns what it wrote to both outputs.
    async fn sh(&self, script: &str) -> (i64, String) {
        let output = self.run(&["sh", "-c", script]).await;
        let text = [output.stdout, output.stderr].concat();
        (output.status, String::from_utf8_lossy(&text).trim().to_owned())
    }

    /// Checks that a shell command fails, and says why.
    async fn refuses(&self, script: &str, why: &str) {
        let (status, text) = self.sh(script).await;
        assert!(status != 0 && text.contains(why), "{script:?} gave {status}: {text}");
    }

    /// Checks what a shell command prints.
    async fn prints(&self, script: &str, expected: &str) {
        assert_eq!(self.sh(script).await, (0, expected.to_owned()), "{script:?}");
    }

    async fn call(&self, name: &str, number: i64, arguments: &[i64], expected: Answer) {
        let numbers = [number].iter().chain(arguments).map(i64::to_string).collect::<Vec<_>>();
        let argv: Vec<&str> = ["/bin/probe"].into_iter().chain(numbers.iter().map(String::as_str)).collect();
        let output = self.run(&argv).await;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let Ok(result) = text.parse::<i64>() else { panic!("{name}: {output:?}") };
        let is_as_expected = match expected {
            Answer::Denied => result == -1,
            Answer::Missing => result == -38,
            Answer::Reached => result != -1 && result != -38,
            Answer::Works => result >= 0,
        };
        assert!(is_as_expected, "{name}{arguments:?} answered {result}, expected {expected:?}");
    }
}

/// A spec that says nothing but small limits, for the user `app`.
fn probe_spec() -> WorkloadSpec {
    let mut spec = spec("probe", images::PROBE);
    spec.command = Some(["sleep", "1000"].map(str::to_owned).into());
    spec.resources.cpus = 0.5;
    spec
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_has_no_privileges() {
    with_engine(|engine| async move {
        images::ensure_probe(&engine.raw).await;
        let app = Inside::start(&engine, "s1", &probe_spec(), Vec::new()).await;
        let mut spec = probe_spec();
        spec.user = Some("root".into());
        let root = Inside::start(&engine, "s2", &spec, Vec::new()).await;

        app.prints("id -u; id -g", "1000\n1000").await;
        root.prints("id -u", "0").await;
        // Of the first process as of a command.
        for (inside, status) in [
            (&app, "/proc/self/status"),
            (&root, "/proc/self/status"),
            (&app, "/proc/1/status"),
            (&root, "/proc/1/status"),
        ] {
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                inside.prints(&format!("grep {set}: {status}"), &format!("{set}:\t0000000000000000")).await;
            }
            inside.prints(&format!("grep NoNewPrivs: {status}"), "NoNewPrivs:\t1").await;
            inside.prints(&format!("grep Seccomp: {status}"), "Seccomp:\t2").await;
        }
        let geteuid = libc::SYS_geteuid.to_string();
        app.prints("ls -l /bin/probe-suid | cut -c1-10", "-rwsr-xr-x").await;
        app.prints(&format!("/bin/probe-suid {geteuid}"), "1000").await;
        root.refuses("chown 1000 /tmp", "Operation not permitted").await;
        root.refuses("mknod /tmp/null c 1 3", "Operation not permitted").await;
        root.refuses("hostname other", "Operation not permitted").await;
        root.refuses("mount -t tmpfs none /tmp", "permission denied").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_sees_only_what_is_its_own() {
    with_engine(|engine| async move {
        images::ensure_probe(&engine.raw).await;
        let slot = tempfile::tempdir().unwrap();
        let mounts = ["state", "secrets"].map(|name| {
            let source = slot.path().join(name);
            std::fs::create_dir(&source).unwrap();
            std::fs::write(source.join("file"), name).unwrap();
            std::fs::set_permissions(&source, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
            Mount {
                source: source.to_str().unwrap().to_owned(),
                target: format!("/{name}"),
                read_only: name == "secrets",
            }
        });
        let mut spec = probe_spec();
        spec.tmpfs = vec!["/var/cache".into()];
        let inside = Inside::start(&engine, "s1", &spec, mounts.into()).await;

        for path in ["/x", "/bin/x", "/etc/x", "/root/x", "/var/x"] {
            inside.refuses(&format!("echo x > {path}"), "").await;
        }
        let mut root = probe_spec();
        root.user = Some("root".into());
        let as_root = Inside::start(&engine, "s2", &root, Vec::new()).await;
        as_root.refuses("echo x > /x", "Read-only file system").await;
        as_root.refuses("echo x > /proc/sys/kernel/core_pattern", "Read-only file system").await;
        as_root.prints("grep -c ' /sys sysfs ro,' /proc/mounts", "1").await;

        inside.prints("cat /state/file; echo; cat /secrets/file", "state\nsecrets").await;
        inside.prints("echo new > /state/new && cat /state/new", "new").await;
        assert_eq!(std::fs::read_to_string(slot.path().join("state/new")).unwrap(), "new\n");
        inside.refuses("echo new > /secrets/new", "Read-only file system").await;

        // Nothing of the host's: no socket of the engine's, no network but loopback, no process.
        inside
            .prints("ls -d /var/run/docker.sock /run/docker.sock /run/containerd 2>/dev/null | wc -l", "0")
            .await;
        inside.prints("ls /sys/class/net", "lo").await;
        inside.prints("tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '", "lo").await;
        inside.prints("wc -l < /proc/net/route", "1").await;
        inside.prints("cat /proc/1/comm", "docker-init").await;
        inside.prints("ls -d /dev/sd* /dev/vd* /dev/nvme* /dev/mem /dev/kmsg 2>/dev/null | wc -l", "0").await;
        for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let host = std::fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
            let (status, inside) = inside.sh(&format!("readlink /proc/self/ns/{namespace}")).await;
            assert_eq!(status, 0);
            assert_ne!(inside, host.to_str().unwrap(), "{namespace}");
        }
        // A private cgroup namespace shows no path of the host's.
        inside.prints("cut -d: -f3 /proc/self/cgroup | sort -u", "/").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_cannot_use_more_than_its_share() {
    with_engine(|engine| async move {
        images::ensure_probe(&engine.raw).await;
        let mut spec = probe_spec();
        spec.tmpfs = vec!["/var/cache".into()];
        let inside = Inside::start(&engine, "s1", &spec, Vec::new()).await;

        for path in ["/tmp", "/run", "/var/cache"] {
            let (_, line) = inside.sh(&format!("grep ' {path} ' /proc/mounts")).await;
            let fields: Vec<&str> = line.split(' ').collect();
            assert_eq!((fields[1], fields[2]), (path, "tmpfs"));
            for option in ["rw", "nosuid", "nodev", "noexec", "size=8192k", "nr_inodes=2048"] {
                assert!(fields[3].split(',').any(|o| o == option), "{path} lacks {option}: {line}");
            }
        }
        inside.refuses("cp /bin/busybox /tmp/sh && /tmp/sh", "Permission denied").await;
        inside.refuses("dd if=/dev/zero of=/tmp/full bs=1M count=9", "No space left").await;
        inside.prints("rm /tmp/full; ls -ld /tmp /var/cache | cut -c1-10", "drwxrwxrwt\ndrwxrwxrwt").await;
        inside.refuses("i=0; while touch /tmp/$i; do i=$((i+1)); done; exit 1", "No space left").await;
        inside.sh("rm -r /tmp/*").await;
        inside.prints("df -k /dev/shm | tail -n 1 | awk '{print $2}'", "16384").await;
        inside.refuses("dd if=/dev/zero of=/dev/shm/full bs=1M count=17", "No space left").await;
        inside.sh("rm /dev/shm/full").await;

        inside.prints("ulimit -c; ulimit -Hc; ulimit -n; ulimit -Hn", "0\n0\n1024\n16384").await;
        let limits = group(
            &inside,
            &[
                ("memory", "memory/memory.limit_in_bytes", "memory.max"),
                ("swap", "memory/memory.memsw.limit_in_bytes", "memory.swap.max"),
                ("cpu", "cpu/cpu.cfs_quota_us", "cpu.max"),
                ("pids", "pids/pids.max", "pids.max"),
            ],
        )
        .await;
        assert_eq!(limits["memory"], "67108864");
        assert_eq!(limits["pids"], "64");
        assert!(["50000", "50000 100000"].contains(&limits["cpu"].as_str()), "{limits:?}");
        // Version 1 counts memory and swap together, version 2 swap alone; some kernels
        // have no account of swap.
        assert!(["67108864", "0", ""].contains(&limits["swap"].as_str()), "{limits:?}");

        inside.refuses("i=0; while [ $i -lt 80 ]; do sleep 30 & i=$((i+1)); done; wait", "can't fork").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_takes_too_much_memory_is_killed_alone() {
    with_engine(|engine| async move {
        let mut spec = spec("greedy", images::APP);
        spec.resources.memory_mb = 32;
        spec.entrypoint =
            Some(["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"].map(str::to_owned).into());
        let plan = plan_of(&engine.instance, "s1", &spec, Vec::new());
        let created = engine.runtime.create(&plan).await.unwrap();
        engine.runtime.start(&created.id).await.unwrap();
        let status = eventually("the container ends", || async {
            let status = engine.runtime.inspect(&created.id.0).await.unwrap().unwrap().status;
            (!status.is_alive()).then_some(status)
        })
        .await;
        assert_eq!(status, ContainerStatus::Exited { code: 137, oom_killed: true });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loosened_spec_is_loosened_and_no_more() {
    with_engine(|engine| async move {
        let mut spec = spec("loose", images::BUSYBOX);
        spec.read_only = false;
        spec.cap_add = vec!["CHOWN".into()];
        let inside = Inside::start(&engine, "s1", &spec, Vec::new()).await;
        inside.prints("echo x > /x && cat /x", "x").await;
        inside.prints("touch /tmp/mine && chown 1000 /tmp/mine && stat -c %u /tmp/mine", "1000").await;
        inside.prints("grep CapEff: /proc/self/status", "CapEff:\t0000000000000001").await;
        inside.prints("grep NoNewPrivs: /proc/self/status", "NoNewPrivs:\t1").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_filter_denies_dangerous_calls_whatever_the_capabilities() {
    with_engine(|engine| async move {
        images::ensure_probe(&engine.raw).await;
        let mut spec = probe_spec();
        spec.user = Some("root".into());
        // Without the filter these would let every call below reach the kernel.
        spec.cap_add =
            ["SYS_ADMIN", "SYS_PTRACE", "NET_RAW", "DAC_READ_SEARCH", "SYS_CHROOT"].map(str::to_owned).into();
        let inside = Inside::start(&engine, "s1", &spec, Vec::new()).await;
        for (name, number, arguments) in [
            ("mount", libc::SYS_mount, &[][..]),
            ("umount2", libc::SYS_umount2, &[]),
            ("move_mount", libc::SYS_move_mount, &[]),
            ("open_tree", libc::SYS_open_tree, &[]),
            ("fsopen", libc::SYS_fsopen, &[]),
            ("mount_setattr", libc::SYS_mount_setattr, &[]),
            ("pivot_root", libc::SYS_pivot_root, &[]),
            ("chroot", libc::SYS_chroot, &[]),
            ("unshare", libc::SYS_unshare, &[libc::CLONE_NEWUSER.into()]),
            ("unshare", libc::SYS_unshare, &[0]),
            ("setns", libc::SYS_setns, &[-1]),
            // SIGCHLD beside the flag, so that a child, were there one, is a proper one.
            ("clone", libc::SYS_clone, &[i64::from(libc::CLONE_NEWUSER) | 17]),
            ("clone", libc::SYS_clone, &[i64::from(libc::CLONE_NEWNS) | 17]),
            ("clone", libc::SYS_clone, &[i64::from(libc::CLONE_NEWNET) | 17]),
            ("clone", libc::SYS_clone, &[i64::from(libc::CLONE_NEWPID) | 17]),
            ("ptrace", libc::SYS_ptrace, &[]),
            ("process_vm_readv", libc::SYS_process_vm_readv, &[1]),
            ("process_vm_writev", libc::SYS_process_vm_writev, &[1]),
            ("kcmp", libc::SYS_kcmp, &[1, 1]),
            ("pidfd_getfd", libc::SYS_pidfd_getfd, &[-1]),
            ("bpf", libc::SYS_bpf, &[]),
            ("perf_event_open", libc::SYS_perf_event_open, &[]),
            ("userfaultfd", libc::SYS_userfaultfd, &[0]),
            ("io_uring_setup", libc::SYS_io_uring_setup, &[1]),
            ("io_uring_enter", libc::SYS_io_uring_enter, &[-1]),
            ("io_uring_register", libc::SYS_io_uring_register, &[-1]),
            ("keyctl", libc::SYS_keyctl, &[0, -3, 0]),
            ("add_key", libc::SYS_add_key, &[]),
            ("request_key", libc::SYS_request_key, &[]),
            ("open_by_handle_at", libc::SYS_open_by_handle_at, &[-1]),
            ("name_to_handle_at", libc::SYS_name_to_handle_at, &[-1]),
            ("fanotify_init", libc::SYS_fanotify_init, &[]),
            ("quotactl", libc::SYS_quotactl, &[]),
            ("syslog", libc::SYS_syslog, &[10]),
            ("sethostname", libc::SYS_sethostname, &[0, -1]),
            ("personality", libc::SYS_personality, &[0x0040_0000]),
            ("socket AF_VSOCK", libc::SYS_socket, &[40, 1]),
            ("socket AF_ALG", libc::SYS_socket, &[38, 5]),
            ("socket AF_PACKET", libc::SYS_socket, &[17, 3]),
            ("socket AF_BLUETOOTH", libc::SYS_socket, &[31, 3]),
            ("socketpair AF_TIPC", libc::SYS_socketpair, &[30, 1]),
        ] {
            inside.call(name, number, arguments, Answer::Denied).await;
        }
        // The filter does not know 32-bit calls: the thread ends.
        if cfg!(target_arch = "x86_64") {
            let output = inside.run(&["/bin/probe", "int80"]).await;
            assert_eq!((output.status, output.stdout.as_slice()), (128 + 31, &b""[..]), "SIGSYS: {output:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_filter_lets_ordinary_calls_through() {
    with_engine(|engine| async move {
        images::ensure_probe(&engine.raw).await;
        let inside = Inside::start(&engine, "s1", &probe_spec(), Vec::new()).await;
        for (name, number, arguments, expected) in [
            ("getpid", libc::SYS_getpid, &[][..], Answer::Works),
            ("socket AF_UNIX", libc::SYS_socket, &[1, 1], Answer::Works),
            ("socket AF_INET", libc::SYS_socket, &[2, 1], Answer::Works),
            ("socket AF_INET6", libc::SYS_socket, &[10, 1], Answer::Reached),
            ("socket AF_NETLINK", libc::SYS_socket, &[16, 3], Answer::Works),
            ("socketpair AF_UNIX", libc::SYS_socketpair, &[1, 1], Answer::Reached),
            // libc falls back to clone, which every shell command here goes through.
            ("clone3", libc::SYS_clone3, &[], Answer::Missing),
            ("personality", libc::SYS_personality, &[0xffff_ffff], Answer::Works),
            ("getrandom", libc::SYS_getrandom, &[], Answer::Works),
            ("memfd_create", libc::SYS_memfd_create, &[], Answer::Reached),
            ("eventfd2", libc::SYS_eventfd2, &[], Answer::Works),
            ("epoll_create1", libc::SYS_epoll_create1, &[], Answer::Works),
            ("epoll_pwait2", libc::SYS_epoll_pwait2, &[-1, 0, 1], Answer::Reached),
            ("inotify_init1", libc::SYS_inotify_init1, &[], Answer::Works),
            ("timerfd_create", libc::SYS_timerfd_create, &[1], Answer::Works),
            ("signalfd4", libc::SYS_signalfd4, &[-1, 0, 8], Answer::Reached),
            ("membarrier", libc::SYS_membarrier, &[], Answer::Works),
            ("io_setup", libc::SYS_io_setup, &[1], Answer::Reached),
            ("openat2", libc::SYS_openat2, &[-100], Answer::Reached),
            ("statx", libc::SYS_statx, &[-100], Answer::Reached),
            ("faccessat2", libc::SYS_faccessat2, &[-100], Answer::Reached),
            ("copy_file_range", libc::SYS_copy_file_range, &[-1, 0, -1], Answer::Reached),
            ("close_range", libc::SYS_close_range, &[100, 200], Answer::Works),
            ("futex", libc::SYS_futex, &[], Answer::Reached),
            ("sched_getaffinity", libc::SYS_sched_getaffinity, &[], Answer::Reached),
            ("prlimit64", libc::SYS_prlimit64, &[0, 7], Answer::Works),
            ("pidfd_open", libc::SYS_pidfd_open, &[-1], Answer::Reached),
            ("shmget", libc::SYS_shmget, &[0, 4096, 0o1600], Answer::Works),
            ("semget", libc::SYS_semget, &[0, 1, 0o1600], Answer::Works),
            ("mq_open", libc::SYS_mq_open, &[], Answer::Reached),
            ("flock", libc::SYS_flock, &[1, 4], Answer::Reached),
            ("fallocate", libc::SYS_fallocate, &[-1, 0, 0, 1], Answer::Reached),
            ("seccomp", libc::SYS_seccomp, &[2, 0, 0], Answer::Reached),
        ] {
            inside.call(name, number, arguments, expected).await;
        }
    })
    .await;
}

/// Reads files of the container's control group, of version 1 or 2, by a name; empty when
/// the kernel has none such.
async fn group(inside: &Inside<'_>, files: &[(&'static str, &str, &str)]) -> BTreeMap<&'static str, String> {
    let mut found = BTreeMap::new();
    for (name, one, two) in files {
        let (_, text) =
            inside.sh(&format!("cd /sys/fs/cgroup; cat {one} 2>/dev/null || cat {two} 2>/dev/null")).await;
        found.insert(*name, text);
    }
    found
}
