# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Why a TLS connection with a registry failed, with who signed its certificate: that is what names a TLS inspector."""

from __future__ import annotations

import ssl
import typing as t
import urllib.parse

from ._errors import FleetError

#: Where the Docker Engine looks for the CA of a registry, beside the system's store.
CERTIFICATES = "/etc/docker/certs.d"
_CA_REMEDY = (
    "put the CA certificate in PEM form into /usr/local/share/ca-certificates/NAME.crt and run update-ca-certificates "
    "(RHEL: /etc/pki/ca-trust/source/anchors/, update-ca-trust), then restart Docker, or for this registry alone into "
    "%s/%s/ca.crt"
)


def tls_error(error: ssl.SSLError, host: str, name: str, facts: t.Dict[str, t.Any]) -> FleetError:
    problem = getattr(error, "verify_message", "") or error.reason or str(error)
    facts["tls_problem"] = problem
    if "expired" in problem or "not yet valid" in problem:
        remedy = "check the clock of this host (timedatectl); if it is right, the certificate has to be renewed"
    elif "ostname" in problem or "IP address" in problem:
        remedy = "use the name that stands in the certificate"
    elif isinstance(error, ssl.SSLCertVerificationError):
        issuer = _issuer(host)
        if issuer:
            facts["issuer"] = issuer
            problem += ", issued by %r" % issuer
        remedy = _CA_REMEDY % (CERTIFICATES, host)
    else:
        remedy = "check that the server speaks TLS on this port; a registry without TLS must be in Docker's insecure-registries"
    return FleetError(
        "tls_error", "TLS with %s failed (asked for %s): %s; %s." % (host, name, problem, remedy), **facts
    )


def _issuer(host: str) -> str:
    """Common name (or organisation) of who issued a server's certificate, which is what names a TLS inspector."""
    parts = urllib.parse.urlsplit("//" + host)
    try:
        pem = ssl.get_server_certificate((parts.hostname or "", parts.port or 443))
        return issuer_name(ssl.PEM_cert_to_DER_cert(pem))
    except (OSError, ValueError, IndexError):
        return ""


def issuer_name(der: bytes) -> str:
    """Common name of the issuer in a DER certificate, else its organisation, else empty (X.509: RFC 5280)."""

    def read(position: int) -> t.Tuple[int, int, int]:
        """Tag, start and end of the value at a position."""
        tag, length = der[position], der[position + 1]
        position += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(der[position : position + size], "big")
            position += size
        return tag, position, position + length

    _tag, start, _end = read(0)
    _tag, position, _end = read(start)
    tag, _start, end = read(position)
    if tag == 0xA0:
        # Optional version; the serial number follows.
        _tag, _start, end = read(end)
    _tag, _start, end = read(end)
    _tag, start, end = read(end)
    issuer = der[start:end]
    # 2.5.4.3 common name, 2.5.4.10 organisation, each followed by a string.
    for identifier in (b"\x06\x03\x55\x04\x03", b"\x06\x03\x55\x04\x0a"):
        at = issuer.find(identifier)
        if at >= 0:
            at += len(identifier)
            return issuer[at + 2 : at + 2 + issuer[at + 1]].decode("utf-8", "replace")
    return ""
