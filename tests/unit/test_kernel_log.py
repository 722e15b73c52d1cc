# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel says about GPUs and kills."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_causes import xid_signature
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_health import KERNEL_LINES
from ansible_collections.gpu_fleet.nim.plugins.module_utils._kernel_log import (
    gpu_addresses,
    kernel_events,
    read_kernel_log,
)
from fake_host import FakeHost

XID_94 = "NVRM: Xid (PCI:0000:01:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No, D-RST: No"
XID_79 = "NVRM: Xid (PCI:0000:41:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
CONTAINER = "0123456789abcdef" * 4
KILL = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=docker-{0}.scope,mems_allowed=0,"
    "oom_memcg=/nim.slice/docker-{0}.scope,task_memcg=/nim.slice/docker-{0}.scope,task=VLLM::EngineCor,pid=812,uid=1000"
).format(CONTAINER)
KILL_CGROUPFS = (
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/docker/%s,"
    "task=python3,pid=1,uid=0"
) % CONTAINER
KILL_ELSEWHERE = (
    "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,"
    "task_memcg=/user.slice/user-1000.slice,task=cc1plus,pid=1,uid=0"
)


def entry(at: float, message: object) -> str:
    return json.dumps({"MESSAGE": message, "__REALTIME_TIMESTAMP": str(int(at * 1e6))})


def test_journal_first() -> None:
    host = FakeHost()
    lines = [entry(90, "old"), entry(100.5, XID_79), "no json", entry(101, [255, 0]), json.dumps({"MESSAGE": "x"})]
    host.commands = {"journalctl --dmesg *": "\n".join(lines)}
    assert [(line.at, line.text) for line in read_kernel_log(host, 100) or ()] == [(100.5, XID_79)]
    assert any("--since=@100" in word for call in host.calls for word in call)


def test_ring_buffer_where_no_journal_keeps_it() -> None:
    host = FakeHost()
    boot = host.time() - host.monotonic()
    host.commands = {"journalctl *": "", "dmesg": "[    5.000000] early\n[  800.250000] %s\nbroken\n" % XID_94}
    assert [(line.at, line.text) for line in read_kernel_log(host, boot + 100) or ()] == [(boot + 800.25, XID_94)]


def test_only_what_is_asked_for() -> None:
    loading = "NVRM: loading NVIDIA UNIX Open Kernel Module"

    def read(commands: dict[str, t.Any]) -> list[str] | None:
        found = read_kernel_log(
            FakeHost(commands={"dmesg": (1, "", "Operation not permitted"), **commands}), 0, KERNEL_LINES
        )
        return None if found is None else [line.text for line in found]

    # journalctl searches, so lines of hours ago are found among any number of others.
    assert read({"journalctl * --grep=NVRM: (Xid*": entry(1, XID_79)}) == [XID_79]
    assert read({"journalctl *": "", "dmesg": "[    5.0] usb\n[    6.0] %s\n" % XID_94}) == [XID_94]
    # Without a match the exit status is 1; the kernel's own buffer is asked too, for a journal that does not keep it.
    assert read({"journalctl * --grep=*": (1, "", ""), "dmesg": "[    5.0] usb"}) == []
    built_without = {"journalctl * --grep=*": (1, "", "Compiled without pattern matching support")}
    assert read({**built_without, "journalctl *": "\n".join((entry(1, "usb"), entry(2, loading)))}) == [loading]
    assert read({**built_without, "journalctl *": (1, "", "No journal files were found.")}) is None


def test_events() -> None:
    host = FakeHost()
    texts = [XID_94, XID_79, KILL, KILL_CGROUPFS, KILL_ELSEWHERE, "usb 1-1: new device", "NVRM: loading"]
    host.commands = {"journalctl --dmesg *": "\n".join(entry(index, text) for index, text in enumerate(texts))}
    events = kernel_events(read_kernel_log(host) or ())
    assert [(one.kind, one.bdf, one.number, one.container, one.process) for one in events] == [
        ("xid", "0000:01:00.0", 94, "", ""),
        ("xid", "0000:41:00.0", 79, "", ""),
        ("out_of_memory", "", 0, CONTAINER, "VLLM::EngineCor"),
        ("out_of_memory", "", 0, CONTAINER, "python3"),
        ("out_of_memory", "", 0, "", "cc1plus"),
    ]
    assert xid_signature(events[1]).cause == "Xid 79 on GPU 0000:41:00.0: the GPU has fallen off the bus"


def test_unknown_xid_is_said_as_such() -> None:
    host = FakeHost()
    host.commands = {"journalctl --dmesg *": entry(1, "NVRM: Xid (PCI:0000:01:00): 999, pid=1, x")}
    [event] = kernel_events(read_kernel_log(host) or ())
    assert "Xid 999" in xid_signature(event).cause
    assert "look the number up" in xid_signature(event).remedy


def test_addresses_of_gpus_without_a_tool() -> None:
    host = FakeHost()
    host.files["/proc/driver/nvidia/gpus/0000:41:00.0/information"] = b"Model: \t H200\nGPU UUID: \t GPU-1\n"
    assert gpu_addresses(host) == {"0000:41:00.0": "GPU-1"}
    assert not host.calls
