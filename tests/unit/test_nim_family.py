# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The three families of NIM images and what each is given."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_downloads import needs_download
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_family import (
    Family,
    detect_family,
    family_of_image,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import NimModel, parse_models

HEX = "0123456789abcdef" * 4


def model(**options: t.Any) -> NimModel:
    return parse_models([dict({"name": "m", "image": "nvcr.io/nim/meta/x:1.8.4"}, **options)])[0]


@pytest.mark.parametrize(
    ("labels", "env", "tag", "family"),
    [
        ({"com.nvidia.nim.version": "1.8.4"}, [], None, "1.x"),
        ({"com.nvidia.nim.version": "2.0.12"}, [], None, "2.x"),
        ({"com.nvidia.nim.version": "3.0.0"}, ["INFERENCE_MICROSERVICE_LLM_NIM_VERSION="], None, "2.x"),
        ({}, ["INFERENCE_MICROSERVICE_LLM_NIM_VERSION="], None, "1.x"),
        ({}, {"INFERENCE_MICROSERVICE_LLM_NIM_VERSION": "1.3.0"}, "latest", "1.x"),
        ({"com.nvidia.nim.model_download_protocol": "native-v1", "com.nvidia.nim.version": "2.1"}, [], None, "native"),
        ({}, ["NIM_CACHE_PATH=/opt/nim/.cache"], "2.0.1", "2.x"),
        ({}, ["PATH=/bin"], "2.0.1", "unknown"),
        (None, None, None, "unknown"),
        ({"com.nvidia.nim.version": "garbage"}, [], None, "unknown"),
    ],
)
def test_detection(labels: t.Any, env: t.Any, tag: str | None, family: str) -> None:
    assert detect_family(labels, env, tag).key == family


def test_image_of_docker_and_of_a_registry() -> None:
    config = {"Labels": {"com.nvidia.nim.version": "2.0.0"}, "Env": None}
    assert family_of_image({"Config": config}).key == family_of_image({"config": config}).key == "2.x"
    assert family_of_image({}).key == "unknown"


def test_environment_of_1x() -> None:
    found = Family("1.x").environment(
        model(
            profile="vllm-fp16-tp1",
            served_model_name="mine",
            weights_directory="/srv/w",
            custom_model_name="engine",
            lora_directory="/srv/l",
            lora_refresh_interval=30,
            max_model_length=4096,
            engine_arguments=["--a", "b c"],
            environment={"NIM_LOG_LEVEL": "DEBUG"},
        )
    )
    assert found == {
        "NIM_CACHE_PATH": "/opt/nim/.cache",
        "NIM_SERVER_PORT": "8000",
        "NIM_HTTP_API_PORT": "8000",
        "NIM_FT_MODEL": "/opt/nim/weights",
        "NIM_CUSTOM_MODEL_NAME": "engine",
        "NIM_SERVED_MODEL_NAME": "mine",
        "NIM_MODEL_PROFILE": "vllm-fp16-tp1",
        "NIM_MAX_MODEL_LEN": "4096",
        "NIM_PEFT_SOURCE": "/opt/nim/loras",
        "NIM_PEFT_REFRESH_INTERVAL": "30",
        "NIM_LOG_LEVEL": "DEBUG",
    }


def test_environment_of_2x() -> None:
    family = Family("2.x")
    found = family.environment(
        model(
            port=9000,
            network_mode="host",
            weights_directory="/w",
            custom_model_name="c",
            engine_arguments=["--a", "b c"],
        )
    )
    assert found["NIM_SERVER_PORT"] == found["NIM_HEALTH_PORT"] == "9000"
    assert found["NIM_MODEL_PATH"] == "/opt/nim/weights"
    assert found["NIM_SERVED_MODEL_NAME"] == "c"
    assert found["NIM_PASSTHROUGH_ARGS"] == "--a 'b c'"
    assert found["NIM_LOG_LEVEL"] == "INFO"
    assert "NIM_FT_MODEL" not in found
    assert "NIM_LOG_LEVEL" not in family.environment(model(environment={"VLLM_LOGGING_LEVEL": "WARNING"}))


def test_native_refuses_what_it_does_not_know() -> None:
    family = Family("native")
    assert family.cache_path == "/opt/cache"
    assert family.environment(model())["NIM_ENGINE_MODEL_PATH"] == "/opt/cache/model"
    with pytest.raises(FleetError, match=r"profile = vllm-fp16-tp1: image .* has the native"):
        family.environment(model(profile="vllm-fp16-tp1"))


def test_engine_arguments_of_1x_follow_the_images_command() -> None:
    subject = model(engine_arguments=["--x"])
    assert Family("1.x").command(subject, ["/opt/nim/start_server.sh"]) == ("/opt/nim/start_server.sh", "--x")
    assert Family("2.x").command(subject, ["nim-serve"]) == ()
    assert Family("1.x").command(model(), ["/opt/nim/start_server.sh"]) == ()


def test_download() -> None:
    one, two, native = Family("1.x"), Family("2.x"), Family("native")
    assert one.download(model()).command == ("download-to-cache",)
    assert one.download(model(profile=HEX)).command == ("download-to-cache", "--profile", HEX)
    assert two.download(model(profile=HEX)).command == ("download-to-cache", "-p", HEX)
    assert one.download(model(lora_directory="/l")).command == ("download-to-cache", "--lora")
    assert two.download(model(lora_directory="/l")).command == ("download-to-cache",)
    assert native.download(model()).environment == {"NIM_ENGINE_MODEL_DOWNLOAD_ONLY": "1"}
    assert Family("unknown").download(model()) is None
    assert one.download(model(weights_directory="/w")) is None


@pytest.mark.parametrize(
    ("environment", "needed"),
    [
        ({}, True),
        ({"NIM_DISABLE_MODEL_DOWNLOAD": "1"}, False),
        ({"NIM_DISABLE_MODEL_DOWNLOAD": "0"}, True),
        ({"HF_HUB_OFFLINE": "true"}, False),
        ({"NIM_MODEL_NAME": "hf://meta/x"}, False),
        ({"NIM_MODEL_NAME": "ngc://nim/x"}, True),
        ({"NIM_REPOSITORY_OVERRIDE": "s3://bucket"}, False),
    ],
)
def test_needs_download(environment: dict[str, str], needed: bool) -> None:
    assert needs_download(model(environment=environment)) is needed
