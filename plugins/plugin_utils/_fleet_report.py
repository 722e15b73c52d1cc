# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""The fleet as one HTML page to read, print or send: hosts, GPUs, drivers, models, health and drift."""

from __future__ import annotations

import collections
import os
import typing as t
from dataclasses import dataclass, field

import jinja2
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _fleet_plan
from ansible_collections.gpu_fleet.nim.plugins.module_utils._fleet_status import DIGEST_DIGITS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from ansible_collections.gpu_fleet.nim.plugins.module_utils._text_table import shorten, value_text

Look = t.Optional[t.Mapping[str, t.Any]]

_TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "playbooks", "templates")

#: Tones of the page: what is well, what wants attention, what is wrong or unknown, what is at rest.
GOOD, WARN, BAD, IDLE = "good", "warn", "bad", "idle"

_STATE_TONES = {_fleet_plan.AS_WANTED: GOOD, _fleet_plan.NO_GPU: IDLE, _fleet_plan.CHANGE: WARN}
#: States of a service in which nobody expects an answer.
_RESTING = ("stopped", "maintenance")
#: How states begin in which a service does not become ready.
_WRONG = ("failing", "failed", "no unit", "port taken", "wrong model", "broken configuration")

_DISRUPTION_WORDS = {
    "none": "no disruption",
    "reload": "reload",
    "restart_docker": "restart of Docker",
    "restart_nim": "restart of a NIM",
    "unload_driver": "unload of the driver",
    "reboot": "reboot",
}


@dataclass
class GpuBox:
    """One GPU; ``percent`` is the memory in use, None where the driver does not tell."""

    label: str
    name: str
    percent: int | None
    memory: str
    models: str


@dataclass
class ModelLine:
    """One NIM service."""

    host: str
    name: str
    image: str
    digest: str
    gpus: str
    url: str
    state: str
    tone: str
    seconds: str
    message: str


@dataclass
class HostCard:
    """One host of the page."""

    name: str
    address: str
    state: str
    tone: str
    message: str = ""
    system: list[str] = field(default_factory=list)
    software: list[tuple[str, str]] = field(default_factory=list)
    gpus: list[GpuBox] = field(default_factory=list)
    models: list[ModelLine] = field(default_factory=list)
    rows: list[dict[str, t.Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A part of a bar."""

    tone: str
    count: int
    word: str


def render_report(hosts: t.Sequence[tuple[str, str, Look, Look]], when: str) -> str:
    """The page.

    Args:
        hosts: Name, address, what ``gpu_host_plan`` and what ``gpu_host_info`` said; the worst host first.
        when: The time to print.
    """
    cards = [_card(name, address, plan, facts) for name, address, plan, facts in hosts]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = [model for card in cards for model in card.models]
    gpus = [gpu for card in cards for gpu in card.gpus]
    return environment.get_template("fleet_report.html.j2").render(
        when=when,
        cards=cards,
        models=models,
        gpu_count=len(gpus),
        memory=_fleet_memory([facts for _name, _address, _plan, facts in hosts if facts]),
        gpu_names=_counted([gpu.name for gpu in gpus]),
        host_parts=_host_parts(cards),
        model_parts=_model_parts(models),
        drift_parts=_drift_parts(cards),
        words=_DISRUPTION_WORDS,
    )


def _card(name: str, address: str, plan: Look, facts: Look) -> HostCard:
    rows = _fleet_plan.ordered(_fleet_plan.rows_of(name, plan))
    states = {str(row["state"]) for row in rows}
    if states & {_fleet_plan.CHANGE, _fleet_plan.ERROR}:
        state, tone = "drift", BAD if _fleet_plan.ERROR in states else WARN
    else:
        state = str(rows[0]["state"])
        tone = _STATE_TONES.get(state, BAD)
    card = HostCard(name, "" if address == name else address, state, tone)
    if state not in ("drift", _fleet_plan.AS_WANTED):
        card.message = str(rows[0]["message"] or "")
    card.rows = [_drift_row(row) for row in rows if row["state"] in (_fleet_plan.CHANGE, _fleet_plan.ERROR)]
    card.notes = [str(note) for note in (plan or {}).get("notes") or []]
    if facts and not facts.get("failed") and not facts.get("unreachable"):
        _add_facts(card, facts)
    return card


def _drift_row(row: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    error = row["state"] == _fleet_plan.ERROR
    return {
        "error": error,
        "disruption": "" if error else str(row["disruption"]),
        "resource": str(row["resource"] or ""),
        "what": "cannot be planned" if error else shorten(value_text(row["what"]), 90),
        "before": "" if error else shorten(value_text(row["from"]), 70),
        "after": "" if error else shorten(value_text(row["to"]), 70),
        "why": str(row["message"] if error else row["why"]),
        "blocked": str(row["blocked"] or ""),
    }


def _add_facts(card: HostCard, facts: t.Mapping[str, t.Any]) -> None:
    system = facts.get("os") or {}
    card.system = [text for text in (str(system.get("name") or ""), str(facts.get("kernel") or "")) if text]
    driver = facts.get("driver") or {}
    loaded = str(driver.get("loaded") or "")
    if not loaded and driver.get("on_disk"):
        loaded = "%s, not loaded" % driver["on_disk"]
    elif loaded and driver.get("flavour"):
        loaded = "%s %s" % (loaded, driver["flavour"])
    docker = facts.get("docker") or {}
    toolkit = facts.get("container_toolkit") or {}
    card.software = [
        ("driver", loaded or "none"),
        ("CUDA", str(facts.get("cuda_version") or "-")),
        ("Docker", str(docker.get("version") or ("not running" if docker.get("installed") else "none"))),
        ("toolkit", str(toolkit.get("version") or "none")),
    ]
    services = facts.get("nim") or []
    card.models = [_model(card, service, facts) for service in services]
    users: dict[str, list[str]] = {}
    for service in services:
        for uuid in service.get("gpus") or []:
            users.setdefault(str(uuid), []).append(str(service.get("name")))
    for gpu in facts.get("gpus") or []:
        total, used = gpu.get("memory_total_mib"), gpu.get("memory_used_mib")
        known = bool(total) and used is not None
        card.gpus.append(
            GpuBox(
                "GPU %s" % gpu.get("index"),
                str(gpu.get("name") or "GPU"),
                round(max(0.0, min(100.0, 100 * used / total))) if known else None,
                "%d / %d GiB" % (round(used / 1024), round(total / 1024)) if known else "memory unknown",
                ", ".join(users.get(str(gpu.get("uuid")), [])),
            )
        )
    if not card.gpus:
        # Without a driver the PCI bus still knows them.
        card.gpus = [
            GpuBox("GPU %d" % number, ("%s GPU" % (gpu.get("architecture") or "NVIDIA")), None, "no driver loaded", "")
            for number, gpu in enumerate(facts.get("pci_gpus") or [])
        ]


def _model(card: HostCard, service: t.Mapping[str, t.Any], facts: t.Mapping[str, t.Any]) -> ModelLine:
    state = str(service.get("state") or "unknown")
    tone = GOOD if service.get("ready") else IDLE if state in _RESTING else BAD if state.startswith(_WRONG) else WARN
    algorithm, _colon, digits = str(service.get("digest") or "").partition(":")
    seconds = service.get("seconds_to_ready")
    indices = {str(gpu.get("uuid")): gpu.get("index") for gpu in facts.get("gpus") or []}
    port = service.get("port")
    scheme = "https" if str(service.get("url") or "").startswith("https:") else "http"
    address = card.address or card.name
    return ModelLine(
        host=card.name,
        name=str(service.get("name") or ""),
        image=str(service.get("image") or ""),
        digest="%s:%s" % (algorithm, digits[:DIGEST_DIGITS]) if digits else "",
        gpus=", ".join(str(indices.get(str(uuid), "?")) for uuid in service.get("gpus") or []),
        url="%s://%s:%s" % (scheme, "[%s]" % address if ":" in address else address, port) if port else "",
        state=state,
        tone=tone,
        seconds="%d s" % round(float(seconds)) if seconds is not None else "-",
        message=str(service.get("message") or ""),
    )


def _fleet_memory(looks: t.Sequence[t.Mapping[str, t.Any]]) -> tuple[int, int]:
    """GPU memory of the fleet in GiB: used, and in all; only of GPUs that tell both."""
    pairs = [
        (gpu["memory_used_mib"], gpu["memory_total_mib"])
        for look in looks
        for gpu in look.get("gpus") or []
        if gpu.get("memory_total_mib") and gpu.get("memory_used_mib") is not None
    ]
    return round(sum(used for used, _total in pairs) / 1024), round(sum(total for _used, total in pairs) / 1024)


def _counted(names: t.Sequence[str]) -> str:
    counted = collections.Counter(names)
    return ", ".join("%d x %s" % (counted[name], name) for name in sorted(counted))


def _host_parts(cards: t.Sequence[HostCard]) -> list[Part]:
    drifting = sum(card.state == "drift" for card in cards)
    wanted = sum(card.state == _fleet_plan.AS_WANTED for card in cards)
    idle = sum(card.state == _fleet_plan.NO_GPU for card in cards)
    return _present(
        Part(GOOD, wanted, "as wanted"),
        Part(WARN, drifting, "with drift"),
        Part(BAD, len(cards) - wanted - drifting - idle, "without an answer"),
        Part(IDLE, idle, "without a GPU"),
    )


def _model_parts(models: t.Sequence[ModelLine]) -> list[Part]:
    tones = collections.Counter(model.tone for model in models)
    words = ((GOOD, "ready"), (WARN, "on the way"), (BAD, "failed"), (IDLE, "at rest"))
    return _present(*(Part(tone, tones[tone], word) for tone, word in words))


def _drift_parts(cards: t.Sequence[HostCard]) -> list[Part]:
    rows = [row for card in cards for row in card.rows]
    counted = collections.Counter(row["disruption"] for row in rows)
    worst_first = [str(disruption) for disruption in sorted(Disruption, reverse=True)]
    return _present(
        Part(BAD, counted[""], "cannot be planned"),
        *(Part(name, counted[name], _DISRUPTION_WORDS[name]) for name in worst_first),
    )


def _present(*parts: Part) -> list[Part]:
    return [part for part in parts if part.count]
