"""Definition of `clip_score` in plain torch. N pictures, M texts, D numbers of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

EPSILON = 1e-12  # the least norm that is divided by, as in torch.nn.functional.normalize
_TILE = 64


def clip_score_reference(
    image_ND: Tensor, text_MD: Tensor, is_pairwise: bool, logit_scale: float | Tensor
) -> Tensor:
    """In float32 (float64 stays float64)."""
    wide = torch.promote_types(image_ND.dtype, torch.float32)
    # Contiguous, because strides change the order in which squares are added.
    image_ND, text_MD = (
        normalize(rows.to(wide).contiguous(), dim=-1, eps=EPSILON) for rows in (image_ND, text_MD)
    )
    cosine = (image_ND * text_MD).sum(-1) if is_pairwise else _multiply(image_ND, text_MD)
    return cosine * (logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale)


def _multiply(image_ND: Tensor, text_MD: Tensor) -> Tensor:
    """`image_ND @ text_MD.mT`; on a CPU in products of one shape.

    There, the last bits of a product's row depend on how many rows it has, and a score must not.
    """
    if image_ND.device.type != "cpu":
        return image_ND @ text_MD.mT
    images, texts = (pad(rows, (0, 0, 0, -len(rows) % _TILE)).split(_TILE) for rows in (image_ND, text_MD))
    cosine_NM = torch.cat([torch.cat([image @ text.mT for text in texts], dim=1) for image in images])
    return cosine_NM[: len(image_ND), : len(text_MD)]
