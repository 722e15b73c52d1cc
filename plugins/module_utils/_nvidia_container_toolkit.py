# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""NVIDIA Container Toolkit: packages in lockstep, runtime registered in Docker, mode explicit, CDI, and the proof.

``nvidia-ctk`` is used for config.toml and CDI specifications only; daemon.json is ours (up to 1.20.0 ``nvidia-ctk runtime
configure --cdi.enabled`` drops all other features from it, and it replaces the file non-atomically).
"""

from __future__ import annotations

import dataclasses
import json
import os.path

from ._cdi_spec import REFRESH, refresh_spec
from ._docker_daemon import DockerDaemon
from ._docker_restart import restart_docker
from ._docker_restart_risk import restart_blocked
from ._errors import FleetError
from ._gpu_smoke_test import run_gpu_container
from ._host import Host
from ._nvidia_container_toolkit_planner import (
    CONFIG,
    MAJOR,
    PACKAGES,
    RUNTIME_PROGRAM,
    STATIC_CDI_SPEC,
    VALIDATION,
    ToolkitPlanner,
    ToolkitState,
    configured_mode,
    outdates_proof,
)
from ._os_release import read_os_release
from ._packages import package_manager
from ._resource import Change, Resource


class NvidiaContainerToolkit(ToolkitPlanner, Resource[ToolkitState]):
    """GPUs in containers: everything between a loaded driver and a NIM that sees its GPU."""

    def apply(self, host: Host, change: Change) -> None:
        if outdates_proof(change):
            host.remove(VALIDATION)
        if change.action.startswith("daemon_"):
            DockerDaemon(self.daemon_options, provided=(RUNTIME_PROGRAM,), api=self.api).apply(host, change)
        elif change.action == "smoke_test":
            self._smoke_test(host)
        elif change.action == "gpus_restart":
            state = self.daemon.observe(host)
            blocked = restart_blocked(state, live_restore=bool(state.info.get("LiveRestoreEnabled")), keys=())
            if blocked:
                raise FleetError("restart_refused", "Restarting Docker was refused: %s." % blocked)
            restart_docker(host, self.api, state)
        elif change.action == "mode":
            self._set_mode(host)
        elif change.action == "static_spec":
            text = host.read_text(STATIC_CDI_SPEC)
            if text is not None:
                host.make_dir("/var/lib/gpu_fleet", mode=0o755)
                host.write_file("/var/lib/gpu_fleet/cdi-nvidia.yaml.before", text, mode=0o644)
                host.remove(STATIC_CDI_SPEC)
        elif change.action == "refresh_path":
            host.check(
                ["systemctl", "enable", "--now", "%s.path" % REFRESH],
                reason="cdi_refresh_failed",
                doing="Enabling %s.path" % REFRESH,
            )
        elif change.action == "refresh_service":
            host.check(
                ["systemctl", "enable", "%s.service" % REFRESH],
                reason="cdi_refresh_failed",
                doing="Enabling %s.service" % REFRESH,
            )
        elif change.action == "refresh":
            refresh_spec(host)
        else:
            self._apply_packages(host, change)

    def _apply_packages(self, host: Host, change: Change) -> None:
        release = read_os_release(host)
        manager = package_manager(host, release)
        if change.action == "repository":
            manager.apply_repository(change.data["repository"])
            return
        if change.action in ("hold", "unhold"):
            present = manager.installed(*PACKAGES)
            if change.action == "hold":
                manager.hold(*(name for name, package in present.items() if not package.held))
            else:
                manager.unhold(*(name for name, package in present.items() if package.held))
            return
        manager.repair()
        state = dataclasses.replace(self.observe(host), offers=manager.available(*PACKAGES))
        if self._packages_good(state):
            return  # the first of the four took the others along
        target = self._target(state)
        if not target:
            manager.refresh(self.repository(release, host.machine()))
            state = dataclasses.replace(state, offers=manager.available(*PACKAGES))
            target = self._target(state)
        if not target:
            offered = [offer.version for offer in state.offers.get(PACKAGES[0], ())]
            raise FleetError(
                "no_suitable_version",
                "Installing NVIDIA Container Toolkit %s failed: %s offers the four packages together only as %s; choose one "
                "of these, or another repository_url."
                % (self.version or MAJOR + ".x", self.repository_url, ", ".join(offered) or "nothing"),
                offered=offered,
            )
        manager.install(dict.fromkeys(PACKAGES, target), reinstall=self._program_missing(state))
        if self.hold:
            # apt forgets the hold of a package that it was told to change all the same.
            manager.hold(*manager.installed(*PACKAGES))

    def _set_mode(self, host: Host) -> None:
        if configured_mode(host.read_text(CONFIG)) == self.mode:
            return
        host.make_dir(os.path.dirname(CONFIG), mode=0o755)
        host.check(
            ["nvidia-ctk", "config", "--in-place", "--set", "nvidia-container-runtime.mode=%s" % self.mode],
            reason="toolkit_config_failed",
            doing="Setting the mode in %s" % CONFIG,
            remedy="The file may be broken; mend it, or move it away and run again.",
            timeout=60,
        )

    def _smoke_test(self, host: Host) -> None:
        state = self.observe(host)
        if self.validated(state):
            return
        seen = run_gpu_container(host, self.injection, state.nvidia_smi or "nvidia-smi")
        host.make_dir(os.path.dirname(VALIDATION), mode=0o755)
        record = {"key": self._key(state), "gpus": list(seen), "time": int(host.time())}
        host.write_file(VALIDATION, json.dumps(record, indent=2) + "\n", mode=0o644)
