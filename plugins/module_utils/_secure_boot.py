# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""UEFI Secure Boot: whether it is on, and whether the host's own module key is enrolled."""

from __future__ import annotations

from ._host import Host

_SECURE_BOOT_VARIABLE = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
#: Public keys that sign modules built on the host: Debian's and upstream's dkms, Ubuntu's shim-signed.
MODULE_KEYS = ("/var/lib/dkms/mok.pub", "/var/lib/shim-signed/mok/MOK.der")


def secure_boot_enabled(host: Host) -> bool:
    """Whether the firmware enforces signatures: the EFI variable's last byte, else what mokutil says."""
    variable = host.read_bytes(_SECURE_BOOT_VARIABLE)
    if variable:
        return variable[-1] == 1
    if not host.exists("/sys/firmware/efi"):
        return False
    return "SecureBoot enabled" in host.run(["mokutil", "--sb-state"], timeout=30).stdout


def module_key_enrolled(host: Host) -> bool:
    """Whether a key that this host signs its own modules with is enrolled in the firmware."""
    for path in MODULE_KEYS:
        if host.exists(path):
            result = host.run(["mokutil", "--test-key", path], timeout=30)
            if "is already enrolled" in result.stdout + result.stderr:
                return True
    return False
