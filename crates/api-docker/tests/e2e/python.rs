//! The PyPI package `docker`, unchanged.

use std::process::Command;

use crate::daemon::{Daemon, has_busybox, shared};

crate::tests! {
    python_makes_volumes_and_networks,
    python_runs_execs_and_copies,
    python_builds_tags_and_saves,
}

/// Runs a script with `client` made; `None` where Python or the package is missing.
#[track_caller]
fn run(daemon: &Daemon, test: &str, script: &str) -> Option<String> {
    let there = Command::new("python3")
        .args(["-c", "import docker"])
        .output()
        .is_ok_and(|o| o.status.success());
    if !there {
        eprintln!(
            "SKIPPED: {test}: the Python package docker is not installed (pip install docker)"
        );
        return None;
    }
    let head = "import docker, io, tarfile, time\nclient = docker.from_env(timeout=40)\napi = client.api\n";
    let output = Command::new("timeout")
        .args(["100", "python3", "-c", &format!("{head}{script}")])
        .env(
            "DOCKER_HOST",
            format!("unix://{}", daemon.socket().display()),
        )
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned();
    assert!(
        output.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(text)
}

fn python_makes_volumes_and_networks() {
    let daemon = shared();
    let script = r#"
assert client.ping()
print(client.version()["ApiVersion"])
volume = client.volumes.create("py-vol", labels={"a": "b"})
assert [v.name for v in client.volumes.list(filters={"label": "a=b"})] == ["py-vol"]
assert volume.attrs["Labels"] == {"a": "b"} and volume.attrs["Driver"] == "local"
volume.remove()
try:
    client.volumes.get("py-vol")
    raise SystemExit("still there")
except docker.errors.NotFound as error:
    assert "no such volume" in str(error), error
try:
    client.images.get("no-such-image")
    raise SystemExit("found")
except docker.errors.ImageNotFound:
    pass
"#;
    if let Some(text) = run(&daemon, "python volumes", script) {
        assert_eq!(text, "1.50");
    }
    if crate::daemon::is_root() {
        let script = r#"
pool = docker.types.IPAMPool(subnet="10.213.7.0/24", gateway="10.213.7.1")
network = client.networks.create("py-net", ipam=docker.types.IPAMConfig(pool_configs=[pool]), labels={"x": "y"})
network.reload()
assert network.attrs["IPAM"]["Config"] == [{"Subnet": "10.213.7.0/24", "Gateway": "10.213.7.1"}], network.attrs
assert [n.name for n in client.networks.list(names=["py-net"])] == ["py-net"]
network.remove()
"#;
        run(&daemon, "python networks", script);
    }
}

fn python_runs_execs_and_copies() {
    let Some(daemon) = has_busybox("python") else {
        return;
    };
    let script = r#"
assert client.containers.run("busybox", ["echo", "hello"], remove=True) == b"hello\n"
try:
    client.containers.run("busybox", ["sh", "-c", "echo bad >&2; exit 3"], remove=True)
    raise SystemExit("succeeded")
except docker.errors.ContainerError as error:
    assert error.exit_status == 3 and error.stderr == b"bad\n", error
box = client.containers.run("busybox", ["sleep", "1000"], detach=True, name="py-box", labels={"py": "1"},
    environment={"A": "b"}, mem_limit="64m", ports={"80/tcp": None})
try:
    box.reload()
    assert box.status == "running", box.status
    assert box.attrs["NetworkSettings"]["IPAddress"], box.attrs["NetworkSettings"]
    assert box.attrs["NetworkSettings"]["Ports"]["80/tcp"], box.attrs["NetworkSettings"]
    assert [c.name for c in client.containers.list(filters={"label": "py=1"})] == ["py-box"]
    code, output = box.exec_run(["sh", "-c", "sleep 0.3; echo out; echo err >&2; exit 4"], demux=True)
    assert (code, output) == (4, (b"out\n", b"err\n")), (code, output)
    code, stream = box.exec_run("cat", stdin=True, socket=True)
    raw = getattr(stream, "_sock", stream)
    raw.sendall(b"typed")
    import socket
    raw.shutdown(socket.SHUT_WR)
    got = b""
    while True:
        part = raw.recv(100)
        if not part: break
        got += part
    assert got == b"\x01\0\0\0\0\0\0\x05typed", got
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo("file"); info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
    assert box.put_archive("/tmp", archive.getvalue())
    bits, stat = box.get_archive("/tmp/file")
    assert stat["name"] == "file" and stat["size"] == 4, stat
    data = io.BytesIO(b"".join(bits))
    assert tarfile.open(fileobj=data).extractfile("file").read() == b"data"
    assert box.top()["Processes"]
    assert box.stats(stream=False)["memory_stats"]["usage"] > 0
    assert any(change["Path"] == "/tmp/file" for change in box.diff())
    box.stop(timeout=0)
    assert box.wait()["StatusCode"] == 137
    box.start()
    box.rename("py-renamed")
    box.kill()
finally:
    box.remove(force=True, v=True)
box = client.containers.run("busybox", ["sh", "-c", "for i in 1 2 3; do echo $i; done"], detach=True)
assert box.wait()["StatusCode"] == 0
assert box.logs() == b"1\n2\n3\n" and box.logs(tail=1) == b"3\n"
assert list(box.logs(stream=True)) != []
box.remove()
"#;
    run(&daemon, "python containers", script);
}

fn python_builds_tags_and_saves() {
    let Some(daemon) = has_busybox("python build") else {
        return;
    };
    let script = r#"
image, logs = client.images.build(fileobj=io.BytesIO(b"FROM busybox\nRUN echo built > /built\nLABEL made=here\nCMD cat /built\n"), tag="py-built:one")
assert image.labels == {"made": "here"}, image.labels
assert client.containers.run("py-built:one", remove=True) == b"built\n"
assert image.tag("py-built", "two")
data = b"".join(image.save())
client.images.remove("py-built:one"); client.images.remove("py-built:two")
loaded = client.images.load(data)
assert loaded[0].id == image.id, loaded
client.images.remove(image.id, force=True)
"#;
    run(&daemon, "python build", script);
}
