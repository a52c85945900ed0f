#!/usr/bin/env python3
"""Writes one or a few well-formed inputs per fuzz target: usage seed.py FOLDER."""

import base64
import gzip
import hashlib
import io
import json
import os
import random
import struct
import sys
import tarfile


def tar(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for kind, name in ((tarfile.DIRTYPE, "etc"), (tarfile.REGTYPE, "etc/name"), (tarfile.REGTYPE, "n" * 150),
                           (tarfile.SYMTYPE, "etc/link"), (tarfile.LNKTYPE, "etc/hard"), (tarfile.CHRTYPE, "null"),
                           (tarfile.REGTYPE, "etc/.wh.gone"), (tarfile.REGTYPE, "etc/.wh..wh..opq"),
                           (tarfile.FIFOTYPE, "pipe")):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.mode = 0o755
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "etc/name"
            if form == tarfile.PAX_FORMAT and name == "etc/name":
                info.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "1.5"}
            info.size = 5 if name == "etc/name" else 0
            archive.addfile(info, io.BytesIO(b"hello"))
    return out.getvalue()


def sparse():
    """A GNU 1.0 sparse file in pax, from its records by hand."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("GNUSparseFile.0/hole")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "hole",
                            "GNU.sparse.realsize": "8192"}
        data = b"1\n4096\n5\n".ljust(512, b"\0") + b"hello"
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def dns(name, kind):
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
    return struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + question + struct.pack(">HH", kind, 1)


def dhcp(kind):
    head = struct.pack(">BBBBIHH", 1, 1, 6, 0, 42, 0, 0) + bytes(16) + bytes([2, 0, 0, 0, 0, 1]) + bytes(10)
    return head + bytes(192) + b"\x63\x82\x53\x63" + bytes([53, 1, kind, 55, 3, 1, 3, 6, 255])


def ipv4(protocol, payload):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0,
                       bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2]))
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:] + payload


def frame(kind, payload):
    return b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + struct.pack(">H", kind) + payload


def netlink(kind, payload):
    return struct.pack("=IHHII", 16 + len(payload), kind, 2, 1, 0) + payload


def attribute(kind, payload):
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def qcow2():
    cluster = 65536
    head = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0, 1, 3 * cluster, cluster, 1, 0, 0,
                       0, 0, 0, 4, 104)
    return head + bytes(8)


def elf():
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 120, 0x100000, 0x100000, 8, 8, 4096) + b"\xf4" * 8


def bzimage():
    head = bytearray(2048)
    head[0x1F1] = 1
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x200:0x202] = b"\xeb\x66"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    return bytes(head)


def archive():
    """An image as docker's older versions saved it, and as an OCI layout."""
    layer = tar(tarfile.GNU_FORMAT)
    sha = lambda data: hashlib.sha256(data).hexdigest()
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                         "rootfs": {"type": "layers", "diff_ids": ["sha256:" + sha(layer)]}}).encode()
    manifest = json.dumps({"schemaVersion": 2, "config": {
        "mediaType": "application/vnd.oci.image.config.v1+json", "digest": "sha256:" + sha(config), "size": len(config)},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + sha(layer),
                    "size": len(layer)}]}).encode()
    index = json.dumps({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "sha256:" + sha(manifest),
        "size": len(manifest), "annotations": {"io.containerd.image.name": "a:1"}}]}).encode()
    docker = json.dumps([{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["l/layer.tar"]}]).encode()
    blobs = {"blobs/sha256/" + sha(data): data for data in (layer, config, manifest)}
    for files in ({"l/layer.tar": layer, "c.json": config, "manifest.json": docker}, {**blobs, "index.json": index}):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as packed:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                packed.addfile(info, io.BytesIO(data))
        yield out.getvalue()


def queue():
    """A chain of two buffers, offered in a ring of sixteen."""
    chain = struct.pack("<QIHH", 0x20000, 64, 1, 1) + struct.pack("<QIHH", 0x21000, 64, 2, 0)
    return chain.ljust(0x100, b"\0") + struct.pack("<HHH", 0, 1, 0)


DIGEST = "sha256:" + "ab" * 32
SPEC = {"ociVersion": "1.2.0", "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["A=b"],
                    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 5}]},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}], "resources": {"memory": {"limit": 1 << 20}},
                  "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}]}}
PROFILE = {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"],
           "syscalls": [{"names": ["read", "clone"], "action": "SCMP_ACT_ALLOW",
                         "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}]}]}
MANIFEST = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 2},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 3}]}
INDEX = {"schemaVersion": 2, "manifests": [
    {**MANIFEST["config"], "platform": {"architecture": "amd64", "os": "linux"}},
    {**MANIFEST["config"], "platform": {"architecture": "arm", "os": "linux", "variant": "v7"}}]}
CONFIG = {"architecture": "amd64", "os": "linux", "created": "2024-01-02T03:04:05Z",
          "config": {"Env": ["A=b"], "Cmd": ["sh"], "ExposedPorts": {"80/tcp": {}}, "Volumes": {"/v": {}}},
          "rootfs": {"type": "layers", "diff_ids": [DIGEST]}, "history": [{"created_by": "x", "empty_layer": True}]}
DOCKERFILE = b"""# syntax=docker/dockerfile:1
ARG V=12
FROM debian:${V} AS one
RUN --mount=type=cache,target=/c apt-get install \\
  # why
  curl
COPY <<EOF /a
$V
EOF
FROM one
COPY --from=one --chown=1:1 /a /b
HEALTHCHECK --interval=1s CMD true
CMD ["sh", "-c", "x"]
"""

SEEDS = {
    "image_tar": [tar(tarfile.PAX_FORMAT), tar(tarfile.GNU_FORMAT), sparse()],
    "image_layer": [gzip.compress(tar(tarfile.PAX_FORMAT), mtime=0), tar(tarfile.GNU_FORMAT), sparse()],
    "image_archive": list(archive()),
    "image_reference": [b"debian", b"registry.test:5000/a/b:1@" + DIGEST.encode(), b"[::1]:5000/x:y"],
    "image_challenge": [b'Bearer realm="https://a.test/t",service="s",scope="repository:a/b:pull,push"',
                        base64.b64encode(b'{"username":"u","password":"p"}')],
    "image_dockerfile": [DOCKERFILE],
    "image_words": [b"${x:-a} \"$y\" '$z' ${path##*/} a=1 b=\"two words\""],
    "image_ignore": [b"# c\n*\n!src/**/*.rs\n/target\n\0src/a/b.rs"],
    "image_config": [json.dumps(CONFIG).encode()],
    "image_manifest": [json.dumps(MANIFEST).encode(), json.dumps(INDEX).encode()],
    "image_sources": [b"deb [arch=amd64 signed-by=/k.gpg] http://m.test/debian bookworm main\n",
                      b"Types: deb\nURIs: http://m.test/debian\nSuites: trixie\nComponents: main\nSigned-By: /k\n"],
    "net_dhcp": [dhcp(1), dhcp(3)],
    "net_dhcp6": [bytes([1, 1, 2, 3]) + struct.pack(">HH", 1, 6) + bytes([0, 2, 0, 0, 171, 17])
                  + struct.pack(">HH", 3, 12) + bytes(12) + struct.pack(">HH", 14, 0),
                  bytes([133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 1])],
    "net_dns": [dns("web", 1), dns("2.0.0.10.in-addr.arpa", 12), dns("db.internal", 28)],
    "net_user_frame": [frame(0x0800, ipv4(6, bytes(20))), frame(0x0800, ipv4(17, struct.pack(">HHHH", 1, 53, 8, 0))),
                       frame(0x0806, struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + bytes(20))],
    "net_netlink": [netlink(0x100, struct.pack("=BBH", 2, 0, 0) + attribute(
        0x8001, attribute(0x8001, attribute(1, bytes([10, 0, 0, 2])) + attribute(2, bytes([10, 0, 0, 1])))
        + attribute(0x8002, attribute(1, b"\x11") + attribute(2, b"\0\x35") + attribute(3, b"\0\x35"))))
        + netlink(3, bytes(4)), netlink(2, struct.pack("=i", -2) + bytes(16))],
    "oci_config": [json.dumps(SPEC).encode()],
    "oci_seccomp": [json.dumps(PROFILE).encode()],
    "api_head": [b"POST /v1.50/containers/x/attach?stream=1 HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\n"
                 b"Upgrade: tcp\r\nContent-Length: 0\r\n\r\n"],
    "api_auth": [base64.urlsafe_b64encode(b'{"username":"u","password":"p","serveraddress":"r.test"}')],
    "api_body": [json.dumps({"Image": "debian", "Cmd": ["sh"], "HostConfig": {
        "PortBindings": {"80/tcp": [{"HostPort": "8080"}]}, "Binds": ["/a:/b:ro"], "RestartPolicy": {"Name": "always"}},
        "NetworkingConfig": {"EndpointsConfig": {"n": {"Aliases": ["a"]}}}}).encode(),
        b'{"label":{"a=b":true},"status":["running"]}'],
    "base_words": [b"1.5GiB", b"1h30m", b"2024-01-02T03:04:05Z", b"10m"],
    "engine_keeper": [b"{}"],
    "disk_qcow2_header": [qcow2()],
    "disk_qcow2_image": [qcow2()],
    "vmm_kernel": [elf(), bzimage()],
    # Any bytes are a sequence of accesses; the first byte of a device's is its kind, an odd second one sets it up.
    "vmm_device": [bytes([kind, 1]) + random.Random(kind).randbytes(600) for kind in range(7)],
    "vmm_queue": [queue()],
    "vmm_control": [b'{"op":"console","history":true}', b'{"ok":true,"stats":{"disks":[]}}'],
    "vmm_board": [random.Random(0).randbytes(600)],
}


def main():
    for target, seeds in SEEDS.items():
        folder = os.path.join(sys.argv[1], target)
        os.makedirs(folder, exist_ok=True)
        for number, seed in enumerate(seeds):
            with open(os.path.join(folder, f"seed-{number}"), "wb") as f:
                f.write(seed)


if __name__ == "__main__":
    main()
