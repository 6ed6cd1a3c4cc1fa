"""Every wrong argument of a flow op is a ValueError that names the argument and its value."""

from __future__ import annotations

import math

import pytest
import torch

from realign_kernels import apply_rope, flow_step, guided_flow_step, guided_velocity, rms_norm, swiglu
from tests.kernels.flow_cases import make_case

SECOND_OFFSETS = torch.tensor([0, 5, 4], dtype=torch.int32)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("cond_LC", torch.zeros(2, 3, 4), r"cond_LC has shape \(2, 3, 4\): must be packed tokens"),
        ("cond_LC", torch.zeros(7, 4, dtype=torch.int64), r"cond_LC has dtype torch.int64: must be float32"),
        (
            "text_uncond_LC",
            torch.zeros(7, 3),
            r"text_uncond_LC has shape \(7, 3\): must be that of cond_LC, \(7, 4\)",
        ),
        (
            "image_uncond_LC",
            torch.zeros(7, 4).half(),
            r"image_uncond_LC has dtype torch.float16: must be that of cond",
        ),
        ("image_uncond_LC", torch.zeros(7, 4, device="meta"), r"image_uncond_LC is on meta: must be on cpu"),
        ("text_uncond_LC", None, r"text_uncond_LC is None and text_scale_B is \[4.0, 1.0\]"),
        ("image_uncond_LC", None, r"image_uncond_LC is None and image_scale_B is \[2.0, 3.0\]"),
        (
            "cu_seqlens",
            SECOND_OFFSETS,
            r"cu_seqlens is \[0, 5, 4\]: must rise from 0 to the number of tokens, 7",
        ),
        (
            "cu_seqlens",
            torch.tensor([0, 3, 6], dtype=torch.int32),
            r"cu_seqlens is \[0, 3, 6\]: must rise from 0",
        ),
        (
            "cu_seqlens",
            torch.tensor([1, 3, 7], dtype=torch.int32),
            r"cu_seqlens is \[1, 3, 7\]: must rise from 0",
        ),
        ("cu_seqlens", torch.tensor([0, 3, 7]), r"cu_seqlens is torch.int64 \(3,\): must be int32"),
        (
            "cu_seqlens",
            torch.tensor([], dtype=torch.int32),
            r"cu_seqlens is torch.int32 \(0,\): must be int32",
        ),
        ("text_scale_B", numbers(4.0), r"text_scale_B is torch.float32 \(1,\): must be float32 \[2\]"),
        (
            "text_scale_B",
            numbers(4, 1).double(),
            r"text_scale_B is torch.float64 \(2,\): must be float32 \[2\]",
        ),
        ("image_scale_B", numbers(2.0, math.nan), r"image_scale_B\[1\] is nan: must be finite"),
        ("renorm_min_B", numbers(0.0, -0.5), r"renorm_min_B\[1\] is -0.5: must be finite and at least 0"),
        ("renorm", "chanel", r"renorm is 'chanel': must be one of none, global, channel, text_channel"),
        ("renorm", ["global"], r"renorm has 1 modes: must be one mode, or one per sample \(2\)"),
        ("renorm", ["global", "all"], r"renorm\[1\] is 'all': must be one of"),
        ("impl", "triton", r"guided_velocity: impl is 'triton': must be one of auto, reference, cpp"),
    ],
)
def test_guidance_arguments(argument, value, message):
    arguments = {**make_case([3, 4], 4).guidance(), argument: value}
    with pytest.raises(ValueError, match=message):
        guided_velocity(**arguments)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (
            "sample_LC",
            torch.zeros(6, 4),
            r"sample_LC has shape \(6, 4\): must be that of velocity_LC, \(7, 4\)",
        ),
        ("velocity_LC", torch.zeros(7), r"velocity_LC has shape \(7,\): must be packed tokens"),
        (
            "noise_LC",
            torch.zeros(7, 4).bfloat16(),
            r"noise_LC has dtype torch.bfloat16: must be that of sample_LC",
        ),
        ("a_B", numbers(1.0, 1.0, 1.0), r"a_B is torch.float32 \(3,\): must be float32 \[2\]"),
        ("b_B", numbers(1.0, math.inf), r"b_B\[1\] is inf: must be finite"),
        ("std_B", numbers(0.3, -0.1), r"std_B\[1\] is -0.1: must be finite and at least 0"),
        ("std_B", None, "std_B is None and noise_LC is not"),
        ("noise_LC", None, "noise_LC is None and std_B is not"),
        ("cu_seqlens", SECOND_OFFSETS, r"cu_seqlens is \[0, 5, 4\]"),
        ("impl", "cuda", r"flow_step: impl is 'cuda'"),
    ],
)
def test_step_arguments(argument, value, message):
    case = make_case([3, 4], 4)
    arguments = {**case.step(), "velocity_LC": case.cond_LC, "cu_seqlens": case.cu_seqlens, argument: value}
    with pytest.raises(ValueError, match=message):
        flow_step(**arguments)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("sample_LC", torch.zeros(6, 4), r"sample_LC has shape \(6, 4\): must be that of cond_LC, \(7, 4\)"),
        ("text_scale_B", numbers(4.0), r"text_scale_B is torch.float32 \(1,\)"),
        ("std_B", numbers(0.3, -0.1), r"std_B\[1\] is -0.1"),
        ("impl", "c++", r"guided_flow_step: impl is 'c\+\+'"),
    ],
)
def test_guided_step_arguments(argument, value, message):
    case = make_case([3, 4], 4)
    arguments = {**case.guidance(), **case.step(), argument: value}
    with pytest.raises(ValueError, match=message):
        guided_flow_step(**arguments)


def test_model_op_arguments():
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), x ends in 4"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"gate has shape \(2, 4\), up \(2, 3\)"):
        swiglu(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="head dim is 3, must be even"):
        apply_rope(torch.zeros(2, 1, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"sin_LD has shape \(2, 2\), must be \(2, 4\)"):
        apply_rope(torch.zeros(2, 1, 4), torch.zeros(2, 4), torch.zeros(2, 2))


def test_values_off_the_cpu_are_not_read():
    case = make_case([3, 4], 4)
    meta = {name: value.to("meta") for name, value in case.guidance().items()}
    with pytest.raises(
        (NotImplementedError, RuntimeError)
    ):  # the reference reads the offsets; the checks did not
        guided_velocity(**meta)
