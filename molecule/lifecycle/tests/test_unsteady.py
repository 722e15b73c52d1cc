# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A NIM that becomes ready and dies two seconds later, again and again, and then no more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fleet_testing import Fleet, wait_until

FLEET = Fleet("lifecycle")
HOST = FLEET.host("gpu01")
#: It dies 2 s after it is ready when this file is there; the cache is where a container sees the host.
ORDER = "/var/lib/nim/cache/nemotron/die"
UNSTEADY = {
    "STANDIN_FAIL": "eng-21a",
    "STANDIN_FAIL_PHASE": "serving",
    "STANDIN_FAIL_AFTER": "2",
    "STANDIN_FAIL_WHEN": "/opt/nim/.cache/die",
    "STANDIN_LOAD_SECONDS": "0.2",
    "STANDIN_GRAPH_SECONDS": "0.2",
}
#: Seconds of service after which the wrapper forgets.
STEADY_SECONDS = 30


@pytest.fixture(autouse=True)
def end_as_begun() -> Iterator[None]:
    yield
    HOST.run("rm -f " + ORDER)
    FLEET.nim()


def word() -> dict[str, int]:
    return HOST.read_json("/run/nim/nemotron.json")


def test_a_nim_that_dies_whenever_it_was_ready() -> None:
    before = HOST.identity("llama")
    inventory = FLEET.changed("gpu01", "nemotron", environment=UNSTEADY)
    FLEET.nim(inventory)
    assert (word()["unsteady"], word()["failures"]) == (0, 0)
    began = HOST.run("date +%s")
    HOST.run("touch " + ORDER)
    # More often than a unit may fail in a row, for it never failed to start: systemd goes on, and nobody waits in between.
    allowed = int(HOST.unit("nemotron", "StartLimitBurst")["StartLimitBurst"])
    wait_until(lambda: word()["unsteady"] > allowed, "the wrapper counts the ends after ready", 120)
    journal = HOST.run("journalctl --no-pager -u nim-nemotron --since @" + began)
    assert journal.count("soon after it was ready") > allowed
    assert "starts failed in a row" not in journal and "repeated too quickly" not in journal, journal
    assert HOST.unit("nemotron", "Result")["Result"] != "start-limit-hit"

    # It answers most of the time, and must not pass for ready: the end comes, with what the engine said.
    run = FLEET.nim(inventory, succeeds=False)
    message = run.failure(HOST.name)
    assert "nemotron" in message and "ended" in message, message
    assert "does not fit into GPU memory" in message and "max_model_length" in message, message
    assert "nemotron ready" not in run.output
    assert HOST.identity("llama") == before

    # The cause is gone. What answers now has to last before it is believed.
    HOST.run("rm " + ORDER)
    HOST.wait_ready(8001)
    wait_until(lambda: word()["phase"] == "ready", "the wrapper has seen it")
    assert word()["unsteady"] > allowed
    run = FLEET.nim(inventory)
    assert run.changed() == []
    assert "watching whether it stays" in run.output
    assert run.seconds > STEADY_SECONDS / 2
    assert (word()["unsteady"], word()["failures"]) == (0, 0)
    # And the next run is told at once.
    assert "watching whether it stays" not in FLEET.nim(inventory).output
