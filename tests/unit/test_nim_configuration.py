# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is written for a service: units, arguments, secrets."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import stat
import subprocess
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_configuration import (
    SLICE_TEXT,
    TARGET_TEXT,
    Secrets,
    unit_text,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import parse_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import (
    UNIT_DIRECTORY,
    WRAPPER,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_unit import spec_hash
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from nim_machine import (
    DIGEST,
    ENTRYPOINT,
    KEY,
    LLAMA,
    ONE,
    ZERO,
    Machine,
    llama,
    nemo,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_what_a_1x_container_is_given(machine: Machine) -> None:
    machine.converge(llama(gpus=[1], profile="vllm-bf16-tp1-pp1", bind_address="127.0.0.1", environment={"B": "x y"}))
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert found["create"] == [
        "--log-driver=journald",
        "--log-opt=tag=nim-llama",
        "--label=io.gpu-fleet.nim.name=llama",
        "--label=io.gpu-fleet.nim.image=" + LLAMA,
        "--label=io.gpu-fleet.nim.digest=" + DIGEST,
        "--cgroup-parent=nim.slice",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=1000:1000",
        "--pids-limit=-1",
        "--shm-size=17179869184",
        "--ulimit=memlock=-1",
        "--ulimit=nofile=65536",
        "--ulimit=stack=67108864",
        "--runtime=nvidia",
        "--mount=type=bind,source=/var/lib/nim/cache/llama,target=/opt/nim/.cache",
        "--publish=127.0.0.1:8000:8000",
        "--env=B=x y",
        "--env=NIM_CACHE_PATH=/opt/nim/.cache",
        "--env=NIM_HTTP_API_PORT=8000",
        "--env=NIM_MODEL_PROFILE=vllm-bf16-tp1-pp1",
        "--env=NIM_SERVER_PORT=8000",
        "--env=NVIDIA_VISIBLE_DEVICES=" + ONE,
        "nvcr.io/nim/meta/llama-3.1-8b-instruct@" + DIGEST,
    ]
    download = found["download"]
    assert download["command"] == [ENTRYPOINT, "download-to-cache", "--profile", "vllm-bf16-tp1-pp1"]
    assert (download["image"], download["uid"]) == ("nvcr.io/nim/meta/llama-3.1-8b-instruct@" + DIGEST, 1000)
    assert not any(word.startswith("--publish") for word in download["options"])
    assert found["key_in_service"] is None


def test_other_ways_to_give_gpus_and_network(machine: Machine) -> None:
    machine.converge(llama(gpus="all", network_mode="host", port=9000), injection="gpus")
    words = json.loads(machine.host.files["/etc/nim/llama.json"])["create"]
    assert '--gpus="device=%s,%s"' % (ZERO, ONE) in words
    assert "--network=host" in words
    assert "--env=NIM_SERVER_PORT=9000" in words
    assert not any(word.startswith(("--publish", "--runtime")) for word in words)
    machine.converge(llama(network_mode="models"), injection="cdi")
    words = json.loads(machine.host.files["/etc/nim/llama.json"])["create"]
    assert "--device=nvidia.com/gpu=" + ZERO in words
    assert "--network=models" in words
    assert b"nvidia-cdi-refresh" in machine.host.files[UNIT_DIRECTORY + "/nim-llama.service"]


def test_local_weights_and_loras_are_mounted_read_only_and_nothing_is_fetched(machine: Machine) -> None:
    machine.host.dirs |= {"/srv/weights", "/srv/loras"}
    machine.converge(llama(weights_directory="/srv/weights", lora_directory="/srv/loras"), key=KEY)
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert "--mount=type=bind,source=/srv/weights,target=/opt/nim/weights,readonly" in found["create"]
    assert "--mount=type=bind,source=/srv/loras,target=/opt/nim/loras,readonly" in found["create"]
    assert found["download"] is None
    assert found["key_in_service"] is None


def test_an_image_of_no_known_family_fetches_by_itself(machine: Machine) -> None:
    machine.api.images[LLAMA]["Config"] = {"Entrypoint": ["/start"], "Cmd": ["serve", "--all"]}
    machine.converge(llama(user="500"))
    found = json.loads(machine.host.files["/etc/nim/llama.json"])
    assert (found["family"], found["download"]) == ("unknown", None)
    assert found["key_in_service"] == {
        "options": found["create"][:-1],
        "image": found["create"][-1],
        "command": ["/start", "serve", "--all"],
        "uid": 500,
    }


def test_the_native_runtime_downloads_with_its_own_command(machine: Machine) -> None:
    machine.api.images[LLAMA]["Config"] = {
        "Labels": {"com.nvidia.nim.model_download_protocol": "native-v1"},
        "Entrypoint": ["/opt/entry"],
        "Cmd": ["nim-native"],
    }
    machine.converge(llama())
    download = json.loads(machine.host.files["/etc/nim/llama.json"])["download"]
    assert download["command"] == ["/opt/entry", "nim-native"]
    assert "--env=NIM_ENGINE_MODEL_DOWNLOAD_ONLY=1" in download["options"]


def test_tls_is_asked_with_tls(machine: Machine) -> None:
    machine.converge(llama(environment={"NIM_SSL_MODE": "TLS"}))
    assert json.loads(machine.host.files["/etc/nim/llama.json"])["ready_url"].startswith("https://127.0.0.1:8000/")


def test_a_cgroupfs_daemon_has_no_slices(machine: Machine) -> None:
    machine.api.driver = "cgroupfs"
    machine.converge(llama())
    assert b"cgroup-parent" not in machine.host.files["/etc/nim/llama.json"]


def test_a_short_secret_cannot_be_guessed_from_what_everybody_reads(machine: Machine) -> None:
    """The same secret under another key has another name everywhere."""
    one, other = (Secrets(key * 64, {"PIN": "0"}) for key in "ab")
    assert str(one) != str(other) and one.spec() != other.spec()
    assert Secrets.parse(one.render()) == one
    assert str(Secrets(one.key, {"PIN": "1"})) != str(one)
    machine.converge(llama(secret_environment={"PIN": "0"}))
    there = Secrets.parse(machine.host.files["/etc/nim/llama.env"].decode())
    assert there and there.key not in machine.host.files["/etc/nim/llama.json"].decode()


def download(machine: Machine) -> dict[str, t.Any]:
    return json.loads(machine.host.files["/etc/nim/llama.json"])["download"]


def test_another_gpu_of_the_same_kind_needs_no_other_files(machine: Machine) -> None:
    machine.converge(llama(gpus=[0]))
    first = download(machine)
    machine.converge(llama(gpus=[1]))
    second = download(machine)
    assert first["key"] == second["key"]
    # As it was written until the GPUs' kinds took the place of the GPUs.
    image = machine.api.images[LLAMA]["Id"]
    former = [spec_hash([image, None, False, "/var/lib/nim/cache/llama", [uuid]]) for uuid in (ZERO, ONE)]
    assert [first["former_key"], second["former_key"]] == former
    # Two of them, or one of another kind, may be served with another profile.
    machine.converge(llama(gpus=[0, 1]))
    assert download(machine)["key"] != first["key"]
    other = dataclasses.replace(machine.inventory.gpus[0], name="NVIDIA H100 80GB HBM3")
    machine.inventory = dataclasses.replace(machine.inventory, gpus=(other, *machine.inventory.gpus[1:]))
    machine.converge(llama(gpus=[0]))
    assert download(machine)["key"] != first["key"]


def test_what_earlier_versions_wrote_is_written_anew_and_nothing_restarts(machine: Machine) -> None:
    machine.converge(llama())
    earlier = json.loads(machine.host.files["/etc/nim/llama.json"])
    earlier["download"]["key"] = earlier["download"].pop("former_key")
    machine.host.files["/etc/nim/llama.json"] = json.dumps(earlier).encode()
    machine.host.files[WRAPPER] = b"#!/usr/bin/python3\n"
    changes = machine.converge(llama()).changes
    assert {(change.what, change.disruption) for change in changes} == {
        (WRAPPER, Disruption.NONE),
        ("/etc/nim/llama.json", Disruption.NONE),
    }


def test_a_profile_by_its_name_has_the_same_files_on_any_gpu(machine: Machine) -> None:
    machine.converge(llama(gpus=[0], profile="vllm-bf16-tp1-pp1"))
    first = download(machine)
    machine.converge(llama(gpus=[0, 1], profile="vllm-bf16-tp1-pp1"))
    assert download(machine)["key"] == first["key"]
    machine.converge(llama(gpus=[0, 1], profile="default"))
    machine.converge(llama(gpus=[0], profile="default"))
    assert download(machine)["key"] != first["key"]


def test_a_secret_replaces_a_default_of_ours(machine: Machine) -> None:
    machine.converge(nemo(secret_environment={"NIM_LOG_LEVEL": "DEBUG"}))
    assert "NIM_LOG_LEVEL=" not in machine.host.files["/etc/nim/nemo.json"].decode()


def test_unit_text_follows_the_timeouts() -> None:
    (model,) = parse_models([llama(start_timeout=600, stop_timeout=45)])
    text = unit_text(model, "runtime")
    for line in (
        "StartLimitIntervalSec=2880",
        "StartLimitBurst=4",
        "TimeoutStopSec=75",
        "RestartSec=200ms",
        "Restart=always",
        "RestartPreventExitStatus=77 78",
        "SuccessExitStatus=77 143",
        "ConditionPathExists=!/var/lib/nim/maintenance",
        "ExecStart=/usr/local/libexec/nim/nim-unit run llama",
        "WantedBy=nim.target multi-user.target",
    ):
        assert line in text.splitlines()
    assert "Requires=" not in [line for line in text.splitlines() if not line.startswith("#")]
    assert "@sha256" not in text


@pytest.mark.parametrize("injection", ["runtime", "cdi"])
def test_systemd_accepts_the_units(tmp_path: pathlib.Path, injection: str) -> None:
    (model,) = parse_models([llama()])
    wrapper = tmp_path / "nim-unit"
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    # Verified where it has no strangers around it, with the program it names in reach.
    texts = {
        "nim-llama.service": unit_text(model, injection).replace(WRAPPER, str(wrapper)),
        "nim.target": TARGET_TEXT,
        "nim.slice": SLICE_TEXT,
    }
    for name in ("docker.service", "nvidia-cdi-refresh.service"):
        texts[name] = "[Service]\nExecStart=/bin/true\n"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in texts)],
        capture_output=True,
        encoding="utf-8",
        env=dict(os.environ, SYSTEMD_UNIT_PATH="%s:" % tmp_path),
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "nim" in line]
    assert (done.returncode, complaints) == (0, [])
