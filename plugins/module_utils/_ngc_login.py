# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The NGC API key, and a registry's entry in a user's Docker configuration.

File format: docker/cli ``cli/config/configfile``; the entry is base64 of ``user:password`` under ``auths``.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing as t
from dataclasses import dataclass, field

from ._errors import FleetError
from ._host import FileStat, Host
from ._image_reference import ImageReference
from ._registry import RegistryClient, decode_basic, encode_basic
from ._resource import Change, FileDiff, Resource
from ._untrusted import is_digits, json_object, parse_json

REGISTRY = "nvcr.io"
#: NGC takes every API key under this literal user name.
USERNAME = "$oauthtoken"
#: Variable that carries the key, on the controller and into the container.
KEY_VARIABLE = "NGC_API_KEY"

VALIDATE_ON_CHANGE = "on_change"
VALIDATE_ALWAYS = "always"
VALIDATE_NEVER = "never"


# -- the key ------------------------------------------------------------------------------------------


def check_api_key(key: t.Any, option: str = "api_key") -> str:
    """Return a key that has the form of one; the message never repeats it.

    Raises:
        FleetError: ``invalid_option`` for what usually goes wrong between a web page, a file and a vault.
    """

    def bad(what: str, remedy: str) -> FleetError:
        return FleetError("invalid_option", "%s = (not shown): %s; %s." % (option, what, remedy))

    if not isinstance(key, str):
        raise bad("the key is no text", "put it in quotes")
    if not key:
        raise bad("the key is empty", "leave the variable out if no key is wanted")
    if "\n" in key or "\r" in key:
        raise bad("there is a line break in the key", "store it without one (printf %s instead of echo)")
    if key[0] in "\"'" or key[-1] in "\"'":
        raise bad("the key is in quotes", "remove the quotes that are part of the value")
    if re.search(r"\s", key):
        raise bad("there is white space in the key", "copy it again without what stands before and after it")
    if "{{" in key or key.startswith("$ANSIBLE_VAULT"):
        raise bad("the key is a template or a vault text that was not resolved", "check where the variable comes from")
    if key.startswith(USERNAME):
        raise bad("the key begins with the user name %s" % USERNAME, "give the key alone")
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", key):
        raise bad("there are characters in the key that no NGC key has", "copy it again")
    if key == "nvapi-" or len(key) < 8:
        raise bad("the key is too short to be one", "copy it again")
    return key


def check_password(password: t.Any, option: str) -> str:
    """For registries that are not NGC: anything that fits into one line."""
    if not isinstance(password, str) or not password or re.search(r"[\x00-\x1f\x7f]", password):
        raise FleetError(
            "invalid_option",
            "%s = (not shown): the password is empty or has control characters in it; correct it." % option,
        )
    return password


def fingerprint(secret: str) -> str:
    """Stable short name of a secret: a rotation shows, the secret does not."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8")).hexdigest()[:12]


def render_environment(key: str) -> str:
    """Content of an environment file (systemd, ``docker --env-file``) that carries the key."""
    return "%s=%s\n" % (KEY_VARIABLE, check_api_key(key))


def key_in_environment(text: t.Optional[str]) -> t.Optional[str]:
    """The key in such a file, or None."""
    for line in (text or "").splitlines():
        name, separator, value = line.strip().partition("=")
        if separator and name == KEY_VARIABLE and value:
            return value
    return None


# -- the Docker configuration -------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """A user of the host."""

    name: str
    uid: int
    gid: int
    home: str


def find_account(host: Host, user: str, option: str = "docker_user") -> Account:
    """Look a user up in /etc/passwd, and where that has none, wherever the host's name service looks.

    Raises:
        FleetError: ``no_such_user``.
    """
    for line in (host.read_text("/etc/passwd") or "").splitlines():
        if line.startswith(user + ":"):
            break
    else:
        line = host.run(["getent", "passwd", user]).stdout.strip()
    fields = line.split(":")
    if len(fields) < 7 or not is_digits(fields[2]) or not is_digits(fields[3]) or not fields[5].startswith("/"):
        raise FleetError(
            "no_such_user",
            "%s = %r: this host has no such user with a home directory; create it first or name another."
            % (option, user),
            user=user,
        )
    return Account(user, int(fields[2]), int(fields[3]), fields[5])


@dataclass(frozen=True)
class DockerConfig:
    """A user's Docker configuration.

    Attributes:
        content: The parsed file; an empty dictionary when there is none.
        helper: Name of the credential helper that Docker would use for the registry, or empty.
        helper_key: Where it is configured: ``credsStore`` or ``credHelpers``.
    """

    account: Account
    path: str
    content: t.Dict[str, t.Any] = field(repr=False)
    file: t.Optional[FileStat]
    directory: t.Optional[FileStat]
    helper: str = ""
    helper_key: str = ""
    helper_credentials: t.Optional[t.Tuple[str, str]] = field(default=None, repr=False)

    def credentials(self, registry: str) -> t.Optional[t.Tuple[str, str]]:
        """User and password that Docker would use for a registry, or None."""
        if self.helper:
            return self.helper_credentials
        entry = (self.content.get("auths") or {}).get(registry)
        if not isinstance(entry, dict):
            return None
        if isinstance(entry.get("auth"), str) and entry["auth"]:
            return decode_basic(entry["auth"])
        if entry.get("username") and entry.get("password"):
            return str(entry["username"]), str(entry["password"])
        return None


def read_docker_config(host: Host, account: Account, registry: str) -> DockerConfig:
    """Read a user's Docker configuration.

    Raises:
        FleetError: ``docker_config_unreadable`` when it is no JSON of the form that Docker writes; it is left as it is.
    """
    directory = account.home.rstrip("/") + "/.docker"
    path = directory + "/config.json"
    content: t.Any = {}
    raw = host.read_text(path)
    if raw is not None and raw.strip():
        try:
            content = parse_json(raw)
        except ValueError as error:
            # The parser's own message quotes no content.
            raise _unreadable(path, "it is not JSON (%s)" % error) from None
    if not isinstance(content, dict):
        raise _unreadable(path, "it is not a JSON object")
    for key in ("auths", "credHelpers"):
        if content.get(key) is not None and not isinstance(content[key], dict):
            raise _unreadable(path, "%r in it is not an object" % key)
    if content.get("credsStore") is not None and not isinstance(content["credsStore"], str):
        raise _unreadable(path, "'credsStore' in it is not a text")
    helper, helper_key = str((content.get("credHelpers") or {}).get(registry) or ""), "credHelpers"
    if not helper:
        helper, helper_key = str(content.get("credsStore") or ""), "credsStore"
    return DockerConfig(
        account,
        path,
        content,
        host.stat(path),
        host.stat(directory),
        helper,
        helper_key if helper else "",
        _ask_helper(host, helper, registry) if helper else None,
    )


def _ask_helper(host: Host, helper: str, registry: str) -> t.Optional[t.Tuple[str, str]]:
    """What a credential helper has for a registry (docker/docker-credential-helpers, verb ``get``)."""
    answer = host.run(["docker-credential-" + helper, "get"], stdin=registry, timeout=20)
    found = json_object(answer.stdout) if answer.ok else {}
    if found.get("Secret"):
        return str(found.get("Username") or ""), str(found["Secret"])
    return None


def _unreadable(path: str, what: str) -> FleetError:
    return FleetError(
        "docker_config_unreadable",
        "Reading %s failed: %s; repair it or move it away, it is left as it is." % (path, what),
        path=path,
    )


def stored_credentials(host: Host, registry: str, user: str = "root") -> t.Optional[t.Tuple[str, str]]:
    """User and password that Docker on this host would use for a registry when this user calls it, or None.

    Raises:
        FleetError: ``no_such_user``, ``docker_config_unreadable``.
    """
    return read_docker_config(host, find_account(host, user), registry).credentials(registry)


# -- the resource -------------------------------------------------------------------------------------


class NgcLogin(Resource[DockerConfig]):
    """One registry's credentials in one user's Docker configuration.

    Args:
        api_key: The key or password; None or empty: there is none, and nothing is done for ``present``.
        registry: Registry host.
        username: User name; NGC's literal by default.
        docker_user: User of the host whose Docker configuration is meant.
        state: ``present`` or ``absent``.
        check_repository: Repository, optionally with a tag, that the key must be allowed to pull.
        insecure: See :class:`._registry.RegistryClient`.

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
        client: t.Callable[..., RegistryClient] = RegistryClient,
    ) -> None:
        if state not in ("present", "absent"):
            raise FleetError("invalid_option", "state = %s: unknown state; choose present or absent." % state)
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
        self.check_reference: t.Optional[ImageReference] = None
        self._check_tag = False
        if check_repository:
            text = check_repository
            if not text.startswith(registry + "/"):
                text = "%s/%s" % (registry, text)
            self.check_reference = ImageReference.parse(text, "check_repository")
            self._check_tag = ":" in text.rsplit("/", 1)[-1] or "@" in text
        self._client = client
        self.checked = False

    def observe(self, host: Host) -> DockerConfig:
        return read_docker_config(host, find_account(host, self.docker_user), self.registry)

    def plan(self, state: DockerConfig) -> t.List[Change]:
        if self.state == "present" and not self.key:
            return []
        if self.state == "absent" and state.credentials(self.registry) is None and not self._entry_names(state):
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
        before = self._describe(state.credentials(self.registry))
        after = self._describe((self.username, self.key) if self.state == "present" else None)
        what = "login of %s at %s" % (self.docker_user, self.registry)
        if before != after or (self.state == "absent"):
            why = "no login is stored" if before is None else "another key or user is stored"
            changes.append(
                Change(
                    self.name,
                    what,
                    before,
                    after,
                    "it is to be removed" if self.state == "absent" else why,
                    action="store" if self.state == "present" else "erase",
                    diff=FileDiff(state.path, self._shown(before), self._shown(after)),
                )
            )
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

    def apply(self, host: Host, change: Change) -> None:
        if change.action in ("store", "erase"):
            if change.action == "store" and self.validate != VALIDATE_NEVER:
                self.check_registry()
            state = self.observe(host)
            if not self.plan(state):
                return
            content = dict(state.content)
            auths = dict(content.get("auths") or {})
            if change.action == "store":
                auths[self.registry] = {"auth": encode_basic(self.username, self.key)}
            else:
                for name in self._entry_names(state):
                    del auths[name]
            content["auths"] = auths
            if change.action == "erase" and not any(content.values()):
                self._remove(host, state)
            else:
                self._write(host, state, content)
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
        if self.validate == VALIDATE_ALWAYS or (
            self.validate == VALIDATE_ON_CHANGE
            and any(change.action == "store" for change in self.plan(self.observe(host)))
        ):
            self.check_registry()

    def check_registry(self) -> None:
        """Ask the registry once whether it takes the key, and whether the key may pull what it is needed for.

        Raises:
            FleetError: As :meth:`._registry.RegistryClient.check_credentials`.
        """
        if not self.key or self.checked:
            return
        client = self._client(self.registry, self.username, self.key)
        try:
            client.check_credentials(self.check_reference)
        except FleetError as error:
            # Read access to the repository is proved by the answer that it lacks this tag.
            if error.reason != "no_such_tag" or self._check_tag:
                raise
        self.checked = True

    def result(self, state: DockerConfig) -> t.Dict[str, t.Any]:
        """Return values of the module."""
        stored = state.credentials(self.registry)
        message = ""
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
                "fingerprint": fingerprint(stored[1]) if stored else None,
            },
            "key_given": bool(self.key),
            "message": message,
        }

    # -- helpers ----------------------------------------------------------------------------------

    def _entry_names(self, state: DockerConfig) -> t.List[str]:
        """Entries by which Docker would log in to the registry: it also takes them written as URL."""
        pattern = re.compile(r"(?:https?://)?%s(?:/.*)?" % re.escape(self.registry))
        return [name for name in state.content.get("auths") or {} if pattern.fullmatch(name)]

    @staticmethod
    def _describe(credentials: t.Optional[t.Tuple[str, str]]) -> t.Optional[str]:
        return None if credentials is None else "%s %s" % (credentials[0], fingerprint(credentials[1]))

    def _shown(self, value: t.Optional[str]) -> str:
        """Only our own entry, and of it no secret: the other entries are not ours to show."""
        return "" if value is None else "%s: %s\n" % (self.registry, value)

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
