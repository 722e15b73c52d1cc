# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every option of a model: what it does to the container, and whether a change of it restarts that model, and no other."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import NIM_MODEL_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._wanted_images import wanted_images
from nim_machine import ONE, Machine, llama, nemo

PROFILE = "4f904d571fe60ff24695b5ee2aa42da58cb460787a968f1e8a09f5a7e862728d"
NEWER = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5"
JSON = "/etc/nim/llama.json"
UNIT = "/etc/systemd/system/nim-llama.service"

#: Option -> (the same model with another value of it, what is in the model's files then and was not before).
RESTARTS: dict[str, tuple[dict[str, t.Any], str]] = {
    "image": (llama(image=NEWER), "sha256:" + "cd" * 32),
    "gpus": (llama(gpus=[1]), '"--env=NVIDIA_VISIBLE_DEVICES=%s"' % ONE),
    "port": (llama(port=8010), '"--publish=0.0.0.0:8010:8000"'),
    "bind_address": (llama(bind_address="127.0.0.1"), '"--publish=127.0.0.1:8000:8000"'),
    "cache_directory": (llama(cache_directory="/srv/c"), '"--mount=type=bind,source=/srv/c,target=/opt/nim/.cache"'),
    "shm_size": (llama(shm_size="32GB"), '"--shm-size=34359738368"'),
    "ulimits": (llama(ulimits={"nofile": "1024:4096"}), '"--ulimit=nofile=1024:4096"'),
    "environment": (llama(environment={"NIM_LOG_LEVEL": "DEBUG"}), '"--env=NIM_LOG_LEVEL=DEBUG"'),
    "secret_environment": (llama(secret_environment={"HF_TOKEN": "hf_x"}), '"HF_TOKEN"'),
    "profile": (llama(profile=PROFILE), '"--env=NIM_MODEL_PROFILE=%s"' % PROFILE),
    "served_model_name": (llama(served_model_name="house,llama"), '"--env=NIM_SERVED_MODEL_NAME=house,llama"'),
    "weights_directory": (
        llama(weights_directory="/srv/weights"),
        '"--mount=type=bind,source=/srv/weights,target=/opt/nim/weights,readonly"',
    ),
    "custom_model_name": (llama(custom_model_name="house"), '"--env=NIM_CUSTOM_MODEL_NAME=house"'),
    "lora_directory": (
        llama(lora_directory="/srv/loras"),
        '"--mount=type=bind,source=/srv/loras,target=/opt/nim/loras,readonly"',
    ),
    "lora_refresh_interval": (
        llama(lora_directory="/srv/loras", lora_refresh_interval=30),
        '"--env=NIM_PEFT_REFRESH_INTERVAL=30"',
    ),
    "max_model_length": (llama(max_model_length=4096), '"--env=NIM_MAX_MODEL_LEN=4096"'),
    "network_mode": (llama(network_mode="host"), '"--network=host"'),
    "user": (llama(user="2000:3000"), '"--user=2000:3000"'),
    "read_only": (llama(read_only=True), '"--read-only"'),
    "tmpfs": (llama(read_only=True, tmpfs=["/tmp", "/home/nim"]), '"--tmpfs=/home/nim:exec,mode=1777"'),
    "engine_arguments": (llama(engine_arguments=["--max-num-seqs", "32"]), '"--max-num-seqs"'),
}
#: The same for what is no part of what the container runs.
KEEPS_RUNNING: dict[str, tuple[dict[str, t.Any], str]] = {
    "start_timeout": (llama(start_timeout=60), "StartLimitIntervalSec=720"),
    "stop_timeout": (llama(stop_timeout=7), "TimeoutStopSec=37"),
    # Asked before a start and while waiting; nothing of it is written.
    "disk_space": (llama(disk_space="1GB"), ""),
    "gpu_memory": (llama(gpu_memory="1GB"), ""),
    "completion": (llama(completion="none"), ""),
}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(monkeypatch)
    image = found.api.images[llama()["image"]]
    found.api.images[NEWER] = {
        **image,
        "Id": "sha256:" + "7" * 64,
        "RepoDigests": [NEWER.rsplit(":", 1)[0] + "@sha256:" + "cd" * 32],
    }
    for directory in ("/srv/weights", "/srv/loras"):
        found.host.make_dir(directory, mode=0o755)
    return found


def files(machine: Machine) -> str:
    return "".join(machine.host.files[path].decode() for path in (JSON, UNIT))


def started(outcome: t.Any) -> list[str]:
    return [change.what for change in outcome.changes if change.after in ("started", "restarted")]


@pytest.mark.parametrize("option", [*RESTARTS, *KEEPS_RUNNING])
def test_change_of_one_option(machine: Machine, option: str) -> None:
    after, text = {**RESTARTS, **KEEPS_RUNNING}[option]
    # What an option has no effect without.
    needs: dict[str, t.Any] = {"lora_refresh_interval": {"lora_directory": "/srv/loras"}, "tmpfs": {"read_only": True}}
    before = llama(**needs.get(option, {}))
    # Of two GPUs the other one has the other model.
    others = [] if option == "gpus" else [nemo(gpus=1)]
    machine.converge(before, *others)
    old = files(machine)
    kept = machine.host.files.get("/etc/nim/nemo.json")
    outcome = machine.converge(after, *others)
    assert started(outcome) == (["nim-llama.service"] if option in RESTARTS else [])
    assert text in files(machine) and (not text or text not in old)
    assert machine.host.files.get("/etc/nim/nemo.json") == kept
    assert not machine.converge(after, *others).changes


def test_state(machine: Machine) -> None:
    machine.converge(llama(), nemo(gpus=1))
    for state, active in (
        ("stopped", "inactive"),
        ("started", "active"),
        ("absent", "inactive"),
        ("started", "active"),
    ):
        machine.converge(llama(state=state), nemo(gpus=1))
        assert machine.active["nim-llama.service"] == active
        assert machine.active["nim-nemo.service"] == "active"
        assert (JSON in machine.host.files) is (state != "absent")


def test_what_a_model_needs_is_asked_for_its_image() -> None:
    (wanted,) = wanted_images([llama(disk_space="20GB", profile=PROFILE, gpus=2)])
    assert (wanted["disk_space"], wanted["profile"], wanted["gpus"]) == ("20GB", PROFILE, 2)


def test_every_option_is_here() -> None:
    assert set(NIM_MODEL_OPTIONS) == {"name", "state", *RESTARTS, *KEEPS_RUNNING}
