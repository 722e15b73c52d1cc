# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What cannot work is refused in seconds, with sentence, reason and verdict, and nothing was changed by then.

The tests of one host build on each other, in this order.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from control import World
from fleet_testing import SANDBOX, Fleet, Host, Json, Run, difference

FLEET = Fleet("preflight")
BARE = FLEET.host("bare")
FIT = FLEET.host("fit")
PLAIN = FLEET.host("plain")
OUTPUT = SANDBOX / "run/test-preflight/rows.json"
LLAMA: Json = {"name": "llama", "image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4", "start_timeout": 90}
#: Docker's own data changes by itself, and is looked at through Docker.
SKIP = ("/var/lib/docker", "/var/lib/containerd")
#: What the stand-in of the kernel module tells nvidia-smi, out of /etc/sandbox/hardware.json.
GPUS = "/proc/driver/nvidia-standin/gpus"


def wanted(host: Host, **variables: object) -> Json:
    """The inventory with other variables for one host."""
    inventory = copy.deepcopy(FLEET.inventory)
    inventory["gpu_hosts"]["hosts"][host.name].update(variables)
    return inventory


class Judged:
    """One run of the playbook on one host."""

    def __init__(self, host: Host, *, succeeds: bool, environment: Any = None, **variables: object) -> None:
        OUTPUT.unlink(missing_ok=True)
        options = ("--limit", host.name, "-e", "preflight_output=%s" % OUTPUT)
        inventory = wanted(host, **variables)
        self.run: Run = FLEET.play(
            "preflight", *options, succeeds=succeeds, inventory=inventory, environment=environment
        )
        assert self.run.code == (0 if succeeds else 2)
        assert self.run.changed() == []
        self.rows: list[Json] = json.loads(OUTPUT.read_text())
        assert {row["host"] for row in self.rows} == {host.name}
        # What people see is what programs read.
        for row in self.rows:
            assert row["verdict"] == "ok" or row["message"].rstrip(".") in self.run.output, row

    def bad(self) -> set[tuple[str, str]]:
        return {(row["check"], row["reason"]) for row in self.rows if row["verdict"] == "refused"}

    def row(self, check: str, subject: str = "", verdict: str = "refused") -> Json:
        (found,) = [
            row for row in self.rows if (row["check"], row["subject"], row["verdict"]) == (check, subject, verdict)
        ]
        return found


@contextlib.contextmanager
def untouched(host: Host) -> Iterator[None]:
    """Nothing on the host is another thing after it."""
    images = "docker image ls --all --quiet --no-trunc; docker ps --all --quiet"
    before = host.snapshot(SKIP), host.run(images, check=False)
    yield
    assert difference(before[0], host.snapshot(SKIP)) == {}
    assert host.run(images, check=False) == before[1]


# -- a bare host ------------------------------------------------------------------------------------


def test_a_bare_host_that_can_serve() -> None:
    began = time.time()
    with untouched(BARE):
        judged = Judged(BARE, succeeds=True, nim_models=[LLAMA])
    assert judged.row("nvml", verdict="unknown")["reason"] == "driver_not_loaded"
    assert judged.row("key", verdict="ok")["message"] == "nvcr.io accepts the key."
    assert "to download" in judged.row("image", LLAMA["image"], "ok")["message"]
    assert judged.row("requirement", LLAMA["image"], "ok")
    assert "port 8000 on 0.0.0.0 is free" in judged.row("port", "llama", "ok")["message"]
    # The registry was asked, and of the image nothing was fetched but its configuration.
    asked = [entry["uri"] for entry in World(str(SANDBOX)).requests(began, client=BARE.address)]
    assert [uri for uri in asked if "/manifests/" in uri], asked
    assert len({uri for uri in asked if "/blobs/" in uri}) <= 1, asked


@pytest.fixture
def squatter() -> Iterator[str]:
    """Somebody who holds port 8000 of the bare host; the process id."""
    BARE.run("systemd-run --quiet --unit squatter python3 -m http.server 8000")
    yield BARE.run("systemctl show --property MainPID --value squatter.service")
    BARE.run("systemctl stop squatter")


def test_everything_that_cannot_work_is_said_at_once(squatter: str) -> None:
    models = [
        # Needs CUDA 12.5, which branch 535 does not have; its port is held.
        {**LLAMA, "image": "nvcr.io/nim/meta/llama3-8b-instruct:1.0.3"},
        {**LLAMA, "name": "ghost", "image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:9.9.9", "port": 8001},
        {**LLAMA, "name": "big", "port": 8002, "disk_space": "900TB"},
    ]
    variables = {"nim_models": models, "nvidia_driver_branch": "535"}
    with untouched(BARE):
        judged = Judged(BARE, succeeds=False, **variables)
        run = FLEET.site("--limit", BARE.name, inventory=wanted(BARE, **variables), succeeds=False)
    # Seconds, although a registry, a driver, a disk and the ports are asked; a pull alone would take minutes.
    assert judged.run.seconds < 20
    assert judged.bad() == {
        ("requirement", "requirement"),
        ("port", "port_in_use"),
        ("image", "no_such_tag"),
        ("disk", "disk_full"),
        ("gpus", "gpus_unavailable"),
    }
    requirement = judged.row("requirement", models[0]["image"])
    assert "cuda>=12.5" in requirement["message"] and "branch 555 or newer" in requirement["message"]
    assert "this host is to get driver branch 535" in requirement["remedy"]
    port = judged.row("port", "llama")
    assert "it is held by python3 (pid %s) of unit squatter.service" % squatter in port["message"]
    assert port["remedy"] == "stop that first, or give the model another port"
    assert "nothing in it under :9.9.9" in judged.row("image", models[1]["image"])["message"]
    assert "/var/lib/nim/cache/big on / needs about 9895" in judged.row("disk")["message"]
    assert (
        "GPU 0" in judged.row("gpus", "big")["remedy"]
        and "1 more would be needed" in judged.row("gpus", "big")["message"]
    )

    # The whole chain is refused with the same sentences, before its first change.
    assert run.changed() == []
    message = run.failure(BARE.name)
    for row in judged.rows:
        if row["verdict"] == "refused":
            # How much of the disk is free changes from one moment to the next.
            assert row["message"].rstrip(".").partition(", and ")[0] in message, row


@pytest.mark.parametrize(
    ("key", "reason"), [("nvapi-sandbox-nobody-has-ever-made-this-key-0123456789", "bad_key"), ("", "no_key")]
)
def test_a_key_that_opens_nothing(key: str, reason: str) -> None:
    with untouched(BARE):
        judged = Judged(BARE, succeeds=False, environment={"NGC_API_KEY": key}, nim_models=[LLAMA])
    refused = judged.row("image", LLAMA["image"])
    assert refused["reason"] == reason and refused["remedy"]
    assert not key or key not in judged.run.output


def test_a_host_without_a_gpu() -> None:
    with untouched(PLAIN):
        judged = Judged(PLAIN, succeeds=True, nim_models=[LLAMA])
    (row,) = judged.rows
    assert (row["check"], row["verdict"], row["reason"]) == ("gpu", "warning", "no_gpu")
    assert "has no NVIDIA GPU on its PCI bus, so it is left as it is and does not serve llama" in row["message"]


# -- GPUs that are not fit for service ----------------------------------------------------------------


@contextlib.contextmanager
def condition(*conditions: Json) -> Iterator[None]:
    """GPUs of which nvidia-smi tells something else, in the order of their indices."""
    healthy = FIT.run("cat " + GPUS) + "\n"
    parts = re.split(r"(?m)^(?=gpu$)", healthy)
    for number, elements in enumerate(conditions, 1):
        parts[number] += "".join("xml.%s=%s\n" % pair for pair in elements.items())
    FIT.run("cat > " + GPUS, stdin="".join(parts))
    try:
        yield
    finally:
        FIT.run("cat > " + GPUS, stdin=healthy)


BOTH = [{**LLAMA, "gpus": [0]}, {**LLAMA, "name": "other", "gpus": [1], "port": 8001}]
PENDING = {"remapped_rows/remapped_row_pending": "Yes"}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (
            (PENDING, {"gpu_recovery_action": "Node Reboot"}),
            [
                ("memory_repair", "row_remap_pending", "row remapping pending", "nvidia-smi --gpu-reset -i 0"),
                ("recovery_action", "recovery_action", "the driver asks for 'Node Reboot'", "reboot the host"),
            ],
        ),
        (
            ({"compute_mode": "Prohibited"}, {"remapped_rows/remapped_row_failure": "Yes"}),
            [
                ("compute_mode", "compute_mode", "its compute mode is Prohibited", "nvidia-smi -i 0 -c DEFAULT"),
                ("memory_repair", "row_remap_failed", "could not remap a bad row", "replaced"),
            ],
        ),
    ],
)
def test_no_model_is_started_on_a_gpu_that_is_not_fit(conditions: tuple[Json, Json], expected: list[Any]) -> None:
    with condition(*conditions), untouched(FIT):
        judged = Judged(FIT, succeeds=False, nim_models=BOTH)
        run = FLEET.site("--limit", FIT.name, inventory=wanted(FIT, nim_models=BOTH), succeeds=False)
    message = run.failure(FIT.name)
    for (check, reason, says, remedy), model in zip(expected, BOTH):
        (row,) = [row for row in judged.rows if row["check"] == check and row["gpu"] and row["reason"] == reason]
        assert row["verdict"] == "refused" and says in row["message"] and remedy in row["remedy"], row
        refused = judged.row("gpu_health", str(model["name"]))
        assert refused["reason"] == reason
        assert refused["message"].startswith("Model %s cannot be started: GPU " % model["name"])
        assert says in message and remedy in message, message
    assert run.changed() == []


def test_one_process_only_is_a_warning() -> None:
    with condition({"compute_mode": "Exclusive_Process"}):
        judged = Judged(FIT, succeeds=True, nim_models=BOTH)
    (row,) = [row for row in judged.rows if row["verdict"] == "warning"]
    assert (row["check"], row["reason"]) == ("compute_mode", "compute_mode")
    assert "its compute mode is Exclusive_Process" in row["message"]


def test_a_gpu_that_does_not_tell_is_unknown() -> None:
    silent = dict.fromkeys(
        ("gpu_recovery_action", "remapped_rows/remapped_row_pending", "fb_memory_usage/total", "fb_memory_usage/free"),
        "N/A",
    )
    with condition(silent):
        judged = Judged(FIT, succeeds=True, nim_models=[{**BOTH[0], "gpu_memory": "80GB"}])
    assert {row["check"] for row in judged.rows if row["verdict"] == "unknown"} >= {"recovery_action", "memory_repair"}


def test_memory_that_the_gpu_does_not_have_free() -> None:
    with untouched(FIT):
        judged = Judged(FIT, succeeds=False, nim_models=[{**BOTH[0], "gpu_memory": "143700MiB"}])
    row = judged.row("gpu_memory", "llama")
    assert row["reason"] == "gpu_memory"
    assert "needs 143700 MiB of free memory" in row["message"] and "of 143771 MiB free" in row["message"]


def test_the_service_refuses_by_itself_too_and_what_runs_is_left_alone() -> None:
    inventory = wanted(FIT, nim_models=BOTH[:1])
    with condition(PENDING):
        # Without the look beforehand, as somebody uses the module.
        options = ("--limit", FIT.name, "--tags", "nim", "-e", "nim_preflight=false")
        run = FLEET.site(*options, inventory=inventory, succeeds=False)
        (failed,) = [entry for entry in run.of(FIT.name) if entry["outcome"] == "failed"]
        assert failed["result"]["reason"] == "row_remap_pending"
        assert "Model llama cannot be started: GPU 0 (NVIDIA H200, GPU-" in failed["result"]["msg"]
    assert FIT.models() == [] and FIT.container_state("llama") is None

    FLEET.site("--limit", FIT.name, inventory=inventory)
    assert FIT.ready(8000)
    before = FIT.identity("llama")
    with condition(PENDING):
        run = FLEET.site("--limit", FIT.name, inventory=inventory)
        assert run.changed() == []
        assert "row remapping pending" in run.warnings()
        judged = Judged(FIT, succeeds=True, nim_models=BOTH[:1])
    # Nothing is to be started on it, so it is said and stands in nobody's way.
    assert judged.bad() == set()
    assert [row["reason"] for row in judged.rows if row["verdict"] == "warning"] == ["row_remap_pending"]
    assert judged.row("service", "llama", "ok")
    assert FIT.identity("llama") == before and FIT.ready(8000)
