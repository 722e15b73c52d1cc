# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every refusal of a model names the variable, the value and the remedy."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import (
    addresses_overlap,
    parse_models,
    parse_size,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import NIM_MODEL_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._wanted_images import wanted_images

IMAGE = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
UUID = "GPU-5f2a4b1c-0000-4000-8000-00000000000%d"
HEX = "0123456789abcdef" * 4


def model(**options: t.Any) -> dict[str, t.Any]:
    return dict({"name": "llama", "image": IMAGE}, **options)


def refuse(*entries: t.Any) -> str:
    with pytest.raises(FleetError) as caught:
        parse_models(list(entries))
    assert caught.value.reason == "invalid_option"
    return caught.value.message


def test_defaults() -> None:
    (found,) = parse_models([model()])
    assert (found.gpus, found.port, found.bind_address) == (None, 8000, "0.0.0.0")
    assert found.cache_directory == "/var/lib/nim/cache/llama"
    assert found.shm_size == 16 * 1024**3
    assert (found.uid, found.gid) == (1000, 1000)
    assert found.ulimits == {"nofile": "65536", "memlock": "-1", "stack": "67108864"}
    assert (found.unit, found.container, found.url) == ("nim-llama.service", "nim-llama", "http://127.0.0.1:8000")
    assert (found.start_timeout, found.stop_timeout, found.completion, found.state) == (1800, 60, "auto", "started")


def test_none_means_not_said_as_ansible_passes_it() -> None:
    assert parse_models([dict.fromkeys(NIM_MODEL_OPTIONS) | model()]) == parse_models([model()])
    assert parse_models(None) == []


def test_strings_from_templates_are_numbers() -> None:
    (found,) = parse_models([model(port="8001", gpus="2", start_timeout="60", max_model_length="4096")])
    assert (found.port, found.gpus, found.start_timeout, found.max_model_length) == (8001, 2, 60, 4096)


def test_a_read_only_container_can_write_to_tmp() -> None:
    assert [(found.read_only, found.tmpfs) for found in parse_models([model()])] == [(False, ())]
    for given in (True, "yes", 1):
        (found,) = parse_models([model(read_only=given)])
        assert (found.read_only, found.tmpfs) == (True, ("/tmp",))
    (found,) = parse_models([model(read_only=True, tmpfs=["/tmp/", "/home/nim"])])
    assert found.tmpfs == ("/tmp", "/home/nim")
    # As Ansible passes what a role or a module has filled in.
    assert parse_models([model(read_only="no", tmpfs=["/tmp"])])[0].tmpfs == ()
    assert parse_models([model(read_only=True, tmpfs=[])])[0].tmpfs == ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, 3),
        ("all", "all"),
        ([0, 1], ("0", "1")),
        (["00", "1"], ("0", "1")),
        ([UUID % 1], (UUID % 1,)),
        (UUID % 1, (UUID % 1,)),
    ],
)
def test_gpus(given: t.Any, expected: t.Any) -> None:
    assert parse_models([model(gpus=given)])[0].gpus == expected


@pytest.mark.parametrize(
    ("options", "path", "words"),
    [
        ({"prot": 1}, "nim_models[0].prot = 1", "use one of bind_address"),
        ({"name": "a b"}, "nim_models[0].name = 'a b'", "letters, digits"),
        ({"name": "-x"}, "nim_models[0].name", "letter or digit"),
        ({"name": "x" * 61}, "nim_models[0].name", "at most 60"),
        ({"name": "a-download"}, "nim_models[0].name", "another name"),
        ({"name": None}, "nim_models[0].name", "is required"),
        ({"image": ""}, "nim_models[0].image", "is required"),
        ({"image": "NVCR.io/nim/Llama:1"}, "nim_models[0].image", "lower case"),
        ({"image": "https://nvcr.io/nim/x:1"}, "nim_models[0].image", "scheme"),
        ({"image": "nvcr.io/nim/x@sha256:12"}, "nim_models[0].image", "digest"),
        ({"port": 0}, "nim_models[0].port = 0", "1 to 65535"),
        ({"port": 65536}, "nim_models[0].port = 65536", "1 to 65535"),
        ({"port": "http"}, "nim_models[0].port = 'http'", "whole number"),
        ({"port": True}, "nim_models[0].port", "whole number"),
        ({"port": "9" * 5000}, "nim_models[0].port = ", "1 to 65535"),
        ({"port": ""}, "nim_models[0].port = '': is empty", "leave it out"),
        ({"stop_timeout": ""}, "nim_models[0].stop_timeout = '': is empty", "leave it out"),
        ({"bind_address": "localhost"}, "nim_models[0].bind_address = 'localhost'", "not an IP address"),
        ({"gpus": 0}, "nim_models[0].gpus = 0", "at least one GPU"),
        ({"gpus": []}, "nim_models[0].gpus", "count, a list"),
        ({"gpus": "0,1"}, "nim_models[0].gpus = '0,1'", "count, a list"),
        ({"gpus": {"a": 1}}, "nim_models[0].gpus", "count, a list"),
        ({"gpus": [-1]}, "nim_models[0].gpus", "neither the index nor the UUID"),
        ({"gpus": [True]}, "nim_models[0].gpus", "neither the index nor the UUID"),
        ({"gpus": ["GPU-1"]}, "nim_models[0].gpus", "neither the index nor the UUID"),
        ({"gpus": [1, "1"]}, "nim_models[0].gpus", "twice"),
        ({"cache_directory": "cache"}, "nim_models[0].cache_directory = 'cache'", "start it with /"),
        ({"name": 1.2}, "nim_models[0].name = 1.2", "put it in quotes"),
        ({"port": "\u0668\u0660"}, "nim_models[0].port", "whole number"),
        ({"bind_address": "fe80::1%eth0"}, "nim_models[0].bind_address", "not an IP address"),
        ({"cache_directory": "/var"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/etc/."}, "nim_models[0].cache_directory = '/etc/.'", "directory of its own"),
        ({"cache_directory": "//etc"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/etc/nim"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/usr/lib/x/y"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/var/lib/docker/volumes"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/var/lib/nim"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/var/lib/nim/state/llama"}, "nim_models[0].cache_directory", "directory of its own"),
        (
            {"environment": {"HTTPS_PROXY": "http://ops:hunter2@proxy.example.org:3128"}},
            "nim_models[0].environment.HTTPS_PROXY = ...",
            "put it into secret_environment",
        ),
        (
            {"engine_arguments": ["--store=s3://ops:hunter2@store.example.org/x"]},
            "nim_models[0].engine_arguments[0] = ...",
            "leave it out",
        ),
        ({"cache_directory": "/var/lib/nim/maintenance"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/home/ops"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/home/ops/.ssh"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/root/.ssh"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/mnt"}, "nim_models[0].cache_directory", "directory of its own"),
        ({"cache_directory": "/w", "weights_directory": "/w/"}, "nim_models[0].weights_directory", "apart"),
        ({"shm_size": "0GB"}, "nim_models[0].shm_size = '0GB'", "out of range"),
        ({"ulimits": {"nofile": "20:10"}}, "nim_models[0].ulimits.nofile = '20:10'", "smaller first"),
        ({"ulimits": {"nofile": 10**25}}, "nim_models[0].ulimits.nofile", "is no limit"),
        ({"weights_directory": "./w"}, "nim_models[0].weights_directory", "start it with /"),
        ({"weights_directory": "/a:b"}, "nim_models[0].weights_directory", "colon"),
        ({"weights_directory": '/a"b'}, "nim_models[0].weights_directory", "double quote"),
        ({"lora_directory": "/a/../b"}, "nim_models[0].lora_directory", "another path"),
        ({"shm_size": "16"}, "nim_models[0].shm_size = '16'", "16GB"),
        ({"shm_size": 16}, "nim_models[0].shm_size", "unit"),
        ({"disk_space": "lots"}, "nim_models[0].disk_space = 'lots'", "16GB"),
        ({"ulimits": [1]}, "nim_models[0].ulimits", "dictionary"),
        ({"ulimits": {"files": 1}}, "nim_models[0].ulimits.files", "nofile"),
        ({"ulimits": {"nofile": "many"}}, "nim_models[0].ulimits.nofile = 'many'", "soft:hard"),
        ({"environment": "A=b"}, "nim_models[0].environment", "dictionary"),
        ({"environment": {"A B": "1"}}, "nim_models[0].environment.A B", "underscores"),
        ({"environment": {"A": "x\ny"}}, "nim_models[0].environment.A", "newline"),
        ({"environment": {"A": True}}, "nim_models[0].environment.A", "quotes"),
        ({"environment": {"A": [1]}}, "nim_models[0].environment.A", "quotes"),
        ({"environment": {"NGC_API_KEY": "secret-value"}}, "nim_models[0].environment.NGC_API_KEY", "ngc_api_key"),
        ({"environment": {"NIM_CACHE_PATH": "/x"}}, "nim_models[0].environment.NIM_CACHE_PATH", "cache_directory"),
        ({"environment": {"NIM_MODEL_PROFILE": "x"}}, "NIM_MODEL_PROFILE", "set profile"),
        ({"environment": {"HF_TOKEN": "hf_secret"}}, "nim_models[0].environment.HF_TOKEN", "secret"),
        ({"environment": {"X": "nvapi-0123456789abcdefghij"}}, "nim_models[0].environment.X", "secret_environment"),
        ({"secret_environment": ["secret-value"]}, "nim_models[0].secret_environment", "dictionary"),
        ({"secret_environment": "HF_TOKEN=hf_secret"}, "nim_models[0].secret_environment", "dictionary"),
        ({"secret_environment": {"hf_secret is no name": "x"}}, "nim_models[0].secret_environment", "no name"),
        (
            {"secret_environment": {"HF_TOKEN": "hf_secret\nX=1"}},
            "nim_models[0].secret_environment.HF_TOKEN",
            "newline",
        ),
        ({"secret_environment": {"HF_TOKEN": ["hf_secret"]}}, "nim_models[0].secret_environment.HF_TOKEN", "string"),
        ({"secret_environment": {"HF_TOKEN": True}}, "nim_models[0].secret_environment.HF_TOKEN", "string"),
        ({"secret_environment": {"HF_TOKEN": ""}}, "nim_models[0].secret_environment.HF_TOKEN", "empty"),
        (
            {"secret_environment": {"HF_TOKEN": "hf_secret" * 4000}},
            "nim_models[0].secret_environment.HF_TOKEN",
            "longer",
        ),
        ({"secret_environment": {"T": "{{ secret-value }}"}}, "nim_models[0].secret_environment.T", "template"),
        (
            {"secret_environment": {"NGC_API_KEY": "secret-value"}},
            "nim_models[0].secret_environment.NGC_API_KEY",
            "ngc_api_key",
        ),
        (
            {"secret_environment": {"T": "secret-value"}, "environment": {"T": "1"}},
            "nim_models[0].secret_environment.T",
            "in environment too",
        ),
        ({"name": "ngc"}, "nim_models[0].name", "key's file"),
        ({"profile": HEX + " (vllm-fp16-tp1)"}, "nim_models[0].profile", "use the id alone: " + HEX),
        ({"profile": HEX[:-1]}, "nim_models[0].profile", "63 characters"),
        ({"profile": HEX.upper()}, "nim_models[0].profile", "capitals"),
        ({"profile": "fast please"}, "nim_models[0].profile = 'fast please'", "list-model-profiles"),
        ({"profile": "fast"}, "nim_models[0].profile = 'fast'", "list-model-profiles"),
        ({"served_model_name": "a b"}, "nim_models[0].served_model_name", "without spaces"),
        ({"served_model_name": "a\nb"}, "nim_models[0].served_model_name", "newline"),
        ({"custom_model_name": "a b"}, "nim_models[0].custom_model_name", "without spaces"),
        ({"lora_refresh_interval": 5}, "nim_models[0].lora_refresh_interval = 5", "set lora_directory"),
        ({"max_model_length": 0}, "nim_models[0].max_model_length = 0", "tokens"),
        ({"network_mode": "none"}, "nim_models[0].network_mode", "bridge, host"),
        ({"network_mode": "container:x"}, "nim_models[0].network_mode", "bridge, host"),
        ({"network_mode": "host", "bind_address": "127.0.0.1"}, "nim_models[0].network_mode", "use bridge"),
        ({"user": "nim"}, "nim_models[0].user = 'nim'", "UID:GID"),
        ({"user": "1000:video"}, "nim_models[0].user", "UID:GID"),
        ({"read_only": "maybe"}, "nim_models[0].read_only = 'maybe'", "true or false"),
        ({"read_only": [True]}, "nim_models[0].read_only", "true or false"),
        ({"tmpfs": ["/home"]}, "nim_models[0].tmpfs", "set read_only"),
        ({"read_only": True, "tmpfs": "/tmp"}, "nim_models[0].tmpfs = '/tmp'", "list entry"),
        ({"read_only": True, "tmpfs": ["tmp"]}, "nim_models[0].tmpfs[0] = 'tmp'", "start it with /"),
        ({"read_only": True, "tmpfs": ["/"]}, "nim_models[0].tmpfs[0] = '/'", "absolute path of a directory"),
        ({"read_only": True, "tmpfs": ["/a/../etc"]}, "nim_models[0].tmpfs[0]", "absolute path"),
        ({"read_only": True, "tmpfs": ["/a:size=1"]}, "nim_models[0].tmpfs[0]", "absolute path"),
        ({"read_only": True, "tmpfs": ["/a", "/a/"]}, "nim_models[0].tmpfs[1] = '/a/'", "name it once"),
        ({"read_only": True, "tmpfs": ["/opt/nim/.cache/"]}, "nim_models[0].tmpfs[0]", "would hide"),
        ({"read_only": True, "tmpfs": ["/opt"]}, "nim_models[0].tmpfs[0]", "would hide"),
        ({"read_only": True, "tmpfs": ["/opt/nim/.cache/ngc"]}, "nim_models[0].tmpfs[0]", "would hide"),
        ({"read_only": True, "tmpfs": ["/."]}, "nim_models[0].tmpfs[0] = '/.'", "would hide"),
        ({"read_only": True, "tmpfs": ["/dev/shm"]}, "nim_models[0].tmpfs[0]", "would hide"),
        ({"engine_arguments": "--x 1"}, "nim_models[0].engine_arguments", "list entry"),
        ({"engine_arguments": ["--port=1"]}, "nim_models[0].engine_arguments[0] = '--port=1'", "set port"),
        ({"engine_arguments": ["a\nb"]}, "nim_models[0].engine_arguments[0]", "newline"),
        ({"engine_arguments": [""]}, "nim_models[0].engine_arguments[0]", "quotes"),
        ({"engine_arguments": ["--api-key", "x"]}, "nim_models[0].engine_arguments[0]", "secret"),
        ({"start_timeout": 1}, "nim_models[0].start_timeout = 1", "10 to 86400"),
        ({"stop_timeout": 0}, "nim_models[0].stop_timeout = 0", "1 to 3600"),
        ({"completion": "maybe"}, "nim_models[0].completion = 'maybe'", "auto, chat, completion, none"),
        ({"state": "present"}, "nim_models[0].state = 'present'", "started, stopped, absent"),
        ({"state": ["started"]}, "nim_models[0].state", "quotes"),
    ],
)
def test_refused(options: dict[str, t.Any], path: str, words: str) -> None:
    message = refuse(model(**options))
    assert path in message
    assert words in message
    for secret in ("secret-value", "hf_secret", "nvapi-0123"):
        assert secret not in message


def test_not_a_list_and_not_a_dictionary() -> None:
    with pytest.raises(FleetError, match=r"nim_models = \.\.\.: must be a list"):
        parse_models({"name": "a"})
    assert "nim_models[0] = 8000: must be a dictionary" in refuse(8000)
    assert "nim_models[0] = ...: must be a dictionary" in refuse(12345678)
    assert "nim_models[0] = ...: must be a dictionary" in refuse("HF_TOKEN=abc")


def test_secrets_are_in_no_representation() -> None:
    given = {"HF_TOKEN": "hf_secret", "PIN": 1234}
    (parsed,) = parse_models([{"name": "m", "image": "nvcr.io/nim/a/b:1", "secret_environment": given}])
    assert parsed.secret_environment == {"HF_TOKEN": "hf_secret", "PIN": "1234"}
    assert "hf_secret" not in repr(parsed)


@pytest.mark.parametrize("raw", [{"name": "m", "secret_environment": {"T": "hf_secret"}}, ["T=hf_secret"]])
def test_what_is_no_list_of_models_is_not_printed(raw: t.Any) -> None:
    with pytest.raises(FleetError) as caught:
        parse_models(raw)
    assert "hf_secret" not in caught.value.message


def test_value_of_an_unknown_key_is_not_printed() -> None:
    assert "nvapi" not in refuse(model(ngc_key="nvapi-whatever"))


def test_duplicates() -> None:
    assert "nim_models[1].name = 'llama'" in refuse(model(), model(port=1))
    message = refuse(model(gpus=[0]), model(name="b", gpus=[1]))
    assert "nim_models[1].port = 8000: is the port of model llama too" in message
    message = refuse(model(gpus=[0, 1]), model(name="b", port=8001, gpus=[1, 2]))
    assert "nim_models[1].gpus = [1, 2]: GPU 1 is taken by model llama" in message
    message = refuse(
        model(gpus=[UUID % 1]), model(name="b", port=8001, gpus=[(UUID % 1).lower().replace("gpu-", "GPU-")])
    )
    assert "is taken by model llama" in message
    message = refuse(model(gpus="all"), model(name="b", port=8001))
    assert "wants all GPUs" in message
    message = refuse(model(cache_directory="/c"), model(name="b", port=1, cache_directory="/c", user="0"))
    assert "another user" in message


def test_no_cache_lies_in_another_ones() -> None:
    for one, other in (("/a", "/a/b"), ("/a/b", "/a")):
        message = refuse(
            model(name="x", cache_directory=one), model(name="y", port=8001, cache_directory=other, user="2:2")
        )
        assert "nim_models[1].cache_directory = %r" % other in message
        assert "lie in each other" in message
    parse_models([model(name="x", cache_directory="/a"), model(name="y", port=8001, cache_directory="/ab")])


@pytest.mark.parametrize(
    "path", ["/data", "/data/nim", "/srv/nim", "/mnt/models", "/home/ops/models", "/root/.cache/nim", "/opt/nim"]
)
def test_directories_that_people_use_for_models(path: str) -> None:
    assert parse_models([model(cache_directory=path + "/")])[0].cache_directory == path


def test_same_port_on_different_addresses_is_fine() -> None:
    assert len(parse_models([model(bind_address="10.0.0.1"), model(name="b", bind_address="10.0.0.2")])) == 2
    assert "port" in refuse(model(bind_address="10.0.0.1"), model(name="b"))
    assert addresses_overlap("::", "10.0.0.1")


def test_absent_models_hold_nothing_and_stopped_ones_do() -> None:
    assert len(parse_models([model(gpus="all", state="absent"), model(name="b", gpus="all")])) == 2
    assert "port" in refuse(model(state="stopped"), model(name="b"))


def test_profile_forms() -> None:
    for good in (HEX, "default", "vllm-fp16-tp1", "tensorrt_llm-h100-fp8-tp1-pp1-throughput", "vllm-fp8-tp1-pp1-34.0"):
        assert parse_models([model(profile=good)])[0].profile == good
    assert parse_models([model(profile="automatic")])[0].profile is None


def test_sizes_count_as_docker_does() -> None:
    assert parse_size("16GB") == parse_size("16g") == parse_size("16 GiB") == 16 * 1024**3
    assert parse_size("512MB") == 512 * 1024**2
    assert parse_size("1.5k") == 1536
    assert parse_size("10b") == 10
    assert parse_size("10") is None
    assert parse_size("-1GB") is None


def test_ipv6_url() -> None:
    assert parse_models([model(bind_address="::")])[0].url == "http://[::1]:8000"


def test_images_that_the_models_need() -> None:
    image = "nvcr.io/nim/meta/x:1"
    models = [
        {"name": "a", "image": image, "gpus": 1, "disk_space": "20GB"},
        {"name": "b", "image": image, "gpus": 1, "port": 8001, "cache_directory": "/srv/b", "state": "stopped"},
        {"name": "c", "image": image, "gpus": [1, 3], "port": 8002, "environment": {"NVIDIA_DISABLE_REQUIRE": "true"}},
        {"name": "d", "image": image, "gpus": 1, "port": 8003, "state": "absent"},
    ]
    cache = "/var/lib/nim/cache/"
    assert wanted_images(models) == [
        {
            "image": image,
            "model": "a",
            "gpus": 1,
            "cache_directory": cache + "a",
            "check_requirement": True,
            "disk_space": "20GB",
        },
        {"image": image, "model": "b", "gpus": 1, "cache_directory": "/srv/b", "check_requirement": True},
        {
            "image": image,
            "model": "c",
            "gpus": 2,
            "gpu_names": ["1", "3"],
            "cache_directory": cache + "c",
            "check_requirement": False,
        },
    ]
    assert wanted_images(None) == []
    with pytest.raises(FleetError, match=r"nim_models\[0\]\.port = 0"):
        wanted_images([{"name": "a", "image": image, "gpus": 1, "port": 0}])


def test_a_proxy_without_a_password_is_no_secret_and_one_with_it_has_its_place() -> None:
    proxies = {"HTTPS_PROXY": "http://proxy.example.org:3128", "NO_PROXY": "localhost,a@b:1"}
    (parsed,) = parse_models([model(environment=proxies)])
    assert dict(parsed.environment) == proxies
    secret = {"HTTPS_PROXY": "http://ops:hunter2@proxy.example.org:3128"}
    (parsed,) = parse_models([model(secret_environment=secret)])
    assert dict(parsed.secret_environment) == secret


@pytest.mark.parametrize("name", ["DB_PASS", "MYSQL_PWD", "GITHUB_PAT", "OPENAI_KEY", "MY_PASSPHRASE", "AUTHORIZATION"])
def test_names_that_tell_a_secret_are_known_from_one_place(name: str) -> None:
    message = refuse(model(environment={name: "hunter2"}))
    assert "put it into secret_environment" in message and "hunter2" not in message


def test_switches_and_paths_are_no_secrets() -> None:
    environment = {"USE_AUTH": "true", "AUTH_LEVEL": "2", "TLS_KEY": "/certificates/tls.key", "MAX_TOKENS": "many"}
    (parsed,) = parse_models([model(environment=environment)])
    assert dict(parsed.environment) == environment
