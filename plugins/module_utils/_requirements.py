# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""NVIDIA_REQUIRE_*: does an image run on this driver and these GPUs?

The rules are those of libnvidia-container (``src/cli/dsl.c``, ``configure.c``), which enforces them only in the legacy
mode of the NVIDIA Container Toolkit; in its default mode since 1.18 nothing does.

    value := group (" " group)*      any true group satisfies
    group := term ("," term)*        all terms must be true
    term  := NAME OP VALUE           NAME: cuda driver arch brand; OP: = != < <= > >=
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ._driver_branches import BRANCHES, branch_of_version
from ._errors import FleetError

PREFIX = "NVIDIA_REQUIRE_"
#: Tegra only; the toolkit keeps it apart from the others.
_JETPACK = "NVIDIA_REQUIRE_JETPACK"
#: What Go's strconv.ParseBool takes for true.
GO_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
#: In the order in which libnvidia-container tries them: an operator counts when it is the beginning of one of these.
_OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
#: NVML brands that libnvidia-container (``driver.c``) knows by name; all others, H100 and H200 among them, are "Unknown".
_BRANDS = ("quadro", "tesla", "nvs", "grid", "geforce", "titan")
#: EXPR_MAX of libnvidia-container: a term that fails must fit into the buffer of the message.
_TERM_MAX = 128

#: Brand as nvidia-smi prints it and compute capability (``9.0``) of a GPU; None or a text that is no version = unknown.
GpuKind = t.Tuple[t.Optional[str], t.Optional[str]]


class InvalidExpressionError(ValueError):
    """The image carries a requirement that libnvidia-container would refuse as malformed."""


@dataclass(frozen=True)
class RequirementVerdict:
    """Whether an image may run.

    Attributes:
        ok: The requirement is met, switched off, or cannot be judged because nothing is known of the driver.
        expression: The failed variable's value; for a met requirement all values joined with " and ".
        message: One sentence for a person; empty when ``ok``.
        smallest_branch: The oldest known driver branch newer than the host's that would do, or None.
        reason: ``requirement`` or ``invalid_requirement``; empty when ``ok``.
    """

    ok: bool
    expression: str = ""
    message: str = ""
    smallest_branch: t.Optional[str] = None
    reason: str = ""


@dataclass(frozen=True)
class _Facts:
    driver: str
    cuda: str
    arch: str
    brand: str


def compare_versions(actual: str, operator: str, expected: str) -> bool:
    """Component by component as numbers; trailing zero components do not count, a longer version is the greater one."""
    have, want = _components(actual), _components(expected)
    return {
        "=": have == want,
        "!=": have != want,
        "<": have < want,
        "<=": have <= want,
        ">": have > want,
        ">=": have >= want,
    }[operator]


def _components(version: str) -> t.Tuple[int, ...]:
    parts = [int(part or 0) for part in version.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _is_version(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9.]+", text))


def _term(term: str, facts: _Facts) -> bool:
    match = re.fullmatch(r"([^=!<>]*)([=!<>]*)(.*)", term, re.DOTALL)
    # The pattern matches any text; the parts may be empty.
    name, given, value = match.groups() if match else ("", "", "")
    operator = next((known for known in _OPERATORS if given and known.startswith(given)), "")
    name = name.lower()
    if name not in ("cuda", "driver", "arch", "brand") or not operator or not value:
        raise InvalidExpressionError(term)
    if name == "brand":
        if operator not in ("=", "!="):
            raise InvalidExpressionError(term)
        # No visible device: taken as true.
        result = not facts.brand or (facts.brand == value.lower()) is (operator == "=")
    else:
        actual = {"cuda": facts.cuda, "driver": facts.driver, "arch": facts.arch}[name]
        if not _is_version(value):
            raise InvalidExpressionError(term)
        result = not _is_version(actual) or compare_versions(actual, operator, value)
    if not result and len(term) >= _TERM_MAX:
        raise InvalidExpressionError(term)
    return result


def _value(expression: str, facts: _Facts) -> bool:
    result = True
    for group in expression.split(" "):
        terms = [term for term in group.split(",") if term]
        if not terms:
            continue
        # all() stops at the first false term and the loop at the first true group, as the original does:
        # what stands behind is never read, and so cannot be invalid.
        result = all(_term(term, facts) for term in terms)
        if result:
            return True
    return result


def _brand(name: t.Optional[str]) -> str:
    if not name:
        return ""
    return name.lower() if name.lower() in _BRANDS else "unknown"


def _all_facts(driver: str, cuda: str, gpus: t.Sequence[GpuKind]) -> t.List[_Facts]:
    if not gpus:
        return [_Facts(driver, cuda, "", "")]
    return [_Facts(driver, cuda, arch or "", _brand(brand)) for brand, arch in gpus]


def satisfied(expression: str, driver: str, cuda: str, gpus: t.Sequence[GpuKind] = ()) -> bool:
    """Evaluate the value of one NVIDIA_REQUIRE_* variable for every GPU.

    Args:
        driver: Version of the loaded driver, empty when unknown.
        cuda: CUDA version of that driver, empty when unknown.

    Raises:
        InvalidExpressionError: When evaluation reaches a malformed term.
    """
    return all(_value(expression, facts) for facts in _all_facts(driver, cuda, gpus))


def requirements_of(environment: t.Mapping[str, str]) -> t.List[str]:
    """Values of all requirements in an image's environment, all of which must be met; empty when switched off.

    Images that have CUDA_VERSION but no NVIDIA_REQUIRE_CUDA count as ``cuda>=major.minor``
    (nvidia-container-toolkit ``internal/config/image/cuda_image.go``).
    """
    if environment.get("NVIDIA_DISABLE_REQUIRE") in GO_TRUE:
        return []
    values = [value for name, value in environment.items() if name.startswith(PREFIX) and not name.startswith(_JETPACK)]
    if PREFIX + "CUDA" not in environment:
        match = re.match(r"(\d+)(?:\.(\d+))?", environment.get("CUDA_VERSION", ""))
        if match:
            values.append("cuda>=%s.%s" % (match.group(1), match.group(2) or "0"))
    return values


def _all_satisfied(values: t.Sequence[str], driver: str, cuda: str, gpus: t.Sequence[GpuKind]) -> bool:
    try:
        return all(satisfied(value, driver, cuda, gpus) for value in values)
    except InvalidExpressionError:
        return False


def _branches_that_do(values: t.Sequence[str], driver: str, gpus: t.Sequence[GpuKind]) -> t.Tuple[t.List[str], bool]:
    """Known branches newer than the driver's that satisfy, oldest first, and whether all behind the first one do."""
    host = branch_of_version(driver)
    newer = [branch for branch in BRANCHES if branch.cuda and (not host or branch.number > int(host))]
    # A point release: "driver<=555" is false for every real 555 driver.
    good = [branch.name for branch in newer if _all_satisfied(values, "%s.1" % branch.name, _text(branch.cuda), gpus)]
    behind = [branch.name for branch in newer if good and branch.number >= int(good[0])]
    return good, good == behind


def _text(value: t.Optional[str]) -> str:
    return value or ""


def evaluate(
    environment: t.Mapping[str, str],
    driver_version: t.Optional[str],
    cuda_version: t.Optional[str],
    gpus: t.Sequence[GpuKind] = (),
    *,
    image: str = "The image",
    host_name: str = "this host",
) -> RequirementVerdict:
    """Judge an image by the environment in its configuration.

    Args:
        environment: Env of the image.
        driver_version: Version of the loaded driver; None when no driver is loaded.
        cuda_version: CUDA version of that driver as nvidia-smi prints it.
        gpus: Brand and compute capability of each GPU the container will see.
        image: Subject of the message.
        host_name: Name of the host for the message.
    """
    driver, cuda = _text(driver_version), _text(cuda_version)
    values = requirements_of(environment)
    for value in values:
        try:
            if satisfied(value, driver, cuda, gpus):
                continue
        except InvalidExpressionError as error:
            return RequirementVerdict(
                False,
                value,
                "%s carries a malformed requirement (%r in its NVIDIA_REQUIRE_* environment), which the NVIDIA Container "
                "Toolkit refuses; use another tag, or set NVIDIA_DISABLE_REQUIRE=1 in its environment if you know that "
                "it runs." % (image, str(error)[:_TERM_MAX]),
                None,
                "invalid_requirement",
            )
        good, or_newer = _branches_that_do(values, driver, gpus)
        first = next((group for group in value.split(" ") if group.strip(",")), value)
        runs = "%s runs %s%s" % (host_name, driver or "an unknown driver", " (CUDA %s)" % cuda if cuda else "")
        if good:
            needs = "needs a driver of branch %s%s" % (good[0], " or newer" if or_newer else "")
            remedy = "set nvidia_driver_branch to %r or use an older image" % good[0]
        else:
            needs = "needs a driver or GPU that no known driver branch would provide"
            remedy = "use another image"
        return RequirementVerdict(
            False,
            value,
            "%s requires %s, which %s; %s: %s." % (image, first, needs, runs, remedy),
            good[0] if good else None,
            "requirement",
        )
    return RequirementVerdict(True, " and ".join(values))


def check(verdict: RequirementVerdict, **facts: t.Any) -> None:
    """Turn a negative verdict into an error.

    Raises:
        FleetError: ``requirement`` or ``invalid_requirement``.
    """
    if not verdict.ok:
        raise FleetError(
            verdict.reason,
            verdict.message,
            requirement=verdict.expression[:500],
            smallest_branch=verdict.smallest_branch,
            **facts,
        )
