# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Other models on a host that serves: the steps, the way back, and that it can be killed anywhere."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils import _nim_deploy
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy import NimDeploy
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy_planner import STEPS, DeployRecord
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy_snapshot import PATH as KEPT
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_deploy_snapshot import Snapshot
from ansible_collections.gpu_fleet.nim.plugins.module_utils._nim_paths import KEY_FILE, MAINTENANCE_FILE
from ansible_collections.gpu_fleet.nim.plugins.module_utils._resource import Disruption, Outcome, converge
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout_record import LEASE, read
from deploy_world import NEW, NEW_DIGEST, NEWER, OLD, DeployWorld
from nim_machine import DIGEST, KEY, LLAMA, llama, nemo
from upgrade_world import KilledError

GOALS = ("prestaged", "drained", "ready", "returned")
RECORD = DeployRecord.path


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> DeployWorld:
    return DeployWorld(monkeypatch)


def call(
    world: DeployWorld, goal: str, *models: dict[str, t.Any], **more: t.Any
) -> tuple[Outcome[t.Any], dict[str, t.Any]]:
    """One call of the module."""
    check_mode = more.pop("check_mode", False)
    resource = world.deploy(goal, *models, **more)
    outcome = converge(world.host, resource, check_mode=check_mode)
    return outcome, resource.result(outcome.state)


def roll(world: DeployWorld, *models: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
    """What the role does with a host."""
    answer: dict[str, t.Any] = {}
    for goal in GOALS:
        answer = call(world, goal, *models, **more)[1]
    return answer


def failure(world: DeployWorld, *models: dict[str, t.Any], **more: t.Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        roll(world, *models, **more)
    return caught.value


def record_of(world: DeployWorld) -> DeployRecord:
    found = read(world.host, DeployRecord)
    assert found is not None
    return found


# -- the way there --------------------------------------------------------------------------------


def test_another_version_of_one_model(world: DeployWorld) -> None:
    world.host.calls.clear()
    answer = roll(world)
    assert world.runs() == NEW_DIGEST and world.runs("nemo") == DIGEST
    assert answer["outcome"] == "updated" and not answer["due"] and not answer["open"]
    assert world.requests == ["llama", "nemo"]
    assert [entry["step"] for entry in record_of(world).steps] == list(STEPS)
    assert (
        record_of(world).before == "llama 1.8.4, nemo 2.0.13" and record_of(world).target == "llama 1.8.5, nemo 2.0.13"
    )
    # The other one was not restarted, and what was kept is gone.
    restarts = [argv for argv in world.host.calls if argv[:2] == ("systemctl", "restart")]
    assert restarts == [("systemctl", "restart", "nim-llama.service")]
    assert not world.host.exists(KEPT)


def test_a_second_run_changes_nothing(world: DeployWorld) -> None:
    roll(world)
    before = dict(world.host.files)
    for goal in GOALS:
        outcome, answer = call(world, goal)
        assert not outcome.changed and not answer["due"], goal
    assert world.host.files == before


def test_a_host_whose_models_run_as_wanted_gets_no_record(world: DeployWorld) -> None:
    answer = roll(world, *OLD)
    assert not answer["due"] and read(world.host, DeployRecord) is None
    assert answer["message"] == "The models run as wanted: llama 1.8.4 (%s), nemo 2.0.13 (%s)." % (
        ("abababababab",) * 2
    )


def test_check_mode_says_every_step_and_touches_nothing(world: DeployWorld) -> None:
    before = dict(world.host.files)
    outcome, answer = call(world, "returned", check_mode=True)
    assert [change.action for change in outcome.changes] == list(STEPS)
    assert max(change.disruption for change in outcome.changes) == Disruption.RESTART_NIM
    assert answer["runs"] == "llama 1.8.4, nemo 2.0.13" and answer["target"] == "llama 1.8.5, nemo 2.0.13"
    looked = call(world, "prestaged", check_mode=True)[1]
    assert len(looked["steps"]) == len(STEPS) and looked["serving"] == ["llama", "nemo"] and looked["way_back"] == ""
    assert world.host.files == before and world.runs() == DIGEST


def test_nothing_is_changed_before_the_host_was_drained(world: DeployWorld) -> None:
    for goal in ("prestaged", "drained"):
        call(world, goal)
    assert world.runs() == DIGEST and not world.host.exists(KEPT) and record_of(world).open
    assert json.loads(world.host.files["/etc/nim/llama.json"])["digest"] == DIGEST


def test_another_digest_behind_the_same_tag(world: DeployWorld) -> None:
    world.pull(LLAMA)
    answer = call(world, "prestaged", *OLD, check_mode=True)[1]
    assert "llama 1.8.4 (abababababab)" in answer["runs"] and "llama 1.8.4 (cdcdcdcdcdcd)" in answer["target"]
    roll(world, *OLD)
    assert world.runs() == NEW_DIGEST


def test_a_model_that_is_new_and_one_that_goes(world: DeployWorld) -> None:
    answer = roll(world, llama(state="absent"), nemo(), llama(name="third", port=8003))
    assert world.runs() == "" and world.runs("third") == DIGEST and "nim-llama" not in world.api.list
    assert answer["models"] == answer["wanted"] == ["nemo", "third"]


# -- what is refused ------------------------------------------------------------------------------


def test_an_image_that_is_not_there_is_refused_before_anything(world: DeployWorld) -> None:
    del world.api.images[NEWER]
    error = failure(world)
    assert error.reason == "image_missing" and "outcome" not in error.facts
    assert world.runs() == DIGEST and not record_of(world).open
    # In check mode it will be pulled first.
    assert call(world, "prestaged", check_mode=True)[1]["due"]


def test_a_look_that_fails_leaves_an_open_deployment_as_it_is(world: DeployWorld) -> None:
    """Who only looks cannot give the host its requests back: a closed record would leave it drained for good."""
    call(world, "drained")
    image = world.api.images.pop(NEWER)
    with pytest.raises(FleetError) as caught:
        call(world, "prestaged")
    assert caught.value.reason == "image_missing" and "outcome" not in caught.value.facts
    assert record_of(world).open and record_of(world).reached("drained") and world.runs() == DIGEST
    world.api.images[NEWER] = image
    assert roll(world)["outcome"] == "updated"


def test_what_cannot_be_set_up_is_refused_at_the_look(world: DeployWorld) -> None:
    with pytest.raises(FleetError) as caught:
        call(world, "prestaged", llama(image=NEWER, gpus=3), nemo(), check_mode=True)
    assert caught.value.reason == "gpus_unavailable"
    assert caught.value.facts["serving"] == caught.value.facts["models"] == ["llama", "nemo"]
    assert world.runs() == DIGEST and read(world.host, DeployRecord) is None


def test_an_image_of_before_that_is_gone_is_told(world: DeployWorld) -> None:
    del world.api.images[LLAMA]
    looked = call(world, "prestaged", check_mode=True)[1]
    assert looked["way_back"].startswith("The image nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.4 that model llama runs")


@pytest.mark.parametrize(
    "services, text", [({"state": "absent"}, "use playbook remove"), ({"goal": "done"}, "state = ")]
)
def test_bad_options(world: DeployWorld, services: dict[str, str], text: str) -> None:
    with pytest.raises(FleetError, match=text) as caught:
        world.deploy(services.pop("goal", "ready"), **services)
    assert caught.value.reason == "invalid_option"


def test_a_host_under_maintenance_is_left_alone(world: DeployWorld) -> None:
    world.host.files[MAINTENANCE_FILE] = b"bad fan\n"
    outcome, answer = call(world, "drained")
    assert not outcome.changed and answer["held"].startswith("somebody has put this host under maintenance")
    assert read(world.host, DeployRecord) is None


def test_a_host_that_a_driver_upgrade_has_out_is_left_alone(world: DeployWorld) -> None:
    steps = [{"step": "drained", "at": 1.0, "seconds": 0.1}]
    world.host.files["/var/lib/gpu_fleet/driver-upgrade.json"] = json.dumps({"steps": steps, "outcome": ""}).encode()
    outcome, answer = call(world, "drained")
    assert not outcome.changed and "the upgrade of its driver has taken this host out" in answer["held"]


def test_a_second_run_is_told_who_runs(world: DeployWorld) -> None:
    call(world, "drained", run="ann on c1 (process 7)")
    world.mortal.clock += 30
    with pytest.raises(FleetError) as caught:
        call(world, "ready", run="bob on c2 (process 8)")
    assert (
        caught.value.reason == "upgrade_running" and "ann on c1 (process 7) is at a deployment" in caught.value.message
    )
    assert world.runs() == DIGEST
    world.mortal.clock += LEASE
    assert call(world, "ready", run="bob on c2 (process 8)")[1]["record"]["claim"]["run"].startswith("bob")


@pytest.mark.parametrize("moment", ["drained", "changed", "restarted", "not ready"])
def test_maintenance_that_begins_meanwhile_keeps_the_host_out(
    world: DeployWorld, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whoever goes on after the module would else give requests to a host that somebody works on."""

    def begin() -> None:
        world.host.files[MAINTENANCE_FILE] = b"bad fan, Kim\n"

    for goal in ("prestaged", "drained"):
        call(world, goal)
    with monkeypatch.context() as patch:
        if moment == "drained":
            begin()
        elif moment == "changed":
            take = Snapshot.take
            patch.setattr(Snapshot, "take", staticmethod(lambda *given: (take(*given), begin())))
        elif moment == "restarted":
            restart = world.host.commands["systemctl restart *"]
            patch.setitem(
                world.host.commands,
                "systemctl restart *",
                lambda *given: (begin(), restart(*given))[1],  # type: ignore[operator]  # a callable, here
            )
        else:

            def stopped(*_given: t.Any) -> None:
                begin()
                raise FleetError("start_timeout", "Model llama is not ready after 1800 seconds.")

            patch.setattr(_nim_deploy, "wait_ready", stopped)
        with pytest.raises(FleetError) as caught:
            call(world, "ready")
    assert "and now somebody has put this host under maintenance; it stays out" in caught.value.message
    assert caught.value.reason == "host_held" and "outcome" not in caught.value.facts
    assert ("Model llama is not ready after 1800 seconds. " in caught.value.message) == (moment == "not ready")
    assert world.host.files[MAINTENANCE_FILE] == b"bad fan, Kim\n" and record_of(world).open
    with pytest.raises(FleetError):
        call(world, "returned")
    # The fleet's plan counts it as out and leaves it; afterwards a run goes on.
    assert call(world, "prestaged")[1]["held"]
    del world.host.files[MAINTENANCE_FILE]
    assert roll(world)["outcome"] == "updated" and world.runs() == NEW_DIGEST


# -- the way back ---------------------------------------------------------------------------------


def test_what_does_not_become_ready_gets_back_the_digest_of_before(world: DeployWorld) -> None:
    before = dict(world.end())
    world.sick.add(NEW_DIGEST)
    error = failure(world)
    assert error.reason == "start_timeout" and error.facts["outcome"] == "rolled_back"
    assert error.message == (
        "Model llama is not ready after 1800 seconds. What ran before (llama 1.8.4, nemo 2.0.13) was put back and answers."
    )
    assert world.end() == before and world.runs() == DIGEST
    assert record_of(world).outcome == "rolled_back" and not record_of(world).claim
    # For the report: how long the host was out.
    times = error.facts["record"]["failure"]
    assert record_of(world).failure == times and times["began"] <= times["at"] <= times["until"]
    # The next run tries again, and only says so until then.
    assert call(world, "prestaged", check_mode=True)[1]["due"]
    world.sick.clear()
    assert roll(world)["outcome"] == "updated" and world.runs() == NEW_DIGEST


def test_the_same_tag_goes_back_to_its_digest_of_before(world: DeployWorld) -> None:
    world.pull(LLAMA)
    world.sick.add(NEW_DIGEST)
    assert failure(world, *OLD).facts["outcome"] == "rolled_back"
    assert world.runs() == DIGEST


def test_models_that_came_go_and_models_that_went_come_back(world: DeployWorld) -> None:
    before = dict(world.end())
    world.sick.add(NEW_DIGEST)
    models = (llama(state="absent"), nemo(), llama(name="third", image=NEWER, port=8003))
    assert failure(world, *models).facts["outcome"] == "rolled_back"
    assert world.end() == before


def test_a_unit_that_does_not_start_goes_back(world: DeployWorld) -> None:
    restart = world.host.commands["systemctl restart *"]

    def only_the_old_one(host: t.Any, *given: t.Any) -> t.Any:
        new = json.loads(host.files["/etc/nim/llama.json"])["digest"] == NEW_DIGEST
        world.fails = {"nim-llama.service"} if new else set()
        return restart(host, *given)  # type: ignore[operator]  # a callable, here

    for verb in ("restart", "start"):
        world.host.commands["systemctl %s *" % verb] = only_the_old_one
    error = failure(world)
    assert error.reason == "start_failed" and error.facts["outcome"] == "rolled_back"
    assert world.runs() == DIGEST


def test_a_way_back_that_fails_too_keeps_the_host_out_and_the_next_run_goes_on(world: DeployWorld) -> None:
    world.sick |= {NEW_DIGEST, DIGEST}
    error = failure(world)
    assert error.facts["outcome"] == "stranded" and "the host stays out of service" in error.message
    assert record_of(world).open and world.host.exists(KEPT)
    world.sick = {NEW_DIGEST}
    # What is put back is what ran before the first try.
    assert failure(world).facts["outcome"] == "rolled_back" and world.runs() == DIGEST
    world.sick = set()
    assert roll(world)["outcome"] == "updated"


def test_a_stranded_host_goes_on_to_another_target(world: DeployWorld) -> None:
    world.sick |= {NEW_DIGEST, DIGEST}
    failure(world)
    world.sick.clear()
    assert roll(world, *OLD)["outcome"] == "updated" and world.runs() == DIGEST and not world.host.exists(KEPT)


def test_giving_up_before_and_after_the_change(world: DeployWorld) -> None:
    call(world, "drained")
    answer = call(world, "restored")[1]
    assert answer["outcome"] == "restored" and not answer["open"] and world.runs() == DIGEST
    call(world, "drained")
    call(world, "ready")
    with pytest.raises(FleetError) as caught:
        call(world, "restored")
    assert caught.value.reason == "not_restorable"
    assert call(world, "returned")[1]["outcome"] == "updated"


def test_a_host_under_maintenance_is_not_given_up(world: DeployWorld) -> None:
    """After a drain that took too long: whoever works on it now would else get its requests."""
    call(world, "drained")
    world.host.files[MAINTENANCE_FILE] = b"bad fan, Kim\n"
    with pytest.raises(FleetError) as caught:
        call(world, "restored")
    assert caught.value.reason == "host_held" and "outcome" not in caught.value.facts and record_of(world).open
    del world.host.files[MAINTENANCE_FILE]
    assert call(world, "restored")[1]["outcome"] == "restored"


def test_another_key_goes_back_too(world: DeployWorld) -> None:
    world.converge(*OLD, key=KEY)
    world.sick.add(NEW_DIGEST)
    failure(world, ngc_api_key=KEY + "-other")
    assert KEY + "-other" not in world.host.files[KEY_FILE].decode() and KEY in world.host.files[KEY_FILE].decode()


def test_what_was_started_since_it_was_planned_runs_again_too(world: DeployWorld) -> None:
    world.host.run(["systemctl", "stop", "nim-nemo.service"])
    call(world, "drained")
    assert record_of(world).workloads == ("llama",)
    world.host.run(["systemctl", "start", "nim-nemo.service"])
    world.sick.add(NEW_DIGEST)
    with pytest.raises(FleetError):
        call(world, "ready", llama(image=NEWER), nemo(state="absent"))
    assert record_of(world).workloads == ("llama", "nemo") and world.runs("nemo") == DIGEST


@pytest.mark.parametrize("models", [NEW, (llama(), nemo(image=NEWER))], ids=["healthy one", "sick one"])
def test_a_model_that_was_not_ready_before_keeps_no_other_out_of_service(
    world: DeployWorld, models: tuple[dict[str, t.Any], ...]
) -> None:
    world.ill = {"nemo"}
    before = world.end()
    error = failure(world, *models)
    assert error.reason == "start_timeout" and error.facts["outcome"] == "rolled_back"
    # The load balancer is told of this one alone, and the other runs as it did.
    assert error.facts["record"]["serving"] == ("llama",) and error.facts["record"]["workloads"] == ("llama", "nemo")
    assert world.end() == before and world.runs("nemo") == DIGEST


def test_giving_up_waits_for_no_model_that_was_not_ready_before(world: DeployWorld) -> None:
    world.ill = {"nemo"}
    call(world, "drained")
    answer = call(world, "restored")[1]
    assert answer["outcome"] == "restored" and answer["record"]["serving"] == ("llama",)


def test_giving_up_gives_back_what_became_ready_meanwhile(world: DeployWorld) -> None:
    world.ill = {"nemo"}
    call(world, "drained")
    world.ill = set()
    assert call(world, "restored")[1]["record"]["serving"] == ("llama", "nemo")


def test_what_was_ready_before_the_first_try_counts_in_the_next_one(world: DeployWorld) -> None:
    world.ill = {"nemo"}
    call(world, "drained")
    # From here on llama does not become ready with any image.
    world.sick |= {NEW_DIGEST, DIGEST}
    with pytest.raises(FleetError) as caught:
        call(world, "ready")
    assert caught.value.facts["outcome"] == "stranded" and record_of(world).serving == ("llama",)
    world.sick = {NEW_DIGEST}
    assert failure(world).facts["outcome"] == "rolled_back" and record_of(world).serving == ("llama",)


def fill_disk(world: DeployWorld, full: t.Callable[[], bool]) -> None:
    """From some moment on nothing can be written below /var."""
    write = world.host.write_file

    def write_file(path: str, content: t.Any, **more: t.Any) -> None:
        if path.startswith("/var/") and full():
            raise FleetError("write_failed", "Writing %s failed: No space left on device." % path)
        write(path, content, **more)

    world.host.write_file = write_file  # type: ignore[method-assign]  # from one moment on


@pytest.mark.parametrize("changed, outcome", [(False, "restored"), (True, "rolled_back")])
def test_a_disk_that_is_full_does_not_keep_the_host_from_going_back(
    world: DeployWorld, changed: bool, outcome: str
) -> None:
    """Not even the record can be written then."""
    before = world.end()
    call(world, "drained")
    fill_disk(world, lambda: not changed or NEW_DIGEST in world.host.files["/etc/nim/llama.json"].decode())
    world.requests.clear()
    with pytest.raises(FleetError) as caught:
        call(world, "ready")
    assert caught.value.reason == "write_failed" and caught.value.facts["outcome"] == outcome
    assert caught.value.facts["record"]["serving"] == ("llama", "nemo") == tuple(world.requests[-2:])
    assert world.end() == before


def test_a_disk_that_is_full_while_models_start_does_not_end_the_wait(
    world: DeployWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign of life is worth less than the models."""
    call(world, "drained", run="ann")
    full: list[bool] = []
    fill_disk(world, lambda: bool(full))
    wait = _nim_deploy.wait_ready

    def slowly(*given: t.Any) -> None:
        full.append(True)
        world.mortal.clock += 90
        wait(*given)
        full.clear()

    monkeypatch.setattr(_nim_deploy, "wait_ready", slowly)
    assert call(world, "ready", run="ann")[1]["step"] == "ready"


def test_a_host_that_serves_the_new_ones_is_not_taken_back_for_its_record(world: DeployWorld) -> None:
    for goal in ("drained", "ready"):
        call(world, goal)
    full = [True]
    fill_disk(world, lambda: bool(full))
    world.host.calls.clear()
    with pytest.raises(FleetError) as caught:
        call(world, "returned")
    assert caught.value.reason == "write_failed" and "outcome" not in caught.value.facts
    assert world.runs() == NEW_DIGEST and not [argv for argv in world.host.calls if "stop" in argv or "restart" in argv]
    full.clear()
    assert roll(world)["outcome"] == "updated"


def test_nothing_goes_back_to_what_an_earlier_deployment_has_left(world: DeployWorld) -> None:
    """The role by itself, months later: the record on the host is that of another deployment."""
    assert roll(world)["outcome"] == "updated"
    fill_disk(world, lambda: True)
    world.host.calls.clear()
    world.requests.clear()
    with pytest.raises(FleetError) as caught:
        call(world, "drained", *OLD)
    assert caught.value.reason == "write_failed" and "outcome" not in caught.value.facts
    assert not [argv for argv in world.host.calls if "start" in argv or "restart" in argv]


def test_what_nobody_has_foreseen_puts_back_what_ran_before(world: DeployWorld) -> None:
    restart = world.host.commands["systemctl restart *"]

    def no_memory(*_given: t.Any) -> t.Any:
        raise OSError(12, "Cannot allocate memory")

    before = world.end()
    world.host.commands["systemctl restart *"] = no_memory
    error = failure(world)
    assert error.message.startswith("Step changed of the deployment failed with OSError")
    assert error.reason == "internal_error" and error.facts["outcome"] == "rolled_back" and world.end() == before
    # And on the way back.
    world.host.commands["systemctl restart *"] = restart
    world.sick = {NEW_DIGEST}
    world.host.commands["systemctl start *"] = no_memory
    error = failure(world)
    assert error.facts["outcome"] == "stranded" and "It failed with OSError" in error.message


# -- killed anywhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("sick", [False, True], ids=["there", "back"])
@pytest.mark.parametrize(
    "models",
    [NEW, (llama(state="absent"), nemo(), llama(name="third", image=NEWER, port=8003))],
    ids=["version", "others"],
)
def test_killed_anywhere_and_run_again(
    monkeypatch: pytest.MonkeyPatch, models: tuple[dict[str, t.Any], ...], sick: bool
) -> None:
    def make() -> DeployWorld:
        world = DeployWorld(monkeypatch)
        world.sick = {NEW_DIGEST} if sick else set()
        return world

    def finish(world: DeployWorld) -> str:
        try:
            roll(world, *models)
        except FleetError as error:
            return "%s %s" % (error.reason, error.facts.get("outcome"))
        return "updated"

    world = make()
    said = finish(world)
    assert said == ("start_timeout rolled_back" if sick else "updated")
    wanted, total = world.end(), world.mortal.steps
    assert total > 10
    for number in range(1, total + 1):
        world = make()
        world.mortal.kill_after = number
        with pytest.raises(KilledError):
            finish(world)
        world.mortal.kill_after = None
        assert finish(world) == said, "killed after %d" % number
        assert world.end() == wanted, "killed after %d" % number
        found = read(world.host, DeployRecord)
        assert found is None or not found.open, "killed after %d" % number


# -- odds and ends --------------------------------------------------------------------------------


def test_what_is_kept_is_for_root_alone_and_the_record_has_no_secret(world: DeployWorld) -> None:
    models = (llama(secret_environment={"HF_TOKEN": "hf_unit_secret"}), nemo())
    world.converge(*models)
    call(world, "drained", llama(image=NEWER, secret_environment={"HF_TOKEN": "hf_unit_secret"}), nemo())
    call(world, "ready", llama(image=NEWER, secret_environment={"HF_TOKEN": "hf_unit_secret"}), nemo())
    assert world.host.modes[KEPT][0] == 0o600 and b"hf_unit_secret" in world.host.files[KEPT]
    assert world.host.modes[RECORD][0] == 0o644 and b"hf_unit_secret" not in world.host.files[RECORD]


@pytest.mark.parametrize(
    "kept",
    [
        b'{"files": 1}',
        b'{"files": {}}',
        b'{"files": {"/etc/nim/x.json": ["text", Infinity]}, "enabled": {}}',
        b'{"files": {"/etc/nim/x.json": [null, 420]}, "enabled": {}}',
        b'{"files": {"/etc/nim/x.json": ["text"]}, "enabled": {}}',
    ],
)
def test_what_was_kept_and_was_broken_keeps_the_host_out(world: DeployWorld, kept: bytes) -> None:
    call(world, "drained")
    world.sick.add(NEW_DIGEST)
    world.host.files[KEPT] = kept
    error = failure(world)
    assert error.facts["outcome"] == "stranded" and KEPT in error.message


def test_a_broken_record_is_reported_and_left(world: DeployWorld) -> None:
    world.host.files[RECORD] = b"{"
    with pytest.raises(FleetError) as caught:
        call(world, "prestaged")
    assert caught.value.reason == "state_unreadable" and "a deployment of its models" in caught.value.message


def test_the_digest_tells_targets_apart_and_nothing_of_secrets(world: DeployWorld) -> None:
    def digest(*models: dict[str, t.Any]) -> str:
        resource: NimDeploy = world.deploy("ready", *models)
        return resource.digest(resource.observe(world.host))

    assert digest(*NEW) == digest(*NEW) != digest(*OLD)
    assert digest(llama(secret_environment={"A": "one"})) == digest(llama(secret_environment={"A": "two"}))
