# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""JSON and numbers that other programs wrote."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._untrusted import (
    MapOf,
    is_digits,
    json_object,
    misfit,
    parse_json,
    real_number,
    strings,
    whole_number,
)
from fuzzing import encodable, json_text, mutated, texts, values
from hypothesis import given

SHAPE = {"State": {"Running": bool, "Pid": int}, "Names": [str], "Labels": MapOf(str)}
FITS = {"State": {"Running": True, "Pid": 7, "New": []}, "Names": ["a"], "Labels": {"a": "b"}, "More": 1}


def test_depth_is_an_error_like_any_other() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    assert json_object("[" * 100_000) == {}


@pytest.mark.parametrize("text", ["", "null", "[]", "5", "{", "\ufeff{}", None])
def test_no_object_is_an_empty_one(text: str | None) -> None:
    assert json_object(text) == {}


def test_numbers() -> None:
    assert whole_number("42") == 42
    assert [whole_number(text, -1) for text in ("", None, "²", "٣", "-1", "1.5", " 1", "9" * 5000)] == [-1] * 8
    assert is_digits("0")
    assert not is_digits("1\n")
    assert real_number(1) == 1.0
    odd: list[t.Any] = [True, None, "1", 10**400, float("nan"), float("inf"), []]
    assert [real_number(value, -1.0) for value in odd] == [-1.0] * 7
    assert strings(["a", 1, None, "b"]) == ["a", "b"]
    assert strings("ab") == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (FITS, ""),
        (None, ""),
        ({"State": None, "Names": None}, ""),
        ({"State": {"Running": 1}}, "State.Running is a number where true or false belongs"),
        ({"State": {"Pid": True}}, "State.Pid is true or false where a whole number belongs"),
        ({"State": "running"}, "State is text where an object belongs"),
        ({"Names": "a"}, "Names is text where a list belongs"),
        ({"Names": [None]}, "Names[] is null where text belongs"),
        ({"Labels": {"a": None}}, ""),
        ({"Names": [{}]}, "Names[] is an object where text belongs"),
        ({"Labels": {"x": 5}}, "Labels.x is a number where text belongs"),
        ({"Labels": []}, "Labels is a list where an object belongs"),
        ([], "it is a list where an object belongs"),
    ],
)
def test_what_does_not_fit_is_named(value: t.Any, problem: str) -> None:
    assert misfit(value, SHAPE) == problem


class Answering(DockerApi):
    def __init__(self, answer: t.Any) -> None:
        super().__init__()
        self.answer = answer

    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        return self.answer


@pytest.mark.parametrize("ask", ["info", "version", "containers", "container", "image"])
def test_another_server_on_dockers_socket(ask: str) -> None:
    api = Answering("<html>hello</html>")
    arguments = ["x"] if ask in ("container", "image") else []
    with pytest.raises(FleetError, match="something else than the Engine API promises") as caught:
        getattr(api, ask)(*arguments)
    assert caught.value.reason == "docker_error"


@given(mutated(FITS, 3))
def test_what_fits_can_be_used(value: t.Any) -> None:
    if misfit(value, SHAPE) or value is None:
        return
    assert (value.get("State") or {}).get("Running") in (True, False, None)
    assert all(isinstance(name, str) for name in value.get("Names") or [])
    assert all(isinstance(label, (str, type(None))) for label in (value.get("Labels") or {}).values())


@given(values)
def test_any_json(value: t.Any) -> None:
    assert isinstance(json_object(json_text(value)), dict)
    assert isinstance(misfit(value, SHAPE), str)


@given(texts)
def test_any_text(text: str) -> None:
    assert isinstance(json_object(encodable(text)), dict)
    assert whole_number(text) >= 0
