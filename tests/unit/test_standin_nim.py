# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The sandbox's NIM keeps NIM's contract, in both dialects: run on this machine as a process."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

WORLD = Path(__file__).resolve().parents[1] / "sandbox" / "world"
PROGRAM = WORLD / "standin" / "standin_nim.py"
LLAMA = "nim/meta/llama-3.1-8b-instruct:1.8.4"
NEMOTRON = "nim/nvidia/nemotron-3-nano:2.0.12"
BASE = "nim/meta/llama-3.1-8b-base:1.3.3"
OLD = "nim/meta/llama3-8b-instruct:1.0.3"
EMBEDDING = "nim/nvidia/nv-embedqa-e5-v5:1.10.1"
NATIVE = "nim/nvidia/llama-nemotron-embed-1b-v2:2.0.0"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


control = load("sandbox_standin_control", WORLD / "control.py")
images = load("sandbox_standin_images", WORLD / "images.py")
gate = load("sandbox_standin_gate", WORLD / "service" / "gate.py")
load_module = load("sandbox_load", WORLD.parent / "load.py")
build = load("sandbox_standin_build", WORLD / "build.py")
failures = load("sandbox_standin_failures", WORLD / "standin" / "failures.py")
CATALOGUE = {"%s:%s" % (image["repository"], image["tag"]): {**image, "files_mib": 1} for image in images.IMAGES}


@pytest.fixture(scope="module")
def ngc(tmp_path_factory):
    """api.ngc.nvidia.com on loopback: (url, World)."""
    world = control.World(tmp_path_factory.mktemp("ngc"))
    world.reset()
    catalogue = images.catalogue()
    for model in catalogue["models"].values():
        for files in model["versions"].values():
            for entry in files:
                entry["sizeInBytes"] = min(entry["sizeInBytes"], 200000)
    world.write("catalogue", catalogue)
    server = gate.Gate(("127.0.0.1", 0), world.state, "", "")
    server.aliases["127.0.0.1"] = gate.NGC_HOST
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield "http://127.0.0.1:%d" % server.server_address[1], world
    server.shutdown()
    server.server_close()
    thread.join()


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Nim:
    """One container's worth of process."""

    def __init__(self, directory, ngc_url):
        self.directory = directory
        self.process = None
        self.port = free_port()
        devices = directory / "dev"
        devices.mkdir()
        for name in ("nvidia0", "nvidiactl"):
            (devices / name).touch()
        (directory / "cache").mkdir()
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "NGC_API_KEY": control.KEY_VALID,
            "NIM_CACHE_PATH": str(directory / "cache"),
            "NIM_REPOSITORY_OVERRIDE": ngc_url,
            "NIM_SERVER_PORT": str(self.port),
            "NIM_BACKEND_PORT": str(free_port()),
            "NIM_LOG_LEVEL": "INFO",
            "STANDIN_CONFIG": str(directory / "standin.json"),
            "STANDIN_DEVICE_DIRECTORY": str(devices),
            "STANDIN_LOAD_SECONDS": "0.2",
            "STANDIN_GRAPH_SECONDS": "0",
            "STANDIN_AUTH_SECONDS": "0",
            "STANDIN_STOP_SECONDS": "0",
            "STANDIN_TTFT_MS": "0",
            "STANDIN_TOKENS_PER_SECOND": "5000",
        }

    def command(self, image, *arguments):
        (self.directory / "standin.json").write_text(json.dumps(CATALOGUE[image]))
        return [sys.executable, str(PROGRAM), *arguments]

    def run(self, image, *arguments, **environment):
        """Run to the end: (code, output)."""
        done = subprocess.run(
            self.command(image, *arguments),
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20,
            check=False,
        )
        return done.returncode, done.stdout

    def start(self, image, *arguments, ready=True, **environment):
        self.log = self.directory / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command(image, *(arguments or ("nim-run",))),
                env={**self.environment, **environment},
                stdout=log,
                stderr=log,
            )
        if ready:
            self.wait(200)
        return self

    def wait(self, status, path="/v1/health/ready", seconds=10):
        until = time.time() + seconds
        seen = None
        while time.time() < until:
            with contextlib.suppress(OSError):
                seen = self.get(path)[0]
                if seen == status:
                    return
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)
        raise AssertionError("%s: %s\n%s" % (path, seen, self.text()))

    def request(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, **body):
        return self.request("POST", path, body)

    def text(self):
        return self.log.read_text()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture
def nim(tmp_path, ngc):
    nim = Nim(tmp_path, ngc[0])
    yield nim
    if nim.process and nim.process.poll() is None:
        nim.process.kill()
        nim.process.wait()


def open_files(pid: int) -> set[str]:
    """Names of the files that a process holds open."""
    found = set()
    for entry in Path("/proc/%d/fd" % pid).iterdir():
        # It goes on working, and closes some meanwhile.
        with contextlib.suppress(FileNotFoundError):
            found.add(os.path.basename(os.readlink(entry)))
    return found


def test_phases_and_interfaces_of_1x(nim):
    nim.start(LLAMA, ready=False, STANDIN_LOAD_SECONDS="0.6")
    time.sleep(0.4)
    with pytest.raises(ConnectionRefusedError):
        nim.get("/v1/health/live")
    nim.wait(200)
    text = nim.text()
    phases = [
        "== NVIDIA Inference Microservice LLM NIM ==",
        "NVIDIA Inference Microservice LLM NIM Version 1.8.4",
        "Model: meta/llama-3.1-8b-instruct",
        "supports LoRA, but LoRA is disabled. Skipping profile.",
        "Detected 3 compatible profile(s).",
        "Valid profile: ",
        "Selected profile: ",
        "Profile metadata: ",
        "Preparing model workspace. This step might download additional files to run the model.",
        "Model workspace is now ready. It took ",
        "Initializing an LLM engine",
        "Loading model weights took ",
        "Graph capturing finished in",
        "Serving endpoints:",
        "Application startup complete",
        "Uvicorn running on",
    ]
    positions = [text.index(phase) for phase in phases]
    assert positions == sorted(positions)
    assert json.loads(nim.get("/v1/health/ready")[1]) == {"object": "health.response", "message": "Service is ready."}
    model = json.loads(nim.get("/v1/models")[1])["data"][0]
    assert (model["id"], model["root"], model["parent"], model["object"]) == (
        "meta/llama-3.1-8b-instruct",
        "meta/llama-3.1-8b-instruct",
        None,
        "model",
    )
    assert json.loads(nim.get("/v1/version")[1])["release"] == "1.8.4"
    metadata = json.loads(nim.get("/v1/metadata")[1])
    assert metadata["version"] == "1.8.4" and len(metadata["selectedModelProfileId"]) == 64
    assert "manifest_file" in json.loads(nim.get("/v1/manifest")[1])
    metrics = nim.get("/v1/metrics")[1]
    assert "\nnum_requests_running{" in metrics and "\ngpu_cache_usage_perc{" in metrics and "vllm:" not in metrics
    assert open_files(nim.process.pid) >= {"nvidia0", "nvidiactl"}
    assert nim.stop() == 0
    assert "received SIGTERM, attempting graceful shutdown..." in nim.text()


def test_2x_listens_at_once(nim):
    nim.start(NEMOTRON, "nim-serve", "--max-model-len", "2048", ready=False, NGC_API_KEY="", STANDIN_LOAD_SECONDS="0.6")
    nim.wait(200, "/v1/health/live")
    assert nim.get("/v1/health/ready")[0] == 503
    assert nim.get("/v1/models")[0] == 503
    nim.wait(200)
    assert json.loads(nim.get("/v1/health/ready")[1])["status"] == "ok"
    assert json.loads(nim.get("/v1/models")[1])["data"][0]["max_model_len"] == 2048
    assert "\nvllm:num_requests_running{" in nim.get("/v1/metrics")[1]
    assert "Matched profile " in nim.text()
    assert nim.stop() == 0


def test_2x_is_quiet_without_a_log_level(nim):
    nim.start(NEMOTRON, "nim-serve", NIM_LOG_LEVEL="")
    assert "INFO" not in nim.text()


def test_first_dialect_without_metadata(nim):
    nim.start(OLD)
    assert nim.get("/v1/metadata")[0] == 404
    assert nim.get("/metrics")[0] == 200


def test_completions(nim):
    nim.start(LLAMA, NIM_SERVED_MODEL_NAME="assistant", NIM_MAX_MODEL_LEN="64")
    chat = {"model": "assistant", "messages": [{"role": "user", "content": "hello there"}]}
    status, text = nim.post("/v1/chat/completions", **chat)
    answer = json.loads(text)
    assert status == 200 and answer["object"] == "chat.completion"
    assert "assistant" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == 2
    status, text = nim.post("/v1/completions", model="assistant", prompt="once", max_tokens=4)
    assert json.loads(text)["usage"]["completion_tokens"] == 4
    status, text = nim.post(
        "/v1/chat/completions", **chat, stream=True, max_tokens=3, stream_options={"include_usage": True}
    )
    events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks if c["choices"]) == "I am the"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    assert nim.post("/v1/chat/completions", **{**chat, "model": "other"})[0] == 404
    assert nim.post("/v1/completions", model="assistant", prompt="a", max_tokens=64)[0] == 400
    assert nim.request("POST", "/v1/completions", ["no object"])[0] == 400
    assert 'generation_tokens_total{model_name="assistant"}' in nim.get("/v1/metrics")[1]


@pytest.mark.parametrize("image", [LLAMA, "nim/mistralai/mistral-7b-instruct-v0.3:1.12.2"])
def test_clients_that_count_get_every_token(nim, image):
    nim.start(image)
    (name,) = [entry["id"] for entry in json.loads(nim.get("/v1/models")[1])["data"]]
    for streamed in (False, True):
        answer = load_module.ask("http://127.0.0.1:%d" % nim.port, name, streamed=streamed, tokens=50)
        assert (answer.outcome, answer.why) == ("done", "")
    # One that is killed in the middle is noticed.
    threading.Timer(0.3, nim.process.kill).start()
    answer = load_module.ask("http://127.0.0.1:%d" % nim.port, name, streamed=True, tokens=20000)
    assert answer.outcome == "truncated"


def test_model_without_chat_template(nim):
    nim.start(BASE)
    status, text = nim.post(
        "/v1/chat/completions", model="meta/llama-3.1-8b-base", messages=[{"role": "user", "content": "x"}]
    )
    assert status == 400 and "As of transformers v4.44, default chat template is no longer allowed" in text
    assert nim.get("/v1/health/ready")[0] == 200
    assert nim.post("/v1/completions", model="meta/llama-3.1-8b-base", prompt="x")[0] == 200


def test_fine_tuned_weights_are_built_once(nim, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "tokenizer_config.json").write_text("{}")
    options = {
        "NIM_FT_MODEL": str(weights),
        "NIM_CUSTOM_MODEL_NAME": "tuned",
        "NIM_SERVED_MODEL_NAME": "my-model",
        "STANDIN_BUILD_SECONDS": "0.3",
        "NGC_API_KEY": "",
    }
    nim.start(LLAMA, **options)
    assert "trtllm_buildable" in nim.text() and "Total time of building all engines" in nim.text()
    assert nim.post("/v1/completions", model="my-model", prompt="x")[0] == 200
    assert nim.post("/v1/chat/completions", model="my-model", messages=[{"role": "user", "content": "x"}])[0] == 400
    nim.stop()
    nim.start(LLAMA, **options)
    assert "Total time of building all engines" not in nim.text()


def test_lora_adapters_come_and_go(nim, tmp_path):
    adapters = tmp_path / "loras"
    (adapters / "math").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapters / "math" / name).touch()
    nim.start(LLAMA, NIM_PEFT_SOURCE=str(adapters), NIM_PEFT_REFRESH_INTERVAL="0.2")
    models = json.loads(nim.get("/v1/models")[1])["data"]
    assert [(m["id"], m["parent"]) for m in models][1] == ("math", "meta/llama-3.1-8b-instruct")
    assert "-lora)" in nim.text()
    (adapters / "math").rename(adapters / "law")
    until = time.time() + 5
    while time.time() < until and '"law"' not in nim.get("/v1/models")[1]:
        time.sleep(0.05)
    assert nim.post("/v1/completions", model="law", prompt="x")[0] == 200
    assert nim.post("/v1/completions", model="math", prompt="x")[0] == 404


def test_bad_key_ends_with_code_0(nim):
    code, text = nim.run(LLAMA, "nim-run", NGC_API_KEY="nvapi-bad")
    assert code == 0 and "ManifestDownloadError" in text and "Authentication Error" in text
    assert nim.run(LLAMA, "nim-run", NGC_API_KEY="")[0] == 0


def test_filled_cache_needs_no_key(nim):
    code, text = nim.run(LLAMA, "download-to-cache")
    assert code == 0 and "Model workspace is now ready" in text
    hub = nim.directory / "cache" / "ngc" / "hub" / "models--nim--meta--llama-3_1-8b-instruct"
    link = hub / "snapshots" / "hf-1" / "config.json"
    assert link.is_symlink() and link.resolve().parent == hub / "blobs"
    assert json.loads(link.read_text())["model_type"] == "llama"
    nim.start(LLAMA, NGC_API_KEY="", NIM_REPOSITORY_OVERRIDE="http://127.0.0.1:9")
    assert nim.get("/v1/models")[0] == 200


def test_interrupted_download_is_continued(nim, ngc):
    fault = ngc[1].fail(500, host="api.ngc.nvidia.com", where="files", path="00002-of")
    code, text = nim.run(LLAMA, "nim-run")
    assert code == 1 and "One or more errors fetching files:" in text
    ngc[1].mend(fault)
    assert nim.run(LLAMA, "download-to-cache")[0] == 0


def test_no_network(nim):
    code, text = nim.run(LLAMA, "nim-run", NIM_REPOSITORY_OVERRIDE="http://127.0.0.1:9")
    assert code == 1 and "error sending request for url (http://127.0.0.1:9/v2/org/nim/" in text


@pytest.mark.parametrize(
    ("environment", "code", "text"),
    [
        ({"NIM_LOG_LEVEL": "LOUD"}, 1, "Unsupported value ('LOUD') of NIM_LOG_LEVEL"),
        (
            {"NIM_MODEL_PROFILE": "nope"},
            1,
            "NIM_MODEL_PROFILE is set to nope but no matching profile_id or profile description is",
        ),
        ({"NIM_TAGS_SELECTOR": "precision=int3"}, 1, "Could not match a profile in manifest"),
        ({"NIM_PASSTHROUGH_ARGS": "--nonsense 3"}, 2, "unrecognized arguments: --nonsense 3"),
        ({"NIM_MAX_MODEL_LEN": "999999"}, 1, "max seq len (999999) is larger than the maximum number of tokens"),
        ({"STANDIN_DEVICE_DIRECTORY": "/nonexistent"}, 1, "Detected 0 compatible profile(s)."),
        ({"STANDIN_GPU_USED_MIB": "46000"}, 1, "that are currently not runnable due to low free GPU memory."),
        ({"STANDIN_FAIL": "eng-28a"}, 137, "Killed"),
        ({"STANDIN_FAIL": "eng-21a"}, 1, "torch.OutOfMemoryError: CUDA out of memory."),
        ({"STANDIN_FAIL": "eng-21a", "STANDIN_FAIL_END": "7", "STANDIN_FAIL_TEXT": "a\\nb c"}, 7, "launch.py:101] b c"),
        # Enough for the profile, not for the share that the engine wants.
        (
            {"STANDIN_GPU_USED_MIB": "9000"},
            1,
            "Free memory on device (36.20/44.99 GiB) on startup is less than desired",
        ),
        ({"STANDIN_OPEN_FILES": "99999999"}, 1, "OSError: [Errno 24] Too many open files: '/dev/null'"),
    ],
)
def test_doomed_starts(nim, environment, code, text):
    got, output = nim.run(LLAMA, "nim-run", **environment)
    assert (got, text in output) == (code, True), output


@pytest.mark.parametrize("wanted", ["vllm-bf16-tp1-pp1", images.profile("vllm-bf16-tp1-pp1", 0)["id"]])
def test_profile_by_id_or_description(nim, wanted):
    nim.start(LLAMA, NIM_MODEL_PROFILE=wanted)
    assert (
        json.loads(nim.get("/v1/metadata")[1])["selectedModelProfileId"] == images.profile("vllm-bf16-tp1-pp1", 0)["id"]
    )


def test_dead_engine_leaves_the_container_up(nim):
    nim.start(LLAMA, STANDIN_FAIL="eng-26", STANDIN_FAIL_AFTER="0.3")
    nim.wait(503)
    assert "EngineDeadError" in nim.text()
    assert nim.process.poll() is None


def test_end_after_ready(nim):
    nim.start(LLAMA, STANDIN_FAIL="eng-21a", STANDIN_FAIL_PHASE="serving", STANDIN_FAIL_AFTER="0.3")
    assert nim.process.wait(10) == 1
    assert nim.text().rstrip().endswith("of which 1.21 GiB is free.")


def test_failure_at_an_order(nim, tmp_path):
    order = tmp_path / "order"
    when = {"STANDIN_FAIL_WHEN": str(order), "STANDIN_FAIL_END": "continue"}
    nim.start(LLAMA, ready=False, STANDIN_FAIL="eng-26", STANDIN_FAIL_PHASE="engine", **when)
    until = time.time() + 10
    while "Initializing" not in nim.text() and time.time() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    assert "EngineDeadError" not in nim.text()
    order.touch()
    nim.wait(200)
    assert "EngineDeadError" in nim.text()


def test_failure_as_an_exception_in_json(nim):
    code, text = nim.run(
        LLAMA,
        "nim-run",
        STANDIN_FAIL="eng-21a",
        STANDIN_FAIL_TRACEBACK="1",
        NIM_JSONL_LOGGING="1",
        NIM_LOG_LEVEL="ERROR",
    )
    record = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
    assert (code, record["level"], record["message"]) == (1, "None", "")
    assert "torch.OutOfMemoryError" in record["exc_info"]


def test_requests_that_fail_although_it_is_healthy(nim):
    nim.start(LLAMA, STANDIN_REQUESTS_FAIL="1")
    messages = [{"role": "user", "content": "Hi"}]
    assert nim.post("/v1/chat/completions", model="meta/llama-3.1-8b-instruct", messages=messages)[0] == 500
    assert nim.get("/v1/health/ready")[0] == 200


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        ({"type": "extended", "factor": 8.0}, "ValueError: Unknown RoPE scaling type extended"),
        ([8.0], "ValueError: `rope_scaling` must be a dictionary with two fields, `type` and `factor`"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, ""),
    ],
)
def test_rope_scaling_of_the_weights(nim, tmp_path, scaling, text):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text(json.dumps({"rope_scaling": scaling}))
    nim.start(LLAMA, ready=not text, NIM_FT_MODEL=str(weights), STANDIN_BUILD_SECONDS="0")
    if text:
        assert nim.process.wait(10) == 1
        assert text in nim.text()


def test_failing_only_at_first(nim):
    options = {"STANDIN_FAIL": "eng-33a", "STANDIN_FAIL_TIMES": "1"}
    assert nim.run(LLAMA, "nim-run", **options)[0] == 1
    nim.start(LLAMA, **options)


def test_sigterm_before_ready(nim):
    nim.start(LLAMA, ready=False, STANDIN_FAIL="nim-17")
    while "Detected" not in nim.text() and "Model:" not in nim.text():
        time.sleep(0.02)
    time.sleep(0.2)
    assert nim.stop() == 0
    assert "Captured NIM_LLM_PID: 0" in nim.text() and "has no NIM_LLM process to terminate" in nim.text()


def test_port_in_use(nim):
    with contextlib.closing(socket.socket()) as holder:
        holder.bind(("0.0.0.0", nim.port))
        holder.listen()
        code, text = nim.run(LLAMA, "nim-run")
    assert code == 1 and "address already in use" in text


def test_json_log(nim):
    nim.start(LLAMA, NIM_JSONL_LOGGING="1")
    lines = [json.loads(line) for line in nim.text().splitlines() if line.startswith("{")]
    assert set(lines[0]) == {"level", "time", "file_path", "line_number", "message", "exc_info", "stack_info"}
    nim.stop()
    nim.start(NEMOTRON, "nim-serve", NIM_JSONL_LOGGING="1")
    lines = [json.loads(line) for line in nim.text().splitlines() if line.startswith("{")]
    assert set(lines[0]) == {"level", "time", "file_name", "line_number", "message"}


def test_listing_in_both_layouts(nim):
    first = nim.run(LLAMA, "list-model-profiles")[1]
    assert first.startswith(
        "SYSTEM INFO\n- Free GPUs:\n  -  [26b9:10de] (0) NVIDIA L40S [current utilization: 0%]\nMODEL PROFILES\n"
    )
    assert "(tensorrt_llm-h100-fp8-tp1-pp1-throughput)" in first.split("- Incompatible with system:")[1]
    assert "just-in-time compilation" in first and "requires >=" not in first
    second = nim.run(NEMOTRON, "list-model-profiles")[1]
    assert "(vllm-fp8-tp1-pp1-9.0) [requires >=9 GB/gpu]\n" in second
    assert "TRTLLM engines: <None>" in second
    busy = nim.run(NEMOTRON, "list-model-profiles", STANDIN_GPU_USED_MIB="40000")[1]
    assert "- Free GPUs: <None>\n- Non-free GPUs:" in busy and "- Compatible with system but low memory:" in busy
    found = json.loads(nim.run(LLAMA, "list-model-profiles", "--output-format", "json")[1])
    assert all(len(entry["profile_id"]) == 64 for entry in found["compatible"])


def test_embedding_and_native(nim):
    nim.start(EMBEDDING)
    status, text = nim.post("/v1/embeddings", model="nvidia/nv-embedqa-e5-v5", input=["a", "b"])
    assert status == 200 and len(json.loads(text)["data"]) == 2
    nim.stop()
    model = nim.directory / "model"
    model.mkdir()
    options = {"NIM_ENGINE_MODEL_PATH": str(model), "NGC_API_KEY": ""}
    assert nim.run(NATIVE, "nim-native", NIM_ENGINE_MODEL_DOWNLOAD_ONLY="1", **options)[0] == 0
    assert "NIM_SERVER_BIND_ADDR" in nim.run(NATIVE, "nim-native", SHOW_CONFIG="1")[1]
    nim.start(NATIVE, "nim-native", NIM_SERVER_BIND_ADDR="0.0.0.0:%d" % nim.port, **options)


def test_every_failure_is_well_formed():
    for name, (phase, end, text) in failures.FAILURES.items():
        assert phase in ("start", "profile", "download", "engine", "serving", "request"), name
        assert isinstance(end, int) or end in ("continue", "unhealthy", "hang"), name
        assert isinstance(text, str), name


def test_images_say_what_nim_images_say():
    layer = build.Layer("", "sha256:" + "1" * 64, "sha256:" + "2" * 64, 10)
    configs, manifests = build.documents_of(CATALOGUE[LLAMA], [layer])
    config = json.loads(configs[0])
    env = dict(pair.split("=", 1) for pair in config["config"]["Env"])
    assert env["NVIDIA_REQUIRE_CUDA"].startswith("cuda>=12.8 brand=unknown,driver>=470,driver<471 ")
    assert env["INFERENCE_MICROSERVICE_LLM_NIM_VERSION"] == "1.8.4"
    assert config["config"]["Labels"]["com.nvidia.nim.version"] == "1.8.4"
    assert config["config"]["Entrypoint"] == ["/opt/nvidia/nvidia_entrypoint.sh"]
    assert len(manifests) == 1 and manifests[0].media_type == build.DOCKER_MANIFEST
    assert build.documents_of(CATALOGUE[LLAMA], [layer])[1][0].digest == manifests[0].digest
    index = json.loads(build.documents_of(CATALOGUE[NEMOTRON], [layer])[1][-1].data)
    assert [entry["platform"]["architecture"] for entry in index["manifests"]] == ["amd64", "arm64"]
    assert manifests[0].digest != build.documents_of(CATALOGUE[LLAMA.replace("1.8.4", "1.8.5")], [layer])[1][0].digest
    native = json.loads(build.documents_of(CATALOGUE[NATIVE], [layer])[0][0])
    assert native["config"]["Labels"]["com.nvidia.nim.model_download_protocol"] == "native-v1"


def test_layers_depend_on_their_content_alone(tmp_path):
    def write(name, order):
        tree = build.Tree()
        for path in order:
            tree.add(path, path.encode())
        return tree.write(tmp_path / name)

    first, second = write("a", ["etc/x", "etc/y"]), write("b", ["etc/y", "etc/x"])
    assert first.digest == second.digest
    with gzip.open(tmp_path / "a") as plain:
        assert "sha256:" + build.hashlib.sha256(plain.read()).hexdigest() == first.diff_id
