# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Known texts of failures."""

from __future__ import annotations

import json
import pathlib

from ansible_collections.gpu_fleet.nim.plugins.module_utils import _failure_signatures


def test_every_signature_matches_its_sample(fixtures: pathlib.Path) -> None:
    samples = json.loads((fixtures / "failure-samples.json").read_text())
    known = {signature.id: signature for signature in _failure_signatures.SIGNATURES}
    assert set(known) == set(samples)
    for name, sample in samples.items():
        found = _failure_signatures.find_cause("before\n%s\nafter" % sample)
        if known[name].harmless:
            assert found is None
            continue
        assert found is not None, name
        assert known[name].cause
        assert known[name].remedy
        # Rows of one kind quote each other's texts, so the family must fit, not the letter.
        assert found.signature.cause == known[name].cause or found.signature.id[:3] == name[:3]


def test_first_cause_counts_and_umbrellas_only_alone() -> None:
    find = _failure_signatures.find_cause
    umbrella = "RuntimeError: Engine core initialization failed. See root cause above."
    cause = "torch.OutOfMemoryError: CUDA out of memory."
    assert find(umbrella).signature.id == "eng-25"  # type: ignore[union-attr]  # None fails the test as well
    assert find("%s\n%s" % (umbrella, cause)).signature.id == "eng-21a"  # type: ignore[union-attr]  # as above
    assert find("a", exit_code=135).signature.cause.startswith("shared memory")  # type: ignore[union-attr]  # as above
    assert find("all is well", exit_code=1) is None
    shm = "OSError: [Errno 28] No space left on device: '/dev/shm/torch_1'"
    assert find(shm).signature.remedy == "raise shm_size"  # type: ignore[union-attr]  # as above
