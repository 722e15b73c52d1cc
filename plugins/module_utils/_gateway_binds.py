# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Whether a gateway can have its addresses and ports.

Asked before a reload: HAProxy that cannot bind stops listening altogether for two seconds before its old process goes on
(seen with 2.6).
"""

from __future__ import annotations

import ipaddress
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._gateway_settings import Settings
from ._host import Host
from ._listeners import Listener, find_listeners, own_addresses
from ._nim_models import addresses_overlap

PACKAGE = "haproxy"


@dataclass(frozen=True)
class Bind:
    """An address and a port of the gateway, and the options that say so."""

    address: str
    port: int
    address_option: str
    port_option: str


@dataclass(frozen=True)
class Binds:
    """What stands in the way of them.

    Attributes:
        taken: Binds that others hold, and who.
        missing: Binds on addresses that this host does not have.
    """

    taken: t.Tuple[t.Tuple[Bind, Listener], ...] = ()
    missing: t.Tuple[Bind, ...] = ()


def look_at_binds(host: Host, settings: Settings, service: str) -> Binds:
    """``service`` is HAProxy's unit, whose own ports are no obstacle."""
    binds = [Bind(settings.bind_address, settings.port, "bind_address", "port")]
    if settings.metrics_port:
        binds.append(Bind(settings.metrics_address, settings.metrics_port, "metrics_address", "metrics_port"))
    # What a name stands for is HAProxy's to find out.
    binds = [bind for bind in binds if _is_address(bind.address)]
    listeners = find_listeners(host, {bind.port for bind in binds}, [])
    own = own_addresses(host.read_text("/proc/net/fib_trie") or "", host.read_text("/proc/net/if_inet6") or "")
    return Binds(
        tuple(
            (bind, listener)
            for bind in binds
            for listener in listeners
            if listener.port == bind.port
            and not _is_own(listener, service)
            and addresses_overlap(listener.address, bind.address)
        ),
        tuple(bind for bind in binds if own and not _is_here(host, bind.address, own)),
    )


def _is_own(listener: Listener, service: str) -> bool:
    # Without a unit where control groups do not tell.
    return listener.unit == service or (listener.command == PACKAGE and not listener.unit)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_here(host: Host, text: str, own: t.Collection[str]) -> bool:
    address = ipaddress.ip_address(text)
    if address.is_unspecified or address.is_loopback or text in own:
        return True
    # As with a virtual address that comes and goes (keepalived).
    setting = "/proc/sys/net/ipv%d/ip_nonlocal_bind" % address.version
    return (host.read_text(setting) or "").strip() == "1"


def check_binds(binds: Binds) -> None:
    """Refuse what HAProxy could not bind.

    Raises:
        FleetError: ``port_in_use`` or ``address_missing``.
    """
    for bind, listener in binds.taken:
        raise FleetError(
            "port_in_use",
            "The gateway cannot have port %d on %s: it is held by %s; stop that first, or choose another port (%s). Nothing "
            "was changed." % (bind.port, bind.address, listener.describe(), bind.port_option),
            port=bind.port,
            address=bind.address,
            pid=listener.pid,
            command=listener.command,
        )
    for bind in binds.missing:
        raise FleetError(
            "address_missing",
            "The gateway cannot listen on %s: no interface of this host has that address; correct %s, or for an address that "
            "comes and goes set net.ipv%d.ip_nonlocal_bind to 1. Nothing was changed."
            % (bind.address, bind.address_option, ipaddress.ip_address(bind.address).version),
            address=bind.address,
        )
