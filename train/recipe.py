"""A recipe of alignment: everything that decides a run, as a TOML file says it."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from realign.rewards.spec import parse_spec
from realign_kernels import AdvantageRule
from train.policy import PolicyOptions
from train.prompts import DataOptions
from train.rollouts import RolloutOptions, WindowOptions
from train.update import UpdateOptions

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Guards:
    """When a run stops by itself, because what it would learn is nothing.

    Attributes:
        ratio: how far the first ratios of an iteration may be from 1; None: not at all where they are exactly
            one (the rollout's packing, float32, a CPU), else a tenth of the clip range.
        spread: least mean standard deviation of rewards within groups.
        patience: iterations in a row with less, before the run stops.
    """

    ratio: float | None = None
    spread: float = 1e-6
    patience: int = 5


TABLES = {
    "data": DataOptions,
    "rollout": RolloutOptions,
    "window": WindowOptions,
    "policy": PolicyOptions,
    "update": UpdateOptions,
    "advantage": partial(AdvantageRule, clamp=5.0),
    "guards": Guards,
}


@dataclass(frozen=True)
class Recipe:
    """A run, whole.

    Attributes:
        start: the checkpoint folder to begin from, or "mini".
        reward: as `realign score` takes it.
        dtype: of the engine's weights; masters, trajectories and log-probs are float32 whatever it is.
    """

    start: str
    reward: str
    iterations: int
    data: DataOptions
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    window: WindowOptions = field(default_factory=WindowOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    advantage: AdvantageRule = field(default_factory=lambda: AdvantageRule(clamp=5.0))
    guards: Guards = field(default_factory=Guards)
    dtype: str = "float32"
    seed: int = 0
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        for name in ("iterations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least 1")
        parse_spec(self.reward)
        self.window.count_places(self.rollout.num_steps)
        if self.update.updates > self.rollout.num_samples:
            what = f"update updates is {self.update.updates}"
            raise ValueError(f"{what}: there are {self.rollout.num_samples} samples to share among them")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Reads a TOML recipe. Raises: ValueError, in one line, for one that cannot be run."""
        try:
            table = tomllib.loads(path.read_text())
            parts = {name: build(**_settle(table.pop(name, {}))) for name, build in TABLES.items()}
            return cls(**parts, **table)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a recipe: {error}") from None


def _settle(table: dict[str, Any]) -> dict[str, Any]:
    """Lists as the tuples that options have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(asdict(recipe)))


def check_same_recipe(saved: dict[str, Any], asked: Recipe, out: Path) -> None:
    """Raise ValueError, naming what differs, unless a run can go on under a recipe: it may be longer, and
    write checkpoints more or less often.
    """
    free = ("iterations", "checkpoint_every")
    wanted = describe_recipe(asked)
    names = sorted((saved.keys() | wanted.keys()) - set(free))
    differing = [name for name in names if saved.get(name) != wanted.get(name)]
    if differing:
        said = "; ".join(f"{name} was {saved.get(name)}, is {wanted.get(name)}" for name in differing)
        raise ValueError(
            f"{out} holds a run of another recipe ({said}): give another --out, or the same recipe"
        )
