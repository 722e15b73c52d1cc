# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What the kernel says about GPUs and about processes that it killed for want of memory."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._gpu import normalise_bdf
from ._host import Host
from ._untrusted import json_object, whole_number
from ._xid_errors import XID_LINE

#: Lines of the kernel log that are read at most.
MOST_LINES = 2000

XID = "xid"
OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True)
class KernelLine:
    """One line and when it was printed, in seconds since the epoch."""

    at: float
    text: str


@dataclass(frozen=True)
class KernelEvent:
    """Something that concerns a GPU or a container.

    Attributes:
        kind: ``xid`` or ``out_of_memory``.
        bdf: Of an Xid: the GPU's PCI address in the form of sysfs.
        number: Of an Xid: its number.
        container: Of a kill: the container's id, empty where the process was in none or the kernel does not say.
        process: Of a kill: name of the process.
    """

    kind: str
    at: float
    text: str
    bdf: str = ""
    number: int = 0
    container: str = ""
    process: str = ""


_KILL = re.compile(r"oom-kill:.*?task_memcg=(?P<cgroup>[^,]*),task=(?P<task>[^,]*),pid=\d+")
_CONTAINER_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_MOST = "--lines=%d" % MOST_LINES
_RING_LINE = re.compile(r"(?:<\d+>)?\[\s*(\d+\.\d+)\] (.*)")


def read_kernel_log(host: Host, since: float = 0.0, only: str = "") -> list[KernelLine] | None:
    """Lines of this boot, oldest first, from the journal, or from the kernel's own buffer where no journal keeps them.

    Args:
        since: Seconds since the epoch; 0 for the whole boot.
        only: Pattern of the lines that are wanted; without one these are the last 2000.

    Returns:
        None when neither can be read.
    """
    argv = ["journalctl", "--dmesg", "--quiet", "--no-pager", "--output=json"]
    argv += ["--since=@%d" % since] if since else []
    read = host.run([*argv, "--grep=" + only, "--case-sensitive=yes"] if only else [*argv, _MOST], timeout=20)
    if only and read.stderr.strip():
        # A journalctl that was built without a search.
        read = host.run([*argv, _MOST], timeout=20)
    found = [line for line in map(_journal_line, read.stdout.splitlines()) if line is not None]
    if not found:
        boot = host.time() - host.monotonic()
        ring = host.run(["dmesg"], timeout=20)
        if not ring.ok and not read.ok:
            return None
        pairs = [place.groups() for place in map(_RING_LINE.match, ring.stdout.splitlines()) if place]
        found = [KernelLine(boot + float(seconds), text) for seconds, text in pairs]
    wanted = re.compile(only)
    return [line for line in found if line.at >= since and wanted.search(line.text)][-MOST_LINES:]


def _journal_line(text: str) -> KernelLine | None:
    entry = json_object(text)
    message, at = entry.get("MESSAGE"), whole_number(str(entry.get("__REALTIME_TIMESTAMP")), -1)
    # Bytes that are no text come as a list of numbers.
    return KernelLine(at / 1e6, message) if isinstance(message, str) and at >= 0 else None


def kernel_events(lines: t.Iterable[KernelLine]) -> list[KernelEvent]:
    """Xids and kills for want of memory."""
    events = []
    for line in lines:
        xid = XID_LINE.search(line.text)
        if xid is not None:
            pci = xid.group("pci")
            # The driver leaves the function out; sysfs has it.
            bdf = normalise_bdf(pci if "." in pci else pci + ".0")
            events.append(KernelEvent(XID, line.at, line.text, bdf=bdf, number=int(xid.group("xid"))))
        kill = _KILL.search(line.text)
        if kill is not None:
            identifier = _CONTAINER_ID.search(kill.group("cgroup"))
            events.append(
                KernelEvent(
                    OUT_OF_MEMORY,
                    line.at,
                    line.text,
                    container=identifier.group(0) if identifier else "",
                    process=kill.group("task"),
                )
            )
    return events


def gpu_addresses(host: Host) -> dict[str, str]:
    """PCI address -> UUID of the GPUs that the loaded driver knows; asks no tool, so it costs nothing."""
    base = "/proc/driver/nvidia/gpus"
    found = {}
    for bdf in host.list_dir(base):
        uuid = re.search(r"(?m)^GPU UUID:\s*(\S+)", host.read_text("%s/%s/information" % (base, bdf)) or "")
        if uuid is not None:
            found[normalise_bdf(bdf)] = uuid.group(1)
    return found
