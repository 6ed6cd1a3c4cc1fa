"""Triton path of `guided_flow_step`, and, with parts of it left out, of `guided_velocity` and `flow_step`.

Two launches at most: the first sums the squares that the global renorm needs, tile by tile; the second
guides, steps and stores, and the last program of each sample to finish adds up its log-prob. Without a global
renorm the first is left out. Every sum has a fixed order within its sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.philox_normal.triton import normal_tile
from realign_kernels.tiles import (
    count_tiles,
    find_tile,
    is_last_program,
    load_number,
    load_wide,
    num_programs,
    sum_tiles,
    tile_constants,
    tile_offsets,
)

MIXED = -1  # the renorm constant of a batch whose samples differ; else an index into RENORMS
GLOBAL = 1


@triton.jit
def shrink_factor(cond_squares, guided_squares, floor):
    """`clamp(|v| / (|g| + 1e-8), floor, 1)`; comparisons, so that NaN stays NaN."""
    factor = tl.div_rn(tl.sqrt_rn(cond_squares), tl.sqrt_rn(guided_squares) + 1e-8)
    factor = tl.where(factor < floor, floor, factor)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def shrink_tokens(cond, guided, floor):
    """Each token shrunk by its own norms."""
    factor = shrink_factor(tl.sum(cond * cond, axis=1), tl.sum(guided * guided, axis=1), floor)
    return guided * factor[:, None]


@triton.jit
def guide_tile(
    cond, p_text, p_image, offsets, mask, text_scale, image_scale, mode, floor, RENORM: tl.constexpr
):
    """The guided velocity of a tile but for the factor of the global renorm. What is not used is not read."""
    guided = cond
    if p_text is not None:
        if text_scale > 1.0:
            text = load_wide(p_text, offsets, mask)
            guided = text + text_scale * (cond - text)
            if RENORM == 3 or RENORM == -1:
                if mode == 3:
                    guided = shrink_tokens(cond, guided, floor)
            if p_image is not None:
                if image_scale > 1.0:
                    image = load_wide(p_image, offsets, mask)
                    guided = image + image_scale * (guided - image)
            if RENORM == 2 or RENORM == -1:
                if mode == 2:
                    guided = shrink_tokens(cond, guided, floor)
    return guided


@triton.jit
def load_mode(p_renorm, i_b, RENORM: tl.constexpr):
    """The renorm of a sample, an index into RENORMS."""
    if RENORM == -1:
        return tl.load(p_renorm + i_b)
    else:
        return tl.full((), RENORM, tl.int32)


@triton.jit(do_not_specialize=["num_samples", "num_programs"])
def sum_squares_kernel(
    p_cond,
    p_text,
    p_image,
    p_cu_seqlens,
    p_text_scale,
    p_image_scale,
    p_renorm,
    p_renorm_min,
    p_squares,
    p_counters,
    num_samples,
    num_programs,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
    RENORM: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_b, first_tile, token, _, end = find_tile(p_cu_seqlens, i_tile, num_samples, BT, BB)
    if p_counters is not None:
        tl.store(p_counters + i_b, 0, mask=i_tile == first_tile)
    text_scale = load_number(p_text_scale, i_b, 1.0)
    mode = load_mode(p_renorm, i_b, RENORM)
    if (mode == 1) & (text_scale > 1.0):
        image_scale = load_number(p_image_scale, i_b, 1.0)
        floor = load_number(p_renorm_min, i_b, 0.0)
        offsets, mask = tile_offsets(token, end, C, BC, BT)
        cond = load_wide(p_cond, offsets, mask)
        guided = guide_tile(
            cond, p_text, p_image, offsets, mask, text_scale, image_scale, mode, floor, RENORM
        )
        tl.store(p_squares + i_tile, tl.sum(cond * cond))
        tl.store(p_squares + num_programs + i_tile, tl.sum(guided * guided))


@triton.jit(do_not_specialize=["num_samples", "num_programs"])
def guided_flow_step_kernel(
    p_cond,
    p_text,
    p_image,
    p_sample,
    p_noise,
    p_out,
    p_cu_seqlens,
    p_text_scale,
    p_image_scale,
    p_renorm,
    p_renorm_min,
    p_a,
    p_b,
    p_std,
    p_noise_key,
    p_noise_step,
    p_weight,
    p_constant,
    p_squares,
    p_errors,
    p_counters,
    p_logprob,
    num_samples,
    num_programs,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
    RENORM: tl.constexpr,
    REDUCE_SUM: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_b, first_tile, token, start, end = find_tile(p_cu_seqlens, i_tile, num_samples, BT, BB)
    num_tiles = count_tiles(start, end, BT)
    if i_tile < first_tile + num_tiles:
        offsets, mask = tile_offsets(token, end, C, BC, BT)
        velocity = load_wide(p_cond, offsets, mask)
        if p_text is not None:
            text_scale = tl.load(p_text_scale + i_b)
            image_scale = load_number(p_image_scale, i_b, 1.0)
            floor = load_number(p_renorm_min, i_b, 0.0)
            mode = load_mode(p_renorm, i_b, RENORM)
            velocity = guide_tile(
                velocity, p_text, p_image, offsets, mask, text_scale, image_scale, mode, floor, RENORM
            )
            if RENORM == 1 or RENORM == -1:
                if (mode == 1) & (text_scale > 1.0):
                    cond_squares = sum_tiles(p_squares, first_tile, num_tiles, 128)
                    guided_squares = sum_tiles(p_squares + num_programs, first_tile, num_tiles, 128)
                    velocity = velocity * shrink_factor(cond_squares, guided_squares, floor)
        if p_sample is not None:
            sample = load_wide(p_sample, offsets, mask)
            mean = tl.load(p_a + i_b) * sample + tl.load(p_b + i_b) * velocity
            x_next = mean
            if p_noise is not None:
                x_next = mean + tl.load(p_std + i_b) * load_wide(p_noise, offsets, mask)
            if p_noise_key is not None:
                key, step = tl.load(p_noise_key + i_b), tl.load(p_noise_step + i_b)
                x_next = mean + tl.load(p_std + i_b) * normal_tile(key, step, token - start, C, BC, BT)
            rounded = x_next.to(p_out.dtype.element_ty)
            tl.store(p_out + offsets, rounded, mask=mask)
            if p_weight is not None:
                error = tl.where(mask, rounded.to(tl.float32) - mean, 0.0)
                tl.store(p_errors + i_tile, tl.sum(error * error))
                if is_last_program(p_counters, i_b, num_tiles):
                    reduced = reduce_errors(p_errors, first_tile, start, end, num_tiles, C, REDUCE_SUM)
                    weight, constant = tl.load(p_weight + i_b), tl.load(p_constant + i_b)
                    tl.store(p_logprob + i_b, constant - weight * reduced)
        else:
            tl.store(p_out + offsets, velocity.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def reduce_errors(p_errors, first_tile, start, end, num_tiles, C: tl.constexpr, REDUCE_SUM: tl.constexpr):
    """Sum or mean of a sample's squared errors, from its tiles' sums."""
    total = sum_tiles(p_errors, first_tile, num_tiles, 128)
    if REDUCE_SUM:
        return total
    else:
        count = tl.maximum((end - start).to(tl.int64) * C, 1)
        return tl.div_rn(total, count.to(tl.float32))


def run_flow(out_LC: Tensor, fields: dict[str, Tensor | None], numbers: dict) -> Tensor:
    """Fill `out_LC`; returns the log-probs, [B], or [0] if not asked.

    `fields` holds cond, text_uncond, image_uncond, sample and noise, `numbers` the rest by the names that the
    ops have; those of parts that are left out are missing.
    """
    has_logprob = numbers.get("logprob_weight") is not None
    cu_seqlens = numbers["cu_seqlens"].contiguous()
    num_samples = cu_seqlens.numel() - 1
    constants = tile_constants(out_LC.shape[1], cu_seqlens)
    num_tiles = num_programs(out_LC.shape[0], num_samples, constants["BT"])
    if out_LC.numel() == 0:
        return numbers["logprob_constant"].clone() if has_logprob else torch.empty(0, device=out_LC.device)
    logprob_B = torch.empty(num_samples if has_logprob else 0, device=out_LC.device)
    renorm = numbers.get("common_renorm", 0) if numbers.get("renorm") is None else MIXED
    scratch = _Scratch(
        out_LC, num_tiles, num_samples, renorm if fields["text_uncond"] is not None else 0, has_logprob
    )
    fields = {name: None if field is None else field.contiguous() for name, field in fields.items()}
    branches = (fields["cond"], fields["text_uncond"], fields["image_uncond"])
    guidance = _take(numbers, "text_scale", "image_scale", "renorm", "renorm_min")
    constants["RENORM"] = scratch.renorm
    counts = (num_samples, num_tiles)
    if scratch.squares is not None:
        sums = (scratch.squares, scratch.counters)
        launch(
            sum_squares_kernel, (num_tiles,), *branches, cu_seqlens, *guidance, *sums, *counts, **constants
        )
    step = _take(numbers, "a", "b", "std", "noise_key", "noise_step", "logprob_weight", "logprob_constant")
    tensors = (*branches, fields["sample"], fields["noise"], out_LC, cu_seqlens, *guidance, *step)
    sums = (scratch.squares, scratch.errors, scratch.counters, logprob_B if has_logprob else None)
    constants["REDUCE_SUM"] = bool(numbers.get("reduce_sum"))
    launch(guided_flow_step_kernel, (num_tiles,), *tensors, *sums, *counts, **constants)
    return logprob_B


def _take(numbers: dict, *names: str) -> list[Tensor | None]:
    found = (numbers.get(name) for name in names)
    return [number.contiguous() if isinstance(number, Tensor) else None for number in found]


class _Scratch:
    """Partial sums: two squares and an error of each tile, and how many tiles of a sample are done."""

    def __init__(
        self, like: Tensor, num_tiles: int, num_samples: int, renorm: int, has_logprob: bool
    ) -> None:
        self.renorm = renorm
        self.squares = self.errors = self.counters = None
        if renorm in (GLOBAL, MIXED):
            self.squares = torch.empty(2 * num_tiles, device=like.device)
        if has_logprob:
            self.errors = torch.empty(num_tiles, device=like.device)
            # The first launch clears the counters; where there is none, they come clear.
            make = torch.zeros if self.squares is None else torch.empty
            self.counters = make(num_samples, dtype=torch.int32, device=like.device)


GUIDANCE_SCHEMA = (
    "Tensor cond, Tensor? text_uncond, Tensor? image_uncond, Tensor cu_seqlens, Tensor text_scale, "
    "Tensor? image_scale, Tensor? renorm, Tensor? renorm_min, int common_renorm=0"
)
STEP_SCHEMA = (
    "Tensor a, Tensor b, Tensor? std, Tensor? noise, Tensor? noise_key, Tensor? noise_step, "
    "Tensor? logprob_weight, Tensor? logprob_constant, bool reduce_sum"
)


@torch.library.custom_op(
    "realign_kernels::guided_flow_step_triton",
    mutates_args=(),
    schema=f"(Tensor sample, {STEP_SCHEMA}, {GUIDANCE_SCHEMA}) -> (Tensor, Tensor)",
)
def guided_flow_step_triton(
    sample: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    noise_key: Tensor | None,
    noise_step: Tensor | None,
    logprob_weight: Tensor | None,
    logprob_constant: Tensor | None,
    reduce_sum: bool,
    cond: Tensor,
    text_uncond: Tensor | None,
    image_uncond: Tensor | None,
    cu_seqlens: Tensor,
    text_scale: Tensor,
    image_scale: Tensor | None,
    renorm: Tensor | None,
    renorm_min: Tensor | None,
    common_renorm: int = 0,
) -> tuple[Tensor, Tensor]:
    """`guided_flow_step` in one launch or two."""
    numbers = dict(locals())
    names = ("cond", "text_uncond", "image_uncond", "sample", "noise")
    out_LC = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    return out_LC, run_flow(out_LC, {name: numbers[name] for name in names}, numbers)


@guided_flow_step_triton.register_fake
def _(sample, a, b, std, noise, noise_key, noise_step, logprob_weight, *rest, **more):
    num_samples = 0 if logprob_weight is None else logprob_weight.shape[0]
    logprob_B = torch.empty(num_samples, device=sample.device)
    return torch.empty(sample.shape, dtype=sample.dtype, device=sample.device), logprob_B
