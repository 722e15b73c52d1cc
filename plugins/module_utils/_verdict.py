# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What a check of a host says."""

from __future__ import annotations

import typing as t
from dataclasses import asdict, dataclass

from ._errors import FleetError

OK = "ok"
#: Nothing can be said; never a refusal.
UNKNOWN = "unknown"
WARNING = "warning"
REFUSED = "refused"

#: Worst last.
SEVERITY = (OK, UNKNOWN, WARNING, REFUSED)


@dataclass(frozen=True)
class Verdict:
    """One check of a host, of one of its GPUs, or of what is wanted on it.

    Attributes:
        check: Stable name of the check.
        verdict: One of :data:`SEVERITY`.
        message: One sentence for a person.
        remedy: What to do about it, one clause; empty when nothing has to be done.
        reason: Stable identifier as errors carry it; empty for ``ok``.
        gpu: UUID of the GPU it is about; empty when it is about the whole host.
        subject: What it is about otherwise, for example a model or an image.
    """

    check: str
    verdict: str
    message: str
    remedy: str = ""
    reason: str = ""
    gpu: str = ""
    subject: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @property
    def sentence(self) -> str:
        """Message and remedy as one sentence, as an error says it."""
        return "%s; %s." % (self.message.rstrip("."), self.remedy.rstrip(".")) if self.remedy else self.message


def refusal(check: str, error: FleetError, subject: str = "") -> Verdict:
    """The error with which a resource refuses to go on, as a verdict; its sentence names the remedy after a semicolon."""
    message, _separator, remedy = error.message.replace(" Nothing was changed.", "").partition("; ")
    return Verdict(check, REFUSED, message.rstrip(".") + ".", remedy.rstrip("."), error.reason, subject=subject)


def worst(verdicts: t.Iterable[Verdict]) -> str:
    """The worst of them; ``ok`` when there are none."""
    return max((verdict.verdict for verdict in verdicts), key=SEVERITY.index, default=OK)
