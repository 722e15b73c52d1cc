# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs inside a look-alike: the collection's own code, on the real files and commands. JSON in, JSON out."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import types

# The directory as a package, so that its relative imports work.
package = types.ModuleType("code_of_the_collection")
package.__path__ = ["/mnt/code"]
sys.modules[package.__name__] = package


def load(name):
    return importlib.import_module("%s.%s" % (package.__name__, name))


request = json.load(sys.stdin)
operation = request.pop("operation")
kernel = request.pop("kernel")
free = request.pop("free")
errors = load("_errors")
packages = load("_packages")


class Machine(load("_host").Host):
    """The kernel is not the machine's own, and the space on its disks need not be."""

    def kernel_release(self):
        return kernel

    def free_bytes(self, path):
        return super().free_bytes(path) if free is None else free


host = Machine()


def resource(name, options):
    if name == "nvidia_driver":
        return load("_nvidia_driver").NvidiaDriver(**options)
    raise ValueError(name)


def converge(name, options, check=False):
    wanted = resource(name, options)
    outcome = load("_resource").converge(host, wanted, check_mode=check)
    return {
        "changed": outcome.changed,
        "changes": [change.as_dict() for change in outcome.changes],
        "blocked": [change.as_dict() for change in outcome.blocked],
        "result": wanted.result(outcome.state),
    }


def prestage(options, reboot=False):
    """As an upgrade does it before the host is out of service, the way back included."""
    precheck = load("_driver_upgrade_precheck")
    driver = resource("nvidia_driver", dict(options, unload=False))
    version = driver.observe(host).user_space
    ready, verdicts = precheck.prestage(host, driver, reboot=reboot)
    old = dict(options, branch=version.partition(".")[0], version=version, unload=False)
    verdicts.append(precheck.way_back(host, lambda: resource("nvidia_driver", old)))
    return {"version": ready.version, "verdicts": {one.check: one.verdict + ": " + one.message for one in verdicts}}


def repository_of(name, url):
    release = load("_os_release").read_os_release(host)
    if name == "docker":
        return load("_docker_engine").DockerEngine(repository_url=url).repository(release)
    return load("_nvidia_container_toolkit").NvidiaContainerToolkit(repository_url=url).repository(release, "x86_64")


def repository(name, url):
    """Plan, apply, plan again."""
    manager = packages.package_manager(host)
    wanted = repository_of(name, url)
    first = manager.plan_repository(name, wanted, manager.repository_state(wanted))
    manager.apply_repository(wanted)
    second = manager.plan_repository(name, wanted, manager.repository_state(wanted))
    return {"first": [one.as_dict() for one in first], "second": [one.as_dict() for one in second]}


def manager(method, arguments=(), options=None):
    answer = getattr(packages.package_manager(host), method)(*arguments, **(options or {}))

    def plain(value):
        if dataclasses.is_dataclass(value):
            return dataclasses.asdict(value)
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    return {"answer": plain(answer)}


try:
    answer = {"converge": converge, "prestage": prestage, "repository": repository, "manager": manager}[operation](
        **request
    )
except errors.FleetError as error:
    answer = {"error": error.reason, "message": error.message, "facts": {k: str(v) for k, v in error.facts.items()}}
json.dump(answer, sys.stdout)
