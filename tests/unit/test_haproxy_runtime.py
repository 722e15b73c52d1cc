# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What HAProxy's master process says of processes that a reload has left, and what its silence means."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _haproxy_runtime
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._haproxy_runtime import RuntimeApi

PROCESSES = """\
#<PID>          <type>          <reloads>       <uptime>        <version>
10              master          1               0d00h00m05s     2.6.12
# workers
30              worker          0               0d00h00m01s     2.6.12
# old workers
20              worker          1               0d00h00m05s     2.6.12
# programs

"""
STAT = """\
# pxname,svname,scur,qcur,status,type
llama,gpu01:llama,1,0,UP,2
llama,gpu02:llama,0,0,UP,2
"""
SERVERS = ("gpu01:llama", "gpu02:llama")


class Master:
    """Answers, one after the other; an exception is raised. The last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: t.Sequence[t.Any]) -> None:
        self.answers = {command.replace("_", " "): list(given) for command, given in answers.items()}
        self.clock = 0.0
        monkeypatch.setattr(_haproxy_runtime, "ask", self.ask)
        monkeypatch.setattr(_haproxy_runtime.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(_haproxy_runtime.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds

    def ask(self, _path: str, command: str) -> str:
        given = next(answers for key, answers in self.answers.items() if key in command)
        answer = given.pop(0) if len(given) > 1 else given[0]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    def requests(self) -> t.Dict[str, int]:
        return RuntimeApi("/run/socket", "/run/master")._earlier_requests(SERVERS)


REFUSED = ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize("silence", [[], [REFUSED], [REFUSED, "", "\n"], [TimeoutError("timed out")]])
def test_a_master_that_starts_anew_is_asked_again(monkeypatch: pytest.MonkeyPatch, silence: list[t.Any]) -> None:
    master = Master(monkeypatch, show_proc=[*silence, PROCESSES], show_stat=[STAT])
    assert master.requests() == {"gpu01:llama": 1, "gpu02:llama": 0}


def test_a_process_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    master = Master(monkeypatch, show_proc=[PROCESSES], show_stat=[ConnectionResetError(), "", STAT], show_info=[""])
    assert master.requests() == {"gpu01:llama": 1, "gpu02:llama": 0}


def test_a_process_that_is_gone_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = PROCESSES.replace("20 ", "#  ")
    said = "Can't find the target PID matching the prefix '@!20'.\n"
    master = Master(monkeypatch, show_proc=[PROCESSES, gone], show_stat=[said], show_info=[said])
    assert not any(master.requests().values())


@pytest.mark.parametrize("said", [REFUSED, "", "Permission denied\n"])
def test_silence_is_not_believed(monkeypatch: pytest.MonkeyPatch, said: t.Any) -> None:
    master = Master(monkeypatch, show_proc=[said])
    with pytest.raises(FleetError, match="requests of before a reload failed") as caught:
        master.requests()
    assert caught.value.reason == "gateway_unreachable" and 9 < master.clock < 12


def test_without_a_master_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Master(monkeypatch, show_proc=[FileNotFoundError()]).requests() == {}
    assert RuntimeApi("/run/socket")._earlier_requests(SERVERS) == {}
