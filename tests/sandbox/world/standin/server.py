# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The HTTP side: health, models, metadata, metrics, completions, embeddings."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from environment import env_flag, env_number

if TYPE_CHECKING:
    from service import Service

CHAT_TEMPLATE_TEXT = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template if the"
    " tokenizer does not define one."
)


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


def read_manifest() -> str:
    for path in ("/opt/nim/etc/default/model_manifest.yaml", "/etc/nim/config/model_manifest.yaml"):
        try:
            with open(path) as handle:
                return handle.read()
        except OSError:
            continue
    return ""
