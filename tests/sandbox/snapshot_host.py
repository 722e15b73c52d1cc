# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs on a host, from standard input: every file (mode, owner, content), package, unit file and kernel module.

Input: {"skip": [path, …]}; output: {what: in which state}, as JSON.
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
SKIP = VOLATILE | set(json.loads(sys.stdin.buffer.readline())["skip"])


def state(path):
    status = os.lstat(path)
    text = "%o %d:%d" % (status.st_mode, status.st_uid, status.st_gid)
    if stat.S_ISLNK(status.st_mode):
        text += " " + os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        with open(path, "rb") as stream:
            text += " " + hashlib.sha256(stream.read()).hexdigest()
    return text


def files():
    for top, directories, names in os.walk("/"):
        directories[:] = [name for name in directories if os.path.join(top, name) not in SKIP]
        for path in [os.path.join(top, name) for name in directories + names]:
            if path not in SKIP:
                try:
                    yield path, state(path)
                except FileNotFoundError:
                    continue


def lines(title, *command):
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    for line in done.stdout.decode().splitlines():
        yield title + " " + line, "there"


json.dump(
    {
        **dict(files()),
        **dict(lines("package", "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Abbrev}\n")),
        **dict(lines("unit", "systemctl", "list-unit-files", "--no-legend", "--no-pager", "--plain")),
        **dict(lines("module", "ls", "/sys/module")),
    },
    sys.stdout,
)
