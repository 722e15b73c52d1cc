# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The list of wanted images."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._wanted_images import parse_images
from image_world import (
    LLAMA,
)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"image": "https://nvcr.io/x"}, "images[0].image"),
        ({"image": LLAMA, "disk_space": "20"}, "not a size with a unit"),
        ({"image": LLAMA, "disk_space": "much"}, "not a size with a unit"),
        ({"image": LLAMA, "cache_directory": "relative"}, "not an absolute path"),
    ],
)
def test_bad_images(entry: dict[str, str], part: str) -> None:
    with pytest.raises(FleetError) as error:
        parse_images([entry])
    assert error.value.reason == "invalid_option"
    assert part in error.value.message


def test_the_same_image_twice() -> None:
    one = {"image": LLAMA, "disk_space": "1GB"}
    two = {"image": LLAMA, "disk_space": "3GB"}
    (image,) = parse_images(
        [dict(one, cache_directory="/a"), dict(two, cache_directory="/b"), {"image": LLAMA}, two, two]
    )
    assert image.spaces == (("/a", 1024**3), ("/b", 3 * 1024**3), ("", 3 * 1024**3))
    with pytest.raises(FleetError, match="both present and absent"):
        parse_images([one, dict(two, state="absent")])
