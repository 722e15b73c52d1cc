# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""This machine for the collection's own code, with what stands for systemd in the mounts of this program."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import typing as t
import uuid

from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import CommandResult, Host

#: An empty file system in memory here; what the collection writes into it is never seen by the machine's systemd.
UNITS = "/etc/systemd/system"


class Machine(Host):
    """This machine; systemctl and journalctl are answered by what was started here."""

    def __init__(self, logs: str = "") -> None:
        self.systemd = Systemd(logs)
        self.journal: t.Optional[Journal] = None

    def run(
        self,
        argv: t.Sequence[str],
        *,
        stdin: t.Optional[str] = None,
        env: t.Optional[t.Mapping[str, str]] = None,
        timeout: t.Optional[float] = None,
    ) -> CommandResult:
        if argv[0] == "systemctl":
            code, output, error = self.systemd.call(list(argv[1:]))
            return CommandResult(tuple(argv), code, output, error)
        if argv[0] == "journalctl":
            return CommandResult(tuple(argv), 0, "\n".join(self._journal(argv)), "")
        return super().run(argv, stdin=stdin, env=env, timeout=timeout)

    def _journal(self, argv: t.Sequence[str]) -> t.List[str]:
        field, _equals, value = argv[-1].partition("=")
        if "--unit" in argv:
            field, value = "_SYSTEMD_UNIT", argv[list(argv).index("--unit") + 1]
        if field == "_SYSTEMD_UNIT":
            unit = self.systemd.units.get(value)
            said = unit.said().splitlines() if unit else []
            entries = [{"MESSAGE": line, "_SYSTEMD_INVOCATION_ID": unit.invocation if unit else ""} for line in said]
        else:
            entries = self.journal.find(field, value) if self.journal else []
        if "--output=json" in argv:
            return [json.dumps(entry) for entry in entries]
        return [entry.get("MESSAGE", "") for entry in entries]


class Journal:
    """A socket where journald's would be: Docker's log driver wants one."""

    PATH = "/run/systemd/journal/socket"

    def __init__(self) -> None:
        self.entries: t.List[t.Dict[str, str]] = []
        os.makedirs(os.path.dirname(self.PATH), exist_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.PATH)
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while True:
            data = self.socket.recv(1 << 18)
            entry: t.Dict[str, str] = {}
            while data:
                line, _newline, data = data.partition(b"\n")
                name, equals, value = line.partition(b"=")
                if not equals and len(data) >= 8:
                    size = struct.unpack("<Q", data[:8])[0]
                    value, data = data[8 : 8 + size], data[9 + size :]
                entry[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
            self.entries.append(entry)

    def find(self, field: str, value: str) -> t.List[t.Dict[str, str]]:
        return [entry for entry in self.entries if entry.get(field) == value]

    def lines(self, field: str, value: str) -> t.List[str]:
        return [entry.get("MESSAGE", "") for entry in self.find(field, value)]


def parse_unit(text: str) -> t.Dict[str, str]:
    """``Section.Key`` -> the last value."""
    found: t.Dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and not line.startswith("#"):
            key, _equals, value = line.partition("=")
            found["%s.%s" % (section, key)] = value
    return found


class Unit:
    """A unit as it was loaded, with its process, the way systemd looks after it."""

    def __init__(self, name: str, text: str, log: str) -> None:
        self.name, self.text, self.log = name, text, log
        self.options = parse_unit(text)
        self.process: t.Optional[subprocess.Popen[bytes]] = None
        self.active = "inactive"
        self.result = "success"
        self.status = 0
        self.restarts = 0
        self.invocation = ""
        self.main_started = 0.0
        self.starts: t.List[float] = []
        self._generation = 0
        self._environment: t.Dict[str, str] = {}
        self._lock = threading.RLock()

    def _argv(self, key: str) -> t.List[str]:
        argv = shlex.split(self.options.get("Service." + key, ""))
        if argv and os.path.exists(argv[0]):
            with open(argv[0], encoding="utf-8") as stream:
                first = stream.readline().strip()
            if first.startswith("#!") and not os.path.exists(first[2:]):
                # A machine whose Python is somewhere else.
                return [sys.executable, *argv]
        return argv

    def start(self) -> None:
        with self._lock:
            if self.active == "active":
                return
            self._generation += 1
            self.restarts = 0
            self._run(self._generation)

    def _run(self, generation: int) -> None:
        now = time.monotonic()
        interval = float(self.options.get("Unit.StartLimitIntervalSec", "10"))
        self.starts = [moment for moment in self.starts if now - moment < interval]
        if len(self.starts) >= int(self.options.get("Unit.StartLimitBurst", "5")):
            self.active, self.result = "failed", "start-limit-hit"
            return
        self.starts.append(now)
        for directory in self.options.get("Service.RuntimeDirectory", "").split():
            os.makedirs("/run/" + directory, mode=0o755, exist_ok=True)
        self.invocation = uuid.uuid4().hex
        self._environment = dict(os.environ, INVOCATION_ID=self.invocation, HOME="/root")
        self.active, self.result, self.main_started = "active", "success", now
        argv = self._argv("ExecStart")
        if not argv:
            return
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        threading.Thread(target=self._watch, args=(self.process, generation), daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes], generation: int) -> None:
        code = process.wait()
        with self._lock:
            if generation != self._generation or process is not self.process:
                return
            self.status = code
            # Without $MAINPID, as systemd calls it when the main process has ended by itself.
            self._stop_command({})
            prevented = self.options.get("Service.RestartPreventExitStatus", "").split()
            good = code == 0 or str(code) in self.options.get("Service.SuccessExitStatus", "").split()
            if self.options.get("Service.Restart") != "always" or str(code) in prevented:
                self.active = "inactive" if good else "failed"
                self.result = "success" if good else "exit-code"
                return
            self.active = "activating"
        time.sleep(0.2)
        with self._lock:
            if generation == self._generation:
                self.restarts += 1
                self._run(generation)

    def _stop_command(self, more: t.Mapping[str, str]) -> None:
        argv = self._argv("ExecStop")
        if argv:
            with open(self.log, "ab") as log:
                environment = dict(self._environment, **more)
                subprocess.run(argv, env=environment, stdout=log, stderr=log, check=False, timeout=300)

    def stop(self) -> int:
        """The main process's exit status."""
        with self._lock:
            self._generation += 1
            process, self.process = self.process, None
        if process is not None and process.poll() is None:
            self._stop_command({"MAINPID": str(process.pid)})
            try:
                self.status = process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                self.status = process.wait()
        self.active, self.result = "inactive", "success"
        return self.status

    def kill(self) -> None:
        """As ``kill -9`` of the main process; systemd starts it again."""
        assert self.process is not None
        self.process.kill()

    def end(self) -> None:
        """Away with it, whatever state it is in."""
        with self._lock:
            self._generation += 1
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def said(self) -> str:
        try:
            with open(self.log, encoding="utf-8", errors="replace") as stream:
                return stream.read()
        except OSError:
            return ""


class Systemd:
    """As much of ``systemctl`` as the collection uses, over the unit files in memory."""

    def __init__(self, logs: str, directory: str = UNITS) -> None:
        self.logs, self.directory = logs, directory
        self.units: t.Dict[str, Unit] = {}

    def call(self, argv: t.List[str]) -> t.Tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        verb, words, options = argv[0], [], {}
        rest = iter(argv[1:])
        for word in rest:
            if word in ("--property", "-p"):
                options.setdefault("property", []).extend(next(rest).split(","))
            elif word.startswith("--property="):
                options.setdefault("property", []).extend(word.partition("=")[2].split(","))
            elif word.startswith("-"):
                options[word.lstrip("-")] = []
            else:
                words.append(word)
        if verb == "show":
            return 0, self._show(words, options), ""
        handler = getattr(self, "_" + verb.replace("-", "_"), None)
        if handler is None:
            return 1, "", "Unknown command verb %s." % verb
        missing = [word for word in words if verb != "reset-failed" and not self._text(word)]
        if missing:
            return 5, "", "Unit %s not found." % missing[0]
        for word in words or [""]:
            handler(word)
            if verb == "disable" and "now" in options:
                self._stop(word)
        return 0, "", ""

    def _text(self, name: str) -> str:
        try:
            with open("%s/%s" % (self.directory, name), encoding="utf-8") as stream:
                return stream.read()
        except OSError:
            return ""

    def _loaded(self, name: str) -> t.Optional[Unit]:
        if name not in self.units and self._text(name):
            self.units[name] = Unit(name, self._text(name), "%s/%s.log" % (self.logs, name))
        return self.units.get(name)

    def _start(self, name: str) -> None:
        unit = self._loaded(name)
        if unit:
            unit.start()

    def _stop(self, name: str) -> None:
        unit = self._loaded(name)
        if unit:
            unit.stop()

    def _restart(self, name: str) -> None:
        self._stop(name)
        self._start(name)

    def _reset_failed(self, name: str) -> None:
        unit = self.units.get(name)
        if unit:
            unit.starts.clear()
            if unit.active == "failed":
                unit.active = "inactive"

    def _daemon_reload(self, _name: str) -> None:
        for name, unit in list(self.units.items()):
            unit.text = self._text(name)
            unit.options = parse_unit(unit.text)
            if not unit.text and unit.active == "inactive":
                del self.units[name]

    def _links(self, name: str) -> t.List[str]:
        wanted = parse_unit(self._text(name)).get("Install.WantedBy", "").split()
        return ["%s/%s.wants/%s" % (self.directory, target, name) for target in wanted]

    def _enable(self, name: str) -> None:
        for link in self._links(name):
            os.makedirs(os.path.dirname(link), exist_ok=True)
            if not os.path.islink(link):
                os.symlink("%s/%s" % (self.directory, name), link)

    def _disable(self, name: str) -> None:
        for link in self._links(name):
            if os.path.islink(link):
                os.unlink(link)

    def _show(self, names: t.Sequence[str], options: t.Mapping[str, t.List[str]]) -> str:
        wanted = options.get("property") or []
        blocks = []
        for name in names:
            values = self._properties(name)
            shown = {key: values.get(key, "") for key in wanted} if wanted else values
            blocks.append(
                "\n".join(("%s" if "value" in options else key + "=%s") % value for key, value in shown.items())
            )
        return "\n\n".join(blocks) + "\n"

    def _properties(self, name: str) -> t.Dict[str, str]:
        text, unit = self._text(name), self._loaded(name)
        masked = os.path.islink("%s/%s" % (self.directory, name))
        known = bool(unit) or bool(text)
        links = self._links(name)
        enabled = "enabled" if links and all(map(os.path.islink, links)) else "disabled" if text else ""
        active = unit.active if unit else "inactive"
        return {
            "Id": name,
            "LoadState": "masked" if masked else "loaded" if known else "not-found",
            "ActiveState": active,
            "SubState": {"active": "running", "activating": "auto-restart", "failed": "failed"}.get(active, "dead"),
            "UnitFileState": "masked" if masked else enabled,
            "NeedDaemonReload": "yes" if unit and unit.text != text else "no",
            "NRestarts": str(unit.restarts if unit else 0),
            "InvocationID": unit.invocation if unit else "",
            "Result": unit.result if unit else "success",
            "ExecMainStatus": str(unit.status if unit else 0),
            "ConditionResult": "yes",
            "ExecMainStartTimestampMonotonic": "%d" % (unit.main_started * 1e6 if unit else 0),
        }


def library_path(name: str) -> str:
    """Where a library is loaded from; empty when it cannot be told."""
    import ctypes

    ctypes.CDLL(name)
    with open("/proc/self/maps", encoding="utf-8") as stream:
        for line in stream:
            path = line.split(None, 5)[-1].strip()
            if re.match(re.escape(name[: name.index(".so")]) + r"\.so", os.path.basename(path)):
                return path
    return ""
