# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules around Docker as Ansible calls them: check, real, check, real, and what they answer."""

from __future__ import annotations

import importlib
import json
import typing as t

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _docker_daemon_planner, _module, _module_progress
from docker_fakes import CONFIG, FakeDockerd
from fake_host import FakeHost

MODULES = "ansible_collections.gpu_fleet.nim.plugins.modules."


@pytest.fixture
def call(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> t.Callable[..., dict[str, t.Any]]:
    dockerd = FakeDockerd(host)
    for shell in (_module, _module_progress):
        monkeypatch.setattr(shell, "Host", lambda: host)
    monkeypatch.setattr(_docker_daemon_planner, "DockerApi", lambda: dockerd)

    def run(name: str, check: bool = False, **arguments: t.Any) -> dict[str, t.Any]:
        module = importlib.import_module(MODULES + name)
        arguments.update(_ansible_check_mode=check, _ansible_diff=True)
        with patch_module_args(arguments), pytest.raises(SystemExit):
            module.main()
        return t.cast("dict[str, t.Any]", json.loads(capsys.readouterr().out))

    return run


def test_docker_daemon(host: FakeHost, call: t.Callable[..., dict[str, t.Any]]) -> None:
    host.files[CONFIG] = b'{\n  "debug": false\n}\n'
    arguments = {"live_restore": True, "options": {"labels": ["fleet=gpu"]}}
    answers = [call("docker_daemon", check, **arguments) for check in (True, False, True, False)]
    assert [answer["changed"] for answer in answers] == [True, True, False, False]
    diff = [
        {
            "before_header": CONFIG,
            "after_header": CONFIG,
            "before": '{\n  "debug": false\n}\n',
            "after": '{\n  "debug": false,\n  "labels": [\n    "fleet=gpu"\n  ],\n  "live-restore": true\n}\n',
        }
    ]
    assert [answer["diff"] for answer in answers] == [diff, diff, [], []]
    assert answers[0]["changes"] == answers[1]["changes"]
    assert answers[1]["changes"][0]["disruption"] == "reload"
    assert answers[3]["live"]["live_restore"] is True
    assert answers[3]["config_file"] == CONFIG


def test_docker_daemon_says_what_it_left_out(host: FakeHost, call: t.Callable[..., dict[str, t.Any]]) -> None:
    answer = call("docker_daemon", options={"log-driver": "journald"}, live_restore=False)
    assert answer["blocked"] == []
    _docker_daemon_planner.DockerApi().add_container("nim-llama")  # type: ignore[attr-defined] # the fake of the fixture
    answer = call("docker_daemon", options={"log-driver": "local"}, live_restore=False)
    assert not answer["changed"]
    assert "nim-llama" in answer["blocked"][0]["blocked"]
    assert "nim-llama" in answer["msg"]


def test_docker_daemon_errors(host: FakeHost, call: t.Callable[..., dict[str, t.Any]]) -> None:
    host.files[CONFIG] = b"{"
    answer = call("docker_daemon", options={"debug": True})
    assert (answer["failed"], answer["changed"], answer["reason"]) == (True, False, "daemon_json_invalid")
    answer = call("docker_daemon", options={"features": {"cdi": "yes"}})
    assert answer["reason"] == "invalid_option"
    assert "options.features.cdi = yes" in answer["msg"]


def test_docker_group(host: FakeHost, call: t.Callable[..., dict[str, t.Any]]) -> None:
    host.files["/etc/passwd"] = b"alice:x:1000:1000::/h:/bin/sh\n"
    host.files["/etc/group"] = b"docker:x:999:eve\n"

    def gpasswd(fake: FakeHost, argv: tuple[str, ...], *_: t.Any) -> str:
        fake.files["/etc/group"] = b"docker:x:999:alice,eve\n" if argv[1] == "-a" else b"docker:x:999:alice\n"
        return ""

    host.commands["gpasswd *"] = gpasswd
    answers = [call("docker_group", check, users=["alice"]) for check in (True, False, True, False)]
    assert [answer["changed"] for answer in answers] == [True, True, False, False]
    assert answers[0]["diff"] == answers[1]["diff"]
    assert answers[0]["diff"][0]["before"] == "member eve: docker\n"
    assert answers[0]["diff"][0]["after"] == "member alice: docker\n"
    assert answers[3]["members"] == ["alice"]
    assert call("docker_group", users=["bob"])["reason"] == "unknown_user"


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("docker_engine", {"version": "29.5.1"}, "cannot pull from nvcr.io"),
        ("docker_engine", {"package_source": "snap"}, "package_source"),
        ("nvidia_container_toolkit", {"version": "2.0"}, "version = 2.0"),
        ("nvidia_container_toolkit", {"mode": "fast"}, "mode"),
        ("nvidia_container_toolkit", {"repository_url": "mirror"}, "repository_url = mirror"),
        ("docker_group", {"users": ["a b"]}, "users = 'a b'"),
        ("docker_group", {}, "users"),
        ("docker_daemon", {"unknown": 1}, "unknown"),
    ],
)
def test_bad_options(
    host: FakeHost, call: t.Callable[..., dict[str, t.Any]], name: str, arguments: dict[str, t.Any], text: str
) -> None:
    answer = call(name, **arguments)
    assert answer["failed"]
    assert text in answer["msg"]
    assert host.calls == []


def test_engine_and_toolkit_on_a_system_without_apt_or_dnf(
    host: FakeHost, call: t.Callable[..., dict[str, t.Any]]
) -> None:
    host.files["/etc/os-release"] = b"ID=arch\nPRETTY_NAME=Arch\n"
    for name in ("docker_engine", "nvidia_container_toolkit"):
        answer = call(name)
        assert (answer["reason"], answer["changed"]) == ("unsupported_os", False)
