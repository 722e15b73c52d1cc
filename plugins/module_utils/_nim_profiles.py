# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Model profiles of a NIM image: what descriptions, tags and its manifest say of them, and which one an operator means.

Descriptions, tags and the layouts of ``model_manifest.yaml`` are those of NVIDIA's documentation (NIM for LLMs 1.0
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
#: Ids of profiles; UUIDs in the oldest manifests.
ID_PATTERN = r"[0-9a-f]{64}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
PROFILE_ID = re.compile(r"(?:%s)\Z" % ID_PATTERN)
_PRECISION = re.compile(
    r"(?:(?:bf|fp|int|uint|nvfp|mxfp|tf)\d{1,2}(?:_\w{1,12})?|w\d{1,2}a\d{1,2}\w{0,8}|awq|gptq)\Z", re.I
)
_DEGREE = re.compile(r"(tp|pp)([0-9]{1,3})\Z")
#: What NIM 2.x ends a description with where it has estimated the memory: GB that every GPU must have, as its listing says
#: again behind it ("vllm-fp8-tp4-pp1-12.0" with "[requires >=12 GB/gpu]").
_MEMORY_TOKEN = re.compile(r"[0-9]{1,4}\.[0-9]{1,2}\Z")
_GPU_TOKEN = re.compile(r"[a-z]{1,5}\d{1,4}[a-z0-9_]{0,30}\Z", re.I)
_DEVICE = re.compile(r"([0-9a-f]{4})(?::10de)?\Z", re.I)


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
        memory_gb: GB that every GPU must have, with the longest context that the profile has by itself.
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


# -- descriptions and tags ------------------------------------------------------------------------


def parse_description(text: str) -> Profile:
    """What the description of a profile says, for example ``tensorrt_llm-h100-fp8-tp2-pp1-latency``.

    The parts are those that NVIDIA documents: engine, kind of GPU (engines that are built for one), precision, tpN, ppN,
    then what else tells profiles apart. Only parts in their place count; hashes behind them say nothing, and a number at the
    end is memory only in the form in which listings of NIM 2.x show what it means.
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
    memory = None
    if (
        found["backend"] in ("vllm", "sglang")
        and found["tp"]
        and found["pp"]
        and rest
        and rest[:-1] in ([], ["lora"], ["feat_lora"])
        and _MEMORY_TOKEN.match(rest[-1])
    ):
        memory = float(rest[-1]) or None
    return Profile(
        id="",
        description=text,
        memory_gb=memory,
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


def merged(profile: Profile, other: Profile) -> Profile:
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


def json_tags(raw: t.Any) -> dict[str, str]:
    """Tags of a JSON document as text; what is no scalar is no tag."""
    if not isinstance(raw, dict):
        return {}
    words = {True: "true", False: "false", None: ""}
    return {
        name: words[value] if value is None or isinstance(value, bool) else str(value)
        for name, value in raw.items()
        if value is None or isinstance(value, (str, bool, int, float))
    }


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
        elif len(path) > 1 and PROFILE_ID.match(path[0]):
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
            listed = [one for one in document[key] if isinstance(one, dict)]
            entries += [(one["id"], one) for one in listed if isinstance(one.get("id"), str)]
    entries += [
        (str(key), one) for key, one in document.items() if PROFILE_ID.match(str(key)) and isinstance(one, dict)
    ]
    if not entries and not known:
        return None
    profiles = {}
    for identifier, entry in entries:
        if identifier:
            profiles[identifier] = profile_of_tags(identifier, json_tags(entry.get("tags")))
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
    if PROFILE_ID.match(wanted):
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
            return Match(merged(replace(by_name, id=agreed.id), agreed), tuple(possible), len(possible) == 1)
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
