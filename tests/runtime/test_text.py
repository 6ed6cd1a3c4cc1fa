"""Text decoding against whole-sequence forwards, the sampling rule, and how texts end."""

from __future__ import annotations

import pytest
import torch

from realign.model.mot import Route
from realign.runtime.context import build_text_block, extend
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.settings import TextSettings
from realign.runtime.text import TextDecoder, choose_tokens, decode_text

pytestmark = pytest.mark.usefixtures("poison_fresh_memory")


@pytest.fixture
def contexts(model):
    blocks = [build_text_block(model, text) for text in ("a", "put the mug next to the lamp", "a red mug")]
    return [*extend(model, [Context()] * 3, blocks), Context()]


@torch.no_grad()
def plain_logits(model, ids):
    """Scores after every token of a sequence, in one causal forward."""
    everything = torch.arange(len(ids))

    def attend(layer, query_LHD, key_LKD, value_LKD):
        repeats = query_LHD.shape[1] // key_LKD.shape[1]
        key_LHD, value_LHD = (t.repeat_interleave(repeats, dim=1) for t in (key_LKD, value_LKD))
        scores_HLS = torch.einsum("lhd,shd->hls", query_LHD, key_LHD) / query_LHD.shape[-1] ** 0.5
        seen_LS = everything[:, None] >= everything
        return torch.einsum(
            "hls,shd->lhd", scores_HLS.masked_fill(~seen_LS, -torch.inf).softmax(-1), value_LHD
        )

    hidden_LE = model.embed_text(torch.tensor(ids))
    return model.logits(model.decoder(hidden_LE, everything, Route(everything, everything[:0]), attend))


def keys(num):
    return [NoiseKey(number, f"r{number}", stream="text") for number in range(num)]


def test_growing_cache_is_the_whole_forward(model, contexts):
    """More steps than there is room at first, contexts of different lengths, rows dropped on the way."""
    texts = ["a", "put the mug next to the lamp", "a red mug"]
    prefixes = [list(build_text_block(model, text).ids) for text in texts] + [[]]
    decoder = TextDecoder(model, contexts)
    rows = list(range(4))
    read = [list(prefix) for prefix in prefixes]
    for step in range(150):
        if step == 70:
            decoder.keep([0, 3])
            rows = [0, 3]
        tokens = [(7 * step + 3 * row) % 250 for row in rows]
        logits_RV = decoder.step(torch.tensor(tokens))
        for row, token in zip(rows, tokens, strict=True):
            read[row].append(token)
        if step in (0, 69, 70, 149):
            for logits_V, row in zip(logits_RV, rows, strict=True):
                torch.testing.assert_close(logits_V, plain_logits(model, read[row])[-1], rtol=1e-4, atol=1e-4)


def test_greedy_is_the_argmax_chain(model, contexts):
    settings = [TextSettings(max_tokens=n) for n in (5, 9, 1, 7)]
    for context, own, written in zip(
        contexts, settings, decode_text(model, contexts, settings, keys(4)), strict=True
    ):
        turn = written.turn
        decoder, token, chain = TextDecoder(model, [context]), model.tokenizer.bos, []
        while len(chain) < own.max_tokens:
            token = int(decoder.step(torch.tensor([token])).argmax())
            if token == model.tokenizer.eos:
                break
            chain.append(token)
        assert turn.ids == tuple(chain)
        assert turn.stopped == (len(chain) < own.max_tokens)


def test_texts_stop_at_eos_and_are_cut_at_bos(model, contexts, monkeypatch):
    eos, bos = model.tokenizer.eos, model.tokenizer.bos
    script = {0: [65, 66, eos], 1: [65, bos, 66, 67], 2: [eos], 3: [65, 65, 65, 65, 65]}
    steps = iter(range(10))

    def scripted(logits_RV, temperature_R, *rest):
        step = next(steps)
        wanted = [round(float(t) * 10) - 1 for t in temperature_R]
        return torch.tensor([script[row][min(step, len(script[row]) - 1)] for row in wanted])

    monkeypatch.setattr("realign.runtime.text.choose_tokens", scripted)
    settings = [TextSettings(4, temperature=(row + 1) / 10) for row in range(4)]
    written = decode_text(model, contexts, settings, keys(4))
    eos = model.tokenizer.eos
    assert [one.rest for one in written] == [(eos,), (67, eos), (eos,), (65, eos)]
    assert [one.context.length - context.length for one, context in zip(written, contexts, strict=True)] == [
        3,
        4,
        1,
        4,
    ]
    turns = [one.turn for one in written]
    assert [turn.ids for turn in turns] == [(65, 66), (65, bos, 66, 67), (), (65,) * 4]
    assert [turn.stopped for turn in turns] == [True, False, True, False]
    assert [turn.text for turn in turns] == [
        model.tokenizer.decode(ids) for ids in ([65, 66], [65], [], [65] * 4)
    ]


def test_sampled_frequencies_are_the_softmax():
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf])
    uniform_R = (torch.arange(20_000) + 0.5) / 20_000
    logits_RV = logits_V.expand(20_000, -1)
    chosen = choose_tokens(logits_RV, torch.full((20_000,), 0.7), torch.ones(20_000), uniform_R)
    shares = torch.bincount(chosen, minlength=5) / 20_000
    torch.testing.assert_close(shares, torch.softmax(logits_V / 0.7, 0), atol=2e-4, rtol=0)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    weight_V = torch.tensor([0.1, 0.4, 0.2, 0.3])
    uniform_R = (torch.arange(1000) + 0.5) / 1000
    for top_p, kept in (
        (0.3, [1]),
        (0.4, [1]),
        (0.5, [1, 3]),
        (0.69, [1, 3]),
        (0.75, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ):
        chosen = choose_tokens(
            weight_V.log().expand(1000, -1), torch.ones(1000), torch.full((1000,), top_p), uniform_R
        )
        shares = torch.bincount(chosen, minlength=4) / 1000
        expected = torch.zeros(4)
        expected[kept] = weight_V[kept] / weight_V[kept].sum()
        torch.testing.assert_close(shares, expected, atol=2e-3, rtol=0)


def test_a_row_chooses_the_same_in_any_company():
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(6, 40, generator=generator)
    uniform_R = torch.rand(6, generator=generator)
    temperature_R = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 2.0])
    top_p_R = torch.tensor([1.0, 1.0, 0.6, 0.9, 0.5, 1.0])
    together = choose_tokens(logits_RV, temperature_R, top_p_R, uniform_R)
    for row in range(6):
        one = slice(row, row + 1)
        assert (
            choose_tokens(logits_RV[one], temperature_R[one], top_p_R[one], uniform_R[one]) == together[row]
        )
    assert together[0] == logits_RV[0].argmax()


def test_the_ends_of_the_unit_interval_choose_possible_tokens():
    logits_RV = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    uniform_R = torch.tensor([0.0, 1 - 2.0**-24])
    assert choose_tokens(logits_RV, torch.ones(2), torch.ones(2), uniform_R).tolist() == [1, 2]


def test_no_contexts_is_no_work(model):
    assert decode_text(model, [], [], []) == []
