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

if t.TYPE_CHECKING:
    from ._gpu_topology import Topology


@dataclass(frozen=True)
class Wish:
    """What one model asks for.

    Attributes:
        gpus: Count, ``"all"``, or indices and UUIDs.
        present: UUIDs that the service has now; kept as long as they satisfy the request.
        memory_mib: Memory that each of its GPUs must have; None = any. A GPU that does not tell its memory, as those
            with unified memory, may have enough.
        profile: Profile that asks for this number of GPUs; empty where the operator gave the number.
        stays: Whether it serves on them: then it keeps them in whatever condition they are.
        memory_option: Option that changes ``memory_mib``.
    """

    name: str
    gpus: GpuRequest
    present: tuple[str, ...] = ()
    memory_mib: int | None = None
    profile: str = ""
    stays: bool = False
    memory_option: str = "gpu_memory"

    @property
    def count(self) -> int:
        """How many GPUs, where that is all it asks for; otherwise 0."""
        return self.gpus if isinstance(self.gpus, int) else 0


def place(
    wishes: t.Sequence[Wish],
    gpus: t.Sequence[Gpu],
    foreign: t.Mapping[str, t.Sequence[str]] | None = None,
    topology: Topology | None = None,
    unfit: t.Mapping[str, str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """UUIDs for every wish, in the order of the GPUs' indices.

    Explicit requests come first, then models keep the GPUs they have while those have enough memory and are fit for
    service, or whatever their condition where they serve. The rest is given by need of memory, then by number of GPUs,
    then in the order of the list: the model that few GPUs suit chooses first, so whatever can be placed is placed. A model
    takes GPUs that are fit, then those that no stranger computes on, then those that are closest to each other, then those
    with the lowest index. One that is not fit comes last, and not never: whoever starts a model on it says what ails it.
    A count is served with whole GPUs only; ``all`` on a GPU in MIG mode means its MIG devices.

    Args:
        foreign: NIM services of the host that are not in the list, with the UUIDs they hold.
        topology: How the GPUs are connected; None = unknown.
        unfit: What is wrong with GPUs that are not fit for service, as a clause, by UUID.

    Raises:
        FleetError: ``gpus_unavailable`` with a table of who holds what.
    """
    table = _Table(gpus, foreign or {}, wishes, topology, unfit or {})
    answer: dict[str, list[str]] = {}
    for wish in wishes:
        if not wish.count:
            answer[wish.name] = table.take_named(wish)
    counted = [wish for wish in wishes if wish.count]
    for wish in counted:
        answer[wish.name] = table.keep(wish)
    for wish in sorted(counted, key=lambda wish: (-(wish.memory_mib or 0), -wish.count)):
        answer[wish.name] += table.take_free(wish, answer[wish.name])
    return {wish.name: tuple(sorted(answer[wish.name], key=table.rank)) for wish in wishes}


def topology_matters(
    wishes: t.Sequence[Wish],
    gpus: t.Sequence[Gpu],
    foreign: t.Mapping[str, t.Sequence[str]] | None = None,
    unfit: t.Mapping[str, str] | None = None,
) -> bool:
    """Whether a model that takes several GPUs has a choice, so that it is worth asking how they are connected."""
    if not any(wish.count > 1 for wish in wishes):
        return False
    table = _Table(gpus, foreign or {}, wishes, None, unfit or {})
    try:
        for wish in wishes:
            if not wish.count:
                table.take_named(wish)
    except FleetError:
        # Said where it is placed.
        return False
    missing = {wish.name: wish.count - len(table.keep(wish)) for wish in wishes if wish.count}
    return any(wish.count > 1 and 0 < missing[wish.name] < len(table.free(wish)) for wish in wishes)


class _Table:
    """Every GPU and MIG device with its holder while the models are being placed."""

    def __init__(
        self,
        gpus: t.Sequence[Gpu],
        foreign: t.Mapping[str, t.Sequence[str]],
        wishes: t.Sequence[Wish],
        topology: Topology | None,
        unfit: t.Mapping[str, str],
    ) -> None:
        self.gpus = sorted(gpus, key=lambda gpu: gpu.index)
        self.topology = topology
        self.unfit = unfit
        self.memory: dict[str, int | None] = {}
        #: Who computes on a GPU without being a service of ours.
        self.strangers: dict[str, list[str]] = {}
        self.holder: dict[str, str] = {}
        self.parent: dict[str, str] = {}
        self.label: dict[str, str] = {}
        self.order: list[str] = []
        self.whole: list[str] = []
        for gpu in self.gpus:
            self.parent[gpu.uuid] = gpu.uuid
            self.label[gpu.uuid] = str(gpu.index)
            self.order.append(gpu.uuid)
            self.memory[gpu.uuid] = gpu.memory_total_mib
            slices = [device for device in gpu.mig_devices if device.get("uuid")]
            if not slices and not mig_enabled(gpu):
                self.whole.append(gpu.uuid)
            for number, device in enumerate(slices):
                uuid = str(device["uuid"])
                self.parent[uuid] = gpu.uuid
                self.label[uuid] = "%d:%d" % (gpu.index, number)
                self.order.append(uuid)
                self.memory[uuid] = device.get("memory_total_mib")
        ours = {uuid.lower() for wish in wishes for uuid in wish.present}
        ours |= {uuid.lower() for uuids in foreign.values() for uuid in uuids}
        for gpu in self.gpus:
            if gpu.uuid.lower() not in ours:
                self.strangers[gpu.uuid] = [_stranger(process) for process in gpu.processes if _computes(process)]
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
        found: list[str] = []
        for name in names:
            uuid = self.by_text.get(name.lower()) or self._unlisted_mig_device(name)
            if uuid is None:
                raise self.refuse(wish, "this host has no GPU %s" % name)
            if uuid in found:
                raise self.refuse(wish, "%s names one GPU a second time" % name)
            taken = self.holders(uuid)
            if taken:
                raise self.refuse(wish, "GPU %s is taken by %s" % (self.label[uuid], ", ".join(taken)))
            if not self.has_memory(wish, uuid):
                raise self.refuse(
                    wish,
                    "GPU %s has %s of memory where the model needs %s"
                    % (self.label[uuid], _shown(self.memory[uuid]), _shown(wish.memory_mib)),
                )
            found.append(uuid)
        return [self.give(wish, uuid) for uuid in found]

    def _unlisted_mig_device(self, name: str) -> str | None:
        """A MIG device that cannot be checked: some drivers list the devices without their UUIDs."""
        if not name.startswith("MIG-") or not any(
            mig_enabled(gpu) and not all(device.get("uuid") for device in gpu.mig_devices) for gpu in self.gpus
        ):
            return None
        self.parent[name] = self.label[name] = name
        self.by_text[name.lower()] = name
        self.order.append(name)
        self.memory[name] = None
        return name

    def has_memory(self, wish: Wish, uuid: str) -> bool:
        memory = self.memory[uuid]
        return wish.memory_mib is None or memory is None or memory >= wish.memory_mib

    def free(self, wish: Wish) -> list[str]:
        """Whole GPUs that nobody holds and that have the memory."""
        return [uuid for uuid in self.whole if not self.holders(uuid) and self.has_memory(wish, uuid)]

    def keep(self, wish: Wish) -> list[str]:
        kept: list[str] = []
        present = self.present(wish)
        for uuid in sorted(self.whole, key=lambda uuid: (uuid in self.unfit, self.rank(uuid))):
            if uuid not in present or len(kept) == wish.count or (uuid in self.unfit and not wish.stays):
                continue
            if not self.holders(uuid) and self.has_memory(wish, uuid):
                kept.append(self.give(wish, uuid))
        return kept

    def present(self, wish: Wish) -> set[str]:
        return {self.by_text.get(uuid.lower(), "") for uuid in wish.present}

    def take_free(self, wish: Wish, kept: t.Sequence[str]) -> list[str]:
        missing = wish.count - len(kept)
        if missing <= 0:
            return []
        free = self.free(wish)
        if missing > len(free):
            small = len([uuid for uuid in self.whole if not self.holders(uuid)]) - len(free)
            raise self.refuse(
                wish,
                "%d more would be needed and %d %s free%s%s"
                % (
                    missing,
                    len(free),
                    "is" if len(free) == 1 else "are",
                    " with the %s of memory that it needs" % _shown(wish.memory_mib) if small else "",
                    ", because a GPU in MIG mode is given by the UUIDs of its MIG devices alone"
                    if any(mig_enabled(gpu) for gpu in self.gpus)
                    else "",
                ),
            )
        fit = [uuid for uuid in free if uuid not in self.unfit]
        quiet = [uuid for uuid in fit if not self.strangers.get(uuid)]
        choice = quiet if len(quiet) >= missing else fit
        if missing < len(choice) and wish.count > 1 and self.topology is not None:
            index = {gpu.index: gpu.uuid for gpu in self.gpus}
            of = {uuid: number for number, uuid in index.items()}
            best = self.topology.best([of[uuid] for uuid in choice], missing, [of[uuid] for uuid in kept])
            choice = [index[number] for number in best]
        elif len(quiet) < missing:
            present = self.present(wish)
            choice = sorted(
                free,
                key=lambda uuid: (
                    uuid in self.unfit,
                    uuid in self.unfit and uuid not in present,
                    bool(self.strangers.get(uuid)),
                    self.rank(uuid),
                ),
            )
        return [self.give(wish, uuid) for uuid in choice[:missing]]

    def refuse(self, wish: Wish, problem: str) -> FleetError:
        asked = "[%s]" % ", ".join(wish.gpus) if isinstance(wish.gpus, tuple) else str(wish.gpus)
        if wish.profile:
            asked = "profile %s with %s GPU%s" % (wish.profile, asked, "" if wish.count == 1 else "s")
        else:
            asked = "gpus = " + asked
        remedy = "name another profile" if wish.profile else "change gpus"
        if wish.memory_mib is not None:
            remedy += " or " + wish.memory_option
        return FleetError(
            "gpus_unavailable",
            "Model %s asks for %s, but %s; %s, or set another service to state absent. The GPUs of this host: %s."
            % (wish.name, asked, problem, remedy, "; ".join(self._row(uuid) for uuid in self.order) or "none"),
            model=wish.name,
            gpus=[
                {
                    "gpu": self.label[uuid],
                    "uuid": uuid,
                    "name": self._name(uuid),
                    "memory_mib": self.memory[uuid],
                    "held_by": self.holders(uuid),
                    "used_by": self.strangers.get(uuid, []),
                    "unfit": self.unfit.get(self.parent[uuid], ""),
                }
                for uuid in self.order
            ],
        )

    def _row(self, uuid: str) -> str:
        """``GPU 0 GPU-… NVIDIA H200 140.4 GiB: llama``"""
        who = ", ".join(self.holders(uuid))
        strangers = ", ".join(self.strangers.get(uuid, []))
        if not who:
            who = "in MIG mode" if self._mig(uuid) else "free"
        if strangers:
            who += ", used by " + strangers
        if self.parent[uuid] in self.unfit:
            who += ", not fit for service (%s)" % self.unfit[self.parent[uuid]]
        return "GPU %s %s %s %s: %s" % (self.label[uuid], uuid, self._name(uuid), _shown(self.memory[uuid]), who)

    def _mig(self, uuid: str) -> bool:
        return any(gpu.uuid == uuid and uuid not in self.whole for gpu in self.gpus)

    def _name(self, uuid: str) -> str:
        for gpu in self.gpus:
            if gpu.uuid == self.parent[uuid]:
                return gpu.name + (" (MIG device)" if uuid != gpu.uuid else "")
        return "(MIG device)"


def mig_enabled(gpu: Gpu) -> bool:
    return gpu.mig.lower().startswith("enabled")


def _shown(memory_mib: int | None) -> str:
    return "memory not told" if memory_mib is None else "%.1f GiB" % (memory_mib / 1024)


def _computes(process: t.Mapping[str, t.Any]) -> bool:
    """Whether a process of nvidia-smi has a compute context; a display does not keep a NIM away."""
    return "C" in str(process.get("type") or "").upper()


def _stranger(process: t.Mapping[str, t.Any]) -> str:
    # Only the program: arguments of strangers may hold secrets.
    name = str(process.get("name") or "a process").split(" ", 1)[0].rsplit("/", 1)[-1]
    pid = process.get("pid")
    used = process.get("used_memory_mib")
    details = ["pid %s" % pid] if pid is not None else []
    if isinstance(used, int):
        details.append("%.1f GiB" % (used / 1024))
    return "%s (%s)" % (name, ", ".join(details)) if details else name
