# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The log of a NIM container: reading it piece by piece, and the phase of a start that its lines tell."""

from __future__ import annotations

import re

from ._host import Host
from ._untrusted import json_object, parse_json

#: Lines of a log that are read at a time.
MOST_LINES = 2000

#: Phases in the order of a start, each with the texts that begin it (NIM 1.x, NIM 2.x, vLLM, TensorRT-LLM, SGLang).
_PHASE_TEXTS: tuple[tuple[str, str], ...] = (
    ("serving", r"Serving endpoints|Uvicorn running on|Application startup complete|Starting vLLM API server"),
    ("graphs", r"[Cc]apturing (?:CUDA )?graph|[Cc]apture cuda graph|Graph capturing finished"),
    (
        "build",
        r"[Bb]uild(?:ing)?\b.*\b[Ee]ngine|[Ee]ngine (?:is being built|build(?:ing)?\b)"
        r"|trtllm-build|\[TRT\].*(?:Compiler|Building)",
    ),
    (
        "loading",
        r"Loading (?:model weights|safetensors|pt checkpoint|weights|model)|Starting to load model"
        r"|Load weight begin|Model loading took",
    ),
    (
        "engine",
        r"Model workspace is now ready|Initializing an? (?:V1 )?LLM engine|Initializing a V1|Serializing engine",
    ),
    ("download", r"Preparing model workspace|[Dd]ownload(?:ing|ed)\b|Fetching \d+ files"),
    ("profile", r"Detected \d+ compatible profile|Matched profile|Selected profile|Valid profile|Profile metadata"),
)
_PHASES = [(name, re.compile(pattern)) for name, pattern in _PHASE_TEXTS]
#: What the operator reads.
PHASE_WORDS = {
    "waiting_for_docker": "waiting for Docker",
    "starting": "starting the container",
    "profile": "choosing a profile",
    "download": "downloading the model",
    "build": "building the engine",
    "engine": "starting the engine",
    "loading": "loading the model",
    "graphs": "capturing CUDA graphs",
    "serving": "starting the server",
    "settling": "answering, but it ended soon after it was ready before; watching whether it stays",
    "silent": "silent: busy or hung",
    "ready": "ready",
}
#: Characters of a line that are looked at.
LINE_MOST = 10_000
_PERCENT = re.compile(r"(?<![\d.])(\d{1,3})(?:\.\d+)?\s?%")
_FRACTION = re.compile(r"(?<![\d/.])(\d{1,6})/(\d{1,6})(?![\d/])")


def message_of(line: str) -> str:
    """What a log line says: the line itself, or message and exception of a JSON line (its level is not reliable)."""
    stripped = line.strip()
    if stripped.startswith("{") and stripped.endswith("}"):
        try:
            record = parse_json(stripped)
        except ValueError:
            return _clipped(stripped)
        if isinstance(record, dict):
            parts = [str(record.get(key) or "") for key in ("message", "exc_info")]
            told = "\n".join(part for part in parts if part and part != "None")
            return _clipped(told or stripped)
    return _clipped(stripped)


def _clipped(text: str) -> str:
    """Beginning and end of a line that no person would read: what is looked for in lines must not take for ever."""
    return text if len(text) <= LINE_MOST else "%s … %s" % (text[: LINE_MOST // 2], text[-LINE_MOST // 2 :])


def phase_of(message: str) -> str | None:
    """The phase that a message begins or belongs to."""
    for name, pattern in _PHASES:
        if pattern.search(message):
            return name
    return None


def percent_of(message: str) -> int | None:
    """The last percentage that a message names; in a message that belongs to a phase "layer 3/32" is one too."""
    found = [int(number) for number in _PERCENT.findall(message)]
    if found:
        return found[-1] if found[-1] <= 100 else None
    parts = _FRACTION.findall(message) if phase_of(message) else []
    if parts:
        done, total = int(parts[-1][0]), int(parts[-1][1])
        return 100 * done // total if 1 < total >= done else None
    return None


def read_log(
    host: Host, container: str, cursor: str, limit: int = MOST_LINES, since: float | None = None
) -> tuple[list[str], str]:
    """Lines of a container's log after ``cursor`` (an RFC 3339 time, empty for the beginning), and the new cursor.

    Args:
        since: Where the beginning is, in seconds since the epoch: a container that was started again keeps the log of its
            earlier runs.
    """
    argv = ["docker", "logs", "--timestamps", "--tail", str(limit)]
    if cursor:
        argv += ["--since", cursor]
    elif since is not None:
        argv += ["--since", "%.6f" % since]
    read = host.run([*argv, container], timeout=20)
    if not read.ok:
        return [], cursor
    stamped: list[tuple[str, str]] = []
    for line in read.stdout.splitlines() + read.stderr.splitlines():
        when, _space, text = line.partition(" ")
        # What came before stays out: --since includes the moment itself.
        if re.match(r"\d{4}-\d\d-\d\dT", when) and when > cursor:
            stamped.append((when, text))
    # The two streams come one after the other; the stable sort keeps the order within a moment.
    stamped.sort(key=lambda entry: entry[0])
    return [text for _when, text in stamped], stamped[-1][0] if stamped else cursor


#: Fields of the journal that tell one container, and one run of a unit, from the others of the same name.
CONTAINER_FIELD = "CONTAINER_ID_FULL"
RUN_FIELD = "_SYSTEMD_INVOCATION_ID"


def journal_lines(
    host: Host, field: str, value: str, *, most: int = 30, of_last: tuple[str, int] | None = None
) -> list[str]:
    """The last lines of the journal with ``field`` = ``value``.

    Args:
        most: Lines at most.
        of_last: A field and a number n: only lines with one of the last n values of that field, because a name is used
            again by every container and every run.
    """
    argv = ["journalctl", "--no-pager", "--quiet", "--output=json", "--lines=%d" % (most * 4)]
    read = host.run([*argv, "%s=%s" % (field, value)], timeout=20)
    entries: list[tuple[str, str]] = []
    for line in read.stdout.splitlines():
        entry = json_object(line)
        if isinstance(entry.get("MESSAGE"), str):
            entries.append((str(entry.get(of_last[0]) or "") if of_last else "", entry["MESSAGE"]))
    if of_last:
        kept = list(dict.fromkeys(key for key, _text in reversed(entries)))[: of_last[1]]
        entries = [entry for entry in entries if entry[0] in kept]
    return [text for _key, text in entries[-most:]]


def last_words(host: Host, name: str, identifier: str) -> list[str]:
    """The last lines of a container that may be gone.

    Args:
        identifier: Its id, because earlier ones had its name too; empty where nobody knows it.
    """
    if not identifier:
        return journal_lines(host, "CONTAINER_NAME", name, of_last=(CONTAINER_FIELD, 1))
    # The journal may not be done with it yet, and the very last line says why.
    host.run(["journalctl", "--sync"], timeout=2)
    return journal_lines(host, CONTAINER_FIELD, identifier)
