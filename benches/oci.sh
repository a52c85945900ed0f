#!/usr/bin/env bash
# Runs one bundle (busybox, five namespaces and more, /bin/true) on berth, crun and runc in turn, and prints wall time,
# CPU time and peak memory, with the ratio to crun. Needs root.
# A hybrid host's cgroups are shown to all as pure v2 (or CGROUPS=v1), in a private mount namespace: crun refuses
# the mixture.
#   benches/oci.sh [rounds]          BERTH_OCI=path of a binary that answers as `berth oci` (default: built here)
set -eu
cd "$(dirname "$0")/.."
rounds=${1:-100}
if [ -z "${BERTH_OCI:-}" ]; then
    cargo build --release -q -p oci --bin berth-oci
    BERTH_OCI=$PWD/target/release/berth-oci
fi
view=:
if [ -d /sys/fs/cgroup/unified ]; then
    case ${CGROUPS:-v2} in
    v2) view='umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup' ;;
    v1) view='umount /sys/fs/cgroup/unified' ;;
    esac
fi
exec unshare -m --propagation private sh -c "$view"' && exec python3 - "$@"' sh "$rounds" "berth=$BERTH_OCI" "crun=$(command -v crun || true)" "runc=$(command -v runc || true)" <<'PYTHON'
import json, os, shutil, statistics, subprocess, sys, tempfile, time

rounds = int(sys.argv[1])
runtimes = [tuple(a.split("=", 1)) for a in sys.argv[2:]]
runtimes = [(n, p) for n, p in runtimes if p]
busybox = next((b for b in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(b)), None)
if os.geteuid() != 0 or not busybox:
    sys.exit("benches/oci.sh: root and busybox-static are needed")
scratch = tempfile.mkdtemp(prefix="berth-bench-")
try:
    os.makedirs(scratch + "/rootfs/bin")
    shutil.copy(busybox, scratch + "/rootfs/bin/busybox")
    os.symlink("busybox", scratch + "/rootfs/bin/true")
    subprocess.run([runtimes[0][1], "spec", "--bundle", scratch], check=True)
    config = json.load(open(scratch + "/config.json"))
    config["process"]["terminal"] = False
    config["process"]["args"] = ["/bin/true"]
    config["ociVersion"] = "1.0.2"
    config["linux"]["namespaces"] = [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount")]
    # crun wants to raise RLIMIT_MEMLOCK for device rules, which roots without CAP_SYS_RESOURCE cannot.
    config["linux"].pop("resources", None)
    json.dump(config, open(scratch + "/config.json", "w"))
    for name, path in list(runtimes):
        if subprocess.run([path, "--root", f"{scratch}/state-{name}", "run", "--bundle", scratch, f"try-{name}"]).returncode:
            print(f"{name} cannot run here and is left out")
            runtimes.remove((name, path))
    results = {n: [] for n, _ in runtimes}
    peaks = {n: [] for n, _ in runtimes}
    for i in range(rounds + 3):
        for name, path in runtimes:
            begin = time.perf_counter()
            pid = os.posix_spawn(path, [path, "--root", f"{scratch}/state-{name}", "run", "--bundle", scratch, f"bench-{name}-{i}"], os.environ)
            _, status, usage = os.wait4(pid, 0)
            wall = time.perf_counter() - begin
            if status:
                sys.exit(f"{name}: exit status {status}")
            if i >= 3 and i % 5 == 0:
                # Apart, and by a small program: a child's peak begins with what its parent had. Busybox takes
                # the kernel's KiB for pages.
                meter = subprocess.run([busybox, "time", "-f", "%M", path, "--root", f"{scratch}/state-{name}", "run", "--bundle", scratch, f"memory-{name}"], capture_output=True, text=True)
                peaks[name].append(int(meter.stderr.split()[-1]) / 1024 / (os.sysconf("SC_PAGESIZE") / 1024))
            if i >= 3:
                results[name].append((wall * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3))
    yard = "crun" if "crun" in results else runtimes[0][0]
    median = statistics.median
    wall0, cpu0 = zip(*results[yard])
    print(f"{rounds} rounds, alternating; ratios are to {yard}; times in ms")
    print(f"{'':8}{'wall min':>10}{'ratio':>7}{'p50':>8}{'ratio':>7}{'CPU min':>10}{'ratio':>7}{'p50':>8}{'ratio':>7}{'peak MB':>10}{'ratio':>7}")
    for name, _ in runtimes:
        wall, cpu = zip(*results[name])
        cells = [(min(wall), min(wall0)), (median(wall), median(wall0)), (min(cpu), min(cpu0)), (median(cpu), median(cpu0)), (median(peaks[name]), median(peaks[yard]))]
        print(f"{name:8}" + "".join(f"{a:{w}.1f}{a / b:7.2f}" for (a, b), w in zip(cells, (10, 8, 10, 8, 10))))
finally:
    shutil.rmtree(scratch, ignore_errors=True)
PYTHON
