# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""One streamed chat completion from every service that the status playbook found, printed as it arrives."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import urllib.request

QUESTION = "In one sentence: what are you running on?"


def chat(url: str, model: str) -> str:
    """The answer of a model, printed piece by piece.

    Raises:
        ValueError: The stream ended without its closing mark, or without a word.
    """
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64, "stream": True}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    words: list[str] = []
    closed = False
    with urllib.request.urlopen(request, timeout=60) as answer:
        for raw in answer:
            line = raw.decode().strip()
            if line == "data: [DONE]":
                closed = True
            elif line.startswith("data: "):
                for choice in json.loads(line[6:]).get("choices", []):
                    piece = choice.get("delta", {}).get("content") or ""
                    words.append(piece)
                    print(piece, end="", flush=True)
    print()
    if not closed or not "".join(words).strip():
        raise ValueError("the stream ended early")
    return "".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("status", type=pathlib.Path, help="JSON written by the status playbook (status_output)")
    services = [row for row in json.loads(parser.parse_args().status.read_text()) if row["nim"]]
    failed = 0
    for row in services:
        print(
            "\n%s/%s  %s  %s\n  > %s\n  < " % (row["host"], row["nim"], row["url"], row["model_id"], QUESTION), end=""
        )
        started = time.monotonic()
        try:
            chat(row["url"], row["model_id"])
            print("  (%.1f s)" % (time.monotonic() - started))
        except (OSError, ValueError) as error:
            failed += 1
            print("  FAILED: %s" % error)
    print("\nchats: %d passed, %d failed" % (len(services) - failed, failed))
    return 1 if failed or not services else 0


if __name__ == "__main__":
    sys.exit(main())
