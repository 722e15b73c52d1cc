# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which Docker Engine is wanted on a host, and what differs."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field, replace

from ._docker_api import DockerApi
from ._docker_daemon_planner import DaemonPlanner
from ._docker_restart_risk import restart_blocked
from ._dockerd import DaemonState, flag_values, version_tuple
from ._errors import FleetError
from ._host import Host
from ._image_store import cannot_pull, containerd_store
from ._options import DOCKER_REPOSITORY, MINIMUM_DOCKER_VERSION
from ._os_release import OsRelease, read_os_release
from ._package_versions import matches_version, upstream_version
from ._packages import (
    Available,
    Package,
    Repository,
    RepositoryState,
    check_url,
    package_manager,
    plan_hold,
)
from ._resource import Change, Disruption, Planner
from ._systemd import unit_properties
from ._untrusted import json_object

SERVICE = "docker.service"
SOCKET = "docker.socket"
CONTAINERD = "containerd.service"

_CE_PACKAGES = ("docker-ce", "docker-ce-cli", "containerd.io")
#: Distributions' own engine by OS id; Debian and its derivatives: docker.io.
_RPM_DISTRIBUTION = {"fedora": "moby-engine", "amzn": "docker"}


def containerd_of(host: Host, service: t.Mapping[str, str], argv: t.Sequence[str]) -> t.Mapping[str, str]:
    """Properties of containerd.service where dockerd is told to use it; without the flag it may keep one of its own.

    Args:
        service: ExecStart of docker.service.
        argv: Command line of the running dockerd; empty where none runs.
    """
    told = flag_values(argv).get("containerd") if argv else "--containerd" in service.get("ExecStart", "")
    return unit_properties(host, CONTAINERD, "LoadState", "ActiveState") if told else {}


@dataclass(frozen=True)
class EngineState:
    """What a look found of the engine.

    Attributes:
        packages: Installed engine packages of either source, and podman's imitation.
        offers: Versions on offer, as far as package lists are on the host.
        service: systemd's properties of docker.service: LoadState, UnitFileState, ActiveState, ExecStart.
        socket_masked: Whether docker.socket, which the service needs, is masked.
        containerd: LoadState and ActiveState of the containerd.service that dockerd is told to use; empty when it is not.
        client: Path of the ``docker`` program.
        daemon: The running daemon.
        containerd_store_off: Whether daemon.json turns containerd's image store off.
    """

    release: OsRelease
    packages: t.Mapping[str, Package] = field(default_factory=dict)
    offers: t.Mapping[str, t.Sequence[Available]] = field(default_factory=dict)
    repository: RepositoryState = field(default_factory=RepositoryState)
    service: t.Mapping[str, str] = field(default_factory=dict)
    socket_masked: bool = False
    containerd: t.Mapping[str, str] = field(default_factory=dict)
    client: t.Optional[str] = None
    daemon: DaemonState = field(default_factory=DaemonState)
    containerd_store_off: bool = False

    def installed_engine(self) -> t.Optional[Package]:
        for name in ("docker-ce", "docker.io", *_RPM_DISTRIBUTION.values()):
            if name in self.packages:
                return self.packages[name]
        return None


class EnginePlanner(Planner[EngineState]):
    """An engine that can run NIM: right source, right version, held, enabled and running.

    Args:
        package_source: ``docker`` (docker-ce of Docker's repository) or ``distribution``.
        version: Exact version, leading components of one, or empty for any that is good enough.
        minimum_version: Oldest version that will do.
        hold: Whether package upgrades leave the engine alone.
    """

    name = "docker_engine"

    def __init__(
        self,
        package_source: str = "docker",
        repository_url: str = DOCKER_REPOSITORY,
        version: str = "",
        minimum_version: str = MINIMUM_DOCKER_VERSION,
        hold: bool = True,
        api: t.Optional[DockerApi] = None,
    ) -> None:
        if package_source not in ("docker", "distribution"):
            raise FleetError(
                "invalid_option",
                "package_source = %s: unknown source; use docker or distribution." % package_source,
                option="package_source",
            )
        self.package_source = package_source
        self.repository_url = check_url("repository_url", repository_url)
        self.version = version.strip()
        self.minimum_version = minimum_version
        self.hold = hold
        if not re.match(r"\d+(\.\d+)*\Z", minimum_version):
            raise FleetError(
                "invalid_option",
                "minimum_version = %s: not a version; write numbers and dots, for example 24.0." % minimum_version,
                option="minimum_version",
            )
        if self.version:
            if not re.match(r"(\d+:)?\d+(\.\d+)*([~+.-][A-Za-z0-9.+~-]*)?\Z", self.version):
                raise FleetError(
                    "invalid_option",
                    "version = %s: not an engine version; write for example 28.3.3 or 5:28.3.3-1~debian.12~bookworm."
                    % self.version,
                    option="version",
                )
            upstream = upstream_version(self.version)
            if cannot_pull(upstream):
                raise FleetError(
                    "invalid_option",
                    # Not even with containerd's store off: an engine starts with it on before daemon.json is written.
                    "version = %s: %s in the image store that a new engine starts with; use 29.4.3 or older."
                    % (self.version, _CANNOT_PULL),
                    option="version",
                )
            wanted, minimum = version_tuple(upstream), version_tuple(minimum_version)
            if wanted < minimum[: len(wanted)]:
                raise FleetError(
                    "invalid_option",
                    "version = %s: older than minimum_version = %s, which the NIM family needs; choose a newer engine."
                    % (self.version, minimum_version),
                    option="version",
                )
        self.daemon = DaemonPlanner({}, api=api)
        self.api = self.daemon.api

    # -- names ------------------------------------------------------------------------------------

    def engine_packages(self, release: OsRelease) -> t.Tuple[str, ...]:
        """Packages of the engine itself; the first one carries its version."""
        if self.package_source == "docker":
            return _CE_PACKAGES
        if release.family == "debian":
            return ("docker.io",)
        name = _RPM_DISTRIBUTION.get(release.id)
        if name is None:
            raise FleetError(
                "invalid_option",
                "package_source = distribution: %s has no Docker Engine of its own; use package_source = docker."
                % (release.pretty or release.id),
                option="package_source",
            )
        return (name,)

    def repository(self, release: OsRelease) -> Repository:
        """Docker's repository for a distribution (docs.docker.com/engine/install)."""
        if release.family == "debian":
            base = release.id if release.id in ("debian", "ubuntu", "raspbian") else "debian"
            if "ubuntu" in release.like:
                base = "ubuntu"
            return Repository(
                name="docker",
                url="%s/%s" % (self.repository_url, base),
                key_url="%s/%s/gpg" % (self.repository_url, base),
                suite=release.codename,
                components=("stable",),
            )
        base = release.id if release.id in ("rhel", "fedora") else "centos"
        return Repository(
            name="docker-ce-stable",
            description="Docker CE Stable",
            url="%s/%s/%d/$basearch/stable" % (self.repository_url, base, release.major),
            key_url="%s/%s/gpg" % (self.repository_url, base),
        )

    # -- observe ----------------------------------------------------------------------------------

    def observe(self, host: Host) -> EngineState:
        release = read_os_release(host)
        manager = package_manager(host, release)
        names = [*_CE_PACKAGES, "docker.io", "docker-cli", "containerd", "podman-docker"]
        names += list(_RPM_DISTRIBUTION.values())
        service = unit_properties(host, SERVICE, "LoadState", "UnitFileState", "ActiveState", "ExecStart")
        daemon = self.daemon.observe(host)
        packages = manager.installed(*names)
        state = EngineState(
            release=release,
            packages=packages,
            repository=(
                manager.repository_state(self.repository(release))
                if self.package_source == "docker"
                else RepositoryState()
            ),
            service=service,
            # Whether it and containerd are started at boot does not matter: docker.service requires the one and wants the other.
            socket_masked=unit_properties(host, SOCKET, "LoadState").get("LoadState") == "masked",
            containerd=containerd_of(host, service, daemon.argv),
            client=host.which("docker"),
            daemon=daemon,
            containerd_store_off=_containerd_store_off(daemon),
        )
        if self._wants_offers(state):
            first = self.engine_packages(release)[0]
            state = replace(state, offers=manager.available(first, "docker-cli"))
        return state

    def _wants_offers(self, state: EngineState) -> bool:
        engine = state.installed_engine()
        return engine is None or state.client is None or not self._good(state, engine)

    def _good(self, state: EngineState, engine: Package) -> bool:
        upstream = upstream_version(engine.version)
        return (
            version_tuple(upstream) >= version_tuple(self.minimum_version)
            and matches_version(engine.version, self.version)
            and (not cannot_pull(upstream) or state.containerd_store_off)
        )

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, state: EngineState) -> t.List[Change]:
        self._check_source(state)
        manager_changes: t.List[Change] = []
        names = self.engine_packages(state.release)
        if self.package_source == "docker":
            repository = self.repository(state.release)
            manager = package_manager(Host(), state.release)  # for the texts only; nothing is looked at
            manager_changes = manager.plan_repository(self.name, repository, state.repository)
        changes = manager_changes + self._package_changes(state, names)
        held = [name for name in (*names, "docker-cli", "containerd") if name in state.packages or name in names]
        why = "an unattended upgrade would restart Docker"
        changes += plan_hold(self.name, held, state.packages, hold=self.hold, why=why)
        changes += self._service_changes(state)
        return changes

    def _check_source(self, state: EngineState) -> None:
        wanted = self.engine_packages(state.release)[0]
        engine = state.installed_engine()
        if engine is not None and engine.name != wanted:
            other = "distribution" if self.package_source == "docker" else "docker"
            raise FleetError(
                "source_switch_refused",
                "Installing %s was refused: %s %s is installed, and swapping one for the other stops all containers; set "
                "package_source = %s to keep it, or drain this host and remove %s by hand first."
                % (wanted, engine.name, engine.version, other, engine.name),
                installed=engine.name,
            )
        if "podman-docker" in state.packages:
            raise FleetError(
                "podman_in_the_way",
                "Installing %s was refused: podman-docker, which stands in for the docker program, is installed; remove it "
                "first." % wanted,
            )
        for unit, masked in (
            (SERVICE, state.service.get("LoadState") == "masked"),
            (SOCKET, state.socket_masked),
            (CONTAINERD, state.containerd.get("LoadState") == "masked"),
        ):
            if masked:
                raise FleetError(
                    "unit_masked",
                    "Starting Docker was refused: %s is masked, so somebody does not want it to run; 'systemctl unmask %s' "
                    "allows it." % (unit, unit),
                    unit=unit,
                )

    def _package_changes(self, state: EngineState, names: t.Tuple[str, ...]) -> t.List[Change]:
        changes: t.List[Change] = []
        engine = state.packages.get(names[0])
        target: t.Optional[str] = None
        why = "the NIM containers run in it"
        if engine is not None and not self._good(state, engine):
            upstream = upstream_version(engine.version)
            target = self._best_offer(state.offers.get(names[0], ()))
            why = "version %s is wanted" % self.version
            if cannot_pull(upstream):
                why = _CANNOT_PULL + "; use 29.4.3 or older, or turn features.containerd-snapshotter off in daemon.json"
            elif version_tuple(upstream) < version_tuple(self.minimum_version):
                why = "the NIM family needs Docker Engine %s or newer" % self.minimum_version
            if target is None and (self.package_source == "distribution" or state.repository.indexed):
                raise self._no_version(state, engine, why)
        missing = [name for name in names if name not in state.packages]
        broken = [name for name in names if name in state.packages and not state.packages[name].complete]
        if engine is None or missing or broken or not self._good(state, engine):
            if engine is not None and not missing and self._good(state, engine):
                why = "an interrupted installation left it half done"
            changes.append(
                Change(
                    self.name,
                    "package %s" % names[0],
                    None if engine is None else engine.version,
                    target or self.version or "newest"
                    if engine is None or not self._good(state, engine)
                    else engine.version,
                    why,
                    Disruption.RESTART_DOCKER if state.daemon.answers else Disruption.NONE,
                    "packages",
                    blocked=self._blocked(state, engine, target),
                )
            )
        else:
            behind = [
                name
                for name in names[1:2]
                if upstream_version(state.packages[name].version) != upstream_version(engine.version)
            ]
            if behind:
                changes.append(
                    Change(
                        self.name,
                        "package %s" % behind[0],
                        state.packages[behind[0]].version,
                        engine.version,
                        "client and engine come in one version",
                        action="client",
                    )
                )
        if self.package_source == "distribution" and self._client_missing(state):
            changes.append(
                Change(
                    self.name,
                    "package docker-cli",
                    None,
                    "newest",
                    "the engine's package has no docker program here",
                    action="client",
                )
            )
        return changes

    def _client_missing(self, state: EngineState) -> bool:
        return state.client is None and "docker-cli" not in state.packages and bool(state.offers.get("docker-cli"))

    def _best_offer(self, offers: t.Sequence[Available]) -> t.Optional[str]:
        """The newest version on offer that is wanted, new enough and able to pull."""
        minimum = version_tuple(self.minimum_version)
        for offer in offers:
            upstream = upstream_version(offer.version)
            if (
                matches_version(offer.version, self.version)
                and version_tuple(upstream) >= minimum
                and not cannot_pull(upstream)
            ):
                return offer.version
        return None

    def _no_version(self, state: EngineState, engine: t.Optional[Package], why: str) -> FleetError:
        offered = (
            ", ".join(offer.version for offer in state.offers.get(self.engine_packages(state.release)[0], ())) or "none"
        )
        remedy = "choose another version, or a repository_url that has it"
        if self.package_source == "distribution":
            remedy = "drain this host, remove %s and use package_source = docker" % (
                engine.name if engine else "the distribution's engine"
            )
        return FleetError(
            "no_suitable_version",
            "Installing a Docker Engine that fits failed: %s%s; versions on offer: %s; %s."
            % ("installed is %s, but " % engine.version if engine else "", why.rstrip("."), offered, remedy),
            offered=[offer.version for offer in state.offers.get(self.engine_packages(state.release)[0], ())],
        )

    def _blocked(self, state: EngineState, engine: t.Optional[Package], target: t.Optional[str]) -> t.Optional[str]:
        """Why the packages must not change under the running daemon now."""
        if engine is None or not state.daemon.answers or not state.daemon.running:
            return None
        reason = restart_blocked(state.daemon, live_restore=bool(state.daemon.info.get("LiveRestoreEnabled")), keys=())
        if reason is None and target is not None:
            before, after = (version_tuple(upstream_version(text))[:2] for text in (engine.version, target))
            if before != after:
                names = ", ".join(sorted(container.name for container in state.daemon.running))
                reason = (
                    "live-restore carries running containers (%s) over patch releases only, not from %s to %s; stop them "
                    "first" % (names, engine.version, target)
                )
        return reason

    def _service_changes(self, state: EngineState) -> t.List[Change]:
        changes: t.List[Change] = []
        if state.service.get("UnitFileState") != "enabled":
            changes.append(
                Change(
                    self.name,
                    "%s at boot" % SERVICE,
                    state.service.get("UnitFileState") or None,
                    "enabled",
                    "the NIM services need it after a reboot",
                    action="enable",
                )
            )
        runs = state.service.get("ActiveState") in ("active", "reloading")
        # Docker brings it along where it has to be started itself.
        if runs and state.containerd and state.containerd.get("ActiveState") not in ("active", "reloading"):
            changes.append(
                Change(
                    self.name,
                    CONTAINERD,
                    state.containerd.get("ActiveState") or None,
                    "active",
                    "Docker runs without it, but starts no container",
                    action="containerd",
                )
            )
        if not runs:
            changes.append(
                Change(
                    self.name,
                    SERVICE,
                    state.service.get("ActiveState") or None,
                    "active",
                    "the NIM containers run in it",
                    action="start",
                )
            )
        return changes


_CANNOT_PULL = "Docker Engine 29.5.x cannot pull from nvcr.io (it answers 'Incorrect Repository Format')"


def _containerd_store_off(daemon: DaemonState) -> bool:
    used = containerd_store(daemon.info) if daemon.answers else None
    if used is not None:
        return not used
    features = json_object(daemon.text).get("features")
    return isinstance(features, dict) and features.get("containerd-snapshotter") is False
