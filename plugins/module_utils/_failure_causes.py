# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which of the known texts explains a failure, and whether it alone says that a start will fail."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._failure_signatures import EXIT_CODES, OUT_OF_MEMORY, SIGNATURES, Signature
from ._kernel_log import KernelEvent
from ._xid_errors import UNKNOWN_XID, XID_ERRORS

#: Where a text stands: in a container's log, in what Docker or the unit's main process said, in the kernel log.
CONTAINER = "container"
DOCKER = "docker"
KERNEL = "host"


@dataclass(frozen=True)
class Match:
    """A signature and the line in which it was found (empty when an exit code decided).

    Attributes:
        own: The signature is the user's.
        source: Where the line stands: ``container``, ``docker`` or ``host``.
    """

    signature: Signature
    line: str
    own: bool = False
    source: str = CONTAINER

    @property
    def rank(self) -> tuple[bool, bool]:
        """Smaller explains better: a consequence counts only alone, and the user knows best."""
        return (self.signature.umbrella, not self.own)


def best(*matches: Match | None) -> Match | None:
    """The match that explains best; of equal ones the first."""
    return min((match for match in matches if match is not None), key=lambda match: match.rank, default=None)


class SignatureBook:
    """All signatures that hold for a host: the user's, then those of the collection whose id the user does not use."""

    def __init__(self, own: t.Sequence[Signature] = ()) -> None:
        replaced = {signature.id for signature in own}
        self.signatures = (*own, *(known for known in SIGNATURES if known.id not in replaced))
        self._own = replaced
        self._compiled: list[tuple[Signature, t.Pattern[str]]] = []

    def by_id(self, identifier: str) -> Signature | None:
        known = (*self.signatures, *EXIT_CODES.values(), OUT_OF_MEMORY)
        return next((signature for signature in known if signature.id == identifier), None)

    def find(
        self,
        text: str,
        *,
        source: str = CONTAINER,
        exit_code: int | None = None,
        oom_killed: bool = False,
        deciding: bool = False,
    ) -> Match | None:
        """The signature that explains a failure best.

        The user's count before the collection's. The first text in the log counts, because what follows it is usually its
        consequence; umbrella messages count only when nothing else is found, exit codes only when no text is. A line in
        which a harmless text stands is no evidence of anything.

        Args:
            text: Log lines joined by newlines; JSON lines already reduced to their message and exception.
            source: ``host`` for the kernel log, in which only texts of the host are looked for; any text may stand in the
                two others, because the runtime's errors show up in both.
            exit_code: Exit code of the container, if it ended.
            oom_killed: What the container engine says about the kernel's out-of-memory killer.
            deciding: Look only for texts that alone say that a start is lost.
        """
        if oom_killed:
            return Match(OUT_OF_MEMORY, "", source=DOCKER)
        text = self._without_harmless(text)
        found: tuple[tuple[bool, bool, int, int], Match] | None = None
        for index, (signature, pattern) in enumerate(self._patterns()):
            if signature.harmless or (source == KERNEL and signature.where != KERNEL):
                continue
            if deciding and (signature.passing or signature.where != source):
                continue
            place = pattern.search(text)
            if place is None:
                continue
            match = Match(signature, _line_at(text, place.start()), signature.id in self._own, source)
            key = (*match.rank, place.start(), index)
            if found is None or key < found[0]:
                found = (key, match)
        if found is not None:
            return found[1]
        if exit_code is not None and exit_code in EXIT_CODES:
            return Match(EXIT_CODES[exit_code], "", source=DOCKER)
        return None

    def _patterns(self) -> list[tuple[Signature, t.Pattern[str]]]:
        # Compiled on first use only: most runs never see a failure.
        if not self._compiled:
            self._compiled = [(entry, re.compile(entry.pattern)) for entry in self.signatures]
        return self._compiled

    def _without_harmless(self, text: str) -> str:
        for signature, pattern in self._patterns():
            if signature.harmless and pattern.search(text):
                text = "\n".join(line for line in text.split("\n") if not pattern.search(line))
        return text


def _line_at(text: str, position: int) -> str:
    begin = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[begin : len(text) if end < 0 else end].strip()


def xid_signature(event: KernelEvent) -> Signature:
    """The cause and remedy of an Xid by its number."""
    meaning = XID_ERRORS.get(event.number, UNKNOWN_XID)
    cause = "Xid %d on GPU %s: %s" % (event.number, event.bdf, meaning.cause)
    return Signature("host-52", "", "host", cause, meaning.remedy)
