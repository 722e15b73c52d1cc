# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""How the GPUs of a host are connected, out of ``nvidia-smi topo -m``, and which of them belong together."""

from __future__ import annotations

import itertools
import re
import typing as t
from dataclasses import dataclass, field

from ._host import Host

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_DEVICE = re.compile(r"(?:GPU\d+|NIC\d+|mlx\w*|ibp\w*|IB\d+)\Z")
#: Connections by the legend of nvidia-smi, the nearest first; a bonded set of NVLinks is nearer than all of them.
_NEARNESS = {"SYS": 1, "NODE": 2, "PHB": 3, "PXB": 4, "PIX": 5, "PSB": 5}
_NVLINK = 100
#: Above this many possible groups the best one is built up GPU by GPU.
_GROUPS_MOST = 20000


@dataclass(frozen=True)
class Topology:
    """Nearness of every pair of GPUs by index, lower index first; pairs that are not told apart have 0."""

    nearness: t.Mapping[tuple[int, int], int] = field(default_factory=dict)

    def between(self, one: int, other: int) -> int:
        return self.nearness.get((min(one, other), max(one, other)), 0)

    def closeness(self, group: t.Collection[int]) -> tuple[int, int]:
        """What is better is larger: the weakest connection of the group, then all of them together."""
        links = [self.between(one, other) for one, other in itertools.combinations(sorted(group), 2)]
        # The number of NVLinks tells groups apart only after the kind of the weakest connection.
        return min((min(link, _NVLINK) for link in links), default=0), sum(links)

    def best(self, free: t.Sequence[int], count: int, kept: t.Collection[int] = ()) -> list[int]:
        """``count`` of the free GPUs that are closest to each other and to those kept; the lowest indices of equal ones."""
        free = sorted(free)
        if _combinations(len(free), count) <= _GROUPS_MOST:
            groups = itertools.combinations(free, count)
            return list(min(groups, key=lambda group: (_negative(self.closeness({*group, *kept})), group)))
        starts = [list(kept)] if kept else [[index] for index in free]
        grown = []
        for start in starts:
            group = list(start)
            while len(group) < len(kept) + count:
                rest = [index for index in free if index not in group]
                group.append(min(rest, key=lambda index: (_negative(self.closeness([*group, index])), index)))
            grown.append(sorted(set(group) - set(kept)))
        return min(grown, key=lambda group: (_negative(self.closeness({*group, *kept})), group))


def _negative(pair: tuple[int, int]) -> tuple[int, int]:
    return -pair[0], -pair[1]


def _combinations(total: int, count: int) -> int:
    number = 1
    for step in range(count):
        number = number * (total - step) // (step + 1)
    return number


def parse_topology(text: str) -> Topology | None:
    """The matrix of ``nvidia-smi topo -m``, which is printed with terminal escapes; None when there is none."""
    columns: list[str] = []
    nearness: dict[tuple[int, int], int] = {}
    seen = False
    for line in _ESCAPES.sub("", text).splitlines():
        words = line.split()
        if not words:
            if seen:
                break
            continue
        if not columns:
            # Behind the devices there are the affinities.
            devices = list(itertools.takewhile(_DEVICE.match, words))
            if devices and devices[0] == "GPU0" and not re.match(r"X\b", " ".join(words[1:])):
                columns = devices
            continue
        row = re.match(r"GPU(\d{1,4})\Z", words[0])
        if row is None:
            continue
        seen = True
        for column, word in zip(columns, words[1:]):
            other = re.match(r"GPU(\d{1,4})\Z", column)
            if other is None or word == "X":
                continue
            pair = (int(row.group(1)), int(other.group(1)))
            bonded = re.match(r"NV(\d{1,3})\Z", word)
            known = _NVLINK + int(bonded.group(1)) if bonded else _NEARNESS.get(word, 0)
            nearness[(min(pair), max(pair))] = known
    return Topology(nearness) if seen else None


def observe_topology(host: Host) -> Topology | None:
    """Ask the driver; None when it does not say."""
    answer = host.run(["nvidia-smi", "topo", "-m"], timeout=60)
    return parse_topology(answer.stdout) if answer.ok else None
