"""The compiled extension: it is there, its ops are proper torch ops with the right bits, and are chosen."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from realign_kernels import dispatch, guided_velocity, native
from realign_kernels.arguments import LogProbCoefficients, NoiseKeys, StepCoefficients
from realign_kernels.flow_step.reference import flow_step_reference
from realign_kernels.philox_normal.reference import NUM_UNITS, philox, philox_normal_reference
from tests.kernels.flow_cases import IMPLS, FlowCase, make_case, needs_cpp

HALVES = [torch.float16, torch.bfloat16]
# Numbers of the dtypes of the sample and the velocity.
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


def test_extension_is_built_where_a_compiler_is():
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler is None or not headers.exists():
        pytest.skip("no C++ compiler or no Python headers here")
    assert native.is_available(), native.describe()


def guidance_of(case: FlowCase, codes: tuple[int, ...] = (1, 2, 3, 0)) -> dict[str, Tensor]:
    """Guidance as the ops call it; every renorm in one batch."""
    renorm_B = torch.tensor(codes, dtype=torch.int32).repeat(len(case.a_B))[: len(case.a_B)]
    return {
        "cond": case.cond_LC,
        "text_uncond": case.text_uncond_LC,
        "image_uncond": case.image_uncond_LC,
        "cu_seqlens": case.cu_seqlens,
        "text_scale": case.text_scale_B,
        "image_scale": case.image_scale_B,
        "renorm": renorm_B,
        "renorm_min": case.renorm_min_B,
    }


def step_of(
    case: FlowCase, noise: str | None = "given", has_logprob: bool = True, reduce_sum: bool = False
) -> dict[str, Tensor | bool | None]:
    """A step as the ops call it; its noise "given", made from "keys" or none."""
    return {
        "sample": case.sample_LC,
        "a": case.a_B,
        "b": case.b_B,
        "std": None if noise is None else case.std_B,
        "noise": case.noise_LC if noise == "given" else None,
        "noise_key": case.key_B if noise == "keys" else None,
        "noise_step": case.step_B if noise == "keys" else None,
        "logprob_weight": case.weight_B if has_logprob else None,
        "logprob_constant": case.constant_B if has_logprob else None,
        "reduce_sum": reduce_sum,
    }


def run_step(case: FlowCase, **options) -> tuple[Tensor, Tensor]:
    """`flow_step` of the conditional velocity."""
    return native.flow_step_cpp(**step_of(case, **options), velocity=case.cond_LC, cu_seqlens=case.cu_seqlens)


def run_guided_step(case: FlowCase, **options) -> tuple[Tensor, Tensor]:
    return native.guided_flow_step_cpp(**step_of(case, **options), **guidance_of(case))


def repeat_logprob(case: FlowCase, next_LC: Tensor, velocity_LC: Tensor, reduce_sum: bool) -> Tensor:
    """The log-prob of a step that was taken, by the op that knows no guidance and no noise."""
    logprob_B, bias_B = native.sde_logprob_cpp(
        sample=case.sample_LC,
        velocity=velocity_LC,
        next_sample=next_LC,
        cu_seqlens=case.cu_seqlens,
        a=case.a_B,
        b=case.b_B,
        weight=case.weight_B,
        constant=case.constant_B,
        reduce_sum=reduce_sum,
        old_velocity=None,
        bias_weight=None,
    )
    assert bias_B.shape == (0,)
    return logprob_B


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    ops, case = torch.ops.realign_kernels, make_case([3, 0, 5], 7).velocities_to(dtype)
    guidance, offsets = guidance_of(case), case.cu_seqlens
    bare = dict.fromkeys(("text_uncond", "image_uncond", "image_scale", "renorm_min"))
    for arguments in (guidance, guidance | bare | {"text_scale": torch.ones(3)}):
        torch.library.opcheck(ops.guided_velocity.default, (), arguments | {"out_dtype": torch.float32})
    for noise in ("given", "keys", None):
        step = step_of(case, noise, has_logprob=noise != "given")
        torch.library.opcheck(
            ops.flow_step.default, (), step | {"velocity": case.cond_LC, "cu_seqlens": offsets}
        )
        torch.library.opcheck(ops.guided_flow_step.default, (), step | guidance)
    step = (case.sample_LC, case.cond_LC, case.noise_LC, offsets, case.a_B, case.b_B)
    logprob = (case.weight_B, case.constant_B, False)
    for bias in ((None, None), (case.text_uncond_LC, case.weight_B)):
        torch.library.opcheck(ops.sde_logprob.default, (*step, *logprob, *bias))
    torch.library.opcheck(ops.philox_normal.default, (case.key_B, case.step_B, offsets, 8, 7))


@needs_cpp
@pytest.mark.parametrize("noise", ["given", "keys", None])
@pytest.mark.parametrize(("sample_dtype", "velocity_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("lengths", "channels"), [([150, 0, 33], 65), ([1], 1), ([], 4), ([9, 2], 3000)])
def test_step_has_the_bits_of_the_reference(lengths, channels, sample_dtype, velocity_dtype, noise):
    case = make_case(lengths, channels).velocities_to(velocity_dtype).samples_to(sample_dtype)
    coefficients = StepCoefficients(case.a_B, case.b_B, None if noise is None else case.std_B)
    given = {"given": case.noise_LC, "keys": NoiseKeys(case.key_B, case.step_B), None: None}[noise]
    logprob = LogProbCoefficients(case.weight_B, case.constant_B, "sum")
    next_LC, logprob_B = run_step(case, noise=noise, reduce_sum=True)
    expected = flow_step_reference(
        case.sample_LC, case.cond_LC, case.cu_seqlens, coefficients, given, logprob
    )
    assert torch.equal(bits(next_LC), bits(expected[0]))
    torch.testing.assert_close(logprob_B, expected[1], rtol=1e-5, atol=1e-5)
    assert run_step(case, noise=noise, has_logprob=False)[1].shape == (0,)


@needs_cpp
@pytest.mark.parametrize("reduce_sum", [False, True])
@pytest.mark.parametrize("noise", ["given", "keys"])
@pytest.mark.parametrize(("sample_dtype", "velocity_dtype"), DTYPE_PAIRS)
def test_sde_logprob_repeats_what_the_step_said(sample_dtype, velocity_dtype, noise, reduce_sum):
    case = make_case([150, 1, 0, 33, 70], 65).velocities_to(velocity_dtype).samples_to(sample_dtype)
    options = {"noise": noise, "reduce_sum": reduce_sum}
    next_LC, recorded_B = run_step(case, **options)
    assert torch.equal(bits(repeat_logprob(case, next_LC, case.cond_LC, reduce_sum)), bits(recorded_B))
    assert recorded_B[2] == case.constant_B[2]
    next_LC, recorded_B = run_guided_step(case, **options)
    velocity_LC = native.guided_velocity_cpp(**guidance_of(case), out_dtype=torch.float32)
    assert torch.equal(bits(repeat_logprob(case, next_LC, velocity_LC, reduce_sum)), bits(recorded_B))


@needs_cpp
@pytest.mark.parametrize("out_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_velocity_in_another_dtype_is_the_float32_one_rounded(dtype, out_dtype):
    arguments = guidance_of(make_case([150, 33, 5, 1], 65).velocities_to(dtype))
    wide_LC = native.guided_velocity_cpp(**arguments, out_dtype=torch.float32)
    assert torch.equal(native.guided_velocity_cpp(**arguments, out_dtype=out_dtype), wide_LC.to(out_dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_neighbours(dtype):
    case = make_case([4096, 999, 1, 0, 1500], 64).velocities_to(dtype).samples_to(dtype)
    results = []
    for num_threads in (1, 2, 3, 8):
        torch.set_num_threads(num_threads)
        velocity_LC = native.guided_velocity_cpp(**guidance_of(case, (1,)), out_dtype=dtype)
        next_LC, logprob_B = native.guided_flow_step_cpp(**step_of(case, "keys"), **guidance_of(case, (1,)))
        results.append((velocity_LC, next_LC, logprob_B, repeat_logprob(case, next_LC, velocity_LC, False)))
    torch.set_num_threads(1)
    alone = [native.guided_velocity_cpp(**guidance_of(case.take(i), (1,)), out_dtype=dtype) for i in range(5)]
    assert torch.equal(results[0][0], torch.cat(alone))
    for i in range(5):
        one = case.take(i)
        step = native.guided_flow_step_cpp(**step_of(one, "keys"), **guidance_of(one, (1,)))
        start, end = case.cu_seqlens[i : i + 2].tolist()
        assert torch.equal(results[0][1][start:end], step[0])
        assert torch.equal(results[0][2][i : i + 1], step[1])
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


@needs_cpp
@pytest.mark.parametrize("renorm", [0, 1, 2, 3])
def test_nan_and_infinity_stay_in_their_sample(renorm):
    case = make_case([40, 30, 3], 64)
    case.cond_LC[7, 3] = torch.nan
    case.noise_LC[69, 63] = torch.inf  # of a sample with std 0.3
    case.noise_LC[70, 5] = torch.inf  # of a sample with std 0.7, not guided
    case.noise_LC[2, 2] = torch.inf  # of a sample with std 0: 0 * inf
    next_LC, logprob_B = native.guided_flow_step_cpp(**step_of(case), **guidance_of(case, (renorm,)))
    spread = {0: case.cond_LC.isnan(), 1: torch.zeros_like(case.cond_LC, dtype=torch.bool)}.get(renorm)
    expected = torch.zeros_like(case.cond_LC, dtype=torch.bool) if spread is None else spread.clone()
    expected[7] |= renorm > 1
    expected[:40] |= renorm == 1
    expected[2, 2] = True
    assert torch.equal(next_LC.isnan(), expected)
    assert next_LC.isinf().nonzero().tolist() == [[69, 63], [70, 5]]
    assert logprob_B[0].isnan()
    assert logprob_B[1:].isinf().all()


# Units at the edges of the arithmetic, each with a step of key 0 whose first block holds it. Of the radius:
# both ends, and around the roots of 1/2 and 1/8, where the logarithm's exponent changes.
RADIUS_STEPS = {
    0: 1224113,
    1: 2524434,
    2: 437180,
    5931641: 1132351,
    5931642: 4820011,
    11863282: 4680722,
    11863283: 11821377,
    NUM_UNITS - 2: 14339733,
    NUM_UNITS - 1: 921823,
}
# Of the turn: both ends, and around its eighths.
TURN_STEPS = {
    0: 372860,
    1: 3945308,
    (1 << 21) - 1: 4056920,
    1 << 21: 10012483,
    (1 << 21) + 1: 21360956,
    (2 << 21) - 1: 6202399,
    2 << 21: 3634013,
    (2 << 21) + 1: 9493610,
    (3 << 21) - 1: 5720069,
    3 << 21: 16129702,
    (4 << 21) - 1: 19883431,
    4 << 21: 2368153,
    (5 << 21) - 1: 16174286,
    5 << 21: 15567811,
    6 << 21: 770495,
    (6 << 21) + 1: 2986626,
    (7 << 21) - 1: 3148488,
    7 << 21: 8337968,
    NUM_UNITS - 1: 8459372,
}


@needs_cpp
def test_normals_have_the_bits_of_the_reference_at_every_edge():
    step_B = torch.tensor([*RADIUS_STEPS.values(), *TURN_STEPS.values()])
    key_B, offsets = torch.zeros_like(step_B), torch.arange(len(step_B) + 1, dtype=torch.int32)
    counters = torch.stack((key_B, step_B, key_B, key_B), 1)
    units = philox(counters, torch.stack((key_B, key_B), 1)) >> 8
    assert set(RADIUS_STEPS) <= set(units[:, 0::2].flatten().tolist())
    assert set(TURN_STEPS) <= set(units[:, 1::2].flatten().tolist())
    ours = native.philox_normal_cpp(
        key=key_B, step=step_B, cu_seqlens=offsets, num_tokens=len(step_B), num_channels=4
    )
    assert torch.equal(bits(ours), bits(philox_normal_reference(key_B, step_B, offsets, 4)))


@needs_cpp
@pytest.mark.parametrize("num_threads", [1, 3])
def test_normals_have_the_bits_of_the_reference_in_bulk(num_threads):
    generator = torch.Generator().manual_seed(0)
    lengths, channels = [30000, 1, 0, 7, 12345], 65
    key_B = torch.randint(-(2**63), 2**63 - 1, (5,), generator=generator)
    step_B = torch.tensor([0, 2**32 - 1, 3, 2**31, 1])
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.set_num_threads(num_threads)
    ours = native.philox_normal_cpp(
        key=key_B, step=step_B, cu_seqlens=offsets, num_tokens=sum(lengths), num_channels=channels
    )
    torch.set_num_threads(1)
    assert torch.equal(bits(ours), bits(philox_normal_reference(key_B, step_B, offsets, channels)))


@needs_cpp
@pytest.mark.parametrize("dtype", HALVES)
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


@needs_cpp
@pytest.mark.parametrize("dtype", HALVES)
def test_guidance_reads_every_half_number_as_torch_does(dtype):
    """By the loop that guides and measures: from zeros, scale 2 doubles; renorm_min 1 leaves it so."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[every.float().abs() < 2.0**50][:, None]  # larger squares are beyond float32
    doubled = native.guided_velocity_cpp(
        cond=numbers,
        text_uncond=torch.zeros_like(numbers),
        image_uncond=None,
        cu_seqlens=torch.tensor([0, len(numbers)], dtype=torch.int32),
        text_scale=torch.tensor([2.0]),
        image_scale=None,
        renorm=torch.tensor([1], dtype=torch.int32),
        renorm_min=torch.ones(1),
        out_dtype=torch.float32,
    )
    assert torch.equal(doubled, 2 * numbers.float())


@needs_cpp
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_half_is_that_of_torch(dtype):
    words = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int()
    edges = torch.tensor(
        [65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 2.0**-14, 6.1e-5, 3.39e38]
    )
    x = torch.cat([words.view(torch.float32), edges, -edges, torch.randn(1 << 16)])
    x = x[x.isfinite()][:, None]
    assert torch.equal(_copy(x, dtype), x.to(dtype))


def _copy(numbers_LC: Tensor, dtype: torch.dtype) -> Tensor:
    """Through the extension, as a velocity that is not guided."""
    return native.guided_velocity_cpp(
        cond=numbers_LC,
        text_uncond=None,
        image_uncond=None,
        cu_seqlens=torch.tensor([0, len(numbers_LC)], dtype=torch.int32),
        text_scale=torch.ones(1),
        image_scale=None,
        renorm=torch.zeros(1, dtype=torch.int32),
        renorm_min=None,
        out_dtype=dtype,
    )


@needs_cpp
def test_arrays_that_are_not_contiguous():
    case = make_case([30, 4], 6)
    strided = {
        name: value.repeat_interleave(2, -1)[..., ::2] if value.is_floating_point() else value
        for name, value in vars(case).items()
    }
    for ours, expected in zip(run_guided_step(FlowCase(**strided)), run_guided_step(case), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)


@needs_cpp
def test_compiled_and_traced_calls_are_the_op_too():
    """They go through torch's dispatcher, which eager calls skip."""
    case = make_case([30, 4], 6)

    def step(sample_LC: Tensor) -> tuple[Tensor, Tensor]:
        return native.guided_flow_step_cpp(
            **{**step_of(case, "keys"), "sample": sample_LC}, **guidance_of(case)
        )

    expected, op = step(case.sample_LC), torch.ops.realign_kernels.guided_flow_step.default
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(case.sample_LC)
    graph = make_fx(step)(case.sample_LC)
    assert sum(node.target is op for node in graph.graph.nodes) == 1
    for results in (compiled, graph(case.sample_LC), op(**step_of(case, "keys"), **guidance_of(case))):
        assert all(torch.equal(ours, first) for ours, first in zip(results, expected, strict=True))


@needs_cpp
def test_a_parameter_that_is_not_there_is_refused():
    with pytest.raises(TypeError, match="no parameter colour"):
        native._C.guided_flow_step({"num_samples": 0, "colour": 1})


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
        guided_velocity(**make_case([3], 4).guided(), impl="cpp")
    assert guided_velocity(**make_case([3], 4).guided()).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_written_to(impl):
    case = make_case([30, 4], 6).on(impl)
    before = {name: value.clone() for name, value in vars(case).items()}
    guided_velocity(**case.guided(), impl=impl)
    assert all(torch.equal(value, before[name]) for name, value in vars(case).items())
