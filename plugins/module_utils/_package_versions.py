# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Versions of packages: their order as dpkg and rpm see it, their upstream part, what a wanted version matches."""

from __future__ import annotations

import re
import typing as t

from ._untrusted import whole_number

#: Name, version, architecture and state of everything that dpkg knows.
DPKG_QUERY = ("dpkg-query", "-W", "-f=${Package}\\t${Version}\\t${Architecture}\\t${db:Status-Abbrev}\\n")


def _debian_order(char: str) -> int:
    if char == "~":
        return -1
    if char.isalpha():
        return ord(char)
    return ord(char) + 256


def _numeral(digits: str) -> t.Tuple[int, str]:
    """A run of digits as something that compares like its number; int() refuses thousands of them."""
    stripped = digits.lstrip("0")
    return len(stripped), stripped


def _cut(pattern: str, text: str) -> t.Tuple[str, str]:
    """The start of a text that matches a pattern, and the rest."""
    found = re.match(pattern, text)
    end = found.end() if found else 0
    return text[:end], text[end:]


def _compare_debian_part(left: str, right: str) -> int:
    """Section "Version" of Debian Policy: alternate non-digit and digit runs; ``~`` sorts before the end."""
    while left or right:
        plain_left, left = _cut(r"[^0-9]*", left)
        plain_right, right = _cut(r"[^0-9]*", right)
        for index in range(max(len(plain_left), len(plain_right))):
            order_left = _debian_order(plain_left[index]) if index < len(plain_left) else 0
            order_right = _debian_order(plain_right[index]) if index < len(plain_right) else 0
            if order_left != order_right:
                return -1 if order_left < order_right else 1
        digits_left, left = _cut(r"[0-9]*", left)
        digits_right, right = _cut(r"[0-9]*", right)
        number_left, number_right = _numeral(digits_left), _numeral(digits_right)
        if number_left != number_right:
            return -1 if number_left < number_right else 1
    return 0


def _split_debian(version: str) -> t.Tuple[int, str, str]:
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, dash, revision = rest.rpartition("-")
    if not dash:
        upstream, revision = rest, ""
    return whole_number(epoch), upstream, revision


def compare_debian(left: str, right: str) -> int:
    """-1, 0 or 1 as ``dpkg --compare-versions`` orders two versions."""
    epoch_left, upstream_left, revision_left = _split_debian(left)
    epoch_right, upstream_right, revision_right = _split_debian(right)
    if epoch_left != epoch_right:
        return -1 if epoch_left < epoch_right else 1
    return _compare_debian_part(upstream_left, upstream_right) or _compare_debian_part(revision_left, revision_right)


def _compare_rpm_part(left: str, right: str) -> int:
    """rpmvercmp: segments of digits or letters; ``~`` before everything, ``^`` after the end, digits beat letters."""
    tokens = re.compile(r"~|\^|[0-9]+|[A-Za-z]+")
    found_left, found_right = tokens.findall(left), tokens.findall(right)
    for index in range(max(len(found_left), len(found_right))):
        one = found_left[index] if index < len(found_left) else ""
        two = found_right[index] if index < len(found_right) else ""
        if one == two:
            continue
        if "~" in (one, two):
            return -1 if one == "~" else 1
        if "^" in (one, two):
            if not one or not two:
                return 1 if one else -1
            return -1 if one == "^" else 1
        if not one or not two:
            return -1 if not one else 1
        if one.isdigit() != two.isdigit():
            return 1 if one.isdigit() else -1
        if one.isdigit():
            if _numeral(one) != _numeral(two):
                return -1 if _numeral(one) < _numeral(two) else 1
            continue
        return -1 if one < two else 1
    return 0


def compare_rpm(left: str, right: str) -> int:
    """-1, 0 or 1 as rpm orders ``[epoch:]version[-release]``; a missing release matches any."""
    epoch_left, upstream_left, revision_left = _split_debian(left)
    epoch_right, upstream_right, revision_right = _split_debian(right)
    if epoch_left != epoch_right:
        return -1 if epoch_left < epoch_right else 1
    found = _compare_rpm_part(upstream_left, upstream_right)
    if found or not revision_left or not revision_right:
        return found
    return _compare_rpm_part(revision_left, revision_right)


def upstream_version(version: str) -> str:
    """Upstream part of a package version: ``5:28.3.3-1~debian.12`` -> ``28.3.3``, ``26.1.5+dfsg1-9`` -> ``26.1.5``."""
    upstream = _split_debian(version)[1]
    found = re.match(r"\d+(\.\d+)*", upstream)
    return found.group() if found else upstream


def matches_version(version: str, wanted: str) -> bool:
    """Whether a package version is the wanted one.

    ``wanted`` may be a full package version (``1.17.4-1``), an upstream version (``1.17.4``), its leading components
    (``1.17`` or ``580``), or empty, which any version matches.
    """
    if not wanted or version == wanted:
        return True
    upstream = upstream_version(version)
    without_epoch = version.partition(":")[2] if ":" in version else version
    return without_epoch == wanted or upstream == wanted or upstream.startswith(wanted + ".")
