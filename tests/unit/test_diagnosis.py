# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Findings of one look: the right ones, the worst first, the cause before its consequences."""

from __future__ import annotations

import dataclasses
import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _diagnosis
from ansible_collections.gpu_fleet.nim.plugins.module_utils._diagnosis import diagnose
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._findings import Diagnosis, Finding
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import Finding as PlanFinding
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import HostPlan, Planned
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._redaction import Redactor
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Change, Disruption
from health_world import Nim, World, check, word
from nim_machine import GPUS


class Sick(World):
    """A host with one service, as Docker and the plan see it."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.plan = HostPlan()
        gpu = dataclasses.replace(GPUS[0], persistence_mode="Enabled", recovery_action="None")
        self.inventory = GpuInventory(
            pci=(PciGpu(gpu.bdf, "2335", "Hopper", "nvidia"),),
            gpus=(gpu,),
            driver=LoadedDriver("580.95.05", "open", True),
            smi_driver_version="580.95.05",
        )
        self.commands = {
            "docker events *": "",
            "docker exec * nvidia-smi -L": "GPU 0: NVIDIA H200",
            **self.commands,
        }
        self.unit("llama")

    def info(self) -> dict[str, t.Any]:
        if self.docker_down:
            raise FleetError("docker_unavailable", "Asking Docker failed: no daemon listens there.")
        return {}

    def look(self, **more: t.Any) -> Diagnosis:
        models = [{"name": "llama", "image": "x", "port": self.port}]
        return diagnose(self, {"nim_service": {"models": models}}, api=t.cast(t.Any, self), **more)


@pytest.fixture
def sick(nim: Nim, monkeypatch: pytest.MonkeyPatch) -> Sick:
    host = Sick(nim.port)
    monkeypatch.setattr(_diagnosis, "plan_host", lambda *_arguments: host.plan)
    monkeypatch.setattr(_diagnosis, "observe_gpus", lambda _host: host.inventory)
    return host


def told(found: Diagnosis) -> list[tuple[str, str, str]]:
    return [(one.severity, one.layer, one.reason) for one in found.ordered()]


def test_a_sound_host_has_no_findings(sick: Sick) -> None:
    sick.box("llama")
    found = sick.look()
    assert told(found) == []
    assert found.worst == "ok"
    assert found.models[0]["ready"] is True


def test_a_host_without_gpu_is_said_and_left(sick: Sick) -> None:
    sick.plan = HostPlan(gpu=False)
    assert told(sick.look()) == [("note", "host", "no_gpu")]


def test_several_faults_in_the_order_of_their_weight(sick: Sick, nim: Nim) -> None:
    nim.ready = 503
    sick.unit("llama", ActiveState="activating", SubState="auto-restart", NRestarts=6)
    word(sick, "back_off", 6, "ended with code 1", age=200)
    sick.files["/run/nim/llama.json"] = sick.files.pop("/run/nim/a.json")
    sick.journal["CONTAINER_NAME=nim-llama"] = ["INFO begin", "ValueError: Unknown RoPE scaling type llama3"]
    sick.commands["docker events *"] = "".join("%d die nim-llama 1\n" % second for second in range(5))
    sick.free = 3 * 10**9
    sick.kernel = [(sick.clock - 7200, "NVRM: Xid (PCI:0000:%s): 31, pid=7, x" % sick.inventory.gpus[0].bdf[5:-2])]
    sick.inventory = dataclasses.replace(
        sick.inventory, gpus=(dataclasses.replace(sick.inventory.gpus[0], recovery_action="GPU Reset"),)
    )
    change = Change(
        "docker_daemon", "/etc/docker/daemon.json", None, {"live-restore": True}, "keys differ", Disruption.RELOAD
    )
    later = Planned(Change("nim_service", "x", None, None, "after it"), "docker_daemon")
    sick.plan = HostPlan(
        planned=[Planned(change), later],
        errors=[
            PlanFinding("ngc_login", "unreadable", "Reading /root/.docker/config.json failed; repair it."),
            PlanFinding("nim_image", "unreadable", "Not looked at.", "ngc_login"),
        ],
    )
    found = sick.look()
    assert told(found) == [
        ("failed", "gpu", "recovery_action"),
        ("failed", "ngc_login", "unreadable"),
        ("failed", "model", "container_ended"),
        ("warning", "host", "disk_full"),
        ("warning", "docker_daemon", "drift"),
        ("warning", "model", "restart_loop"),
        ("note", "gpu", "xid"),
    ]
    assert found.worst == "failed"
    by_reason = {one.reason: one for one in found.findings}
    model = by_reason["container_ended"]
    assert (model.model, model.signature) == ("llama", "eng-30a")
    assert "(6 starts in a row have failed): the image is too old" in model.cause
    assert model.remedy == "use a newer tag of the image"
    assert "ValueError: Unknown RoPE scaling type llama3" in model.evidence
    assert by_reason["unreadable"].remedy == "repair it"
    assert by_reason["drift"].evidence == ('/etc/docker/daemon.json: absent -> {"live-restore": true}',)
    assert by_reason["drift"].remedy.endswith("(reload)")
    assert by_reason["xid"].gpu == sick.inventory.gpus[0].uuid
    assert "Xid 31" in by_reason["xid"].cause
    assert "(once since boot, the last 2 hours ago)" in by_reason["xid"].cause
    assert json.dumps([one.as_dict() for one in found.findings])


def test_lost_gpus_of_a_service_that_answers(sick: Sick) -> None:
    sick.box("llama", Running=True)
    sick.commands["docker exec * nvidia-smi -L"] = (255, "", "Failed to initialize NVML: Unknown Error")
    [finding] = sick.look().findings
    assert (finding.severity, finding.reason, finding.model) == ("failed", "gpus_lost", "llama")
    assert "systemctl daemon-reload" in finding.cause
    assert "site does" in finding.remedy


def test_a_dead_docker_is_the_cause_and_the_model_its_consequence(sick: Sick, nim: Nim) -> None:
    nim.ready = 503
    sick.docker_down = True
    assert told(sick.look()) == [
        ("failed", "docker_engine", "docker_unavailable"),
        ("failed", "model", "docker_unavailable"),
    ]


def test_a_start_on_its_way_is_a_note(sick: Sick, nim: Nim) -> None:
    nim.ready = 503
    sick.box("llama")
    sick.log("llama", "Loading model weights")
    [finding] = sick.look().findings
    assert (finding.severity, finding.reason) == ("note", "starting")
    assert "loading the model" in finding.cause


def test_a_start_that_is_lost_is_a_failure_with_the_users_cause(sick: Sick, nim: Nim) -> None:
    nim.ready = 503
    sick.box("llama")
    sick.log("llama", "lease: quota exceeded")
    own = [_diagnosis.Signature("site-1", "quota exceeded", "container", "no quota", "ask")]
    [finding] = sick.look(signatures=own).findings
    assert (finding.severity, finding.reason, finding.signature, finding.remedy) == (
        "failed",
        "start_failed",
        "site-1",
        "ask",
    )


def test_a_kill_for_memory_names_the_container(sick: Sick) -> None:
    sick.box("llama", box_id="c" * 64)
    line = "oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/nim.slice/docker-%s.scope,task=python3,pid=8,uid=0" % (
        "c" * 64
    )
    sick.kernel = [(sick.clock - 60, line), (sick.clock - 30, line)]
    [finding] = sick.look().findings
    assert (finding.severity, finding.reason, finding.model) == ("warning", "out_of_memory", "llama")
    assert finding.cause.startswith("the kernel killed python3 of container nim-llama for want of memory (2 times")


def test_a_completion_that_failed_is_a_finding(sick: Sick, nim: Nim) -> None:
    nim.chat = (500, {"error": {"message": "EngineDeadError"}})
    sick.box("llama")
    check(sick, [{"name": "llama", "port": nim.port}])
    [finding] = sick.look().findings
    assert (finding.severity, finding.reason, finding.model) == ("failed", "completion_failed", "llama")


def test_driver_and_maintenance(sick: Sick, nim: Nim) -> None:
    nim.ready = 503
    sick.unit("llama", ActiveState="inactive", SubState="dead", ConditionResult="no")
    sick.files["/var/lib/nim/maintenance"] = b""
    sick.inventory = dataclasses.replace(
        sick.inventory,
        gpus=(),
        smi_driver_version="",
        smi_error="Failed to initialize NVML: Driver/library version mismatch",
    )
    assert told(sick.look()) == [
        ("failed", "gpu", "driver_mismatch"),
        ("warning", "host", "maintenance"),
        ("note", "model", "maintenance"),
    ]
    sick.inventory = dataclasses.replace(sick.inventory, driver=None)
    assert ("failed", "gpu", "driver_not_loaded") in told(sick.look())


def test_secrets_are_masked_in_everything_that_is_found(sick: Sick, nim: Nim) -> None:
    secret = "known-secret-0123"
    nim.ready = 503
    sick.box("llama")
    sick.log("llama", "with %s" % secret, "EngineDeadError %s nvapi-abcdefghij" % secret)
    sick.plan = HostPlan(errors=[PlanFinding("docker_group", "x", "Reading %s failed; see %s." % (secret, secret))])
    found = sick.look(redactor=Redactor([secret]))
    shown = json.dumps([one.as_dict() for one in found.findings])
    assert "EngineDeadError ***" in shown
    assert secret not in shown
    assert "nvapi-" not in shown


def test_the_order_is_total() -> None:
    found = Diagnosis(
        [
            Finding("note", "host", "a", "c"),
            Finding("failed", "model", "b", "c", model="z"),
            Finding("failed", "model", "b", "c", model="a"),
            Finding("failed", "nim_image", "d", "c"),
            Finding("warning", "nvidia_driver", "e", "c"),
        ]
    )
    assert [(one.layer, one.model) for one in found.ordered()] == [
        ("nim_image", ""),
        ("model", "a"),
        ("model", "z"),
        ("nvidia_driver", ""),
        ("host", ""),
    ]
