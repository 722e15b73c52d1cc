# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a gateway needs: the distribution's HAProxy with our configuration, reloaded and never restarted.

What the running process was started with is told by the process itself: its description is a digest of the configuration and
of all that it reads, so "verified" means that the live gateway says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gateway_binds import PACKAGE, Binds, check_binds, look_at_binds
from ._gateway_settings import OPTION_CHECKS, Layout, Settings, check_pem, make_backends, parse_servers
from ._gateway_state import source
from ._haproxy_config import MARKER, MINIMUM_VERSION, RenderedFile, render
from ._haproxy_runtime import RuntimeApi
from ._haproxy_server import STATE_PROGRAM
from ._host import Host
from ._packages import PackageManager, package_manager
from ._resource import Change, Disruption, FileDiff, Planner
from ._systemd import unit_properties

SERVICE = "haproxy.service"
DROP_IN = "/etc/systemd/system/haproxy.service.d/nim-gateway.conf"

SELINUX = "haproxy_connect_any"

GATEWAY_OPTIONS: t.Dict[str, t.Dict[str, t.Any]] = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "hosts": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "address": {"type": "str", "required": True},
            "models": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                    "served": {"type": "list", "elements": "str", "required": True},
                    "address": {"type": "str"},
                },
            },
        },
    },
    "bind_address": {"type": "str", "default": "0.0.0.0"},  # noqa: S104 - a gateway is meant to be reached
    "port": {"type": "int", "default": 8080},
    "body_limit": {"type": "str", "default": "1MB"},
    "inactivity_timeout": {"type": "int", "default": 600},
    "slow_start": {"type": "int", "default": 10},
    "server_connections": {"type": "int", "default": 256},
    "max_connections": {"type": "int", "default": 4096},
    "api_keys": {"type": "dict", "default": {}, "no_log": True},
    # People put the key into the same text.
    "certificate": {"type": "str", "no_log": True},
    "private_key": {"type": "str", "no_log": True},
    "certificate_file": {"type": "path"},
    "metrics_address": {"type": "str", "default": "0.0.0.0"},  # noqa: S104 - as above
    "metrics_port": {"type": "int", "default": 8405},
    "replace_configuration": {"type": "bool", "default": False},
}


@dataclass(frozen=True)
class FileState:
    content: str
    mode: int


@dataclass(frozen=True)
class GatewayState:
    """What a look found.

    Attributes:
        version: Version of the package, None when it is not installed.
        files: Path -> file, of those that are ours or would be.
        foreign: Whether the configuration there is neither ours nor the one that the package came with.
        former: Whether the configuration that ours took the place of is kept.
        fragment: Text of the distribution's unit, None when there is none.
        active: Whether the service runs.
        enabled: Whether it starts at boot.
        masked: Whether somebody forbade it to run.
        daemon_reload: Whether systemd has yet to read the unit.
        live: What identifies the running configuration; None when nothing answers.
        foreign_pem: Content of the certificate file that somebody else keeps.
        binds: What is in the way of the ports, where HAProxy does not run with what is wanted.
        selinux_blocks: Whether SELinux keeps HAProxy from connecting to the servers.
    """

    version: t.Optional[str] = None
    files: t.Mapping[str, FileState] = dataclasses.field(default_factory=dict)
    foreign: bool = False
    former: bool = False
    fragment: t.Optional[str] = None
    active: bool = False
    enabled: bool = False
    masked: bool = False
    daemon_reload: bool = False
    live: t.Optional[str] = None
    foreign_pem: t.Optional[str] = None
    binds: Binds = dataclasses.field(default_factory=Binds)
    selinux_blocks: bool = False


class GatewayPlanner(Planner[GatewayState]):
    """What a gateway is to be. The arguments are the options of the module."""

    name = "nim_gateway"

    def __init__(self, **options: t.Any) -> None:
        given = {name: option.get("default") for name, option in GATEWAY_OPTIONS.items()}
        given.update({name: value for name, value in options.items() if value is not None})
        self.layout = Layout()
        self.wanted = given["state"]
        self.replace_configuration = bool(given["replace_configuration"])
        self.settings = self._settings(given) if self.wanted == "present" else Settings(())
        self.api = RuntimeApi(self.layout.socket)
        self.python = sys.executable or "/usr/bin/python3"
        self.manager: t.Callable[[Host], PackageManager] = package_manager

    @staticmethod
    def _settings(given: t.Mapping[str, t.Any]) -> Settings:
        checked = {name: check(given[name]) for name, check in OPTION_CHECKS.items() if given[name] is not None}
        certificate_file = checked.get("certificate_file")
        pem = check_pem(given["certificate"], given["private_key"])
        if certificate_file and pem:
            raise FleetError(
                "invalid_option",
                "certificate_file = %s: certificate is given too; give one of the two." % certificate_file,
                option="certificate_file",
            )
        if checked["port"] == checked["metrics_port"]:
            raise FleetError(
                "invalid_option",
                "metrics_port = %d: is the port of the gateway itself; choose another one, or 0 for no metrics."
                % checked["port"],
                option="metrics_port",
            )
        keys = checked.pop("api_keys")
        return Settings(make_backends(parse_servers(given["hosts"])), keys=keys, pem=pem, **checked)

    # -- look -------------------------------------------------------------------------------------

    def observe(self, host: Host) -> GatewayState:
        installed = self.manager(host).installed(PACKAGE)
        version = installed[PACKAGE].version if PACKAGE in installed else None
        files: t.Dict[str, FileState] = {}
        paths = [self.layout.file(name) for name in host.list_dir(self.layout.directory)]
        for path in [*paths, self.layout.configuration, STATE_PROGRAM, DROP_IN]:
            content, found = host.read_text(path), host.stat(path)
            if content is not None and found is not None:
                files[path] = FileState(content, found.mode)
        unit = unit_properties(
            host, SERVICE, "LoadState", "ActiveState", "UnitFileState", "NeedDaemonReload", "FragmentPath"
        )
        configuration = files.get(self.layout.configuration)
        active = unit.get("ActiveState") in ("active", "reloading")
        live = self.api.version() if active else None
        foreign_pem = host.read_text(self.settings.certificate_file) if self.settings.certificate_file else None
        as_wanted = self.wanted == "absent" or (live and live == render(self.settings, self.layout, foreign_pem)[0])
        return GatewayState(
            version=version,
            files=files,
            foreign=configuration is not None
            and not configuration.content.startswith(MARKER)
            and not self._packaged(host),
            former=host.exists(self.layout.former),
            fragment=host.read_text(unit["FragmentPath"]) if unit.get("FragmentPath") else None,
            active=active,
            enabled=unit.get("UnitFileState") == "enabled",
            masked=unit.get("LoadState") == "masked",
            daemon_reload=unit.get("NeedDaemonReload") == "yes",
            live=live,
            foreign_pem=foreign_pem,
            # Looking for who holds a port takes a look at all processes.
            binds=Binds() if as_wanted else look_at_binds(host, self.settings, SERVICE),
            selinux_blocks=(host.read_text("/sys/fs/selinux/enforce") or "").strip() == "1"
            and host.run(["getsebool", SELINUX]).stdout.strip().endswith("off"),
        )

    def _packaged(self, host: Host) -> bool:
        """Whether the configuration is the one that the package came with."""
        path = self.layout.configuration
        asked = host.run(["dpkg-query", "--show", "--showformat=${Conffiles}", PACKAGE])
        if asked.ok:
            digest = host.run(["md5sum", path]).stdout.split()[:1]
            return any(line.split()[:2] == [path, *digest] for line in asked.stdout.splitlines())
        verified = host.run(["rpm", "--verify", "--nomtime", PACKAGE])
        return verified.rc not in (126, 127) and path not in verified.stdout

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: GatewayState) -> t.List[Change]:
        return self._plan_absent(state) if self.wanted == "absent" else self._plan_present(state)

    def rendered(self, state: GatewayState, layout: t.Optional[Layout] = None) -> t.Tuple[str, t.List[RenderedFile]]:
        return render(self.settings, layout or self.layout, state.foreign_pem)

    def _file_change(self, state: GatewayState, file: RenderedFile, action: str, why: str) -> t.Optional[Change]:
        found = state.files.get(file.path)
        if found == FileState(file.content, file.mode):
            return None
        secret = file.shown != file.content
        before = found.content if found is not None else ""
        if found is not None and found.content == file.content:
            return Change(
                self.name,
                file.path,
                "mode %04o" % found.mode,
                "mode %04o" % file.mode,
                why,
                action=action,
                data={"file": file},
            )
        if file.path == self.layout.configuration and before and not before.startswith(MARKER):
            why += "; what is there is kept as %s" % self.layout.former
            # Whoever wrote it may have passwords in it.
            shown = "(somebody else's, not shown)\n"
        else:
            shown = _masked(before) if secret and before else before
        return Change(
            self.name,
            file.path,
            None if found is None else "another content",
            "as wanted",
            why,
            action=action,
            data={"file": file},
            diff=FileDiff(file.path, shown, file.shown),
        )

    def _plan_present(self, state: GatewayState) -> t.List[Change]:
        changes: t.List[Change] = []
        if state.masked:
            raise FleetError(
                "service_masked",
                "Running HAProxy was refused: %s is masked, so somebody does not want it to run; 'systemctl unmask %s' "
                "allows it." % (SERVICE, SERVICE),
            )
        if state.version is None:
            changes.append(
                Change(self.name, "package " + PACKAGE, None, "installed", "it is the gateway", action="package")
            )
        else:
            check_version(state.version)
        if state.foreign and not self.replace_configuration:
            raise FleetError(
                "foreign_configuration",
                "%s is somebody else's: it is neither this collection's nor the one that the package came with, so it is left "
                "as it is; move it away, or let it be replaced (replace_configuration: true)."
                % self.layout.configuration,
                path=self.layout.configuration,
            )
        if self.settings.certificate_file and "PRIVATE KEY-----" not in (state.foreign_pem or ""):
            raise FleetError(
                "certificate_missing",
                "certificate_file = %s: no file with a certificate and its private key is there on the gateway; put both into "
                "it, in PEM form." % self.settings.certificate_file,
                path=self.settings.certificate_file,
            )
        check_binds(state.binds)
        if state.selinux_blocks:
            changes.append(
                Change(
                    self.name,
                    "SELinux " + SELINUX,
                    "off",
                    "on",
                    "without it HAProxy may not connect to the servers' ports",
                    action="selinux",
                )
            )
        program = source()
        own = [
            (RenderedFile(STATE_PROGRAM, program, 0o755, program), "program", "drain and maintenance are kept by it"),
            (self.drop_in(state), "unit", "the state of the servers is kept over reloads and restarts"),
        ]
        version, files = self.rendered(state)
        own += [(file, "configuration", "the gateway serves the models of the inventory") for file in files]
        for file, action, why in own:
            change = self._file_change(state, file, action, why)
            if change is not None:
                changes.append(change)
        if state.daemon_reload and not any(change.action == "unit" for change in changes):
            changes.append(
                Change(self.name, SERVICE, "as systemd read it", "as it is now", "its unit has changed", action="unit")
            )
        if not state.active or not state.enabled:
            before = ", ".join(
                [
                    word
                    for word, true in (("stopped", not state.active), ("not started at boot", not state.enabled))
                    if true
                ]
            )
            changes.append(Change(self.name, SERVICE, before, "running", "it is the gateway", action="start"))
        if state.active and state.live != version:
            changes.append(
                Change(
                    self.name,
                    "running configuration",
                    state.live or "another one",
                    version,
                    "HAProxy runs with what it has read, not with what is in its files",
                    Disruption.RELOAD,
                    action="reload",
                )
            )
        # Last, when nothing that runs refers to them any more.
        wanted = {file.path for file, _action, _why in own}
        for path in sorted(state.files):
            if path not in wanted:
                changes.append(Change(self.name, path, "there", None, "nothing refers to it", action="remove"))
        return changes

    def drop_in(self, state: GatewayState) -> RenderedFile:
        keep = "%s %s %s %s %s" % (
            self.python,
            STATE_PROGRAM,
            self.layout.socket,
            self.layout.servers,
            self.layout.state_file,
        )
        # Added commands come after the distribution's, and the state must be there before the reload; so these are repeated.
        reload = re.findall(r"(?m)^ExecReload=(.+)$", state.fragment or "")
        start = re.findall(r"(?m)^ExecStart=(.+)$", state.fragment or "")
        # The units of EL have no socket of the master process, which alone knows of requests from before a reload.
        master = [] if re.search(r"[\s=\"]-S\s", state.fragment or "=-S ") else ["ExecStart="]
        master += ["ExecStart=%s -S %s" % (command, self.layout.master_socket) for command in start if master]
        lines = [
            MARKER,
            "[Service]",
            "RuntimeDirectory=haproxy",
            "RuntimeDirectoryPreserve=yes",
            *master,
            "ExecStartPre=-%s" % keep,
            "ExecReload=",
            "ExecReload=-%s" % keep,
            *("ExecReload=%s" % command for command in reload),
            "ExecStop=-%s" % keep,
        ]
        text = "\n".join(lines) + "\n"
        return RenderedFile(DROP_IN, text, 0o644, text)

    def _plan_absent(self, state: GatewayState) -> t.List[Change]:
        changes: t.List[Change] = []
        configuration = state.files.get(self.layout.configuration)
        ours = configuration is not None and configuration.content.startswith(MARKER)
        if ours and (state.active or state.enabled):
            changes.append(Change(self.name, SERVICE, "running", None, "the gateway is to be gone", action="stop"))
        for path in sorted(state.files):
            if path != self.layout.configuration:
                changes.append(Change(self.name, path, "there", None, "the gateway is to be gone", action="remove"))
            elif ours and state.former:
                changes.append(Change(self.name, path, "ours", "as before", "it was there before", action="restore"))
            elif ours:
                changes.append(Change(self.name, path, "there", None, "the gateway is to be gone", action="remove"))
        return changes


def check_version(version: str) -> None:
    numbers = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version)
    if numbers and (int(numbers.group(1)), int(numbers.group(2))) < MINIMUM_VERSION:
        raise FleetError(
            "haproxy_too_old",
            "HAProxy %s of this distribution is too old: routing by the model of a request needs %d.%d or newer; use a newer "
            "release of the distribution for gateways." % (version, *MINIMUM_VERSION),
            version=version,
        )


def _masked(content: str) -> str:
    """A secret file of an earlier run for a diff: hashed keys shortened, anything else as a fingerprint."""
    if "PRIVATE KEY" in content:
        return "sha256:%s\n" % hashlib.sha256(content.encode()).hexdigest()[:12]
    return re.sub(r"(?m)^([0-9A-F]{12})[0-9A-F]{52} ", lambda found: "sha256:%s " % found.group(1).lower(), content)
