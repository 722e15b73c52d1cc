# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The shell around resources: plain, and as a job that is watched."""

from __future__ import annotations

import json
import os
import pathlib
import time
import typing as t

import pytest
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _module_progress
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import Jobs
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change, Resource


class Lines(Resource["list[str]"]):
    """Files a, b, … that must exist; making one takes a moment."""

    name = "lines"

    def __init__(self, directory: pathlib.Path, wanted: str, seconds: float = 0.0, broken: bool = False) -> None:
        self.directory, self.wanted, self.seconds, self.broken = directory, wanted, seconds, broken

    def observe(self, host: Host) -> list[str]:
        return host.list_dir(str(self.directory))

    def plan(self, state: list[str]) -> list[Change]:
        return [Change(self.name, one, None, "there", "it is missing") for one in self.wanted if one not in state]

    def apply(self, host: Host, change: Change) -> None:
        time.sleep(self.seconds)
        if self.broken:
            raise FleetError("broken", "Making %s failed: it is broken. Mend it." % change.what)
        (self.directory / change.what).write_text("")


class Caller:
    """Calls the shell as the action plugin would."""

    def __init__(
        self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder = folder / "lines"
        self.folder.mkdir()
        self.capsys = capsys
        jobs = str(folder / "jobs")
        monkeypatch.setattr(_module_progress, "Jobs", lambda: Jobs(jobs))

    def slice(self, resource: Lines, *, interval: int = 1, check: bool = False, **options: t.Any) -> dict[str, t.Any]:
        options.update(progress_interval=interval, _ansible_check_mode=check, _ansible_remote_tmp="/tmp")
        with patch_module_args(options), pytest.raises(SystemExit):
            module = AnsibleModule(argument_spec=dict(_module_progress.PROGRESS_OPTIONS), supports_check_mode=True)
            _module_progress.run_resource_with_progress(module, lambda: resource, lambda state: {"state": state})
        return t.cast("dict[str, t.Any]", json.loads(self.capsys.readouterr().out))

    def all(self, resource: Lines) -> list[dict[str, t.Any]]:
        answers = [self.slice(resource)]
        while answers[-1].get("finished") is False:
            answers.append(self.slice(resource, resume=answers[-1]["resume"]))
        return answers


@pytest.fixture
def caller(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(tmp_path, monkeypatch, capsys)


def test_long_work_is_shown_and_finished(caller: Caller) -> None:
    answers = caller.all(Lines(caller.folder, "ab", seconds=0.8))
    assert "of 2)" in answers[0]["progress"]["text"]
    assert answers[0]["changed"] is False
    assert answers[-1]["changed"] is True
    assert [change["what"] for change in answers[-1]["changes"]] == ["a", "b"]
    assert answers[-1]["state"] == ["a", "b"]


def test_nothing_to_do_is_one_call_without_a_job(caller: Caller) -> None:
    (caller.folder / "a").write_text("")
    answers = caller.all(Lines(caller.folder, "a"))
    assert len(answers) == 1
    assert answers[0]["changed"] is False
    assert not (caller.folder.parent / "jobs").exists()


def test_check_mode_changes_nothing(caller: Caller) -> None:
    answer = caller.slice(Lines(caller.folder, "a"), check=True)
    assert answer["changed"] is True
    assert os.listdir(caller.folder) == []


def test_interval_zero_runs_to_the_end(caller: Caller) -> None:
    answer = caller.slice(Lines(caller.folder, "a", seconds=0.1), interval=0)
    assert answer["changed"] is True
    assert answer["state"] == ["a"]
    assert not (caller.folder.parent / "jobs").exists()


def test_failure_of_the_job_is_the_failure_of_the_module(caller: Caller) -> None:
    answers = caller.all(Lines(caller.folder, "a", broken=True))
    assert answers[-1]["failed"] is True
    assert answers[-1]["reason"] == "broken"
    assert answers[-1]["msg"] == "Making a failed: it is broken. Mend it."
    assert answers[-1]["changed"] is True


def test_a_running_job_of_somebody_else_is_waited_for_and_then_looked_at_anew(caller: Caller) -> None:
    first = caller.slice(Lines(caller.folder, "a", seconds=1.5))
    assert first["finished"] is False
    answers = caller.all(Lines(caller.folder, "ab"))
    assert answers[0]["resume"] in ({"own": False}, {})
    assert [change["what"] for change in answers[-1]["changes"]] == ["b"]
