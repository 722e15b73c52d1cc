# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What an operator may say about one NIM, and every check of it that needs no host."""

from __future__ import annotations

import ipaddress
import posixpath
import re
import typing as t
from dataclasses import dataclass, field

from ._booleans import parse_boolean
from ._errors import FleetError
from ._image_reference import ImageReference
from ._nim_paths import (
    CACHE_PATH,
    LORA_PATH,
    NATIVE_CACHE_PATH,
    SERVICE_NAME,
    WEIGHTS_PATH,
    container_name,
    unit_name,
)
from ._options import NIM_MODEL_OPTIONS
from ._redaction import is_name_of_secret, is_plain, scrub_given
from ._untrusted import is_digits

#: Environment variables that an option of ours sets: two ways to say one thing would contradict each other one day.
OWNED_ENVIRONMENT: dict[str, str] = {
    "NGC_API_KEY": "set ngc_api_key instead (it must not lie in a readable file)",
    "NGC_CLI_API_KEY": "set ngc_api_key instead (it must not lie in a readable file)",
    "NIM_CACHE_PATH": "set cache_directory instead",
    "NIM_MODEL_PROFILE": "set profile instead",
    "NIM_MANIFEST_PROFILE": "set profile instead",
    "NIM_SERVED_MODEL_NAME": "set served_model_name instead",
    "NIM_CUSTOM_MODEL_NAME": "set custom_model_name instead",
    "NIM_FT_MODEL": "set weights_directory instead",
    "NIM_PEFT_SOURCE": "set lora_directory instead",
    "NIM_PEFT_REFRESH_INTERVAL": "set lora_refresh_interval instead",
    "NIM_MAX_MODEL_LEN": "set max_model_length instead",
    "NIM_PASSTHROUGH_ARGS": "set engine_arguments instead",
    "NIM_SERVER_PORT": "set port instead",
    "NIM_HTTP_API_PORT": "set port instead",
    "NIM_HEALTH_PORT": "set port instead",
    "NIM_BIND_ADDR": "set port and bind_address instead",
    "NIM_SERVER_BIND_ADDR": "set port and bind_address instead",
    "NVIDIA_VISIBLE_DEVICES": "set gpus instead",
    "CUDA_VISIBLE_DEVICES": "set gpus instead",
}

#: Engine arguments that an option of ours sets.
OWNED_ENGINE_ARGUMENTS: dict[str, str] = {
    "--port": "set port instead",
    "--host": "set bind_address instead",
    "--served-model-name": "set served_model_name instead",
    "--max-model-len": "set max_model_length instead",
}

# The environment is stored in a file that every user of the host can read.
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY|API_?KEY|CREDENTIALS?)$", re.I)
#: Switches, numbers and paths, under names that only may be those of secrets.
_NO_SECRET = re.compile(r"(?i)(?:true|false|yes|no|on|off|none|[0-9.]*|/.*)\Z")
_SECRET_VALUE = re.compile(r"nvapi-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|://[^\s/@:]*:[^\s@]+@")

#: Label that says which service a container is.
NAME_LABEL = "io.gpu-fleet.nim.name"
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_GPU_UUID = re.compile(r"(GPU|MIG)-[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\Z")
_PROFILE_ID = re.compile(r"[0-9a-f]{64}\Z")
_PROFILE_DESCRIPTION = re.compile(r"[A-Za-z][A-Za-z0-9_.+:]*(-[A-Za-z0-9_.+:]+)+\Z")
_SERVED_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@+-]*(,[A-Za-z0-9][A-Za-z0-9_./:@+-]*)*\Z")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_USER = re.compile(r"(\d{1,10})(?::(\d{1,10}))?\Z")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(?:i?[bB])?\Z")
#: Directories of a container that nothing may be mounted above or below.
_TAKEN = (CACHE_PATH, NATIVE_CACHE_PATH, WEIGHTS_PATH, LORA_PATH, "/dev", "/proc", "/sys")
_CONTAINER_DIRECTORY = re.compile(r"/[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*/?\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: Docker reads a line of an environment file up to 64 KiB, name included.
_SECRET_LENGTH = 32768
# Whole trees of the system and of packages, the well-known parents of other people's directories, and home directories.
_SYSTEM_DIRECTORY = re.compile(
    r"/+(?:"
    r"(?:bin|boot|dev|etc|lib|lib32|lib64|libx32|proc|root/\.ssh|run|sbin|sys|usr"
    r"|var/(?:backups|cache/[^/]+|log|mail|run|spool)"
    r"|var/lib/(?:apt|containerd|containers|dkms|docker|dpkg|gpu_fleet|kubelet|rpm|snapd|systemd|nim/(?:maintenance|state)))(?:/.*)?"
    r"|home(?:/[^/]+(?:/\.ssh(?:/.*)?)?)?|media|mnt|opt|root|srv|tmp|var|var/cache|var/lib|var/lib/nim|var/lib/nim/cache"
    r"|var/opt|var/tmp"
    r")?/?\Z"
)
_ULIMIT_NAMES = ["core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc"]
_ULIMIT_NAMES += ["rss", "rtprio", "rttime", "sigpending", "stack"]

#: How many (int), which (indices as digits, or UUIDs), or every one ("all") of the host's GPUs.
GpuRequest = t.Union[int, str, "tuple[str, ...]"]


@dataclass(frozen=True)
class NimModel:
    """One entry of ``nim_models``, checked and with its defaults filled in.

    Attributes:
        gpus: Count, ``"all"``, or a tuple of indices (digits) and UUIDs; None = as many as its profile needs, else one.
        shm_size: Bytes.
        disk_space: Bytes that the model needs, or None when not said.
        gpu_memory: Bytes that must be free on each of its GPUs, or None when not said.
        uid: User id of the container's process, the owner of its cache.
        read_only: Whether the container can write to its mounts and to ``tmpfs`` alone.
        tmpfs: Directories of a read-only container that are kept in memory.
        start_timeout: Seconds until ready.
        stop_timeout: Seconds between SIGTERM and SIGKILL.
    """

    name: str
    image: str
    gpus: GpuRequest | None
    port: int
    bind_address: str
    cache_directory: str
    shm_size: int
    uid: int
    gid: int
    ulimits: t.Mapping[str, str] = field(default_factory=dict)
    environment: t.Mapping[str, str] = field(default_factory=dict)
    secret_environment: t.Mapping[str, str] = field(default_factory=dict, repr=False)
    profile: str | None = None
    served_model_name: str | None = None
    weights_directory: str | None = None
    custom_model_name: str | None = None
    lora_directory: str | None = None
    lora_refresh_interval: int | None = None
    max_model_length: int | None = None
    network_mode: str = "bridge"
    read_only: bool = False
    tmpfs: tuple[str, ...] = ()
    engine_arguments: tuple[str, ...] = ()
    start_timeout: int = 1800
    stop_timeout: int = 60
    disk_space: int | None = None
    gpu_memory: int | None = None
    completion: str = "auto"
    state: str = "started"

    @property
    def unit(self) -> str:
        return unit_name(self.name)

    @property
    def container(self) -> str:
        return container_name(self.name)

    @property
    def container_port(self) -> int:
        """Port inside the container: ours to choose, so it is NIM's default unless the host's network is shared."""
        return self.port if self.network_mode == "host" else 8000

    @property
    def gpu_memory_mib(self) -> int | None:
        """``gpu_memory`` in MiB, as nvidia-smi counts."""
        return None if self.gpu_memory is None else -(-self.gpu_memory // 2**20)

    @property
    def url(self) -> str:
        """Base URL at which the host itself reaches the service."""
        address = probe_address(self.bind_address)
        return "http://%s:%d" % ("[%s]" % address if ":" in address else address, self.port)


def probe_address(bind_address: str) -> str:
    """The address at which the host itself reaches a listener."""
    address = ipaddress.ip_address(bind_address)
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return str(address)


def is_system_directory(path: str) -> bool:
    """Whether a normal absolute path is none that a service may own: giving it to a container's user, or removing it as
    a model's cache, would break the host or lose somebody's files."""
    return _SYSTEM_DIRECTORY.match(path) is not None


def parse_size(text: str) -> int | None:
    """Bytes of ``16GB``, ``512MiB``, ``64k``; units count in steps of 1024 as Docker does. None: not a size with unit."""
    match = _SIZE.match(text.strip())
    if match is None or text.strip()[-1].isdigit():
        return None
    exponent = " kmgt".index(match.group(2).lower() or " ")
    return int(float(match.group(1)) * 1024**exponent)


def addresses_overlap(one: str, other: str) -> bool:
    """Whether two listeners with the same port would collide."""
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    if first == second:
        return True
    # A listener on :: takes IPv4 too unless it is told otherwise, and Docker publishes both.
    return first.is_unspecified or second.is_unspecified


def parse_models(raw: t.Any, variable: str = "nim_models") -> list[NimModel]:
    """Check a list of models and fill in the defaults.

    Args:
        raw: What the operator wrote: a list of dictionaries; None stands for "not said".
        variable: Name of the list in messages.

    Raises:
        FleetError: ``invalid_option``; the message names the variable, the value and the remedy.
    """
    if raw is None:
        return []
    if not isinstance(raw, (list, tuple)):
        # Shown by none of its values: a secret may be among them.
        raise _refuse(
            variable, raw if is_plain(raw) else "...", "must be a list of models", "write each model as one list entry"
        )
    models = [_Entry("%s[%d]" % (variable, number), entry).parse() for number, entry in enumerate(raw)]
    _check_together(models, variable)
    return models


def _refuse(path: str, value: t.Any, problem: str, remedy: str) -> FleetError:
    if isinstance(value, tuple):
        shown = _shown(value)
    else:
        shown = repr(value) if isinstance(value, str) and value != "..." else str(value)
    # One that stands in the wrong place or has the wrong form may hold a secret.
    shown = scrub_given(shown)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    # A key that is none may hold anything, and a mistake is told in one line.
    path = _CONTROL.sub("?", path)
    return FleetError("invalid_option", "%s = %s: %s; %s." % (path, shown, problem, remedy), option=path)


def _telling(key: t.Any) -> bool:
    """Whether a key, well written or not, is the name of a secret."""
    name = re.sub(r"\W", "_", str(key))
    return is_name_of_secret(name) or _SECRET_NAME.search(name) is not None


class _Entry:
    """One dictionary of the list while it is being read."""

    def __init__(self, path: str, raw: t.Any) -> None:
        self.path = path
        if not isinstance(raw, dict):
            raise _refuse(
                path, raw if is_plain(raw) else "...", "must be a dictionary", "write at least name and image"
            )
        for key in raw:
            if key not in NIM_MODEL_OPTIONS:
                raise _refuse(
                    "%s.%s" % (path, key),
                    # A text under an unknown key may be a secret that was put in the wrong place.
                    "..." if _telling(key) or not is_plain(raw[key]) else raw[key],
                    "no such option",
                    "use one of " + ", ".join(sorted(NIM_MODEL_OPTIONS)),
                )
        self.raw: dict[str, t.Any] = raw

    def bad(self, key: str, problem: str, remedy: str) -> FleetError:
        return _refuse("%s.%s" % (self.path, key), self.raw.get(key), problem, remedy)

    def value(self, key: str) -> t.Any:
        given = self.raw.get(key)
        return NIM_MODEL_OPTIONS[key].get("default") if given is None else given

    def text(self, key: str) -> str | None:
        """A string without control characters; the empty string counts as not said."""
        given = self.value(key)
        if given is None or given == "":
            return None
        if isinstance(given, float):
            raise self.bad(key, "is a number to YAML, which reads 1.20 as 1.2", "put it in quotes")
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise self.bad(key, "must be a string", "put it in quotes")
        given = str(given)
        if _CONTROL.search(given):
            raise self.bad(key, "holds a newline or another control character", "remove it")
        choices = NIM_MODEL_OPTIONS[key].get("choices")
        if choices and given not in choices:
            raise self.bad(key, "is not one of the choices", "use one of " + ", ".join(choices))
        return given

    def required(self, key: str, example: str) -> str:
        given = self.text(key)
        if given is None:
            raise _refuse("%s.%s" % (self.path, key), given, "is required", "set it, for example " + example)
        return given

    def present(self, key: str, value: int | None) -> int:
        """An option that has a default is never None; an explicit empty string falls here."""
        if value is None:
            raise self.bad(key, "is empty", "give it a value or leave it out")
        return value

    def number(self, key: str, low: int, high: int, unit: str) -> int | None:
        given = self.value(key)
        if given is None or given == "":
            return None
        remedy = "write a whole number%s from %d to %d" % (unit and " of " + unit, low, high)
        if isinstance(given, str) and re.match(r"-?[0-9]{1,18}\Z", given):
            given = int(given)
        if isinstance(given, bool) or not isinstance(given, int):
            raise self.bad(key, "is not a whole number", remedy)
        if not low <= given <= high:
            raise self.bad(key, "is out of range", remedy)
        return given

    def size(self, key: str) -> int | None:
        given = self.text(key)
        if given is None:
            return None
        size = parse_size(given)
        if size is None:
            raise self.bad(key, "is not a size with a unit", "write a number and a unit, for example 16GB or 512MB")
        if size < 1024**2 or size > 2**60:
            raise self.bad(key, "is out of range", "write a size from 1MB to 1048576TB")
        return size

    def directory(self, key: str) -> str | None:
        given = self.text(key)
        if given is None:
            return None
        if not given.startswith("/"):
            raise self.bad(key, "is not an absolute path", "start it with /")
        if re.search('[:,"]', given) or ".." in given.split("/"):
            raise self.bad(
                key, "holds a colon, a comma, a double quote or '..', which mounts do not allow", "choose another path"
            )
        given = posixpath.normpath("/" + given.lstrip("/"))
        if is_system_directory(given):
            raise self.bad(key, "is a directory of the system", "choose a directory of its own")
        return given

    def parse(self) -> NimModel:
        name = self.required("name", "llama3")
        if not SERVICE_NAME.match(name):
            raise self.bad(
                "name",
                "cannot be the name of a unit and a container",
                "use at most 60 letters, digits, '-', '_' and '.', the first one a letter or digit",
            )
        if name.endswith("-download"):
            raise self.bad("name", "ends in '-download', as the download containers do", "choose another name")
        if name == "ngc":
            raise self.bad("name", "would give its files the name of the NGC key's file", "choose another name")
        image = self.required("image", "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4")
        ImageReference.parse(image, option=self.path + ".image")
        bind_address = self.text("bind_address") or ""
        try:
            # Docker does not take a zone (fe80::1%eth0), and before Python 3.9 ipaddress did not either.
            ipaddress.ip_address(bind_address.replace("%", "/"))
        except ValueError:
            raise self.bad(
                "bind_address", "is not an IP address", "use 0.0.0.0, 127.0.0.1 or an address of the host"
            ) from None
        network_mode = self.text("network_mode") or "bridge"
        if not _NETWORK.match(network_mode) or network_mode == "none":
            raise self.bad("network_mode", "cannot serve", "use bridge, host, or the name of a Docker network")
        if network_mode == "host" and not ipaddress.ip_address(bind_address).is_unspecified:
            raise self.bad(
                "network_mode",
                "shares the host's network, where NIM listens on every address and bind_address %s has no effect"
                % bind_address,
                "use bridge, or leave bind_address out",
            )
        user = _USER.match(self.text("user") or "")
        if user is None:
            raise self.bad("user", "is not a numeric user", "write UID or UID:GID, for example 1000:1000")
        uid = int(user.group(1))
        read_only = parse_boolean(self.value("read_only"))
        if read_only is None:
            raise self.bad("read_only", "is neither true nor false", "write true or false")
        lora_directory = self.directory("lora_directory")
        lora_refresh_interval = self.number("lora_refresh_interval", 1, 86400, "seconds")
        if lora_refresh_interval is not None and lora_directory is None:
            raise self.bad("lora_refresh_interval", "has no effect without lora_directory", "set lora_directory too")
        served_model_name = self.text("served_model_name")
        if served_model_name is not None and not _SERVED_NAMES.match(served_model_name):
            raise self.bad("served_model_name", "is no model name", "use letters, digits and ._/:@+- without spaces")
        custom_model_name = self.text("custom_model_name")
        if custom_model_name is not None and not _SERVED_NAMES.match(custom_model_name):
            raise self.bad("custom_model_name", "is no model name", "use letters, digits and ._/:@+- without spaces")
        cache_directory = self.directory("cache_directory") or "/var/lib/nim/cache/" + name
        for key in ("weights_directory", "lora_directory"):
            if self.directory(key) == cache_directory:
                raise self.bad(
                    key, "is the cache of the model too, which NIM fills and a removal deletes", "keep the two apart"
                )
        return NimModel(
            name=name,
            image=image,
            gpus=self._gpus(),
            port=self.present("port", self.number("port", 1, 65535, "")),
            bind_address=bind_address,
            cache_directory=cache_directory,
            shm_size=self.present("shm_size", self.size("shm_size")),
            uid=uid,
            gid=int(user.group(2) or uid),
            ulimits=self._ulimits(),
            environment=self._environment(),
            secret_environment=self._secret_environment(),
            profile=self._profile(),
            served_model_name=served_model_name,
            weights_directory=self.directory("weights_directory"),
            custom_model_name=custom_model_name,
            lora_directory=lora_directory,
            lora_refresh_interval=lora_refresh_interval,
            max_model_length=self.number("max_model_length", 1, 100_000_000, "tokens"),
            network_mode=network_mode,
            read_only=read_only,
            tmpfs=self._tmpfs(read_only),
            engine_arguments=self._engine_arguments(),
            start_timeout=self.present("start_timeout", self.number("start_timeout", 10, 86400, "seconds")),
            stop_timeout=self.present("stop_timeout", self.number("stop_timeout", 1, 3600, "seconds")),
            disk_space=self.size("disk_space"),
            gpu_memory=self.size("gpu_memory"),
            completion=self.text("completion") or "auto",
            state=self.text("state") or "started",
        )

    def _gpus(self) -> GpuRequest | None:
        given = self.value("gpus")
        if given is None or given == "":
            return None
        remedy = "write a count, a list of indices or UUIDs, or all"
        if isinstance(given, str) and is_digits(given.strip()):
            given = int(given)
        if isinstance(given, str):
            if given == "all":
                return given
            if _GPU_UUID.match(given):
                return (given,)
            raise self.bad("gpus", "is neither a count nor a list of GPUs", remedy)
        if isinstance(given, int) and not isinstance(given, bool):
            if given < 1:
                raise self.bad("gpus", "a NIM needs at least one GPU", remedy)
            return given
        if not isinstance(given, (list, tuple)) or not given:
            raise self.bad("gpus", "is neither a count nor a list of GPUs", remedy)
        found: list[str] = []
        for entry in given:
            text = "" if isinstance(entry, bool) else str(entry).strip()
            if is_digits(text):
                text = str(int(text))
            elif not _GPU_UUID.match(text):
                raise self.bad("gpus", "%r is neither the index nor the UUID of a GPU" % (entry,), remedy)
            if text.lower() in (known.lower() for known in found):
                raise self.bad("gpus", "names GPU %s twice" % text, "name it once")
            found.append(text)
        return tuple(found)

    def _entries(self, option: str, remedy: str) -> t.Iterator[tuple[t.Any, t.Any, str]]:
        """Key, value and path of each entry of an option that is a dictionary."""
        given = self.value(option)
        if not isinstance(given, dict):
            raise self.bad(option, "must be a dictionary", remedy)
        for key, value in given.items():
            yield key, value, "%s.%s.%s" % (self.path, option, key)

    def _ulimits(self) -> dict[str, str]:
        found = {}
        for key, value, path in self._entries("ulimits", "write for example {nofile: 65536}"):
            if key not in _ULIMIT_NAMES:
                raise _refuse(path, value, "no such limit", "use one of " + ", ".join(_ULIMIT_NAMES))
            text = "" if isinstance(value, bool) else str(value)
            if not re.match(r"-1\Z|[0-9]{1,18}(:([0-9]{1,18}|-1))?\Z|-1:-1\Z", text):
                raise _refuse(path, value, "is no limit", "write a number, soft:hard, or -1 for no limit")
            soft, _colon, hard = text.partition(":")
            if hard not in ("", "-1") and int(soft) > int(hard):
                raise _refuse(path, value, "has a soft limit above the hard one", "write soft:hard, the smaller first")
            found[key] = text
        return found

    def _environment(self) -> dict[str, str]:
        found = {}
        for key, value, path in self._entries("environment", "write NAME: value pairs"):
            if not isinstance(key, str) or not _ENVIRONMENT_NAME.match(key):
                # A text may be a secret under a name that is written wrong.
                shown = "..." if _telling(key) or not is_plain(value) else value
                raise _refuse(path, shown, "is no name of a variable", "use letters, digits and underscores")
            if key in OWNED_ENVIRONMENT:
                shown = "..." if _telling(key) or not is_plain(value) else value
                raise _refuse(path, shown, "is set by this collection", OWNED_ENVIRONMENT[key])
            telling = is_name_of_secret(key) and not _NO_SECRET.match(str(value))
            if telling or _SECRET_NAME.search(key) or (isinstance(value, str) and _SECRET_VALUE.search(value)):
                raise _refuse(
                    path,
                    "...",
                    "looks like a secret, and the environment is stored readable for everybody on the host",
                    "put it into secret_environment instead",
                )
            if isinstance(value, bool):
                raise _refuse(
                    path, value, "is ambiguous: NIM reads 1 and 0 as well as true and false", "put it in quotes"
                )
            if not isinstance(value, (str, int, float)):
                raise _refuse(path, value, "must be a string or a number", "put it in quotes")
            if _CONTROL.search(str(value)):
                raise _refuse(path, value, "holds a newline or another control character", "remove it")
            found[key] = str(value)
        return found

    def _secret_environment(self) -> dict[str, str]:
        """Never shows a value: all of them are secrets."""
        given = self.value("secret_environment")
        path = self.path + ".secret_environment"
        if not isinstance(given, dict):
            raise _refuse(path, "...", "must be a dictionary", "write NAME: value pairs")
        plain = self.raw.get("environment")
        found = {}
        for key, value in given.items():
            if not isinstance(key, str) or not _ENVIRONMENT_NAME.match(key):
                # Somebody who has mixed up name and value must not find the value in a log.
                raise _refuse(path, "...", "holds what is no name of a variable", "use letters, digits and underscores")
            entry = "%s.%s" % (path, key)
            if key in OWNED_ENVIRONMENT:
                raise _refuse(entry, "...", "is set by this collection", OWNED_ENVIRONMENT[key])
            if isinstance(plain, dict) and key in plain:
                raise _refuse(entry, "...", "is in environment too", "leave it out there")
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise _refuse(entry, "...", "must be a string or a number", "put it in quotes")
            text = str(value)
            if not text:
                raise _refuse(entry, "...", "is empty", "check where the value comes from, or leave the variable out")
            if _CONTROL.search(text):
                raise _refuse(entry, "...", "holds a newline or another control character", "remove it")
            if "{{" in text or text.startswith("$ANSIBLE_VAULT"):
                raise _refuse(
                    entry, "...", "is a template or a vault text that was not resolved", "check where it comes from"
                )
            if len(text.encode("utf-8", "surrogatepass")) > _SECRET_LENGTH:
                raise _refuse(entry, "...", "is longer than %d bytes" % _SECRET_LENGTH, "mount it as a file instead")
            found[key] = text
        return found

    def _profile(self) -> str | None:
        given = self.text("profile")
        if given is None or given == "automatic":
            return None
        if _PROFILE_ID.match(given) or given in ("default", "vllm", "sglang", "tensorrt_llm"):
            return given
        trap = re.match(r"([0-9a-fA-F]{64})\s*\((.*)\)\Z", given)
        if trap:
            raise self.bad(
                "profile",
                "is a line of list-model-profiles, 'id (description)', which NIM does not accept",
                "use the id alone: " + trap.group(1).lower(),
            )
        if re.match(r"[0-9a-fA-F]{16,}\Z", given):
            raise self.bad(
                "profile",
                "looks like an id but has %d characters%s" % (len(given), "" if given.islower() else " and capitals"),
                "copy all 64 lower-case hexadecimal digits from list-model-profiles",
            )
        if not _PROFILE_DESCRIPTION.match(given):
            raise self.bad(
                "profile",
                "is neither the id nor the description of a profile",
                "use the 64-digit id or the description (such as vllm-fp16-tp1) from list-model-profiles, or leave it out",
            )
        return given

    def _tmpfs(self, read_only: bool) -> tuple[str, ...]:
        given = self.value("tmpfs")
        if not isinstance(given, (list, tuple)):
            raise self.bad("tmpfs", "must be a list", "write each directory as one list entry")
        if not read_only:
            if self.raw.get("tmpfs") not in (None, NIM_MODEL_OPTIONS["tmpfs"]["default"]):
                raise self.bad("tmpfs", "has no effect without read_only", "set read_only too")
            return ()
        found = []
        for number, entry in enumerate(given):
            path = "%s.tmpfs[%d]" % (self.path, number)
            if not isinstance(entry, str) or not _CONTAINER_DIRECTORY.match(entry) or ".." in entry.split("/"):
                raise _refuse(
                    path,
                    entry,
                    "is no absolute path of a directory in the container",
                    "start it with / and use letters, digits and ._-/",
                )
            directory = posixpath.normpath(entry)
            if directory in found:
                raise _refuse(path, entry, "is there twice", "name it once")
            if directory == "/" or any(
                _inside(known + "/", directory) or _inside(directory + "/", known) for known in _TAKEN
            ):
                raise _refuse(
                    path, entry, "would hide NIM's own files, its cache or those of the system", "leave it out"
                )
            found.append(directory)
        return tuple(found)

    def _engine_arguments(self) -> tuple[str, ...]:
        given = self.value("engine_arguments")
        if not isinstance(given, (list, tuple)):
            raise self.bad("engine_arguments", "must be a list", "write each argument as one list entry")
        found = []
        for number, entry in enumerate(given):
            path = "%s.engine_arguments[%d]" % (self.path, number)
            if isinstance(entry, bool) or not isinstance(entry, (str, int, float)) or str(entry) == "":
                raise _refuse(path, entry, "must be a string", "put it in quotes")
            text = str(entry)
            if _CONTROL.search(text):
                raise _refuse(path, entry, "holds a newline or another control character", "remove it")
            option = text.split("=", 1)[0]
            if option in OWNED_ENGINE_ARGUMENTS:
                raise _refuse(path, text, "is set by this collection", OWNED_ENGINE_ARGUMENTS[option])
            if option in ("--api-key", "--hf-token") or _SECRET_VALUE.search(text):
                raise _refuse(path, "...", "is a secret, and arguments are readable for everybody", "leave it out")
            found.append(text)
        return tuple(found)


def _check_together(models: t.Sequence[NimModel], variable: str) -> None:
    """Refuse two models that want the same name, port or GPU. Stopped models keep their port and GPUs."""
    for number, model in enumerate(models):
        path = "%s[%d]" % (variable, number)
        for earlier in models[:number]:
            if model.name == earlier.name:
                raise _refuse(
                    path + ".name", model.name, "is the name of an earlier model too", "give each its own name"
                )
            if "absent" in (model.state, earlier.state):
                continue
            if model.port == earlier.port and addresses_overlap(model.bind_address, earlier.bind_address):
                raise _refuse(
                    path + ".port",
                    model.port,
                    "is the port of model %s too, on the same address" % earlier.name,
                    "give each model its own port",
                )
            if "all" in (model.gpus, earlier.gpus):
                raise _refuse(
                    path + ".gpus",
                    model.gpus,
                    "cannot share the host with model %s, as one of the two wants all GPUs (the other has %s)"
                    % (earlier.name, _shown(earlier.gpus)),
                    "name counts or lists that leave room for both",
                )
            if isinstance(model.gpus, tuple) and isinstance(earlier.gpus, tuple):
                wanted = {gpu.lower() for gpu in model.gpus}
                shared = [gpu for gpu in earlier.gpus if gpu.lower() in wanted]
                if shared:
                    raise _refuse(
                        path + ".gpus",
                        model.gpus,
                        "GPU %s is taken by model %s" % (", ".join(shared), earlier.name),
                        "give each model GPUs of its own",
                    )
            if model.cache_directory == earlier.cache_directory and model.uid != earlier.uid:
                raise _refuse(
                    path + ".cache_directory",
                    model.cache_directory,
                    "belongs to model %s, which runs as another user (%d, not %d)"
                    % (earlier.name, earlier.uid, model.uid),
                    "use the same user or another directory",
                )
            if _inside(model.cache_directory, earlier.cache_directory) or _inside(
                earlier.cache_directory, model.cache_directory
            ):
                raise _refuse(
                    path + ".cache_directory",
                    model.cache_directory,
                    "and the cache of model %s, %s, lie in each other" % (earlier.name, earlier.cache_directory),
                    "give each model a directory beside the other's",
                )


def _inside(path: str, parent: str) -> bool:
    return path.startswith(parent + "/")


def _shown(gpus: GpuRequest | None) -> str:
    if gpus is None:
        return "what its profile needs"
    return "[%s]" % ", ".join(gpus) if isinstance(gpus, tuple) else str(gpus)
