"""What work takes is about what is measured; what there is; which errors say that it is too little."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from realign.model.bagel import Bagel
from realign.runtime import budget
from realign.runtime.budget import CPU_BYTES, Budget, Costs, find_free_bytes, is_out_of_memory
from realign.runtime.context import build_text_block, extend
from realign.runtime.guidance import Branch
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.sampler import DenoiseJob, denoise
from realign.runtime.schedule import Schedule
from realign.runtime.settings import TextSettings
from realign.runtime.text import decode_text, slot_size

# An estimate is at least what is measured, and at most so many times as much.
LARGEST_ESTIMATE = 2.5


@pytest.fixture(scope="module")
def mini() -> Bagel:
    return Bagel.from_pretrained("mini")


def measure_peak(work):
    """The most bytes that a call holds at once."""
    work()  # what is made once is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def check_estimate(estimate, work):
    peak = measure_peak(work)
    assert peak <= estimate <= LARGEST_ESTIMATE * peak


@pytest.mark.parametrize("num_jobs", [4, 32])
def test_drawing_takes_what_is_estimated(mini, num_jobs):
    branches = (Branch(Context()), Branch(Context(), 4.0, "text"))
    jobs = [DenoiseJob(branches, 64, 64, Schedule.build(3, 3.0)) for _ in range(num_jobs)]
    costs, num_tokens = Costs.of(mini), num_jobs * 2 * (16 + 2)
    estimate = num_tokens * (costs.kv_token + costs.forward_token)
    check_estimate(estimate, lambda: denoise(mini, jobs))


def test_reading_takes_what_is_estimated(mini):
    block = build_text_block(mini, "a red star on a beach " * 8)
    estimate = 32 * block.length * Costs.of(mini).read_token
    check_estimate(estimate, lambda: extend(mini, [Context()] * 32, [block] * 32))


def test_writing_takes_what_is_estimated(mini):
    settings = [TextSettings(20, 1.0, 0.9)] * 32
    keys = [NoiseKey(0, str(row), stream="text") for row in range(32)]
    costs, slot = Costs.of(mini), slot_size(Context(), settings[0])
    estimate = 32 * (slot * costs.kv_token + costs.forward_token + costs.scores_row)
    check_estimate(estimate, lambda: decode_text(mini, [Context()] * 32, settings, keys))


@pytest.mark.parametrize("side", [64, 256])
def test_decoding_takes_what_is_estimated(mini, side):
    latent = torch.zeros(1, 16, side // 8, side // 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        check_estimate(side * side * Costs.of(mini).pixel, lambda: mini.autoencoder.decode(latent))


def test_costs_of_bagels_own_numbers():
    """57,344 bytes of keys and values a token, as 28 layers of 4 heads of 128 numbers in bfloat16 are."""
    from bench.generate.models import BAGEL_7B

    with torch.device("meta"):
        costs = Costs.of(Bagel(BAGEL_7B).to(torch.bfloat16))
    assert costs.kv_token == 57_344
    assert costs.forward_token == budget.MARGIN * 2 * (3 * 3584 + 3 * 18944)


def test_a_failed_call_halves_what_the_next_may_take():
    own = Budget(1000)
    assert own.room("drawing", 300) == 700
    own.lower("drawing", 600)
    assert own.room("drawing", 300) == 300
    assert own.room("drawing", 900) == 100
    assert own.room("reading", 300) == 700
    assert own.room("reading", 2000) == 0


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_errors_of_memory_are_known(error, is_it):
    assert is_out_of_memory(error) == is_it


def test_torchs_own_error_on_this_machine_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_cpus_default_is_bounded_by_what_is_there(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    65536000 kB\n")
    monkeypatch.setattr(budget, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    assert find_free_bytes(cpu) == CPU_BYTES
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert find_free_bytes(cpu) == CPU_BYTES
    (tmp_path / "memory.max").write_text("1600000000\n")
    assert find_free_bytes(cpu) == 300_000_000
    (tmp_path / "meminfo").write_text("MemAvailable:    100 kB\n")
    assert find_free_bytes(cpu) == 51_200


def test_a_cuda_devices_default_is_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 200_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10_000)
    assert find_free_bytes(torch.device("cuda")) == 100_000 + 20_000 - 10_000
