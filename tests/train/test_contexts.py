"""Gradient through contexts: the same values, and the gradient of one plain forward over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention.gradient import DifferentiableAttention
from realign.runtime.context import PictureBlock, build_text_block, latent_position_ids
from realign.runtime.prepare import crop_picture
from realign.runtime.reader import RUN_TOKENS, Reader, Reading
from realign.runtime.request import Sample, TextPart
from realign_kernels import LogProbCoefficients, StepCoefficients, sde_logprob
from tests.train.plain import build_blocks, forward_plainly
from tests.train.test_policy import set_up_factors
from tests.train.test_replay import CHECKPOINT, FREE, GUIDED, PlainAttention, build_engine, build_requests
from train.policy import PolicyOptions, build_policy, checkpoint_layers
from train.replay import Entry, Replayer, list_entries, pack_entries


@pytest.mark.parametrize("run_tokens", [16, RUN_TOKENS])
@pytest.mark.parametrize("guidance", [FREE, GUIDED], ids=["plain", "guided"])
def test_the_ratio_is_one_through_contexts(guidance, run_tokens: int) -> None:
    engine = build_engine(run_tokens=run_tokens)
    engine.model.requires_grad_(True)
    samples = engine.run(build_requests("flow-grpo", guidance, 2, "think"))
    replayer = Replayer(engine, through_contexts=True)
    for pack in pack_entries(list_entries(samples), "rollout", 0) * 2:
        replayed = replayer.replay(pack)
        assert torch.equal(replayed.logprob_N, replayed.old_logprob_N)
        replayed.logprob_N.sum().backward()  # every forward has contexts of its own
    assert replayer.held[1] == []


def replay_plainly(model: Bagel, entry: Entry, step) -> Tensor:
    """The log-prob of an unguided entry whose sample has no chain."""
    sample, noisy = entry.sample, entry.noisy
    place_L = latent_position_ids(model, *reversed(sample.image.size))
    latent_LE = model.embed_latent(noisy.sample_LC, torch.tensor([step.t]), place_L).to(model.dtype)
    turns = [build_text_block(model, turn.text) for turn in sample.trajectory.text_turns]
    blocks = [*read_blocks(model, sample), *turns, PictureBlock(latent_LE, is_gen=True)]
    velocity_LC = model.velocity(forward_plainly(model, blocks)[-1][1:-1]).float()  # as guidance gives it
    numbers = [torch.tensor([x], dtype=torch.float32) for x in (step.a, step.b)]
    terms = [torch.tensor([x], dtype=torch.float32) for x in (step.logprob_weight, step.logprob_constant)]
    cu_seqlens = torch.tensor([0, len(velocity_LC)], dtype=torch.int32)
    pair = (noisy.sample_LC, noisy.next_LC)
    return sde_logprob(
        pair, velocity_LC, cu_seqlens, StepCoefficients(*numbers), LogProbCoefficients(*terms)
    )[0]


def read_blocks(model: Bagel, sample: Sample) -> list:
    """What the conditional branch reads before any chain."""
    program = build_engine().programs[sample.request.settings.reasoning]
    return build_blocks(model, program.read_by_branch(sample.request)["conditional"])


@pytest.mark.parametrize("run_tokens", [16, RUN_TOKENS])
def test_gradients_through_contexts_are_plain_autograds(run_tokens: int) -> None:
    """Both in float64; of all of the decoder, and the embeddings. Without, they are others."""
    samples = build_engine().run(build_requests("flow-grpo", FREE, 2, "think"))
    entries = list_entries(samples)[:3]
    weight_N = torch.tensor([1.0, -2.0, 0.5])
    engine = build_engine(torch.float64, run_tokens)
    engine.model.requires_grad_(True)
    names, weights = zip(
        *((n, p) for n, p in engine.model.named_parameters() if n.startswith(("decoder.", "embed_tokens."))),
        strict=True,
    )

    def differentiate(logprob_N: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad((logprob_N * weight_N).sum(), weights, allow_unused=True)

    replayed = Replayer(engine, through_contexts=True).replay(entries)
    ours, cut = differentiate(replayed.logprob_N), differentiate(Replayer(engine).replay(entries).logprob_N)
    pairs = zip(entries, replayed.steps, strict=True)
    plain_N = torch.stack([replay_plainly(engine.model, entry, step) for entry, step in pairs])
    torch.testing.assert_close(replayed.logprob_N, plain_N, rtol=1e-6, atol=1e-6)
    expected = differentiate(plain_N)
    for name, own, short, plain in zip(names, ours, cut, expected, strict=True):
        if plain is None or not plain.any():  # the understanding expert's last norm
            assert own is None or not own.any(), name
            continue
        scale = float(plain.abs().max())
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6 * scale, msg=name)
        if "layers.0" in name:  # of the last layer, contexts have no queries
            assert short is None or float((short - plain).abs().max()) > 1e-3 * scale, name


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointing_changes_no_bit_through_contexts(kind: str) -> None:
    engine = build_engine()
    policy = build_policy(engine, PolicyOptions(kind, rank=3, alpha=6.0), False, 0, trains_text=True)
    if kind == "lora":
        set_up_factors(policy)
    entries = list_entries(engine.run(build_requests("cps", FREE, 1, "think")))[:4]
    found = []
    for is_on in (False, True):
        with policy.differentiate(), checkpoint_layers(engine.model, is_on):
            Replayer(engine, through_contexts=True).replay(entries).logprob_N.sum().backward()
        found.append([master.grad for master in policy.masters.values()])
        for master in policy.masters.values():
            master.grad = None
    names = list(policy.masters)
    assert any(
        ".und." in name and grad.any() for name, grad in zip(names, found[0], strict=True) if grad is not None
    )
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("run_tokens", [8, 10**6])
def test_gradients_of_causal_attention_and_of_its_contexts(run_tokens: int) -> None:
    """In float64; rows of other lengths, one shares all it read with another, one read nothing."""
    torch.manual_seed(0)
    model = Bagel.from_pretrained(CHECKPOINT, dtype=torch.float64)
    reader = Reader(model, crop_picture, 10**6, run_tokens=run_tokens, has_gradient=True)
    texts = ("a mug of many words that are read", "on it")
    readings = [Reading((TextPart(texts[0]),)), Reading(tuple(map(TextPart, texts)))]
    contexts = reader.read([*readings, readings[1]])
    past = [
        t for s in dict.fromkeys(s for c in contexts for s in c.segments) for t in (s.key_NLKD, s.value_NLKD)
    ]
    lengths, is_causal, llm = [5, 7, 7, 3], [True, True, False, True], model.config.llm
    shapes = [(22, heads, llm.head_dim) for heads in (4, 2, 2)]
    heads = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad_LHD = torch.randn(shapes[0], dtype=torch.float64)
    contexts = [*contexts, reader.start]
    found = []
    for kind in (DifferentiableAttention, CausalAttention):
        out_LHD = kind(model, contexts, lengths, is_causal)(1, *heads)
        found.append([out_LHD, *torch.autograd.grad(out_LHD, [*heads, *past], grad_LHD, retain_graph=True)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


class CausalAttention(PlainAttention):
    """Written out, one query at a time where rows are causal."""

    def __init__(self, model, contexts, lengths, is_causal, backend=None) -> None:
        self.given = (model, contexts, lengths, is_causal)

    def __call__(self, layer: int, *heads: Tensor) -> Tensor:
        model, contexts, lengths, is_causal = self.given
        outs = []
        parts = zip(contexts, is_causal, *(head.split(lengths) for head in heads), strict=True)
        for context, causal, query, key, value in parts:
            for end in range(1, len(query) + 1) if causal else [len(query)]:
                row = PlainAttention(model, [context], [end], [False])
                out_QHD = row(layer, query[:end], key[:end], value[:end])
                outs.append(out_QHD[-1:] if causal else out_QHD)
        return torch.cat(outs)
