# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans of the services of a host for every kind of change, and what is done for them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import typing as t

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _module, _nim_service
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._ngc_key import fingerprint
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import (
    KEY_FILE,
    MAINTENANCE_FILE,
    UNIT_DIRECTORY,
    WRAPPER,
)
from ansible_collections.gpu_fleet.nim.plugins.module_utils._options import NIM_MODEL_OPTIONS
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption
from ansible_collections.gpu_fleet.nim.plugins.modules import nim_service
from nim_machine import (
    DIGEST,
    KEY,
    LLAMA,
    NEMO,
    ONE,
    ROOT,
    ZERO,
    Machine,
    calls,
    failure,
    llama,
    nemo,
    summary,
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# -- the first run and the second -----------------------------------------------------------------


def test_first_run_then_nothing(machine: Machine) -> None:
    outcome = machine.converge(llama(), nemo(), key=KEY)
    assert machine.reloads == 1
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service nim-nemo.service"]
    assert machine.enabled == {"nim.target", "nim-llama.service", "nim-nemo.service"}
    assert machine.host.modes["/var/lib/nim/cache/llama"] == (0o750, 1000, 1000)
    assert machine.host.modes[KEY_FILE] == (0o600, 0, 0)
    assert machine.host.modes["/etc/nim/llama.json"] == (0o644, 0, 0)
    assert machine.host.modes[WRAPPER] == (0o755, 0, 0)
    assert max(change.disruption for change in outcome.changes) == Disruption.RELOAD
    assert [service["gpus"] for service in machine.answer["services"]] == [[ZERO], [ONE]]
    assert machine.answer["services"][1] | {"spec": ""} == {
        "name": "nemo",
        "unit": "nim-nemo.service",
        "container": "nim-nemo",
        "image": NEMO,
        "digest": DIGEST,
        "gpus": [ONE],
        "port": 8001,
        "spec": "",
        "state": "started",
        "url": "http://127.0.0.1:8001",
    }
    assert machine.converge(llama(), nemo(), key=KEY).changes == []
    # The order of the list moves nobody.
    assert machine.converge(nemo(), llama(), key=KEY).changes == []


def test_the_key_is_nowhere_but_in_its_file(machine: Machine) -> None:
    outcome = machine.converge(llama(), nemo(), key=KEY)
    for path, content in machine.host.files.items():
        assert (KEY.encode() in content) == (path == KEY_FILE), path
    assert KEY not in repr(machine.host.calls)
    assert KEY not in json.dumps([change.as_dict() for change in outcome.changes])
    assert KEY not in repr([change.diff for change in outcome.changes])
    assert fingerprint(KEY) in json.dumps([change.as_dict() for change in outcome.changes])


# -- changes --------------------------------------------------------------------------------------


def test_a_change_of_one_model_restarts_that_one_only(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.host.calls.clear()
    outcome = machine.converge(llama(environment={"NIM_LOG_LEVEL": "DEBUG"}), nemo())
    assert summary(outcome.changes) == [("/etc/nim/llama.json", "as wanted"), ("nim-llama.service", "restarted")]
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]
    assert calls(machine, "daemon-reload") == []


def test_secret_variables_are_nowhere_but_in_their_file(machine: Machine) -> None:
    secret = {"HF_TOKEN": "hf_unit_secret", "PIN": 471108154711}
    outcome = machine.converge(llama(secret_environment=secret), nemo(), key=KEY)
    path = "/etc/nim/llama.env"
    assert machine.host.files[path].decode().splitlines()[2:] == ["HF_TOKEN=hf_unit_secret", "PIN=471108154711"]
    assert machine.host.modes[path] == (0o600, 0, 0)
    for name, content in machine.host.files.items():
        assert (b"hf_unit_secret" in content) == (name == path), name
    assert "/etc/nim/nemo.env" not in machine.host.files
    printed = json.dumps([change.as_dict() for change in outcome.changes]) + repr([c.diff for c in outcome.changes])
    printed += repr(machine.host.calls) + repr(machine.resource(llama(secret_environment=secret)).observe(machine.host))
    assert "hf_unit_secret" not in printed and "471108154711" not in printed
    (change,) = [change for change in outcome.changes if change.what == path]
    # A fingerprint with a random key that is new tells nothing, and would be another one in the plan.
    assert change.after == "HF_TOKEN, PIN"
    assert json.loads(machine.host.files["/etc/nim/llama.json"])["secret_environment"] == ["HF_TOKEN", "PIN"]
    assert machine.converge(llama(secret_environment=secret), nemo(), key=KEY).changes == []


def test_another_secret_restarts_its_model_only_and_without_any_the_file_goes(machine: Machine) -> None:
    machine.converge(llama(secret_environment={"T": "one"}), nemo())
    spec = json.loads(machine.host.files["/etc/nim/llama.json"])["spec"]
    machine.host.calls.clear()
    outcome = machine.converge(llama(secret_environment={"T": "two"}), nemo())
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]
    (change,) = [change for change in outcome.changes if change.what == "/etc/nim/llama.env"]
    assert change.before != change.after and str(change.before).startswith("T hmac:")
    machine.host.calls.clear()
    machine.converge(llama(secret_environment={"T": "one"}), nemo())
    assert json.loads(machine.host.files["/etc/nim/llama.json"])["spec"] == spec
    machine.host.calls.clear()
    machine.converge(llama(), nemo())
    assert "/etc/nim/llama.env" not in machine.host.files
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]
    assert machine.converge(llama(), nemo()).changes == []


def test_a_secret_file_that_somebody_changed_is_put_right(machine: Machine) -> None:
    path = "/etc/nim/llama.env"
    wanted = llama(secret_environment={"T": "one"})
    machine.converge(wanted)
    text = machine.host.files[path]
    machine.host.calls.clear()
    machine.host.files[path] = text.replace(b"T=one", b"T=other")
    assert summary(machine.converge(wanted).changes)[0][0] == path
    machine.host.modes[path] = (0o644, 0, 0)
    (change,) = machine.converge(wanted).changes
    assert "others than root" in change.why
    assert machine.host.files[path] == text and machine.host.modes[path] == (0o600, 0, 0)
    # What runs was created with the right values.
    assert calls(machine, "restart") == []
    # Without its key nothing proves what the container was given.
    machine.host.files[path] = b"T=one\n"
    machine.converge(wanted)
    assert calls(machine, "restart") == ["systemctl restart nim-llama.service"]


def test_a_secret_file_that_is_gone(machine: Machine) -> None:
    path = "/etc/nim/llama.env"
    wanted = llama(secret_environment={"T": "one=1", "U": "2"})

    def runs(**variables: str) -> None:
        create = json.loads(machine.host.files["/etc/nim/llama.json"])["create"]
        labels = dict(word[len("--label=") :].split("=", 1) for word in create if word.startswith("--label="))
        variables.update(word[len("--env=") :].split("=", 1) for word in create if word.startswith("--env="))
        entries = ["%s=%s" % pair for pair in variables.items()]
        machine.api.inspected["nim-llama"] = {"Config": {"Labels": labels, "Env": entries}}

    machine.converge(wanted)
    configuration = machine.host.files["/etc/nim/llama.json"]
    runs(T="one=1", U="2")
    # The container has what is wanted: twice, because the key that was lost first is not the one that is lost then.
    for _time in range(2):
        del machine.host.files[path]
        (change,) = machine.plan(wanted)
        assert (change.what, change.before, change.after, change.disruption) == (path, None, "T, U", Disruption.NONE)
        machine.host.calls.clear()
        assert len(machine.converge(wanted).changes) == 1
        assert calls(machine, "restart") == []
        assert b"T=one=1\nU=2\n" in machine.host.files[path]
        assert machine.host.files["/etc/nim/llama.json"] == configuration
        assert machine.plan(wanted) == []
    # Other values are other values, with the old key or a new one.
    other = llama(secret_environment={"T": "two", "U": "2"})
    assert any(change.disruption is Disruption.RESTART_NIM for change in machine.plan(other))
    del machine.host.files[path]
    assert any(change.disruption is Disruption.RESTART_NIM for change in machine.plan(other))
    # So they are where the container does not have them, or does not tell.
    for variables in ({"T": "one=1"}, {"T": "two", "U": "2"}):
        runs(**variables)
        assert any(change.disruption is Disruption.RESTART_NIM for change in machine.plan(wanted))
    machine.api.inspected.clear()
    assert any(change.disruption is Disruption.RESTART_NIM for change in machine.plan(wanted))


def test_absent_removes_secrets(machine: Machine) -> None:
    machine.converge(llama(secret_environment={"T": "one"}))
    machine.converge(llama(secret_environment={"T": "one"}, state="absent"))
    assert [path for path in machine.host.files if "llama" in path] == []


def test_timeouts_change_files_and_restart_nothing(machine: Machine) -> None:
    machine.converge(llama())
    outcome = machine.converge(llama(start_timeout=60, stop_timeout=90))
    assert [change.action for change in outcome.changes] == ["file", "file", "daemon_reload"]


def test_a_new_key_restarts_nothing_that_runs(machine: Machine) -> None:
    machine.converge(llama(), key=KEY)
    outcome = machine.converge(llama(), key=KEY + "2")
    assert [(change.what, change.before, change.after) for change in outcome.changes] == [
        (KEY_FILE, fingerprint(KEY), fingerprint(KEY + "2"))
    ]
    assert machine.host.files[KEY_FILE] == b"NGC_API_KEY=%s2\n" % KEY.encode()
    assert machine.converge(llama()).changes == []


def test_a_key_that_could_be_guessed_has_no_fingerprint(machine: Machine) -> None:
    machine.converge(llama(), key="password")
    (change,) = machine.converge(llama(), key="hunter22").changes
    assert (change.before, change.after) == ("a key", "the key that is given")
    assert machine.host.files[KEY_FILE] == b"NGC_API_KEY=hunter22\n"


def test_a_new_key_lets_a_failing_start_try_again_at_once(machine: Machine) -> None:
    machine.converge(llama(), key=KEY)
    spec = json.loads(machine.host.files["/etc/nim/llama.json"])["spec"]
    machine.api.list["nim-llama"]["State"] = "exited"
    machine.host.files["/run/nim/llama.json"] = json.dumps({"spec": spec, "failures": 2}).encode()
    assert machine.plan(llama(), key=KEY) == []
    assert [change.action for change in machine.plan(llama(), key=KEY + "2")] == ["key", "restart"]


def test_a_key_that_others_could_read_is_put_right_and_an_unwanted_one_removed(machine: Machine) -> None:
    machine.converge(llama(), key=KEY)
    machine.host.modes[KEY_FILE] = (0o644, 0, 0)
    outcome = machine.converge(llama(), key=KEY)
    assert outcome.changes[0].why == "the file could be read by others than root"
    assert machine.host.modes[KEY_FILE] == (0o600, 0, 0)
    machine.converge(llama(), key_state="absent")
    assert KEY_FILE not in machine.host.files


@pytest.mark.parametrize("key", ["nvapi-a b c d", "nvapi-0123456\n", "nvapi-käse-und-brot"])
def test_a_key_that_cannot_be_one(machine: Machine, key: str) -> None:
    with pytest.raises(FleetError, match=r"ngc_api_key = .not shown.") as caught:
        machine.resource(llama(), key=key)
    assert key not in caught.value.message


@pytest.mark.parametrize("active", ["failed", "inactive"])
def test_a_dead_unit_is_started_and_its_failures_forgotten(machine: Machine, active: str) -> None:
    machine.converge(llama())
    machine.active["nim-llama.service"] = active
    machine.api.list["nim-llama"]["State"] = "exited"
    machine.host.calls.clear()
    outcome = machine.converge(llama())
    assert [(change.what, change.after, change.disruption) for change in outcome.changes] == [
        ("nim-llama.service", "started", Disruption.NONE)
    ]
    verbs = [argv[1] for argv in machine.host.calls if argv[0] == "systemctl"]
    assert verbs.index("reset-failed") < verbs.index("restart")


def test_a_container_that_goes_on_without_its_unit_is_adopted(machine: Machine) -> None:
    machine.converge(llama())
    machine.active["nim-llama.service"] = "inactive"
    (change,) = machine.plan(llama())
    assert (change.after, change.disruption) == ("started", Disruption.NONE)


def test_a_unit_that_is_on_its_way_is_left_alone(machine: Machine) -> None:
    machine.converge(llama())
    del machine.api.list["nim-llama"]
    assert machine.plan(llama()) == []
    machine.host.files["/run/nim/llama.json"] = b'{"spec": "another"}'
    assert [change.after for change in machine.plan(llama())] == ["restarted"]


def test_stopped(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    outcome = machine.converge(llama(state="stopped"), nemo())
    assert ("nim-llama.service", "stopped") in summary(outcome.changes)
    assert ("nim-llama.service", "disabled") in summary(outcome.changes)
    assert outcome.changes[0].disruption == Disruption.RESTART_NIM
    assert machine.api.list["nim-llama"]["State"] == "exited"
    assert machine.answer["services"][0]["state"] == "stopped"
    assert machine.converge(llama(state="stopped"), nemo()).changes == []


def test_stop_looks_at_docker_too(machine: Machine) -> None:
    machine.converge(llama())
    machine.active["nim-llama.service"] = "inactive"
    machine.converge(llama(state="stopped"))
    assert ("docker", "stop", "-t", "60", "nim-llama") in machine.host.calls
    machine.api.put("nim-llama-download", "x")
    assert [change.after for change in machine.plan(llama(state="stopped"))] == ["stopped"]


def test_absent_removes_everything_but_the_cache(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.converge(llama(state="absent"), nemo())
    assert not [path for path in machine.host.files if "llama" in path]
    assert "nim-llama" not in machine.api.list
    assert "/var/lib/nim/cache/llama" in machine.host.dirs
    assert machine.converge(llama(state="absent"), nemo()).changes == []
    machine.api.up = False
    assert machine.plan(llama(state="absent")) == []


def test_remove_all_leaves_nothing_but_caches(machine: Machine) -> None:
    before = set(machine.host.files)
    machine.converge(llama(), nemo(), key=KEY)
    outcome = machine.converge(remove_all=True)
    assert [change.what for change in outcome.changes if change.action == "stop"] == [
        "nim-llama.service",
        "nim-nemo.service",
    ]
    assert set(machine.host.files) == before
    assert machine.api.list == {}
    assert "/var/lib/nim/cache/llama" in machine.host.dirs
    assert machine.enabled == set()
    assert machine.converge(remove_all=True).changes == []
    assert machine.answer["services"] == machine.answer["orphans"] == []


def test_services_outside_the_list_are_reported_and_keep_their_gpus(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    assert machine.converge(nemo()).changes == []
    (orphan,) = machine.answer["orphans"]
    assert orphan == {"name": "llama", "unit": "nim-llama.service", "gpus": [ZERO], "state": "started"}
    assert "left alone: llama" in machine.answer["warnings"][0]
    error = failure(machine, nemo(gpus=2))
    assert error.reason == "gpus_unavailable"
    assert "llama (not in the list)" in error.message


def test_a_hand_edited_unit_is_written_again(machine: Machine) -> None:
    machine.converge(llama())
    machine.host.files[UNIT_DIRECTORY + "/nim-llama.service"] += b"User=nobody\n"
    assert [change.action for change in machine.plan(llama())] == ["file", "daemon_reload"]
    machine.host.files[UNIT_DIRECTORY + "/nim-llama.service"] = machine.host.files[UNIT_DIRECTORY + "/nim.target"]
    machine.enabled.clear()
    assert [change.action for change in machine.plan(llama())] == ["file", "enable", "enable", "daemon_reload"]


def test_maintenance_blocks_starts_and_nothing_else(machine: Machine) -> None:
    machine.host.files[MAINTENANCE_FILE] = b""
    outcome = machine.converge(llama())
    assert [change.what for change in outcome.blocked] == ["nim-llama.service"]
    assert "under maintenance" in outcome.blocked[0].blocked
    assert calls(machine, "restart") == []
    assert machine.answer["services"][0]["state"] == "maintenance"


def test_under_maintenance_nothing_that_a_start_needs_is_asked(machine: Machine) -> None:
    machine.listen(8000, 977, "nginx")
    assert failure(machine, llama()).reason == "port_in_use"
    machine.host.files[MAINTENANCE_FILE] = b""
    outcome = machine.converge(llama())
    assert [change.what for change in outcome.blocked] == ["nim-llama.service"]
    assert "/etc/nim/llama.json" in machine.host.files
    del machine.host.files[MAINTENANCE_FILE]
    assert failure(machine, llama()).reason == "port_in_use"


def test_a_start_that_systemd_gives_up_is_an_error_with_the_reason(machine: Machine) -> None:
    machine.fails.add("nim-llama.service")
    error = failure(machine, llama())
    assert error.reason == "start_failed"
    assert "Cannot start nim-llama: docker create: unknown flag" in error.message


def test_a_file_in_the_place_of_a_directory(machine: Machine) -> None:
    machine.host.files["/srv/cache"] = b""
    machine.host.modes["/srv/cache"] = (0o644, 1000, 1000)
    assert failure(machine, llama(cache_directory="/srv/cache")).reason == "not_a_directory"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ((0o777, 1000, 1000), (0o755, 1000, 1000)),
        ((0o750, 0, 0), (0o750, 1000, 1000)),
        ((0o700, 1000, 50), None),
        ((0o775, 1000, 1000), None),
    ],
)
def test_the_cache_belongs_to_the_container(
    machine: Machine, found: tuple[int, int, int], wanted: tuple[int, int, int] | None
) -> None:
    machine.host.dirs.add("/srv/cache")
    machine.host.modes["/srv/cache"] = found
    machine.converge(llama(cache_directory="/srv/cache"))
    assert machine.host.modes["/srv/cache"] == (wanted or found)


def test_containers_that_a_daemon_reload_endangers_are_named_and_looked_at(machine: Machine) -> None:
    machine.api.put("trainer")
    machine.api.host_config["trainer"] = {"DeviceRequests": [{"Driver": "", "Capabilities": [["gpu"]]}]}
    machine.host.commands["docker exec *"] = (1, "", "Failed to initialize NVML: Unknown Error")
    outcome = machine.converge(llama())
    (change,) = [change for change in outcome.changes if change.action == "daemon_reload"]
    assert "may lose their GPUs by it: trainer" in change.why
    assert "Container trainer has lost its GPUs" in machine.answer["warnings"][0]


def test_module_role_and_models_say_the_same() -> None:
    """One source: the argument specification; module documentation and role follow it."""
    wanted = {name: dict(option) for name, option in NIM_MODEL_OPTIONS.items()}
    tree = ast.parse((ROOT / "plugins/modules/nim_service.py").read_text())
    (text,) = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DOCUMENTATION"
    ]
    documented = yaml.safe_load(text)["options"]["models"]["suboptions"]
    role = yaml.safe_load((ROOT / "roles/nim/meta/argument_specs.yml").read_text())
    role_options = role["argument_specs"]["main"]["options"]["nim_models"]["options"]
    for given in (documented, role_options):
        assert list(given) == list(wanted)
        for name, option in given.items():
            assert option.pop("description")
            expected = dict(wanted[name])
            # No key of the documentation, and in a role it breaks values encrypted with Vault (ansible-core 2.18).
            expected.pop("no_log", None)
            assert option == expected, name


def module_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: bool, **options: t.Any
) -> dict[str, t.Any]:
    """Run the module as Ansible does, on the machine in memory."""
    monkeypatch.setattr(_nim_service, "DockerApi", lambda: machine.api)
    monkeypatch.setattr(_module, "Host", lambda: machine.host)
    arguments = {"_ansible_check_mode": check, "_ansible_diff": True, **options}
    with patch_module_args(arguments), pytest.raises(SystemExit):
        nim_service.main()
    printed = capsys.readouterr().out
    assert KEY not in printed
    return t.cast("dict[str, t.Any]", json.loads(printed))


def test_module_check_real_check_real(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = functools.partial(module_run, machine, monkeypatch, capsys, models=[llama(), nemo()], ngc_api_key=KEY)
    check_1 = run(check=True)
    assert "/etc/nim/llama.json" not in machine.host.files
    real_1, check_2, real_2 = run(check=False), run(check=True), run(check=False)
    machine.listen(8002, 977, "nginx")
    moved = [llama(port=8002), nemo()]
    held = module_run(machine, monkeypatch, capsys, True, models=moved)
    bad = module_run(machine, monkeypatch, capsys, False, models=[llama(), llama(port=1)])
    assert [answer["changed"] for answer in (check_1, real_1, check_2, real_2)] == [True, True, False, False]
    assert check_1["diff"] == real_1["diff"]
    assert check_1["changes"] == real_1["changes"]
    assert check_2["diff"] == real_2["diff"] == []
    assert real_1["diff"][-1]["after"].splitlines()[-2:] == ["nim-nemo.service: started", "nim.target: active"]
    assert KEY_FILE + ": " + fingerprint(KEY) in real_1["diff"][-1]["after"]
    assert [service["state"] for service in check_1["services"]] == ["absent", "absent"]
    assert [service["state"] for service in real_2["services"]] == ["started", "started"]
    assert (held["failed"], held["reason"], held["changed"]) == (True, "port_in_use", False)
    assert "nginx (pid 977)" in held["msg"]
    assert (bad["reason"], bad["changed"]) == ("invalid_option", False)
    assert "models[1].name = 'llama'" in bad["msg"]


@pytest.mark.parametrize("given", [{"T": 'hunter "secret\\'}, "T=hunter-text"])
def test_module_never_prints_secret_variables(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: t.Any
) -> None:
    models = [llama(secret_environment=given), nemo()]
    logged: list[str] = []
    monkeypatch.setattr(
        "ansible.module_utils.basic.AnsibleModule.log",
        lambda self, *given, **named: logged.append(repr((given, named))),
    )
    for check in (True, False):
        answer = module_run(machine, monkeypatch, capsys, check, models=models)
        assert answer["changed"], answer
        assert "hunter" not in json.dumps(answer), answer
    assert b"hunter" in machine.host.files["/etc/nim/llama.env"]
    assert "hunter" not in "".join(logged)


def test_plan_is_pure(machine: Machine) -> None:
    resource = machine.resource(llama(), nemo(), key=KEY)
    state = resource.observe(machine.host)
    before = dict(machine.host.files), list(machine.host.calls)
    first = resource.plan(state)
    assert first == resource.plan(dataclasses.replace(state))
    assert (dict(machine.host.files), list(machine.host.calls)) == before


# -- what somebody did by hand --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "mode", "reloads"),
    [
        (WRAPPER, (0o644, 0, 0), 0),
        (WRAPPER, (0o777, 0, 0), 0),
        (WRAPPER, (0o755, 1000, 0), 0),
        ("/etc/nim/llama.json", (0o666, 0, 0), 0),
        (UNIT_DIRECTORY + "/nim-llama.service", (0o664, 0, 0), 1),
        (UNIT_DIRECTORY + "/nim.target", (0o644, 1000, 1000), 1),
    ],
)
def test_a_file_that_others_may_write_or_nobody_run(
    machine: Machine, path: str, mode: tuple[int, int, int], reloads: int
) -> None:
    machine.converge(llama())
    machine.host.modes[path] = mode
    before = machine.reloads
    changes = machine.converge(llama()).changes
    assert changes[0].what == path
    assert changes[0].before == "%04o owner %d:%d" % mode
    assert [change.what for change in changes[1:]] == ["systemd"] * reloads
    assert machine.reloads - before == reloads
    assert machine.plan(llama()) == []


def test_a_file_that_others_may_not_read_is_the_operators_affair(machine: Machine) -> None:
    machine.converge(llama())
    machine.host.modes["/etc/nim/llama.json"] = (0o600, 0, 0)
    machine.host.modes[WRAPPER] = (0o700, 0, 0)
    assert machine.plan(llama()) == []


def test_a_paused_container_is_woken(machine: Machine) -> None:
    machine.converge(llama())
    machine.api.list["nim-llama"]["State"] = "paused"
    (change,) = machine.converge(llama()).changes
    assert (change.what, change.before, change.after) == ("nim-llama.service", "paused", "running")
    assert change.disruption is Disruption.NONE
    assert machine.plan(llama()) == []


def test_dockers_restart_policy_is_taken_away_without_a_restart(machine: Machine) -> None:
    machine.converge(llama())
    machine.api.host_config["nim-llama"] = {"RestartPolicy": {"Name": "always"}}
    (change,) = machine.converge(llama()).changes
    assert (change.what, change.before) == ("restart policy of container nim-llama", "always")
    assert change.disruption is Disruption.NONE
    assert machine.plan(llama()) == []


def test_a_container_that_was_made_again_with_its_label(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    machine.api.inspected["nim-llama"] = {"Config": {"Env": ["NIM_LOG_LEVEL=DEBUG"]}}
    (change,) = machine.plan(llama(), nemo())
    assert (change.what, change.after, change.disruption) == (
        "nim-llama.service",
        "restarted",
        Disruption.RESTART_NIM,
    )
    assert "variable NIM_LOG_LEVEL" in change.why
    assert "DEBUG" not in str(change)


def test_a_service_that_got_the_key_through_its_pipe(machine: Machine) -> None:
    del machine.api.images[LLAMA]["Config"]["Labels"]
    machine.converge(llama(), key=KEY)
    pipe = {"Type": "bind", "Source": "/run/nim/keys/llama", "Target": "/run/secrets/ngc_api_key", "ReadOnly": True}
    cache = {"Type": "bind", "Source": "/var/lib/nim/cache/llama", "Target": "/opt/nim/.cache"}
    image = {"Image": machine.api.images[LLAMA]["RepoDigests"][0]}
    # Without a key the same service has no pipe.
    for mounts in ([cache, pipe], [cache]):
        machine.api.inspected["nim-llama"] = {"Config": image, "HostConfig": {"Mounts": mounts}}
        assert machine.plan(llama(), key=KEY) == []
    for mount in (dict(pipe, Source="/root/key"), dict(pipe, Target="/run/secrets/other")):
        machine.api.inspected["nim-llama"] = {"Config": image, "HostConfig": {"Mounts": [cache, mount]}}
        (change,) = machine.plan(llama(), key=KEY)
        assert "mounts" in change.why
    # A service that fetches its files before it starts never gets it.
    machine.api.images[LLAMA]["Config"]["Labels"] = {"com.nvidia.nim.version": "1.8.4"}
    machine.api.inspected.clear()
    machine.converge(llama(), key=KEY)
    machine.api.inspected["nim-llama"] = {"Config": image, "HostConfig": {"Mounts": [cache, pipe]}}
    (change,) = machine.plan(llama(), key=KEY)
    assert "mounts" in change.why


def test_a_container_of_somebody_in_the_place_of_a_stopped_service_is_stopped_first(machine: Machine) -> None:
    machine.converge(llama(stop_timeout=7))
    machine.stop(machine.host, ("systemctl", "stop", "nim-llama.service"))
    machine.api.put("nim-llama", "")
    (change,) = machine.converge(llama(stop_timeout=7)).changes
    assert (change.what, change.disruption) == ("nim-llama.service", Disruption.RESTART_NIM)
    assert ("docker", "stop", "-t", "7", "nim-llama") in machine.host.calls
    assert machine.plan(llama(stop_timeout=7)) == []


def test_a_service_that_serves_no_more_is_restarted(machine: Machine) -> None:
    machine.converge(llama(), nemo())
    spec = json.loads(machine.host.files["/run/nim/llama.json"])["spec"]
    machine.silence = "it was ready, and nobody has listened on its port for 15 seconds"
    # It has not been ready yet: that is for nim_health to wait for.
    assert machine.plan(llama(), nemo()) == []
    machine.host.files["/run/nim/llama.json"] = json.dumps({"spec": spec, "phase": "ready"}).encode()
    (change,) = machine.plan(llama(), nemo())
    assert (change.what, change.disruption) == ("nim-llama.service", Disruption.RESTART_NIM)
    assert change.why == machine.silence
    machine.silence = ""
    assert machine.plan(llama(), nemo()) == []


def test_a_container_that_is_gone_while_its_unit_believes_in_it(machine: Machine) -> None:
    machine.converge(llama())
    spec = json.loads(machine.host.files["/run/nim/llama.json"])["spec"]
    machine.host.files["/run/nim/llama.json"] = json.dumps({"spec": spec, "phase": "ready"}).encode()
    machine.docker_rm(machine.host, ("nim-llama",))
    (change,) = machine.converge(llama()).changes
    assert (change.what, change.why) == ("nim-llama.service", "its container is gone")


def test_a_container_that_has_ended_while_its_unit_hangs(machine: Machine) -> None:
    machine.converge(llama())
    spec = json.loads(machine.host.files["/run/nim/llama.json"])["spec"]
    machine.host.files["/run/nim/llama.json"] = json.dumps({"spec": spec, "phase": "ready"}).encode()
    machine.api.list["nim-llama"]["State"] = "exited"
    (change,) = machine.plan(llama())
    assert (change.what, change.why) == ("nim-llama.service", "its container has ended, which its unit has not seen")
    assert change.disruption is Disruption.NONE
    # Whoever has seen it is about to start another one.
    machine.host.files["/run/nim/llama.json"] = json.dumps({"spec": spec, "phase": "ended"}).encode()
    assert machine.plan(llama()) == []


def test_files_of_others_in_the_cache(machine: Machine) -> None:
    machine.converge(llama())
    machine.foreign.add("/var/lib/nim/cache/llama")
    (change,) = machine.converge(llama()).changes
    assert change.what == "directory /var/lib/nim/cache/llama"
    assert "others' files" in change.before
    command = "find /var/lib/nim/cache/llama -xdev ! -uid 1000 -exec chown --no-dereference 1000:1000 {} +"
    assert tuple(command.split()) in machine.host.calls
    assert machine.plan(llama()) == []


def test_a_masked_target(machine: Machine) -> None:
    machine.converge(llama())
    machine.masked.add("nim.target")
    error = failure(machine, llama())
    assert error.reason == "unit_masked"
    assert "systemctl unmask nim.target" in error.message
