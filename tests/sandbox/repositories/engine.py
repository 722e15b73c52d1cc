# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Docker's repository. The programs in it are Debian's builds of the same version, under the names of Docker's packages.

Debian's archives are fetched with apt and its signatures, into a cache below the build directory.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from deb import Key, Package, data_archive, index_entry, write_if_changed, write_release

SUITE = "trixie"
SOURCES = ("docker.io", "docker-cli", "containerd", "runc", "tini")
VERSION = "26.1.5"
CONTAINERD = "1.7.24-1"
#: A version that must be refused: there is nothing in its packages, and they do not install.
UNWANTED = "29.5.1"
DISTRIBUTIONS = (("ubuntu", "noble", "ubuntu.24.04~noble"), ("debian", "trixie", "debian.13~trixie"))

#: Path in a Debian package -> path in Docker's.
ENGINE = {
    "usr/sbin/dockerd": "/usr/bin/dockerd",
    "usr/sbin/docker-proxy": "/usr/bin/docker-proxy",
    "usr/bin/tini-static": "/usr/bin/docker-init",
}
CLIENT = {"usr/bin/docker": "/usr/bin/docker"}
RUNTIME = {
    "usr/bin/containerd": "/usr/bin/containerd",
    "usr/bin/containerd-shim-runc-v2": "/usr/bin/containerd-shim-runc-v2",
    "usr/bin/ctr": "/usr/bin/ctr",
    "usr/sbin/runc": "/usr/bin/runc",
}

DOCKER_SERVICE = """\
[Unit]
Description=Docker Application Container Engine
Documentation=https://docs.docker.com
After=network-online.target docker.socket firewalld.service containerd.service time-set.target
Wants=network-online.target containerd.service
Requires=docker.socket

[Service]
Type=notify
ExecStart=/usr/bin/dockerd -H fd:// --containerd=/run/containerd/containerd.sock
ExecReload=/bin/kill -s HUP $MAINPID
TimeoutStartSec=0
RestartSec=2
Restart=always
StartLimitBurst=3
StartLimitInterval=60s
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
Delegate=yes
KillMode=process
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""
DOCKER_SOCKET = """\
[Unit]
Description=Docker Socket for the API

[Socket]
ListenStream=/run/docker.sock
SocketMode=0660
SocketUser=root
SocketGroup=docker

[Install]
WantedBy=sockets.target
"""
CONTAINERD_SERVICE = """\
[Unit]
Description=containerd container runtime
Documentation=https://containerd.io
After=network.target local-fs.target dbus.service

[Service]
ExecStartPre=-/sbin/modprobe overlay
ExecStart=/usr/bin/containerd
Type=notify
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
"""


def fetch(work: Path) -> dict[str, bytes]:
    """{path: content} of the programs in Debian's packages."""
    cache = work / "archives"
    if len(list(cache.glob("*.deb"))) != len(SOURCES):
        for directory in ("lists/partial", "archives/partial", "etc"):
            (work / directory).mkdir(parents=True, exist_ok=True)
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (work / "etc/debian.sources").write_text(
            f"Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {SUITE}\nComponents: main\nSigned-By: {keyring}\n"
        )
        settings = {
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": str(work / "etc"),
            "Dir::State::lists": str(work / "lists"),
            "Dir::State::status": "/dev/null",
            "Dir::Cache": str(work),
            "APT::Architecture": "amd64",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }
        apt = [
            "apt-get",
            "--quiet",
            "--quiet",
            *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
        ]
        for command in (["update"], ["download", *SOURCES]):
            done = subprocess.run([*apt, *command], cwd=cache, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"apt-get {' '.join(command)} for Debian {SUITE} failed: {done.stderr.strip()}")
    wanted = {*ENGINE, *CLIENT, *RUNTIME}
    found: dict[str, bytes] = {}
    for archive in sorted(cache.glob("*.deb")):
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                source = tar.extractfile(member) if name in wanted and member.isfile() else None
                if source:
                    found[name] = source.read()
    missing = wanted - set(found)
    if missing:
        raise SystemExit(f"not in Debian {SUITE}'s packages any more: {', '.join(sorted(missing))}")
    return found


def build(output: Path, key: Key, work: Path, say: Callable[[str], None]) -> None:
    """The repositories of all distributions, with the layout of download.docker.com/linux."""
    say(f"download.docker.com: fetching Debian {SUITE}'s Docker Engine")
    programs = fetch(work)
    contents = {}
    for name, chosen, more in (
        ("docker-ce", ENGINE, {"docker.service": DOCKER_SERVICE, "docker.socket": DOCKER_SOCKET}),
        ("docker-ce-cli", CLIENT, {}),
        ("containerd.io", RUNTIME, {"containerd.service": CONTAINERD_SERVICE}),
    ):
        say(f"download.docker.com: packing {name}")
        files = {target: (programs[source], 0o755) for source, target in chosen.items()}
        files.update({f"/usr/lib/systemd/system/{unit}": (text.encode(), 0o644) for unit, text in more.items()})
        if name == "containerd.io":
            files["/etc/containerd/config.toml"] = (b'disabled_plugins = ["cri"]\n', 0o644)
        # Fast rather than small: it is unpacked on this very machine.
        contents[name] = data_archive(files, {}, level=1)
    for distribution, codename, suffix in DISTRIBUTIONS:
        directory = output / distribution
        suite = directory / "dists" / codename
        entries = []
        for package in _packages(suffix, contents):
            content = package.build()
            path = f"dists/{codename}/pool/stable/amd64/{package.filename}"
            write_if_changed(directory / path, content)
            entries.append(index_entry(package, content, path))
        index = "\n".join(entries).encode()
        files = {
            "stable/binary-amd64/Packages": index,
            "stable/binary-amd64/Packages.gz": gzip.compress(index, mtime=0),
        }
        fields = {"Origin": "Docker", "Label": "Docker CE", "Suite": codename, "Codename": codename}
        write_release(suite, files, {**fields, "Architectures": "amd64", "Components": "stable"}, key)
        write_if_changed(directory / "gpg", key.public(armor=True))


def _packages(suffix: str, contents: dict[str, bytes]) -> list[Package]:
    found = []
    for version, data in ((VERSION, contents), (UNWANTED, None)):
        full = f"5:{version}-1~{suffix}"
        relations = {
            "docker-ce": {
                "Depends": "containerd.io (>= 1.6.24), docker-ce-cli, iptables, libc6 (>= 2.34), libsystemd0",
                "Conflicts": "docker (<< 1.5~), docker.io",
                "Replaces": "docker (<< 1.5~), docker.io",
            },
            "docker-ce-cli": {
                "Depends": "libc6 (>= 2.34)",
                "Conflicts": "docker-cli, docker.io",
                "Replaces": "docker-cli, docker.io",
            },
        }
        for name, fields in relations.items():
            scripts = _service("docker.service", "docker.socket", group="docker") if name == "docker-ce" else {}
            if data is None:
                scripts = {
                    "preinst": f'#!/bin/sh\necho "{name} {version} only exists in the sandbox to be refused" >&2\nexit 1\n'
                }
            payload = data[name] if data else None
            found.append(Package(name, full, fields, scripts=scripts, section="admin", data=payload))
    found.append(
        Package(
            "containerd.io",
            f"{CONTAINERD}~{suffix}" if suffix.startswith("ubuntu") else CONTAINERD,
            {
                "Depends": "libc6 (>= 2.38), libseccomp2 (>= 2.5.0)",
                "Provides": "containerd, runc",
                "Conflicts": "containerd, runc",
                "Replaces": "containerd, runc",
            },
            scripts={**_service("containerd.service"), "conffiles": "/etc/containerd/config.toml\n"},
            section="devel",
            data=contents["containerd.io"],
        )
    )
    return found


def _service(*units: str, group: str = "") -> dict[str, str]:
    """Enabled and started on installation, restarted on an upgrade, as debhelper does it."""
    names = " ".join(units)
    make_group = f"    getent group {group} >/dev/null || groupadd --system {group}\n" if group else ""
    return {
        "postinst": '#!/bin/sh\nset -e\nif [ "$1" = configure ]; then\n'
        f"{make_group}    if [ -z \"$2\" ]; then systemctl enable --quiet {names}; fi\n"
        "    if [ -d /run/systemd/system ]; then\n        systemctl daemon-reload\n"
        f'        if [ -n "$2" ]; then systemctl restart {units[0]} || true; else systemctl start {names} || true; fi\n'
        "    fi\nfi\n",
        "prerm": f'#!/bin/sh\nset -e\nif [ "$1" = remove ] && [ -d /run/systemd/system ]; then systemctl stop {names} || true; fi\n',
        "postrm": '#!/bin/sh\nset -e\nif [ "$1" = remove ] || [ "$1" = purge ]; then\n'
        f"    for unit in {names}; do rm -f /etc/systemd/system/*.target.wants/$unit; done\nfi\n"
        "if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi\n",
    }  # fmt: skip
