# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Placement is deterministic, moves nobody without need, and shows who holds what when it fails."""

from __future__ import annotations

import dataclasses
import itertools
import typing as t
from pathlib import Path

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu, parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_placement import Wish, place, topology_matters
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_topology import parse_topology
from hypothesis import given
from hypothesis import strategies as st


def gpu(
    index: int,
    mig: str = "Disabled",
    slices: int = 0,
    memory: int | None = 81920,
    processes: tuple[dict[str, t.Any], ...] = (),
) -> Gpu:
    devices = tuple({"uuid": "MIG-%d%d" % (index, number), "memory_total_mib": 9856} for number in range(slices))
    return Gpu(
        index=index,
        uuid="GPU-%d" % index,
        name="NVIDIA H200",
        brand="NVIDIA",
        architecture="Hopper",
        memory_total_mib=memory,
        memory_used_mib=0,
        memory_free_mib=memory,
        processes=processes,
        mig=mig,
        compute_mode="Default",
        minor=index,
        bdf="",
        mig_devices=devices,
    )


FOUR = [gpu(index) for index in range(4)]


def refuse(*arguments: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        place(*arguments)
    assert caught.value.reason == "gpus_unavailable"
    return caught.value


def test_counts_take_the_lowest_index_in_the_order_of_the_list() -> None:
    assert place([Wish("a", 2), Wish("b", 1)], FOUR) == {"a": ("GPU-0", "GPU-1"), "b": ("GPU-2",)}


def test_explicit_requests_come_first() -> None:
    assert place([Wish("a", 1), Wish("b", ("0",)), Wish("c", ("gpu-2",))], FOUR) == {
        "a": ("GPU-1",),
        "b": ("GPU-0",),
        "c": ("GPU-2",),
    }


def test_a_model_keeps_its_gpus_when_another_is_put_before_it() -> None:
    assert place([Wish("new", 1), Wish("old", 1, ("GPU-0",))], FOUR) == {"new": ("GPU-1",), "old": ("GPU-0",)}


def test_a_larger_count_keeps_what_it_has_and_a_smaller_one_gives_back() -> None:
    assert place([Wish("a", 2, ("GPU-3",))], FOUR) == {"a": ("GPU-0", "GPU-3")}
    assert place([Wish("a", 1, ("GPU-2", "GPU-3"))], FOUR) == {"a": ("GPU-2",)}


def test_a_model_moves_when_its_gpu_is_named_by_another_or_gone() -> None:
    assert place([Wish("a", 1, ("GPU-0",)), Wish("b", ("0",))], FOUR)["a"] == ("GPU-1",)
    assert place([Wish("a", 1, ("GPU-9",))], FOUR)["a"] == ("GPU-0",)


def test_all() -> None:
    assert place([Wish("a", "all")], FOUR) == {"a": ("GPU-0", "GPU-1", "GPU-2", "GPU-3")}
    assert "none on this host" in refuse([Wish("a", "all")], []).message


def test_services_outside_the_list_hold_their_gpus() -> None:
    assert place([Wish("a", 1)], FOUR, {"old": ["GPU-0"]}) == {"a": ("GPU-1",)}
    message = refuse([Wish("a", ("0",))], FOUR, {"old": ["GPU-0"]}).message
    assert "Model a asks for gpus = [0], but GPU 0 is taken by old (not in the list)" in message
    assert "GPU 0 GPU-0 NVIDIA H200 80.0 GiB: old (not in the list); GPU 1 GPU-1 NVIDIA H200 80.0 GiB: free" in message


def test_too_many() -> None:
    error = refuse([Wish("a", 3), Wish("b", 2)], FOUR)
    assert "Model b asks for gpus = 2, but 2 more would be needed and 1 is free" in error.message
    assert error.facts["gpus"][0] == {
        "gpu": "0",
        "uuid": "GPU-0",
        "name": "NVIDIA H200",
        "memory_mib": 81920,
        "held_by": ["a"],
        "used_by": [],
        "unfit": "",
    }


def test_unknown_and_repeated_gpus() -> None:
    assert "this host has no GPU 7" in refuse([Wish("a", ("7",))], FOUR).message
    assert "a second time" in refuse([Wish("a", ("0", "GPU-0"))], FOUR).message
    assert "The GPUs of this host: none." in refuse([Wish("a", 1)], []).message


def test_mig() -> None:
    gpus = [gpu(0, "Enabled", 2), gpu(1)]
    assert place([Wish("a", 1)], gpus) == {"a": ("GPU-1",)}
    assert place([Wish("a", ("MIG-00",)), Wish("b", ("MIG-01",))], gpus) == {"a": ("MIG-00",), "b": ("MIG-01",)}
    assert "GPU 0 is taken by a" in refuse([Wish("a", ("MIG-00",)), Wish("b", ("0",))], gpus).message
    assert place([Wish("a", "all")], gpus) == {"a": ("MIG-00", "MIG-01", "GPU-1")}


def test_mig_devices_without_uuids_cannot_be_checked_but_not_be_shared_either() -> None:
    blind = dataclasses.replace(gpu(0, "Enabled"), mig_devices=({"uuid": ""},))
    assert place([Wish("a", ("MIG-7",))], [blind]) == {"a": ("MIG-7",)}
    assert "taken by a" in refuse([Wish("a", ("MIG-7",)), Wish("b", ("mig-7".upper(),))], [blind]).message
    assert "no GPU MIG-7" in refuse([Wish("a", ("MIG-7",))], FOUR).message


# -- memory -----------------------------------------------------------------------------------------

MIXED = [gpu(0, memory=81559), gpu(1, memory=23034), gpu(2, memory=46068), gpu(3, memory=None)]


def test_a_model_that_needs_much_memory_chooses_first() -> None:
    placed = place([Wish("small", 1), Wish("big", 1, memory_mib=80000)], MIXED)
    assert placed == {"small": ("GPU-1",), "big": ("GPU-0",)}


def test_unified_memory_counts_as_enough() -> None:
    assert place([Wish("a", 1, memory_mib=500000)], MIXED) == {"a": ("GPU-3",)}
    assert place([Wish("a", ("3",), memory_mib=500000)], MIXED) == {"a": ("GPU-3",)}
    assert "GPU 3 GPU-3 NVIDIA H200 memory not told: a" in refuse([Wish("a", ("3",)), Wish("b", ("3",))], MIXED).message


def test_too_little_memory() -> None:
    message = refuse([Wish("a", 3, memory_mib=40000), Wish("b", 1, memory_mib=40000)], MIXED).message
    assert "Model b asks for gpus = 1, but 1 more would be needed and 0 are free with the 39.1 GiB" in message
    assert "GPU 1 GPU-1 NVIDIA H200 22.5 GiB: free" in message
    message = refuse([Wish("a", ("1",), memory_mib=40000)], MIXED).message
    assert "GPU 1 has 22.5 GiB of memory where the model needs 39.1 GiB" in message


def test_a_model_moves_when_its_gpu_has_become_too_small() -> None:
    assert place([Wish("a", 1, ("GPU-1",), memory_mib=20000)], MIXED) == {"a": ("GPU-1",)}
    assert place([Wish("a", 1, ("GPU-1",), memory_mib=30000)], MIXED) == {"a": ("GPU-0",)}


def test_the_number_of_a_profile_is_named() -> None:
    error = refuse([Wish("a", 8, profile="vllm-bf16-tp8-pp1")], FOUR)
    assert "Model a asks for profile vllm-bf16-tp8-pp1 with 8 GPUs, but 8 more would be needed and 4 are free" in (
        error.message
    )
    assert "name another profile" in error.message


# -- strangers --------------------------------------------------------------------------------------


def training(used: int | None = 71680) -> tuple[dict[str, t.Any], ...]:
    return ({"pid": 812, "type": "C", "name": "/usr/bin/python3 train.py --token=x", "used_memory_mib": used},)


def test_gpus_that_a_stranger_computes_on_come_last() -> None:
    gpus = [gpu(0, processes=training()), gpu(1), gpu(2, processes=({"pid": 9, "type": "G", "name": "Xorg"},))]
    assert place([Wish("a", 2)], gpus) == {"a": ("GPU-1", "GPU-2")}
    assert place([Wish("a", 3)], gpus) == {"a": ("GPU-0", "GPU-1", "GPU-2")}
    message = refuse([Wish("a", 4)], gpus).message
    assert "GPU 0 GPU-0 NVIDIA H200 80.0 GiB: free, used by python3 (pid 812, 70.0 GiB)" in message
    assert "token" not in message


def test_what_computes_on_our_own_gpus_is_no_stranger() -> None:
    gpus = [gpu(0, processes=training()), gpu(1)]
    assert place([Wish("a", 1, ("GPU-0",))], gpus) == {"a": ("GPU-0",)}
    assert place([Wish("a", ("1",), ("GPU-0",)), Wish("b", 1)], gpus) == {"a": ("GPU-1",), "b": ("GPU-0",)}


# -- MIG --------------------------------------------------------------------------------------------


def test_a_count_says_why_mig_devices_are_not_taken() -> None:
    message = refuse([Wish("a", 1)], [gpu(0, "Enabled", 2)]).message
    assert "a GPU in MIG mode is given by the UUIDs of its MIG devices alone" in message
    assert "GPU 0 GPU-0 NVIDIA H200 80.0 GiB: in MIG mode; GPU 0:0 MIG-00 NVIDIA H200 (MIG device) 9.6 GiB: free" in (
        message
    )
    assert "9.6 GiB of memory" in refuse([Wish("a", ("MIG-00",), memory_mib=20000)], [gpu(0, "Enabled", 1)]).message


# -- connections ------------------------------------------------------------------------------------


def matrix(size: int, link: t.Callable[[int, int], str]) -> str:
    """As nvidia-smi prints it, escapes and all."""
    lines = [
        "\t\x1b[4m" + "\t".join("GPU%d" % one for one in range(size)) + "\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m"
    ]
    for row in range(size):
        cells = [" X " if row == column else link(*sorted((row, column))) for column in range(size)]
        lines.append("GPU%d\t" % row + "\t".join(cells) + "\tSYS\t0-15\t0")
    lines.append("NIC0\t" + "\t".join("SYS" for dummy in range(size)) + "\t X ")
    return "\n".join([*lines, "", "Legend:", "", "  X    = Self", "  NV#  = a bonded set of # NVLinks"])


def pairs(one: int, other: int) -> str:
    """NVLink bridges between 0-3, 1-2, 4-5 and 6-7; two sockets."""
    if (one, other) in ((0, 3), (1, 2), (4, 5), (6, 7)):
        return "NV4"
    return "NODE" if one // 4 == other // 4 else "SYS"


def test_topology_is_read() -> None:
    topology = parse_topology(matrix(8, pairs))
    assert topology is not None
    assert topology.between(3, 0) == 104
    assert topology.between(0, 1) == 2 and topology.between(0, 7) == 1
    fixture = Path(__file__).parent / "fixtures" / "h200-single" / "basic.txt"
    four = parse_topology((fixture.parents[1] / "nvidia-smi" / "topo-h200-x4.txt").read_text())
    assert four is not None and set(four.nearness.values()) == {118} and len(four.nearness) == 6
    alone = parse_topology(fixture.read_text())
    assert alone is not None and alone.nearness == {}
    assert parse_topology("NVIDIA-SMI has failed") is None


def test_connected_gpus_are_taken_together() -> None:
    topology = parse_topology(matrix(8, pairs))
    gpus = [gpu(index) for index in range(8)]
    assert place([Wish("a", 2)], gpus, topology=topology) == {"a": ("GPU-0", "GPU-3")}
    assert place([Wish("a", 2), Wish("b", 2)], gpus, topology=topology)["b"] == ("GPU-1", "GPU-2")
    # A single one does not break a group up that somebody needs.
    assert place([Wish("one", 1), Wish("a", 2)], gpus, topology=topology)["a"] == ("GPU-0", "GPU-3")
    # The same socket before the other one, once there is no NVLink.
    assert place([Wish("x", ("0", "1")), Wish("a", 4)], gpus, topology=topology)["a"] == (
        "GPU-4",
        "GPU-5",
        "GPU-6",
        "GPU-7",
    )
    # What it has stays, and the new one is close to it.
    assert place([Wish("a", 2, ("GPU-6",))], gpus, topology=topology) == {"a": ("GPU-6", "GPU-7")}
    assert place([Wish("a", 2, ("GPU-0", "GPU-7"))], gpus, topology=topology) == {"a": ("GPU-0", "GPU-7")}


def test_sixteen_and_more_gpus_end_in_time() -> None:
    gpus = [gpu(index) for index in range(32)]
    topology = parse_topology(matrix(32, lambda one, other: "NV18" if one % 4 == other % 4 else "SYS"))
    assert place([Wish("a", 8)], gpus, topology=topology)["a"] == tuple("GPU-%d" % index for index in range(0, 32, 4))


def test_topology_is_asked_for_only_where_there_is_a_choice() -> None:
    assert topology_matters([Wish("a", 2)], FOUR)
    assert not topology_matters([Wish("a", 1)], FOUR)
    assert not topology_matters([Wish("a", 4)], FOUR)
    assert not topology_matters([Wish("a", 2, ("GPU-1", "GPU-2"))], FOUR)
    assert not topology_matters([Wish("a", ("0", "1")), Wish("b", 2)], FOUR)
    assert not topology_matters([Wish("a", 2)], FOUR, {"old": ["GPU-0", "GPU-1"]})
    assert not topology_matters([Wish("a", ("9",)), Wish("b", 2)], FOUR)


def test_eight_gpus_of_a_real_host() -> None:
    text = (Path(__file__).parent / "fixtures" / "nvidia-smi" / "h200-x8.xml").read_text()
    gpus = parse_smi(text)[2]
    topology = parse_topology(matrix(8, lambda one, other: "NV18"))
    placed = place([Wish("a", 4, memory_mib=140000), Wish("b", 2), Wish("c", 1)], gpus, topology=topology)
    assert [[gpu.index for gpu in gpus if gpu.uuid in placed[name]] for name in "abc"] == [[0, 1, 2, 3], [4, 5], [6]]
    error = refuse([Wish("a", 4), Wish("b", 4), Wish("c", 1)], gpus)
    assert error.message.count("NVIDIA H200 140.4 GiB: ") == 8


# -- whatever is asked for --------------------------------------------------------------------------

SIZES = st.sampled_from([None, 16000, 40000, 80000])


@st.composite
def hosts(draw: t.Any) -> tuple[list[Gpu], list[Wish]]:
    gpus = [gpu(index, memory=draw(SIZES)) for index in range(draw(st.integers(1, 8)))]
    wishes = [
        Wish("m%d" % number, draw(st.integers(1, 4)), memory_mib=draw(SIZES))
        for number in range(draw(st.integers(0, 4)))
    ]
    return gpus, wishes


def possible(gpus: list[Gpu], wishes: list[Wish]) -> bool:
    """By trying everything."""
    if not wishes:
        return True
    suits = [
        one
        for one in gpus
        if None in (one.memory_total_mib, wishes[0].memory_mib) or one.memory_total_mib >= wishes[0].memory_mib
    ]  # type: ignore[operator]  # None is among them
    return any(
        possible([one for one in gpus if one not in group], wishes[1:])
        for group in itertools.combinations(suits, wishes[0].count)
    )


def placement(wishes: list[Wish], gpus: list[Gpu], topology: t.Any = None) -> dict[str, tuple[str, ...]] | None:
    try:
        return place(wishes, gpus, topology=topology)
    except FleetError as error:
        assert error.reason == "gpus_unavailable"
        return None


@given(hosts(), st.randoms(), st.booleans())
def test_what_can_be_placed_is_placed_in_any_order_of_the_list(
    given_host: tuple[list[Gpu], list[Wish]], random: t.Any, connected: bool
) -> None:
    gpus, wishes = given_host
    topology = parse_topology(matrix(8, pairs)) if connected else None
    first = placement(wishes, gpus, topology)
    assert (first is not None) == possible(gpus, wishes)
    assert placement(wishes, list(reversed(gpus)), topology) == first
    shuffled = list(wishes)
    random.shuffle(shuffled)
    second = placement(shuffled, gpus, topology)
    assert (second is None) == (first is None)
    if first is None or second is None:
        return
    memory = {one.uuid: one.memory_total_mib for one in gpus}
    for placed in (first, second):
        used = [uuid for uuids in placed.values() for uuid in uuids]
        assert len(used) == len(set(used))
        for wish in wishes:
            assert len(placed[wish.name]) == wish.count
            assert all(
                None in (memory[uuid], wish.memory_mib) or memory[uuid] >= wish.memory_mib for uuid in placed[wish.name]
            )  # type: ignore[operator]  # None is among them
    # Once they have their GPUs, neither the order nor what is known of the connections moves anybody.
    again = [dataclasses.replace(wish, present=first[wish.name]) for wish in shuffled]
    assert place(again, gpus) == first == place(again, gpus, topology=topology)
    assert not topology_matters(again, gpus)


@given(hosts(), st.data())
def test_nobody_moves_for_a_newcomer(given_host: tuple[list[Gpu], list[Wish]], data: t.Any) -> None:
    gpus, wishes = given_host
    first = placement(wishes, gpus)
    if first is None:
        return
    there = [dataclasses.replace(wish, present=first[wish.name]) for wish in wishes]
    position = data.draw(st.integers(0, len(there)))
    newcomer = Wish("new", data.draw(st.integers(1, 3)), memory_mib=data.draw(SIZES))
    placed = placement([*there[:position], newcomer, *there[position:]], gpus)
    if placed is not None:
        assert {name: placed[name] for name in first} == first


# -- GPUs that are not fit for service ----------------------------------------------------------------

SICK = {"GPU-0": "needs recovery: the driver asks for 'GPU Reset'"}


def test_a_count_is_served_with_fit_gpus_while_there_are_some() -> None:
    assert place([Wish("a", 1), Wish("b", 2)], FOUR, unfit=SICK) == {"a": ("GPU-3",), "b": ("GPU-1", "GPU-2")}
    # Whoever names it gets it: the start is refused with the reason, or was allowed knowingly.
    assert place([Wish("a", ("0",)), Wish("b", 1)], FOUR, unfit=SICK) == {"a": ("GPU-0",), "b": ("GPU-1",)}
    # One that strangers compute on may still have the memory; one that is not fit is refused.
    busy = [FOUR[0], *(gpu(index, processes=({"type": "C", "pid": 7},)) for index in (1, 2))]
    assert place([Wish("a", 1)], busy, unfit=SICK) == {"a": ("GPU-1",)}


def test_where_fit_gpus_are_too_few_the_others_come_last_and_a_model_stays_with_its_own() -> None:
    sick = dict.fromkeys(("GPU-0", "GPU-1", "GPU-2"), "has not begun to join the NVLink fabric")
    assert place([Wish("a", 1), Wish("b", 1)], FOUR, unfit=sick) == {"a": ("GPU-3",), "b": ("GPU-0",)}
    assert place([Wish("a", 3, ("GPU-1", "GPU-2", "GPU-3"))], FOUR, unfit=sick)["a"] == ("GPU-1", "GPU-2", "GPU-3")


def test_who_serves_on_a_gpu_that_is_not_fit_any_more_stays_there() -> None:
    assert place([Wish("a", 1, ("GPU-0",), stays=True)], FOUR, unfit=SICK) == {"a": ("GPU-0",)}
    assert place([Wish("a", 1, ("GPU-0",))], FOUR, unfit=SICK) == {"a": ("GPU-1",)}
    assert place([Wish("a", 2, ("GPU-0", "GPU-3"))], FOUR, unfit=SICK) == {"a": ("GPU-1", "GPU-3")}
    # Of two it gives back the one that is not fit.
    assert place([Wish("a", 1, ("GPU-0", "GPU-3"), stays=True)], FOUR, unfit=SICK) == {"a": ("GPU-3",)}


def test_connections_are_asked_for_of_fit_gpus_alone() -> None:
    topology = parse_topology(matrix(4, pairs))
    assert place([Wish("a", 2)], FOUR, topology=topology)["a"] == ("GPU-0", "GPU-3")
    assert place([Wish("a", 2)], FOUR, topology=topology, unfit=SICK)["a"] == ("GPU-1", "GPU-2")
    assert topology_matters([Wish("a", 2, ("GPU-0", "GPU-1"))], FOUR, unfit=SICK)
    assert not topology_matters([Wish("a", 2, ("GPU-0", "GPU-1"), stays=True)], FOUR, unfit=SICK)


def test_the_table_says_which_gpus_are_not_fit() -> None:
    with pytest.raises(FleetError) as caught:
        place([Wish("a", 5)], FOUR, unfit=SICK)
    assert (
        "GPU 0 GPU-0 NVIDIA H200 80.0 GiB: free, not fit for service (needs recovery: the driver asks for 'GPU Reset'); "
        "GPU 1 GPU-1 NVIDIA H200 80.0 GiB: free;" in caught.value.message
    )
    assert [row["unfit"] for row in caught.value.facts["gpus"]] == [SICK["GPU-0"], "", "", ""]
