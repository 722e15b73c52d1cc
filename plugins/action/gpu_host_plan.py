# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of the collection's roles, as the roles give them to their modules."""

from __future__ import annotations

import os
import typing as t

import yaml
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase

try:
    from ansible.template import trust_as_template
except ImportError:  # ansible-core 2.18 trusts every string

    def trust_as_template(value: str) -> str:
        return value


_ROLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "roles")


class Part(t.NamedTuple):
    """A resource as a role sets it up; a unit test compares it with the role's own task.

    Attributes:
        role: Role whose task manages it.
        when: Conditions of that task which hang on variables alone.
        options: Its options, word for word.
    """

    role: str
    when: tuple[str, ...]
    options: t.Mapping[str, str]


PARTS: dict[str, Part] = {
    "nvidia_driver": Part(
        "nvidia_driver",
        (),
        {
            "source": "{{ nvidia_driver_source }}",
            "repository_url": "{{ nvidia_driver_repository_url }}",
            "repository_architecture": "{{ nvidia_driver_repository_architecture }}",
            "branch": "{{ nvidia_driver_branch }}",
            "version": "{{ nvidia_driver_version }}",
            "flavour": "{{ nvidia_driver_flavour }}",
            "fabric_manager": "{{ nvidia_driver_fabric_manager }}",
            "imex": "{{ nvidia_driver_imex }}",
            "persistenced": "{{ nvidia_driver_persistenced }}",
            "hold": "{{ nvidia_driver_hold }}",
            "kernel_headers": "{{ nvidia_driver_kernel_headers }}",
            "kernel_module": "{{ nvidia_driver_kernel_module }}",
            "secure_boot": "{{ nvidia_driver_secure_boot }}",
            "unload": "{{ nvidia_driver_reload }}",
        },
    ),
    "nvidia_driver_reload": Part(
        "nvidia_driver",
        ("nvidia_driver_reload | bool", "nvidia_driver_kernel_module | bool"),
        {"expected_version": "{{ nvidia_driver_version or nvidia_driver_branch }}"},
    ),
    "docker_engine": Part(
        "docker",
        (),
        {
            "package_source": "{{ docker_package_source }}",
            "repository_url": "{{ docker_repository_url }}",
            "version": "{{ docker_version }}",
            "minimum_version": "{{ docker_minimum_version }}",
            "hold": "{{ docker_hold }}",
        },
    ),
    "docker_daemon": Part(
        "docker",
        (),
        {
            "options": "{{ docker_daemon_options }}",
            "absent": "{{ docker_daemon_absent }}",
            "live_restore": "{{ docker_live_restore }}",
        },
    ),
    "docker_group": Part("docker", ("docker_users is defined",), {"users": "{{ docker_users }}"}),
    "nvidia_container_toolkit": Part(
        "nvidia_container_toolkit",
        (),
        {
            "repository_url": "{{ nvidia_container_toolkit_repository_url }}",
            "version": "{{ nvidia_container_toolkit_version }}",
            "mode": "{{ nvidia_container_toolkit_mode }}",
            "default_runtime": "{{ nvidia_container_toolkit_default_runtime }}",
            "cdi": "{{ nvidia_container_toolkit_cdi }}",
            "hold": "{{ nvidia_container_toolkit_hold }}",
            "smoke_test": "{{ nvidia_container_toolkit_smoke_test }}",
            "injection": "{{ nvidia_container_toolkit_injection }}",
        },
    ),
    "ngc_login": Part(
        "ngc",
        (),
        {
            "api_key": "{{ __ngc_api_key }}",
            "registry": "{{ ngc_registry }}",
            "username": "{{ ngc_username }}",
            "docker_user": "{{ ngc_docker_user }}",
            "state": "{{ ngc_state }}",
            "check_repository": "{{ ngc_check_repository }}",
            "validate": "{{ ngc_validate }}",
        },
    ),
    "nim_image": Part(
        "nim",
        ("nim_state == 'present' and __nim_images | length > 0",),
        {
            "images": "{{ __nim_images }}",
            "pull": "{{ nim_image_pull }}",
            "registry_mirrors": "{{ nim_registry_mirrors }}",
            "api_key": "{{ nim_ngc_api_key }}",
        },
    ),
    "nim_service": Part(
        "nim",
        ("nim_state == 'absent' or nim_models | length > 0",),
        {
            "models": "{{ nim_models }}",
            "state": "{{ nim_state }}",
            "ngc_api_key": "{{ nim_ngc_api_key }}",
            "ngc_key_state": "{{ nim_ngc_key_state }}",
            "gpu_injection": "{{ nim_gpu_injection }}",
        },
    ),
}


def _trusted(value: t.Any) -> t.Any:
    """Templates of our own files, which ansible-core takes for plain text otherwise."""
    if isinstance(value, dict):
        return {key: _trusted(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_trusted(entry) for entry in value]
    return trust_as_template(value) if isinstance(value, str) else value


def role_variables(kind: str, roles: str = _ROLES) -> dict[str, t.Any]:
    """Variables of all roles of the collection: those of ``defaults`` or those of ``vars``."""
    found: dict[str, t.Any] = {}
    for role in sorted({part.role for part in PARTS.values()}):
        path = os.path.join(roles, role, kind, "main.yml")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                found.update(yaml.safe_load(stream) or {})
    return t.cast("dict[str, t.Any]", _trusted(found))


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no type information
    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        args = dict(self._task.args) or self.options(task_vars)
        result: dict[str, t.Any] = self._execute_module(
            module_name="gpu_fleet.nim.gpu_host_plan", module_args=args, task_vars=task_vars
        )
        return result

    def options(self, task_vars: t.Mapping[str, t.Any]) -> dict[str, dict[str, t.Any]]:
        """Options of every resource that the roles would set up with the variables of a host."""
        variables = {**role_variables("defaults"), **task_vars, **role_variables("vars")}
        templar = self._templar.copy_with_new_env(available_variables=variables)

        def render(text: str) -> t.Any:
            return templar.template(trust_as_template(text))

        options: dict[str, dict[str, t.Any]] = {}
        for resource, part in PARTS.items():
            try:
                if all(boolean(render("{{ %s }}" % condition)) for condition in part.when):
                    options[resource] = {name: render(text) for name, text in part.options.items()}
            except (AnsibleError, TypeError):
                # The message may quote a template with a secret in it.
                raise AnsibleActionFail(
                    "The variables of role %s that %s needs cannot be resolved; gpu_fleet.nim.validate_inventory says "
                    "which, and why." % (part.role, resource)
                ) from None
        return options
