"""`realign verify DIR`: check this implementation against recorded outputs of the reference one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from realign.cli.console import print_error

if TYPE_CHECKING:
    from realign.evals.parity import CaseResult


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `verify` and its arguments."""
    parser = subparsers.add_parser(
        "verify",
        help="check this implementation against recorded outputs of the reference one",
        description="Compute every case of a golden folder and print the largest error of each. "
        "Exit code 0: all within tolerance; 1: one is not; 2: not a golden folder.",
    )
    parser.add_argument("folder", metavar="DIR", help="checkpoint/, cases.json and cases.safetensors")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16 has wider tolerances, and leaves out the interleaved call, whose text may differ",
    )


def main(args: argparse.Namespace) -> int:
    """Run the check; returns the exit code."""
    import torch  # imported late: help is instant

    from realign.evals.parity import check_golden

    try:
        device = check_device(args.device)
        results = check_golden(args.folder, device, getattr(torch, args.dtype))
    except ValueError as error:
        print_error(error)
        return 2
    print(format_results(results))
    return 0 if all(result.passed for result in results) else 1


def check_device(name: str) -> str:
    """The name, if torch has that device here. Raises: ValueError."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}): give cpu") from None
    return name


def format_results(results: list[CaseResult]) -> str:
    """A table: case, largest error, tolerance, verdict; and a line that counts."""
    width = max(len(result.name) for result in results)
    lines = [f"{'case':<{width}}  {'max error':>9}  {'tolerance':>9}"]
    for result in results:
        verdict = "ok" if result.passed else "FAILED"
        lines.append(f"{result.name:<{width}}  {result.max_error:>9.3g}  {result.tolerance:>9.3g}  {verdict}")
    num_passed = sum(result.passed for result in results)
    return "\n".join([*lines, f"{num_passed} of {len(results)} cases passed"])
