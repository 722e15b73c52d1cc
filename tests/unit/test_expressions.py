# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles' templates without ansible-core's template engine: the same values, or none."""

from __future__ import annotations

import typing as t

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.gpu_fleet.nim.plugins.action import gpu_host_plan as action
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._expressions import Expressions, NotPlainError


def expressions(*templates: str) -> Expressions:
    found = Expressions()
    for template in templates:
        found.learn(template)
    return found


def templates() -> list[str]:
    """Every template of the roles that this collection itself renders."""
    found = []
    for part in action.parts().values():
        found += ["{{ %s }}" % condition for condition in part.when] + list(part.options.values())
    return sorted({text for text in found if isinstance(text, str) and "lookup" not in text})


@pytest.mark.parametrize(
    "changes", [{}, {"docker_users": ["ops"], "nim_state": "absent", "nvidia_driver_reload": "no"}]
)
@pytest.mark.parametrize("template", templates())
def test_the_same_value_as_ansible_core(template: str, changes: dict[str, t.Any]) -> None:
    variables = {**action.role_variables("defaults"), "nim_models": [], "__nim_images": [], "ngc_api_key": "k"}
    variables = {**variables, "__ngc_api_key": "k", "nim_ngc_api_key": "k", "ngc_state": "present", **changes}
    templar = Templar(loader=DataLoader(), variables=variables)
    try:
        value = action._EXPRESSIONS.render(template, variables)
    except NotPlainError:
        assert "docker_users" in template
        assert "docker_users" not in variables
    else:
        assert value == templar.template(action._trusted(template))


def test_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", "nvapi-1")
    variables = {**action.role_variables("defaults"), **action.role_variables("vars")}
    documented = {**variables, "ngc_api_key": "{{ lookup('ansible.builtin.env', 'NGC_API_KEY') }}"}
    for value in (variables, documented):
        assert action._EXPRESSIONS.render("{{ nim_ngc_api_key }}", value) == "nvapi-1"


def test_templates_that_variables_lead_to_are_learnt_and_no_others() -> None:
    found = Expressions()
    found.learn_reached(
        ["{{ a }}", 1], {"a": "{{ b | bool }}", "b": "{{ c or d }}", "d": [], "other": "{{ c and d }}", "c": "{{ a }}"}
    )
    assert found.render("{{ a }}", {"a": "{{ b | bool }}", "b": "{{ c or d }}", "c": "yes", "d": ""}) is True
    with pytest.raises(NotPlainError):
        found.render("{{ c and d }}", {"c": True, "d": True})


def test_whatever_the_plan_renders_of_the_roles_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGC_API_KEY", "nvapi-1")
    variables = {**action.role_variables("defaults"), **action.role_variables("vars")}
    variables |= {"docker_users": ["ops"], "nim_models": [{"name": "a", "image": "nvcr.io/nim/meta/a:1"}]}
    for template in [*templates(), "{{ __nim_images }}", "{{ __ngc_api_key }}"]:
        action._EXPRESSIONS.render(template, variables)


def test_what_an_inventory_gives_as_a_template_is_left_to_ansible_core() -> None:
    found = expressions("{{ a }}")
    assert found.render("{{ a }}", {"a": [1, {"b": "c"}]}) == [1, {"b": "c"}]
    for value in ("{{ b }}", ["{{ b }}"], {"x": "{% if b %}1{% endif %}"}, object()):
        with pytest.raises(NotPlainError):
            found.render("{{ a }}", {"a": value, "b": 1})


@pytest.mark.parametrize(
    "template",
    [
        "{{ a }}{{ a }}",
        "{{ lookup('ansible.builtin.file', '/etc/hosts') }}",
        "{{ a | unknown }}",
        "{{ nowhere }}",
        "{{ a.b",
    ],
)
def test_what_it_does_not_know_it_does_not_guess(template: str) -> None:
    with pytest.raises(NotPlainError):
        expressions(template).render(template, {"a": "x"})
