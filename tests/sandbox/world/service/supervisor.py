# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""PID 1 of the outside world: starts the services, restarts one that ends, ends with all of them."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time

STATE = "/var/lib/world"
REPOSITORIES = "/srv/repositories"
NAMES = (
    "nvcr.io",
    "api.ngc.nvidia.com",
    "developer.download.nvidia.com",
    "nvidia.github.io",
    "download.docker.com",
    "mirror.fleet.test",
)


def resolver() -> list[str]:
    """Where questions about other names go: what Docker wrote into this container."""
    given = os.environ.get("WORLD_UPSTREAM_DNS")
    if given:
        return given.split(",")
    with open("/etc/resolv.conf") as handle:
        words = [line.split() for line in handle]
    return [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"] or ["127.0.0.11"]


def services() -> dict[str, list[str]]:
    address = os.environ.get("WORLD_ADDRESS", "172.30.0.2")
    names = list(NAMES)
    if os.path.isdir(REPOSITORIES):
        names += [name for name in sorted(os.listdir(REPOSITORIES)) if "." in name and name not in names]
    dns = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--user=root", "--cache-size=2000"]
    dns += ["--server=" + server for server in resolver()]
    for name in names:
        # local= keeps the question for an IPv6 address from going out.
        dns += ["--address=/%s/%s" % (name, address), "--local=/%s/" % name]
    return {
        "dns": dns,
        "registry": ["docker-registry", "serve", "/opt/world/registry.yml"],
        "gate": [sys.executable, "/opt/world/gate.py"],
        "front": ["nginx", "-c", "/opt/world/nginx.conf"],
        "packages": [
            "apt-cacher-ng",
            "-c",
            "/etc/apt-cacher-ng",
            "ForeGround=1",
            "Port=3142",
            "BindAddress=0.0.0.0",
            "PassThroughPattern=.*",
            "CacheDir=/var/cache/apt-cacher-ng",
            "LogDir=/var/log/apt-cacher-ng",
        ],
    }


def main() -> int:
    for name in ("control", "log", "registry", "models"):
        os.makedirs(os.path.join(STATE, name), exist_ok=True)
    owner = pwd.getpwnam("apt-cacher-ng")
    for directory in ("/var/cache/apt-cacher-ng", "/var/log/apt-cacher-ng", "/run/apt-cacher-ng"):
        os.makedirs(directory, exist_ok=True)
        os.chown(directory, owner.pw_uid, owner.pw_gid)

    def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
        def become() -> None:
            if name == "packages":
                os.initgroups(owner.pw_name, owner.pw_gid)
                os.setgid(owner.pw_gid)
                os.setuid(owner.pw_uid)

        with open(os.path.join(STATE, "log", name + ".log"), "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=become)  # noqa: PLW1509  (one thread)

    commands = services()
    running = {name: start(name, command) for name, command in commands.items()}
    ending = False

    def end(number: int, frame: object) -> None:
        nonlocal ending
        ending = True
        for process in running.values():
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    while not ending:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pid = 0
        if not pid:
            time.sleep(0.2)
            continue
        for name, process in running.items():
            if process.pid == pid and not ending:
                print("%s ended; starting it again" % name, flush=True)
                time.sleep(0.5)
                running[name] = start(name, commands[name])
                break
    for process in running.values():
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
