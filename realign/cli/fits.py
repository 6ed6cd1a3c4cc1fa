"""Whether a run fits its model: sizes asked for, the model's own, those of references; text lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from realign.cli.console import UsageError
from realign.cli.models import ModelFolder
from realign.cli.options import PictureOptions
from realign.data.readers import PromptEntry, PromptError, PromptFile, Reference
from realign.model.config import BagelConfig
from realign.reasoning.prompts import SYSTEM_TEXTS
from realign.runtime.settings import KEPT_POSITIONS


def largest_side(config: BagelConfig) -> int:
    """Pixels that the model's latent positions reach, per side."""
    return config.latent_stride * config.max_latent_size


def check_given_size(options: PictureOptions, config: BagelConfig) -> None:
    """Raises UsageError for a --height or --width that is no whole number of latent patches."""
    if (options.height is None) != (options.width is None):
        raise UsageError("--height and --width go together: give both, or neither for the model's own size")
    stride, largest = config.latent_stride, largest_side(config)
    for name, value in (("--height", options.height), ("--width", options.width)):
        if value is not None and (value % stride or not stride <= value <= largest):
            raise UsageError(f"{name} {value}: give a multiple of {stride} from {stride} to {largest}")


def check_sizes(
    options: PictureOptions,
    config: BagelConfig,
    prompts: PromptFile,
    references: Mapping[Path, Reference],
) -> None:
    """Raises UsageError or PromptError where a size that follows from model and pictures does not fit."""
    follows = all(entry.pictures for entry in prompts.entries) and config.size_follows_picture
    if options.height is None and not follows:
        _check_default_size(config)
    if references:
        _check_references(config, prompts, references)


def _check_default_size(config: BagelConfig) -> None:
    height, width = config.default_image_size
    stride, largest = config.latent_stride, largest_side(config)
    if height % stride or width % stride or max(height, width) > largest:
        raise UsageError(
            f"the model's own size {height}x{width} does not fit it: "
            f"give --height and --width, multiples of {stride} up to {largest}"
        )


def _check_references(config: BagelConfig, prompts: PromptFile, references: Mapping[Path, Reference]) -> None:
    from realign.runtime.prepare import resized_size

    largest_vit = config.vit.patch_size * config.vit_max_num_patch_per_side
    for entry in prompts.entries:
        for part in entry.pictures:
            for_vae = resized_size(references[part.path].size, config.vae_resize)
            for_vit = resized_size(for_vae, config.vit_resize)
            for rule, size, largest in (
                ("vae_resize", for_vae, largest_side(config)),
                ("vit_resize", for_vit, largest_vit),
            ):
                if max(size) > largest:
                    what = (
                        f"the model resizes {part.name!r} to {size[0]}x{size[1]}, and takes at most {largest}"
                    )
                    raise PromptError(f"{prompts.path}:{entry.line}: {what}; mend {rule} in its config.json")


def check_lengths(model: ModelFolder, prompts: PromptFile, reasoning: str) -> None:
    """Raises PromptError for more text, its system text counted, than the model has positions for.

    A byte-level tokenizer makes at most one token of a byte, so that most prompts need no tokenizer here.
    """
    system = [SYSTEM_TEXTS[reasoning]] if reasoning in SYSTEM_TEXTS else []

    def count_positions(entry: PromptEntry, count: Callable[[str], int]) -> int:
        """As the engine counts them: a text has a bos and an eos, a picture is two blocks."""
        return 2 * (len(system) + len(entry.parts)) + sum(map(count, (*system, *entry.texts)))

    limit = model.config.llm.max_position_embeddings - KEPT_POSITIONS
    long = [one for one in prompts.entries if count_positions(one, lambda text: len(text.encode())) > limit]
    if not long:
        return
    from realign.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model.path)
    for entry in long:
        count = count_positions(entry, lambda text: len(tokenizer.encode(text)))
        if count > limit:
            what = f"the prompt has {count} tokens, the model reads at most {limit}"
            raise PromptError(f"{prompts.path}:{entry.line}: {what}; shorten it")
