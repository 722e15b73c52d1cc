# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decides which hosts are upgraded when, tells it, and writes the report; connects to none of them."""

from __future__ import annotations

import json
import time
import typing as t

from ansible.errors import AnsibleActionFail
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _rollout_looks as looks
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout import (
    FleetHost,
    Rollout,
    Limits,
    admit,
    exhausted,
    parse_share,
    plan_fleet,
)
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._fleet_table import write_file
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import resolved, returned
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._rollout_page import render_page

_OPTIONS: dict[str, dict[str, t.Any]] = {
    "phase": {"type": "str", "choices": ["plan", "batch", "end"], "default": "plan"},
    "variable": {"type": "str", "required": True},
    "results": {"type": "list", "elements": "str", "default": []},
    "gateways": {"type": "str"},
    "hosts": {"type": "list", "elements": "str"},
    "canary": {"type": "list", "elements": "str", "default": []},
    "max_parallel": {"type": "str", "default": "0"},
    "max_unavailable": {"type": "str", "default": "25%"},
    "min_ready": {"type": "int", "default": 1},
    "min_ready_of": {"type": "dict", "default": {}},
    "failure_budget": {"type": "str", "default": "0"},
    "fail_on_failure": {"type": "bool", "default": False},
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
        try:
            self._look()
            return getattr(self, "_" + self.args["phase"])()  # type: ignore[no-any-return]
        except FleetError as error:
            raise AnsibleActionFail(error.message) from error

    # -- what is known

    def _look(self) -> None:
        """All hosts as they were before the run, and the plan that follows from it."""
        names = self.args["hosts"] or self.task_vars.get("ansible_play_hosts_all") or []
        self.variables = {str(name): self.task_vars["hostvars"][name] for name in names}
        self.looks = {name: self._answer(name, self.args["variable"]) for name in self.variables}
        self.skips = {name: self._skip(name) for name in self.variables}
        self.limits = Limits(
            max_parallel=parse_share("driver_upgrade_max_parallel", self.args["max_parallel"]),
            max_unavailable=parse_share("driver_upgrade_max_unavailable", self.args["max_unavailable"]),
            min_ready=self.args["min_ready"],
            min_ready_of=self._min_ready_of(),
        )
        self.budget = parse_share("driver_upgrade_failure_budget", self.args["failure_budget"])
        groups = self.task_vars.get("groups") or {}
        canaries = {str(host) for name in self.args["canary"] for host in groups.get(name, [name])}
        self.gateway_errors: dict[str, str] = {}
        self.fleet = [
            looks.fleet_host(name, look, skip=self.skips[name], canary=name in canaries, gateways=self._gateways(name))
            for name, look in self.looks.items()
            if looks.state_of(look) != looks.NO_GPU
        ]
        self.plan: Rollout = plan_fleet(self.fleet, self.limits)

    def _answer(self, name: str, variable: str | None) -> looks.Look:
        found = returned(self.variables[name].get(variable)) if variable else None
        return found if isinstance(found, dict) else None

    def _skip(self, name: str) -> bool:
        return bool(boolean(resolved(self.variables[name].get("driver_upgrade_skip") or False), strict=False))

    def _min_ready_of(self) -> dict[str, int]:
        found = self.args["min_ready_of"]
        try:
            return {str(model): int(count) for model, count in found.items()}
        except (TypeError, ValueError):
            raise FleetError(
                "invalid_option",
                "driver_upgrade_min_ready_of = %r: not a mapping of models to numbers; write it like {llama: 2}."
                % found,
            ) from None

    def _gateways(self, name: str) -> list[looks.Look]:
        """What each gateway says of a host."""
        found = self._answer(name, self.args["gateways"]) or {}
        answers = [
            entry for entry in found.get("results") or [] if isinstance(entry, dict) and not entry.get("skipped")
        ]
        for entry in answers:
            if entry.get("failed") or entry.get("unreachable"):
                text = "gateway %s: %s" % (entry.get("item") or "", entry.get("msg") or "it does not answer")
                self.gateway_errors[name] = text
        return list(answers)

    def _results(self, name: str) -> list[looks.Look]:
        return [self._answer(name, variable) for variable in self.args["results"]]

    def _outcomes(self) -> dict[str, str]:
        """What has come of every host of the plan so far."""
        known = {host.name: host for host in self.fleet}
        return {
            name: looks.outcome_of(self._results(name), resumable=known[name].resumable) for name in self.plan.order
        }

    # -- the three calls

    def _plan(self) -> dict[str, t.Any]:
        rows = [
            row
            for name, look in self.looks.items()
            for row in looks.rows_of(
                name, look, self.plan, skip=self.skips[name], gateway_error=self.gateway_errors.get(name, "")
            )
        ]
        self._display.display("\n%s\n" % looks.render_plan(rows, self.plan, steps=bool(self._task.check_mode)))
        if self.args["output"] and not self._task.check_mode:
            write_file(self.args["output"], json.dumps({"rows": rows, **self.plan.as_dict()}, indent=2) + "\n")
        self._write_page()
        refused = looks.refused(rows)
        if refused:
            raise AnsibleActionFail(
                "%s cannot be upgraded, so nothing was begun; mend what is said above, or set driver_upgrade_skip to true "
                "for them." % ", ".join(refused)
            )
        serial = [len(batch.hosts) for batch in self.plan.batches]
        return {
            "changed": False,
            "rows": rows,
            "order": list(self.plan.order),
            "serial": serial or [1],
            "fleet": list(self.variables),
            **self.plan.as_dict(),
        }

    def _batch(self) -> dict[str, t.Any]:
        batch = [str(name) for name in self.task_vars.get("ansible_play_batch") or []]
        order = list(self.plan.order)
        outcomes = self._outcomes()
        passed = order[: min((order.index(name) for name in batch if name in order), default=0)]
        # A host that Ansible has given up before its turn had any result has failed, too.
        alive = {str(name) for name in self.task_vars.get("ansible_play_hosts") or []}
        bad = [
            name
            for name in passed
            if outcomes[name] in (looks.RESTORED, looks.ROLLED_BACK, looks.OUT) or name not in alive
        ]
        self._write_page()
        stop = exhausted(bad, self.budget, len(order))
        if stop:
            raise AnsibleActionFail(
                "The upgrade stops here, %d of %d hosts had their turn: %s. Mend them and run again: it goes on where it is."
                % (len(passed), len(order), stop)
            )
        now: list[FleetHost] = [
            looks.after(host, outcomes.get(host.name, looks.NOT_BEGUN)) if host.name in passed else host
            for host in self.fleet
        ]
        chosen, left = admit(now, self.limits, [name for name in batch if name in order])
        number = next((entry.number for entry in self.plan.batches if batch and batch[0] in entry.hosts), 0)
        lines = ["Batch %d of %d: %s." % (number, len(self.plan.batches), ", ".join(chosen) or "no host")]
        lines += ["%s is left for another run: %s." % item for item in left.items()]
        self._display.display("\n".join(lines))
        return {
            "changed": False,
            "admitted": list(chosen),
            "left": left,
            "number": number,
            "first_after_canary": self._after_canary(number),
        }

    def _after_canary(self, number: int) -> bool:
        """Whether this is the first batch after those of the canaries."""
        kinds = [entry.kind for entry in self.plan.batches]
        return 1 < number <= len(kinds) and kinds[number - 1] == "roll" and kinds[number - 2] == "canary"

    def _end(self) -> dict[str, t.Any]:
        outcomes = self._outcomes()
        messages = {name: looks.message_of(self._results(name)) for name in outcomes}
        if outcomes:
            self._display.display("\n%s\n" % looks.render_end(outcomes, messages))
        self._write_page()
        other = [name for name, outcome in outcomes.items() if outcome != looks.UPGRADED]
        if other and self.args["fail_on_failure"]:
            raise AnsibleActionFail("Not upgraded: %s. Run again to go on with them." % ", ".join(other))
        return {"changed": False, "outcomes": outcomes}

    def _write_page(self) -> None:
        if not self.args["report"] or self._task.check_mode:
            return
        outcomes = self._outcomes()
        hosts = []
        for name, look in self.looks.items():
            results = [*self._results(name), look]
            hosts.append(
                {
                    "name": name,
                    "outcome": outcomes.get(name) or looks.state_of(look, skip=self.skips[name]),
                    "message": looks.message_of(results) or self.plan.left.get(name, ""),
                    "record": looks.record_of(results) if name in outcomes else {},
                    "models": [str(model) for model in (look or {}).get("models") or []],
                }
            )
        when = time.strftime("%Y-%m-%d at %H:%M UTC", time.gmtime())
        write_file(self.args["report"], render_page(hosts, self.plan.as_dict(), when))
