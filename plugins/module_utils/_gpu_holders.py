# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Who has the driver's device files open."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ._daemon_json import DEFAULT_CONFIG
from ._host import Host
from ._image_store import DOCKER_ROOT
from ._untrusted import is_digits, json_object


@dataclass(frozen=True)
class Holder:
    """A process that has NVIDIA device files open."""

    pid: int
    command: str
    unit: str
    container_id: str
    container: str
    devices: tuple[str, ...] = field(default=(), compare=False)

    def describe(self) -> str:
        """``pid 812 (python3 serve.py) in container nim-llama, unit docker-….scope``."""
        text = "pid %d (%s)" % (self.pid, self.command or "?")
        if self.container or self.container_id:
            return "%s in container %s" % (text, self.container or self.container_id[:12])
        if self.unit:
            return "%s of unit %s" % (text, self.unit)
        return text

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "pid": self.pid,
            "command": self.command,
            "unit": self.unit,
            "container_id": self.container_id,
            "container": self.container,
            "devices": list(self.devices),
        }


def parse_cgroup(text: str) -> tuple[str, str]:
    """systemd unit and container id out of ``/proc/<pid>/cgroup`` (version 1 or 2); empty strings when there is none."""
    unit = container = ""
    for line in text.splitlines():
        path = line.split(":", 2)[-1]
        match = re.search(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:/|$)", path)
        if match:
            container = match.group(1)
        parts = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
        if parts and (not unit or line.startswith(("0::", "1:name=systemd"))):
            unit = parts[-1]
    return unit, container


def container_name(host: Host, container_id: str) -> str:
    """Name of a Docker container from Docker's own record, without asking the daemon; empty when unknown."""
    if not container_id:
        return ""
    configured = json_object(host.read_text(DEFAULT_CONFIG)).get("data-root")
    root = configured if isinstance(configured, str) and configured.startswith("/") else DOCKER_ROOT
    text = host.read_text("%s/containers/%s/config.v2.json" % (root.rstrip("/"), container_id))
    return str(json_object(text).get("Name") or "").lstrip("/")


def _is_gpu_device(target: str, drm_nodes: t.Collection[str]) -> bool:
    return bool(re.match(r"/dev/nvidia(?!-container)", target)) or target in drm_nodes


def _nvidia_drm_nodes(host: Host) -> set[str]:
    """Device nodes under /dev/dri that belong to the NVIDIA driver."""
    nodes = set()
    for name in host.list_dir("/sys/class/drm"):
        if re.fullmatch(r"(card|renderD)\d+", name):
            link = host.read_link("/sys/class/drm/%s/device/driver" % name) or ""
            if link.rsplit("/", 1)[-1] == "nvidia":
                nodes.add("/dev/dri/" + name)
    return nodes


def driver_holders(host: Host) -> list[Holder]:
    """Every process with an open NVIDIA device file, by pid; neither lsof nor fuser is needed."""
    drm_nodes = _nvidia_drm_nodes(host)
    holders = []
    for name in host.list_dir("/proc"):
        if not is_digits(name):
            continue
        devices = set()
        for descriptor in host.list_dir("/proc/%s/fd" % name):
            target = host.read_link("/proc/%s/fd/%s" % (name, descriptor))
            if target and _is_gpu_device(target, drm_nodes):
                devices.add(target)
        if not devices:
            continue
        unit, container = parse_cgroup(host.read_text("/proc/%s/cgroup" % name) or "")
        command = (host.read_text("/proc/%s/cmdline" % name) or "").replace("\0", " ").strip()
        if not command:
            command = (host.read_text("/proc/%s/comm" % name) or "").strip()
        # Only the program: arguments of strangers may hold secrets.
        command = command.split(" ", 1)[0]
        holders.append(
            Holder(int(name), command, unit, container, container_name(host, container), tuple(sorted(devices)))
        )
    return sorted(holders, key=lambda holder: holder.pid)
