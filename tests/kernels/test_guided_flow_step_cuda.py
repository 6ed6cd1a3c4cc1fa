"""The CUDA path of guided_flow_step: emulated on the CPU, and on a GPU with clusters where there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from realign_kernels import Guidance, guided_flow_step, native
from realign_kernels.flow_step.api import name_step
from realign_kernels.guided_flow_step import cuda
from realign_kernels.guided_flow_step.cuda import guided_flow_step_cuda
from realign_kernels.guided_velocity.api import name_fields, name_guidance
from tests.kernels.emulation import build_emulated_module, find_compiler
from tests.kernels.flow_cases import (
    RENORMS,
    SHAPES,
    FlowCase,
    assert_as_exact_as_plain,
    expected_step,
    expected_velocity,
    make_case,
    plain_velocity,
)

SIZES = [1, 2, 4, 8, 16]
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# With the scales of flow_cases, samples 0, 2, 4, 5 and 7 are guided, 0, 4 and 5 with an image too.
LENGTHS = [150, 1, 33, 0, 400, 90, 2, 1]
MIXED = ["global", "channel", "channel", "global", "text_channel", "channel", "none", "global"]


HAS_CLUSTERS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
MACHINES = ["emulated", *(["gpu"] if HAS_CLUSTERS else [])]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if find_compiler() is None:
        pytest.skip("no C++ compiler here: the emulation cannot be built")
    return build_emulated_module(tmp_path_factory.mktemp("emulated"))


@dataclass
class Machine:
    """Where the op runs; emulated, in which order of threads, with how much shared memory (0: a Hopper's)."""

    device: str
    order: str = "forward"
    shared_bytes: int = 0


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    return Machine("cuda") if request.param == "gpu" else emulate(request, monkeypatch)


@pytest.fixture
def emulator(request, monkeypatch):
    return emulate(request, monkeypatch)


def emulate(request, monkeypatch) -> Machine:
    machine = Machine("cpu")
    monkeypatch.setattr(native, "_C_CUDA", request.getfixturevalue("emulated"))
    monkeypatch.setattr(cuda, "find_stream", lambda device: (machine.shared_bytes, ORDERS[machine.order]))
    return machine


def run(
    machine: Machine,
    case: FlowCase,
    renorm: str | list[str],
    has_keys: bool = False,
    reduction: str = "mean",
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next samples and log-probs, on the CPU."""
    case = FlowCase(**{name: value.to(machine.device) for name, value in vars(case).items()})
    guided, step = case.guided(renorm), case.step(has_keys)
    names = name_fields(guided["velocities"]) | name_guidance(guided["guidance"], case.cu_seqlens)
    names |= name_step(step["coefficients"], step["noise"], case.logprob(reduction))
    results = guided_flow_step_cuda(sample=case.sample_LC, cu_seqlens=case.cu_seqlens, **names, **options)
    return tuple(result.cpu() for result in results)


def define(case: FlowCase, renorm: str | list[str], has_keys: bool = False, reduction: str = "mean"):
    """The same by the definition."""
    arguments = {**case.guided(renorm), **case.step(has_keys), "logprob": case.logprob(reduction)}
    return guided_flow_step(**arguments, impl="reference")


def assert_same_bits(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(("lengths", "channels"), [*SHAPES, ([700, 30], 64), ([40], 24)])
def test_error_is_that_of_plain_torch_at_most(lengths, channels, renorm, dtype, machine):
    case = make_case(lengths, channels).velocities_to(dtype)
    actual, _ = run(machine, case, renorm)
    plain = expected_step(case, plain_velocity(case, renorm)).float()
    assert_as_exact_as_plain(actual, plain, expected_step(case, expected_velocity(case, renorm)))


@pytest.mark.parametrize("sample_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize("channels", [64, 7])
def test_where_no_sum_is_it_has_the_bits_of_the_definition(channels, has_keys, dtype, sample_dtype, machine):
    case = make_case([130, 0, 7], channels).velocities_to(dtype).samples_to(sample_dtype)
    actual, _ = run(machine, case, "none", has_keys)
    assert torch.equal(actual, define(case, "none", has_keys)[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("renorm", [*RENORMS, MIXED])
@pytest.mark.parametrize("channels", [1, 8, 20, 65])
def test_results_are_those_of_the_definition(channels, renorm, reduction, machine):
    case = make_case(LENGTHS, channels).samples_to(torch.bfloat16)
    actual, expected = run(machine, case, renorm, True, reduction), define(case, renorm, True, reduction)
    torch.testing.assert_close(actual[0], expected[0], rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-6)
    # A rounding of x_next the other way is within the log-prob too: it is of the x_next that is returned.
    torch.testing.assert_close(actual[1], expected[1], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("channels", [64, 20])
def test_bits_do_not_depend_on_the_size_of_the_cluster(channels, cluster_size, machine):
    case = make_case(LENGTHS, channels).velocities_to(torch.bfloat16)
    assert_same_bits(
        run(machine, case, MIXED, True, cluster_size=cluster_size), run(machine, case, MIXED, True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [64, 65])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(channels, dtype, machine):
    case = make_case(LENGTHS, channels).velocities_to(dtype)
    alone = [run(machine, case.take(index), mode, True) for index, mode in enumerate(MIXED)]
    expected = tuple(torch.cat(parts) for parts in zip(*alone, strict=True))
    assert_same_bits(run(machine, case, MIXED, True), expected)


@pytest.mark.parametrize("max_tokens", [1, 16, 100, 1000])
@pytest.mark.parametrize("channels", [64, 20])
def test_a_sample_that_finds_no_room_has_the_same_bits(channels, max_tokens, machine):
    case = make_case(LENGTHS, channels).velocities_to(torch.bfloat16)
    assert_same_bits(run(machine, case, MIXED, max_tokens=max_tokens), run(machine, case, MIXED))


@pytest.mark.parametrize("cluster_size", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_bits_do_not_depend_on_the_order_of_threads(order, cluster_size, emulator):
    case = make_case(LENGTHS, 64)
    expected = run(emulator, case, MIXED, True)
    emulator.order = order
    assert_same_bits(run(emulator, case, MIXED, True, cluster_size=cluster_size), expected)


@pytest.mark.parametrize("shared_bytes", [1 << 12, 1 << 13, 1 << 15])
def test_bits_do_not_depend_on_the_size_of_shared_memory(shared_bytes, emulator):
    case = make_case(LENGTHS, 64)
    expected = run(emulator, case, MIXED, True)
    emulator.shared_bytes = shared_bytes
    assert_same_bits(run(emulator, case, MIXED, True), expected)


def test_seventy_thousand_tokens(machine):
    case = make_case([70_000, 3], 8)
    case = replace(case, text_scale_B=torch.full((2,), 4.0))
    next_LC, logprob_B = run(machine, case, "global")
    plain_LC, plain_B = define(case, "global")
    assert_as_exact_as_plain(next_LC, plain_LC, expected_step(case, expected_velocity(case, "global")))
    torch.testing.assert_close(logprob_B, plain_B, rtol=1e-4, atol=1e-5)


def test_unaligned_addresses(machine):
    case = make_case([61, 5], 64).velocities_to(torch.bfloat16)
    padded = torch.zeros(66 * 64 + 1, dtype=torch.bfloat16)
    padded[1:] = case.cond_LC.flatten()
    shifted = replace(case, cond_LC=padded[1:].view(66, 64))
    assert_same_bits(run(machine, shifted, "global"), run(machine, case, "global"))


def test_tensors_need_not_be_contiguous(machine):
    case = make_case([61, 5], 64)
    turned = replace(
        case, cond_LC=case.cond_LC.t().contiguous().t(), sample_LC=case.sample_LC.repeat(1, 2)[:, :64]
    )
    assert_same_bits(run(machine, turned, "global"), run(machine, case, "global"))


def test_what_no_sample_uses_may_be_left_out(machine):
    case = make_case([61, 5], 64)
    off = replace(case, text_scale_B=torch.ones(2))
    guidance = Guidance(off.text_scale_B.to(machine.device))
    step = name_step(off.step()["coefficients"], None, None) | {"std": None}
    names = name_fields((off.cond_LC, None, None)) | name_guidance(guidance, off.cu_seqlens) | step
    names = {
        name: value.to(machine.device) if isinstance(value, torch.Tensor) else value
        for name, value in names.items()
    }
    place = {"sample": off.sample_LC.to(machine.device), "cu_seqlens": off.cu_seqlens.to(machine.device)}
    next_LC, logprob_B = guided_flow_step_cuda(**place, **names)
    quiet = replace(off, std_B=torch.zeros(2))
    assert torch.equal(next_LC.cpu(), define(quiet, "none")[0])
    assert logprob_B.shape == (0,)


def test_opcheck(emulator, monkeypatch):
    case = make_case([3, 0, 5], 7)
    guided, step = case.guided(MIXED[:3]), case.step(True)
    names = name_fields(guided["velocities"]) | name_guidance(guided["guidance"], case.cu_seqlens)
    names |= name_step(step["coefficients"], step["noise"], case.logprob())
    arguments = {"sample": case.sample_LC, "cu_seqlens": case.cu_seqlens, **names}
    monkeypatch.setattr(torch, "empty", poison_free_empty)
    torch.library.opcheck(torch.ops.realign_kernels.guided_flow_step_cuda.default, (), arguments)


poison_free_empty = torch.empty


def test_a_gpu_without_clusters_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(
        ValueError, match=r"A100 has compute capability 8\.0: .* need 9\.0; use impl='triton'"
    ):
        cuda.find_stream(torch.device("cuda", 0))


def test_auto_is_told_where_it_was_measured_to_be_faster(monkeypatch, emulator):
    def is_faster(num_tokens: int, num_samples: int) -> bool:
        return cuda.is_faster(torch.empty(num_tokens, 1), torch.zeros(num_samples + 1))

    monkeypatch.setattr(cuda, "has_clusters", lambda device: True)
    assert not is_faster(96 * 4096, 96)
    monkeypatch.setattr(cuda, "MEASURED_FASTER", ((range(1024, 8193), range(8, 97)),))
    assert is_faster(96 * 4096, 96)
    assert not is_faster(4096, 1)
    assert not is_faster(96 * 64, 96)
    assert not is_faster(0, 0)
    monkeypatch.setattr(cuda, "has_clusters", lambda device: False)
    assert not is_faster(96 * 4096, 96)
