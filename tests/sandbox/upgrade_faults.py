# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Everything that goes wrong while a fleet is changed under load, and what must come of it.

The fleet: gpu01 and gpu02 serve llama, gpu03 and gpu04 large. It is on driver OLD, and NEW is wanted: 570 and 580 by turns, so
that no line needs the work of the one before it undone. For ``deploy``, llama 1.8.5 is wanted. gpu01 is the canary, and at most two
hosts are out at a time, so the batches are gpu01 / gpu02, gpu03 / gpu04. Clients ask gateway gw01 all the time. What the design
gives up is said in ``lost``; where it is empty, no request may fail or be truncated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LLAMA = ("gpu01", "gpu02")
LARGE = ("gpu03", "gpu04")
HOSTS = (*LLAMA, *LARGE)
#: Steps of a driver upgrade as a host has them on record, in their order.
STEPS = (
    "planned",
    "prestaged",
    "drained",
    "workloads_stopped",
    "clients_stopped",
    "unloaded",
    "packages_changed",
    "loaded",
    "validated",
    "workloads_started",
    "ready",
    "returned",
)
#: Branches of the driver; the table has their places.
BRANCHES = ("570", "580")
OLD, NEW = "OLD", "NEW"
REPOSITORY = "developer.download.nvidia.com"

#: How a host ends that was never begun with, that has what is wanted, and that is back on what it had.
UNTOUCHED = (OLD, "")
DONE = (NEW, "updated")
ROLLED_BACK = (OLD, "rolled_back")
RESTORED = (OLD, "restored")
#: Out of service; what is loaded does not matter.
STRANDED = ("", "stranded")
#: It cannot be asked.
GONE = ("", "gone")


@dataclasses.dataclass(frozen=True)
class Order:
    """Something done to the fleet.

    Attributes:
        where: Name of a host for a command there; ``sandbox`` or ``world`` for a command of theirs.
        what: The shell command, or the name of the method.
        options: Further arguments; a host's name in those of the sandbox stands for it in this scenario.
    """

    where: str
    what: str
    options: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fault:
    """One line of the table.

    Attributes:
        demand: The fault in the words of what was asked for.
        expected: What must come of it, in words; the fields below are the same for the test.
        prepare: Before the run.
        moment: Host and the step that it has on record, or later, when ``during`` happens.
        mend: After the run, as an operator would.
        variables: Of the run.
        towards: Branch that must be the wanted one; empty for either.
        succeeds: Whether the run ends well.
        says: Patterns in what it prints.
        ends: Host -> branch of the loaded driver ("" for any) and outcome on record ("" for none).
        out: Hosts that get no requests after it.
        again: Whether a second run after ``mend`` brings every host to where it is wanted.
        second: Pattern in what a second run prints that is begun at the moment; empty when there is none.
        lost: Which requests the design gives up; empty for none.
    """

    name: str
    demand: str
    expected: str
    playbook: str = "upgrade_drivers"
    towards: str = ""
    prepare: tuple[Order, ...] = ()
    moment: tuple[str, str] = ("", "")
    during: tuple[Order, ...] = ()
    mend: tuple[Order, ...] = ()
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    succeeds: bool = False
    says: tuple[str, ...] = ()
    ends: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    out: tuple[str, ...] = ()
    again: bool = True
    second: str = ""
    lost: str = ""


def directed(fault: Fault, old: str, new: str) -> Fault:
    """A line of the table for one direction."""

    def named(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(OLD, old).replace(NEW, new)
        if isinstance(value, dict):
            return {key: named(each) for key, each in value.items()}
        if isinstance(value, tuple):
            return tuple(named(each) for each in value)
        if isinstance(value, Order):
            return dataclasses.replace(value, what=named(value.what), options=named(value.options))
        return value

    return dataclasses.replace(
        fault, **{field.name: named(getattr(fault, field.name)) for field in dataclasses.fields(fault)}
    )


def ends(default: tuple[str, str], **hosts: tuple[str, str]) -> dict[str, tuple[str, str]]:
    """The end of every host."""
    return {**dict.fromkeys(HOSTS, default), **hosts}


NOTHING_BEGUN = "cannot be updated, so nothing was begun"
STOPPED = r"The run stops after 1 of 4 hosts"
_CLEAN = tuple(Order(host, "apt-get clean") for host in HOSTS)
_HOLD = "systemd-run --quiet --unit=foreign /bin/sh -c 'exec 3</dev/nvidia0; exec sleep 3600'"
_LET_GO = "systemctl stop foreign; systemctl reset-failed foreign 2>/dev/null; true"
_STALE = (
    "k=$(uname -r) && install -D -m 0644 $(modinfo -n nvidia) /lib/modules/$k/manual/nvidia.ko && "
    "echo 'override nvidia * manual' > /etc/depmod.d/manual.conf && depmod"
)
_FRESH = "rm -rf /lib/modules/$(uname -r)/manual /etc/depmod.d/manual.conf && depmod"
_HARDWARE = (
    'python3 -c \'import json; p = "/etc/sandbox/hardware.json"; d = json.load(open(p)); '
    'd.update(load_error=%s) if %s else d.pop("load_error", None); json.dump(d, open(p, "w"))\''
)
_REFUSE_NEW = (
    "install -D -m 0644 /dev/null /etc/systemd/system/nim-llama.service.d/zz.conf && "
    "printf '[Service]\\nExecStartPre=/bin/sh -c \"! grep -q ^NEW /sys/module/nvidia/version\"\\n' "
    "> /etc/systemd/system/nim-llama.service.d/zz.conf && systemctl daemon-reload"
)
_ALLOW_NEW = "rm -rf /etc/systemd/system/nim-llama.service.d && systemctl daemon-reload"
_SET_STATE = (
    "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
    "s.sendall(b'show stat -1 4 -1\\n'); rows = [l.split(',') for l in s.makefile().read().splitlines()]; "
    "name = ['%%s/%%s' %% (r[0], r[1]) for r in rows if len(r) > 17 and r[1].startswith('%s:')][0]; "
    "s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
    "s.sendall(('set server %%s state %s\\n' %% name).encode()); s.recv(99)\""
)

FAULTS = (
    Fault(
        "broken_package",
        "package broken in the repository",
        "Every host is refused while it serves, because its package is not what the index says; nothing is begun.",
        prepare=(
            *_CLEAN,
            Order(
                "world",
                "fail",
                (
                    200,
                    {"host": REPOSITORY, "where": "static", "path": r"nvidia-(kernel-)?(open-)?dkms[^/]*NEW[^/]*\.deb"},
                ),
            ),
        ),
        mend=(Order("world", "reset"),),
        says=(NOTHING_BEGUN,),
        ends=ends(UNTOUCHED),
        again=False,
    ),
    Fault(
        "download_interrupted",
        "download interrupted",
        "Every host is refused while it serves; nothing is begun.",
        prepare=(*_CLEAN, Order("world", "cut", (20000, {"host": REPOSITORY, "where": "static", "path": r"\.deb$"}))),
        mend=(Order("world", "reset"),),
        says=(NOTHING_BEGUN,),
        ends=ends(UNTOUCHED),
        again=False,
    ),
    Fault(
        "dkms_build_fails",
        "DKMS build fails",
        "The canary gets its old driver back and serves on it; the others are not touched.",
        towards="580",
        variables={"nvidia_driver_version": "580.82.07"},
        says=(r"The old driver OLD\.\S+ was put back and the services run on it again", STOPPED),
        ends=ends(UNTOUCHED, gpu01=ROLLED_BACK),
    ),
    Fault(
        "foreign_process_before",
        "module in use by a foreign process",
        "The host is refused while it serves, with the name of the unit; nothing is begun.",
        prepare=(Order("gpu02", _HOLD),),
        mend=(Order("gpu02", _LET_GO),),
        says=(NOTHING_BEGUN, r"gpu02: .*foreign"),
        ends=ends(UNTOUCHED),
        again=False,
    ),
    Fault(
        "foreign_process_during",
        "module in use by a foreign process",
        "It comes when the host is about to be drained: the services are left or started again on the old driver, the host is given "
        "back, the others are not touched.",
        moment=("gpu01", "drained"),
        during=(Order("gpu01", _HOLD),),
        mend=(Order("gpu01", _LET_GO),),
        says=(r"gpu01: .*foreign", STOPPED),
        ends=ends(UNTOUCHED, gpu01=RESTORED),
    ),
    Fault(
        "module_will_not_load",
        "module will not load",
        "Neither the new module nor the old one loads, and no reboot is allowed: the canary stays out with its record, the others are "
        "not touched.",
        variables={"driver_upgrade_reboot": "never"},
        moment=("gpu01", "unloaded"),
        during=(Order("gpu01", _HARDWARE % ('"Cannot allocate memory"', "True")),),
        mend=(Order("gpu01", _HARDWARE % ("0", "False")),),
        says=("the host stays out of service", STOPPED),
        ends=ends(UNTOUCHED, gpu01=STRANDED),
        out=("gpu01",),
    ),
    Fault(
        "version_mismatch",
        "version mismatch after load",
        "Somebody's file hides the new module, so the old one is loaded under the new libraries: the old packages are put back.",
        prepare=(Order("gpu01", _STALE),),
        mend=(Order("gpu01", _FRESH),),
        says=(r"The old driver OLD\.\S+ was put back", STOPPED),
        ends=ends(UNTOUCHED, gpu01=ROLLED_BACK),
    ),
    Fault(
        "nim_not_ready",
        "NIM not ready on the new driver",
        "The canary gets its old driver back and serves on it; the others are not touched.",
        prepare=(Order("gpu01", _REFUSE_NEW),),
        mend=(Order("gpu01", _ALLOW_NEW),),
        says=(r"The old driver OLD\.\S+ was put back and the services run on it again", STOPPED),
        ends=ends(UNTOUCHED, gpu01=ROLLED_BACK),
    ),
    Fault(
        "unreachable_after_drain",
        "host unreachable after drain",
        "It stays drained and counts as failed; the others are not touched; the next run goes on with it.",
        moment=("gpu01", "workloads_stopped"),
        during=(Order("sandbox", "pause", ("gpu01",)),),
        mend=(Order("sandbox", "start", ("gpu01",)),),
        says=("gpu01: The host cannot be reached any more", "1 out of service, 3 not begun"),
        ends=ends(UNTOUCHED, gpu01=GONE),
        out=("gpu01",),
    ),
    Fault(
        "never_returns_from_reboot",
        "host never returns from reboot",
        "It stays drained and counts as failed; the others are not touched; the next run goes on with it.",
        prepare=(Order("gpu01", "echo infinity > /etc/sandbox/boot-delay"),),
        variables={"driver_upgrade_reboot": "always", "driver_upgrade_reboot_timeout": 60},
        mend=(
            Order("sandbox", "exec", ("gpu01", "--", "rm", "/etc/sandbox/boot-delay")),
            Order("sandbox", "stop", ("gpu01", "--power-cut")),
            Order("sandbox", "start", ("gpu01",)),
        ),
        says=("1 out of service, 3 not begun",),
        ends=ends(UNTOUCHED, gpu01=GONE),
        out=("gpu01",),
    ),
    Fault(
        "gateway_reloaded",
        "gateway reloaded mid-run",
        "What is drained stays so, and the run does not notice.",
        moment=("gpu01", "unloaded"),
        during=(Order("gw01", "systemctl reload haproxy"),),
        succeeds=True,
        says=("4 updated",),
        ends=ends(DONE),
        again=False,
    ),
    Fault(
        "gateway_unreachable",
        "gateway unreachable when undraining",
        "The host has the new driver and is not given back at the gateway that is gone; the run stops; the next one gives it back.",
        moment=("gpu01", "validated"),
        during=(Order("sandbox", "stop", ("gw02", "--power-cut")),),
        mend=(Order("sandbox", "start", ("gw02",)),),
        says=(r"Gateways \S*gw02 cannot be reached, so this host is not enabled there", STOPPED),
        ends=ends(UNTOUCHED, gpu01=(NEW, "")),
    ),
    Fault(
        "registry_down",
        "registry down",
        "The images are on the hosts, so an upgrade of the driver does not need it.",
        prepare=(Order("world", "down"),),
        mend=(Order("world", "reset"),),
        succeeds=True,
        says=("4 updated",),
        ends=ends(DONE),
        again=False,
    ),
    Fault(
        "registry_down_deploy",
        "registry down",
        "The new image cannot be had: the hosts that need it are refused while they serve; nothing is begun.",
        playbook="deploy",
        prepare=(Order("world", "down"),),
        mend=(Order("world", "reset"),),
        says=(NOTHING_BEGUN,),
        ends=ends(UNTOUCHED),
        again=False,
    ),
    Fault(
        "last_replica",
        "last replica",
        "The only host that serves llama is left alone, and says so; those of the other model are upgraded.",
        prepare=(Order("gpu02", "systemctl stop nim-llama"),),
        mend=(Order("gpu02", "systemctl start nim-llama"),),
        says=(r"gpu01\b.* model llama would have 0 ready replicas and keeps at least 1",),
        ends={"gpu01": UNTOUCHED, "gpu03": DONE, "gpu04": DONE},
    ),
    Fault(
        "operator_drained",
        "operator-drained host",
        "It is left alone and stays drained; so is the one that is the last of its model then; those of the other model are upgraded.",
        prepare=(Order("gw01", _SET_STATE % ("upgrade-faults-gpu04", "drain")),),
        mend=(Order("gw01", _SET_STATE % ("upgrade-faults-gpu04", "ready")),),
        says=(
            r"gpu04: somebody else has drained it at a gateway",
            "model large would have 0 ready replicas and keeps at least 1",
            "2 updated",
        ),
        ends=ends(DONE, gpu03=UNTOUCHED, gpu04=UNTOUCHED),
        out=("gpu04",),
    ),
    Fault(
        "two_runs",
        "two runs at once",
        "The second is told who runs and since when, and changes nothing; the first ends well.",
        moment=("gpu01", "drained"),
        second=r"\(process \d+\) is at the upgrade of its driver on this host, last seen",
        succeeds=True,
        says=("4 updated",),
        ends=ends(DONE),
        again=False,
    ),
    Fault(
        "disk_full",
        "disk full while unpacking",
        "There is no room for the old packages either: the canary stays out with its record, the others are not touched.",
        moment=("gpu01", "workloads_stopped"),
        during=(Order("gpu01", "mount -t tmpfs -o size=4k,nr_inodes=2 full /usr/src"),),
        mend=(Order("gpu01", "umount /usr/src"),),
        says=("the host stays out of service", STOPPED),
        ends=ends(UNTOUCHED, gpu01=STRANDED),
        out=("gpu01",),
    ),
)

#: "controller killed at every step of the state machine and rerun": the step that gpu01 has on record when it dies. After the last
#: one nothing is left but the hosts of the next batches.
KILLED_AT = STEPS
KILLED_EXPECTED = "Every next run goes on where the dead one was; the last one ends with every host upgraded; nothing is lost in between."
