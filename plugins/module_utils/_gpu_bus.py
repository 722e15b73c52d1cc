# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""GPUs on the PCI bus, from sysfs: there without any driver."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ._host import Host

_NVIDIA_VENDOR = "0x10de"
# First and last PCI device id of every generation (facts from the public PCI id database). Blackwell is the newest
# here and its range is open upwards: a newer GPU takes the open modules as well.
_ARCHITECTURE_OF_ID: tuple[tuple[int, int, str], ...] = (
    (0x0FB0, 0x0FB0, "Maxwell"),
    (0x0FC0, 0x103F, "Kepler"),
    (0x1180, 0x11FF, "Kepler"),
    (0x1280, 0x130F, "Kepler"),
    (0x1340, 0x143F, "Maxwell"),
    (0x15C0, 0x15FF, "Pascal"),
    (0x1600, 0x16FF, "Maxwell"),
    (0x1720, 0x173F, "Pascal"),
    (0x1740, 0x17FF, "Maxwell"),
    (0x1B00, 0x1D7F, "Pascal"),
    (0x1D80, 0x1DFF, "Volta"),
    (0x1E00, 0x1FFF, "Turing"),
    (0x2080, 0x20FF, "Ampere"),
    (0x2180, 0x21FF, "Turing"),
    (0x2200, 0x22A2, "Ampere"),
    (0x2300, 0x23FF, "Hopper"),
    (0x2400, 0x25FF, "Ampere"),
    (0x2680, 0x28FF, "Ada Lovelace"),
    (0x2900, 0xFFFF, "Blackwell"),
)
#: GH200: the Hopper of a Grace superchip, which takes the open modules only.
_GRACE_HOPPER = range(0x2342, 0x2350)
#: GB200 and GB300: Blackwell of a Grace superchip; these machines form IMEX domains.
GRACE_BLACKWELL = (0x2941, 0x31C2)


@dataclass(frozen=True)
class PciGpu:
    """A GPU on the PCI bus, driver or not.

    Attributes:
        bdf: PCI address in the form of sysfs, ``0000:00:06.0``.
        device_id: Four hexadecimal digits, lower case.
        architecture: As nvidia-smi names it; empty when the id is older than every supported GPU.
        bound: Kernel driver bound to it: ``nvidia``, ``nouveau``, ``vfio-pci`` or empty.
    """

    bdf: str
    device_id: str
    architecture: str
    bound: str


def hexadecimal(text: str) -> int:
    """A PCI id, with or without ``0x``; -1 for anything else."""
    return int(text, 16) if re.match(r"(0x)?[0-9a-fA-F]{1,8}\Z", text) else -1


def architecture_of_device(device_id: str, machine: str = "x86_64") -> str:
    """Architecture of a PCI device id (hexadecimal, with or without ``0x``); empty when it is unknown."""
    number = hexadecimal(device_id)
    if machine == "aarch64" and number in _GRACE_HOPPER:
        return "Grace Hopper"
    for first, last, name in _ARCHITECTURE_OF_ID:
        if first <= number <= last:
            return name
    return ""


def observe_pci(host: Host) -> tuple[tuple[PciGpu, ...], int]:
    """GPUs on the PCI bus and the number of NVSwitch devices, from sysfs."""
    gpus: list[PciGpu] = []
    switches = 0
    machine = host.machine()
    base = "/sys/bus/pci/devices"
    for bdf in host.list_dir(base):
        if (host.read_text("%s/%s/vendor" % (base, bdf)) or "").strip().lower() != _NVIDIA_VENDOR:
            continue
        pci_class = (host.read_text("%s/%s/class" % (base, bdf)) or "").strip().lower()
        if pci_class.startswith("0x0680"):
            switches += 1
            continue
        if not pci_class.startswith(("0x0300", "0x0302")):
            continue
        device = (host.read_text("%s/%s/device" % (base, bdf)) or "").strip().lower()
        device = device[2:] if device.startswith("0x") else device
        link = host.read_link("%s/%s/driver" % (base, bdf)) or ""
        gpus.append(PciGpu(bdf, device, architecture_of_device(device, machine), link.rsplit("/", 1)[-1]))
    return tuple(gpus), switches


def has_nvlink5(host: Host) -> bool:
    """NVLink switches of the fifth generation carry SW_MNG in the vital product data of their InfiniBand port."""
    base = "/sys/class/infiniband"
    return any(b"SW_MNG" in (host.read_bytes("%s/%s/device/vpd" % (base, name)) or b"") for name in host.list_dir(base))
