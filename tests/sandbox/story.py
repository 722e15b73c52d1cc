# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""For tests that tell a story: run playbooks against the hosts of a molecule scenario, and programs on those hosts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
SANDBOX = CHECKOUT / ".sandbox"
sys.path.insert(0, str(CHECKOUT / "tests/sandbox/world"))


@dataclasses.dataclass
class Run:
    """What a playbook did."""

    rc: int
    output: str

    def recap(self, host: str) -> dict[str, int]:
        """Counters of a host: ok, changed, unreachable, failed, …"""
        lines = re.findall(r"^%s +: (ok=.*)$" % re.escape(host), self.output, re.M)
        assert lines, self.output
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", lines[-1])}


def sandbox(*arguments: str) -> None:
    """A command of the sandbox: ``sandbox("add", "gpu01", "--scenario", "x")``."""
    program = CHECKOUT / "tests/sandbox/sandbox.py"
    done = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Story:
    """The hosts of one scenario.

    Args:
        scenario: Name under which the hosts were made.
        directory: Where its ``inventory.yml`` with the variables is; by default the scenario's below ``molecule``.
    """

    def __init__(self, scenario: str, directory: Path | None = None) -> None:
        self.scenario = scenario
        self.directory = directory or CHECKOUT / "molecule" / scenario
        self.inventory = SANDBOX / "inventories" / (scenario + ".yml")
        hosts = yaml.safe_load(self.inventory.read_text(encoding="utf-8"))["gpu_hosts"]["hosts"]
        self.addresses = {name: str(host["ansible_host"]) for name, host in hosts.items()}

    # ---- hosts

    def ssh_command(self, host: str, command: str) -> list[str]:
        options = ["-i", str(SANDBOX / "ssh/id_ed25519"), "-o", "UserKnownHostsFile=%s" % (SANDBOX / "ssh/known_hosts")]
        return [
            "ssh",
            *options,
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=10",
            "root@" + self.addresses[host],
            command,
        ]

    def ssh(self, host: str, command: str, *, input: str = "", check: bool = True) -> str:
        """Run a shell command as root; returns what it wrote on standard output."""
        done = subprocess.run(
            self.ssh_command(host, command),
            input=input,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
        )
        assert not check or done.returncode == 0, "%s: %s\n%s%s" % (host, command, done.stdout, done.stderr)
        return done.stdout

    def python(self, host: str, script: str, data: Any = None) -> Any:
        """Run a Python program on the host; it reads ``data`` as JSON from its input and writes JSON.

        Neither the program nor the data appears in an argument list or a file of the host.
        """
        loader = "import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
        source = script.encode()
        text = "%d\n%s%s\n" % (len(source), script, json.dumps(data))
        return json.loads(self.ssh(host, "python3 -c %s" % shlex.quote(loader), input=text))

    # ---- playbooks

    def command(self, playbook: str, *arguments: str, variables: bool = True) -> list[str]:
        inventories = ["-i", str(self.inventory)]
        if variables:
            inventories = ["-i", str(self.directory / "inventory.yml"), *inventories]
        return [str(Path(sys.executable).parent / "ansible-playbook"), *inventories, playbook, *arguments]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {
            "ANSIBLE_COLLECTIONS_PATH": str(CHECKOUT / ".build/collections"),
            **os.environ,
            "ANSIBLE_CONFIG": str(SANDBOX / "ansible.cfg"),
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_NOCOLOR": "1",
            **(extra or {}),
        }

    def play(
        self,
        playbook: str,
        *arguments: str,
        check: bool = True,
        variables: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Run a playbook of the collection (``gpu_fleet.nim.site``) or a file to its end.

        Args:
            check: It must succeed.
            variables: Use the variables of the scenario's inventory; otherwise only its hosts.
        """
        done = subprocess.run(
            self.command(playbook, *arguments, variables=variables),
            env=self.environment(environment),
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=600,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout[-6000:]
        return Run(done.returncode, done.stdout)

    def play_until(
        self,
        moment: str,
        playbook: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        after: float = 0,
    ) -> Run:
        """Run a playbook and kill the controller ``after`` seconds after ``moment`` (a pattern) was in its output.

        All its processes get SIGKILL at once, as when the controller loses power: nothing is cleaned up.
        """
        run = Run(0, "")
        with subprocess.Popen(
            self.command(playbook, *arguments),
            env={**self.environment(environment), "PYTHONUNBUFFERED": "1"},
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            assert process.stdout
            os.set_blocking(process.stdout.fileno(), False)
            seen, deadline = 0.0, time.monotonic() + 400
            while process.poll() is None and time.monotonic() < deadline:
                run.output += (process.stdout.read() or b"").decode(errors="replace")
                if not seen and re.search(moment, run.output):
                    seen = time.monotonic()
                if seen and time.monotonic() - seen >= after:
                    break
                time.sleep(0.02)
            kill_tree(process.pid)
            run.rc = process.wait()
        assert seen, "the moment %r never came:\n%s" % (moment, run.output[-6000:])
        return run


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that it has started, sessions of their own included."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = entry.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    queue: Sequence[int] = [pid]
    while queue:
        found += queue
        queue = [child for parent in queue for child in children.get(parent, [])]
    for each in found:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


# ---- the state of a host, for comparisons

_SNAPSHOT = r"""
import hashlib, json, os, stat, subprocess, sys
skip = set(json.load(sys.stdin))
found = {}
for top, directories, files in os.walk("/"):
    directories[:] = [name for name in directories if os.path.join(top, name) not in skip]
    for name in directories + files:
        path = os.path.join(top, name)
        if path in skip:
            continue
        try:
            status = os.lstat(path)
            what = "%o %d:%d" % (status.st_mode, status.st_uid, status.st_gid)
            if stat.S_ISLNK(status.st_mode):
                what += " " + os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as stream:
                    what += " " + hashlib.sha256(stream.read()).hexdigest()
        except FileNotFoundError:
            continue
        found[path] = what
def lines(title, *command):
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        found[title + " " + line] = "there"
lines("package", "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Abbrev}\n")
lines("unit", "systemctl", "list-unit-files", "--no-legend", "--no-pager", "--plain")
lines("module", "ls", "/sys/module")
json.dump(found, sys.stdout)
"""

#: Changes by itself, or is rebuilt by the system from what else is there.
VOLATILE = (
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
)


def snapshot(story: Story, host: str, skip: Sequence[str] = ()) -> dict[str, str]:
    """Every file (mode, owner, content), package, unit file and kernel module of a host."""
    found: dict[str, str] = story.python(host, _SNAPSHOT, [*VOLATILE, *skip])
    return found


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """What is new, gone or different."""
    found = {}
    for path in sorted({*before, *after}):
        if path not in before:
            found[path] = "new"
        elif path not in after:
            found[path] = "gone"
        elif before[path] != after[path]:
            found[path] = "different"
    return found


def main() -> None:
    """``story.py snapshot SCENARIO HOST FILE``"""
    dummy, verb, scenario, host, output = sys.argv
    assert verb == "snapshot"
    Path(output).write_text(json.dumps(snapshot(Story(scenario), host)), encoding="utf-8")


if __name__ == "__main__":
    main()
