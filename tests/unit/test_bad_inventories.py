# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Every malformed inventory is refused with the variable, its value and a remedy, before any host is touched."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.action.validate_inventory import load_specs
from ansible_collections.gpu_fleet.nim.plugins.module_utils._inventory import Problem, validate

IMAGE = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"
PROFILE = "4f904d571fe60ff24695b5ee2aa42da58cb460787a968f1e8a09f5a7e862728d"
UUID = "GPU-5a4d9e64-0c2f-4b4a-9d5e-1f2a3b4c5d6e"
SIGNATURE = {"id": "a", "pattern": "quota exceeded", "cause": "no quota", "remedy": "ask"}
KEY = "nvapi-0123456789abcdefSECRET"


def model(**more: t.Any) -> dict[str, t.Any]:
    return {"nim_models": [{"name": "llama", "image": IMAGE, **more}]}


def two(one: dict[str, t.Any], other: dict[str, t.Any]) -> dict[str, t.Any]:
    return {
        "nim_models": [
            {"name": "one", "image": IMAGE, "port": 8000, **one},
            {"name": "two", "image": IMAGE, "port": 8001, **other},
        ]
    }


def without(key: str) -> dict[str, t.Any]:
    entry = {"name": "llama", "image": IMAGE}
    del entry[key]
    return {"nim_models": [entry]}


M = "nim_models[0]"

#: (variables, the variable that is named, a part of the value as shown, a part of the remedy)
TABLE: list[tuple[dict[str, t.Any], str, str, str]] = [
    # -- names that no role knows
    ({"nvidia_driver_brnach": "580"}, "nvidia_driver_brnach", "'580'", "did you mean nvidia_driver_branch"),
    ({"nvidia_driver_flavor": "open"}, "nvidia_driver_flavor", "'open'", "did you mean nvidia_driver_flavour"),
    ({"nvidia_driver_reboots": True}, "nvidia_driver_reboots", "True", "did you mean nvidia_driver_reboot"),
    ({"nim_model": [{"secret_environment": {"X": "y"}}]}, "nim_model", "(not shown)", "did you mean nim_models"),
    ({"nim_models": None}, "nim_models", "null", "remove the line"),
    ({"docker_users": None}, "docker_users", "null", "remove the line"),
    ({"nvidia_driver_branch": None}, "nvidia_driver_branch", "null", "remove the line"),
    ({"nim_model": []}, "nim_model", "[]", "did you mean nim_models"),
    ({"nim_registry_mirror": {}}, "nim_registry_mirror", "{}", "did you mean nim_registry_mirrors"),
    ({"docker_user": ["alice"]}, "docker_user", "(not shown)", "did you mean docker_users"),
    ({"docker_user": [{"name": "alice"}]}, "docker_user", "(not shown)", "did you mean docker_users"),
    ({"nim_gateway_api_kys": ["team-one"]}, "nim_gateway_api_kys", "(not shown)", "did you mean nim_gateway_api_keys"),
    ({"docker_live_restor": True}, "docker_live_restor", "True", "did you mean docker_live_restore"),
    ({"ngc_apikey": KEY}, "ngc_apikey", "(not shown)", "did you mean ngc_api_key"),
    ({"nim_api_key": KEY}, "nim_api_key", "(not shown)", "did you mean nim_ngc_api_key"),
    ({"docker_ngc_api_key": KEY}, "docker_ngc_api_key", "(not shown)", "did you mean"),
    (
        {"nvidia_container_toolkit_runtime": True},
        "nvidia_container_toolkit_runtime",
        "True",
        "did you mean nvidia_container_toolkit_default_runtime",
    ),
    (
        {"nvidia_container_toolkit_versio": ""},
        "nvidia_container_toolkit_versio",
        "''",
        "nvidia_container_toolkit_version",
    ),
    (
        {"nim_favourite_colour": "green"},
        "nim_favourite_colour",
        "'green'",
        "give a variable of your own another prefix",
    ),
    # -- gateways
    ({"nim_gateway_prot": 443}, "nim_gateway_prot", "443", "did you mean nim_gateway_port"),
    ({"nim_gateway_port": 0}, "nim_gateway_port", "0", "1 to 65535"),
    ({"nim_gateway_metrics_port": 70000}, "nim_gateway_metrics_port", "70000", "1 to 65535"),
    ({"nim_gateway_body_limit": "1GB"}, "nim_gateway_body_limit", "1GB", "for example 1MB"),
    ({"nim_gateway_bind_address": "all hosts"}, "nim_gateway_bind_address", "all hosts", "correct it"),
    ({"nim_gateway_api_keys": {"team": KEY[:12]}}, "nim_gateway_api_keys.team", "(not shown)", "openssl rand"),
    ({"nim_gateway_api_keys": KEY}, "nim_gateway_api_keys", "(not shown)", "dict"),
    ({"nim_gateway_api_keys": [KEY]}, "nim_gateway_api_keys", "(not shown)", "dict"),
    ({"nim_gateway_api_keys_file": "keys.yml"}, "nim_gateway_api_keys_file", "keys.yml", "start it with /"),
    ({"nim_gateway_api_keys_file": "/no/file"}, "nim_gateway_api_keys_file", "/no/file", "create it there"),
    ({"nim_gateway_certificate": KEY}, "nim_gateway_certificate", "(not shown)", "give the chain"),
    ({"nim_gateway_certificate_file": "a.pem"}, "nim_gateway_certificate_file", "a.pem", "choose another path"),
    # -- types
    ({"nim_models": "llama"}, "nim_models", "(not shown)", "write each entry as one list item"),
    ({"nim_models": 5}, "nim_models", "5", "write each entry as one list item"),
    ({"nim_models": "HF_TOKEN=SECRET12"}, "nim_models", "(not shown)", "write each entry as one list item"),
    ({"nim_models": {"llama": {}}}, "nim_models", "(not shown)", "write each entry as one list item"),
    ({"nim_models": ["llama"]}, M, "...", "write at least name and image"),
    ({"docker_users": "alice"}, "docker_users", "'alice'", "write each entry as one list item"),
    ({"docker_daemon_options": ["debug"]}, "docker_daemon_options", "['debug']", "write key: value pairs"),
    ({"nvidia_driver_hold": "maybe"}, "nvidia_driver_hold", "'maybe'", "write true or false"),
    ({"nvidia_driver_reboot": 2}, "nvidia_driver_reboot", "2", "write true or false"),
    ({"nvidia_driver_reboot_timeout": "20m"}, "nvidia_driver_reboot_timeout", "'20m'", "without a unit"),
    ({"nvidia_driver_reboot_timeout": 5}, "nvidia_driver_reboot_timeout", "5", "from 60 to 86400"),
    ({"nvidia_driver_branch": ["580"]}, "nvidia_driver_branch", "['580']", "put it in quotes"),
    ({"nim_registry_mirrors": ["a"]}, "nim_registry_mirrors", "['a']", "write key: value pairs"),
    ({"nim_wait": "perhaps"}, "nim_wait", "'perhaps'", "write true or false"),
    # -- texts of failures
    ({"nim_failure_signatures": "oom"}, "nim_failure_signatures", "'oom'", "list"),
    ({"nim_failure_signatures": ["oom"]}, "nim_failure_signatures[0]", "'oom'", "write key: value"),
    (
        {"nim_failure_signatures": [SIGNATURE, {**SIGNATURE, "id": "b", "pattern": "(a+)+$"}]},
        "nim_failure_signatures[1].pattern",
        "'(a+)+$'",
        "write the inner part without",
    ),
    (
        {"nim_failure_signatures": [{**SIGNATURE, "pattern": "(?P<x>"}]},
        "nim_failure_signatures[0].pattern",
        "'(?P<x>'",
        "correct it",
    ),
    (
        {"nim_failure_signatures": [{**SIGNATURE, "pattern": "(?s).*.*foo"}]},
        "nim_failure_signatures[0].pattern",
        "'(?s).*.*foo'",
        "begin with a literal text",
    ),
    ({"nim_failure_signatures": [SIGNATURE, SIGNATURE]}, "nim_failure_signatures[1].id", "'a'", "give each its own"),
    ({"nim_failure_signatures": [{**SIGNATURE, "regexp": "x"}]}, "nim_failure_signatures[0].regexp", "'x'", "use id,"),
    ({"nim_progress_interval": 0}, "nim_progress_interval", "0", "from 1 to 300"),
    ({"nim_progress_interval": "5s"}, "nim_progress_interval", "'5s'", "write a whole number"),
    # -- choices
    ({"nvidia_driver_source": "ubuntu"}, "nvidia_driver_source", "'ubuntu'", "use nvidia or distribution"),
    ({"nvidia_driver_flavour": "free"}, "nvidia_driver_flavour", "'free'", "use auto or open or proprietary"),
    ({"docker_package_source": "snap"}, "docker_package_source", "'snap'", "use docker or distribution"),
    ({"nvidia_container_toolkit_mode": "cdii"}, "nvidia_container_toolkit_mode", "'cdii'", "did you mean cdi"),
    ({"ngc_state": "gone"}, "ngc_state", "'gone'", "use present or absent"),
    ({"nim_gpu_injection": "magic"}, "nim_gpu_injection", "'magic'", "runtime"),
    # -- driver
    ({"nvidia_driver_branch": "581"}, "nvidia_driver_branch", "'581'", "choose one of 535, 550, 555"),
    ({"nvidia_driver_branch": "470"}, "nvidia_driver_branch", "'470'", "choose one of 535"),
    ({"nvidia_driver_branch": "latest"}, "nvidia_driver_branch", "'latest'", "choose one of 535"),
    ({"nvidia_driver_branch": "580.95"}, "nvidia_driver_branch", "'580.95'", "choose one of 535"),
    (
        {"nvidia_driver_branch": "570", "nvidia_driver_version": "580.95.05"},
        "nvidia_driver_version",
        "'580.95.05'",
        "set nvidia_driver_branch to '580' or choose a version of branch 570",
    ),
    (
        {"nvidia_driver_version": "550.54.15"},
        "nvidia_driver_version",
        "'550.54.15'",
        "set nvidia_driver_branch to '550'",
    ),
    ({"nvidia_driver_version": "580"}, "nvidia_driver_version", "'580'", "write it like 580.95.05"),
    ({"nvidia_driver_version": "580.95.05-1"}, "nvidia_driver_version", "'580.95.05-1'", "without package suffix"),
    (
        {"nvidia_driver_branch": "620", "nvidia_driver_flavour": "proprietary"},
        "nvidia_driver_flavour",
        "'proprietary'",
        "choose open, auto or an older branch",
    ),
    (
        {"nvidia_driver_repository_url": "mirror.example.org/cuda"},
        "nvidia_driver_repository_url",
        "'mirror.example.org/cuda'",
        "for example https://mirror.example.org/cuda",
    ),
    ({"nvidia_driver_repository_url": "ftp://mirror/x"}, "nvidia_driver_repository_url", "ftp://mirror/x", "https://"),
    ({"nvidia_driver_repository_url": "https://"}, "nvidia_driver_repository_url", "https://", "scheme and host"),
    (
        {"nvidia_driver_repository_architecture": "../sbsa"},
        "nvidia_driver_repository_architecture",
        "'../sbsa'",
        "write x86_64, sbsa, or leave it empty",
    ),
    # -- Docker
    ({"docker_repository_url": "mirror/docker"}, "docker_repository_url", "'mirror/docker'", "https://mirror/docker"),
    ({"docker_minimum_version": "old"}, "docker_minimum_version", "'old'", "is no version; write it like"),
    ({"docker_daemon_absent": "dns"}, "docker_daemon_absent", "'dns'", "one list item"),
    ({"docker_daemon_absent": ["Debug"]}, "docker_daemon_absent", "Debug", "write key or key.inner"),
    ({"docker_daemon_options": {"": 2}}, "docker_daemon_options", "''", "with hyphens"),
    ({"docker_daemon_options": {1: 2}}, "docker_daemon_options", "1", "with hyphens"),
    ({"docker_version": 28.10}, "docker_version", "28.1", "put it in quotes"),
    ({"docker_version": "29.5.1"}, "docker_version", "29.5.1", "use 29.4.3 or older"),
    ({"docker_version": "19.03"}, "docker_version", "19.03", "choose a newer engine"),
    ({"nvidia_container_toolkit_version": 1.20}, "nvidia_container_toolkit_version", "1.2", "put it in quotes"),
    ({"docker_repository_url": "https://a:b@c/d"}, "docker_repository_url", "(not shown)", "auth.conf.d"),
    ({"docker_repository_url": "https://a:b/c@d/e"}, "docker_repository_url", "(not shown)", "auth.conf.d"),
    ({"docker_repository_url": "a:b@c.example/e"}, "docker_repository_url", "(not shown)", "auth.conf.d"),
    ({"nim_progress_interval": 10**9}, "nim_progress_interval", "1000000000", "from 1 to 300"),
    ({"docker_version": "newest"}, "docker_version", "'newest'", "leave it empty for the newest"),
    ({"docker_users": ["alice", "Bob Smith"]}, "docker_users[1]", "'Bob Smith'", "write the login name"),
    ({"docker_users": ["alice", "alice"]}, "docker_users[1]", "'alice'", "name every user once"),
    ({"docker_users": [["alice"]]}, "docker_users[0]", "['alice']", "put it in quotes"),
    ({"docker_daemon_options": {"live_restore": True}}, "docker_daemon_options", "live_restore", "with hyphens"),
    (
        {"docker_daemon_options": {"live-restore": False}},
        "docker_daemon_options.live-restore",
        "False",
        "give it in one place only",
    ),
    ({"docker_daemon_options": {"runtimes": ["nvidia"]}}, "docker_daemon_options.runtimes", "['nvidia']", "a mapping"),
    (
        {"docker_daemon_options": {"features": {"cdi": "yes"}}},
        "docker_daemon_options.features.cdi",
        "yes",
        "true or false",
    ),
    # -- toolkit
    (
        {"nvidia_container_toolkit_repository_url": "nvidia.github.io/libnvidia-container"},
        "nvidia_container_toolkit_repository_url",
        "'nvidia.github.io/libnvidia-container'",
        "https://nvidia.github.io/libnvidia-container",
    ),
    ({"nvidia_container_toolkit_version": "v1.17"}, "nvidia_container_toolkit_version", "'v1.17'", "like 1.17.4"),
    (
        {"nvidia_container_toolkit_version": "2.0"},
        "nvidia_container_toolkit_version",
        "2.0",
        "write for example 1.20.0",
    ),
    (
        {"nvidia_container_toolkit_version": "1.17", "nvidia_container_toolkit_mode": "jit-cdi"},
        "nvidia_container_toolkit_mode",
        "jit-cdi",
        "use version 1.18 or newer, or another mode",
    ),
    # -- NGC
    ({"ngc_api_key": KEY + "\n"}, "ngc_api_key", "(not shown)", "store it without one"),
    ({"ngc_api_key": " " + KEY}, "ngc_api_key", "(not shown)", "copy it again"),
    ({"ngc_api_key": '"%s"' % KEY}, "ngc_api_key", "(not shown)", "remove the quotes"),
    ({"ngc_api_key": "nvapi-"}, "ngc_api_key", "(not shown)", "copy it again"),
    ({"ngc_api_key": "$oauthtoken:" + KEY}, "ngc_api_key", "(not shown)", "give the key alone"),
    ({"ngc_api_key": [KEY]}, "ngc_api_key", "(not shown)", "put it in quotes"),
    ({"nim_ngc_api_key": KEY + "\r\n"}, "nim_ngc_api_key", "(not shown)", "store it without one"),
    ({"ngc_api_key_file": "ngc.key"}, "ngc_api_key_file", "'ngc.key'", "start it with /"),
    ({"ngc_api_key_file": "/nowhere/ngc.key"}, "ngc_api_key_file", "'/nowhere/ngc.key'", "create it there"),
    ({"ngc_registry": "https://nvcr.io"}, "ngc_registry", "'https://nvcr.io'", "leave https out"),
    ({"ngc_registry": "nvcr.io/nim"}, "ngc_registry", "'nvcr.io/nim'", "like nvcr.io"),
    ({"ngc_registry": "nvcr.io:99999"}, "ngc_registry", "'nvcr.io:99999'", "like nvcr.io"),
    ({"ngc_username": "me:too"}, "ngc_username", "'me:too'", "correct it"),
    ({"ngc_username": ""}, "ngc_username", "''", "correct it"),
    ({"ngc_username": "me", "ngc_api_key": "a\nSECRET"}, "ngc_api_key", "(not shown)", "correct it"),
    ({"ngc_docker_user": "no body"}, "ngc_docker_user", "'no body'", "login name"),
    ({"ngc_check_repository": "nim/Meta/llama"}, "ngc_check_repository", "'nim/Meta/llama'", "lower case"),
    # -- registry mirrors
    (
        {"nim_registry_mirrors": {"nvcr.io": "https://m"}},
        "nim_registry_mirrors['nvcr.io']",
        "'https://m'",
        "leave https out",
    ),
    ({"nim_registry_mirrors": {"nvcr.io": "m:0"}}, "nim_registry_mirrors['nvcr.io']", "'m:0'", "mirror.example:5000"),
    ({"nim_registry_mirrors": {"nvcr.io": "m y"}}, "nim_registry_mirrors['nvcr.io']", "'m y'", "mirror.example:5000"),
    # -- one model
    (model(pport=8000), M + ".pport", "8000", "use one of bind_address"),
    (model(**{"po\nrt": 8000}), M + ".po?rt", "8000", "use one of bind_address"),
    (model(colour="green"), M + ".colour", "...", "use one of bind_address"),
    (model(hf_token=12345678), M + ".hf_token", "...", "use one of bind_address"),
    (model(ports=[8000]), M + ".ports", "...", "use one of bind_address"),
    (model(ulimits={"no\nfile": 1}), M + ".ulimits.no?file", "1", "use one of"),
    (without("name"), M + ".name", "None", "set it, for example llama3"),
    (without("image"), M + ".image", "None", "set it, for example nvcr.io/"),
    (model(name="llama 3"), M + ".name", "'llama 3'", "letters, digits"),
    (model(name="-x"), M + ".name", "'-x'", "the first one a letter or digit"),
    (model(name="a" * 61), M + ".name", "aaa", "at most 60"),
    (model(name=["llama"]), M + ".name", "['llama']", "put it in quotes"),
    (model(image="nvcr.io/nim/Meta/llama:1"), M + ".image", "'nvcr.io/nim/Meta/llama:1'", "lower case"),
    (model(image="https://nvcr.io/nim/x:1"), M + ".image", "'https://nvcr.io/nim/x:1'", "leave https out"),
    (model(image="nvcr.io/nim/x:1@sha256:12"), M + ".image", "@sha256:12", "64 lower-case hex digits"),
    (model(image="nvcr.io/nim/x:a b"), M + ".image", "'nvcr.io/nim/x:a b'", "write it like nvcr.io/"),
    (model(image="mirror:70000/nim/x:1"), M + ".image", "'mirror:70000/nim/x:1'", "host name with optional port"),
    (model(image="nvcr.io/nim/x:"), M + ".image", "'nvcr.io/nim/x:'", "a tag has"),
    (model(image=""), M + ".image", "None", "set it, for example nvcr.io/"),
    (model(gpus=0), M + ".gpus", "0", "write a count, a list of indices or UUIDs, or all"),
    (model(gpus="two"), M + ".gpus", "'two'", "write a count"),
    (model(gpus=[]), M + ".gpus", "[]", "write a count"),
    (model(gpus=True), M + ".gpus", "True", "write a count"),
    (model(gpus=[0, 0]), M + ".gpus", "[0, 0]", "name it once"),
    (model(gpus=["GPU-12"]), M + ".gpus", "['GPU-12']", "UUIDs"),
    (model(gpus="²"), M + ".gpus", "'²'", "write a count"),
    (model(gpus=["²"]), M + ".gpus", "['²']", "UUIDs"),
    (model(gpus=1.5), M + ".gpus", "1.5", "write a count"),
    (model(port=0), M + ".port", "0", "from 1 to 65535"),
    (model(port=70000), M + ".port", "70000", "from 1 to 65535"),
    (model(port="http"), M + ".port", "'http'", "write a whole number"),
    (model(bind_address="localhost"), M + ".bind_address", "'localhost'", "use 0.0.0.0, 127.0.0.1"),
    (model(cache_directory="nim-cache"), M + ".cache_directory", "'nim-cache'", "start it with /"),
    (model(cache_directory="/srv/../etc"), M + ".cache_directory", "'/srv/../etc'", "choose another path"),
    (model(cache_directory="/etc"), M + ".cache_directory", "'/etc'", "choose a directory of its own"),
    (model(weights_directory="weights"), M + ".weights_directory", "'weights'", "start it with /"),
    (model(lora_directory="./lora"), M + ".lora_directory", "'./lora'", "start it with /"),
    (model(lora_refresh_interval=60), M + ".lora_refresh_interval", "60", "set lora_directory too"),
    (model(shm_size="16"), M + ".shm_size", "'16'", "a number and a unit"),
    (model(shm_size=16), M + ".shm_size", "16", "a number and a unit"),
    (model(shm_size="lots"), M + ".shm_size", "'lots'", "for example 16GB"),
    (model(disk_space="20"), M + ".disk_space", "'20'", "a number and a unit"),
    (model(ulimits={"nofiles": 1}), M + ".ulimits.nofiles", "1", "use one of"),
    (model(ulimits={"nofile": "many"}), M + ".ulimits.nofile", "'many'", "soft:hard"),
    (model(ulimits=65536), M + ".ulimits", "65536", "{nofile: 65536}"),
    (model(environment=["A=b"]), M + ".environment", "['A=b']", "NAME: value"),
    (model(environment={"NGC_API_KEY": KEY}), M + ".environment.NGC_API_KEY", "...", "set ngc_api_key instead"),
    (model(environment={"NIM_SERVER_PORT": 9000}), M + ".environment.NIM_SERVER_PORT", "9000", "set port instead"),
    (model(environment={"NGC_API_KEY": 12345678}), M + ".environment.NGC_API_KEY", "...", "set ngc_api_key instead"),
    (model(environment={"DB_PASSWORD": "hunter"}), M + ".environment.DB_PASSWORD", "...", "into secret_environment"),
    (model(environment={"db-password": 12345678}), M + ".environment.db-password", "...", "letters, digits"),
    (model(secret_environment={"HF-TOKEN": 5}), M + ".secret_environment", "...", "letters, digits"),
    (model(secret_environment={"PIN": True}), M + ".secret_environment.PIN", "...", "put it in quotes"),
    (model(environment={"HF_TOKEN": "hf_abc"}), M + ".environment.HF_TOKEN", "...", "put it into secret_environment"),
    (
        model(secret_environment={"HF_TOKEN": "a\nb"}),
        M + ".secret_environment.HF_TOKEN",
        "...",
        "remove it",
    ),
    (model(environment={"A": True}), M + ".environment.A", "True", "put it in quotes"),
    (model(environment={"A-B": "x"}), M + ".environment.A-B", "...", "letters, digits and underscores"),
    (model(environment={"A": "x\ny"}), M + ".environment.A", "'x\\ny'", "remove it"),
    (model(profile="fast"), M + ".profile", "'fast'", "list-model-profiles"),
    (model(profile=PROFILE[:-1]), M + ".profile", PROFILE[:20], "copy all 64"),
    (model(profile=PROFILE + " (vllm-bf16-tp1)"), M + ".profile", PROFILE[:20], "use the id alone"),
    (model(served_model_name="my model"), M + ".served_model_name", "'my model'", "without spaces"),
    (model(custom_model_name="my model"), M + ".custom_model_name", "'my model'", "without spaces"),
    (model(max_model_length="8k"), M + ".max_model_length", "'8k'", "a whole number of tokens"),
    (model(max_model_length=0), M + ".max_model_length", "0", "from 1"),
    (model(network_mode="none"), M + ".network_mode", "'none'", "use bridge, host"),
    (
        model(network_mode="host", bind_address="10.0.0.1"),
        M + ".network_mode",
        "'host'",
        "use bridge, or leave bind_address out",
    ),
    (model(user="nim"), M + ".user", "'nim'", "UID:GID"),
    (model(read_only="perhaps"), M + ".read_only", "'perhaps'", "true or false"),
    (model(read_only=True, tmpfs=["scratch"]), M + ".tmpfs[0]", "'scratch'", "start it with /"),
    (model(tmpfs=["/scratch"]), M + ".tmpfs", "/scratch", "set read_only too"),
    (model(engine_arguments="--x"), M + ".engine_arguments", "'--x'", "one list entry"),
    (model(engine_arguments=["--port=9"]), M + ".engine_arguments[0]", "'--port=9'", "set port instead"),
    (model(engine_arguments=["--api-key=%s" % KEY]), M + ".engine_arguments[0]", "...", "leave it out"),
    (model(start_timeout="30m"), M + ".start_timeout", "'30m'", "a whole number of seconds"),
    (model(start_timeout=1), M + ".start_timeout", "1", "from 10"),
    (model(stop_timeout=0), M + ".stop_timeout", "0", "from 1"),
    (model(completion="poem"), M + ".completion", "'poem'", "use one of auto, chat, completion, none"),
    (model(state="running"), M + ".state", "'running'", "use one of started, stopped, absent"),
    # -- models together
    (two({}, {"name": "one"}), "nim_models[1].name", "'one'", "give each its own name"),
    (two({}, {"port": 8000}), "nim_models[1].port", "8000", "give each model its own port"),
    (
        two({"bind_address": "127.0.0.1"}, {"port": 8000}),
        "nim_models[1].port",
        "8000",
        "give each model its own port",
    ),
    (two({"gpus": [0, 1]}, {"gpus": [1]}), "nim_models[1].gpus", "[1]", "give each model GPUs of its own"),
    (
        two({"gpus": [UUID]}, {"gpus": [UUID.lower().replace("gpu-", "GPU-")]}),
        "nim_models[1].gpus",
        "GPU-",
        "of its own",
    ),
    (two({"gpus": "all"}, {"gpus": 1}), "nim_models[1].gpus", "1", "leave room for both"),
    (
        two({"cache_directory": "/srv/c"}, {"cache_directory": "/srv/c", "user": "2000"}),
        "nim_models[1].cache_directory",
        "'/srv/c'",
        "use the same user or another directory",
    ),
]

SPECS = load_specs()
#: What stands in the place of secrets, and of what could be one.
HIDDEN = ("...", "(not shown)")


def find(variables: dict[str, t.Any], **more: t.Any) -> list[Problem]:
    return validate(variables, SPECS, **more)


@pytest.mark.parametrize(
    ("variables", "variable", "value", "remedy"), TABLE, ids=["%s-%d" % (row[1], at) for at, row in enumerate(TABLE)]
)
def test_refused(variables: dict[str, t.Any], variable: str, value: str, remedy: str) -> None:
    problems = find(variables)
    assert [problem.variable for problem in problems] == [variable]
    [problem] = problems
    assert problem.message.startswith(variable + " = ")
    shown, _colon, rest = problem.message[len(variable) + 3 :].partition(": ")
    if value in HIDDEN:
        assert shown == value
    else:
        assert value in problem.message
        assert shown not in HIDDEN
    assert remedy in rest
    # One sentence, one line, no secret.
    assert problem.message.endswith(".")
    assert "\n" not in problem.message
    assert "SECRET" not in problem.message


@pytest.mark.parametrize(
    "variables",
    [
        {"ngc_registry": "ops:SECRET@nvcr.io"},
        {"nim_registry_mirrors": "ops:SECRET@mirror.example.org"},
        {"nim_registry_mirrors": [{"nvcr.io": "ops:SEC/RET@mirror.example.org"}]},
        {"nim_registry_mirrors": {"nvcr.io": "ops:SECRET@https://mirror.example.org"}},
        {"docker_repository_url": ["ops:SECRET@mirror.example.org"]},
        model(image=["ops:SECRET@nvcr.io/nim/x:1"]),
        model(image={"ops:SECRET@nvcr.io/nim/x:1": None}),
    ],
)
def test_a_password_before_a_host_is_never_shown(variables: dict[str, t.Any]) -> None:
    [problem] = find(variables)
    assert "RET" not in problem.message


@pytest.mark.parametrize(
    "variables",
    [
        model(environment=["NGC_API_KEY=nvapi-SECRET1234567890"]),
        model(environment="HF_TOKEN=SECRET123456789"),
        model(environment=["DB_PASS=SECRET"]),
        model(environment={"A": {"PASSWORD": "SECRET"}}),
        model(environment={"A": ["nvapi-SECRET1234567890"]}),
        model(engine_arguments="--api-key nvapi-SECRET1234567890"),
        model(image="nvapi-SECRET1234567890"),
    ],
)
def test_a_secret_in_the_wrong_place_is_not_shown(variables: dict[str, t.Any]) -> None:
    """As lists of NAME=value, which Docker Compose takes and we do not."""
    [problem] = find(variables)
    assert "SECRET" not in problem.variable + problem.message
    assert "***" in problem.message


def test_a_digest_is_no_password() -> None:
    [problem] = find(model(image=["nvcr.io/nim/x:1@sha256:12"]))
    assert "'nvcr.io/nim/x:1@sha256:12'" in problem.message


def test_the_table_is_long_enough() -> None:
    assert len([row for row in TABLE if row[2] not in HIDDEN]) >= 100


SOUND: dict[str, t.Any] = {
    "nvidia_driver_branch": 580,
    "nvidia_driver_version": "580.95.05",
    "nvidia_driver_flavour": "open",
    "nvidia_driver_reboot": "yes",
    "nvidia_driver_repository_url": "http://mirror.example.org:8080/cuda/repos/",
    "docker_version": "5:28.5.1-1~debian.13~trixie",
    "docker_users": ["alice", "svc-nim$"],
    "docker_daemon_options": {"log-opts": {"max-size": "10m"}, "features": {"cdi": True}},
    "nvidia_container_toolkit_version": "1.17.4",
    "ngc_api_key": KEY,
    "ngc_registry": "registry.example.org:5000",
    "nim_registry_mirrors": {"nvcr.io": "mirror.example.org:5000/ngc"},
    "nim_models": [
        {"name": "a", "image": IMAGE, "gpus": [0], "port": "8000", "profile": PROFILE, "shm_size": "16GB"},
        {"name": "b", "image": IMAGE, "gpus": [UUID], "port": 8001, "profile": "vllm-bf16-tp1", "state": "stopped"},
        {"name": "c", "image": IMAGE, "gpus": 1, "port": 8002, "environment": {"NIM_LOG_LEVEL": "INFO"}},
        {"name": "d", "image": IMAGE, "port": 8002, "state": "absent"},
    ],
    # other people's
    "docker_compose_version": "2.29.7",
    "ansible_host": "192.0.2.1",
    "my_nim_models": "whatever",
}


def test_sound_inventory() -> None:
    assert find(SOUND) == []
    assert find({}) == []


def test_a_password_of_another_registry_need_not_look_like_a_key() -> None:
    variables = {"ngc_registry": "mirror.example.org", "ngc_username": "me", "ngc_api_key": "p w'SECRET"}
    assert find(variables) == []
    assert find({**variables, "ngc_username": "$oauthtoken"})


def test_all_mistakes_are_reported_at_once() -> None:
    variables = {
        "nvidia_driver_branch": "581",
        "docker_users": "alice",
        "ngc_registry": "https://nvcr.io",
        "nim_models": [
            {"name": "a b", "image": "X", "port": 0, "shm_size": "16", "colour": "green"},
            {"name": "c", "image": IMAGE, "port": 8000},
            {"name": "d", "image": IMAGE, "port": 8000},
            {"name": "c", "image": IMAGE, "port": 8003},
        ],
    }
    assert sorted(problem.variable for problem in find(variables)) == [
        "docker_users",
        "ngc_registry",
        "nim_models[0].colour",
        "nim_models[0].image",
        "nim_models[0].name",
        "nim_models[0].port",
        "nim_models[0].shm_size",
        "nim_models[2].port",
        "nim_models[3].name",
        "nvidia_driver_branch",
    ]


def test_key_of_the_environment_and_of_a_file() -> None:
    [problem] = find({}, environment={"NGC_API_KEY": KEY + "\n"})
    assert problem.message.startswith("NGC_API_KEY in the environment of the controller = (not shown): ")
    assert find({"ngc_api_key": ""}, environment={"NGC_API_KEY": KEY + "\n"}) == []
    files = {"/k": KEY + "\n", "/two": KEY + "\n" + KEY}
    assert find({"ngc_api_key_file": "/k"}, read_file=files.get) == []
    [problem] = find({"ngc_api_key_file": "/two"}, read_file=files.get)
    assert problem.variable == "ngc_api_key_file"
    assert find({"ngc_api_key": "", "ngc_state": "absent", "ngc_api_key_file": "/gone"}) == []
