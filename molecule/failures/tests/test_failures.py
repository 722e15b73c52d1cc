# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The failures that matter most, brought about on one host: each is said within 5 seconds, with cause and remedy."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from failure_runner import Seen, Theatre, problems, report
from failure_table import SITUATIONS
from fleet_testing import SOURCE, Fleet

FLEET = Fleet("failures")
HOST = FLEET.host("gpu01")
ALL = {situation.name: situation for situation in SITUATIONS}
#: Several at once.
TOGETHER = (
    ("nim-02", "nim-06", "nim-16a", "nim-19", "eng-30a", "json-exception"),
    ("nim-01", "out-of-memory", "eng-34a", "umbrella-first", "hangs", "requests-fail"),
)
#: One after the other on a host that is made unfit.
UNFIT = {"gpus": ("host-40", "host-45a", "host-53b"), "runtime": ("host-58a", "nim-08")}
LLAMA = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4"


#: One index for two architectures.
INDEX = "nvcr.io/nim/nvidia/nemotron-3-nano:2.0.13"


@pytest.fixture(scope="module")
def theatre() -> Theatre:
    return Theatre(FLEET, HOST)


@pytest.fixture(scope="module")
def seen(theatre: Theatre) -> Iterator[dict[str, Seen]]:
    found: dict[str, Seen] = {}
    for names in TOGETHER:
        found.update(theatre.play([ALL[name] for name in names]))
    found.update(theatre.breaks([ALL[name] for name in UNFIT["gpus"]], "gpus"))
    theatre.image, theatre.key = LLAMA, "nvapi-" + secrets.token_urlsafe(40)
    theatre.world.set_key(theatre.key)
    try:
        found.update(theatre.breaks([ALL[name] for name in UNFIT["runtime"]], "runtime"))
    finally:
        theatre.world.remove_key(theatre.key)
    print(report(found))
    yield found


@pytest.mark.parametrize("name", [name for group in (*TOGETHER, *UNFIT.values()) for name in group])
def test_failure(seen: dict[str, Seen], name: str) -> None:
    assert problems(ALL[name], seen[name]) == []


def test_an_image_of_another_machine_is_pulled_again(theatre: Theatre) -> None:
    """Docker's own image store has one image a digest, also of an index for several machines."""
    HOST.run("docker pull --quiet --platform linux/arm64 %s && docker create --name foreign %s" % (INDEX, INDEX))
    hosts = {"index": {**theatre.connection, "wanted": INDEX, "key": ""}}
    inventory = {"refusals": {"hosts": hosts}, "logins": {"hosts": {}}}
    try:
        run = theatre.fleet.attempt(SOURCE / "failure_registry.yml", inventory=inventory)
        result = run.of("index", "Image")[-1]["result"]
        assert result["changed"], result
        pinned = result["images"][0]["run"]
        architecture = "docker image inspect --format '{{.Architecture}}' "
        assert [HOST.run(architecture + name) for name in (INDEX, pinned)] == ["amd64", "amd64"]
        assert "@sha256:" in pinned
        again = theatre.fleet.attempt(SOURCE / "failure_registry.yml", inventory=inventory)
        assert not again.of("index", "Image")[-1]["result"]["changed"]
    finally:
        HOST.run("docker rm -f foreign; docker image rm -f %s" % INDEX, check=False)
