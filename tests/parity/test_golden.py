"""Every recorded output of the reference implementation is reproduced, in float32 on the CPU."""

from __future__ import annotations


def test_recorded_outputs_are_reproduced(golden_results):
    assert golden_results
    failed = [result for result in golden_results if not result.passed]
    assert not failed
