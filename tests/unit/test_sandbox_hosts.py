# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sandbox's host table: names, addresses, hardware descriptions, inventory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))
from fleet_sandbox import gpus, inventory
from fleet_sandbox.common import SandboxError


@pytest.mark.parametrize(
    ("scenario", "name", "full"),
    [("", "gpu01", "gpu01"), ("multi_model", "gpu01", "multi-model-gpu01"), ("default", "A_b", "default-a-b")],
)
def test_names_are_unique_by_scenario_and_valid_host_names(scenario, name, full):
    assert inventory.full_name(scenario, name) == full


@pytest.mark.parametrize("name", ["", "1gpu", "world", "gpu.01", "a" * 42, "gpu 1"])
def test_a_name_that_is_no_host_name_is_refused(name):
    with pytest.raises(SandboxError, match="host name"):
        inventory.full_name("", name)


def test_addresses():
    assert inventory.allocate("gpu01", set()) == "172.30.1.1"
    assert inventory.allocate("gpu100", set()) == "172.30.1.100"
    assert inventory.allocate("gpu300", set()) == "172.30.2.1"
    assert inventory.allocate("default-gpu01", {"172.30.1.1"}) == "172.30.2.1"
    assert inventory.allocate("other", {"172.30.2.1", "172.30.2.3"}) == "172.30.2.2"


def test_addresses_may_run_out():
    taken = {"172.30.%d.%d" % (third, last) for third in range(2, 255) for last in range(256)}
    with pytest.raises(SandboxError, match="no free address"):
        inventory.allocate("other", taken)


def host(address, scenario=""):
    return {"address": address, "scenario": scenario, "host_key": "ssh-ed25519 AAAA"}


def test_inventory_is_yaml_with_the_hosts_of_one_scenario():
    table = {"gpu01": host("172.30.1.1"), "default-gpu01": host("172.30.2.1", "default")}
    rendered = yaml.safe_load(inventory.render(inventory.select(table, "default")))
    group = rendered["gpu_hosts"]
    assert group["hosts"] == {"default-gpu01": {"ansible_host": "172.30.2.1"}}
    assert group["vars"]["ansible_user"] == "root"
    assert rendered == inventory.structure(inventory.select(table, "default"))


def test_an_inventory_without_hosts_is_valid():
    assert yaml.safe_load(inventory.render({}))["gpu_hosts"]["hosts"] == {}


def test_hardware():
    described = gpus.describe("gpu01", "NVIDIA H200:143771:2,NVIDIA GeForce RTX 4090:24564:1", ["secure_boot=true"])
    assert [gpu["name"] for gpu in described["gpus"]] == ["NVIDIA H200", "NVIDIA H200", "NVIDIA GeForce RTX 4090"]
    assert described["gpus"][2]["architecture"] == "Ada Lovelace"
    assert len({gpu["uuid"] for gpu in described["gpus"]}) == 3
    assert described["secure_boot"] is True
    assert described["module_unload"] is True
    assert gpus.describe("gpu01", "NVIDIA H200:143771:1", []) == gpus.describe("gpu01", "NVIDIA H200:143771:1", [])
    assert gpus.describe("gpu01", "none", [])["gpus"] == []


@pytest.mark.parametrize("specification", ["H200", "NVIDIA H200:143771", "NVIDIA H200:x:1", "NVIDIA H2:1:1"])
def test_gpus_that_cannot_be_described_are_refused(specification):
    with pytest.raises(SandboxError, match="--gpus"):
        gpus.parse_gpus("gpu01", specification)


def test_a_setting_without_value_is_refused():
    with pytest.raises(SandboxError, match="KEY=VALUE"):
        gpus.describe("gpu01", "none", ["secure_boot"])
