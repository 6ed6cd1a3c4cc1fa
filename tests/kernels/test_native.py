"""The compiled extension: is it there, is it a proper torch op, and is it chosen when it should be."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from realign_kernels import dispatch, guided_velocity, native
from tests.kernels.flow_cases import IMPLS, make_case, needs_cpp

OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_extension_is_built_where_a_compiler_is():
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler is None or not headers.exists():
        pytest.skip("no C++ compiler or no Python headers here")
    assert native.is_available(), native.describe()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    case = make_case([3, 0, 5], 7).velocities_to(dtype)
    branches = (case.cond_LC, case.text_uncond_LC, case.image_uncond_LC, case.cu_seqlens)
    scales = (case.text_scale_B, case.image_scale_B)
    step = (case.a_B, case.b_B, case.std_B, case.noise_LC)
    renorm = ([1, 2, 3], case.renorm_min_B)
    ops = torch.ops.realign_kernels
    torch.library.opcheck(ops.guided_velocity.default, (*branches, *scales, *renorm), test_utils=OPCHECK)
    torch.library.opcheck(
        ops.guided_velocity.default,
        (case.cond_LC, None, None, case.cu_seqlens, torch.ones(3), None, [0, 0, 0], None),
    )
    torch.library.opcheck(ops.flow_step.default, (case.sample_LC, case.cond_LC, case.cu_seqlens, *step))
    torch.library.opcheck(
        ops.guided_flow_step.default, (case.sample_LC, *branches, *scales, *step, *renorm), test_utils=OPCHECK
    )


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_number_is_read_and_written_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()][:, None]
    infinite = every[every.isinf()][:, None]
    for numbers in (finite, infinite):
        widened = _copy(numbers, torch.float32)
        assert torch.equal(widened, numbers.float())
        assert torch.equal(_copy(widened, dtype), numbers)
    assert _copy(every[every.isnan()][:, None], torch.float32).isnan().all()
    assert _copy(torch.full((5, 1), torch.nan), dtype).isnan().all()


def _copy(numbers_LC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Through the extension, as the velocity of a step with a = 0, b = 1."""
    offsets = torch.tensor([0, len(numbers_LC)], dtype=torch.int32)
    zeros_LC = torch.zeros(numbers_LC.shape, dtype=dtype)
    return native.flow_step_cpp(zeros_LC, numbers_LC, offsets, torch.zeros(1), torch.ones(1), None, None)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_half_is_that_of_torch(dtype):
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    edges = torch.tensor(
        [65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 2.0**-14, 6.1e-5, 3.39e38]
    )
    x = torch.cat([bits.view(torch.float32), edges, -edges, torch.randn(1 << 16)])
    x = x[x.isfinite()][:, None]
    assert torch.equal(_copy(x, dtype), x.to(dtype))


PATHS = {"cpp": False, "triton": False}


def test_auto_follows_its_table(monkeypatch):
    def choose(*tensors, paths=PATHS):
        return dispatch.choose_impl("op", "auto", tensors, paths)

    float32, float64 = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.float64)
    trained = torch.zeros(2, 2, requires_grad=True)
    built = "cpp" if native.is_available() else "reference"
    assert choose(float32, None) == built
    assert choose(float32, float64) == "reference"
    assert choose(trained) == "reference"
    assert choose(trained, paths={"cpp": True}) == built
    assert choose(float32, paths={"triton": True}) == "reference"
    with torch.no_grad():
        assert choose(trained) == built
    assert choose(torch.zeros(2, device="meta")) == "reference"
    monkeypatch.setattr(native, "_C", None)
    assert choose(float32) == "reference"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, dtype=torch.float64), "not torch.float64"),
        (torch.zeros(2, requires_grad=True), "a tensor requires one"),
        (torch.zeros(2, device="meta"), "a tensor is on meta"),
    ],
)
@needs_cpp
def test_explicit_cpp_never_falls_back(tensor, reason):
    with pytest.raises(ValueError, match=f"op: impl='cpp' cannot run: .*{reason}"):
        dispatch.choose_impl("op", "cpp", (tensor,), PATHS)


def test_explicit_cpp_without_the_extension_says_so(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_STATE", "no compiled extension (test)")
    with pytest.raises(ValueError, match=r"impl='cpp' cannot run: no compiled extension \(test\)"):
        guided_velocity(**make_case([3], 4).guidance(), impl="cpp")
    assert guided_velocity(**make_case([3], 4).guidance()).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_written_to(impl):
    case = make_case([30, 4], 6)
    before = {name: value.clone() for name, value in case.guidance().items()}
    guided_velocity(**case.guidance(), impl=impl)
    assert all(torch.equal(value, before[name]) for name, value in case.guidance().items())
