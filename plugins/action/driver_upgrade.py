# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of the roles and the name of this run, and shows how far the host is."""

from __future__ import annotations

import getpass
import os
import platform
import re
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_plan import role_options
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._models import without_secrets
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase

#: What the role nim says of its services is of use here, too.
_OF_SERVICES = ("gpu_injection", "gpu_health")


def this_run() -> str:
    """Who upgrades, for the records on the hosts: the same in all worker processes of one run."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "user %d" % os.getuid()
    return "%s on %s (process %d)" % (user, platform.node(), os.getppid())


def has_ended(run: str) -> bool:
    """Whether a run of this very controller is gone; of other controllers nothing is known."""
    found = re.search(r" on (\S+) \(process (\d+)\)\Z", run)
    if not found or found.group(1) != platform.node():
        return False
    try:
        os.kill(int(found.group(2)), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class ActionModule(ProgressActionBase):
    module = "gpu_fleet.nim.driver_upgrade"

    def _call(self, args: dict[str, t.Any], task_vars: dict[str, t.Any], wrap_async: bool = False) -> dict[str, t.Any]:
        given = {**self._defaults(args, task_vars), **args}
        given["models"] = without_secrets(given.get("models"))
        result = super()._call(dict(given), task_vars, wrap_async)
        if result.get("reason") == "upgrade_running" and has_ended(str((result.get("claim") or {}).get("run"))):
            return super()._call(dict(given, take_over=True), task_vars, wrap_async)
        return result

    def _defaults(self, args: t.Mapping[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        found: dict[str, t.Any] = {"run": this_run()}
        if "nvidia_driver" not in args:
            found["nvidia_driver"] = role_options(self._templar, task_vars, ["nvidia_driver"])["nvidia_driver"]
        services = role_options(self._templar, task_vars, ["nim_service"]).get("nim_service", {})
        found.update({name: services[name] for name in _OF_SERVICES if name in services})
        found["models"] = services.get("models") or []
        return found
