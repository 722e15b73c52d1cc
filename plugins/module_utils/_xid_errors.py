# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The errors that the NVIDIA driver writes to the kernel's log, by their numbers (docs.nvidia.com/deploy/xid-errors)."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: An error as it stands in the log (open-gpu-kernel-modules, src/nvidia/src/kernel/gpu/rc/kernel_rc.c); the driver leaves
#: the function of the PCI address out.
XID_LINE = re.compile(
    r"NVRM: Xid \(PCI:(?P<pci>[0-9a-fA-F:.]+)(?: GPU-I:\d+)?(?: GPU-CI:\d+)?\): (?P<xid>[0-9]{1,9})\b"
)

#: Errors of programs rather than of the GPU.
XID_APPLICATION = frozenset((13, 31, 43, 45))
#: After these a GPU is not to be trusted before it was reset.
XID_FATAL = frozenset((48, 64, 79, 95, 119, 120))
#: A change of the recovery action; nvidia-smi tells it as it is now.
XID_NOTES = frozenset((154,))


@dataclass(frozen=True)
class XidMeaning:
    """What an Xid says (docs.nvidia.com/deploy/xid-errors)."""

    cause: str
    remedy: str


_APPLICATION = "look at the program that ran on it; the GPU itself is most likely sound"
_RESET = "reset the GPU (nvidia-smi --gpu-reset) or reboot the host"
_REPLACE = "reboot the host; if it comes back, have the GPU checked by its vendor"
XID_ERRORS: dict[int, XidMeaning] = {
    13: XidMeaning("a program did something the GPU does not allow", _APPLICATION),
    31: XidMeaning("a program used GPU memory that is not its own", _APPLICATION),
    43: XidMeaning("a program made the GPU stop", _APPLICATION),
    45: XidMeaning("a program's work on the GPU was cleaned up after an error", _APPLICATION),
    48: XidMeaning("GPU memory has an error that cannot be corrected", _RESET),
    63: XidMeaning("a bad row of GPU memory is to be replaced by a spare one", "reset the GPU when it is idle"),
    64: XidMeaning("a bad row of GPU memory could not be replaced", _REPLACE),
    74: XidMeaning("an NVLink connection failed", "check NVLink (nvidia-smi nvlink -s) and the Fabric Manager"),
    79: XidMeaning("the GPU has fallen off the bus", _REPLACE),
    94: XidMeaning("GPU memory had an error that hit one program only", "start that program again; " + _RESET),
    95: XidMeaning("GPU memory had an error that hit every program on the GPU", _RESET),
    119: XidMeaning("the GPU's system processor does not answer", _REPLACE),
    120: XidMeaning("the GPU's system processor reported an error", _REPLACE),
    154: XidMeaning("the driver asks for a recovery action", "see GPU Recovery Action in 'nvidia-smi -q'"),
}
UNKNOWN_XID = XidMeaning("the GPU or its driver reported a fault", "look the number up in NVIDIA's list of Xid errors")
