"""Reads prompts into contexts, for a whole batch: what several readings have in common is done once.

Parts become blocks (a text turn; a picture's latents, then its ViT features). Readings go on side by side, a
block at a time: equal blocks after equal beginnings are one step of one packed forward, and their contexts
are one object from then on. A group of samples of one prompt thus holds the prompt once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from PIL import Image

from realign.model.bagel import Bagel
from realign.model.config import BagelConfig
from realign.runtime.attention import pack_rows
from realign.runtime.context import (
    Block,
    Context,
    TextBlock,
    build_text_block,
    build_vae_blocks,
    build_vit_blocks,
    extend,
    split_text_block,
)
from realign.runtime.prepare import PreparedPicture
from realign.runtime.request import Part, TextPart
from realign.runtime.text import Written

# ("text", its ids), ("vae", digest of the picture) or ("vit", the same)
BlockName = tuple[str, str | tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Reading:
    """Parts to read, after what `start` has read."""

    parts: tuple[Part, ...]
    start: Context = field(default_factory=Context)


class Reader:
    """Reads for one run; keeps the blocks of every text and picture that it met.

    Args:
        prepare: how pictures are fitted to the model.
        max_tokens: bound on the padded tokens of one forward.
    """

    def __init__(
        self, model: Bagel, prepare: Callable[[Image.Image, BagelConfig], PreparedPicture], max_tokens: int
    ) -> None:
        self.model, self.fit, self.max_tokens = model, prepare, max_tokens
        self.start = Context()
        self.pictures: dict[str, PreparedPicture] = {}
        self.texts: dict[str, list[BlockName]] = {}
        self.blocks: dict[BlockName, Block] = {}

    def read(self, readings: Sequence[Reading]) -> list[Context]:
        """The context that each reading ends with."""
        names = [[name for part in reading.parts for name in self._block_names(part)] for reading in readings]
        self._build_blocks(dict.fromkeys(name for own in names for name in own))
        contexts = [reading.start if reading.start.length else self.start for reading in readings]
        for depth in range(max(map(len, names), default=0)):
            steps = {i: (contexts[i], own[depth]) for i, own in enumerate(names) if depth < len(own)}
            reached = self._extend(list(dict.fromkeys(steps.values())))
            contexts = [reached[steps[i]] if i in steps else context for i, context in enumerate(contexts)]
        return contexts

    def finish(self, starts: Sequence[Context], written: Sequence[Written]) -> list[Written]:
        """Let every text that was written be read to its end.

        What was read while writing is kept where the text, encoded again, is the tokens that were written: it
        is then what reading the text gives. Another way to write the same text is read anew.
        """
        tokenizer = self.model.tokenizer
        is_kept = [tuple(tokenizer.encode(one.turn.text)) == one.turn.ids for one in written]
        kept = [one for one, keep in zip(written, is_kept, strict=True) if keep]
        self.blocks.update({("text", one.rest): TextBlock(one.rest) for one in kept})
        steps = [(one.context, ("text", one.rest)) for one in kept]
        reached = self._extend(steps)
        again = iter(
            self.read(
                [
                    Reading((TextPart(one.turn.text),), start)
                    for one, start, keep in zip(written, starts, is_kept, strict=True)
                    if not keep
                ]
            )
        )
        ends = (reached[step] for step in steps)
        contexts = [next(ends) if keep else next(again) for keep in is_kept]
        return [
            replace(one, context=context, rest=()) for one, context in zip(written, contexts, strict=True)
        ]

    def prepare(self, image: Image.Image) -> PreparedPicture:
        """The picture as the model sees it; made once for all equal pictures."""
        return self.pictures[self._meet(image)]

    def _extend(self, steps: Sequence[tuple[Context, BlockName]]) -> dict[tuple[Context, BlockName], Context]:
        """Extend each context by its block, in parts that fit the memory bound."""
        lengths = [context.length + self.blocks[name].length for context, name in steps]
        reached = {}
        for pack in pack_rows(lengths, self.max_tokens):
            contexts, names = zip(*(steps[row] for row in pack), strict=True)
            extended = extend(self.model, contexts, [self.blocks[name] for name in names])
            reached.update(zip((steps[row] for row in pack), extended, strict=True))
        return reached

    def _block_names(self, part: Part) -> list[BlockName]:
        if isinstance(part, TextPart):
            return self._meet_text(part.text)
        digest = self._meet(part.image)
        return [("vae", digest), ("vit", digest)]

    def _meet_text(self, text: str) -> list[BlockName]:
        """The names of a text's blocks, a long one's pieces in order; builds them if it is new."""
        if text not in self.texts:
            blocks = split_text_block(build_text_block(self.model, text))
            self.texts[text] = [("text", block.ids) for block in blocks]
            self.blocks.update(zip(self.texts[text], blocks, strict=True))
        return self.texts[text]

    def _meet(self, image: Image.Image) -> str:
        """A digest of the picture's content; prepares it if it is new."""
        header = f"{image.mode} {image.size} {image.info.get('transparency')} {image.getpalette()}"
        digest = blake2b(image.tobytes(), key=blake2b(header.encode()).digest()).hexdigest()
        if digest not in self.pictures:
            self.pictures[digest] = self.fit(image, self.model.config)
        return digest

    def _build_blocks(self, names: Iterable[BlockName]) -> None:
        """Encode every picture that was not met before, in batches."""
        new = [name for name in names if name not in self.blocks]
        for kind, build in (("vae", build_vae_blocks), ("vit", build_vit_blocks)):
            own = [name for name in new if name[0] == kind]
            pixels = [getattr(self.pictures[digest], f"{kind}_CHW") for _, digest in own]
            self.blocks.update(zip(own, build(self.model, pixels), strict=True))
