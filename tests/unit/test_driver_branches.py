# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Branches, CUDA versions, and what each GPU generation takes."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_branches import (
    ARCHITECTURES,
    BRANCHES,
    branch_names,
    branch_of_version,
    check_branch,
    check_flavour,
    check_version,
    choose_flavour,
    cuda_of_branch,
    smallest_branch_for_cuda,
    upstream_version,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError


def test_branches_are_in_order_and_their_cuda_grows() -> None:
    numbers = [branch.number for branch in BRANCHES]
    assert numbers == sorted(numbers)
    cuda = [tuple(map(int, branch.cuda.split("."))) for branch in BRANCHES if branch.cuda]
    assert cuda == sorted(cuda)


@pytest.mark.parametrize(
    ("branch", "cuda"),
    [
        ("535", "12.2"),
        ("550", "12.4"),
        ("555", "12.5"),
        ("570", "12.8"),
        ("580", "13.0"),
        ("595", "13.2"),
        ("620", None),
        ("999", None),
    ],
)
def test_cuda_of_branch(branch: str, cuda: str | None) -> None:
    assert cuda_of_branch(branch) == cuda


@pytest.mark.parametrize(
    ("cuda", "branch"),
    [
        ("12.5", "555"),
        ("12.2", "535"),
        ("12.0", "535"),
        ("12.3", "550"),
        ("12", "535"),
        ("12.8", "570"),
        ("13", "580"),
        ("13.0", "580"),
        ("13.9", None),
        ("11.4", "470"),
        ("12.5.1", "555"),
    ],
)
def test_smallest_branch_for_cuda(cuda: str, branch: str | None) -> None:
    assert smallest_branch_for_cuda(cuda) == branch


@pytest.mark.parametrize(
    ("version", "branch", "upstream"),
    [
        ("580.95.05", "580", "580.95.05"),
        ("580.95.05-0ubuntu1", "580", "580.95.05"),
        ("3:580.95.05-1.el9", "580", "580.95.05"),
        ("535.161.07-1~deb12u1", "535", "535.161.07"),
        ("580.159", "580", "580.159"),
        ("20220217+3~deb12u1", "", ""),
        ("1.20.0-1", "", ""),
        ("", "", ""),
        ("580", "", ""),
    ],
)
def test_versions(version: str, branch: str, upstream: str) -> None:
    assert branch_of_version(version) == branch
    assert upstream_version(version) == upstream


@pytest.mark.parametrize("branch", ["581", "470", "r580", "", "58"])
def test_a_branch_that_does_not_exist_is_refused(branch: str) -> None:
    with pytest.raises(FleetError) as caught:
        check_branch(branch)
    assert caught.value.reason == "invalid_option"
    assert "nvidia_driver_branch = '%s'" % branch in caught.value.message
    assert "choose one of 535, 550" in caught.value.message


@pytest.mark.parametrize("branch", branch_names())
def test_every_offered_branch_is_accepted(branch: str) -> None:
    assert check_branch(branch).name == branch


def test_exact_version_outside_its_branch() -> None:
    check_version("580.95.05", "580")
    check_version("580.95", "580")
    with pytest.raises(FleetError, match="not in branch 580; set nvidia_driver_branch to '570'"):
        check_version("570.124.06", "580")
    for malformed in ("580", "580.95.05-1", "latest", "v580.95.05", "580.95.05 "):
        with pytest.raises(FleetError, match="not a driver version"):
            check_version(malformed, "580")


def test_proprietary_ends_at_620() -> None:
    check_flavour("proprietary", "615")
    check_flavour("open", "620")
    with pytest.raises(FleetError, match="branch 620 has no proprietary kernel modules"):
        check_flavour("proprietary", "620")


@pytest.mark.parametrize(
    ("flavour", "branch", "architectures", "chosen"),
    [
        ("auto", "580", ["Hopper"], "open"),
        ("auto", "535", ["Hopper"], "proprietary"),
        ("auto", "555", ["Ada Lovelace"], "proprietary"),
        ("auto", "560", ["Ada Lovelace"], "open"),
        ("auto", "580", ["Volta"], "proprietary"),
        ("auto", "535", ["Grace Hopper"], "open"),
        ("auto", "570", ["Blackwell"], "open"),
        ("auto", "580", ["Pascal", "Ampere"], "proprietary"),
        ("auto", "580", [], "open"),
        ("auto", "620", ["Hopper"], "open"),
        ("auto", "580", ["Rubin"], "open"),
        ("open", "535", ["Ampere"], "open"),
        ("proprietary", "580", ["Hopper"], "proprietary"),
    ],
)
def test_choose_flavour(flavour: str, branch: str, architectures: list[str], chosen: str) -> None:
    assert choose_flavour(flavour, branch, architectures) == chosen


@pytest.mark.parametrize(
    ("flavour", "branch", "architectures", "words"),
    [
        ("open", "580", ["Volta"], "works with proprietary kernel modules only"),
        ("proprietary", "580", ["Blackwell"], "works with open kernel modules only"),
        ("proprietary", "580", ["Grace Hopper"], "works with open kernel modules only"),
        ("auto", "590", ["Volta"], "the last branch that does is 580"),
        ("auto", "595", ["Maxwell"], "the last branch that does is 580"),
        ("auto", "550", ["Blackwell"], "too old for the Blackwell GPU"),
        ("auto", "580", ["Kepler"], "the last branch that does is 470"),
        ("auto", "580", ["Pascal", "Blackwell"], "drives all GPUs of this host"),
    ],
)
def test_a_gpu_that_cannot_take_it(flavour: str, branch: str, architectures: list[str], words: str) -> None:
    with pytest.raises(FleetError) as caught:
        choose_flavour(flavour, branch, architectures)
    assert caught.value.reason == "unsupported_gpu"
    assert words in caught.value.message


def test_every_architecture_has_a_flavour() -> None:
    assert all(entry.modules for entry in ARCHITECTURES.values())
