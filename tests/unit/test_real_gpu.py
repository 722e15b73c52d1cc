# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks for real GPU servers, as far as they run without one: they must keep up with the collection."""

from __future__ import annotations

import importlib
import json
import pathlib
import subprocess
import types
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_family import Family
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service_state import ImageState

DIRECTORY = pathlib.Path(__file__).parents[1] / "real_gpu"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(DIRECTORY))
    return importlib.import_module("check")


@pytest.fixture
def verification(check: types.ModuleType, tmp_path: pathlib.Path, fixtures: pathlib.Path) -> t.Any:
    (tmp_path / "work").mkdir()
    (tmp_path / "output").mkdir()
    found = check.Verification(str(tmp_path / "work"), str(tmp_path / "output"))
    found.gpus = parse_smi((fixtures / "nvidia-smi/h200-x2.xml").read_text())[2]
    return found


def test_the_shell_program_parses() -> None:
    subprocess.run(["bash", "-n", str(DIRECTORY / "run.sh")], check=True)


def test_placement_holds_on_a_captured_host(verification: t.Any) -> None:
    verification.placement()
    assert len(verification.report.entries) == 9
    assert verification.report.failed == 0


def test_a_failed_check_counts(verification: t.Any, capsys: pytest.CaptureFixture[str]) -> None:
    verification.report.same("answer", 1, (2, 3))
    assert verification.report.failed == 1
    assert capsys.readouterr().out == "FAILED  answer: 1 != (2, 3)\n"


def test_configuration_of_a_service(
    check: types.ModuleType, verification: t.Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(check, "torch_directory", lambda: "/opt/python/site-packages")
    model = parse_models([verification._entry(1, verification.gpus[1], {"memlock": -1})])[0]
    image = ImageState("sha256:1", "sha256:1", "", Family("2.x", "2.0.0"))
    configuration = check.configuration_of(model, image, [verification.gpus[1].uuid])
    assert "--device=nvidia.com/gpu=%s" % verification.gpus[1].uuid in configuration["create"]
    assert "--env=PYTHONPATH=/opt/nim/weights" in configuration["create"]
    assert configuration["download"] is None
    json.dumps(configuration)


def test_identities_of_boards_are_replaced(check: types.ModuleType) -> None:
    uuid = "GPU-6e1f0d6a-0f5b-4c3e-9d7a-1b2c3d4e5f60"
    text = check.redact("<serial>123</serial><uuid>%s</uuid><pdi>0x1</pdi>" % uuid)
    assert uuid not in text
    assert "<serial>REDACTED</serial>" in text
    assert "<pdi>REDACTED</pdi>" in text
    assert check.redact(uuid) in text
    assert check.redact(check.redact(uuid)) == check.redact(uuid)
