"""`clip_score` in Triton: pairs in one launch, all with all in two, the norms and the product.

The norms have a launch of their own: a product that sums squares too would keep its tensor cores waiting. The
order of sums depends on the width and dtype of the embeddings alone: a score's bits are its own. N pictures,
M texts, D numbers of an embedding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.clip_score.reference import EPSILON
from realign_kernels.launch import launch

ROWS = 4  # of embeddings that a program reads: one for each of its warps
MAX_COLUMNS = 1024
# Tile of a product, and its launch. Rows that begin anywhere are loaded a number at a time, into registers.
HALF_PRODUCT = {"BN": 128, "BM": 128, "BD": 64, "num_warps": 8, "num_stages": 4}
NARROW_HALF_PRODUCT = {"BN": 128, "BM": 64, "BD": 64, "num_warps": 8, "num_stages": 2}
# Of float32 every sum is one thread's, number after number, in any tile: its size may follow the call's.
FLOAT_PRODUCT = {"BN": 128, "BM": 64, "BD": 32, "num_warps": 8, "num_stages": 3}
SMALL_FLOAT_PRODUCT = {"BN": 32, "BM": 32, "BD": 64, "num_warps": 4, "num_stages": 3}
SMALL = 1 << 20  # scores: fewer would leave most of a chip without one of the larger tiles
ALIGNMENT = 16  # bytes, and numbers, from which Triton takes loads to be wide


@torch.library.custom_op(
    "realign_kernels::clip_score_triton",
    mutates_args=(),
    schema="(Tensor image, Tensor text, bool is_pairwise, float scale, Tensor? logit_scale) -> Tensor",
)
def clip_score_triton(
    image: Tensor, text: Tensor, is_pairwise: bool, scale: float, logit_scale: Tensor | None
) -> Tensor:
    """float32 [N] or [N, M], times `scale`, and times `logit_scale` where it is given."""
    image, text = _align(image), _align(text)
    return (_score_pairs if is_pairwise else _score_all)(image, text, scale, logit_scale)


@clip_score_triton.register_fake
def _(image, text, is_pairwise, scale, logit_scale):
    shape = image.shape[:1] if is_pairwise else (image.shape[0], text.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=image.device)


def _score_pairs(image_ND: Tensor, text_ND: Tensor, scale: float, logit_scale: Tensor | None) -> Tensor:
    num_rows, width = image_ND.shape
    score_N = torch.empty(num_rows, dtype=torch.float32, device=image_ND.device)
    launch(
        score_pairs_kernel,
        (triton.cdiv(num_rows, ROWS),),
        *(image_ND, text_ND, logit_scale, score_N, scale, num_rows, width),
        **_row_constants(width),
    )
    return score_N


def _score_all(image_ND: Tensor, text_MD: Tensor, scale: float, logit_scale: Tensor | None) -> Tensor:
    (num_images, width), num_texts = image_ND.shape, len(text_MD)
    inverses = torch.empty(num_images + num_texts, dtype=torch.float32, device=image_ND.device)
    score_NM = torch.empty(num_images, num_texts, dtype=torch.float32, device=image_ND.device)
    if score_NM.numel() == 0:
        return score_NM
    launch(
        inverse_norm_kernel,
        (triton.cdiv(num_images, ROWS) + triton.cdiv(num_texts, ROWS),),
        *(image_ND, text_MD, inverses, num_images, num_texts, width),
        **_row_constants(width),
    )
    product = _choose_product(image_ND, num_images * num_texts)
    launch(
        score_all_kernel,
        (triton.cdiv(num_images, product["BN"]), triton.cdiv(num_texts, product["BM"])),
        *(image_ND, text_MD, inverses, logit_scale, score_NM, scale, num_images, num_texts, width),
        **product,
    )
    return score_NM


def _align(rows: Tensor) -> Tensor:
    """Whole rows from an aligned address on: the width of loads, and so the order of sums, must not vary."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


def _choose_product(image_ND: Tensor, num_scores: int) -> dict[str, int]:
    if image_ND.dtype == torch.float32:
        return SMALL_FLOAT_PRODUCT if num_scores < SMALL else FLOAT_PRODUCT
    return HALF_PRODUCT if image_ND.shape[1] % ALIGNMENT == 0 else NARROW_HALF_PRODUCT


def _row_constants(width: int) -> dict[str, int | float]:
    """Constants of the kernels that read whole rows."""
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    return {"EPSILON": EPSILON, "BL": ROWS, "BD": columns, "num_warps": ROWS}


@triton.jit
def score_pairs_kernel(
    p_image,
    p_text,
    p_scale,
    p_score,
    scale,
    num_rows,
    width,
    EPSILON: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    o_l = tl.program_id(0) * BL + tl.arange(0, BL)
    m_l = o_l < num_rows
    rows = o_l.to(tl.int64)[:, None] * width
    products = tl.zeros((BL, BD), tl.float32)
    image_squares, text_squares = products, products
    for start in range(0, width, BD):
        o_d = start + tl.arange(0, BD)
        mask = m_l[:, None] & (o_d < width)[None, :]
        image = tl.load(p_image + (rows + o_d[None, :]), mask=mask, other=0.0).to(tl.float32)
        text = tl.load(p_text + (rows + o_d[None, :]), mask=mask, other=0.0).to(tl.float32)
        products += image * text
        image_squares += image * image
        text_squares += text * text
    inverse = _inverse_norm(image_squares, EPSILON) * _inverse_norm(text_squares, EPSILON)
    cosine = tl.sum(products, axis=1) * inverse
    tl.store(p_score + o_l, cosine * _load_scale(p_scale, scale), mask=m_l)


@triton.jit
def inverse_norm_kernel(
    p_image,
    p_text,
    p_inverse,
    num_images,
    num_texts,
    width,
    EPSILON: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    i_l = tl.program_id(0)
    num_image_programs = tl.cdiv(num_images, BL)
    p_rows, num_rows = p_image, num_images
    if i_l >= num_image_programs:
        p_rows, num_rows = p_text, num_texts
        p_inverse += num_images
        i_l -= num_image_programs
    o_l = i_l * BL + tl.arange(0, BL)
    m_l = o_l < num_rows
    squares = tl.zeros((BL, BD), tl.float32)
    for start in range(0, width, BD):
        o_d = start + tl.arange(0, BD)
        offsets = o_l.to(tl.int64)[:, None] * width + o_d[None, :]
        row = tl.load(p_rows + offsets, mask=m_l[:, None] & (o_d < width)[None, :], other=0.0).to(tl.float32)
        squares += row * row
    tl.store(p_inverse + o_l, _inverse_norm(squares, EPSILON), mask=m_l)


@triton.jit
def score_all_kernel(
    p_image,
    p_text,
    p_inverse,
    p_scale,
    p_score,
    scale,
    num_images,
    num_texts,
    width,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_n, m_m = o_n < num_images, o_m < num_texts
    o_d = tl.arange(0, BD)
    p_image += o_n.to(tl.int64)[:, None] * width + o_d[None, :]
    p_text += o_m.to(tl.int64)[:, None] * width + o_d[None, :]
    products = tl.zeros((BN, BM), tl.float32)
    for start in range(0, width, BD):
        m_d = (start + o_d < width)[None, :]
        image = tl.load(p_image, mask=m_n[:, None] & m_d, other=0.0)
        text = tl.load(p_text, mask=m_m[:, None] & m_d, other=0.0)
        products = tl.dot(image, tl.trans(text), products, input_precision="ieee")
        p_image += BD
        p_text += BD
    image_inverse = tl.load(p_inverse + o_n, mask=m_n, other=0.0)
    text_inverse = tl.load(p_inverse + num_images + o_m, mask=m_m, other=0.0) * _load_scale(p_scale, scale)
    offsets = o_n.to(tl.int64)[:, None] * num_texts + o_m[None, :]
    score = products * image_inverse[:, None] * text_inverse[None, :]
    tl.store(p_score + offsets, score, mask=m_n[:, None] & m_m[None, :])


@triton.jit
def _inverse_norm(squares, EPSILON: tl.constexpr):
    """Of each row of [BL, BD] sums of squares."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=1)), EPSILON))


@triton.jit
def _load_scale(p_scale, scale):
    if p_scale is not None:
        scale = scale * tl.load(p_scale).to(tl.float32)
    return scale
