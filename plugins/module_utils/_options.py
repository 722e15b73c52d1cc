# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What can be said to each resource: the argument specifications of the modules, for them and for the plan of a host.

Data alone: it travels with every module, so it imports nothing of the resources, which take their defaults from here.
"""

from __future__ import annotations

import typing as t

Spec = t.Dict[str, t.Dict[str, t.Any]]

DRIVER_REPOSITORY = "https://developer.download.nvidia.com/compute/cuda/repos"
DOCKER_REPOSITORY = "https://download.docker.com/linux"
TOOLKIT_REPOSITORY = "https://nvidia.github.io/libnvidia-container"
#: Oldest engine that NIM 1.x is documented for; NIM 2.x asks for 24.0.
MINIMUM_DOCKER_VERSION = "23.0.1"

#: Modes of the NVIDIA container runtime, and ways in which a NIM gets its GPUs.
RUNTIME_MODES = ("auto", "legacy", "cdi", "jit-cdi", "csv")
GPU_INJECTIONS = ("runtime", "cdi", "gpus")
#: What happens to a start on a GPU that is not fit for service.
GPU_HEALTH = ("enforce", "warn")

#: Ulimits that keep NIM from "Too many open files" and from failing to pin memory; NVIDIA's documents use these.
DEFAULT_ULIMITS: dict[str, int] = {"nofile": 65536, "memlock": -1, "stack": 67108864}

_PRESENT_OR_ABSENT = {"type": "str", "choices": ["present", "absent"], "default": "present"}
_AUTO_PRESENT_ABSENT = {"type": "str", "choices": ["auto", "present", "absent"], "default": "auto"}

#: One entry of ``nim_models``.
NIM_MODEL_OPTIONS: Spec = {
    "name": {"type": "str", "required": True},
    "image": {"type": "str", "required": True},
    "gpus": {"type": "raw"},
    "port": {"type": "int", "default": 8000},
    "bind_address": {"type": "str", "default": "0.0.0.0"},  # noqa: S104 - a served model is meant to be reached
    "cache_directory": {"type": "str"},
    "shm_size": {"type": "str", "default": "16GB"},
    "ulimits": {"type": "dict", "default": DEFAULT_ULIMITS},
    "environment": {"type": "dict", "default": {}},
    "secret_environment": {"type": "dict", "default": {}, "no_log": True},
    "profile": {"type": "str"},
    "served_model_name": {"type": "str"},
    "weights_directory": {"type": "str"},
    "custom_model_name": {"type": "str"},
    "lora_directory": {"type": "str"},
    "lora_refresh_interval": {"type": "int"},
    "max_model_length": {"type": "int"},
    "network_mode": {"type": "str", "default": "bridge"},
    "user": {"type": "str", "default": "1000:1000"},
    "read_only": {"type": "bool", "default": False},
    "tmpfs": {"type": "list", "elements": "str", "default": ["/tmp"]},  # noqa: S108 - in a container
    "engine_arguments": {"type": "list", "elements": "str", "default": []},
    "start_timeout": {"type": "int", "default": 1800},
    "stop_timeout": {"type": "int", "default": 60},
    "disk_space": {"type": "str"},
    "gpu_memory": {"type": "str"},
    "completion": {"type": "str", "choices": ["auto", "chat", "completion", "none"], "default": "auto"},
    "state": {"type": "str", "choices": ["started", "stopped", "absent"], "default": "started"},
}

#: Module -> those of its options that say what is wanted, in the order in which the resources are set up: later ones
#: build on earlier ones. Options that say how a call of the module goes stand in the module itself.
RESOURCE_OPTIONS: dict[str, Spec] = {
    "nvidia_driver": {
        "source": {"type": "str", "choices": ["nvidia", "distribution"], "default": "nvidia"},
        "repository_url": {"type": "str", "default": DRIVER_REPOSITORY},
        "repository_architecture": {"type": "str", "default": ""},
        "branch": {"type": "str", "default": "580"},
        "version": {"type": "str", "default": ""},
        "flavour": {"type": "str", "choices": ["auto", "open", "proprietary"], "default": "auto"},
        "fabric_manager": _AUTO_PRESENT_ABSENT,
        "imex": _AUTO_PRESENT_ABSENT,
        "persistenced": {"type": "bool", "default": True},
        "hold": {"type": "bool", "default": True},
        "kernel_headers": {"type": "bool", "default": True},
        "kernel_module": {"type": "bool", "default": True},
        "secure_boot": {"type": "str", "choices": ["check", "enrolled"], "default": "check"},
        "unload": {"type": "bool", "default": True},
    },
    "nvidia_driver_reload": {
        "expected_version": {"type": "str", "default": ""},
    },
    "docker_engine": {
        "package_source": {"type": "str", "choices": ["docker", "distribution"], "default": "docker"},
        "repository_url": {"type": "str", "default": DOCKER_REPOSITORY},
        "version": {"type": "str", "default": ""},
        "minimum_version": {"type": "str", "default": MINIMUM_DOCKER_VERSION},
        "hold": {"type": "bool", "default": True},
    },
    "docker_daemon": {
        "options": {"type": "dict", "default": {}},
        "absent": {"type": "list", "elements": "str", "default": []},
        "live_restore": {"type": "bool"},
        "config_file": {"type": "path"},
    },
    "docker_group": {
        "users": {"type": "list", "elements": "str", "required": True},
    },
    "nvidia_container_toolkit": {
        "repository_url": {"type": "str", "default": TOOLKIT_REPOSITORY},
        "version": {"type": "str", "default": ""},
        "mode": {"type": "str", "choices": list(RUNTIME_MODES), "default": "auto"},
        "default_runtime": {"type": "bool", "default": False},
        "cdi": {"type": "bool", "default": False},
        "hold": {"type": "bool", "default": True},
        "smoke_test": {"type": "bool", "default": True},
        "injection": {"type": "str", "choices": list(GPU_INJECTIONS), "default": "runtime"},
    },
    "ngc_login": {
        "api_key": {"type": "str", "no_log": True},
        "registry": {"type": "str", "default": "nvcr.io"},
        "username": {"type": "str", "default": "$oauthtoken"},
        "docker_user": {"type": "str", "default": "root"},
        "state": _PRESENT_OR_ABSENT,
        "check_repository": {"type": "str", "default": ""},
        "validate": {"type": "str", "choices": ["on_change", "always", "never"], "default": "on_change"},
        "only_ours": {"type": "bool", "default": False},
    },
    "nim_image": {
        "images": {
            "type": "list",
            "elements": "dict",
            "required": True,
            "options": {
                "image": {"type": "str", "required": True},
                "state": _PRESENT_OR_ABSENT,
                "disk_space": {"type": "str"},
                "cache_directory": {"type": "path"},
                "check_requirement": {"type": "bool", "default": True},
                "model": {"type": "str"},
                "profile": {"type": "str"},
                "gpus": {"type": "int"},
                "gpu_names": {"type": "list", "elements": "str"},
                "lora": {"type": "bool", "default": False},
                "profile_memory": {"type": "bool", "default": True},
            },
        },
        "pull": {"type": "str", "choices": ["missing", "newer", "never"], "default": "missing"},
        "registry_mirrors": {"type": "dict", "default": {}},
        "api_key": {"type": "str", "no_log": True},
        "docker_user": {"type": "str", "default": "root"},
        "retries": {"type": "int", "default": 5},
        "disk_factor": {"type": "float", "default": 3.3},
    },
    "nim_service": {
        "models": {"type": "list", "elements": "dict", "required": True, "options": NIM_MODEL_OPTIONS},
        "ngc_api_key": {"type": "str", "no_log": True},
        "ngc_key_state": dict(_PRESENT_OR_ABSENT, no_log=False),
        "state": _PRESENT_OR_ABSENT,
        "gpu_injection": {"type": "str", "choices": list(GPU_INJECTIONS), "default": "runtime"},
        "gpu_health": {"type": "str", "choices": list(GPU_HEALTH), "default": "enforce"},
    },
    "nim_health": {
        # Mappings with more in them than a look needs are welcome, so their keys are not listed.
        "models": {"type": "list", "elements": "dict", "required": True},
        "failure_signatures": {"type": "list", "elements": "dict", "default": []},
    },
}

#: Where secrets can be in what the specifications above leave open.
_SECRETS: dict[str, Spec] = {
    "nim_health": {"models": {"options": {"secret_environment": {"no_log": True}}}},
}

#: Resources in the order in which they are set up.
CHAIN = tuple(RESOURCE_OPTIONS)


def secrets_of(resource: str, given: t.Any) -> set[str]:
    """All secrets in what was given as the options of a resource, also where it is not what they ask for.

    Text in place of a mapping may hold a secret anywhere, and is secret as a whole.
    """
    return _secrets_in(_SECRETS.get(resource) or RESOURCE_OPTIONS[resource], given)


def _secrets_in(options: Spec, given: t.Any) -> set[str]:
    found: set[str] = set()
    if isinstance(given, str):
        return {given} if given and _has_secrets(options) else set()
    if isinstance(given, (list, tuple)):
        for entry in given:
            found |= _secrets_in(options, entry)
    if isinstance(given, dict):
        for name, option in options.items():
            value = given.get(name)
            if option.get("no_log"):
                found |= _texts(value)
            elif "options" in option:
                found |= _secrets_in(option["options"], value)
    return found


def _has_secrets(options: Spec) -> bool:
    return any(option.get("no_log") or _has_secrets(option.get("options") or {}) for option in options.values())


def _texts(value: t.Any) -> set[str]:
    """Everything in a secret that could be printed."""
    if isinstance(value, dict):
        return set().union(*(_texts(entry) for entry in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*(_texts(entry) for entry in value))
    return set() if value is None or isinstance(value, bool) or value == "" else {str(value)}
