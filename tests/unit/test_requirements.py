# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA_REQUIRE_*: the truth table of libnvidia-container, and properties that hold for every expression."""

from __future__ import annotations

import functools

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._driver_branches import BRANCHES, Branch
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._requirements import (
    InvalidExpressionError,
    check,
    compare_versions,
    evaluate,
    requirements_of,
    satisfied,
)
from fuzzing import only_told
from hypothesis import given, settings
from hypothesis import strategies as st

TESLA = [("Tesla", "7.5")]
GEFORCE = [("GeForce", "8.6")]
#: nvidia-smi prints product_brand NVIDIA for these; libnvidia-container calls them Unknown.
H200 = [("NVIDIA", "9.0")]
#: As in CUDA 12.8 images, shortened.
REAL = (
    "cuda>=12.8 brand=unknown,driver>=470,driver<471 brand=grid,driver>=470,driver<471 "
    "brand=tesla,driver>=470,driver<471 brand=nvidia,driver>=470,driver<471 "
    "brand=unknown,driver>=535,driver<536 brand=tesla,driver>=535,driver<536 "
    "brand=unknown,driver>=550,driver<551 brand=tesla,driver>=550,driver<551"
)
INVALID = "invalid"

TABLE = [
    ("cuda>=12.8", "580.95.05", "13.0", TESLA, True),
    ("cuda>=12.8 brand=tesla,driver>=535,driver<536", "535.183.01", "12.2", TESLA, True),
    ("cuda>=12.8 brand=tesla,driver>=535,driver<536", "535.183.01", "12.2", GEFORCE, False),
    ("cuda>=12.8 brand=unknown,driver>=550,driver<551", "550.54.15", "12.4", H200, True),
    (REAL, "545.23.08", "12.3", H200, False),
    (REAL, "550.54.15", "12.4", H200, True),
    ("driver<=470", "470.57.02", "11.4", TESLA, False),
    ("driver<471", "470.57.02", "11.4", TESLA, True),
    ("cuda==12.8", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda=>12.8", "580.95.05", "13.0", TESLA, INVALID),
    ("brand>=tesla", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda >= 12.8", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=12.8 brand==x", "580.95.05", "13.0", TESLA, True),
    ("cuda>=13.8,brand==x", "580.95.05", "13.0", TESLA, False),
    ("cuda>=13.8 brand==x", "580.95.05", "13.0", TESLA, INVALID),
    ("", "535.183.01", "12.2", TESLA, True),
    ("  ,, ", "535.183.01", "12.2", TESLA, True),
    ("cuda>=12.8  cuda>=12.0", "535.183.01", "12.2", TESLA, True),
    ("cuda>=12.0,,driver>=535", "535.183.01", "12.2", TESLA, True),
    ("CUDA>=12.0", "535.183.01", "12.2", TESLA, True),
    ("BRAND=TeSlA", "535.183.01", "12.2", TESLA, True),
    ("brand!=tesla", "535.183.01", "12.2", TESLA, False),
    ("brand!tesla", "535.183.01", "12.2", GEFORCE, True),
    ("brand=nvidia", "580.95.05", "13.0", H200, False),
    ("brand=quadrortx", "580.95.05", "13.0", [("Quadro RTX", "7.5")], False),
    ("cuda=12.0", "525.60.13", "12", TESLA, True),
    ("cuda>=12.2.0", "535.183.01", "12.2", TESLA, True),
    ("arch>=7.0", "580.95.05", "13.0", TESLA, True),
    ("arch>=8.0", "580.95.05", "13.0", TESLA, False),
    ("arch>=8.0", "580.95.05", "13.0", H200 + TESLA, False),
    ("arch>=8.0", "580.95.05", "13.0", [("NVIDIA", None)], True),
    ("arch>=8.0 brand=tesla", "580.95.05", "13.0", [], True),
    ("cuda>=99", "", "", TESLA, True),
    ("driver>=999", "", "", TESLA, True),
    ("cuda", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=", "580.95.05", "13.0", TESLA, INVALID),
    (">=12", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=12.x", "580.95.05", "13.0", TESLA, INVALID),
    ("glibc>=2.3", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=" + "0" * 150 + "99", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=" + "0" * 150 + "12", "580.95.05", "13.0", TESLA, True),
    # A failing term has to fit as "cuda >= 99..." into 128 bytes with the NUL behind it.
    ("cuda>=" + "0" * 117 + "99", "580.95.05", "13.0", TESLA, False),
    ("cuda>=" + "0" * 118 + "99", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=99 " + "brand=" + "é" * 60, "580.95.05", "13.0", TESLA, INVALID),
    # Several dots are one; a dot at the beginning is none.
    ("cuda>=12..8", "580.95.05", "12.8", TESLA, True),
    ("cuda=12..8.", "580.95.05", "12.8", TESLA, True),
    ("cuda>=.5", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=.", "580.95.05", "13.0", TESLA, INVALID),
    # Numbers of a machine word; what is behind the first difference is not read.
    ("cuda>=18446744073709551614", "580.95.05", "13.0", TESLA, False),
    ("cuda>=18446744073709551615", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=12.99999999999999999999999", "580.95.05", "13.0", TESLA, True),
    ("cuda>=" + "9" * 5000, "580.95.05", "13.0", TESLA, INVALID),
    ("driver>=535.183.99999999999999999999999", "535.183.01", "12.2", TESLA, INVALID),
    # A group of commas ends the evaluation with what was found so far.
    (", cuda>=99", "580.95.05", "13.0", TESLA, True),
    ("cuda>=99 , cuda>=12", "580.95.05", "13.0", TESLA, False),
    ("cuda>=99, cuda>=12", "580.95.05", "13.0", TESLA, True),
    # Unknown is true before the value is looked at; the capability of a GPU that is there is never unknown to the original.
    ("cuda>=abc", "580.95.05", "", TESLA, True),
    ("driver>=abc", "", "13.0", TESLA, True),
    ("brand>=tesla", "580.95.05", "13.0", [], True),
    ("arch>=abc", "580.95.05", "13.0", [], True),
    ("arch>=abc", "580.95.05", "13.0", [("NVIDIA", None)], INVALID),
    ("brand==tesla", "580.95.05", "13.0", [], INVALID),
    ("brand=x", "580.95.05", "13.0", [(None, "9.0")], True),
    # strcasecmp knows the letters A to Z.
    ("\u212ald>=1", "580.95.05", "13.0", TESLA, INVALID),
    ("br\u0430nd=tesla", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=\u0661\u0662", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda>=12\tcuda>=13", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda<>12", "580.95.05", "13.0", TESLA, INVALID),
    ("cuda!12.2", "535.183.01", "12.2", TESLA, False),
    ("cuda>=12.2-1", "535.183.01", "12.2", TESLA, INVALID),
    ("cuda>=99\n", "580.95.05", "13.0", TESLA, INVALID),
]


@pytest.mark.parametrize(("expression", "driver", "cuda", "gpus", "expected"), TABLE)
def test_truth_table(expression: str, driver: str, cuda: str, gpus: list, expected: object) -> None:
    if expected is INVALID:
        with pytest.raises(InvalidExpressionError):
            satisfied(expression, driver, cuda, gpus)
    else:
        assert satisfied(expression, driver, cuda, gpus) is expected


_number = st.integers(0, 999)
_version = st.lists(_number, min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
_condition = st.builds(
    lambda name, operator, value: name + operator + value,
    st.sampled_from(["cuda", "driver", "arch"]),
    st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
    _version,
)


@settings(deadline=None)
@given(_version, _version)
def test_comparisons_are_a_total_order(left: str, right: str) -> None:
    less, equal, greater = (compare_versions(left, operator, right) for operator in ("<", "=", ">"))
    assert [less, equal, greater].count(True) == 1
    assert compare_versions(left, "<=", right) is (less or equal)
    assert compare_versions(left, ">=", right) is (greater or equal)
    assert compare_versions(left, "!=", right) is not equal
    assert compare_versions(right, "<", left) is greater


@settings(deadline=None)
@given(_version)
def test_trailing_zeros_do_not_count(version: str) -> None:
    assert compare_versions(version + ".0", "=", version)


@settings(deadline=None)
@given(st.lists(_condition, min_size=1, max_size=5), _version, _version)
def test_a_group_is_a_conjunction(terms: list[str], driver: str, cuda: str) -> None:
    assert satisfied(",".join(terms), driver, cuda, TESLA) is all(satisfied(x, driver, cuda, TESLA) for x in terms)


@settings(deadline=None)
@given(st.lists(_condition, min_size=1, max_size=5), _version, _version)
def test_groups_are_alternatives(groups: list[str], driver: str, cuda: str) -> None:
    assert satisfied(" ".join(groups), driver, cuda, TESLA) is any(satisfied(x, driver, cuda, TESLA) for x in groups)


@settings(deadline=None)
@given(st.lists(_condition, max_size=4), _condition, _version, _version)
def test_an_alternative_more_never_refuses_what_was_satisfied(
    groups: list[str], more: str, driver: str, cuda: str
) -> None:
    before = satisfied(" ".join(groups), driver, cuda, TESLA)
    after = satisfied(" ".join([*groups, more]), driver, cuda, TESLA)
    assert after >= before or not groups


@settings(deadline=None)
@given(st.lists(_condition, max_size=4), st.text(max_size=30), _version, _version)
def test_what_stands_behind_a_true_alternative_is_never_read(
    groups: list[str], rubbish: str, driver: str, cuda: str
) -> None:
    if groups and satisfied(" ".join(groups), driver, cuda, TESLA):
        assert satisfied(" ".join([*groups, rubbish]), driver, cuda, TESLA)


@settings(deadline=None)
@given(st.lists(_condition, min_size=1, max_size=4), _version, _version)
def test_all_variables_of_an_image_must_be_met(values: list[str], driver: str, cuda: str) -> None:
    environment = {"NVIDIA_REQUIRE_%d" % number: value for number, value in enumerate(values)}
    expected = all(satisfied(value, driver, cuda, TESLA) for value in values)
    assert evaluate(environment, driver, cuda, TESLA).ok is expected


@settings(deadline=None)
@given(_condition, _version, _version, st.integers(1, 3), st.integers(1, 3))
def test_empty_pieces_count_for_nothing(condition: str, driver: str, cuda: str, spaces: int, commas: int) -> None:
    plain = satisfied(condition, driver, cuda, TESLA)
    for padded in (
        " " * spaces + condition,
        condition + " " * spaces,
        "," * commas + condition,
        condition + "," * commas,
        condition.upper(),
    ):
        assert satisfied(padded, driver, cuda, TESLA) is plain


@settings(deadline=None)
@given(_version, _version, _version)
def test_the_order_is_transitive(one: str, two: str, three: str) -> None:
    first, second, third = sorted((one, two, three), key=functools.cmp_to_key(_sign))
    assert compare_versions(first, "<=", second)
    assert compare_versions(second, "<=", third)
    assert compare_versions(first, "<=", third)


def _sign(left: str, right: str) -> int:
    return compare_versions(left, ">", right) - compare_versions(left, "<", right)


@settings(deadline=None)
@given(_condition, _version, st.integers(0, 999))
def test_more_gpus_never_satisfy_more(condition: str, driver: str, minor: int) -> None:
    more = [*TESLA, ("GeForce", "%d.0" % minor)]
    assert satisfied(condition, driver, "12.0", more) <= satisfied(condition, driver, "12.0", TESLA)


@settings(deadline=None)
@given(st.text(alphabet="cudabrniveh=!<>,. 0189", max_size=60))
def test_any_text_is_judged_or_refused(expression: str) -> None:
    with only_told():
        verdict = evaluate({"NVIDIA_REQUIRE_CUDA": expression}, "535.183.01", "12.2", TESLA)
        try:
            held = satisfied(expression, "535.183.01", "12.2", TESLA)
        except InvalidExpressionError:
            assert verdict.reason == "invalid_requirement"
            assert not verdict.ok
        else:
            assert verdict.ok is held


@settings(deadline=None)
@given(
    st.sampled_from(("cuda>=12.2", "brand=tesla,driver<471", "=", ",", " ", "1", ".", "!", "x")), st.integers(1, 5000)
)
def test_no_text_takes_for_ever(piece: str, times: int) -> None:
    with only_told():
        evaluate({"NVIDIA_REQUIRE_CUDA": piece * times}, "535.183.01", "12.2", TESLA)


def test_the_message_names_the_smallest_branch() -> None:
    verdict = evaluate(
        {"NVIDIA_REQUIRE_CUDA": "cuda>=12.5 brand=tesla,driver>=535,driver<536"},
        "535.183.01",
        "12.2",
        GEFORCE,
        image="nvcr.io/nim/x:1",
        host_name="gpu03",
    )
    assert not verdict.ok
    assert verdict.smallest_branch == "555"
    assert verdict.reason == "requirement"
    assert verdict.message == (
        "nvcr.io/nim/x:1 requires cuda>=12.5, which needs a driver of branch 555 or newer; gpu03 runs 535.183.01 "
        "(CUDA 12.2): set nvidia_driver_branch to '555' or use an older image."
    )


def test_a_compatible_older_branch_is_not_called_or_newer() -> None:
    verdict = evaluate({"NVIDIA_REQUIRE_CUDA": REAL}, "545.23.08", "12.3", H200)
    assert verdict.smallest_branch == "550"
    assert "branch 550;" in verdict.message


@pytest.mark.parametrize(
    ("value", "host", "gpus", "architectures", "branch", "message"),
    [
        (
            "cuda>=99.0",
            "580.95.05",
            TESLA,
            [],
            None,
            "The image requires cuda>=99.0, which no driver branch that is known here satisfies; gpu03 runs 580.95.05: "
            "use another image.",
        ),
        (
            "brand=tesla",
            "580.95.05",
            GEFORCE,
            [],
            None,
            "The image requires brand=tesla, which does not allow this GPU (brand geforce, arch 8.6) with any driver; "
            "gpu03 runs 580.95.05: use another image.",
        ),
        (
            "arch>=9.0,cuda>=12",
            "580.95.05",
            TESLA,
            [],
            None,
            "The image requires arch>=9.0,cuda>=12, which does not allow this GPU (brand tesla, arch 7.5) with any "
            "driver; gpu03 runs 580.95.05: use another image.",
        ),
        (
            "driver<571",
            "580.95.05",
            TESLA,
            [],
            "570",
            "The image requires driver<571, which needs an older driver, of branch 570; gpu03 runs 580.95.05: use "
            "another image.",
        ),
        (
            "driver>=580.126",
            "580.95.05",
            TESLA,
            [],
            "580",
            "The image requires driver>=580.126, which needs a newer release of driver branch 580; gpu03 runs "
            "580.95.05: set nvidia_driver_branch to '580' or use an older image.",
        ),
        (
            "cuda>=13.1",
            "580.95.05",
            [("Tesla", "7.0")],
            ["Volta"],
            None,
            "The image requires cuda>=13.1, which needs a driver of branch 590, which does not support this GPU (Volta); "
            "gpu03 runs 580.95.05: use another image.",
        ),
        (
            "cuda>=13.1",
            "580.95.05",
            TESLA,
            ["Turing"],
            "590",
            "The image requires cuda>=13.1, which needs a driver of branch 590 or newer; gpu03 runs 580.95.05: set "
            "nvidia_driver_branch to '590' or use an older image.",
        ),
        (
            "cuda>=11.0",
            "390.157",
            TESLA,
            [],
            "470",
            "The image requires cuda>=11.0, which needs a driver of branch 470 or newer; gpu03 runs 390.157: set "
            "nvidia_driver_branch to '535' or use an older image.",
        ),
    ],
)
def test_the_message_when_it_is_less_simple(
    value: str, host: str, gpus: list, architectures: list[str], branch: str | None, message: str
) -> None:
    cuda = "9.1" if host.startswith("390") else "13.0"
    verdict = evaluate({"NVIDIA_REQUIRE_CUDA": value}, host, cuda, gpus, architectures=architectures, host_name="gpu03")
    assert verdict.smallest_branch == branch
    assert verdict.message.replace(" (CUDA %s)" % cuda, "") == message


@settings(deadline=None)
@given(
    st.lists(_condition, min_size=1, max_size=3),
    st.sampled_from([branch for branch in BRANCHES if branch.cuda]),
    st.sampled_from([TESLA, GEFORCE, H200]),
)
def test_the_branch_that_is_named_satisfies(groups: list[str], host: Branch, gpus: list) -> None:
    value = " ".join(groups)
    verdict = evaluate({"NVIDIA_REQUIRE_CUDA": value}, "%s.10" % host.name, host.cuda, gpus)
    if verdict.ok:
        assert verdict.smallest_branch is None
        return
    named = [branch for branch in BRANCHES if branch.name == verdict.smallest_branch]
    for branch in named:
        assert any(satisfied(value, "%s.%d" % (branch.name, at), branch.cuda, gpus) for at in (1, 999))
    between = [
        branch
        for branch in BRANCHES
        if branch.cuda and host.number < branch.number and (not named or branch.number < named[0].number)
    ]
    assert not any(satisfied(value, branch.name + ".1", branch.cuda, gpus) for branch in between)


def test_all_variables_must_be_met() -> None:
    environment = {"NVIDIA_REQUIRE_CUDA": "cuda>=12.0", "NVIDIA_REQUIRE_DRIVER": "driver>=570", "PATH": "/bin"}
    verdict = evaluate(environment, "535.183.01", "12.2", TESLA)
    assert verdict.expression == "driver>=570"
    assert verdict.smallest_branch == "570"


@pytest.mark.parametrize("value", ["1", "t", "T", "TRUE", "true", "True"])
def test_switched_off(value: str) -> None:
    environment = {"NVIDIA_REQUIRE_CUDA": "cuda>=99", "NVIDIA_DISABLE_REQUIRE": value}
    assert evaluate(environment, "535.183.01", "12.2", TESLA).ok


@pytest.mark.parametrize("value", ["", "0", "yes", "on", "tRUE"])
def test_not_switched_off(value: str) -> None:
    environment = {"NVIDIA_REQUIRE_CUDA": "cuda>=99", "NVIDIA_DISABLE_REQUIRE": value}
    assert not evaluate(environment, "535.183.01", "12.2", TESLA).ok


def test_requirements_of_old_images() -> None:
    assert requirements_of({"CUDA_VERSION": "12.8.0"}) == ["cuda>=12.8"]
    assert requirements_of({"CUDA_VERSION": "12"}) == ["cuda>=12.0"]
    assert requirements_of({"CUDA_VERSION": "v12.8"}) == ["cuda>=12.8"]
    assert requirements_of({"CUDA_VERSION": "latest"}) == []
    assert requirements_of({"CUDA_VERSION": "\u0661\u0662.8"}) == []
    # The toolkit asks for the length, not for the presence.
    assert requirements_of({"CUDA_VERSION": "12.8.0", "NVIDIA_REQUIRE_CUDA": ""}) == ["", "cuda>=12.8"]
    assert requirements_of({"CUDA_VERSION": "12.8.0", "NVIDIA_REQUIRE_CUDA": "cuda>=12"}) == ["cuda>=12"]
    assert requirements_of({"NVIDIA_REQUIRE_JETPACK": "csv-mounts=all"}) == []
    assert requirements_of({}) == []


def test_nothing_known_of_the_driver_is_no_refusal() -> None:
    assert evaluate({"NVIDIA_REQUIRE_CUDA": "cuda>=12.5"}, None, None, []).ok


def test_check_raises_with_the_branch() -> None:
    check(evaluate({}, "535.183.01", "12.2", TESLA))
    with pytest.raises(FleetError) as error:
        check(evaluate({"NVIDIA_REQUIRE_CUDA": "cuda>=12.5"}, "535.183.01", "12.2", GEFORCE))
    assert error.value.reason == "requirement"
    assert error.value.facts["smallest_branch"] == "555"
