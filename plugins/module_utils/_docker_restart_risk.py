# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether Docker can be restarted without losing a running container."""

from __future__ import annotations

import typing as t

from ._docker_api import DockerApi
from ._dockerd import DaemonState, RunningContainer, version_tuple

#: Keys that live-restore does not carry over: after a restart the running containers would be lost to the daemon or to the
#: network.
LOSES_CONTAINERS = frozenset(
    {
        "bip",
        "bip6",
        "bridge",
        "containerd-namespace",
        "data-root",
        "default-address-pools",
        "exec-root",
        "features.containerd-snapshotter",
        "fixed-cidr",
        "fixed-cidr-v6",
        "iptables",
        "ip6tables",
        "ipv6",
        "storage-driver",
        "userns-remap",
    }
)


def observe_running(api: DockerApi, version: t.Tuple[int, ...]) -> t.Tuple[RunningContainer, ...]:
    """Running containers; ``--rm`` is looked up only for engines that remove such containers when they restart."""
    found = []
    for entry in api.containers(all=False):
        identifier = str(entry.get("Id") or "")
        names = entry.get("Names") or [identifier[:12]]
        auto_remove = False
        if identifier and version < (24, 0, 8):
            details = api.container(identifier) or {}
            auto_remove = bool((details.get("HostConfig") or {}).get("AutoRemove"))
        found.append(RunningContainer(identifier, names[0].lstrip("/"), auto_remove=auto_remove))
    return tuple(found)


def restart_blocked(state: DaemonState, *, live_restore: bool, keys: t.Sequence[str]) -> t.Optional[str]:
    """Why a restart of the daemon would hurt running containers; None when it would not.

    Args:
        live_restore: Whether live-restore is on, or will be by a reload, before the restart.
        keys: Keys of daemon.json that the restart brings into effect.
    """
    if not state.running:
        return None
    names = ", ".join(sorted(container.name for container in state.running))
    swarm = str((state.info.get("Swarm") or {}).get("LocalNodeState", "inactive"))
    if not live_restore:
        return (
            "it would stop the running containers (%s) because live-restore is off; allow live_restore, or stop them first"
            % names
        )
    if swarm not in ("inactive", ""):
        return (
            "it would stop the running containers (%s): this host is a swarm node, where live-restore does not work; "
            "drain it first" % names
        )
    lost = sorted(LOSES_CONTAINERS.intersection(keys))
    if lost:
        return "live-restore does not carry running containers (%s) over a change of %s; stop them first" % (
            names,
            " and ".join(lost),
        )
    removed = sorted(container.name for container in state.running if container.auto_remove)
    if removed and version_tuple(state.version) < (24, 0, 8):
        return (
            "Docker Engine %s removes containers that were started with --rm (%s) when it restarts; stop them first, "
            "or upgrade to 24.0.8 or newer" % (state.version, ", ".join(removed))
        )
    if state.dependents:
        return (
            "systemd would restart %s with it (Requires= or BindsTo= docker.service); stop them first, or weaken that to "
            "Wants=" % ", ".join(state.dependents)
        )
    return None
