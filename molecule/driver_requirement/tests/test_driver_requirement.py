# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A driver that is too old for an image, and everything that can stand between a host and another driver.

The tests of one host build on each other, in this order.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import re
import time

from control import World
from fleet_sandbox.common import WORLD_ADDRESS
from fleet_testing import SANDBOX, Fleet, Host, Json, wait_until

FLEET = Fleet("driver_requirement")
GEFORCE = FLEET.host("geforce")
BUSY = FLEET.host("busy")
PLAIN = FLEET.host("plain")
SECURE = FLEET.host("secure")
REPOSITORY = "nim/meta/llama3-8b-instruct"
MODEL = {"name": "llama3", "image": "nvcr.io/%s:1.0.3" % REPOSITORY, "gpus": 1, "start_timeout": 90}
BOOTS = "/var/lib/boots"


def wanted(host: Host, **variables: object) -> Json:
    """The inventory with other variables for one host."""
    inventory = copy.deepcopy(FLEET.inventory)
    inventory["gpu_hosts"]["hosts"][host.name].update(variables)
    return inventory


def packages(host: Host) -> str:
    return host.run("dpkg-query -W -f '${Package} ${Version} ${db:Status-Abbrev}\\n'; ls /etc/apt/sources.list.d")


def loaded(host: Host) -> str:
    return host.run("cat /sys/module/nvidia/version", check=False)


def layers(repository: str, tag: str) -> list[str]:
    """Digests of the layers of an image, asked of the registry behind nvcr.io."""
    kinds = ("vnd.oci.image.manifest.v1", "vnd.docker.distribution.manifest.v2")
    registry = http.client.HTTPConnection(WORLD_ADDRESS, 5000, timeout=10)
    with contextlib.closing(registry):
        accepted = ", ".join("application/%s+json" % kind for kind in kinds)
        registry.request("GET", "/v2/%s/manifests/%s" % (repository, tag), headers={"Accept": accepted})
        return [layer["digest"] for layer in json.load(registry.getresponse())["layers"]]


# -- an image that needs a newer driver, on a kernel that cannot unload modules -----------------------


def test_refused_before_the_pull() -> None:
    before = GEFORCE.run("docker images --quiet --no-trunc")
    began = time.time()
    run = FLEET.site("--limit", GEFORCE.name, inventory=wanted(GEFORCE, nim_models=[MODEL]), succeeds=False)
    message = run.failure(GEFORCE.name)
    # Who, what it needs, what there is, and the smallest branch that would do.
    for word in ("llama3-8b-instruct", "12.5", "535.183.06", "555"):
        assert word in message, message
    assert "550" not in message and "560" not in message, message
    assert GEFORCE.run("docker images --quiet --no-trunc") == before
    asked = [entry["uri"] for entry in World(str(SANDBOX)).requests(began, client=GEFORCE.address)]
    assert [uri for uri in asked if "/manifests/" in uri], asked
    wanted_layers = layers(REPOSITORY, "1.0.3")
    assert wanted_layers
    assert [uri for uri in asked if any(digest in uri for digest in wanted_layers)] == []
    assert GEFORCE.models() == []


def test_one_run_with_a_reboot_ends_with_a_nim_that_answers() -> None:
    GEFORCE.write("/usr/lib/sandbox/boot.d/99-count", "#!/bin/sh\necho >> %s\n" % BOOTS, "0755")
    before = GEFORCE.boot_id()
    inventory = wanted(GEFORCE, nim_models=[MODEL], nvidia_driver_branch="555", nvidia_driver_reboot=True)
    hosts = "%s:%s" % (GEFORCE.name, PLAIN.name)
    bare = packages(PLAIN)
    run = FLEET.site("--limit", hosts, inventory=inventory)
    assert loaded(GEFORCE) == "555.42.06"
    assert GEFORCE.boot_id() != before
    assert GEFORCE.run("wc -l < " + BOOTS) == "1"
    assert GEFORCE.complete(8000)[0] == 200

    # The host without a GPU in the same play is told so and left alone.
    said = [str(entry["result"].get("msg", "")) for entry in run.of(PLAIN.name)]
    assert [text for text in said if "no NVIDIA GPU" in text and PLAIN.name in text], said
    assert not [entry for entry in run.of(PLAIN.name) if entry["result"].get("changed")]
    assert packages(PLAIN) == bare
    assert "nvidia" not in bare and not PLAIN.succeeds("command -v docker")

    identity, boot = GEFORCE.identity(), GEFORCE.boot_id()
    again = FLEET.site("--limit", hosts, inventory=inventory)
    assert again.changed() == []
    assert GEFORCE.boot_id() == boot and GEFORCE.identity() == identity
    assert GEFORCE.run("wc -l < " + BOOTS) == "1"


def test_without_permission_the_reboot_is_asked_for() -> None:
    stopped = [{**MODEL, "state": "stopped"}]
    GEFORCE.run("systemctl stop nim-llama3")
    inventory = wanted(GEFORCE, nim_models=stopped, nvidia_driver_branch="570")
    boot = GEFORCE.boot_id()
    options = ("--limit", GEFORCE.name, "--tags", "nvidia_driver")
    run = FLEET.site(*options, inventory=inventory, succeeds=False)
    message = run.failure(GEFORCE.name)
    assert "a reboot is needed because" in message and "unload" in message, message
    assert "nvidia_driver_reboot" in message
    assert [entry for entry in run.of(GEFORCE.name) if entry["result"].get("reboot_required")]
    assert GEFORCE.boot_id() == boot
    assert loaded(GEFORCE) == "555.42.06"
    # The operator reboots it, and the next run has nothing left to ask for.
    GEFORCE.reboot()
    FLEET.site(*options, inventory=inventory)
    assert loaded(GEFORCE) == "570.124.06"


# -- a GPU that is in use -----------------------------------------------------------------------------


def test_a_gpu_in_use_is_taken_from_nobody() -> None:
    script = "import time; held = open('/dev/nvidia1'); time.sleep(900)"
    BUSY.run('systemd-run --quiet --unit=training python3 -c "%s"' % script)
    try:
        pid = BUSY.run("systemctl show --property MainPID --value training")
        wait_until(lambda: "nvidia1" in BUSY.run("ls -l /proc/%s/fd" % pid), "the job has opened its GPU")
        before, identity = packages(BUSY), BUSY.identity()
        with BUSY.client(8000) as client:
            run = FLEET.site(
                "--limit",
                BUSY.name,
                "--tags",
                "nvidia_driver",
                inventory=wanted(BUSY, nvidia_driver_branch="580", nvidia_driver_reboot=True),
                succeeds=False,
            )
        message = run.failure(BUSY.name)
        assert "pid %s (" % pid in message and "training.service" in message, message
        assert "in container nim-llama" in message and "Nothing was changed" in message, message
        # A docker stop would be undone.
        assert "systemctl stop nim-llama" in message, message
        assert client.failures == []
        assert run.changed() == []
        assert (packages(BUSY), BUSY.identity(), loaded(BUSY)) == (before, identity, "570.124.06")
    finally:
        BUSY.run("systemctl stop training")

    # Our own service alone is nobody less.
    run = FLEET.site(
        "--limit",
        BUSY.name,
        "--tags",
        "nvidia_driver",
        inventory=wanted(BUSY, nvidia_driver_branch="580"),
        succeeds=False,
    )
    message = run.failure(BUSY.name)
    assert "nim-llama" in message and "training" not in message, message
    assert packages(BUSY) == before and BUSY.ready(8000)

    # When nobody uses it any more, the same run goes through without a reboot, and the service can come back.
    boot = BUSY.boot_id()
    BUSY.run("systemctl stop nim-llama")
    FLEET.site("--limit", BUSY.name, inventory=wanted(BUSY, nvidia_driver_branch="580"))
    assert loaded(BUSY) == "580.95.05" and BUSY.boot_id() == boot
    assert BUSY.complete(8000)[0] == 200


# -- branches with their number in the names of their packages, and without it ------------------------


def test_to_a_branch_without_a_number_in_its_names_and_back() -> None:
    options = ("--limit", BUSY.name, "--tags", "nvidia_driver")
    boot = BUSY.boot_id()
    BUSY.run("systemctl stop nim-llama")
    try:
        FLEET.site(*options, inventory=wanted(BUSY, nvidia_driver_branch="590"))
        assert loaded(BUSY) == "590.44.01" and BUSY.boot_id() == boot
        present = packages(BUSY)
        assert re.search(r"(?m)^nvidia-driver-pinning-590 \S+ hi", present), present
        assert re.search(r"(?m)^nvidia-open 590\.44\.01\S* hi", present), present
        assert not re.search(r"(?m)^\S*nvidia\S*-580\S* \S+ .i", present), present
        # Branch 595 is in the same repository under the same names.
        assert "595.45.04" in BUSY.run("apt-cache madison nvidia-open")
        upgrade = BUSY.run("apt-get -s -q --ignore-hold dist-upgrade")
        assert "595.45.04" not in upgrade and not re.search(r"(?m)^Inst \S*nvidia-(open|driver|dkms)", upgrade), upgrade
        assert FLEET.site(*options, inventory=wanted(BUSY, nvidia_driver_branch="590")).changed() == []

        FLEET.site(*options, inventory=wanted(BUSY, nvidia_driver_branch="595"))
        assert loaded(BUSY) == "595.45.04"
        assert "nvidia-driver-pinning-590" not in packages(BUSY)
    finally:
        FLEET.site("--limit", BUSY.name, inventory=wanted(BUSY, nvidia_driver_branch="580"))
    assert loaded(BUSY) == "580.95.05" and BUSY.boot_id() == boot
    assert "nvidia-driver-pinning" not in packages(BUSY)
    assert BUSY.complete(8000)[0] == 200


# -- firmware that accepts signed modules only --------------------------------------------------------


def test_secure_boot_is_found_out_before_anything_is_installed() -> None:
    before = packages(SECURE)
    run = FLEET.site("--limit", SECURE.name, inventory=wanted(SECURE), succeeds=False)
    message = run.failure(SECURE.name)
    assert "Secure Boot is on" in message and "nothing was installed" in message and "mokutil --import" in message
    assert run.changed() == []
    assert packages(SECURE) == before and "nvidia" not in before


def test_a_flavour_that_the_gpu_cannot_take_is_found_out_before_anything_is_installed() -> None:
    before = packages(SECURE)
    run = FLEET.site("--limit", SECURE.name, inventory=wanted(SECURE, nvidia_driver_flavour="open"), succeeds=False)
    message = run.failure(SECURE.name)
    # The variable, what is wrong with its value, and what would do.
    assert "nvidia_driver_flavour = 'open': the Pascal GPU" in message, message
    assert "set nvidia_driver_flavour to auto or proprietary" in message, message
    assert run.changed() == []
    assert packages(SECURE) == before and "nvidia" not in before
