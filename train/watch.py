"""What people watch of a run: its log, its progress, and held-out evaluations with their pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from realign.rewards.spec import build_reward
from realign.runtime.settings import Settings
from train.evaluation import Evaluation, EvaluationOptions, Evaluator
from train.journal import Journal, load_rows
from train.pages import Pages
from train.progress import Progress
from train.recipe import Recipe, describe_recipe

if TYPE_CHECKING:
    from train.rga import Aligner

BEST = "best"


class Watch:
    """Writes down what a run does; a context manager. The weights that training makes do not depend on it.

    Every process has one, as evaluations are spread over them; the first alone writes and speaks.
    """

    def __init__(self, aligner: Aligner, out: Path) -> None:
        recipe, ranks = aligner.recipe, aligner.ranks
        self.aligner, self.recipe, self.ranks, self.out = aligner, recipe, ranks, out
        self.evaluator = None if recipe.evaluation is None else build_evaluator(aligner, recipe.evaluation)
        self.journal = self.pages = None
        if ranks.is_first:
            self.journal = Journal(out, aligner.num_done)
            self.journal.add_recipe(describe_recipe(recipe))
            if self.evaluator is not None:
                self.pages = Pages(out, _describe_run(recipe, self.evaluator))
        self.progress = Progress(recipe.iterations, aligner.num_done, ranks.is_first)

    def __enter__(self) -> Watch:
        self.progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.__exit__()
        if self.journal is not None:
            self.journal.close()

    def add_row(self, row: dict[str, Any]) -> None:
        """An iteration is done."""
        self.progress.advance(row)
        if self.journal is not None:
            self.journal.add_row(row)

    def evaluate_if_due(self) -> None:
        """Measures the averaged weights of now, unless that is not due, or was done before a restart."""
        if self.evaluator is None or not self._is_due():
            return
        with self.aligner.averaged():
            evaluation = self.evaluator.evaluate()
            if self.ranks.is_first:
                self._write(evaluation)

    def _is_due(self) -> bool:
        """The same in every process: the first one knows what is there."""
        step = self.aligner.num_done
        if step % self.recipe.evaluation.every and step != self.recipe.iterations:
            return False
        is_there = self.journal is not None and self.journal.has_evaluation(step)
        return not float(self.ranks.sum(torch.tensor(float(is_there), device=self.ranks.device)))

    def _write(self, evaluation: Evaluation) -> None:
        """The row last: until it is there, the evaluation is made again after a kill."""
        before = load_rows(self.journal.evaluations)
        base = self.pages.load_rewards(before[0]["step"]) if before else None
        row = {"step": self.aligner.num_done, **evaluation.describe(base)}
        if before and row["reward"] > max(other["reward"] for other in before):
            self.aligner.save_model(self.out / BEST)
        self.pages.write(evaluation, row)
        is_same = self.recipe.evaluation.reward in (None, self.recipe.reward)
        self.pages.write_index([*before, row], load_rows(self.journal.log) if is_same else [])
        self.journal.add_evaluation(row, _list_pictures(evaluation))
        gain = f", {row['gain']:+.4f} ± {row['gain_se']:.4f} since the start" if base else ""
        said = f"held-out reward {row['reward']:.4f} ± {row['se']:.4f}{gain}"
        self.progress.say(f"evaluation at {row['step']}: {said}; {self.pages.folder / 'index.html'}")


def build_evaluator(aligner: Aligner, options: EvaluationOptions) -> Evaluator:
    """Of a run's engine, by its reward unless the options name another."""
    recipe, ranks = aligner.recipe, aligner.ranks
    reward = aligner.reward if options.reward is None else build_reward(options.reward, ranks.device)
    return Evaluator(aligner.engine, reward, options, (recipe.data, recipe.rollout), ranks)


def _describe_run(recipe: Recipe, evaluator: Evaluator) -> dict[str, Any]:
    """What the pages say, and what evaluations of a run have in common."""
    options, settings = evaluator.options, evaluator.settings
    data = options.find_data(recipe.data)
    return {
        "model": {"name": recipe.start},
        "settings": {
            "reward": evaluator.reward.name,
            **_describe_settings(settings),
            "seed": options.seed,
            "prompts": data.prompts or f"{', '.join(data.tasks)} of {data.split}",
            "num_prompts": len(evaluator.items),
            "samples": options.samples,
        },
    }


def _describe_settings(settings: Settings) -> dict[str, Any]:
    """Under the names that `realign generate` gives them."""
    guidance = settings.guidance
    return {
        "reasoning": settings.reasoning,
        "steps": settings.num_timesteps,
        "timestep_shift": settings.timestep_shift,
        "text_guidance_scale": guidance.text_scale,
        "image_guidance_scale": guidance.image_scale,
        "guidance_interval": list(guidance.interval),
        "temperature": settings.text.temperature,
        "size": [settings.height, settings.width],
    }


def _list_pictures(evaluation: Evaluation) -> dict[str, Any]:
    """Those that are shown, by prompt and number."""
    shown = [judged for judged in evaluation.judged if judged.shown is not None]
    return {"/".join(map(str, evaluation.name(judged))): judged.shown.picture for judged in shown}
