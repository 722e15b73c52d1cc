# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks upgrade_drivers and deploy with their roles under a real ansible-playbook; what hosts and gateways say is scripted."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing as t

import pytest

pytestmark = pytest.mark.rollout

ROOT = pathlib.Path(__file__).parents[2]
#: In the place of the modules that would connect to a host: what they are asked is written down, and answered from a file.
ACTION = """
import json, os
from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
class ActionModule(ActionBase):
    _requires_connection = False
    _supports_check_mode = True
    def run(self, tmp=None, task_vars=None):
        super().run(tmp, task_vars)
        host, args = task_vars["inventory_hostname"], self._task.args
        call = ("%s %s" % ({NAME!r}, args.get("state", ""))).strip()
        # Modules that are delegated answer for the host at which they are.
        host = args.get("host", host) if {NAME!r} not in ("look", "claim") else (self._task.delegate_to or host)
        with open(os.environ["SCRIPT"]) as stream:
            answers = json.load(stream).get(host, {{}}).get(call, {{}})
        if isinstance(answers, list):
            # One after the other.
            with open(os.environ["SCRIPT"] + ".log") as stream:
                asked = sum(line.startswith("%s: %s" % (host, call)) for line in stream)
            answers = answers[min(asked, len(answers) - 1)]
        with open(os.environ["SCRIPT"] + ".log", "a") as stream:
            of = " of " + ", ".join(args["models"]) if args.get("models") else ""
            of += " (allow_last)" if os.environ.get("TELL_LAST") and args.get("allow_last") in (True, "True") else ""
            stream.write("%s: %s%s%s\\n" % (host, call, of, " (check)" if self._task.check_mode else ""))
        if answers == "unreachable":
            raise AnsibleConnectionFailure("timed out")
        if answers == "lost":
            answers = {{"failed": True, "lost": True, "msg": "The host cannot be reached any more."}}
        return dict({{"changed": False}}, **answers)
"""
LOOK = {
    "gpu": True,
    "due": True,
    "loaded": "570.124.06",
    "target": "branch 580",
    "models": ["llama"],
    "serving": ["llama"],
    "held": "",
    "open": False,
    "steps": [{"what": "kernel module nvidia", "from": "570.124.06", "to": None, "disruption": "unload_driver"}],
}
GOOD: dict[str, t.Any] = {
    "upgrade prestaged": LOOK,
    "upgrade drained": {"due": True, "held": "", "outcome": "", "open": True, "models": ["llama"]},
    "upgrade ready": {
        "due": True,
        "outcome": "",
        "open": True,
        "reboot_required": False,
        "record": {"workloads": ["llama", "loading"]},
    },
    "upgrade returned": {"due": False, "outcome": "updated", "open": False},
    "upgrade restored": {
        "due": True,
        "outcome": "restored",
        "open": False,
        "record": {"workloads": ["llama"], "serving": ["llama"]},
    },
}
#: The same for playbook deploy.
DEPLOY_LOOK = {
    **{key: value for key, value in LOOK.items() if key != "loaded"},
    "runs": "llama 1.8.4",
    "target": "llama 1.8.5",
    "steps": [
        {"what": "NIM services llama", "from": "llama 1.8.4", "to": "llama 1.8.5", "disruption": "restart_nim"},
    ],
}
GOOD_DEPLOY: dict[str, t.Any] = {
    "deploy prestaged": DEPLOY_LOOK,
    "deploy drained": {
        "due": True,
        "held": "",
        "outcome": "",
        "open": True,
        "models": ["llama", "new"],
        "record": {"workloads": ["llama", "loading"], "serving": ["llama"]},
    },
    "deploy ready": {"due": True, "outcome": "", "open": True, "wanted": ["llama"]},
    "deploy returned": {"due": False, "outcome": "updated", "open": False},
    "deploy restored": {
        "due": True,
        "outcome": "restored",
        "open": False,
        "record": {"workloads": ["llama", "loading"], "serving": ["llama"]},
    },
}
#: In the place of modules: their names in the scripts.
SCRIPTED = {
    "driver_upgrade": "upgrade",
    "nim_deploy": "deploy",
    "nim_image": "pull",
    "gpu_host_preflight": "preflight",
    "haproxy_server": "gateway",
    "haproxy_info": "look",
    "rollout_claim": "claim",
}
HOSTS = ("gpu01", "gpu02", "gpu03")


def seen(**hosts: t.Any) -> dict[str, t.Any]:
    """What the gateway says; ``hosts`` is host -> what differs from a server that serves."""
    servers = [
        {"host": host, "model": "llama", "serving": True, "foreign": False, **hosts.get(host, {})}
        for host in (*HOSTS, "gpu04")
    ]
    traffic = [{"backend": "meta_llama", "requests": 7, "failed": 0, "truncated": 0}]
    return {"servers": servers, "process": "p1", "traffic": traffic, "at": 1000.0}


#: What happens to a host that is upgraded.
TURN = ["upgrade drained", "gateway drained", "upgrade ready", "gateway enabled of llama, loading", "upgrade returned"]
DEPLOY_TURN = [call.replace("upgrade", "deploy").replace(", loading", "") for call in TURN]


class Play:
    """A copy of the collection with the scripted modules in it."""

    playbook = "upgrade_drivers"
    scripted: t.Mapping[str, str] = SCRIPTED

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.script = folder / "script.json"
        copy = self.copy = folder / "collections" / "ansible_collections" / "gpu_fleet" / "nim"
        copy.mkdir(parents=True)
        for name in ("plugins", "roles", "playbooks", "meta"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "galaxy.yml", copy)
        for module, name in self.scripted.items():
            (copy / "plugins" / "action" / (module + ".py")).write_text(ACTION.format(NAME=name))
            (copy / "plugins" / "modules" / (module + ".py")).touch()
        self.environment: dict[str, str] = {}
        self.answers: dict[str, dict[str, t.Any]] = {host: dict(GOOD) for host in HOSTS}
        self.answers["gw1"] = {"look": seen()}
        self.inventory: dict[str, t.Any] = {
            "gpu_hosts": {"hosts": {host: {"driver_upgrade_skip": False} for host in HOSTS}},
            "nim_gateways": {"hosts": {"gw1": {}}},
        }

    def run(self, *options: str, **variables: t.Any) -> tuple[int, str]:
        self.script.write_text(json.dumps(self.answers))
        log = pathlib.Path("%s.log" % self.script)
        log.write_text("")
        inventory = self.folder / "inventory.json"
        inventory.write_text(json.dumps(self.inventory))
        command = [str(pathlib.Path(sys.executable).parent / "ansible-playbook"), "gpu_fleet.nim." + self.playbook]
        command += ["-i", str(inventory), "-e", json.dumps(variables), *options]
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "collections"),
            "ANSIBLE_HOME": str(self.folder / "home"),
            "ANSIBLE_NOCOLOR": "1",
            "SCRIPT": str(self.script),
        }
        environment.update(self.environment)
        environment.pop("ANSIBLE_CONFIG", None)
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", timeout=300, cwd=self.folder, check=False
        )
        self.log = log.read_text().splitlines()
        return done.returncode, done.stdout + done.stderr

    def turn(self, host: str) -> list[str]:
        """What was asked of a host after the looks, in order."""
        calls = [line.partition(": ")[2] for line in self.log if line.startswith(host + ": ")]
        return [
            call
            for call in calls
            if "(check)" not in call and not call.endswith(("prestaged", "pull", "preflight")) and "claim" not in call
        ]


class Deploy(Play):
    """The same for another version of a model."""

    playbook = "deploy"

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        self.answers.update({host: dict(GOOD_DEPLOY) for host in HOSTS})
        self.inventory["gpu_hosts"] = {
            "hosts": {host: {} for host in HOSTS},
            "vars": {"nim_models": [{"name": "llama", "image": "nvcr.io/nim/meta/llama:1.8.5", "gpus": 1}]},
        }


@pytest.fixture
def play(tmp_path: pathlib.Path) -> Play:
    return Play(tmp_path)


@pytest.fixture
def deploy(tmp_path: pathlib.Path) -> Deploy:
    return Deploy(tmp_path)


def test_batch_by_batch_each_in_order_and_all_looked_at_first(play: Play) -> None:
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 0, output
    assert [play.turn(host) for host in HOSTS] == [TURN] * 3
    order = [line for line in play.log if "(check)" not in line]
    assert sorted(order[:3]) == ["%s: upgrade prestaged" % host for host in HOSTS] and "WARNING" not in output
    # The gateways are looked at once for all, before and after everything and before each batch.
    batches = [line for host in HOSTS for line in ("gw1: look", *("%s: %s" % (host, call) for call in TURN))]
    assert order[3:] == ["gw1: look", *batches, "gw1: look"]
    assert "Batch 1 of 3: gpu01." in output and "3 updated." in output
    assert "Requests at the gateways during the run: 0, of them 0 failed" in output


def test_check_mode_asks_and_stops(play: Play) -> None:
    code, output = play.run("--check")
    assert code == 0, output
    assert sorted(play.log) == [*("%s: upgrade prestaged (check)" % host for host in HOSTS), "gw1: look"]
    assert "Ready replicas of every model at each moment:" in output
    assert "Steps on gpu01, gpu02, gpu03:" in output


def test_a_refused_host_ends_the_run_and_a_skipped_one_does_not(play: Play) -> None:
    play.answers["gpu02"]["upgrade prestaged"] = {"failed": True, "msg": "There is no room."}
    code, output = play.run()
    assert code != 0 and "gpu02 cannot be updated, so nothing was begun" in output
    assert [play.turn(host) for host in HOSTS] == [[], [], []]
    play.inventory["gpu_hosts"]["hosts"]["gpu02"]["driver_upgrade_skip"] = True
    code, output = play.run(driver_upgrade_max_unavailable=2)
    assert code == 0, output
    assert play.turn("gpu02") == [] and play.turn("gpu01") == play.turn("gpu03") == TURN
    assert "gpu02: upgrade prestaged (check)" in play.log


def test_a_rollback_gives_the_host_back_and_ends_the_run(play: Play, tmp_path: pathlib.Path) -> None:
    play.answers["gpu01"]["upgrade ready"] = {
        "failed": True,
        "outcome": "rolled_back",
        "msg": "Model llama is not ready.",
        "record": {"workloads": ["llama", "loading"], "serving": ["llama"]},
    }
    page = tmp_path / "page.html"
    code, output = play.run(driver_upgrade_report=str(page))
    assert code == 2, output
    assert play.turn("gpu01") == ["upgrade drained", "gateway drained", "upgrade ready", "gateway enabled of llama"]
    assert play.turn("gpu02") == play.turn("gpu03") == []
    assert "gpu01: Model llama is not ready." in output and "The run stops after 1 of 3 hosts" in output
    assert "rolled back: Model llama is not ready. Run again" in output
    # Who was not updated has failed, and nobody else.
    assert output.count("failed=1") == 3 and "2 not begun." in output
    assert play.log[-1] == "gw1: look" and play.log.count("gw1: look") == 4
    assert "rolled back" in page.read_text() and "Model llama is not ready." in page.read_text()


def test_a_host_that_stays_out_is_not_given_back_and_the_budget_lets_others_go(play: Play) -> None:
    play.answers["gpu01"]["upgrade ready"] = {"failed": True, "outcome": "stranded", "msg": "It does not load."}
    code, output = play.run(driver_upgrade_failure_budget=1, driver_upgrade_max_unavailable=2)
    assert code == 2, output
    assert play.turn("gpu01") == ["upgrade drained", "gateway drained", "upgrade ready"]
    # Two were to go together; one of them still can, and the other is left for the next run.
    assert play.turn("gpu02") == TURN and play.turn("gpu03") == []
    assert "gpu03 is left for another run: 2 of at most 2 hosts are out of service (gpu01, gpu02)." in output
    assert output.count("failed=1") == 2 and "1 updated" in output


def test_a_drain_that_is_refused_gives_the_upgrade_up(play: Play) -> None:
    play.answers["gpu01"]["gateway drained"] = {"failed": True, "msg": "It is the last one that serves llama."}
    code, output = play.run()
    assert code == 2 and "It is the last one that serves llama." in output
    assert play.turn("gpu01") == ["upgrade drained", "gateway drained", "upgrade restored", "gateway enabled of llama"]
    assert play.turn("gpu02") == []
    # The summary has it, too, and not only the task.
    assert "gpu01: It is the last one that serves llama." in output


def test_who_goes_back_with_what_another_run_has_left_gives_the_host_back(play: Play) -> None:
    play.answers["gpu01"]["upgrade drained"] = {
        "failed": True,
        "outcome": "restored",
        "msg": "Downloading driver 580 failed.",
        "record": {"workloads": ["llama", "loading"], "serving": ["llama"]},
    }
    code, output = play.run()
    assert code == 2 and "Downloading driver 580 failed." in output
    assert play.turn("gpu01") == ["upgrade drained", "gateway enabled of llama"]


def test_a_host_that_somebody_drains_meanwhile_is_left_alone(play: Play) -> None:
    play.answers["gpu01"]["gateway drained"] = {"reason": "foreign_drain"}
    code, output = play.run(driver_upgrade_failure_budget=1, driver_upgrade_max_unavailable=2)
    assert code == 2, output
    assert play.turn("gpu01") == ["upgrade drained", "gateway drained", "upgrade restored", "gateway enabled of llama"]
    assert play.turn("gpu02") == TURN


def test_a_gateway_that_is_gone_when_a_host_comes_back_leaves_it_for_the_next_run(play: Play) -> None:
    play.answers["gpu01"]["gateway enabled"] = "unreachable"
    code, output = play.run()
    assert code == 2, output
    assert play.turn("gpu01") == TURN[:-1] and play.turn("gpu02") == []
    assert "Gateways gw1 cannot be reached, so this host is not enabled there" in output
    assert "1 out of service" in output


def test_a_canary_that_is_lost_counts_as_well_as_any_and_everything_is_told(play: Play, tmp_path: pathlib.Path) -> None:
    play.answers["gpu01"]["upgrade ready"] = "lost"
    page = tmp_path / "page.html"
    code, output = play.run(driver_upgrade_report=str(page))
    assert code == 2, output
    assert play.turn("gpu01") == ["upgrade drained", "gateway drained", "upgrade ready"] and play.turn("gpu02") == []
    assert "gpu01: The host cannot be reached any more." in output and "1 out of service, 2 not begun." in output
    assert "out of service" in page.read_text()
    code, output = play.run(driver_upgrade_failure_budget=1, driver_upgrade_max_unavailable=2)
    assert code == 2 and play.turn("gpu02") == TURN, output


def test_a_host_that_is_lost_in_a_batch_counts(play: Play) -> None:
    play.answers["gpu02"]["upgrade ready"] = "lost"
    for host in HOSTS:
        # Models of their own, so that two can go together.
        look = dict(LOOK, models=[host], serving=[host])
        play.answers[host]["upgrade prestaged"] = look
    play.inventory["gpu_hosts"]["hosts"]["gpu04"] = {"driver_upgrade_skip": False}
    play.answers["gpu04"] = dict(GOOD, **{"upgrade prestaged": dict(LOOK, models=[], serving=[])})
    code, output = play.run(driver_upgrade_max_unavailable=2, driver_upgrade_min_ready=0)
    assert code != 0
    assert play.turn("gpu02") == ["upgrade drained", "gateway drained", "upgrade ready"]
    assert play.turn("gpu01") == play.turn("gpu03") == TURN and play.turn("gpu04") == []
    assert "The run stops after 3 of 4 hosts, because 1 host failed or cannot be reached (gpu02)" in output


def test_a_host_of_somebody_else_and_one_that_is_done_are_left(play: Play) -> None:
    play.answers["gpu01"]["upgrade prestaged"] = dict(LOOK, due=False)
    play.answers["gw1"]["look"] = seen(gpu02={"serving": False, "foreign": True})
    play.answers["gpu03"]["upgrade drained"] = {"due": True, "held": "bad fan", "outcome": "", "models": ["llama"]}
    code, output = play.run(driver_upgrade_max_unavailable=3, driver_upgrade_min_ready=0)
    assert code == 2 and output.count("failed=1") == 1, output
    assert play.turn("gpu01") == play.turn("gpu02") == []
    # Since the look somebody has put it under maintenance.
    assert play.turn("gpu03") == ["upgrade drained"]
    assert "gpu02: somebody else has drained it at a gateway." in output


def test_nothing_to_do_is_one_look_a_host(play: Play) -> None:
    for host in HOSTS:
        play.answers[host]["upgrade prestaged"] = dict(LOOK, due=False)
    code, output = play.run(drain_hook="none")
    assert code == 0, output
    assert sorted(play.log) == ["%s: upgrade prestaged" % host for host in HOSTS]
    assert "0 of 3 hosts are to be updated in 0 batches; 3 are as wanted." in output
    assert "WARNING" not in output


def test_drain_is_a_hook_the_operators_own_command_is_told(play: Play, tmp_path: pathlib.Path) -> None:
    told = tmp_path / "told"
    command = ["/bin/sh", "-c", 'echo "$DRAIN_HOST $DRAIN_STATE" >> "%s"' % told]
    code, output = play.run("--limit", "gpu01", drain_hook="command", drain_command=command, driver_upgrade_min_ready=0)
    assert code == 0, output
    assert told.read_text() == "gpu01 drained\ngpu01 enabled\n"
    assert not any("gateway" in line or "look" in line for line in play.log)
    play.answers["gpu01"]["upgrade prestaged"] = LOOK
    code, output = play.run(
        "--limit", "gpu01", drain_hook="command", drain_command=["false"], driver_upgrade_min_ready=0
    )
    assert code == 2 and play.turn("gpu01") == ["upgrade drained", "upgrade restored"], output


def test_the_operator_is_asked_after_the_canary_and_nobody_there_is_no_yes(play: Play) -> None:
    code, output = play.run(driver_upgrade_pause_after_canary=True)
    assert code != 0 and "nobody is at a terminal" in output
    assert play.turn("gpu01") == TURN and play.turn("gpu02") == []
    code, output = play.run(driver_upgrade_pause_after_canary=1)
    assert code == 0 and "1 seconds until the next batch" in output, output


# -- deploy ---------------------------------------------------------------------------------------


def test_deploy_pulls_everywhere_before_it_takes_out_the_first(deploy: Deploy) -> None:
    code, output = deploy.run(nim_deploy_max_unavailable=1, nim_deploy_pull_throttle=1)
    assert code == 0, output
    assert [deploy.turn(host) for host in HOSTS] == [DEPLOY_TURN] * 3
    first = next(number for number, line in enumerate(deploy.log) if "drained" in line)
    before = deploy.log[:first]
    assert sorted(line for line in before if "pull" in line) == ["%s: pull" % host for host in HOSTS]
    assert [line for line in deploy.log[first:] if "pull" in line] == []
    looks = [before.index("%s: deploy prestaged" % host) for host in HOSTS]
    assert all(before.index("%s: pull" % host) < look for host, look in zip(HOSTS, looks))
    assert "Batch 1 of 3: gpu01." in output and "3 updated." in output and "WARNING" not in output
    assert "llama 1.8.4" in output and "llama 1.8.5" in output


def test_deploy_in_check_mode_asks_and_stops(deploy: Deploy) -> None:
    code, output = deploy.run("--check")
    assert code == 0, output
    assert all("(check)" in line for line in deploy.log if "gw1" not in line) and "restart nim" in output
    assert {line.partition(": ")[2] for line in deploy.log} == {
        "preflight (check)",
        "pull (check)",
        "deploy prestaged (check)",
        "look",
    }


def test_deploy_that_cannot_pull_begins_nothing(deploy: Deploy) -> None:
    deploy.answers["gpu02"]["pull"] = {"failed": True, "msg": "nvcr.io does not answer."}
    code, output = deploy.run()
    assert code != 0 and "gpu02: nvcr.io does not answer." in output
    assert "gpu02 cannot be updated, so nothing was begun" in output
    assert [deploy.turn(host) for host in HOSTS] == [[], [], []]
    # Whoever is left out needs nothing of it, and is not touched.
    deploy.inventory["gpu_hosts"]["hosts"]["gpu02"]["nim_deploy_skip"] = True
    code, output = deploy.run(nim_deploy_max_unavailable=2)
    assert code == 0, output
    assert "gpu02: pull" not in deploy.log and "gpu02: deploy prestaged (check)" in deploy.log
    assert deploy.turn("gpu01") == deploy.turn("gpu03") == DEPLOY_TURN


def test_deploy_that_went_back_gives_the_host_back_and_stops(deploy: Deploy, tmp_path: pathlib.Path) -> None:
    said = "Model llama is not ready. What ran before (llama 1.8.4) was put back and answers."
    record = {"workloads": ["llama", "old", "loading"], "serving": ["llama", "old"]}
    deploy.answers["gpu01"]["deploy ready"] = {"failed": True, "outcome": "rolled_back", "msg": said, "record": record}
    page = tmp_path / "page.html"
    code, output = deploy.run(nim_deploy_report=str(page))
    assert code == 2, output
    # Only what was ready before comes back: nobody waits for a model that was new and is gone again.
    assert deploy.turn("gpu01") == [*DEPLOY_TURN[:3], "gateway enabled of llama, old"]
    assert deploy.turn("gpu02") == deploy.turn("gpu03") == []
    assert "The run stops after 1 of 3 hosts" in output and said in page.read_text()
    assert "Deployment of models" in page.read_text()


def test_deploy_that_strands_a_host_leaves_it_out_and_the_budget_lets_others_go(deploy: Deploy) -> None:
    deploy.answers["gpu01"]["deploy ready"] = {"failed": True, "outcome": "stranded", "msg": "Nothing starts."}
    code, output = deploy.run(nim_deploy_failure_budget=1, nim_deploy_max_unavailable=2)
    assert code == 2, output
    assert deploy.turn("gpu01") == ["deploy drained", "gateway drained", "deploy ready"]
    assert deploy.turn("gpu02") == DEPLOY_TURN and deploy.turn("gpu03") == []


def test_deploy_leaves_out_a_host_that_somebody_takes_over_meanwhile(deploy: Deploy) -> None:
    said = "This host is out of service for a deployment of its models, and now somebody has put it under maintenance."
    deploy.answers["gpu01"]["deploy ready"] = {"failed": True, "reason": "host_held", "msg": said}
    code, output = deploy.run(nim_deploy_failure_budget=1, nim_deploy_max_unavailable=2)
    assert code == 2 and "gpu01: " + said in output and "1 out of service" in output
    assert deploy.turn("gpu01") == ["deploy drained", "gateway drained", "deploy ready"]
    assert deploy.turn("gpu02") == DEPLOY_TURN


def test_a_drain_that_takes_too_long_gives_nobody_requests_that_somebody_has_taken_over(deploy: Deploy) -> None:
    said = "This host is out of service for a deployment of its models, and now somebody has put it under maintenance."
    deploy.answers["gpu01"]["gateway drained"] = {"failed": True, "msg": "2 requests still run on gpu01."}
    deploy.answers["gpu01"]["deploy restored"] = {"failed": True, "reason": "host_held", "msg": said}
    code, output = deploy.run()
    assert code == 2 and "gpu01: " + said in output and "1 out of service" in output
    assert "2 requests still run on gpu01." in output
    assert deploy.turn("gpu01") == [*DEPLOY_TURN[:2], "deploy restored"]


def test_deploy_gives_up_where_the_drain_is_refused(deploy: Deploy) -> None:
    deploy.answers["gpu01"]["gateway drained"] = {"failed": True, "msg": "It is the last one that serves llama."}
    code, output = deploy.run()
    assert code == 2 and "It is the last one that serves llama." in output
    assert deploy.turn("gpu01") == [*DEPLOY_TURN[:2], "deploy restored", "gateway enabled of llama"]


def test_deploy_that_goes_back_with_what_another_run_has_left_gives_the_host_back(deploy: Deploy) -> None:
    deploy.answers["gpu01"]["deploy drained"] = {
        "failed": True,
        "outcome": "rolled_back",
        "msg": "The image of llama is not on the host.",
        "record": {"workloads": ["llama", "loading"], "serving": ["llama"]},
    }
    code, output = deploy.run()
    assert code == 2 and "The image of llama is not on the host." in output
    assert deploy.turn("gpu01") == ["deploy drained", "gateway enabled of llama"]


def test_deploy_of_a_host_that_is_down_is_no_end_of_the_run(deploy: Deploy) -> None:
    for call in ("preflight", "pull", "deploy prestaged"):
        deploy.answers["gpu03"][call] = "unreachable"
    code, output = deploy.run(nim_deploy_max_unavailable=2)
    assert code == 2, output
    assert deploy.turn("gpu01") == deploy.turn("gpu02") == DEPLOY_TURN and deploy.turn("gpu03") == []
    assert "it cannot be reached" in output
