# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The loop that calls a long module in slices, with everything of Ansible around it replaced."""

from __future__ import annotations

import types
import typing as t

import pytest
from ansible.errors import AnsibleConnectionFailure
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils import _progress


class Waiter(_progress.ProgressActionBase):
    module = "gpu_fleet.nim.waiter"


class Display:
    def __init__(self) -> None:
        self.lines: list[tuple[str, bool]] = []

    def display(self, text: str, stderr: bool = False) -> None:
        self.lines.append((text, stderr))


class Run:
    """One task with a scripted module; keeps the calls and the lines shown."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        answers: list[t.Any],
        args: dict[str, t.Any] | None = None,
        **task: t.Any,
    ) -> None:
        self.calls: list[dict[str, t.Any]] = []
        self.async_calls: list[bool] = []
        self.resets = 0
        self.display = Display()
        self.clock = 100.0
        answers = list(answers)

        def execute(
            module_name: str, module_args: dict[str, t.Any], task_vars: dict[str, t.Any], wrap_async: bool
        ) -> dict[str, t.Any]:
            assert module_name == "gpu_fleet.nim.waiter"
            self.calls.append(dict(module_args))
            # ansible-core writes its internal arguments into what it is given
            module_args["_ansible_check_mode"] = False
            self.async_calls.append(wrap_async)
            self.clock += 5
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return dict(answer)

        def reset() -> None:
            self.resets += 1

        fields = {"args": dict(args or {}), "async_val": 0, "check_mode": False, "no_log": False, "action": "waiter"}
        fields.update(task)
        plugin = Waiter.__new__(Waiter)
        plugin._task = types.SimpleNamespace(**fields)
        plugin._connection = types.SimpleNamespace(
            has_native_async=False, reset=reset, _shell=types.SimpleNamespace(tmpdir="/tmp/x")
        )
        plugin._display = self.display
        monkeypatch.setattr(plugin, "_execute_module", execute)
        monkeypatch.setattr(_progress.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(_progress.time, "sleep", self.advance)
        self.plugin = plugin

    def advance(self, seconds: float) -> None:
        self.clock += seconds

    def __call__(self) -> dict[str, t.Any]:
        return self.plugin.run(task_vars={"inventory_hostname": "gpu01"})

    @property
    def lines(self) -> list[str]:
        return [text for text, _stderr in self.display.lines]


def slice_(text: str, **more: t.Any) -> dict[str, t.Any]:
    return {"changed": False, "finished": False, "progress": {"text": text}, "resume": {"at": text}, **more}


def test_nothing_to_wait_for_is_one_call_without_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [{"changed": False, "finished": True, "models": []}], {"models": ["a"]})
    assert run() == {"changed": False, "models": []}
    assert run.calls == [{"models": ["a"]}]
    assert run.lines == []


def test_slices_resume_and_show_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    done = {
        "changed": True,
        "finished": True,
        "progress": {"text": "done"},
        "resume": {},
        "invocation": {"module_args": {"name": "x", "resume": {"at": "b"}}},
    }
    run = Run(monkeypatch, [slice_("a"), slice_("b"), done], {"name": "x"})
    assert run() == {"changed": True, "invocation": {"module_args": {"name": "x"}}}
    assert run.calls == [{"name": "x"}, {"name": "x", "resume": {"at": "a"}}, {"name": "x", "resume": {"at": "b"}}]
    assert run.display.lines == [("[gpu01] a", True), ("[gpu01] b", True)]


def test_same_line_is_not_repeated_until_a_minute_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [slice_("same")] * 15 + [{"changed": False}])
    run()
    assert run.lines == ["[gpu01] same"] * 2


def test_changed_and_warnings_of_every_slice_count(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        slice_("a", changed=True, warnings=["w1"]),
        slice_("b", warnings=["w1", "w2"]),
        {"changed": False, "finished": True},
    ]
    assert Run(monkeypatch, answers)() == {"changed": True, "warnings": ["w1", "w2"]}


def test_failure_ends_the_loop_and_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [slice_("a"), {"failed": True, "finished": False, "msg": "it ended", "reason": "container_ended"}]
    assert Run(monkeypatch, answers)() == {
        "changed": False,
        "failed": True,
        "msg": "it ended",
        "reason": "container_ended",
    }


def test_a_crash_without_protocol_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [{"failed": True, "msg": "MODULE FAILURE"}])
    assert run()["msg"] == "MODULE FAILURE"
    assert len(run.calls) == 1


def test_no_log_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [slice_("secret"), {"changed": False}], no_log=True)
    run()
    assert run.lines == []


def test_text_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [slice_("a\n  b\tc"), {"changed": False}])
    run()
    assert run.lines == ["[gpu01] a b c"]


def test_async_runs_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {"ansible_job_id": "j1", "finished": 0, "started": 1, "changed": True}
    run = Run(monkeypatch, [started], {"name": "x", "progress_interval": 5}, async_val=600)
    assert run() == started
    assert run.calls == [{"name": "x", "progress_interval": 0}]
    assert run.async_calls == [True]


def test_connection_lost_between_slices_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = AnsibleConnectionFailure("gone")
    run = Run(monkeypatch, [slice_("a"), lost, lost, {"changed": False, "finished": True}])
    assert run() == {"changed": False}
    assert run.resets == 2
    assert [call.get("resume") for call in run.calls] == [None, {"at": "a"}, {"at": "a"}, {"at": "a"}]


def test_connection_that_stays_lost_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = AnsibleConnectionFailure("gone")
    run = Run(monkeypatch, [slice_("a"), lost, lost, lost, lost])
    with pytest.raises(AnsibleConnectionFailure):
        run()


def test_first_call_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, [AnsibleConnectionFailure("gone")])
    with pytest.raises(AnsibleConnectionFailure):
        run()
    assert len(run.calls) == 1


def test_what_a_host_shows_is_one_line_that_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = slice_("a\r\n[gpu02] ready \x1b[2J\x9b31m\ud800" + "x" * 1_000_000, warnings="text")
    run = Run(monkeypatch, [odd, slice_("", progress=[1], resume=7, warnings={"a": 1}), {"changed": False}])
    assert run() == {"changed": False}
    first, second = run.lines
    assert first.startswith("[gpu01] a [gpu02] ready \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}31m")
    assert len(first) < 2100
    assert second == "[gpu01] [1]"


def test_eight_models_of_a_host_are_all_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = "llama-3-1-70b-%d downloading the model 45 %%, about 100.0 GB, 1000 s of 1800 s"
    run = Run(monkeypatch, [slice_("; ".join(model % number for number in range(8))), {"changed": False}])
    run()
    assert (model % 7) in run.lines[0]
