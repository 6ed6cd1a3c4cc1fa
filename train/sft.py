"""Supervised fine-tuning: next-token cross-entropy and rectified-flow matching on packed interleaved samples.

    python -m train.sft train/recipes/mini-1.toml --out runs/mini-1
    torchrun --nproc-per-node 2 -m train.sft train/recipes/mini-1.toml --out runs/mini-1

BAGEL's recipe (2505.14683, section 4): a packed sequence of text, ViT, clean and noised latent tokens, both
losses at once. Everything random is a function of (seed, step, slot), and the losses are means over the whole
step, so the weights do not depend on where a run was killed, and on the number of processes only by rounding.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from realign.data.packing import Packer
from realign.model.bagel import Bagel
from realign.model.mot import MoTLayer
from realign.model.training import PackedBatch, packed_losses
from train.ranks import Ranks
from train.state import (
    append_row,
    drop_rows_after,
    load_optimizer_tensors,
    load_state,
    optimizer_tensors,
    save_state,
)
from train.world_data import LatentPool, Mixture, WorldData

PACK_MULTIPLE = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Optimization:
    """AdamW, its schedule (linear warm-up, constant, linear decay to zero at the end) and the average."""

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    decay_fraction: float = 0.4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    ce_weight: float = 0.2
    mse_weight: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        decay_steps = max(1, round(self.decay_fraction * self.steps))
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * min(1.0, (self.steps - step) / decay_steps)

    def average(self, step: int) -> float:
        """The decay of the moving average after a step: short at first, as nothing is worth keeping yet."""
        return min(self.ema_decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Recipe:
    """A run, whole. `start` is the checkpoint folder to begin from (configs and tokenizer, with or without
    weights).

    `precision` 'bfloat16' is autocast: weights, moments and the average stay float32. `compile` fuses what a
    layer does before and after attention (torch.compile: some 20 s to begin with, then a fifth off every
    step on a CPU). `first_step` is where in the endless data a run begins: another gives other samples of the
    same scenes.
    """

    start: str
    optimization: Optimization
    mixture: Mixture
    precision: str = "bfloat16"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    first_step: int = 0

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Reads a TOML recipe.

        Raises:
            ValueError: no such file, not TOML, or a field that is unknown, missing or of no use.
        """
        try:
            table = tomllib.loads(path.read_text())
            optimization = Optimization(**table.pop("optimization"))
            mixture = Mixture(**table.pop("mixture"))
            recipe = cls(optimization=optimization, mixture=mixture, **table)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a recipe: {error}") from None
        if recipe.precision not in DTYPES:
            raise ValueError(f"{path}: precision is {recipe.precision!r}; choose float32 or bfloat16")
        return recipe


class Trainer:
    """Model, optimiser and moving average; `step` is one optimiser step."""

    def __init__(self, model: Bagel, recipe: Recipe, ranks: Ranks) -> None:
        self.model, self.recipe, self.ranks = model, recipe, ranks
        model.autoencoder.requires_grad_(False)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = {id(p): n for n, p in named}
        self.parameters = [p for _, p in named]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = self._build_optimizer()
        self.steps_done = 0

    def _build_optimizer(self) -> torch.optim.AdamW:
        o = self.recipe.optimization
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": o.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=o.learning_rate, betas=tuple(o.betas), fused=True)

    def step(self, batch: PackedBatch) -> dict[str, float]:
        """One optimiser step on this process's share of the samples. Returns: the step's losses and norms."""
        o = self.recipe.optimization
        for group in self.optimizer.param_groups:
            group["lr"] = o.rate(self.steps_done)
        batch = batch.to(self.model.device)
        num_losses = [len(batch.ce_index), len(batch.mse_index)]
        counts = self.ranks.sum(torch.tensor(num_losses, dtype=torch.float64, device=self.model.device))
        with self._precision():
            losses = packed_losses(self.model, batch)
        ce = losses.ce.sum() / counts[0].clamp(min=1).float()
        mse = losses.mse.mean(-1).sum() / counts[1].clamp(min=1).float()
        (o.ce_weight * ce + o.mse_weight * mse).backward()
        self._sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        torch._foreach_lerp_(self.average, self.parameters, 1 - o.average(self.steps_done))
        shared = self.ranks.sum(torch.stack([ce.detach(), mse.detach()]))
        return {
            "ce": float(shared[0]),
            "mse": float(shared[1]),
            "grad_norm": float(norm),
            "lr": o.rate(self.steps_done - 1),
        }

    def _precision(self) -> AbstractContextManager:
        dtype = DTYPES[self.recipe.precision]
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.parameters[0].device.type, dtype)

    def _sum_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks.size > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters])
            self.ranks.sum(flat)
            pieces = flat.split([p.numel() for p in self.parameters])
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                parameter.grad.copy_(piece.view_as(parameter))

    def save(self, out: Path) -> None:
        """Everything that the next step needs, atomically, under out/checkpoints."""
        tensors = {f"model.{self.names[id(p)]}": p for p in self.parameters}
        tensors |= {
            f"average.{self.names[id(p)]}": a for p, a in zip(self.parameters, self.average, strict=True)
        }
        tensors |= optimizer_tensors(self.optimizer, self.names)
        save_state(out / "checkpoints", self.steps_done, tensors, {"recipe": asdict(self.recipe)})

    @torch.no_grad()
    def restore(self, out: Path) -> None:
        """Goes back to the newest whole checkpoint, if there is one.

        Raises:
            ValueError: it was made by another recipe.
        """
        state = load_state(out / "checkpoints")
        if state is None:
            return
        tensors, numbers = state
        check_same_recipe(numbers["recipe"], self.recipe, numbers["step"], out)
        for parameter, average in zip(self.parameters, self.average, strict=True):
            name = self.names[id(parameter)]
            parameter.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"average.{name}"])
        load_optimizer_tensors(self.optimizer, self.names, tensors)
        self.steps_done = numbers["step"]

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes the averaged weights as a checkpoint that `realign.load` reads."""
        live = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        self.model.save_pretrained(folder)
        torch._foreach_copy_(self.parameters, live)


def check_same_recipe(saved: dict[str, Any], asked: Recipe, steps_done: int, out: Path) -> None:
    """Checks that a run can go on under a recipe: its length and decay may differ, before that decay
    has begun.

    Raises:
        ValueError: naming what differs.
    """
    wanted = json.loads(json.dumps(asdict(asked)))
    before = Optimization(**saved["optimization"])
    if all(before.rate(step) == asked.optimization.rate(step) for step in range(steps_done)):
        schedule = {name: wanted["optimization"][name] for name in ("steps", "decay_fraction")}
        saved = {**saved, "optimization": {**saved["optimization"], **schedule}}
    differing = [k for k in sorted(saved.keys() | wanted.keys()) if saved.get(k) != wanted.get(k)]
    if differing:
        said = "; ".join(f"{k} was {saved.get(k)}, is {wanted.get(k)}" for k in differing)
        raise ValueError(
            f"{out} holds a run of another recipe ({said}): give another --out, or the same recipe"
        )


def run(recipe: Recipe, out: Path, ranks: Ranks, latents: Path | None = None) -> None:
    """Trains to the recipe's last step, going on from the newest checkpoint, and exports to out/model.

    Args:
        latents: where the scenes' latents are, or will be; None: out/latents.
    """
    torch.manual_seed(recipe.seed)
    model = Bagel.from_pretrained(recipe.start, device=ranks.device).train()
    pool = build_pool(model, recipe, out / "latents" if latents is None else latents, ranks)
    data = WorldData(model, recipe.mixture, pool, recipe.seed)
    packer = Packer(model.tokenizer, model.config.vit.patch_dim, model.config.latent_dim)
    trainer = Trainer(model, recipe, ranks)
    trainer.restore(out)
    if recipe.compile:
        compile_layers()
    steps = recipe.optimization.steps
    with Log(out / "log.jsonl", steps, trainer.steps_done, is_shown=ranks.rank == 0) as log:
        while trainer.steps_done < steps:
            number = recipe.first_step + trainer.steps_done
            batch = packer.pack(data.step_samples(number, ranks.rank, ranks.size), PACK_MULTIPLE)
            numbers = trainer.step(batch)
            done = trainer.steps_done
            log.advance(
                done, numbers, len(data.kinds), is_written=done % recipe.log_every == 0 or done == steps
            )
            if ranks.rank == 0 and (done % recipe.checkpoint_every == 0 or done == steps):
                trainer.save(out)
    if ranks.rank == 0:
        trainer.export(out / "model")


def compile_layers() -> None:
    """Compiles the two halves of a layer, once for all layers, whatever the number of tokens."""
    for half in ("project", "finish"):
        setattr(MoTLayer, half, torch.compile(getattr(MoTLayer, half), dynamic=True))


def build_pool(model: Bagel, recipe: Recipe, folder: Path, ranks: Ranks) -> LatentPool:
    """The scenes' latents; the first process encodes them, the others wait."""
    if ranks.rank == 0:
        LatentPool(folder, model, recipe.mixture.num_scenes, recipe.seed)
    ranks.wait()
    return LatentPool(folder, model, recipe.mixture.num_scenes, recipe.seed)


class Log:
    """JSONL rows on disk, and a progress bar with loss and samples per second."""

    def __init__(self, path: Path, total: int, done: int, is_shown: bool) -> None:
        self.path, self.is_shown = path, is_shown
        if is_shown:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(path, done)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, disable=not is_shown)
        self.task = self.progress.add_task("training", total=total, completed=done)
        self.began, self.samples = time.perf_counter(), 0

    def __enter__(self) -> Log:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, step: int, numbers: dict[str, float], samples: int, is_written: bool) -> None:
        """One step further: `samples` more were seen; `numbers` are the step's, for a row if `is_written`."""
        self.samples += samples
        if not (self.is_shown and is_written):
            return
        seconds = time.perf_counter() - self.began
        rate = self.samples / seconds
        self.began, self.samples = time.perf_counter(), 0
        append_row(self.path, {"step": step, **numbers, "samples_per_second": round(rate, 1)})
        said = f"mse {numbers['mse']:.4f} ce {numbers['ce']:.4f}  {rate:.0f} samples/s"
        self.progress.update(self.task, completed=step, description=said)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="another number of steps than the recipe's")
    parser.add_argument(
        "--device", default="auto", help="such as cpu or cuda (default: cuda where there is one)"
    )
    args = parser.parse_args()
    try:
        ranks = Ranks.join(args.device)
        recipe = Recipe.load(args.recipe)
        if args.steps is not None:
            recipe = replace(recipe, optimization=replace(recipe.optimization, steps=args.steps))
        run(recipe, args.out, ranks)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
