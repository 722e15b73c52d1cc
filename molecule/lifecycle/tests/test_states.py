# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator asks for: stopped, absent, started; failures while starting; time limits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from fleet_testing import Fleet, wait_until

FLEET = Fleet("lifecycle")
HOST = FLEET.host("gpu01")


@pytest.fixture(scope="module", autouse=True)
def end_as_begun() -> Iterator[None]:
    yield
    FLEET.nim()


def start_with(environment: dict[str, str], succeeds: bool = True, **values: object) -> object:
    changed = FLEET.changed("gpu01", "nemotron", environment=environment, **values)
    return FLEET.nim(changed, succeeds=succeeds)


def test_stopped_absent_started() -> None:
    before = HOST.identity()
    stopped = FLEET.changed("gpu01", "nemotron", state="stopped")
    FLEET.nim(stopped)
    assert HOST.unit("nemotron", "ActiveState", "UnitFileState") == {
        "ActiveState": "inactive",
        "UnitFileState": "disabled",
    }
    assert not HOST.container_state("nemotron")["Running"]
    assert FLEET.nim(stopped).changed() == []
    # nim.target starts what belongs to it, and a stopped model does not.
    HOST.run("systemctl restart nim.target")
    HOST.wait_ready(8000)
    assert not HOST.container_state("nemotron")["Running"]
    before["llama"] = HOST.identity("llama")["llama"]

    absent = FLEET.changed("gpu01", "nemotron", state="absent")
    FLEET.nim(absent)
    assert HOST.container_state("nemotron") is None
    assert HOST.unit("nemotron", "LoadState")["LoadState"] == "not-found"
    assert not HOST.succeeds("ls /etc/nim/nemotron.json /run/nim/nemotron.json /var/lib/nim/state/nemotron*")
    # It cost an hour of download, and only its name brings that back.
    assert HOST.succeeds('test -n "$(ls -A /var/lib/nim/cache/nemotron)"')
    assert FLEET.nim(absent).changed() == []

    run = FLEET.nim()
    assert run.restarts(HOST.name) == {"nim-nemotron.service"}
    HOST.wait_ready(8001, seconds=1)
    assert HOST.identity("llama")["llama"] == before["llama"]


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ("eng-21a", "memory"),
        # Recorded of a refused key: exit code 0 before anything served.
        ("nim-08", "key"),
    ],
)
def test_crash_loop_is_said_within_seconds(failure: str, cause: str) -> None:
    before = HOST.identity("llama")
    run = start_with({"STANDIN_FAIL": failure}, succeeds=False)
    message = run.failure(HOST.name)
    assert "nemotron did not start" in message
    assert cause in message.lower()
    # The budget of a start is half an hour; a busy machine may need a minute.
    assert run.seconds < 60
    # The unit goes on trying, with a pause in between, and says that it failed.
    wait_until(lambda: HOST.read_json("/run/nim/nemotron.json")["failures"] >= 2, "a second failure is counted", 30)
    assert HOST.identity("llama") == before


@pytest.mark.skipif(not os.environ.get("TEST_FULL"), reason="the pauses between the starts take long; TEST_FULL=1")
def test_failing_starts_end_at_the_start_limit() -> None:
    run = start_with({"STANDIN_FAIL": "nim-14"}, succeeds=False)
    assert "NIM_LOG_LEVEL" in run.failure(HOST.name)
    wait_until(lambda: HOST.active("nemotron") == "failed", "systemd gave up", 90, 1)
    assert "Start request repeated too quickly" in HOST.run("journalctl --no-pager -u nim-nemotron -n 20")
    run = FLEET.nim()
    assert run.restarts(HOST.name) == {"nim-nemotron.service"}
    HOST.wait_ready(8001, seconds=1)


def test_start_timeout() -> None:
    run = start_with({"STANDIN_LOAD_SECONDS": "60"}, succeeds=False, start_timeout=10)
    message = run.failure(HOST.name)
    assert "not ready after 1" in message and "start_timeout" in message
    # It is late, not wrong: it may go on loading.
    assert HOST.active("nemotron") == "active"


def test_stop_timeout() -> None:
    start_with({"STANDIN_IGNORE_SIGTERM": "1"}, stop_timeout=3)
    began = time.monotonic()
    HOST.run("systemctl stop nim-nemotron")
    assert 3 <= time.monotonic() - began < 10
    state = HOST.container_state("nemotron")
    assert not state["Running"] and state["ExitCode"] == 137

    start_with({"STANDIN_STOP_SECONDS": "4"}, stop_timeout=20)
    began = time.monotonic()
    HOST.run("systemctl stop nim-nemotron")
    assert 4 <= time.monotonic() - began < 15
    state = HOST.container_state("nemotron")
    assert not state["Running"] and state["ExitCode"] == 0
    assert HOST.unit("nemotron", "ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
