# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is a signing key and what only pretends to be one."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._repository_key import dearmor
from package_fakes import ARMORED, KEY


def test_key_is_stored_binary_whatever_came() -> None:
    assert dearmor(KEY) == KEY
    assert dearmor(ARMORED) == KEY
    assert dearmor(ARMORED + ARMORED) == KEY + KEY
    assert dearmor(ARMORED.replace(b"Version: GnuPG v2\n", b"").replace(b"\n", b"\r\n")) == KEY


@pytest.mark.parametrize(
    "content", [b"", b"<html>log in</html>", ARMORED.replace(b"BEGIN PGP PUBLIC", b"BEGIN PGP PRIVATE"), ARMORED[:40]]
)
def test_what_is_no_key(content: bytes) -> None:
    with pytest.raises(FleetError) as caught:
        dearmor(content, "https://x/gpg")
    assert caught.value.reason == "invalid_key"
    assert "https://x/gpg" in caught.value.message
