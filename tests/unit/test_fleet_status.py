# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of the fleet, and the part of the look at a host that it needs."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.action.fleet_status import wanted_models
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _host_services
from ansible_collections.gpu_fleet.nim.plugins.module_utils._docker_api import DockerApi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_status import gpus_text, render_table, rows_of
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_host_info import SECTIONS, gather
from fake_host import FakeHost

DIGEST = "sha256:" + "0123456789abcdef" * 4
LOOK: dict[str, t.Any] = {
    "pci_gpus": [{"architecture": "Hopper"}] * 2,
    "gpus": [{"name": "NVIDIA H200"}, {"name": "NVIDIA H200"}],
    "driver": {"loaded": "580.95.05", "on_disk": "580.95.05"},
    "docker": {"installed": True, "version": "28.5.1"},
    "container_toolkit": {"version": "1.20.0"},
    "errors": {},
    "nim": [
        {
            "name": "llama",
            "image": "nvcr.io/nim/meta/llama:1.8.4",
            "digest": DIGEST,
            "port": 8000,
            "state": "ready",
            "seconds_to_ready": 31.4,
            "model_id": "meta/llama",
            "url": "http://127.0.0.1:8000",
            "message": None,
        },
        {"name": "mistral", "digest": "", "port": 8001, "state": "failed", "message": "NIM mistral did not start."},
    ],
}


def test_rows_of_a_host_with_services() -> None:
    rows = rows_of("gpu01", LOOK, address="10.0.0.1", wanted=["llama", "later"])
    assert [(row["nim"], row["state"], row["url"]) for row in rows] == [
        ("llama", "ready", "http://10.0.0.1:8000"),
        ("mistral", "failed", "http://10.0.0.1:8001"),
        ("later", "not deployed", ""),
    ]
    assert rows[0]["gpus"] == "2 x NVIDIA H200"
    assert (rows[0]["driver"], rows[0]["engine"], rows[0]["toolkit"]) == ("580.95.05", "28.5.1", "1.20.0")


def test_hosts_without_an_answer_are_rows() -> None:
    assert rows_of("a", {"unreachable": True, "msg": "Failed to connect\n  to the host"})[0]["state"] == "unreachable"
    assert rows_of("a", {"unreachable": True, "msg": "x\n y"})[0]["message"] == "x y"
    assert rows_of("a", {"failed": True, "msg": "Missing sudo password"})[0]["state"] == "look failed"
    assert rows_of("a", None)[0]["state"] == "not looked at"
    assert rows_of("a", {"pci_gpus": [], "errors": {}})[0]["state"] == "no GPU"
    assert (
        rows_of("a", {"pci_gpus": [{"architecture": "Hopper"}], "docker": {"installed": True}})[0]["state"] == "no NIM"
    )


def test_host_before_the_driver_is_loaded() -> None:
    look = {
        "pci_gpus": [{"architecture": "Hopper"}],
        "gpus": [],
        "driver": {"loaded": "", "on_disk": "580.95.05"},
        "docker": {"installed": True, "version": ""},
        "errors": {"nvidia-smi": "no devices"},
    }
    [row] = rows_of("a", look)
    assert row["gpus"] == "1 x Hopper GPU"
    assert row["driver"] == "580.95.05 (not loaded)"
    assert row["engine"] == "not running"
    assert row["message"] == "nvidia-smi: no devices"


def test_mixed_gpus() -> None:
    look = {"gpus": [{"name": "B"}, {"name": "A"}, {"name": "B"}]}
    assert gpus_text(look) == "1 x A, 2 x B"
    assert gpus_text({}) == "none"


def test_table() -> None:
    rows = rows_of("gpu01", LOOK) + rows_of("gpu02", {"unreachable": True, "msg": "no route"})
    assert render_table(rows).splitlines() == [
        "HOST   GPUS             DRIVER     ENGINE  TOOLKIT  NIM      IMAGE DIGEST         STATE        READY AFTER",
        "gpu01  2 x NVIDIA H200  580.95.05  28.5.1  1.20.0   llama    sha256:0123456789ab  ready        31 s",
        "                                                    mistral  -                    failed       -",
        "gpu02  -                -          -       -        -        -                    unreachable  -",
        "",
        "gpu01/mistral: NIM mistral did not start.",
        "gpu02: no route",
    ]


def test_wanted_models() -> None:
    models = [{"name": "a"}, {"name": "b", "state": "absent"}, {"name": "c", "state": "stopped"}, "x"]
    assert wanted_models({"nim_models": models}) == ["a", "c"]
    assert wanted_models({}) == []


# -- the sections of the look ---------------------------------------------------------------------


class Api(DockerApi):
    def __init__(self, info: dict[str, t.Any] | None = None, boxes: dict[str, t.Any] | None = None) -> None:
        super().__init__("/nowhere")
        self.given = info
        self.boxes = boxes or {}

    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        if self.given is None:
            raise FleetError("docker_unavailable", "Asking Docker failed: no daemon listens there.")
        if path == "/info":
            return self.given
        return self.boxes.get(path.split("/")[2])


def test_bare_host() -> None:
    host = FakeHost({"/etc/os-release": 'ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n'})
    answer = gather(host, api=Api())
    assert answer["docker"]["installed"] is False
    assert answer["docker"]["problem"] == ""
    assert answer["container_toolkit"]["version"] == ""
    assert answer["nim"] == []
    assert answer["ports"] == []
    assert set(answer["free_bytes"]) == {"/", "/var/lib/docker", "/var/lib/containerd", "/var/lib/nim"}
    assert rows_of("a", answer)[0]["state"] == "no GPU"


def test_engine_that_does_not_answer() -> None:
    host = FakeHost({"/usr/bin/dockerd": ""})
    assert _host_services.engine(host, Api())["problem"].startswith("Asking Docker failed")
    live = _host_services.engine(
        host, Api({"ServerVersion": "28.5.1", "Runtimes": {"runc": {}, "nvidia": {}}, "LiveRestoreEnabled": True})
    )
    assert live["running"] is True
    assert live["runtimes"] == ["nvidia", "runc"]


def test_services_of_a_host() -> None:
    specification = {
        "name": "llama",
        "spec": "s",
        "image": "nvcr.io/nim/meta/llama:1.8.4",
        "digest": DIGEST,
        "gpus": ["GPU-1"],
        "ready_url": "http://127.0.0.1:9/v1/health/ready",
        "cache_directory": "/srv/c",
    }
    host = FakeHost(
        {
            "/etc/nim/llama.json": json.dumps(specification),
            "/etc/nim/broken.json": "{half",
            "/etc/nim/ngc.env": "NGC_API_KEY=x",
            "/run/nim/llama.json": json.dumps({"phase": "back_off", "failures": 3, "since": 1, "spec": "s"}),
        },
        {
            "systemctl show *": "Id=nim-llama.service\nLoadState=loaded\nActiveState=active\nSubState=running\nNRestarts=3\n"
        },
    )
    broken, llama = _host_services.services(host, Api({}))
    assert broken == {"name": "broken", "ready": False, "state": "broken configuration"}
    assert llama["state"] == "failing (3 failed starts)"
    assert (llama["port"], llama["digest"], llama["restarts"]) == (9, DIGEST, 3)


def test_states_in_words() -> None:
    def state(**model: t.Any) -> str:
        return _host_services.state_of({"ready": False, "reason": None, "phase": "starting", **model}, 0)

    assert state(ready=True) == "ready"
    assert state(phase="build") == "building the engine"
    assert state(reason="not_running") == "stopped"
    assert state(reason="docker_unavailable") == "docker unavailable"


def test_every_section_is_named_once() -> None:
    names = [name for name, _section in SECTIONS]
    assert len(names) == len(set(names))
    assert {"docker", "container_toolkit", "space", "ports", "nim"} <= set(names)
