"""clip_score: N pictures with M texts, all with all or in pairs; D numbers of an embedding."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from realign_kernels import clip_score

LOGIT_SCALE = 100.0
# A group's pictures with its captions, ViT-L's and ViT-H's width; and a retrieval benchmark's all with all.
SIZES = [(32, 32, 768), (96, 96, 768), (96, 96, 1024), (512, 512, 768)]
GPU_SIZES = [(4096, 4096, 1024), (96, 96, 1024), (16, 16, 768), (1, 96, 512), (1024, 1024, 1280)]


def _shapes(sizes: list[tuple[int, int, int]], *dtypes: torch.dtype) -> list[Shape]:
    return [Shape(dict(zip("NMD", size, strict=True)), dtype) for dtype in dtypes for size in sizes]


def _pairs(sizes: list[tuple[int, int]], *dtypes: torch.dtype) -> list[Shape]:
    return [Shape(dict(zip("ND", size, strict=True)), dtype) for dtype in dtypes for size in sizes]


def plain_score(mode: str, image_ND: Tensor, text_MD: Tensor) -> Tensor:
    """CLIP's forward pass."""
    image_ND = image_ND / image_ND.norm(dim=1, keepdim=True)
    text_MD = text_MD / text_MD.norm(dim=1, keepdim=True)
    return LOGIT_SCALE * ((image_ND * text_MD).sum(-1) if mode == "pairs" else image_ND @ text_MD.t())


def build(mode: str, shape: Shape, device: torch.device) -> Case:
    """Embeddings as a tower gives them, not normalised."""
    num_images, width = shape.sizes["N"], shape.sizes["D"]
    num_texts = shape.sizes.get("M", num_images)
    image_ND = randn(shape, device, "N", "D")
    text_MD = randn(Shape({"M": num_texts, "D": width}, shape.dtype), device, "M", "D", seed=1)

    def run(impl: str) -> Run:
        return lambda: clip_score(image_ND, text_MD, mode, LOGIT_SCALE, impl)

    runs = {PLAIN: partial(plain_score, mode, image_ND, text_MD)}
    runs |= {impl: run(impl) for impl in list_impls(["triton"], device)}
    num_scores = num_images if mode == "pairs" else num_images * num_texts
    return Case(
        runs,
        num_bytes=count_bytes(image_ND, text_MD) + 4 * num_scores,
        relative_error=allow_error(shape),
        num_flops=2 * num_scores * width if mode == "all" else 0,
    )


HALF, BOTH = (torch.bfloat16,), (torch.bfloat16, torch.float32)
OPS = {
    "clip_score": Op(partial(build, "all"), _shapes(SIZES, *BOTH), _shapes(GPU_SIZES, *BOTH)),
    "clip_score.pairs": Op(
        partial(build, "pairs"),
        _pairs([(96, 768), (4096, 768)], *BOTH),
        _pairs([(16384, 1024), (96, 1024), (4096, 768)], *HALF),
    ),
}
