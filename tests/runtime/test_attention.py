"""Attention backends by one contract; runs that are shared against contexts that are not."""

from __future__ import annotations

import pytest
import torch

from realign.runtime.attention import BACKENDS, ContextAttention, find_backend, order_rows
from realign.runtime.attention.backends import Backend, attend_by_heads
from realign.runtime.attention.spans import Spans
from realign.runtime.context import PictureBlock, build_text_block, extend
from realign.runtime.kv import Context, Segment, join_runs
from realign.runtime.settings import ATTENTION_BACKENDS

pytestmark = pytest.mark.usefixtures("poison_fresh_memory")

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
PRESENT = [
    (backend, device)
    for backend in BACKENDS.values()
    for device in DEVICES
    if backend.find_obstacle(device, torch.bfloat16) is None
]
NAMES = [f"{backend.name}-{device.type}" for backend, device in PRESENT]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def draw(length: int, heads: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(length, heads, dim).to(device, dtype)


def attend_exactly(query_LHD, key_SKD, value_SKD, spans, is_causal):
    """In float64, key by key."""
    outs, lses, begin = [], [], 0
    keys = [0]
    for length in spans.k_lengths:
        keys.append(keys[-1] + length)
    for number, num_queries in enumerate(spans.q_lengths):
        place = slice(0, keys[1]) if spans.is_shared else slice(keys[number], keys[number + 1])
        query, key, value = (
            t.double() for t in (query_LHD[begin : begin + num_queries], key_SKD[place], value_SKD[place])
        )
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        score_HQS = torch.einsum("qhd,shd->hqs", query, key) / query.shape[-1] ** 0.5
        if is_causal:
            seen = torch.arange(len(key)) <= torch.arange(num_queries)[:, None] + len(key) - num_queries
            score_HQS = score_HQS.masked_fill(~seen.to(key.device), -torch.inf)
        outs.append(torch.einsum("hqs,shd->qhd", score_HQS.softmax(-1), value))
        lses.append(score_HQS.logsumexp(-1).T)
        begin += num_queries
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (3, 3)], ids=str)
@pytest.mark.parametrize(("backend", "device"), PRESENT, ids=NAMES)
def test_contract(backend: Backend, device: torch.device, heads: tuple[int, int], is_causal: bool):
    """Ragged sequences, grouped heads, one query, more keys than queries."""
    torch.manual_seed(0)
    dim = 64
    spans = Spans((5, 1, 17, 4), (5, 9, 30, 4), device)
    for dtype in DTYPES[device.type]:
        query = draw(27, heads[0], dim, device, dtype)
        key, value = (draw(48, heads[1], dim, device, dtype) for _ in range(2))
        out, lse = backend.attend(query, key, value, spans, is_causal)
        expected, expected_lse = attend_exactly(query, key, value, spans, is_causal)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
            query.shape,
            dtype,
            (27, heads[0]),
            torch.float32,
        )
        close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(out.double(), expected, **close)
        torch.testing.assert_close(lse.double(), expected_lse, **close)


@pytest.mark.parametrize(("backend", "device"), PRESENT, ids=NAMES)
def test_shared_keys_are_those_of_every_sequence(backend: Backend, device: torch.device):
    torch.manual_seed(1)
    lengths, dtype = (3, 8, 1), DTYPES[device.type][0]
    query = draw(12, 4, 64, device, dtype)
    key, value = (draw(21, 2, 64, device, dtype) for _ in range(2))
    shared = backend.attend(query, key, value, Spans(lengths, (21,), device, is_shared=True))
    apart = backend.attend(
        query, key.repeat(3, 1, 1), value.repeat(3, 1, 1), Spans(lengths, (21,) * 3, device)
    )
    for ours, theirs in zip(shared, apart, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-2 if device.type == "cuda" else 1e-6, rtol=1e-2)


@pytest.mark.parametrize(("backend", "device"), PRESENT, ids=NAMES)
def test_a_sequence_has_its_bits_in_any_company(backend: Backend, device: torch.device):
    torch.manual_seed(2)
    q_lengths, k_lengths, dtype = (5, 40, 5), (70, 45, 70), DTYPES[device.type][0]
    query, key, value = (draw(n, heads, 64, device, dtype) for n, heads in ((50, 4), (185, 2), (185, 2)))
    out, lse = backend.attend(query, key, value, Spans(q_lengths, k_lengths, device))
    alone = backend.attend(query[45:], key[115:], value[115:], Spans((5,), (70,), device))
    assert torch.equal(out[45:], alone[0])
    assert torch.equal(lse[45:], alone[1])


class PlainKernel:
    """A kernel as an older library has it: it knows no grouped heads."""

    has_grouped_heads = False

    def __call__(self, query, key, value, spans, is_causal):
        assert query.shape[1] == key.shape[1]
        return BACKENDS["reference"].attend(query, key, value, spans, is_causal)


@pytest.mark.parametrize(("is_causal", "is_shared"), [(False, False), (False, True), (True, False)])
def test_a_kernel_without_grouped_heads_is_called_so_that_it_needs_none(is_causal, is_shared):
    torch.manual_seed(3)
    spans = Spans((4, 9), (30,) if is_shared else (20, 10), torch.device("cpu"), is_shared)
    query, key, value = torch.randn(13, 6, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    ours = attend_by_heads(PlainKernel(), query, key, value, spans, is_causal)
    for one, other in zip(ours, attend_exactly(query, key, value, spans, is_causal), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_the_choice_is_automatic_or_named():
    assert tuple(BACKENDS) == ATTENTION_BACKENDS
    cpu = torch.device("cpu")
    assert find_backend(cpu, torch.float32).name == "sdpa"
    assert find_backend(cpu, torch.float32, "reference").name == "reference"
    with pytest.raises(ValueError, match="attention is 'fast': must be one of auto, varlen"):
        find_backend(cpu, torch.float32, "fast")
    with pytest.raises(ValueError, match="attention 'flash-attn' cannot be used on cpu: it runs on CUDA"):
        find_backend(cpu, torch.float32, "flash-attn")


def test_on_a_gpu_the_dtype_decides():
    cuda = torch.device("cuda")
    assert find_backend(cuda, torch.bfloat16).name == "varlen"
    assert find_backend(cuda, torch.float32).name == "reference"
    with pytest.raises(
        ValueError, match="'varlen' cannot be used on cuda: it takes bfloat16 and float16, not float32"
    ):
        find_backend(cuda, torch.float32, "varlen")


@pytest.fixture
def contexts(model):
    """Two prompts, one of them twice, one longer by a text; and one that has read nothing."""
    torch.manual_seed(4)
    empty = Context()
    pictures = [
        PictureBlock(torch.randn(n, model.config.llm.hidden_size) * 0.02, is_gen=False) for n in (20, 9)
    ]
    first, second = extend(model, [empty] * 2, pictures)
    (longer,) = extend(model, [first], [build_text_block(model, "put the mug next to the lamp")])
    return [first, longer, empty, second, longer]


def join_first(contexts):
    return join_runs(contexts, [min(1, len(context.tail)) for context in contexts], least=1)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_shared_runs_give_what_whole_contexts_give(model, contexts, name):
    torch.manual_seed(5)
    llm, lengths, is_causal = model.config.llm, [6, 3, 4, 6, 5], [False, True, False, False, True]
    heads = [(llm.num_attention_heads,), (llm.num_key_value_heads,), (llm.num_key_value_heads,)]
    new = [torch.randn(sum(lengths), *count, llm.head_dim) for count in heads]
    backend = find_backend(model.device, model.dtype, name)
    joined = join_first(contexts)
    assert [context.num_runs for context in joined] == [1, 1, 0, 1, 1]
    assert joined[0].runs == joined[1].runs == joined[4].runs
    whole = ContextAttention(model, contexts, lengths, is_causal, backend)
    shared = ContextAttention(model, joined, lengths, is_causal, backend)
    for layer in range(llm.num_hidden_layers):
        torch.testing.assert_close(shared(layer, *new), whole(layer, *new), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_a_row_has_its_bits_whoever_shares_its_run(model, contexts, name):
    torch.manual_seed(6)
    llm, backend = model.config.llm, find_backend(model.device, model.dtype, name)
    lengths = [5] * 5
    new = [
        torch.randn(25, n, llm.head_dim) for n in (llm.num_attention_heads, *[llm.num_key_value_heads] * 2)
    ]
    joined = join_first(contexts)
    together = ContextAttention(model, joined, lengths, [False] * 5, backend)(0, *new)
    for row in range(5):
        place = slice(5 * row, 5 * row + 5)
        alone = ContextAttention(model, [joined[row]], [5], [False], backend)(0, *(t[place] for t in new))
        assert torch.equal(alone, together[place])


def test_rows_that_share_lie_together(model, contexts):
    joined = join_first(contexts)
    order = order_rows(joined, [5] * 5)
    assert sorted(order) == [0, 1, 2, 3, 4]
    runs = [joined[row].runs for row in order]
    assert runs == sorted(runs, key=runs.index)
    attention = ContextAttention(model, [joined[row] for row in order], [5] * 5, [False] * 5)
    assert not any(isinstance(place, torch.Tensor) for place, _ in attention.shared)


def test_a_run_is_held_once(model, contexts):
    joined = join_first(contexts)
    held = {
        segment.key_NLKD.untyped_storage().data_ptr() for context in joined for segment in context.segments
    }
    assert len(held) == 3  # two pictures and a text
    (run,) = joined[0].runs
    assert run.key_NLKD.untyped_storage().nbytes() == run.key_NLKD.nbytes


def test_few_tokens_are_no_run():
    segment = Segment(*(torch.zeros(2, 5, 1, 4) for _ in range(2)))
    context = Context().extended(segment, 1)
    (same,) = join_runs([context], [1], least=6)
    assert same is context
