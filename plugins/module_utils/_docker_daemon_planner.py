# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which keys of daemon.json are wanted, in the file and in the live daemon, and what differs."""

from __future__ import annotations

import json
import re
import typing as t

from ._daemon_json import (
    ABSENT,
    DEFAULT_CONFIG,
    Path,
    action_for,
    dotted,
    edits,
    expand,
    get_value,
    invalid,
    merge,
    parse,
    read,
)
from ._docker_api import DockerApi, Json
from ._docker_restart_risk import observe_running, restart_blocked
from ._dockerd import (
    UNIT,
    DaemonState,
    LiveDifference,
    flag_says,
    flag_values,
    is_live,
    live_differences,
    live_gpu_settings,
    parse_exec_start,
    same_program,
    version_tuple,
)
from ._errors import FleetError
from ._host import Host
from ._redaction import scrub, scrub_data
from ._resource import Change, Disruption, FileDiff, Planner
from ._systemd import unit_properties
from ._untrusted import json_object, strings, whole_number

#: Left behind between writing the file and telling the daemon; gone after a reboot, as is the daemon it speaks of.
PENDING = "/run/gpu_fleet/docker_daemon.json"

#: The one key that dockerd itself merges from flags and file.
_MERGED_BY_DOCKERD = frozenset({"runtimes"})

_RUNTIME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_KEY_NAME = re.compile(r"[a-z][a-z0-9-]*\Z")


def _owned_paths(wanted: t.Mapping[str, t.Any]) -> t.List[Path]:
    """Paths of the wanted values at the depth at which the daemon can be asked."""
    result: t.List[Path] = []
    for key, value in wanted.items():
        if key in ("runtimes", "features", "log-opts") and isinstance(value, dict):
            result += [(key, name) for name in value]
        else:
            result.append((key,))
    return result


class DaemonPlanner(Planner[DaemonState]):
    """Own keys of daemon.json and the live daemon that obeys them.

    Args:
        options: Wanted keys of daemon.json; objects are merged into what is there, other values replace it.
        absent: Keys that must not be there, ``key`` or ``key.inner`` (``runtimes.nvidia``).
        live_restore: Value of ``live-restore``; None leaves it alone.
        config_file: Path of the file; None for the one dockerd was started with.
        provided: Runtime programs that another change of the same plan installs; only ``plan`` takes them for granted.
        api: The live daemon.
    """

    name = "docker_daemon"

    def __init__(
        self,
        options: t.Mapping[str, t.Any],
        absent: t.Sequence[str] = (),
        live_restore: t.Optional[bool] = None,
        config_file: t.Optional[str] = None,
        provided: t.Collection[str] = (),
        api: t.Optional[DockerApi] = None,
    ) -> None:
        self.wanted: Json = dict(options)
        if live_restore is not None:
            if self.wanted.get("live-restore", live_restore) is not live_restore:
                raise FleetError(
                    "invalid_option",
                    "options.live-restore = %s: contradicts live_restore = %s; give it in one place only."
                    % (self.wanted["live-restore"], live_restore),
                    option="options",
                )
            self.wanted["live-restore"] = live_restore
        self.absent: t.List[Path] = [tuple(key.split(".", 1)) for key in absent]
        self.config_file = config_file
        self.provided = frozenset(provided)
        self.api = api or DockerApi()
        self._check_options()

    def _check_options(self) -> None:
        def refuse(option: str, value: t.Any, wrong: str, remedy: str) -> t.NoReturn:
            shown = value if not isinstance(value, str) or value.strip() else repr(value)
            raise FleetError("invalid_option", "%s = %s: %s; %s." % (option, shown, wrong, remedy), option=option)

        if self.config_file is not None and not self.config_file.startswith("/"):
            refuse("config_file", self.config_file, "not an absolute path", "write it from the root")
        try:
            json.dumps(self.wanted)
        except (TypeError, ValueError) as error:
            refuse("options", "…", str(error), "use only what JSON has")
        for key, value in self.wanted.items():
            if not isinstance(key, str) or not _KEY_NAME.match(key):
                refuse("options", key, "not a key of daemon.json", "keys are lower case with hyphens")
            if key in ("runtimes", "features", "log-opts", "default-ulimits") and not isinstance(value, dict):
                refuse("options.%s" % key, value, "not a mapping", "dockerd takes a mapping here")
            if key == "exec-opts" and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
                refuse(
                    "options.exec-opts", value, "not a list of texts", "write for example [native.cgroupdriver=systemd]"
                )
            if key in ("live-restore", "debug") and not isinstance(value, bool):
                refuse("options.%s" % key, value, "not a boolean", "write true or false")
        for name, runtime in self.wanted.get("runtimes", {}).items():
            option = "options.runtimes.%s" % name
            if not isinstance(name, str) or not _RUNTIME_NAME.match(name):
                refuse(option, runtime, "not a name of a runtime", "use letters, digits, '.', '_' and '-'")
            if name == "runc":
                refuse(option, runtime, "the name is reserved by dockerd", "give your runtime another name")
            if not isinstance(runtime, dict) or bool(runtime.get("path")) == bool(runtime.get("runtimeType")):
                refuse(option, runtime, "needs either path or runtimeType", "give exactly one of them")
        for feature, value in self.wanted.get("features", {}).items():
            if not isinstance(value, bool):
                refuse("options.features.%s" % feature, value, "not a boolean", "write true or false")
        for path in self.absent:
            if not _KEY_NAME.match(path[0]):
                refuse("absent", dotted(path), "not a key of daemon.json", "write key or key.inner")
            if get_value(self.wanted, path) is not ABSENT:
                refuse("absent", dotted(path), "is wanted in options as well", "name it in one place only")

    # -- observe ----------------------------------------------------------------------------------

    def observe(self, host: Host) -> DaemonState:
        installed = host.which("dockerd") is not None
        shown = unit_properties(
            host, UNIT, "MainPID", "ActiveState", "ExecStart", "FragmentPath", "DropInPaths", "RequiredBy", "BoundBy"
        )
        active = shown.get("ActiveState") in ("active", "reloading")
        main_pid = whole_number(shown.get("MainPID"))
        argv: t.Tuple[str, ...] = ()
        if main_pid:
            raw = host.read_text("/proc/%d/cmdline" % main_pid) or ""
            argv = tuple(raw.rstrip("\0").split("\0")) if raw else ()
        argv = argv or parse_exec_start(shown.get("ExecStart", ""))
        path = self.config_file or (flag_values(argv).get("config-file") or [DEFAULT_CONFIG])[-1]
        text, damage = read(host, path)

        # Asking a stopped daemon would start it through docker.socket: a look must not.
        info: Json = self.api.info() if active else {}
        running = observe_running(self.api, version_tuple(str(info.get("ServerVersion", "")))) if active else ()
        dependents: t.Tuple[str, ...] = ()
        names = (shown.get("RequiredBy", "") + " " + shown.get("BoundBy", "")).split()
        if active and names:
            result = host.run(["systemctl", "is-active", *names])
            dependents = tuple(
                name
                for name, state in zip(names, result.stdout.split())
                if state in ("active", "activating", "reloading")
            )
        pending, pending_action = _read_pending(host, main_pid)
        return DaemonState(
            path=path,
            text=text,
            damage=damage,
            installed=installed,
            answers=active,
            main_pid=main_pid,
            argv=argv,
            unit_files=tuple(
                item for item in [shown.get("FragmentPath", ""), *shown.get("DropInPaths", "").split()] if item
            ),
            info=info,
            running=running,
            dependents=dependents,
            programs=self._programs(host, text, info),
            pending=pending,
            pending_action=pending_action,
        )

    def _programs(self, host: Host, text: t.Optional[str], info: Json) -> t.Dict[str, t.Optional[str]]:
        names = {runtime["path"] for runtime in self.wanted.get("runtimes", {}).values() if runtime.get("path")}
        try:
            present = parse(text).get("runtimes")
        except FleetError:
            present = None  # plan says it
        for runtimes in (present, info.get("Runtimes")):
            if isinstance(runtimes, dict):
                names |= {
                    r["path"] for r in runtimes.values() if isinstance(r, dict) and isinstance(r.get("path"), str)
                }
        return {name: _find_program(host, name) for name in names}

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: DaemonState) -> t.List[Change]:
        if state.damage:
            raise invalid(state.path, state.damage)
        document = parse(state.text, state.path)
        wanted = self._without_flags(state)
        changes = expand(edits(document, self._same_runtimes(document, wanted, state.programs)))
        changes += self._removals(document, wanted, state)
        final = parse(merge(state.text, changes), state.path)
        self._check_document(final, state)

        owned = _owned_paths(self.wanted)
        told = [path for path, dummy in changes]
        differences = (
            [
                difference
                for difference in live_differences(final, owned, self.absent, state.info, state.programs)
                if not any(
                    path[: len(difference.path)] == difference.path or difference.path[: len(path)] == path
                    for path in told
                )
            ]
            if state.answers
            else []
        )
        needs_start = [edit for edit in changes if action_for(edit[0], edit[1] is ABSENT) == "restart"]
        reload_edits = [edit for edit in changes if edit not in needs_start]
        # What the daemon has already is only missing in the file.
        file_edits = [edit for edit in needs_start if is_live(edit[0], edit[1], state)]
        restart_edits = [edit for edit in needs_start if edit not in file_edits]
        restart_keys = [dotted(path) for path, dummy in restart_edits]
        untold_restart = [difference for difference in differences if difference.action == "restart"]
        untold_reload = [difference for difference in differences if difference.action == "reload"]

        blocked = None
        if state.answers and (restart_keys or untold_restart or state.pending_action == "restart"):
            keys = restart_keys + [dotted(difference.path) for difference in untold_restart]
            blocked = self._blocked(state, final, keys or list(state.pending))

        restarts = state.answers and bool(restart_keys or untold_restart or state.pending_action == "restart")
        if restarts and not blocked and not document:
            # The whole file is gone. A restart would take the GPUs from containers until the toolkit has had its turn, and
            # would have to be done again then.
            file_edits += [edit for edit in live_gpu_settings(state) if self._is_free(edit[0], final, state)]
        result: t.List[Change] = []
        result += self._file_changes(state, reload_edits, [] if blocked else restart_edits, file_edits)
        has_reload = any(change.disruption is Disruption.RELOAD for change in result)
        if untold_reload and not has_reload:
            result.append(
                Change(
                    self.name,
                    "running daemon",
                    scrub_data({dotted(one.path): None if one.live is ABSENT else one.live for one in untold_reload}),
                    scrub_data(
                        {dotted(one.path): None if one.wanted is ABSENT else one.wanted for one in untold_reload}
                    ),
                    "%s has it, but the daemon was not told" % state.path,
                    Disruption.RELOAD,
                    "daemon_reload",
                )
            )
        elif state.pending_action == "reload" and not has_reload and state.answers:
            result.append(
                Change(
                    self.name,
                    "running daemon",
                    None,
                    list(state.pending),
                    "an earlier run wrote these keys to %s and was interrupted before the daemon was told" % state.path,
                    Disruption.RELOAD,
                    "daemon_reload",
                )
            )
        if restarts:
            result.append(self._restart_change(state, restart_edits, untold_restart, document, blocked))
        return result

    def _is_free(self, path: Path, final: Json, state: DaemonState) -> bool:
        """Whether nobody has a word on a key: neither what is wanted, nor what is unwanted, nor the command line."""
        return get_value(final, path) is ABSENT and path not in self.absent and path[0] not in flag_values(state.argv)

    def _without_flags(self, state: DaemonState) -> Json:
        """The wanted keys less those that the command line already sets to the wanted value."""
        flags = flag_values(state.argv)
        wanted: Json = {}
        for key, value in self.wanted.items():
            if key in flags and key not in _MERGED_BY_DOCKERD:
                if flag_says(flags[key], value):
                    continue
                raise FleetError(
                    "daemon_flag_conflict",
                    "Setting %s in %s failed: dockerd is started with a flag for it (%s), and does not start when both say "
                    "it; take the flag out of %s, or the key out of the wanted options."
                    % (
                        key,
                        state.path,
                        scrub(", ".join(flags[key])),
                        " or ".join(state.unit_files) or UNIT,
                    ),
                    key=key,
                    unit_files=list(state.unit_files),
                )
            wanted[key] = value
        return wanted

    def _same_runtimes(self, document: Json, wanted: Json, programs: t.Mapping[str, t.Optional[str]]) -> Json:
        """Wanted runtimes in the spelling of the file where it names the same program (``/usr/bin/x`` for ``x``)."""
        if "runtimes" not in wanted:
            return wanted
        runtimes: Json = {}
        for name, runtime in wanted["runtimes"].items():
            present = get_value(document, ("runtimes", name, "path"))
            path = runtime.get("path")
            same = path and isinstance(present, str) and same_program(present, path, programs)
            runtimes[name] = dict(runtime, path=present) if same else runtime
        return dict(wanted, runtimes=runtimes)

    def _removals(self, document: Json, wanted: Json, state: DaemonState) -> t.List[t.Tuple[Path, t.Any]]:
        """Edits for ``absent`` in the form that a SIGHUP takes over on every engine version."""
        result: t.List[t.Tuple[Path, t.Any]] = []
        default = document.get("default-runtime", ABSENT)
        for path in self.absent:
            present = get_value(document, path)
            if path == ("default-runtime",):
                live = state.info.get("DefaultRuntime", "runc")
                if default not in (ABSENT, "runc") or (default is ABSENT and live != "runc"):
                    # A key that is gone keeps its last value in the live daemon: the default is said out loud.
                    result.append((path, "runc"))
            elif path[0] == "runtimes" and len(path) == 2:
                if default == path[1] and "default-runtime" not in wanted and ("default-runtime",) not in self.absent:
                    result.append((("default-runtime",), "runc"))
                if present is not ABSENT:
                    result.append((path, ABSENT))
                elif "runtimes" not in document and path[1] in (state.info.get("Runtimes") or {}):
                    # Only an object that is there, if empty, makes the live daemon forget.
                    result.append((("runtimes",), {}))
            elif present is not ABSENT:
                result.append((path, ABSENT))
        return result

    def _check_document(self, document: Json, state: DaemonState) -> None:
        """What ``dockerd --validate`` does not see."""
        runtimes = document.get("runtimes") or {}
        if not isinstance(runtimes, dict):
            raise invalid(state.path, "runtimes is no object")
        default = document.get("default-runtime", "runc")
        flags = " ".join(flag_values(state.argv).get("runtimes", []))
        known = default in runtimes or default in ("runc", "io.containerd.runc.v2") or "%s=" % default in flags
        if not known and "." not in str(default):
            raise FleetError(
                "undefined_runtime",
                "default-runtime = %s: no runtime of that name is defined in %s, and every container would fail to start; "
                "define it under runtimes or choose another." % (default, state.path),
                runtime=default,
            )
        for name, runtime in self.wanted.get("runtimes", {}).items():
            path = runtime.get("path")
            if path and path not in self.provided and not state.programs.get(path):
                raise FleetError(
                    "missing_runtime",
                    "options.runtimes.%s.path = %s: there is no such program on this host, and containers with that "
                    "runtime would fail to start; install it first or correct the path." % (name, path),
                    runtime=name,
                    file=path,
                )
        drivers = ((state.info.get("Plugins") or {}).get("Log")) or []
        driver = self.wanted.get("log-driver")
        if drivers and driver is not None and driver not in (*drivers, "none"):
            # dockerd starts with any name and then cannot start a container.
            raise FleetError(
                "unknown_log_driver",
                "log-driver = %s: Docker has no such driver, and no container would start; use one of %s."
                % (driver, ", ".join(sorted({*drivers, "none"}))),
                driver=driver,
            )
        if self.wanted.get("features", {}).get("cdi") and state.answers and version_tuple(state.version) < (25,):
            raise FleetError(
                "invalid_option",
                "features.cdi = true: Docker Engine %s has no CDI; use Engine 25.0 or newer, or leave CDI off."
                % state.version,
                option="options.features.cdi",
            )

    def _blocked(self, state: DaemonState, final: Json, keys: t.Sequence[str]) -> t.Optional[str]:
        """Why the daemon must not be restarted now; None when it may."""
        live = final.get("live-restore", state.info.get("LiveRestoreEnabled"))
        return restart_blocked(state, live_restore=live is True, keys=keys)

    def _file_changes(
        self,
        state: DaemonState,
        reload_edits: t.Sequence[t.Tuple[Path, t.Any]],
        restart_edits: t.Sequence[t.Tuple[Path, t.Any]],
        file_edits: t.Sequence[t.Tuple[Path, t.Any]],
    ) -> t.List[Change]:
        """One change of the file; two when a runtime goes that is still the live default (dockerd 20.10 would panic)."""
        stages = [[*reload_edits, *restart_edits, *file_edits]]
        live_default = state.info.get("DefaultRuntime")
        dropped: t.List[Path] = [
            path for path, value in reload_edits if value is ABSENT and path == ("runtimes", live_default)
        ]
        if (("runtimes",), {}) in list(reload_edits) and live_default != "runc":
            dropped.append(("runtimes",))
        if dropped:
            late = [edit for edit in stages[0] if edit[0] in dropped]
            stages = [[edit for edit in stages[0] if edit not in late], late]
        result: t.List[Change] = []
        text = state.text
        for stage in stages:
            if not stage:
                continue
            after = merge(text, stage)
            document, new = parse(text, state.path), parse(after, state.path)
            reload = any(edit in reload_edits for edit in stage) and state.answers
            result.append(
                Change(
                    self.name,
                    state.path,
                    _printable(document, stage) or None,
                    _printable(new, stage),
                    "these keys are ours; all others stay as they are",
                    Disruption.RELOAD if reload else Disruption.NONE,
                    "daemon_file",
                    {
                        "before": text,
                        "after": after,
                        "keys": [dotted(path) for path, dummy in stage],
                        "reload": reload,
                        "restart": state.answers and any(edit in restart_edits for edit in stage),
                    },
                    FileDiff(state.path, scrub(text or ""), scrub(after)),
                )
            )
            text = after
        return result

    def _restart_change(
        self,
        state: DaemonState,
        restart_edits: t.Sequence[t.Tuple[Path, t.Any]],
        untold: t.Sequence[LiveDifference],
        document: Json,
        blocked: t.Optional[str],
    ) -> Change:
        before: Json = {}
        after: Json = {}
        for path, value in restart_edits:
            present = get_value(document, path)
            before[dotted(path)] = None if present is ABSENT else present
            after[dotted(path)] = None if value is ABSENT else value
        for one in untold:
            before[dotted(one.path)] = None if one.live is ABSENT else one.live
            after[dotted(one.path)] = None if one.wanted is ABSENT else one.wanted
        why = "dockerd reads %s only when it starts" % ", ".join(after or state.pending)
        if not restart_edits:
            why = "%s has it, but %s" % (state.path, why)
        if state.running and not blocked:
            why += "; live-restore keeps the %d running containers going" % len(state.running)
        return Change(
            self.name,
            "running daemon",
            scrub_data(before) or None,
            scrub_data(after) or list(state.pending),
            why,
            Disruption.RESTART_DOCKER,
            "daemon_restart",
            blocked=blocked,
        )


def _find_program(host: Host, name: str) -> t.Optional[str]:
    if not name.startswith("/"):
        return host.which(name)
    found = host.stat(name)
    return name if found is not None and not found.is_dir else None


def _read_pending(host: Host, main_pid: int) -> t.Tuple[t.Tuple[str, ...], str]:
    """Keys and action of an interrupted run; a daemon that was started since has read the file by itself."""
    found = json_object(host.read_text(PENDING))
    if found.get("main_pid") != main_pid or not main_pid:
        return (), ""
    return tuple(strings(found.get("keys"))), str(found.get("action") or "")


def _printable(document: Json, stage: t.Sequence[t.Tuple[Path, t.Any]]) -> Json:
    found = {dotted(path): get_value(document, path) for path, dummy in stage}
    return t.cast(Json, scrub_data({key: value for key, value in found.items() if value is not ABSENT}))
