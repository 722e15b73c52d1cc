# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This module util is PRIVATE to the collection; it may change at any time.
"""The families of NIM images, told apart by labels and environment, and the contract of each.

Sources: NVIDIA's documentation of NIM for LLMs (configuration, utilities, fine-tuned models, PEFT), the migration guide
from 1.x to 2.x, and for the native runtime NVIDIA/k8s-nim-operator (``internal/nimsource``).
"""

from __future__ import annotations

import re
import shlex
import typing as t
from dataclasses import dataclass

from ._errors import FleetError
from ._nim_downloads import needs_download
from ._nim_models import NimModel
from ._nim_paths import CACHE_PATH, LORA_PATH, NATIVE_CACHE_PATH, WEIGHTS_PATH
from ._options import MINIMUM_DOCKER_VERSION

NATIVE_MODEL_PATH = NATIVE_CACHE_PATH + "/model"

#: Where the engine of 2.x listens, on all addresses of the container.
BACKEND_PORT = 8001
BACKEND_PORT_VARIABLE = "NIM_BACKEND_PORT"

_LABEL_VERSION = "com.nvidia.nim.version"
_LABEL_PROTOCOL = "com.nvidia.nim.model_download_protocol"
_ENV_1X = "INFERENCE_MICROSERVICE_LLM_NIM_VERSION"

#: Oldest Docker Engine that NVIDIA documents for a family; of the others nothing is known.
OLDEST_ENGINE = {"1.x": MINIMUM_DOCKER_VERSION, "2.x": "24.0"}


@dataclass(frozen=True)
class DownloadStep:
    """How the files of a model are fetched into the cache by a container of their own.

    Attributes:
        command: Arguments behind the image, which replace its default command.
        environment: Variables beside those of the service.
    """

    command: tuple[str, ...]
    environment: t.Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One line of NIM images.

    Attributes:
        key: ``1.x``, ``2.x`` (also 3.x), ``native`` or ``unknown``.
        version: What the image says about itself, may be empty.
        cache_path: Where the model cache is mounted in the container.
    """

    key: str
    version: str = ""

    @property
    def cache_path(self) -> str:
        return NATIVE_CACHE_PATH if self.key == "native" else CACHE_PATH

    def environment(self, model: NimModel) -> dict[str, str]:
        """Variables that the service container is given for the options of a model, its own ``environment`` last.

        Those of ``secret_environment`` come by another way; none of them is in the answer.

        Raises:
            FleetError: ``invalid_option`` when this family cannot do what an option asks for.
        """
        found = self._native_environment(model) if self.key == "native" else self._llm_environment(model)
        found.update(model.environment)
        return {name: value for name, value in found.items() if name not in model.secret_environment}

    def _llm_environment(self, model: NimModel) -> dict[str, str]:
        port = str(model.container_port)
        found = {"NIM_CACHE_PATH": CACHE_PATH, "NIM_SERVER_PORT": port}
        if self.key == "2.x":
            # Its own health listener unless it is the server's port.
            found["NIM_HEALTH_PORT"] = port
            if not {"NIM_LOG_LEVEL", "VLLM_LOGGING_LEVEL"} & set(model.environment):
                # The default of 2.x is WARNING, which hides the phases of the start.
                found["NIM_LOG_LEVEL"] = "INFO"
        else:
            # NIMs that are not LLMs read this one; the operator of NVIDIA sets both.
            found["NIM_HTTP_API_PORT"] = port
        served = model.served_model_name
        if model.weights_directory:
            found["NIM_MODEL_PATH" if self.key == "2.x" else "NIM_FT_MODEL"] = WEIGHTS_PATH
        if model.custom_model_name:
            if self.key == "2.x":
                # 2.x builds no engine, so there is nothing to name but the model itself.
                served = served or model.custom_model_name
            else:
                found["NIM_CUSTOM_MODEL_NAME"] = model.custom_model_name
        if served:
            found["NIM_SERVED_MODEL_NAME"] = served
        if model.profile:
            found["NIM_MODEL_PROFILE"] = model.profile
        if model.max_model_length:
            found["NIM_MAX_MODEL_LEN"] = str(model.max_model_length)
        if model.lora_directory:
            found["NIM_PEFT_SOURCE"] = LORA_PATH
            if model.lora_refresh_interval:
                found["NIM_PEFT_REFRESH_INTERVAL"] = str(model.lora_refresh_interval)
        if self.key == "2.x" and model.engine_arguments:
            found["NIM_PASSTHROUGH_ARGS"] = " ".join(shlex.quote(argument) for argument in model.engine_arguments)
        return found

    def _native_environment(self, model: NimModel) -> dict[str, str]:
        for option in (
            "profile",
            "served_model_name",
            "custom_model_name",
            "lora_directory",
            "max_model_length",
            "engine_arguments",
        ):
            if getattr(model, option):
                raise FleetError(
                    "invalid_option",
                    "Model %s: %s = %s: image %s has the native NIM runtime, which knows no such setting; "
                    "leave the option out." % (model.name, option, getattr(model, option), model.image),
                    option=option,
                )
        address = "0.0.0.0:%d" % model.container_port
        return {
            "NIM_BIND_ADDR": address,
            "NIM_SERVER_BIND_ADDR": address,
            "NIM_ENGINE_MODEL_PATH": WEIGHTS_PATH if model.weights_directory else NATIVE_MODEL_PATH,
        }

    def backend_port(self, model: NimModel) -> int | None:
        """Second port that the service takes on the host: that of the engine behind 2.x, where the network is shared.

        Raises:
            FleetError: ``invalid_option``.
        """
        if self.key != "2.x" or model.network_mode != "host":
            return None
        given = model.environment.get(BACKEND_PORT_VARIABLE, str(BACKEND_PORT))
        if not re.match(r"\d{1,5}\Z", given) or not 0 < int(given) < 65536:
            raise FleetError(
                "invalid_option",
                "Model %s: environment.%s = %r: is no port; write a number from 1 to 65535."
                % (model.name, BACKEND_PORT_VARIABLE, given),
            )
        return int(given)

    def command(self, model: NimModel, image_command: t.Sequence[str]) -> tuple[str, ...]:
        """Arguments behind the image; empty leaves the image's own command alone."""
        if self.key != "2.x" and model.engine_arguments:
            return tuple(image_command) + model.engine_arguments
        return ()

    def download(self, model: NimModel) -> DownloadStep | None:
        """How to fill the cache before the service starts, or None when there is nothing to fetch or no known way."""
        if self.key == "unknown" or not needs_download(model):
            return None
        if self.key == "native":
            return DownloadStep((), {"NIM_ENGINE_MODEL_DOWNLOAD_ONLY": "1"})
        command = ["download-to-cache"]
        if model.profile and model.profile != "default":
            command += ["--profile" if self.key == "1.x" else "-p", model.profile]
        elif model.lora_directory and self.key == "1.x":
            command.append("--lora")
        return DownloadStep(tuple(command), {})


def detect_family(
    labels: t.Mapping[str, str] | None, env: t.Mapping[str, str] | t.Sequence[str] | None, tag: str | None = None
) -> Family:
    """Tell the family of an image.

    Args:
        labels: Labels of the image's configuration.
        env: Its environment, as a mapping or as Docker's list of ``NAME=value``.
        tag: Tag of the reference; decides only where the image itself says nothing.

    An image that cannot be recognised is ``unknown``, never an error: NIMs that are not LLMs may carry no label at all.
    """
    labels = labels or {}
    variables = dict(env) if isinstance(env, t.Mapping) else dict(_split(entry) for entry in env or ())
    version = labels.get(_LABEL_VERSION) or variables.get(_ENV_1X) or ""
    if labels.get(_LABEL_PROTOCOL, "").startswith("native"):
        return Family("native", version)
    major = _major(labels.get(_LABEL_VERSION))
    if major is not None:
        return Family("2.x" if major >= 2 else "1.x", version)
    # Set, possibly to nothing, by the Python start-up of 1.x only.
    if _ENV_1X in variables:
        return Family("1.x", version)
    major = _major(tag)
    if major is not None and "NIM_CACHE_PATH" in variables:
        return Family("2.x" if major >= 2 else "1.x", tag or "")
    return Family("unknown", version)


def family_of_image(image: t.Mapping[str, t.Any], tag: str | None = None) -> Family:
    """Family of an image as Docker's API (``Config``) or a registry's configuration blob (``config``) describes it."""
    config = image.get("Config") or image.get("config") or {}
    return detect_family(config.get("Labels"), config.get("Env"), tag)


def _split(entry: str) -> tuple[str, str]:
    name, _equals, value = entry.partition("=")
    return name, value


def _major(version: str | None) -> int | None:
    match = re.match(r"v?(\d{1,3})(\.|\Z)", version or "")
    return int(match.group(1)) if match else None
