"""Every wrong argument of a flow op is a ValueError that names the argument and its value."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from realign_kernels import (
    LogProbCoefficients,
    NoiseKeys,
    flow_step,
    guided_flow_step,
    guided_velocity,
    launch,
)
from tests.kernels.flow_cases import make_case

SECOND_OFFSETS = torch.tensor([0, 5, 4], dtype=torch.int32)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


OFFSETS = torch.tensor([0, 3, 7], dtype=torch.int32)


def fields_with(index: int, value: torch.Tensor | None) -> dict:
    """The three velocities with one of them replaced."""
    return {"velocities": [value if i == index else torch.zeros(7, 4) for i in range(3)]}


def guidance_with(**change: object) -> dict:
    return {"guidance": replace(make_case([3, 4], 4).guided()["guidance"], **change)}


def coefficients_with(**change: object) -> dict:
    return {"coefficients": replace(make_case([3, 4], 4).step()["coefficients"], **change)}


GUIDANCE_ERRORS = [
    (fields_with(0, torch.zeros(2, 3, 4)), r"velocities\[0\] has shape \(2, 3, 4\): must be packed tokens"),
    (fields_with(0, torch.zeros(7, 4).long()), r"velocities\[0\] has dtype torch.int64: must be float32"),
    (fields_with(0, None), r"velocities is \[None, \(7, 4\), \(7, 4\)\]: must be the conditional"),
    ({"velocities": []}, r"velocities is \[\]: must be the conditional"),
    (
        fields_with(1, torch.zeros(7, 3)),
        r"velocities\[1\] has shape \(7, 3\): must be that of velocities\[0\]",
    ),
    (fields_with(2, torch.zeros(7, 4).half()), r"velocities\[2\] has dtype torch.float16: must be that of"),
    (fields_with(2, torch.zeros(7, 4, device="meta")), r"velocities\[2\] is on meta: must be on cpu"),
    (fields_with(1, None), r"velocities\[1\] is None and guidance.text_scale_B is \[4.0, 1.0\]"),
    (fields_with(2, None), r"velocities\[2\] is None and guidance.image_scale_B is \[2.0, 3.0\]"),
    (
        {"cu_seqlens": SECOND_OFFSETS},
        r"cu_seqlens is \[0, 5, 4\]: must rise from 0 to the number of tokens, 7",
    ),
    ({"cu_seqlens": OFFSETS - 1}, r"cu_seqlens is \[-1, 2, 6\]: must rise from 0"),
    ({"cu_seqlens": OFFSETS.long()}, r"cu_seqlens is torch.int64 \(3,\): must be int32"),
    ({"cu_seqlens": OFFSETS[:0]}, r"cu_seqlens is torch.int32 \(0,\): must be int32"),
    (
        guidance_with(text_scale_B=numbers(4.0)),
        r"guidance.text_scale_B is torch.float32 \(1,\): must be float32 \[2\]",
    ),
    (
        guidance_with(text_scale_B=numbers(4, 1).double()),
        r"guidance.text_scale_B is torch.float64 \(2,\): must be",
    ),
    (
        guidance_with(image_scale_B=numbers(2.0, math.nan)),
        r"guidance.image_scale_B\[1\] is nan: must be finite",
    ),
    (
        guidance_with(renorm_min_B=numbers(0, -0.5)),
        r"guidance.renorm_min_B\[1\] is -0.5: must be finite and at least 0",
    ),
    (
        guidance_with(renorm="chanel"),
        r"guidance.renorm is 'chanel': must be one of none, global, channel, text_channel",
    ),
    (
        guidance_with(renorm=["global"]),
        r"guidance.renorm has 1 modes: must be one mode, or one per sample \(2\)",
    ),
    (guidance_with(renorm=["global", "all"]), r"guidance.renorm\[1\] is 'all': must be one of"),
    (guidance_with(renorm=torch.tensor([0, 4]).int()), r"guidance.renorm\[1\] is 4: must be from 0 to 3"),
    (
        guidance_with(renorm=torch.tensor([0, 1])),
        r"guidance.renorm is torch.int64 \(2,\) on cpu: must be int32 \[2\]",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *GUIDANCE_ERRORS,
        ({"impl": "cuda"}, r"guided_velocity: impl is 'cuda': must be one of auto, reference, cpp, triton"),
        ({"dtype": torch.int32}, "dtype is torch.int32: must be float32"),
    ],
)
def test_guidance_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        guided_velocity(**{**make_case([3, 4], 4).guided(), **change})


STEP_ERRORS = [
    ({"noise": torch.zeros(7, 4).bfloat16()}, "noise has dtype torch.bfloat16: must be that of sample_LC"),
    ({"noise": None}, "noise is None and coefficients.std_B is not"),
    (coefficients_with(std_B=None), "coefficients.std_B is None and noise is not"),
    (
        coefficients_with(std_B=numbers(0.3, -0.1)),
        r"coefficients.std_B\[1\] is -0.1: must be finite and at least 0",
    ),
    (
        coefficients_with(a_B=numbers(1, 1, 1)),
        r"coefficients.a_B is torch.float32 \(3,\): must be float32 \[2\]",
    ),
    (coefficients_with(b_B=numbers(1.0, math.inf)), r"coefficients.b_B\[1\] is inf: must be finite"),
    (
        {"noise": NoiseKeys(torch.zeros(2).long(), torch.zeros(3).long())},
        r"noise.step_B is torch.int64 \(3,\): must be int64 \[2\]",
    ),
    (
        {"logprob": LogProbCoefficients(numbers(1, -1), numbers(0, 0))},
        r"logprob.weight_B\[1\] is -1: must be finite and at least 0",
    ),
    (
        {"logprob": LogProbCoefficients(numbers(1, 1), numbers(0, 0), "max")},
        "logprob.reduction is 'max': must be one of mean, sum",
    ),
    ({"cu_seqlens": SECOND_OFFSETS}, r"cu_seqlens is \[0, 5, 4\]"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *STEP_ERRORS,
        (
            {"sample_LC": torch.zeros(6, 4)},
            r"sample_LC has shape \(6, 4\): must be that of velocity_LC, \(7, 4\)",
        ),
        ({"velocity_LC": torch.zeros(7)}, r"velocity_LC has shape \(7,\): must be packed tokens"),
        ({"impl": "cuda"}, "flow_step: impl is 'cuda'"),
    ],
)
def test_step_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        flow_step(**{**make_case([3, 4], 4).stepped(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *GUIDANCE_ERRORS,
        *STEP_ERRORS,
        ({"sample_LC": torch.zeros(6, 4)}, r"sample_LC has shape \(6, 4\): must be that of velocities\[0\]"),
        ({"impl": "c++"}, r"guided_flow_step: impl is 'c\+\+'"),
    ],
)
def test_guided_step_arguments(change, message):
    case = make_case([3, 4], 4)
    with pytest.raises(ValueError, match=message):
        guided_flow_step(**{**case.guided(), **case.step(), **change})


def test_values_off_the_cpu_are_not_read():
    case = make_case([3, 4], 4)
    meta = replace(case, **{name: value.to("meta") for name, value in vars(case).items()})
    # The reference reads the offsets; the checks did not.
    with pytest.raises((NotImplementedError, RuntimeError)):
        guided_velocity(**meta.guided())


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(launch, "is_interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run: .*TRITON_INTERPRET=1 before"):
        guided_velocity(**make_case([3], 4).guided(), impl="triton")
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' cannot run: triton is not installed"):
        guided_velocity(**make_case([3], 4).guided(), impl="triton")
