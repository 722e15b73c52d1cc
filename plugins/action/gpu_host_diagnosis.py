# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gives the module the variables of the roles, and puts its support bundle on the controller."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
import typing as t

import yaml
from ansible.errors import AnsibleActionFail
from ansible.release import __version__ as core_version
from ansible_collections.gpu_fleet.nim.plugins.action.gpu_host_plan import ActionModule as PlanAction
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError, file_problem
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import CHAIN
from ansible_collections.gpu_fleet.nim.plugins.module_utils._support_bundle import check_archive, unwrap
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import resolved

_COLLECTION = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")


def collection_version(collection: str = _COLLECTION) -> str:
    """Version of this collection; empty where it cannot be told."""
    for name in ("MANIFEST.json", "galaxy.yml"):
        path = os.path.join(collection, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as stream:
                found = yaml.safe_load(stream)
            return str((found.get("collection_info") or found).get("version") or "")
    return ""


def write_private(directory: str, name: str, content: bytes) -> str:
    """A file that nobody else can read; never seen half written.

    Raises:
        AnsibleActionFail: When it cannot be written.
    """
    path = os.path.join(directory, name)
    temporary = "%s.%d" % (path, os.getpid())
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise AnsibleActionFail(file_problem("Writing", path, error)) from error
    return path


class ActionModule(PlanAction):
    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super(PlanAction, self).run(tmp, task_vars)
        task_vars = task_vars or {}
        args = dict(self._task.args)
        if not any(name in args for name in CHAIN):
            args.update(self.options(task_vars))
            signatures = self._templar.template(task_vars.get("nim_failure_signatures") or [])
            args.setdefault("failure_signatures", resolved(signatures))
        args["versions"] = {
            "gpu_fleet.nim": collection_version(),
            "ansible-core": core_version,
            "controller python": platform.python_version(),
            "host": str(task_vars.get("inventory_hostname") or ""),
        }
        result: dict[str, t.Any] = self._execute_module(
            module_name="gpu_fleet.nim.gpu_host_diagnosis", module_args=args, task_vars=task_vars
        )
        archive = result.pop("archive", None)
        # Said here alone, not by the host.
        result.pop("bundle", None)
        if archive and args.get("bundle"):
            host = re.sub(r"[^A-Za-z0-9._-]", "_", str(task_vars.get("inventory_hostname") or "host"))
            try:
                content = unwrap(archive)
                check_archive(content)
            except FleetError as error:
                return {"failed": True, "reason": error.reason, "msg": error.message}
            found = re.fullmatch(r"[0-9]{8}T[0-9]{6}Z", str(archive.get("stamp")))
            stamp = found.group(0) if found else time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            path = os.path.expanduser(str(args["bundle"]))
            result["bundle"] = write_private(path, "%s-%s.tar.gz" % (host, stamp), content)
        return result
