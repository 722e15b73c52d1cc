# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""A Docker daemon that is stopped, and that a mere look must not wake through its socket."""

from __future__ import annotations

import typing as t

from ._docker_api import DockerApi
from ._errors import FleetError
from ._host import Host
from ._systemd import unit_properties


class SleepingDocker(DockerApi):
    """A daemon that is stopped while its socket is open: asking it would start it, and a plan changes nothing."""

    def get(self, path: str, parameters: t.Mapping[str, str] | None = None) -> t.Any:
        raise FleetError(
            "docker_unavailable",
            "Asking Docker for %s was left, because docker.service is stopped and docker.socket would start it; start it "
            "with 'systemctl start docker'." % path,
        )


def sleeps(host: Host) -> bool:
    def state(unit: str) -> str:
        return unit_properties(host, unit, "ActiveState").get("ActiveState", "")

    return state("docker.service") in ("inactive", "failed") and state("docker.socket") == "active"


def look_at_docker(host: Host) -> DockerApi:
    """Docker of a host, for those who only want to know how it is set up."""
    return SleepingDocker() if sleeps(host) else DockerApi()
