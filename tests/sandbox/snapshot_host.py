# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on a host, from standard input: every file (mode, owner, content), package, unit file and kernel module.

Input: {"skip": [path, …], "by_size": [path, …], "live": bool}; output: {what: in which state}, as JSON. Files below
``by_size`` are told apart by their size, which is many times faster. ``live`` adds what runs: units, Docker's settings,
images and containers.
"""

import hashlib
import json
import os
import stat
import subprocess
import sys

#: Changes by itself, or is rebuilt by the system from what else is there.
VOLATILE = {
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/var/tmp",
    "/var/log",
    "/var/cache/apt/pkgcache.bin",
    "/var/cache/apt/srcpkgcache.bin",
    "/var/lib/systemd/timers",
    "/root/.ansible",
}
#: Tables in which the order of the lines says nothing.
TABLES = {"/etc/group", "/etc/gshadow"}
REQUEST = json.loads(sys.stdin.buffer.readline())
SKIP = VOLATILE | set(REQUEST["skip"])
BY_SIZE = tuple(path + "/" for path in REQUEST.get("by_size", ()))


def content(path, size):
    if path.startswith(BY_SIZE):
        return "%d bytes" % size
    with open(path, "rb") as stream:
        data = stream.read()
    if path in TABLES:
        data = b"".join(sorted(data.splitlines(True)))
    elif path.endswith(".json"):
        try:
            data = json.dumps(json.loads(data), sort_keys=True).encode()
        except ValueError:
            pass
    return hashlib.sha256(data).hexdigest()


def state(path):
    status = os.lstat(path)
    text = "%o %d:%d" % (status.st_mode, status.st_uid, status.st_gid)
    if stat.S_ISLNK(status.st_mode):
        text += " " + os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        text += " " + content(path, status.st_size)
    return text


def files(start):
    for top, directories, names in os.walk(start):
        directories[:] = [name for name in directories if os.path.join(top, name) not in SKIP]
        for path in [os.path.join(top, name) for name in directories + names]:
            if path not in SKIP:
                try:
                    yield path, state(path)
                except FileNotFoundError:
                    continue


def output(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()


def lines(title, *command):
    for line in output(*command):
        words = line.split()
        if words[1:2] != ["transient"]:
            yield " ".join([title, *words]), "there"


def live():
    """What runs, without what is another one after every start: process and container ids, addresses, times."""
    yield from files("/run/cdi")
    yield "/run/docker.sock", state("/run/docker.sock") if os.path.exists("/run/docker.sock") else "gone"
    kinds = "--type=service,socket,path,target,mount"
    for line in output("systemctl", "list-units", "--all", kinds, "--no-legend", "--no-pager", "--plain"):
        unit, _load, active, _sub = line.split(None, 4)[:4]
        yield "running " + unit, active
    settings = "{{.LiveRestoreEnabled}} {{.DefaultRuntime}} {{json .Runtimes}} {{json .CDISpecDirs}} {{.LoggingDriver}}"
    for line in output("docker", "info", "--format", settings):
        yield "docker", line
    for line in output("docker", "image", "ls", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"):
        yield "image " + line, "there"
    shown = "{{.Name}} {{.Config.Image}} {{.State.Status}} {{.HostConfig.RestartPolicy.Name}} {{.RestartCount}}"
    for name in output("docker", "ps", "--all", "--quiet"):
        for line in output("docker", "inspect", "--format", shown, name):
            yield "container " + line, "there"


json.dump(
    {
        **dict(files("/")),
        **dict(lines("package", "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Abbrev}\n")),
        **dict(lines("unit", "systemctl", "list-unit-files", "--no-legend", "--no-pager", "--plain")),
        **dict(lines("module", "ls", "/sys/module")),
        **(dict(live()) if REQUEST.get("live") else {}),
    },
    sys.stdout,
)
