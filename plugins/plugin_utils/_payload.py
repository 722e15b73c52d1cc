# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""What ansible-core sends to hosts for a module, kept from run to run.

ansible-core packs a module with everything that it imports, and parses every Python file for that: for a module that knows
the whole chain this is the larger part of what a run costs the controller for one host. It keeps the package for all hosts
of a run; here the same file is kept for the next run, as long as nothing has changed that is in it. Where that fails, for
whatever reason, ansible-core packs the module as ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import typing as t

from ansible.constants import DEFAULT_LOCAL_TMP, DEFAULT_MODULE_UTILS_PATH, config
from ansible.module_utils.basic import AnsibleModule
from ansible.release import __version__ as core_version

_PLUGINS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: Packages that are kept: other controllers, or other checkouts, may share the directory.
_KEPT = 4


def _signature(paths: t.Iterable[str]) -> str:
    """Hash of what decides about the content: versions, and name, size and time of change of files."""
    hashed = hashlib.sha256(("%s %s" % (core_version, sys.version)).encode())
    for path in paths:
        found = os.stat(path)
        hashed.update(("%s %d %d\n" % (path, found.st_size, found.st_mtime_ns)).encode())
    return hashed.hexdigest()[:16]


def _python_files(directory: str) -> list[str]:
    return sorted(entry.path for entry in os.scandir(directory) if entry.name.endswith(".py"))


def _own(directory: str) -> bool:
    """Whether nobody else can have put anything into a directory: what is in it runs on all hosts."""
    try:
        found = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


class Payload:
    """The package of one module of this collection.

    Args:
        module: Its name without the collection's.
        local: Directory in which ansible-core has the packages of a run; by default its own.
        home: Directory in which they are kept; by default below ``ANSIBLE_HOME``.
    """

    def __init__(self, module: str, *, local: str = "", home: str = "") -> None:
        self._prefix = "ansible_collections.gpu_fleet.nim.plugins.modules.%s-" % module
        self._local = local or os.path.join(str(DEFAULT_LOCAL_TMP), "ansiballz_cache")
        self._home = home or os.path.join(str(config.get_config_value("ANSIBLE_HOME")), "gpu_fleet.nim")
        self._kept = ""
        # Somebody's own module_utils may stand in for ansible-core's; what is in them is not followed here.
        own = [path for path in DEFAULT_MODULE_UTILS_PATH or [] if os.path.isdir(path) and os.listdir(path)]
        with contextlib.suppress(OSError):
            if not own:
                files = _python_files(os.path.join(_PLUGINS, "module_utils"))
                files += [os.path.join(_PLUGINS, "modules", module + ".py")]
                files += _python_files(os.path.dirname(str(sys.modules[AnsibleModule.__module__].__file__)))
                self._kept = os.path.join(self._home, "%s-%s" % (module, _signature(files)))

    def _files(self, directory: str) -> list[str]:
        with contextlib.suppress(OSError):
            names = os.listdir(directory)
            return [name for name in names if name.startswith(self._prefix) and not name.endswith((".lock", "-part"))]
        return []

    @staticmethod
    def _copy(source: str, target: str) -> None:
        """Copy a file so that nobody sees a part of it."""
        handle, part = tempfile.mkstemp(dir=os.path.dirname(target), suffix="-part")
        try:
            with os.fdopen(handle, "wb") as stream, open(source, "rb") as content:
                shutil.copyfileobj(content, stream)
            os.replace(part, target)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    def put(self) -> None:
        """Give ansible-core the package of an earlier run."""
        if not (self._kept and _own(self._home) and _own(self._kept)):
            return
        with contextlib.suppress(OSError):
            for name in self._files(self._kept):
                target = os.path.join(self._local, name)
                if not os.path.exists(target):
                    os.makedirs(self._local, exist_ok=True)
                    self._copy(os.path.join(self._kept, name), target)

    def keep(self) -> None:
        """Keep the package of this run for the next one."""
        if not self._kept or self._files(self._kept):
            return
        with contextlib.suppress(OSError):
            os.makedirs(self._home, mode=0o700, exist_ok=True)
            if not _own(self._home):
                return
            os.makedirs(self._kept, mode=0o700, exist_ok=True)
            for name in self._files(self._local):
                self._copy(os.path.join(self._local, name), os.path.join(self._kept, name))
            others = sorted(
                (entry for entry in os.scandir(self._home) if entry.is_dir()), key=lambda one: one.stat().st_mtime
            )
            for entry in others[:-_KEPT]:
                shutil.rmtree(entry.path, ignore_errors=True)
