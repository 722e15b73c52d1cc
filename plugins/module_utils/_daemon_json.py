# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The text of daemon.json: parsed strictly and edited in place; and what the daemon needs to take a key over.

Which keys a SIGHUP reaches: dockerd's reference, "Configuration reload behavior", and moby ``daemon/reload*.go``; keys that
a SIGHUP does not reach are ignored by it without a word.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass

from ._docker_api import Json
from ._errors import FleetError
from ._host import Host
from ._untrusted import parse_json

DEFAULT_CONFIG = "/etc/docker/daemon.json"

#: Keys that dockerd takes over on SIGHUP.
RELOADABLE = frozenset(
    {
        "authorization-plugins",
        "debug",
        "default-cgroupns-mode",
        "default-ipc-mode",
        "default-runtime",
        "default-shm-size",
        "features",
        "insecure-registries",
        "labels",
        "live-restore",
        "max-concurrent-downloads",
        "max-concurrent-uploads",
        "max-download-attempts",
        "registry-mirrors",
        "runtimes",
        "shutdown-timeout",
    }
)
#: Of those, the ones whose *absence* a SIGHUP takes over as well; the others keep their last value until a restart.
RELOADABLE_REMOVAL = frozenset(
    {"features", "max-concurrent-downloads", "max-concurrent-uploads", "max-download-attempts"}
)
#: Features that are set up when the daemon starts: stored by SIGHUP, effective after a restart.
RESTART_FEATURES = frozenset({"cdi", "containerd-snapshotter"})

Path = t.Tuple[str, ...]


# -- the text of the file -------------------------------------------------------------------------


class _Absent:
    """Marks a key that is to be taken out."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: t.Any = _Absent()


def read(host: Host, path: str) -> t.Tuple[t.Optional[str], str]:
    """The text of daemon.json (None when absent), and why it is no text that could be kept as it is (empty: it is)."""
    content = host.read_bytes(path)
    if content is None:
        found = host.stat(path)
        return None, "it is a directory" if found is not None and found.is_dir else ""
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return content.decode("utf-8", "replace"), "it is no UTF-8 text (byte %d)" % (error.start + 1)


def invalid(path: str, wrong: str) -> FleetError:
    """``daemon_json_invalid``: the file cannot be edited in place, so it is left alone."""
    return FleetError(
        "daemon_json_invalid",
        "Reading %s failed: %s. It was left as it is; mend it by hand and run again." % (path, wrong),
        file=path,
    )


def parse(text: t.Optional[str], path: str = DEFAULT_CONFIG) -> Json:
    """The document in daemon.json; a missing or blank file is an empty one, as dockerd reads it.

    Raises:
        FleetError: ``daemon_json_invalid`` when it is no JSON object or names a key twice; the file is left alone.
    """

    def pairs(members: t.List[t.Tuple[str, t.Any]]) -> Json:
        found: Json = {}
        for key, value in members:
            if key in found:
                raise ValueError("the key %r stands there twice" % key)
            found[key] = value
        return found

    content = (text or "").lstrip("\ufeff")
    if not content.strip():
        return {}
    try:
        document = parse_json(content, object_pairs_hook=pairs)
    except ValueError as error:
        raise invalid(path, str(error)) from error
    if not isinstance(document, dict):
        raise invalid(path, "it holds no JSON object")
    return document


@dataclass(frozen=True)
class _Member:
    key: str
    start: int
    value_start: int
    end: int


_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def _members(text: str, start: int) -> t.Tuple[t.List[_Member], int]:
    """Positions of the members of the object that opens at ``start``, and of its closing brace. The text is valid JSON."""

    def skip(position: int) -> int:
        found = _BLANK.match(text, position)
        return found.end() if found else position

    members: t.List[_Member] = []
    position = skip(start + 1)
    while text[position] != "}":
        key, after = _DECODER.raw_decode(text, position)
        value_start = skip(skip(after) + 1)
        dummy, end = _DECODER.raw_decode(text, value_start)
        members.append(_Member(key, position, value_start, end))
        position = skip(end)
        if text[position] == ",":
            position = skip(position + 1)
    return members, position


def _indentation(text: str) -> str:
    # Also none: what is inserted into such a file must not look like its style to the next run.
    found = re.search(r"\n([ \t]*)\"", text)
    return found.group(1) if found else "  "


def set_value(text: str, path: Path, value: t.Any) -> str:
    """The text of a JSON object with one value set or (``ABSENT``) taken out; every other character stays.

    Args:
        path: Keys from the outside in; missing objects on the way are created.
    """
    if not text.lstrip("\ufeff").strip():
        text = "{}\n"
    unit = _indentation(text)
    many_lines = "\n" in text.strip() or not parse(text)

    def render(content: t.Any, depth: int) -> str:
        if not many_lines:
            return json.dumps(content, ensure_ascii=False)
        plain = json.dumps(content, ensure_ascii=False, indent=unit)
        return plain.replace("\n", "\n" + unit * depth)

    start = text.index("{")
    depth = 0
    keys = list(path)
    while True:
        depth += 1
        members, close = _members(text, start)
        key = keys.pop(0)
        index = next((number for number, member in enumerate(members) if member.key == key), None)
        if index is None:
            if value is ABSENT:
                return text
            for inner in reversed(keys):
                value = {inner: value}
            member_text = "%s: %s" % (json.dumps(key, ensure_ascii=False), render(value, depth))
            if members:
                opening = text[start + 1 : members[0].start]
                return text[: members[-1].end] + "," + (opening or " ") + member_text + text[members[-1].end :]
            if not many_lines:
                return text[: start + 1] + member_text + text[close:]
            inside = "\n" + unit * depth + member_text + "\n" + unit * (depth - 1)
            return text[: start + 1] + inside + text[close:]
        member = members[index]
        if keys and value is ABSENT and text[member.value_start] != "{":
            return text
        if keys and text[member.value_start] == "{":
            start = member.value_start
            continue
        if value is not ABSENT:
            for inner in reversed(keys):
                value = {inner: value}
            return text[: member.value_start] + render(value, depth) + text[member.end :]
        if len(members) == 1:
            return text[: start + 1] + text[close:]
        if index == 0:
            return text[: member.start] + text[members[1].start :]
        return text[: members[index - 1].end] + text[member.end :]


# -- merging --------------------------------------------------------------------------------------


def edits(document: t.Mapping[str, t.Any], wanted: t.Mapping[str, t.Any]) -> t.List[t.Tuple[Path, t.Any]]:
    """What must be set in a document so that it holds every wanted value; objects are merged, all else is replaced."""
    result: t.List[t.Tuple[Path, t.Any]] = []
    for key, value in wanted.items():
        present = document.get(key, ABSENT)
        if isinstance(value, dict) and isinstance(present, dict):
            result += [((key, *path), inner) for path, inner in edits(present, value)]
        elif present is ABSENT or not same(present, value):
            result.append(((key,), value))
    return result


def same(left: t.Any, right: t.Any) -> bool:
    """Equality of JSON values: unlike Python's, true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def get_value(document: t.Any, path: Path) -> t.Any:
    """The value at a path, or ``ABSENT``."""
    for key in path:
        if not isinstance(document, dict) or key not in document:
            return ABSENT
        document = document[key]
    return document


def merge(text: t.Optional[str], changes: t.Sequence[t.Tuple[Path, t.Any]]) -> str:
    """The text of daemon.json after a list of edits."""
    result = text or ""
    for path, value in changes:
        result = set_value(result, path, value)
    return result


def taken_out(text: str, own: t.Mapping[str, t.Any], path: str = DEFAULT_CONFIG) -> t.Optional[str]:
    """The text of daemon.json without our own keys, as far as they still have our values; the runtime of the toolkit goes
    whatever its value, as its program does. None when it holds nothing then.

    Args:
        own: Keys that this collection sets, with their values.

    Raises:
        FleetError: ``daemon_json_invalid``.
    """
    document = parse(text, path)
    changes: t.List[t.Tuple[Path, t.Any]] = [(found, ABSENT) for found in _with_these_values(document, own)]
    runtime = ("runtimes", "nvidia")
    if get_value(document, runtime) is not ABSENT and (runtime, ABSENT) not in changes:
        changes.append((runtime, ABSENT))
    # With a runtime that is not defined no container would start; runc is what removing the runtime has put in its place.
    default = get_value(document, ("default-runtime",))
    if default == "nvidia" or (default == "runc" and own.get("default-runtime") == "nvidia"):
        changes = [edit for edit in changes if edit[0] != ("default-runtime",)] + [(("default-runtime",), ABSENT)]
    # Objects in which nothing is left; removing the runtime leaves an empty one.
    for found in [found for found, dummy in changes] + ([runtime] if changes else []):
        for length in range(len(found) - 1, 0, -1):
            if get_value(parse(merge(text, changes), path), found[:length]) == {}:
                changes.append((found[:length], ABSENT))
    after = merge(text, changes)
    return None if changes and not parse(after, path) else after


def _with_these_values(document: t.Mapping[str, t.Any], own: t.Mapping[str, t.Any]) -> t.List[Path]:
    result: t.List[Path] = []
    for key, value in own.items():
        present = document.get(key, ABSENT)
        if isinstance(value, dict) and isinstance(present, dict):
            result += [(key, *inner) for inner in _with_these_values(present, value)]
        elif present is not ABSENT and same(present, value):
            result.append((key,))
    return result


def action_for(path: Path, removal: bool) -> str:
    """``reload`` or ``restart``: what the running daemon needs to take a changed key over."""
    key = path[0]
    if key not in RELOADABLE:
        return "restart"
    if key == "features" and (len(path) < 2 or path[1] in RESTART_FEATURES):
        return "restart"
    if removal and len(path) == 1 and key not in RELOADABLE_REMOVAL:
        return "restart"
    return "reload"


def expand(changes: t.Sequence[t.Tuple[Path, t.Any]]) -> t.List[t.Tuple[Path, t.Any]]:
    """Edits of a whole ``features`` object as one edit per feature, because they need different actions."""
    result: t.List[t.Tuple[Path, t.Any]] = []
    for path, value in changes:
        if path == ("features",) and isinstance(value, dict):
            result += [(("features", name), inner) for name, inner in value.items()]
        else:
            result.append((path, value))
    return result


def dotted(path: Path) -> str:
    return ".".join(path)
