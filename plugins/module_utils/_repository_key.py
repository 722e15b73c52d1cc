# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The key that signs a package repository: downloaded, and brought into the form that apt takes."""

from __future__ import annotations

import base64
import binascii
import re
import typing as t

from ._errors import FleetError

#: Seconds for the download of a repository key.
KEY_TIMEOUT = 30


def download(url: str) -> bytes:
    """Content of a URL, trusting what the host's own trust store trusts.

    Raises:
        FleetError: ``repository_unreachable`` with the cause.
    """
    # Here: looks do without it, and loading it takes longer than most of them.
    import ssl
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "gpu_fleet.nim"})  # noqa: S310 (scheme: check_url)
    try:
        opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
        with opener.open(request, timeout=KEY_TIMEOUT) as answer:
            return t.cast(bytes, answer.read())
    except urllib.error.HTTPError as error:
        raise FleetError(
            "repository_unreachable",
            "Downloading %s failed: HTTP status %d %s. Check the repository URL." % (url, error.code, error.reason),
            url=url,
        ) from error
    except (OSError, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise FleetError(
            "repository_unreachable",
            "Downloading %s failed: %s. Check the repository URL, the proxy, and for a private authority the host's "
            "trust store." % (url, cause),
            url=url,
        ) from error


def is_binary_key(content: t.Optional[bytes]) -> bool:
    """Whether bytes start like an OpenPGP public key packet (tag 6, RFC 9580 section 4.2), old or new format."""
    return content is not None and len(content) > 0 and (content[0] & 0xFC == 0x98 or content[0] == 0xC6)


def dearmor(content: bytes, url: str = "") -> bytes:
    """Binary form of an OpenPGP key, which every version of apt takes without gpg being installed.

    Raises:
        FleetError: ``invalid_key`` when the content is neither armoured nor binary key material.
    """
    if is_binary_key(content):
        return content
    text = content.decode("ascii", "replace").replace("\r\n", "\n")
    blocks = re.findall(r"-----BEGIN PGP PUBLIC KEY BLOCK-----\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", text, re.S)
    result = b""
    for block in blocks:
        # Armour headers contain a colon ("Version: …"), the CRC line starts with "="; neither is base64.
        lines = block.split("\n")
        encoded = "".join(
            line.strip() for line in lines if line.strip() and not line.startswith("=") and ":" not in line
        )
        try:
            result += base64.b64decode(encoded, validate=True)
        except binascii.Error:
            result = b""
            break
    if not is_binary_key(result):
        raise FleetError(
            "invalid_key",
            "%s is not an OpenPGP public key (a proxy or a log-in page may have answered in its place); check the URL."
            % (url or "The downloaded key"),
            url=url,
        )
    return result
