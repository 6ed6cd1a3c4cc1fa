"""A workload is made by both in turns; rows and targets follow from what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from bench.generate import __main__ as command
from bench.generate import clock as clocks
from bench.generate.clock import PHASES, Clock, NoClock, watch_engine
from bench.generate.command import PromptSet, choose_evenly, write_world_prompts
from bench.generate.flops import count_requests
from bench.generate.measure import Run, check_same, list_turns, make_with_engine, measure_workload
from bench.generate.models import build_random, load_model
from bench.generate.report import Conditions, Report
from bench.generate.rows import keep_latest, median_ratio, read_rows
from bench.generate.workloads import BUILDERS, build_workloads
from bench.rows import append_rows
from realign.model.bagel import Bagel

CPU = torch.device("cpu")
CONDITIONS = Conditions("mini", "float32", "a chip", 1, 0.0, "2.13", "abc")


@pytest.fixture(scope="module")
def mini() -> Bagel:
    return load_model("mini", CPU, torch.float32)


def shorten(workload, count=2, timesteps=3):
    """Fewer requests, with fewer steps and shorter texts."""
    requests = []
    for request in workload.requests[:count]:
        text = replace(request.settings.text, max_tokens=8)
        requests.append(
            replace(request, settings=replace(request.settings, num_timesteps=timesteps, text=text))
        )
    return replace(workload, requests=tuple(requests))


def find(mini, name, variant):
    return next(w for w in build_workloads(mini.config, name) if w.variant == variant)


def test_workloads_are_the_issues(mini):
    built = {name: build_workloads(mini.config, name) for name in BUILDERS}
    sizes = {name: {w.variant: len(w.requests) for w in workloads} for name, workloads in built.items()}
    assert sizes["W1"] == {"batch 1": 1, "batch 4": 4}
    assert list(sizes["W2"].values()) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes["W3"] == {"unguided": 24, "guided": 24, "unguided, nothing shared": 24}
    assert sizes["W3t"] == {"unguided": 24, "guided on every step": 24}
    assert sizes["W4"] == {"unguided": 32, "guided": 32}
    references = {name: len(workloads[0].requests[0].prompt.pictures) for name, workloads in built.items()}
    assert references == {"W1": 0, "W2": 0, "W3": 4, "W3t": 0, "W4": 3}
    assert [len(w.requests) for w in build_workloads(mini.config, "W2", 4)] == [1, 2, 4]
    assert {len(w.requests) for w in build_workloads(mini.config, "W3", 4)} == {4}


def test_large_sizes_are_for_the_large_model(mini):
    large = build_workloads(replace(mini.config, name="bagel-7b, random weights"), "W3")
    request = large[0].requests[0]
    assert (request.settings.height, request.settings.width) == (512, 512)
    assert {picture.size for picture in request.prompt.pictures} == {(512, 512)}
    pixels = {r.prompt.pictures[0].getpixel((0, 0)) for r in large[2].requests}
    assert len(pixels) == 24  # no two requests have a picture in common


@pytest.mark.parametrize(("name", "variant"), [("W3", "guided"), ("W4", "unguided"), ("W3t", "unguided")])
def test_rows_of_a_workload(mini, name, variant):
    workload = shorten(find(mini, name, variant), count=3)
    measured = measure_workload(mini, workload, num_turns=2, num_baseline=2)
    flops = count_requests(mini, workload.requests, measured.engine.made)
    engine, baseline = Report(name, variant, 3, measured, flops).make_rows(CONDITIONS)
    assert (engine.impl, engine.measured_images, baseline.impl, baseline.measured_images) == (
        "engine",
        3,
        "baseline",
        2,
    )
    assert len(engine.turn_seconds) == len(baseline.turn_seconds) == 2
    assert (baseline.times_faster, baseline.picture_times_faster) == (1.0, 1.0)
    assert engine.times_faster > 0
    assert engine.latent_error < 1e-4
    assert set(engine.phases) == set(PHASES)
    assert sum(engine.phases.values()) == pytest.approx(engine.seconds, rel=0.2)
    has_text = name == "W4"
    assert (engine.tokens == 24) == has_text
    assert (engine.tokens_per_s > 0) == (engine.text_times_faster > 0) == has_text
    assert engine.peak_memory_mb > 50
    assert engine.tflop_per_s == pytest.approx(sum(flops.values()) / engine.seconds / 1e12, rel=1e-2)


def test_a_form_of_ours_alone_has_no_baseline(mini):
    workload = shorten(find(mini, "W3", "unguided, nothing shared"))
    measured = measure_workload(mini, workload, 1, 1)
    (row,) = Report("W3", workload.variant, 2, measured, {}).make_rows(CONDITIONS)
    assert row.times_faster == 0


def test_nothing_counts_where_the_pictures_differ(mini):
    made = make_with_engine(mini, shorten(find(mini, "W3t", "unguided")).requests, NoClock())
    check_same([(made[0], made[0])], 1e-6)
    with pytest.raises(ValueError, match=r"differ by 1\.0e-02: no time counts"):
        check_same([(made[0], made[0])], 1e-2)
    with pytest.raises(ValueError, match="the engine wrote"):
        check_same([(replace(made[0], turn="a text"), made[0])], 0.0)


def test_a_group_shares_its_prompt(mini):
    """Work that is common is counted once; guidance adds its branches' work."""
    both = {}
    for variant in ("unguided", "unguided, nothing shared", "guided"):
        requests = find(mini, "W3", variant).requests
        both[variant] = count_requests(mini, requests, [None] * len(requests))
    apart, shared, guided = both["unguided, nothing shared"], both["unguided"], both["guided"]
    assert apart["reading"] == 24 * shared["reading"]
    assert apart["denoising"] == shared["denoising"]
    assert guided["denoising"] > 2 * shared["denoising"]
    assert guided["reading"] > shared["reading"]


def test_phases_interrupt_each_other(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(times))
    clock = Clock()
    with clock.phase("reading"), clock.phase("autoencoder"):
        pass
    assert (clock.seconds["reading"], clock.seconds["autoencoder"]) == (1.0 + 3.0, 2.0)


def test_a_function_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(clocks, "ENGINE_PLACES", (("realign.runtime.engine", "Engine.jump", print),))
    gone = pytest.raises(LookupError, match=r"realign\.runtime\.engine\.Engine\.jump is not there")
    with gone, watch_engine(Clock()):
        pass


def test_the_engine_is_left_as_it_was():
    from realign.runtime import stages

    before = stages.denoise
    with watch_engine(Clock()):
        assert stages.denoise is not before
    assert stages.denoise is before


def test_turns_on_a_gpu_are_timed_or_clocked():
    assert list_turns(CPU, 2) == [(True, True)] * 2
    assert list_turns(torch.device("cuda"), 2) == [(True, False), (True, False), (False, True)]


def test_scaled_times():
    run = Run(lambda clock: [], scale=8.0)
    run.take_turn(CPU, is_timed=True, is_clocked=True)
    assert 0 < run.seconds[0] < 8.0
    assert median_ratio([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == 2.0
    assert median_ratio([4.0], [0.0]) == 0.0


def test_the_command(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--workload", "W3t", "geneval", "--max-samples", "1", "--turns", "1", "--threads", "1"]
    arguments += ["--variant", "unguided"]
    code = command.main([*arguments, "--out", str(out)])
    rows = read_rows(out)
    assert [(row.workload, row.impl) for row in rows] == [
        ("W3t", "engine"),
        ("W3t", "baseline"),
        ("geneval", "engine"),
        ("geneval", "baseline"),
    ]
    said = capsys.readouterr().out
    assert "geneval: 1 prompts of world" in said
    assert "not measured" in said
    assert code == 0
    append_rows(rows, out)
    assert keep_latest(read_rows(out)) == rows
    assert json.loads(out.read_text().splitlines()[0]) == asdict(rows[0])


def test_prompts_are_known_by_their_form(tmp_path):
    world = PromptSet.read(write_world_prompts(tmp_path / "world.txt", 3))
    assert world.describe() == "3 prompts of world"
    assert [request.settings.num_timesteps for request in world.build_requests()] == [50] * 3
    line = {"tag": "counting", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert PromptSet.read(path).describe() == "1 prompts of GenEval"
    assert choose_evenly(553, 4) == [0, 138, 276, 414]
    assert choose_evenly(2, 4) == [0, 1]


def test_a_random_model_draws_and_writes(mini):
    """BAGEL-7B's stand-in, small: the experts differ, and what it writes reads back to the same tokens."""
    config = replace(mini.config, name="bagel-7b, random weights", max_latent_size=32)
    model = build_random(config, CPU, torch.float32)
    und, gen = (getattr(model.decoder.layers[0], name).qkv_proj.weight for name in ("und", "gen"))
    assert not torch.equal(und, gen)
    assert len(model.tokenizer) == config.llm.vocab_size
    ids = [3, 100, 450]
    assert model.tokenizer.encode(model.tokenizer.decode(ids)) == ids
    workload = shorten(find(mini, "W4", "guided"), count=1)
    measured = measure_workload(model, workload, 1, 1)
    assert measured.engine.made[0].latent_LC.isfinite().all()
    assert len(measured.engine.made[0].turn.ids) == 8
