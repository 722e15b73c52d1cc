# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Which credentials of a registry are wanted in a user's Docker configuration, and what differs."""

from __future__ import annotations

import re
import typing as t
from dataclasses import replace

from ._docker_config import DockerConfig, find_account, read_docker_config
from ._errors import FleetError
from ._host import Host
from ._image_reference import ImageReference
from ._ngc_key import REGISTRY, USERNAME, check_api_key, check_password, printable
from ._resource import Change, FileDiff, Planner

VALIDATE_ON_CHANGE = "on_change"
VALIDATE_ALWAYS = "always"
VALIDATE_NEVER = "never"


class LoginPlanner(Planner[DockerConfig]):
    """One registry's credentials in one user's Docker configuration.

    Args:
        api_key: The key or password; None or empty: there is none, and nothing is done for ``present``.
        registry: Registry host.
        username: User name; NGC's literal by default.
        docker_user: User of the host whose Docker configuration is meant.
        state: ``present`` or ``absent``.
        check_repository: Repository, optionally with a tag, that the key must be allowed to pull.
        only_ours: With ``absent``: only what this collection has stored goes, or what has this very user and key.

    Raises:
        FleetError: ``invalid_option``.
    """

    name = "ngc_login"

    def __init__(
        self,
        api_key: t.Optional[str],
        *,
        registry: str = REGISTRY,
        username: str = USERNAME,
        docker_user: str = "root",
        state: str = "present",
        check_repository: str = "",
        validate: str = VALIDATE_ON_CHANGE,
        only_ours: bool = False,
    ) -> None:
        if state not in ("present", "absent"):
            raise FleetError("invalid_option", "state = %s: unknown state; choose present or absent." % state)
        if only_ours and state != "absent":
            raise FleetError(
                "invalid_option", "only_ours = true: means nothing with state present; leave it out or log out."
            )
        if "/" in registry or "://" in registry:
            raise FleetError(
                "invalid_option", "registry = %s: not a registry host; leave scheme and path out." % registry
            )
        ImageReference.parse("%s/check" % registry, "registry")
        if not docker_user or not re.fullmatch(r"[A-Za-z0-9_.@$-]+", docker_user):
            raise FleetError("invalid_option", "docker_user = %r: not a user name; name one user." % docker_user)
        if not username or ":" in username or re.search(r"[\x00-\x20]", username):
            raise FleetError(
                "invalid_option", "username = %r: no registry takes such a user name; correct it." % username
            )
        self.registry = registry
        self.username = username
        self.docker_user = docker_user
        self.state = state
        self.validate = validate
        self.key = ""
        if state == "present" and api_key:
            check = check_api_key if username == USERNAME else check_password
            self.key = check(api_key, "api_key")
        self.only_ours = only_ours
        # Only compared, so it need not have the form of a key.
        self._our_key = api_key if only_ours else None
        self.check_reference: t.Optional[ImageReference] = None
        self.check_tag = False
        if check_repository:
            text = check_repository
            if not text.startswith(registry + "/"):
                text = "%s/%s" % (registry, text)
            self.check_reference = ImageReference.parse(text, "check_repository")
            self.check_tag = ":" in text.rsplit("/", 1)[-1] or "@" in text

    def observe(self, host: Host) -> DockerConfig:
        state = read_docker_config(host, find_account(host, self.docker_user), self.registry)
        if self.state != "absent":
            return state
        # A look at a host never asks for it.
        from ._ngc_login_record import LoginRecord, read_logins

        damage = ""
        try:
            record = read_logins(host)
        except FleetError as error:
            # What is given by its key can go all the same.
            damage, record = error.message, LoginRecord("00")
        if not self.only_ours:
            return replace(state, record_damage=damage)

        def is_ours(entry: t.Optional[t.Tuple[str, str]]) -> bool:
            given = bool(self._our_key) and entry == (self.username, self._our_key)
            return given or record.has(self.docker_user, self.registry, entry)

        return replace(
            state,
            record_damage=damage,
            ours=tuple(name for name in self.entry_names(state) if is_ours(state.entry(name))),
        )

    def plan(self, state: DockerConfig) -> t.List[Change]:
        if self.only_ours:
            # Entries of the file, also where a helper goes before them: what that has, we have never stored.
            return [self._login_change(state, state.entry(state.ours[0]), None)] if state.ours else []
        if self.state == "present" and not self.key:
            return []
        if self.state == "absent" and state.credentials(self.registry) is None and not self.entry_names(state):
            return []
        if state.helper:
            if self.state == "present" and state.credentials(self.registry) == (self.username, self.key):
                return []
            raise FleetError(
                "credential_helper",
                "%s sends Docker to the credential helper %r (%s), so a login written beside it would have no effect; "
                "%s it with that helper ('docker login %s' as %s), or remove %s from the file, or choose another "
                "docker_user."
                % (
                    state.path,
                    "docker-credential-" + state.helper,
                    state.helper_key,
                    "store" if self.state == "present" else "erase",
                    self.registry,
                    self.docker_user,
                    state.helper_key,
                ),
                path=state.path,
                helper=state.helper,
            )
        changes = []
        stored = state.credentials(self.registry)
        wanted = (self.username, self.key) if self.state == "present" else None
        if stored != wanted or self.state == "absent":
            changes.append(self._login_change(state, stored, wanted))
        if self.state == "present":
            owner = (state.account.uid, state.account.gid)
            for kind, found, mode in (("directory", state.directory, 0o700), ("file", state.file, 0o600)):
                if found is None or (kind == "file" and changes and changes[0].action == "store"):
                    continue
                if (found.uid, found.gid, found.mode) != (*owner, mode):
                    changes.append(
                        Change(
                            self.name,
                            "permissions of %s" % (state.path if kind == "file" else state.path.rsplit("/", 1)[0]),
                            "%d:%d %04o" % (found.uid, found.gid, found.mode),
                            "%d:%d %04o" % (*owner, mode),
                            "the %s holds a secret" % kind,
                            action=kind,
                        )
                    )
        return changes

    def _login_change(
        self, state: DockerConfig, stored: t.Optional[t.Tuple[str, str]], wanted: t.Optional[t.Tuple[str, str]]
    ) -> Change:
        before = self._describe(stored, "a password")
        after = self._describe(wanted, "the password that is given")
        why = "no login is stored" if before is None else "another key or user is stored"
        return Change(
            self.name,
            "login of %s at %s" % (self.docker_user, self.registry),
            before,
            after,
            "it is to be removed" if self.state == "absent" else why,
            action="store" if self.state == "present" else "erase",
            diff=FileDiff(state.path, self._shown(before), self._shown(after)),
        )

    def left(self, state: DockerConfig) -> str:
        """What is left of the registry's logins because it is somebody else's, as a sentence; empty when nothing is."""
        auths = state.content.get("auths") or {}
        # Docker leaves an empty entry beside what a helper has.
        names = [name for name in self.entry_names(state) if auths[name] and name not in state.ours]
        if state.helper_credentials is not None:
            place, names = "the credential helper 'docker-credential-%s'" % state.helper, [self.registry, *names]
        elif names:
            place = state.path
        else:
            return ""
        known = "is not known to be stored" if state.record_damage else "was not stored"
        return "The login of %s at %s in %s %s by this collection, so it is left; %s as %s removes it." % (
            self.docker_user,
            self.registry,
            place,
            known,
            " and ".join("'docker logout %s'" % name for name in dict.fromkeys(names)),
            self.docker_user,
        )

    def result(self, state: DockerConfig) -> t.Dict[str, t.Any]:
        """Return values of the module."""
        stored = state.credentials(self.registry)
        told = [state.record_damage, self.left(state) if self.only_ours else ""]
        message = " ".join(sentence for sentence in told if sentence)
        if self.state == "present" and not self.key:
            message = (
                "No API key is given: the stored login is left as it is."
                if stored
                else "No API key is given and none is stored: only public images can be pulled."
            )
        return {
            "login": {
                "registry": self.registry,
                "docker_user": self.docker_user,
                "path": state.path,
                "username": stored[0] if stored else None,
                "fingerprint": printable(stored[1]) if stored else None,
            },
            "key_given": bool(self.key),
            "message": message,
        }

    # -- helpers ----------------------------------------------------------------------------------

    def entry_names(self, state: DockerConfig) -> t.List[str]:
        """Entries by which Docker would log in to the registry: it also takes them written as URL."""
        pattern = re.compile(r"(?:https?://)?%s(?:/.*)?" % re.escape(self.registry))
        return [name for name in state.content.get("auths") or {} if pattern.fullmatch(name)]

    @staticmethod
    def _describe(credentials: t.Optional[t.Tuple[str, str]], otherwise: str) -> t.Optional[str]:
        """User and fingerprint; ``otherwise`` stands for a password that has none."""
        if credentials is None:
            return None
        shown = printable(credentials[1])
        return "%s, %s" % (credentials[0], otherwise) if shown is None else "%s %s" % (credentials[0], shown)

    def _shown(self, value: t.Optional[str]) -> str:
        """Only our own entry, and of it no secret: the other entries are not ours to show."""
        return "" if value is None else "%s: %s\n" % (self.registry, value)
