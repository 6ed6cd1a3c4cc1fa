"""Signature, formula, checks and dispatch of `clip_score`. N pictures, M texts, D numbers of an embedding."""

from __future__ import annotations

import math

from torch import Tensor

from realign_kernels.checks import FLOAT_DTYPES
from realign_kernels.clip_score.reference import clip_score_reference
from realign_kernels.dispatch import choose_impl

MODES = ("pairs", "all")


def clip_score(
    image_ND: Tensor,
    text_MD: Tensor,
    mode: str = "pairs",
    logit_scale: float | Tensor = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Cosines of embeddings, of each picture with its own text or of all with all.

        score = logit_scale * <image, text> / (max(|image|, 1e-12) * max(|text|, 1e-12))

    A vector of zeros scores 0. A score depends on its two vectors alone, bit for bit.

    Args:
        image_ND, text_MD: embeddings as the towers give them, normalised or not, D at least 1; float32,
            bfloat16, float16 or float64, both the same; sums are float32 or wider.
        mode: `"pairs"`, which needs M = N, or `"all"`.
        logit_scale: a number, or a float tensor of one number on the embeddings' device: what multiplies the
            cosines, which is the exponential of the `logit_scale` that CLIP learns.
        impl: `"auto"` (table in `dispatch.py`), `"reference"` or `"triton"`, which has no gradient.

    Returns: float32, or float64 for float64; [N] for pairs, [N, M] for all.
    Raises: ValueError naming the argument and its value.
    Source: CLIP, arXiv 2103.00020, figure 3; Hessel et al., CLIPScore, arXiv 2104.08718, without its weight.
    """
    check_embeddings(image_ND, text_MD, mode)
    check_logit_scale(logit_scale, image_ND)
    is_pairwise = mode == "pairs"
    floats = [image_ND, text_MD, *([logit_scale] if isinstance(logit_scale, Tensor) else [])]
    if choose_impl("clip_score", impl, floats, {"triton": False}) == "reference":
        return clip_score_reference(image_ND, text_MD, is_pairwise, logit_scale)
    from realign_kernels.clip_score.triton import clip_score_triton

    if isinstance(logit_scale, Tensor):
        return clip_score_triton(image_ND, text_MD, is_pairwise, 1.0, logit_scale)
    return clip_score_triton(image_ND, text_MD, is_pairwise, float(logit_scale), None)


def check_embeddings(image_ND: Tensor, text_MD: Tensor, mode: str) -> None:
    """Raise ValueError unless the embeddings are alike, and as many as `mode` needs."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: must be 'pairs' or 'all'")
    for name, embedding in (("image_ND", image_ND), ("text_MD", text_MD)):
        if embedding.dim() != 2 or embedding.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(embedding.shape)}: "
                "must be embeddings by numbers, [N, D], D at least 1"
            )
        if embedding.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} has dtype {embedding.dtype}: must be float32, bfloat16, float16 or float64"
            )
    if text_MD.shape[1] != image_ND.shape[1]:
        raise ValueError(f"text_MD is {text_MD.shape[1]} wide: must be as image_ND, {image_ND.shape[1]}")
    if mode == "pairs" and len(text_MD) != len(image_ND):
        raise ValueError(
            f"text_MD has {len(text_MD)} rows: "
            f"must have one for each of image_ND, {len(image_ND)}, or mode 'all'"
        )
    if text_MD.dtype != image_ND.dtype or text_MD.device != image_ND.device:
        raise ValueError(
            f"text_MD is {text_MD.dtype} on {text_MD.device}: must be as image_ND, "
            f"{image_ND.dtype} on {image_ND.device}"
        )


def check_logit_scale(logit_scale: float | Tensor, image_ND: Tensor) -> None:
    """Raise ValueError unless `logit_scale` is a finite number, or a float tensor of one by `image_ND`."""
    if not isinstance(logit_scale, Tensor):
        if not math.isfinite(logit_scale):
            raise ValueError(f"logit_scale is {logit_scale}: must be finite")
    elif logit_scale.numel() != 1 or not logit_scale.is_floating_point():
        raise ValueError(
            f"logit_scale is {logit_scale.dtype} {tuple(logit_scale.shape)}: "
            "must be a number, or a float tensor of one"
        )
    elif logit_scale.device != image_ND.device:
        raise ValueError(
            f"logit_scale is on {logit_scale.device}: must be on {image_ND.device} with image_ND"
        )
