# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Containers that are not what they were made as, and containers that are although they look different."""

from __future__ import annotations

import copy
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_container import differences, restart_policy

CREATE = [
    "--log-driver=journald",
    "--label=gpu_fleet.nim.name=llama",
    "--cgroup-parent=nim.slice",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--user=1000:1000",
    "--pids-limit=-1",
    "--shm-size=17179869184",
    "--ulimit=nofile=65536",
    "--runtime=nvidia",
    "--mount=type=bind,source=/var/lib/nim/cache/llama,target=/opt/nim/.cache",
    "--mount=type=bind,source=/srv/lora,target=/lora,readonly",
    "--publish=0.0.0.0:8000:8000",
    "--env=NIM_LOG_LEVEL=INFO",
    "--env=NVIDIA_VISIBLE_DEVICES=GPU-1",
    "nvcr.io/nim/meta/x@sha256:ab",
    "serve",
    "--env=of-the-command",
]
CONTAINER: dict[str, t.Any] = {
    "Config": {
        "Image": "nvcr.io/nim/meta/x@sha256:ab",
        "User": "1000:1000",
        "Env": ["NIM_LOG_LEVEL=INFO", "NVIDIA_VISIBLE_DEVICES=GPU-1", "HF_TOKEN=x", "PATH=/bin", "NIM_HOME=/opt"],
    },
    "HostConfig": {
        "Runtime": "nvidia",
        "CgroupParent": "nim.slice",
        "ShmSize": 17179869184,
        "CapDrop": ["ALL"],
        "CapAdd": None,
        "Privileged": False,
        "Memory": 0,
        "NetworkMode": "bridge",
        "PortBindings": {"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8000"}]},
        "DeviceRequests": None,
        "Binds": None,
        "Mounts": [
            {"Type": "bind", "Source": "/var/lib/nim/cache/llama", "Target": "/opt/nim/.cache"},
            {"Type": "bind", "Source": "/srv/lora", "Target": "/lora", "ReadOnly": True},
        ],
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
    },
}
KNOWN = ("HF_TOKEN", "NIM_HOME")


def test_as_it_was_made() -> None:
    assert differences(CREATE, CONTAINER, KNOWN) == []
    # Engines up to 25 say default.
    older = copy.deepcopy(CONTAINER)
    older["HostConfig"]["NetworkMode"] = "default"
    assert differences(CREATE, older, KNOWN) == []


def test_a_read_only_container() -> None:
    create = ["--read-only", "--tmpfs=/tmp:exec,mode=1777", *CREATE]
    container = copy.deepcopy(CONTAINER)
    container["HostConfig"].update(ReadonlyRootfs=True, Tmpfs={"/tmp": "exec,mode=1777"})
    assert differences(create, container, KNOWN) == []
    container["HostConfig"].update(ReadonlyRootfs=False, Tmpfs=None)
    assert differences(create, container, KNOWN) == ["read-only root file system", "directories in memory"]


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "NO_PROXY"])
def test_proxies_of_the_docker_command(name: str) -> None:
    container = copy.deepcopy(CONTAINER)
    container["Config"]["Env"].append(name + "=http://proxy.example:3128")
    assert differences(CREATE, container, KNOWN) == []
    assert differences(["--env=%s=http://other.example" % name, *CREATE], container, KNOWN) == ["variable " + name]


@pytest.mark.parametrize("container", [{}, {"Config": None, "HostConfig": None}, {"Config": {}, "HostConfig": {}}])
def test_what_is_not_told_is_no_difference(container: dict[str, t.Any]) -> None:
    assert differences(CREATE, container, KNOWN) == []


@pytest.mark.parametrize(
    ("part", "key", "value", "found"),
    [
        ("Config", "Image", "nvcr.io/nim/meta/x:latest", ["image"]),
        ("Config", "User", "", ["user"]),
        ("Config", "Env", ["NIM_LOG_LEVEL=INFO"], ["variable NVIDIA_VISIBLE_DEVICES"]),
        ("Config", "Env", ["NIM_LOG_LEVEL=DEBUG", "NVIDIA_VISIBLE_DEVICES=GPU-1"], ["variable NIM_LOG_LEVEL"]),
        ("Config", "Env", [*CONTAINER["Config"]["Env"], "DEBUG=1"], ["variable DEBUG"]),
        ("HostConfig", "Runtime", "runc", ["runtime"]),
        ("HostConfig", "CgroupParent", "", ["cgroup"]),
        ("HostConfig", "ShmSize", 67108864, ["shared memory"]),
        ("HostConfig", "CapDrop", None, ["capabilities"]),
        ("HostConfig", "CapAdd", ["SYS_ADMIN"], ["capabilities"]),
        ("HostConfig", "ReadonlyRootfs", True, ["read-only root file system"]),
        ("HostConfig", "Tmpfs", {"/scratch": ""}, ["directories in memory"]),
        ("HostConfig", "Privileged", True, ["privileged"]),
        ("HostConfig", "Memory", 4 << 30, ["memory limit"]),
        ("HostConfig", "NanoCpus", 10**9, ["processor limit"]),
        ("HostConfig", "NetworkMode", "host", ["network"]),
        ("HostConfig", "PortBindings", {}, ["published ports"]),
        ("HostConfig", "PortBindings", {"8000/tcp": [{"HostIp": "", "HostPort": "9000"}]}, ["published ports"]),
        ("HostConfig", "Mounts", CONTAINER["HostConfig"]["Mounts"][:1], ["mounts"]),
        ("HostConfig", "Binds", ["/:/host"], ["mounts"]),
        ("HostConfig", "DeviceRequests", [{"Count": -1, "Capabilities": [["gpu"]]}], ["GPUs"]),
    ],
)
def test_differences(part: str, key: str, value: t.Any, found: list[str]) -> None:
    container = copy.deepcopy(CONTAINER)
    container[part][key] = value
    assert differences(CREATE, container, KNOWN) == found


@pytest.mark.parametrize(
    ("options", "requests", "same"),
    [
        (["--device=nvidia.com/gpu=GPU-1"], [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}], True),
        (["--device=nvidia.com/gpu=GPU-1"], [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}], False),
        (['--gpus="device=GPU-1,GPU-2"'], [{"DeviceIDs": ["GPU-2", "GPU-1"], "Capabilities": [["gpu"]]}], True),
        (['--gpus="device=GPU-1,GPU-2"'], [{"DeviceIDs": None, "Count": -1, "Capabilities": [["gpu"]]}], False),
    ],
)
def test_gpus(options: list[str], requests: list[t.Any], same: bool) -> None:
    found = differences([*options, "image"], {"HostConfig": {"DeviceRequests": requests}})
    assert found == ([] if same else ["GPUs"])


def test_restart_policy() -> None:
    assert restart_policy(CONTAINER) == restart_policy({}) == "no"
    assert restart_policy({"HostConfig": {"RestartPolicy": {"Name": "unless-stopped"}}}) == "unless-stopped"
