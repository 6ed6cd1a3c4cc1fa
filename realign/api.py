"""The Python entry: `realign.load("mini").generate(["a red star on a beach"])`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from realign.model.bagel import Bagel
from realign.model.fingerprint import hash_checkpoint
from realign.model.fp8 import Fp8Scales, use_fp8
from realign.model.weights import find_folder
from realign.reasoning.programs import PROGRAMS, describe_untrained
from realign.runtime.attention import find_backend
from realign.runtime.engine import Engine
from realign.runtime.options import GenerateOptions
from realign.runtime.request import Prompt, Request, Sample
from realign.runtime.settings import Settings
from realign.runtime.stream import StreamOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Generator:
    """A loaded model that makes pictures from prompts."""

    def __init__(self, model: Bagel, attention: str = "auto") -> None:
        self.model = model
        self.engine = Engine(model, PROGRAMS, attention=attention)

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        num_images: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        **options: Any,
    ) -> list[Sample]:
        """Make `num_images` pictures of each prompt.

        Args:
            prompts: each a text; or a list of texts and PIL pictures, in order; or a `Prompt`; or a
                `Request`, which is made as it is.
            seed: with the number of the prompt and of its picture it decides the noise.
            batch_size: pictures at a time at most; by default as many as fit. It does not change them.
            options: see `realign.runtime.options.GenerateOptions`.

        Returns: samples in the order of the prompts, a prompt's pictures together; each has `image`,
            `reasoning` (`caption`, `relations`, `text`, `error`; None where none was asked for) and
            `trajectory`.
        Raises: ValueError for a prompt or option that cannot be used.
        """
        check_numbers(num_images, seed, batch_size)
        requests = build_requests(prompts, build_settings(**options), num_images, seed)
        self._warn_untrained({request.settings.reasoning for request in requests})
        return self.engine.run(requests, StreamOptions(batch_size=batch_size))

    def stream(
        self,
        prompts: Iterable[Any],
        *,
        num_images: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        **options: Any,
    ) -> Iterator[Sample]:
        """The same samples as of `generate`, each as it is done, of any number of prompts.

        Prompts are taken as they are needed, in a thread; samples come in an order of their own. Prompt 3's
        picture 1 has `sample.request.id` "00003/1".

        Raises: ValueError as `generate`, but for a prompt only where it is met.
        """
        check_numbers(num_images, seed, batch_size)
        settings = build_settings(**options)
        self._warn_untrained({settings.reasoning})
        requests = iterate_requests(prompts, settings, num_images, seed)
        return self.engine.stream(requests, StreamOptions(batch_size=batch_size))

    def _warn_untrained(self, modes: set[str]) -> None:
        for mode in sorted(modes):
            warning = describe_untrained(self.model.config, mode)
            if warning:
                warnings.warn(warning, stacklevel=3)


def load(
    path: str | Path = "mini",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    fp8: str | Path | None = None,
) -> Generator:
    """Load a checkpoint folder in BAGEL's layout, or the embedded "mini".

    Args:
        device: "auto" is "cuda" where there is one, else "cpu".
        dtype: "float32", "bfloat16", or "auto": bfloat16 on a GPU, float32 on a CPU.
        attention: "varlen" (torch's own), "flash-attn", "xformers" on a GPU; "sdpa" on a CPU; "reference"; or
            "auto": varlen on a GPU in bfloat16, sdpa on a CPU.
        fp8: a file of scales that `realign calibrate` made for this checkpoint: the generation expert's
            products are in float8 then (see `realign.model.fp8`).

    Raises: ValueError for a folder that is no checkpoint, or an argument that cannot be used.
    """
    device = find_device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = find_dtype(dtype)
    find_backend(device, dtype, attention)  # before the weights are loaded
    scales = None if fp8 is None else Fp8Scales.load(fp8)
    if scales is not None:
        scales.check_model(hash_checkpoint(find_folder(path)))
    model = Bagel.from_pretrained(path, device=device, dtype=dtype)
    if scales is not None:
        use_fp8(model, scales)
    return Generator(model, attention)


def find_device(name: str | torch.device) -> torch.device:
    """The device that a user named, "auto" for the best, if torch has it here. Raises: ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {str(name)!r} cannot be used here: give cpu, cuda or cuda:N")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used here ({reason}): give cpu") from None


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype that a user named. Raises: ValueError."""
    if name in DTYPES.values():
        return name
    if name not in DTYPES:
        raise ValueError(f"dtype is {str(name)!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def build_settings(**options: Any) -> Settings:
    """Settings from `GenerateOptions` by name. Raises: ValueError."""
    unknown = sorted(options.keys() - GenerateOptions.__dataclass_fields__.keys())
    if unknown:
        known = ", ".join(GenerateOptions.__dataclass_fields__)
        raise ValueError(f"unknown option {unknown[0]!r}: the options are {known}")
    return GenerateOptions(**options).settings()


def check_numbers(num_images: int, seed: int, batch_size: int | None) -> None:
    """Raises: ValueError for a number that cannot be used."""
    numbers = {"num_images": (num_images, 1), "seed": (seed, 0), "batch_size": (batch_size, 1)}
    for name, (value, least) in numbers.items():
        if name == "batch_size" and value is None:
            continue
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is {value!r}: must be a whole number, at least {least}")


def build_requests(
    prompts: Sequence[Any], settings: Settings, num_images: int = 1, seed: int = 0
) -> list[Request]:
    """Number prompts and pictures: prompt 3's picture 1 is the request "00003/1".

    Raises: ValueError naming the prompt that cannot be used.
    """
    return list(iterate_requests(prompts, settings, num_images, seed))


def iterate_requests(
    prompts: Iterable[Any], settings: Settings, num_images: int = 1, seed: int = 0
) -> Iterator[Request]:
    """`build_requests`, prompt by prompt."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts!r}: must be a list of prompts, such as [{prompts!r}]")
    for number, value in enumerate(prompts):
        if isinstance(value, Request):
            yield value
            continue
        try:
            prompt = Prompt.build(value)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
        for index in range(num_images):
            yield Request(f"{number:05d}/{index}", prompt, seed, settings)
