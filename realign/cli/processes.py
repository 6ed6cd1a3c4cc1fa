"""This process among those that share a run, as torchrun says it in the environment, or another launcher.

The processes of a run open no connection to each other: all that they have in common is the run's folder (see
`locks` and `claims`). So none of them waits for one that died, and one that is late finds less to do.

What they say: the first of all speaks of the whole run; the first of each machine says what is refused, which
the others there refuse too; each says for itself what fails on the way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# What the processes of one launch have in common, as far as the launcher says it.
_JOB_VARIABLES = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")


@dataclass(frozen=True)
class Process:
    """One of the processes of a run.

    Attributes:
        rank, world_size: its number from 0, and how many there are.
        local_rank, local_size: the same among those on its machine; None where the launcher does not say.
        job: the same for all processes of one launch.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int | None = 1
    job: str = ""

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        return self.local_rank == 0

    def name_in(self, message: object) -> str:
        """The message, with whose it is where there are several."""
        return str(message) if self.is_alone else f"rank {self.rank} of {self.world_size}: {message}"


ALONE = Process()


def current_process(environment: Mapping[str, str] = os.environ) -> Process:
    """This process. Without RANK and WORLD_SIZE it is alone; without LOCAL_RANK all are on one machine.

    Raises: ValueError for numbers that cannot be.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ALONE
    rank, world_size = _read_number(environment, "RANK"), _read_number(environment, "WORLD_SIZE")
    if rank >= world_size:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE {world_size}: ranks go from 0 to WORLD_SIZE - 1")
    if world_size == 1:
        return ALONE
    local_rank, local_size = rank, world_size
    if "LOCAL_RANK" in environment:
        local_rank, local_size = _read_number(environment, "LOCAL_RANK"), None
    if "LOCAL_WORLD_SIZE" in environment:
        local_size = _read_number(environment, "LOCAL_WORLD_SIZE")
    job = "|".join(environment.get(name, "") for name in _JOB_VARIABLES)
    return Process(rank, world_size, local_rank, local_size, job)


def _read_number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name].strip()
    if not text.isdecimal():
        raise ValueError(
            f"{name} is {text!r} in the environment: must be a whole number; unset it or mend it"
        )
    return int(text)
