# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""What is written for a NIM service: its unit, its container's arguments and its secret variables."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sys
import typing as t
from dataclasses import dataclass, field

from ._gpu_wishes import names_profile
from ._nim_family import Family
from ._nim_models import NAME_LABEL, NimModel
from ._nim_paths import LORA_PATH, MAINTENANCE_FILE, STATE_DIRECTORY, WEIGHTS_PATH, WRAPPER, download_name
from ._nim_service_state import ImageState
from ._nim_unit import spec_hash
from ._nim_unit_program import program

IMAGE_LABEL = "io.gpu-fleet.nim.image"
DIGEST_LABEL = "io.gpu-fleet.nim.digest"
#: Says which secret variables a container was given; see :meth:`Secrets.spec`.
SECRETS_LABEL = "io.gpu-fleet.nim.secrets"

START_LIMIT_BURST = 4
#: Seconds that one failed start takes beyond its start timeout: back-off and the stop of what is left.
START_LIMIT_MARGIN = 120

_HEADER = "# Written by gpu_fleet.nim.nim_service; changes made here are overwritten.\n"

TARGET_TEXT = (
    _HEADER
    + """\
[Unit]
Description=All NIM services of this host
Documentation=https://docs.nvidia.com/nim/

[Install]
WantedBy=multi-user.target
"""
)

SLICE_TEXT = (
    _HEADER
    + """\
[Unit]
Description=Containers of the NIM services
Before=slices.target
"""
)

Json = t.Dict[str, t.Any]


def unit_text(model: NimModel, injection: str) -> str:
    """The unit of one model. The image is not named in it: a new image must not need a daemon-reload."""
    wants = ["docker.service", "network-online.target"]
    after = [
        *wants,
        "nvidia-persistenced.service",
        "nvidia-fabricmanager.service",
        "nvidia-cdi-refresh.service",
        "nvidia-gpu-reset.target",
    ]
    if injection == "cdi":
        wants.append("nvidia-cdi-refresh.service")
    interval = START_LIMIT_BURST * (model.start_timeout + START_LIMIT_MARGIN)
    return (
        _HEADER
        + """\
[Unit]
Description=NIM {name}
Documentation=https://docs.nvidia.com/nim/
# Not Requires=: a restart of Docker must not restart the model.
Wants={wants}
After={after}
PartOf=nim.target
# Lies there while the host is being worked on; survives a reboot.
ConditionPathExists=!{maintenance}
StartLimitIntervalSec={interval}
StartLimitBurst={burst}

[Service]
Type=exec
Environment=HOME=/root
ExecStart={wrapper} run {name}
# Also called when the main process died by itself; it then leaves the container alone.
ExecStop={wrapper} stop {name}
TimeoutStopSec={timeout_stop}
KillMode=mixed
# Always: a NIM may end with code 0 although it failed.
Restart=always
# The wrapper waits longer after a failure; a stop during this pause would leave the container running.
RestartSec=200ms
RestartPreventExitStatus=77 78
SuccessExitStatus=77 143
RuntimeDirectory=nim
RuntimeDirectoryPreserve=yes
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ReadWritePaths=-{state}

[Install]
WantedBy=nim.target multi-user.target
""".format(
            name=model.name,
            wants=" ".join(wants),
            after=" ".join(after),
            maintenance=MAINTENANCE_FILE,
            interval=interval,
            burst=START_LIMIT_BURST,
            wrapper=WRAPPER,
            timeout_stop=model.stop_timeout + 30,
            state=STATE_DIRECTORY,
        )
    )


def wrapper_text() -> str:
    """The program that the units run, with a Python that is there whatever Ansible was told to use."""
    python = sys.executable if sys.executable.startswith(("/usr/bin/", "/usr/libexec/")) else "/usr/bin/python3"
    return "#!%s\n%s" % (python, program())


@dataclass(frozen=True)
class Secrets:
    """Content of ``/etc/nim/<name>.env``, readable for root alone.

    What is derived from a secret and stands elsewhere (the specification that everybody can read, the differences that
    Ansible prints) is derived with a random key that is kept in the file: a short password could be guessed from a plain
    hash of it.
    """

    key: str
    values: t.Mapping[str, str] = field(default_factory=dict, repr=False)
    #: For the values with the first fingerprint: the one that a container had for them, from a key that was lost.
    alias: tuple[str, str] = ("", "")

    @classmethod
    def parse(cls, text: str | None) -> Secrets | None:
        """What :meth:`render` wrote; None for anything that has no key in it."""
        found = re.match(r"(?:#.*\n)*# key ([0-9a-f]{64})\n(?:# ([0-9a-f]{64}) is ([0-9a-f]{64})\n)?", text or "")
        if found is None:
            return None
        lines = (text or "")[found.end() :].splitlines()
        values = dict(_pair(line) for line in lines if "=" in line and not line.startswith("#"))
        return cls(found.group(1), values, (found.group(2) or "", found.group(3) or ""))

    def render(self) -> str:
        """An environment file as ``docker create --env-file`` reads it: no quotes, no escapes."""
        lines = ["%s=%s\n" % pair for pair in sorted(self.values.items())]
        alias = "# %s is %s\n" % self.alias if all(self.alias) else ""
        return "%s# key %s\n%s%s" % (_HEADER, self.key, alias, "".join(lines))

    def as_in(self, container: t.Mapping[str, t.Any]) -> Secrets:
        """The same, under the fingerprint that a container has for them, if it has these very values.

        So a file that was lost can be written again without a restart. What is not told by the container is not taken for
        granted.
        """
        config = container.get("Config") or {}
        label = str((config.get("Labels") or {}).get(SECRETS_LABEL) or "")
        there = dict(_pair(str(entry)) for entry in config.get("Env") or ())
        if not re.match(r"[0-9a-f]{64}\Z", label) or any(there.get(name) != text for name, text in self.values.items()):
            return self
        return Secrets(self.key, self.values, (self._own(), label))

    def fingerprint(self, content: str) -> str:
        return hmac.new(bytes.fromhex(self.key), content.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def _own(self) -> str:
        return self.fingerprint(json.dumps(sorted(self.values.items())))

    def spec(self) -> str:
        """The part of a specification that changes with any of them."""
        own = self._own()
        return self.alias[1] if own == self.alias[0] else own

    def __str__(self) -> str:
        """``HF_TOKEN hmac:12ab34cd56ef, …``"""
        return ", ".join(
            "%s hmac:%s" % (name, self.fingerprint(json.dumps([name, value]))[:12])
            for name, value in sorted(self.values.items())
        )


def _pair(line: str) -> tuple[str, str]:
    name, _separator, value = line.partition("=")
    return name, value


def build_configuration(
    model: NimModel,
    image: ImageState,
    gpus: t.Sequence[str],
    *,
    kinds: t.Sequence[str],
    injection: str,
    cgroup_driver: str,
    secret: Secrets,
) -> Json:
    """Content of ``/etc/nim/<name>.json``: all that the wrapper needs, nothing secret.

    ``spec`` names what the container runs; it leaves out what can change without a new container.

    Args:
        gpus: UUIDs.
        kinds: Of these GPUs.
    """
    family = image.family
    environment = family.environment(model)
    if injection == "runtime":
        environment["NVIDIA_VISIBLE_DEVICES"] = ",".join(gpus)
    # Docker's slices exist with the systemd driver only.
    common = ["--cgroup-parent=nim.slice"] if cgroup_driver == "systemd" else []
    common += ["--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=%d:%d" % (model.uid, model.gid)]
    if model.read_only:
        # Executable: kernels that are compiled at run time are loaded from there.
        common += ["--read-only", *("--tmpfs=%s:exec,mode=1777" % path for path in model.tmpfs)]
    common += ["--pids-limit=-1", "--shm-size=%d" % model.shm_size]
    common += ["--ulimit=%s=%s" % limit for limit in sorted(model.ulimits.items())]
    common += gpu_arguments(gpus, injection)
    common += _mounts(model, family)
    network = [] if model.network_mode == "bridge" else ["--network=" + model.network_mode]
    address = "[%s]" % model.bind_address if ":" in model.bind_address else model.bind_address
    publish = (
        [] if model.network_mode == "host" else ["--publish=%s:%d:%d" % (address, model.port, model.container_port)]
    )
    options = [*common, *network, *publish, *_environment_arguments(environment)]
    command = family.command(model, image.command)
    create = [*options, image.reference, *command]
    content: Json = {"image": image.identifier, "create": create}
    if secret.values:
        content["secrets"] = secret.spec()
    spec = spec_hash(content)
    labels = ["--label=%s=%s" % (NAME_LABEL, model.name), "--label=%s=%s" % (IMAGE_LABEL, model.image)]
    labels.append("--label=%s=%s" % (DIGEST_LABEL, image.digest))
    if secret.values:
        labels.append("--label=%s=%s" % (SECRETS_LABEL, secret.spec()))

    download: Json | None = None
    step = family.download(model)
    if step is not None:
        words = [*_log_arguments(download_name(model.name)), *labels, *common, *network]
        words += _environment_arguments({**environment, **step.environment})
        files = [image.identifier, model.profile, bool(model.lora_directory), model.cache_directory]
        download = {
            **_with_key(model, image, words, step.command),
            # What decides which files are fetched, and where to: without a name NIM takes a profile that suits the GPUs.
            "key": spec_hash([*files, [] if names_profile(model) else sorted(kinds)]),
            # By which hosts know what they fetched while that was asked with the very GPUs.
            "former_key": spec_hash([*files, sorted(gpus)]),
        }
    key_in_service: Json | None = None
    if step is None and family.key == "unknown":
        # No known way to fetch the files beforehand: the service has to do it, and then it needs the key.
        words = [*_log_arguments(model.container), *labels, *options]
        key_in_service = _with_key(model, image, words, command)
    tls = model.environment.get("NIM_SSL_MODE", "").lower() == "tls"
    return {
        "name": model.name,
        "spec": spec,
        "image": model.image,
        "digest": image.digest,
        "family": family.key,
        "gpus": list(gpus),
        "port": model.port,
        "create": [*_log_arguments(model.container), *labels, *create],
        "download": download,
        # Names alone; the values are in the environment file.
        "secret_environment": sorted(secret.values),
        "key_in_service": key_in_service,
        "cache_directory": model.cache_directory,
        "ready_url": (model.url.replace("http:", "https:", 1) if tls else model.url) + "/v1/health/ready",
        "stop_timeout": model.stop_timeout,
        "docker_timeout": model.start_timeout,
    }


def _with_key(model: NimModel, image: ImageState, options: t.Sequence[str], command: t.Sequence[str]) -> Json:
    """What the wrapper needs for a container that gets the NGC key: there a shell runs what the image would run."""
    return {
        "options": list(options),
        "image": image.reference,
        "command": [*image.entrypoint, *(command or image.command)],
        "uid": model.uid,
    }


def _log_arguments(tag: str) -> list[str]:
    return ["--log-driver=journald", "--log-opt=tag=" + tag]


def _environment_arguments(environment: t.Mapping[str, str]) -> list[str]:
    return ["--env=%s=%s" % pair for pair in sorted(environment.items())]


def gpu_arguments(gpus: t.Sequence[str], injection: str) -> list[str]:
    if injection == "runtime":
        return ["--runtime=nvidia"]
    if injection == "cdi":
        return ["--device=nvidia.com/gpu=" + uuid for uuid in gpus]
    # The option is read as CSV, so a list of devices needs quotes of its own.
    return ['--gpus="device=%s"' % ",".join(gpus)]


def _mounts(model: NimModel, family: Family) -> list[str]:
    mounts = ["--mount=type=bind,source=%s,target=%s" % (model.cache_directory, family.cache_path)]
    for source_path, target in ((model.weights_directory, WEIGHTS_PATH), (model.lora_directory, LORA_PATH)):
        if source_path:
            mounts.append("--mount=type=bind,source=%s,target=%s,readonly" % (source_path, target))
    return mounts
