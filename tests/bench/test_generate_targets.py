"""Targets are judged by the rows of a run; launches are read from a profile."""

from __future__ import annotations

from dataclasses import fields

from bench.generate.rows import GenerateRow
from bench.generate.targets import CPU_TARGETS, GPU_TARGETS, describe, judge
from bench.generate.trace import Counts, Event, count_events


def test_events_of_a_profile():
    events = [
        Event("a kernel", True, 5),
        Event("Memcpy DtoH (Device -> Pageable)", True, 1),
        Event("cudaLaunchKernelExC", False, 3),
        Event("cudaGraphLaunch", False, 1),
        Event("cudaStreamSynchronize", False, 2),
        Event("aten::mm", False, 7),
    ]
    assert count_events(events) == Counts(6, 4, 2)


def make_row(**fields_) -> GenerateRow:
    """An engine's row."""
    blank = {field.name: 1 for field in fields(GenerateRow)}
    blank |= {"workload": "W3", "variant": "unguided", "impl": "engine", "model": "mini", "machine": "a chip"}
    return GenerateRow(**blank | {"phases": {}, "turn_seconds": [1.0]} | fields_)


def test_targets_are_judged_by_the_rows():
    rows = [make_row(times_faster=4.5), make_row(variant="guided", times_faster=3.9)]
    rows += [make_row(workload="geneval", variant="553 prompts of world", times_faster=7.0)]
    lines = {line[0]: line[1:] for line in describe(judge(CPU_TARGETS, rows))}
    assert lines["W3 unguided, times the baseline"] == ("4.5", "at least 4", "met")
    assert lines["W3 guided, times the baseline"] == ("3.9", "at least 4", "missed")
    assert lines["W4 guided, text, times the baseline"] == ("", "at least 8", "not measured")
    assert lines["realign generate of 553 prompts, times the baseline"][2] == "met"


def test_gpu_targets():
    rows = [make_row(images_per_s=2.5, seconds=10.0)]
    results = {result.target.what: result for result in judge(GPU_TARGETS, rows)}
    assert results["W3 unguided, images a second"].is_met
    assert results["W3 unguided, times its unshared form"].is_met is None
    rows += [make_row(variant="unguided, nothing shared", seconds=25.0)]
    rows += [make_row(workload="W1", variant="batch 1", seconds=8.5, images=1)]
    results = {result.target.what: result for result in judge(GPU_TARGETS, rows)}
    assert results["W3 unguided, times its unshared form"].measured == 2.5
    assert results["W1, seconds an image"].is_met is False
