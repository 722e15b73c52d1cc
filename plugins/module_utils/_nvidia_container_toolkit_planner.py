# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What is wanted between a loaded driver and a NIM that sees its GPU, and what differs."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing as t
from dataclasses import dataclass, field

from ._cdi_spec import CDI_SPEC, REFRESH, spec_is_for
from ._docker_api import DockerApi
from ._docker_daemon_planner import DaemonPlanner
from ._docker_restart_risk import restart_blocked
from ._dockerd import DaemonState, version_tuple
from ._errors import FleetError
from ._host import Host
from ._options import GPU_INJECTIONS, RUNTIME_MODES, TOOLKIT_REPOSITORY
from ._os_release import OsRelease, read_os_release
from ._package_versions import compare_debian, matches_version, upstream_version
from ._packages import Available, Package, Repository, RepositoryState, check_url, package_manager, plan_hold
from ._resource import Change, Disruption, Planner
from ._systemd import unit_properties
from ._untrusted import is_digits, json_object, whole_number

#: One version for all four, always: they depend on each other's exact behaviour (nvidia-container-toolkit #1091, #59).
PACKAGES = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)
#: The major version that this collection knows.
MAJOR = "1"
RUNTIME = "nvidia"
RUNTIME_PROGRAM = "nvidia-container-runtime"
#: The package that brings it.
BASE_PACKAGE = "nvidia-container-toolkit-base"
HOOK = "/usr/bin/nvidia-container-runtime-hook"
CONFIG = "/etc/nvidia-container-runtime/config.toml"
STATIC_CDI_SPEC = "/etc/cdi/nvidia.yaml"
#: Record of the last smoke test that passed; gone after a reboot, when it has to be proved again.
VALIDATION = "/run/gpu_fleet/validations/nvidia_container_toolkit.json"


@dataclass(frozen=True)
class RefreshUnits:
    """The units that keep the CDI specification fresh (toolkit 1.18 and newer)."""

    present: bool = False
    path_enabled: bool = False
    path_active: bool = False
    service_enabled: bool = True
    failed: bool = False
    masked: str = ""


@dataclass(frozen=True)
class ToolkitState:
    """What a look found of the toolkit.

    Attributes:
        machine: Machine hardware name of the host.
        packages: Those of the four that are installed.
        offers: Versions on offer, as far as package lists are on the host.
        mode: ``mode`` in config.toml; None when it is not set there.
        config_present: Whether there is a config.toml.
        refresh: The CDI refresh units.
        cdi_spec: Text of the generated specification.
        static_cdi_spec: Text of a specification that was put into /etc/cdi by hand.
        driver_version: Version of the loaded kernel module; empty when none is loaded.
        nvidia_smi: Path of nvidia-smi on the host.
        daemon: Docker's configuration, wanted and live.
        hook_missing: Whether the toolkit's hook, which dockerd looks for when it starts, is not there.
        hook_newer_than_daemon: Whether dockerd was started before the toolkit's hook was there in its present form.
        validation: The record of the last smoke test that passed.
    """

    release: OsRelease
    machine: str = "x86_64"
    packages: t.Mapping[str, Package] = field(default_factory=dict)
    offers: t.Mapping[str, t.Sequence[Available]] = field(default_factory=dict)
    repository: RepositoryState = field(default_factory=RepositoryState)
    mode: t.Optional[str] = None
    config_present: bool = False
    refresh: RefreshUnits = field(default_factory=RefreshUnits)
    cdi_spec: t.Optional[str] = None
    static_cdi_spec: t.Optional[str] = None
    driver_version: str = ""
    nvidia_smi: t.Optional[str] = None
    daemon: DaemonState = field(default_factory=DaemonState)
    hook_missing: bool = False
    hook_newer_than_daemon: bool = False
    validation: t.Mapping[str, t.Any] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Package version of the toolkit; empty when it is not installed."""
        package = self.packages.get(PACKAGES[0])
        return package.version if package else ""

    @property
    def registered(self) -> bool:
        """Whether the live daemon knows the runtime."""
        return RUNTIME in (self.daemon.info.get("Runtimes") or {})


def configured_mode(text: t.Optional[str]) -> t.Optional[str]:
    """``mode`` of the table ``[nvidia-container-runtime]`` in config.toml; None where it is commented out or missing."""
    table = ""
    for raw in (text or "").splitlines():
        line = raw.strip()
        header = re.match(r"\[([^\[\]]+)\]", line)
        if header:
            table = header.group(1).strip()
        elif table == "nvidia-container-runtime":
            found = re.match(r"mode\s*=\s*[\"']([^\"']*)[\"']", line)
            if found:
                return found.group(1)
    return None


class ToolkitPlanner(Planner[ToolkitState]):
    """GPUs in containers: everything between a loaded driver and a NIM that sees its GPU.

    Args:
        version: Exact version or leading components of one; empty takes the newest 1.x when installing and keeps what is
            installed afterwards.
        mode: The runtime's mode, written into config.toml whatever its default is.
        default_runtime: Whether ``nvidia`` is Docker's default runtime.
        cdi: Whether Docker's CDI feature is on.
        hold: Whether package upgrades leave the four packages alone.
        smoke_test: Whether a GPU container must prove that all this works.
        injection: How the containers of this host ask for GPUs; the smoke test asks in the same way.
    """

    name = "nvidia_container_toolkit"

    def __init__(
        self,
        repository_url: str = TOOLKIT_REPOSITORY,
        version: str = "",
        mode: str = "auto",
        default_runtime: bool = False,
        cdi: bool = False,
        hold: bool = True,
        smoke_test: bool = True,
        injection: str = "runtime",
        api: t.Optional[DockerApi] = None,
    ) -> None:
        for option, value, allowed in (("mode", mode, RUNTIME_MODES), ("injection", injection, GPU_INJECTIONS)):
            if value not in allowed:
                raise FleetError(
                    "invalid_option",
                    "%s = %s: unknown; use %s." % (option, value, ", ".join(allowed)),
                    option=option,
                )
        self.repository_url = check_url("repository_url", repository_url)
        self.version = version.strip()
        if self.version and not re.match(r"%s(\.\d+){0,2}([~-][A-Za-z0-9.~]+)*\Z" % MAJOR, self.version):
            raise FleetError(
                "invalid_option",
                "version = %s: not a version of the toolkit's %s.x line; write for example 1.20.0 or 1.20.0-1."
                % (self.version, MAJOR),
                option="version",
            )
        # A version of one component may become any.
        if mode == "jit-cdi" and "." in self.version:
            self._check_jit_cdi(self.version)
        self.mode = mode
        self.hold = hold
        self.cdi = cdi or injection == "cdi"
        self.smoke_test = smoke_test
        self.injection = injection
        options: t.Dict[str, t.Any] = {"runtimes": {RUNTIME: {"path": RUNTIME_PROGRAM}}}
        if default_runtime:
            options["default-runtime"] = RUNTIME
        if self.cdi:
            options["features"] = {"cdi": True}
        #: Keys of daemon.json.
        self.daemon_options = options
        self.daemon = DaemonPlanner(options, provided=(RUNTIME_PROGRAM,), api=api)
        self.api = self.daemon.api

    def repository(self, release: OsRelease, machine: str) -> Repository:
        """NVIDIA's repository: the same for every distribution, one per package format and architecture."""
        if release.family == "debian":
            architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
            url = "%s/stable/deb/%s" % (self.repository_url, architecture)
        else:
            url = "%s/stable/rpm/%s" % (self.repository_url, machine)
        return Repository(
            name="nvidia-container-toolkit",
            description="NVIDIA Container Toolkit",
            url=url,
            key_url="%s/gpgkey" % self.repository_url,
            suite="/",
        )

    # -- observe ----------------------------------------------------------------------------------

    def observe(self, host: Host) -> ToolkitState:
        release = read_os_release(host)
        manager = package_manager(host, release)
        packages = manager.installed(*PACKAGES)
        config = host.read_text(CONFIG)
        daemon = self.daemon.observe(host)
        state = ToolkitState(
            release=release,
            machine=host.machine(),
            packages=packages,
            repository=manager.repository_state(self.repository(release, host.machine())),
            mode=configured_mode(config),
            config_present=config is not None,
            refresh=observe_refresh(host) if packages else RefreshUnits(),
            cdi_spec=host.read_text(CDI_SPEC),
            static_cdi_spec=host.read_text(STATIC_CDI_SPEC),
            driver_version=(host.read_text("/sys/module/nvidia/version") or "").strip(),
            nvidia_smi=host.which("nvidia-smi"),
            daemon=daemon,
            hook_missing=self.injection == "gpus" and not host.exists(HOOK),
            hook_newer_than_daemon=self.injection == "gpus" and _hook_newer(host, daemon.main_pid),
            validation=_read_validation(host),
        )
        if not self._packages_good(state):
            state = dataclasses.replace(state, offers=manager.available(*PACKAGES))
        return state

    @staticmethod
    def _program_missing(state: ToolkitState) -> bool:
        """Whether the packages say that the runtime and its hook are there, and they are not."""
        return (
            len(state.packages) == len(PACKAGES)
            and all(package.complete for package in state.packages.values())
            and (not state.daemon.programs.get(RUNTIME_PROGRAM) or state.hook_missing)
        )

    def _packages_good(self, state: ToolkitState) -> bool:
        if self._program_missing(state):
            return False
        versions = {package.version for package in state.packages.values()}
        return (
            len(state.packages) == len(PACKAGES)
            and len(versions) == 1
            and all(package.complete for package in state.packages.values())
            and matches_version(next(iter(versions)), self.version)
        )

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: ToolkitState) -> t.List[Change]:
        manager = package_manager(Host(), state.release)  # for the texts only; nothing is looked at
        repository = self.repository(state.release, state.machine)
        changes = manager.plan_repository(self.name, repository, state.repository)
        changes += self._package_changes(state)
        target = self._target(state)
        if self.mode == "jit-cdi" and target:
            self._check_jit_cdi(target)
        if state.mode != self.mode:
            changes.append(
                Change(
                    self.name,
                    "%s: mode" % CONFIG,
                    state.mode,
                    self.mode,
                    "the default has changed between releases, so it is said explicitly; running containers keep theirs",
                    action="mode",
                )
            )
        for change in self.daemon.plan(state.daemon):
            changes.append(dataclasses.replace(change, resource=self.name, why=self._daemon_why(state, change)))
        changes += self._cdi_changes(state, target)
        changes += self._gpus_changes(state, changes)
        changes += self._smoke_changes(state, changes)
        return changes

    @staticmethod
    def _check_jit_cdi(version: str) -> None:
        if version_tuple(upstream_version(version)) < (1, 18):
            raise FleetError(
                "invalid_option",
                "mode = jit-cdi: toolkit %s does not know it; use version 1.18 or newer, or another mode." % version,
                option="mode",
            )

    def _target(self, state: ToolkitState) -> str:
        """The one version that all four shall have, as far as it is known; empty for "the newest on offer"."""
        if self._packages_good(state):
            return state.version
        installed = sorted(
            {package.version for package in state.packages.values() if matches_version(package.version, self.version)},
            key=functools.cmp_to_key(compare_debian),
        )
        everywhere = [
            offer.version
            for offer in state.offers.get(PACKAGES[0], ())
            if all(any(one.version == offer.version for one in state.offers.get(name, ())) for name in PACKAGES)
        ]
        # Half an upgrade is finished, not undone.
        for version in [*reversed(installed), *everywhere]:
            if version in everywhere and matches_version(version, self.version or MAJOR):
                return version
        return ""

    def _package_changes(self, state: ToolkitState) -> t.List[Change]:
        changes: t.List[Change] = []
        target = self._target(state) or self.version or "newest %s.x" % MAJOR
        if not self._packages_good(state):
            versions = sorted({package.version for package in state.packages.values()})
            if not state.packages:
                why = "containers get their GPUs through it"
            elif len(versions) > 1:
                why = "the four packages must have one version"
            elif len(state.packages) < len(PACKAGES):
                why = "one of the four packages is missing"
            elif not all(package.complete for package in state.packages.values()):
                why = "an interrupted installation left it half done"
            else:
                why = "version %s is wanted" % self.version
            lost = ""
            if self._program_missing(state):
                runtime = state.daemon.programs.get(RUNTIME_PROGRAM)
                lost, program = (PACKAGES[0], HOOK) if runtime else (BASE_PACKAGE, RUNTIME_PROGRAM)
                why = "its program %s is not there" % program
            for name in PACKAGES:
                package = state.packages.get(name)
                if name == lost:
                    changes.append(
                        Change(self.name, "package %s" % name, "without its files", target, why, action="packages")
                    )
                elif package is None or package.version != target or not package.complete:
                    changes.append(
                        Change(
                            self.name,
                            "package %s" % name,
                            None if package is None else package.version,
                            target,
                            why,
                            action="packages",
                        )
                    )
        why = "an unattended upgrade would change what new containers get"
        changes += plan_hold(self.name, PACKAGES, state.packages, hold=self.hold, why=why)
        return changes

    def _daemon_why(self, state: ToolkitState, change: Change) -> str:
        """The three ways to ``could not select device driver``, told apart."""
        if state.registered or not state.daemon.answers:
            return change.why
        if not state.packages:
            return "the toolkit was never installed, so Docker cannot give GPUs to a container"
        if change.action == "daemon_file":
            return "the toolkit is installed but was never registered in Docker"
        return "the runtime is registered in %s, but the running daemon was not told" % state.daemon.path

    def _cdi_changes(self, state: ToolkitState, target: str) -> t.List[Change]:
        changes: t.List[Change] = []
        static = state.static_cdi_spec
        if static is not None and "nvidia.com/gpu" in static:
            newer = bool(target) and version_tuple(upstream_version(target)) >= (1, 18)
            stale = bool(state.driver_version) and not spec_is_for(static, state.driver_version)
            if newer or stale:
                why = "the refresh service writes %s; a file made by hand goes stale and comes first at boot" % CDI_SPEC
                if stale:
                    why = "it names the libraries of another driver than the loaded %s" % state.driver_version
                changes.append(Change(self.name, STATIC_CDI_SPEC, "present", None, why, action="static_spec"))
        if not state.driver_version or not state.packages:
            return changes
        if self.cdi and state.refresh.masked:
            raise FleetError(
                "unit_masked",
                "Keeping the CDI specification fresh failed: %s is masked, so somebody does not want it to run; 'systemctl "
                "unmask %s' allows it." % (state.refresh.masked, state.refresh.masked),
            )
        if self.cdi and state.refresh.present and not (state.refresh.path_enabled and state.refresh.path_active):
            changes.append(
                Change(
                    self.name,
                    "%s.path" % REFRESH,
                    "enabled" if state.refresh.path_enabled else None,
                    "enabled and active",
                    "the CDI specification must follow the driver",
                    action="refresh_path",
                )
            )
        if self.cdi and state.refresh.present and not state.refresh.service_enabled:
            changes.append(
                Change(
                    self.name,
                    "%s.service" % REFRESH,
                    "disabled",
                    "enabled",
                    "a boot begins without a CDI specification",
                    action="refresh_service",
                )
            )
        outdated = state.cdi_spec is None or not spec_is_for(state.cdi_spec, state.driver_version)
        wanted = self.cdi or (state.refresh.present and state.refresh.path_active)
        if state.refresh.failed or (wanted and outdated and (self.cdi or state.cdi_spec is not None)):
            why = "it was made for another driver than the loaded %s" % state.driver_version
            if state.refresh.failed:
                why = "%s.service failed, as it does when the driver is swapped under it" % REFRESH
            elif state.cdi_spec is None:
                why = "--device nvidia.com/gpu needs it"
            changes.append(
                Change(
                    self.name,
                    CDI_SPEC,
                    None if state.cdi_spec is None else "outdated" if outdated else "present",
                    "for driver %s" % state.driver_version,
                    why,
                    action="refresh",
                )
            )
        return changes

    def _gpus_changes(self, state: ToolkitState, planned: t.Sequence[Change]) -> t.List[Change]:
        """``--gpus`` works only in a daemon that was started after the toolkit was installed."""
        if self.injection != "gpus" or not state.daemon.answers:
            return []
        if any(change.disruption is Disruption.RESTART_DOCKER for change in planned):
            return []
        # New packages bring a new hook: where no smoke test can prove that the daemon goes on with it, it is started anew.
        unproven = any(change.action == "packages" for change in planned) and not (
            self.smoke_test and state.driver_version and state.nvidia_smi
        )
        # Without the hook dockerd was started without it, whatever of the toolkit is there.
        if not state.hook_missing and not unproven and (not state.hook_newer_than_daemon or self.validated(state)):
            return []
        return [
            Change(
                self.name,
                "GPU driver of the running daemon",
                None,
                "registered",
                "dockerd looks for the toolkit's hook only when it starts, and was started before it was there",
                Disruption.RESTART_DOCKER,
                "gpus_restart",
                blocked=restart_blocked(
                    state.daemon, live_restore=bool(state.daemon.info.get("LiveRestoreEnabled")), keys=()
                ),
            )
        ]

    def _key(self, state: ToolkitState) -> t.Dict[str, str]:
        """What the outcome of the smoke test depends on."""
        key = {
            "driver": state.driver_version,
            "toolkit": state.version,
            "docker": state.daemon.version,
            "mode": state.mode or "",
            "injection": self.injection,
        }
        if self.injection != "runtime":
            # CDI and --gpus are set up when the daemon starts.
            key["daemon"] = str(state.daemon.main_pid)
        return key

    def validated(self, state: ToolkitState) -> bool:
        """Whether the last smoke test that passed was made with the present versions."""
        return dict(state.validation.get("key", {})) == self._key(state)

    def _smoke_changes(self, state: ToolkitState, planned: t.Sequence[Change]) -> t.List[Change]:
        if not self.smoke_test or not state.driver_version or not state.nvidia_smi or not state.daemon.answers:
            return []
        if any(change.blocked for change in planned):
            return []
        if self.validated(state) and not any(outdates_proof(change) for change in planned):
            return []
        return [
            Change(
                self.name,
                "GPU container",
                None,
                "sees the host's GPUs",
                "proof of driver, toolkit and Docker together, in the way the NIM containers ask for GPUs (%s)"
                % self.injection,
                action="smoke_test",
                proof=True,
            )
        ]


def outdates_proof(change: Change) -> bool:
    """Whether a change may alter what a GPU container gets, so that the last smoke test proves nothing any more."""
    return change.action in ("packages", "mode", "gpus_restart", "refresh") or change.action.startswith("daemon_")


def observe_refresh(host: Host) -> RefreshUnits:
    path = unit_properties(host, "%s.path" % REFRESH, "LoadState", "UnitFileState", "ActiveState")
    service = unit_properties(host, "%s.service" % REFRESH, "LoadState", "UnitFileState", "ActiveState")
    return RefreshUnits(
        present=service.get("LoadState") == "loaded",
        path_enabled=path.get("UnitFileState") == "enabled",
        path_active=path.get("ActiveState") == "active",
        service_enabled=service.get("UnitFileState") != "disabled",
        failed=service.get("ActiveState") == "failed",
        masked=" ".join(
            "%s.%s" % (REFRESH, kind)
            for kind, shown in (("path", path), ("service", service))
            if shown.get("LoadState") == "masked"
        ),
    )


def _hook_newer(host: Host, main_pid: int) -> bool:
    """Whether the toolkit's hook was put in place after the daemon had started."""
    if not main_pid:
        return False
    changed = host.run(["stat", "-c", "%Z", HOOK])
    process = (host.read_text("/proc/%d/stat" % main_pid) or "").rpartition(")")[2].split()
    boot = re.search(r"(?m)^btime (\d+)$", host.read_text("/proc/stat") or "")
    if not changed.ok or len(process) < 20 or not boot or not all(map(is_digits, (boot.group(1), process[19]))):
        return False
    # Field 22 of /proc/<pid>/stat, in USER_HZ, which is 100 on every architecture that NVIDIA supports.
    # Both are rounded to seconds, and the boot time moves with the clock.
    return whole_number(changed.stdout.strip()) > int(boot.group(1)) + int(process[19]) // 100 + 2


def _read_validation(host: Host) -> t.Dict[str, t.Any]:
    found = json_object(host.read_text(VALIDATION))
    return found if isinstance(found.get("key"), dict) else {}
