# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Known texts of failures."""

from __future__ import annotations

import json
import pathlib

from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_causes import SignatureBook
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_signatures import SIGNATURES, Signature


def test_every_signature_matches_its_sample(fixtures: pathlib.Path) -> None:
    samples = json.loads((fixtures / "failure-samples.json").read_text())
    known = {signature.id: signature for signature in SIGNATURES}
    # No text of NVLS is recorded; the words are a guess.
    assert set(known) - set(samples) == {"eng-35"}
    assert set(samples) <= set(known)
    for name, sample in samples.items():
        found = SignatureBook().find("before\n%s\nafter" % sample)
        if known[name].harmless:
            assert found is None
            continue
        assert found is not None, name
        assert known[name].cause
        assert known[name].remedy
        # Rows of one kind quote each other's texts, so the family must fit, not the letter.
        assert found.signature.cause == known[name].cause or found.signature.id[:3] == name[:3]


def test_first_cause_counts_and_umbrellas_only_alone() -> None:
    find = SignatureBook().find
    umbrella = "RuntimeError: Engine core initialization failed. See root cause above."
    cause = "torch.OutOfMemoryError: CUDA out of memory."
    assert find(umbrella).signature.id == "eng-25"  # type: ignore[union-attr]  # None fails the test as well
    assert find("%s\n%s" % (umbrella, cause)).signature.id == "eng-21a"  # type: ignore[union-attr]  # as above
    assert find("a", exit_code=135).signature.cause.startswith("shared memory")  # type: ignore[union-attr]  # as above
    assert find("all is well", exit_code=1) is None
    shm = "OSError: [Errno 28] No space left on device: '/dev/shm/torch_1'"
    assert find(shm).signature.remedy == "raise shm_size"  # type: ignore[union-attr]  # as above


def test_the_users_signatures_come_first_and_replace() -> None:
    own = Signature("eng-21a", r"CUDA out of memory", "container", "our batch job runs", "wait for the night")
    late = Signature("site-1", r"quota exceeded", "container", "the quota of the file server", "ask storage")
    text = "torch.OutOfMemoryError: CUDA out of memory.\nquota exceeded"
    assert SignatureBook().find(text).signature.cause == "the model does not fit into GPU memory"  # type: ignore[union-attr]  # None fails the test as well
    found = SignatureBook([own, late]).find(text)
    assert found is not None
    assert (found.signature.id, found.signature.cause, found.own) == ("eng-21a", "our batch job runs", True)
    late_only = SignatureBook([late]).find(text)
    assert late_only is not None
    assert late_only.signature.id == "site-1"


def test_a_harmless_line_is_no_evidence() -> None:
    quiet = Signature("quiet", r"probe: .*EngineDeadError", "container", "a probe", "nothing", harmless=True)
    book = SignatureBook([quiet])
    assert book.find("probe: EngineDeadError seen elsewhere") is None
    assert book.find("probe: EngineDeadError\nEngineDeadError") is not None


def test_only_texts_of_the_place_decide() -> None:
    book = SignatureBook()
    # A container that quotes a registry's answer may still start.
    assert book.find("x509: certificate signed by unknown authority", deciding=True) is None
    assert book.find("Detected 0 compatible profile(s)", deciding=True) is None
    assert book.find("EngineDeadError", deciding=True) is not None
    assert book.find("EngineDeadError", source="host") is None
