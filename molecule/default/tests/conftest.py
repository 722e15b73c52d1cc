# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests/sandbox"))
import story as story_module


@pytest.fixture(scope="session")
def story() -> story_module.Story:
    return story_module.Story("default")


@pytest.fixture(scope="session")
def bare() -> dict[str, str]:
    """The host before anything was done to it; prepare.yml has looked."""
    directory = Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
    found: dict[str, str] = json.loads((directory / "bare.json").read_text(encoding="utf-8"))
    return found
