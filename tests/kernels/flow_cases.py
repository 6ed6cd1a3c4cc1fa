"""Inputs for the tests of the flow ops, and an independent definition of guidance in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from realign_kernels import Guidance, LogProbCoefficients, NoiseKeys, StepCoefficients, launch, native
from realign_kernels.arguments import RENORMS as RENORMS
from tests.kernels.devices import device_of

needs_cpp = pytest.mark.skipif(not native.is_available(), reason=native.describe())
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton is not installed")
KERNELS = [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
IMPLS = ["reference", *KERNELS]
# Lengths of the samples, channels: one token, empty batch, empty sample, odd channels, more than one tile.
SHAPES = [([1], 4), ([], 4), ([3, 0, 5], 7), ([6, 1, 17, 2], 1), ([150, 33], 65), ([3], 3000), ([4, 2], 0)]


@dataclass(frozen=True)
class FlowCase:
    """One packed call. Scales are mixed: on, off, image off, text off with image on."""

    sample_LC: Tensor
    cond_LC: Tensor
    text_uncond_LC: Tensor
    image_uncond_LC: Tensor
    noise_LC: Tensor
    cu_seqlens: Tensor
    text_scale_B: Tensor
    image_scale_B: Tensor
    renorm_min_B: Tensor
    a_B: Tensor
    b_B: Tensor
    std_B: Tensor
    weight_B: Tensor
    constant_B: Tensor
    key_B: Tensor
    step_B: Tensor

    def guided(self, renorm: str | list[str] = "global") -> dict:
        """Arguments of `guided_velocity`."""
        guidance = Guidance(self.text_scale_B, self.image_scale_B, renorm, self.renorm_min_B)
        return {"velocities": self.velocities(), "cu_seqlens": self.cu_seqlens, "guidance": guidance}

    def velocities(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.cond_LC, self.text_uncond_LC, self.image_uncond_LC

    def step(self, has_keys: bool = False) -> dict:
        """Arguments of `flow_step` beside velocity and offsets; its noise given, or made from keys."""
        coefficients = StepCoefficients(self.a_B, self.b_B, self.std_B)
        noise = NoiseKeys(self.key_B, self.step_B) if has_keys else self.noise_LC
        return {"sample_LC": self.sample_LC, "coefficients": coefficients, "noise": noise}

    def stepped(self, has_keys: bool = False) -> dict:
        """Arguments of `flow_step` with the conditional velocity."""
        return {**self.step(has_keys), "velocity_LC": self.cond_LC, "cu_seqlens": self.cu_seqlens}

    def logprob(self, reduction: str = "mean") -> LogProbCoefficients:
        return LogProbCoefficients(self.weight_B, self.constant_B, reduction)

    def on(self, impl: str) -> FlowCase:
        """The case where an implementation's tests run."""
        return FlowCase(**{name: value.to(device_of(impl)) for name, value in vars(self).items()})

    def velocities_to(self, dtype: torch.dtype) -> FlowCase:
        names = ("cond_LC", "text_uncond_LC", "image_uncond_LC")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def samples_to(self, dtype: torch.dtype) -> FlowCase:
        return replace(self, sample_LC=self.sample_LC.to(dtype), noise_LC=self.noise_LC.to(dtype))

    def take(self, index: int) -> FlowCase:
        """The case with one sample alone."""
        start, end = self.cu_seqlens[index : index + 2].tolist()
        packed = {name: value[start:end] for name, value in vars(self).items() if name.endswith("_LC")}
        numbers = {
            name: value[index : index + 1] for name, value in vars(self).items() if name.endswith("_B")
        }
        return FlowCase(**packed, **numbers, cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32))


def make_case(lengths: list[int], channels: int, seed: int = 0) -> FlowCase:
    """Random fields and numbers in float32; values are exact in bfloat16, so that casts lose nothing."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_samples = sum(lengths), len(lengths)

    def field() -> Tensor:
        return torch.randn(num_tokens, channels, generator=generator).bfloat16().float()

    def cycle(*numbers: float) -> Tensor:
        return torch.tensor([numbers[i % len(numbers)] for i in range(num_samples)], dtype=torch.float32)

    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return FlowCase(
        *(field() for _ in range(5)),
        cu_seqlens=offsets,
        text_scale_B=cycle(4.0, 1.0, 2.5, 0.5, 7.5),
        image_scale_B=cycle(2.0, 3.0, 1.0, 2.0, 1.5),
        renorm_min_B=cycle(0.0, 0.5, 0.25),
        a_B=cycle(1.0, 0.93, 0.98),
        b_B=cycle(-0.02, -0.07, 0.04),
        std_B=cycle(0.0, 0.3, 0.7),
        weight_B=cycle(0.0, 5.5, 1.0),
        constant_B=cycle(0.0, 0.28, -0.5),
        key_B=torch.arange(num_samples) * 0x1234_5678_9ABC + 0x7FFF_FFFF_0000_0000,
        step_B=torch.arange(num_samples) % 3,
    )


def expected_velocity(case: FlowCase, renorm: str) -> Tensor:
    """Guidance in float64, token by token, written apart from the reference it checks."""
    cond, text, image = (x.double() for x in (case.cond_LC, case.text_uncond_LC, case.image_uncond_LC))
    out = cond.clone()
    for index, (start, end) in enumerate(pairwise(case.cu_seqlens.tolist())):
        text_scale, image_scale, floor = (
            float(x[index]) for x in (case.text_scale_B, case.image_scale_B, case.renorm_min_B)
        )
        if text_scale <= 1:
            continue
        v = cond[start:end]
        guided = text_scale * v + (1 - text_scale) * text[start:end]
        if renorm == "text_channel":
            guided = guided * _shrink(v, guided, floor, by_token=True)
        if image_scale > 1:
            guided = image_scale * guided + (1 - image_scale) * image[start:end]
        if renorm == "channel":
            guided = guided * _shrink(v, guided, floor, by_token=True)
        if renorm == "global":
            guided = guided * _shrink(v, guided, floor, by_token=False)
        out[start:end] = guided
    return out


def _shrink(v: Tensor, guided: Tensor, floor: float, by_token: bool) -> Tensor:
    squares, guided_squares = (v * v).sum(1, keepdim=True), (guided * guided).sum(1, keepdim=True)
    if not by_token:
        squares, guided_squares = squares.sum(0, keepdim=True), guided_squares.sum(0, keepdim=True)
    return (squares.sqrt() / (guided_squares.sqrt() + 1e-8)).clamp(floor, 1.0)


def expected_step(case: FlowCase, velocity_LC: Tensor) -> Tensor:
    """The step in float64."""
    token_sample_L = torch.repeat_interleave(torch.arange(len(case.a_B)), case.cu_seqlens.diff())
    a, b, std = (x.double()[token_sample_L, None] for x in (case.a_B, case.b_B, case.std_B))
    return a * case.sample_LC.double() + b * velocity_LC.double() + std * case.noise_LC.double()


def plain_velocity(case: FlowCase, renorm: str) -> Tensor:
    """Guidance as the BAGEL code does it: every operation rounds to the dtype of the velocities."""
    out = case.cond_LC.clone()
    for index, (start, end) in enumerate(pairwise(case.cu_seqlens.tolist())):
        numbers = (case.text_scale_B, case.image_scale_B, case.renorm_min_B)
        text_scale, image_scale, floor = (float(x[index]) for x in numbers)
        v, text, image = (x[start:end] for x in (case.cond_LC, case.text_uncond_LC, case.image_uncond_LC))
        if text_scale <= 1:
            continue
        dim = None if renorm == "global" else -1
        guided = text + text_scale * (v - text)
        if renorm == "text_channel":
            guided = guided * _plain_shrink(v, guided, floor, dim)
        if image_scale > 1:
            guided = image + image_scale * (guided - image)
        if renorm in ("global", "channel"):
            guided = guided * _plain_shrink(v, guided, floor, dim)
        out[start:end] = guided
    return out


def _plain_shrink(v: Tensor, guided: Tensor, floor: float, dim: int | None) -> Tensor:
    keepdim = dim is not None
    norm = torch.linalg.vector_norm(v, dim=dim, keepdim=keepdim)
    return (norm / (torch.linalg.vector_norm(guided, dim=dim, keepdim=keepdim) + 1e-8)).clamp(floor, 1.0)


def assert_as_exact_as_plain(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of plain torch in this dtype, or one rounding."""
    assert actual.shape == exact.shape
    actual, plain, exact = actual.cpu(), plain.cpu(), exact.cpu()
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = torch.maximum(2 * (plain.double() - exact).abs().max(), rounding)
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
