# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Container toolkit: lockstep, registration, mode, CDI, and the container as proof."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import tarfile
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nvidia_container_toolkit as tk
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _packages
from ansible_collections.gpu_fleet.nim.plugins.module_utils._cdi_spec import CDI_SPEC, spec_is_for
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._gpu_smoke_test import build_archive, parse_gpu_list
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nvidia_container_toolkit_planner import HOOK
from ansible_collections.gpu_fleet.nim.plugins.module_utils._os_release import parse_os_release
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from docker_fakes import CONFIG
from toolkit_machine import CONFIG_TOML, DRIVER, LISTED, SPEC, UUIDS, Machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    key = b"\x99" + bytes(40)
    monkeypatch.setattr(_packages, "download", lambda url: key)
    return Machine()


def test_fresh_host(machine: Machine) -> None:
    before = dict(machine.host.files)
    promised = machine.run(True)
    assert machine.host.files == before
    assert machine.containers == 0
    done = machine.run()
    assert [change.what for change in promised.changes] == [change.what for change in done.changes]
    assert max(change.disruption for change in done.changes) is Disruption.RELOAD
    for check in (True, False):
        assert not machine.run(check).changed
    assert {package.version for package in machine.apt.packages.values()} == {"1.20.0-1"}
    assert all(package.held for package in machine.apt.packages.values())
    assert machine.containers == 1
    assert (machine.dockerd.reloads, machine.dockerd.restarts) == (1, 0)
    assert json.loads(machine.host.files[tk.VALIDATION])["gpus"] == list(UUIDS)
    assert not [call for call in machine.host.calls if call[:2] == ("nvidia-ctk", "runtime")]


# -- "could not select device driver": three causes -----------------------------------------------


def test_toolkit_absent(machine: Machine) -> None:
    outcome = machine.run(True)
    (registration,) = (change for change in outcome.changes if change.action == "daemon_file")
    assert "never installed" in registration.why


def test_toolkit_never_registered(machine: Machine) -> None:
    machine.ready()
    machine.host.files[CONFIG] = b'{"live-restore": true}'
    machine.dockerd.live = {"live-restore": True, "runtimes": {}}
    outcome = machine.run()
    assert outcome.changes[0].what == CONFIG
    assert "never registered" in outcome.changes[0].why
    assert outcome.changes[-1].what == "GPU container"
    assert machine.containers == 1
    assert machine.dockerd.restarts == 0


def test_daemon_not_told(machine: Machine) -> None:
    machine.ready()
    machine.dockerd.live = {"live-restore": True, "runtimes": {}}
    outcome = machine.run()
    assert outcome.changes[0].what == "running daemon"
    assert "was not told" in outcome.changes[0].why
    assert (machine.dockerd.reloads, machine.dockerd.restarts) == (1, 0)
    assert machine.dockerd.running["id-other"]["State"]["StartedAt"] == "early"
    assert not machine.run().changed


def test_gpus_flag_needs_a_daemon_that_is_younger_than_the_toolkit(machine: Machine) -> None:
    machine.ready()
    machine.host.files["/proc/stat"] = b"cpu 1\nbtime 1000\n"
    for pid, ticks in ((4242, 100), (4243, 900000)):
        fields = ["S"] + ["0"] * 18 + [str(ticks)] + ["0"] * 5
        machine.host.files["/proc/%d/stat" % pid] = ("%d (dockerd) %s" % (pid, " ".join(fields))).encode()
    machine.host.commands["stat -c %Z *"] = "5000\n"
    assert machine.whats(injection="gpus") == ["GPU driver of the running daemon", "GPU container"]
    assert machine.dockerd.restarts == 1
    assert machine.dockerd.running["id-other"]["State"]["StartedAt"] == "early"
    assert not machine.run(injection="gpus").changed


@pytest.mark.parametrize("missing", [tk.PACKAGES, tk.PACKAGES[:2], tk.PACKAGES[1:2]])
def test_a_hook_that_comes_back_needs_a_younger_daemon(machine: Machine, missing: tuple[str, ...]) -> None:
    """However much of the toolkit is left, and whatever was proved before it went."""
    machine.ready()
    assert machine.whats(injection="gpus") == ["GPU container"]
    for name in missing:
        del machine.apt.packages[name]
    del machine.host.files[HOOK]
    whats = machine.whats(injection="gpus")
    assert whats[-2:] == ["GPU driver of the running daemon", "GPU container"], whats
    assert machine.dockerd.restarts == 1
    assert not machine.run(injection="gpus").changed


def test_a_hook_that_was_deleted_is_put_back_once(machine: Machine) -> None:
    machine.ready()
    machine.run(injection="gpus")
    del machine.host.files[HOOK]
    whats = machine.whats(injection="gpus")
    assert whats == ["package nvidia-container-toolkit", "GPU driver of the running daemon", "GPU container"]
    assert HOOK in machine.host.files
    assert machine.dockerd.restarts == 1
    assert not machine.run(injection="gpus").changed


@pytest.mark.parametrize("left", [(), tk.PACKAGES], ids=["a hook of nobody", "an older version"])
def test_new_packages_without_a_proof_need_a_younger_daemon(machine: Machine, left: tuple[str, ...]) -> None:
    machine.ready()
    for name in tk.PACKAGES:
        if left:
            machine.apt.packages[name] = dataclasses.replace(machine.apt.packages[name], version="1.17.8-1")
        else:
            del machine.apt.packages[name]
    machine.host.files["/proc/stat"] = b"btime 1000\n"
    for pid, ticks in ((4242, 100), (4243, 900000)):
        fields = ["S"] + ["0"] * 18 + [str(ticks)] + ["0"] * 5
        machine.host.files["/proc/%d/stat" % pid] = ("%d (dockerd) %s" % (pid, " ".join(fields))).encode()
    # The hook gets the time of its installation.
    machine.host.commands["stat -c %Z *"] = lambda *_arguments: "5000\n" if len(machine.apt.packages) == 4 else "0\n"
    options = {"injection": "gpus", "smoke_test": False, "version": "1.20.0"}
    assert machine.whats(**options)[-1] == "GPU driver of the running daemon"
    assert machine.dockerd.restarts == 1
    assert not machine.run(**options).changed


def test_gpus_restart_is_refused_without_live_restore(machine: Machine) -> None:
    machine.ready()
    machine.host.files["/proc/stat"] = b"btime 1000\n"
    machine.host.files["/proc/4242/stat"] = b"4242 (dockerd) S " + b"0 " * 18 + b"100 0"
    machine.host.commands["stat -c %Z *"] = "5000\n"
    machine.dockerd.live["live-restore"] = False
    outcome = machine.run(injection="gpus")
    assert "other" in (outcome.blocked[0].blocked or "")
    assert not outcome.changes
    assert machine.dockerd.restarts == machine.containers == 0


# -- packages -------------------------------------------------------------------------------------


def test_skew_is_mended_forwards(machine: Machine) -> None:
    machine.ready("1.17.8-1")
    machine.apt.put("libnvidia-container1", "1.20.0-1", True)
    outcome = machine.run()
    assert "one version" in outcome.changes[0].why
    assert {package.version for package in machine.apt.packages.values()} == {"1.20.0-1"}
    assert all(package.held for package in machine.apt.packages.values())
    assert outcome.changes[-1].what == "GPU container"


def test_skew_with_a_wanted_version(machine: Machine) -> None:
    machine.ready("1.17.8-1")
    machine.apt.put("libnvidia-container1", "1.20.0-1", True)
    machine.run(version="1.17")
    assert {package.version for package in machine.apt.packages.values()} == {"1.17.8-1"}


def test_missing_one_of_four(machine: Machine) -> None:
    machine.ready()
    del machine.apt.packages["libnvidia-container-tools"]
    assert machine.whats()[0] == "package libnvidia-container-tools"


def test_packages_without_their_program(machine: Machine) -> None:
    machine.ready()
    del machine.host.files["/usr/bin/nvidia-container-runtime"]
    changes = machine.run().changes
    assert [change.what for change in changes] == ["package nvidia-container-toolkit-base", "GPU container"]
    assert "nvidia-container-runtime is not there" in changes[0].why
    (call,) = (call for call in machine.host.calls if call[0] == "apt-get" and "install" in call)
    assert "--reinstall" in call
    assert not machine.run().changed


def test_installed_version_is_kept(machine: Machine) -> None:
    machine.ready("1.17.8-1")
    assert not machine.run().changed


def test_newest_that_all_four_have(machine: Machine) -> None:
    machine.apt.offers["libnvidia-container1"] = ["1.17.8-1"]
    machine.run()
    assert {package.version for package in machine.apt.packages.values()} == {"1.17.8-1"}


def test_major_two_is_not_taken(machine: Machine) -> None:
    for offers in machine.apt.offers.values():
        offers.insert(0, "2.0.0-1")
    machine.run()
    assert {package.version for package in machine.apt.packages.values()} == {"1.20.0-1"}


def test_version_that_nobody_offers(machine: Machine) -> None:
    with pytest.raises(FleetError) as caught:
        machine.run(version="1.19.9")
    assert caught.value.reason == "no_suitable_version"
    assert "1.20.0-1, 1.17.8-1" in caught.value.message


def test_broken_hold(machine: Machine) -> None:
    machine.ready()
    machine.apt.put("nvidia-container-toolkit", "1.20.0-1", False)
    assert machine.whats() == ["hold of nvidia-container-toolkit"]
    assert machine.containers == 0
    assert not machine.run().changed


def test_interrupted_installation(machine: Machine) -> None:
    machine.ready()
    machine.apt.put("nvidia-container-toolkit", "1.20.0-1", True, complete=False)
    assert "interrupted" in machine.run().changes[0].why
    assert not machine.run().changed


def test_unreachable_repository(machine: Machine) -> None:
    machine.apt.update = (
        100,
        "",
        "E: Failed to fetch https://nvidia.github.io/x  Could not resolve 'nvidia.github.io'",
    )
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == "repository_unreachable"
    assert "Could not resolve" in caught.value.message
    assert machine.host.files[CONFIG] == b'{"live-restore": true}'
    machine.apt.update = (0, "", "")
    machine.run()
    assert not machine.run().changed


# -- mode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (CONFIG_TOML % "auto", "auto"),
        (CONFIG_TOML.replace("mode =", "#mode =") % "auto", None),
        ("mode = 'cdi'\n" + CONFIG_TOML % "legacy", "legacy"),
        ("[nvidia-container-runtime.modes.cdi]\nmode = 'x'\n", None),
        ("", None),
        (None, None),
    ],
)
def test_mode_in_config_toml(text: str | None, mode: str | None) -> None:
    assert tk.configured_mode(text) == mode


def test_mode_is_said_explicitly_and_proved(machine: Machine) -> None:
    machine.ready()
    assert machine.whats(mode="cdi") == ["%s: mode" % tk.CONFIG, "GPU container"]
    assert not machine.run(mode="cdi").changed
    assert (machine.dockerd.reloads, machine.dockerd.restarts) == (0, 0)


def test_mode_that_the_version_does_not_know(machine: Machine) -> None:
    machine.ready("1.17.8-1")
    with pytest.raises(FleetError, match=r"1\.17\.8"):
        machine.run(mode="jit-cdi")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "fast"}, "mode = fast"),
        ({"injection": "magic"}, "injection = magic"),
        ({"version": "2.0"}, "version = 2.0"),
        ({"version": "newest"}, "version = newest"),
        ({"repository_url": "mirror"}, "repository_url = mirror"),
    ],
)
def test_bad_options(options: dict[str, str], text: str) -> None:
    with pytest.raises(FleetError) as caught:
        tk.NvidiaContainerToolkit(**options)  # type: ignore[arg-type] # texts only
    assert caught.value.reason == "invalid_option"
    assert text in caught.value.message


# -- CDI ------------------------------------------------------------------------------------------


def test_cdi_feature_takes_one_restart(machine: Machine) -> None:
    machine.ready()
    outcome = machine.run(injection="cdi")
    assert [str(change.disruption) for change in outcome.changes] == ["none", "restart_docker", "none"]
    assert (machine.dockerd.reloads, machine.dockerd.restarts) == (0, 1)
    assert json.loads(machine.host.files[CONFIG])["features"] == {"cdi": True}
    (call,) = (call for call in machine.host.calls if call[:2] == ("docker", "run"))
    assert "--device=nvidia.com/gpu=all" in call
    assert not machine.run(injection="cdi").changed


def test_failed_refresh_unit_is_reset(machine: Machine) -> None:
    machine.ready()
    machine.refresh = "failed"
    assert machine.whats() == [CDI_SPEC, "GPU container"]
    assert ("systemctl", "reset-failed", "nvidia-cdi-refresh.service") in machine.host.calls
    assert not machine.run().changed


def test_masked_refresh_units_count_only_where_they_are_needed(machine: Machine) -> None:
    machine.ready()
    masked = "LoadState=masked\nUnitFileState=masked\nActiveState=inactive\n"
    machine.host.commands = {"systemctl show *nvidia-cdi-refresh.path": masked, **machine.host.commands}
    assert not machine.run().changed
    with pytest.raises(FleetError) as caught:
        machine.run(cdi=True)
    assert caught.value.reason == "unit_masked"
    assert "systemctl unmask nvidia-cdi-refresh.path" in caught.value.message


def test_refresh_service_that_is_not_started_at_boot(machine: Machine) -> None:
    machine.ready()
    machine.run(cdi=True)
    state = {"UnitFileState": "disabled"}

    def enable(*_: t.Any) -> str:
        state["UnitFileState"] = "enabled"
        return ""

    machine.host.commands = {
        "systemctl show *nvidia-cdi-refresh.service": lambda *_: (
            "LoadState=loaded\nActiveState=inactive\nUnitFileState=%s\n" % state["UnitFileState"]
        ),
        "systemctl enable nvidia-cdi-refresh.service": enable,
        **machine.host.commands,
    }
    # Where nobody wants a specification, whoever disabled it knows why.
    assert not machine.run().changed
    (change,) = machine.run(cdi=True).changes
    assert (change.what, change.before, change.after) == ("nvidia-cdi-refresh.service", "disabled", "enabled")
    assert not machine.run(cdi=True).changed


def test_specification_of_an_older_driver(machine: Machine) -> None:
    machine.ready()
    machine.host.files[CDI_SPEC] = (SPEC % "570.1").encode()
    (change, dummy) = machine.run().changes
    assert DRIVER in change.why
    assert not machine.run().changed


@pytest.mark.parametrize(
    ("version", "spec", "goes"), [("1.20.0-1", DRIVER, True), ("1.17.8-1", "570.1", True), ("1.17.8-1", DRIVER, False)]
)
def test_specification_made_by_hand(machine: Machine, version: str, spec: str, goes: bool) -> None:
    machine.ready(version)
    machine.host.files[tk.STATIC_CDI_SPEC] = (SPEC % spec).encode()
    machine.run()
    assert (tk.STATIC_CDI_SPEC not in machine.host.files) is goes
    assert not machine.run().changed


def test_specification_of_another_vendor_stays(machine: Machine) -> None:
    machine.ready()
    machine.host.files[tk.STATIC_CDI_SPEC] = b"kind: example.com/gpu\n"
    assert not machine.run().changed


def test_real_specification(fixtures: pathlib.Path) -> None:
    text = (fixtures / "cdi-h200-x2.yaml").read_text()
    assert spec_is_for(text, "580.159.04")
    assert not spec_is_for(text, "580.159")
    assert not spec_is_for(text, "580.95.05")


# -- proof ----------------------------------------------------------------------------------------


def test_proof_is_repeated_when_the_driver_changes(machine: Machine) -> None:
    machine.ready()
    machine.host.files["/sys/module/nvidia/version"] = b"580.126.09\n"
    machine.host.files[CDI_SPEC] = (SPEC % "580.126.09").encode()
    assert machine.whats() == ["GPU container"]
    assert not machine.run().changed
    assert machine.containers == 1


def test_no_proof_without_a_driver_or_a_docker(machine: Machine) -> None:
    machine.ready()
    del machine.host.files[tk.VALIDATION]
    del machine.host.files["/sys/module/nvidia/version"]
    assert not machine.run().changed
    machine.host.files["/sys/module/nvidia/version"] = DRIVER.encode()
    machine.dockerd.active = False
    assert not machine.run().changed
    machine.dockerd.active = True
    assert not machine.run(smoke_test=False).changed
    assert machine.whats() == ["GPU container"]


def test_container_sees_other_gpus(machine: Machine) -> None:
    machine.ready()
    machine.host.remove(tk.VALIDATION)
    machine.container = lambda argv: (0, LISTED.splitlines()[0], "")
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == "gpu_container_differs"
    assert UUIDS[1] in caught.value.message
    assert tk.VALIDATION not in machine.host.files


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
            "daemon_without_gpu_driver",
        ),
        (
            "docker: Error response from daemon: unknown or invalid runtime name: nvidia.\nSee 'docker run --help'.",
            "runtime_not_registered",
        ),
        (
            "nvidia-container-cli: initialization error: nvml error: driver/library version mismatch: unknown.",
            "driver_mismatch",
        ),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95", "driver_mismatch"),
        (
            "docker: Error response from daemon: CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all",
            "cdi_spec_missing",
        ),
        (
            "nvidia-container-cli: initialization error: load library failed: libnvidia-ml.so.1: cannot open shared object file",
            "driver_libraries_missing",
        ),
        ("nvidia-container-cli: initialization error: nvml error: driver not loaded: unknown", "driver_not_loaded"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "driver_not_loaded"),
        ("Failed to initialize NVML: Unknown Error", "devices_denied"),
        ('exec: "nvidia-smi": executable file not found in $PATH: unknown.', "nothing_injected"),
        ("fork/exec /usr/bin/nvidia-container-runtime: no such file or directory: unknown.", "runtime_program_missing"),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "docker_unavailable"),
        ("something new", "gpu_container_failed"),
    ],
)
def test_failures_are_explained(machine: Machine, output: str, reason: str) -> None:
    machine.ready()
    machine.host.remove(tk.VALIDATION)
    machine.container = lambda argv: (125, "", output)
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == reason
    assert "--runtime=nvidia" in caught.value.message
    # nothing is left behind, and the next run tries again
    assert ("docker", "rm", "--force", "gpu-fleet-smoke-test") in machine.host.calls
    assert not [path for path in machine.host.files if "smoke" in path]
    assert machine.whats(check=True) == ["GPU container"]


def test_smoke_test_finds_nvidia_smi_behind_a_link(machine: Machine) -> None:
    # As on Debian: the toolkit mounts the program where it really is.
    machine.host.links["/usr/bin/nvidia-smi"] = "/etc/alternatives/nvidia--nvidia-smi"
    machine.host.links["/etc/alternatives/nvidia--nvidia-smi"] = "../../usr/lib/nvidia/current/nvidia-smi"
    machine.run()
    change = next(call for call in machine.host.calls if call[:2] == ("docker", "import"))[3]
    assert change.startswith("ENV PATH=/usr/bin:/usr/lib/nvidia/current:/usr/local/sbin:")


def test_host_that_cannot_list_its_gpus(machine: Machine) -> None:
    machine.ready()
    machine.host.remove(tk.VALIDATION)
    machine.host.commands["/usr/bin/nvidia-smi -L"] = (
        18,
        "Failed to initialize NVML: Driver/library version mismatch\n",
        "",
    )
    with pytest.raises(FleetError) as caught:
        machine.run()
    assert caught.value.reason == "driver_mismatch"
    assert "on the host" in caught.value.message
    assert machine.containers == 0


def test_broken_record_counts_for_nothing(machine: Machine) -> None:
    machine.ready()
    machine.host.files[tk.VALIDATION] = b'{"key": '
    assert machine.whats() == ["GPU container"]


def test_image_holds_a_shell_and_libraries_only(machine: Machine) -> None:
    machine.host.files["/lib/libm.so.6"] = b"\x7fELF m"
    archive = build_archive(machine.host, ["/bin/sh", "/usr/bin/nvidia-smi"])
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        files = sorted("/" + entry.name for entry in content if entry.isfile())
        assert {"etc", "proc", "tmp", "usr/bin", "lib"} <= {entry.name for entry in content if entry.isdir()}
    assert files == ["/bin/sh", "/lib/libc.so.6", "/lib/libm.so.6"]
    assert archive == build_archive(machine.host, ["/bin/sh", "/usr/bin/nvidia-smi"])


def test_gpu_list_with_mig() -> None:
    text = LISTED.splitlines()[0] + "\n  MIG 1g.18gb Device 0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)\n"
    assert parse_gpu_list(text) == (UUIDS[0], "MIG-c7384736-a75d-5afc-978f-d2f1294409fd")
    assert parse_gpu_list("No devices found.\n") == ()


def test_broken_daemon_json_is_left_alone(machine: Machine) -> None:
    machine.ready()
    machine.host.files[CONFIG] = b"{,}"
    with pytest.raises(FleetError) as caught:
        machine.run(version="1.17")
    assert caught.value.reason == "daemon_json_invalid"
    assert machine.host.files[CONFIG] == b"{,}"
    assert machine.apt.packages["libnvidia-container1"].version == "1.20.0-1"


def test_default_runtime(machine: Machine) -> None:
    machine.ready()
    machine.run(default_runtime=True)
    assert machine.dockerd.live["default-runtime"] == "nvidia"
    assert machine.dockerd.restarts == 0


def test_rpm_repository() -> None:
    resource = tk.NvidiaContainerToolkit(repository_url="https://mirror.example.org/x/")
    repository = resource.repository(parse_os_release('ID=rocky\nVERSION_ID="9.4"'), "aarch64")
    assert repository.url == "https://mirror.example.org/x/stable/rpm/aarch64"
    assert repository.key_url == "https://mirror.example.org/x/gpgkey"
