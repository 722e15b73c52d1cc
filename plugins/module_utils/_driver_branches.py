# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""NVIDIA driver branches, the CUDA version in each, and which GPU architecture takes which branch and flavour.

Sources: docs.nvidia.com/datacenter/tesla/drivers, docs.nvidia.com/deploy/cuda-compatibility and NVIDIA's driver
installation guides. Life-cycle dates are the announced ones.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._errors import FleetError

OPEN = "open"
PROPRIETARY = "proprietary"


@dataclass(frozen=True)
class Branch:
    """One driver branch.

    Attributes:
        name: As users write it, for example ``580``.
        cuda: CUDA version that the user-space driver of the branch implements; empty when not announced.
        kind: LTS, LTSB (three years), PB (one year) or NFB (about a quarter); empty when not announced.
        end: ``YYYY-MM``, ``ended`` or empty when no date is known.
    """

    name: str
    cuda: str
    kind: str
    end: str

    @property
    def number(self) -> int:
        return int(self.name)


BRANCHES: tuple[Branch, ...] = (
    Branch("470", "11.4", "LTS", "ended"),
    Branch("535", "12.2", "LTSB", "2026-06"),
    Branch("550", "12.4", "PB", "ended"),
    Branch("555", "12.5", "NFB", "ended"),
    Branch("560", "12.6", "NFB", "ended"),
    Branch("565", "12.7", "NFB", "ended"),
    Branch("570", "12.8", "PB", ""),
    Branch("575", "12.9", "NFB", ""),
    Branch("580", "13.0", "LTSB", "2028-06"),
    Branch("590", "13.1", "NFB", ""),
    Branch("595", "13.2", "PB", "2027-03"),
    Branch("610", "13.3", "NFB", "2026-08"),
    Branch("615", "", "", ""),
    Branch("620", "", "", ""),
)
_BY_NAME = {branch.name: branch for branch in BRANCHES}

#: Branches older than this are known (for reading hosts) but not offered for installation.
FIRST_INSTALLABLE = 535
#: ``auto`` takes the open modules from here on; before, NVIDIA's own tools take the proprietary ones.
OPEN_BY_DEFAULT_FROM = 560
#: From here on NVIDIA ships no proprietary kernel modules.
PROPRIETARY_REMOVED_FROM = 620
#: From here on apt packages carry no branch in their names and a pinning package selects the branch.
BRANCHLESS_FROM = 590


@dataclass(frozen=True)
class Architecture:
    """What a GPU generation takes.

    Attributes:
        modules: Kernel module flavours that drive it.
        first_branch: Oldest branch that knows it; 0 when every branch here does.
        last_branch: Newest branch that still supports it; 0 when there is no end.
    """

    name: str
    modules: tuple[str, ...]
    first_branch: int = 0
    last_branch: int = 0


#: A newer architecture that is not listed takes both flavours, like Turing.
ARCHITECTURES: dict[str, Architecture] = {
    entry.name: entry
    for entry in (
        Architecture("Kepler", (PROPRIETARY,), last_branch=470),
        Architecture("Maxwell", (PROPRIETARY,), last_branch=580),
        Architecture("Pascal", (PROPRIETARY,), last_branch=580),
        Architecture("Volta", (PROPRIETARY,), last_branch=580),
        Architecture("Turing", (OPEN, PROPRIETARY)),
        Architecture("Ampere", (OPEN, PROPRIETARY)),
        Architecture("Ada Lovelace", (OPEN, PROPRIETARY)),
        Architecture("Hopper", (OPEN, PROPRIETARY)),
        Architecture("Grace Hopper", (OPEN,)),
        # First CUDA for Blackwell is 12.8, that is branch 570.
        Architecture("Blackwell", (OPEN,), first_branch=570),
    )
}
_ARCHITECTURE_ALIASES = {"Ada": "Ada Lovelace", "Grace": "Grace Hopper"}


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def branch_names() -> list[str]:
    """Branches that can be installed, oldest first."""
    return [branch.name for branch in BRANCHES if branch.number >= FIRST_INSTALLABLE]


def branch_of_version(version: str) -> str:
    """``580.95.05-0ubuntu1`` -> ``580``; empty when the text does not begin with a version (an epoch is skipped)."""
    match = re.match(r"(?:\d+:)?(\d{3})(?:\.\d+)", version)
    return match.group(1) if match else ""


def upstream_version(version: str) -> str:
    """Driver version inside a package version: ``3:580.95.05-1.el9`` -> ``580.95.05``; empty when there is none."""
    match = re.match(r"(?:\d+:)?(\d{3}(?:\.\d+){1,2})", version)
    return match.group(1) if match else ""


def cuda_of_branch(branch: str) -> str | None:
    """CUDA version of a branch, for example ``12.5``; None when the branch is unknown or its CUDA not announced."""
    known = _BY_NAME.get(str(branch))
    return known.cuda or None if known else None


def smallest_branch_for_cuda(version: str) -> str | None:
    """The oldest branch whose CUDA is at least ``version`` (``major`` or ``major.minor``), or None."""
    wanted = _version_key(version)[:2]
    for branch in BRANCHES:
        if branch.cuda and _version_key(branch.cuda) >= wanted:
            return branch.name
    return None


def architecture(name: str) -> Architecture | None:
    """The rules of an architecture as nvidia-smi names it; None when it is unknown, which means no known limit."""
    return ARCHITECTURES.get(_ARCHITECTURE_ALIASES.get(name, name))


def branch_supports(number: int, architectures: t.Iterable[str]) -> bool:
    """Whether a branch drives GPUs of these architectures; an unknown name sets no limit."""
    for name in architectures:
        rules = architecture(name)
        if rules and (number < rules.first_branch or (rules.last_branch and number > rules.last_branch)):
            return False
    return True


def check_branch(branch: str, option: str = "nvidia_driver_branch") -> Branch:
    """Look a branch up.

    Raises:
        FleetError: ``invalid_option`` when it does not exist or can no longer be installed.
    """
    known = _BY_NAME.get(str(branch))
    if known is None or known.number < FIRST_INSTALLABLE:
        raise FleetError(
            "invalid_option",
            "%s = %r: %s; choose one of %s."
            % (
                option,
                branch,
                "branch %s is older than this collection installs" % branch if known else "no such driver branch",
                ", ".join(branch_names()),
            ),
        )
    return known


def check_version(version: str, branch: str, option: str = "nvidia_driver_version") -> None:
    """Check an exact version against its branch.

    Raises:
        FleetError: ``invalid_option`` when it is malformed or belongs to another branch.
    """
    if not re.fullmatch(r"\d{3}\.\d{1,3}(\.\d{1,3})?", version):
        raise FleetError(
            "invalid_option",
            "%s = %r: not a driver version; write it like 580.95.05, without package suffix." % (option, version),
        )
    if branch_of_version(version) != str(branch):
        raise FleetError(
            "invalid_option",
            "%s = %r: this version is not in branch %s; set nvidia_driver_branch to %r or choose a version of branch %s."
            % (option, version, branch, branch_of_version(version), branch),
        )


def check_flavour(flavour: str, branch: str, option: str = "nvidia_driver_flavour") -> None:
    """Check a flavour against a branch, before any GPU is known.

    Raises:
        FleetError: ``invalid_option`` for a flavour that the branch does not have.
    """
    if flavour == PROPRIETARY and int(branch) >= PROPRIETARY_REMOVED_FROM:
        raise FleetError(
            "invalid_option",
            "%s = %r: branch %s has no proprietary kernel modules (removed from %d on); choose open, auto or an older branch."
            % (option, flavour, branch, PROPRIETARY_REMOVED_FROM),
        )


def choose_flavour(flavour: str, branch: str, architectures: t.Iterable[str]) -> str:
    """The kernel module flavour for a host: the one that was asked for, or with ``auto`` the one the GPUs want.

    Args:
        architectures: Architectures of all GPUs of the host; unknown names set no limit.

    Raises:
        FleetError: ``unsupported_gpu`` when a GPU takes neither the branch nor the flavour, or when no flavour
            drives all GPUs of the host.
    """
    number = int(branch)
    allowed = [OPEN, PROPRIETARY] if number < PROPRIETARY_REMOVED_FROM else [OPEN]
    wanted = [flavour] if flavour in (OPEN, PROPRIETARY) else list(allowed)
    names = sorted(set(architectures))
    for name in names:
        rules = architecture(name)
        if rules is None:
            continue
        if rules.last_branch and number > rules.last_branch:
            raise FleetError(
                "unsupported_gpu",
                "Driver branch %s does not support the %s GPU of this host; the last branch that does is %d: "
                "set nvidia_driver_branch to %r." % (branch, name, rules.last_branch, str(rules.last_branch)),
                architecture=name,
            )
        if number < rules.first_branch:
            raise FleetError(
                "unsupported_gpu",
                "Driver branch %s is too old for the %s GPU of this host; set nvidia_driver_branch to %r or newer."
                % (branch, name, str(rules.first_branch)),
                architecture=name,
            )
        if not set(wanted) & set(rules.modules):
            if flavour not in (OPEN, PROPRIETARY):
                raise FleetError(
                    "unsupported_gpu",
                    "No kernel module flavour of branch %s drives all GPUs of this host (%s): %s needs %s modules."
                    % (branch, ", ".join(names), name, " or ".join(rules.modules)),
                    architecture=name,
                )
            raise FleetError(
                "unsupported_gpu",
                "nvidia_driver_flavour = %r: the %s GPU of this host works with %s kernel modules only; "
                "set nvidia_driver_flavour to auto or %s." % (flavour, name, rules.modules[0], rules.modules[0]),
                architecture=name,
            )
        wanted = [entry for entry in wanted if entry in rules.modules]
    if len(wanted) == 1:
        return wanted[0]
    return OPEN if number >= OPEN_BY_DEFAULT_FROM else PROPRIETARY
