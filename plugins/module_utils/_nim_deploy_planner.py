# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The plan of a deployment on one host: which steps are left, found out by looking, and what is said of them."""

from __future__ import annotations

import dataclasses
import typing as t
from dataclasses import dataclass, replace

from ._docker_api import DockerApi
from ._driver_upgrade_record import maintenance
from ._errors import FleetError, check_choice
from ._host import Host
from ._image_reference import ImageReference
from ._nim_models import parse_models
from ._nim_service import NimService
from ._nim_service_state import HostState
from ._resource import Change, Disruption, Planner
from ._rollout_record import (
    GOALS,
    LEASE,
    STRANDED,
    UPDATED,
    Rival,
    RolloutRecord,
    claimed,
    digest_of,
    read,
    rival,
    taken_away,
)
from ._rollout_services import (
    Service,
    observe_own,
    serving,
)

STEPS = ("planned", "prestaged", "drained", "changed", "ready", "returned")
#: Changes of the services' resource for which the host is taken out of service; the others are site's.
_DUE = ("restart", "stop", "remove", "prerequisite")


@dataclass(frozen=True)
class DeployRecord(RolloutRecord):
    """One deployment on one host.

    Attributes:
        before: What ran before, in words.
    """

    order: t.ClassVar[t.Tuple[str, ...]] = STEPS
    path: t.ClassVar[str] = "/var/lib/gpu_fleet/nim-deploy.json"
    shape: t.ClassVar[t.Mapping[str, t.Any]] = {"before": str}

    before: str = ""

    @classmethod
    def more(cls, found: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        return {"before": str(found.get("before") or "")}


@dataclass(frozen=True)
class DeployState:
    """One look at the host.

    Attributes:
        services: As the resource of the services sees them.
        own: The services that are on the host, with what they run.
        changes: What that resource would do for which the host must be out of service.
        error: Why it cannot say.
        serving: Models that are ready; looked for only where the fleet is planned with it.
        way_back: Why what runs now could not be put back; likewise.
        now: When it was, in seconds since the epoch.
    """

    services: HostState
    own: tuple[Service, ...]
    record: DeployRecord | None
    maintenance: str
    rival: Rival | None
    changes: tuple[Change, ...] = ()
    error: FleetError | None = None
    serving: tuple[str, ...] = ()
    way_back: str = ""
    now: float = 0.0

    @property
    def held(self) -> str:
        """Why the host is left alone; empty when it is not."""
        if self.rival is not None and self.rival.out:
            return "%s has taken this host out of service and not given it back; run that again first" % self.rival.work
        if self.maintenance:
            return "somebody has put this host under maintenance; it is left alone"
        return ""

    @property
    def due(self) -> bool:
        """Whether a service does not run what is wanted."""
        return bool(self.changes) or self.error is not None


class DeployPlanner(Planner[DeployState]):
    """What is left of a deployment to what is wanted of the services of a host.

    Args:
        services: Options of module nim_service.
        goal: The step at which to stop, one of :data:`._rollout_record.GOALS`. Who wants ``ready`` has taken the host out of the load
            balancer. ``restored`` gives up, as long as nothing was changed.
        run: Who deploys, in words; another one is told of it.
        take_over: Honour no other run.
        lease: Seconds that ``run`` is honoured by others without a sign of life.

    Raises:
        FleetError: ``invalid_option``.
    """

    name = "nim_deploy"

    def __init__(
        self,
        *,
        services: t.Mapping[str, t.Any],
        goal: str = "ready",
        run: str = "",
        take_over: bool = False,
        lease: int = LEASE,
        api: DockerApi | None = None,
    ) -> None:
        check_choice("state", goal, GOALS)
        if services.get("state") == "absent":
            raise FleetError(
                "invalid_option",
                "nim_service.state = absent: nothing can be ready then; use playbook remove to take services away.",
            )
        self.api = api or DockerApi()
        self.models = parse_models(list(services["models"]), variable="models")
        self.entries = list(services["models"])
        self.services = NimService(
            self.models,
            key=services.get("ngc_api_key"),
            key_state=str(services.get("ngc_key_state") or "present"),
            injection=str(services.get("gpu_injection") or "runtime"),
            health=str(services.get("gpu_health") or "enforce"),
            api=self.api,
        )
        self.goal = goal
        self.run = run
        self.take_over = take_over
        self.lease = lease

    @property
    def started(self) -> tuple[str, ...]:
        """Models that are to be ready in the end."""
        return tuple(sorted(model.name for model in self.models if model.state == "started"))

    def digest(self, state: DeployState) -> str:
        """Name of the target on this host; it tells nothing of secrets."""
        parts: dict[str, t.Any] = {}
        for model in self.models:
            options = {key: value for key, value in dataclasses.asdict(model).items() if key != "secret_environment"}
            image = state.services.images.get(model.image)
            parts[model.name] = [repr(sorted(options.items())), image.digest or image.identifier if image else ""]
        return digest_of(parts)

    # -- observe

    def observe(self, host: Host) -> DeployState:
        state = self._look(host)
        if self.goal != "prestaged":
            return state
        return replace(state, serving=serving(host, self.api, state.own), way_back=self._way_back(state))

    def _look(self, host: Host) -> DeployState:
        """What the steps go by."""
        services = self.services.observe(host)
        changes: list[Change] = []
        error = None
        try:
            changes = self.services.plan(services)
        except FleetError as caught:
            error = caught
        return DeployState(
            services,
            observe_own(host),
            read(host, DeployRecord),
            maintenance(host),
            rival(host, DeployRecord.path),
            tuple(change for change in changes if change.action in _DUE),
            error,
            now=host.time(),
        )

    def _way_back(self, state: DeployState) -> str:
        for service in state.own:
            try:
                if service.active and self.api.image(service.reference) is None:
                    return (
                        "The image %s that model %s runs is not on the host any more, so it could not be put back."
                        % (
                            service.image or service.reference,
                            service.name,
                        )
                    )
            except FleetError as error:
                return "Whether what runs now can be put back is not known: %s" % error.message
        return ""

    # -- plan

    def plan(self, state: DeployState) -> list[Change]:
        record = state.record or DeployRecord()
        if not record.open and (not state.due or self.goal == "restored"):
            return []
        if self.goal == "prestaged" and not state.held:
            try:
                self._refuse(state)
            except FleetError as error:
                # It serves all the same, and counts so where it is left alone.
                error.facts.update(models=list(self.started), serving=list(state.serving))
                raise
        # Whoever is told here has not even waited for the other one's job.
        claimed(record, self.run, state.now, take_over=self.take_over)
        if state.rival is not None:
            state.rival.refuse(self.run, state.now, take_over=self.take_over, begun=record.open)
        if self.goal == "restored":
            # Other work that has this host out is no reason: neither of them could be given up then.
            if state.maintenance:
                raise taken_away(DeployRecord, state.held)
            return [self._change("restored", state, record)]
        if state.held and record.open and self.goal in ("ready", "returned"):
            # Whoever has drained it must not take it for ready.
            raise taken_away(DeployRecord, state.held)
        return self._steps(state, record, self.goal)

    @staticmethod
    def _refuse(state: DeployState) -> None:
        """Raises:
        FleetError: What the services' resource says against it. An image that is not there yet is no error: in check mode it
            will not be pulled.
        """
        if state.error is not None:
            raise state.error
        for change in state.changes:
            if change.action == "prerequisite" and change.data["reason"] != "image_missing":
                raise FleetError(str(change.data["reason"]), str(change.data["message"]))

    def _steps(self, state: DeployState, record: DeployRecord, goal: str) -> list[Change]:
        """The steps that are left up to a goal."""
        steps = STEPS[: STEPS.index(goal) + 1]
        changes = [self._change(step, state, record) for step in steps if not self._done(step, state, record)]
        return [replace(change, blocked=state.held) for change in changes] if state.held else changes

    def _done(self, step: str, state: DeployState, record: DeployRecord) -> bool:
        """Whether a step has nothing left to do, as the host is and not as its record says."""
        known = record.digest == self.digest(state) and (record.open or not record.outcome)
        if step == "planned":
            # Two runs that both go on with what a third has left must not do so at once.
            return known and (not self.run or record.claim.get("run") == self.run)
        if step == "prestaged":
            return known and record.reached("prestaged")
        if step == "drained":
            return known and record.open and record.outcome != STRANDED
        if step == "changed":
            return not state.due
        if step == "ready":
            return known and record.reached("ready") and not state.due
        return record.outcome == UPDATED and known

    def _change(self, step: str, state: DeployState, record: DeployRecord) -> Change:
        services = "NIM services %s" % ", ".join(self.started) if self.started else "NIM services"
        runs, target = self._words(state)
        why = "; ".join(dict.fromkeys("%s: %s" % (change.what, change.why) for change in state.changes))
        what, before, after, why, disruption = {
            "planned": ("record of the deployment", None, target, "any controller can go on", Disruption.NONE),
            "prestaged": ("images", None, "on the host", "nothing is waited for while it is out", Disruption.NONE),
            "drained": ("the host", "in service", "out of service", "its models are restarted", Disruption.NONE),
            "changed": (services, runs, target, why or "they do not run what is wanted", Disruption.RESTART_NIM),
            "ready": (
                services,
                "starting",
                "ready",
                "a host comes back when its models answer",
                Disruption.NONE,
            ),
            "returned": ("the host", "out of service", "in service", "the deployment has ended", Disruption.NONE),
            "restored": ("the host", "out of service", "in service", "its deployment is given up", Disruption.NONE),
        }[step]
        return Change(self.name, what, before, after, why, disruption=disruption, action=step)

    def _words(self, state: DeployState) -> tuple[str, str]:
        """What runs and what is wanted: ``llama 1.8.4, qwen 1.2.0``, with digests where the tags are the same."""
        active = {service.name: service for service in state.own if service.active}
        runs = {name: _tag(service.image or service.reference) for name, service in active.items()}
        wanted = {model.name: _tag(model.image) for model in self.models if model.state == "started"}
        if runs == wanted:
            runs = {name: "%s (%s)" % (tag, _short(active[name].reference)) for name, tag in runs.items()}
            wanted = {name: "%s (%s)" % (tag, self._short_of(name, state)) for name, tag in wanted.items()}
        return tuple(", ".join("%s %s" % item for item in sorted(words.items())) for words in (runs, wanted))  # type: ignore[return-value]  # two

    def _short_of(self, name: str, state: DeployState) -> str:
        image = next((state.services.images.get(model.image) for model in self.models if model.name == name), None)
        return _short(image.reference) if image else "not pulled yet"

    # -- answer

    def result(self, state: DeployState) -> dict[str, t.Any]:
        """Return values of the module."""
        record = state.record or DeployRecord()
        runs, target = self._words(state)
        return {
            "gpu": True,
            "due": state.due or record.open,
            "target": target,
            "runs": runs,
            "digest": self.digest(state),
            "step": record.step,
            "outcome": record.outcome,
            "open": record.open,
            "held": state.held,
            "wanted": list(self.started),
            "models": sorted({*self.started, *record.workloads}) if record.open else list(self.started),
            "serving": list(state.serving),
            "steps": [change.as_dict() for change in self._left(state, record)],
            "record": record.as_dict() if state.record else {},
            "way_back": state.way_back,
            "message": self._message(state, record, runs, target),
        }

    def _left(self, state: DeployState, record: DeployRecord) -> list[Change]:
        """Everything that is still to be done until the host is given back."""
        return self._steps(state, record, "returned") if state.due or record.open else []

    @staticmethod
    def _message(state: DeployState, record: DeployRecord, runs: str, target: str) -> str:
        if state.held:
            return "This host was left alone: %s." % state.held
        if not state.due and not record.open:
            return "The models run as wanted: %s." % (target or "none")
        return "The models of this host run %s, and %s is wanted." % (runs or "nothing", target or "nothing")


def _tag(reference: str) -> str:
    """Tag of an image, or the beginning of its digest."""
    try:
        parsed = ImageReference.parse(reference)
    except FleetError:
        return reference
    return parsed.tag or _short(reference)


def _short(reference: str) -> str:
    """The first digits of a digest in a reference, or of an image's id."""
    return reference.rpartition("sha256:")[2][:12]
