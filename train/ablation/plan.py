"""What the ablation trains and measures, and what has to be there first.

From a base that never saw IC-CoT: (a) fine-tuning without it and (b) with it, on as many new samples; from
(b) of the same seed, alignment with (c) one chain shared by a group and (d) a chain for every sample (RID).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BASE, PLAIN, REASONED, SHARED, RID = "base", "sft", "sft-iccot", "rga", "rga-rid"
VARIANTS = (BASE, PLAIN, REASONED, SHARED, RID)
STARTS = {PLAIN: BASE, REASONED: BASE, SHARED: REASONED, RID: REASONED}
ALIGNED = (SHARED, RID)
REASONING = {BASE: "none", PLAIN: "none", REASONED: "ic-cot", SHARED: "ic-cot", RID: "ic-cot"}


@dataclass(frozen=True)
class Job:
    """One thing to be done, in a folder or file of its own, once `needs` are done.

    Attributes:
        kind: "train" or "measure".
        variant, seed: of the model; the base has no seed but 0.
    """

    kind: str
    variant: str
    seed: int
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it is called on the command line, and its folder."""
        return f"{self.kind}/{model_name(self.variant, self.seed)}"


def model_name(variant: str, seed: int) -> str:
    """Of a trained model: "base", "sft-0", ..."""
    return variant if variant == BASE else f"{variant}-{seed}"


def list_jobs(num_seeds: int) -> list[Job]:
    """All jobs, those that others wait for first; seed by seed, so that the first numbers come early."""
    trained = [(BASE, 0), *((variant, seed) for seed in range(num_seeds) for variant in VARIANTS[1:])]
    jobs = []
    for variant, seed in trained:
        start = (f"train/{model_name(STARTS[variant], seed)}",) if variant in STARTS else ()
        job = Job("train", variant, seed, start)
        jobs += [job, Job("measure", variant, seed, (job.name,))]
    return jobs


@dataclass(frozen=True)
class Layout:
    """Where things are: `out` the run's folder, `recipes` those of its parts."""

    out: Path
    recipes: Path

    def folder(self, job: Job) -> Path:
        """What a job writes into."""
        return self.out / job.name

    def marker(self, job: Job) -> Path:
        """Is there once a job is done."""
        return self.folder(job) / "done"

    def model(self, variant: str, seed: int) -> Path:
        """A trained model, as `realign.load` takes it."""
        return self.folder(Job("train", variant, seed)) / "model"

    def measured(self, variant: str, seed: int) -> Path:
        """What was measured of a model."""
        return self.folder(Job("measure", variant, seed)) / "measured.json"

    def log(self, variant: str, seed: int) -> Path:
        """A training's log."""
        return self.folder(Job("train", variant, seed)) / "log.jsonl"
