# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""How a host reaches registries: as its Docker daemon does, with TLS or without, through which proxies.

Whoever asks a registry about something, asks through :class:`Registries`; otherwise an answer would say nothing about what
a pull will meet.
"""

from __future__ import annotations

import ipaddress
import os
import typing as t

from ._docker_api import DockerApi
from ._errors import FleetError
from ._image_store import DRIVER_TYPE
from ._registry import RegistryClient


class Registries:
    """Registries as this host's Docker would ask them.

    Args:
        daemon_options: Keys of daemon.json that the daemon will obey, whatever it says of itself now.
    """

    def __init__(
        self,
        api: DockerApi,
        daemon_options: t.Optional[t.Mapping[str, t.Any]] = None,
        client: t.Callable[..., RegistryClient] = RegistryClient,
    ) -> None:
        self._api = api
        self._daemon_options = daemon_options or {}
        self._client = client
        self._info: t.Optional[t.Dict[str, t.Any]] = None

    def docker_info(self) -> t.Dict[str, t.Any]:
        """What Docker says of itself.

        Raises:
            FleetError: ``docker_unavailable``, ``docker_error``.
        """
        if self._info is None:
            self._info = self._api.info()
        return self._info

    def engine(self) -> t.Mapping[str, t.Any]:
        """The same with the options that it is to get, and without complaint where there is no daemon yet."""
        try:
            info = self.docker_info()
        except FleetError:
            # Registries can be asked all the same, with the proxies of our own environment.
            info = {}
        return with_daemon_options(info, self._daemon_options)

    def client(self, registry: str, credentials: t.Optional[t.Tuple[str, str]]) -> RegistryClient:
        """Who asks a registry with a login or with none."""
        user, password = credentials or ("", "")
        info = self.engine()
        return self._client(
            registry, user, password, insecure=insecure_registry(info, registry), proxies=daemon_proxies(info)
        )


def with_daemon_options(info: t.Mapping[str, t.Any], options: t.Mapping[str, t.Any]) -> t.Mapping[str, t.Any]:
    """``docker info`` as it will be once the daemon obeys these keys of daemon.json, as far as images are concerned."""
    found = dict(info)
    if "insecure-registries" in options:
        entries = [str(entry).rpartition("://")[2] for entry in options["insecure-registries"] or []]
        networks = [entry for entry in entries if "/" in entry]
        config = {entry: {"Secure": False} for entry in entries if entry not in networks}
        # What dockerd itself adds (daemon/pkg/registry, newServiceConfig).
        networks += ["::1/128", "127.0.0.0/8"]
        found["RegistryConfig"] = {"IndexConfigs": config, "InsecureRegistryCIDRs": networks}
    proxies = options.get("proxies")
    for key, name in (("http-proxy", "HttpProxy"), ("https-proxy", "HttpsProxy"), ("no-proxy", "NoProxy")):
        if isinstance(proxies, dict) and key in proxies:
            found[name] = proxies[key]
    if options.get("data-root"):
        found["DockerRootDir"] = options["data-root"]
    features = options.get("features")
    if isinstance(features, dict) and isinstance(features.get("containerd-snapshotter"), bool):
        found["DriverStatus"] = [["driver-type", DRIVER_TYPE]] if features["containerd-snapshotter"] else []
    return found


def insecure_registry(info: t.Mapping[str, t.Any], registry: str) -> t.Optional[bool]:
    """Whether the daemon was told not to insist on TLS for a registry; None leaves the decision to the client."""
    config = info.get("RegistryConfig") or {}
    index = (config.get("IndexConfigs") or {}).get(registry) or {}
    if index.get("Secure") is False:
        return True
    host = registry.rsplit(":", 1)[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    for network in config.get("InsecureRegistryCIDRs") or []:
        try:
            if address in ipaddress.ip_network(network):
                return True
        except ValueError:
            continue
    return None


def daemon_proxies(info: t.Mapping[str, t.Any]) -> t.Optional[t.Dict[str, str]]:
    """The daemon's proxies where our own environment has none; None means the environment's."""
    if any(os.environ.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")):
        return None
    found = {"http": info.get("HttpProxy"), "https": info.get("HttpsProxy"), "no": info.get("NoProxy")}
    # The daemon does not tell a proxy's password but prints xxxxx in its place.
    usable = {key: str(value) for key, value in found.items() if value and "xxxxx@" not in str(value)}
    return usable if {"http", "https"} & set(usable) else None
