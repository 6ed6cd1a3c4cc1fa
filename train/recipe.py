"""A recipe of alignment: everything that decides a run, as a TOML file says it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from realign.rewards.spec import parse_spec
from realign_kernels import AdvantageRule, group_advantage
from train.evaluation import EvaluationOptions
from train.policy import PolicyOptions
from train.prompts import DataOptions
from train.ranks import Ranks
from train.rollouts import RolloutOptions, WindowOptions
from train.text import TextOptions, check_text
from train.update import UpdateOptions
from train.zero import ScaleOptions

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

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.ratio >= 0:
            raise ValueError(f"guards ratio is {self.ratio}: must be 0 or more")
        if not self.spread >= 0:
            raise ValueError(f"guards spread is {self.spread}: must be 0 or more; 0 never stops a run")
        if self.patience < 1:
            raise ValueError(f"guards patience is {self.patience}: must be at least 1")


TABLES: dict[str, type] = {
    "data": DataOptions,
    "rollout": RolloutOptions,
    "window": WindowOptions,
    "policy": PolicyOptions,
    "update": UpdateOptions,
    "advantage": AdvantageRule,
    "guards": Guards,
    "text": TextOptions,
    "evaluation": EvaluationOptions,
    "scale": ScaleOptions,
}
OPTIONAL = ("text", "evaluation")  # a table that is not there is not meant


@dataclass(frozen=True)
class Recipe:
    """A run, whole.

    Attributes:
        start: the checkpoint folder to begin from, or "mini".
        reward: as `realign score` takes it.
        dtype: of the engine's weights; masters, trajectories and log-probs are float32 whatever it is.
        text: the policy gradient of what the model writes; None: only pictures are trained.
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
    text: TextOptions | None = None
    evaluation: EvaluationOptions | None = None
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    dtype: str = "float32"
    seed: int = 0
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        for name in ("iterations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: must be 0 or more")
        parse_spec(self.reward)
        group_advantage(
            torch.zeros(1), torch.zeros(1, dtype=torch.int64), 1, rule=self.advantage
        )  # checks it
        self.window.count_places(self.rollout.num_steps)
        if self.evaluation is not None:
            self.evaluation.find_data(self.data)
            self.evaluation.settings(self.rollout)
        if self.update.updates > self.rollout.num_samples:
            what = f"update updates is {self.update.updates}"
            raise ValueError(f"{what}: there are {self.rollout.num_samples} samples to share among them")
        if self.text is not None:
            check_text(self.text, self.rollout)

    def check_spread(self, ranks: Ranks) -> None:
        """Raise ValueError, before anything is loaded, unless these processes can run this together."""
        self.scale.check(ranks)
        least = self.rollout.num_samples // self.update.updates
        if least < ranks.size:
            what = f"rollout has {self.rollout.num_samples} samples for {self.update.updates} updates"
            raise ValueError(f"{what}: {ranks.size} processes need one each; raise prompts or group")

    @classmethod
    def load(cls, path: Path, changes: Sequence[str] = ()) -> Recipe:
        """Reads a TOML recipe, changed as `change_table` does. Raises: ValueError, in one line, for one that
        cannot be run.
        """
        try:
            table = tomllib.loads(path.read_text())
            for change in changes:
                change_table(table, change)
            if isinstance(table.setdefault("advantage", {}), dict):
                table["advantage"].setdefault("clamp", 5.0)
            meant = {n: kind for n, kind in TABLES.items() if n in table or n not in OPTIONAL}
            parts = {name: _build(kind, name, table.pop(name, {})) for name, kind in meant.items()}
            return _build(cls, "recipe", {**table, **parts})
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a recipe: {error}") from None


def change_table(table: dict[str, Any], change: str) -> None:
    """Sets one value of a recipe: `seed=1`, `update.learning_rate=1e-5`, `data={prompts="mine.jsonl"}`. What
    is no TOML is text, such as a path without quotes.

    Raises: ValueError for what is no such thing.
    """
    name, equals, text = change.partition("=")
    *parents, key = name.strip().split(".")
    if not equals or not key or len(parents) > 1:
        raise ValueError(f"{change!r} is no change: must be NAME=VALUE or TABLE.NAME=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ValueError(f"{change!r} is no change: {parent} is no table")
    table[key] = value


# By the annotation of a field; those of other kinds are checked where they are used.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "str | None": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "int | None": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float), "a number"),
    "tuple[float, float]": ((list,), "two numbers"),
    "tuple[float, float] | None": ((list,), "two numbers"),
    "tuple[str, ...]": ((list,), "a list of texts"),
}


def _build(kind: type, name: str, table: Any) -> Any:
    """Options of a table of TOML; lists become the tuples that options have."""
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {table!r}: must be a table")
    known = {field.name: field for field in fields(kind)}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{name} has {key!r}: the names are {', '.join(known)}")
        types, what = KINDS.get(known[key].type, ((object,), ""))
        if not _is_of_kind(value, types) or (isinstance(value, list) and not _are_items(value, what)):
            raise ValueError(f"{name} {key} is {value!r}: must be {what}")
    missing = [key for key, field in known.items() if key not in table and _is_required(field)]
    if missing:
        raise ValueError(f"{name} has no {missing[0]!r}: give it")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def _is_of_kind(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not (isinstance(value, bool) and int in types)


def _are_items(values: list[Any], what: str) -> bool:
    """Whether a list holds what an option's does."""
    if what == "two numbers":
        return len(values) == 2 and all(_is_of_kind(value, (int, float)) for value in values)
    return all(isinstance(value, str) for value in values)


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(asdict(recipe)))


FREE = ("iterations", "checkpoint_every", "scale", "evaluation")
# Of a table: how much is computed together.
FREE_OPTIONS = {
    "rollout": ("batch_size",),
    "policy": ("checkpointing",),
    "update": ("packing", "micro_batch"),
    "text": ("micro_batch",),
}


def _leave_out_free(described: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what may change while it runs."""
    kept = {name: value for name, value in described.items() if name not in FREE}
    for name, free in FREE_OPTIONS.items():
        if kept.get(name) is not None:
            kept[name] = {key: value for key, value in kept[name].items() if key not in free}
    return kept


def check_same_recipe(saved: dict[str, Any], asked: Recipe, out: Path) -> None:
    """Raise ValueError, naming what differs, unless a run can go on under a recipe: it may be longer, write
    checkpoints more or less often, be spread otherwise, begin or cease to be evaluated (how it is,
    `train.pages` holds on to), and take less memory (`FREE_OPTIONS`; results differ in their last bits then).
    """
    saved, wanted = _leave_out_free(saved), _leave_out_free(describe_recipe(asked))
    names = sorted(saved.keys() | wanted.keys())
    differing = [name for name in names if saved.get(name) != wanted.get(name)]
    if differing:
        said = "; ".join(f"{name} was {saved.get(name)}, is {wanted.get(name)}" for name in differing)
        raise ValueError(
            f"{out} holds a run of another recipe ({said}): give another --out, or the same recipe"
        )
