# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The CDI specification that NVIDIA's toolkit writes: it names the libraries of one driver version."""

from __future__ import annotations

import os.path
import re

from ._host import Host
from ._systemd import unit_properties

CDI_SPEC = "/var/run/cdi/nvidia.yaml"
#: Units that keep it fresh (toolkit 1.18 and newer); their path unit watches for new modules, not for loaded ones.
REFRESH = "nvidia-cdi-refresh"


def spec_is_for(spec: str, driver_version: str) -> bool:
    """Whether a CDI specification mounts the libraries of a driver version (their names carry it)."""
    return re.search(r"lib[\w-]+\.so\.%s(?![\w.])" % re.escape(driver_version), spec) is not None


def refresh_spec(host: Host) -> None:
    """Write it for the loaded driver.

    Raises:
        FleetError: ``cdi_refresh_failed``.
    """
    if unit_properties(host, "%s.service" % REFRESH, "LoadState").get("LoadState") == "loaded":
        # A driver swap uses its start limit up: without the reset it would refuse to start.
        host.run(["systemctl", "reset-failed", "%s.service" % REFRESH])
        host.check(
            ["systemctl", "restart", "%s.service" % REFRESH],
            reason="cdi_refresh_failed",
            doing="Writing the CDI specification with %s.service" % REFRESH,
            remedy="See 'journalctl -u %s'." % REFRESH,
            timeout=120,
        )
        return
    host.make_dir(os.path.dirname(CDI_SPEC), mode=0o755)
    host.check(
        ["nvidia-ctk", "cdi", "generate", "--output=%s" % CDI_SPEC],
        reason="cdi_refresh_failed",
        doing="Writing the CDI specification %s" % CDI_SPEC,
        timeout=120,
    )


def follow_driver(host: Host, driver_version: str, *, needed: bool) -> None:
    """Have the specification name the libraries of the loaded driver, where there is one.

    Args:
        needed: Whether containers of this host ask for their GPUs by it.

    Raises:
        FleetError: ``cdi_refresh_failed``.
    """
    spec = host.read_text(CDI_SPEC)
    outdated = needed if spec is None else not spec_is_for(spec, driver_version)
    if driver_version and outdated and host.which("nvidia-ctk"):
        refresh_spec(host)
