# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Ansible itself, its settings and the way it is called could do to a rollout, under a real ansible-playbook."""

from __future__ import annotations

import pathlib
import time

import pytest
from test_rollout_playbooks import DEPLOY_TURN, GOOD, GOOD_DEPLOY, HOSTS, LOOK, TURN, Play, seen

pytestmark = pytest.mark.rollout


@pytest.fixture
def play(tmp_path: pathlib.Path) -> Play:
    return Play(tmp_path)


def test_a_second_rollout_by_the_same_command_has_a_plan_of_its_own(play: Play) -> None:
    (play.copy / "playbooks" / "both.yml").write_text(
        "- ansible.builtin.import_playbook: gpu_fleet.nim.upgrade_drivers\n"
        "- ansible.builtin.import_playbook: gpu_fleet.nim.deploy\n"
    )
    play.playbook = "both"
    for host in HOSTS:
        play.answers[host].update(GOOD_DEPLOY)
    # The driver is rolled out on two hosts, the models on another one.
    play.answers["gpu03"]["upgrade prestaged"] = dict(LOOK, due=False)
    for host in ("gpu01", "gpu02"):
        play.answers[host]["deploy prestaged"] = dict(GOOD_DEPLOY["deploy prestaged"], due=False)
    code, output = play.run()
    assert code == 0, output
    assert [play.turn(host) for host in HOSTS] == [TURN, TURN, DEPLOY_TURN]
    assert "Batch 1 of 2: gpu01." in output and "Batch 1 of 1: gpu03." in output and "no host" not in output
    # The second one with nothing to do is over after its look.
    play.answers["gpu03"]["deploy prestaged"] = dict(GOOD_DEPLOY["deploy prestaged"], due=False)
    code, output = play.run()
    assert code == 0 and "0 of 3 hosts are to be updated in 0 batches" in output, output
    assert [play.turn(host) for host in HOSTS] == [TURN, TURN, []] and output.count("updated.") == 1


def test_a_second_rollout_of_the_same_kind_has_answers_of_its_own(play: Play) -> None:
    (play.copy / "playbooks" / "twice.yml").write_text(
        "- ansible.builtin.import_playbook: gpu_fleet.nim.upgrade_drivers\n" * 2
    )
    play.playbook = "twice"
    not_ready = {"failed": True, "outcome": "stranded", "msg": "It does not load."}
    play.answers["gpu01"]["upgrade ready"] = [GOOD["upgrade ready"], not_ready]
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 2, output
    # Nothing that came of the first one counts in the second: not for the host that fails, and not for those that wait.
    assert play.turn("gpu01") == [*TURN, *TURN[:3]] and play.turn("gpu02") == play.turn("gpu03") == TURN
    second = output.partition("3 updated.")[2]
    assert "1 out of service, 2 not begun." in second and "The run stops after 1 of 3 hosts" in second, output
    assert "out of service: It does not load. Run again" in second and "ended before its turn" in second
    # Nor when only the drain fails, which leaves the driver in place.
    play.answers["gpu01"]["upgrade ready"] = GOOD["upgrade ready"]
    play.answers["gpu01"]["gateway drained"] = [{}, {"failed": True, "msg": "It is the last one that serves llama."}]
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 2, output
    assert play.turn("gpu01") == [*TURN, *TURN[:2], "upgrade restored", "gateway enabled of llama"]
    assert "1 restored, 2 not begun." in output.partition("3 updated.")[2], output


def test_a_second_deployment_has_answers_of_its_own(play: Play) -> None:
    (play.copy / "playbooks" / "twice.yml").write_text("- ansible.builtin.import_playbook: gpu_fleet.nim.deploy\n" * 2)
    play.playbook = "twice"
    for host in HOSTS:
        play.answers[host].update(GOOD_DEPLOY)
    play.answers["gpu01"]["gateway drained"] = [{}, {"failed": True, "msg": "It is the last one that serves llama."}]
    code, output = play.run(nim_deploy_max_unavailable=1)
    assert code == 2, output
    assert play.turn("gpu01") == [*DEPLOY_TURN, *DEPLOY_TURN[:2], "deploy restored", "gateway enabled of llama"]
    assert "1 restored, 2 not begun." in output.partition("3 updated.")[2], output


def test_requests_of_an_earlier_rollout_of_the_same_command_are_not_counted_again(play: Play) -> None:
    (play.copy / "playbooks" / "both.yml").write_text(
        "- ansible.builtin.import_playbook: gpu_fleet.nim.upgrade_drivers\n"
        "- ansible.builtin.import_playbook: gpu_fleet.nim.deploy\n"
    )
    play.playbook = "both"
    for host in HOSTS:
        play.answers[host].update(GOOD_DEPLOY)
        play.answers[host]["deploy prestaged"] = dict(GOOD_DEPLOY["deploy prestaged"], due=host == "gpu03")

    def look(at: float, process: str, requests: int) -> dict[str, object]:
        traffic = [{"backend": "meta_llama", "requests": requests, "failed": 0, "truncated": 0}]
        return dict(seen(), at=at, process=process, traffic=traffic)

    # The upgrade looks five times, the deployment three times.
    looks = [look(100 * number, "p1", 100 * number) for number in range(1, 6)]
    play.answers["gw1"]["look"] = [*looks, look(600, "p2", 10), look(700, "p2", 20), look(800, "p2", 50)]
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 0, output
    assert "during the run: 400, of them" in output and "during the run: 40, of them" in output, output
    assert "reloaded" not in output


# -- two operators --------------------------------------------------------------------------------


def claimed(seen: float) -> dict[str, object]:
    """A look that has left word of this run on the host."""
    return dict(LOOK, record={"claim": {"run": "me", "seen": seen, "lease": 3600}})


def test_a_run_that_is_refused_or_ends_early_leaves_the_hosts_to_others(play: Play) -> None:
    for host in HOSTS:
        play.answers[host]["upgrade prestaged"] = claimed(time.time())
    play.answers["gpu02"]["upgrade prestaged"] = {"failed": True, "reason": "upgrade_running", "msg": "Bob is at it."}
    code, output = play.run()
    assert code == 2 and "gpu02 cannot be updated, so nothing was begun" in output, output
    assert sorted(play.log[-3:]) == ["%s: claim absent" % host for host in HOSTS] and output.count("failed=1") == 1
    # A gateway that cannot be asked is another cause; and who has written nothing takes nothing back.
    play.answers["gpu02"]["upgrade prestaged"] = claimed(time.time())
    play.answers["gw1"]["look"] = {"failed": True, "msg": "No socket."}
    code, output = play.run()
    assert code == 2 and sorted(play.log[-3:]) == ["%s: claim absent" % host for host in HOSTS], output
    code, output = play.run("--check")
    assert code == 2 and not any("claim" in line for line in play.log), output
    # One is left by the plan, one is updated, one fails in its turn.
    play.answers["gw1"]["look"] = seen(gpu03={"serving": False, "foreign": True})
    play.answers["gpu02"]["upgrade drained"] = {"failed": True, "reason": "upgrade_running", "msg": "Bob is at it."}
    code, output = play.run(driver_upgrade_max_unavailable=2)
    assert code == 2 and "1 updated, 1 restored" in output, output
    claims = [line for line in play.log if "claim" in line]
    assert claims == ["gpu03: claim absent", "gpu02: claim absent"] and play.log[-1] == claims[-1]


def test_what_waits_is_kept_and_a_run_that_was_overtaken_drains_nothing_more(play: Play) -> None:
    # Looked at just now: nothing is renewed.
    for host in HOSTS:
        play.answers[host]["upgrade prestaged"] = claimed(time.time())
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 0 and not any("claim" in line for line in play.log), output
    # Downloads took long; once is enough for the next half hour.
    for host in HOSTS:
        play.answers[host]["upgrade prestaged"] = claimed(time.time() - 2000)
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 0 and [play.turn(host) for host in HOSTS] == [TURN] * 3, output
    assert [line for line in play.log if "claim" in line] == ["%s: claim" % host for host in HOSTS]
    assert play.log.index("gpu03: claim") < play.log.index("gpu01: upgrade drained")
    said = "Bob on ctl2 (process 8) is at the upgrade of its driver on this host, last seen 60 seconds ago."
    play.answers["gpu03"]["claim"] = {"failed": True, "reason": "upgrade_running", "msg": said}
    play.answers["gpu02"]["claim"] = "unreachable"
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 2 and [play.turn(host) for host in HOSTS] == [[], [], []], output
    assert "The run stops after 0 of 3 hosts, because gpu03: Bob on ctl2" in output and "3 not begun." in output
    # All at the same time.
    assert sorted(line for line in play.log if "absent" in line) == ["%s: claim absent" % host for host in HOSTS]


def test_requests_before_a_reload_are_still_known_in_the_end(play: Play) -> None:
    def look(at: float, process: str, requests: int) -> dict[str, object]:
        traffic = [{"backend": "meta_llama", "requests": requests, "failed": requests // 100, "truncated": 0}]
        return dict(seen(), at=at, process=process, traffic=traffic)

    play.answers["gw1"]["look"] = [
        look(100, "p1", 1000),
        look(200, "p1", 1300),
        look(300, "p1", 1500),
        look(400, "p2", 50),
        look(500, "p2", 250),
    ]
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 0, output
    assert "Requests at the gateways during the run: at least 750, of them 7 failed" in output
    assert "reloaded or restarted between 00:05:00 and 00:06:40 UTC" in output


def test_settings_of_ansible_change_nothing(play: Play) -> None:
    play.environment = {"ANSIBLE_STRATEGY": "free", "ANSIBLE_ANY_ERRORS_FATAL": "true"}
    play.answers["gpu02"]["upgrade ready"] = {"failed": True, "outcome": "rolled_back", "msg": "Not ready."}
    code, output = play.run(driver_upgrade_max_unavailable=2, driver_upgrade_failure_budget=1)
    assert code == 2, output
    assert play.turn("gpu01") == play.turn("gpu03") == TURN
    assert "2 updated, 1 rolled back." in output


def test_a_part_of_the_fleet_goes_within_the_limits_of_the_whole(play: Play) -> None:
    code, output = play.run("--limit", "gpu02", driver_upgrade_max_unavailable="25%")
    assert code == 0, output
    # Two others serve the model, and gpu04, which the inventory does not even have.
    assert [play.turn(host) for host in HOSTS] == [[], TURN, []] and "ready: llama 3 of 4" in output
    play.answers["gw1"]["look"] = seen(gpu01={"serving": False})
    code, output = play.run("--limit", "gpu02", driver_upgrade_max_unavailable="25%")
    assert code == 2 and "1 of at most 1 hosts are out of service (gpu01)" in output, output
    assert play.turn("gpu02") == []
    code, output = play.run("--limit", "gpu02", driver_upgrade_canary=["gpu02", "gpu22"])
    assert code == 2 and "driver_upgrade_canary = gpu22: the inventory has neither" in output, output
    code, output = play.run("--limit", "gpu02", driver_upgrade_min_ready_of={"lama": 2})
    assert code == 2 and "driver_upgrade_min_ready_of = lama: no host has a model of that name" in output, output


def test_hosts_may_be_drained_in_different_ways(play: Play, tmp_path: pathlib.Path) -> None:
    hosts = play.inventory["gpu_hosts"]["hosts"]
    hosts["gpu01"]["drain_hook"] = "none"
    hosts["gpu03"]["drain_gateways"] = ["gw2"]
    play.inventory["nim_gateways"]["hosts"] = {"gw1": {}}
    play.inventory["others"] = {"hosts": {"gw2": {}}}
    answer = seen()
    for gateway, host in (("gw1", "gpu02"), ("gw2", "gpu03")):
        servers = [server for server in answer["servers"] if server["host"] == host]
        play.answers[gateway] = {"look": dict(answer, servers=servers)}
    code, output = play.run(driver_upgrade_max_unavailable=1)
    assert code == 0, output
    assert play.turn("gpu01") == [call for call in TURN if "gateway" not in call] and play.turn("gpu02") == TURN
    assert play.log.count("gw1: look") == play.log.count("gw2: look") == 5


def test_an_own_command_that_fails_says_what_and_how_to_try_it(play: Play) -> None:
    command = ["/bin/sh", "-c", "echo starting >&2; echo no such node >&2; exit 3"]
    code, output = play.run(drain_hook="command", drain_command=command)
    assert code == 2, output
    assert "drain_command (/bin/sh) for gpu01, drained, ended with status 3: no such node. Run it by" in output
    code, output = play.run(drain_hook="command")
    assert code == 2 and "drain_hook is command and drain_command is empty" in output, output
    assert [play.turn(host) for host in HOSTS] == [[], [], []]
    # No host is restarted under its clients because nobody has said which gateways there are.
    code, output = play.run(drain_hook="haproxy", drain_gateways=[])
    assert code == 2 and "drain_hook is haproxy and drain_gateways is empty" in output, output
    assert [play.turn(host) for host in HOSTS] == [[], [], []]


def test_a_host_that_is_gone_when_it_is_to_be_rebooted_counts_and_is_told(play: Play) -> None:
    # Nobody answers under that name, so Ansible's own module for it finds the host unreachable.
    play.answers["gpu01"]["upgrade ready"] = [dict(GOOD["upgrade ready"], reboot_required=True), "lost"]
    code, output = play.run(driver_upgrade_failure_budget=1, driver_upgrade_max_unavailable=2)
    assert code == 2, output
    assert play.turn("gpu01") == ["upgrade drained", "gateway drained", "upgrade ready", "upgrade ready"]
    assert play.turn("gpu02") == TURN and "1 out of service" in output
    assert "gpu01: The host cannot be reached any more." in output


def test_only_hosts_with_a_model_that_keeps_none_may_take_the_last_server_away(play: Play) -> None:
    for host, model in zip(HOSTS, ("llama", "dev", "llama")):
        play.inventory["gpu_hosts"]["hosts"][host]["nim_models"] = [
            {"name": model, "image": "nvcr.io/nim/meta/llama:1.8.5", "gpus": 1}
        ]
        play.answers[host]["upgrade prestaged"] = dict(LOOK, models=[model], serving=[model])
    play.environment = {"TELL_LAST": "1"}
    code, output = play.run(driver_upgrade_max_unavailable=1, driver_upgrade_min_ready_of={"dev": 0})
    assert code == 0, output
    assert [line for line in play.log if "allow_last" in line] == ["gpu02: gateway drained (allow_last)"]
    code, output = play.run(driver_upgrade_max_unavailable=1, driver_upgrade_min_ready=0)
    assert code == 0 and len([line for line in play.log if "allow_last" in line]) == 3, output
