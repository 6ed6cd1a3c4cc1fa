"""Replay: the ratio is one before the first update, and the gradient is that of plain autograd."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.attention.gradient import DifferentiableAttention
from realign.runtime.engine import Engine
from realign.runtime.guidance import Branch
from realign.runtime.kv import Context
from realign.runtime.prepare import crop_picture
from realign.runtime.reader import RUN_TOKENS, Reader, Reading
from realign.runtime.request import Prompt, Request, TextPart
from realign.runtime.settings import SDE_RULES, GuidanceSettings, NoiseSettings, Settings, TextSettings
from realign.runtime.stream import StreamOptions
from realign_kernels import grpo_loss
from tests.runtime.conftest import draw_picture
from train.replay import Replayer, list_entries, pack_entries

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "bagel-tiny" / "checkpoint"
LEVELS = {"flow-grpo": 1.3, "dance-grpo": 0.5, "cps": 0.8}
GUIDED, FREE = GuidanceSettings(3.0, 1.5, (0.0, 1.0)), GuidanceSettings(1.0)


def build_engine(dtype: torch.dtype = torch.float32, run_tokens: int = RUN_TOKENS) -> Engine:
    model = Bagel.from_pretrained(CHECKPOINT, dtype=dtype)
    return Engine(model, PROGRAMS, prepare=crop_picture, record=True, run_tokens=run_tokens)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine()


def build_requests(
    rule: str, guidance: GuidanceSettings = FREE, num_references: int = 0, reasoning: str = "none"
) -> list[Request]:
    """Two prompts, two samples each; sampled texts of their own."""
    noise, text = NoiseSettings(rule, LEVELS[rule], (1, 2)), TextSettings(20, temperature=1.0)
    settings = Settings(32, 32, reasoning, 6, guidance=guidance, text=text, noise=noise)
    requests = []
    for number in range(4):
        pictures = [draw_picture(number // 2 * 4 + i, 32, 48) for i in range(num_references)]
        prompt = Prompt.build([*pictures, f"a mug, the {number // 2}th"])
        requests.append(Request(f"request {number}", prompt, number, settings))
    return requests


CASES = [
    pytest.param(rule, guidance, references, reasoning, run_tokens, id="-".join(map(str, what)))
    for rule in SDE_RULES
    for *what, guidance, references, reasoning, run_tokens in (
        (rule, "plain", FREE, 0, "none", RUN_TOKENS),
        (rule, "guided", GUIDED, 0, "none", RUN_TOKENS),
        (rule, "references", FREE, 2, "none", 16),
        (rule, "all", GUIDED, 2, "ic-cot", RUN_TOKENS),
        (rule, "all", "runs", GUIDED, 1, "think", 16),
    )
]


@pytest.mark.parametrize(("rule", "guidance", "references", "reasoning", "run_tokens"), CASES)
def test_the_ratio_is_one_before_the_first_update(
    rule: str, guidance: GuidanceSettings, references: int, reasoning: str, run_tokens: int
) -> None:
    """Bit for bit in the rollout's packing; in another the difference is bounded."""
    engine = build_engine(run_tokens=run_tokens)
    samples = engine.run(build_requests(rule, guidance, references, reasoning))
    texts = {sample.trajectory.text_turns for sample in samples}
    assert len(texts) == (4 if reasoning != "none" else 1)
    entries = list_entries(samples)
    assert len(entries) == 8
    engine.model.requires_grad_(True)
    replayer = Replayer(engine)
    for pack in pack_entries(entries, "rollout", 0):
        assert len(pack) == 4
        replayed = replayer.replay(pack)
        assert replayed.logprob_N.requires_grad
        assert torch.equal(replayed.logprob_N, replayed.old_logprob_N)
        assert not replayed.bias_N.any()
        advantage_N = torch.tensor([1.0, -1.0, 0.5, -0.5])
        _, metrics = grpo_loss(replayed.logprob_N, replayed.old_logprob_N, advantage_N, 1e-5)
        assert torch.equal(metrics.ratio_N, torch.ones(4))
    for pack in pack_entries(entries, "dense", 3):
        replayed = replayer.replay(pack)
        difference_N = (replayed.logprob_N.detach() - replayed.old_logprob_N).abs()
        assert float(difference_N.max()) <= 1e-6


def test_packings(engine: Engine) -> None:
    samples = engine.run(build_requests("cps"), StreamOptions(batch_size=3))
    entries = list_entries(samples)
    packs = pack_entries(entries, "rollout", 0)
    sizes = sorted(len(pack) for pack in packs)
    assert sizes == [1, 1, 3, 3]
    for pack in packs:
        assert len({entry.noisy.index for entry in pack}) == 1
        company = pack[0].sample.trajectory.recording.company
        assert tuple(entry.sample.request.id for entry in pack) == company
    assert [len(pack) for pack in pack_entries(entries, "dense", 3)] == [3, 3, 2]
    with pytest.raises(ValueError, match="packing is 'loose'"):
        pack_entries(entries, "loose", 1)


def test_other_weights_give_other_logprobs(engine: Engine) -> None:
    engine = build_engine()
    samples = engine.run(build_requests("flow-grpo", GUIDED, 1))
    replayer = Replayer(engine)
    (pack, _) = pack_entries(list_entries(samples), "rollout", 0)
    assert torch.equal(replayer.replay(pack).logprob_N, replayer.replay(pack).old_logprob_N)
    weight = engine.model.decoder.layers[0].gen.down_proj.weight
    engine.publish({"decoder.layers.0.gen.down_proj.weight": weight.detach() * 1.5})
    replayed = replayer.replay(pack)
    assert not torch.equal(replayed.logprob_N, replayed.old_logprob_N)
    assert (replayed.bias_N > 0).all()


def attend_plainly(contexts: list[Context], lengths: list[int], layer: int, *heads: Tensor) -> Tensor:
    """Row by row, softmax written out; nothing of the runtime's."""
    outs = []
    for context, *parts in zip(contexts, *(head.split(lengths) for head in heads), strict=True):
        query_QHD, key_SKD, value_SKD = parts
        if context.length:
            key_SKD = torch.cat((context.key(layer), key_SKD))
            value_SKD = torch.cat((context.value(layer), value_SKD))
        groups = query_QHD.shape[1] // key_SKD.shape[1]
        key_SHD, value_SHD = (t.repeat_interleave(groups, dim=1) for t in (key_SKD, value_SKD))
        score_HQS = torch.einsum("qhd,shd->hqs", query_QHD, key_SHD) / query_QHD.shape[-1] ** 0.5
        outs.append(torch.einsum("hqs,shd->qhd", score_HQS.softmax(-1), value_SHD))
    return torch.cat(outs)


class PlainAttention:
    def __init__(self, model, contexts, lengths, is_causal, backend=None) -> None:
        self.attend = partial(attend_plainly, contexts, lengths)

    def __call__(self, layer: int, *heads: Tensor) -> Tensor:
        return self.attend(layer, *heads)


@pytest.mark.parametrize("run_tokens", [8, 10**6])
def test_gradients_of_attention_in_float64(run_tokens: int) -> None:
    """Contexts of other lengths, one shared by rows, one empty; sizes differ."""
    torch.manual_seed(0)
    model = Bagel.from_pretrained(CHECKPOINT, dtype=torch.float64)
    reader = Reader(model, crop_picture, 10**6, run_tokens=run_tokens)
    texts = ("a mug of many words that are read", "on it")
    readings = [Reading((TextPart(texts[0]),)), Reading(tuple(map(TextPart, texts)))]
    contexts = reader.read([*readings, readings[1]])
    contexts = [*contexts, Context()]
    lengths = [5, 7, 7, 3]
    llm = model.config.llm
    shapes = [(22, heads, llm.head_dim) for heads in (4, 2, 2)]
    heads = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad_LHD = torch.randn(shapes[0], dtype=torch.float64)
    for layer in range(2):
        found = []
        for kind in (DifferentiableAttention, PlainAttention):
            out_LHD = kind(model, contexts, lengths, [False] * 4)(layer, *heads)
            found.append([out_LHD, *torch.autograd.grad(out_LHD, heads, grad_LHD)])
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("guidance", [FREE, GUIDED], ids=["plain", "guided"])
def test_gradients_of_weights_are_plain_autograds(
    guidance: GuidanceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, through kernels that are not the compiled ones; in float32 near it."""
    samples = build_engine().run(build_requests("flow-grpo", guidance, 1))
    grads = []
    for dtype, attention in ((torch.float64, PlainAttention), (torch.float32, DifferentiableAttention)):
        monkeypatch.setattr("train.replay.DifferentiableAttention", attention)
        engine = build_engine(dtype)
        engine.model.requires_grad_(True)
        replayed = Replayer(engine).replay(list_entries(samples)[:3])
        weights = dict(engine.model.decoder.layers.named_parameters(prefix="layers"))
        weights = {name: weight for name, weight in weights.items() if ".gen." in name}
        total = (replayed.logprob_N * torch.tensor([1.0, -2.0, 0.5])).sum()
        grads.append(dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True)))
    assert len(grads[0]) > 10
    for name, expected in grads[0].items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            grads[1][name].double(),
            expected,
            rtol=1e-3,
            atol=2e-4 * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_branches_are_those_of_the_rollout(engine: Engine) -> None:
    """Kinds and scales; and no gradient is kept of reading."""
    samples = engine.run(build_requests("cps", GUIDED, 1, "think"))
    replayer = Replayer(engine)
    for branches in replayer._rebuild(samples):
        assert [branch.kind for branch in branches] == ["conditional", "text", "image"]
        assert [branch.scale for branch in branches] == [1.0, 3.0, 1.5]
        assert isinstance(branches[0], Branch)
        assert not branches[0].context.key(0).requires_grad


def test_given_texts_are_read_as_written_ones(engine: Engine) -> None:
    """A group's one chain: the others take the first one's."""
    first, *_ = engine.run(build_requests("cps", FREE, 0, "think"))
    request = replace(first.request, turns=first.trajectory.text_turns)
    (again,) = engine.run([request])
    assert again.trajectory.text_turns == first.trajectory.text_turns
    assert torch.equal(again.trajectory.latent_LC, first.trajectory.latent_LC)
    assert again.reasoning == first.reasoning
