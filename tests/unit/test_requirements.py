# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA_REQUIRE_*: the truth table of libnvidia-container, and properties that hold for every expression."""

from __future__ import annotations

import pytest
from ansible_collections.gpu_fleet.nim.plugins.module_utils._errors import FleetError
from ansible_collections.gpu_fleet.nim.plugins.module_utils._requirements import (
    InvalidExpressionError,
    check,
    compare_versions,
    evaluate,
    requirements_of,
    satisfied,
)
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
@given(_condition, _version, st.integers(0, 999))
def test_more_gpus_never_satisfy_more(condition: str, driver: str, minor: int) -> None:
    more = [*TESLA, ("GeForce", "%d.0" % minor)]
    assert satisfied(condition, driver, "12.0", more) <= satisfied(condition, driver, "12.0", TESLA)


@settings(deadline=None)
@given(st.text(alphabet="cudabrniveh=!<>,. 0189", max_size=60))
def test_any_text_is_judged_or_refused(expression: str) -> None:
    try:
        satisfied(expression, "535.183.01", "12.2", TESLA)
    except InvalidExpressionError:
        verdict = evaluate({"NVIDIA_REQUIRE_CUDA": expression}, "535.183.01", "12.2", TESLA)
        assert verdict.reason == "invalid_requirement"
        assert not verdict.ok


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


def test_no_branch_would_do() -> None:
    verdict = evaluate({"NVIDIA_REQUIRE_CUDA": "cuda>=99.0"}, "580.95.05", "13.0", TESLA)
    assert verdict.smallest_branch is None
    assert "no known driver branch" in verdict.message


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
    assert requirements_of({"CUDA_VERSION": "12.8.0", "NVIDIA_REQUIRE_CUDA": ""}) == [""]
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
