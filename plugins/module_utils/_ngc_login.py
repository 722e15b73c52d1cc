# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""A registry's credentials, checked there and written into a user's Docker configuration."""

from __future__ import annotations

import json
import typing as t

from ._docker_api import DockerApi
from ._docker_config import DockerConfig, encode_basic
from ._docker_registries import Registries
from ._errors import FleetError
from ._host import Host
from ._ngc_login_planner import VALIDATE_ALWAYS, VALIDATE_NEVER, VALIDATE_ON_CHANGE, LoginPlanner
from ._ngc_login_record import read_logins, write_logins
from ._registry import RegistryClient
from ._resource import Change, Resource
from ._sleeping_docker import look_at_docker


class NgcLogin(LoginPlanner, Resource[DockerConfig]):
    """One registry's credentials in one user's Docker configuration.

    Args:
        api: Docker of the host, which is asked how it reaches the registry.
        daemon_options: See :class:`._docker_registries.Registries`.
    """

    def __init__(
        self,
        api_key: t.Optional[str],
        *,
        client: t.Callable[..., RegistryClient] = RegistryClient,
        api: t.Optional[DockerApi] = None,
        daemon_options: t.Optional[t.Mapping[str, t.Any]] = None,
        **options: t.Any,
    ) -> None:
        super().__init__(api_key, **options)
        self._client = client
        self._api = api
        self._daemon_options = daemon_options
        self.checked = False

    def apply(self, host: Host, change: Change) -> None:
        if change.action in ("store", "erase"):
            if change.action == "store" and self.validate != VALIDATE_NEVER:
                self.check_registry(host)
            state = self.observe(host)
            if not self.plan(state):
                return
            content = dict(state.content)
            auths = dict(content.get("auths") or {})
            # Without it nothing is stored. What is to go, goes; a broken record then stays.
            record = None if change.action == "erase" and state.record_damage else read_logins(host)
            if record is not None and change.action == "store":
                auths[self.registry] = {"auth": encode_basic(self.username, self.key)}
                # First, so that no login of ours is ever on the host without it.
                before = state.credentials(self.registry)
                record.add(self.docker_user, self.registry, (self.username, self.key), before)
                write_logins(host, record)
            else:
                for name in state.ours if self.only_ours else self.entry_names(state):
                    del auths[name]
            content["auths"] = auths
            if change.action == "erase" and not any(content.values()):
                self._remove(host, state)
            else:
                self._write(host, state, content)
            if record is not None and change.action == "erase":
                record.drop(self.docker_user, self.registry)
                write_logins(host, record)
        elif change.action == "directory":
            self._make_directory(host, self.observe(host))
        elif change.action == "file":
            state = self.observe(host)
            self._write(host, state, state.content)
        else:
            raise AssertionError(change.action)

    def precheck(self, host: Host) -> None:
        """Check the key before anything is changed, and in check mode too, where that is wanted.

        Raises:
            FleetError: As :meth:`observe`, :meth:`plan` and :meth:`check_registry`.
        """
        stores = any(change.action == "store" for change in self.plan(self.observe(host)))
        if stores:
            # What is stored is noted there.
            read_logins(host)
        if self.validate == VALIDATE_ALWAYS or (self.validate == VALIDATE_ON_CHANGE and stores):
            self.check_registry(host)

    def check_registry(self, host: Host) -> None:
        """Ask the registry once, as this host's Docker would, whether it takes the key, and whether the key may pull what it
        is needed for.

        Raises:
            FleetError: As :meth:`._registry.RegistryClient.check_credentials`.
        """
        if not self.key or self.checked:
            return
        registries = Registries(self._api or look_at_docker(host), self._daemon_options, self._client)
        client = registries.client(self.registry, (self.username, self.key))
        try:
            client.check_credentials(self.check_reference)
        except FleetError as error:
            # Read access to the repository is proved by the answer that it lacks this tag.
            if error.reason != "no_such_tag" or self.check_tag:
                raise
        self.checked = True

    @staticmethod
    def _make_directory(host: Host, state: DockerConfig) -> None:
        account = state.account
        directory = state.path.rsplit("/", 1)[0]
        for path in (directory, state.path):
            if account.uid != 0 and host.read_link(path) is not None:
                # Root must not follow what another user can point anywhere.
                raise FleetError(
                    "unsafe_path",
                    "%s is a symbolic link in the home of %s, and root does not follow it; replace it by what it points "
                    "to." % (path, account.name),
                    path=path,
                )
        host.make_dir(directory, mode=0o700, uid=account.uid, gid=account.gid)

    @classmethod
    def _remove(cls, host: Host, state: DockerConfig) -> None:
        """Nothing is left in the file: it goes, and so does the directory that was made for it."""
        cls._make_directory(host, state)
        host.remove(state.path)
        directory = state.path.rsplit("/", 1)[0]
        if not host.list_dir(directory):
            host.remove(directory)

    @classmethod
    def _write(cls, host: Host, state: DockerConfig, content: t.Dict[str, t.Any]) -> None:
        cls._make_directory(host, state)
        # Docker's own layout: indented with tabs.
        text = json.dumps(content, indent="\t", ensure_ascii=False) + "\n"
        host.write_file(state.path, text, mode=0o600, uid=state.account.uid, gid=state.account.gid)
