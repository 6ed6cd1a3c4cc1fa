"""A run whose numbers are wrong has no time."""

from __future__ import annotations

import math

import pytest
import torch

from bench.case import PLAIN, Case
from bench.gate import find_fault, keep_right_runs, measure_error
from tests.bench.fakes import make_case

ONES = torch.ones(3)


def test_right_runs_pass():
    right, notes = keep_right_runs(make_case(torch=ONES, cpp=ONES + 1e-4, diffusers=ONES))
    assert list(right) == [PLAIN, "cpp", "diffusers"]
    assert notes == []


def test_a_wrong_run_of_ours_refuses_the_case():
    with pytest.raises(ValueError, match=r"cpp differs from plain torch by 1\.0e-01, allowed are 1\.0e-03"):
        keep_right_runs(make_case(torch=ONES, cpp=1.1 * ONES))
    with pytest.raises(ValueError, match="triton differs from plain torch by nan"):
        keep_right_runs(make_case(torch=ONES, triton=ONES * torch.nan))
    with pytest.raises(ValueError, match=r"cpp gives shape \(4,\), plain torch \(3,\)"):
        keep_right_runs(make_case(torch=ONES, cpp=torch.ones(4)))


def test_a_wrong_library_is_left_out():
    right, notes = keep_right_runs(make_case(torch=ONES, cpp=ONES, liger=1.1 * ONES))
    assert list(right) == [PLAIN, "cpp"]
    assert notes == ["liger left out: it differs from plain torch by 1.0e-01, allowed are 1.0e-03"]


def test_ours_has_all_results_and_a_library_the_first_ones():
    case = Case({PLAIN: lambda: (ONES, ONES), "liger": lambda: ONES, "cpp": lambda: (ONES, ONES)}, 12, 0.0)
    assert list(keep_right_runs(case)[0]) == [PLAIN, "liger", "cpp"]
    case.runs["cpp"] = lambda: ONES
    with pytest.raises(ValueError, match="cpp gives 1 results, plain torch 2"):
        keep_right_runs(case)
    assert find_fault((ONES,), (ONES, ONES), 0.0, is_prefix=True)


def test_memory_that_is_not_written_is_wrong():
    with pytest.raises(ValueError, match="cpp differs from plain torch by nan"):
        keep_right_runs(Case({PLAIN: lambda: ONES.clone(), "cpp": lambda: torch.empty(3)}, 12, 1e-3))
    assert not torch.are_deterministic_algorithms_enabled()


def test_errors_are_relative_and_of_every_dtype():
    assert measure_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert measure_error(torch.tensor([True, False]), torch.tensor([True, False])) == 0
    assert measure_error(torch.tensor([True, False]), torch.tensor([True, True])) == 1
    assert measure_error(torch.zeros(2), torch.full((2,), 0.5)) == pytest.approx(math.sqrt(0.5))
    assert measure_error(torch.zeros(0), torch.zeros(0)) == 0
    assert math.isnan(measure_error(torch.full((2,), math.nan), torch.zeros(2)))
