# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Verdicts on GPUs: captures of real ones are all ok, and every rule is exercised by a variation of a capture."""

from __future__ import annotations

import pathlib
import re

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu import parse_smi
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_bus import PciGpu
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_health import (
    Xid,
    gpu_health,
    needs_kernel_log,
    parse_xids,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_inventory import GpuInventory, observe_gpus
from ansible_collections.gpu_fleet.nim.plugins.module_utils._kernel_log import KernelLine
from ansible_collections.gpu_fleet.nim.plugins.module_utils._loaded_driver import LoadedDriver
from ansible_collections.gpu_fleet.nim.plugins.module_utils._verdict import (
    OK,
    REFUSED,
    UNKNOWN,
    WARNING,
    Verdict,
    worst,
)
from fake_host import FakeHost

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
CAPTURES = [
    *sorted((FIXTURES / "nvidia-smi").glob("h200-x*.xml")),
    FIXTURES / "h200-single/nvidia-smi-q-x.580.159.04.h200.xml",
]
ONE = (FIXTURES / "nvidia-smi/h200-x1.xml").read_text()
TWO = (FIXTURES / "nvidia-smi/h200-x2.xml").read_text()
NO_TELEMETRY = dict.fromkeys(
    (
        "gpu_recovery_action",
        "current_ecc",
        "pending_ecc",
        "sram_uncorrectable_parity",
        "sram_uncorrectable_secded",
        "dram_uncorrectable",
        "sram_threshold_exceeded",
        "remapped_row_pending",
        "remapped_row_failure",
        "compute_mode",
        "persistence_mode",
        "total",
        "used",
        "free",
        "current_mig",
        "pending_mig",
    ),
    "N/A",
)


def inventory(xml: str, *, nvswitches: int = 0) -> GpuInventory:
    cuda, version, gpus = parse_smi(xml)
    return GpuInventory(
        pci=tuple(PciGpu(gpu.bdf, "2335", "Hopper", "nvidia") for gpu in gpus),
        nvswitches=nvswitches,
        driver=LoadedDriver("580.159.04", "open", True),
        gpus=gpus,
        cuda_version=cuda,
        smi_driver_version=version,
    )


def varied(xml: str, values: dict[str, str]) -> str:
    """The capture with other texts in elements of these names, in the first GPU only."""
    head, found, rest = xml.partition("</gpu>")
    for name, value in values.items():
        head, count = re.subn(r"<%s>[^<]*</%s>" % (name, name), "<%s>%s</%s>" % (name, value, name), head)
        assert count, name
    return head + found + rest


def said(log: str) -> list[KernelLine]:
    return [KernelLine(float(number), text) for number, text in enumerate(log.splitlines())]


def judged(values: dict[str, str], check: str, *, xml: str = TWO, nvswitches: int = 0, log: str | None = "") -> Verdict:
    """The verdict of one check of the first GPU."""
    found = inventory(varied(xml, values), nvswitches=nvswitches)
    verdicts = gpu_health(found, None if log is None else said(log))
    others = [verdict for verdict in verdicts if verdict.gpu != found.gpus[0].uuid]
    assert worst(others) == OK, others
    (verdict,) = [verdict for verdict in verdicts if (verdict.check, verdict.gpu) == (check, found.gpus[0].uuid)]
    return verdict


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.name)
def test_real_gpus_are_all_ok(path: pathlib.Path) -> None:
    found = inventory(path.read_text())
    verdicts = gpu_health(found, "")
    assert {verdict.verdict for verdict in verdicts} == {OK}
    assert len(verdicts) == 2 + 9 * len(found.gpus)
    assert not any(verdict.reason or verdict.remedy for verdict in verdicts)
    assert not needs_kernel_log(found)


RULES = [
    ("gpu_recovery_action", "GPU Reset", "recovery_action", REFUSED, "recovery_action", "--gpu-reset -i 0"),
    ("gpu_recovery_action", "Node Reboot", "recovery_action", REFUSED, "recovery_action", "reboot the host"),
    ("gpu_recovery_action", "Drain P2P", "recovery_action", REFUSED, "recovery_action", "its peers"),
    ("gpu_recovery_action", "Drain and Reset", "recovery_action", REFUSED, "recovery_action", "--gpu-reset -i 0"),
    ("gpu_recovery_action", "Recover IMEX Domain", "recovery_action", REFUSED, "recovery_action", "nvidia-imex"),
    ("gpu_recovery_action", "Wave Hands", "recovery_action", WARNING, "recovery_action_unknown", "documentation"),
    ("gpu_recovery_action", "N/A", "recovery_action", UNKNOWN, "not_told", ""),
    ("gpu_recovery_action", "Unknown Error", "recovery_action", UNKNOWN, "not_told", ""),
    ("gpu_temp", "GPU requires reset", "recovery_action", REFUSED, "gpu_reset_required", "--gpu-reset -i 0"),
    ("gpu_temp", "GPU is lost", "recovery_action", REFUSED, "gpu_lost", "reboot the host"),
    ("remapped_row_pending", "Yes", "memory_repair", REFUSED, "row_remap_pending", "--gpu-reset -i 0"),
    ("remapped_row_failure", "Yes", "memory_repair", REFUSED, "row_remap_failed", "replaced"),
    ("pending_retirement", "Yes", "memory_repair", REFUSED, "page_retirement_pending", "--gpu-reset -i 0"),
    ("pending_blacklist", "Yes", "memory_repair", REFUSED, "page_retirement_pending", "--gpu-reset -i 0"),
    ("channel_repair_pending", "Yes", "memory_repair", WARNING, "channel_repair_pending", "--gpu-reset"),
    ("tpc_repair_pending", "Yes", "memory_repair", WARNING, "tpc_repair_pending", "--gpu-reset"),
    ("unrepairable_memory", "Yes", "memory_repair", WARNING, "unrepairable_memory", "checked"),
    ("sram_threshold_exceeded", "Yes", "ecc", REFUSED, "sram_threshold_exceeded", "replaced"),
    ("pending_ecc", "Disabled", "ecc", WARNING, "ecc_mode_pending", "--gpu-reset"),
    ("state", "In Progress", "fabric", REFUSED, "fabric_not_ready", "nvidia-fabricmanager"),
    ("state", "Not Started", "fabric", WARNING, "fabric_not_ready", "nvidia-fabricmanager"),
    ("state", "N/A", "fabric", OK, "", ""),
    ("state", "Not Supported", "fabric", OK, "", ""),
    ("state", "Dancing", "fabric", UNKNOWN, "not_told", ""),
    ("status", "Insufficient Resources", "fabric", REFUSED, "fabric_failed", "nvidia-fabricmanager"),
    ("summary", "Healthy", "fabric", OK, "", ""),
    ("summary", "Unhealthy", "fabric", REFUSED, "fabric_unhealthy", "nvidia-fabricmanager"),
    ("summary", "Limited Capacity", "fabric", WARNING, "fabric_degraded", "nvidia-fabricmanager"),
    ("compute_mode", "Prohibited", "compute_mode", REFUSED, "compute_mode", "nvidia-smi -i 0 -c DEFAULT"),
    ("compute_mode", "Exclusive_Process", "compute_mode", WARNING, "compute_mode", "nvidia-smi -i 0 -c DEFAULT"),
    ("compute_mode", "N/A", "compute_mode", UNKNOWN, "not_told", ""),
    ("pending_mig", "Enabled", "mig", WARNING, "mig_mode_pending", "--gpu-reset"),
    ("persistence_mode", "Disabled", "persistence", WARNING, "persistence_off", "nvidia_driver_persistenced"),
    ("persistence_mode", "N/A", "persistence", UNKNOWN, "not_told", ""),
    ("clocks_event_reason_hw_thermal_slowdown", "Active", "slowdown", WARNING, "hardware_slowdown", "cooling"),
    ("clocks_event_reason_hw_power_brake_slowdown", "Active", "slowdown", WARNING, "hardware_slowdown", "power"),
    ("clocks_event_reason_sw_power_cap", "Active", "slowdown", OK, "", ""),
]


@pytest.mark.parametrize(("element", "value", "check", "verdict", "reason", "remedy"), RULES)
def test_rules(element: str, value: str, check: str, verdict: str, reason: str, remedy: str) -> None:
    found = judged({element: value}, check)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert remedy in found.remedy and bool(found.remedy) == bool(remedy)
    assert found.message.startswith("GPU 0 (NVIDIA H200, GPU-")


def counted(volatile: int, aggregate: int) -> str:
    """The first counter of uncorrectable DRAM errors is the volatile one, the second is in the aggregate."""
    before, between, after = TWO.split("<dram_uncorrectable>0<", 2)
    return "".join(
        (before, "<dram_uncorrectable>%d<" % volatile, between, "<dram_uncorrectable>%d<" % aggregate, after)
    )


def test_uncorrectable_errors() -> None:
    found = judged({}, "ecc", xml=counted(2, 2))
    assert (found.verdict, found.reason) == (REFUSED, "ecc_uncorrectable")
    assert "2 uncorrectable memory errors since it was last reset" in found.message
    # Those of before the last reset were dealt with.
    found = judged({}, "ecc", xml=counted(0, 3))
    assert found.verdict == OK and "(3 in its life)" in found.message
    old = "<volatile><double_bit><total>1</total></double_bit></volatile>"
    xml = re.sub(r"<volatile>.*?</volatile>", old, TWO, count=1, flags=re.DOTALL)
    assert judged({}, "ecc", xml=xml).reason == "ecc_uncorrectable"


def test_ecc_that_is_off_has_no_counters() -> None:
    off = {
        "current_ecc": "Disabled",
        "pending_ecc": "Disabled",
        "dram_uncorrectable": "N/A",
        "sram_uncorrectable_parity": "N/A",
        "sram_uncorrectable_secded": "N/A",
    }
    assert judged(off, "ecc").verdict == OK


def test_a_gpu_on_nvswitches_must_have_joined() -> None:
    assert judged({"state": "N/A"}, "fabric", nvswitches=4).verdict == UNKNOWN
    assert judged({"state": "Not Started"}, "fabric", nvswitches=4).verdict == REFUSED


def test_a_badly_connected_gpu_says_what_is_wrong_and_nothing_else() -> None:
    health = {
        "summary": "Unhealthy",
        "bandwidth": "Full",
        "route_unhealthy": "True",
        "route_recovery_in_progress": "False",
        "incorrect_configuration": "Insufficient Nvlinks",
        "partition_assigned": "True",
    }
    assert "(route unhealthy: True, incorrect configuration: Insufficient Nvlinks)" in judged(health, "fabric").message
    health.update(route_unhealthy="False", incorrect_configuration="None", partition_assigned="False")
    assert "(partition assigned: False)" in judged(health, "fabric").message
    health.update(partition_assigned="N/A", bandwidth="Degraded", summary="Limited Capacity")
    assert "(bandwidth: Degraded)" in judged(health, "fabric").message
    health.update(bandwidth="N/A", summary="Unhealthy")
    assert "(no reason given)" in judged(health, "fabric").message


def test_an_exclusive_gpu_that_somebody_holds() -> None:
    entry = "<process_info><pid>77</pid><type>C</type><process_name>train</process_name></process_info>"
    xml = TWO.replace("<processes>", "<processes>" + entry, 1)
    found = judged({"compute_mode": "Exclusive_Process"}, "compute_mode", xml=xml)
    assert (found.verdict, found.reason) == (REFUSED, "compute_mode_busy")
    assert "held by train (pid 77)" in found.message
    assert judged({}, "compute_mode", xml=xml).verdict == OK


def test_the_reset_names_the_gpu_it_is_about() -> None:
    xml = TWO[::-1].replace("<remapped_row_pending>No<"[::-1], "<remapped_row_pending>Yes<"[::-1], 1)[::-1]
    (found,) = [verdict for verdict in gpu_health(inventory(xml), "") if verdict.verdict != OK]
    assert "nvidia-smi --gpu-reset -i 1'" in found.remedy
    assert found.sentence.startswith("GPU 1 (") and "; stop what uses it" in found.sentence


def test_a_gpu_without_telemetry_is_unknown_and_not_refused() -> None:
    """As unified memory (GB10) and MIG have it: hardly anything is told."""
    verdicts = gpu_health(inventory(varied(ONE, NO_TELEMETRY)), "")
    assert worst(verdicts) == UNKNOWN
    unknown = {verdict.check for verdict in verdicts if verdict.verdict == UNKNOWN}
    assert unknown == {"recovery_action", "memory_repair", "ecc", "compute_mode", "persistence"}
    bare = "<nvidia_smi_log><driver_version>580.1.1</driver_version><gpu id='00000000:01:00.0'/></nvidia_smi_log>"
    assert worst(gpu_health(inventory(bare), "")) == UNKNOWN


# -- the host -------------------------------------------------------------------------------------

PCI = (PciGpu("0000:00:06.0", "2335", "Hopper", "nvidia"),)
DRIVER = LoadedDriver("580.159.04", "open", True)


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        (GpuInventory(pci=PCI), UNKNOWN, "driver_not_loaded"),
        (
            GpuInventory(
                pci=PCI, driver=DRIVER, smi_error="Failed to initialize NVML: Driver/library version mismatch"
            ),
            REFUSED,
            "driver_mismatch",
        ),
        (
            GpuInventory(
                pci=PCI,
                driver=DRIVER,
                smi_error="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            ),
            REFUSED,
            "nvml_failed",
        ),
        (GpuInventory(pci=PCI, driver=DRIVER, smi_error="No devices were found"), REFUSED, "nvml_failed"),
        (
            GpuInventory(
                pci=PCI,
                driver=DRIVER,
                smi_error="Unable to determine the device handle for GPU0000:00:06.0: Unknown Error",
            ),
            REFUSED,
            "gpu_lost",
        ),
        (
            GpuInventory(pci=PCI, driver=DRIVER, smi_error="nvidia-smi: no end after 90 seconds"),
            UNKNOWN,
            "nvml_unknown",
        ),
        (GpuInventory(pci=PCI, driver=DRIVER, smi_error="nvidia-smi: not found"), UNKNOWN, "nvml_unknown"),
    ],
)
def test_nvidia_smi_that_gives_no_answer(found: GpuInventory, verdict: str, reason: str) -> None:
    (answer,) = gpu_health(found)
    assert (answer.check, answer.verdict, answer.reason) == ("nvml", verdict, reason)


def test_no_gpu_no_verdict() -> None:
    assert gpu_health(GpuInventory()) == ()


def test_a_gpu_that_fell_off_the_bus() -> None:
    host = FakeHost(commands={"nvidia-smi -q -x": ONE})
    host.files["/sys/module/nvidia/version"] = b"580.159.04\n"
    for bdf, driver in (("0000:00:06.0", "nvidia"), ("0000:00:07.0", "nvidia"), ("0000:00:08.0", "vfio-pci")):
        base = "/sys/bus/pci/devices/%s/" % bdf
        host.files.update({base + "vendor": b"0x10de", base + "device": b"0x2335", base + "class": b"0x030200"})
        host.links[base + "driver"] = "../drivers/" + driver
    found = observe_gpus(host)
    assert found.unlisted == ("0000:00:07.0",)
    (refused,) = [verdict for verdict in gpu_health(found) if verdict.verdict == REFUSED]
    assert (refused.check, refused.reason, refused.gpu) == ("gpu_count", "gpu_lost", "")
    assert "0000:00:07.0" in refused.message
    host.files["/proc/driver/nvidia/gpus/0000:00:07.0/information"] = b"Model: \t NVIDIA H200\nGPU Excluded:\t Yes\n"
    assert observe_gpus(host).unlisted == ()


# -- Xid errors -----------------------------------------------------------------------------------

LOADING = "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"


def test_xid_lines() -> None:
    log = (
        "NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.\n"
        + LOADING
        + "[ 12.5] NVRM: Xid (PCI:0000:1B:00 GPU-I:05): 94, pid=7194, Contained: CE User Channel (0x9). RST: No\n"
        "NVRM: Xid (PCI:0000:1b:00 GPU-I:05 GPU-CI:01): 94, pid=7195, name=python3, x\n"
        "NVRM: Xid (PCI:0000:1b:00): 63, Row Remapper: New row marked for remapping\n"
        "nvidia-nvswitch0: SXid (PCI:0000:c1:00.0): 12028, Non-fatal\n"
        "NVRM: Xid (PCI:0000:1b:00): x\n"
    )
    assert parse_xids(said(log)) == (Xid("0000:1b:00", 94), Xid("0000:1b:00", 63))


@pytest.mark.parametrize(
    ("numbers", "action", "verdict"),
    [
        ((13, 31, 43, 45), "N/A", OK),
        ((154,), "None", OK),
        ((63,), "N/A", WARNING),
        ((74,), "None", WARNING),
        ((9999,), "N/A", WARNING),
        ((79,), "None", WARNING),
        ((79,), "N/A", REFUSED),
        ((13, 119), "N/A", REFUSED),
    ],
)
def test_xids_count_as_much_as_the_driver_leaves_open(numbers: tuple[int, ...], action: str, verdict: str) -> None:
    log = "".join("NVRM: Xid (PCI:0000:00:06): %d, pid=1, name=x\n" % number for number in numbers)
    found = judged({"gpu_recovery_action": action}, "xid", log=log)
    assert (found.verdict, found.reason) == (verdict, "" if verdict == OK else "xid")
    # The remedy is one after which the error is forgotten.
    assert verdict != REFUSED or "load the driver anew" in found.remedy
    if verdict != OK:
        assert "Xid %d" % numbers[-1] in found.message and "Xid 13" not in found.message
    # The driver's next load resets the GPU.
    assert judged({"gpu_recovery_action": action}, "xid", log=log + LOADING).verdict == OK
