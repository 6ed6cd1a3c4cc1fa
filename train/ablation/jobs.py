"""Does one job; each is resumable by itself, and leaves a marker when it is done."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from realign.model.weights import find_folder
from train import rga, sft
from train.ablation.measure import MeasureOptions, measure
from train.ablation.plan import ALIGNED, BASE, REASONING, SHARED, STARTS, Job, Layout
from train.init_model import init_model
from train.ranks import Ranks
from train.recipe import Recipe

STEPS_APART = 1_000_000  # the data of another seed begins so many steps further on


@dataclass(frozen=True)
class JobRunner:
    """Runs jobs of an ablation.

    Args:
        layout: of the run.
        options: of the measurement.
        device: as `train.rga --device`.
    """

    layout: Layout
    options: MeasureOptions
    device: str

    def run(self, job: Job) -> None:
        """From its beginning or its last checkpoint to its end."""
        ranks = Ranks.join(self.device)
        if job.kind == "measure":
            self._measure(job, ranks)
        elif job.variant in ALIGNED:
            self._align(job, ranks)
        else:
            self._tune(job, ranks)
        if ranks.is_first:
            self.layout.marker(job).touch()

    def _tune(self, job: Job, ranks: Ranks) -> None:
        recipe = sft.Recipe.load(self.layout.recipes / f"{job.variant}.toml")
        if job.variant == BASE:
            start = self.layout.out / "start"
            if ranks.is_first and not (start / "config.json").exists():
                init_model(find_folder(recipe.start), start, recipe.seed)
            ranks.wait()
            recipe = replace(recipe, start=str(start))
        else:
            start = self.layout.model(STARTS[job.variant], job.seed)
            recipe = replace(recipe, start=str(start), first_step=(1 + job.seed) * STEPS_APART)
        sft.run(recipe, self.layout.folder(job), ranks, self.layout.out / "latents")

    def _align(self, job: Job, ranks: Ranks) -> None:
        recipe = self._alignment(job)
        start = str(self.layout.model(STARTS[job.variant], job.seed))
        rga.run(replace(recipe, start=start, seed=recipe.seed + job.seed), self.layout.folder(job), ranks)

    def _alignment(self, job: Job) -> Recipe:
        recipe = Recipe.load(self.layout.recipes / "rga.toml")
        return replace(recipe, rollout=replace(recipe.rollout, shared_chain=job.variant == SHARED))

    def _measure(self, job: Job, ranks: Ranks) -> None:
        model = self.layout.model(job.variant, job.seed)
        recipe = self._alignment(job)
        found = measure(model, REASONING[job.variant], recipe, self.options, ranks.device)
        path = self.layout.measured(job.variant, job.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
