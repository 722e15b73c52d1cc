# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks for real GPU servers, as far as they run without one: they must keep up with the collection."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import subprocess
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import Gpu, GpuTelemetry, parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_service import NimService

DIRECTORY = pathlib.Path(__file__).parents[1] / "real_gpu"


@pytest.fixture(autouse=True)
def _beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DIRECTORY))


@pytest.fixture
def gpus(fixtures: pathlib.Path) -> t.Sequence[Gpu]:
    return parse_smi((fixtures / "nvidia-smi/h200-x2.xml").read_text())[2]


@pytest.fixture
def verification(tmp_path: pathlib.Path, gpus: t.Sequence[Gpu]) -> t.Any:
    (tmp_path / "output").mkdir()
    found = importlib.import_module("check").Verification(str(tmp_path), str(tmp_path / "output"))
    found.gpus = gpus
    return found


@pytest.fixture
def systemd(tmp_path: pathlib.Path) -> t.Any:
    return importlib.import_module("machine").Systemd(str(tmp_path), str(tmp_path))


def test_the_shell_program_parses() -> None:
    subprocess.run(["bash", "-n", str(DIRECTORY / "run.sh")], check=True)


@pytest.mark.parametrize(("copies", "checks"), [(1, 17), (2, 21), (4, 25)])
def test_placement_holds_on_a_captured_host(verification: t.Any, copies: int, checks: int) -> None:
    verification.gpus = [
        dataclasses.replace(gpu, index=2 * number + gpu.index, uuid="%s%d%s" % (gpu.uuid[:-2], number, gpu.uuid[-1]))
        for number in range(copies)
        for gpu in verification.gpus
    ]
    verification.placement()
    assert verification.report.failed == 0
    assert len(verification.report.entries) == checks


def test_a_failed_check_counts(verification: t.Any, capsys: pytest.CaptureFixture[str]) -> None:
    verification.report.same("answer", 1, (2, 3))
    assert verification.report.failed == 1
    assert capsys.readouterr().out == "FAILED  answer: 1 != (2, 3)\n"


def test_every_field_of_a_gpu_is_compared_or_named(
    verification: t.Any, gpus: t.Sequence[Gpu], fixtures: pathlib.Path
) -> None:
    check = importlib.import_module("check")
    xml = (fixtures / "nvidia-smi/h200-x2.xml").read_text()
    gpu = gpus[0]
    known = {
        field: getattr(gpu, field)
        for field in (
            *("index", "uuid", "name", "brand", "architecture", "compute_mode", "mig", "minor", "bdf"),
            *("persistence_mode", "memory_total_mib", "memory_used_mib", "memory_free_mib", "fabric_state"),
        )
    }
    known["telemetry"] = dataclasses.asdict(gpu.telemetry)
    del known["telemetry"]["lost"], known["telemetry"]["retirement_pending"]
    known["pids"] = sorted(entry["pid"] for entry in gpu.processes)
    cells = {
        "index": "0",
        "uuid": gpu.uuid,
        "name": gpu.name,
        "memory.total": str(gpu.memory_total_mib),
        "memory.used": str(gpu.memory_used_mib),
        "memory.free": str(gpu.memory_free_mib),
        "compute_mode": gpu.compute_mode,
        "mig.mode.current": gpu.mig,
        "pci.bus_id": "0000" + gpu.bdf.upper(),
        "persistence_mode": gpu.persistence_mode,
    }
    row = [cells[column] for column in check.COLUMNS]
    verification._compare(gpu, row, known, xml[xml.index("<gpu id=") :])
    assert verification.report.failed == 0
    said = [entry["check"].split(" ")[2].rstrip(",") for entry in verification.report.entries]
    assert {field.name for field in dataclasses.fields(Gpu)} <= set(said)
    told = {
        entry["check"].split(" ")[3].rstrip(",")
        for entry in verification.report.entries
        if "telemetry" in entry["check"]
    }
    assert {field.name for field in dataclasses.fields(GpuTelemetry)} <= told
    (skipped,) = [entry["check"] for entry in verification.report.entries if entry["outcome"] == "skipped"]
    assert "retirement_pending" in skipped
    sick = dataclasses.replace(gpu.telemetry, ecc_volatile=7, lost="GPU is lost")
    verification._compare(dataclasses.replace(gpu, memory_total_mib=1, minor=9, telemetry=sick), row, known, xml)
    assert verification.report.failed == 5


@pytest.mark.parametrize(
    ("count", "wishes"),
    [(1, [1]), (2, [["GPU-1"], 1]), (3, [2, [0]]), (4, [2, ["GPU-3"], 1]), (8, [4, ["GPU-7"], 1])],
)
def test_services_for_hosts_of_every_size(count: int, wishes: list[t.Any]) -> None:
    found = importlib.import_module("services").requests_for(["GPU-%d" % number for number in range(count)])
    assert [wish for _name, wish in found] == wishes


def test_options_of_the_services_are_valid(
    verification: t.Any, monkeypatch: pytest.MonkeyPatch, gpus: t.Sequence[Gpu]
) -> None:
    services = importlib.import_module("services")
    monkeypatch.setattr(services, "torch_directory", lambda: "/opt/python/site-packages")
    found = services.Services(verification.host, verification.engine, verification.report, gpus)
    models = parse_models(found.entries)
    assert [model.name for model in models] == ["real-gpu-named", "real-gpu-one"]
    assert models[0].weights_directory == "/opt/python/site-packages"
    assert models[0].environment["PYTHONPATH"] == "/opt/nim/weights"
    NimService(models, injection=services.INJECTION)


# -- what stands for systemd --------------------------------------------------------------------------------------------


def _unit(tmp_path: pathlib.Path, program: str, more: str = "") -> str:
    (tmp_path / "program").write_text("#!/bin/sh\n%s\n" % program)
    (tmp_path / "program").chmod(0o755)
    (tmp_path / "x.service").write_text(
        "[Unit]\nStartLimitIntervalSec=60\nStartLimitBurst=3\n[Service]\nExecStart=%s run x\nExecStop=%s stop x\n"
        "Restart=always\nRestartPreventExitStatus=77 78\nSuccessExitStatus=77\n%s[Install]\nWantedBy=nim.target\n"
        % (tmp_path / "program", tmp_path / "program", more)
    )
    return "x.service"


def _show(systemd: t.Any, unit: str, name: str) -> str:
    code, output, dummy = systemd.call(["show", "--property", name, "--value", unit])
    assert code == 0
    return output.strip()


def test_a_unit_from_start_to_stop(systemd: t.Any, tmp_path: pathlib.Path) -> None:
    unit = _unit(tmp_path, '[ "$1" = run ] && exec sleep 60; echo "stop $MAINPID $INVOCATION_ID"; kill $MAINPID')
    assert systemd.call(["start", "y.service"]) == (5, "", "Unit y.service not found.")
    assert _show(systemd, unit, "UnitFileState") == "disabled"
    systemd.call(["enable", "--no-reload", unit])
    assert _show(systemd, unit, "UnitFileState") == "enabled"
    systemd.call(["restart", unit])
    process = systemd.units[unit].process
    invocation = _show(systemd, unit, "InvocationID")
    shown = systemd.call(["show", "--property=Id,ActiveState,NRestarts", "--", unit, "docker.service"])[1]
    assert shown == (
        "Id=x.service\nActiveState=active\nNRestarts=0\n\nId=docker.service\nActiveState=inactive\nNRestarts=0\n"
    )
    systemd.call(["stop", unit])
    assert process.poll() is not None
    assert "stop %d %s" % (process.pid, invocation) in systemd.units[unit].said()
    assert _show(systemd, unit, "ActiveState") == "inactive"
    systemd.call(["disable", unit])
    assert _show(systemd, unit, "UnitFileState") == "disabled"


def test_a_unit_that_dies_is_started_again_but_not_for_ever(systemd: t.Any, tmp_path: pathlib.Path) -> None:
    wait_for = importlib.import_module("report").wait_for
    unit = _unit(tmp_path, '[ "$1" = run ] || echo "stop <$MAINPID>"; exit 1')
    systemd.call(["start", unit])
    assert wait_for(lambda: _show(systemd, unit, "ActiveState") == "failed", 10)
    assert _show(systemd, unit, "Result") == "start-limit-hit"
    assert _show(systemd, unit, "NRestarts") == "3"
    assert systemd.units[unit].said() == "stop <>\n" * 3
    systemd.call(["reset-failed", unit])
    assert _show(systemd, unit, "ActiveState") == "inactive"


def test_some_codes_prevent_a_restart_and_text_is_loaded_by_a_reload(systemd: t.Any, tmp_path: pathlib.Path) -> None:
    wait_for = importlib.import_module("report").wait_for
    unit = _unit(tmp_path, "exit 77")
    systemd.call(["start", unit])
    assert wait_for(lambda: _show(systemd, unit, "ActiveState") == "inactive", 10)
    assert _show(systemd, unit, "NRestarts") == "0"
    _unit(tmp_path, "exit 78", "TimeoutStopSec=5\n")
    assert _show(systemd, unit, "NeedDaemonReload") == "yes"
    systemd.call(["daemon-reload"])
    assert _show(systemd, unit, "NeedDaemonReload") == "no"
    systemd.call(["start", unit])
    assert wait_for(lambda: _show(systemd, unit, "ActiveState") == "failed", 10)
    assert _show(systemd, unit, "ExecMainStatus") == "78"


def test_identities_of_boards_are_replaced() -> None:
    redact = importlib.import_module("report").redact
    uuid = "GPU-6e1f0d6a-0f5b-4c3e-9d7a-1b2c3d4e5f60"
    text = redact("<serial>123</serial><uuid>%s</uuid><pdi>0x1</pdi>" % uuid)
    assert uuid not in text
    assert "<serial>REDACTED</serial>" in text
    assert "<pdi>REDACTED</pdi>" in text
    assert redact(uuid) in text
    assert redact(redact(uuid)) == redact(uuid)
