# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The container's log, plain or JSON, in the words of its dialect."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

from environment import env_flag

LOG_LEVELS = ("DEFAULT", "TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
RANKS = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}


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
