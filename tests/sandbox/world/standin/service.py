# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One served model: what was asked for, the phases of its start, its stop."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import threading
import time

import trouble
from cache import Cache
from environment import FatalError, env_flag, env_number
from failures import FAILURES
from gpus import Gpus
from log import LOG_LEVELS, Log
from metrics import Metrics
from profiles import Profiles, listing
from server import Server

# The vLLM arguments the stand-in knows; the engine refuses any other, as argparse does there.
ENGINE_ARGUMENTS = (
    "async-scheduling block-size chat-template compilation-config cpu-offload-gb data-parallel-size"
    " disable-custom-all-reduce disable-log-requests disable-log-stats distributed-executor-backend dtype"
    " enable-auto-tool-choice enable-chunked-prefill enable-expert-parallel enable-lora enable-prefix-caching"
    " no-enable-prefix-caching enforce-eager generation-config gpu-memory-utilization hf-overrides host kv-cache-dtype"
    " limit-mm-per-prompt load-format max-loras max-lora-rank max-model-len max-num-batched-tokens max-num-seqs"
    " max-seq-len-to-capture model pipeline-parallel-size port quantization reasoning-parser revision seed"
    " served-model-name speculative-config swap-space task tensor-parallel-size tokenizer tokenizer-mode"
    " tool-call-parser trust-remote-code"
)


class Service:
    """One served model: start-up phases, state, stop."""

    def __init__(self, image: dict, arguments: list[str]) -> None:
        self.image = image
        self.dialect = image["dialect"]
        self.log = Log(self.dialect)
        self.stop = threading.Event()
        self.arguments = arguments
        self.metrics = Metrics()
        self.ready = False
        self.unhealthy = False
        self.engine_started = False
        self.health_logged = False
        self.adapters = []  # type: list[str]
        self.servers = []  # type: list[ThreadingHTTPServer]
        self.profile = {}  # type: dict
        self.failure = os.environ.get("STANDIN_FAIL", "")
        self.started = time.time()
        self.created = int(self.started)

    # ---- what was asked for

    def configure(self) -> None:
        level = os.environ.get("NIM_LOG_LEVEL", "").strip()
        if level and level.upper() not in LOG_LEVELS:
            raise FatalError(
                1, "Unsupported value ('%s') of NIM_LOG_LEVEL. Supported values: %s" % (level, ", ".join(LOG_LEVELS))
            )
        if self.failure and self.failure not in FAILURES:
            raise FatalError(
                64, "STANDIN_FAIL=%s: no such failure; known: %s" % (self.failure, ", ".join(sorted(FAILURES)))
            )
        engine = self.arguments + shlex.split(os.environ.get("NIM_PASSTHROUGH_ARGS", ""))
        self.engine_options = {}  # type: dict[str, str]
        position = 0
        while position < len(engine):
            name, dummy, value = engine[position].partition("=")
            if not name.startswith("--") or name[2:].replace("_", "-") not in ENGINE_ARGUMENTS.split():
                raise FatalError(2, "nim-serve: error: unrecognized arguments: %s" % " ".join(engine[position:]))
            if not value and position + 1 < len(engine) and not engine[position + 1].startswith("--"):
                position += 1
                value = engine[position]
            # Arguments of the command come first in the list and win over NIM_PASSTHROUGH_ARGS.
            self.engine_options.setdefault(name[2:].replace("_", "-"), value)
            position += 1
        self.max_model_len = int(self.image["max_model_len"])
        wanted = self.engine_options.get("max-model-len") or os.environ.get("NIM_MAX_MODEL_LEN", "")
        if wanted:
            try:
                length = int(wanted)
            except ValueError as exc:
                raise FatalError(
                    1, "ValueError: invalid literal for int() with base 10: '%s' (max_model_len)" % wanted
                ) from exc
            if length > self.max_model_len:
                raise FatalError(
                    1,
                    "ValueError: The model's max seq len (%d) is larger than the maximum number of tokens that can be stored"
                    " in KV cache (%d)." % (length, self.max_model_len),
                )
            self.max_model_len = length
        self.weights = os.environ.get("NIM_FT_MODEL", "")
        if self.dialect == "2" and os.environ.get("NIM_MODEL_PATH", "").startswith("/"):
            self.weights = os.environ["NIM_MODEL_PATH"]
        self.custom = os.environ.get("NIM_CUSTOM_MODEL_NAME", "")
        served = self.engine_options.get("served-model-name") or os.environ.get("NIM_SERVED_MODEL_NAME", "")
        default = self.custom or (os.path.basename(self.weights.rstrip("/")) if self.weights else self.image["model"])
        self.names = [name.strip() for name in served.split(",") if name.strip()] or [default]
        self.peft = os.environ.get("NIM_PEFT_SOURCE", "")
        self.chat_template = bool(self.image["chat_template"])
        if self.weights:
            self.chat_template = self._has_template(self.weights)
        if "chat-template" in self.engine_options:
            self.chat_template = True
        if self.failure == "eng-32" or env_flag("STANDIN_NO_CHAT_TEMPLATE"):
            self.chat_template = False
        port = os.environ.get("NIM_SERVER_PORT") or os.environ.get("NIM_HTTP_API_PORT") or "8000"
        address = "0.0.0.0"
        bind = os.environ.get("NIM_SERVER_BIND_ADDR") or os.environ.get("NIM_BIND_ADDR") or ""
        if self.dialect == "native" and bind:
            address, dummy, port = bind.rpartition(":")
        self.address, self.port = address, int(port)

    @staticmethod
    def _has_template(directory: str) -> bool:
        if os.path.exists(os.path.join(directory, "chat_template.jinja")):
            return True
        try:
            with open(os.path.join(directory, "tokenizer_config.json")) as handle:
                return bool(json.load(handle).get("chat_template"))
        except (OSError, ValueError):
            return False

    # ---- failures on request

    def fail(self, phase: str) -> None:
        """End here, or only say so, when STANDIN_FAIL names a failure of this phase."""
        if not self.failure:
            return
        at, end, text = FAILURES[self.failure]
        if (os.environ.get("STANDIN_FAIL_PHASE") or at) != phase or not self._still_failing():
            return
        self._await_order("STANDIN_FAIL_WHEN")
        text = os.environ.get("STANDIN_FAIL_TEXT", "").replace("\\n", "\n") or text
        wanted = os.environ.get("STANDIN_FAIL_END", "")
        end = (int(wanted) if wanted.isdigit() else wanted) if wanted else end
        level = "WARNING" if end == "continue" else "ERROR"
        if env_flag("STANDIN_FAIL_TRACEBACK"):
            self.log.traceback(text)
            text = ""
        for line in text.splitlines():
            if (
                text.startswith(("WARNING: The NVIDIA", "ERROR: The NVIDIA"))
                or line.startswith("[")
                or line == "Killed"
            ):
                self.log.raw(line)
            else:
                self.log.write(level, line)
        if end == "hang":
            while not self.stop.wait(3600):
                pass
        if end == "unhealthy":
            self.unhealthy = True
        elif isinstance(end, int):
            raise FatalError(int(env_number("STANDIN_EXIT_CODE", end)))

    def _await_order(self, name: str) -> None:
        """The file that a variable names is waited for."""
        path = os.environ.get(name, "")
        while path and not os.path.exists(path) and not self.stop.wait(0.1):
            pass

    def _still_failing(self) -> bool:
        """STANDIN_FAIL_TIMES=n: only the first n starts fail.  Counted in the cache directory."""
        times = os.environ.get("STANDIN_FAIL_TIMES", "")
        if not times:
            return True
        path = os.path.join(os.environ.get("NIM_CACHE_PATH") or "/opt/nim/.cache", ".standin-failures")
        try:
            with open(path) as handle:
                count = int(handle.read())
        except (OSError, ValueError):
            count = 0
        if count >= int(times):
            return False
        with open(path, "w") as handle:
            handle.write(str(count + 1))
        return True

    def pause(self, name: str, default: float) -> None:
        self.stop.wait(env_number(name, default))

    # ---- phases

    def banner(self) -> None:
        title = {"embedding": "NVIDIA Retriever Text Embedding NIM", "native": "NVIDIA Retriever NIM"}.get(
            self.dialect, "NVIDIA Inference Microservice LLM NIM"
        )
        rule = "=" * (len(title) + 6)
        for line in ["", rule, "== %s ==" % title, rule, "", "%s Version %s" % (title, self.image["version"])]:
            self.log.raw(line)
        self.log.raw("Model: %s" % self.image["model"])
        self.log.raw("This is the sandbox's stand-in: no model is run.")
        self.log.raw("")

    def choose(self) -> None:
        self.gpus = Gpus()
        if not self.gpus.gpus:
            refused = self.gpus.refused
            if refused is not None and refused.errno in (errno.EPERM, errno.EACCES):
                raise FatalError(1, "Failed to initialize NVML: Unknown Error")
        profiles = Profiles(self.image["profiles"], self.gpus.gpus, bool(self.peft))
        self.fail("profile")
        if not self.image["profiles"]:
            return
        if not self.peft:
            for profile in self.image["profiles"]:
                if profile["tags"].get("feat_lora") == "true":
                    self.log.note(
                        "Profile %s supports LoRA, but LoRA is disabled. Skipping profile." % profile["id"],
                        "ngc_profile.py",
                        217,
                    )
        runnable = profiles.group("runnable")
        compatible = [
            entry
            for entry in runnable + profiles.group("buildable")
            if self.peft or entry["tags"].get("feat_lora") != "true"
        ]
        low = profiles.group("low")
        if self.dialect != "2" or not compatible:
            self.log.note("Detected %d compatible profile(s)." % len(compatible), "ngc_profile.py", 231)
        if low:
            self.log.note(
                "Detected additional %d compatible profile(s) that are currently not runnable due to low free GPU memory."
                % len(low),
                "ngc_profile.py",
                233,
            )
        try:
            self.profile = profiles.select(
                os.environ.get("NIM_MODEL_PROFILE", "").strip() or os.environ.get("NIM_MANIFEST_PROFILE", "").strip(),
                os.environ.get("NIM_TAGS_SELECTOR", "").strip(),
                bool(self.weights),
            )
        except FatalError as exc:
            self.log.problem(exc.text, "ngc_injector.py", 172)
            for line in listing(self.image, profiles).splitlines():
                self.log.raw(line)
            raise FatalError(exc.code) from exc
        chosen = "%s (%s)" % (self.profile["id"], self.profile["description"])
        if self.dialect == "2":
            self.log.note("Matched profile %s" % chosen, "profile.py", 88)
        else:
            count = int(self.profile["tags"].get("tp", 1))
            self.log.note("Valid profile: %s on GPUs %s" % (chosen, list(range(count))), "ngc_injector.py", 152)
            self.log.note("Selected profile: %s" % chosen, "ngc_injector.py", 207)
            for tag, value in sorted(self.profile["tags"].items()):
                self.log.note("Profile metadata: %s: %s" % (tag, value), "ngc_injector.py", 214)

    def workspace(self) -> None:
        begun = time.time()
        self.log.note(
            "Preparing model workspace. This step might download additional files to run the model.",
            "ngc_injector.py",
            234,
        )
        self.fail("download")
        if self.weights:
            if not os.path.isdir(self.weights):
                raise FatalError(1, "FileNotFoundError: [Errno 2] No such file or directory: '%s'" % self.weights)
            missing = [name for name in ("config.json",) if not os.path.exists(os.path.join(self.weights, name))]
            if missing:
                raise FatalError(1, "OSError: %s does not appear to have a file named %s." % (self.weights, missing[0]))
            tokenizer = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
            if not any(os.path.exists(os.path.join(self.weights, name)) for name in tokenizer):
                self.log.warn("no tokenizer in %s" % self.weights)
        else:
            Cache(self.image, self.log, self.stop).fill()
        self.log.note(
            "Model workspace is now ready. It took %.3f seconds" % (time.time() - begun), "ngc_injector.py", 241
        )

    def engine(self) -> None:
        self.engine_started = True
        name = self.weights or self.image["model"]
        if self.dialect == "2":
            # NIM 2.x logs its whole runtime command line: that is why no secret may stand in it.
            self.log.note(
                "runtime arguments: %s" % json.dumps(["vllm", "serve", name, *self.arguments]), "serve.py", 60
            )
            self.log.note("Initializing an LLM engine (v0.27.1) with config: model='%s'" % name, "core.py", 58)
        else:
            self.log.note(
                "Initializing an LLM engine (v%s) with config: model='%s'" % (self.image["version"], name),
                "llm_engine.py",
                176,
            )
        self.fail("engine")
        trouble.meet(self.gpus.gpus, self.weights, self.stop)
        if self.profile.get("tags", {}).get("trtllm_buildable") == "true":
            self.build()
        self.pause("STANDIN_LOAD_SECONDS", 1.0)
        if self.dialect == "2":
            self.log.note("Loading weights took 1.00 seconds", "default_loader.py", 262)
            self.log.note("Model loading took 14.9888 GiB and 1.20 seconds", "gpu_model_runner.py", 1892)
        else:
            self.log.note("Loading model weights took 14.9888 GB", "model_runner.py", 1008)
        self.pause("STANDIN_GRAPH_SECONDS", 0.5)
        self.log.note("Graph capturing finished in 1 secs, took 0.55 GiB", "model_runner.py", 1335)
        if self.peft:
            self.rescan(first=True)

    def build(self) -> None:
        """The local TensorRT-LLM engine, kept in the cache under the custom name."""
        cache = os.environ.get("NIM_CACHE_PATH") or "/opt/nim/.cache"
        directory = os.path.join(cache, "local_cache", self.custom or "engine-" + self.profile["id"][:12])
        path = os.path.join(directory, "rank0.engine")
        if os.path.exists(path):
            self.log.note("Using the engine in %s" % directory, "trtllm_build.py", 77)
            return
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as exc:
            raise FatalError(
                1, "PermissionError: [Errno %d] %s: '%s'" % (exc.errno or 13, os.strerror(exc.errno or 13), directory)
            ) from exc
        seconds = env_number("STANDIN_BUILD_SECONDS", 5.0)
        begun = time.time()
        self.log.note("[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", "trtllm_build.py", 80)
        while time.time() - begun < seconds and not self.stop.is_set():
            self.stop.wait(min(2.0, max(0.05, seconds - (time.time() - begun))))
            self.log.note(
                "[TRT-LLM] [I] Building engine: layer %d/32"
                % min(32, int(32 * (time.time() - begun) / max(seconds, 0.01))),
                "trtllm_build.py",
                96,
            )
        if self.stop.is_set():
            return
        spent = int(time.time() - begun)
        self.log.note(
            "[TRT] [I] Engine generation completed in %.4f seconds." % (time.time() - begun), "trtllm_build.py", 101
        )
        clock = "%02d:%02d:%02d" % (spent // 3600, spent // 60 % 60, spent % 60)
        self.log.note("[TRT-LLM] [I] Total time of building all engines: %s" % clock, "trtllm_build.py", 104)
        with open(path + ".part", "wb") as handle:
            handle.write(os.urandom(1 << 20))
        os.replace(path + ".part", path)

    def rescan(self, first: bool = False) -> None:
        if not os.path.isdir(self.peft):
            if first:
                raise FatalError(1, "NIM_PEFT_SOURCE %s is not a directory" % self.peft)
            return
        found = []
        for name in sorted(os.listdir(self.peft)):
            directory = os.path.join(self.peft, name)
            weights = ("adapter_model.safetensors", "adapter_model.bin")
            if os.path.isfile(os.path.join(directory, "adapter_config.json")) and any(
                os.path.isfile(os.path.join(directory, file)) for file in weights
            ):
                found.append(name)
        for name in found:
            if name not in self.adapters:
                self.log.note("LoRA adapter %s loaded from %s" % (name, self.peft), "lora.py", 51)
        self.adapters = found

    def listen(self) -> None:
        ports = [self.port]
        if self.dialect == "2":
            backend = int(os.environ.get("NIM_BACKEND_PORT") or 8001)
            if backend != self.port:
                ports.append(backend)
        for port in ports:
            try:
                server = Server((self.address or "0.0.0.0", port), self)
            except OSError as exc:
                raise FatalError(
                    1,
                    "ERROR: [Errno 98] error while attempting to bind on address ('%s', %d): address already in use"
                    % (self.address, port),
                ) from exc
            self.servers.append(server)
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()

    def serving(self) -> None:
        self.log.note("Serving endpoints:", "api_server.py", 459)
        for path in ("/v1/health/live", "/v1/health/ready", "/v1/models", "/v1/chat/completions", "/v1/completions"):
            self.log.note("  0.0.0.0:%d%s" % (self.port, path), "api_server.py", 460)
        self.log.note("Started server process [%d]" % os.getpid(), "server.py", 82)
        self.log.note("Waiting for application startup.", "on.py", 48)
        self.log.note("Application startup complete.", "on.py", 62)
        self.log.note("Uvicorn running on http://0.0.0.0:%d (Press CTRL+C to quit)" % self.port, "server.py", 214)

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self.terminate)
        signal.signal(signal.SIGINT, self.terminate)
        try:
            self.banner()
            self._await_order("STANDIN_START_WHEN")
            self.configure()
            self.fail("start")
            if self.dialect == "2":
                self.listen()
            self.choose()
            if not self.gpus.gpus:
                self.log.warn("no GPU device was given to this container")
            self.workspace()
            if not self.stop.is_set():
                self.engine()
            if not self.stop.is_set():
                if self.dialect != "2":
                    self.listen()
                self.ready = True
                self.serving()
            self.serve_until_stopped()
        except FatalError as exc:
            if self.stop.is_set():
                return self.stopped()
            for line in exc.text.splitlines():
                self.log.problem(line)
            return exc.code
        return self.stopped()

    def serve_until_stopped(self) -> None:
        ready_at = time.time()
        refresh = env_number("NIM_PEFT_REFRESH_INTERVAL", 0) if self.peft else 0
        crash = env_number("STANDIN_CRASH_AFTER", 0)
        fail_after = env_number("STANDIN_FAIL_AFTER", 2)
        scanned = ready_at
        failed = False
        while not self.stop.wait(0.2):
            now = time.time()
            if crash and now - ready_at >= crash:
                raise FatalError(
                    int(env_number("STANDIN_EXIT_CODE", 1)), "RuntimeError: Engine core initialization failed."
                )
            if self.failure and not failed and now - ready_at >= fail_after:
                failed = True
                self.fail("serving")
            if refresh and now - scanned >= refresh:
                scanned = now
                self.rescan()

    # ---- stop

    def terminate(self, number: int, frame: object) -> None:
        if env_flag("STANDIN_IGNORE_SIGTERM"):
            return
        self.stop.set()

    def stopped(self) -> int:
        seconds = env_number("STANDIN_STOP_SECONDS", 0.2)
        if self.dialect == "2":
            self.ready = False
            self.log.note("Shutting down", "server.py", 264)
            time.sleep(seconds)
            self.log.note("Application shutdown complete.", "on.py", 76)
            return 0
        self.log.raw("received SIGTERM, attempting graceful shutdown...")
        self.log.raw("Captured NIM_LLM_PID: %d" % (os.getpid() if self.engine_started else 0))
        if not self.engine_started:
            self.log.raw("start_server.sh has no NIM_LLM process to terminate")
            return 0
        time.sleep(min(seconds, 5.0))
        if seconds > 5:
            self.log.raw("graceful shutdown failed, forcefully killing process...")
        return 0
