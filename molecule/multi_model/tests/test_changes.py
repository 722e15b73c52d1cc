# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator changes on a fleet that serves, and what must not be touched by it."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import readme
from control import KEY_EXPIRED, KEY_SECOND, KEY_VALID, World
from drifts import LEFTOVER_PROXY
from fleet_testing import SANDBOX, Fleet, Host, Json, wait_until

FLEET = Fleet("multi_model", readme.inventory_of("multi_model"))
ONE = FLEET.host("gpu01")
TWO = FLEET.host("gpu02")
#: The real length of such a build.
BUILD_SECONDS = 84


@pytest.fixture(autouse=True)
def all_serve() -> None:
    """Every test begins with everything serving; which variant of it is left to the one before."""
    if not (ONE.ready(8000) and ONE.ready(8001) and TWO.ready(8000)):
        FLEET.nim()
    for host in (ONE, TWO):
        for model in host.models():
            word = "/run/nim/%s.json" % model
            wait_until(lambda host=host, word=word: host.read_json(word)["phase"] == "ready", "%s is ready" % model)


def gpus_of(host: Host, model: str) -> list[str]:
    """Indices of the GPUs that the container of a model really has."""
    on_host = host.run("nvidia-smi --query-gpu=index,uuid --format=csv,noheader").splitlines()
    inside = host.gpus_inside(model)
    return [index for index, uuid in (line.split(", ") for line in on_host) if uuid in inside]


# -- the fleet as the README has it ---------------------------------------------------------------


def test_status_shows_all_models(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "status.json"
    FLEET.play("status", "-e", "status_output=%s" % output)
    rows: list[Json] = json.loads(output.read_text())
    text = json.dumps(rows)
    assert {row["host"] for row in rows} == {ONE.name, TWO.name}
    assert [text.count('"%s"' % model) > 0 for model in ("llama", "mistral", "nemotron")] == [True] * 3
    assert text.count("sha256:") >= 3


def test_every_model_completes_on_its_own_gpu() -> None:
    for host, port in ((ONE, 8000), (ONE, 8001), (TWO, 8000)):
        status, answer = host.complete(port)
        assert status == 200 and answer["choices"][0]["text"]
    assert sorted(gpus_of(ONE, "llama") + gpus_of(ONE, "mistral")) == ["0", "1"]
    assert gpus_of(TWO, "nemotron") == ["0"]


# -- one model's settings -------------------------------------------------------------------------


def test_change_of_one_environment_restarts_only_that_one() -> None:
    before, other = ONE.identity(), TWO.identity()
    changed = FLEET.changed("gpu01", "llama", environment={"STANDIN_TTFT_MS": "21"})
    with ONE.client(8001) as client:
        run = FLEET.site(inventory=changed)
    assert run.restarts(ONE.name) == {"nim-llama.service"}
    assert run.changed() == ["%s: gpu_fleet.nim.nim : NIM services are as wanted" % ONE.name]
    assert client.failures == []
    after = ONE.identity()
    assert after["llama"].serving != before["llama"].serving
    assert after["mistral"] == before["mistral"]
    assert TWO.identity() == other


def test_names_length_and_engine_arguments() -> None:
    before = ONE.identity()
    changed = FLEET.changed(
        "gpu01",
        "llama",
        served_model_name="house-llama,llama",
        max_model_length=4096,
        engine_arguments=["--max-num-seqs", "32"],
        environment={"NIM_LOG_LEVEL": "INFO"},
    )
    run = FLEET.nim(changed, "gpu01")
    assert run.restarts(ONE.name) == {"nim-llama.service"}
    entries = ONE.get(8000, "/v1/models")[1]["data"]
    assert [entry["id"] for entry in entries] == ["house-llama", "llama"]
    assert entries[0]["max_model_len"] == 4096
    assert "--max-num-seqs" in ONE.run("docker inspect --format '{{json .Config.Cmd}}' nim-llama")
    assert ONE.identity("mistral")["mistral"] == before["mistral"]


def test_network_of_the_host_another_user_a_gpu_by_its_uuid_and_a_read_only_root() -> None:
    before, uuids = ONE.identity(), ONE.gpus_inside("llama")
    cache = "/srv/models/llama"
    changed = FLEET.changed(
        "gpu01",
        "llama",
        network_mode="host",
        port=8010,
        user="2000:2001",
        gpus=uuids,
        shm_size="1GB",
        ulimits={"nofile": "1024:2048"},
        # Another cache: the container that fetches is read-only, too.
        cache_directory=cache,
        read_only=True,
        tmpfs=["/tmp", "/scratch"],  # noqa: S108  # of the container
    )
    run = FLEET.nim(changed, "gpu01")
    assert run.restarts(ONE.name) == {"nim-llama.service"}
    assert ONE.ready(8010) and ONE.get(8000, "/v1/health/ready")[0] == 0
    assert ONE.gpus_inside("llama") == uuids
    process = "/proc/%d" % ONE.identity("llama")["llama"].container_pid
    status = ONE.run("grep -E '^[UG]id:' %s/status" % process).split()
    assert status == ["Uid:", *["2000"] * 4, "Gid:", *["2001"] * 4]
    assert ONE.run("grep 'open files' %s/limits" % process).split()[3:5] == ["1024", "2048"]
    assert "size=1048576k" in ONE.run("grep ' /dev/shm ' %s/mounts" % process)
    mounts = {line.split()[1]: line for line in ONE.run("cat %s/mounts" % process).splitlines()}
    assert mounts["/"].split()[3].startswith("ro,")
    for directory in ("/scratch", "/tmp"):  # noqa: S108  # of the container
        options = mounts[directory].split()[3].split(",")
        assert mounts[directory].split()[2] == "tmpfs" and "rw" in options and "noexec" not in options
        ONE.run("docker exec nim-llama touch %s/written" % directory)
    assert ONE.run("stat -c %%u:%%g:%%a %s" % cache) == "2000:2001:750"
    assert ONE.run("find %s ! -user 2000" % cache) == ""
    assert ONE.identity("mistral")["mistral"] == before["mistral"]
    assert FLEET.nim(changed, "gpu01").changed() == []


def test_new_tag_restarts_only_its_model() -> None:
    before = ONE.identity()
    changed = FLEET.changed("gpu01", "llama", image="nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.5")
    run = FLEET.nim(changed, "gpu01")
    assert run.restarts(ONE.name) == {"nim-llama.service"}
    assert "1.8.5" in json.dumps(ONE.get(8000, "/v1/version")[1])
    assert ONE.identity("mistral")["mistral"] == before["mistral"]
    assert FLEET.nim(changed, "gpu01").changed() == []


def test_image_from_a_local_mirror() -> None:
    name = "nim/nvidia/nemotron-3-nano"
    changed = FLEET.changed("gpu02", "nemotron", image="nvcr.io/%s:2.0.13" % name)
    mirror = ["-e", json.dumps({"nim_registry_mirrors": {"nvcr.io": "mirror.fleet.test"}})]
    began = time.time()
    assert FLEET.nim(changed, "gpu02", options=mirror).restarts(TWO.name) == {"nim-nemotron.service"}
    asked = [entry for entry in World(SANDBOX).requests(began, client=TWO.address) if entry["uri"].startswith("/v2/")]
    assert {entry["host"] for entry in asked} == {"mirror.fleet.test"}
    image = TWO.run("docker inspect --format '{{.Config.Image}}' nim-nemotron")
    assert re.fullmatch(r"mirror\.fleet\.test/%s@sha256:[0-9a-f]{64}" % name, image), image
    assert "2.0.13" in json.dumps(TWO.get(8000, "/v1/version")[1])
    assert FLEET.nim(changed, "gpu02", options=mirror).changed() == []


def test_profile_by_description_with_lora_and_profile_by_id() -> None:
    before = ONE.identity()
    for adapter in ("poems", "contracts"):
        ONE.write("/srv/loras/%s/adapter_config.json" % adapter, '{"r": 8}')
        ONE.write("/srv/loras/%s/adapter_model.safetensors" % adapter, "weights")
    lora = "vllm-bf16-tp1-pp1-lora"
    changed = FLEET.changed("gpu01", "llama", profile=lora, lora_directory="/srv/loras", lora_refresh_interval=2)
    assert FLEET.nim(changed, "gpu01").restarts(ONE.name) == {"nim-llama.service"}
    assert {"poems", "contracts"} <= set(ONE.model_names(8000))
    assert ONE.get(8000, "/v1/metadata")[1]["selectedModelProfileId"] == profile_id(lora)
    ONE.write("/srv/loras/recipes/adapter_config.json", '{"r": 8}')
    ONE.write("/srv/loras/recipes/adapter_model.safetensors", "weights")
    wait_until(lambda: "recipes" in ONE.model_names(8000), "the new adapter is found without a restart")

    plain = profile_id("vllm-bf16-tp1-pp1")
    assert FLEET.nim(FLEET.changed("gpu01", "llama", profile=plain), "gpu01").restarts(ONE.name) == {
        "nim-llama.service"
    }
    assert ONE.get(8000, "/v1/metadata")[1]["selectedModelProfileId"] == plain
    assert ONE.identity("mistral")["mistral"] == before["mistral"]


def profile_id(description: str) -> str:
    """As the stand-in images have it."""
    return hashlib.sha256(("profile:" + description).encode()).hexdigest()


# -- profiles -------------------------------------------------------------------------------------


def test_profiles_of_both_families(tmp_path: pathlib.Path) -> None:
    module = "gpu_fleet.nim.nim_profile_info"
    tasks = [
        {
            "name": method,
            module: {"image": "{{ nim_models[0].image }}", "method": method, "profile": "vllm-bf16-tp2-pp1"},
        }
        for method in ("container", "manifest")
    ]
    tasks.append({"name": "registry", module: {"image": "nvcr.io/nim/openai/gpt-oss-20b:2.0.5"}})
    playbook = tmp_path / "profiles.yml"
    playbook.write_text(json.dumps([{"hosts": "gpu_hosts", "gather_facts": False, "become": True, "tasks": tasks}]))
    before = {
        host.name: host.run("docker ps -aq --no-trunc | sort; docker images -q --no-trunc | sort")
        for host in (ONE, TWO)
    }
    run = FLEET.play(playbook)
    for host, family in ((ONE, "1.x"), (TWO, "2.x")):
        listing, manifest, registry = (run.of(host.name, task["name"])[0]["result"] for task in tasks)
        assert (listing["source"], manifest["source"], registry["source"]) == ("container", "image", "registry")
        assert (listing["family"], manifest["family"], registry["family"]) == (family, family, "2.x")
        keys = ("id", "backend", "precision", "tp", "pp", "lora")
        told, written = (
            {tuple(profile[key] for key in keys) for profile in answer["profiles"]} for answer in (listing, manifest)
        )
        assert told == written and len(told) > 3
        assert {len(answer["gpus"]) for answer in (listing, manifest)} == {2 if host is ONE else 1}
        # No trace of the container.
        assert host.run("docker ps -aq --no-trunc | sort; docker images -q --no-trunc | sort") == before[host.name]
    fits = {
        host.name: {one["description"]: one["fits"] for one in run.of(host.name, "container")[0]["result"]["profiles"]}
        for host in (ONE, TWO)
    }
    assert fits[ONE.name]["vllm-bf16-tp2-pp1"] is True
    assert fits[ONE.name]["tensorrt_llm-h200-fp8-tp1-pp1-throughput"] is True
    assert fits[ONE.name]["tensorrt_llm-h100-fp8-tp1-pp1-throughput"] is False
    assert fits[TWO.name]["vllm-bf16-tp1-pp1-16.0"] is True
    assert fits[TWO.name]["vllm-bf16-tp2-pp1-9.0"] is False
    assert run.of(ONE.name, "container")[0]["result"]["match"]["fits"] is True
    assert run.of(TWO.name, "container")[0]["result"]["match"]["found"] is False


def test_a_profile_that_cannot_run_is_refused_before_the_download() -> None:
    before = ONE.identity()
    images = ONE.run("docker images --quiet --no-trunc | sort")
    larger = "nvcr.io/nim/meta/llama-3.1-70b-instruct:1.3.3"
    values = {"image": larger, "gpus": None, "profile": "vllm-bf16-tp2-pp1", "gpu_memory": "200GB"}
    run = FLEET.nim(FLEET.changed("gpu01", "llama", **values), "gpu01", succeeds=False)
    message = run.failure(ONE.name)
    asked = "llama asks for profile vllm-bf16-tp2-pp1 with 2 GPUs, but 2 more would be needed and 0 are free with the 200.0 GiB"
    # Who holds what.
    rows = ["GPU 0 GPU-", "GPU 1 GPU-", "NVIDIA H200 140.4 GiB: mistral", "NVIDIA H200 140.4 GiB: free"]
    assert all(word in message for word in [asked, *rows]), message
    # The manifest at the registry knows what the image has, and for which GPUs.
    engine = profile_id("tensorrt_llm-h100-fp8-tp1-pp1-throughput")
    run = FLEET.nim(FLEET.changed("gpu01", "llama", image=larger, profile=engine), "gpu01", succeeds=False)
    message = run.failure(ONE.name)
    assert "llama" in message and "built for H100" in message and "NVIDIA H200" in message, message
    assert ONE.run("docker images --quiet --no-trunc | sort") == images
    assert ONE.identity() == before


# -- GPUs and ports -------------------------------------------------------------------------------


def test_two_models_want_one_gpu_or_one_port() -> None:
    before = ONE.identity()
    for values, words in (
        ({"gpus": [1]}, ["gpus"]),
        ({"port": 8001}, ["port", "8001"]),
    ):
        changed = FLEET.changed("gpu01", "llama", **values)
        if "gpus" in values:
            entry = changed["gpu_hosts"]["hosts"][ONE.name]["nim_models"][1]
            entry["gpus"] = [1]
        run = FLEET.site(inventory=changed, succeeds=False)
        # Before any host is touched.
        assert {entry["task"] for entry in run.results} == {"Find all mistakes in the variables of all hosts"}
        message = run.failure(ONE.name)
        assert all(word in message for word in (*words, "nim_models[1]", "llama"))
    # Only the host knows how many it has.
    run = FLEET.nim(FLEET.changed("gpu01", "llama", gpus=2), "gpu01", succeeds=False)
    assert "GPU" in run.failure(ONE.name) and "llama" in run.failure(ONE.name)
    assert ONE.identity() == before


def test_gpus_change_hands() -> None:
    FLEET.nim(host="gpu01")
    before = ONE.identity()
    # The same GPU by its index is no change of what runs.
    first = int(gpus_of(ONE, "llama")[0])
    assert FLEET.nim(FLEET.changed("gpu01", "llama", gpus=[first]), "gpu01").restarts(ONE.name) == set()
    assert ONE.identity() == before
    changed = FLEET.changed("gpu01", "llama", gpus=[1 - first])
    changed["gpu_hosts"]["hosts"][ONE.name]["nim_models"][1]["gpus"] = [first]
    run = FLEET.nim(changed, "gpu01")
    assert run.restarts(ONE.name) == {"nim-llama.service", "nim-mistral.service"}
    assert [gpus_of(ONE, "llama"), gpus_of(ONE, "mistral")] == [[str(1 - first)], [str(first)]]
    # Back to a count: nobody moves without need.
    assert FLEET.nim(host="gpu01").restarts(ONE.name) == set()


@pytest.mark.parametrize("holder", ["container", "service", "proxy"])
def test_port_is_held_by_somebody_else(holder: str) -> None:
    before = ONE.identity()
    ONE.run("systemctl stop nim-llama")
    image = ONE.run("docker inspect --format '{{.Image}}' nim-llama")
    try:
        if holder == "container":
            ONE.run("docker run -d --name old-nim -p 8000:8000 --entrypoint /bin/busybox %s sleep 600" % image)
            named = ["docker-proxy", "old-nim"]
        elif holder == "service":
            ONE.run("systemd-run --quiet --unit old-server python3 -m http.server 8000")
            wait_until(lambda: ONE.get(8000, "/")[0] == 200, "the other server answers")
            named = ["python3", "old-server.service"]
        else:
            ONE.run(LEFTOVER_PROXY)
            pid = ONE.run("cat /tmp/proxy")
            named = ["docker-proxy (pid %s)" % pid, "left behind", "kill %s" % pid]
        changed = FLEET.changed("gpu01", "mistral", environment={"STANDIN_TTFT_MS": "22"})
        run = FLEET.nim(changed, "gpu01", succeeds=False)
        message = run.failure(ONE.name)
        assert "8000" in message and "llama" in message
        assert all(word in message for word in named), message
        assert "pid" in message
        # The other model's change must wait too.
        assert ONE.identity("mistral")["mistral"] == before["mistral"]
        assert ONE.active("llama") == "inactive"
    finally:
        ONE.run("docker rm -f old-nim; systemctl stop old-server", check=False)
        ONE.run("test ! -e /tmp/proxy || kill $(cat /tmp/proxy); rm -f /tmp/proxy", check=False)
    FLEET.nim(host="gpu01")
    assert ONE.ready(8000)


# -- the list -------------------------------------------------------------------------------------


def test_a_model_leaves_the_list() -> None:
    before = ONE.identity()
    run = FLEET.nim(FLEET.changed("gpu01", remove="mistral"), "gpu01")
    assert "mistral" in run.warnings() and "absent" in run.warnings()
    assert ONE.identity("mistral")["mistral"] == before["mistral"]
    # Its GPU is not free for others either.
    run = FLEET.nim(FLEET.changed("gpu01", "llama", remove="mistral", gpus=2), "gpu01", succeeds=False)
    assert "mistral" in run.failure(ONE.name)

    FLEET.nim(FLEET.changed("gpu01", "mistral", state="absent"), "gpu01")
    assert ONE.container_state("mistral") is None
    assert ONE.identity("llama")["llama"] == before["llama"]
    run = FLEET.nim(FLEET.changed("gpu01", "llama", remove="mistral", gpus=2), "gpu01")
    assert gpus_of(ONE, "llama") == ["0", "1"]


# -- the key --------------------------------------------------------------------------------------

WITHOUT_KEY = {"NGC_API_KEY": ""}


@pytest.fixture
def own_key() -> Iterator[str]:
    key = "nvapi-sandbox-multi-model-Rt5vQ8xKc2LmNp7JwY4h"
    world = World(SANDBOX)
    world.set_key(key, "valid")
    yield key
    world.remove_key(key)


def in_vault(folder: pathlib.Path, key: str) -> tuple[str, ...]:
    """Options of a run whose key is in an encrypted file of variables."""
    password, variables = folder / "password", folder / "vault.yml"
    password.write_text("correct horse battery staple\n")
    variables.write_text("ngc_api_key: %s\n" % key)
    vault = pathlib.Path(sys.executable).parent / "ansible-vault"
    subprocess.run([vault, "encrypt", "--vault-password-file", password, variables], check=True, capture_output=True)
    assert key not in variables.read_text()
    return ("-e", "@%s" % variables, "--vault-password-file", str(password))


def test_expired_key(own_key: str, tmp_path: pathlib.Path) -> None:
    before = ONE.identity()
    options = ("--limit", ONE.name, "--tags", "ngc,nim")
    # A new key is stored and restarts nothing.
    run = FLEET.site(*options, environment={"NGC_API_KEY": own_key})
    assert run.restarts(ONE.name) == set() and len(run.changed()) > 0
    assert ONE.identity() == before
    stored = ONE.run("sha256sum /etc/nim/ngc.env /root/.docker/config.json")

    # It expires, and the operator notices when a model is to be replaced.
    World(SANDBOX).set_key(own_key, "expired")
    changed = FLEET.changed("gpu01", "llama", image="nvcr.io/nim/meta/llama3-8b-instruct:1.0.3")
    run = FLEET.site(*options, inventory=changed, environment={"NGC_API_KEY": own_key}, succeeds=False)
    assert "expired" in run.failure(ONE.name)
    assert own_key not in run.output
    assert ONE.identity() == before

    # Another one, and that is no better: it is not even stored.
    run = FLEET.site(*options, environment={"NGC_API_KEY": KEY_EXPIRED}, succeeds=False)
    assert "expired" in run.failure(ONE.name)
    assert ONE.run("sha256sum /etc/nim/ngc.env /root/.docker/config.json") == stored
    assert ONE.identity() == before

    # A new one, in the vault.
    run = FLEET.site(*options, *in_vault(tmp_path, KEY_SECOND), environment=WITHOUT_KEY)
    assert run.restarts(ONE.name) == set() and len(run.changed()) > 0
    assert ONE.identity() == before
    renewed = ONE.run("sha256sum /etc/nim/ngc.env /root/.docker/config.json")
    assert renewed != stored
    # The same one, in a file, is nothing new; another one is stored like any.
    file = tmp_path / "key"
    in_file = ("-e", "ngc_api_key_file=%s" % file)
    file.write_text(KEY_SECOND + "\n")
    assert FLEET.site(*options, *in_file, environment=WITHOUT_KEY).changed() == []
    file.write_text(KEY_VALID + "\n")
    run = FLEET.site(*options, *in_file, environment=WITHOUT_KEY)
    assert run.restarts(ONE.name) == set() and len(run.changed()) > 0
    assert ONE.identity() == before
    assert ONE.run("sha256sum /etc/nim/ngc.env /root/.docker/config.json") not in (stored, renewed)


def test_expired_key_and_files_still_to_be_fetched(own_key: str, tmp_path: pathlib.Path) -> None:
    options = ("--limit", ONE.name, "--tags", "ngc,nim")
    FLEET.nim(host="gpu01")
    before = ONE.identity()
    assert FLEET.site(*options, environment={"NGC_API_KEY": own_key}).restarts(ONE.name) == set()
    World(SANDBOX).set_key(own_key, "expired")
    # The same image, for which nobody has to ask the registry; but its files for this are not on the host.
    changed = FLEET.changed("gpu01", "llama", profile="vllm-bf16-tp1-pp1", cache_directory="/srv/models/other-profile")
    with ONE.client(8000) as client:
        run = FLEET.site(*options, inventory=changed, environment={"NGC_API_KEY": own_key}, succeeds=False)
    message = run.failure(ONE.name)
    assert "llama fetches files with the NGC key" in message and "refuses the API key" in message, message
    assert own_key not in run.output
    assert ONE.identity() == before
    assert client.failures == []

    run = FLEET.site(*options, *in_vault(tmp_path, KEY_VALID), inventory=changed, environment=WITHOUT_KEY)
    assert run.restarts(ONE.name) == {"nim-llama.service"}
    assert ONE.get(8000, "/v1/metadata")[1]["selectedModelProfileId"] == profile_id("vllm-bf16-tp1-pp1")
    assert ONE.identity("mistral")["mistral"] == before["mistral"]
    FLEET.nim(host="gpu01")


# -- fine-tuned -----------------------------------------------------------------------------------


def test_fine_tuned_weights() -> None:
    before = ONE.identity()
    weights = "/srv/weights/house-style"
    TWO.write(weights + "/config.json", '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    TWO.write(weights + "/tokenizer_config.json", "{}")
    TWO.write(weights + "/tokenizer.json", "{}")
    TWO.write(weights + "/model.safetensors", "weights")
    repository = "nim/meta/llama-3.1-8b-instruct"
    tuned = {
        "name": "tuned",
        # The base model's: its prebuilt engines, one for this very GPU among them, hold other weights.
        "image": "nvcr.io/%s:1.8.4" % repository,
        "gpus": 1,
        "port": 8000,
        "weights_directory": weights,
        "served_model_name": "house-style",
        "custom_model_name": "house-style-engine",
        "environment": {"STANDIN_BUILD_SECONDS": str(BUILD_SECONDS)},
    }
    changed = FLEET.changed("gpu02", "nemotron", state="absent", add=tuned)
    # From an earlier run of this test; all tags share the one large layer, so gpu01 would pull next to nothing.
    TWO.run("docker images --quiet nvcr.io/%s | sort -u | xargs --no-run-if-empty docker rmi --force" % repository)
    world = World(SANDBOX)
    # Some 12 seconds for 60 MB, so two lines of progress.
    throttle = world.throttle(5000, repository=repository)
    try:
        run = FLEET.site(inventory=changed)
    finally:
        world.mend(throttle)
    # The operator sees what takes so long: how much of the image is here, how fast it comes, and when it will be there,
    progress = r"\[%s\] %s \d+%% [\d.]+(?: kB)? of [\d.]+ MB, [\d.]+ [kM]B/s, \d+:\d\d left"
    assert re.search(progress % (re.escape(TWO.name), re.escape(repository)), run.output)
    # and the build.
    assert "tuned building the engine" in run.output
    health = run.of(TWO.name, "Every model answers")[0]["result"]["models"][0]
    assert health["ready"] and health["seconds_to_ready"] >= BUILD_SECONDS
    assert health["completion"]["kind"] == "completion" and "chat template" in health["completion"]["note"]
    chosen = TWO.get(8000, "/v1/metadata")[1]["selectedModelProfileId"]
    assert chosen == profile_id("tensorrt_llm-trtllm_buildable-bf16-tp1-pp1")
    assert TWO.model_names(8000) == ["house-style"]
    assert TWO.complete(8000, "house-style")[0] == 200
    chat = {"model": "house-style", "messages": [{"role": "user", "content": "Hello"}]}
    assert TWO.get(8000, "/v1/chat/completions", chat)[0] == 400
    assert ONE.identity() == before
    assert FLEET.site(inventory=changed).changed() == []

    # The engine is kept, under the name that it was given.
    engine = "/var/lib/nim/cache/tuned/local_cache/house-style-engine/rank0.engine"
    built = TWO.run("stat --format '%i %Y' " + engine)
    TWO.run("systemctl restart nim-tuned")
    TWO.wait_ready(8000, seconds=BUILD_SECONDS - 20)
    assert TWO.run("stat --format '%i %Y' " + engine) == built
    FLEET.nim(FLEET.changed("gpu02", add={"name": "tuned", "image": tuned["image"], "port": 8009, "state": "absent"}))
    assert TWO.model_names(8000) != ["house-style"]


# -- the GPU runtime ------------------------------------------------------------------------------


def without_toolkit() -> None:
    # All four packages: with two of them left, it would be half an installation.
    ONE.run(
        "DEBIAN_FRONTEND=noninteractive apt-get purge -qq -y --allow-change-held-packages "
        "'nvidia-container-toolkit*' 'libnvidia-container*'"
    )
    ONE.restart_docker()


def without_runtime() -> None:
    settings = ONE.read_json("/etc/docker/daemon.json")
    del settings["runtimes"]["nvidia"]
    ONE.write("/etc/docker/daemon.json", json.dumps(settings))
    ONE.run("systemctl reload docker")


def without_telling_docker() -> None:
    kept = ONE.run("cat /etc/docker/daemon.json")
    without_runtime()
    ONE.write("/etc/docker/daemon.json", kept)


#: What breaks it, the part that is missing then, and the cause by which the three are told apart.
WITHOUT_GPUS = (
    (without_toolkit, "nvidia-container-toolkit", "containers get their GPUs through it"),
    (without_runtime, "runtimes.nvidia", "the toolkit is installed but was never registered in Docker"),
    (
        without_telling_docker,
        "runtimes.nvidia",
        "the runtime is registered in /etc/docker/daemon.json, but the running daemon was not told",
    ),
)


@pytest.mark.parametrize(("break_it", "named", "why"), WITHOUT_GPUS)
def test_gpu_runtime_is_missing(break_it: Callable[[], None], named: str, why: str) -> None:
    image = ONE.run("docker inspect --format '{{.Image}}' nim-mistral")
    gpu_container = (
        "docker run --rm --runtime=nvidia -e NVIDIA_VISIBLE_DEVICES=all --entrypoint nvidia-smi %s -L" % image
    )
    assert ONE.succeeds(gpu_container)
    before = ONE.identity()
    break_it()
    assert not ONE.succeeds(gpu_container)
    with ONE.client(8001) as client:
        run = FLEET.site("--limit", ONE.name, "--tags", "docker,nvidia_container_toolkit,nim")
    changes = run.changes(ONE.name)
    assert named in json.dumps([change for change in changes if change["why"] == why])
    assert {change["why"] for change in changes} & {cause for *_dummy, cause in WITHOUT_GPUS} == {why}
    assert ONE.succeeds(gpu_container)
    assert run.restarts(ONE.name) == set()
    assert {name: who.serving for name, who in ONE.identity().items()} == {
        name: who.serving for name, who in before.items()
    }
    assert client.outage < 2


def test_gpus_by_cdi() -> None:
    """Every way to give GPUs is set up and proved the way the services then use it."""
    inventory = FLEET.changed("gpu01", "llama")
    for model in inventory["gpu_hosts"]["hosts"][ONE.name]["nim_models"]:
        # Without memlock, which the sandbox's hosts cannot grant in this way of giving GPUs.
        model["ulimits"] = {"nofile": 1024}
    FLEET.nim(inventory, "gpu01")
    before, daemon = ONE.identity(), ONE.run("systemctl show --property MainPID --value docker")
    gpus = {model: ONE.gpus_inside(model) for model in before}
    tags = "docker,nvidia_container_toolkit,nim"
    cdi = ("--limit", ONE.name, "--tags", tags, "-e", "nim_gpu_injection=cdi")
    run = FLEET.site(*cdi, inventory=inventory)
    toolkit = run.of(ONE.name, "Containers can use the GPUs")[0]["result"]
    assert toolkit["smoke_test"] == "passed" and len(toolkit["gpus"]) == 2
    assert "(cdi)" in json.dumps(toolkit["changes"])
    assert "nvidia.com/gpu" in ONE.run("cat /var/run/cdi/nvidia.yaml")
    # Docker reads that feature only when it starts; the services are started anew for their GPUs alone.
    assert ONE.run("systemctl show --property MainPID --value docker") != daemon
    assert run.restarts(ONE.name) == {"nim-llama.service", "nim-mistral.service"}
    for model, uuids in gpus.items():
        requests = json.loads(ONE.run("docker inspect --format '{{json .HostConfig.DeviceRequests}}' nim-" + model))
        assert {request["Driver"] for request in requests} == {"cdi"}
        asked = [device for request in requests for device in request["DeviceIDs"]]
        assert asked == ["nvidia.com/gpu=" + uuid for uuid in uuids]
        assert ONE.gpus_inside(model) == uuids
    assert FLEET.site(*cdi, inventory=inventory).changed() == []
