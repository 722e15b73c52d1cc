# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What was checked and what came out, without what identifies a board."""

from __future__ import annotations

import json
import re
import sys
import time
import typing as t

Json = t.Dict[str, t.Any]

_KNOWN: t.Dict[str, str] = {}


class Report:
    """Every check with its outcome, on the screen and in a file."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.entries: t.List[Json] = []

    def note(self, outcome: str, what: str, detail: t.Any = "") -> None:
        what, detail = redact(what), redact(str(detail))
        self.entries.append({"outcome": outcome, "check": what, "detail": detail})
        sys.stdout.write("%-7s %s%s\n" % (outcome, what, ": " + detail if detail else ""))
        sys.stdout.flush()

    def check(self, what: str, good: t.Any, detail: t.Any = "") -> bool:
        self.note("ok" if good else "FAILED", what, detail)
        return bool(good)

    def same(self, what: str, found: t.Any, expected: t.Any) -> bool:
        return self.check(what, found == expected, found if found == expected else "%r != %r" % (found, expected))

    def count(self, outcome: str) -> int:
        return sum(entry["outcome"] == outcome for entry in self.entries)

    @property
    def failed(self) -> int:
        return self.count("FAILED")

    def keep(self, name: str, text: str) -> None:
        """Leave a capture in the output directory."""
        with open("%s/%s" % (self.output, name), "w", encoding="utf-8") as stream:
            stream.write(redact(text))

    def end(self) -> int:
        """The exit status; the outcome of every check goes into ``report.json``."""
        counts = tuple(self.count(kind) for kind in ("ok", "FAILED", "skipped"))
        sys.stdout.write("\n%d ok, %d failed, %d skipped\n" % counts)
        with open(self.output + "/report.json", "w", encoding="utf-8") as stream:
            json.dump(self.entries, stream, indent=1)
        return 1 if self.failed else 0


def redact(text: str) -> str:
    """Text without what identifies a board; the same GPU keeps the same substitute."""

    def replaced(match: t.Match[str]) -> str:
        found = match.group()
        if found in _KNOWN.values():
            return found
        return _KNOWN.setdefault(found, "GPU-00000000-0000-0000-0000-%012x" % (len(_KNOWN) + 1))

    text = re.sub(r"GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", replaced, text)
    return re.sub(
        r"<(serial|pdi|board_part_number|gpu_part_number|cluster_uuid|chassis_serial_number|board_id)>[^<]*<",
        lambda match: "<%s>REDACTED<" % match.group(1),
        text,
    )


def wait_for(what: t.Callable[[], t.Any], seconds: float) -> t.Any:
    """Value of ``what`` as soon as it is true, or its last value."""
    end = time.monotonic() + seconds
    while True:
        found = what()
        if found or time.monotonic() >= end:
            return found
        time.sleep(0.2)
