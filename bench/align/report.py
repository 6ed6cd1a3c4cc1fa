"""What was measured, as rows."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from bench.align.outcome import Agreement
from bench.align.rows import ROLLOUT_PHASES, AlignRow
from bench.generate.measure import Measured, Run
from bench.generate.report import Conditions
from bench.generate.rows import BASELINE, ENGINE, median_ratio, round_to


@dataclass(frozen=True)
class Report:
    """One workload.

    Attributes:
        what: its sizes, in words.
        flops: work that it needs.
        agreement: of both; None without a baseline.
    """

    workload: str
    variant: str
    what: str
    measured: Measured
    flops: int = 0
    agreement: Agreement | None = None

    def make_rows(self, conditions: Conditions, command: str) -> list[AlignRow]:
        """The engine's row, and the baseline's where there is one."""
        runs = {ENGINE: self.measured.engine, BASELINE: self.measured.baseline}
        return [
            self._make_row(name, run, conditions, command) for name, run in runs.items() if run is not None
        ]

    def _make_row(self, name: str, run: Run, conditions: Conditions, command: str) -> AlignRow:
        seconds, phases, outcome = statistics.median(run.seconds), run.median_phases, run.made
        drawing = sum(phases.get(phase, 0.0) for phase in ROLLOUT_PHASES)
        reasoning, count = phases.get("reasoning", 0.0), len(outcome.reward_N) * run.scale
        turns = [made.turn for made in outcome.made if made.turn is not None]
        num_tokens = sum(len(turn.ids) for turn in turns)
        rate, done = conditions.matmul_tflop_per_s, self.flops / seconds / 1e12
        return AlignRow(
            workload=self.workload,
            variant=self.variant,
            impl=name,
            what=self.what,
            samples=round(count),
            chains=len({turn.text for turn in turns}),
            seconds=round_to(seconds),
            turn_seconds=[round_to(turn) for turn in run.seconds],
            samples_per_s=round_to(count / seconds),
            images_per_s=round_to(count / drawing) if drawing else 0.0,
            tokens=num_tokens,
            tokens_per_s=round_to(num_tokens / reasoning) if reasoning else 0.0,
            phases={phase: round_to(spent) for phase, spent in phases.items() if spent},
            peak_memory_mb=round(run.peak_mb, 1),
            **self._compare(run),
            agreement={} if self.agreement is None else asdict(self.agreement),
            first_ratio_error=round_to(outcome.ratio_error),
            tflop_per_s=round_to(done),
            matrix_share=round_to(done / rate) if rate else 0.0,
            command=command,
            **vars(conditions),
        )

    def _compare(self, run: Run) -> dict[str, Any]:
        base = self.measured.baseline
        if base is None:
            return {"times_faster": 0.0, "cpu_times_faster": 0.0, "phase_times_faster": {}}
        ours, theirs = run.median_phases, base.median_phases
        return {
            "times_faster": round_to(median_ratio(base.seconds, run.seconds), 3),
            "cpu_times_faster": round_to(median_ratio(base.cpu_seconds, run.cpu_seconds), 3),
            "phase_times_faster": {
                name: round_to(theirs[name] / ours[name], 3) for name in ours if ours[name] and theirs[name]
            },
        }


def describe_row(row: AlignRow) -> str:
    """A row for people."""
    words = [f"  {row.impl:8}  {row.seconds:.4g} s ({row.samples_per_s:.3g} samples/s)"]
    if row.images_per_s:
        words.append(f"rollouts without chains {row.images_per_s:.3g} images/s")
    if row.tokens:
        words.append(f"{row.chains} chains, {row.tokens_per_s:.4g} tokens/s")
    words.append("  ".join(f"{phase} {seconds:.3g} s" for phase, seconds in row.phases.items()))
    words.append(f"{row.peak_memory_mb:.0f} MB")
    if row.matrix_share:
        words.append(f"{row.matrix_share:.0%} of the matrix rate")
    if row.times_faster and row.impl == ENGINE:
        words.append(f"{row.times_faster:.3g} times faster ({row.cpu_times_faster:.3g} by processor time)")
        words.append("apart: " + "  ".join(f"{name} {value:.2g}" for name, value in row.agreement.items()))
    return "; ".join(words)
