# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module of the collection says about check mode, diff mode and idempotence."""

from __future__ import annotations


class ModuleDocFragment:
    """Standard attributes; a module overrides one by naming it again with its own C(details)."""

    DOCUMENTATION = r"""
attributes:
  check_mode:
    description: Can run in check mode and return what would change without changing anything.
    support: full
  diff_mode:
    description: Returns what changed (or would change) as a difference; secrets appear as fingerprints at most.
    support: full
  idempotent:
    description: A second run with the same options on an unchanged host changes nothing.
    support: full
  platform:
    description: Operating systems on which the module works.
    platforms: linux
    support: full
options: {}
"""

    # For modules that only read.
    INFO = r"""
attributes:
  check_mode:
    description: Can run in check mode; the module never changes anything.
    support: full
  diff_mode:
    description: The module changes nothing, so there is no difference to show.
    support: N/A
  idempotent:
    description: A second run with the same options on an unchanged host gives the same answer.
    support: full
  platform:
    description: Operating systems on which the module works.
    platforms: linux
    support: full
options: {}
"""
