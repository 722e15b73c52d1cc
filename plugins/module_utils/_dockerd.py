# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The Docker daemon as it runs: its command line, its live configuration, and where that differs from daemon.json."""

from __future__ import annotations

import os.path
import re
import typing as t
from dataclasses import dataclass, field

from ._daemon_json import ABSENT, DEFAULT_CONFIG, Path, action_for, dotted, get_value, same
from ._docker_api import Json

UNIT = "docker.service"
SOCKET_UNIT = "docker.socket"

#: Command-line flags whose key in daemon.json is named differently (moby ``cmd/dockerd/config*.go``).
_FLAG_KEYS = {
    "-D": "debug",
    "-G": "group",
    "-H": "hosts",
    "-b": "bridge",
    "-g": "data-root",
    "-l": "log-level",
    "-p": "pidfile",
    "-s": "storage-driver",
    "--add-runtime": "runtimes",
    "--authorization-plugin": "authorization-plugins",
    "--cdi-spec-dir": "cdi-spec-dirs",
    "--default-address-pool": "default-address-pools",
    "--default-ulimit": "default-ulimits",
    "--dns-opt": "dns-opts",
    "--exec-opt": "exec-opts",
    "--feature": "features",
    "--graph": "data-root",
    "--host": "hosts",
    "--insecure-registry": "insecure-registries",
    "--label": "labels",
    "--log-opt": "log-opts",
    "--node-generic-resource": "node-generic-resources",
    "--registry-mirror": "registry-mirrors",
    "--storage-opt": "storage-opts",
}
#: Flags that take no value unless it is attached with "=".
_BOOLEAN_FLAGS = frozenset(
    {
        "debug",
        "experimental",
        "icc",
        "init",
        "ip-forward",
        "ip-masq",
        "ip6tables",
        "iptables",
        "ipv6",
        "live-restore",
        "no-new-privileges",
        "raw-logs",
        "rootless",
        "selinux-enabled",
        "tls",
        "tlsverify",
        "userland-proxy",
        "validate",
    }
)


# -- the command line of the daemon ---------------------------------------------------------------


def flag_values(argv: t.Sequence[str]) -> t.Dict[str, t.List[str]]:
    """Keys of daemon.json that are set by flags of a dockerd command line, with their values."""
    found: t.Dict[str, t.List[str]] = {}
    words = list(argv[1:])
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            continue
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") and len(flag) > 2:
            flag, value, equals = flag[:2], flag[2:], "="
        key = _FLAG_KEYS.get(flag, flag.lstrip("-"))
        if not equals:
            if key in _BOOLEAN_FLAGS:
                value = "true"
            elif words:
                value = words.pop(0)
        found.setdefault(key, []).append(value)
    return found


def flag_says(values: t.Sequence[str], wanted: t.Any) -> bool:
    """Whether a flag already gives a scalar the wanted value."""
    if isinstance(wanted, bool):
        return values[-1].lower() in (("true", "1", "t") if wanted else ("false", "0", "f"))
    if isinstance(wanted, (str, int)):
        return values[-1] == str(wanted)
    return False


def parse_exec_start(text: str) -> t.Tuple[str, ...]:
    """argv of systemd's ``ExecStart`` property: ``{ path=… ; argv[]=/usr/bin/dockerd -H fd:// ; ignore_errors=no ; … }``."""
    found = re.search(r"argv\[\]=(.*?) ; ", text)
    return tuple(found.group(1).split()) if found else ()


# -- the running daemon ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RunningContainer:
    """A running container, as far as a restart of the daemon concerns it."""

    id: str
    name: str
    started_at: str = ""
    auto_remove: bool = False


@dataclass(frozen=True)
class DaemonState:
    """The daemon's configuration, wanted and live.

    Attributes:
        path: The file that dockerd reads.
        text: Its content; None when absent.
        damage: Why it is no text that could be edited; empty when it is.
        installed: Whether there is a dockerd.
        answers: Whether the daemon runs and answers.
        main_pid: Process of the running daemon.
        argv: Its command line.
        unit_files: Where the command line comes from: the unit and its drop-ins.
        info: ``GET /info`` of the live daemon.
        running: Running containers.
        dependents: Active units that systemd stops and starts with docker.service.
        programs: Runtime path as written -> absolute path of the executable, None when there is none.
        pending: Keys and action that an interrupted run has written to the file but not told this daemon.
    """

    path: str = DEFAULT_CONFIG
    text: t.Optional[str] = None
    damage: str = ""
    installed: bool = False
    answers: bool = False
    main_pid: int = 0
    argv: t.Tuple[str, ...] = ()
    unit_files: t.Tuple[str, ...] = ()
    info: Json = field(default_factory=dict)
    running: t.Tuple[RunningContainer, ...] = ()
    dependents: t.Tuple[str, ...] = ()
    programs: t.Mapping[str, t.Optional[str]] = field(default_factory=dict)
    pending: t.Tuple[str, ...] = ()
    pending_action: str = ""

    @property
    def version(self) -> str:
        return str(self.info.get("ServerVersion", ""))

    def live(self) -> t.Dict[str, t.Any]:
        """The parts of the live daemon that GPU containers depend on; empty when it does not run."""
        if not self.answers:
            return {}
        return {
            "version": self.version,
            "runtimes": sorted(self.info.get("Runtimes") or {}),
            "default_runtime": str(self.info.get("DefaultRuntime", "")),
            "live_restore": bool(self.info.get("LiveRestoreEnabled")),
            "cgroup_driver": str(self.info.get("CgroupDriver", "")),
            "cdi": bool(self.info.get("CDISpecDirs")),
        }


def version_tuple(version: str) -> t.Tuple[int, ...]:
    """Leading numbers of an engine version: ``26.1.5+dfsg1`` -> (26, 1, 5)."""
    found = re.match(r"[0-9]{1,9}(\.[0-9]{1,9})*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def live_value(info: t.Mapping[str, t.Any], path: Path) -> t.Any:
    """What the live daemon has for a key, in the form of daemon.json; ``ABSENT`` when it has none.

    Raises:
        LookupError: When ``GET /info`` does not tell.
    """
    key = path[0]
    plain = {
        "debug": "Debug",
        "default-runtime": "DefaultRuntime",
        "live-restore": "LiveRestoreEnabled",
        "log-driver": "LoggingDriver",
        "data-root": "DockerRootDir",
        "labels": "Labels",
    }
    if len(path) == 1 and key in plain and plain[key] in info:
        return info[plain[key]]
    if len(path) == 2 and key == "runtimes":
        runtime = (info.get("Runtimes") or {}).get(path[1])
        return ABSENT if runtime is None else runtime
    if path == ("features", "cdi") and version_tuple(str(info.get("ServerVersion", ""))) >= (25,):
        return bool(info.get("CDISpecDirs"))
    if path == ("features", "containerd-snapshotter") and "DriverStatus" in info:
        return any(list(entry)[:1] == ["driver-type"] for entry in info["DriverStatus"] or [])
    if path == ("exec-opts",) and "CgroupDriver" in info:
        return ["native.cgroupdriver=%s" % info["CgroupDriver"]]
    if path == ("registry-mirrors",):
        mirrors = (info.get("RegistryConfig") or {}).get("Mirrors")
        if mirrors is not None:
            return [str(mirror).rstrip("/") for mirror in mirrors]
    raise LookupError(dotted(path))


def _live_agrees(live: t.Any, wanted: t.Any, path: Path, programs: t.Mapping[str, t.Optional[str]]) -> bool:
    if path[0] == "runtimes":
        if live is ABSENT:
            return False
        if "path" in wanted:
            return same_program(str(live.get("path", "")), str(wanted["path"]), programs)
        return bool(live.get("runtimeType", wanted.get("runtimeType")) == wanted.get("runtimeType"))
    if path == ("labels",):
        return sorted(live or []) == sorted(wanted)
    if path == ("exec-opts",):
        drivers = [option for option in wanted if option.startswith("native.cgroupdriver=")]
        return not drivers or drivers == live
    if path == ("registry-mirrors",):
        return bool(live == [str(mirror).rstrip("/") for mirror in wanted])
    if path == ("data-root",):
        return str(live).rstrip("/") == str(wanted).rstrip("/")
    return same(live, wanted)


def same_program(left: str, right: str, programs: t.Mapping[str, t.Optional[str]]) -> bool:
    """Whether two runtime paths are the same executable, written bare or absolute."""
    if left == right:
        return True
    found_left, found_right = programs.get(left), programs.get(right)
    if found_left is None and found_right is None:
        # Not installed (any more): where a package would put it counts.
        return os.path.join("/usr/bin", left) == os.path.join("/usr/bin", right)
    return found_left is not None and found_left == found_right


def is_live(path: Path, wanted: t.Any, state: DaemonState) -> bool:
    """Whether the running daemon tells that it has a value already; what it does not tell is not known to be there."""
    if not state.answers or wanted is ABSENT:
        return False
    if path == ("exec-opts",) and not all(str(option).startswith("native.cgroupdriver=") for option in wanted):
        return False
    try:
        return _live_agrees(live_value(state.info, path), wanted, path, state.programs)
    except LookupError:
        return False


def live_gpu_settings(state: DaemonState) -> t.List[t.Tuple[Path, t.Any]]:
    """What the running daemon has for GPU containers, as values of daemon.json."""
    found: t.List[t.Tuple[Path, t.Any]] = []
    program = ((state.info.get("Runtimes") or {}).get("nvidia") or {}).get("path")
    if state.answers and program and state.programs.get(program):
        found.append((("runtimes", "nvidia"), {"path": program}))
        if state.info.get("DefaultRuntime") == "nvidia":
            found.append((("default-runtime",), "nvidia"))
    # Newer engines have CDI on by themselves: without the runtime it says nothing of a file that is gone.
    if found and is_live(("features", "cdi"), True, state):
        found.append((("features", "cdi"), True))
    return found


@dataclass(frozen=True)
class LiveDifference:
    """A key that the file has right and the live daemon does not."""

    path: Path
    live: t.Any
    wanted: t.Any
    action: str


def live_differences(
    document: t.Mapping[str, t.Any],
    owned: t.Sequence[Path],
    absent: t.Sequence[Path],
    info: t.Mapping[str, t.Any],
    programs: t.Mapping[str, t.Optional[str]],
) -> t.List[LiveDifference]:
    """Where the live daemon differs from a document, over the keys that we own and that it tells about."""
    result = []
    for path in owned:
        wanted = get_value(document, path)
        if wanted is ABSENT:
            continue
        try:
            live = live_value(info, path)
        except LookupError:
            continue
        if not _live_agrees(live, wanted, path, programs):
            result.append(LiveDifference(path, live, wanted, action_for(path, False)))
    for path in absent:
        if path[0] == "runtimes" and len(path) == 2 and path[1] in (info.get("Runtimes") or {}):
            result.append(LiveDifference(path, info["Runtimes"][path[1]], ABSENT, "reload"))
        elif path == ("default-runtime",) and info.get("DefaultRuntime", "runc") != "runc":
            result.append(LiveDifference(path, info["DefaultRuntime"], "runc", "reload"))
    return result
