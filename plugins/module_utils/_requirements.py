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

from ._driver_branches import BRANCHES, FIRST_INSTALLABLE, Branch, branch_of_version, branch_supports
from ._errors import FleetError
from ._untrusted import GO_TRUE

PREFIX = "NVIDIA_REQUIRE_"
#: Tegra only; the toolkit keeps it apart from the others.
_JETPACK = "NVIDIA_REQUIRE_JETPACK"
#: In the order in which libnvidia-container tries them: an operator counts when it is the beginning of one of these.
_OPERATORS = ("=", "!=", "<", "<=", ">", ">=")
#: NVML brands that libnvidia-container (``driver.c``) knows by name; all others, H100 and H200 among them, are "Unknown".
_BRANDS = ("quadro", "tesla", "nvs", "grid", "geforce", "titan")
#: EXPR_MAX of libnvidia-container: a term that fails must fit as "name operator value" into a buffer of so many bytes.
_TERM_MAX = 128
#: UINTMAX_MAX: a component that is not less is malformed.
_COMPONENT_MAX = 2**64 - 1

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
        smallest_branch: The oldest known driver branch newer than the host's that would do (else the newest older one), or None.
        reason: ``requirement`` or ``invalid_requirement``; empty when ``ok``.
    """

    ok: bool
    expression: str = ""
    message: str = ""
    smallest_branch: t.Optional[str] = None
    reason: str = ""


@dataclass(frozen=True)
class _Facts:
    """Of the driver and one GPU; empty = not known."""

    driver: str
    cuda: str
    arch: str
    brand: str
    visible: bool


def compare_versions(actual: str, operator: str, expected: str) -> bool:
    """Component by component as numbers; trailing zero components do not count, a longer version is the greater one.

    Raises:
        ValueError: When comparing reaches something that is no version.
    """
    order = _order(actual, expected)
    return {
        "=": order == 0,
        "!=": order != 0,
        "<": order < 0,
        "<=": order <= 0,
        ">": order > 0,
        ">=": order >= 0,
    }[operator]


def _order(left: str, right: str) -> int:
    """Negative, zero or positive as ``left`` is less, equal or greater; the first difference decides."""
    if not (_is_version(left) and _is_version(right)):
        raise ValueError("%s or %s is no version" % (left, right))
    while left and right:
        first, left = _component(left)
        second, right = _component(right)
        if first != second:
            return -1 if first < second else 1
    return len(left.lstrip(".0")) - len(right.lstrip(".0"))


def _component(version: str) -> t.Tuple[int, str]:
    """The number at the beginning, and what is behind the dots that follow it."""
    rest = version.lstrip("0123456789")
    digits = version[: len(version) - len(rest)]
    # Before int(), which has a limit of its own.
    if not digits or len(digits.lstrip("0")) > len(str(_COMPONENT_MAX)) or int(digits) >= _COMPONENT_MAX:
        raise ValueError("%s is no version" % version[:50])
    return int(digits), rest.lstrip(".")


def _is_version(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9.]+", text))


def _lower(text: str) -> str:
    """Lower case of the letters A to Z alone, as strcasecmp() compares."""
    return re.sub("[A-Z]+", lambda match: match.group().lower(), text)


def _term(term: str, facts: _Facts) -> bool:
    match = re.fullmatch(r"([^=!<>]*)([=!<>]*)(.*)", term, re.DOTALL)
    # The pattern matches any text; the parts may be empty.
    name, given, value = match.groups() if match else ("", "", "")
    operator = next((entry for entry in _OPERATORS if given and entry.startswith(given)), "")
    rule = _lower(name)
    if rule not in ("cuda", "driver", "arch", "brand") or not operator or not value:
        raise InvalidExpressionError(term)
    actual = {"cuda": facts.cuda, "driver": facts.driver, "arch": facts.arch, "brand": facts.brand}[rule]
    if rule == "brand":
        if actual and operator not in ("=", "!="):
            raise InvalidExpressionError(term)
        result = not actual or (actual == _lower(value)) is (operator == "=")
    elif not _is_version(actual) and (rule != "arch" or not facts.visible):
        # What libnvidia-container does not know is true, and the value is not looked at.
        result = True
    else:
        try:
            known = _is_version(actual)
            result = compare_versions(actual if known else "0", operator, value) or not known
        except ValueError:
            raise InvalidExpressionError(term) from None
    if not result and len(("%s %s %s" % (name, operator, value)).encode("utf-8", "surrogateescape")) >= _TERM_MAX:
        raise InvalidExpressionError(term)
    return result


def _value(expression: str, facts: _Facts) -> bool:
    result = True
    for group in expression.split(" "):
        if not group:
            continue
        for term in group.split(","):
            if term:
                result = _term(term, facts)
                if not result:
                    break
        else:
            # What stands behind is never read, and so cannot be invalid. A group of commas alone ends it too, with the
            # outcome of the group before.
            return result
    return result


def _brand(name: t.Optional[str]) -> str:
    if not name:
        return ""
    return _lower(name) if _lower(name) in _BRANDS else "unknown"


def _all_facts(driver: str, cuda: str, gpus: t.Sequence[GpuKind]) -> t.List[_Facts]:
    if not gpus:
        return [_Facts(driver, cuda, "", "", False)]
    return [_Facts(driver, cuda, arch or "", _brand(brand), True) for brand, arch in gpus]


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

    Images that have CUDA_VERSION but no NVIDIA_REQUIRE_CUDA, or an empty one, count as ``cuda>=major.minor``
    (nvidia-container-toolkit ``internal/config/image/cuda_image.go``). A CUDA_VERSION that is no version says nothing.
    """
    if environment.get("NVIDIA_DISABLE_REQUIRE") in GO_TRUE:
        return []
    values = [value for name, value in environment.items() if name.startswith(PREFIX) and not name.startswith(_JETPACK)]
    if not environment.get(PREFIX + "CUDA"):
        match = re.match(r"v?([0-9]+)(?:\.([0-9]+))?(?![0-9])", environment.get("CUDA_VERSION", ""))
        if match:
            values.append("cuda>=%s.%s" % (match.group(1), match.group(2) or "0"))
    return values


def _all_satisfied(values: t.Sequence[str], driver: str, cuda: str, gpus: t.Sequence[GpuKind]) -> bool:
    try:
        return all(satisfied(value, driver, cuda, gpus) for value in values)
    except InvalidExpressionError:
        return False


@dataclass(frozen=True)
class _Remedy:
    """Which driver would do: ``needs`` is what to say, ``branch`` the smallest one, ``install`` the one to ask for."""

    needs: str
    branch: t.Optional[str] = None
    install: t.Optional[str] = None


def _remedy(
    values: t.Sequence[str], driver: str, cuda: str, gpus: t.Sequence[GpuKind], architectures: t.Sequence[str]
) -> _Remedy:
    """Look for known driver branches that satisfy all requirements and support the GPUs; newer ones come first."""
    number = int(branch_of_version(driver) or "0")

    def does(branch: Branch) -> bool:
        # A point release: "driver<=555" is false for every real 555 driver.
        return _all_satisfied(values, "%s.1" % branch.name, branch.cuda, gpus)

    known = [branch for branch in BRANCHES if branch.cuda and branch_supports(branch.number, architectures)]
    # A later release of the host's own branch may be all that is missing: "driver>=535.183".
    if number and _all_satisfied(values, "%d.999" % number, cuda, gpus):
        name = str(number)
        return _Remedy("needs a newer release of driver branch %s" % name, name, name)
    newer = [branch for branch in known if branch.number > number]
    good = [branch for branch in newer if does(branch)]
    if good:
        installable = [branch.name for branch in good if branch.number >= FIRST_INSTALLABLE]
        first = good[0]
        or_newer = good == [branch for branch in newer if branch.number >= first.number]
        needs = "needs a driver of branch %s%s" % (first.name, " or newer" if or_newer else "")
        return _Remedy(needs, first.name, installable[0] if installable else None)
    older = [branch for branch in known if branch.number < number and does(branch)]
    if older:
        return _Remedy("needs an older driver, of branch %s" % older[-1].name, older[-1].name)
    if gpus and _all_satisfied(values, driver, cuda, ()):
        return _Remedy("does not allow this GPU (%s) with any driver" % _kinds(gpus))
    wider = [branch for branch in BRANCHES if branch.cuda and branch.number > number and does(branch)]
    if wider:
        return _Remedy(
            "needs a driver of branch %s, which does not support this GPU (%s)"
            % (wider[0].name, ", ".join(sorted(set(architectures))))
        )
    return _Remedy("no driver branch that is known here satisfies")


def _kinds(gpus: t.Sequence[GpuKind]) -> str:
    """``brand tesla, arch 7.5`` in the words of the requirements."""
    return "; ".join(
        sorted({"brand %s%s" % (_brand(brand) or "?", ", arch %s" % arch if arch else "") for brand, arch in gpus})
    )


def _text(value: t.Optional[str]) -> str:
    return value or ""


def evaluate(
    environment: t.Mapping[str, str],
    driver_version: t.Optional[str],
    cuda_version: t.Optional[str],
    gpus: t.Sequence[GpuKind] = (),
    *,
    architectures: t.Sequence[str] = (),
    image: str = "The image",
    host_name: str = "this host",
    runs: str = "",
) -> RequirementVerdict:
    """Judge an image by the environment in its configuration.

    Args:
        environment: Env of the image.
        driver_version: Version of the loaded driver; None when no driver is loaded.
        cuda_version: CUDA version of that driver as nvidia-smi prints it.
        gpus: Brand and compute capability of each GPU the container will see.
        architectures: Names of the GPUs' architectures, so that no branch is named that does not support them.
        image: Subject of the message.
        host_name: Name of the host for the message.
        runs: What the message says of the driver, where it is not the loaded one.
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
        remedy = _remedy(values, driver, cuda, gpus, architectures)
        # Only the first alternative, like the original: images list dozens of older branches behind it.
        first = next((group for group in value.split(" ") if group.strip(",")), value)[:200]
        runs = runs or "%s runs %s%s" % (host_name, driver or "an unknown driver", " (CUDA %s)" % cuda if cuda else "")
        todo = "use another image"
        if remedy.install:
            todo = "set nvidia_driver_branch to %r or use an older image" % remedy.install
        return RequirementVerdict(
            False,
            value,
            "%s requires %s, which %s; %s: %s." % (image, first, remedy.needs, runs, todo),
            remedy.branch,
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
