# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on a host, from standard input: looks for secrets, all the time while playbooks run ("watch") or once ("search").

Input: {"mode": …, "needles": {name: [text, …]}, "skip": [path, …]}; output: what was found, as JSON, every finding under the
name of the secret and where it was ("key /etc/nim/ngc.env"). A watch ends with its input.
"""

import http.client
import json
import os
import select
import socket
import subprocess
import sys

REQUEST = json.loads(sys.stdin.buffer.readline())
NEEDLES = {name: [needle.encode() for needle in needles] for name, needles in REQUEST["needles"].items()}
SKIP = set(REQUEST["skip"])
#: Looked through again and again; the last two are what Docker and containerd know of containers.
WATCHED = ("/etc", "/root", "/home", "/run", "/tmp", "/var/tmp", "/var/lib/gpu_fleet", "/var/lib/nim")
WATCHED += ("/var/lib/docker/containers", "/var/lib/containerd/io.containerd.metadata.v1.bolt")


def has(data):
    """Names of the secrets in there."""
    return [name for name, needles in NEEDLES.items() if any(needle in data for needle in needles)]


def read(path):
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""


class Docker(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect("/var/run/docker.sock")

    def ask(self, path):
        try:
            self.request("GET", path)
            return self.getresponse().read()
        except (OSError, http.client.HTTPException):
            return b""
        finally:
            self.close()


def containers():
    """Name, id and full inspection of every container."""
    docker = Docker("docker")
    for entry in json.loads(docker.ask("/containers/json?all=1") or b"[]"):
        yield entry["Names"][0].lstrip("/"), entry["Id"], docker.ask("/containers/%s/json" % entry["Id"])


def processes():
    """Process id, and those of its arguments and environment that hold a secret."""
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            yield pid, has(read("/proc/%s/cmdline" % pid)), has(read("/proc/%s/environ" % pid))


def files(top):
    """Files with a secret in them: path and mode."""
    for directory, directories, names in os.walk(top):
        directories[:] = [name for name in directories if os.path.join(directory, name) not in SKIP]
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.lstat(path)
            except OSError:
                continue
            if status.st_mode & 0o170000 == 0o100000:
                for secret in has(read(path)):
                    yield secret + " " + path, "%o" % (status.st_mode & 0o7777)


def watch():
    arguments, environments, inspections, found = {}, {}, {}, {}
    rounds = 0
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        rounds += 1
        for pid, in_arguments, in_environment in processes():
            for secret in in_arguments:
                arguments[secret + " " + pid] = read("/proc/%s/comm" % pid).decode().strip()
            for secret in in_environment:
                environments[secret + " " + pid] = read("/proc/%s/cgroup" % pid).decode().strip()
        if rounds % 3 == 0:
            for name, identifier, text in containers():
                for secret in has(text):
                    inspections[secret + " " + identifier] = name
        if rounds % 10 == 0:
            for top in WATCHED:
                found.update(files(top))
    return {
        "rounds": rounds,
        "arguments": arguments,
        "environments": environments,
        "inspections": inspections,
        "files": found,
    }


def search():
    def output(*command):
        return has(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False).stdout)

    units = subprocess.run(
        ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager"], stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    names = [line.split()[0] for line in units.splitlines() if line]
    return {
        "files": dict(files("/")),
        "units": sorted(
            {*output("systemctl", "cat", "--", *names), *output("systemctl", "show", "--all", "--", *names)}
        ),
        "journal": output("journalctl", "--all", "--output=export", "--no-pager"),
        "arguments": [secret + " " + pid for pid, found, dummy in processes() for secret in found],
        "environments": [
            secret + " " + read("/proc/%s/cgroup" % pid).decode().strip()
            for pid, dummy, found in processes()
            for secret in found
        ],
        "containers": [secret + " " + name for name, dummy, text in containers() for secret in has(text)],
        "unit_names": names,
        "identifiers": {name: identifier for name, identifier, dummy in containers()},
    }


json.dump({"watch": watch, "search": search}[REQUEST["mode"]](), sys.stdout)
