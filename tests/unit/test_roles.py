# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Roles: specification, defaults and the modules behind them say the same."""

from __future__ import annotations

import pathlib
import re
import typing as t

import pytest
import yaml
from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_plan import tasks_of
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_branches import branch_names
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_gateway_planner import GATEWAY_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS

ROLES = sorted(path for path in (pathlib.Path(__file__).resolve().parents[2] / "roles").iterdir())
#: A gateway is no resource of a GPU host.
OPTIONS = {**RESOURCE_OPTIONS, "nim_gateway": GATEWAY_OPTIONS}
#: Variables that are not set by default, and why.
UNSET = {"docker_users": "undefined leaves the group alone", "drain_models": "undefined means all"}
#: Options whose meaning in a role is not the module's alone.
OWN_DEFAULT = {"nim_models", "nvidia_driver_reload", "nvidia_container_toolkit_injection"}


def load(role: pathlib.Path, name: str) -> t.Any:
    return yaml.safe_load((role / name).read_text())


def options_of(role: pathlib.Path) -> dict[str, t.Any]:
    return t.cast("dict[str, t.Any]", load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"])


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_variable_is_specified_and_has_a_commented_default(role: pathlib.Path) -> None:
    defaults, options = load(role, "defaults/main.yml"), options_of(role)
    assert set(options) - set(UNSET) == set(defaults)
    text = (role / "defaults/main.yml").read_text()
    for name, option in options.items():
        assert name.startswith((role.name + "_", "nim_"))
        assert option["type"] and option["description"], name
        if "default" in option:
            assert option["default"] == defaults[name], name
        # A comment, a blank line or an example stands above it.
        assert re.search(r"(?m)^#.*\n(?:# .*\n)*(?:# )?%s:" % name, text) or "# %s:" % name in text, name


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_are_what_the_modules_take(role: pathlib.Path) -> None:
    options, compared = options_of(role), 0
    for task in tasks_of(str(role / "tasks")):
        for key, given in task.items():
            module = key.rpartition(".")[2]
            if not key.startswith("gpu_fleet.nim.") or module not in OPTIONS:
                continue
            for option, template in given.items():
                variable = re.fullmatch(r"\{\{ (\w+) \}\}", str(template))
                spec = OPTIONS[module].get(option)
                if variable is None or spec is None or variable.group(1) not in options:
                    continue
                said = options[variable.group(1)]
                compared += 1
                assert said["type"] == spec["type"], variable.group(1)
                branches = branch_names() if variable.group(1) == "nvidia_driver_branch" else None
                assert said.get("choices") == ((branches and list(branches)) or spec.get("choices")), variable.group(1)
                if "default" in spec and "default" in said and variable.group(1) not in OWN_DEFAULT:
                    assert said["default"] == spec["default"], variable.group(1)
    # Those take the options of others by way of an action plugin, or have no resource of their own.
    assert compared >= 3 or role.name in ("driver_upgrade", "nim_deploy", "drain")
