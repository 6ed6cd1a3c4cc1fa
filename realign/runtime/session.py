"""A request on its way to its sample."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from realign.runtime.operations import Operation
from realign.runtime.reader import MetPicture
from realign.runtime.recording import Recording
from realign.runtime.request import Request, Sample
from realign.runtime.sampler import DenoiseJob


@dataclass(frozen=True, eq=False)
class Denoised:
    """A picture that is still latents, and as in `Trajectory` how it came about."""

    job: DenoiseJob
    latent_LC: Tensor
    steps: tuple[Tensor, ...]
    recording: Recording | None


@dataclass(eq=False)
class Session:
    """A request, its running program, and what that waits for.

    Attributes:
        number: of the request among all, from 0.
        size: (height, width) of its pictures.
        start: begins its program.
        pictures: its references as the model sees them, until they are read.
        waiting: what the program asked for last; None before it begins and once it has ended.
        denoised: what was drawn of it, until it is a picture.
        sample: what came of it in the end.
        has_begun: whether anything was done for it yet.
    """

    number: int
    request: Request
    size: tuple[int, int]
    start: Callable[[Request], Generator[Operation, Any, Sample]]
    pictures: tuple[MetPicture, ...] = ()
    waiting: Operation | None = None
    denoised: Denoised | None = None
    sample: Sample | None = None
    has_begun: bool = False
    program: Generator[Operation, Any, Sample] = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin, or begin again: nothing of what was done is held any more."""
        self.program, self.denoised, self.has_begun = self.start(self.request), None, False
        self._go_on(None)

    def resume(self, result: Any) -> None:
        """Give the program what it waited for; it goes on to its next operation, or its end."""
        self.has_begun = True
        self._go_on(result)

    @property
    def is_done(self) -> bool:
        return self.waiting is None

    def _go_on(self, result: Any) -> None:
        try:
            self.waiting = self.program.send(result)
        except StopIteration as end:
            self.waiting, self.sample = None, end.value
            return
        if not isinstance(self.waiting, Operation):
            what = f"the program of request {self.request.id!r} asks for {self.waiting!r}"
            raise TypeError(f"{what}: must be a Read, Write or Draw")


def count_picture_bytes(request: Request, pictures: Sequence[MetPicture]) -> dict[int, int]:
    """Bytes of host memory that a request's references take, as given and as met, by what takes them."""
    images = request.prompt.pictures
    held = {id(image): image.width * image.height * len(image.getbands()) for image in images}
    for met in pictures:
        held[id(met)] = met.prepared.vae_CHW.nbytes + met.prepared.vit_CHW.nbytes
    return held
