# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What an operator may say about a gateway, checked: servers, backends, keys, certificates, limits."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._nim_models import parse_size

_HOST_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_BACKEND_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}\Z")
_KEY = re.compile(r"[\x21-\x7e]{16,512}\Z")
_HASHED_KEY = re.compile(r"sha256:([0-9A-Fa-f]{64})\Z")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
_API_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@+-]{0,199}\Z")
_PATH = re.compile(r"/[A-Za-z0-9_./+@-]+\Z")


@dataclass(frozen=True)
class Server:
    """One NIM of the fleet as the gateway sees it.

    Attributes:
        host: The GPU host as the inventory names it.
        model: Its name in ``nim_models``.
        address: IP address or host name at which the gateway reaches it.
        served: Names by which clients ask for it, the ``model`` of a request.
    """

    host: str
    model: str
    address: str
    port: int
    served: t.Tuple[str, ...]

    @property
    def name(self) -> str:
        return server_name(self.host, self.model)


@dataclass(frozen=True)
class Backend:
    """The servers that answer for the same names."""

    name: str
    served: t.Tuple[str, ...]
    servers: t.Tuple[Server, ...]


@dataclass(frozen=True)
class Layout:
    """Where things are on the gateway."""

    configuration: str = "/etc/haproxy/haproxy.cfg"
    #: The configuration that was there before ours.
    former: str = "/etc/haproxy/haproxy.cfg.before-nim-gateway"
    directory: str = "/etc/haproxy/nim"
    socket: str = "/run/haproxy/admin.sock"
    #: Where the units of Debian and Ubuntu have it.
    master_socket: str = "/run/haproxy-master.sock"
    state_file: str = "/var/lib/haproxy/nim-server-state"
    chroot: str = "/var/lib/haproxy"

    def file(self, name: str) -> str:
        return "%s/%s" % (self.directory, name)

    @property
    def models_map(self) -> str:
        return self.file("models.map")

    @property
    def models_json(self) -> str:
        return self.file("models.json")

    @property
    def keys(self) -> str:
        return self.file("keys.map")

    @property
    def certificate(self) -> str:
        return self.file("tls.pem")

    @property
    def servers(self) -> str:
        return self.file("servers")


@dataclass(frozen=True)
class Settings:
    """What an operator may say about a gateway, checked.

    Attributes:
        body_limit: Bytes of a request's body.
        inactivity_timeout: Seconds without a byte after which a request is given up.
        server_connections: Requests that one server gets at a time; others wait.
        max_connections: Connections of clients at a time.
        keys: Name of a client -> SHA-256 of its key in upper-case hex, as HAProxy's ``hex`` writes it.
        pem: Certificate chain and key, or None.
        certificate_file: Path on the gateway of a file with both, kept by somebody else, or None.
        metrics_port: 0 for no metrics.
    """

    backends: t.Tuple[Backend, ...]
    bind_address: str = "0.0.0.0"  # noqa: S104 - a gateway is meant to be reached
    port: int = 8080
    body_limit: int = 2**20
    inactivity_timeout: int = 600
    slow_start: int = 10
    server_connections: int = 256
    max_connections: int = 4096
    keys: t.Mapping[str, str] = field(default_factory=dict, repr=False)
    pem: t.Optional[str] = field(default=None, repr=False)
    certificate_file: t.Optional[str] = None
    metrics_address: str = "0.0.0.0"  # noqa: S104 - as above
    metrics_port: int = 8405

    @property
    def tls(self) -> bool:
        return self.pem is not None or self.certificate_file is not None


# -- names ----------------------------------------------------------------------------------------


def server_name(host: str, model: str) -> str:
    """Name of a server in HAProxy. The colon can be in neither part, so the host can be read from it."""
    return "%s:%s" % (safe_host(host), model)


def safe_host(host: str) -> str:
    """A host's name in the alphabet that HAProxy allows."""
    return _HOST_UNSAFE.sub("_", host)


def host_of(server: str) -> str:
    """The host's part of a server's name, as :func:`safe_host` wrote it."""
    return server.rpartition(":")[0]


def make_backends(servers: t.Sequence[Server]) -> t.Tuple[Backend, ...]:
    """One backend for each set of servers that the same names ask for.

    Raises:
        FleetError: ``invalid_option`` when two hosts would have the same name in HAProxy.
    """
    hosts: dict[str, str] = {}
    for server in servers:
        if hosts.setdefault(safe_host(server.host), server.host) != server.host:
            raise _invalid(
                "hosts", server.host, "has the same name in HAProxy as %s" % hosts[safe_host(server.host)], "rename one"
            )
    of_name: dict[str, list[Server]] = {}
    for server in servers:
        for name in server.served:
            if server not in of_name.setdefault(name, []):
                of_name[name].append(server)
    names_of: dict[t.Tuple[Server, ...], list[str]] = {}
    for name, found in of_name.items():
        names_of.setdefault(tuple(sorted(found, key=lambda server: server.name)), []).append(name)
    backends: list[Backend] = []
    taken: set[str] = set()
    for members, names in sorted(names_of.items(), key=lambda item: item[1][0]):
        proxy = _BACKEND_UNSAFE.sub("_", names[0])
        if proxy in taken or proxy in ("nim_gateway", "nim_gateway_metrics"):
            proxy = "%s-%s" % (proxy, hashlib.sha256(names[0].encode()).hexdigest()[:8])
        taken.add(proxy)
        backends.append(Backend(proxy, tuple(names), members))
    return tuple(backends)


# -- options --------------------------------------------------------------------------------------


def _invalid(option: str, value: t.Any, problem: str, remedy: str) -> FleetError:
    return FleetError("invalid_option", "%s = %s: %s; %s." % (option, value, problem, remedy), option=option)


def parse_servers(hosts: t.Sequence[t.Mapping[str, t.Any]]) -> t.Tuple[Server, ...]:
    """The servers out of the option ``hosts``.

    Raises:
        FleetError: ``invalid_option``.
    """
    servers: list[Server] = []
    for number, host in enumerate(hosts):
        path = "hosts[%d]" % number
        address = check_address(path + ".address", str(host["address"]))
        if any(server.host == host["name"] for server in servers):
            raise _invalid(path + ".name", host["name"], "is there twice", "name every host once")
        for model in host["models"]:
            at = "%s.models.%s" % (path, model["name"])
            if not str(model["name"]) or _HOST_UNSAFE.search(str(model["name"])):
                raise _invalid(
                    path + ".models",
                    repr(model["name"]),
                    "cannot be the name of a server",
                    "use letters, digits and _.-",
                )
            if not 1 <= int(model["port"]) <= 65535:
                raise _invalid(at + ".port", model["port"], "is out of range", "give a port from 1 to 65535")
            for name in model["served"]:
                if not _API_NAME.match(str(name)):
                    raise _invalid(
                        at + ".served", repr(name), "cannot be the name of a model", "use letters, digits and _./:@+-"
                    )
            if not model["served"]:
                raise _invalid(at + ".served", "[]", "is empty", "say by which name clients ask for it")
            own = check_address(at + ".address", str(model["address"])) if model.get("address") else address
            servers.append(
                Server(
                    str(host["name"]),
                    str(model["name"]),
                    own,
                    int(model["port"]),
                    tuple(dict.fromkeys(map(str, model["served"]))),
                )
            )
            if [server.name for server in servers].count(servers[-1].name) > 1:
                raise _invalid(at + ".name", model["name"], "is there twice", "name every model of a host once")
    if not servers:
        raise FleetError(
            "invalid_option",
            "hosts: no host has a model that is started and can be reached from another host, so the gateway would serve "
            "nothing; name hosts with nim_models, or remove the gateway.",
            option="hosts",
        )
    return tuple(servers)


def check_address(option: str, address: str) -> str:
    """An IP address or a host name.

    Raises:
        FleetError: ``invalid_option``.
    """
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        pass
    if not _HOST_NAME.match(address):
        raise _invalid(option, repr(address), "is neither an IP address nor a host name", "correct it")
    return address


def _port(option: str, *, zero: bool = False) -> t.Callable[[t.Any], int]:
    def check(value: t.Any) -> int:
        port = int(value)
        if not (1 <= port <= 65535 or (zero and port == 0)):
            raise _invalid(option, port, "is out of range", "give a port from 1 to 65535")
        return port

    return check


def _number(option: str, least: int, most: int) -> t.Callable[[t.Any], int]:
    def check(value: t.Any) -> int:
        number = int(value)
        if not least <= number <= most:
            raise _invalid(option, number, "is out of range", "give a whole number from %d to %d" % (least, most))
        return number

    return check


def _body_limit(value: t.Any) -> int:
    text = str(value)
    size = parse_size(text)
    if size is None or not 2**14 <= size <= 2**26:
        raise _invalid("body_limit", text, "is no size from 16KB to 64MB", "write a number and a unit, for example 1MB")
    return size


def hash_keys(keys: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Name of a client -> SHA-256 of its key, in upper-case hex.

    Args:
        keys: Name -> the key itself, or ``sha256:`` and 64 hex digits of its SHA-256.

    Raises:
        FleetError: ``invalid_option``; the message never has a key in it.
    """
    hashed: dict[str, str] = {}
    for name, key in keys.items():
        option = "api_keys.%s" % name
        if not _KEY_NAME.match(str(name)):
            # The key itself may have been written in the place of the name.
            raise _invalid(
                "api_keys",
                "(not shown)",
                "one of its names is none",
                "name every client with at most 64 letters, digits and _.@-, and give its key as the value",
            )
        given = _HASHED_KEY.match(str(key))
        if given:
            found = given.group(1).upper()
        elif str(key).startswith("sha256:") or not _KEY.match(str(key)):
            raise _invalid(
                option,
                "(not shown)",
                "is no key of 16 to 512 printable characters without spaces, and no sha256:<64 hex digits>",
                "make one with: openssl rand -hex 32",
            )
        else:
            found = hashlib.sha256(str(key).encode()).hexdigest().upper()
        if found in hashed.values():
            raise _invalid(option, "(not shown)", "is the key of another client too", "give each client its own")
        hashed[str(name)] = found
    return hashed


def check_pem(certificate: t.Optional[str], private_key: t.Optional[str]) -> t.Optional[str]:
    """Certificate chain and key as HAProxy reads them from one file; None without.

    Raises:
        FleetError: ``invalid_option``.
    """
    certificate, private_key = (certificate or "").strip(), (private_key or "").strip()
    if not certificate and not private_key:
        return None
    if "-----BEGIN CERTIFICATE-----" not in certificate:
        raise _invalid(
            "certificate", "(not shown)", "has no certificate in PEM form", "give the chain, the server's own first"
        )
    if "PRIVATE KEY-----" not in private_key and "PRIVATE KEY-----" not in certificate:
        raise _invalid("private_key", "(not shown)", "has no private key in PEM form", "give the certificate's key")
    return "\n".join(part for part in (certificate, private_key) if part) + "\n"


def _certificate_file(value: t.Any) -> str:
    path = str(value)
    if not _PATH.match(path) or ".." in path:
        raise _invalid(
            "certificate_file", path, "is no absolute path that HAProxy takes unquoted", "choose another path"
        )
    return path


#: Option -> its check, of those that can be judged alone. Each gives the value to use, or raises ``invalid_option``.
OPTION_CHECKS: t.Mapping[str, t.Callable[[t.Any], t.Any]] = {
    "bind_address": lambda value: check_address("bind_address", str(value)),
    "port": _port("port"),
    "body_limit": _body_limit,
    "inactivity_timeout": _number("inactivity_timeout", 10, 86400),
    "slow_start": _number("slow_start", 0, 3600),
    "server_connections": _number("server_connections", 1, 100000),
    "max_connections": _number("max_connections", 16, 1000000),
    "api_keys": hash_keys,
    "certificate_file": _certificate_file,
    "metrics_address": lambda value: check_address("metrics_address", str(value)),
    "metrics_port": _port("metrics_port", zero=True),
}
