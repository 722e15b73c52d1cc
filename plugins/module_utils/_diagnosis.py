# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What is wrong with a GPU host and its NIM services, in one look: findings with cause and remedy, the worst first.

Nothing is found out here that another part of the collection does not know: the plan of the host, the judgement of its
GPUs, what nim_health says of each service without waiting, the kernel log, and what Docker remembers. Changes nothing.
"""

from __future__ import annotations

import json
import typing as t

from ._docker_api import DockerApi
from ._errors import FleetError
from ._failure_causes import xid_signature
from ._failure_signatures import Signature
from ._findings import FAILED, NOTED, WARNED, Diagnosis, Finding
from ._gpu_health import gpu_health
from ._gpu_inventory import GpuInventory, observe_gpus
from ._gpu_loss import LOST_TEXT, lost_gpus
from ._gpu_loss import REMEDY as LOST_REMEDY
from ._health_target import HealthTarget, parse_targets
from ._host import Host
from ._host_plan import HostPlan, Options, plan_host
from ._image_store import DOCKER_ROOT, image_directory
from ._kernel_log import OUT_OF_MEMORY, XID, KernelEvent, KernelLine, kernel_events, read_kernel_log
from ._nim_health import HealthCheck, Outcome
from ._nim_log import PHASE_WORDS
from ._nim_paths import MAINTENANCE_FILE
from ._redaction import Redactor
from ._resource import Change, Disruption
from ._verdict import REFUSED, WARNING, Verdict
from ._xid_errors import XID_APPLICATION

Json = t.Dict[str, t.Any]

#: Free bytes on a file system below which it is about to be full, and below which nothing can be written any more.
LITTLE_SPACE = 10 * 1024**3
NO_SPACE = 512 * 1024**2
#: Seconds of the past in which ended containers count, and ends of one container from which it loops.
EVENT_SECONDS = 3600
LOOP_ENDS = 3
#: Lines of evidence of one finding.
EVIDENCE_LINES = 12

_PLAN_REMEDY = "run gpu_fleet.nim.site, which puts it right"


def diagnose(
    host: Host,
    wanted: t.Mapping[str, Options | None],
    *,
    signatures: t.Sequence[Signature] = (),
    redactor: Redactor | None = None,
    api: DockerApi | None = None,
) -> Diagnosis:
    """Look at a host once.

    Args:
        wanted: Options of the resources, as for a plan.
        signatures: The user's failure signatures.
        redactor: Masks the secrets of the host in what is found.
    """
    return _Look(host, wanted, signatures, redactor or Redactor(()), api or DockerApi()).run()


class _Look:
    def __init__(
        self,
        host: Host,
        wanted: t.Mapping[str, Options | None],
        signatures: t.Sequence[Signature],
        redactor: Redactor,
        api: DockerApi,
    ) -> None:
        self.host = host
        self.wanted = wanted
        self.signatures = signatures
        self.redactor = redactor
        self.api = api
        self.found = Diagnosis()
        models = (wanted.get("nim_service") or {}).get("models") or []
        self.targets: list[HealthTarget] = parse_targets(models)

    def run(self) -> Diagnosis:
        # Services are judged below, and more strictly.
        planned = {name: options for name, options in self.wanted.items() if name != "nim_health"}
        plan = plan_host(self.host, planned, self.api)
        self.found.plan = plan.result()
        if not plan.gpu:
            self._add(NOTED, "host", "no_gpu", "this host has no NVIDIA GPU, so it is left as it is")
            return self.found
        self._plan(plan)
        inventory = observe_gpus(self.host)
        kernel = read_kernel_log(self.host)
        self._gpus(inventory, kernel)
        docker = self._docker()
        self._kernel(kernel or (), inventory, docker)
        self._space()
        if self.host.exists(MAINTENANCE_FILE):
            self._add(
                WARNED,
                "host",
                "maintenance",
                "%s exists, so no service is started" % MAINTENANCE_FILE,
                "remove it when the host may serve again",
            )
        lost = self._lost_gpus(docker, inventory)
        self._services(lost)
        return self.found

    def _add(
        self,
        severity: str,
        layer: str,
        reason: str,
        cause: str,
        remedy: str = "",
        evidence: t.Iterable[str] = (),
        **more: str,
    ) -> None:
        text = self.redactor.text
        lines = tuple(text(line)[:500] for line in list(evidence)[-EVIDENCE_LINES:])
        finding = Finding(severity, layer, reason, text(cause.rstrip(".")), text(remedy.rstrip(".")), lines, **more)
        if finding not in self.found.findings:
            self.found.findings.append(finding)

    # -- what is not as wanted --------------------------------------------------------------------

    def _plan(self, plan: HostPlan) -> None:
        for error in plan.errors:
            # What another error explains already is told by that one.
            if not error.after:
                cause, _separator, remedy = error.message.partition("; ")
                self._add(FAILED, error.resource, error.reason, cause, remedy)
        for planned in plan.planned:
            if planned.after:
                continue
            change = planned.change
            self._add(
                WARNED,
                change.resource,
                "drift",
                "%s is not as wanted: %s" % (change.what, change.why),
                change.blocked or self._plan_remedy(change),
                ["%s: %s -> %s" % (change.what, _value(change.before), _value(change.after))],
            )

    @staticmethod
    def _plan_remedy(change: Change) -> str:
        if change.disruption == Disruption.NONE:
            return _PLAN_REMEDY
        return "%s (%s)" % (_PLAN_REMEDY, str(change.disruption).replace("_", " "))

    # -- GPUs and kernel --------------------------------------------------------------------------

    def _gpus(self, inventory: GpuInventory, kernel: t.Sequence[KernelLine] | None) -> None:
        for verdict in gpu_health(inventory, kernel):
            self._verdict(verdict)
        if inventory.driver is None:
            self._add(
                FAILED,
                "gpu",
                "driver_not_loaded",
                "the NVIDIA driver is not loaded",
                "run gpu_fleet.nim.site; with Secure Boot its signing key must be enrolled first",
            )

    def _verdict(self, verdict: Verdict) -> None:
        if verdict.verdict in (REFUSED, WARNING):
            severity = FAILED if verdict.verdict == REFUSED else WARNED
            self._add(severity, "gpu", verdict.reason, verdict.message, verdict.remedy, gpu=verdict.gpu)

    def _kernel(
        self, kernel: t.Sequence[KernelLine], inventory: GpuInventory, containers: t.Mapping[str, Json]
    ) -> None:
        uuids = {gpu.bdf: gpu.uuid for gpu in inventory.gpus}
        told: dict[tuple[str, str, int], list[KernelEvent]] = {}
        for event in kernel_events(kernel):
            # Errors of a GPU itself are among its verdicts.
            if event.kind == OUT_OF_MEMORY or event.number in XID_APPLICATION:
                told.setdefault((event.kind, event.bdf or event.container, event.number), []).append(event)
        names = {str(found.get("Id", "")): name for name, found in containers.items()}
        for (kind, where, _number), events in told.items():
            last = events[-1]
            lines = [event.text for event in events]
            if kind == XID:
                meaning = xid_signature(last)
                cause = "%s (%s since boot, the last %s ago)" % (
                    meaning.cause,
                    _times(len(events)),
                    _ago(self.host.time() - last.at),
                )
                gpu = uuids.get(last.bdf, "")
                self._add(NOTED, "gpu", "xid", cause, meaning.remedy, lines, gpu=gpu, signature=meaning.id)
                continue
            name = names.get(where, "")
            self._add(
                WARNED,
                "host",
                "out_of_memory",
                "the kernel killed %s%s for want of memory (%s since boot, the last %s ago)"
                % (
                    last.process or "a process",
                    " of container %s" % (name or where[:12]) if where else "",
                    _times(len(events)),
                    _ago(self.host.time() - last.at),
                ),
                "give the host more memory or swap, or run fewer models",
                lines,
                model=name[len("nim-") :] if name.startswith("nim-") else "",
                signature="eng-28b",
            )

    # -- Docker -----------------------------------------------------------------------------------

    def _docker(self) -> dict[str, Json]:
        """Containers of the services by name, as ``docker inspect`` tells them."""
        found: dict[str, Json] = {}
        try:
            self.api.info()
            for target in self.targets:
                container = self.api.container(target.container)
                if container is not None:
                    found[target.container] = container
        except FleetError as error:
            if not any(one.reason == error.reason and one.severity == FAILED for one in self.found.findings):
                cause, _separator, remedy = error.message.partition("; ")
                self._add(FAILED, "docker_engine", error.reason, cause, remedy or "start it: systemctl start docker")
            return found
        self._events()
        return found

    def _events(self) -> None:
        """Containers that ended again and again, by what Docker remembers."""
        format_ = "{{.Time}} {{.Action}} {{.Actor.Attributes.name}} {{.Actor.Attributes.exitCode}}"
        # An upper end makes the command return.
        until = int(self.host.time())
        argv = ["docker", "events", "--since", str(until - EVENT_SECONDS), "--until", str(until), "--format", format_]
        read = self.host.run([*argv, "--filter", "type=container", "--filter", "event=die"], timeout=20)
        ends: dict[str, list[str]] = {}
        for line in read.stdout.splitlines():
            words = line.split()
            if len(words) >= 3 and words[1] == "die":
                ends.setdefault(words[2], []).append(line)
        for target in self.targets:
            lines = ends.get(target.container, [])
            if len(lines) >= LOOP_ENDS:
                self._add(
                    WARNED,
                    "model",
                    "restart_loop",
                    "the container ended %d times within the last hour" % len(lines),
                    "see 'journalctl CONTAINER_NAME=%s'" % target.container,
                    lines,
                    model=target.name,
                )

    def _lost_gpus(self, containers: t.Mapping[str, Json], inventory: GpuInventory) -> set[str]:
        lost: set[str] = set()
        if not inventory.gpus:
            return lost
        for target in self.targets:
            state = (containers.get(target.container) or {}).get("State") or {}
            if not state.get("Running") or not lost_gpus(self.host, target.container):
                continue
            lost.add(target.name)
            self._add(
                FAILED,
                "model",
                "gpus_lost",
                "its container has lost its GPUs although the driver is alive on the host, as systemctl daemon-reload does "
                "to GPUs that were given behind the runtime's back",
                LOST_REMEDY,
                ["docker exec %s nvidia-smi -L: %s" % (target.container, LOST_TEXT)],
                model=target.name,
                signature="host-48",
            )
        return lost

    # -- space and services -----------------------------------------------------------------------

    def _space(self) -> None:
        try:
            info = self.api.info()
        except FleetError:
            # That Docker does not answer is told elsewhere.
            info = {}
        places = {"/": "the system", str(info.get("DockerRootDir") or DOCKER_ROOT): "Docker", "/var/log": "the journal"}
        places.setdefault(image_directory(self.host, info), "Docker's image store")
        places.update({target.cache_directory: "the model cache of %s" % target.name for target in self.targets})
        told: set[int] = set()
        for path, what in places.items():
            free = self.host.free_bytes(path)
            # Several paths on one file system are one finding.
            if free >= LITTLE_SPACE or free in told:
                continue
            told.add(free)
            self._add(
                FAILED if free < NO_SPACE else WARNED,
                "host",
                "disk_full",
                "only %.1f GB are free where %s is (%s)" % (free / 1e9, what, path),
                "free space there, or move it: cache_directory, Docker's data-root, containerd's root",
            )

    def _services(self, lost: t.Collection[str]) -> None:
        check = HealthCheck(self.host, self.api, self.targets, self.signatures)
        outcome: Outcome = check.run(None, interval=0, wait=False, record=False, strict=True)
        self.found.models = outcome.models
        failures = {target.name: failure for target, failure in outcome.failures}
        for model in outcome.models:
            name = str(model["name"])
            failure = failures.get(name)
            if failure is None:
                if not model["ready"] and name not in lost:
                    self._not_ready(name, str(model["phase"]))
                continue
            cause, remedy, evidence = "it " + failure.what, failure.remedy, list(failure.lines[-EVIDENCE_LINES:])
            if failure.match is not None:
                cause += ": " + failure.match.signature.cause
                remedy = failure.match.signature.remedy
                if failure.match.line:
                    # The line that tells most comes first.
                    others = [line for line in evidence if line != failure.match.line]
                    evidence = [failure.match.line, *others[1 - EVIDENCE_LINES :]]
            severity = NOTED if failure.reason == "maintenance" else FAILED
            self._add(
                severity,
                "model",
                failure.reason,
                cause,
                remedy,
                evidence,
                model=name,
                signature=failure.signature or "",
            )

    def _not_ready(self, name: str, phase: str) -> None:
        if any(one.reason == "docker_unavailable" for one in self.found.findings):
            cause = "it cannot be seen, because Docker does not answer"
            self._add(FAILED, "model", "docker_unavailable", cause, "see the finding on Docker", model=name)
        else:
            self._add(
                NOTED, "model", "starting", "it is still starting (%s)" % PHASE_WORDS.get(phase, phase), model=name
            )


def _value(value: t.Any) -> str:
    text = value if isinstance(value, str) else "absent" if value is None else json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "..."


def _times(count: int) -> str:
    return "once" if count == 1 else "%d times" % count


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return "%d %s%s" % (count, unit, "" if count == 1 else "s")
    return "%d seconds" % max(0, seconds)
