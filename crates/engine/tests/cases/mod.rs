//! What containers do.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use engine::container::{
    ArchivePutOptions, AttachOptions, ListOptions, LogsOptions, RemoveOptions, UpdateConfig,
    WaitCondition,
};
use engine::exec::ExecConfig;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{Fixture, unframed, within};

/// Runs all cases (or those whose name holds `filter`) on one engine.
pub fn run(filter: Option<&str>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut fixture = Fixture::new().await;
        let _guard = fixture.guard();
        macro_rules! cases {
            ($($name:ident),* $(,)?) => { $(
                if filter.is_none_or(|filter| stringify!($name).contains(filter)) {
                    let begun = Instant::now();
                    tokio::time::timeout(Duration::from_secs(60), $name(&mut fixture)).await.expect(stringify!($name));
                    eprintln!("test {} ... ok ({} ms)", stringify!($name).replace('_', " "), begun.elapsed().as_millis());
                }
            )* };
        }
        cases!(
            output_and_exit_code_come_back,
            stdin_reaches_the_container_and_its_end_too,
            a_terminal_is_one_and_can_be_resized,
            detach_keys_leave_a_container_running,
            a_client_that_does_not_read_holds_the_container_up_but_loses_nothing,
            too_much_memory_is_noticed,
            a_missing_program_is_refused_in_dockers_words,
            the_user_environment_and_folder_are_as_asked,
            volumes_get_what_the_image_has,
            a_container_is_stopped_by_its_signal_and_then_killed,
            exec_runs_inside_and_tells_its_code,
            files_go_in_and_out,
            logs_follow_to_the_end,
            pause_and_limits_change_a_running_container,
            a_failing_container_is_restarted,
            health_is_checked,
            init_reaps_and_passes_signals_on,
            a_removed_one_leaves_nothing,
            the_daemon_dies_and_the_next_finds_all,
            the_keeper_dies_and_its_containers_are_ended,
            many_at_once_and_in_a_row,
        );
        fixture.clean().await;
    });
    ExitCode::SUCCESS
}

async fn output_and_exit_code_come_back(f: &mut Fixture) {
    let (code, output) = f
        .run(&["sh", "-c", "echo out; echo err >&2; exit 7"], |_, _| {})
        .await;
    assert_eq!(code, 7);
    assert!(
        output.contains("out\n") && output.contains("err\n"),
        "{output}"
    );
    let (code, _) = f.run(&["sh", "-c", "kill -9 $$"], |_, _| {}).await;
    // Pid 1 is not killed by itself.
    assert_eq!(code, 0);
    let (_, output) = f.run(&["seq", "200000"], |_, _| {}).await;
    assert_eq!(output.lines().count(), 200_000);
}

async fn stdin_reaches_the_container_and_its_end_too(f: &mut Fixture) {
    let id = f
        .create(&["cat"], |config, _| {
            config.open_stdin = true;
            config.stdin_once = true;
        })
        .await;
    let options = AttachOptions {
        stdin: true,
        stdout: true,
        stream: true,
        ..Default::default()
    };
    let stream = f.engine.attach(&id, options).await.unwrap();
    let wait = f.engine.wait(&id, WaitCondition::NextExit).await.unwrap();
    f.engine.start(&id).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let input = vec![b'x'; 3 << 20];
    let write = async {
        writer.write_all(&input).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut output = Vec::new();
    let (_, _) = tokio::join!(write, reader.read_to_end(&mut output));
    assert_eq!(unframed(&output).len(), input.len());
    assert_eq!(within(wait).await.status_code, 0);
    f.remove(&id).await;
}

async fn a_terminal_is_one_and_can_be_resized(f: &mut Fixture) {
    let (code, output) = f
        .run(
            &["sh", "-c", "test -t 0 && test -t 1 && echo yes"],
            |config, _| {
                config.tty = true;
                config.open_stdin = true;
            },
        )
        .await;
    assert_eq!((code, output.as_str()), (0, "yes\r\n"));
    let id = f
        .start(&["sleep", "60"], |config, _| config.tty = true)
        .await;
    f.engine.resize(&id, 40, 100).await.unwrap();
    f.remove(&id).await;
}

async fn detach_keys_leave_a_container_running(f: &mut Fixture) {
    let id = f
        .create(&["cat"], |config, _| {
            config.tty = true;
            config.open_stdin = true;
            config.stdin_once = true;
        })
        .await;
    let options = AttachOptions {
        stdin: true,
        stdout: true,
        stream: true,
        ..Default::default()
    };
    let mut stream = f.engine.attach(&id, options).await.unwrap();
    f.engine.start(&id).await.unwrap();
    stream.write_all(b"hi\n\x10\x11").await.unwrap();
    let mut output = Vec::new();
    within(stream.read_to_end(&mut output)).await.unwrap();
    assert!(f.engine.inspect(&id, false).await.unwrap().state.running);
    f.remove(&id).await;
}

async fn a_client_that_does_not_read_holds_the_container_up_but_loses_nothing(f: &mut Fixture) {
    let id = f.create(&["seq", "300000"], |_, _| {}).await;
    let options = AttachOptions {
        stdout: true,
        stream: true,
        ..Default::default()
    };
    let mut slow = f.engine.attach(&id, options.clone()).await.unwrap();
    let gone = f.engine.attach(&id, options).await.unwrap();
    f.engine.start(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        f.engine.inspect(&id, false).await.unwrap().state.running,
        "it waits for its clients"
    );
    // Another container is not held up by it.
    let (code, _) = f.run(&["true"], |_, _| {}).await;
    assert_eq!(code, 0);
    drop(gone);
    let mut output = Vec::new();
    within(slow.read_to_end(&mut output)).await.unwrap();
    assert_eq!(unframed(&output).lines().count(), 300_000);
    f.remove(&id).await;
}

async fn too_much_memory_is_noticed(f: &mut Fixture) {
    let id = f
        .start(
            &["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"],
            |_, host| {
                host.resources.memory = 16 << 20;
                host.resources.memory_swap = 16 << 20;
            },
        )
        .await;
    let wait = f.engine.wait(&id, WaitCondition::NotRunning).await.unwrap();
    let code = within(wait).await.status_code;
    let state = f.engine.inspect(&id, false).await.unwrap().state;
    assert_eq!((code, state.oom_killed), (137, true));
    f.remove(&id).await;
}

async fn a_missing_program_is_refused_in_dockers_words(f: &mut Fixture) {
    let id = f.create(&["/no/such"], |_, _| {}).await;
    let error = f.engine.start(&id).await.unwrap_err();
    assert!(
        error.to_string().contains("no such file or directory"),
        "{error}"
    );
    assert_eq!(
        f.engine.inspect(&id, false).await.unwrap().state.exit_code,
        127
    );
    f.remove(&id).await;
    let id = f.create(&["nosuch"], |_, _| {}).await;
    let error = f.engine.start(&id).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("executable file not found in $PATH"),
        "{error}"
    );
    f.remove(&id).await;
}

async fn the_user_environment_and_folder_are_as_asked(f: &mut Fixture) {
    let (_, output) = f
        .run(
            &["sh", "-c", "id -u; id -G; pwd; echo $HOME; hostname"],
            |config, _| {
                config.user = "web".into();
                config.working_dir = "/new/place".into();
                config.hostname = "harbor".into();
            },
        )
        .await;
    assert_eq!(output, "33\n33 4\n/new/place\n/data\nharbor\n");
    let (code, output) = f
        .run(&["sh", "-c", "touch /x"], |_, host| {
            host.readonly_rootfs = true
        })
        .await;
    assert!(code != 0, "{output}");
    let (_, output) = f
        .run(
            &[
                "sh",
                "-c",
                "mount -t tmpfs x /tmp; echo $?; cat /proc/kcore | head -c 1",
            ],
            |_, _| {},
        )
        .await;
    assert!(!output.starts_with('0'), "{output}");
}

async fn volumes_get_what_the_image_has(f: &mut Fixture) {
    let (_, output) = f
        .run(
            &[
                "sh",
                "-c",
                "cat /data/seed; echo more > /data/more; ls /mnt",
            ],
            |_, host| {
                host.binds = Some(vec![
                    "store:/data".into(),
                    format!("{}:/mnt:ro", f.folder.display()),
                ]);
                host.tmpfs.insert("/tmp".into(), "size=1m".into());
            },
        )
        .await;
    assert!(
        output.starts_with("from the image\n") && output.contains("images"),
        "{output}"
    );
    let (_, output) = f
        .run(&["cat", "/data/more"], |_, host| {
            host.binds = Some(vec!["store:/data".into()])
        })
        .await;
    assert_eq!(output, "more\n");
    f.engine.volumes().remove("store", false).unwrap();
}

async fn a_container_is_stopped_by_its_signal_and_then_killed(f: &mut Fixture) {
    let id = f
        .start(
            &[
                "sh",
                "-c",
                "trap 'exit 3' TERM; while :; do sleep 0.05; done",
            ],
            |_, _| {},
        )
        .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    f.engine.stop(&id, None, None).await.unwrap();
    assert_eq!(
        f.engine.inspect(&id, false).await.unwrap().state.exit_code,
        3
    );
    assert!(f.engine.stop(&id, None, None).await.is_err());
    f.engine.start(&id).await.unwrap();
    f.engine.kill(&id, "KILL").await.unwrap();
    let state = f.engine.inspect(&id, false).await.unwrap().state;
    assert_eq!((state.exit_code, state.status.as_str()), (137, "exited"));
    f.remove(&id).await;
    let id = f.start(&["sleep", "100"], |_, _| {}).await;
    let begun = Instant::now();
    f.engine.restart(&id, Some(0), None).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(f.engine.inspect(&id, false).await.unwrap().state.running);
    assert!(
        f.engine
            .remove(&id, RemoveOptions::default())
            .await
            .is_err()
    );
    f.remove(&id).await;
}

async fn exec_runs_inside_and_tells_its_code(f: &mut Fixture) {
    let id = f
        .start(&["sleep", "100"], |_, host| {
            host.resources.memory = 64 << 20
        })
        .await;
    let config = ExecConfig {
        cmd: vec!["sh".to_owned(), "-c".into(), "echo $A; cat; exit 5".into()].into(),
        env: vec!["A=b".into()],
        attach_stdin: true,
        attach_stdout: true,
        attach_stderr: true,
        ..Default::default()
    };
    let exec = f.engine.exec_create(&id, config).await.unwrap();
    let mut stream = f
        .engine
        .exec_start(&exec, Default::default())
        .await
        .unwrap()
        .unwrap();
    stream.write_all(b"typed\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut output = Vec::new();
    within(stream.read_to_end(&mut output)).await.unwrap();
    assert_eq!(unframed(&output), "b\ntyped\n");
    for _ in 0..100 {
        let inspect = f.engine.exec_inspect(&exec).await.unwrap();
        if let Some(code) = inspect.exit_code {
            assert_eq!(code, 5);
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(
        f.engine.exec_inspect(&exec).await.unwrap().exit_code,
        Some(5)
    );
    let missing = ExecConfig {
        cmd: vec!["nosuch".to_owned()].into(),
        attach_stdout: true,
        ..Default::default()
    };
    let exec = f.engine.exec_create(&id, missing).await.unwrap();
    let error = f
        .engine
        .exec_start(&exec, Default::default())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("executable file not found"),
        "{error}"
    );
    let top = f.engine.top(&id, "").await.unwrap();
    assert_eq!(top.processes.len(), 1);
    let mut stats = f.engine.stats(&id, false, true).await.unwrap();
    let sample = stats.next().await.unwrap().unwrap();
    assert_eq!(sample.memory_stats.limit, Some(64 << 20));
    assert!(sample.pids_stats.current.is_some_and(|count| count >= 1));
    f.remove(&id).await;
}

async fn files_go_in_and_out(f: &mut Fixture) {
    let id = f.create(&["sleep", "100"], |_, _| {}).await;
    let mut tar = image::layer::tar::TarWriter::new(Vec::new());
    tar.file("in/file", 0o600, b"content\n").unwrap();
    let tar = tar.finish().unwrap();
    for running in [false, true] {
        if running {
            f.engine.start(&id).await.unwrap();
        }
        let archive = Box::pin(std::io::Cursor::new(tar.clone()));
        f.engine
            .archive_put(&id, "/tmp", ArchivePutOptions::default(), archive)
            .await
            .unwrap();
        let stat = f.engine.archive_stat(&id, "/tmp/in/file").await.unwrap();
        assert_eq!((stat.size, stat.name.as_str()), (8, "file"));
        let (_, stream) = f.engine.archive_get(&id, "/tmp/in").await.unwrap();
        let chunks: Vec<_> = stream.collect().await;
        let bytes: Vec<u8> = chunks
            .into_iter()
            .flat_map(|chunk| chunk.unwrap())
            .collect();
        let mut reader = image::layer::tar::TarReader::new(&bytes[..]);
        let mut names = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            names.push(String::from_utf8(entry.path).unwrap());
        }
        assert!(
            names
                .iter()
                .any(|name| name.trim_end_matches('/') == "in/file"),
            "{names:?}"
        );
        let error = f.engine.archive_stat(&id, "/no/such").await.unwrap_err();
        assert!(
            error.to_string().contains("Could not find the file"),
            "{error}"
        );
    }
    let changes = f.engine.changes(&id).await.unwrap();
    assert!(
        changes
            .iter()
            .any(|change| change.path == "/tmp/in/file" && change.kind == 1)
    );
    let (_, stream) = (0, f.engine.export(&id).await.unwrap());
    let exported: usize = stream
        .map(|chunk| chunk.unwrap().len())
        .fold(0, async |a, b| a + b)
        .await;
    assert!(exported > 500_000, "{exported}");
    let options = engine::container::CommitOptions {
        repository: "made".into(),
        pause: true,
        ..Default::default()
    };
    let image = f.engine.commit(&id, options).await.unwrap();
    f.remove(&id).await;
    let (_, output) = f
        .run(&["sh", "-c", "cat /tmp/in/file"], |config, _| {
            config.image = image.clone()
        })
        .await;
    assert_eq!(output, "content\n");
}

async fn logs_follow_to_the_end(f: &mut Fixture) {
    let id = f
        .start(
            &[
                "sh",
                "-c",
                "for i in 1 2 3 4 5 6 7 8 9; do echo line $i; sleep 0.02; done",
            ],
            |_, host| {
                host.log_config
                    .config
                    .insert("max-size".into(), "200".into());
                host.log_config
                    .config
                    .insert("max-file".into(), "20".into());
            },
        )
        .await;
    let options = LogsOptions {
        stdout: true,
        stderr: true,
        follow: true,
        ..Default::default()
    };
    let text = within(f.log(&id, options.clone())).await;
    assert_eq!(text.lines().count(), 9, "{text}");
    let text = f
        .log(
            &id,
            LogsOptions {
                follow: false,
                tail: Some(2),
                ..options
            },
        )
        .await;
    assert_eq!(text, "line 8\nline 9\n");
    f.remove(&id).await;
}

async fn pause_and_limits_change_a_running_container(f: &mut Fixture) {
    let id = f.start(&["sleep", "100"], |_, _| {}).await;
    f.engine.pause(&id).await.unwrap();
    assert_eq!(
        f.engine.inspect(&id, false).await.unwrap().state.status,
        "paused"
    );
    assert!(f.engine.pause(&id).await.is_err());
    f.engine.unpause(&id).await.unwrap();
    let mut update = UpdateConfig::default();
    update.resources.memory = 100 << 20;
    f.engine.update(&id, update).await.unwrap();
    let mut stats = f.engine.stats(&id, false, true).await.unwrap();
    assert_eq!(
        stats.next().await.unwrap().unwrap().memory_stats.limit,
        Some(100 << 20)
    );
    f.engine.rename(&id, "other-name").await.unwrap();
    assert_eq!(f.engine.inspect("other-name", false).await.unwrap().id, id);
    assert_eq!(f.engine.inspect(&id[..6], false).await.unwrap().id, id);
    f.remove(&id).await;
}

async fn a_failing_container_is_restarted(f: &mut Fixture) {
    let id = f
        .create(&["false"], |_, host| {
            host.restart_policy.name = "on-failure".into();
            host.restart_policy.maximum_retry_count = 2;
        })
        .await;
    f.engine.start(&id).await.unwrap();
    let wait = f.engine.wait(&id, WaitCondition::NotRunning).await.unwrap();
    assert_eq!(within(wait).await.status_code, 1);
    let shown = f.engine.inspect(&id, false).await.unwrap();
    assert_eq!(
        (shown.restart_count, shown.state.status.as_str()),
        (2, "exited")
    );
    f.remove(&id).await;
}

async fn health_is_checked(f: &mut Fixture) {
    let id = f
        .start(&["sleep", "100"], |config, _| {
            config.healthcheck = Some(engine::container::HealthConfig {
                test: vec!["CMD-SHELL".into(), "echo fine".into()],
                interval: 50_000_000,
                ..Default::default()
            });
        })
        .await;
    for _ in 0..100 {
        let health = f
            .engine
            .inspect(&id, false)
            .await
            .unwrap()
            .state
            .health
            .unwrap();
        if health.status == "healthy" {
            assert_eq!(health.log[0].output, "fine\n");
            f.remove(&id).await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it never becomes healthy");
}

async fn init_reaps_and_passes_signals_on(f: &mut Fixture) {
    let (code, output) = f
        .run(&["sh", "-c", "cat /proc/1/cmdline; exit 9"], |_, host| {
            host.init = Some(true)
        })
        .await;
    assert_eq!(code, 9);
    assert!(output.contains("docker-init"), "{output}");
    let id = f
        .start(&["sleep", "100"], |_, host| host.init = Some(true))
        .await;
    let begun = Instant::now();
    f.engine.stop(&id, Some(10), None).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(
        f.engine.inspect(&id, false).await.unwrap().state.exit_code,
        143
    );
    f.remove(&id).await;
}

async fn a_removed_one_leaves_nothing(f: &mut Fixture) {
    let id = f
        .create(&["true"], |config, host| {
            host.auto_remove = true;
            config.volumes = Some(["/anonymous".to_owned()].into_iter().collect());
        })
        .await;
    let wait = f.engine.wait(&id, WaitCondition::Removed).await.unwrap();
    f.engine.start(&id).await.unwrap();
    assert_eq!(within(wait).await.status_code, 0);
    assert!(f.engine.inspect(&id, false).await.is_err());
    assert!(!f.folder.join("containers").join(&id).exists());
    assert!(
        f.engine
            .volumes()
            .list(&Default::default())
            .unwrap()
            .is_empty()
    );
}

async fn the_daemon_dies_and_the_next_finds_all(f: &mut Fixture) {
    let lives = f
        .start(
            &["sh", "-c", "while :; do echo tick; sleep 0.05; done"],
            |_, _| {},
        )
        .await;
    let ends = f.start(&["sh", "-c", "sleep 0.5; exit 6"], |_, _| {}).await;
    let made = f.create(&["true"], |_, _| {}).await;
    // As after kill -9: nothing is told, the connection just ends. A half-made container lies about.
    let half = f
        .folder
        .join("containers")
        .join(base::Id::random().as_str());
    std::fs::create_dir(&half).unwrap();
    // A second engine cannot open the folder while the first has it, so the first must be gone: leak nothing, drop all.
    let empty = std::mem::replace(&mut f.engine, crate::cases::placeholder().await);
    drop(empty);
    tokio::time::sleep(Duration::from_millis(800)).await;
    f.reopen().await;
    assert!(!half.exists());
    let state = f.engine.inspect(&lives, false).await.unwrap().state;
    assert!(state.running, "{state:?}");
    for _ in 0..50 {
        if f.engine.inspect(&ends, false).await.unwrap().state.status == "exited" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let state = f.engine.inspect(&ends, false).await.unwrap().state;
    assert_eq!((state.status.as_str(), state.exit_code), ("exited", 6));
    assert_eq!(
        f.engine.inspect(&made, false).await.unwrap().state.status,
        "created"
    );
    let before = f
        .log(
            &lives,
            LogsOptions {
                stdout: true,
                ..Default::default()
            },
        )
        .await
        .lines()
        .count();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let after = f
        .log(
            &lives,
            LogsOptions {
                stdout: true,
                ..Default::default()
            },
        )
        .await
        .lines()
        .count();
    assert!(after > before && before > 10, "{before} {after}");
    for id in [lives, ends, made] {
        f.remove(&id).await;
    }
}

/// An engine of another folder, to stand in while the real one is gone.
async fn placeholder() -> std::sync::Arc<engine::Engine> {
    let folder =
        std::env::temp_dir().join(format!("berth-engine-test-{}-other", std::process::id()));
    let mut config = engine::EngineConfig::new(base::paths::Paths::beneath(&folder));
    config.keeper_command = vec![std::env::current_exe().unwrap(), "keeper".into()];
    let engine = engine::Engine::open(config).await.unwrap();
    let _ = std::fs::remove_dir_all(&folder);
    engine
}

async fn the_keeper_dies_and_its_containers_are_ended(f: &mut Fixture) {
    let id = f.start(&["sleep", "100"], |_, _| {}).await;
    let shown = f.engine.inspect(&id, false).await.unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", shown.state.pid)).unwrap();
    let keeper: i32 = stat[stat.rfind(')').unwrap() + 1..]
        .split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{keeper}/comm"))
            .unwrap()
            .trim(),
        "berth-keeper"
    );
    let memory = std::fs::read_to_string(format!("/proc/{keeper}/status")).unwrap();
    eprintln!(
        "keeper: {}",
        memory
            .lines()
            .find(|line| line.starts_with("VmRSS"))
            .unwrap()
    );
    base::pidfd::PidFd::open(keeper).unwrap().signal(9).unwrap();
    let wait = f.engine.wait(&id, WaitCondition::NotRunning).await.unwrap();
    assert_eq!(within(wait).await.status_code, 255);
    let (code, _) = f.run(&["true"], |_, _| {}).await;
    assert_eq!(code, 0);
    f.remove(&id).await;
}

async fn many_at_once_and_in_a_row(f: &mut Fixture) {
    let count = |f: &Fixture| {
        std::fs::read_dir(f.folder.join("containers"))
            .unwrap()
            .count()
    };
    let before = count(f);
    let begun = Instant::now();
    for _ in 0..20 {
        let id = f.create(&["true"], |_, host| host.auto_remove = true).await;
        let wait = f.engine.wait(&id, WaitCondition::Removed).await.unwrap();
        f.engine.start(&id).await.unwrap();
        assert_eq!(within(wait).await.status_code, 0);
    }
    eprintln!("20 in a row: {} ms each", begun.elapsed().as_millis() / 20);
    let begun = Instant::now();
    let all = (0..30).map(|_| async {
        let id = f
            .create(&["sh", "-c", "exit 4"], |_, host| host.auto_remove = true)
            .await;
        let wait = f.engine.wait(&id, WaitCondition::Removed).await.unwrap();
        f.engine.start(&id).await.unwrap();
        assert_eq!(within(wait).await.status_code, 4);
    });
    futures_util::future::join_all(all).await;
    eprintln!("30 at once: {} ms", begun.elapsed().as_millis());
    assert_eq!(count(f), before);
    assert!(
        f.engine
            .list(ListOptions {
                all: true,
                ..Default::default()
            })
            .await
            .unwrap()
            .is_empty()
    );
}
