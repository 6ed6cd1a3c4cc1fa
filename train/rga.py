"""Reasoning-generation alignment: GRPO on the flow, samples rewarded for what their own reasoning says.

    python -m train.rga train/recipes/mini-rga.toml --out runs/mini-rga

Each iteration: prompts times G rollouts through the runtime, rewards, advantages within the groups, updates
by replay of the recorded steps, the new weights published into the engine (Re-Align, arXiv 2601.05124;
Flow-GRPO, arXiv 2505.05470). Everything random is a function of (seed, iteration), so a run that was killed
goes on from its last checkpoint and ends with the weights it would have had.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.rewards.base import RewardError, WeightedSum
from realign.rewards.spec import build_reward
from realign.runtime.budget import is_out_of_memory
from realign.runtime.engine import Engine
from realign_kernels import group_advantage
from train.command import build_parser, load_recipe
from train.measure import (
    Clock,
    measure_chains,
    measure_memory,
    measure_pace,
    measure_spreads,
    measure_updates,
)
from train.policy import build_policy
from train.prompts import build_source
from train.ranks import Ranks
from train.recipe import Recipe, check_same_recipe, describe_recipe
from train.replay import Entry, Replayer, list_entries
from train.rollouts import Roller, Rollout, cut_parts, score
from train.state import load_state, save_state
from train.text import TextTrainer, TrainedText, measure_texts
from train.update import Stopped, UpdateNumbers, Updater
from train.watch import Watch

LESS_MEMORY = "lower rollout.batch_size (also the rows of a replay), or take policy.checkpointing = true"
CLIP_SHARE = 0.1  # of the clip range: how far a replay that is not exact may be off


class Aligner:
    """A run of a recipe; `iterate` is one iteration.

    Args:
        model: what to begin from, if it is not the recipe's `start`.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, model: Bagel | None = None) -> None:
        self.recipe, self.ranks = recipe, ranks
        source = build_source(recipe.data, recipe.seed)
        self.reward: WeightedSum = build_reward(recipe.reward, ranks.device)
        if model is None:  # last, as it takes longest, and what is wrong with others is said before
            model = Bagel.from_pretrained(recipe.start, ranks.device, getattr(torch, recipe.dtype))
        self.engine = Engine(model, PROGRAMS, record=True)
        self.roller = Roller(self.engine, source, recipe.rollout, recipe.window, recipe.seed)
        text = recipe.text
        has_pull = recipe.update.kl_beta > 0 or (text is not None and text.kl_beta > 0)
        self.policy = build_policy(self.engine, recipe.policy, has_pull, recipe.seed, text is not None)
        self.text = None
        if text is not None:
            self.text = TextTrainer(self.policy, text, recipe.rollout, recipe.advantage, ranks)
        replayer = Replayer(self.engine, recipe.update.through_contexts)
        self.updater = Updater(self.policy, replayer, recipe.update, ranks, recipe.scale, self.text)
        self.num_done = 0
        self.num_collapsed = 0

    def iterate(self) -> dict[str, Any]:
        """One iteration. Returns: its row of the log. Raises: Stopped, RewardError."""
        clock = Clock()
        numbers = cut_parts(self.recipe.rollout, self.recipe.update.updates, self.ranks)
        with clock.phase("rollout"):
            parts = [self.roller.roll(self.num_done, part) for part in numbers]
        with clock.phase("reward"):
            advantages, row = self._judge([rollout for part in parts for rollout in part])
        entries = _list_entries(parts)
        references = {}
        if self.recipe.update.kl_beta:
            with clock.phase("reference"):
                references = self.updater.find_references([entry for part in entries for entry in part])
        texts: list[list[TrainedText]] = [[] for _ in parts]
        if self.text is not None:
            with clock.phase("text"):
                texts, text_row = self.text.prepare(parts)
            row |= text_row
        with clock.phase("update"):
            made = self._update(entries, advantages, references, texts)
        self.num_done += 1
        row |= measure_updates(made, self.recipe.update.clip_low, self.recipe.update.clip_high)
        if self.text is not None:
            row |= measure_texts([one.text_T2 for one in made], self.text.options)
        row["lr"] = self.recipe.update.rate(self.updater.num_done - 1)
        row |= measure_pace(clock.seconds, self.recipe.rollout.num_samples) | measure_memory(self.ranks)
        seconds = {name: round(value, 3) for name, value in clock.seconds.items()}
        return {"step": self.num_done, **row, "seconds": seconds}

    def _judge(self, rollouts: Sequence[Rollout]) -> tuple[list[float], dict[str, Any]]:
        """The advantages of this process's rollouts, and what the log says of all."""
        rewards_NR = self.ranks.gather(score(self.reward, rollouts))
        group_N = self.ranks.gather(torch.tensor([rollout.group for rollout in rollouts], dtype=torch.int64))
        if not bool(rewards_NR.isfinite().all()):
            raise Stopped(f"reward: {int((~rewards_NR.isfinite()).sum())} numbers are not finite: mend it")
        weights_R = torch.tensor([weight for _, weight in self.reward.terms], dtype=torch.float32)
        num_groups = self.recipe.rollout.prompts
        found = group_advantage(rewards_NR, group_N, num_groups, weights_R, self.recipe.advantage)
        total_N = rewards_NR @ weights_R
        spread = float(measure_spreads(total_N, group_N, num_groups).mean())
        self._watch_spread(spread)
        row: dict[str, Any] = {"reward": float(total_N.mean()), "spread": spread}
        if len(self.reward.terms) > 1:
            names = [term.name for term, _ in self.reward.terms]
            row["rewards"] = dict(zip(names, rewards_NR.mean(0).tolist(), strict=True))
        row["degenerate"] = float(found.is_degenerate_G.float().mean())
        row |= measure_chains(rollouts, self.ranks)
        return self._take_own(found.advantage_N, len(rollouts)), row

    def _take_own(self, advantage_N: torch.Tensor, count: int) -> list[float]:
        """This process's, of all that were gathered in the order of the processes."""
        counts = self.ranks.gather(torch.tensor([count])).tolist()
        start = sum(counts[: self.ranks.rank])
        return advantage_N[start : start + count].tolist()

    def _update(
        self,
        entries: Sequence[Sequence[Entry]],
        advantages: Sequence[float],
        references: dict[int, torch.Tensor],
        texts: Sequence[Sequence[TrainedText]],
    ) -> list[UpdateNumbers]:
        """All updates of an iteration."""
        made = []
        for _ in range(self.recipe.update.epochs):
            for part, own_texts in zip(entries, texts, strict=True):
                made.append(self.updater.update(part, advantages, references, own_texts))
                if len(made) == 1:
                    self._check_ratio(made[0])
        return made

    def _check_ratio(self, first: UpdateNumbers) -> None:
        """The weights were those of the rollout: the ratio has to be one."""
        update = self.recipe.update
        is_plain = self.recipe.dtype == "float32" and self.engine.model.device.type == "cpu"
        ratios = [("", first.ratio_N, update, is_plain and update.packing == "rollout")]
        if first.text_T2 is not None:
            ratios.append(("text ", first.text_T2[:, 0], self.recipe.text, is_plain))
        for name, ratio_N, options, is_exact in ratios:
            bound = self.recipe.guards.ratio
            if bound is None:
                bound = 0.0 if is_exact else CLIP_SHARE * min(options.clip_low, options.clip_high)
            error = float((ratio_N - 1).abs().max())
            if not error <= bound:
                what = f"the first {name}ratio of iteration {self.num_done + 1} is off one by {error:.3g}"
                raise Stopped(f"{what}, more than {bound:.3g}: replay and rollout do not compute the same")

    def _watch_spread(self, spread: float) -> None:
        guards = self.recipe.guards
        self.num_collapsed = self.num_collapsed + 1 if spread < guards.spread else 0
        if self.num_collapsed >= guards.patience:
            what = (
                f"rewards within groups were equal for {self.num_collapsed} iterations (spread {spread:.3g})"
            )
            raise Stopped(f"{what}: there is nothing to learn from; look at the samples and the reward")

    def save(self, out: Path) -> None:
        """Everything that the next iteration needs, atomically, under out/checkpoints; of all processes."""
        tensors = self.updater.optimizer.tensors()
        numbers = {"recipe": describe_recipe(self.recipe), "collapsed": self.num_collapsed}
        numbers["prompts"] = self.roller.source.fingerprint
        if self.ranks.is_first:
            numbers["updates"] = self.updater.num_done
            save_state(out / "checkpoints", self.num_done, tensors, numbers)

    @torch.no_grad()
    def restore(self, out: Path) -> None:
        """Goes back to the newest whole checkpoint, if there is one.

        Raises:
            ValueError: it was made by another recipe, or of other prompts.
        """
        state = load_state(out / "checkpoints")
        if state is None:
            return
        tensors, numbers = state
        check_same_recipe(numbers["recipe"], self.recipe, out)
        if numbers["prompts"] != self.roller.source.fingerprint:
            what = f"{self.recipe.data.prompts} has changed since the run in {out} was begun"
            raise ValueError(f"{what}: give another --out, or the file as it was")
        self.updater.optimizer.load(tensors)
        self.num_done, self.num_collapsed = numbers["step"], numbers["collapsed"]
        self.updater.num_done = numbers["updates"]
        self.policy.publish()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While the engine runs on the averaged weights."""
        self.policy.publish(self.updater.optimizer.averages())
        try:
            yield
        finally:
            self.policy.publish()

    def save_model(self, folder: Path) -> None:
        """Writes the weights that the engine runs on, adapters merged, as a checkpoint that `realign.load`
        reads; the folder is whole or absent.
        """
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        self.engine.model.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def _list_entries(parts: Sequence[Sequence[Rollout]]) -> list[list[Entry]]:
    """The entries of each part, their samples numbered through."""
    entries, start = [], 0
    for part in parts:
        own = list_entries([rollout.sample for rollout in part])
        entries.append([replace(entry, number=start + entry.number) for entry in own])
        start += len(part)
    return entries


def run(recipe: Recipe, out: Path, ranks: Ranks) -> None:
    """Aligns to the recipe's last iteration, going on from the newest checkpoint; exports to out/model."""
    aligner = Aligner(recipe, ranks)
    aligner.restore(out)
    with Watch(aligner, out) as watch:
        watch.evaluate_if_due()
        watch.progress.begin()
        while aligner.num_done < recipe.iterations:
            watch.add_row(aligner.iterate())
            is_last = aligner.num_done == recipe.iterations
            if is_last or aligner.num_done % recipe.checkpoint_every == 0:
                aligner.save(out)
            watch.evaluate_if_due()
    with aligner.averaged():
        if ranks.is_first:
            aligner.save_model(out / "model")


def main() -> None:
    """Command line."""
    parser = build_parser(__doc__)
    args = parser.parse_args()
    try:
        ranks = Ranks.join(args.device)
        recipe = load_recipe(args)
        recipe.check_spread(ranks)
        run(recipe, args.out, ranks)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, RewardError) as error:
        sys.exit(f"stopped: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"stopped: memory ran out; {LESS_MEMORY}, and run the same command again")
    except (OSError, SafetensorError) as error:
        sys.exit(
            f"stopped: {args.out} cannot be written to ({error}); mend that and run the same command again"
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
