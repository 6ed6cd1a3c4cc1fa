"""The clock of a CUDA device: events, graph replay, and what the device can reach at all."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import cycle, islice, pairwise

import torch

from bench.case import Run
from bench.measure import Machine, Timing
from bench.rows import Spread
from realign_kernels import launch

SECONDS = 0.1  # of device time for each measurement
MIN_TIMES, MAX_TIMES = 11, 200
GRAPH_US = 500.0  # work in a graph, so that the gap between two replays does not count
KERNEL_NODES = (0, 1, 2)  # of CUgraphNodeType: kernel, copy, fill


class CudaTimer:
    """Times runs on the first CUDA device, all on one stream of its own, as capturing asks."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.stream = torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Everything that is measured is built and called within this: backward runs where forward ran."""
        with torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()

    @cached_property
    def machine(self) -> Machine:
        """The device, the rate of a copy of 2 GiB (read and written), that of a product of 8192-matrices."""
        side = 8192
        source = torch.empty(1 << 30, dtype=torch.int16, device=self.device).random_()
        target = torch.empty_like(source)
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        copy_us = statistics.median(self._time_each([lambda: target.copy_(source)]))
        matmul_us = statistics.median(self._time_each([lambda: left @ right]))
        return Machine(
            gpu=torch.cuda.get_device_name(self.device),
            driver=_name_driver(),
            torch=torch.__version__,
            triton=importlib.metadata.version("triton") if launch.has_triton() else "",
            copy_gb_per_s=round(2 * source.nbytes / copy_us / 1e3, 1),
            matmul_tflop_per_s=round(2 * side**3 / matmul_us / 1e6, 1),
        )

    def time(self, runs: Sequence[Run]) -> Timing:
        """Time one run over equal sets of inputs: by graph replay, or events where it cannot be captured."""
        calls_us = self._time_each(runs)
        call_us = statistics.median(calls_us)
        try:
            single = self._capture(runs[:1])
        except RuntimeError:  # it reads a result on the host, say
            torch.cuda.synchronize()
            return Timing(Spread.of(calls_us), call_us, "events", 0)
        launches = count_nodes(single.raw_cuda_graph())
        single_us = statistics.median(self._time_between([single.replay], MIN_TIMES))
        num_calls = max(len(runs), round(GRAPH_US / single_us))
        rotation = self._capture(list(islice(cycle(runs), num_calls)))
        times_us = [us / num_calls for us in self._time_each([rotation.replay])]
        return Timing(Spread.of(times_us), call_us, "graph", launches)

    def _capture(self, runs: Sequence[Run]) -> torch.cuda.CUDAGraph:
        """A graph of the runs one after the other, each with results of its own."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=self.stream):
            results = [run() for run in runs]
        del results
        graph.instantiate()
        return graph

    def _time_each(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Microseconds from the end of one call to the end of the next, calls in turn without a pause."""
        for call in islice(cycle(calls), max(3, len(calls))):
            call()
        rough_us = self._time_between(calls, 3)
        num_times = round(SECONDS * 1e6 / max(statistics.median(rough_us), 1e-3))
        return self._time_between(calls, min(max(num_times, MIN_TIMES), MAX_TIMES))

    def _time_between(self, calls: Sequence[Callable[[], object]], num_times: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(num_times + 1)]
        events[0].record(self.stream)
        for call, event in zip(cycle(calls), events[1:], strict=False):
            call()
            event.record(self.stream)
        self.stream.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairwise(events)]


def count_nodes(graph: int) -> int:
    """Nodes of a CUgraph that are kernels, copies or fills; 0 where the driver does not tell."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, count, kind = ctypes.c_void_p(graph), ctypes.c_size_t(), ctypes.c_int()
    if driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) != 0:
        return 0
    nodes = (ctypes.c_void_p * count.value)()
    driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count))
    kinds = []
    for node in nodes:
        driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
        kinds.append(kind.value)
    return sum(kind in KERNEL_NODES for kind in kinds)


def _name_driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
