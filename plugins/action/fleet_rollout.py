# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides which hosts are taken out when, tells it, and writes the report; connects to none of them."""

from __future__ import annotations

import json
import time
import typing as t
from dataclasses import replace

from ansible.errors import AnsibleActionFail, AnsibleError, AnsiblePromptInterrupt, AnsiblePromptNoninteractive
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.filter.gateway_hosts import gateway_hosts
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _rollout_gateways as gateways
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _rollout_looks as looks
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout import (
    FleetHost,
    Limits,
    Rollout,
    admit,
    exhausted,
    parse_share,
    plan_fleet,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import LEASE
from ansible_collections.gpu_fleet.nim.plugins.module_utils._text_table import shorten
from ansible_collections.gpu_fleet.nim.plugins.module_utils._untrusted import real_number
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import write_file
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import resolved, returned
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_page import render_page

_OPTIONS: dict[str, dict[str, t.Any]] = {
    "phase": {"type": "str", "choices": ["plan", "pause", "batch", "end"], "default": "plan"},
    "kind": {"type": "str", "choices": ["driver_upgrade", "nim_deploy"], "default": "driver_upgrade"},
    "variable": {"type": "str", "required": True},
    "results": {"type": "list", "elements": "str", "default": []},
    "failure": {"type": "str"},
    "gateways": {"type": "str"},
    "decision": {"type": "str"},
    "claims": {"type": "str"},
    "fail": {"type": "bool", "default": True},
    "before": {"type": "dict", "default": {}},
    "begun": {"type": "float", "default": 0.0},
    "hosts": {"type": "list", "elements": "str"},
    "order": {"type": "list", "elements": "str", "default": []},
    "canary": {"type": "list", "elements": "str", "default": []},
    "pause_after_canary": {"type": "raw", "default": False},
    "max_parallel": {"type": "str", "default": "0"},
    "max_unavailable": {"type": "str", "default": "25%"},
    "min_ready": {"type": "int", "default": 1},
    "min_ready_of": {"type": "dict", "default": {}},
    "failure_budget": {"type": "str", "default": "0"},
    "output": {"type": "path"},
    "report": {"type": "path"},
}


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no type information
    TRANSFERS_FILES = False
    #: One call for all hosts, so that there is one plan.
    BYPASS_HOST_LOOP = True
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        super().run(tmp, task_vars)
        self.task_vars = task_vars or {}
        _result, self.args = self.validate_argument_spec(argument_spec=_OPTIONS)
        self.prefix = str(self.args["kind"])
        self.looks: dict[str, looks.Look] = {}
        try:
            try:
                self._look()
                return getattr(self, "_" + self.args["phase"])()  # type: ignore[no-any-return]  # by name
            except FleetError as error:
                raise AnsibleActionFail(error.message) from error
        except AnsibleActionFail as failure:
            if self.args["fail"]:
                raise
            return {"changed": False, "refused": str(failure), "order": [], "claimed": self._claimed(self.looks)}

    # -- what is known

    def _look(self) -> None:
        """All hosts as they were before the run, and the plan that follows from it."""
        names = self.args["hosts"] or self.task_vars.get("ansible_play_hosts_all") or []
        self.variables = {str(name): self.task_vars["hostvars"][name] for name in self._ordered(list(map(str, names)))}
        self.looks = {name: self._answer(name, self.args["variable"]) for name in self.variables}
        self.skips = {name: self._skip(name) for name in self.variables}
        self.limits = Limits(
            max_parallel=parse_share(self.prefix + "_max_parallel", self.args["max_parallel"]),
            max_unavailable=parse_share(self.prefix + "_max_unavailable", self.args["max_unavailable"]),
            min_ready=self.args["min_ready"],
            min_ready_of=self._min_ready_of(),
        )
        self.budget = parse_share(self.prefix + "_failure_budget", self.args["failure_budget"])
        self.pause = self._pause_option()
        self._check_names()
        canaries = self._named(self.args["canary"])
        # The gateways now, and as they were before anything began.
        self.now = gateways.parse_looks(self._own(self.args["gateways"]))
        self.before = gateways.parse_looks(self.args["before"]) or self.now
        self.fleet = [
            gateways.as_gateways_see(
                looks.fleet_host(name, look, skip=self.skips[name], canary=name in canaries), self.before
            )
            for name, look in self.looks.items()
            if looks.state_of(look) != looks.NO_GPU
        ]
        self._check_limits()
        self.plan: Rollout = self._with_left_out(
            plan_fleet([*self.fleet, *gateways.beside(self.variables, self.before)], self.limits)
        )

    def _check_names(self) -> None:
        """A name with a mistake in it must not make another host the canary."""
        groups, hosts = self.task_vars.get("groups") or {}, self.task_vars["hostvars"]
        for option in ("order", "canary"):
            for name in self.args[option]:
                if name not in groups and name not in hosts:
                    raise FleetError(
                        "invalid_option",
                        "%s_%s = %s: the inventory has neither a host nor a group of that name; name what it has."
                        % (self.prefix, option, name),
                    )

    def _check_limits(self) -> None:
        """Limits that say something else than the operator may believe."""
        if not self.limits.max_unavailable.number:
            raise FleetError(
                "invalid_option",
                "%s_max_unavailable = %s: no host could ever go, and it is no way to say that there is no limit; give at least "
                "1, or 100%% for no limit." % (self.prefix, self.limits.max_unavailable),
            )
        for option, number in (
            ("min_ready", self.limits.min_ready),
            *(("min_ready_of", number) for number in self.limits.min_ready_of.values()),
        ):
            if number < 0:
                raise FleetError(
                    "invalid_option",
                    "%s_%s = %d: there are no fewer replicas than 0; 0 lets the last one go, too."
                    % (self.prefix, option, number),
                )
        wrong = sorted(set(self.limits.min_ready_of) - self._models())
        if wrong:
            raise FleetError(
                "invalid_option",
                "%s_min_ready_of = %s: no host has a model of that name, so nothing would be kept; use the names in nim_models."
                % (self.prefix, ", ".join(wrong)),
            )

    def _models(self) -> set[str]:
        """Names of models, where the operator has named some."""
        found = {model for host in self.fleet for model in (*host.models, *host.serving)}
        if not set(self.limits.min_ready_of) - found:
            return found
        # Of hosts, too, that this run does not have or that cannot be asked.
        hostvars = self.task_vars["hostvars"]
        for name in {*(self.task_vars.get("groups") or {}).get("all", ()), *self.variables}:
            try:
                entries = resolved(hostvars[name].get("nim_models") or [])
            except AnsibleError:
                # Of a host that this run does not have; its own have been checked.
                continue
            found |= {str(entry.get("name")) for entry in entries if isinstance(entry, dict)}
        return found

    def _with_left_out(self, plan: Rollout) -> Rollout:
        """The plan, and hosts that are as wanted although an earlier run that went back could not give them back."""
        left = {}
        for name in plan.done:
            look = self.looks[name] or {}
            gateway = gateways.left_out(name, look.get("models") or (), self.now)
            if gateway and look.get("outcome") in ("restored", "rolled_back"):
                left[name] = (
                    "an earlier run has left it drained at gateway %s; enable it there with module haproxy_server, when its "
                    "models are ready" % gateway
                )
        return replace(
            plan,
            done=tuple(name for name in plan.done if name not in left),
            left={**plan.left, **left},
            waits=(*plan.waits, *left),
        )

    def _named(self, names: t.Iterable[str]) -> list[str]:
        """Hosts and the members of groups."""
        groups = self.task_vars.get("groups") or {}
        return [str(host) for name in names for host in groups.get(name, [name])]

    def _ordered(self, names: list[str]) -> list[str]:
        first = self._named(self.args["order"])
        return sorted(names, key=lambda name: first.index(name) if name in first else len(first))

    def _answer(self, name: str, variable: str | None) -> looks.Look:
        found = returned(self.variables[name].get(variable)) if variable else None
        return found if isinstance(found, dict) else None

    def _own(self, variable: str | None) -> t.Any:
        """A variable of the host that this task runs for, which all hosts of its play have."""
        return returned(self.task_vars.get(variable)) if variable else None

    def _skip(self, name: str) -> str:
        variable = self.prefix + "_skip"
        return variable if boolean(resolved(self.variables[name].get(variable) or False), strict=False) else ""

    def _min_ready_of(self) -> dict[str, int]:
        found = self.args["min_ready_of"]
        try:
            return {str(model): int(count) for model, count in found.items()}
        except (TypeError, ValueError):
            raise FleetError(
                "invalid_option",
                "%s_min_ready_of = %r: not a mapping of models to numbers; write it like {llama: 2}."
                % (self.prefix, found),
            ) from None

    def _pause_option(self) -> int | None:
        """Seconds to wait after the canaries: 0 for none, None for a key."""
        given = self.args["pause_after_canary"]
        text = str(given).strip()
        if text.isdigit() and not isinstance(given, bool) and len(text) < 8:
            return int(text)
        try:
            return None if boolean(given) else 0
        except TypeError:
            raise FleetError(
                "invalid_option",
                "%s_pause_after_canary = %r: neither true or false nor a number of seconds; write it like 900."
                % (self.prefix, given),
            ) from None

    def _results(self, name: str) -> list[looks.Look]:
        """What is registered of a host's turn, where it had one in this run."""
        if self._registered_before(name):
            return [None for _variable in self.args["results"]]
        return [self._answer(name, variable) for variable in self.args["results"]]

    def _registered_before(self, name: str) -> bool:
        """Whether what is registered of a host is of an earlier run of the same command."""
        return bool(float((self._answer(name, self.args["decision"]) or {}).get("begun") or 0.0) < self.args["begun"])

    def _message(self, name: str) -> str:
        """What went wrong on a host, where the role has failed or else where its module has."""
        failure = None if self._registered_before(name) else self._answer(name, self.args["failure"])
        message = looks.message_of([failure, *self._results(name)])
        gateway = self._not_given_back(name)
        return "%s It is still drained at gateway %s." % (message, gateway) if message and gateway else message

    def _not_given_back(self, name: str) -> str:
        """A gateway at which a host that went back is still drained; empty when there is none."""
        return gateways.left_out(name, (self.looks[name] or {}).get("serving") or (), self.now)

    def _outcomes(self) -> dict[str, str]:
        """What has come of every host of the plan so far."""
        known = {host.name: host for host in self.fleet}
        found = {
            name: looks.outcome_of(self._results(name), resumable=known[name].resumable and not known[name].available)
            for name in self.plan.order
        }
        for name, outcome in found.items():
            if outcome in (looks.RESTORED, looks.ROLLED_BACK) and self._not_given_back(name):
                found[name] = looks.OUT
        return found

    def _records(self) -> dict[str, t.Mapping[str, t.Any]]:
        return {name: looks.record_of([*self._results(name), look]) for name, look in self.looks.items()}

    def _traffic(self) -> dict[str, t.Any]:
        """What the gateways have counted since before the run; empty where there are none."""
        samples: dict[tuple[str, str, float], gateways.GatewayLook] = {}
        for name in self.variables:
            # As they were before each batch; what was registered then, a later look has replaced.
            for look in gateways.parse_looks({"results": self._decision(name).get("requests")}):
                samples.setdefault((look.name, look.process, look.at), look)
        meanwhile = [[look] for look in sorted(samples.values(), key=lambda one: one.at)]
        found = gateways.traffic_of([self.before, *meanwhile, self.now])
        return found.as_dict() if found else {}

    # -- the three calls

    def _plan(self) -> dict[str, t.Any]:
        rows = []
        for name, look in self.looks.items():
            error, note = self._at_gateways(name, look)
            rows.append(looks.row_of(name, look, self.plan, skip=self.skips[name], gateway_error=error, note=note))
        text = looks.render_plan(rows, self.plan, steps=bool(self._task.check_mode))
        undrained = [name for name in self.plan.order if self._hook(name) == "none"]
        if undrained:
            text += (
                "\ndrain_hook is none for %s: nobody in front is told, and requests that run there are broken off."
                % shorten(", ".join(undrained), 200)
            )
        widest = max((len(batch.hosts) for batch in self.plan.batches), default=0)
        forks = int(self.task_vars.get("ansible_forks") or widest)
        if widest > forks:
            text += (
                "\nBatches have up to %d hosts, and Ansible works on %d at a time: the others of a batch wait while they are out of "
                "service; run with --forks %d." % (widest, forks, widest)
            )
        self._display.display("\n%s\n" % text)
        if self.args["output"] and not self._task.check_mode:
            write_file(self.args["output"], json.dumps({"rows": rows, **self.plan.as_dict()}, indent=2) + "\n")
        self._write_page({})
        refused = looks.refused(rows)
        if refused:
            raise AnsibleActionFail(
                "%s cannot be updated, so nothing was begun; mend what is said above, or set %s_skip to true for them."
                % (", ".join(refused), self.prefix)
            )
        unasked = gateways.errors(self.now)
        if unasked and self.plan.order:
            raise AnsibleActionFail("No host could be drained, so nothing was begun: %s." % "; ".join(unasked))
        if self.plan.waits and not self.plan.order and not self._task.check_mode:
            raise AnsibleActionFail("No host can be updated: %s." % self._waiting())
        serial, begun = [len(batch.hosts) for batch in self.plan.batches], round(time.time(), 3)
        return {
            "changed": False,
            "rows": rows,
            "order": list(self.plan.order),
            "refused": "",
            "claimed": self._claimed(name for name in self.looks if name not in self.plan.order),
            "roll": {
                "serial": serial,
                "group": "rollout_%d" % (begun * 1000),
                "begun": begun,
                "fleet": list(self.variables),
                "gateways": [look.name for look in self.now],
                "before": {"results": (self._own(self.args["gateways"]) or {}).get("results") or []},
            },
            **self.plan.as_dict(),
        }

    def _at_gateways(self, name: str, look: looks.Look) -> tuple[str, str]:
        """What speaks against draining a host, and what the operator should know of it; empty where nothing does."""
        own = self._gateways_of(name)
        missing = gateways.unknown_at(name, own) if (look or {}).get("models") else ""
        if missing:
            return "gateway %s has no server of this host; run playbook gateway first" % missing, ""
        if self.args["kind"] != "nim_deploy" or not own:
            return "", ""
        try:
            (found,) = gateway_hosts([name], self.task_vars["hostvars"]) or [{}]
        except AnsibleError:
            # Models that come from elsewhere than the inventory.
            return "", ""
        ports = {str(model["name"]): int(model["port"]) for model in found.get("models") or []}
        return gateways.other_port(name, ports, own), gateways.unknown_models(name, ports, own)

    def _hook(self, name: str) -> str:
        """How a host is drained, by the variables and the default of role drain."""
        found = self.variables[name].get("drain_hook") or self.task_vars.get("drain_hook")
        usual = "haproxy" if (self.task_vars.get("groups") or {}).get("nim_gateways") or self.now else "none"
        return str(resolved(found or usual))

    def _gateways_of(self, name: str) -> tuple[gateways.GatewayLook, ...]:
        """What those gateways say through which a host is drained: the variables of role drain may be others for some hosts."""
        if self._hook(name) != "haproxy":
            return ()
        named = resolved(self.variables[name].get("drain_gateways"))
        names = named if isinstance(named, list) else (self.task_vars.get("groups") or {}).get("nim_gateways") or []
        found = tuple(look for look in self.now if look.name in names)
        return found if found or isinstance(named, list) else self.now

    def _waiting(self) -> str:
        return "; ".join("%s: %s" % (name, self.plan.left[name].rstrip(".")) for name in self.plan.waits)

    def _stop(self, passed: t.Sequence[str], outcomes: t.Mapping[str, str]) -> str:
        """Why no further batch may begin; empty when one may.

        Args:
            passed: Hosts that had their turn.
        """
        # A host that Ansible has given up before its turn had any result has failed, too.
        alive = {str(name) for name in self.task_vars.get("ansible_play_hosts") or []}
        bad = [
            name
            for name in passed
            if outcomes[name] in (looks.RESTORED, looks.ROLLED_BACK, looks.OUT)
            or (outcomes[name] == looks.NOT_BEGUN and name not in alive)
        ]
        stop = exhausted(bad, self.budget, len(self.plan.order))
        return "after %d of %d hosts, because %s" % (len(passed), len(self.plan.order), stop) if stop else ""

    def _passed(self) -> list[str]:
        order = list(self.plan.order)
        batch = self.task_vars.get("ansible_play_batch") or []
        return order[: min((order.index(name) for name in batch if name in order), default=0)]

    def _number(self) -> int:
        batch = self.task_vars.get("ansible_play_batch") or []
        return next((entry.number for entry in self.plan.batches if batch and batch[0] in entry.hosts), 0)

    def _pause(self) -> dict[str, t.Any]:
        stop = self._asked()
        if stop:
            self._display.display(stop)
        return {"changed": False, "stop": stop, "renew": [] if stop else self._to_renew()}

    def _asked(self) -> str:
        """Why the run does not go on after the canaries; empty when it does."""
        kinds = [entry.kind for entry in self.plan.batches]
        number = self._number()
        first = 1 < number <= len(kinds) and kinds[number - 1] == "roll" and kinds[number - 2] == "canary"
        if first and self.pause != 0 and not self._stop(self._passed(), self._outcomes()):
            return self._wait()
        return ""

    def _wait(self) -> str:
        try:
            if self.pause is None:
                self._display.prompt_until("The canaries are done. Press return to go on, or Ctrl+C to stop:")
                return ""
            self._display.display("The canaries are done; %d seconds until the next batch." % self.pause)
            time.sleep(self.pause)
        except AnsiblePromptInterrupt:
            return "Stopped after the canaries. Run again to go on."
        except AnsiblePromptNoninteractive:
            return (
                "The canaries are done, and nobody is at a terminal to say that it may go on, as %s_pause_after_canary wants "
                "it. Run again without it to go on; a number of seconds in its place waits that long." % self.prefix
            )
        return ""

    # -- the word that this run has left on the hosts

    def _claims(self) -> dict[str, t.Mapping[str, t.Any]]:
        """Host -> the word with which it was left after its look, where there is one."""
        records = {name: (look or {}).get("record") for name, look in self.looks.items()}
        found = {name: record.get("claim") for name, record in records.items() if isinstance(record, dict)}
        return {name: claim for name, claim in found.items() if isinstance(claim, dict) and claim}

    def _claimed(self, names: t.Iterable[str]) -> list[str]:
        """Those on which the run may have left word: a look that was refused does not say."""
        claims = self._claims()
        return [name for name in names if name in claims or looks.state_of(self.looks[name]) == looks.REFUSED]

    def _renewed(self) -> float:
        """When the word on all that wait was renewed last, in seconds since the epoch; 0.0 when it was not."""
        return max((float(self._decision(name).get("renewed") or 0.0) for name in self.variables), default=0.0)

    def _to_renew(self) -> list[str]:
        """Hosts that wait, this batch's too, when half of the time is over for which their word counts."""
        now, renewed, passed, claims = time.time(), self._renewed(), self._passed(), self._claims()
        waiting = [name for name in self.plan.order if name not in passed and name in claims]

        def due(claim: t.Mapping[str, t.Any]) -> bool:
            # The clock of a host may be ahead.
            left = min(real_number(claim.get("seen")), self.args["begun"])
            return bool(now - max(left, renewed) >= real_number(claim.get("lease"), float(LEASE)) / 2)

        return waiting if any(due(claims[name]) for name in waiting) else []

    def _renewals(self) -> list[t.Mapping[str, t.Any]]:
        results = (self._own(self.args["claims"]) or {}).get("results")
        return [entry for entry in results or [] if isinstance(entry, dict)]

    def _taken(self) -> list[str]:
        """Hosts that another run has begun with while they waited, and what is said of it."""
        return [
            "%s: %s" % (entry.get("item"), str(entry.get("msg")).rstrip("."))
            for entry in self._renewals()
            if entry.get("reason") == "upgrade_running"
        ]

    def _batch(self) -> dict[str, t.Any]:
        batch = [str(name) for name in self.task_vars.get("ansible_play_batch") or []]
        outcomes, passed = self._outcomes(), self._passed()
        self._write_page(self._traffic())
        found = {
            "changed": False,
            "number": self._number(),
            "begun": self.args["begun"],
            "renewed": time.time() if self._renewals() else self._renewed(),
            "requests": gateways.counts_of(self.now),
        }
        stop = self._stop(passed, outcomes)
        unasked = self._taken() or gateways.errors(self.now)
        if not stop and unasked:
            stop = "after %d of %d hosts, because %s" % (len(passed), len(outcomes), "; ".join(unasked))
        if stop:
            self._display.display("The run stops %s." % stop)
            return {**found, "admitted": [], "left": {}, "stop": stop}
        now: list[FleetHost] = [
            looks.after(host, outcomes.get(host.name, looks.NOT_BEGUN)) if host.name in passed else host
            for host in self.fleet
        ]
        now = [gateways.as_gateways_see(host, self.now) for host in now]
        now += gateways.beside(self.variables, self.now)
        chosen, left = admit(now, self.limits, [name for name in batch if name in outcomes])
        if passed and all(outcomes[name] == looks.NOT_BEGUN for name in passed):
            # The canaries could not go after all.
            left.update(
                dict.fromkeys(chosen[1:], "no host has tried it yet, and %s goes first" % chosen[0] if chosen else "")
            )
            chosen = chosen[:1]
        lines = ["Batch %d of %d: %s." % (self._number(), len(self.plan.batches), ", ".join(chosen) or "no host")]
        lines += ["%s is left for another run: %s." % item for item in left.items()]
        self._display.display("\n".join(lines))
        return {**found, "admitted": list(chosen), "left": left, "stop": ""}

    def _end(self) -> dict[str, t.Any]:
        outcomes = self._outcomes()
        messages = {name: self._message(name) for name in outcomes}
        traffic = self._traffic()
        lines = gateways.traffic_words(traffic) if traffic else []
        if outcomes:
            self._display.display(
                "\n%s\n" % looks.render_end(outcomes, messages, self._records(), self.plan.left, lines)
            )
        self._write_page(traffic)
        missing = {
            name: "%s: %s. Run again to go on with it." % (outcome, self._why(name, messages[name]).rstrip("."))
            for name, outcome in outcomes.items()
            if outcome != looks.UPDATED
        }
        missing.update(
            {name: "left: %s. Run again to go on with it." % self.plan.left[name] for name in self.plan.waits}
        )
        claimed = self._claimed(name for name, outcome in outcomes.items() if outcome != looks.UPDATED)
        return {"changed": False, "outcomes": outcomes, "missing": missing, "claimed": claimed, "requests": traffic}

    def _why(self, name: str, message: str) -> str:
        """Why a host of the plan is not as wanted."""
        decision = self._decision(name)
        return (
            message
            or (decision.get("left") or {}).get(name)
            or "the run ended before %s" % ("its end" if name in (decision.get("admitted") or ()) else "its turn")
        )

    def _decision(self, name: str) -> t.Mapping[str, t.Any]:
        """What phase batch has said of the batch of a host; empty when it was never asked in this run."""
        return {} if self._registered_before(name) else self._answer(name, self.args["decision"]) or {}

    def _write_page(self, traffic: dict[str, t.Any]) -> None:
        if not self.args["report"] or self._task.check_mode:
            return
        outcomes, records = self._outcomes(), self._records()
        hosts = []
        for name, look in self.looks.items():
            hosts.append(
                {
                    "name": name,
                    "outcome": outcomes.get(name) or looks.state_of(look, skip=bool(self.skips[name])),
                    "message": self._message(name) or looks.message_of([look]) or self.plan.left.get(name, ""),
                    # What is on record of a host that had no turn is of an earlier run.
                    "record": records[name] if outcomes.get(name, looks.NOT_BEGUN) != looks.NOT_BEGUN else {},
                    "models": [str(model) for model in (look or {}).get("models") or []],
                }
            )
        when = time.strftime("%Y-%m-%d at %H:%M UTC", time.gmtime())
        lines = gateways.traffic_words(traffic) if traffic else []
        page = render_page(
            self.prefix, hosts, self.plan.as_dict(), when, traffic=traffic, said=lines, begun=self.args["begun"]
        )
        write_file(self.args["report"], page)
