# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether a container still is what ``docker create`` was told: its label goes along when somebody makes it again by hand.

Compared is what every engine shows in the form in which it was asked for; what it rewrites (resource limits it may adjust,
the order of mounts) is left out, because a difference that is none would restart a model for nothing.
"""

from __future__ import annotations

import re
import typing as t

Json = t.Dict[str, t.Any]

#: What the docker command adds to every container where root's Docker configuration names proxies
#: (docs.docker.com/engine/cli/proxy).
_PROXIES = frozenset(
    variant
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
    for variant in (name, name.lower())
)


def differences(
    create: t.Sequence[str], container: t.Mapping[str, t.Any], known: t.Collection[str] = ()
) -> t.List[str]:
    """What is other in a container than in the arguments it was made with, in the user's words and without values.

    Args:
        create: Arguments of ``docker create`` from the first option to the last word of the command.
        container: ``docker inspect``; parts that it lacks are not compared.
        known: Environment variables that may be there besides: the image's own, and the secret ones.
    """
    options = _options(create)
    found: t.List[str] = []
    config, host = container.get("Config"), container.get("HostConfig")
    if isinstance(config, dict):
        # As it was typed: identifiers depend on how the engine stores images.
        image = next((word for word in create if not word.startswith("--")), "")
        if config.get("Image", image) != image:
            found.append("image")
        found += _environment(options, config, known)
        if "User" in config and options.get("--user") and config["User"] != options["--user"][-1]:
            found.append("user")
    if isinstance(host, dict):
        found += _host_configuration(options, host)
    return found


def _options(create: t.Sequence[str]) -> t.Dict[str, t.List[str]]:
    """``--name=value`` options up to the image."""
    options: t.Dict[str, t.List[str]] = {}
    for word in create:
        if not word.startswith("--"):
            break
        name, _equals, value = word.partition("=")
        options.setdefault(name, []).append(value)
    return options


def _environment(
    options: t.Mapping[str, t.Sequence[str]], config: t.Mapping[str, t.Any], known: t.Collection[str]
) -> t.List[str]:
    if not isinstance(config.get("Env"), list):
        return []
    there = dict(_pair(str(entry)) for entry in config["Env"])
    wanted = dict(_pair(entry) for entry in options.get("--env", ()))
    other = {name for name, value in wanted.items() if there.get(name) != value}
    # Docker gives every container a PATH.
    strange = there.keys() - wanted.keys() - {*known, "PATH"} - _PROXIES
    return ["variable %s" % name for name in sorted({*other, *strange})]


def _pair(entry: str) -> t.Tuple[str, str]:
    name, _equals, value = entry.partition("=")
    return name, value


def _host_configuration(options: t.Mapping[str, t.Sequence[str]], host: t.Mapping[str, t.Any]) -> t.List[str]:
    found: t.List[str] = []
    if host.get("Privileged"):
        found.append("privileged")
    for option, key, what in (
        ("--runtime", "Runtime", "runtime"),
        ("--cgroup-parent", "CgroupParent", "cgroup"),
        ("--shm-size", "ShmSize", "shared memory"),
    ):
        if key in host and options.get(option) and str(host[key]) != options[option][-1]:
            found.append(what)
    if "CapDrop" in host and sorted(host["CapDrop"] or ()) != sorted(options.get("--cap-drop", ())):
        found.append("capabilities")
    if "ReadonlyRootfs" in host and bool(host["ReadonlyRootfs"]) != ("--read-only" in options):
        found.append("read-only root file system")
    if "Tmpfs" in host and set(host["Tmpfs"] or ()) != {one.partition(":")[0] for one in options.get("--tmpfs", ())}:
        found.append("directories in memory")
    if host.get("CapAdd"):
        found.append("capabilities")
    for key, what in (("Memory", "memory limit"), ("NanoCpus", "processor limit"), ("CpusetCpus", "processor limit")):
        if host.get(key):
            found.append(what)
    if "NetworkMode" in host:
        network = (options.get("--network") or ["bridge"])[-1]
        # "default" up to engine 25.
        if host["NetworkMode"] != network and {network, host["NetworkMode"]} != {"bridge", "default"}:
            found.append("network")
    if "PortBindings" in host:
        ports = {
            (str(port), str(binding.get("HostPort") or ""))
            for port, bindings in (host["PortBindings"] or {}).items()
            for binding in bindings or ()
        }
        if ports != {_published(entry) for entry in options.get("--publish", ())}:
            found.append("published ports")
    if "DeviceRequests" in host:
        # A device of the kind "nvidia.com/gpu=UUID", or "device=UUID,…" in quotes.
        gpus = {
            str(one).rpartition("=")[2]
            for request in host["DeviceRequests"] or ()
            for one in request.get("DeviceIDs") or ["all"]
        }
        asked = [*options.get("--device", ()), *options.get("--gpus", ())]
        if gpus != {one for entry in asked for one in entry.strip('"').rpartition("=")[2].split(",")}:
            found.append("GPUs")
    # What is asked for with --volume is a bind; each is shown as it was asked for.
    if "Mounts" in host or "Binds" in host:
        mounts = {(str(one.get("Source")), str(one.get("Target"))) for one in host.get("Mounts") or ()}
        if mounts != {_mounted(entry) for entry in options.get("--mount", ())} or host.get("Binds"):
            found.append("mounts")
    return list(dict.fromkeys(found))


def restart_policy(container: t.Mapping[str, t.Any]) -> str:
    """Docker's restart policy, which ``docker update`` changes in a container that runs."""
    policy = (container.get("HostConfig") or {}).get("RestartPolicy") or {}
    return str(policy.get("Name") or "no")


def _published(entry: str) -> t.Tuple[str, str]:
    """``0.0.0.0:8000:8000`` and ``[::1]:8000:8000`` as container port and host port."""
    found = re.search(r"(\d+):(\d+)\Z", entry)
    return ("%s/tcp" % found.group(2), found.group(1)) if found else ("", "")


def _mounted(entry: str) -> t.Tuple[str, str]:
    parts = dict(_pair(part) for part in entry.split(","))
    return parts.get("source", ""), parts.get("target", "")
