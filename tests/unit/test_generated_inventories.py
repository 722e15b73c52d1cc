# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every option of every role with values of every wrong type: refused with the variable, the value and what to do."""

from __future__ import annotations

import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.action.validate_inventory import load_specs
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._inventory import Problem, Unresolved, report, validate
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import MASK
from fuzzing import mutated, only_told, texts, values
from hypothesis import example, given
from hypothesis import strategies as st

SPECS = load_specs()
IMAGE = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
SECRET = "nvapi-0123456789abcdefSECRET"
#: Values that no option of the type takes; null is left out below where it means the default.
WRONG: dict[str, list[t.Any]] = {
    "str": [["x"], {"a": "b"}, []],
    "path": [["x"], {"a": "b"}, 5],
    "bool": ["maybe", "", 2, -1, 0.5, [], [True], {}, {"a": True}],
    "int": ["x", "", "5s", "1.5", 1.5, [], [1], {}, {"a": 1}],
    "float": ["x", "", [], [1], {}],
    "list": ["x", 5, True, {"a": "b"}, {}],
    "dict": ["x", 5, True, ["a"], [["a", "b"]]],
}


def _options() -> list[tuple[str, dict[str, t.Any]]]:
    return [(name, option) for role in SPECS.values() for name, option in role.items()]


def _wrong_values(option: dict[str, t.Any]) -> list[t.Any]:
    found: list[t.Any] = [None, *WRONG.get(str(option.get("type", "str")), [])]
    if option.get("choices"):
        found += ["no such choice", option["choices"][0] + "x" if isinstance(option["choices"][0], str) else -5]
    return found


def _rows() -> list[tuple[dict[str, t.Any], str]]:
    rows: list[tuple[dict[str, t.Any], str]] = []
    for name, option in _options():
        # No key at all is a key that is not given.
        least = 1 if name.endswith("api_key") else 0
        rows += [({name: value}, name) for value in _wrong_values(option)[least:]]
        rows.append(({name: Unresolved("'other' is undefined")}, name))
        # Many roles of other people have variables that begin with docker_.
        if not name.startswith("docker_"):
            rows.append(({name[:-1] + "_x": "value"}, name[:-1] + "_x"))
    for name, option in SPECS["nim"]["nim_models"]["options"].items():
        for value in _wrong_values(option):
            # What a model does not say, or says with an empty text, has its default.
            if value not in (None, "") or option.get("required"):
                rows.append(({"nim_models": [{"name": "llama", "image": IMAGE, name: value}]}, "nim_models[0]." + name))
    rows += [
        ({"nim_models": [{"name": "llama", "image": IMAGE, "x" + name: 1}]}, "nim_models[0].x" + name)
        for name in SPECS["nim"]["nim_models"]["options"]
    ]
    return rows


ROWS = _rows()


#: With what a remedy begins.
VERBS = ("choose", "copy", "correct", "create", "did", "give", "leave", "make", "name")
VERBS += ("put", "remove", "set", "start", "store", "use", "write")


def _check(problem: Problem) -> None:
    assert problem.message.startswith(problem.variable + " = "), problem.message
    shown, colon, rest = problem.message[len(problem.variable) + 3 :].partition(": ")
    assert shown
    # Under a name that tells a secret the mask covers what follows up to the next blank.
    assert colon or shown.startswith(MASK)
    # What is wrong, and what to do about it: a sentence in the imperative.
    remedies = [part.split() for part in (rest or shown).split("; ")[1:]]
    assert [words for words in remedies if words and words[0] in VERBS and len(words) > 1], problem.message
    assert problem.message.endswith(".")
    assert "\n" not in problem.message
    assert "SECRET" not in problem.message


@pytest.mark.parametrize(
    ("variables", "variable"), ROWS, ids=["%d-%s" % (number, row[1]) for number, row in enumerate(ROWS)]
)
def test_refused(variables: dict[str, t.Any], variable: str) -> None:
    problems = validate(variables, SPECS)
    assert [problem for problem in problems if problem.variable.startswith(variable)], variables
    unresolved = any(isinstance(value, Unresolved) for value in variables.values())
    for problem in problems:
        if unresolved:
            # Nobody knows its value.
            assert problem.message.startswith(variable + ": its template cannot be resolved (")
            assert problem.message.endswith("; correct the template or set what it needs.")
        else:
            _check(problem)
    for name, value in _harmless(variables):
        [problem] = [problem for problem in problems if problem.variable == name]
        assert problem.message.startswith("%s = %s: " % (name, value))


def _harmless(variables: dict[str, t.Any]) -> t.Iterator[tuple[str, t.Any]]:
    """Numbers and switches, which are shown as they are, but for those of secrets."""
    entries = dict(variables)
    models = entries.get("nim_models")
    if isinstance(models, list) and models and isinstance(models[0], dict):
        entries = {"nim_models[0]." + key: value for key, value in models[0].items() if key not in ("name", "image")}
    for name, value in entries.items():
        if isinstance(value, (bool, int, float)) and not re.search("key|secret|certificate", name):
            yield name, value


def test_there_are_enough() -> None:
    assert len(ROWS) >= 300
    assert {name for name, _option in _options()} <= {row[1] for row in ROWS}


SOUND: dict[str, t.Any] = {
    "nvidia_driver_branch": "580",
    "nvidia_driver_version": "580.95.05",
    "nvidia_driver_reboot": False,
    "nvidia_driver_reboot_timeout": 1200,
    "docker_users": ["alice"],
    "docker_version": "28.5.1",
    "docker_daemon_options": {"log-opts": {"max-size": "10m"}, "features": {"cdi": True}},
    "nvidia_container_toolkit_mode": "auto",
    "ngc_api_key": SECRET,
    "ngc_registry": "nvcr.io",
    "nim_registry_mirrors": {"nvcr.io": "mirror.example.org:5000/ngc"},
    "nim_models": [
        {"name": "a", "image": IMAGE, "gpus": [0], "port": 8000, "environment": {"NIM_LOG_LEVEL": "INFO"}},
        {"name": "b", "image": IMAGE, "gpus": 1, "port": 8001, "secret_environment": {"HF_TOKEN": "hf_SECRET"}},
    ],
}


def test_the_sound_one_is_sound() -> None:
    assert validate(SOUND, SPECS) == []


@given(mutated(SOUND, 4))
@example({"docker_daemon_options": {"features": {"etc/passwd": None}}})
def test_any_inventory(variables: t.Any) -> None:
    """No crash, no secret, and what is let through is what the modules take."""
    if not isinstance(variables, dict):
        return
    named = {str(name): value for name, value in variables.items()}
    with only_told():
        problems = validate(named, SPECS)
        for problem in problems:
            _check(problem)
        assert isinstance(report({"gpu01": problems}), list)
    models = named.get("nim_models", [])
    if not any(problem.variable.startswith("nim_models") for problem in problems):
        parse_models(models)


@given(st.dictionaries(texts | st.sampled_from([name for name, _option in _options()]), values, max_size=4))
def test_any_variables(variables: dict[str, t.Any]) -> None:
    with only_told():
        for problem in validate(variables, SPECS):
            _check(problem)


@given(mutated(SOUND["nim_models"], 4))
def test_models_are_judged_alike_before_and_on_the_host(models: t.Any) -> None:
    problems = validate({"nim_models": models}, SPECS)
    try:
        parse_models(models)
    except FleetError:
        assert problems
