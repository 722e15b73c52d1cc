# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that serves two NIMs, in memory: its models can be changed, and it can be killed after any step."""

from __future__ import annotations

import json
import re
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_deploy, _nim_deploy_planner
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host import CommandResult
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy import NimDeploy
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import RESOURCE_OPTIONS
from fake_host import FakeHost
from nim_machine import ENTRYPOINT, LLAMA, Machine, llama, nemo
from upgrade_world import KilledError

_QUESTION = re.compile(r"systemctl (show|is-active|is-enabled)|journalctl|docker exec|find ")
#: The next version of the first model, and the digest of it.
NEWER = LLAMA.replace("1.8.4", "1.8.5")
NEW_DIGEST = "sha256:" + "cd" * 32
OLD = (llama(), nemo())
NEW = (llama(image=NEWER), nemo())


class MortalHost(FakeHost):
    """Attributes:
    kill_after: Number of commands and writes after which the process is gone; None for never.
    """

    def __init__(self, of: FakeHost) -> None:
        super().__init__(commands=of.commands)
        self.dirs = set(of.dirs)
        self.steps = 0
        self.kill_after: int | None = None

    def _step(self) -> None:
        self.steps += 1
        if self.kill_after is not None and self.steps >= self.kill_after:
            raise KilledError

    def run(self, argv: t.Sequence[str], **more: t.Any) -> CommandResult:
        result = super().run(argv, **more)
        # To be killed after a question is to be killed after the change before it.
        if not _QUESTION.match(" ".join(argv)):
            self._step()
        return result

    def write_file(self, path: str, content: str | bytes, *, mode: int, uid: int = 0, gid: int = 0) -> None:
        super().write_file(path, content, mode=mode, uid=uid, gid=gid)
        self._step()

    def remove(self, path: str) -> None:
        super().remove(path)
        self._step()


class DeployWorld(Machine):
    """Two models that serve, and what is needed for another version of the first.

    Attributes:
        sick: Digests with which no NIM becomes ready.
        ill: Services that never become ready.
        requests: Names of the services that were waited for, each time they were ready.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.sick: set[str] = set()
        self.ill: set[str] = set()
        self.requests: list[str] = []
        self.mortal = MortalHost(self.host)
        self.host = self.mortal
        self.host.commands["systemctl show --property=*"] = self._show_units
        self.converge(*OLD)
        self.pull()
        self.mortal.steps = 0
        monkeypatch.setattr(_nim_deploy, "wait_ready", self._wait_ready)
        for module in (_nim_deploy, _nim_deploy_planner):
            monkeypatch.setattr(module, "serving", self._serving)

    def pull(self, reference: str = NEWER, digest: str = NEW_DIGEST) -> None:
        """The image is on the host; where the tag was another image, that one has lost its name."""
        old = self.api.images.pop(reference, None)
        if old is not None:
            self.api.images["<none>"] = old
        self.api.images[reference] = {
            "Id": "sha256:" + "3" * 64,
            "RepoDigests": ["%s@%s" % (reference.rsplit(":", 1)[0], digest)],
            "Config": {
                "Labels": {"com.nvidia.nim.version": "1.8.5"},
                "Env": [],
                "Entrypoint": [ENTRYPOINT],
                "Cmd": ["/opt/nim/start.sh"],
            },
        }

    # -- what tests do and ask

    def deploy(self, goal: str, *models: dict[str, t.Any], **more: t.Any) -> NimDeploy:
        options = {name: option.get("default") for name, option in RESOURCE_OPTIONS["nim_service"].items()}
        service = {name: more.pop(name) for name in list(more) if name in options}
        services = {**options, **service, "models": list(models or NEW)}
        return NimDeploy(services=services, goal=goal, api=t.cast(t.Any, self.api), **more)

    def runs(self, name: str = "llama") -> str:
        """Digest that a service was started with; empty when it does not run."""
        entry = self.api.list.get("nim-" + name)
        if self.active.get("nim-%s.service" % name) != "active" or entry is None or entry["State"] != "running":
            return ""
        found = json.loads(self.host.files["/etc/nim/%s.json" % name])
        assert entry["Labels"] == {"com.gpu-fleet.nim.spec": found["spec"]} or found["spec"] in entry["Labels"].values()
        return str(found["digest"])

    def end(self) -> dict[str, t.Any]:
        """What must be the same however often the deployment was interrupted."""
        files = {
            path: text for path, text in self.host.files.items() if path.startswith(("/etc/", "/usr/", "/run/nim"))
        }
        return {
            "files": files,
            "containers": {name: (entry["Labels"], entry["State"]) for name, entry in self.api.list.items()},
            "active": {unit: state for unit, state in self.active.items() if state == "active"},
            "enabled": set(self.enabled),
            "kept": self.host.exists("/var/lib/gpu_fleet/nim-deploy.before"),
        }

    # -- what the commands do

    def _show_units(self, _host: t.Any, argv: tuple[str, ...], *_rest: t.Any) -> str:
        blocks = []
        for unit in argv[3:]:
            state = self.active.get(unit, "inactive")
            blocks.append("Id=%s\nLoadState=loaded\nActiveState=%s\nSubState=running\n" % (unit, state))
        return "\n".join(blocks)

    def _wait_ready(
        self, _host: t.Any, _api: t.Any, services: t.Any, names: t.Any, _models: t.Any, tell: t.Any
    ) -> None:
        for service in services:
            if service.name in names:
                digest = self.runs(service.name)
                assert digest, "%s was never started" % service.unit
                if digest in self.sick or service.name in self.ill:
                    raise FleetError("start_timeout", "Model %s is not ready after 1800 seconds." % service.name)
                self.requests.append(service.name)
        tell("all ready")

    def _serving(self, _host: t.Any, _api: t.Any, services: t.Any) -> tuple[str, ...]:
        well = [service for service in services if service.active and service.name not in self.ill]
        return tuple(one.name for one in well if one.reference.rpartition("@")[2] not in self.sick)
