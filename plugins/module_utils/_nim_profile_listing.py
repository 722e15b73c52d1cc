# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What ``list-model-profiles`` of a NIM image prints, in the layouts that NVIDIA's documentation shows of it.

It comes from an image, so nothing in it is trusted: what is not understood stays unknown, and no text is an error.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass, replace

from ._nim_profiles import (
    COMPATIBLE,
    ID_PATTERN,
    INCOMPATIBLE,
    LOW_MEMORY,
    PROFILE_ID,
    Profile,
    json_tags,
    merged,
    parse_description,
    profile_of_tags,
)

# Terminal control: CSI, OSC, and single escapes (ECMA-48).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")

_ENTRY = re.compile(r"\s*[-*]\s+(%s)(?![0-9a-f])(.*)\Z" % ID_PATTERN)
_GPU_LINE = re.compile(
    r"\s*[-*]\s+\[([0-9a-fA-F]{4}):[0-9a-fA-F]{4}\]\s+\(([0-9]{1,3})\)\s+(.*?)"
    r"(?:\s*\[current utilization:\s*([^\]%]*)%?\s*\])?\s*\Z"
)
_KNOWN_HEADING = re.compile(
    r"\s*(?:[-*]\s+)?((?:in)?compatible with\b.*|compilable to\b.*|all profiles\b.*|with lora support\b.*"
    r"|(?:non-)?free gpus\b.*)\Z",
    re.I,
)
_OTHER_HEADING = re.compile(r"\s*[-*]\s+([^\[\]{}|]{3,150}?)\s*(?::\s*(?:<none>)?|<none>)\s*\Z", re.I)
_TAG_LINE = re.compile(r"\s*[-*]\s+((?:[\w.]+\s*:[^|]*)(?:\|\s*[\w.]+\s*:[^|]*)*)\Z")
_MEMORY = re.compile(r"requires\s*>=?\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([GMT])i?B\b", re.I)
_REDUCED = re.compile(
    r"--max-model-len[= ]([0-9]{1,12})\b.{0,40}?>=?\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([GMT])i?B\b", re.I
)
_PYTHON_PAIR = re.compile(r"['\"]([\w.]{1,60})['\"]\s*:\s*['\"]([^'\"]{0,200})['\"]")
#: More than this in one line is no line of a listing.
_LINE_MOST = 4000


@dataclass(frozen=True)
class ListedGpu:
    """A GPU as a listing describes it; ``free`` and the utilization in percent are None where it does not say."""

    index: int
    name: str
    device: str
    free: bool | None = None
    utilization: int | None = None


@dataclass(frozen=True)
class Listing:
    """What a listing says.

    Attributes:
        unknown: Headings that are not understood; the verdict of the profiles below them is unknown.
    """

    profiles: tuple[Profile, ...] = ()
    gpus: tuple[ListedGpu, ...] = ()
    unknown: tuple[str, ...] = ()
    understood: bool = False


def plain(text: str) -> str:
    """Text without terminal control, as a terminal would have shown it."""
    return _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")


def parse_listing(text: str) -> Listing:
    """What ``list-model-profiles`` printed, in any of its layouts, with log lines and terminal control around it.

    Unknown headings and fields are kept as unknown; ``understood`` is False where the text is no listing at all.
    """
    text = plain(text)
    reader = _ListingReader()
    for line in text.split("\n"):
        if len(line) <= _LINE_MOST:
            reader.feed(line.rstrip())
    if not reader.understood:
        found = _json_listing(text)
        if found is not None:
            return found
    return reader.listing()


class _ListingReader:
    """State while the lines of a listing go by."""

    def __init__(self) -> None:
        self.understood = False
        self.profiles: dict[str, Profile] = {}
        self.gpus: list[ListedGpu] = []
        self.unknown: list[str] = []
        self.last = ""
        self.section = ""
        self.verdict: str | None = None
        self.buildable: bool | None = None
        self.free: bool | None = None
        self.has_lora_sections = False
        #: Indentation of the heading "With LoRA support", -1 outside of it.
        self.lora_indent = -1
        #: Whether its entries are indented more than it is; None until the first one.
        self.lora_nested: bool | None = None

    def feed(self, line: str) -> None:
        words = line.strip().lower()
        if words.startswith(("model profiles", "system info")):
            self.understood = True
            self._section("", None)
            return
        known = _KNOWN_HEADING.match(line)
        if known:
            self._heading(known.group(1), len(line) - len(line.lstrip()))
            return
        gpu = _GPU_LINE.match(line)
        if gpu:
            self._gpu(gpu)
            return
        entry = _ENTRY.match(line)
        if entry:
            self._entry(entry.group(1), entry.group(2).strip(), len(line) - len(line.lstrip()))
            return
        tags = _TAG_LINE.match(line)
        if tags and self.last and not self.profiles[self.last].description and not self.profiles[self.last].tags:
            self._add(profile_of_tags(self.last, _tags_of(tags.group(1))))
            return
        other = _OTHER_HEADING.match(line)
        if other and self.understood:
            self._section(other.group(1).strip(), None)
            self.unknown.append(self.section)

    def _heading(self, text: str, indent: int) -> None:
        lowered = text.lower()
        if lowered.startswith(("free gpus", "non-free gpus")):
            self.understood = True
            self._section("", None)
            self.free = lowered.startswith("free")
            return
        if lowered.startswith("with lora support"):
            self.has_lora_sections = True
            self.lora_indent, self.lora_nested = indent, None
            return
        if not re.search(r":|<none>|\bmemory\s*\Z", lowered) and not self.understood:
            # A sentence in a log.
            return
        self.understood = True
        title = re.sub(r"\s*:?\s*(<none>)?\s*\Z", "", text, flags=re.I).split(":")[0]
        verdict, buildable = _verdict_of(lowered)
        self._section(title, verdict)
        self.buildable = buildable
        if verdict is None and not lowered.startswith("all profiles"):
            self.unknown.append(title)

    def _section(self, title: str, verdict: str | None) -> None:
        self.section, self.verdict, self.buildable = title, verdict, None
        self.free = None
        self.last = ""
        self.lora_indent, self.lora_nested = -1, None

    def _gpu(self, match: t.Match[str]) -> None:
        usage = (match.group(4) or "").strip()
        self.gpus.append(
            ListedGpu(
                int(match.group(2)),
                match.group(3).strip(),
                match.group(1).lower(),
                self.free,
                int(usage) if re.match(r"[0-9]{1,3}\Z", usage) else None,
            )
        )

    def _entry(self, identifier: str, rest: str, indent: int) -> None:
        in_lora = self.lora_indent >= 0
        if in_lora:
            if self.lora_nested is None:
                self.lora_nested = indent > self.lora_indent
            elif self.lora_nested and indent <= self.lora_indent:
                self.lora_indent, self.lora_nested, in_lora = -1, None, False
        self.understood = True
        self.last = identifier
        self._add(replace(_entry(identifier, rest), lora=True if in_lora else _entry(identifier, rest).lora))

    def _add(self, profile: Profile) -> None:
        profile = replace(profile, section=self.section, verdict=self.verdict)
        if self.buildable is not None and profile.buildable is None:
            profile = replace(profile, buildable=self.buildable)
        known = self.profiles.get(profile.id)
        self.profiles[profile.id] = profile if known is None else merged(known, profile)

    def listing(self) -> Listing:
        profiles = tuple(self.profiles.values())
        if self.has_lora_sections:
            # A listing that sorts them out has the others elsewhere.
            profiles = tuple(replace(one, lora=False) if one.lora is None else one for one in profiles)
        return Listing(profiles, tuple(self.gpus), tuple(dict.fromkeys(self.unknown)), self.understood)


def _verdict_of(heading: str) -> tuple[str | None, bool | None]:
    """Verdict of a heading in lower case, and whether engines are built there."""
    if heading.startswith("incompatible"):
        return INCOMPATIBLE, None
    if heading.startswith("compilable"):
        return COMPATIBLE, True
    if heading.startswith("compatible"):
        if re.search(r"\blow\b|memory", heading):
            return LOW_MEMORY, None
        if re.match(r"compatible with (?:the )?system\s*(?:and runnable\s*)?(?::|<none>|\Z)", heading):
            return COMPATIBLE, None
    return None, None


def _entry(identifier: str, rest: str) -> Profile:
    """What stands behind the id: ``(description) [requires …]``, a dictionary of tags, or ``key:value|key:value``."""
    memory = _MEMORY.search(rest)
    reduced = _REDUCED.search(rest)
    text = re.sub(r"\s*\[[^\]]*\]\s*\Z", "", rest).strip()
    if text.startswith("(") and text.endswith(")"):
        found = replace(parse_description(text[1:-1].strip()), id=identifier)
    else:
        tags = _tags_of(text.lstrip("- "))
        found = profile_of_tags(identifier, tags) if tags else Profile(identifier)
    if memory is None:
        return found
    return replace(
        found,
        memory_gb=_gigabytes(memory.group(1), memory.group(2)),
        reduced_model_length=int(reduced.group(1)) if reduced else None,
        reduced_memory_gb=_gigabytes(reduced.group(2), reduced.group(3)) if reduced else None,
    )


def _gigabytes(number: str, unit: str) -> float:
    return float(number) * {"M": 1e-3, "G": 1.0, "T": 1e3}[unit.upper()]


def _tags_of(text: str) -> dict[str, str]:
    """Tags in the form ``{'a': 'b', …}`` or ``a:b|c:d``; empty for anything else."""
    if text.startswith("{"):
        return dict(_PYTHON_PAIR.findall(text))
    found = {}
    for part in text.split("|"):
        name, colon, value = part.strip().partition(":")
        if not colon or not re.match(r"[\w.]{1,60}\s*\Z", name):
            return {}
        found[name.strip()] = value.strip()
    return found


def _json_listing(text: str) -> Listing | None:
    """The listing of ``--output-format json``: lists of profiles, each named like a heading."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        document, dummy = json.JSONDecoder().raw_decode(text[start:])
    except (ValueError, RecursionError):
        return None
    profiles: dict[str, Profile] = {}
    unknown: list[str] = []
    understood = False
    for key, entries in document.items() if isinstance(document, dict) else ():
        if not isinstance(entries, list):
            continue
        title = str(key)
        understood = understood or "compatible" in title.lower()
        verdict = _json_verdict(title.lower())
        if verdict is None:
            unknown.append(title)
        for entry in entries:
            identifier = str(entry.get("profile_id") or entry.get("id") or "") if isinstance(entry, dict) else ""
            if not PROFILE_ID.match(identifier):
                continue
            tags = json_tags(entry.get("tags"))
            described = entry.get("description")
            profile = replace(profile_of_tags(identifier, tags), verdict=verdict, section=title)
            if isinstance(described, str):
                profile = replace(profile, description=described)
            known = profiles.get(identifier)
            profiles[identifier] = profile if known is None else merged(known, profile)
    if not understood:
        return None
    return Listing(tuple(profiles.values()), (), tuple(unknown), True)


def _json_verdict(key: str) -> str | None:
    if key == "incompatible":
        return INCOMPATIBLE
    if "low" in key and "memory" in key:
        return LOW_MEMORY
    return COMPATIBLE if key == "compatible" else None
