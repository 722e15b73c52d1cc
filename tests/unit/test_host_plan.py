# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a whole host: bare, converged, broken in places; what the roles pass and what the table shows."""

from __future__ import annotations

import importlib
import json
import typing as t

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.gpu_fleet.nim.plugins.action import fleet_plan as fleet_plan_action
from ansible_collections.gpu_fleet.nim.plugins.action import gpu_host_plan as action
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _docker_daemon, _fleet_plan
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan import CHAIN, ReadOnlyHost, plan_host
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_models import wanted_images
from ansible_collections.gpu_fleet.nim.plugins.modules import gpu_host_plan
from docker_fakes import CONFIG, FakeDockerd
from driver_world import DriverWorld
from fake_host import FakeHost
from nim_machine import KEY, LLAMA, NEMO, ROOT, Machine, llama, nemo

SECRET = "hf_plan-secret \\ \" '"
MODULES = "ansible_collections.gpu_fleet.nim.plugins.modules."


class Down:
    """Docker that is not there."""

    def __getattr__(self, name: str) -> t.Callable[..., t.Any]:
        def ask(*_arguments: t.Any, **_options: t.Any) -> t.Any:
            if name == "available":
                return False
            raise FleetError("docker_unavailable", "Asking Docker failed: there is no such socket.")

        return ask


def plan(host: FakeHost, api: t.Any = None, **wanted: t.Any) -> dict[str, t.Any]:
    before = (dict(host.files), dict(host.modes), set(host.dirs), dict(host.links))
    answer = plan_host(host, wanted, api or Down()).result()
    assert (host.files, host.modes, host.dirs, host.links) == before
    # What a module returns must be JSON.
    return t.cast("dict[str, t.Any]", json.loads(json.dumps(answer)))


def found(answer: dict[str, t.Any], resource: str) -> list[tuple[str, str | None]]:
    return [(change["what"], change["after"]) for change in answer["changes"] if change["resource"] == resource]


def everything(*models: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    wanted: dict[str, t.Any] = {
        "nvidia_driver": {},
        "nvidia_driver_reload": {"expected_version": "580"},
        "docker_engine": {},
        "docker_daemon": {"options": {}, "live_restore": True},
        "docker_group": {"users": ["ops"]},
        "nvidia_container_toolkit": {},
        "ngc_login": {"api_key": KEY},
        "nim_image": {"images": [{"image": model["image"]} for model in models]},
        "nim_service": {"models": list(models), "ngc_api_key": KEY},
    }
    return {**wanted, **options}


@pytest.fixture
def bare() -> DriverWorld:
    """A GPU host as it comes: no driver, no Docker."""
    world = DriverWorld()
    no_unit = "LoadState=not-found\nActiveState=inactive\n"
    # Before the world's own pattern for all units.
    docker = {"systemctl show *docker.service": no_unit, "systemctl show *docker.socket": no_unit}
    world.commands = {**docker, "systemctl is-active *": "active\n", **world.commands}
    world.files["/etc/passwd"] = b"root:x:0:0::/root:/bin/sh\nops:x:1000:1000::/home/ops:/bin/sh\n"
    return world


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host whose services can be set up."""
    machine = Machine(monkeypatch)
    base = "/sys/bus/pci/devices/0000:00:06.0/"
    machine.host.files.update(
        {base + "vendor": b"0x10de\n", base + "class": b"0x030200\n", base + "device": b"0x2335\n"}
    )
    return machine


def services(*models: dict[str, t.Any], **options: t.Any) -> dict[str, t.Any]:
    return {
        "nim_image": {"images": [{"image": model["image"]} for model in models]},
        "nim_service": {"models": list(models), **options},
    }


# -- hosts ----------------------------------------------------------------------------------------


def test_bare_host(bare: DriverWorld) -> None:
    answer = plan(bare, **everything(llama()))
    assert answer["errors"] == []
    assert answer["drift"] is True
    assert answer["worst"] == "none"
    resources = [change["resource"] for change in answer["changes"]]
    assert set(resources) == set(CHAIN)
    assert sorted(resources, key=CHAIN.index) == resources
    assert ("driver packages", None) in found(answer, "nvidia_driver")
    assert found(answer, "nvidia_driver_reload") == [("kernel module nvidia", "nvidia_driver")]
    assert ("package docker-ce", None) in found(answer, "docker_engine")
    assert found(answer, "docker_daemon") == [(CONFIG, None)]
    assert found(answer, "docker_group") == [("member ops", None)]
    assert ("package nvidia-container-toolkit", None) in found(answer, "nvidia_container_toolkit")
    assert found(answer, "ngc_login") == [("login of root at nvcr.io", None)]
    assert found(answer, "nim_image") == [("image " + LLAMA, "docker_engine")]
    assert found(answer, "nim_service") == [("nim-llama.service", "docker_engine")]
    assert answer["changes"][-1]["why"] == "after docker_engine: it cannot be planned in detail before that"


def test_host_without_a_gpu_is_left_alone(host: FakeHost) -> None:
    answer = plan(host, **everything(llama()))
    assert (answer["gpu"], answer["drift"], answer["changes"], answer["errors"]) == (False, False, [], [])
    assert host.calls == []


def test_only_what_is_asked_for(bare: DriverWorld) -> None:
    assert {change["resource"] for change in plan(bare, docker_engine={})["changes"]} == {"docker_engine"}


def test_a_broken_file_hides_nothing_else(bare: DriverWorld) -> None:
    bare.files[CONFIG] = b'{"debug": tru'
    answer = plan(bare, **everything(llama()))
    assert [(error["resource"], error["reason"], error["after"]) for error in answer["errors"]] == [
        ("docker_daemon", "daemon_json_invalid", None),
        ("nvidia_container_toolkit", "daemon_json_invalid", "docker_daemon"),
    ]
    assert CONFIG in answer["errors"][0]["message"]
    planned = {change["resource"] for change in answer["changes"]}
    assert planned == set(CHAIN) - {"docker_daemon", "nvidia_container_toolkit"}


def test_wrong_options_are_findings_too(bare: DriverWorld) -> None:
    answer = plan(bare, nvidia_driver={"branch": "12"}, docker_group={"users": ["nobody-here"]}, docker_engine={})
    assert [(error["resource"], error["reason"]) for error in answer["errors"]] == [
        ("nvidia_driver", "invalid_option"),
        ("docker_group", "unknown_user"),
    ]
    assert found(answer, "docker_engine")


def test_driver_that_is_installed_but_not_loaded(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05", loaded=False)
    wanted = {"nvidia_driver": {}, "nvidia_driver_reload": {"expected_version": "580"}}
    answer = plan(bare, **wanted)
    [change] = [change for change in answer["changes"] if change["resource"] == "nvidia_driver_reload"]
    assert (change["from"], change["to"], change["after"]) == (None, "580.95.05", None)
    bare.load("580.95.05")
    assert found(plan(bare, **wanted), "nvidia_driver_reload") == []


def test_another_branch_is_loaded_after_its_packages(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05")
    wanted = {"nvidia_driver": {"branch": "595"}, "nvidia_driver_reload": {"expected_version": "595"}}
    answer = plan(bare, **wanted)
    assert answer["errors"] == []
    assert answer["worst"] == "unload_driver"
    assert [(change["resource"], change["what"], change["disruption"]) for change in answer["changes"][:2]] == [
        ("nvidia_driver", "driver packages", "unload_driver"),
        ("nvidia_driver_reload", "kernel module nvidia", "unload_driver"),
    ]
    bare.hold_gpu(812, "train.service")
    answer = plan(bare, **wanted)
    assert all("train.service" in change["blocked"] for change in answer["changes"])
    # Nobody is about to mend it: then it is wrong.
    [error] = plan(bare, nvidia_driver_reload={"expected_version": "595"})["errors"]
    assert error["reason"] == "driver_mismatch"


def test_without_reloading_only_a_reboot_helps(bare: DriverWorld) -> None:
    bare.install_driver("580.95.05", loaded=False)
    bare.load("580.65.06")
    answer = plan(bare, nvidia_driver={"unload": False})
    assert answer["worst"] == "reboot"
    assert (answer["changes"][0]["resource"], answer["changes"][0]["to"]) == ("nvidia_driver_reload", "580.95.05")
    assert "switched off" in answer["changes"][0]["blocked"]


def test_converged_services_have_an_empty_plan(serving: Machine) -> None:
    wanted = services(llama(), nemo(), ngc_api_key=KEY)
    answer = plan(serving.host, serving.api, **wanted)
    assert [change["what"] for change in answer["changes"] if change["resource"] == "nim_image"] == [
        "image " + LLAMA,
        "image " + NEMO,
    ]
    assert ("nim-llama.service", None) in found(answer, "nim_service")
    serving.converge(llama(), nemo(), key=KEY)
    answer = plan(serving.host, serving.api, nim_service=wanted["nim_service"])
    assert answer == {"gpu": True, "drift": False, "worst": "none", "changes": [], "errors": [], "notes": []}


def test_exactly_what_was_broken(serving: Machine) -> None:
    serving.converge(llama(), nemo())
    serving.host.files["/etc/systemd/system/nim-llama.service"] += b"# by hand\n"
    serving.active["nim-nemo.service"] = "failed"
    serving.api.list["nim-nemo"]["State"] = "exited"
    answer = plan(serving.host, serving.api, nim_service={"models": [llama(), nemo()]})
    assert [change["what"] for change in answer["changes"]] == [
        "systemd",
        "/etc/systemd/system/nim-llama.service",
        "nim-nemo.service",
    ]
    assert answer["worst"] == "reload"


def test_a_missing_image_hides_no_other_model(serving: Machine) -> None:
    serving.converge(llama(), nemo())
    del serving.api.images[LLAMA]
    serving.host.files["/etc/systemd/system/nim-nemo.service"] += b"# by hand\n"
    answer = plan(serving.host, serving.api, **services(llama(), nemo()))
    assert answer["worst"] == "restart_nim"
    assert found(answer, "nim_service") == [
        ("nim-llama.service", "nim_image"),
        ("systemd", None),
        ("/etc/systemd/system/nim-nemo.service", None),
    ]
    # Without anybody who would pull it, it is an error.
    answer = plan(serving.host, serving.api, nim_service={"models": [llama(), nemo()]})
    assert [(error["resource"], error["reason"]) for error in answer["errors"]] == [("nim_service", "image_missing")]
    assert ("/etc/systemd/system/nim-nemo.service", None) in found(answer, "nim_service")


def test_docker_that_is_down_and_nobody_mends(serving: Machine) -> None:
    serving.api.up = False
    answer = plan(serving.host, serving.api, **services(llama()))
    assert [(error["resource"], error["reason"]) for error in answer["errors"]] == [
        ("nim_image", "docker_unavailable"),
        ("nim_service", "docker_unavailable"),
    ]


def test_a_stopped_docker_is_not_started_by_asking(serving: Machine) -> None:
    for unit, state in (("service", "inactive"), ("socket", "active")):
        serving.host.commands["systemctl show * -p ActiveState docker.%s" % unit] = "ActiveState=%s\n" % state
    serving.api.check = lambda: pytest.fail("Docker was asked")  # type: ignore[method-assign]
    serving.api.available = serving.api.check  # type: ignore[assignment]
    answer = plan(serving.host, serving.api, **services(llama()))
    assert [error["reason"] for error in answer["errors"]] == ["docker_unavailable"] * 2
    assert "docker.socket would start it" in answer["errors"][1]["message"]


def test_pull_newer_asks_no_registry(serving: Machine) -> None:
    answer = plan(serving.host, serving.api, nim_image={"images": [{"image": LLAMA}], "pull": "newer"})
    assert answer["notes"]
    assert found(answer, "nim_image") == [("image " + LLAMA, None)]


def test_cdi_may_restart_docker_because_live_restore_comes_first(
    bare: DriverWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerd = FakeDockerd(bare)
    bare.files["/etc/docker/daemon.json"] = b"{}"
    dockerd.add_container("nim-llama")
    wanted = {"docker_daemon": {"options": {}, "live_restore": True}, "nvidia_container_toolkit": {"cdi": True}}
    blocked = [change for change in plan(bare, dockerd, **wanted)["changes"] if change["blocked"]]
    assert blocked == []
    del wanted["docker_daemon"]
    assert [change["what"] for change in plan(bare, dockerd, **wanted)["changes"] if change["blocked"]]


def test_host_for_looking_only(host: FakeHost) -> None:
    host.commands["date"] = "now"
    looking = ReadOnlyHost(host)
    assert [looking.run(["date"]).stdout for _time in range(2)] == ["now", "now"]
    assert host.calls == [("date",)]
    for write in (
        lambda: looking.write_file("/x", "", mode=0o600),
        lambda: looking.make_dir("/x", mode=0o700),
        lambda: looking.remove("/x"),
    ):
        with pytest.raises(AssertionError):
            write()


# -- the module -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [False, True])
def test_module_prints_no_secret(
    bare: DriverWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: bool
) -> None:
    monkeypatch.setattr(gpu_host_plan, "Host", lambda: bare)
    monkeypatch.setattr(_docker_daemon, "DockerApi", Down)
    monkeypatch.setattr("ansible_collections.gpu_fleet.nim.plugins.module_utils._host_plan.DockerApi", Down)
    wanted = everything(llama(secret_environment={"HF_TOKEN": SECRET}))
    wanted["nim_image"]["api_key"] = KEY
    with patch_module_args({**wanted, "_ansible_check_mode": check}), pytest.raises(SystemExit):
        gpu_host_plan.main()
    text = capsys.readouterr().out
    answer = json.loads(text)
    assert answer["changed"] is False
    assert answer["drift"] is True
    assert found(answer, "nim_service") == [("nim-llama.service", "docker_engine")]
    assert KEY not in text
    assert json.dumps(SECRET)[1:-1] not in text


def test_services_with_secrets_print_fingerprints(serving: Machine) -> None:
    model = llama(secret_environment={"HF_TOKEN": SECRET})
    serving.converge(llama(), key=KEY)
    answer = json.dumps(plan(serving.host, serving.api, nim_service={"models": [model], "ngc_api_key": KEY + "-new"}))
    assert "/etc/nim/llama.env" in answer
    assert "/etc/nim/ngc.env" in answer
    assert SECRET not in json.loads(answer)["changes"].__repr__()
    assert KEY not in answer


@pytest.mark.parametrize("name", CHAIN)
def test_options_are_those_of_the_modules(name: str) -> None:
    """Names, types, defaults and choices; those that have no part in a plan are left out."""
    left_out = {"progress_interval", "resume", "prepare_reboot", "reboot_reason", "host_name"}
    documented = yaml.safe_load(importlib.import_module(MODULES + name).DOCUMENTATION)["options"]

    def compare(options: dict[str, t.Any], specification: dict[str, t.Any]) -> None:
        assert set(options) - left_out == set(specification)
        for option, spec in specification.items():
            for key, default in (
                ("type", "str"),
                ("elements", None),
                ("choices", None),
                ("default", None),
                ("required", False),
            ):
                assert spec.get(key, default) == options[option].get(key, default), (option, key)
            if "options" in spec:
                compare(options[option]["suboptions"], spec["options"])

    compare(documented, gpu_host_plan.OPTIONS[name])
    assert gpu_host_plan.OPTIONS["ngc_login"]["api_key"]["no_log"]
    assert gpu_host_plan.OPTIONS["nim_image"]["api_key"]["no_log"]
    assert gpu_host_plan.OPTIONS["nim_service"]["ngc_api_key"]["no_log"]


# -- what the roles pass --------------------------------------------------------------------------


def role_tasks() -> dict[str, tuple[str, dict[str, t.Any]]]:
    """Resource -> the first task of a role that sets it up."""
    tasks: dict[str, tuple[str, dict[str, t.Any]]] = {}
    for path in sorted((ROOT / "roles").glob("*/tasks/main.yml")):
        for task in yaml.safe_load(path.read_text()):
            for key in task:
                if key.startswith("gpu_fleet.nim."):
                    tasks.setdefault(key[len("gpu_fleet.nim.") :], (path.parts[-3], task))
    return tasks


#: Modules of roles that wait for what others have set up, and set nothing up themselves.
WAITING = {"nim_health"}


def test_every_module_of_every_role_is_in_the_plan() -> None:
    assert set(role_tasks()) - WAITING == set(action.PARTS) == set(CHAIN)


@pytest.mark.parametrize("resource", CHAIN)
def test_the_plan_passes_what_the_role_passes(resource: str) -> None:
    role, task = role_tasks()[resource]
    part = action.PARTS[resource]
    options = dict(task["gpu_fleet.nim." + resource])
    options.pop("progress_interval", None)
    assert part.role == role
    assert part.options == options
    assert set(part.options) <= set(gpu_host_plan.OPTIONS[resource])
    conditions = task.get("when") or []
    conditions = conditions if isinstance(conditions, list) else [conditions]
    # The rest hangs on what an earlier task returned, which the plan looks at itself.
    assert list(part.when) == [text for text in conditions if "__nvidia_driver_packages" not in text]


Rendered = t.Callable[..., "dict[str, t.Any]"]


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> Rendered:
    """Options as the action plugin makes them out of variables."""

    def render(**variables: t.Any) -> dict[str, t.Any]:
        # A unit test has not the plugins that templates name: the lookup of the controller's environment, our own filter.
        keys = {"ngc_api_key": "", "nim_ngc_api_key": "{{ ngc_api_key }}"}
        # The filter of the role is called as it is, on ports that need no template.
        models = [{**model, "port": 8000 + number} for number, model in enumerate(variables.get("nim_models", []))]
        images = {"__nim_images": wanted_images(models)}
        real = action.role_variables
        with monkeypatch.context() as patch:
            patch.setattr(action, "role_variables", lambda kind: {**real(kind), **(images if kind == "vars" else {})})
            plugin = action.ActionModule.__new__(action.ActionModule)
            plugin._templar = Templar(loader=DataLoader(), variables={})
            return t.cast("dict[str, t.Any]", plugin.options(action._trusted({**keys, **variables})))

    return render


def test_role_variables_reach_the_options(rendered: Rendered) -> None:
    options = rendered(
        ngc_api_key=KEY,
        nvidia_driver_version="580.95.05",
        docker_users=["ops"],
        nim_gpu_injection="cdi",
        my_port=8009,
        nim_models=[llama(port="{{ my_port }}", disk_space="20GB"), nemo(state="absent")],
    )
    assert list(options) == list(CHAIN)
    assert options["nvidia_driver"]["branch"] == "580"
    assert options["nvidia_driver"]["hold"] is True
    assert options["nvidia_driver_reload"] == {"expected_version": "580.95.05"}
    assert options["docker_group"] == {"users": ["ops"]}
    assert options["nvidia_container_toolkit"]["injection"] == "cdi"
    assert options["ngc_login"]["api_key"] == options["nim_service"]["ngc_api_key"] == KEY
    [image] = options["nim_image"]["images"]
    assert (image["image"], image["disk_space"]) == (LLAMA, "20GB")
    assert [model["port"] for model in options["nim_service"]["models"]] == [8009, 8001]


def test_what_the_roles_would_skip_is_not_planned(rendered: Rendered) -> None:
    options = rendered(nvidia_driver_reload=False, nim_models=[])
    assert set(CHAIN) - set(options) == {"nvidia_driver_reload", "docker_group", "nim_image", "nim_service"}
    assert options["nvidia_driver"]["unload"] is False
    assert rendered(nim_state="absent")["nim_service"]["state"] == "absent"


def test_a_variable_that_cannot_be_resolved_is_named_without_its_template(rendered: Rendered) -> None:
    with pytest.raises(Exception, match="variables of role ngc") as caught:
        rendered(ngc_api_key="{{ undefined_thing ~ '%s' }}" % KEY)
    assert KEY not in str(caught.value)


# -- the table ------------------------------------------------------------------------------------

CHANGE = {
    "resource": "nim_service",
    "what": "nim-llama.service",
    "from": "started",
    "to": "restarted",
    "why": "the container runs something else",
    "disruption": "restart_nim",
    "blocked": None,
    "after": None,
}
ERROR = {"resource": "docker_daemon", "reason": "daemon_json_invalid", "message": "Reading failed.", "after": None}
LOOKS: dict[str, t.Any] = {
    "quiet": {"gpu": True, "changes": [], "errors": []},
    "mild": {"gpu": True, "errors": [], "changes": [{**CHANGE, "disruption": "none", "from": None, "to": {"a": 1}}]},
    "busy": {"gpu": True, "errors": [], "changes": [CHANGE, {**CHANGE, "what": "x", "blocked": "maintenance"}]},
    "cpu": {"gpu": False, "changes": [], "errors": []},
    "down": {"unreachable": True, "msg": "no\n route", "changed": False},
    "sudo": {"failed": True, "msg": "Missing sudo password"},
    "broken": {"gpu": True, "changes": [], "errors": [ERROR]},
    "never": None,
}


def all_rows() -> list[dict[str, t.Any]]:
    return _fleet_plan.ordered([row for host, look in LOOKS.items() for row in _fleet_plan.rows_of(host, look)])


def test_rows_and_their_order() -> None:
    rows = all_rows()
    assert [(row["host"], row["state"]) for row in rows] == [
        ("down", "unreachable"),
        ("sudo", "look failed"),
        ("broken", "cannot be planned"),
        ("never", "not looked at"),
        ("busy", "change"),
        ("busy", "change"),
        ("mild", "change"),
        ("quiet", "as wanted"),
        ("cpu", "no GPU"),
    ]
    assert rows[0]["message"] == "no route"
    assert _fleet_plan.drifted(rows) == ["down", "sudo", "broken", "never", "busy", "mild"]


def test_table() -> None:
    lines = _fleet_plan.render_table([row for row in all_rows() if row["host"] in ("down", "busy", "mild", "cpu")])
    assert lines.splitlines() == [
        "HOST  DISRUPTION              RESOURCE     WHAT               FROM -> TO            WHY",
        "down  -                                    unreachable",
        "busy  restart_nim             nim_service  nim-llama.service  started -> restarted  the container runs something else",
        "      restart_nim (left out)  nim_service  x                  started -> restarted  the container runs something else",
        'mild  none                    nim_service  nim-llama.service  - -> {"a": 1}         the container runs something else',
        "cpu   -                                    no GPU",
        "",
        "down: no route",
        "busy: left out: x: maintenance",
        "1 of 4 hosts is as wanted; 3 changes.",
    ]


def run_table(
    monkeypatch: pytest.MonkeyPatch, hosts: t.Sequence[str], **arguments: t.Any
) -> tuple[dict[str, t.Any], str]:
    plugin = fleet_plan_action.ActionModule.__new__(fleet_plan_action.ActionModule)
    shown: list[str] = []
    arguments = {"format": "table", "output": None, "fail_on_drift": False, "variable": "plan", **arguments}
    monkeypatch.setattr(fleet_plan_action.ActionBase, "run", lambda *_arguments: {})
    monkeypatch.setattr(plugin, "validate_argument_spec", lambda **_options: (None, arguments), raising=False)
    monkeypatch.setattr(plugin, "_display", type("D", (), {"display": staticmethod(shown.append)}), raising=False)
    monkeypatch.setattr(plugin, "_task", type("T", (), {"check_mode": False}), raising=False)
    variables = {host: {} if LOOKS[host] is None else {"plan": LOOKS[host]} for host in hosts}
    result = plugin.run(None, {"ansible_play_hosts_all": list(hosts), "hostvars": variables})
    return result, "\n".join(shown)


def test_drift_fails_only_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any) -> None:
    result, text = run_table(monkeypatch, ["quiet", "down"])
    assert "failed" not in result
    assert (result["drift"], result["hosts"]) == (True, ["down"])
    result, text = run_table(
        monkeypatch, ["quiet", "down"], fail_on_drift=True, format="json", output=str(tmp_path / "plan.json")
    )
    assert result["failed"] is True
    assert result["msg"] == "Not as wanted, or not known to be: down."
    assert json.loads(text) == json.loads((tmp_path / "plan.json").read_text()) == result["rows"]
    result, text = run_table(monkeypatch, ["quiet", "cpu"], fail_on_drift=True)
    assert "failed" not in result
