"""What processes under a launcher do for `test_zero`: the same steps in every way to share, and runs.

python -m torch.distributed.run --nproc-per-node 2 -m tests.train.zero_job FOLDER
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.optimizer import AveragedAdamW, Optimizer
from train.ranks import Ranks
from train.recipe import Recipe
from train.rga import run
from train.zero import ScaleOptions, build_optimizer

WAYS = {
    "zero1": ScaleOptions(1),
    "zero2": ScaleOptions(2),
    "zero3": ScaleOptions(3),
    "zero2-offload": ScaleOptions(2, offload=True),
    "zero3-offload": ScaleOptions(3, offload=True),
}
SHAPES = {"wide": (5, 7), "one": (1,), "square": (4, 4), "three": (3,)}
PACKS = (3, 1, 2)  # of the first process, the second, and so on
CLIP = 0.5


class Toy:
    """As much of a policy as an optimiser needs."""

    def __init__(self) -> None:
        drawn = draw(0)
        self.masters = {name: nn.Parameter(tensor) for name, tensor in drawn.items()}
        self.leaves = self.masters
        self.read_masters: Callable[[], Iterable[Mapping[str, Tensor]]] = lambda: [self.masters]

    def shard(self, read_masters: Callable[[], Iterable[Mapping[str, Tensor]]]) -> None:
        self.read_masters = read_masters
        self.masters = {name: nn.Parameter(leaf.detach().clone()) for name, leaf in self.leaves.items()}

    def read(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for piece in self.read_masters() for name, t in piece.items()}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def build(scale: ScaleOptions, ranks: Ranks) -> tuple[Toy, Optimizer]:
    toy = Toy()
    return toy, build_optimizer(toy, build_adamw, CLIP, ranks, scale)


def build_adamw(masters: Sequence[Tensor]) -> AveragedAdamW:
    """With a group of its own for a tensor, which never has a gradient: it decays, at half the rate."""
    place = list(SHAPES).index("one")
    groups = [
        {"params": [*masters[:place], *masters[place + 1 :]]},
        {"params": [masters[place]], "share": 0.5},
    ]
    return AveragedAdamW(groups, has_average=True, lr=1.0, betas=(0.8, 0.95), weight_decay=0.1)


def take_steps(toy: Toy, optimizer: Optimizer, numbers: Iterable[int], own: Iterable[int]) -> list[float]:
    """Steps of these numbers from the packs of some processes; the norms. Step 2 has no gradient, in all one
    group has none, and in one a tensor of the other. The last is so large that it is clipped.
    """
    norms = []
    for number in numbers:
        for rank in own:
            for pack in range(PACKS[rank]):
                for name, gradient in draw(100 * number + 10 * rank + pack + 1).items():
                    if name != "one" and (name, number) != ("three", 1):
                        factor = 0.0 if number == 2 else 0.01 * 10**number
                        leaf = toy.leaves[name]
                        leaf.grad = factor * gradient + (0 if leaf.grad is None else leaf.grad)
                optimizer.collect()
        norms.append(optimizer.step(rate=0.1 * (number + 1), decay=0.5))
    return norms


def collect(toy: Toy, optimizer: Optimizer, norms: list[float]) -> dict[str, Tensor]:
    """All that can be seen of an optimiser."""
    averages = {name: tensor for piece in optimizer.averages() for name, tensor in piece.items()}
    found = {f"read.{name}": tensor for name, tensor in toy.read().items()}
    found |= {f"averages.{name}": tensor.detach() for name, tensor in averages.items()}
    return {**found, **optimizer.tensors(), "norms": torch.tensor(norms)}


def try_infinite(toy: Toy, optimizer: Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """A step by a gradient that is not finite in one process: its norm, and how many numbers it changed."""
    before = toy.read()
    value = math.inf if ranks.rank else 1.0
    toy.leaves["wide"].grad = torch.full_like(toy.leaves["wide"], value)
    optimizer.collect()
    norm = torch.tensor(optimizer.step(rate=1.0, decay=0.5))
    changed = sum(int((before[name] != tensor).sum()) for name, tensor in toy.read().items())
    return {"infinite.norm": norm, "infinite.changed": torch.tensor(changed)}


def count_held(toy: Toy, optimizer: Optimizer) -> dict[str, Tensor]:
    """Numbers that this process holds: of moments and average, of masters."""
    states = optimizer.adamw.state.values()
    moments = sum(t.numel() for state in states for name, t in state.items() if name != "step")
    counts = {
        "moments": moments,
        "masters": sum(master.numel() for master in toy.masters.values()),
        "whole": sum(leaf.numel() for leaf in toy.leaves.values()),
    }
    return {name: torch.tensor(count) for name, count in counts.items()}


def main(folder: Path) -> None:
    ranks = Ranks.join("cpu")
    for name, scale in WAYS.items():
        toy, optimizer = build(scale, ranks)
        found = collect(toy, optimizer, take_steps(toy, optimizer, range(4), [ranks.rank]))
        found |= count_held(toy, optimizer)
        toy, optimizer = build(scale, ranks)
        optimizer.load(load_file(folder / "start.safetensors"))
        again = collect(toy, optimizer, take_steps(toy, optimizer, range(2, 4), [ranks.rank]))
        found |= {f"again.{key}": value for key, value in again.items()}
        found |= try_infinite(toy, optimizer, ranks)
        copies = {key: tensor.detach().clone() for key, tensor in found.items()}
        save_file(copies, folder / f"{name}-{ranks.rank}.safetensors")
    for path in sorted(folder.glob("recipes/*.toml")):
        run(Recipe.load(path), folder / path.stem, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
