# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What the gateways say during a rollout: who serves at this moment, and what has come of the requests meanwhile."""

from __future__ import annotations

import time
import typing as t
from dataclasses import dataclass, field, replace

from ._gateway_settings import safe_host
from ._haproxy_runtime import DRAINED, MAINTENANCE
from ._rollout import FleetHost

Json = t.Mapping[str, t.Any]
_COUNTS = ("requests", "failed", "truncated")


@dataclass(frozen=True)
class GatewayLook:
    """One answer of haproxy_info.

    Attributes:
        error: Why there is none; empty when there is one.
        process: Name of the process that has counted.
        traffic: Backend -> counts of that process.
        at: Seconds since the epoch on the gateway's clock.
    """

    name: str
    error: str = ""
    servers: tuple[Json, ...] = ()
    process: str = ""
    traffic: t.Mapping[str, t.Mapping[str, int]] = field(default_factory=dict)
    at: float = 0.0


def parse_looks(answer: t.Any) -> tuple[GatewayLook, ...]:
    """What a task of haproxy_info in a loop over the gateways was registered as; empty where there was none."""
    results = answer.get("results") if isinstance(answer, dict) else None
    found = []
    for entry in results or []:
        if not isinstance(entry, dict) or entry.get("skipped"):
            continue
        name = str(entry.get("item") or "")
        if entry.get("failed") or entry.get("unreachable"):
            found.append(GatewayLook(name, error=str(entry.get("msg") or "it does not answer")))
            continue
        found.append(
            GatewayLook(
                name,
                servers=tuple(entry.get("servers") or ()),
                process=str(entry.get("process") or ""),
                traffic={
                    str(row.get("backend")): {count: int(row.get(count) or 0) for count in _COUNTS}
                    for row in entry.get("traffic") or []
                },
                at=float(entry.get("at") or 0.0),
            )
        )
    return tuple(found)


def counts_of(gateways: t.Sequence[GatewayLook]) -> list[dict[str, t.Any]]:
    """What of them :func:`traffic_of` needs later, as :func:`parse_looks` reads it."""
    return [
        {
            "item": look.name,
            "process": look.process,
            "at": look.at,
            "traffic": [{"backend": backend, **counts} for backend, counts in look.traffic.items()],
        }
        for look in gateways
        if not look.error
    ]


def errors(gateways: t.Sequence[GatewayLook]) -> list[str]:
    """Gateways that could not be asked, and why."""
    return ["gateway %s: %s" % (look.name, look.error) for look in gateways if look.error]


def unknown_at(name: str, gateways: t.Sequence[GatewayLook]) -> str:
    """A gateway that has no server of this host; empty when all have one."""
    for look in gateways:
        if not look.error and not _own(name, look):
            return look.name
    return ""


def other_port(name: str, ports: t.Mapping[str, int], gateways: t.Sequence[GatewayLook]) -> str:
    """A model that a gateway would ask at another port than is wanted; empty when there is none.

    Args:
        ports: Model -> port on the host.
    """
    for look in gateways:
        for server in _own(name, look):
            model, port = str(server.get("model")), server.get("port")
            if port and ports.get(model, port) != port:
                return (
                    "gateway %s asks model %s at port %s of this host, and nim_models has %s. Change it for one host at a time: the "
                    "port in the variables of that host, then playbook gateway, then deploy with -e target=%s"
                    % (look.name, model, port, ports[model], name)
                )
    return ""


def unknown_models(name: str, models: t.Iterable[str], gateways: t.Sequence[GatewayLook]) -> str:
    """Models of a host that a gateway has no server of; empty when there are none."""
    for look in gateways:
        known = {str(server.get("model")) for server in _own(name, look)}
        missing = sorted(set(models) - known)
        if missing and known:
            return "gateway %s has no server of %s here; run playbook gateway, or no client will reach that" % (
                look.name,
                ", ".join(missing),
            )
    return ""


def beside(names: t.Iterable[str], gateways: t.Sequence[GatewayLook]) -> list[FleetHost]:
    """Hosts that the gateways have and this run does not, for example because of --limit; they count all the same."""
    here = {safe_host(name) for name in names}
    servers: dict[str, list[Json]] = {}
    for look in gateways:
        for server in look.servers:
            if str(server.get("host")) not in here:
                servers.setdefault(str(server.get("host")), []).append(server)
    found = []
    for name, own in sorted(servers.items()):
        models = frozenset(str(server.get("model")) for server in own)
        serving = models - {str(server.get("model")) for server in own if not server.get("serving")}
        found.append(FleetHost(name, serving=serving, models=models, due=False, available=bool(serving), beside=True))
    return found


def left_out(name: str, models: t.Collection[str], gateways: t.Sequence[GatewayLook]) -> str:
    """A gateway at which this collection has taken one of these models of a host out; empty when there is none."""
    for look in gateways:
        for server in _own(name, look):
            out = server.get("state") in (DRAINED, MAINTENANCE) and not server.get("foreign")
            if out and server.get("model") in models:
                return look.name
    return ""


def _own(name: str, look: GatewayLook) -> list[Json]:
    return [server for server in look.servers if server.get("host") == safe_host(name)]


def as_gateways_see(host: FleetHost, gateways: t.Sequence[GatewayLook]) -> FleetHost:
    """A host with what the gateways say of it: a model counts as ready where it is at every gateway that knows it."""
    own = [server for look in gateways for server in _own(host.name, look)]
    if not own:
        return host
    if any(server.get("foreign") for server in own):
        reason = host.skip or "somebody else has drained it at a gateway"
        return replace(host, available=False, resumable=False, down=False, serving=frozenset(), skip=reason)
    silent = {str(server.get("model")) for server in own if not server.get("serving")}
    asked = frozenset(str(server.get("model")) for server in own if server.get("serving"))
    if host.resumable and asked:
        # It was about to be taken out, or is given back in part: that is on record before and after it is so.
        return replace(host, available=True, serving=asked - silent)
    serving = host.serving - silent
    down = host.down or (host.available and bool(host.models) and not serving)
    return replace(host, serving=serving, down=down, available=host.available and not down)


# -- requests -------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Requests at the gateways between the first look and the last.

    Attributes:
        backends: Backend -> counts.
        gaps: Gateway, and the two times between which its process was another one: what the earlier one counted after the first
            of them is not known.
        unknown: Gateways that could not be asked in the end.
    """

    backends: dict[str, dict[str, int]] = field(default_factory=dict)
    gaps: list[tuple[str, float, float]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def total(self, count: str) -> int:
        return sum(counts[count] for counts in self.backends.values())

    def as_dict(self) -> dict[str, t.Any]:
        return {
            **{count: self.total(count) for count in _COUNTS},
            "backends": [{"backend": name, **counts} for name, counts in sorted(self.backends.items())],
            "gaps": [{"gateway": name, "after": begin, "before": end} for name, begin, end in self.gaps],
            "unknown": list(self.unknown),
            "complete": not self.gaps and not self.unknown,
        }


def traffic_of(samples: t.Sequence[t.Sequence[GatewayLook]]) -> Traffic | None:
    """What the gateways have counted from the first sample on; None where none was asked twice.

    HAProxy's new process after a reload counts from nothing, and nobody can ask the old one any more.
    """
    by_gateway: dict[str, list[GatewayLook]] = {}
    for sample in samples:
        for look in sample:
            by_gateway.setdefault(look.name, []).append(look)
    if not any(len(looks) > 1 for looks in by_gateway.values()):
        return None
    found = Traffic()
    for name, looks in by_gateway.items():
        if looks[-1].error:
            found.unknown.append(name)
        good = [look for look in looks if not look.error]
        for before, after in zip(good, good[1:]):
            same = before.process == after.process
            if not same:
                found.gaps.append((name, before.at, after.at))
            for backend, counts in after.traffic.items():
                earlier = before.traffic.get(backend, {}) if same else {}
                sums = found.backends.setdefault(backend, dict.fromkeys(_COUNTS, 0))
                for count in _COUNTS:
                    sums[count] += max(0, counts[count] - earlier.get(count, 0))
    return found


def traffic_words(traffic: t.Mapping[str, t.Any]) -> list[str]:
    """Lines about :meth:`Traffic.as_dict` for people."""
    lines = [
        "Requests at the gateways during the run: %s%d, of them %d failed and %d broken off by a server."
        % (
            "" if traffic["complete"] else "at least ",
            traffic["requests"],
            traffic["failed"],
            traffic["truncated"],
        )
    ]
    lines += [
        "Gateway %s was reloaded or restarted between %s and %s UTC: what its earlier process counted after the first of these "
        "times is not known." % (gap["gateway"], _clock(gap["after"]), _clock(gap["before"]))
        for gap in traffic["gaps"]
    ]
    lines += ["Gateway %s could not be asked in the end." % name for name in traffic["unknown"]]
    return lines


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at))
