# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which GPUs each NIM of a host gets: all models together, the same answer every time, nobody moved without need."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gpu import Gpu
from ._nim_models import GpuRequest


@dataclass(frozen=True)
class Wish:
    """What one model asks for.

    Attributes:
        gpus: Count, ``"all"``, or indices and UUIDs.
        present: UUIDs that the service has now; kept as long as they satisfy the request.
    """

    name: str
    gpus: GpuRequest
    present: tuple[str, ...] = ()


def place(
    wishes: t.Sequence[Wish], gpus: t.Sequence[Gpu], foreign: t.Mapping[str, t.Sequence[str]] | None = None
) -> dict[str, tuple[str, ...]]:
    """UUIDs for every wish, in the order of the GPUs' indices.

    Explicit requests come first, then models keep the GPUs they have, then the rest is given by lowest index.
    A count is served with whole GPUs only; ``all`` on a GPU in MIG mode means its MIG devices.

    Args:
        foreign: NIM services of the host that are not in the list, with the UUIDs they hold.

    Raises:
        FleetError: ``gpus_unavailable`` with a table of who holds what.
    """
    table = _Table(gpus, foreign or {})
    answer: dict[str, list[str]] = {}
    for wish in wishes:
        if not isinstance(wish.gpus, int):
            answer[wish.name] = table.take_named(wish)
    counted = [wish for wish in wishes if isinstance(wish.gpus, int)]
    for wish in counted:
        answer[wish.name] = table.keep(wish)
    for wish in counted:
        answer[wish.name] += table.take_free(wish, t.cast(int, wish.gpus) - len(answer[wish.name]))
    return {wish.name: tuple(sorted(answer[wish.name], key=table.rank)) for wish in wishes}


class _Table:
    """Every GPU and MIG device with its holder while the models are being placed."""

    def __init__(self, gpus: t.Sequence[Gpu], foreign: t.Mapping[str, t.Sequence[str]]) -> None:
        self.gpus = sorted(gpus, key=lambda gpu: gpu.index)
        self.holder: dict[str, str] = {}
        self.parent: dict[str, str] = {}
        self.label: dict[str, str] = {}
        self.order: list[str] = []
        self.whole: list[str] = []
        for gpu in self.gpus:
            self.parent[gpu.uuid] = gpu.uuid
            self.label[gpu.uuid] = str(gpu.index)
            self.order.append(gpu.uuid)
            slices = [str(device["uuid"]) for device in gpu.mig_devices if device.get("uuid")]
            if not slices and not _mig_enabled(gpu):
                self.whole.append(gpu.uuid)
            for number, uuid in enumerate(slices):
                self.parent[uuid] = gpu.uuid
                self.label[uuid] = "%d:%d" % (gpu.index, number)
                self.order.append(uuid)
        self.by_text = {uuid.lower(): uuid for uuid in self.order}
        self.by_text.update({label: uuid for uuid, label in self.label.items()})
        for name, uuids in sorted(foreign.items()):
            for uuid in uuids:
                known = self.by_text.get(uuid.lower())
                if known is not None:
                    self.holder.setdefault(known, "%s (not in the list)" % name)

    def rank(self, uuid: str) -> int:
        return self.order.index(uuid)

    def holders(self, uuid: str) -> list[str]:
        """Who stands in the way of giving away a GPU (its MIG devices included) or a MIG device (its GPU included)."""
        related = [
            other
            for other in self.order
            if other == uuid or other == self.parent[uuid] or (self.parent[other] == uuid and uuid in self.label)
        ]
        return sorted({self.holder[other] for other in related if other in self.holder})

    def give(self, wish: Wish, uuid: str) -> str:
        self.holder[uuid] = wish.name
        return uuid

    def take_named(self, wish: Wish) -> list[str]:
        if wish.gpus == "all":
            names: t.Sequence[str] = [uuid for uuid in self.order if uuid in self.whole or (self.parent[uuid] != uuid)]
            if not names:
                raise self.refuse(wish, "there is none on this host")
        else:
            names = t.cast("tuple[str, ...]", wish.gpus)
        found = []
        for name in names:
            uuid = self.by_text.get(name.lower()) or self._unlisted_mig_device(name)
            if uuid is None:
                raise self.refuse(wish, "this host has no GPU %s" % name)
            if uuid in found:
                raise self.refuse(wish, "%s names one GPU a second time" % name)
            taken = self.holders(uuid)
            if taken:
                raise self.refuse(wish, "GPU %s is taken by %s" % (self.label[uuid], ", ".join(taken)))
            found.append(uuid)
        return [self.give(wish, uuid) for uuid in found]

    def _unlisted_mig_device(self, name: str) -> str | None:
        """A MIG device that cannot be checked: some drivers list the devices without their UUIDs."""
        if not name.startswith("MIG-") or not any(
            _mig_enabled(gpu) and not all(device.get("uuid") for device in gpu.mig_devices) for gpu in self.gpus
        ):
            return None
        self.parent[name] = self.label[name] = name
        self.by_text[name.lower()] = name
        self.order.append(name)
        return name

    def keep(self, wish: Wish) -> list[str]:
        kept: list[str] = []
        for uuid in sorted((uuid for uuid in wish.present if uuid in self.whole), key=self.rank):
            if len(kept) < t.cast(int, wish.gpus) and not self.holders(uuid):
                kept.append(self.give(wish, uuid))
        return kept

    def take_free(self, wish: Wish, missing: int) -> list[str]:
        free = [uuid for uuid in self.whole if not self.holders(uuid)]
        if missing > len(free):
            raise self.refuse(wish, "%d more would be needed and %d are free" % (missing, len(free)))
        return [self.give(wish, uuid) for uuid in free[:missing]]

    def refuse(self, wish: Wish, problem: str) -> FleetError:
        asked = "[%s]" % ", ".join(wish.gpus) if isinstance(wish.gpus, tuple) else str(wish.gpus)
        rows = [
            "GPU %s %s %s: %s" % (self.label[uuid], uuid, self._name(uuid), ", ".join(self.holders(uuid)) or "free")
            for uuid in self.order
        ]
        return FleetError(
            "gpus_unavailable",
            "Model %s asks for gpus = %s, but %s; change gpus, or set another service to state absent. "
            "The GPUs of this host: %s." % (wish.name, asked, problem, "; ".join(rows) or "none"),
            model=wish.name,
            gpus=[{"gpu": self.label[uuid], "uuid": uuid, "held_by": self.holders(uuid)} for uuid in self.order],
        )

    def _name(self, uuid: str) -> str:
        for gpu in self.gpus:
            if gpu.uuid == self.parent[uuid]:
                return gpu.name + (" (MIG device)" if uuid != gpu.uuid else "")
        return ""


def _mig_enabled(gpu: Gpu) -> bool:
    return gpu.mig.lower().startswith("enabled")
