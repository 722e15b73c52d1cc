# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Model profiles of a NIM image: what its listing and its manifest say of them, and which one an operator means.

The layouts of ``list-model-profiles`` and of ``model_manifest.yaml`` are those of NVIDIA's documentation (NIM for LLMs 1.0
to 3.0: utilities, model profiles; Riva, NV-CLIP and VLM NIMs: utilities) and of NVIDIA/k8s-nim-operator
(``internal/nimparser``). Both texts come from an image, so nothing in them is trusted: what is not understood stays
unknown (None), and no text is an error.
"""

from __future__ import annotations

import json
import re
import typing as t
from dataclasses import dataclass, field, replace

from ._errors import FleetError

#: What a listing says of a profile on the GPUs that it was made with.
COMPATIBLE = "compatible"
LOW_MEMORY = "low_memory"
INCOMPATIBLE = "incompatible"

_BACKENDS = ("tensorrt_llm", "trtllm", "tensorrt", "vllm", "sglang", "onnx", "pytorch", "triton", "python")
_LLM_BACKENDS = ("tensorrt_llm", "trtllm", "vllm", "sglang")
_ID = r"[0-9a-f]{64}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ID_ALONE = re.compile(r"(?:%s)\Z" % _ID)
_PRECISION = re.compile(
    r"(?:(?:bf|fp|int|uint|nvfp|mxfp|tf)\d{1,2}(?:_\w{1,12})?|w\d{1,2}a\d{1,2}\w{0,8}|awq|gptq)\Z", re.I
)
_DEGREE = re.compile(r"(tp|pp)(\d{1,3})\Z")
_GPU_TOKEN = re.compile(r"[a-z]{1,5}\d{1,4}[a-z0-9_]{0,30}\Z", re.I)
_DEVICE = re.compile(r"([0-9a-f]{4})(?::10de)?\Z", re.I)

# Terminal control: CSI, OSC, and single escapes (ECMA-48).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")


@dataclass(frozen=True)
class Profile:
    """One profile of an image. None (an empty string for texts that name it) where nobody says.

    Attributes:
        id: 64 hexadecimal digits; a UUID or a name in the oldest manifests.
        description: As the listing has it; a manifest has none.
        backend: ``vllm``, ``tensorrt_llm``, ``sglang``, …
        tp, pp: GPUs that one layer is spread over, and stages that the layers are spread over.
        gpu: Kind of GPU it was built for, as NVIDIA writes it there: ``h100``, ``H100_NVL``, ``L40S``.
        gpu_device: PCI device id of that kind, four hexadecimal digits in lower case.
        memory_gb: GB that every GPU must have.
        reduced_memory_gb, reduced_model_length: The same with a shorter context, as the listing advises.
        lora: Whether it can load LoRA adapters.
        buildable: Whether its engine is built on the host.
        verdict: What the listing said, one of the constants above.
        section: Heading that it stood under.
    """

    id: str
    description: str = ""
    backend: str | None = None
    precision: str | None = None
    tp: int | None = None
    pp: int | None = None
    gpu: str | None = None
    gpu_device: str | None = None
    memory_gb: float | None = None
    reduced_memory_gb: float | None = None
    reduced_model_length: int | None = None
    lora: bool | None = None
    buildable: bool | None = None
    tags: t.Mapping[str, str] = field(default_factory=dict)
    verdict: str | None = None
    section: str = ""

    @property
    def gpus(self) -> int | None:
        """How many GPUs it takes. Profiles from before NIM 1.2 name no pipeline parallelism and have none."""
        return None if self.tp is None else self.tp * (self.pp or 1)

    def __str__(self) -> str:
        """``vllm-bf16-tp2-pp1 (0494aafce0df…)``, or the whole id and what is known where there is no description."""
        if self.description:
            short = self.id if len(self.id) < 40 else self.id[:12] + "…"
            return "%s (%s)" % (self.description, short) if short else self.description
        known = (
            self.backend,
            self.gpu,
            "buildable" if self.buildable else "",
            self.precision,
            "tp%d" % self.tp if self.tp else "",
            "pp%d" % self.pp if self.pp else "",
            self.tags.get("profile", ""),
            "lora" if self.lora else "",
        )
        text = " ".join(part for part in known if part)
        # What NIM calls it is not known: nothing that looks like a name stands here.
        return "%s (%s)" % (self.id, text) if text else self.id


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


# -- descriptions and tags ------------------------------------------------------------------------


def parse_description(text: str) -> Profile:
    """What the description of a profile says, for example ``tensorrt_llm-h100-fp8-tp2-pp1-latency``.

    The parts are those that NVIDIA documents: engine, kind of GPU (engines that are built for one), precision, tpN, ppN,
    then what else tells profiles apart. Only parts in their place count; hashes behind them say nothing.
    """
    tokens = text.split("-")
    found: dict[str, t.Any] = {"backend": None, "precision": None, "tp": None, "pp": None, "gpu": None}
    tags: dict[str, str] = {}
    buildable = None
    rest = list(tokens)
    if rest and rest[0] in _BACKENDS:
        found["backend"] = rest.pop(0)
    while rest:
        token = rest[0]
        degree = _DEGREE.match(token)
        if token in ("trtllm_buildable", "buildable", "local_build"):
            buildable = True
        elif degree and found[degree.group(1)] is None:
            found[degree.group(1)] = int(degree.group(2)) or None
        elif _PRECISION.match(token) and found["precision"] is None and found["tp"] is None:
            found["precision"] = token.lower()
        elif _GPU_TOKEN.match(token) and found["gpu"] is None and found["precision"] is None and found["tp"] is None:
            found["gpu"] = token
        else:
            break
        rest.pop(0)
    for token in rest:
        if token in ("throughput", "latency", "balanced"):
            tags.setdefault("profile", token)
        elif re.match(r"[0-9a-f]{4}:10de\Z", token, re.I):
            tags.setdefault("gpu_device", token.lower())
    lora: bool | None = None
    if "lora" in rest or "feat_lora" in rest:
        lora = True
    elif found["backend"] in _LLM_BACKENDS and found["tp"] is not None:
        # "The -lora suffix indicates the profile supports LoRA adapter loading" (model profiles and selection).
        lora = False
    return Profile(
        id="",
        description=text,
        lora=lora,
        buildable=buildable,
        gpu_device=_device(tags.get("gpu_device")),
        tags=tags,
        **found,
    )


def _device(text: str | None) -> str | None:
    match = _DEVICE.match((text or "").strip())
    return match.group(1).lower() if match else None


def _number(text: str | None) -> int | None:
    """A degree of parallelism; zero, which nothing can have, and nonsense are unknown."""
    text = (text or "").strip()
    return (int(text) or None) if re.match(r"[0-9]{1,3}\Z", text) else None


def _flag(text: str | None) -> bool | None:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        (text or "").strip().lower()
    )


def profile_of_tags(identifier: str, tags: t.Mapping[str, str]) -> Profile:
    """A profile out of the tags that a manifest or a listing gives it."""
    return Profile(
        id=identifier,
        backend=(tags.get("llm_engine") or tags.get("backend") or "").strip().lower() or None,
        precision=(tags.get("precision") or "").strip().lower() or None,
        tp=_number(tags.get("tp")),
        pp=_number(tags.get("pp")),
        gpu=(tags.get("gpu") or "").strip() or None,
        gpu_device=_device(tags.get("gpu_device")),
        lora=_flag(tags.get("feat_lora")),
        buildable=_flag(tags.get("trtllm_buildable")),
        tags=dict(tags),
    )


def _merged(profile: Profile, other: Profile) -> Profile:
    """A profile with what another text about it adds; where the two contradict each other nothing is known."""
    values: dict[str, t.Any] = {}
    for name in ("backend", "precision", "tp", "pp", "gpu", "gpu_device", "lora", "buildable", "memory_gb", "verdict"):
        mine, theirs = getattr(profile, name), getattr(other, name)
        values[name] = mine if theirs is None else theirs if mine is None else mine if mine == theirs else None
    return replace(
        profile,
        description=profile.description or other.description,
        tags={**other.tags, **profile.tags},
        **values,
    )


# -- listings -------------------------------------------------------------------------------------

_ENTRY = re.compile(r"\s*[-*]\s+(%s)(?![0-9a-f])(.*)\Z" % _ID)
_GPU_LINE = re.compile(
    r"\s*[-*]\s+\[([0-9a-fA-F]{4}):[0-9a-fA-F]{4}\]\s+\((\d{1,3})\)\s+(.*?)"
    r"(?:\s*\[current utilization:\s*([^\]%]*)%?\s*\])?\s*\Z"
)
_KNOWN_HEADING = re.compile(
    r"\s*(?:[-*]\s+)?((?:in)?compatible with\b.*|compilable to\b.*|all profiles\b.*|with lora support\b.*"
    r"|(?:non-)?free gpus\b.*)\Z",
    re.I,
)
_OTHER_HEADING = re.compile(r"\s*[-*]\s+([^\[\]{}|]{3,150}?)\s*(?::\s*(?:<none>)?|<none>)\s*\Z", re.I)
_TAG_LINE = re.compile(r"\s*[-*]\s+((?:[\w.]+\s*:[^|]*)(?:\|\s*[\w.]+\s*:[^|]*)*)\Z")
_MEMORY = re.compile(r"requires\s*>=?\s*(\d{1,6}(?:\.\d{1,6})?)\s*([GMT])i?B\b", re.I)
_REDUCED = re.compile(r"--max-model-len[= ](\d{1,12})\b.{0,40}?>=?\s*(\d{1,6}(?:\.\d{1,6})?)\s*([GMT])i?B\b", re.I)
_PYTHON_PAIR = re.compile(r"['\"]([\w.]{1,60})['\"]\s*:\s*['\"]([^'\"]{0,200})['\"]")
#: More than this in one line is no line of a listing.
_LINE_MOST = 4000


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
        self.profiles[profile.id] = profile if known is None else _merged(known, profile)

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
            if not _ID_ALONE.match(identifier):
                continue
            raw = entry.get("tags")
            tags = {str(name): _scalar(value) for name, value in raw.items()} if isinstance(raw, dict) else {}
            described = entry.get("description")
            profile = replace(profile_of_tags(identifier, tags), verdict=verdict, section=title)
            if isinstance(described, str):
                profile = replace(profile, description=described)
            known = profiles.get(identifier)
            profiles[identifier] = profile if known is None else _merged(known, profile)
    if not understood:
        return None
    return Listing(tuple(profiles.values()), (), tuple(unknown), True)


def _json_verdict(key: str) -> str | None:
    if key == "incompatible":
        return INCOMPATIBLE
    if "low" in key and "memory" in key:
        return LOW_MEMORY
    return COMPATIBLE if key == "compatible" else None


def _scalar(value: t.Any) -> str:
    return {True: "true", False: "false", None: ""}[value] if value is None or isinstance(value, bool) else str(value)


# -- manifests ------------------------------------------------------------------------------------

_YAML_KEY = re.compile(
    r"(?:'((?:[^']|'')*)'|\"([^\"]*)\"|([^\s'\"#{}\[\],&*!|>%@`-][^#{}\[\],]*?|-[^\s#]+?))\s*:(?:\s+(.*))?\Z"
)
_FLOW_PAIR = re.compile(
    r"\s*(?:'([^']*)'|\"([^\"]*)\"|([\w.]+))\s*:\s*(?:'([^']*)'|\"([^\"]*)\"|([^,'\"{}\[\]]*))\s*(?:,|\Z)"
)


def parse_manifest(text: str) -> tuple[Profile, ...] | None:
    """The profiles of a ``model_manifest.yaml``: a map by id (1.x), or a list below ``profiles`` (2.x) or ``manifest``.

    Reads the parts of YAML that these files are written in, or JSON; ids and tags alone are looked at.

    Returns:
        None when the text is no manifest; an empty tuple for one without profiles, as images without a model have.
    """
    stripped = text.lstrip("\ufeff \t\r\n")
    if stripped.startswith("{"):
        return _json_manifest(stripped)
    found: dict[tuple[str, ...], dict[str, str]] = {}
    ids: dict[tuple[str, ...], str] = {}
    known = False
    for path, value in _yaml_scalars(text):
        if path[0] in ("profiles", "manifest"):
            known = True
            if len(path) < 3 or not path[1].startswith("#"):
                continue
            owner, inner = path[:2], path[2:]
        elif path[0] == "schema_version":
            known = True
            continue
        elif len(path) > 1 and _ID_ALONE.match(path[0]):
            known = True
            owner, inner = path[:1], path[1:]
            ids[owner] = path[0]
        else:
            continue
        if inner == ("id",) and value:
            ids[owner] = value
        elif inner[0] == "tags" and len(inner) == 2:
            found.setdefault(owner, {})[inner[1]] = value
    if not known:
        return None
    return _completed([profile_of_tags(identifier, found.get(owner, {})) for owner, identifier in ids.items()])


def _json_manifest(text: str) -> tuple[Profile, ...] | None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    entries: list[tuple[str, t.Any]] = []
    known = "schema_version" in document
    for key in ("profiles", "manifest"):
        if isinstance(document.get(key), list):
            known = True
            entries += [(str(one.get("id") or ""), one) for one in document[key] if isinstance(one, dict)]
    entries += [(str(key), one) for key, one in document.items() if _ID_ALONE.match(str(key)) and isinstance(one, dict)]
    if not entries and not known:
        return None
    profiles = {}
    for identifier, entry in entries:
        raw = entry.get("tags")
        tags = {str(name): _scalar(value) for name, value in raw.items()} if isinstance(raw, dict) else {}
        if identifier:
            profiles[identifier] = profile_of_tags(identifier, tags)
    return _completed(list(profiles.values()))


def _completed(profiles: list[Profile]) -> tuple[Profile, ...]:
    """A manifest that marks the profiles for LoRA has all others without it."""
    if any(profile.lora is not None for profile in profiles):
        profiles = [
            replace(profile, lora=False)
            if profile.lora is None and profile.backend in _LLM_BACKENDS and "feat_lora_max_rank" not in profile.tags
            else profile
            for profile in profiles
        ]
    unique = {profile.id: profile for profile in profiles}
    return tuple(unique.values())


def _yaml_scalars(text: str) -> t.Iterator[tuple[tuple[str, ...], str]]:
    """Path and text of every scalar, and path and ``""`` of every key that has no scalar.

    Items of lists have ``#`` and their number as part of the path. ``workspace``, by far the largest part of a manifest,
    is left out, and so are block texts.
    """
    # (indentation, name) of the mappings and list items that are open.
    stack: list[tuple[int, str]] = []
    counters: dict[tuple[int, int], int] = {}
    skip: int | None = None
    for line in text.splitlines():
        body = line.strip(" ")
        if not body or body[0] == "#" or body in ("---", "..."):
            continue
        indent = len(line) - len(line.lstrip(" "))
        if skip is not None:
            if indent > skip or (indent == skip and body.startswith("- ")):
                continue
            skip = None
        while body == "-" or body.startswith("- "):
            while stack and stack[-1][0] >= indent and not (stack[-1][0] == indent and stack[-1][1][0] != "#"):
                stack.pop()
            place = (len(stack), indent)
            counters[place] = counters.get(place, -1) + 1
            # Odd halves keep an item above a key at the same column ("profiles:" and "- id" below it).
            stack.append((indent, "#%d" % counters[place]))
            rest = body[1:].lstrip(" ")
            indent += len(body) - len(rest)
            body = rest
            if not body:
                break
        else:
            while stack and stack[-1][0] >= indent:
                stack.pop()
        if not body:
            continue
        match = _YAML_KEY.match(body)
        if match is None:
            continue
        quoted, double, bare, value = match.groups()
        key = (
            quoted.replace("''", "'") if quoted is not None else double if double is not None else (bare or "").strip()
        )
        if not key or key[0] == "#":
            continue
        path = (*[name for dummy, name in stack], key)
        value = _unquoted(value or "")
        stack.append((indent, key))
        if key == "workspace" or value[:1] in ("|", ">"):
            skip = indent
            continue
        if value.startswith("{"):
            for pair in _FLOW_PAIR.finditer(value[1 : value.rfind("}")] if "}" in value else ""):
                name = next((part for part in pair.groups()[:3] if part is not None), "")
                inner = next((part for part in pair.groups()[3:] if part is not None), "")
                yield (*path, name), inner.strip()
            continue
        yield path, value


def _unquoted(text: str) -> str:
    """Value of a plain or quoted scalar, without a comment behind it and without a tag (``!name``) before it."""
    text = re.sub(r"\A![^\s]*\s*", "", text.strip())
    for quote in ("'", '"'):
        if text.startswith(quote):
            end = text.find(quote, 1)
            return text[1:end] if end > 0 else text[1:]
    return re.split(r"\s#", text, maxsplit=1)[0].strip()


# -- which one is meant ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """What is known of the profile that an operator named.

    Attributes:
        profile: What all profiles that can be meant agree on; None when nothing is known.
        candidates: The profiles that can be meant; one is certain.
        certain: False where there is nothing to compare the name with.
    """

    profile: Profile | None
    candidates: tuple[Profile, ...] = ()
    certain: bool = False


def match_profile(wanted: str, profiles: t.Sequence[Profile] | None) -> Match:
    """Find the profile that an id or a description names, as NIM does: the whole of it, letter by letter.

    A manifest has no descriptions; NIM makes them out of the tags. There a description matches every profile whose tags
    do not contradict it, and only what they agree on is taken as known.

    Args:
        profiles: Of the listing or the manifest; None when neither is known.

    Raises:
        FleetError: ``no_such_profile`` with the candidates.
    """
    by_name = parse_description(wanted)
    if _ID_ALONE.match(wanted):
        by_name = Profile(wanted)
    if not profiles:
        return Match(by_name if by_name.description else None)
    exact = [one for one in profiles if wanted in (one.id, one.description)]
    if exact:
        return Match(_common(exact), tuple(exact), True)
    if by_name.description and not any(one.description for one in profiles):
        possible = [one for one in profiles if _may_be(by_name, one)]
        if possible:
            agreed = _common(possible)
            return Match(_merged(replace(by_name, id=agreed.id), agreed), tuple(possible), len(possible) == 1)
    raise FleetError(
        "no_such_profile",
        "%s is none of the %d profiles of the image; name one by its id or its whole description: %s."
        % (wanted, len(profiles), shown(profiles)),
        profile=wanted,
        candidates=[one.id for one in profiles],
    )


def shown(profiles: t.Sequence[Profile], most: int = 8) -> str:
    """The profiles in a sentence, those that can run first."""
    order = {COMPATIBLE: 0, LOW_MEMORY: 1, None: 2, INCOMPATIBLE: 3}
    ordered = sorted(profiles, key=lambda one: order[one.verdict])
    text = ", ".join(str(one) for one in ordered[:most])
    return text + (" and %d more" % (len(ordered) - most) if len(ordered) > most else "")


def _may_be(named: Profile, profile: Profile) -> bool:
    """Whether tags do not contradict a description. Its documented parts are written if there is a tag for them."""
    if named.backend is None and named.precision is None and named.tp is None:
        # Nothing in it is understood.
        return True
    for name in ("backend", "precision", "tp", "pp", "gpu_device"):
        mine, theirs = getattr(named, name), getattr(profile, name)
        if mine is not None and theirs is not None and str(mine).lower() != str(theirs).lower():
            return False
    if named.gpu and profile.gpu and _squeezed(named.gpu) != _squeezed(profile.gpu):
        return False
    if named.tags.get("profile") and profile.tags.get("profile", named.tags["profile"]) != named.tags["profile"]:
        return False
    return not (named.lora is not None and profile.lora is not None and named.lora != profile.lora)


def _squeezed(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _common(profiles: t.Sequence[Profile]) -> Profile:
    """What several profiles agree on; the id and the description only where there is one."""
    first = profiles[0]
    if len(profiles) == 1:
        return first
    values: dict[str, t.Any] = {
        name: getattr(first, name) if len({getattr(one, name) for one in profiles}) == 1 else None
        for name in (
            "backend",
            "precision",
            "tp",
            "pp",
            "gpu",
            "gpu_device",
            "memory_gb",
            "lora",
            "buildable",
            "verdict",
        )
    }
    same = {name: value for name, value in first.tags.items() if all(one.tags.get(name) == value for one in profiles)}
    return Profile("", "", tags=same, **values)
