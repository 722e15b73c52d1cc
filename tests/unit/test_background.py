# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Background jobs, with real processes."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import Jobs
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError


@pytest.fixture
def jobs(tmp_path: pathlib.Path) -> Jobs:
    return Jobs(str(tmp_path / "jobs"))


def _until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_ends_with_its_result(jobs: Jobs) -> None:
    def work(report: object) -> dict[str, object]:
        report({"bytes": 5})  # type: ignore[operator]
        return {"answer": 42}

    assert jobs.read("a") is None
    assert jobs.start("a", work) is True
    (status,) = jobs.wait(["a"], 10)
    assert status.state == "done"
    assert status.finished
    assert status.result == {"answer": 42}
    assert status.progress == {"bytes": 5}


def test_the_second_caller_attaches(jobs: Jobs, tmp_path: pathlib.Path) -> None:
    gate, runs = tmp_path / "gate", tmp_path / "runs"

    def work(report: object) -> dict[str, object]:
        with runs.open("a") as stream:
            stream.write("x")
        while not gate.exists():
            time.sleep(0.02)
        return {}

    assert jobs.start("a", work) is True
    assert jobs.start("a", work) is False
    assert jobs.start("b", lambda report: {}) is True
    (status,) = jobs.wait(["a"], 0.1)
    assert status.state == "running"
    gate.touch()
    assert [entry.state for entry in jobs.wait(["a", "b"], 10)] == ["done", "done"]
    assert runs.read_text() == "x"
    assert jobs.start("a", work) is True
    jobs.wait(["a"], 10)
    assert runs.read_text() == "xx"


def test_an_expected_failure_keeps_its_reason(jobs: Jobs) -> None:
    def work(report: object) -> dict[str, object]:
        raise FleetError("disk_full", "No room.", path="/x")

    jobs.start("a", work)
    (status,) = jobs.wait(["a"], 10)
    error = status.failure("Pulling x")
    assert (error.reason, error.message, error.facts) == ("disk_full", "No room.", {"path": "/x"})


def test_an_unexpected_failure_does_not_repeat_what_it_was_given(jobs: Jobs) -> None:
    def work(report: object) -> dict[str, object]:
        raise ValueError("nvapi-secret")

    jobs.start("a", work)
    (status,) = jobs.wait(["a"], 10)
    error = status.failure("Pulling x")
    assert error.reason == "internal_error"
    assert "ValueError at test_background.py" in error.message
    assert "nvapi-secret" not in (pathlib.Path(jobs.directory) / "a.json").read_text()


def test_a_killed_job_is_lost_and_can_be_started_again(jobs: Jobs) -> None:
    def work(report: object) -> dict[str, object]:
        report({"x": 1})  # type: ignore[operator]
        time.sleep(60)
        return {}

    jobs.start("a", work)
    file = pathlib.Path(jobs.directory) / "a.json"
    _until(lambda: "pid" in json.loads(file.read_text()))
    os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)
    (status,) = jobs.wait(["a"], 10)
    assert status.state == "lost"
    assert status.failure("Pulling x").reason == "job_lost"
    assert jobs.start("a", lambda report: {"ok": True}) is True
    assert jobs.wait(["a"], 10)[0].result == {"ok": True}


def test_waiting_ends_with_the_first_failure(jobs: Jobs, tmp_path: pathlib.Path) -> None:
    gate = tmp_path / "gate"

    def fails(report: object) -> dict[str, object]:
        raise FleetError("x", "y")

    def sleeps(report: object) -> dict[str, object]:
        _until(gate.exists, 30)
        return {}

    jobs.start("slow", sleeps)
    jobs.start("bad", fails)
    assert {status.state for status in jobs.wait(["slow", "bad"], 20)} == {"running", "failed"}
    gate.touch()
    assert jobs.wait(["slow"], 20)[0].state == "done"


def test_it_survives_its_parent_and_frees_its_output(tmp_path: pathlib.Path) -> None:
    """The starter's output ends when the starter does, and the job goes on in a session of its own."""
    script = tmp_path / "starter.py"
    script.write_text(
        "import os, sys, time\n"
        "from ansible_collections.gpu_fleet.nim.plugins.module_utils._background import Jobs\n"
        "def work(report):\n"
        "    while not os.path.exists(sys.argv[2]):\n"
        "        time.sleep(0.02)\n"
        "    return {'session': os.getsid(0), 'parent': os.getppid()}\n"
        "Jobs(sys.argv[1]).start('a', work)\n"
        "print('started', os.getsid(0))\n"
    )
    directory, gate = str(tmp_path / "jobs"), tmp_path / "gate"
    # Returns only when every holder of its standard output is gone: a job that held it would block here.
    done = subprocess.run(
        [sys.executable, str(script), directory, str(gate)], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    (status,) = Jobs(directory).wait(["a"], 0)
    assert status.state == "running"
    gate.touch()
    (status,) = Jobs(directory).wait(["a"], 10)
    assert status.state == "done"
    assert str(status.result["session"]) != done.stdout.split()[1]


def test_unwritable_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FleetError) as error:
        Jobs(str(tmp_path / "file" / "jobs")).start("a", lambda report: {})
    assert error.value.reason == "write_failed"
