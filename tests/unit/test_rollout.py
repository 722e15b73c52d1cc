# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import typing as t
from dataclasses import replace

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._rollout import (
    CANARY,
    RESUME,
    ROLL,
    FleetHost,
    Limits,
    Rollout,
    Share,
    admit,
    exhausted,
    parse_share,
    plan_fleet,
)
from hypothesis import given
from hypothesis import strategies as st


def host(name: str, *models: str, **more: t.Any) -> FleetHost:
    more.setdefault("serving", frozenset(models))
    return FleetHost(name, models=frozenset(models), **more)


def out(name: str, *models: str, **more: t.Any) -> FleetHost:
    return host(name, *models, available=False, serving=frozenset(), **more)


def shape(plan: Rollout) -> list[tuple[str, list[str]]]:
    return [(batch.kind, list(batch.hosts)) for batch in plan.batches]


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, total, hosts",
    [(3, 10, 3), ("3", 10, 3), ("25%", 10, 3), ("25%", 4, 1), ("7%", 100, 7), ("0%", 9, 0), (" 100 % ", 7, 7)],
)
def test_a_share_is_absolute_or_percent_rounded_up(value: t.Any, total: int, hosts: int) -> None:
    assert parse_share("x", value).of(total) == hosts


@pytest.mark.parametrize("value", ["", "-1", "25.5%", "many", None, True, "101%", "٣"])
def test_what_is_no_share_is_refused_with_the_options_name(value: t.Any) -> None:
    with pytest.raises(FleetError, match=r"\Adriver_upgrade_max_parallel = ") as caught:
        parse_share("driver_upgrade_max_parallel", value)
    assert caught.value.reason == "invalid_option"


# -- batches --------------------------------------------------------------------------------------


def test_the_first_host_is_the_canary_and_the_rest_goes_in_slots() -> None:
    hosts = [host("h%d" % number, "llama") for number in range(8)]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(3)))
    assert shape(plan) == [
        (CANARY, ["h0"]),
        (ROLL, ["h1", "h2", "h3"]),
        (ROLL, ["h4", "h5", "h6"]),
        (ROLL, ["h7"]),
    ]
    assert [batch.capacity["llama"] for batch in plan.batches] == [7, 5, 5, 7]
    assert plan.capacity == {"llama": 8} and plan.left == {} and plan.done == ()


def test_a_canary_group_goes_before_the_others_whatever_its_place() -> None:
    hosts = [host("a"), host("b", canary=True), host("c"), host("d", canary=True)]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(2)))
    assert shape(plan) == [(CANARY, ["b", "d"]), (ROLL, ["a", "c"])]


def test_a_canary_that_cannot_go_yet_goes_later_and_another_one_is_the_canary() -> None:
    hosts = [host("a", "llama", canary=True), host("b", "llama", serving=frozenset()), host("c")]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(1)))
    assert shape(plan) == [(CANARY, ["b"]), (ROLL, ["a"]), (ROLL, ["c"])]


def test_replicas_of_a_model_never_go_together() -> None:
    hosts = [host("a", "llama"), host("b", "llama"), host("c", "qwen"), host("d", "qwen")]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(4)))
    assert shape(plan) == [(CANARY, ["a"]), (ROLL, ["b", "c"]), (ROLL, ["d"])]
    assert all(count >= 1 for batch in plan.batches for count in batch.capacity.values())


def test_the_only_replica_is_left_with_the_reason_unless_the_operator_says_so() -> None:
    hosts = [host("a", "llama"), host("b", "qwen"), host("c", "qwen")]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(2)))
    assert shape(plan) == [(CANARY, ["b"]), (ROLL, ["c"])]
    assert plan.left == {"a": "model llama would have 0 ready replicas and keeps at least 1"}
    allowed = plan_fleet(hosts, Limits(max_unavailable=Share(2), min_ready_of={"llama": 0}))
    assert sorted(allowed.order) == ["a", "b", "c"]


def test_a_model_that_is_not_ready_on_a_host_is_not_lost_with_it() -> None:
    hosts = [host("a", "llama", serving=frozenset()), host("b", "llama")]
    plan = plan_fleet(hosts, Limits())
    # The host that serves nothing goes first; when it is back and ready, the other one can go.
    assert shape(plan) == [(CANARY, ["a"]), (ROLL, ["b"])]
    assert [batch.capacity["llama"] for batch in plan.batches] == [1, 1]


def test_hosts_that_are_down_or_drained_by_others_use_up_the_slots() -> None:
    hosts = [host("a"), host("b"), host("c"), out("down"), out("drained", due=False)]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(3)))
    assert shape(plan) == [(CANARY, ["a"]), (ROLL, ["b"]), (ROLL, ["c"])]
    assert plan.left == {"down": "it is out of service"}
    assert [batch.unavailable for batch in plan.batches] == [3, 3, 3]
    none = plan_fleet(hosts, Limits(max_unavailable=Share(2)))
    assert none.batches == ()
    assert none.left["a"] == "2 of at most 2 hosts are out of service (down, drained)"


def test_a_host_that_an_earlier_run_has_left_outside_comes_first_and_needs_no_slot() -> None:
    hosts = [host("a", "llama"), host("b", "llama"), out("c", "llama", resumable=True)]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(1)))
    assert shape(plan) == [(RESUME, ["c"]), (CANARY, ["a"]), (ROLL, ["b"])]
    assert [batch.capacity["llama"] for batch in plan.batches] == [2, 2, 2]


def test_a_host_that_is_down_can_go_beside_others_but_is_no_canary_while_one_serves() -> None:
    fleet = [out("a", "llama", down=True), host("b", "llama"), host("c", "llama"), host("d", "llama")]
    plan = plan_fleet(fleet, Limits(max_unavailable=Share(2)))
    # It uses up a slot until it has come back.
    assert shape(plan) == [(CANARY, ["b"]), (ROLL, ["a", "c"]), (ROLL, ["d"])]
    assert [batch.unavailable for batch in plan.batches] == [2, 2, 1]
    assert shape(plan_fleet(fleet[:1], Limits())) == [(CANARY, ["a"])]


def test_max_parallel_limits_a_batch_and_zero_does_not() -> None:
    hosts = [host("h%d" % number) for number in range(6)]
    limits = Limits(max_parallel=Share(2), max_unavailable=Share(100, percent=True))
    assert [len(batch.hosts) for batch in plan_fleet(hosts, limits).batches] == [1, 2, 2, 1]
    limits = replace(limits, max_parallel=Share(0))
    assert [len(batch.hosts) for batch in plan_fleet(hosts, limits).batches] == [1, 5]
    # A percentage never comes down to none, and none would mean any number.
    limits = replace(limits, max_parallel=Share(1, percent=True))
    assert [len(batch.hosts) for batch in plan_fleet(hosts, limits).batches] == [1] * 6


def test_skipped_and_finished_hosts_are_told_apart() -> None:
    hosts = [host("a", skip="driver_upgrade_skip"), host("b", due=False), host("c")]
    plan = plan_fleet(hosts, Limits(max_unavailable=Share(1)))
    assert shape(plan) == [(CANARY, ["c"])]
    assert plan.left == {"a": "driver_upgrade_skip"} and plan.done == ("b",)
    assert plan.as_dict()["batches"][0]["hosts"] == ["c"]


def test_an_empty_fleet_has_an_empty_plan() -> None:
    plan = plan_fleet([], Limits())
    assert plan.batches == () and plan.left == {} and plan.capacity == {}


# -- before each batch ----------------------------------------------------------------------------


def test_a_batch_is_admitted_as_the_fleet_is_now() -> None:
    limits = Limits(max_unavailable=Share(2))
    hosts = [host("a", "llama"), host("b", "llama"), host("c", "qwen"), host("d", "qwen")]
    assert admit(hosts, limits, ["b", "c"]) == (("b", "c"), {})
    # The canary has failed: it is out, and llama is only on b.
    hosts[0] = out("a", "llama")
    chosen, reasons = admit(hosts, limits, ["b", "c"])
    assert chosen == ("c",)
    assert reasons == {"b": "model llama would have 0 ready replicas and keeps at least 1"}
    assert admit(hosts, limits, ["a"]) == ((), {"a": "it is out of service"})


def test_the_failure_budget_counts_over_all_batches() -> None:
    assert exhausted([], Share(0), 5) == ""
    assert exhausted(["b", "b"], Share(1), 5) == ""
    assert exhausted(["b"], Share(0), 5) == "1 host failed or cannot be reached (b) and the budget is 0"
    assert exhausted(["a", "b"], Share(20, percent=True), 5).startswith("2 hosts failed")
    assert exhausted(["a", "b"], Share(40, percent=True), 5) == ""


# -- for every fleet ------------------------------------------------------------------------------

MODELS = ["llama", "qwen", "mistral"]


@st.composite
def fleets(draw: t.Any) -> list[FleetHost]:
    found = []
    for number in range(draw(st.integers(0, 9))):
        models = draw(st.frozensets(st.sampled_from(MODELS)))
        available = draw(st.booleans()) or draw(st.booleans())
        found.append(
            FleetHost(
                "h%d" % number,
                serving=draw(st.frozensets(st.sampled_from(sorted(models)))) if available and models else frozenset(),
                models=models,
                due=draw(st.booleans()) or draw(st.booleans()),
                available=available,
                resumable=draw(st.booleans()),
                down=not available and draw(st.booleans()),
                skip=draw(st.sampled_from(["", "", "", "asked for"])),
                canary=draw(st.sampled_from([False, False, True])),
            )
        )
    return found


SHARES = st.one_of(
    st.builds(Share, st.integers(0, 10)), st.builds(lambda number: Share(number, percent=True), st.integers(0, 100))
)
LIMITS = st.builds(
    Limits,
    max_parallel=SHARES,
    max_unavailable=SHARES,
    min_ready=st.integers(0, 3),
    min_ready_of=st.dictionaries(st.sampled_from(MODELS), st.integers(0, 3)),
)


@given(fleets(), LIMITS)
def test_every_plan_keeps_the_limits_at_every_moment(hosts: list[FleetHost], limits: Limits) -> None:
    plan = plan_fleet(hosts, limits)
    known = {entry.name: entry for entry in hosts}
    allowed = max(1, limits.max_unavailable.of(len(hosts)))
    for batch in plan.batches:
        assert batch.hosts
        fresh = [name for name in batch.hosts if known[name].available]
        down = [name for name, entry in known.items() if not entry.available]
        out_now = {*down, *batch.hosts}
        assert batch.unavailable == len(out_now)
        # Hosts of others alone may exceed the limit; none is added then.
        assert not fresh or len(out_now) <= allowed
        if limits.max_parallel.of(len(hosts)):
            assert len(batch.hosts) <= max(1, limits.max_parallel.of(len(hosts)))
        for model in MODELS:
            ready = sum(model in entry.serving for name, entry in known.items() if name not in out_now)
            assert batch.capacity.get(model, 0) == ready
            if any(model in known[name].serving for name in fresh):
                assert ready >= limits.keeps(model)
        for name in batch.hosts:
            assert known[name].wanted
            known[name] = replace(
                known[name], available=True, down=False, due=False, serving=known[name].serving | known[name].models
            )


@given(fleets(), LIMITS)
def test_every_host_is_in_one_place_and_plans_are_repeatable(hosts: list[FleetHost], limits: Limits) -> None:
    plan = plan_fleet(hosts, limits)
    assert plan == plan_fleet(list(hosts), limits)
    assert len(plan.order) == len(set(plan.order))
    assert not set(plan.order) & set(plan.left)
    places = [*plan.order, *plan.left, *plan.done]
    assert sorted(places) == sorted(entry.name for entry in hosts)
    kinds = [batch.kind for batch in plan.batches]
    assert kinds == sorted(kinds, key=[RESUME, CANARY, ROLL].index)
    assert [batch.number for batch in plan.batches] == list(range(1, len(kinds) + 1))


@given(fleets(), LIMITS)
def test_the_first_batch_of_a_plan_is_admitted_and_nothing_left_out_could_go_at_the_end(
    hosts: list[FleetHost], limits: Limits
) -> None:
    plan = plan_fleet(hosts, limits)
    if plan.batches:
        assert admit(hosts, limits, plan.batches[0].hosts) == (plan.batches[0].hosts, {})
    after = [
        replace(entry, due=False, available=True, down=False, serving=entry.serving | entry.models)
        if entry.name in plan.order
        else entry
        for entry in hosts
    ]
    for name in plan.left:
        assert admit(after, limits, [name])[0] == (), plan.left[name]
