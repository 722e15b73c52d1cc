# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds the outside world: its CA, its container image, and the images that its registry offers.

Every result is cached by a hash of its inputs, so a second run does nothing.  Standard library, mmdebstrap and openssl.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from control import DEFAULT_KEYS  # noqa: E402  (both are found beside this file)
from images import IMAGES, catalogue  # noqa: E402
from standin.failures import FAILURES  # noqa: E402

#: The program of the NIM stand-in.
STANDIN = sorted((HERE / "standin").glob("*.py"))
SUITE = "trixie"
MIRROR = os.environ.get("SANDBOX_DEBIAN_MIRROR", "http://deb.debian.org/debian")
ADDRESS = "172.30.0.2"
EPOCH = 1767225600  # 2026-01-01, the date of every file in the images
WORLD_PACKAGES = ("nginx-light", "docker-registry", "dnsmasq-base", "apt-cacher-ng", "python3", "ca-certificates")
STANDIN_PACKAGES = ("python3", "busybox-static")
WITHOUT_DOCUMENTATION = [
    '--aptopt=Acquire::Languages "none"',
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
]
# Names in the server's certificate: what the world answers for, and room for more package repositories.
CERTIFICATE_NAMES = (
    "nvcr.io *.nvcr.io ngc.nvidia.com *.ngc.nvidia.com nvidia.com *.nvidia.com *.download.nvidia.com *.github.io"
    " download.docker.com *.fleet.test"
)
APPLETS = (
    "[ basename cat chmod chown cp cut date dd df dirname du echo env expr false find grep head hostname id kill ln ls mkdir"
    " mktemp mv nice od pidof printf ps pwd readlink realpath rm rmdir sed seq sh sha256sum sleep sort stat tail tar tee test"
    " timeout touch tr true uname wc which whoami xargs"
)
LIBRARIES = (
    "ld-linux libbz2. libc. libcrypto. libdl. libexpat. libffi. libgcc_s. liblzma. libm. libnss_ libpthread. libresolv. librt."
    " libssl. libutil. libuuid. libz. libzstd."
)
NO_PYTHON = (
    "test",
    "pydoc_data",
    "idlelib",
    "ensurepip",
    "turtledemo",
    "tkinter",
    "config-3",
    "_pyrepl",
    "lib2to3",
    "unittest",
)


def say(text: str) -> None:
    print("world: " + text, file=sys.stderr, flush=True)


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run(command: list[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit("world: %s failed (%d):\n%s" % (command[0], done.returncode, done.stderr[-3000:]))


# ---------------------------------------------------------------------------------------------------------- CA, state


def prepare_state(state: Path) -> None:
    """Directories, CA and server certificate, keys.  What exists is left as it is."""
    state.mkdir(parents=True, exist_ok=True)
    # The steps "image" and "standin" may run side by side.
    with open(state / ".world.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _prepare_state(state)


def _prepare_state(state: Path) -> None:
    world = state / "world"
    for name in ("control", "tls", "log", "registry", "models"):
        (world / name).mkdir(parents=True, exist_ok=True)
    (state / "repositories").mkdir(parents=True, exist_ok=True)
    (state / "cache" / "apt-cacher-ng").mkdir(parents=True, exist_ok=True)
    make_certificates(world)
    keys = world / "control" / "keys.json"
    if not keys.exists():
        keys.write_text(json.dumps(DEFAULT_KEYS, indent=1))
    write_if_changed(world / "control" / "catalogue.json", json.dumps(catalogue(), indent=1).encode())


def write_if_changed(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        temporary = path.with_suffix(".part")
        temporary.write_bytes(data)
        temporary.replace(path)


def make_certificates(world: Path) -> None:
    """The sandbox's own CA (once), and the certificate of the front (again when its names change)."""
    authority, authority_key = world / "ca.crt", world / "ca.key"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    if not (authority.exists() and authority_key.exists()):
        say("making the sandbox's CA")
        subject = ["-subj", "/CN=GPU fleet sandbox CA", "-days", "3650"]
        usage = [
            "-addext",
            "basicConstraints=critical,CA:TRUE,pathlen:0",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        ]
        run(
            ["openssl", "req", "-x509", *curve, *subject, *usage, "-keyout", str(authority_key), "-out", str(authority)]
        )
        authority_key.chmod(0o600)
    names = ",".join("DNS:" + name for name in CERTIFICATE_NAMES.split()) + ",IP:" + ADDRESS
    wanted = hash_of(names, authority.read_text())
    mark = world / "tls" / "names"
    if mark.exists() and mark.read_text() == wanted:
        return
    request, extensions = world / "tls" / "server.csr", world / "tls" / "extensions"
    extensions.write_text(
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nsubjectAltName=%s\n" % names
    )
    run(
        [
            "openssl",
            "req",
            *curve,
            "-subj",
            "/CN=nvcr.io",
            "-keyout",
            str(world / "tls" / "server.key"),
            "-out",
            str(request),
        ]
    )
    signer = ["-CA", str(authority), "-CAkey", str(authority_key), "-CAcreateserial", "-days", "3650"]
    target = ["-extfile", str(extensions), "-out", str(world / "tls" / "server.crt")]
    run(["openssl", "x509", "-req", "-in", str(request), *signer, *target])
    (world / "tls" / "server.key").chmod(0o600)
    mark.write_text(wanted)


# ---------------------------------------------------------------------------------------------------------- world image


@dataclass
class WorldImage:
    """What sandbox.py needs to import and run the world."""

    tar: str
    tag: str
    command: list[str]
    run_arguments: list[str]


def bootstrap(cache: Path, name: str, variant: str, packages: tuple[str, ...], hooks: tuple[str, ...] = ()) -> Path:
    """A Debian root file system as tar, from the cache when its inputs are the same."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / ("%s-%s.tar" % (name, hash_of(variant, packages, SUITE, MIRROR, WITHOUT_DOCUMENTATION, hooks)))
    if target.exists():
        return target
    say("building the root file system of %s (%s)" % (name, ", ".join(packages)))
    partial = target.with_suffix(".part.tar")
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)}
    command = ["mmdebstrap", "--variant=" + variant, "--include=" + ",".join(packages), *WITHOUT_DOCUMENTATION]
    command += ["--customize-hook=" + hook for hook in hooks]
    run([*command, SUITE, str(partial), MIRROR], env=environment)
    partial.replace(target)
    for old in cache.glob(name + "-*.tar"):
        if old != target and ".part" not in old.name:
            old.unlink()
    return target


def build_image(state: Path) -> WorldImage:
    """The world's container image (Debian packages only; the service's code is mounted)."""
    prepare_state(state)
    tar = bootstrap(state / "cache" / "world", "world", "minbase", WORLD_PACKAGES)
    arguments = ["-e", "WORLD_ADDRESS=" + ADDRESS]
    for source, target in (
        (state / "world", "/var/lib/world"),
        (HERE / "service", "/opt/world:ro"),
        (state / "repositories", "/srv/repositories:ro"),
        (state / "cache" / "apt-cacher-ng", "/var/cache/apt-cacher-ng"),
    ):
        arguments += ["-v", "%s:%s" % (source.resolve(), target)]
    tag = "gpu-fleet-sandbox/world:" + tar.stem.rsplit("-", 1)[1]
    return WorldImage(str(tar), tag, ["/usr/bin/python3", "/opt/world/supervisor.py"], arguments)


# ---------------------------------------------------------------------------------------------------------- layers


@dataclass
class Layer:
    path: str
    digest: str
    diff_id: str
    size: int


class Tree:
    """The files of one layer; its order and dates never depend on the machine."""

    def __init__(self) -> None:
        self.entries: dict[str, tuple[tarfile.TarInfo, bytes]] = {}

    def add(
        self,
        path: str,
        data: bytes = b"",
        *,
        mode: int = 0o644,
        kind: bytes = tarfile.REGTYPE,
        link: str = "",
        owner: int = 0,
    ) -> None:
        info = tarfile.TarInfo(path.strip("/"))
        info.type, info.mode, info.linkname = kind, mode, link
        info.uid = info.gid = owner
        info.mtime = EPOCH
        info.size = len(data) if kind == tarfile.REGTYPE else 0
        self.entries[info.name] = (info, data)

    def directory(self, path: str, mode: int = 0o755, owner: int = 0) -> None:
        self.add(path, mode=mode, kind=tarfile.DIRTYPE, owner=owner)

    def link(self, path: str, target: str) -> None:
        self.add(path, kind=tarfile.SYMTYPE, link=target, mode=0o777)

    def write(self, path: Path, level: int = 6) -> Layer:
        plain = hashlib.sha256()
        with open(path, "wb") as raw, gzip.GzipFile("", "wb", level, raw, mtime=0) as packed:
            sink = _Tee(packed, plain)
            with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as archive:
                for name in sorted(self.entries):
                    info, data = self.entries[name]
                    archive.addfile(info, io.BytesIO(data) if info.type == tarfile.REGTYPE else None)
        return Layer(str(path), "sha256:" + file_digest(path), "sha256:" + plain.hexdigest(), path.stat().st_size)


class _Tee(io.RawIOBase):
    """Writes to a file and hashes what passes."""

    def __init__(self, target: Any, digest: Any) -> None:
        self.target, self.digest, self.position = target, digest, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.target.write(data)
        self.digest.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cached_layer(cache: Path, name: str, inputs: str, make: Any, level: int = 6) -> Layer:
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / ("%s-%s.tar.gz" % (name, inputs))
    record = target.with_suffix(".json")
    if record.exists() and target.exists():
        layer = Layer(**json.loads(record.read_text()))
        layer.path = str(target)
        return layer
    for old in cache.glob(name + "-????????????????.tar.*"):
        old.unlink()
    layer = make().write(target, level)
    record.write_text(json.dumps(layer.__dict__))
    return layer


def base_tree(rootfs: Path) -> Tree:
    """Python, libc and busybox out of Debian's packages; nothing else."""
    tree = Tree()
    for name in ("bin", "lib", "lib64", "sbin"):
        tree.link(name, "usr/" + name)
    for name in (
        "dev",
        "etc",
        "home",
        "home/nim",
        "opt",
        "proc",
        "root",
        "run",
        "sys",
        "usr",
        "usr/bin",
        "usr/lib",
        "usr/lib64",
        "usr/local",
        "usr/local/bin",
        "usr/sbin",
        "var",
    ):
        tree.directory(name)
    tree.directory("home/nim", owner=1000)
    for name in ("tmp", "var/tmp"):
        tree.directory(name, mode=0o1777)
    tree.link("var/run", "/run")
    tree.add(
        "etc/passwd",
        b"root:x:0:0:root:/root:/bin/sh\nnim:x:1000:1000:nim:/home/nim:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )
    tree.add("etc/group", b"root:x:0:\nnim:x:1000:\nnogroup:x:65534:\n")
    tree.add("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n")
    with tarfile.open(rootfs) as archive:
        for member in archive:
            name = member.name[2:] if member.name.startswith("./") else member.name
            if not wanted_file(name):
                continue
            if member.isfile():
                source = archive.extractfile(member)
                tree.add(name, source.read() if source else b"", mode=member.mode)
            elif member.issym():
                tree.link(name, member.linkname)
            elif member.islnk():
                source = archive.extractfile(member)
                tree.add(name, source.read() if source else b"", mode=member.mode)
            elif member.isdir():
                tree.directory(name)
    for applet in APPLETS.split():
        tree.link("usr/bin/" + applet, "busybox")
    return tree


def wanted_file(name: str) -> bool:
    parts = name.split("/")
    if name in ("usr/bin/busybox", "usr/lib/os-release", "etc/os-release", "etc/debian_version"):
        return True
    if parts[:2] == ["usr", "bin"]:
        return len(parts) == 3 and parts[2] in ("python3", "python3.13")
    if parts[:2] == ["usr", "lib"] and len(parts) >= 3 and parts[2].startswith("python3."):
        inside = parts[3] if len(parts) > 3 else ""
        if inside.startswith(NO_PYTHON) or "_test" in parts[-1] or "_codecs_" in parts[-1]:
            return False
        # Compiled by the interpreter itself at build time; the container could not write them.
        return "opt-" not in parts[-1]
    if parts[:2] == ["usr", "lib64"] and len(parts) == 3:
        return True
    if parts[:2] == ["usr", "lib"] and len(parts) == 4 and parts[2].endswith("-linux-gnu"):
        return parts[3].startswith(tuple(LIBRARIES.split()))
    return False


ENTRYPOINT = """#!/bin/sh
# What the entry point of NVIDIA's base images does: say so when there is no GPU, then run the command.
found=
for node in /dev/nvidia[0-9]*; do [ -e "$node" ] && found=1; done
[ -n "$found" ] || cat /opt/nvidia/no-driver.txt
# Or when CUDA cannot be initialised because the Fabric Manager has not done its work.
if command -v nvidia-smi >/dev/null && nvidia-smi -q 2>/dev/null | grep -q 'In Progress'; then
  cat /opt/nvidia/no-cuda.txt
fi
case "$1" in -*) set -- nim-serve "$@" ;; esac
exec "$@"
"""


def standin_tree() -> Tree:
    tree = Tree()
    for name in (
        "opt/nim",
        "opt/nim/standin",
        "opt/nim/etc",
        "opt/nim/etc/default",
        "opt/nvidia",
        "model",
        "opt/cache",
    ):
        tree.directory(name, owner=1000 if name in ("model", "opt/cache") else 0)
    tree.directory("opt/nim/.cache", owner=1000)
    for path in STANDIN:
        tree.add("opt/nim/standin/" + path.name, b"#!/usr/bin/python3\n" + path.read_bytes(), mode=0o755)
    tree.add("opt/nvidia/nvidia_entrypoint.sh", ENTRYPOINT.encode(), mode=0o755)
    tree.add("opt/nvidia/no-driver.txt", (FAILURES["host-49"][2] + "\n\n").encode())
    tree.add("opt/nvidia/no-cuda.txt", (FAILURES["host-50a"][2] + "\n\n").encode())
    tree.add("opt/nim/start_server.sh", b'#!/bin/sh\nexec nim-run "$@"\n', mode=0o755)
    return tree


def image_tree(image: dict[str, Any]) -> Tree:
    """What tells one image from another: its description, its manifest, its commands."""
    tree = Tree()
    commands = ["list-model-profiles", "download-to-cache", "create-model-store"]
    commands += {"2": ["nim-serve"], "native": ["nim-native"]}.get(image["dialect"], ["nim-run"])
    if image["dialect"] == "native":
        commands = ["nim-native"]
    for command in commands:
        tree.link("usr/local/bin/" + command, "/opt/nim/standin/standin_nim.py")
    tree.add("opt/nim/etc/default/standin.json", json.dumps(image, indent=1, sort_keys=True).encode())
    if image["profiles"]:
        path = "opt/nim/etc/default/model_manifest.yaml"
        if not image["has_metadata"]:
            tree.directory("etc/nim")
            tree.directory("etc/nim/config")
            path = "etc/nim/config/model_manifest.yaml"
        tree.add(path, manifest_yaml(image).encode())
    if "amd64" not in image["architectures"]:
        # A program of that machine, which no other can run: the head of an ELF file for AArch64 (elf.h).
        numbers = (2, 183, 1, 0, 0, 0, 0, 64, 56, 0, 64, 0, 0)
        head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", *numbers)
        tree.add("opt/nvidia/nvidia_entrypoint.sh", head, mode=0o755)
    return tree


def manifest_yaml(image: dict[str, Any]) -> str:
    """model_manifest.yaml: a map by profile id (1.x), or schema_version 2.0.0 with a list (2.x)."""
    lines: list[str] = []
    store = "ngc://" + image["model_store"]
    second = image["dialect"] == "2"
    if second:
        lines = ["schema_version: 2.0.0", "profiles:"]
    for entry in image["profiles"]:
        pad = "  "
        if second:
            lines.append("- id: " + entry["id"])
        else:
            lines += [entry["id"] + ":", pad + "model: " + image["model"], pad + "release: '%s'" % image["version"]]
        lines.append(pad + "tags:")
        lines += ["%s  %s: '%s'" % (pad, name, value) for name, value in sorted(entry["tags"].items())]
        if not second:
            lines.append(pad + "container_url: nvcr.io/%s:%s" % (image["repository"], image["tag"]))
        lines += [
            pad + "workspace: !workspace",
            pad + "  components:",
            pad + "  - dst: ''",
            pad + "    src:",
            pad + "      repo_id: " + store,
        ]
    return "\n".join(lines) + "\n"


def padding_tree(mebibytes: int) -> Tree:
    """Bytes that do not compress, so that a pull takes its time."""
    tree = Tree()
    tree.add("opt/nim/llm/libengine.so", hashlib.shake_128(b"padding").digest(mebibytes << 20))
    return tree


def build_standin(state: Path) -> dict[str, list[Layer]]:
    """All layers of all images: "repository:tag" -> layers, in order."""
    prepare_state(state)
    cache = state / "cache" / "world"
    layers = cache / "layers"
    hook = 'chroot "$1" python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.13'
    rootfs = bootstrap(cache, "standin", "extract", STANDIN_PACKAGES, (hook,))
    own = hash_of(file_digest(Path(__file__)))
    base = cached_layer(layers, "base", hash_of(rootfs.name, own), lambda: base_tree(rootfs))
    authority = (state / "world" / "ca.crt").read_bytes()

    def ca_tree() -> Tree:
        tree = Tree()
        # The public CAs of the real image; here the sandbox's CA stands in for them.
        for name in ("etc/ssl", "etc/ssl/certs"):
            tree.directory(name)
        tree.add("etc/ssl/certs/ca-certificates.crt", authority)
        return tree

    ca = cached_layer(layers, "ca", hash_of(authority.decode(), own), ca_tree)
    code = hash_of(own, *[path.name + file_digest(path) for path in STANDIN])
    common = cached_layer(layers, "nim", code, standin_tree)
    result: dict[str, list[Layer]] = {}
    for image in IMAGES:
        name = "%s:%s" % (image["repository"], image["tag"])
        if image["dialect"] == "cuda":
            result[name] = [base, ca]
            continue
        stack = [base, ca, common]
        if image["padding_mib"]:
            size = image["padding_mib"]
            stack.append(
                cached_layer(layers, "padding%d" % size, hash_of(size, own), lambda size=size: padding_tree(size), 1)
            )
        label = "image-" + name.replace("/", "-").replace(":", "-")
        stack.append(cached_layer(layers, label, hash_of(image, own), lambda image=image: image_tree(image)))
        result[name] = stack
    return result


# ---------------------------------------------------------------------------------------------------------- manifests

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
TYPES = {
    DOCKER_MANIFEST: (
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    ),
    OCI_MANIFEST: ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+gzip"),
}


def config_of(image: dict[str, Any], architecture: str, layers: list[Layer]) -> dict[str, Any]:
    """The config blob: environment, labels and commands as NIM images have them."""
    require = image["require"] if architecture == "amd64" else image["require"].split(" ")[0]
    env = {
        "PATH": "/opt/nim/bin:/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        "NVIDIA_REQUIRE_CUDA": require,
        "CUDA_VERSION": image["cuda"],
    }
    config: dict[str, Any] = {}
    dialect = image["dialect"]
    labels = {"com.nvidia.cudnn.version": "9.8.0"} if dialect == "cuda" else {}
    if dialect != "cuda":
        env["NIM_CACHE_PATH"] = "/opt/nim/.cache"
        labels = {
            "com.nvidia.nim.version": image["version"],
            "com.nvidia.nim.type": "llm" if dialect in ("1", "2") else "embedding",
            "com.nvidia.nim.name": image["model"],
            "com.nvidia.nim.inference_protocol": "openai",
            "com.nvidia.nim.base_image": "nvcr.io/nvidia/cuda:%s-base-ubuntu24.04" % image["cuda"],
        }
        config.update(User="1000", WorkingDir="/opt/nim", ExposedPorts={"8000/tcp": {}})
    if dialect == "1":
        env["INFERENCE_MICROSERVICE_LLM_NIM_VERSION"] = image["version"]
    if dialect == "native":
        labels["com.nvidia.nim.model_download_protocol"] = "native-v1"
        env["NIM_ENGINE_MODEL_PATH"] = "/model"
        del env["NIM_CACHE_PATH"]
    if dialect == "cuda":
        config.update(Cmd=["/bin/sh"])
    else:
        command = {"2": ["nim-serve"], "native": ["nim-native"]}.get(dialect, ["/opt/nim/start_server.sh"])
        config.update(Entrypoint=["/opt/nvidia/nvidia_entrypoint.sh"], Cmd=command)
    if image.get("silent"):
        labels = {}
        del env["NIM_CACHE_PATH"]
    config.update(Env=["%s=%s" % pair for pair in env.items()], Labels=labels)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH))
    return {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": created, "created_by": "sandbox"} for _layer in layers],
    }


@dataclass
class Document:
    """A manifest or index, its exact bytes being what the digest is of."""

    media_type: str
    data: bytes

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.data).hexdigest()


def documents_of(image: dict[str, Any], layers: list[Layer]) -> tuple[list[bytes], list[Document]]:
    """(config blobs, manifests in the order of upload): the last one carries the tag."""
    kind = OCI_MANIFEST if image["dialect"] in ("2", "native") else DOCKER_MANIFEST
    config_type, layer_type = TYPES[kind]
    configs, manifests, entries = [], [], []
    for architecture in image["architectures"]:
        config = json.dumps(config_of(image, architecture, layers), sort_keys=True).encode()
        body = {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {
                "mediaType": config_type,
                "size": len(config),
                "digest": "sha256:" + hashlib.sha256(config).hexdigest(),
            },
            "layers": [{"mediaType": layer_type, "size": layer.size, "digest": layer.digest} for layer in layers],
        }
        document = Document(kind, json.dumps(body, indent=1).encode())
        configs.append(config)
        manifests.append(document)
        platform = {"architecture": architecture, "os": "linux"}
        entries.append({"mediaType": kind, "size": len(document.data), "digest": document.digest, "platform": platform})
    if image["architectures"] != ["amd64"]:
        listing = OCI_INDEX if kind == OCI_MANIFEST else DOCKER_LIST
        body = {"schemaVersion": 2, "mediaType": listing, "manifests": entries}
        manifests.append(Document(listing, json.dumps(body, indent=1).encode()))
    return configs, manifests


# ---------------------------------------------------------------------------------------------------------- publication


class Registry:
    """Just enough of the registry's HTTP API to put images into it."""

    def __init__(self, address: str, port: int = 5000) -> None:
        self.connection = http.client.HTTPConnection(address, port, timeout=60)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        self.connection.request(method, path, body, headers or {})
        answer = self.connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def blob(self, repository: str, digest: str, source: Any, size: int, mount_from: str = "") -> None:
        if self.call("HEAD", "/v2/%s/blobs/%s" % (repository, digest))[0] == 200:
            return
        query = "?" + urllib.parse.urlencode({"mount": digest, "from": mount_from}) if mount_from else ""
        status, headers, text = self.call(
            "POST", "/v2/%s/blobs/uploads/%s" % (repository, query), headers={"Content-Length": "0"}
        )
        if status == 201:
            return
        if status != 202:
            raise SystemExit("world: upload to %s refused: %d %s" % (repository, status, text[:200]))
        location = headers["location"]
        parts = urllib.parse.urlsplit(location)
        path = (
            parts.path + "?" + (parts.query + "&" if parts.query else "") + urllib.parse.urlencode({"digest": digest})
        )
        status, _headers, text = self.call(
            "PUT",
            path,
            source.read_bytes() if isinstance(source, Path) else source,
            {"Content-Length": str(size), "Content-Type": "application/octet-stream"},
        )
        if status != 201:
            raise SystemExit("world: upload of %s to %s failed: %d %s" % (digest, repository, status, text[:200]))

    def manifest(self, repository: str, reference: str, document: Document) -> None:
        path = "/v2/%s/manifests/%s" % (repository, reference)
        status, headers, _text = self.call("HEAD", path, headers={"Accept": document.media_type})
        if status == 200 and headers.get("docker-content-digest") == document.digest:
            return
        status, _headers, text = self.call("PUT", path, document.data, {"Content-Type": document.media_type})
        if status != 201:
            raise SystemExit("world: manifest %s:%s refused: %d %s" % (repository, reference, status, text[:300]))


def publish(state: Path, address: str = ADDRESS, port: int = 5000) -> dict[str, Any]:
    """Put all images into the registry; what is there already is not sent again.  Returns and records their digests."""
    stacks = build_standin(state)
    registry = Registry(address, port)
    holder: dict[str, str] = {}
    record: dict[str, Any] = {}
    for image in IMAGES:
        repository = image["repository"]
        layers = stacks["%s:%s" % (repository, image["tag"])]
        configs, manifests = documents_of(image, layers)
        for layer in layers:
            registry.blob(repository, layer.digest, Path(layer.path), layer.size, holder.get(layer.digest, ""))
            holder.setdefault(layer.digest, repository)
        for config in configs:
            registry.blob(repository, "sha256:" + hashlib.sha256(config).hexdigest(), config, len(config))
        for document in manifests[:-1]:
            registry.manifest(repository, document.digest, document)
        registry.manifest(repository, image["tag"], manifests[-1])
        record["nvcr.io/%s:%s" % (repository, image["tag"])] = {
            "digest": manifests[-1].digest,
            "image_ids": ["sha256:" + hashlib.sha256(config).hexdigest() for config in configs],
            "compressed_bytes": sum(layer.size for layer in layers),
            "public": image["public"],
        }
    write_if_changed(state / "world" / "images.json", json.dumps(record, indent=1).encode())
    say("%d images in the registry" % len(IMAGES))
    return record


def wait_ready(address: str = ADDRESS, timeout: float = 60) -> None:
    """Return when registry and front answer; SystemExit after ``timeout`` seconds."""
    until = time.time() + timeout
    last: object = None
    for port, host in ((5000, address), (80, "nvcr.io")):
        while True:
            try:
                connection = http.client.HTTPConnection(address, port, timeout=5)
                connection.request("GET", "/v2/", headers={"Host": host})
                last = connection.getresponse().status
                if last in (200, 401):
                    break
            except OSError as exc:
                last = exc
            if time.time() > until:
                raise SystemExit("world: %s:%d does not answer (%s)" % (address, port, last))
            time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["image", "standin", "wait", "publish"])
    parser.add_argument("--state", type=Path, default=Path(".sandbox"))
    parser.add_argument("--address", default=ADDRESS)
    parser.add_argument("--timeout", type=float, default=60)
    options = parser.parse_args()
    if options.step in ("image", "standin") and not shutil.which("mmdebstrap"):
        raise SystemExit("world: mmdebstrap is missing (apt-get install mmdebstrap)")
    state = options.state.resolve()
    if options.step == "image":
        print(json.dumps(build_image(state).__dict__, indent=1))
    elif options.step == "standin":
        print(
            json.dumps(
                {name: [layer.digest for layer in layers] for name, layers in build_standin(state).items()}, indent=1
            )
        )
    elif options.step == "wait":
        wait_ready(options.address, options.timeout)
    else:
        print(json.dumps(publish(state, options.address), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
