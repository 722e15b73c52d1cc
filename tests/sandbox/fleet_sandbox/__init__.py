# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Host side of the sandbox: a private Docker Engine, host images, GPU hosts, inventory."""
