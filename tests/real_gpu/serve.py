# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The service in the container: keeps the health contract of a NIM and computes on the GPU that it was given.

It uses PyTorch where the container has it, and the CUDA driver alone where not.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import typing as t

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from cuda import Cuda
from nvml import Nvml

#: Held, so that the memory can be seen from outside.
HELD_MIB = 512
STATE: t.Dict[str, t.Any] = {"ready": False}
LOCK = threading.Lock()


def compute() -> t.Dict[str, t.Any]:
    """One computation on every GPU in sight, checked against the processor."""
    try:
        import torch
    except ImportError as error:
        return {"with": "driver", "why": str(error), "gpus": compute_with_driver()}
    if os.environ.get("REAL_GPU_TOO_LARGE"):
        torch.zeros(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    torch.manual_seed(7)
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    expected = one @ other
    count = torch.cuda.device_count()
    held = STATE.setdefault("held", {})
    found = []
    for number in range(count):
        device = "cuda:%d" % number
        if number not in held:
            held[number] = torch.zeros(HELD_MIB << 18, device=device)
        # Half of the factors goes through the GPU before it, as layers of a model do.
        product = (one.to("cuda:%d" % (number - 1) if number else device).to(device) @ other.to(device)).cpu()
        uuid = str(torch.cuda.get_device_properties(number).uuid)
        error = float((product - expected).abs().max() / expected.abs().max())
        found.append({"uuid": uuid if uuid.startswith("GPU-") else "GPU-" + uuid, "error": error})
    return {"with": "torch %s" % torch.__version__, "gpus": found}


def compute_with_driver() -> t.List[t.Dict[str, t.Any]]:
    """The same without PyTorch."""
    if "cuda" not in STATE:
        first = Cuda(0)
        STATE["cuda"] = [first, *(Cuda(number) for number in range(1, first.count))]
        for cuda in STATE["cuda"]:
            cuda.use()
            cuda.allocate(HELD_MIB << 20)
    found = []
    for cuda in STATE["cuda"]:
        cuda.use()
        found.append({"uuid": cuda.uuid(), "error": cuda.axpy()})
    return found


def metrics() -> str:
    """In the text format of Prometheus, with a name for each GPU that does not tell which board it is."""
    lines = ["# HELP gpu_memory_used_bytes Memory of the GPU that is in use.", "# TYPE gpu_memory_used_bytes gauge"]
    for gpu in Nvml().gpus():
        lines.append('gpu_memory_used_bytes{gpu="%d"} %d' % (gpu["index"], gpu["memory_used_mib"] << 20))
    return "\n".join(lines) + "\n"


def load() -> None:
    """What a NIM does before it is ready."""
    sys.stderr.write("Loading model weights\n")
    result = compute()
    result["nvml"] = [gpu["uuid"] for gpu in Nvml().gpus()]
    STATE.update(result=result, ready=True)
    sys.stderr.write("Uvicorn running on port %s\n" % os.environ["NIM_SERVER_PORT"])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: t.Any) -> None:
        """Quiet."""

    def answer(self, status: int, content: t.Any) -> None:
        plain = isinstance(content, str)
        body = content.encode() if plain else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = os.environ.get("NIM_SERVED_MODEL_NAME", "gpu-fleet/real-gpu")
        if self.path == "/v1/health/ready":
            self.answer(200 if STATE["ready"] else 503, {"object": "health", "message": "ready"})
        elif self.path == "/v1/health/live":
            self.answer(200, {"object": "health", "message": "live"})
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
        elif self.path == "/v1/version":
            self.answer(200, {"release": "2.0.0", "api": "2.0.0"})
        elif self.path == "/v1/metrics":
            self.answer(200, metrics())
        elif self.path == "/gpu":
            self.answer(200, STATE.get("result", {}))
        else:
            self.answer(404, {"message": "not found"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            self.answer(404, {"message": "not found"})
            return
        with LOCK:
            text = "largest error %g" % max(gpu["error"] for gpu in compute()["gpus"])
        self.answer(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_arguments: os._exit(0))
    port = int(os.environ["NIM_SERVER_PORT"])
    server = http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    load()
    threading.Event().wait()


if __name__ == "__main__":
    main()
