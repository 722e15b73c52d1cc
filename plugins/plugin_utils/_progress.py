# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""Action plugins for modules that take minutes: call in slices, show one line a host, hand on the last result.

The module is called with all options of the task. It returns after at most ``progress_interval`` seconds with::

    finished: false
    progress: {text: "llama 42 %, 85 MB/s, 20 s left"}   # one line, never a secret
    resume: {...}                                         # what the next call needs; the task's options stay the same

and is called again with that ``resume`` until it returns ``finished: true`` (or nothing of the kind, or a failure).
A call with ``progress_interval: 0`` must not return before the end: that is how asynchronous tasks call it.
Nothing is shown, and one SSH execution is all it costs, when the first call already is the last.
"""

from __future__ import annotations

import time
import typing as t

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.module_utils._text_table import shorten
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._answers import printable

#: Seconds between two looks when the task does not say; equal to the default of the modules' option.
DEFAULT_INTERVAL = 5
#: An unchanged line is shown again after this many seconds, as a sign of life.
REPEAT_AFTER = 60.0
#: A host that cannot be reached between two looks is tried again after these many seconds; the work goes on without us.
RECONNECT_PAUSES = (1.0, 2.0, 4.0)
#: Characters of a line; a host with eight models, each in its phase, needs six hundred.
_WIDTH = 2000
#: Keys of the protocol that are no part of the task's result.
_PROTOCOL_KEYS = ("finished", "progress", "resume")


class ProgressActionBase(ActionBase):  # type: ignore[misc]  # ansible-core ships no type information
    """Base class; a subclass names its module.

    Attributes:
        module: Fully qualified name of the module that is called in slices.
    """

    module = ""

    TRANSFERS_FILES = False
    _supports_async = True
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        if self._task.async_val:
            args = dict(self._task.args, progress_interval=0)
            in_background = not self._connection.has_native_async
            return self._call(args, task_vars, wrap_async=in_background)

        name = str(task_vars.get("inventory_hostname") or "host")
        changed = False
        warnings: list[t.Any] = []
        resume: t.Any = None
        shown = ""
        shown_at = 0.0
        while True:
            args = dict(self._task.args)
            if resume is not None:
                args["resume"] = resume
            began = time.monotonic()
            result = self._call(args, task_vars) if resume is None else self._call_again(args, task_vars)
            changed = changed or bool(result.get("changed"))
            more = result.get("warnings")
            warnings += [entry for entry in (more if isinstance(more, list) else []) if entry not in warnings]
            if result.get("failed") or result.get("finished") is not False:
                break
            resume = result.get("resume") or {}
            text = self.progress_text(result.get("progress"))
            now = time.monotonic()
            if text and (text != shown or now - shown_at >= REPEAT_AFTER):
                self._show(name, text)
                shown, shown_at = text, now
            if now - began < 0.5:
                # A module that does not wait by itself must not turn this loop into a flood of connections.
                time.sleep(min(1.0, self._interval()))

        for key in _PROTOCOL_KEYS:
            result.pop(key, None)
        given = result.get("invocation")
        if isinstance(given, dict) and isinstance(given.get("module_args"), dict):
            given["module_args"].pop("resume", None)
        result["changed"] = changed
        if warnings:
            result["warnings"] = warnings
        return result

    def progress_text(self, progress: t.Any) -> str:
        """The line to show for a module's ``progress``; empty shows nothing."""
        if isinstance(progress, dict):
            progress = progress.get("text")
        return printable(shorten(str(progress or ""), _WIDTH))

    def _interval(self) -> float:
        try:
            return max(0.0, float(self._task.args.get("progress_interval", DEFAULT_INTERVAL)))
        except (TypeError, ValueError):
            # The module itself reports the bad value.
            return float(DEFAULT_INTERVAL)

    def _show(self, name: str, text: str) -> None:
        """Print a line on standard error, so that machine-readable output on standard output stays intact."""
        if self._task.no_log:
            return
        self._display.display("[%s] %s" % (name, text), stderr=True)

    def _call(self, args: dict[str, t.Any], task_vars: dict[str, t.Any], wrap_async: bool = False) -> dict[str, t.Any]:
        result: dict[str, t.Any] = self._execute_module(
            module_name=self.module, module_args=args, task_vars=task_vars, wrap_async=wrap_async
        )
        return result

    def _call_again(self, args: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """A later slice: a connection that broke meanwhile is opened again a few times."""
        for pause in RECONNECT_PAUSES:
            try:
                return self._call(dict(args), task_vars)
            except AnsibleConnectionFailure:
                time.sleep(pause)
                reset = getattr(self._connection, "reset", None)
                if reset is not None:
                    try:
                        reset()
                    except (AnsibleConnectionFailure, NotImplementedError):
                        # The next call opens a connection anyway, or says why it cannot.
                        continue
        return self._call(args, task_vars)
