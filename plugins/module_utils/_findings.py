# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a diagnosis is made of."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ._options import CHAIN

Json = t.Dict[str, t.Any]

#: Severities, worst first: something does not work; something is not as wanted or soon will not work; worth knowing.
FAILED = "failed"
WARNED = "warning"
NOTED = "note"
SEVERITIES = (FAILED, WARNED, NOTED)

#: What causes what: of two findings of one severity, the one further down the stack comes first.
LAYERS = ("host", "gpu", *CHAIN, "model")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        layer: Part of the host it belongs to, one of :data:`LAYERS`.
        reason: Stable identifier.
        cause: What is wrong and why, one clause.
        remedy: What to do about it, one clause; empty where nothing has to be done.
        evidence: Lines that show it.
        model: Name of the model it is about; empty when it is about the host.
        gpu: UUID of the GPU it is about.
        signature: Known failure that was recognised.
    """

    severity: str
    layer: str
    reason: str
    cause: str
    remedy: str = ""
    evidence: tuple[str, ...] = ()
    model: str = ""
    gpu: str = ""
    signature: str = ""

    def as_dict(self) -> Json:
        return {
            "severity": self.severity,
            "layer": self.layer,
            "model": self.model or None,
            "gpu": self.gpu or None,
            "reason": self.reason,
            "cause": self.cause,
            "remedy": self.remedy or None,
            "evidence": list(self.evidence),
            "signature": self.signature or None,
        }


@dataclass
class Diagnosis:
    """What one look at a host found.

    Attributes:
        models: The services as nim_health sees them.
    """

    findings: list[Finding] = field(default_factory=list)
    models: list[Json] = field(default_factory=list)
    plan: Json = field(default_factory=dict)

    def ordered(self) -> list[Finding]:
        """The worst first; of equal ones the cause before its consequences."""
        return sorted(
            self.findings, key=lambda one: (SEVERITIES.index(one.severity), LAYERS.index(one.layer), one.model)
        )

    @property
    def worst(self) -> str:
        """Severity of the worst finding; ``ok`` when there is none."""
        return next((one.severity for one in self.ordered()), "ok")
