"""Texts trained: their ratio is one, their gradient plain autograd's, and a reward of them rises."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realign.runtime.context import TextBlock
from realign.runtime.engine import Engine
from realign.runtime.guidance import Branch
from realign.runtime.operations import Draw, Read, Write
from realign.runtime.reader import Reading
from realign.runtime.request import ImagePart, Request, Sample, Trajectory
from realign.runtime.settings import TextSettings
from tests.train.plain import forward_plainly
from tests.train.rga_runs import (
    FULL,
    assert_same_weights,
    build_recipe,
    find_launcher,
    read_log,
    read_weights,
    start,
    write_recipe,
)
from tests.train.test_contexts import read_blocks
from tests.train.test_replay import FREE, build_engine, build_requests
from train.ranks import Ranks
from train.recipe import Recipe
from train.rga import Aligner, run
from train.rollouts import score
from train.text import TextOptions, TextTrainer, TrainedText, estimate_kl
from train.text_replay import TextEntry, TextReplayer, list_texts

REWARD = "function:tests.train.rewards:evenness"
TEXT = {"text": {"reward": REWARD, "learning_rate": 1e-3}, "rollout": {"reasoning": "think"}}
SAMPLING = [TextSettings(20, 1.0), TextSettings(20, 0.7, 0.8)]


def sample_texts(engine: Engine, text: TextSettings, references: int = 1) -> list[Sample]:
    requests = build_requests("cps", FREE, references, "think")
    return engine.run([replace(r, settings=replace(r.settings, text=text)) for r in requests])


def list_entries(engine: Engine, samples: list[Sample]) -> list[TextEntry]:
    return list_texts(samples, engine.model.tokenizer.bos, engine.model.tokenizer.eos)


@pytest.mark.parametrize("text", SAMPLING, ids=["plain", "top-p"])
def test_a_replay_with_a_gradient_has_the_bits_of_one_without(text: TextSettings) -> None:
    """And the log-probs that were recorded while sampling, but for rounding."""
    engine = build_engine(run_tokens=16)
    engine.model.requires_grad_(True)
    entries = list_entries(engine, sample_texts(engine, text))
    assert len({entry.tokens for entry in entries}) == 4
    replayer = TextReplayer(engine)
    kept = replayer.find_kept(entries)
    assert all((own is None) == (text.top_p == 1) for own in kept)
    with torch.no_grad():
        old_T = replayer.score(entries, kept)
    new_T = replayer.score(entries, kept)
    assert new_T.requires_grad
    assert torch.equal(new_T.detach(), old_T)
    sampled_T = torch.tensor([x for entry in entries for x in entry.sampled])
    assert len(sampled_T) == len(old_T)
    torch.testing.assert_close(old_T, sampled_T, rtol=0, atol=1e-4)
    assert (old_T < 0).any()


def score_plainly(model: Any, entry: TextEntry) -> Tensor:
    """Log-probs of a text's tokens by one forward over prompt and text; what top-p keeps by sorting."""
    block = TextBlock((model.tokenizer.bos, *entry.tokens[:-1]))
    hidden_TE = forward_plainly(model, [*read_blocks(model, entry.sample), block])[-1]
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    settings = entry.sample.request.settings.text
    logits_TV = hidden_TE @ head.weight.T
    weight_TV = (logits_TV / settings.temperature).exp()
    # In float32, as it was sampled: tokens may be alike but for less, and then the first of them is kept.
    share_TV = (logits_TV.detach().float().double() / settings.temperature).softmax(-1)
    is_kept_TV = torch.zeros_like(share_TV)
    for token, share_V in enumerate(share_TV):
        total = 0.0
        for index in share_V.argsort(descending=True, stable=True).tolist():
            is_kept_TV[token, index] = float(total < settings.top_p)
            total += float(share_V[index])
    chosen_T = weight_TV[torch.arange(len(entry.tokens)), torch.tensor(entry.tokens)]
    return (chosen_T / (weight_TV * is_kept_TV).sum(-1)).log()


@pytest.mark.parametrize("text", SAMPLING, ids=["plain", "top-p"])
def test_gradients_of_texts_are_plain_autograds(text: TextSettings) -> None:
    """In float64, of everything that reads and writes, through the prompt and its pictures as well."""
    samples = sample_texts(build_engine(), text)[:3]
    engine = build_engine(torch.float64)
    engine.model.requires_grad_(True)
    entries = list_entries(engine, samples)
    replayer = TextReplayer(engine)
    parts = ("decoder.", "embed_tokens.", "lm_head.")
    weights = {n: p for n, p in engine.model.named_parameters() if n.startswith(parts)}

    def differentiate(logprob_T: Tensor) -> tuple[Tensor | None, ...]:
        weight_T = torch.linspace(-1, 1, len(logprob_T)).to(logprob_T)
        return torch.autograd.grad((logprob_T * weight_T).sum(), list(weights.values()), allow_unused=True)

    ours_T = replayer.score(entries, replayer.find_kept(entries))
    plain_T = torch.cat([score_plainly(engine.model, entry) for entry in entries])
    torch.testing.assert_close(ours_T.double(), plain_T, rtol=1e-5, atol=1e-5)
    found = zip(weights, differentiate(ours_T), differentiate(plain_T), strict=True)
    num_compared = 0
    for name, own, plain in found:
        if plain is None or not plain.any():
            assert own is None or not own.any(), name
            continue
        num_compared += 1
        atol = 2e-5 * float(plain.abs().max())
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=atol, msg=name)
    assert num_compared > 30


class TwoTexts:
    """Writes, draws, looks at the picture, and writes again."""

    def __call__(self, request: Request) -> Generator[Any, Any, Sample]:
        (context,) = yield Read((Reading(request.prompt.parts),))
        first = yield Write(context, 0)
        drawn = yield Draw((Branch(first.context, 1.0, "conditional"),))
        (seen,) = yield Read((Reading((ImagePart(drawn.image),), first.context),))
        second = yield Write(seen, 1)
        turns = (first.turn, second.turn)
        trajectory = Trajectory(turns, drawn.noise_key, drawn.latent_LC, drawn.steps, drawn.recording)
        return Sample(request, drawn.image, None, trajectory)


def test_all_texts_of_a_sample_are_replayed() -> None:
    """The second after what the program read between: the first text, and the picture."""
    engine = build_engine()
    engine.programs = {"think": TwoTexts()}
    entries = list_entries(engine, sample_texts(engine, SAMPLING[0]))
    assert [(entry.number, entry.index) for entry in entries] == [(n, i) for n in range(4) for i in range(2)]
    for chosen in (entries, entries[1::2], entries[::2]):
        logprob_T = TextReplayer(engine).score(chosen, [None] * len(chosen)).detach()
        sampled_T = torch.tensor([x for entry in chosen for x in entry.sampled])
        torch.testing.assert_close(logprob_T, sampled_T, rtol=0, atol=1e-4)


def test_a_text_ends_with_its_bos_or_eos() -> None:
    engine = build_engine()
    (sample, *_) = sample_texts(engine, SAMPLING[0], 0)
    bos, eos = engine.model.tokenizer.bos, engine.model.tokenizer.eos
    (turn,) = sample.trajectory.text_turns
    for ids, stopped, tokens in (
        ((65, 66), True, (65, 66, eos)),
        ((65, 66), False, (65, 66)),
        ((65, bos, 66), True, (65, bos)),
        ((), True, (eos,)),
    ):
        own = replace(turn, ids=ids, stopped=stopped, logprobs=(-1.0,) * (len(ids) + stopped))
        trajectory = replace(sample.trajectory, text_turns=(own,))
        (entry,) = list_texts([replace(sample, trajectory=trajectory)], bos, eos)
        assert entry.tokens == tokens
        assert len(entry.sampled) == len(tokens)


def build_text(number: int, advantage: float, share: float, old: list[float], reference: list[float]):
    entry = TextEntry(None, 0, number, (0,) * len(old), ())
    return TrainedText(entry, advantage, share, torch.tensor(old), None, torch.tensor(reference))


@pytest.mark.parametrize("normalization", ["token", "sample"])
def test_the_loss_is_grpos_written_out(normalization: str) -> None:
    """Ratios within the clip range and beyond, both signs, the pull; two texts of one sample."""
    options = TextOptions(
        clip_low=0.1, clip_high=0.3, weight=0.7, kl_beta=0.5, normalization=normalization, micro_batch=2
    )
    texts = [(0, 1.5, [0.0, 0.2, -0.3]), (0, 1.5, [0.4]), (1, -2.0, [-0.2, 0.5]), (2, 0.0, [0.1])]
    trainer = object.__new__(TextTrainer)
    trainer.options = options
    entries = [TextEntry(None, 0, number, (0,) * len(own), ()) for number, _, own in texts]
    shares = trainer._share(entries)
    given = [
        build_text(number, advantage, share, [-1.0] * len(own), [-1.2] * len(own))
        for (number, advantage, own), share in zip(texts, shares, strict=True)
    ]
    leaves = [torch.tensor(own, requires_grad=True) for _, _, own in texts]
    by_entry = {id(text.entry): leaf for text, leaf in zip(given, leaves, strict=True)}

    class Replayer:
        def score(self, entries, kept):
            return torch.cat([by_entry[id(entry)] - 1.0 for entry in entries])

    trainer.replayer = Replayer()
    rows_T2 = trainer.accumulate(given, float(trainer.count(given)), lambda: None)
    shifts = [torch.tensor(own, requires_grad=True) for _, _, own in texts]
    by_sample: dict[int, list[Tensor]] = {}
    for (number, advantage, _), shift in zip(texts, shifts, strict=True):
        ratio = shift.exp()
        surrogate = torch.minimum(advantage * ratio, advantage * ratio.clamp(0.9, 1.3))
        away = -0.2 - shift
        by_sample.setdefault(number, []).append(-surrogate + 0.5 * (away.exp() - away - 1))
    if normalization == "token":
        loss = torch.cat([one for own in by_sample.values() for one in own]).mean()
    else:
        loss = torch.stack([torch.cat(own).mean() for own in by_sample.values()]).mean()
    (0.7 * loss).backward()
    for leaf, shift in zip(leaves, shifts, strict=True):
        torch.testing.assert_close(leaf.grad, shift.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rows_T2[:, 0], torch.cat(shifts).exp().detach())


def test_the_estimate_of_the_kl_is_right_in_the_mean() -> None:
    """Against the sum over a small vocabulary; and never negative."""
    logprob_V, reference_V = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    kl_V = estimate_kl(logprob_V, reference_V)
    exact = (logprob_V.exp() * (logprob_V - reference_V)).sum()
    torch.testing.assert_close((logprob_V.exp() * kl_V).sum(), exact)
    assert (kl_V >= 0).all()


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_a_run_in_pieces_is_the_whole_run(tmp_path: Path, policy: str) -> None:
    """With everything at once, texts among it."""
    text = {"text": {**TEXT["text"], "kl_beta": 0.1, "normalization": "sample", "micro_batch": 2}}
    changes = {"policy": {"kind": policy, "rank": 2, "alpha": 4.0}, "rollout": {"top_p": 0.9}}
    changes["rollout"] |= FULL["rollout"]
    given = (FULL, changes, text)
    run(build_recipe(tmp_path, *given, {"iterations": 3}), tmp_path / "whole", Ranks())
    for iterations in (1, 3):
        run(build_recipe(tmp_path, *given, {"iterations": iterations}), tmp_path / "pieces", Ranks())
    assert_same_weights(tmp_path / "whole", tmp_path / "pieces")
    for row in read_log(tmp_path / "pieces"):
        assert row["first_ratio_error"] == row["first_text_ratio_error"] == 0
        assert row["text_ratio_min"] < 1 < row["text_ratio_max"], "of the second update"
        assert 0 < row["text_gap"] < 1e-4
        assert 6 <= row["text_tokens"] <= 6 * 9
    assert read_log(tmp_path / "pieces")[-1]["text_kl"] > 0


def test_the_understanding_expert_changes_and_at_its_own_rate(tmp_path: Path) -> None:
    """AdamW's first step is about as long as the learning rate, whatever the gradient."""
    aligner = Aligner(build_recipe(tmp_path, TEXT, {"update": {"learning_rate": 1e-5}}), Ranks())
    before = {name: master.detach().clone() for name, master in aligner.policy.masters.items()}
    aligner.iterate()
    for name, master in aligner.policy.masters.items():
        moved = float((master.detach() - before[name]).abs().max())
        if name not in ("decoder.norm.und.weight",):
            expected = 1e-5 if ".gen." in name else 1e-3
            assert 0.5 * expected < moved < 1.1 * expected, name
    for name, master in aligner.policy.masters.items():
        assert torch.equal(aligner.engine.model.get_parameter(name), master), "published"


def test_the_reward_of_texts_rises(tmp_path: Path) -> None:
    """Of the same uniform numbers, before and after, by more than the spread of single texts."""
    changes = {"text": {"reward": REWARD, "learning_rate": 1e-2}, "update": {"learning_rate": 1e-6}}
    bigger = {"rollout": {"group": 8, "num_timesteps": 4}, "window": {"size": 1}}
    aligner = Aligner(build_recipe(tmp_path, TEXT, bigger, changes), Ranks())
    scores = [score(aligner.text.reward, aligner.roller.roll(0, range(16)))]
    for _ in range(6):
        aligner.iterate()
    scores.append(score(aligner.text.reward, aligner.roller.roll(0, range(16))))
    assert float(scores[1].mean() - scores[0].mean()) > float(scores[0].std())


def test_a_shared_chain_counts_once(tmp_path: Path) -> None:
    """Two prompts' chains are compared with each other, in the update that has the group's first sample."""
    changes = {"rollout": {"shared_chain": True, "prompts": 2}, "update": {"updates": 4}}
    aligner = Aligner(build_recipe(tmp_path, TEXT, changes), Ranks())
    parts = [aligner.roller.roll(0, numbers) for numbers in ([0, 1], [2, 3], [4], [5])]
    texts, row = aligner.text.prepare(parts)
    assert [len(part) for part in texts] == [1, 1, 0, 0]
    (first,), (second,), *_ = texts
    assert second.entry.sample is parts[1][1].sample
    assert first.advantage == pytest.approx(-second.advantage, abs=1e-3)
    assert first.advantage != 0
    assert row["text_tokens"] == sum(len(part[0].old_T) for part in texts[:2])
    assert aligner.iterate()["first_text_ratio_error"] == 0


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml", TEXT, {"text": {"kl_beta": 0.1, "normalization": "sample"}})
    run(Recipe.load(path), tmp_path / "one", Ranks())
    process = start(path, tmp_path / "two", find_launcher(2), stdout=subprocess.DEVNULL)
    assert process.wait(timeout=600) == 0
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5, msg=name)
    for first, second in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert second["first_text_ratio_error"] == 0
        for name in ("text_reward", "text_tokens", "text_ratio_max", "grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=1e-3), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"reasoning": "none"}}, "rollout reasoning is 'none'"),
        ({"rollout": {"temperature": 0.0}}, "rollout temperature is 0"),
        ({"rollout": {"shared_chain": True, "prompts": 1}}, "has one shared_chain"),
        ({"text": {"reward": "beauty"}}, "'beauty' is not known"),
        ({"text": {"normalization": "none"}}, "text normalization is 'none'"),
        ({"text": {"clip_low": 2.0}}, "text clip_low is 2.0"),
        ({"text": {"learning_rate": 0.0}}, "text learning_rate is 0.0"),
        ({"text": {"kl_beta": -1.0}}, "text kl_beta is -1.0"),
        ({"text": {"micro_batch": 0}}, "text micro_batch is 0"),
        ({"text": {"speed": 1}}, "text has 'speed'"),
    ],
)
def test_options_of_no_use_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(tmp_path, TEXT, changes)


def test_texts_are_trained_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    assert build_recipe(tmp_path).text is None
    path = write_recipe(tmp_path / "recipe.toml", {"rollout": {"reasoning": "think"}})
    path.write_text(path.read_text() + "\n[text]\n")
    assert Recipe.load(path).text == TextOptions()
