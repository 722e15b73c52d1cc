# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""nouveau, the kernel's own driver for NVIDIA GPUs, kept out of the way."""

from __future__ import annotations

from ._errors import FleetError
from ._host import Host

BLACKLIST = "/etc/modprobe.d/gpu-fleet-nouveau.conf"
BLACKLIST_CONTENT = (
    "# Managed by gpu_fleet.nim. The NVIDIA driver cannot take a GPU that nouveau drives.\n"
    "blacklist nouveau\n"
    "options nouveau modeset=0\n"
)
_INITRAMFS_TIMEOUT = 1800.0  # seconds, on a slow machine with many kernels


def write_blacklist(host: Host) -> None:
    """Write the blacklist and rebuild the initramfs, which carries a copy: both, or neither.

    Raises:
        FleetError: ``initramfs_failed``, ``write_failed``.
    """
    before = host.read_text(BLACKLIST)
    if host.stat("/etc/modprobe.d") is None:
        host.make_dir("/etc/modprobe.d", mode=0o755)
    host.write_file(BLACKLIST, BLACKLIST_CONTENT, mode=0o644)
    _rebuild_initramfs(host, before, "so that nouveau stays out")


def remove_blacklist(host: Host) -> None:
    """Remove the blacklist, and its copy in the initramfs: both, or neither.

    Raises:
        FleetError: ``initramfs_failed``.
    """
    before = host.read_text(BLACKLIST)
    host.remove(BLACKLIST)
    _rebuild_initramfs(host, before, "without the blacklist of nouveau")


def _rebuild_initramfs(host: Host, before: str | None, purpose: str) -> None:
    """Rebuild it with the tool of the host.

    Args:
        before: What the blacklist held; it gets that again when the tool fails. None: there was none.
        purpose: What the rebuild is for, for the message.
    """
    if host.which("update-initramfs"):
        command = ["update-initramfs", "-u", "-k", "all"]
    elif host.which("dracut"):
        command = ["dracut", "--force", "--regenerate-all"]
    else:
        # No initramfs is made on this host (a virtual machine that boots its kernel directly).
        return
    result = host.run(command, timeout=_INITRAMFS_TIMEOUT)
    if not result.ok:
        if before is None:
            host.remove(BLACKLIST)
        else:
            host.write_file(BLACKLIST, before, mode=0o644)
        raise FleetError(
            "initramfs_failed",
            "Rebuilding the initramfs %s (%s) failed: %s. Mend that (often /boot is full) and run again."
            % (purpose, command[0], result.last_line().rstrip(".")),
            stderr=result.stderr[-4000:],
        )
