# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later

# This plugin util is PRIVATE to the collection; it may change at any time.
"""What modules of this collection answer, read on the controller: a host may be damaged, or in foreign hands.

What is not shaped as the module's answer is a failure of that host alone, and nothing in it can steer a terminal.
"""

from __future__ import annotations

import json
import re
import typing as t

from ansible_collections.gpu_fleet.nim.plugins.module_utils._findings import SEVERITIES
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from ansible_collections.gpu_fleet.nim.plugins.module_utils._text_table import shorten
from ansible_collections.gpu_fleet.nim.plugins.module_utils._untrusted import MapOf, OneOf, misfit
from ansible_collections.gpu_fleet.nim.plugins.module_utils._verdict import SEVERITY
from ansible_collections.gpu_fleet.nim.plugins.plugin_utils._plain import returned

Answer = t.Dict[str, t.Any]

#: Reason of a host whose answer is none.
BAD_ANSWER = "bad_answer"
#: Characters of one answer, and of the message of one that failed; no host has that much to say.
_LARGEST = 4_000_000
_MESSAGE = 4000

#: What the table itself reads of every answer.
_NOTES = {"notes": [str]}
#: What is read of the answer of gpu_host_plan.
PLAN = {
    "gpu": bool,
    "changes": [
        {
            **dict.fromkeys(("resource", "what", "why", "blocked", "after"), str),
            "disruption": OneOf(tuple(map(str, Disruption))),
        }
    ],
    "errors": [dict.fromkeys(("resource", "reason", "message", "after"), str)],
    **_NOTES,
}
#: Of gpu_host_preflight.
PREFLIGHT = {
    "checks": [
        {
            **dict.fromkeys(("check", "message", "remedy", "reason", "gpu", "subject"), str),
            "verdict": OneOf(SEVERITY),
        }
    ],
    **_NOTES,
}
#: Of gpu_host_diagnosis.
DIAGNOSIS = {
    "findings": [
        {
            **dict.fromkeys(("model", "layer", "gpu", "reason", "cause", "remedy", "signature"), str),
            "severity": OneOf(SEVERITIES),
            "evidence": [str],
        }
    ],
    "bundle": str,
    **_NOTES,
}
#: Of gpu_host_info.
FACTS = {
    "os": {"name": str},
    "kernel": str,
    "driver": dict.fromkeys(("loaded", "on_disk", "flavour"), str),
    "cuda_version": str,
    "docker": {"version": str, "installed": bool},
    "container_toolkit": {"version": str},
    "gpus": [
        {
            **dict.fromkeys(("name", "uuid", "architecture"), str),
            **dict.fromkeys(("index", "memory_total_mib", "memory_used_mib"), float),
        }
    ],
    "pci_gpus": [{"architecture": str}],
    "nim": [
        {
            **dict.fromkeys(("name", "image", "digest", "cache_directory", "state", "url", "model_id", "message"), str),
            **dict.fromkeys(("port", "seconds_to_ready"), float),
            "ready": bool,
            "gpus": [str],
        }
    ],
    "errors": MapOf(str),
    **_NOTES,
}

#: Signs that a terminal obeys, that turn the direction of writing, or that no file takes; line ends and tabs are none.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text without signs that do something when they are printed."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def read_answer(found: t.Any, shape: t.Any) -> Answer | None:
    """What a task was registered as on a host, or the word that it failed when it is no answer of the module.

    Args:
        found: As Ansible has it; None, or anything but a mapping, where the task never ran.
        shape: Of the answer, for :func:`misfit`.
    """
    try:
        answer = _printable(returned(found))
        size = len(json.dumps(answer))
    except RecursionError:
        return _bad("it is nested too deeply")
    if not isinstance(answer, dict):
        return None
    if answer.get("unreachable") or answer.get("failed"):
        answer["msg"] = str(answer.get("msg") or "")[:_MESSAGE]
        answer["reason"] = str(answer.get("reason") or "")[:_MESSAGE]
    wrong = "it is larger than any answer" if size > _LARGEST else misfit(answer, shape)
    if not wrong:
        return answer
    if answer.get("unreachable"):
        return {"unreachable": True, "msg": answer["msg"]}
    return _bad(wrong)


def _bad(wrong: str) -> Answer:
    message = "the host's answer is none of the module's (%s); look at the host itself, and do not trust it before"
    return {"failed": True, "reason": BAD_ANSWER, "msg": message % shorten(wrong, 200)}


def _printable(value: t.Any) -> t.Any:
    if isinstance(value, dict):
        return {_printable(key): _printable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    # Python reads NaN and Infinity as JSON, which nobody else does.
    if isinstance(value, float) and not -1e300 < value < 1e300:
        return None
    return printable(value) if isinstance(value, str) else value
