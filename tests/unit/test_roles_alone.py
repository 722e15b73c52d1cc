# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A role by itself, with none of the others' variables, and all of them without an NGC key."""

from __future__ import annotations

import pathlib
import typing as t

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.module_utils.parsing.convert_bool import boolean
from ansible_collections.gpu_fleet.nim.plugins.action import gpu_host_plan as action
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import plan_host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import CHAIN, RESOURCE_OPTIONS
from driver_world import DriverWorld
from nim_machine import llama
from test_host_plan import Down, bare

__all__ = ["bare"]

ROLES = pathlib.Path(__file__).resolve().parents[2] / "roles"
#: Those whose options the look at a GPU host renders. For that of the gateway see test_gateway_role.py, for those of rollouts
#: test_rollout_playbooks.py.
NAMES = sorted({path.name for path in ROLES.iterdir()} - {"nim_gateway", "drain", "driver_upgrade", "nim_deploy"})
PUBLIC = {"nim_models": [llama(image="docker.io/example/public-nim:1.0")]}


def load(path: pathlib.Path) -> t.Any:
    return yaml.safe_load(path.read_text()) if path.exists() else None


def variables_of(*roles: str) -> dict[str, t.Any]:
    found: dict[str, t.Any] = {}
    for kind in ("defaults", "vars"):
        for role in roles:
            found.update(load(ROLES / role / kind / "main.yml") or {})
    return found


def options(roles: t.Sequence[str], **inventory: t.Any) -> dict[str, dict[str, t.Any]]:
    """What the modules get, rendered with the variables of these roles alone; a name that is not there is an error."""
    variables = {**variables_of(*roles), **inventory}

    def render(template: t.Any) -> t.Any:
        return action._EXPRESSIONS.render(template, variables)

    return {
        resource: {name: render(value) for name, value in part.options.items()}
        for resource, part in action.parts().items()
        if part.role in roles and all(boolean(render("{{ %s }}" % condition)) for condition in part.when)
    }


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NGC_API_KEY", raising=False)


@pytest.mark.parametrize("role", NAMES)
def test_a_role_needs_no_variable_of_another_one(role: str) -> None:
    found = options([role], **(PUBLIC if role == "nim" else {}))
    assert found
    for name, given in found.items():
        assert not ArgumentSpecValidator(RESOURCE_OPTIONS[name]).validate(given).error_messages, name


def test_roles_follow_each_other_where_they_are_together() -> None:
    together = options(["nim", "ngc", "nvidia_container_toolkit"], nim_gpu_injection="cdi", ngc_api_key="k", **PUBLIC)
    assert together["nvidia_container_toolkit"]["injection"] == "cdi"
    assert together["nim_service"]["ngc_api_key"] == together["nim_image"]["api_key"] == "k"
    assert options(["nvidia_container_toolkit"])["nvidia_container_toolkit"]["injection"] == "runtime"
    assert options(["nim"], ngc_state="absent", **PUBLIC)["nim_service"]["ngc_key_state"] == "absent"


def test_a_host_without_any_key_gets_everything_but_a_login(bare: DriverWorld) -> None:
    wanted = options(NAMES, **PUBLIC)
    given = {
        name: ArgumentSpecValidator(RESOURCE_OPTIONS[name]).validate(entry).validated_parameters
        for name, entry in wanted.items()
    }
    assert given["nim_service"]["ngc_api_key"] == given["nim_image"]["api_key"] == ""
    answer = plan_host(bare, given, t.cast(t.Any, Down())).result()
    assert answer["errors"] == []
    assert {change["resource"] for change in answer["changes"]} == set(CHAIN) - {
        "docker_group",
        "ngc_login",
        "nim_health",
    }
    assert not [change for change in answer["changes"] if "ngc.env" in str(change)]
