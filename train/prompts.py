"""What alignment draws its prompts from: a prompt file, or the procedural world."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from realign.data.images import load_picture
from realign.data.readers import PictureEntry, TextEntry, load_references, read_prompts
from realign.evals.world import build_request
from realign.runtime.request import ImagePart, Prompt, TextPart
from realign.runtime.settings import Settings
from realign.world.instructions import Instruction
from realign.world.scene import SPLITS
from realign.world.tasks import TASKS, sample


@dataclass(frozen=True)
class DataOptions:
    """Either a file of prompts or tasks of the world.

    Attributes:
        prompts: a file that `realign generate` reads.
        tasks: of the world, in turns; one named twice comes twice as often.
        num_prompts: how many samples of the world there are, of all tasks together.
        split: of the world.
    """

    prompts: str | None = None
    tasks: tuple[str, ...] = ()
    num_prompts: int = 4096
    split: str = "train"

    def __post_init__(self) -> None:
        if (self.prompts is None) == (not self.tasks):
            what = f"data has prompts {self.prompts!r} and tasks {list(self.tasks)}"
            raise ValueError(f"{what}: give one of them")
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"data tasks has {unknown[0]!r}: must be of {', '.join(TASKS)}")
        if self.split not in SPLITS:
            raise ValueError(f"data split is {self.split!r}: must be one of {', '.join(SPLITS)}")
        if self.num_prompts < 1:
            raise ValueError(f"data num_prompts is {self.num_prompts}: must be at least 1")


@dataclass(frozen=True, eq=False)
class Item:
    """A prompt, and what the world's oracle holds its pictures to."""

    prompt: Prompt
    instruction: Instruction | None = None


class Source(ABC):
    """Prompts by number, the same whenever they are asked for.

    Attributes:
        fingerprint: of what the recipe's options alone do not fix: another one gives other prompts.
    """

    fingerprint: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item: ...


class WorldSource(Source):
    """Samples of the world's tasks, in turns."""

    def __init__(self, options: DataOptions, seed: int) -> None:
        self.options, self.seed = options, seed

    def __len__(self) -> int:
        return self.options.num_prompts

    def __getitem__(self, index: int) -> Item:
        number, turn = divmod(index, len(self.options.tasks))
        drawn = sample(self.options.tasks[turn], number, self.seed, self.options.split)
        return Item(build_request(drawn, "", Settings(), 0).prompt, drawn.instruction)


class FileSource(Source):
    """The prompts of a file, all of whose lines and pictures were checked."""

    def __init__(self, path: str) -> None:
        file = read_prompts(path)
        load_references(file)
        self.entries, self.fingerprint = file.entries, file.sha256

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item:
        return Item(Prompt(tuple(map(_build_part, self.entries[index].parts))))


def _build_part(entry: PictureEntry | TextEntry) -> ImagePart | TextPart:
    if isinstance(entry, PictureEntry):
        return ImagePart(load_picture(entry.path).image)
    return TextPart(entry.text)


def build_source(options: DataOptions, seed: int) -> Source:
    """What the options name. Raises: ValueError for a file that cannot be used."""
    return WorldSource(options, seed) if options.prompts is None else FileSource(options.prompts)


def choose_items(source: Source, seed: int, iteration: int, count: int) -> list[Item]:
    """The prompts of an iteration: every pass through the source has its own order. A function of its
    arguments, so that a run that goes on needs to know its iteration alone.
    """
    chosen = []
    for place in range(iteration * count, (iteration + 1) * count):
        epoch, position = divmod(place, len(source))
        order = np.random.default_rng([seed, epoch]).permutation(len(source))
        chosen.append(source[int(order[position])])
    return chosen
