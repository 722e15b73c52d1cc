# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Placement is deterministic, moves nobody without need, and shows who holds what when it fails."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_placement import Wish, place
from hypothesis import given
from hypothesis import strategies as st


def gpu(index: int, mig: str = "Disabled", slices: int = 0) -> Gpu:
    devices = tuple({"uuid": "MIG-%d%d" % (index, number)} for number in range(slices))
    return Gpu(
        index=index,
        uuid="GPU-%d" % index,
        name="NVIDIA H200",
        brand="NVIDIA",
        architecture="Hopper",
        memory_total_mib=1,
        memory_used_mib=0,
        memory_free_mib=1,
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
    assert "GPU 0 GPU-0 NVIDIA H200: old (not in the list); GPU 1 GPU-1 NVIDIA H200: free" in message


def test_too_many() -> None:
    error = refuse([Wish("a", 3), Wish("b", 2)], FOUR)
    assert "Model b asks for gpus = 2, but 2 more would be needed and 1 are free" in error.message
    assert error.facts["gpus"][0] == {"gpu": "0", "uuid": "GPU-0", "held_by": ["a"]}


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


@given(st.lists(st.integers(1, 3), max_size=4), st.randoms())
def test_nobody_shares_and_a_second_run_changes_nothing(counts: list[int], random: t.Any) -> None:
    gpus = [gpu(index) for index in range(8)]
    wishes = [Wish("m%d" % number, count) for number, count in enumerate(counts)]
    if sum(counts) > 8:
        refuse(wishes, gpus)
        return
    first = place(wishes, gpus)
    used = [uuid for uuids in first.values() for uuid in uuids]
    assert len(used) == len(set(used)) == sum(counts)
    again = [Wish(wish.name, wish.gpus, first[wish.name]) for wish in wishes]
    random.shuffle(again)
    assert place(again, gpus) == first
