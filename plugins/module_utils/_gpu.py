# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""GPUs as the driver sees them, out of what nvidia-smi prints."""

from __future__ import annotations

import re
import typing as t
import xml.etree.ElementTree as ET  # the XML comes from the host's own nvidia-smi
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GpuTelemetry:
    """What a GPU says of its own condition; an empty string or None where it does not tell.

    Attributes:
        ecc: ``Enabled`` or ``Disabled``; ``ecc_pending`` from the next reset on.
        ecc_volatile: Uncorrectable ECC errors since the driver was loaded or the GPU was reset.
        ecc_aggregate: Uncorrectable ECC errors in the GPU's life.
        sram_threshold_exceeded, remap_pending, remap_failure, retirement_pending: ``Yes`` or ``No``.
        repairs: Of channel repair pending, TPC repair pending and unrepairable memory those that are ``Yes``.
        slowdowns: Hardware slowdowns that are active now, by the names of nvidia-smi without their common beginning.
        fabric_health: Summary of the fabric's health, for example ``Healthy``.
        fabric_troubles: What is wrong with it, for example ``bandwidth: Degraded``.
        lost: The text with which the GPU refuses to answer, for example ``GPU requires reset``.
    """

    ecc: str = ""
    ecc_pending: str = ""
    ecc_volatile: int | None = None
    ecc_aggregate: int | None = None
    sram_threshold_exceeded: str = ""
    remap_pending: str = ""
    remap_failure: str = ""
    retirement_pending: str = ""
    repairs: tuple[str, ...] = ()
    slowdowns: tuple[str, ...] = ()
    mig_pending: str = ""
    fabric_health: str = ""
    fabric_troubles: tuple[str, ...] = ()
    lost: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver sees it. Memory in MiB; None where the driver does not tell."""

    index: int
    uuid: str
    name: str
    brand: str
    architecture: str
    memory_total_mib: int | None
    memory_used_mib: int | None
    memory_free_mib: int | None
    mig: str
    compute_mode: str
    minor: int | None
    bdf: str
    processes: tuple[dict[str, t.Any], ...] = ()
    mig_devices: tuple[dict[str, t.Any], ...] = ()
    persistence_mode: str = ""
    recovery_action: str = ""
    fabric_state: str = ""
    fabric_status: str = ""
    telemetry: GpuTelemetry = GpuTelemetry()


_NO_VALUE = {"", "n/a", "[n/a]", "unknown error", "gpu requires reset", "[gpu requires reset]", "[unknown error]"}


def _text(element: ET.Element | None, path: str) -> str:
    """Text of an element; empty when it is missing or says that there is no value."""
    found = (element.findtext(path) if element is not None else None) or ""
    found = found.strip()
    if found.lower() in _NO_VALUE or found.startswith(("Requested functionality", "ERR!", "[Not Supported]")):
        return ""
    return found


def whole_number(text: str) -> int | None:
    """A number that is all of the text; the beginning of another text is none."""
    return int(text) if re.match(r"[0-9]{1,18}\Z", text) else None


def _mib(text: str) -> int | None:
    """``143771 MiB`` -> 143771; other units are converted; any other text, also a number without unit, is None."""
    match = re.match(r"([0-9]{1,18})\s*([KMGT])i?B\Z", text)
    if not match:
        return None
    return int(match.group(1)) * {"K": 1, "M": 1024, "G": 1024**2, "T": 1024**3}[match.group(2)] // 1024


def normalise_bdf(bdf: str) -> str:
    """``00000000:00:06.0`` (nvidia-smi) -> ``0000:00:06.0`` (sysfs)."""
    domain, dummy, rest = bdf.strip().lower().partition(":")
    return "%s:%s" % (domain[-4:].rjust(4, "0"), rest) if rest else bdf.strip().lower()


def parse_smi(xml: str) -> tuple[str, str, tuple[Gpu, ...]]:
    """CUDA version, driver version and GPUs out of ``nvidia-smi -q -x``.

    Elements come and go between branches and values may be N/A or an error text: what is missing becomes an empty
    string or None, never an exception.

    Raises:
        ValueError: When the text is no XML at all, for example a message of nvidia-smi.
    """
    try:
        root = ET.fromstring(xml)  # noqa: S314 - output of the host's own nvidia-smi
    except ET.ParseError as error:
        raise ValueError(str(error)) from error
    gpus: list[Gpu] = []
    for index, element in enumerate(root.findall("gpu")):
        processes = [
            {
                "pid": whole_number(_text(entry, "pid")),
                "type": _text(entry, "type"),
                "name": _text(entry, "process_name"),
                "used_memory_mib": _mib(_text(entry, "used_memory")),
            }
            for entry in element.findall("processes/process_info")
        ]
        mig_devices = [
            {
                "index": whole_number(_text(entry, "index")),
                "gpu_instance_id": whole_number(_text(entry, "gpu_instance_id")),
                "compute_instance_id": whole_number(_text(entry, "compute_instance_id")),
                "uuid": _text(entry, "uuid"),
                "memory_total_mib": _mib(_text(entry, "fb_memory_usage/total")),
                "memory_used_mib": _mib(_text(entry, "fb_memory_usage/used")),
            }
            for entry in element.findall("mig_devices/mig_device")
        ]
        gpus.append(
            Gpu(
                index=index,
                uuid=_text(element, "uuid"),
                name=_text(element, "product_name"),
                brand=_text(element, "product_brand"),
                architecture=_text(element, "product_architecture"),
                memory_total_mib=_mib(_text(element, "fb_memory_usage/total")),
                memory_used_mib=_mib(_text(element, "fb_memory_usage/used")),
                memory_free_mib=_mib(_text(element, "fb_memory_usage/free")),
                mig=_text(element, "mig_mode/current_mig"),
                compute_mode=_text(element, "compute_mode"),
                minor=whole_number(_text(element, "minor_number")),
                bdf=normalise_bdf(element.get("id") or _text(element, "pci/pci_bus_id")),
                processes=tuple(processes),
                mig_devices=tuple(mig_devices),
                persistence_mode=_text(element, "persistence_mode"),
                recovery_action=_text(element, "gpu_recovery_action"),
                fabric_state=_text(element, "fabric/state"),
                fabric_status=_text(element, "fabric/status"),
                telemetry=_telemetry(element),
            )
        )
    return _text(root, "cuda_version"), _text(root, "driver_version"), tuple(gpus)


#: What nvidia-smi prints in place of values when a GPU does not answer any more.
_LOST = ("gpu requires reset", "gpu is lost")
#: Values of a fabric's health that mean no trouble, the others being told as they are.
_FABRIC_GOOD = {
    "bandwidth": "Full",
    "route_recovery_in_progress": "False",
    "route_unhealthy": "False",
    "access_timeout_recovery": "False",
    "incorrect_configuration": "None",
    "partition_assigned": "True",
}
_REPAIRS = ("channel_repair_pending", "tpc_repair_pending", "unrepairable_memory")


def _telemetry(gpu: ET.Element) -> GpuTelemetry:
    """Branches differ: clocks were throttled before they had events, and memory was counted by bits before Ampere."""
    fabric = gpu.find("fabric/health")
    return GpuTelemetry(
        ecc=_text(gpu, "ecc_mode/current_ecc"),
        ecc_pending=_text(gpu, "ecc_mode/pending_ecc"),
        ecc_volatile=_uncorrectable(gpu.find("ecc_errors/volatile")),
        ecc_aggregate=_uncorrectable(gpu.find("ecc_errors/aggregate")),
        sram_threshold_exceeded=_text(gpu, "ecc_errors/aggregate/sram_threshold_exceeded"),
        remap_pending=_text(gpu, "remapped_rows/remapped_row_pending"),
        remap_failure=_text(gpu, "remapped_rows/remapped_row_failure"),
        retirement_pending=_text(gpu, "retired_pages/pending_retirement")
        or _text(gpu, "retired_pages/pending_blacklist"),
        repairs=tuple(name for name in _REPAIRS if _text(gpu, "ecc_errors/" + name) == "Yes"),
        slowdowns=tuple(
            element.tag.split("_reason_", 1)[1]
            for path in ("clocks_event_reasons", "clocks_throttle_reasons")
            for element in gpu.findall(path + "/*")
            if "_reason_hw_" in element.tag and (element.text or "").strip() == "Active"
        ),
        mig_pending=_text(gpu, "mig_mode/pending_mig"),
        fabric_health=_text(gpu, "fabric/health/summary"),
        fabric_troubles=tuple(
            "%s: %s" % (name.replace("_", " "), value)
            for name, good in _FABRIC_GOOD.items()
            for value in [_text(fabric, name)]
            if value not in ("", good)
        ),
        lost=next(
            (text for text in map(str.strip, gpu.itertext()) if text.strip("[]").lower() in _LOST),
            "",
        ).strip("[]"),
    )


def _uncorrectable(counters: ET.Element | None) -> int | None:
    """Sum of the counters of uncorrectable errors; None when none of them has a value."""
    found = [
        number
        for element in (counters if counters is not None else ())
        if "_uncorrectable" in element.tag
        for number in [whole_number(_text(element, "."))]
        if number is not None
    ]
    if found:
        return sum(found)
    return whole_number(_text(counters, "double_bit/total"))


def with_mig_uuids(gpus: t.Sequence[Gpu], listed: str) -> tuple[Gpu, ...]:
    """GPUs whose MIG devices have the UUIDs that ``nvidia-smi -L`` lists; not every branch has them in its XML."""
    found: dict[tuple[str, int], str] = {}
    gpu_uuid = ""
    for line in listed.splitlines():
        gpu = re.match(r"GPU \d+: .*\(UUID: (GPU-[0-9A-Fa-f-]+)\)", line)
        if gpu:
            gpu_uuid = gpu.group(1)
        device = re.match(r"\s+MIG \S+\s+Device\s+(\d+): \(UUID: (MIG-[0-9A-Za-z/-]+)\)", line)
        if device:
            found[(gpu_uuid, int(device.group(1)))] = device.group(2)
    return tuple(
        replace(
            gpu,
            mig_devices=tuple(
                device if device.get("uuid") else dict(device, uuid=found.get((gpu.uuid, device.get("index") or 0), ""))
                for device in gpu.mig_devices
            ),
        )
        for gpu in gpus
    )
