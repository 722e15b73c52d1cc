# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host that says at once what a real one has said: what is left is the controller's own work."""

from __future__ import annotations

import os

from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: replay
short_description: Answers every module with what is in the file that BENCH_ANSWER names
description: For benchmarks.
version_added: historical
options: {}
"""


class Connection(ConnectionBase):
    """Takes what it is given and answers."""

    transport = "replay"
    has_pipelining = True

    def _connect(self):
        return self

    def exec_command(self, cmd, in_data=None, sudoable=True):
        with open(os.environ["BENCH_ANSWER"], "rb") as stream:
            return 0, stream.read(), b""

    def put_file(self, in_path, out_path):
        raise NotImplementedError("pipelining puts no files")

    def fetch_file(self, in_path, out_path):
        raise NotImplementedError("modules fetch no files")

    def close(self):
        """There is nothing to close."""
