# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What gpu_host_plan takes from the roles."""

from __future__ import annotations

import typing as t

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.gpu_fleet.nim.plugins.action import gpu_host_plan as action
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import CHAIN
from ansible_collections.gpu_fleet.nim.plugins.module_utils._wanted_images import wanted_images
from nim_machine import KEY, LLAMA, ROOT, llama, nemo

SECRET = "hf_plan-secret"


def test_every_module_of_every_role_is_in_the_plan() -> None:
    modules = set()
    for folder in (ROOT / "roles").glob("*/tasks"):
        for task in action.tasks_of(str(folder)):
            modules |= {key for key in task if key.startswith("gpu_fleet.nim.")}
    # The preflight looks at what is about to be set up, and sets nothing up itself; a gateway is no GPU host.
    assert modules - {"gpu_fleet.nim.gpu_host_preflight", "gpu_fleet.nim.nim_gateway"} == {
        "gpu_fleet.nim." + name for name in action.parts()
    }
    assert tuple(action.parts()) == CHAIN


def test_options_and_conditions_are_the_roles_own() -> None:
    parts = action.parts()
    assert {name: part.role for name, part in parts.items()}["ngc_login"] == "ngc"
    assert parts["docker_daemon"].options == {
        "options": "{{ docker_daemon_options }}",
        "absent": "{{ docker_daemon_absent }}",
        "live_restore": "{{ docker_live_restore }}",
    }
    # How a call goes is no part of what is wanted.
    assert "progress_interval" not in parts["nim_image"].options
    # What hangs on an earlier task's result is left to the plan's own look.
    assert parts["nvidia_driver_reload"].when == ("nvidia_driver_reload | bool", "nvidia_driver_kernel_module | bool")
    assert parts["docker_group"].when == ("docker_users is defined",)
    assert parts["docker_engine"].when == ()


Rendered = t.Callable[..., "dict[str, t.Any]"]


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> Rendered:
    """Options as the action plugin makes them out of variables."""

    def render(**variables: t.Any) -> dict[str, t.Any]:
        # A unit test has not the plugins that templates name: the lookup of the controller's environment, our own filter.
        keys = {"ngc_api_key": "", "nim_ngc_api_key": "{{ ngc_api_key }}"}
        # The filter of the role is called as it is, on ports that need no template.
        models = [{**model, "port": 8000 + number} for number, model in enumerate(variables.get("nim_models", []))]
        images = {"__nim_images": wanted_images(models)}
        real = action.role_variables
        with monkeypatch.context() as patch:
            patch.setattr(action, "role_variables", lambda kind: {**real(kind), **(images if kind == "vars" else {})})
            plugin = action.ActionModule.__new__(action.ActionModule)
            plugin._templar = Templar(loader=DataLoader(), variables={})
            return t.cast("dict[str, t.Any]", plugin.options(action._trusted({**keys, **variables})))

    return render


def test_role_variables_reach_the_options(rendered: Rendered) -> None:
    options = rendered(
        ngc_api_key=KEY,
        nvidia_driver_version="580.95.05",
        docker_users=["ops"],
        nim_gpu_injection="cdi",
        my_port=8009,
        nim_models=[
            llama(port="{{ my_port }}", disk_space="20GB", secret_environment={"HF_TOKEN": SECRET}),
            nemo(state="absent"),
        ],
    )
    assert list(options) == list(CHAIN)
    assert options["nvidia_driver"]["branch"] == "580"
    assert options["nvidia_driver"]["hold"] is True
    assert options["nvidia_driver_reload"] == {"expected_version": "580.95.05"}
    assert options["docker_group"] == {"users": ["ops"]}
    assert options["nvidia_container_toolkit"]["injection"] == "cdi"
    assert options["nim_service"]["models"][0]["secret_environment"] == {"HF_TOKEN": SECRET}
    # Not needed to ask how it is.
    assert SECRET not in repr(options["nim_health"])
    assert options["ngc_login"]["api_key"] == options["nim_service"]["ngc_api_key"] == KEY
    assert [model["name"] for model in options["nim_health"]["models"]] == ["llama", "nemo"]
    [image] = options["nim_image"]["images"]
    assert (image["image"], image["disk_space"]) == (LLAMA, "20GB")
    assert [model["port"] for model in options["nim_service"]["models"]] == [8009, 8001]


def test_what_the_roles_would_skip_is_not_planned(rendered: Rendered) -> None:
    options = rendered(nvidia_driver_reload=False, nim_models=[])
    assert set(CHAIN) - set(options) == {
        "nvidia_driver_reload",
        "docker_group",
        "nim_image",
        "nim_service",
        "nim_health",
    }
    assert options["nvidia_driver"]["unload"] is False
    removal = rendered(nim_state="absent", nim_models=[llama()])
    assert removal["nim_service"]["state"] == "absent"
    assert "nim_health" not in removal
    for no in (False, "false"):
        assert "nim_health" not in rendered(nim_wait=no, nim_models=[llama()])


def test_a_variable_that_cannot_be_resolved_is_named_without_its_template(rendered: Rendered) -> None:
    with pytest.raises(Exception, match="variables of role ngc") as caught:
        rendered(ngc_api_key="{{ undefined_thing ~ '%s' }}" % KEY)
    assert KEY not in str(caught.value)
