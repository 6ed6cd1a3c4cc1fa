"""clip_score against float64, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from realign_kernels import clip_score
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import needs_triton

IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]
MODES = ["pairs", "all"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# Pictures, texts, width: one of each, none, one number, odd, more than one tile, as CLIP has it.
SHAPES = [(1, 1, 5), (0, 0, 4), (3, 2, 1), (5, 7, 77), (150, 131, 40), (2, 33, 768), (3, 3, 1280)]


def make_embeddings(num_images: int, num_texts: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Not normalised, of lengths far apart; exact in bfloat16 and float16, so that casts lose nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_images + num_texts, width, generator=generator)
    sizes = torch.tensor([0.25, 1.0, 30.0])[torch.arange(len(rows)) % 3]
    rows = (rows * sizes[:, None]).bfloat16().half().float()
    return rows[:num_images], rows[num_images:]


def expect(image_ND: Tensor, text_MD: Tensor, mode: str, logit_scale: float = 1.0) -> Tensor:
    """In float64, written apart from the reference."""
    image, text = image_ND.double(), text_MD.double()
    norms = [(rows * rows).sum(1).sqrt().clamp(min=1e-12) for rows in (image, text)]
    if mode == "pairs":
        return logit_scale * (image * text).sum(1) / (norms[0] * norms[1])
    products = torch.einsum("nd,md->nm", image, text)
    return logit_scale * products / (norms[0][:, None] * norms[1][None, :])


def plain(image_ND: Tensor, text_MD: Tensor, mode: str, logit_scale: float = 1.0) -> Tensor:
    """In float32, as CLIP code has it."""
    image_ND, text_MD = (
        rows.float() / rows.float().norm(dim=-1, keepdim=True) for rows in (image_ND, text_MD)
    )
    return logit_scale * ((image_ND * text_MD).sum(-1) if mode == "pairs" else image_ND @ text_MD.T)


def assert_as_exact_as_plain(
    actual: Tensor, embeddings: tuple[Tensor, Tensor], mode: str, logit_scale: float = 1.0
) -> None:
    """The error is at most twice that of plain float32, or one rounding of the largest possible score."""
    exact = expect(*embeddings, mode, logit_scale)
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    plain_error = (plain(*embeddings, mode, logit_scale).double() - exact).abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= max(2 * plain_error, torch.finfo(torch.float32).eps * logit_scale)


def run(image_ND: Tensor, text_MD: Tensor, mode: str, impl: str, logit_scale: float | Tensor = 1.0) -> Tensor:
    """The op on the device of the implementation; the result on the CPU."""
    device = device_of(impl)
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.to(device)
    return clip_score(image_ND.to(device), text_MD.to(device), mode, logit_scale, impl).cpu()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_images", "num_texts", "width"), SHAPES)
def test_error_is_that_of_plain_float32_at_most(num_images, num_texts, width, mode, dtype, impl):
    num_texts = num_images if mode == "pairs" else num_texts
    embeddings = make_embeddings(num_images, num_texts, width)
    actual = run(*(rows.to(dtype) for rows in embeddings), mode, impl, 20.0)
    assert actual.dtype == torch.float32
    assert_as_exact_as_plain(actual, embeddings, mode, 20.0)


@pytest.mark.parametrize("mode", MODES)
def test_reference_in_float64_is_the_formula(mode):
    embeddings = [rows.double() for rows in make_embeddings(70, 70, 33)]
    actual = run(*embeddings, mode, "reference", 100.0)
    torch.testing.assert_close(actual, expect(*embeddings, mode, 100.0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@given(num_images=st.integers(1, 40), num_texts=st.integers(1, 40), width=st.integers(1, 150))
@settings(max_examples=25)
def test_any_size(impl, num_images, num_texts, width):
    embeddings = make_embeddings(num_images, num_texts, width)
    assert_as_exact_as_plain(run(*embeddings, "all", impl), embeddings, "all")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 77])
def test_a_score_alone_has_the_bits_it_has_among_others(width, dtype, impl):
    image_ND, text_MD = (rows.to(dtype) for rows in make_embeddings(135, 135, width))
    pairs, scores = run(image_ND, text_MD, "pairs", impl), run(image_ND, text_MD, "all", impl)
    for first, end in ((0, 1), (3, 5), (130, 134)):
        assert torch.equal(run(image_ND[first:end], text_MD[first:end], "pairs", impl), pairs[first:end])
        alone = run(image_ND[first:end], text_MD[7:10], "all", impl)
        assert torch.equal(alone, scores[first:end, 7:10])
        assert torch.equal(run(image_ND[2:70], text_MD[first:end], "all", impl), scores[2:70, first:end])


def test_bits_do_not_depend_on_the_number_of_threads():
    embeddings = make_embeddings(200, 150, 512)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(run(*embeddings, "all", "reference"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_zeros_score_zero_and_short_vectors_are_divided_by_the_epsilon(mode, impl):
    image_ND, text_MD = make_embeddings(4, 4, 20)
    image_ND[1] = 0.0
    text_MD[2] = 0.0
    image_ND[3] *= 1e-15 / image_ND[3].norm()
    scores = run(image_ND, text_MD, mode, impl, 100.0)
    diagonal = scores if mode == "pairs" else scores.diagonal()
    assert diagonal[1] == 0.0
    assert diagonal[2] == 0.0
    torch.testing.assert_close(scores.double(), expect(image_ND, text_MD, mode, 100.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_own_scores(impl):
    image_ND, text_MD = make_embeddings(5, 6, 20)
    clean = run(image_ND, text_MD, "all", impl)
    image_ND[2, 3] = math.nan
    scores = run(image_ND, text_MD, "all", impl)
    assert scores[2].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(scores[others], clean[others])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_logit_scale_may_be_a_tensor(mode, impl):
    embeddings = make_embeddings(4, 4, 24)
    expected = run(*embeddings, mode, impl, 14.25)
    for logit_scale in (torch.tensor(14.25), torch.tensor([14.25]), torch.tensor(14.25).bfloat16()):
        actual = run(*embeddings, mode, impl, logit_scale)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_strides_and_alignment_do_not_matter(mode, impl):
    image_ND, text_MD = make_embeddings(9, 9, 48)
    expected = run(image_ND, text_MD, mode, impl)
    device = device_of(impl)
    shifted = torch.zeros(9 * 48 + 1, device=device)[1:].view(9, 48).copy_(image_ND)
    strided = torch.stack([image_ND, text_MD], dim=-1).to(device)[..., 1]
    assert shifted.data_ptr() % 16 != 0
    assert not strided.is_contiguous()
    actual = clip_score(shifted, strided, mode, impl=impl).cpu()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_sides(impl):
    image_ND, text_MD = make_embeddings(3, 2, 8)
    assert run(image_ND[:0], text_MD, "all", impl).shape == (0, 2)
    assert run(image_ND, text_MD[:0], "all", impl).shape == (3, 0)
    assert run(image_ND[:0], text_MD[:0], "pairs", impl).shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_not_written_to(mode, impl):
    embeddings = make_embeddings(5, 5, 16)
    before = [rows.clone() for rows in embeddings]
    run(*embeddings, mode, impl)
    assert all(map(torch.equal, embeddings, before))


@pytest.mark.parametrize("num_rows", [3000, 70_000])
def test_many_pairs(num_rows):
    embeddings = make_embeddings(num_rows, num_rows, 12)
    assert_as_exact_as_plain(run(*embeddings, "pairs", "reference"), embeddings, "pairs")
    if num_rows < 10_000 or device_of("triton").type == "cuda":
        assert_as_exact_as_plain(run(*embeddings, "pairs", "triton"), embeddings, "pairs")


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    embeddings = [rows.double().requires_grad_() for rows in make_embeddings(3, 3, 5)]
    logit_scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: clip_score(*inputs[:2], mode, inputs[2]), (*embeddings, logit_scale)
    )
    wide = [rows.detach().float().requires_grad_() for rows in embeddings]
    clip_score(*wide, mode).sum().backward()
    expected = [rows.detach().requires_grad_() for rows in embeddings]
    images, texts = (normalize(rows, dim=-1) for rows in expected)
    ((images * texts).sum() if mode == "pairs" else (images @ texts.T).sum()).backward()
    for actual, exact in zip(wide, expected, strict=True):
        torch.testing.assert_close(actual.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@needs_triton
def test_explicit_triton_has_no_gradient():
    image_ND, text_MD = make_embeddings(3, 3, 5)
    with pytest.raises(ValueError, match="impl='triton' cannot run: it has no gradient"):
        clip_score(image_ND.requires_grad_(), text_MD, impl="triton")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_pairwise", [True, False])
def test_opcheck(is_pairwise, dtype, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    device = device_of("triton")
    image_ND, text_MD = (rows.to(device, dtype) for rows in make_embeddings(3, 3, 16))
    clip_score(image_ND, text_MD, "pairs", impl="triton")
    op = torch.ops.realign_kernels.clip_score_triton.default
    torch.library.opcheck(op, (image_ND, text_MD, is_pairwise, 2.0, None), test_utils=OPCHECK)
    scale = torch.tensor(3.0, device=device)
    torch.library.opcheck(op, (image_ND, text_MD, is_pairwise, 1.0, scale), test_utils=OPCHECK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "mode is 'both': must be 'pairs' or 'all'"),
        ({"image_ND": torch.zeros(4)}, r"image_ND has shape \(4,\): must be embeddings by numbers"),
        ({"text_MD": torch.zeros(2, 0)}, r"text_MD has shape \(2, 0\): .* D at least 1"),
        ({"text_MD": torch.zeros(2, 4, dtype=torch.int32)}, "text_MD has dtype torch.int32: must be float32"),
        ({"text_MD": torch.zeros(2, 5)}, "text_MD is 5 wide: must be as image_ND, 4"),
        (
            {"text_MD": torch.zeros(3, 4)},
            "text_MD has 3 rows: must have one for each of image_ND, 2, or mode 'all'",
        ),
        ({"text_MD": torch.zeros(2, 4).half()}, "text_MD is torch.float16 on cpu: must be as image_ND"),
        ({"logit_scale": math.inf}, "logit_scale is inf: must be finite"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale is torch.float32 \(2,\): must be a number"),
        (
            {"logit_scale": torch.tensor(3)},
            r"logit_scale is torch.int64 \(\): must be a number, or a float tensor",
        ),
        (
            {"logit_scale": torch.ones((), device="meta")},
            "logit_scale is on meta: must be on cpu with image_ND",
        ),
        ({"impl": "cpp"}, "impl is 'cpp': must be one of auto, reference, triton"),
    ],
)
def test_bad_arguments(change, message):
    call = {"image_ND": torch.zeros(2, 4), "text_MD": torch.zeros(2, 4), **change}
    with pytest.raises(ValueError, match=message):
        clip_score(**call)
