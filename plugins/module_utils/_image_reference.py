# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Image references, read with the grammar of github.com/distribution/reference (what the Docker Engine uses)."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, replace

from ._errors import FleetError
from ._redaction import scrub

DOCKER_HUB = "docker.io"

_DOMAIN_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = r"(?:%s(?:\.%s)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?" % (_DOMAIN_COMPONENT, _DOMAIN_COMPONENT)
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = r"%s(?:/%s)*" % (_PATH_COMPONENT, _PATH_COMPONENT)
_REGISTRY_RE = re.compile(_DOMAIN)
_PATH_RE = re.compile(_PATH)
_PREFIX_RE = re.compile(r"(?P<registry>%s)(?:/(?P<path>%s))?" % (_DOMAIN, _PATH))
_TAG_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST_RE = re.compile(r"sha256:[0-9a-f]{64}")
#: Limit of the grammar for registry and path together.
_NAME_MAX = 255


def _bad(option: str, value: t.Any, what: str, remedy: str) -> FleetError:
    return FleetError("invalid_option", "%s = %s: %s; %s." % (option, _shown(value), what, remedy))


def _shown(value: t.Any) -> str:
    """What was given, but where an @ says that it may begin with a user name and a password."""
    text = repr(value)
    return "(not shown)" if re.search(r"@(?!sha256:)", text) else scrub(text)


def _scheme(text: str) -> str:
    """What stands before ``://``, where it is one and no password."""
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)", text)
    return scrub(found.group(0)) if found else "the scheme"


@dataclass(frozen=True)
class ImageReference:
    """A normalised image reference: the registry is always named, and so is a tag or a digest.

    Attributes:
        registry: Host with optional port, for example ``nvcr.io``.
        repository: Path inside the registry, for example ``nim/meta/llama-3.1-8b-instruct``.
        tag: Tag, or None when only a digest is given.
        digest: ``sha256:…``, or None.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: t.Any, option: str = "image") -> ImageReference:
        """Read a reference as a user writes it.

        As in Docker, a name without registry belongs to Docker Hub and a name without tag and digest means ``latest``.

        Args:
            option: Name of the variable, for the message.

        Raises:
            FleetError: ``invalid_option`` when it is malformed.
        """
        example = "write it like nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
        if not isinstance(text, str) or not text:
            raise _bad(option, text, "not an image reference", example)
        if "://" in text:
            raise _bad(option, text, "an image reference has no scheme", "leave %s out" % _scheme(text))
        if re.search(r"\s", text):
            raise _bad(option, text, "there is white space in the image reference", example)

        rest, separator, digest = text.partition("@")
        if separator and not _DIGEST_RE.fullmatch(digest):
            raise _bad(option, text, "what follows the @ is not a digest", "use sha256: and 64 lower-case hex digits")
        name, tag = rest, None
        if ":" in rest.rsplit("/", 1)[-1]:
            name, tag = rest.rsplit(":", 1)
            if not _TAG_RE.fullmatch(tag):
                raise _bad(
                    option,
                    text,
                    "%s is not a tag" % _shown(tag),
                    "a tag has up to 128 letters, digits, '_', '.' and '-' and begins with a letter, digit or '_'",
                )
        first, slash, path = name.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
            registry, repository = first, path
            if not _REGISTRY_RE.fullmatch(registry) or not port_exists(registry):
                what = "%s is not a registry host" % _shown(registry)
                raise _bad(option, text, what, "use a host name with optional port")
        else:
            registry, repository = DOCKER_HUB, name
        if registry == "index.docker.io":
            registry = DOCKER_HUB
        if registry == DOCKER_HUB and "/" not in repository:
            repository = "library/" + repository
        if not _PATH_RE.fullmatch(repository):
            what = "the repository %s is malformed" % _shown(path) if slash else "the repository is malformed"
            remedy = (
                "repository names are lower case"
                if repository.lower() != repository and _PATH_RE.fullmatch(repository.lower())
                else example
            )
            raise _bad(option, text, what, remedy)
        if len(registry) + 1 + len(repository) > _NAME_MAX:
            raise _bad(option, text, "registry and repository exceed %d characters" % _NAME_MAX, "use a shorter name")
        if tag is None and not digest:
            tag = "latest"
        return cls(registry, repository, tag, digest or None)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return "%s/%s" % (self.registry, self.repository)

    @property
    def short(self) -> str:
        """For progress lines: the repository without its registry."""
        return self.repository

    def with_digest(self, digest: str) -> ImageReference:
        """The same image pinned to a digest; the tag is dropped, since the digest alone decides."""
        if not _DIGEST_RE.fullmatch(digest):
            raise _bad("digest", digest, "not a digest", "use sha256: and 64 lower-case hex digits")
        return replace(self, tag=None, digest=digest)

    def rewritten(self, mirrors: t.Mapping[str, str] | None) -> ImageReference:
        """The place the image is really fetched from.

        Args:
            mirrors: As checked by :func:`check_mirrors`: a registry, or a registry with leading path components ->
                the registry and path that stand for it. The longest match wins.
        """
        best = ""
        for source in mirrors or {}:
            if (self.name == source or self.name.startswith(source + "/")) and len(source) > len(best):
                best = source
        if not best:
            return self
        target = (mirrors or {})[best].rstrip("/")
        registry, _slash, path = (target + self.name[len(best) :]).partition("/")
        return replace(self, registry=registry, repository=path)

    def __str__(self) -> str:
        text = self.name
        if self.tag:
            text += ":" + self.tag
        if self.digest:
            text += "@" + self.digest
        return text


def port_exists(registry: str) -> bool:
    """Whether the port of a registry, with or without a path behind it, is one that there is; true where none is named."""
    port = re.search(r":(\d+)(?:/|\Z)", registry)
    return port is None or (len(port.group(1)) < 6 and 0 < int(port.group(1)) < 65536)


def check_mirrors(mirrors: t.Any, option: str = "registry_mirrors") -> dict[str, str]:
    """Check a mapping of registries to their mirrors, for example ``{"nvcr.io": "mirror.example:5000/ngc"}``.

    Raises:
        FleetError: ``invalid_option`` with the entry that is wrong.
    """
    if mirrors in (None, ""):
        return {}
    if not isinstance(mirrors, dict):
        raise _bad(option, mirrors, "not a dictionary", "write {'nvcr.io': 'mirror.example:5000/ngc'}")
    checked: dict[str, str] = {}
    for source, target in mirrors.items():
        for text in (source, target):
            where = "%s[%s]" % (option, _shown(source))
            if isinstance(text, str) and "://" in text:
                raise _bad(where, target, "a registry has no scheme", "leave %s out" % _scheme(text))
            if not isinstance(text, str) or not _PREFIX_RE.fullmatch(text.rstrip("/")) or not port_exists(text):
                raise _bad(
                    where,
                    target,
                    "%s is not a registry host with optional port and path" % _shown(text),
                    "write it like mirror.example:5000/ngc",
                )
        checked[source.rstrip("/")] = target.rstrip("/")
    return checked
