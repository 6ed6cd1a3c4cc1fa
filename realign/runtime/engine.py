"""Makes samples of requests: a list at once, or thousands as they come.

Each request has a program (see `operations`). The engine keeps many of them side by side and carries out what
they ask for together, each kind of work in calls as large as memory allows; how is told in `stream`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache

from PIL import Image
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.config import BagelConfig
from realign.runtime.attention import find_backend
from realign.runtime.operations import Program, Read
from realign.runtime.prepare import PreparedPicture, fit_picture
from realign.runtime.publish import LoRA, Publisher
from realign.runtime.reader import RUN_TOKENS, MetPicture, Reader
from realign.runtime.request import ImagePart, Request, Sample, TextPart
from realign.runtime.settings import KEPT_POSITIONS
from realign.runtime.stream import Stream, StreamOptions

# Pictures that a check of many requests keeps, as those that follow often have the same.
PICTURES_KEPT = 16
DEFAULTS = StreamOptions()


class Engine:
    """Makes samples of requests with one model. A sample depends on its request alone.

    Args:
        model: with its tokenizer.
        programs: the program of every reasoning mode, usually `realign.reasoning.programs.PROGRAMS`.
        prepare: how reference pictures are fitted to the model.
        memory_bytes: what may be held at a time beside the weights: keys and values, and what a forward
            needs; one request is worked on even if it needs more. Default: what is free on a CUDA device, on
            a CPU 2 GiB. See `budget`.
        keep_steps: keep the latents of every step in the trajectories.
        attention: a name of `realign.runtime.attention.BACKENDS`, or "auto".
        run_tokens: see `Reader`.
        record: keep in the trajectories what training takes again: the stochastic steps that settings ask
            for, with their log-probs; and leave pictures on the device, where rewards see them. What was
            written is then read as training reads it.

    Attributes:
        backend: of attention, the one taken.
        lowered: what a kind of work may take since memory ran out: see `Budget`.
        report: is told, in one line, when memory ran out and work goes on with less: `lowered` stays as it
            is then for all that this engine makes later, until it is cleared.

    Raises: ValueError for an attention backend that is none, or cannot run here.
    """

    def __init__(
        self,
        model: Bagel,
        programs: Mapping[str, Program],
        prepare: Callable[[Image.Image, BagelConfig], PreparedPicture] = fit_picture,
        memory_bytes: int | None = None,
        keep_steps: bool = False,
        attention: str = "auto",
        run_tokens: int = RUN_TOKENS,
        record: bool = False,
    ) -> None:
        self.record = record
        self.model, self.programs, self.prepare = model, programs, prepare
        self.memory_bytes, self.keep_steps, self.run_tokens = memory_bytes, keep_steps, run_tokens
        self.publisher = Publisher(model)
        self.backend = find_backend(model.device, model.dtype, attention)
        self.lowered: dict[str, int] = {}
        self.report: Callable[[str], object] = warnings.warn

    def run(self, requests: Sequence[Request], options: StreamOptions = DEFAULTS) -> list[Sample]:
        """The samples of all requests, in their order.

        Raises: ValueError, before any work, for a reasoning mode without a program, a size that does not
            fit, or more text than the model has positions for. MemoryShortage for a request that needs more
            memory than there is.
        """
        with self.publisher.in_use():
            self._check_all(requests)
            all_there = replace(options, patience=math.inf)  # none of them waits for a sample
            samples = dict(self._iterate(requests, all_there))
        return [samples[number] for number in range(len(requests))]

    def stream(self, requests: Iterable[Request], options: StreamOptions = DEFAULTS) -> Iterator[Sample]:
        """Each request's sample as it is done: in another order than the requests, each exactly once.

        Requests are taken as they are needed, in a thread of their own, so that loading their pictures takes
        no time of the device's; what is held does not grow with their number.

        Raises: as `run`, but where the request is met: those before it may be lost.
        """
        for _, sample in self._iterate(requests, options):
            yield sample

    def _iterate(self, requests: Iterable[Request], options: StreamOptions) -> Iterator[tuple[int, Sample]]:
        with self.publisher.in_use(), closing(Stream(self, requests, options)) as stream:
            yield from stream

    def publish(
        self, weights: Mapping[str, Tensor] | None = None, lora: Mapping[str, LoRA] | None = None
    ) -> int:
        """Run on new weights from now on: `Publisher.publish`; not while a stream is read."""
        return self.publisher.publish(weights, lora)

    @property
    def weights_version(self) -> int:
        """How often weights were published."""
        return self.model.weights_version

    def _check_all(self, requests: Sequence[Request]) -> None:
        meet = lru_cache(maxsize=PICTURES_KEPT)(Reader(self.model, self.prepare, 0).meet)
        for request in requests:
            self.check(request, self.find_size(request, meet))

    def find_size(self, request: Request, meet: Callable[[ImagePart], MetPicture]) -> tuple[int, int]:
        """(height, width): the settings', or the last reference's as it is met, or the model's own."""
        config, settings = self.model.config, request.settings
        if settings.height is not None:
            return settings.height, settings.width
        references = [part for part in request.prompt.parts if isinstance(part, ImagePart)]
        if not (references and config.size_follows_picture):
            return config.default_image_size
        prepared = meet(references[-1]).prepared
        return prepared.height, prepared.width

    def check(self, request: Request, size: tuple[int, int]) -> None:
        """Raise ValueError for a reasoning mode without a program, a size that the model cannot draw, or more
        text than it can read.
        """
        mode, config = request.settings.reasoning, self.model.config
        if mode not in self.programs:
            known = ", ".join(self.programs)
            raise ValueError(f"request {request.id!r}: no program for reasoning {mode!r}: there is {known}")
        stride, largest = config.latent_stride, config.latent_stride * config.max_latent_size
        for name, side in zip(("height", "width"), size, strict=True):
            if side % stride or not stride <= side <= largest:
                bounds = f"a multiple of {stride} from {stride} to {largest}"
                raise ValueError(f"request {request.id!r}: {name} {side} must be {bounds}")
        self._check_length(request)

    def _check_length(self, request: Request) -> None:
        """Count what its program reads first; what it writes then is cut to what is left of the positions.

        A byte-level tokenizer makes at most one token of a byte, so that most prompts are not counted.
        """
        first = next(self.programs[request.settings.reasoning](request), None)
        limit = self.model.config.llm.max_position_embeddings - KEPT_POSITIONS
        for reading in first.readings if isinstance(first, Read) else ():
            texts = [part.text for part in reading.parts if isinstance(part, TextPart)]
            others = 2 * len(reading.parts)  # a text's bos and eos; a picture's two blocks
            if others + sum(len(text.encode()) for text in texts) <= limit:
                continue
            count = others + sum(len(self.model.tokenizer.encode(text)) for text in texts)
            if count > limit:
                what = f"the prompt has {count} tokens, the model reads at most {limit}"
                raise ValueError(f"request {request.id!r}: {what}: shorten it")
