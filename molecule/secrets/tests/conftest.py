# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests/sandbox"))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests/sandbox/world"))
