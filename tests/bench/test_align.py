"""An iteration of ours gives what the reference trainers' way gives; rows and targets follow from both."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.align import __main__ as command
from bench.align.baseline import ReferenceTrainer, list_weights
from bench.align.measure import load_start, measure_alone, measure_scoring
from bench.align.noise import Recorder, list_times, logprob_again, move
from bench.align.ours import Ours
from bench.align.outcome import BOUNDS, Agreement, check, compare
from bench.align.report import describe_row
from bench.align.rows import read_rows
from bench.align.scoring import OneByOne
from bench.align.targets import CPU_TARGETS, GPU_TARGETS
from bench.align.workloads import MINI_CLIP, Sizes, build_large, build_mini
from bench.generate.clock import Clock, NoClock
from bench.generate.models import build_random, load_model
from bench.generate.report import Conditions
from bench.generate.targets import judge
from bench.rows import RESULTS
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import NoiseSettings, Settings
from realign.runtime.stages import build_schedule
from realign_kernels import LogProbCoefficients, StepCoefficients, sde_logprob
from train.policy import is_generation
from train.recipe import Recipe

CPU = torch.device("cpu")
CONDITIONS = Conditions("mini", "float32", "a chip", 1, 0.0, "2.13", "abc")


def shorten(recipe: Recipe, **changes: object) -> Recipe:
    return replace(recipe, rollout=replace(recipe.rollout, **changes))


@pytest.mark.parametrize(
    "noise", [NoiseSettings("cps", 0.8, (1, 2)), NoiseSettings("flow-grpo", 1.3, (0, 2))]
)
def test_steps_and_logprobs_are_the_samplers(noise: NoiseSettings) -> None:
    """The trainers' own formulas give the numbers of the schedule that we sample and train with."""
    settings = Settings(64, 64, num_timesteps=5, noise=noise)
    request = Request("one", Prompt.build(["a mug"]), 3, settings)
    steps = build_schedule(5, settings.timestep_shift, noise).steps
    generator = torch.Generator().manual_seed(0)
    recorder = Recorder(request)
    for number, step in enumerate(steps):
        sample_LC, velocity_LC = (torch.randn(16, 8, generator=generator) for _ in range(2))
        next_LC = recorder(number, sample_LC, velocity_LC)
        if not step.std:
            expected_LC = step.a * sample_LC + step.b * velocity_LC
            torch.testing.assert_close(next_LC, expected_LC, atol=1e-6, rtol=1e-5)
            continue
        drawn_LC = (next_LC - step.a * sample_LC - step.b * velocity_LC) / step.std
        assert float(drawn_LC.std()) == pytest.approx(1, abs=0.2)
        coefficients = [torch.tensor([value]) for value in (step.a, step.b)]
        numbers = [torch.tensor([value]) for value in (step.logprob_weight, step.logprob_constant)]
        ours = sde_logprob(
            (sample_LC, next_LC),
            velocity_LC,
            torch.tensor([0, 16], dtype=torch.int32),
            StepCoefficients(*coefficients),
            LogProbCoefficients(*numbers),
        )
        *_, logprob = recorder.kept[-1]
        assert logprob == pytest.approx(float(ours), abs=1e-5)
        assert float(logprob_again(request, number, sample_LC, next_LC, velocity_LC)) == logprob
    assert [number for number, *_ in recorder.kept] == [n for n, step in enumerate(steps) if step.std]


def test_another_rule_is_refused() -> None:
    noise, sample_LC = NoiseSettings("dance-grpo", 0.3), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="'dance-grpo': the baseline has cps and flow-grpo"):
        move(noise, list_times(Settings(num_timesteps=3)), 0, sample_LC, sample_LC)


def test_an_iteration_gives_what_the_baselines_gives() -> None:
    """Texts, pictures, log-probs, rewards, and the gradient of every weight; with guidance and references."""
    recipe = shorten(build_mini("guided", Sizes(1, 2)), num_timesteps=7)
    ours = Ours(recipe, CPU)
    outcome = ours.iterate(NoClock())
    trainer = ReferenceTrainer(load_start(recipe), recipe, OneByOne(MINI_CLIP, CPU))
    before = {name: torch.cat(parts).detach().clone() for name, parts in trainer.weights.items()}
    theirs = trainer.iterate(ours.requests, NoClock())
    found = compare(outcome, theirs)
    check(found)
    assert outcome.logprob_NS.shape == (2, 2)
    assert outcome.ratio_error == 0
    assert theirs.ratio_error < 1e-6
    assert float(outcome.reward_N[0]) != float(outcome.reward_N[1])
    assert sum(float(gradient.square().sum()) for gradient in theirs.gradients.values()) > 0
    masters, named = ours.aligner.policy.masters, dict(trainer.model.named_parameters())
    for name, weight in before.items():
        assert not torch.equal(named[name], weight), "the model that samples is the one that is trained"
    pairs = [(masters[name].detach(), named[name].detach()) for name in before]
    apart = torch.cat([(one - other).abs().flatten() for one, other in pairs])
    # Adam's first step is the gradient's sign: where it is next to nothing, rounding decides.
    assert float((apart > recipe.update.learning_rate / 2).float().mean()) < 0.01


def test_all_of_the_generation_expert_is_trained() -> None:
    model = load_model("mini", CPU, torch.float32)
    sizes = {name: sum(map(torch.numel, parts)) for name, parts in list_weights(model).items()}
    assert sizes == {n: p.numel() for n, p in model.named_parameters() if is_generation(n)}


def test_nothing_counts_where_outcomes_differ() -> None:
    check(BOUNDS)
    for name, value in vars(BOUNDS).items():
        with pytest.raises(ValueError, match=f"{name} of ours .* no time counts"):
            check(Agreement(**vars(BOUNDS) | {name: 2 * value}))
    with pytest.raises(ValueError, match="no time counts"):
        check(replace(BOUNDS, gradient_error=math.nan))


def test_contexts_read_for_a_replay_are_told_from_those_of_rollouts() -> None:
    clock = Clock(CPU, ("reading", "rebuilding"), closed=("rebuilding",))
    with clock.phase("rebuilding"), clock.phase("reading"):
        pass
    assert clock.seconds["reading"] == 0 < clock.seconds["rebuilding"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "align.jsonl"
    arguments = ["--prompts", "1", "--group", "2", "--turns", "1", "--threads", "1", "--out", str(out)]
    assert command.main(arguments) in (0, 1)
    engine, baseline = read_rows(out)
    assert (engine.impl, baseline.impl, engine.samples, baseline.samples) == ("engine", "baseline", 2, 2)
    for row in (engine, baseline):
        assert {"reading", "reasoning", "denoising", "autoencoder", "reward", "replay"} <= row.phases.keys()
        assert sum(row.phases.values()) == pytest.approx(row.seconds, rel=0.2)
        assert (row.model, row.chains) == ("mini", engine.chains)
        assert row.command == " ".join(["python -m bench.align", *arguments])
    assert "publishing" in engine.phases
    assert "publishing" not in baseline.phases
    assert engine.times_faster > 0
    assert baseline.times_faster == 1
    assert "1 prompts x 2 samples, reasoning ic-cot, 11 timesteps, window 2 (cps)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", "bagel-7b"])


def test_the_large_workload_small(tmp_path: Path) -> None:
    """What a GPU is to run, by a model of mini's size with random weights."""
    (tmp_path / "prompts.txt").write_text("a small brass telescope\n")
    recipe = build_large(MINI_CLIP, tmp_path / "prompts.txt", Sizes(group=3))
    assert (recipe.rollout.height, recipe.rollout.num_timesteps, recipe.window.size) == (512, 15, 2)
    assert build_large(MINI_CLIP, tmp_path / "prompts.txt", Sizes()).rollout.num_samples == 24
    recipe = shorten(recipe, height=64, width=64, num_timesteps=10, max_tokens=8)
    mini = load_model("mini", CPU, torch.float32)
    config = replace(mini.config, name="bagel-7b, random weights", max_latent_size=32)
    report = measure_alone(recipe, build_random(config, CPU, torch.float32), "guided on every step", 1)
    (row,) = report.make_rows(replace(CONDITIONS, matmul_tflop_per_s=1.0), "a command")
    assert (row.samples, row.tokens, row.times_faster) == (3, 24, 0)
    assert row.images_per_s > row.samples_per_s
    assert row.matrix_share == row.tflop_per_s > 0
    assert {"reasoning", "denoising", "replay", "publishing"} <= row.phases.keys()
    rollouts, _ = judge(GPU_TARGETS, [replace(row, images_per_s=1.6)])
    assert rollouts.is_met
    assert "samples/s" in describe_row(row)


def test_scoring_small() -> None:
    report = measure_scoring(MINI_CLIP, CPU, (3, 2, 64), 1)
    engine, baseline = report.make_rows(CONDITIONS, "a command")
    assert (engine.workload, engine.variant, engine.samples, baseline.samples) == ("clip", "64x64", 3, 3)
    assert engine.samples_per_s == pytest.approx(3 / engine.seconds, rel=1e-3)
    assert engine.times_faster > 0
    (_, scoring) = judge(GPU_TARGETS, [replace(engine, variant="1024x1024", samples_per_s=1999.0)])
    assert scoring.is_met is False


def test_committed_rows() -> None:
    rows = read_rows(RESULTS / "align.jsonl")
    assert rows
    for row in rows:
        assert row.seconds > 0 < row.samples
        assert "dirty" not in row.commit
        for name, bound in vars(BOUNDS).items():
            assert row.agreement.get(name, 0.0) <= bound
    assert judge(CPU_TARGETS, rows)[0].is_met
