# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The kernel that a host has after its next boot."""

from __future__ import annotations

import functools
import re

from ._host import Host
from ._package_versions import compare_rpm

#: What kernels of one kind have in common: -generic, -cloud-amd64; on EL nothing, or +debug, +rt, +64k.
_KIND = re.compile(r"((?:-[a-z][a-z0-9_]*)+|\.(?:x86_64|aarch64)(?:\+\S+)?)\Z")


def next_kernel(host: Host) -> str:
    """Release of the kernel that a reboot would bring, as far as it is not the running one; empty otherwise.

    The newest installed one of the kind of the running one: GRUB's menu has the newest first, and on EL the package makes
    itself the default. Whoever has chosen another default is not looked for.
    """
    running = host.kernel_release()
    kind = _kind(running)
    newer = [
        release
        for release in host.list_dir("/lib/modules")
        if _kind(release) == kind
        and compare_rpm(release, running) > 0
        # Headers and modules of others are in this directory too, and stay behind when a kernel is removed.
        and host.exists("/lib/modules/%s/modules.order" % release)
        and (host.exists("/boot/vmlinuz-%s" % release) or host.exists("/lib/modules/%s/vmlinuz" % release))
    ]
    return max(newer, key=functools.cmp_to_key(compare_rpm), default="")


def _kind(release: str) -> str:
    found = _KIND.search(release)
    return found.group(1) if found else ""
