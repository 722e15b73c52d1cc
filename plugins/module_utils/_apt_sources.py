# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Text of apt's source files, one-line and deb822: which archives and components they name."""

from __future__ import annotations

import re
import typing as t

from ._host import Host
from ._os_release import OsRelease
from ._packages import Repository


def without_repository(path: str, text: str, repository: Repository) -> str:
    """An apt source file with all entries of one repository taken out (``.list``: lines, ``.sources``: stanzas)."""

    def same(url: str, suite: str) -> bool:
        url = re.sub(r"\$\(ARCH\)", "*", url.rstrip("/"))
        pattern = re.escape(url).replace(r"\*", "[a-z0-9]+") + r"\Z"
        return re.match(pattern, repository.url) is not None and suite.rstrip("/") == repository.suite.rstrip("/")

    if path.endswith(".sources"):
        stanzas = re.split(r"\n[ \t]*\n", text)
        kept = []
        for stanza in stanzas:
            fields = {
                name.lower(): value.strip()
                for name, dummy, value in (
                    line.partition(":") for line in stanza.splitlines() if not line.startswith(("#", " ", "\t"))
                )
            }
            enabled = fields.get("enabled", "yes").lower() != "no"
            urls, suites = fields.get("uris", "").split(), fields.get("suites", "").split()
            if enabled and any(same(url, suite) for url in urls for suite in suites):
                continue
            kept.append(stanza)
        if len(kept) == len(stanzas):
            return text
        if not any(re.search(r"(?im)^types:", stanza) for stanza in kept):
            return ""
        return "\n\n".join(kept).rstrip("\n") + "\n"
    lines = text.splitlines(True)
    kept = []
    for line in lines:
        found = re.match(r"\s*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?(\S+)\s+(\S+)", line)
        if not (found and same(found.group(1), found.group(2))):
            kept.append(line)
    if len(kept) == len(lines):
        return text
    if path != "/etc/apt/sources.list" and all(not line.strip() or line.lstrip().startswith("#") for line in kept):
        return ""
    return "".join(kept)


def apt_components(host: Host, os_release: OsRelease) -> frozenset[str]:
    """Components that some enabled apt source has for this release."""
    found: set[str] = set()
    for path, text in _apt_sources(host):
        if path.endswith(".sources"):
            for fields in _stanzas(text):
                if os_release.codename in fields.get("suites", "").split():
                    found.update(fields.get("components", "").split())
        else:
            for line in text.splitlines():
                match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s*)?\S+\s+(\S+)\s+(.*)", line)
                if match and match.group(1) == os_release.codename:
                    found.update(match.group(2).split("#")[0].split())
    return frozenset(found)


def _apt_sources(host: Host) -> list[tuple[str, str]]:
    paths = ["/etc/apt/sources.list"]
    paths += ["/etc/apt/sources.list.d/" + name for name in host.list_dir("/etc/apt/sources.list.d")]
    return [(path, host.read_text(path) or "") for path in paths if path.endswith((".list", ".sources"))]


def _stanzas(text: str) -> list[dict[str, str]]:
    """Enabled stanzas of a deb822 source file with lower-case field names."""
    stanzas = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += " " + line.strip()
            elif ":" in line:
                name, dummy, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("types") and fields.get("enabled", "yes").lower() != "no" and "deb" in fields["types"].split():
            stanzas.append(fields)
    return stanzas


def debian_source(host: Host, os_release: OsRelease, components: t.Sequence[str]) -> str:
    """A source for more components of the archive the host already uses: same URL, same key.

    apt refuses two definitions of one archive with different keys, so the existing one is copied.
    """
    url, signed_by = "http://deb.debian.org/debian", "/usr/share/keyrings/debian-archive-keyring.gpg"
    for path, text in _apt_sources(host):
        if path.endswith(".sources"):
            for fields in _stanzas(text):
                if os_release.codename in fields.get("suites", "").split() and fields.get("uris"):
                    url, signed_by = fields["uris"].split()[0], fields.get("signed-by", "")
                    break
        else:
            match = re.search(
                r"^\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+%s\s" % re.escape(os_release.codename), text, re.MULTILINE
            )
            if match:
                option = re.search(r"signed-by=(\S+)", match.group(1) or "")
                url, signed_by = match.group(2), option.group(1) if option else ""
    lines = [
        "# Managed by gpu_fleet.nim.",
        "Types: deb",
        "URIs: %s" % url,
        "Suites: %s" % os_release.codename,
        "Components: %s" % " ".join(components),
    ]
    if signed_by:
        lines.append("Signed-By: %s" % signed_by)
    return "\n".join(lines) + "\n"
