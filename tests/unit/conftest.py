# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of all unit tests."""

from __future__ import annotations

import os
import pathlib
import sys
import typing as t

import pytest
from ansible.module_utils.common import warnings
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from fake_host import FakeHost
from health_world import Nim, World

_UNHURRIED = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
#: Every time the same examples, so that nobody's change fails by chance; `make fuzz` looks further.
settings.register_profile("unit", max_examples=40, derandomize=True, database=None, **_UNHURRIED)
settings.register_profile("fuzz", max_examples=2000, **_UNHURRIED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))


@pytest.fixture
def host() -> FakeHost:
    """An empty host; fill its files and commands."""
    return FakeHost()


@pytest.fixture
def nim() -> t.Iterator[Nim]:
    """The HTTP side of a NIM."""
    server = Nim()
    yield server
    server.close()


@pytest.fixture
def world() -> World:
    """A host on which a NIM starts."""
    return World()


@pytest.fixture
def fixtures() -> pathlib.Path:
    """Real captures and recorded data."""
    return pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _as_in_a_module_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is a process of its own that collects its warnings; here all share one, with controller code in it."""
    monkeypatch.setattr("ansible.module_utils._internal.is_controller", False, raising=False)
    warnings._global_warnings.clear()
    warnings._global_deprecations.clear()
