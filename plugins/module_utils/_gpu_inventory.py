# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What GPUs a host has, read without changing anything.

nvidia-smi loads the kernel module when it is not loaded; therefore it is asked only while the module is loaded.
Everything else comes from sysfs and procfs and works on a host without any driver.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._gpu import Gpu, parse_smi, whole_number, with_mig_uuids
from ._gpu_bus import GRACE_BLACKWELL, PciGpu, has_nvlink5, hexadecimal, observe_pci
from ._host import Host
from ._loaded_driver import LoadedDriver, observe_loaded_driver

_SMI_TIMEOUT = 90.0  # seconds; eight GPUs without persistence mode take half a minute


@dataclass(frozen=True)
class GpuInventory:
    """All there is to know about the GPUs of a host at one moment.

    Attributes:
        nvswitches: Number of NVSwitch devices on the PCI bus.
        nvlink5: True where NVLink switches are managed over InfiniBand (HGX B200 and newer).
        imex: True on Grace Blackwell, whose NVLink domain spans hosts.
        cuda_version: CUDA version of the user-space driver, empty when nvidia-smi did not run.
        smi_error: Why nvidia-smi gave no answer; empty when it did or was not asked.
        unlisted: PCI addresses of GPUs that the driver is bound to and nvidia-smi does not list, other than those that
            the driver was told to leave out.
    """

    pci: tuple[PciGpu, ...] = ()
    nvswitches: int = 0
    nvlink5: bool = False
    imex: bool = False
    driver: LoadedDriver | None = None
    gpus: tuple[Gpu, ...] = ()
    cuda_version: str = ""
    smi_driver_version: str = ""
    smi_error: str = ""
    unlisted: tuple[str, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        """Distinct architectures of all GPUs, sorted."""
        return tuple(sorted({gpu.architecture for gpu in self.pci if gpu.architecture}))

    @property
    def needs_fabric_manager(self) -> bool:
        return self.nvswitches > 0 or self.nvlink5

    @property
    def fabric_states(self) -> tuple[str, ...]:
        """Fabric state of every GPU that has one (N/A left out)."""
        return tuple(gpu.fabric_state for gpu in self.gpus if gpu.fabric_state)


def _unlisted(host: Host, pci: t.Sequence[PciGpu], gpus: t.Sequence[Gpu]) -> tuple[str, ...]:
    listed = {gpu.bdf for gpu in gpus}
    return tuple(
        gpu.bdf
        for gpu in pci
        if gpu.bound == "nvidia"
        and gpu.bdf not in listed
        and not re.search(
            r"^GPU Excluded:\s*Yes",
            host.read_text("/proc/driver/nvidia/gpus/%s/information" % gpu.bdf) or "",
            re.MULTILINE,
        )
    )


def _gpus_from_proc(host: Host, pci: t.Sequence[PciGpu]) -> tuple[Gpu, ...]:
    """Name, UUID and minor number of every GPU from procfs: works while the user-space driver does not match."""
    architectures = {gpu.bdf: gpu.architecture for gpu in pci}
    gpus: list[Gpu] = []
    base = "/proc/driver/nvidia/gpus"
    for bdf in host.list_dir(base):
        text = host.read_text("%s/%s/information" % (base, bdf)) or ""
        values = {
            key.strip(): value.strip() for key, separator, value in (line.partition(":") for line in text.splitlines())
        }
        minor = whole_number(values.get("Device Minor", ""))
        gpus.append(
            Gpu(
                index=len(gpus),
                uuid=values.get("GPU UUID", ""),
                name=values.get("Model", ""),
                brand="",
                architecture=architectures.get(bdf, ""),
                memory_total_mib=None,
                memory_used_mib=None,
                memory_free_mib=None,
                mig="",
                compute_mode="",
                minor=minor,
                bdf=bdf,
            )
        )
    return tuple(gpus)


def observe_gpus(host: Host, *, with_smi: bool = True) -> GpuInventory:
    """Look at all GPUs of a host.

    Args:
        with_smi: False leaves nvidia-smi out; GPUs then come from procfs, without memory and processes.
    """
    pci, switches = observe_pci(host)
    driver = observe_loaded_driver(host)
    cuda = smi_version = smi_error = ""
    gpus: tuple[Gpu, ...] = ()
    unlisted: tuple[str, ...] = ()
    if driver is not None:
        if with_smi:
            result = host.run(["nvidia-smi", "-q", "-x"], timeout=_SMI_TIMEOUT)
            try:
                cuda, smi_version, gpus = parse_smi(result.stdout)
            except ValueError:
                smi_error = result.last_line()
            if not result.ok and not smi_error and not gpus:
                smi_error = result.last_line()
            if gpus:
                unlisted = _unlisted(host, pci, gpus)
            if any(not device.get("uuid") for gpu in gpus for device in gpu.mig_devices):
                gpus = with_mig_uuids(gpus, host.run(["nvidia-smi", "-L"], timeout=_SMI_TIMEOUT).stdout)
        if not gpus:
            gpus = _gpus_from_proc(host, pci)
    return GpuInventory(
        pci=pci,
        nvswitches=switches,
        nvlink5=has_nvlink5(host) if pci else False,
        imex=any(hexadecimal(gpu.device_id) in GRACE_BLACKWELL for gpu in pci),
        driver=driver,
        gpus=gpus,
        cuda_version=cuda,
        smi_driver_version=smi_version,
        smi_error=smi_error,
        unlisted=unlisted,
    )
