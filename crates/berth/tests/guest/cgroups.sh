#!/bin/sh
# Runs in a guest whose kernel has the v2 tree alone: containers with limits, and a reboot that is one. Who runs it wants
# every check after "PASS". It is the initial RAM disk's init (tests/machines_cgroups.rs), or a unit of a whole Debian
# with systemd (scripts/check-systemd).
export PATH=/bin:/sbin:/usr/local/bin
[ -d /run/systemd/system ] && systemd=yes || systemd=
if [ -z "$systemd" ] && [ "$1" != second ]; then
    # A root file system that can be left (pivot_root): the initial one cannot.
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    mkdir -p /new
    mount -t tmpfs -o size=300m tmpfs /new
    mkdir /new/proc /new/sys /new/dev /new/run /new/tmp /new/var /new/root
    cp -a /bin /lib /lib64 /etc /init /modules /new/ && rm -rf /bin/berth /lib
    for tree in proc sys dev; do mount --move /$tree /new/$tree; done
    exec switch_root /new /init second
fi

check() {
    # check NAME WANTED GOT
    if [ "$2" = "$3" ]; then echo "PASS $1 ($(cut -d' ' -f1 /proc/uptime) s)"; else echo "FAIL $1: wanted '$2', got '$3'"; fi
}
holds() {
    # holds NAME COMMAND...
    name=$1
    shift
    if "$@" >/tmp/said 2>&1; then echo "PASS $name ($(cut -d' ' -f1 /proc/uptime) s)"; else echo "FAIL $name: $* ended with $?: $(cat /tmp/said)"; fi
}

root=/sys/fs/cgroup
if [ -z "$systemd" ]; then
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    insmod /modules/overlay.ko
    ip link set lo up
    mount -t ext4 /dev/nvme0n1 /var || echo "FAIL the disk"
fi

wait_daemon() {
    [ -n "$systemd" ] || berth serve >/var/daemon.log 2>&1 &
    for _ in $(seq 600); do
        [ -S /run/berth/berth.sock ] && berth ps >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "FAIL the daemon does not answer"
    [ -n "$systemd" ] && journalctl -u berth | tail -n 20 || tail -n 20 /var/daemon.log
}
down() {
    # down reboot|poweroff
    sync
    if [ -n "$systemd" ]; then systemctl "$1"; else "$1" -f; fi
    sleep 1000
}
status() {
    berth inspect "$1" | grep '"Status"' | head -n 1 | cut -d'"' -f4
}

if [ -e /var/rebooted ]; then
    wait_daemon
    for _ in $(seq 300); do
        [ "$(status always)$(status unless)" = runningrunning ] && break
        sleep 0.2
    done
    check "always is back" running "$(status always)"
    check "unless-stopped is back" running "$(status unless)"
    check "no stays down" exited "$(status never)"
    check "what was stopped stays down" exited "$(status stopped)"
    check "its boot is another" other "$([ "$(cat /var/rebooted)" = "$(cat /proc/sys/kernel/random/boot_id)" ] && echo same || echo other)"
    check "what came back can be used" well "$(berth exec always echo well)"
    check "its files are there" kept "$(berth exec always cat /note)"
    berth rm -f always unless never stopped >/dev/null
    check "nothing is left" "" "$(berth ps -aq)"
    if [ -n "$systemd" ]; then
        # Ended with the host, they do not hold it up until systemd kills them.
        took=$(($(journalctl -b -1 -o short-unix -n 1 --no-pager | cut -d. -f1) - $(cat /var/went)))
        check "going down takes no minute" yes "$([ $took -lt 60 ] && echo yes || echo "$took s")"
    fi
    echo END
    down poweroff
fi

# --- the runtime -----------------------------------------------------------------------------------------------------
mkdir -p /tmp/bundle/rootfs/bin
cd /tmp/bundle
cp /bin/busybox rootfs/bin/
for applet in sh cat sleep mknod mkdir ls echo dd true; do ln -s busybox rootfs/bin/$applet; done
bundle() {
    # bundle RESOURCES SCRIPT
    cat >config.json <<END
{"ociVersion":"1.2.0","process":{"user":{"uid":0,"gid":0},"args":["sh","-c","$2"],"env":["PATH=/bin"],"cwd":"/",
"capabilities":{"bounding":["CAP_MKNOD"],"effective":["CAP_MKNOD"],"permitted":["CAP_MKNOD"]}},
"root":{"path":"rootfs"},"mounts":[{"destination":"/proc","type":"proc","source":"proc"},
{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","mode=755"]},
{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["ro","nosuid","nodev","noexec"]}],
"linux":{"cgroupsPath":"/made/by/test","resources":{$1},
"namespaces":[{"type":"pid"},{"type":"mount"},{"type":"ipc"},{"type":"uts"},{"type":"network"},{"type":"cgroup"}]}}
END
}
limits='"memory":{"limit":33554432,"swap":33554432},"pids":{"limit":16},"cpu":{"quota":50000,"period":100000,"shares":512,"cpus":"0"},"blockIO":{"weight":500},"unified":{"memory.high":"30000000"}'
bundle "$limits" 'cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight cpuset.cpus memory.high; cat /proc/self/cgroup'
check "limits are set" "33554432 16 50000 100000 20 0 29999104 0::/" "$(berth oci run one 2>&1 | tr '\n' ' ' | sed 's/ $//')"
check "the cgroup is gone" gone "$([ -d $root/made/by/test ] && echo there || echo gone)"
bundle '' 'mknod /dev/k c 1 11 && (cat /dev/k || echo refused); echo x > /dev/null && echo fine'
berth oci run one >/tmp/out 2>/dev/null
check "devices are filtered" "refused fine" "$(tr '\n' ' ' </tmp/out | sed 's/ $//')"
bundle '"pids":{"limit":8}' 'for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 3 & done; wait; true'
check "processes are counted" yes "$(berth oci run one 2>&1 | grep -q "can't fork" && echo yes)"
bundle '"memory":{"limit":20971520,"swap":20971520}' 'x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done'
check "too much memory is death" 137 "$(berth oci run one >/dev/null 2>&1; echo $?)"
bundle "$limits" 'while :; do sleep 1; done'
holds "it runs detached" sh -c 'berth oci run -d two >/dev/null 2>&1 </dev/null'
holds "it is paused" berth oci pause two
check "it is frozen" "frozen 1" "$(grep frozen $root/made/by/test/cgroup.events)"
check "its state says so" paused "$(berth oci state two | grep status | cut -d'"' -f4)"
holds "it goes on" berth oci resume two
holds "it is counted" sh -c 'berth oci events --stats two | grep -q "\"limit\":33554432"'
holds "its limits change" berth oci update --memory 48m --memory-swap 48m --pids-limit 20 two
check "to what was said" "50331648 20" "$(echo $(cat $root/made/by/test/memory.max $root/made/by/test/pids.max))"
check "another process joins it" "0::/" "$(berth oci exec two cat /proc/self/cgroup)"
holds "it is killed with all it has" berth oci delete --force two
check "and leaves nothing" gone "$([ -d $root/made/by/test ] && echo there || echo gone)"

# --- systemd's own scopes --------------------------------------------------------------------------------------------
if [ -n "$systemd" ]; then
    bundle "$limits" 'while :; do sleep 1; done'
    sed -i 's,/made/by/test,test-made.slice:berth:three,' config.json
    holds "systemd makes a scope" sh -c 'berth oci --systemd-cgroup run -d three >/dev/null 2>&1 </dev/null'
    own=$root/test.slice/test-made.slice/berth-three.scope
    check "with the limits as its properties" "CPUQuotaPerSecUSec=500ms CPUWeight=20 MemoryMax=33554432 MemorySwapMax=0 TasksMax=16" \
        "$(systemctl show berth-three.scope -p MemoryMax,MemorySwapMax,TasksMax,CPUQuotaPerSecUSec,CPUWeight | sort | tr '\n' ' ' | sed 's/ $//')"
    systemctl daemon-reload
    check "which a reload keeps" "33554432 0 16 50000 100000 20" "$(cd $own && echo $(cat memory.max memory.swap.max pids.max cpu.max cpu.weight))"
    holds "systemd is told new ones" berth oci update --memory 48m --memory-swap 48m --pids-limit 20 three
    systemctl daemon-reload
    check "and keeps these" "50331648 20" "$(echo $(cat $own/memory.max $own/pids.max))"
    check "a process joins the scope" "0::/" "$(berth oci exec three cat /proc/self/cgroup)"
    holds "the scope is paused" berth oci pause three
    check "which freezes it" "frozen 1" "$(grep frozen $own/cgroup.events)"
    holds "the scope goes on" berth oci resume three
    holds "the scope is removed" berth oci delete --force three
    check "systemd has forgotten it" "" "$(systemctl list-units --all --no-legend 'berth-three*')"
fi

# --- the engine ------------------------------------------------------------------------------------------------------
cd /
wait_daemon
mkdir -p /tmp/image/bin /tmp/image/etc /tmp/image/tmp
cp /bin/busybox /tmp/image/bin/
for applet in $(busybox --list); do [ "$applet" = busybox ] || ln -s busybox "/tmp/image/bin/$applet"; done
echo root:x:0:0:root:/root:/bin/sh >/tmp/image/etc/passwd
holds "an image is imported" sh -c 'tar -C /tmp/image -c . | berth import - busybox'
run="berth run --network none"
check "a container runs" hello "$($run --rm busybox echo hello 2>&1)"
holds "with limits" $run -d --name aa -m 64m --memory-swap 64m --cpus 0.25 --pids-limit 20 --cpu-shares 512 --cpuset-cpus 0 busybox sh -c 'while :; do :; done'
check "which it sees" "67108864 0 25000 100000 20 20 0" "$(berth exec aa sh -c 'cd /sys/fs/cgroup; echo $(cat memory.max memory.swap.max cpu.max pids.max cpu.weight cpuset.cpus)')"
check "and cannot change" no "$(berth exec aa sh -c 'echo max > /sys/fs/cgroup/memory.max' >/dev/null 2>&1 && echo yes || echo no)"
own=$root$(cut -d: -f3 "/proc/$(berth inspect aa | grep '"Pid"' | tr -dc 0-9)/cgroup")
sleep 2
check "its share is kept" yes "$([ "$(grep nr_throttled "$own/cpu.stat" | cut -d' ' -f2)" -gt 0 ] && echo yes)"
check "its use is shown" "64MiB" "$(berth stats --no-stream aa | tail -n 1 | sed 's,.*/ \([0-9]*MiB\) .*,\1,')"
holds "the engine pauses it" berth pause aa
check "the kernel agrees" "frozen 1" "$(grep frozen "$own/cgroup.events")"
check "and so does its status" paused "$(status aa)"
holds "the engine lets it go on" berth unpause aa
holds "the engine changes limits" berth update -m 96m --memory-swap 96m --pids-limit 30 aa
check "to these" "100663296 30" "$(echo $(cat "$own/memory.max" "$own/pids.max"))"
holds "its processes are listed" sh -c 'berth top aa | grep -q "while :"'
holds "it is removed" berth rm -f aa
check "its cgroup is gone" gone "$([ -d "$own" ] && echo there || echo gone)"
check "a greedy one is killed" 137 "$($run --name greedy -m 24m --memory-swap 24m busybox sh -c 'x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done' >/dev/null 2>&1; echo $?)"
check "and is said to be" 1 "$(berth inspect greedy | grep -c '"OOMKilled": true')"
berth rm greedy >/dev/null

# --- machines --------------------------------------------------------------------------------------------------------
# An ELF kernel of three bytes of code, which halts its CPU for good.
zeros() { head -c "$1" /dev/zero; }
{
    printf '\177ELF\2\1\1'; zeros 9; printf '\2\0\76\0\1\0\0\0\0\0\0\1'; zeros 4; printf '\100'; zeros 19; printf '\100\0\70\0\1'; zeros 7
    printf '\1\0\0\0\5\0\0\0\170'; zeros 10; printf '\1'; zeros 7; printf '\1'; zeros 4
    printf '\3'; zeros 7; printf '\0\20'; zeros 6; printf '\0\20'; zeros 6; printf '\364\353\375'
} >/tmp/idle
head -c 134217728 /dev/zero >/tmp/disk
holds "a machine is made" berth machine create vm --kernel /tmp/idle --disk /tmp/disk --memory 64M --cpu soft --network none
rm /tmp/disk
holds "it runs" berth machine start vm
shown() { berth machine inspect vm | grep "\"$1\"" | sed 's/.*: "\?\([^",]*\).*/\1/'; }
own=$root/$(shown cgroup)
check "in a cgroup of its own" "0::/$(shown cgroup)" "$(cat "/proc/$(shown pid)/cgroup")"
check "with limits for memory, processes and CPU" "639631360 200 200000 100000" "$(echo $(cat "$own/memory.max" "$own/pids.max" "$own/cpu.max"))"
holds "it is ended" berth machine kill vm
check "and its cgroup goes with it" gone "$([ -d "$own" ] && echo there || echo gone)"
holds "and is removed" berth machine rm vm

# --- the reboot ------------------------------------------------------------------------------------------------------
$run -d --name always --restart always busybox sh -c 'echo kept > /note; exec sleep 1000' >/dev/null
$run -d --name unless --restart unless-stopped busybox sleep 1000 >/dev/null
$run -d --name never busybox sleep 1000 >/dev/null
$run -d --name stopped --restart unless-stopped busybox sleep 1000 >/dev/null
berth stop -t 0 stopped >/dev/null
check "all run" "runningrunningrunningexited" "$(status always)$(status unless)$(status never)$(status stopped)"
cat /proc/sys/kernel/random/boot_id >/var/rebooted
date +%s >/var/went
echo REBOOT
down reboot
