# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A container that keeps NIM's contract without running a model: log texts, HTTP, utilities, signals, exit codes.

It is the program behind every command of the stand-in images (``nim-run``, ``nim-serve``, ``list-model-profiles``,
``download-to-cache``, …); the name it is called by decides.  What the image is comes from
``/opt/nim/etc/default/standin.json``.  ``README.md`` beside it lists the STANDIN_* variables.
"""

from __future__ import annotations

import argparse
import errno
import glob
import hashlib
import json
import mmap
import os
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
from failures import FAILURES

CONFIG_PATH = os.environ.get("STANDIN_CONFIG", "/opt/nim/etc/default/standin.json")
LOG_LEVELS = ("DEFAULT", "TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
RANKS = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
PCI_IDS = {
    "H200": "2335",
    "H100 80GB HBM3": "2330",
    "L40S": "26b9",
    "L40": "26b5",
    "L4": "27b8",
    "A10": "2236",
    "4090": "2684",
}
CHAT_TEMPLATE_TEXT = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the"
    " tokenizer does not define one."
)
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


class FatalError(Exception):
    """The container ends now with this code; the text, if any, is the last thing in the log."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def env_number(name: str, default: float) -> float:
    try:
        return float(os.environ.get(name, "") or default)
    except ValueError:
        return default


def env_flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


# ---------------------------------------------------------------------------------------------------------- log


class Log:
    """One writer of log lines, plain or JSON, in the dialect of the image."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.json = env_flag("NIM_JSONL_LOGGING") or env_flag("NIM_LOGGING_JSONL")
        level = os.environ.get("NIM_LOG_LEVEL", "").strip().upper()
        quiet = "WARNING" if dialect == "2" else "INFO"
        self.threshold = RANKS.get(level, RANKS[quiet])
        self._lock = threading.Lock()

    def raw(self, text: str) -> None:
        with self._lock:
            try:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
            except (BrokenPipeError, ValueError):
                pass

    def write(self, level: str, text: str, source: str = "launch.py", line: int = 101) -> None:
        if RANKS[level] < self.threshold:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)) + ".%03d" % (now % 1 * 1000)
        if self.json:
            if self.dialect == "2":
                record = {"level": level, "time": stamp, "file_name": source, "line_number": str(line), "message": text}
            else:
                record = {
                    "level": level,
                    "time": stamp,
                    "file_path": "/opt/nim/llm/" + source,
                    "line_number": str(line),
                    "message": text,
                    "exc_info": "None",
                    "stack_info": "None",
                }
            self.raw(json.dumps(record))
        else:
            self.raw("%s %s %s:%d] %s" % (level, stamp, source, line, text))

    def traceback(self, text: str) -> None:
        """An exception as 1.x logs it: no message, no level, everything in exc_info."""
        if self.json:
            record = {
                "level": "None",
                "time": "None",
                "message": "",
                "exc_info": "Traceback (most recent call last):\n" + text,
            }
            self.raw(json.dumps(record))
        else:
            self.raw("Traceback (most recent call last):\n" + text)

    def note(self, text: str, source: str = "launch.py", line: int = 101) -> None:
        self.write("INFO", text, source, line)

    def warn(self, text: str, source: str = "launch.py", line: int = 101) -> None:
        self.write("WARNING", text, source, line)

    def problem(self, text: str, source: str = "launch.py", line: int = 101) -> None:
        self.write("ERROR", text, source, line)


# ---------------------------------------------------------------------------------------------------------- GPUs


class Gpu:
    def __init__(self, index: int, name: str, total: int, used: int) -> None:
        self.index, self.name, self.total, self.used = index, name, total, used

    @property
    def pci_id(self) -> str:
        return next((device for name, device in PCI_IDS.items() if self.name.endswith(name)), "26b9")

    @property
    def free_gb(self) -> float:
        return (self.total - self.used) / 1024

    @property
    def total_gb(self) -> float:
        return self.total / 1024


class Gpus:
    """The devices this container was given.  They stay open until the process ends: that is what "in use" means."""

    def __init__(self) -> None:
        self.directory = os.environ.get("STANDIN_DEVICE_DIRECTORY", "/dev")
        self.handles = []  # type: list[int]
        self.refused = None  # type: OSError | None
        nodes = sorted(glob.glob(os.path.join(self.directory, "nvidia[0-9]*")), key=lambda path: (len(path), path))
        for name in ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"]:
            path = os.path.join(self.directory, name)
            if os.path.exists(path):
                nodes.append(path)
        numbered = [node for node in nodes if os.path.basename(node)[6:].isdigit()]
        # Asked before the devices are opened: our own use is no use by others.
        described = self._describe(len(numbered))
        refused = set()
        for node in nodes:
            try:
                self.handles.append(os.open(node, os.O_RDWR | os.O_CLOEXEC))
            except OSError as exc:
                self.refused = exc
                refused.add(node)
        self.gpus = [gpu for node, gpu in zip(numbered, described) if node not in refused]

    def _describe(self, count: int) -> list[Gpu]:
        name = os.environ.get("STANDIN_GPU_NAME", "")
        memory = int(env_number("STANDIN_GPU_TOTAL_MIB", 46068))
        described = []  # type: list[Gpu]
        program = shutil.which("nvidia-smi")
        if count and program and not name:
            try:
                answer = subprocess.run(
                    [program, "--query-gpu=index,name,memory.total,memory.used", "--format=csv,noheader,nounits"],
                    capture_output=True,
                    text=True,
                    timeout=10,
                    check=True,
                ).stdout
                for line in answer.splitlines():
                    parts = [part.strip() for part in line.split(",")]
                    total = int(parts[2]) if parts[2].isdigit() else memory
                    used = int(parts[3]) if parts[3].isdigit() else 0
                    described.append(Gpu(len(described), parts[1], total, used))
            except (OSError, ValueError, IndexError, subprocess.SubprocessError):
                described = []
        # Which of the machine's GPUs are ours is known from the device nodes alone.
        if len(described) > count:
            described = described[:count]
        while len(described) < count:
            described.append(
                Gpu(len(described), name or "NVIDIA L40S", memory, int(env_number("STANDIN_GPU_USED_MIB", 0)))
            )
        return described


# ---------------------------------------------------------------------------------------------------------- profiles


class Profiles:
    def __init__(self, profiles: list, gpus: list[Gpu], lora: bool) -> None:
        self.all = profiles
        self.gpus = gpus
        self.lora = lora

    def verdict(self, profile: dict) -> str:
        """runnable | low | incompatible | buildable, for these GPUs."""
        tags = profile["tags"]
        tp = int(tags.get("tp", 1)) * int(tags.get("pp", 1))
        wanted_gpu = tags.get("gpu", "")
        if len(self.gpus) < tp:
            return "incompatible"
        fitting = [gpu for gpu in self.gpus if not wanted_gpu or wanted_gpu.upper() in gpu.name.upper()]
        fitting = [gpu for gpu in fitting if gpu.total_gb * 1.05 >= profile["memory_gb"]]
        if len(fitting) < tp:
            return "incompatible"
        if len([gpu for gpu in fitting if gpu.free_gb * 1.05 >= profile["memory_gb"]]) < tp:
            return "low"
        return "buildable" if tags.get("trtllm_buildable") == "true" else "runnable"

    def group(self, verdict: str) -> list:
        return [profile for profile in self.all if self.verdict(profile) == verdict]

    def select(self, wanted: str, selector: str, fine_tuned: bool) -> dict:
        """The profile to run.  FatalError as NIM is."""
        if wanted and wanted != "default":
            for profile in self.all:
                if wanted in (profile["id"], profile["description"]):
                    return profile
            raise FatalError(
                1,
                "Model download failed: Environment variable NIM_MODEL_PROFILE is set to %s but no matching profile_id or"
                " profile description is found in manifest." % wanted,
            )
        candidates = self.group("runnable") + self.group("buildable")
        if fine_tuned:
            # Prebuilt engines hold the base model's weights: only a profile that loads or builds from weights fits.
            candidates = self.group("buildable") or [p for p in candidates if p["tags"]["llm_engine"] != "tensorrt_llm"]
        if selector:
            pairs = dict(pair.split("=", 1) for pair in selector.split(",") if "=" in pair)
            candidates = [p for p in candidates if all(p["tags"].get(k) == v for k, v in pairs.items())]
            if not candidates:
                raise FatalError(1, "Could not match a profile in manifest")
        wanted_lora = [p for p in candidates if (p["tags"].get("feat_lora") == "true") == self.lora]
        candidates = wanted_lora or candidates
        if wanted == "default":
            candidates = [p for p in candidates if p["tags"]["llm_engine"] == "vllm"] or candidates
        if not candidates:
            raise FatalError(
                1,
                "Could not find a profile that is currently runnable with the detected hardware. Please check the system"
                " information below and make sure you have enough free GPUs.",
            )
        return candidates[0]


def listing(image: dict, profiles: Profiles) -> str:
    """What list-model-profiles prints."""
    second = image["dialect"] == "2"
    lines = ["SYSTEM INFO"]

    def gpu_lines(title: str, gpus: list[Gpu]) -> None:
        if not gpus:
            lines.append("- %s: <None>" % title)
            return
        lines.append("- %s:" % title)
        for gpu in gpus:
            percent = int(100 * gpu.used / gpu.total) if gpu.total else 0
            lines.append(
                "  -  [%s:10de] (%d) %s [current utilization: %d%%]" % (gpu.pci_id, gpu.index, gpu.name, percent)
            )

    free = [gpu for gpu in profiles.gpus if gpu.used * 10 < gpu.total]
    busy = [gpu for gpu in profiles.gpus if gpu not in free]
    gpu_lines("Free GPUs", free)
    if busy:
        gpu_lines("Non-free GPUs", busy)

    def section(title: str, group: list, indent: int = 2) -> None:
        if not group:
            lines.append("- %s: <None>" % title if ":" not in title else "- %s <None>" % title)
            return
        lines.append("- " + title + ("" if title.endswith("GPU free memory") and not second else ":"))
        plain = [p for p in group if p["tags"].get("feat_lora") != "true"]
        lora = [p for p in group if p["tags"].get("feat_lora") == "true"]
        pad = " " * indent

        def entry(profile: dict) -> str:
            text = "%s (%s)" % (profile["id"], profile["description"])
            if second and title != "Incompatible with system":
                text += " [requires >=%d GB/gpu]" % profile["memory_gb"]
            return text

        lines.extend("%s- %s" % (pad, entry(p)) for p in plain)
        if lora:
            lines.append(pad + "- With LoRA support:")
            lines.extend("%s  - %s" % (pad, entry(p)) for p in lora)

    lines.append("MODEL PROFILES")
    section("Compatible with system and runnable", profiles.group("runnable"))
    low = profiles.group("low")
    if second:
        if low:
            section("Compatible with system but low memory", low, 4)
    elif low:
        section("Compatible with system but not runnable due to low GPU free memory", low)
    build = "Compilable to TRT-LLM using just-in-time compilation of HF models to TRTLLM engines"
    if second or profiles.group("buildable"):
        section(build, profiles.group("buildable"))
    section("Incompatible with system", profiles.group("incompatible"), 4 if second else 2)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- cache


class Cache:
    """The model cache in NIM's own layout, filled from api.ngc.nvidia.com."""

    CHUNK = 1 << 18

    def __init__(self, image: dict, log: Log, stop: threading.Event) -> None:
        self.image = image
        self.log = log
        self.stop = stop
        self.root = os.environ.get("NIM_CACHE_PATH") or "/opt/nim/.cache"
        self.base = (os.environ.get("NIM_REPOSITORY_OVERRIDE") or "https://api.ngc.nvidia.com").rstrip("/")
        store = image["model_store"]  # "nim/meta/llama-3_1-8b-instruct:hf-1"
        self.store, dummy, self.version = store.partition(":")
        self.directory = os.path.join(self.root, "ngc", "hub", "models--" + self.store.replace("/", "--"))
        self.snapshot = os.path.join(self.directory, "snapshots", self.version)
        self.context = None  # type: ssl.SSLContext | None

    def key(self) -> str:
        names = ["NGC_CLI_API_KEY", "NGC_API_KEY"] if self.image["dialect"] == "2" else ["NGC_API_KEY"]
        for name in names:
            if os.environ.get(name):
                return os.environ[name]
        return ""

    def complete(self) -> bool:
        marker = os.path.join(self.directory, "refs", self.version)
        return os.path.isfile(marker) and os.path.isdir(self.snapshot)

    def url(self, path: str = "") -> str:
        parts = self.store.split("/")  # org, team, model
        url = "%s/v2/org/%s/team/%s/models/%s/%s/files" % (self.base, parts[0], parts[1], parts[2], self.version)
        return url + ("?path=" + urllib.parse.quote(path) if path else "")

    def _context(self) -> ssl.SSLContext:
        if self.context is None:
            self.context = ssl.create_default_context()
            if not os.environ.get("SSL_CERT_FILE") and os.path.exists("/etc/ssl/certs/ca-certificates.crt"):
                self.context.load_verify_locations("/etc/ssl/certs/ca-certificates.crt")
        return self.context

    def _open(self, url: str, offset: int = 0):
        request = urllib.request.Request(url)
        request.add_header("User-Agent", "nim-standin/" + self.image["version"])
        if self.key():
            request.add_header("Authorization", "Bearer " + self.key())
        if offset:
            request.add_header("Range", "bytes=%d-" % offset)
        try:
            return urllib.request.urlopen(request, timeout=60, context=self._context())
        except urllib.error.HTTPError as exc:
            if exc.code in (401, 403):
                self.stop.wait(env_number("STANDIN_AUTH_SECONDS", 1))
                # Recorded for 1.x: the container ends with code 0 although nothing works.
                raise FatalError(0, "ManifestDownloadError: Error downloading manifest: Authentication Error") from exc
            raise FatalError(
                1, "One or more errors fetching files:\nHTTP status %d for url (%s)" % (exc.code, url)
            ) from exc
        except (urllib.error.URLError, OSError) as exc:
            self.log.problem("error sending request for url (%s)" % url, "rust/nim-sdk/src/hub/repo.rs", 119)
            raise FatalError(
                1, "ManifestDownloadError: Error downloading manifest: error sending request for url (%s)" % url
            ) from exc

    def _refused(self) -> int:
        """Why nothing can be written into the cache, as errno; 0 when something can."""
        try:
            os.makedirs(self.root, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                return 0
        except OSError as exc:
            # A full disk is met while something is written.
            return 0 if exc.errno == errno.ENOSPC else exc.errno or errno.EIO

    def fill(self) -> None:
        """Download what is missing.  A file that was begun is continued."""
        refused = self._refused()
        if self.complete():
            if refused:
                self.log.warn(
                    "%s: cache is read-only, application may fail if model is not already present in cache" % self.root
                )
            return
        if refused == errno.EROFS:
            self.log.warn(
                "%s: cache is read-only, application may fail if model is not already present in cache" % self.root
            )
        if refused:
            raise FatalError(
                1,
                "ManifestDownloadError: Error downloading manifest: I/O error %s (os error %d)"
                % (os.strerror(refused), refused),
            )
        if env_flag("NIM_DISABLE_MODEL_DOWNLOAD"):
            raise FatalError(1, "Model files are not in the cache and NIM_DISABLE_MODEL_DOWNLOAD is set.")
        if not self.key() and not self.image["public"]:
            self.stop.wait(env_number("STANDIN_AUTH_SECONDS", 1))
            raise FatalError(0, "ManifestDownloadError: Error downloading manifest: Authentication Error")
        try:
            self._download()
        except OSError as exc:
            number = exc.errno or 0
            raise FatalError(
                1, "One or more errors fetching files:\nI/O error %s (os error %d)" % (os.strerror(number), number)
            ) from exc

    def _download(self) -> None:
        with self._open(self.url()) as answer:
            files = json.load(answer)["modelFiles"]
        for name in ("blobs", "refs"):
            os.makedirs(os.path.join(self.directory, name), exist_ok=True)
        os.makedirs(self.snapshot, exist_ok=True)
        for entry in files:
            blob = hashlib.md5(("%s/%s/%s" % (self.store, self.version, entry["path"])).encode()).hexdigest()  # noqa: S324
            blob_path = os.path.join(self.directory, "blobs", blob)
            if not os.path.exists(blob_path):
                self._file(entry, blob_path)
            link = os.path.join(self.snapshot, entry["path"])
            os.makedirs(os.path.dirname(link), exist_ok=True)
            if not os.path.islink(link):
                os.symlink(os.path.relpath(blob_path, os.path.dirname(link)), link)
        with open(os.path.join(self.directory, "refs", self.version), "w") as handle:
            handle.write(self.version)
        self.stop.wait(env_number("STANDIN_DOWNLOAD_SECONDS", 0))

    def _file(self, entry: dict, blob_path: str) -> None:
        partial = blob_path + ".incomplete"
        have = os.path.getsize(partial) if os.path.exists(partial) else 0
        size = entry["sizeInBytes"]
        if have < size:
            self.log.note("Downloading file: %s (%d bytes)" % (entry["path"], size), "nim_hub_ngc.rs", 210)
            with self._open(self.url(entry["path"]), have) as answer, open(partial, "ab") as handle:
                if have and answer.status != 206:
                    handle.truncate(0)
                while not self.stop.is_set():
                    chunk = answer.read(self.CHUNK)
                    if not chunk:
                        break
                    handle.write(chunk)
                    handle.flush()
        if os.path.getsize(partial) != size:
            raise FatalError(1, "One or more errors fetching files:\nerror decoding response body")
        os.replace(partial, blob_path)


# ---------------------------------------------------------------------------------------------------------- metrics


class Histogram:
    BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)

    def __init__(self) -> None:
        self.counts = [0] * len(self.BOUNDS)
        self.total = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        for position, bound in enumerate(self.BOUNDS):
            if value <= bound:
                self.counts[position] += 1
        self.total += 1
        self.sum += value

    def text(self, name: str, label: str) -> list[str]:
        lines = ["# HELP %s %s" % (name, name), "# TYPE %s histogram" % name]
        for bound, count in zip(self.BOUNDS, self.counts):
            lines.append('%s_bucket{%s,le="%s"} %d' % (name, label, bound, count))
        lines.append('%s_bucket{%s,le="+Inf"} %d' % (name, label, self.total))
        lines.append("%s_count{%s} %d" % (name, label, self.total))
        lines.append("%s_sum{%s} %s" % (name, label, self.sum))
        return lines


class Metrics:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.prompt_tokens = self.generation_tokens = self.success = self.failure = 0
        self.ttft, self.per_token, self.e2e = Histogram(), Histogram(), Histogram()

    def text(self, dialect: str, model: str, gpus: list[Gpu], slots: int) -> str:
        second = dialect == "2"
        prefix = "vllm:" if second else ""
        label = 'model_name="%s"' % model
        out = []  # type: list[str]

        def value(name: str, kind: str, number: float, labels: str = label) -> None:
            out.extend(
                ["# HELP %s %s" % (name, name), "# TYPE %s %s" % (name, kind), "%s{%s} %s" % (name, labels, number)]
            )

        with self.lock:
            use = min(1.0, self.running / max(1, slots))
            value(prefix + "num_requests_running", "gauge", float(self.running))
            value(prefix + "num_requests_waiting", "gauge", 0.0)
            if second:
                value("vllm:kv_cache_usage_perc", "gauge", use)
            else:
                value("num_request_max", "gauge", float(slots))
                value("gpu_cache_usage_perc", "gauge", use)
            value(prefix + "prompt_tokens_total", "counter", float(self.prompt_tokens))
            value(prefix + "generation_tokens_total", "counter", float(self.generation_tokens))
            if second:
                value("vllm:request_success_total", "counter", float(self.success), label + ',finished_reason="stop"')
            else:
                value("request_success_total", "counter", float(self.success))
                value("request_failure_total", "counter", float(self.failure))
                value("request_finish_total", "counter", float(self.success), label + ',finished_reason="stop"')
            out.extend(self.ttft.text(prefix + "time_to_first_token_seconds", label))
            name = "vllm:inter_token_latency_seconds" if second else "time_per_output_token_seconds"
            out.extend(self.per_token.text(name, label))
            out.extend(self.e2e.text(prefix + "e2e_request_latency_seconds", label))
            if not second:
                for gpu in gpus:
                    device = 'device_id="%d"' % gpu.index
                    value("gpu_utilization", "gauge", 0.9 * use, device)
                    value("gpu_power_usage_watts", "gauge", 70.0 + 230.0 * use, device)
                    value("gpu_power_limit_watts", "gauge", 350.0, device)
                    value("gpu_total_energy_consumption_joules", "counter", 1000.0, device)
                    value("gpu_memory_used_bytes", "gauge", float(gpu.used << 20), device)
                    value("gpu_memory_total_bytes", "gauge", float(gpu.total << 20), device)
        return "\n".join(out) + "\n"


# ---------------------------------------------------------------------------------------------------------- service


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

    def trouble(self) -> None:
        """What really goes wrong while an engine starts, with the words of the real one."""
        if self._fabric_waits():
            raise FatalError(
                1, "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
            )
        share = env_number("NIM_KVCACHE_PERCENT", 0.9)
        for gpu in self.gpus.gpus:
            if gpu.free_gb < share * gpu.total_gb and not env_flag("NIM_RELAX_MEM_CONSTRAINTS"):
                raise FatalError(
                    1,
                    "ValueError: Free memory on device (%.2f/%.2f GiB) on startup is less than desired GPU memory"
                    " utilization (%s, %.2f GiB)" % (gpu.free_gb, gpu.total_gb, share, share * gpu.total_gb),
                )
        self._check_rope_scaling()
        try:
            kept = [open(os.devnull) for _number in range(int(env_number("STANDIN_OPEN_FILES", 0)))]  # noqa: SIM115
            del kept
        except OSError as exc:
            raise FatalError(1, "OSError: [Errno %d] %s: '%s'" % (exc.errno or 0, exc.strerror, exc.filename)) from exc
        self._fill_shared_memory(int(env_number("STANDIN_SHM_MIB", 0)))
        self._allocate(int(env_number("STANDIN_ALLOCATE_MIB", 0)))

    def _fabric_waits(self) -> bool:
        program = shutil.which("nvidia-smi")
        if not self.gpus.gpus or not program:
            return False
        try:
            shown = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=False).stdout
        except (OSError, subprocess.SubprocessError):
            return False
        return "In Progress" in shown

    def _check_rope_scaling(self) -> None:
        try:
            with open(os.path.join(self.weights, "config.json")) as handle:
                scaling = json.load(handle).get("rope_scaling")
        except (OSError, ValueError, AttributeError):
            return
        if scaling is None:
            return
        if not isinstance(scaling, dict) or (len(scaling) != 2 and "rope_type" not in scaling):
            raise FatalError(
                1,
                "ValueError: `rope_scaling` must be a dictionary with two fields, `type` and `factor`, got %s"
                % scaling,
            )
        kind = str(scaling.get("rope_type", scaling.get("type")))
        if kind not in ("default", "linear", "dynamic", "yarn", "su", "longrope", "llama3"):
            raise FatalError(1, "ValueError: Unknown RoPE scaling type %s" % kind)

    @staticmethod
    def _fill_shared_memory(mebibytes: int) -> None:
        """As NCCL does; STANDIN_SHM_MAP: through a mapping, where the kernel answers with SIGBUS."""
        if not mebibytes:
            return
        path = "/dev/shm/nccl-%d" % os.getpid()
        if env_flag("STANDIN_SHM_MAP"):
            with open(path, "w+b") as handle:
                handle.truncate(mebibytes << 20)
                with mmap.mmap(handle.fileno(), 0) as area:
                    for position in range(0, mebibytes << 20, 4096):
                        area[position] = 1
        try:
            with open(path, "wb") as handle:
                for _number in range(mebibytes):
                    handle.write(bytes(1 << 20))
        except OSError as exc:
            raise FatalError(1, "OSError: [Errno %d] %s: '%s'" % (exc.errno or 0, exc.strerror, path)) from exc
        finally:
            os.unlink(path)

    def _allocate(self, mebibytes: int) -> None:
        """Take main memory piece by piece, as weights that are read; who has less kills it."""
        held = []
        for _number in range(mebibytes):
            held.append(bytearray(os.urandom(4096)) * 256)
            if self.stop.wait(0.01):
                return

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
        self.trouble()
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


# ---------------------------------------------------------------------------------------------------------- HTTP


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True

    def __init__(self, address: tuple, service: Service) -> None:
        self.service = service
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # HTTPServer asks DNS for its own name here, which can take seconds in a container.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no event."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    @property
    def service(self) -> Service:
        return self.server.service

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, status: int, body: object, content_type: str = "application/json") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error_body(self, status: int, message: str, kind: str) -> None:
        with self.service.metrics.lock:
            self.service.metrics.failure += 1
        if self.service.dialect == "2":
            self.send(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})
        else:
            self.send(status, {"object": "error", "message": message, "type": kind, "param": None, "code": status})

    # ---- GET

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        service = self.service
        up = service.ready and not service.unhealthy
        second = service.dialect == "2"
        if path == "/v1/health/live":
            self.send(
                200,
                {
                    "object": "health.response",
                    "message": "Service is live" + ("" if second else "."),
                    **({"status": "ok"} if second else {}),
                },
            )
        elif path == "/v1/health/ready" or path == "/health":
            self._ready(up, second)
        elif not service.ready:
            self.send(503, {"error": {"message": "Service is not ready", "type": "ServiceUnavailable", "code": 503}})
        elif path == "/v1/models":
            self.send(200, {"object": "list", "data": self.models()})
        elif path == "/v1/version":
            self.send(200, {"release": service.image["version"], "api": "0.27.1" if second else "1.3.0"})
        elif path == "/v1/metadata" and service.image["has_metadata"]:
            self.send(200, self.metadata())
        elif path == "/v1/manifest" and service.image["has_metadata"]:
            self.send(200, {"manifest_file": read_manifest()})
        elif path == "/v1/license" and service.image["has_metadata"]:
            self.send(
                200,
                {"name": "NVIDIA AI Foundation Models Community License", "path": "/opt/nim/LICENSE", "content": ""},
            )
        elif path == ("/v1/metrics" if service.image["has_metadata"] else "/metrics"):
            text = service.metrics.text(
                service.dialect, service.names[0], service.gpus.gpus, int(env_number("NIM_MAX_NUM_SEQS", 256))
            )
            self.send(200, text, "text/plain; version=0.0.4; charset=utf-8")
        else:
            self.send(404, {"detail": "Not Found"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _ready(self, up: bool, second: bool) -> None:
        if not up:
            self.send(503, {"error": {"message": "Service is not ready", "type": "ServiceUnavailable", "code": 503}})
            return
        if not self.service.health_logged:
            self.service.health_logged = True
            self.service.log.note("Health request successful.", "health.py", 33)
        if second:
            self.send(200, {"object": "health.response", "message": "Service is ready", "status": "ok"})
        elif self.service.dialect in ("embedding", "native"):
            self.send(200, {"object": "health-response", "message": "Service is ready."})
        else:
            self.send(200, {"object": "health.response", "message": "Service is ready."})

    def models(self) -> list[dict]:
        service = self.service
        base = service.names[0]
        root = service.image["model"] if service.dialect != "2" else (service.weights or service.image["model"])
        entries = [(name, root if name == base else base, None) for name in service.names]
        for adapter in service.adapters:
            entries.append((adapter, os.path.join(service.peft, adapter) if service.dialect == "2" else base, base))
        return [
            {
                "id": name,
                "object": "model",
                "created": service.created,
                "owned_by": "vllm" if service.dialect == "2" else "system",
                "root": root_name,
                "parent": parent,
                "max_model_len": service.max_model_len,
                "permission": [],
            }
            for name, root_name, parent in entries
        ]

    def metadata(self) -> dict:
        service = self.service
        image = service.image
        return {
            "assetInfo": ["nvcr.io/%s:%s" % (image["repository"], image["version"])],
            "licenseInfo": {"name": "", "path": "", "sha": "", "size": "", "url": "", "type": "file", "content": ""},
            "modelInfo": [
                {"shortName": image["model_store"].rsplit("/", 1)[-1], "modelUrl": "ngc://" + image["model_store"]}
            ],
            "repository_override": os.environ.get("NIM_REPOSITORY_OVERRIDE", ""),
            "version": image["version"],
            "selectedModelProfileId": service.profile.get("id", ""),
        }

    # ---- POST

    def do_POST(self) -> None:
        path = self.path.split("?", 1)[0]
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        service = self.service
        if not service.ready:
            self.send(503, {"error": {"message": "Service is not ready", "type": "ServiceUnavailable", "code": 503}})
            return
        if service.unhealthy or env_flag("STANDIN_REQUESTS_FAIL"):
            self.send_error_body(
                500,
                "EngineCore encountered an issue. See stack trace (above) for the root cause.",
                "InternalServerError",
            )
            return
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            self.send_error_body(400, "The request body is no JSON object", "BadRequestError")
            return
        embedding = service.dialect in ("embedding", "native")
        if path == "/v1/embeddings" and embedding:
            self.known(body) and self.embeddings(body)
        elif path == "/v1/chat/completions" and not embedding:
            self.known(body) and self.complete(body, chat=True)
        elif path == "/v1/completions" and not embedding:
            self.known(body) and self.complete(body, chat=False)
        else:
            self.send(404, {"detail": "Not Found"})

    def known(self, body: dict) -> bool:
        model = body.get("model")
        if model in self.service.names or model in self.service.adapters:
            return True
        self.send_error_body(404, "The model `%s` does not exist." % model, "NotFoundError")
        return False

    def embeddings(self, body: dict) -> None:
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts or []
        data = []
        for index, text in enumerate(texts):
            digest = hashlib.sha256(str(text).encode()).digest()
            vector = [(digest[position % 32] - 127.5) / 2000 for position in range(1024)]
            data.append({"object": "embedding", "index": index, "embedding": vector})
        tokens = sum(len(str(text).split()) for text in texts)
        with self.service.metrics.lock:
            self.service.metrics.success += 1
            self.service.metrics.prompt_tokens += tokens
        self.send(
            200,
            {
                "object": "list",
                "data": data,
                "model": body["model"],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
        )

    def complete(self, body: dict, chat: bool) -> None:
        service = self.service
        if chat and not service.chat_template:
            service.log.problem(CHAT_TEMPLATE_TEXT, "serving_chat.py", 200)
            self.send_error_body(400, CHAT_TEMPLATE_TEXT, "BadRequestError")
            return
        if chat:
            messages = body.get("messages")
            if not isinstance(messages, list) or not messages:
                self.send_error_body(400, "messages: field required", "BadRequestError")
                return
            prompt = " ".join(str(message.get("content", "")) for message in messages if isinstance(message, dict))
        else:
            prompt = body.get("prompt", "")
            prompt = prompt if isinstance(prompt, str) else " ".join(str(part) for part in prompt)
        prompt_tokens = max(1, len(prompt.split()))
        answer = ("I am the sandbox's stand-in for %s and I answer without a model." % body["model"]).split(" ")
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or (len(answer) if chat else 16)
        if not isinstance(wanted, int) or wanted < 1:
            self.send_error_body(400, "max_tokens must be at least 1, got %s." % wanted, "BadRequestError")
            return
        if prompt_tokens + wanted > service.max_model_len:
            self.send_error_body(
                400,
                "This model's maximum context length is %d tokens. However, you requested %d tokens."
                % (service.max_model_len, prompt_tokens + wanted),
                "BadRequestError",
            )
            return
        if body.get("ignore_eos") or body.get("min_tokens"):
            answer = [answer[position % len(answer)] for position in range(wanted)]
        words = answer[:wanted]
        finish = "stop" if len(words) == len(answer) and not body.get("ignore_eos") else "length"
        with service.metrics.lock:
            service.metrics.running += 1
        begun = time.time()
        try:
            self._generate(body, chat, words, finish, prompt_tokens, begun)
        finally:
            with service.metrics.lock:
                service.metrics.running -= 1
                service.metrics.success += 1
                service.metrics.prompt_tokens += prompt_tokens
                service.metrics.generation_tokens += len(words)
                service.metrics.e2e.observe(time.time() - begun)

    def _generate(
        self, body: dict, chat: bool, words: list[str], finish: str, prompt_tokens: int, begun: float
    ) -> None:
        service = self.service
        gap = 1 / max(0.1, env_number("STANDIN_TOKENS_PER_SECOND", 200))
        time.sleep(env_number("STANDIN_TTFT_MS", 20) / 1000)
        with service.metrics.lock:
            service.metrics.ttft.observe(time.time() - begun)
        identifier = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        head = {"id": identifier, "created": int(begun), "model": body["model"]}
        usage = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + len(words),
            "completion_tokens": len(words),
        }
        if not body.get("stream"):
            time.sleep(gap * max(0, len(words) - 1))
            with service.metrics.lock:
                for _word in words[1:]:
                    service.metrics.per_token.observe(gap)
            text = " ".join(words)
            choice = {"index": 0, "logprobs": None, "finish_reason": finish, "stop_reason": None}
            choice.update(
                {"message": {"role": "assistant", "content": text, "tool_calls": []}} if chat else {"text": text}
            )
            kind = "chat.completion" if chat else "text_completion"
            self.send(200, {**head, "object": kind, "choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        include = bool((body.get("stream_options") or {}).get("include_usage"))

        def event(choices: list, last_usage: object = None) -> None:
            record = {**head, "choices": choices}
            if include:
                record["usage"] = last_usage
            self._chunk("data: %s\n\n" % json.dumps(record))

        if chat:
            event(
                [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
            )
        for position, word in enumerate(words):
            if position:
                time.sleep(gap)
                with service.metrics.lock:
                    service.metrics.per_token.observe(gap)
            text = (" " if position else "") + word
            last = finish if position == len(words) - 1 else None
            if chat:
                event([{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": last}])
            else:
                event([{"index": 0, "text": text, "logprobs": None, "finish_reason": last}])
        if include:
            event([], usage)
        self._chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


# ---------------------------------------------------------------------------------------------------------- commands


def read_manifest() -> str:
    for path in ("/opt/nim/etc/default/model_manifest.yaml", "/etc/nim/config/model_manifest.yaml"):
        try:
            with open(path) as handle:
                return handle.read()
        except OSError:
            continue
    return ""


def command_list(image: dict, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="list-model-profiles")
    parser.add_argument("--output-format", choices=["text", "json"], default="text")
    parser.add_argument("--output-file")
    options = parser.parse_args(arguments)
    gpus = Gpus()
    profiles = Profiles(image["profiles"], gpus.gpus, True)
    time.sleep(env_number("STANDIN_LIST_SECONDS", 0))
    if options.output_format == "json":
        compatible = profiles.group("runnable") + profiles.group("buildable")
        text = json.dumps({"compatible": [{"profile_id": p["id"], "tags": p["tags"]} for p in compatible]})
    else:
        text = listing(image, profiles)
    if options.output_file:
        with open(options.output_file, "w") as handle:
            handle.write(text + "\n")
    else:
        print(text)
    return 0


def command_download(image: dict, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="download-to-cache")
    parser.add_argument("-p", "--profiles", "--profile", nargs="+", default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--model-uri")
    parser.add_argument("--manifest-file")
    options = parser.parse_args(arguments)
    log = Log(image["dialect"])
    log.threshold = min(log.threshold, RANKS["INFO"])
    profiles = Profiles(image["profiles"], Gpus().gpus, options.lora)
    try:
        for wanted in options.profiles or ([] if options.all else [os.environ.get("NIM_MODEL_PROFILE", "")]):
            chosen = profiles.select(wanted, "", False)
            log.note("Selected profile: %s (%s)" % (chosen["id"], chosen["description"]), "ngc_injector.py", 207)
        log.note(
            "Preparing model workspace. This step might download additional files to run the model.",
            "ngc_injector.py",
            234,
        )
        begun = time.time()
        Cache(image, log, threading.Event()).fill()
        log.note("Model workspace is now ready. It took %.3f seconds" % (time.time() - begun), "ngc_injector.py", 241)
    except FatalError as exc:
        for line in exc.text.splitlines():
            log.problem(line)
        return exc.code
    return 0


def command_store(image: dict, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="create-model-store")
    parser.add_argument("-p", "--profile")
    parser.add_argument("--model-repo")
    parser.add_argument("-m", "--model-store", required=True)
    options = parser.parse_args(arguments)
    code = command_download(image, ["-p", options.profile] if options.profile else [])
    if code:
        return code
    cache = Cache(image, Log(image["dialect"]), threading.Event())
    if not cache.complete():
        return 0
    shutil.copytree(cache.snapshot, options.model_store, symlinks=False, dirs_exist_ok=True)
    return 0


def command_native(image: dict, arguments: list[str]) -> int:
    """The native family: SHOW_CONFIG, download-only, or serve with the weights in NIM_ENGINE_MODEL_PATH."""
    if env_flag("SHOW_CONFIG"):
        for name in ("NIM_SERVER_BIND_ADDR", "LOG_FORMAT", "RUST_LOG", "NIM_ENGINE_MODEL_PATH", "NIM_ENGINE_PRECISION"):
            print("%s=%s" % (name, os.environ.get(name, "")))
        return 0
    os.environ["NIM_CACHE_PATH"] = os.environ.get("NIM_ENGINE_MODEL_PATH") or "/model"
    if env_flag("NIM_ENGINE_MODEL_DOWNLOAD_ONLY"):
        return command_download(image, ["--all"])
    return Service(image, arguments).run()


def command_serve(image: dict, arguments: list[str]) -> int:
    service = Service(image, [argument for argument in arguments if argument != "--dry-run"])
    if "--dry-run" in arguments:
        try:
            service.configure()
        except FatalError as exc:
            print(exc.text)
            return exc.code
        print(
            json.dumps(
                {
                    "model": image["model"],
                    "served_model_name": service.names,
                    "max_model_len": service.max_model_len,
                    "arguments": service.engine_options,
                },
                indent=2,
            )
        )
        return 0
    return service.run()


def main() -> int:
    name = os.path.basename(sys.argv[0])
    arguments = sys.argv[1:]
    commands = {
        "list-model-profiles": command_list,
        "nim_list_model_profiles": command_list,
        "download-to-cache": command_download,
        "create-model-store": command_store,
        "nim-run": command_serve,
        "nim-serve": command_serve,
        "nim-native": command_native,
    }
    if name not in commands and arguments and arguments[0] in commands:
        name, arguments = arguments[0], arguments[1:]
    try:
        with open(CONFIG_PATH) as handle:
            image = json.load(handle)
    except OSError as exc:
        print("%s: %s" % (CONFIG_PATH, exc.strerror), file=sys.stderr)
        return 66
    if name not in commands:
        print("usage: standin_nim.py {%s} [argument …]" % ",".join(sorted(commands)), file=sys.stderr)
        return 64
    return commands[name](image, arguments)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
