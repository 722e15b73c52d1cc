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
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _host_plan, _module_progress
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import Jobs
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import Host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import Finding, HostPlan, Planned
from ansible_collections.gpu_fleet.nim.plugins.module_utils._module import converged, fail, succeed
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change, Resource
from ansible_collections.gpu_fleet.nim.plugins.module_utils._verdict import REFUSED, Verdict
from ansible_collections.gpu_fleet.nim.plugins.modules import gpu_host_plan, gpu_host_preflight


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


# -- secrets ---------------------------------------------------------------------------------------

PASSWORD = "hunter2-of-the-proxy"
#: As a tool says it that reads a configuration which is none of ours.
SAID = "Err: http://proxy-user:%s@proxy.example.org:3128 refused the connection" % PASSWORD


def answer_of(capsys: pytest.CaptureFixture[str], call: t.Callable[[AnsibleModule], t.Any]) -> dict[str, t.Any]:
    with patch_module_args({"_ansible_remote_tmp": "/tmp", "_ansible_diff": True}), pytest.raises(SystemExit):
        call(AnsibleModule(argument_spec={}, supports_check_mode=True))
    printed = capsys.readouterr()
    assert PASSWORD not in printed.out + printed.err
    return t.cast("dict[str, t.Any]", json.loads(printed.out))


def test_facts_of_an_error_are_masked_however_deep_they_lie(capsys: pytest.CaptureFixture[str]) -> None:
    change = Change("docker_engine", "packages", {"lines": [SAID]}, None, SAID).as_dict()
    error = FleetError(
        "package_failed",
        SAID,
        lines=[SAID, "plain"],
        deep={"one": [{"two": SAID, "HTTP_PASSWORD": PASSWORD, "count": 3, "share": 0.5, "done": True, "no": None}]},
        pair=("a", SAID),
        key="live-restore",
        status=404,
        changes=[change],
    )
    answer = answer_of(capsys, lambda module: fail(module, error))
    assert (answer["failed"], answer["reason"], answer["changed"]) == (True, "package_failed", True)
    assert answer["lines"][1] == "plain"
    (deep,) = answer["deep"]["one"]
    assert (deep["count"], deep["share"], deep["done"], deep["no"]) == (3, 0.5, True, None)
    # Names of facts are the collection's own: this one is a key of daemon.json.
    assert (answer["key"], answer["status"], answer["pair"][0]) == ("live-restore", 404, "a")
    assert "proxy.example.org" in answer["changes"][0]["why"]
    # What is still needed of the error is as it was.
    assert error.facts["lines"] == [SAID, "plain"]


class Talkative(Lines):
    def plan(self, state: list[str]) -> list[Change]:
        return [
            Change(self.name, "a", SAID, {"url": SAID}, SAID),
            Change(self.name, "b", None, None, SAID, blocked=SAID),
        ]


def test_changes_and_what_is_left_out_are_masked(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    def call(module: AnsibleModule) -> None:
        module.check_mode = True
        module.exit_json(**converged(module, Talkative(tmp_path, ""), lambda state: {}, Host()))

    answer = answer_of(capsys, call)
    assert (len(answer["changes"]), len(answer["blocked"])) == (1, 1)
    assert "proxy.example.org" in answer["msg"]
    assert "proxy.example.org" in answer["diff"][0]["before"]


def test_the_plan_of_a_host_is_masked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = HostPlan(
        planned=[Planned(Change("docker_daemon", "running daemon", SAID, [SAID], SAID, blocked=SAID))],
        errors=[Finding("docker_engine", "repository_unreachable", SAID)],
        notes=[SAID],
        warnings=[SAID],
    )
    monkeypatch.setattr(_host_plan, "plan_host", lambda *given: plan)
    with patch_module_args({"docker_engine": {}, "_ansible_remote_tmp": "/tmp"}), pytest.raises(SystemExit):
        gpu_host_plan.main()
    printed = capsys.readouterr()
    assert PASSWORD not in printed.out + printed.err
    answer = json.loads(printed.out)
    assert "proxy.example.org" in answer["errors"][0]["message"]
    assert (answer["drift"], answer["gpu"], answer["changed"]) == (True, True, False)
    assert len(answer["warnings"]) == len(answer["notes"]) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_preflight_is_masked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    verdict = Verdict("key", REFUSED, SAID, SAID, "registry_unreachable", subject=SAID)
    monkeypatch.setattr(gpu_host_preflight, "preflight", lambda *given: [verdict])
    options = {"docker_engine": {}, "fail_on_refusal": fails, "_ansible_remote_tmp": "/tmp"}
    with patch_module_args(options), pytest.raises(SystemExit):
        gpu_host_preflight.main()
    printed = capsys.readouterr()
    assert PASSWORD not in printed.out + printed.err
    answer = json.loads(printed.out)
    assert (answer.get("failed", False), answer["verdict"]) == (fails, REFUSED)
    assert answer["checks"][0]["check"] == "key"


def test_what_modules_find_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    answer = answer_of(capsys, lambda module: succeed(module, {"found": [SAID, 3]}, [SAID]))
    assert (answer["changed"], answer["found"][1]) == (False, 3)
