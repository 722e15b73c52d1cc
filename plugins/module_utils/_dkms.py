# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""dkms builds the kernel module on the host: the build, and why it failed."""

from __future__ import annotations

import re

from ._errors import FleetError
from ._host import Host
from ._nvidia_driver_state import on_disk_version

#: What dkms says in the output of a package transaction; its name alone is in the names of packages.
BUILD_SIGNS = re.compile(
    r"Bad return status|make\.log|[Kk]ernel headers for (this )?kernel|failed to install during auto"
)
BUILD_TIMEOUT = 1800.0  # seconds for dkms on a slow machine


def build_failure(host: Host, kernel: str, output: str = "") -> str:
    """Why dkms could not build the module, from its own output, status and build log."""
    status = host.run(["dkms", "status"], timeout=60)
    text = output + "\n" + status.stdout + "\n" + status.stderr
    if status.rc == 127:
        return "dkms is not installed"
    if "kernel headers for kernel" in text or "kernel headers for this kernel" in text:
        return "the headers of kernel %s are missing" % kernel
    logs = re.findall(r"(/var/lib/dkms/\S+?make\.log)", output)
    for base in ("nvidia", "nvidia-current", "nvidia-current-open", "nvidia-open"):
        for version in host.list_dir("/var/lib/dkms/" + base):
            logs.append("/var/lib/dkms/%s/%s/build/make.log" % (base, version))
            logs.append("/var/lib/dkms/%s/%s/%s/%s/log/make.log" % (base, version, kernel, host.machine()))
    for path in logs:
        log = host.read_text(path)
        if log:
            errors = [
                line.strip() for line in log.splitlines() if re.search(r"\berror\b[: ]|fatal error|\*\*\* ", line, re.I)
            ]
            if errors:
                return "%s (%s)" % (errors[0], path)
    lines = [line.strip() for line in status.stdout.splitlines() if line.startswith("nvidia")]
    return "dkms says %s" % "; ".join(lines) if lines else "dkms knows no NVIDIA module"


def build_error(host: Host, output: str) -> FleetError:
    kernel = host.kernel_release()
    reason = build_failure(host, kernel, output)
    return FleetError(
        "dkms_build_failed",
        "The NVIDIA kernel module could not be built for the running kernel %s: %s. Install the kernel's headers and a "
        "compiler, choose a driver branch that supports this kernel, or boot an older kernel; then run again."
        % (kernel, reason.rstrip(".")),
        kernel=kernel,
        output=output[-4000:],
    )


def build_module(host: Host) -> None:
    """Build the module for the running kernel; what is missing after a kernel upgrade or an interrupted run."""
    kernel = host.kernel_release()
    result = host.run(["dkms", "autoinstall", "-k", kernel], timeout=BUILD_TIMEOUT)
    if on_disk_version(host, kernel):
        return
    # What somebody has taken out of dkms' own list it does not build by itself; the package's sources are still there.
    for entry in host.list_dir("/usr/src"):
        found = re.match(r"(nvidia(?:-current|-open|-current-open)?)-(\d[\d.]*)\Z", entry)
        if found is not None:
            result = host.run(["dkms", "install", "/".join(found.groups()), "-k", kernel], timeout=BUILD_TIMEOUT)
    if on_disk_version(host, kernel):
        return
    raise build_error(host, result.stdout + result.stderr)
