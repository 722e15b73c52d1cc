# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""Action plugins of the modules that take a host through a rollout: the name of this run, and hosts that get lost in it."""

from __future__ import annotations

import abc
import getpass
import os
import platform
import re
import typing as t

from ansible.errors import AnsibleConnectionFailure
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._models import without_secrets
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._progress import ProgressActionBase

#: The call with which a fleet is looked at; there Ansible itself tells who cannot be reached.
LOOK = "prestaged"


def this_run() -> str:
    """Who is at it, for the records on the hosts: the same in all worker processes of one run."""
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


class RolloutActionBase(ProgressActionBase):
    """Base class; a subclass names its module and its options."""

    @abc.abstractmethod
    def defaults(self, args: t.Mapping[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Options that follow from the variables of the roles."""

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        try:
            return super().run(tmp, task_vars)
        except AnsibleConnectionFailure as error:
            if self._task.args.get("state") == LOOK:
                raise
            # Failed and not unreachable: Ansible would drop the host, and end the run with the last one of a batch, before
            # anybody could count and tell it.
            return {
                "failed": True,
                "lost": True,
                "changed": False,
                "reason": "host_lost",
                "msg": "The host cannot be reached any more (%s); it stays as it is, and the next run goes on with it."
                % str(error).rstrip("."),
            }

    def _call(self, args: dict[str, t.Any], task_vars: dict[str, t.Any], wrap_async: bool = False) -> dict[str, t.Any]:
        given = {"run": this_run(), **self.defaults(args, task_vars), **args}
        if "models" in given:
            given["models"] = without_secrets(given["models"])
        result = super()._call(dict(given), task_vars, wrap_async)
        if result.get("reason") == "upgrade_running" and has_ended(str((result.get("claim") or {}).get("run"))):
            return super()._call(dict(given, take_over=True), task_vars, wrap_async)
        return result
