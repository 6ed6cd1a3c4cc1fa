"""The clock of a GPU: how often it times, everywhere; that its times are right, where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from bench.device import MAX_TIMES, MIN_TIMES, CudaTimer


class PacedTimer(CudaTimer):
    """Every call takes the same time, on no device."""

    def __init__(self, call_us: float) -> None:
        self.call_us = call_us

    def _time_between(self, calls, num_times):
        return [self.call_us] * num_times


@pytest.mark.parametrize(("call_us", "num_times"), [(1.0, MAX_TIMES), (1000.0, 100), (1e6, MIN_TIMES)])
def test_short_calls_are_timed_more_often(call_us, num_times):
    assert PacedTimer(call_us)._time_each([lambda: None]) == [call_us] * num_times


@pytest.mark.parametrize("num_sets", [1, 7])
def test_every_set_of_inputs_is_called_before_the_clock_runs(num_sets):
    called = []
    PacedTimer(1.0)._time_each([lambda index=index: called.append(index) for index in range(num_sets)])
    assert set(called) == set(range(num_sets))
    assert len(called) >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a CUDA device")
def test_the_clock_of_a_gpu_agrees_with_itself():
    timer = CudaTimer()
    with timer.scope(), torch.no_grad():
        source = torch.randn(1 << 26, device=timer.device)
        copied = timer.time([source.clone])
        twice = timer.time([lambda: source.clone() + 1])
        on_the_host = timer.time([lambda: source.sum().item()])
    assert (copied.method, copied.launches, twice.launches) == ("graph", 1, 2)
    assert on_the_host.method == "events"
    rate = 2 * source.nbytes / copied.spread.median_us / 1e3
    assert 0.7 < rate / timer.machine.copy_gb_per_s < 1.2
    assert 1.5 < twice.spread.median_us / copied.spread.median_us < 2.6
