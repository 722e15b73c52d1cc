# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a sandbox could leave on its machine; `make demo-down` must leave nothing.

traces.py save FILE       before the sandbox is started
traces.py compare FILE    after `down`: status 1 and a line for everything that was not there before, or is not any more

A sandbox that was killed leaves its interface and its rules; that the next one takes them away with its own is no fault.
Debian packages that the sandbox installed may stay, as its README says; so may what was built below .build and .venv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

from fleet_sandbox.common import BRIDGE
from fleet_sandbox.engine import NFT_TABLE

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
PROC = pathlib.Path("/proc")
#: Files and directories of the machine that containers, their networks or an SSH client like to write to.
SHARED = (
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/sysctl.d",
    "/root/.docker",
    "/root/.ssh",
    "/run/docker",
    "/run/docker.sock",
    "/usr/local/share/ca-certificates",
)
SWITCHES = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")


def _output(*command: str) -> list[str]:
    """Lines of a command's output; none where the command is not installed."""
    if shutil.which(command[0], path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        return []
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _processes() -> list[str]:
    """Processes in a network of their own, and those whose command line names the sandbox's directory."""
    own_network = (PROC / "self/ns/net").readlink()
    found = []
    for process in PROC.glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            network = (process / "ns/net").readlink()
        except OSError:  # it has ended
            continue
        if command and (network != own_network or str(CHECKOUT / ".sandbox") in command):
            found.append("%s %s" % (process.name, command[:120]))
    return found


def _content(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "-"


def _files(place: str) -> list[str]:
    path = pathlib.Path(place)
    below = sorted(path.rglob("*")) if path.is_dir() else []
    return ["%s %s" % (each, _content(each)) for each in ([path] if path.exists() else []) + below]


def _cgroups() -> list[str]:
    return [str(path) for path in pathlib.Path("/sys/fs/cgroup").rglob("*sandbox*") if path.is_dir()]


def look() -> dict[str, list[str]]:
    """Kind of trace → what there is of it, sorted."""
    rules = [*_output("iptables", "-S"), *_output("iptables", "-t", "nat", "-S"), *_output("nft", "list", "tables")]
    switches = [PROC / "sys" / name for name in SWITCHES]
    traces = {
        "cgroup": _cgroups(),
        "directory": [str(path) for path in [CHECKOUT / ".sandbox"] if path.exists()],
        "file": [line for place in SHARED for line in _files(place)],
        "firewall": [line for line in rules if not line.startswith("-P ")],
        "kernel setting": ["%s = %s" % (path, path.read_text().strip()) for path in switches if path.exists()],
        "loop device": _output("losetup", "--noheadings", "--list", "--output", "NAME,BACK-FILE"),
        "mount": [line.split()[4] for line in (PROC / "self/mountinfo").read_text().splitlines()],
        "network": [path.name for path in pathlib.Path("/sys/class/net").iterdir()],
        "process": _processes(),
        "route": _output("ip", "route"),
    }
    return {kind: sorted(found) for kind, found in traces.items()}


def differences(before: dict[str, list[str]], now: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Lines for what must not differ, and for what a killed sandbox had left and is gone."""
    wrong, leftovers = [], []
    for kind, found in now.items():
        wrong += ["left behind: %s %s" % (kind, each) for each in sorted(set(found) - set(before[kind]))]
        for each in sorted(set(before[kind]) - set(found)):
            if kind == "process":  # one that was there before and has ended is nobody's trace
                continue
            sandbox = not {BRIDGE, NFT_TABLE}.isdisjoint(each.split())
            (leftovers if sandbox else wrong).append("gone: %s %s" % (kind, each))
    return wrong, leftovers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "compare"))
    parser.add_argument("file", type=pathlib.Path)
    options = parser.parse_args()
    now = look()
    if options.action == "save":
        options.file.write_text(json.dumps(now, indent=1))
        return 0
    wrong, leftovers = differences(json.loads(options.file.read_text()), now)
    for line in leftovers:
        print("== %s (left by a sandbox that was killed)" % line)
    print("\n".join(wrong) or "== no trace of the sandbox is left")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
