# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Known texts of failures."""

from __future__ import annotations

import json
import pathlib

from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_causes import SignatureBook
from ansible_collections.gpu_fleet.nim.plugins.module_utils._failure_signatures import SIGNATURES, Signature

#: The reference quotes one text for both places; in a log it is the container's, with the same cause and remedy.
SAME_TEXT = {"nim-16b": "nim-16a"}


def test_every_signature_matches_its_sample(fixtures: pathlib.Path) -> None:
    samples = json.loads((fixtures / "failure-samples.json").read_text())
    known = {signature.id: signature for signature in SIGNATURES}
    # Recorded is neither a text of NVLS, whose words are a guess, nor one that goes with HTTP 451.
    assert set(known) - set(samples) == {"eng-35", "reg-65"}
    assert set(samples) <= set(known)
    for name, sample in samples.items():
        found = SignatureBook().find("before\n%s\nafter" % sample)
        if known[name].harmless:
            assert found is None
            continue
        assert found is not None, name
        assert found.signature.id == SAME_TEXT.get(name, name)
        assert (found.signature.cause, found.signature.remedy) == (known[name].cause, known[name].remedy)


def test_the_banner_alone_names_no_reason() -> None:
    """NIM's banner stands there for every reason that CUDA has; only error 802 is about the Fabric Manager."""
    banner = (
        "ERROR: The NVIDIA Driver is present, but CUDA failed to initialize.  GPU functionality will not be available."
    )
    other = SignatureBook().find(banner + "\n   [[ No CUDA-capable device is detected (error 100) ]]")
    assert other is not None
    assert other.signature.id == "host-50b"
    assert "Fabric Manager" not in other.signature.cause + other.signature.remedy
    assert "[[ ]]" in other.signature.remedy
    fabric = SignatureBook().find(banner + "\n   [[ System not yet initialized (error 802) ]]")
    assert fabric is not None
    assert fabric.signature.id == "host-50a"
    assert "Fabric Manager" in fabric.signature.cause


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
