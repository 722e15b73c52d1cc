# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules themselves: check, run, check, run; what they print; options that are refused."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _module, _module_progress, _packages
from ansible_collections.gpu_fleet.nim.plugins.modules import gpu_host_info, nvidia_driver, nvidia_driver_reload
from driver_world import DriverWorld


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> DriverWorld:
    world = DriverWorld()
    monkeypatch.setattr(_packages, "download", lambda _url: b"\x99\x01key")
    for shell in (_module, _module_progress):
        monkeypatch.setattr(shell, "Host", lambda: world)
    monkeypatch.setattr(gpu_host_info, "Host", lambda: world)
    return world


def call(module: t.Any, capsys: pytest.CaptureFixture[str], **arguments: t.Any) -> dict[str, t.Any]:
    if module in (nvidia_driver, nvidia_driver_reload):
        # In this process, where the host in memory is; not as a job in a process of its own.
        arguments["progress_interval"] = 0
    with patch_module_args(arguments), pytest.raises(SystemExit):
        module.main()
    answer = json.loads(capsys.readouterr().out)
    assert isinstance(answer, dict)
    return answer


def test_driver_check_run_check_run(world: DriverWorld, capsys: pytest.CaptureFixture[str]) -> None:
    check = {"_ansible_check_mode": True, "_ansible_diff": True}
    answers = [call(nvidia_driver, capsys, **extra) for extra in (check, {"_ansible_diff": True}, check, {})]
    assert [answer["changed"] for answer in answers] == [True, True, False, False]
    assert answers[0]["changes"] == answers[1]["changes"]
    assert answers[0]["diff"] == answers[1]["diff"]
    assert answers[2]["changes"] == answers[2]["diff"] == answers[3]["changes"] == []
    assert answers[0]["message"] == "The driver of branch 580 is not installed yet."
    assert answers[3]["message"] == "Driver 580.95.05 is installed; its module is not loaded yet."
    after = "".join(entry["after"] for entry in answers[0]["diff"])
    assert "blacklist nouveau" in after
    assert "driver packages: branch 580 (open, nvidia)" in after

    answers = [call(nvidia_driver_reload, capsys, **extra) for extra in (check, {}, check, {})]
    assert [answer["changed"] for answer in answers] == [True, True, False, False]
    assert answers[3]["message"] == "Driver 580.95.05: loaded = on disk = user space."
    assert call(gpu_host_info, capsys)["driver"]["loaded"] == "580.95.05"


def test_driver_in_use(world: DriverWorld, capsys: pytest.CaptureFixture[str]) -> None:
    world.install_driver("580.65.06")
    world.hold_gpu(812, "nim-llama.service")
    for check in (True, False):
        answer = call(nvidia_driver, capsys, branch="580", version="580.95.05", _ansible_check_mode=check)
        assert answer["failed"]
        assert answer["reason"] == "gpu_in_use"
        assert not answer["changed"]
        assert answer["holders"][0]["unit"] == "nim-llama.service"


def test_reboot_required_is_a_warning(world: DriverWorld, capsys: pytest.CaptureFixture[str]) -> None:
    world.can_unload = False
    world.install_driver("580.95.05", loaded=False)
    world.load("580.65.06")
    answer = call(nvidia_driver_reload, capsys)
    assert answer["reboot_required"]
    assert answer["reboot_reason"].endswith("without module unloading")
    assert "a reboot is needed" in str(answer["warnings"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"branch": "581"}, "no such driver branch"),
        ({"version": "570.1.2"}, "not in branch 580"),
        ({"repository_url": "mirror/x"}, "URL of a repository"),
        ({"flavor": "open"}, "Unsupported parameters"),
    ],
)
def test_refused_options(
    world: DriverWorld, capsys: pytest.CaptureFixture[str], arguments: dict[str, str], words: str
) -> None:
    answer = call(nvidia_driver, capsys, **arguments)
    assert answer["failed"]
    assert words in answer["msg"]
    assert world.calls == []


def test_unknown_section(world: DriverWorld, capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(gpu_host_info, capsys, sections=["gpu"])
    assert answer["failed"]
    assert "choose from system, pci, driver, gpus" in answer["msg"]
