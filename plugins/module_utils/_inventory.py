# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""Everything in an inventory that is wrong whatever the host looks like, found on the controller before any contact.

The roles' argument specifications say which variables there are and of which type; what the types cannot say is checked
here with the same functions that the modules use, so that the two cannot disagree. They are imported where a variable is
set that needs them: ansible-core compiles every file of a collection anew in every run, and every run begins here.
"""

from __future__ import annotations

import difflib
import functools
import re
import typing as t
from dataclasses import dataclass

from ._booleans import parse_boolean
from ._driver_branches import check_branch, check_flavour, check_version
from ._errors import FleetError
from ._image_reference import ImageReference, check_mirrors, port_exists
from ._ngc_key import USERNAME, check_api_key, check_password
from ._nim_models import parse_models
from ._options import MINIMUM_DOCKER_VERSION
from ._redaction import is_name_of_secret, is_plain, scrub, scrub_given

#: Role name -> option name -> specification, as in ``argument_specs.main.options``.
Specs = t.Mapping[str, t.Mapping[str, t.Mapping[str, t.Any]]]

#: Prefixes under which a variable that nobody knows is a mistake. Other people's roles use ``docker_`` too: there only
#: what resembles one of our names counts.
PREFIXES = (
    "nvidia_driver_",
    "nvidia_container_toolkit_",
    "ngc_",
    "nim_",
    "docker_",
    "driver_upgrade_",
    "drain_",
)
SHARED_PREFIXES = ("docker_",)
#: Variables whose values are never shown. (no_log in the roles' specifications breaks Vault in ansible-core 2.18.)
KEYS = ("ngc_api_key", "nim_ngc_api_key")
# A certificate is none, but people put its key into the same text.
SECRETS = (*KEYS, "nim_gateway_api_keys", "nim_gateway_private_key", "nim_gateway_certificate")
#: How alike a misspelt name and a known one are (0 to 1, difflib's ratio). Shared prefixes make names alike by
#: themselves, so there the rest of the name is compared.
LIKENESS = 0.72

_SECRET_NAME = re.compile(r"key|token|secret|passw", re.I)
_USER_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}\$?\Z", re.I)
_REGISTRY = re.compile(r"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:]+\])(?::\d{1,5})?\Z")
_VERSION = re.compile(r"(?:\d+:)?\d+(?:\.\d+){0,3}(?:[~+.-][A-Za-z0-9.~+-]+)?\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        variable: The variable, with the path to the value inside it.
        message: One sentence: variable, value, what is wrong, remedy. Never a secret.
    """

    variable: str
    message: str


class Unresolved:
    """Stands for the value of a variable whose template could not be resolved."""

    def __init__(self, why: str) -> None:
        self.why = why


def validate(
    variables: t.Mapping[str, t.Any],
    specs: Specs,
    *,
    environment: t.Mapping[str, str] | None = None,
    read_file: t.Callable[[str], str | None] | None = None,
) -> list[Problem]:
    """All mistakes in the variables of one host.

    Args:
        variables: Every variable that somebody set for the host, resolved; others are ignored.
        specs: Options of all roles of the collection.
        environment: The controller's environment, from which the NGC key may come.
        read_file: Content of a file on the controller, None when it cannot be read.
    """
    return _Check(variables, specs, environment or {}, read_file or (lambda path: None)).run()


def _one_line(text: str) -> str:
    """Text with what would not be seen, or would break the line, written as Python does: keys may be any text."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _shown(value: t.Any, secret: bool = False) -> str:
    if secret:
        return "(not shown)"
    text = scrub_given(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 120 else text[:117] + "..."


class _Check:
    def __init__(
        self,
        variables: t.Mapping[str, t.Any],
        specs: Specs,
        environment: t.Mapping[str, str],
        read_file: t.Callable[[str], str | None],
    ) -> None:
        self.variables = variables
        self.options: dict[str, t.Mapping[str, t.Any]] = {}
        for options in specs.values():
            self.options.update(options)
        self.environment = environment
        self.read_file = read_file
        self.problems: list[Problem] = []
        #: Variables whose value is of the wrong type: no further check makes sense.
        self.broken: set[str] = set()

    def run(self) -> list[Problem]:
        self._unknown_names()
        self._types()
        self._driver()
        self._docker()
        self._toolkit()
        self._ngc()
        self._nim()
        self._gateway()
        return [Problem(_one_line(problem.variable), _one_line(problem.message)) for problem in self.problems]

    # -- tools ------------------------------------------------------------------------------------

    def add(self, variable: str, value: t.Any, wrong: str, remedy: str, *, secret: bool = False) -> None:
        secret = secret or variable in SECRETS
        self.problems.append(Problem(variable, "%s = %s: %s; %s." % (variable, _shown(value, secret), wrong, remedy)))

    def take(self, check: t.Callable[[], t.Any], rename: t.Callable[[str], str] = str) -> bool:
        """Run a check of another part of the collection; its sentence becomes the problem's."""
        try:
            check()
        except FleetError as error:
            message = scrub_given(rename(error.message))
            if not message.endswith("."):
                message += "."
            self.problems.append(Problem(message.split(" = ", 1)[0], message))
            return False
        return True

    def get(self, name: str, default: t.Any = None) -> t.Any:
        """A usable value: set, resolved, of the right type; else the default of the role."""
        if name in self.broken:
            return default
        value = self.variables.get(name)
        if value is None:
            return default
        return value

    def text(self, name: str) -> str:
        """A scalar as text; empty when the variable is not set."""
        value = self.get(name, "")
        return "" if isinstance(value, (dict, list)) else str(value)

    def _failure_signatures(self, entries: t.Any) -> None:
        from ._own_signatures import parse_signatures

        sound = True
        for index, entry in enumerate(entries):
            try:
                parse_signatures([entry], trial=False)
            except FleetError as error:
                message = error.message.replace("[0]", "[%d]" % index, 1)
                self.problems.append(Problem(message.split(" = ", 1)[0], message))
                sound = False
        if sound:
            # What only shows in all of them: an id twice, and one that is slow.
            self.take(lambda: parse_signatures(entries))

    # -- names and types --------------------------------------------------------------------------

    def _unknown_names(self) -> None:
        for name in sorted(self.variables, key=str):
            if not isinstance(name, str) or not name.startswith(PREFIXES) or name in self.options:
                continue
            near = self._nearest(name)
            if near:
                remedy = "did you mean %s" % near
            elif name.startswith(SHARED_PREFIXES):
                continue
            else:
                remedy = "remove it, or give a variable of your own another prefix"
            value = self.variables[name]
            # What is misspelt may be a list of models, with secrets inside, or a key.
            entries = value if isinstance(value, (list, tuple)) else []
            nested = (isinstance(value, dict) and bool(value)) or not all(map(is_plain, entries))
            telling = bool(_SECRET_NAME.search(name)) or is_name_of_secret(name) or near in SECRETS
            secret = telling or isinstance(value, Unresolved) or nested
            self.problems.append(
                Problem(name, "%s = %s: no such variable; %s." % (name, _shown(value, secret), remedy))
            )

    def _nearest(self, name: str) -> str | None:
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        rests = {known[len(prefix) :]: known for known in self.options if known.startswith(prefix)}
        rest = name[len(prefix) :]
        found = difflib.get_close_matches(rest, sorted(rests), n=1, cutoff=LIKENESS)
        if found:
            return rests[found[0]]
        # A prefix that was mixed up: nim_api_key for ngc_api_key, docker_container_toolkit_mode.
        for other in PREFIXES:
            if other + rest in self.options:
                return other + rest
        if name.startswith(SHARED_PREFIXES):
            return None
        whole = difflib.get_close_matches(name, sorted(self.options), n=1, cutoff=0.85)
        return whole[0] if whole else None

    def _types(self) -> None:
        for name in sorted(self.options):
            value = self.variables.get(name)
            if name not in self.variables:
                continue
            spec = self.options[name]
            if value is None:
                # Set to nothing is set: the default of the role is gone. No key at all is a choice that one may state.
                if name not in KEYS:
                    self.add(
                        name, "null", "is empty, and that replaces the default", "give a value, or remove the line"
                    )
                continue
            secret = name in SECRETS
            if isinstance(value, Unresolved):
                self.broken.add(name)
                self.problems.append(
                    Problem(
                        name,
                        "%s: its template cannot be resolved (%s); correct the template or set what it needs."
                        % (
                            name,
                            ("Vault cannot decrypt it" if "vault" in value.why.lower() else "not shown")
                            if secret
                            else scrub(value.why),
                        ),
                    )
                )
                continue
            wrong = _type_error(value, str(spec.get("type", "str")))
            if wrong is not None:
                self.broken.add(name)
                # What stands in the place of the list of models may have secrets in it.
                self.add(name, value, *wrong, secret=secret or (name == "nim_models" and not is_plain(value)))
                continue
            # Branches have a check of their own that knows which ones are only too old.
            choices = None if name == "nvidia_driver_branch" else spec.get("choices")
            if choices and str(value) not in [str(choice) for choice in choices]:
                self.broken.add(name)
                near = difflib.get_close_matches(str(value).lower(), [str(choice) for choice in choices], n=1)
                self.add(
                    name,
                    value,
                    "is not one of the choices",
                    "use %s" % " or ".join(str(choice) for choice in choices)
                    + (" (did you mean %s)" % near[0] if near else ""),
                )
                continue
            if isinstance(value, str) and not secret and _CONTROL.search(value):
                self.broken.add(name)
                self.add(name, value, "holds a newline or another control character", "remove it")
            if isinstance(value, (list, tuple)) and spec.get("elements") in ("str", "int", "dict"):
                for number, entry in enumerate(value):
                    wrong = _type_error(entry, str(spec["elements"]))
                    # Models have their own, deeper check.
                    if wrong is not None and name != "nim_models":
                        self.broken.add(name)
                        self.add("%s[%d]" % (name, number), entry, *wrong, secret=secret)

    def _number(self, name: str, least: int, most: int, unit: str) -> None:
        value = self.get(name)
        if value is not None and not least <= int(value) <= most:
            self.add(name, value, "is out of range", "give a whole number of %s from %d to %d" % (unit, least, most))

    def _url(self, name: str) -> None:
        value = self.text(name)
        if not value:
            return
        if "://" not in value and "@" not in value:
            self.add(
                name,
                value,
                "a URL without scheme",
                "write it with scheme and host, for example https://%s" % (value.lstrip("/") or "mirror.example.org"),
            )
        else:
            from ._packages import check_url

            self.take(lambda: check_url(name, value))

    def _file(self, name: str, needed: bool = True) -> str | None:
        """Content of a file on the controller, when it is needed and can be read."""
        path = self.text(name)
        if path and not path.startswith("/"):
            self.add(name, path, "is not an absolute path", "start it with /")
        elif path and needed:
            content = self.read_file(path)
            if content is None:
                remedy = "create it there, readable for the user that runs Ansible"
                self.add(name, path, "cannot be read on the controller", remedy)
            return content
        return None

    def _version(self, name: str) -> bool:
        value = self.text(name)
        if value and not _VERSION.match(value):
            self.add(name, value, "is no version", "write it like 1.17.4, or leave it empty for the newest")
            return False
        return True

    # -- the roles --------------------------------------------------------------------------------

    def _driver(self) -> None:
        branch = self.text("nvidia_driver_branch")
        default = str(self.options.get("nvidia_driver_branch", {}).get("default", "580"))
        known = True
        if branch:
            known = self.take(lambda: check_branch(branch))
        branch = branch or default
        version = self.text("nvidia_driver_version")
        if version and known:
            self.take(lambda: check_version(version, branch))
        flavour = self.text("nvidia_driver_flavour")
        if flavour and known:
            self.take(lambda: check_flavour(flavour, branch))
        self._url("nvidia_driver_repository_url")
        self._number("nvidia_driver_reboot_timeout", 60, 86400, "seconds")
        architecture = self.text("nvidia_driver_repository_architecture")
        if architecture:
            from ._nvidia_driver_packages import check_architecture

            self.take(lambda: check_architecture(architecture))

    def _docker(self) -> None:
        self._url("docker_repository_url")
        version = self._version("docker_version")
        minimum = self._version("docker_minimum_version")
        if version and minimum and (self.text("docker_version") or self.text("docker_minimum_version")):
            from ._docker_engine_planner import EnginePlanner

            # The two checked against each other and against what engines are known for.
            self.take(
                lambda: EnginePlanner(
                    version=self.text("docker_version"),
                    minimum_version=self.text("docker_minimum_version") or MINIMUM_DOCKER_VERSION,
                ),
                lambda message: re.sub(r"\b(minimum_version|version) =", r"docker_\1 =", message),
            )
        users = self.get("docker_users")
        seen: set[str] = set()
        for number, user in enumerate(users if isinstance(users, (list, tuple)) else []):
            if not _USER_NAME.match(str(user)):
                self.add("docker_users[%d]" % number, user, "is no user name", "write the login name of one user")
            elif str(user) in seen:
                self.add("docker_users[%d]" % number, user, "is there twice", "name every user once")
            seen.add(str(user))
        options = self.get("docker_daemon_options", {})
        absent = self.get("docker_daemon_absent", [])
        if options or absent:
            from ._docker_daemon_planner import DaemonPlanner

            live_restore = self.get("docker_live_restore", True)
            self.take(
                lambda: DaemonPlanner(
                    options, [str(key) for key in absent], live_restore=bool(parse_boolean(live_restore))
                ),
                lambda message: re.sub(
                    r"^(options|absent)\b", lambda found: "docker_daemon_" + found.group(1), message
                ).replace("live_restore =", "docker_live_restore ="),
            )

    def _toolkit(self) -> None:
        self._url("nvidia_container_toolkit_repository_url")
        mode = "nvidia_container_toolkit_mode"
        sound = self._version("nvidia_container_toolkit_version") and mode not in self.broken
        version = self.text("nvidia_container_toolkit_version")
        if sound and (version or self.text(mode)):
            from ._nvidia_container_toolkit_planner import ToolkitPlanner

            self.take(
                lambda: ToolkitPlanner(version=version, mode=self.text(mode) or "auto"),
                lambda message: "nvidia_container_toolkit_" + message,
            )

    def _ngc(self) -> None:
        key = self.get("ngc_api_key")
        source = "ngc_api_key"
        if key is None and "ngc_api_key" not in self.broken:
            key = self.environment.get("NGC_API_KEY", "")
            source = "NGC_API_KEY in the environment of the controller"
        absent = self.text("ngc_state") == "absent"
        username = self.text("ngc_username") if "ngc_username" in self.variables else USERNAME
        # What is no key of NGC may hold whatever its registry takes.
        check = check_api_key if username == USERNAME else check_password
        if key and not absent:
            self.take(lambda: check(key, source))
        if "ngc_username" in self.variables and "ngc_username" not in self.broken:
            from ._ngc_login_planner import LoginPlanner

            self.take(lambda: LoginPlanner(None, username=username), lambda message: "ngc_" + message)
        content = self._file("ngc_api_key_file", needed=not key and not absent)
        if content is not None:
            # The file's last line ends with a newline; the role's lookup strips it.
            self.take(lambda: check(content.rstrip("\r\n"), "ngc_api_key_file"))
        registry = self.text("ngc_registry")
        if registry and "://" in registry:
            self.add(
                "ngc_registry", registry, "a registry has no scheme", "leave %s out" % registry.partition("://")[0]
            )
        elif registry and not (_REGISTRY.match(registry) and port_exists(registry)):
            self.add("ngc_registry", registry, "is no registry", "write a host with optional port, like nvcr.io")
        user = self.text("ngc_docker_user")
        if user and not _USER_NAME.match(user):
            self.add("ngc_docker_user", user, "is no user name", "write the login name of a user of the host")
        repository = self.text("ngc_check_repository")
        if repository:
            self.take(lambda: ImageReference.parse(repository, option="ngc_check_repository"))

    def _gateway(self) -> None:
        if not any(str(name).startswith("nim_gateway_") for name in self.variables):
            return

        from ._gateway_settings import OPTION_CHECKS, check_pem

        def of_role(message: str) -> str:
            return "nim_gateway_" + message

        for option, check in OPTION_CHECKS.items():
            value = self.get("nim_gateway_" + option)
            if value not in (None, ""):
                self.take(functools.partial(check, value), of_role)
        certificate, private_key = self.text("nim_gateway_certificate"), self.text("nim_gateway_private_key")
        self.take(lambda: check_pem(certificate, private_key), of_role)
        self._file("nim_gateway_api_keys_file")

    def _nim(self) -> None:
        mirrors = self.get("nim_registry_mirrors")
        if mirrors:
            self.take(lambda: check_mirrors(mirrors, option="nim_registry_mirrors"))
        self._number("nim_progress_interval", 1, 300, "seconds")
        signatures = self.get("nim_failure_signatures")
        if signatures:
            self._failure_signatures(signatures)
        key = self.get("nim_ngc_api_key")
        if key and key != self.get("ngc_api_key") and self.text("nim_ngc_key_state") != "absent":
            self.take(lambda: check_api_key(key, option="nim_ngc_api_key"))
        models = self.get("nim_models")
        if isinstance(models, (list, tuple)):
            self._models(list(models))

    def _models(self, models: list[t.Any]) -> None:
        """All mistakes of all models: each entry alone, key by key, then the good ones together."""
        good: list[int] = []
        for number, entry in enumerate(models):
            if self._one_model(number, entry):
                good.append(number)
        while len(good) > 1:
            positions = list(good)
            try:
                parse_models([models[number] for number in positions])
            except FleetError as error:
                position, rest = _split_path(error.message)
                if position is None:
                    self.problems.append(Problem("nim_models", error.message))
                    return
                number = positions[position]
                message = "nim_models[%d]%s" % (number, rest)
                self.problems.append(Problem(message.split(" = ", 1)[0], message))
                good.remove(number)
                continue
            return

    def _one_model(self, number: int, entry: t.Any) -> bool:
        sound = True
        rest = dict(entry) if isinstance(entry, dict) else entry
        # Each round takes out the key that was refused, so every mistake of an entry is found.
        for _round in range(len(rest) + 3 if isinstance(rest, dict) else 1):
            try:
                parse_models([rest])
            except FleetError as error:
                sound = False
                message = re.sub(r"^nim_models\[0\]", "nim_models[%d]" % number, error.message)
                self.problems.append(Problem(message.split(" = ", 1)[0], message))
                found = re.match(r"nim_models\[0\]\.([^.\[ ]+)", error.message)
                if not found or not isinstance(rest, dict):
                    break
                key = found.group(1)
                stand_in = {"name": "model-%d" % number, "image": "registry.invalid/model:1"}.get(key)
                if stand_in is not None and rest.get(key) != stand_in:
                    rest[key] = stand_in
                elif key in rest and stand_in is None:
                    del rest[key]
                else:
                    break
                continue
            break
        return sound


def _split_path(message: str) -> tuple[int | None, str]:
    found = re.match(r"nim_models\[(\d+)\]", message)
    return (int(found.group(1)), message[found.end() :]) if found else (None, message)


def _type_error(value: t.Any, wanted: str) -> tuple[str, str] | None:
    """What is wrong with the type of a value, and the remedy; None when Ansible would take it."""
    if wanted == "bool":
        if parse_boolean(value) is not None:
            return None
        return "is neither true nor false", "write true or false"
    if wanted == "int":
        if not isinstance(value, bool) and re.match(r"-?\d+\Z", str(value)):
            return None
        return "is not a whole number", "write a whole number without a unit"
    if wanted == "list":
        return None if isinstance(value, (list, tuple)) else ("must be a list", "write each entry as one list item")
    if wanted == "dict":
        return None if isinstance(value, dict) else ("must be a dictionary", "write key: value pairs")
    if wanted in ("str", "path") and (isinstance(value, (dict, list, tuple, bool))):
        return "must be a string", "put it in quotes"
    if wanted in ("str", "path") and isinstance(value, float):
        return "is a number to YAML, which reads 1.20 as 1.2", "put it in quotes"
    return None


def report(problems: t.Mapping[str, t.Sequence[Problem]]) -> list[str]:
    """One line a mistake, hosts that share it together, in the order of the hosts.

    Args:
        problems: Host -> its problems.
    """
    hosts: dict[str, list[str]] = {}
    for host, found in problems.items():
        for problem in found:
            named = hosts.setdefault(problem.message, [])
            if host not in named:
                named.append(host)
    lines = []
    for message, named in hosts.items():
        shown = ", ".join(named[:5]) + (" and %d more" % (len(named) - 5) if len(named) > 5 else "")
        lines.append("%s: %s" % (shown, message))
    return lines
