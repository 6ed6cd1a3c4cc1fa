"""Reads prompts into contexts, for many requests at once.

Readings are carried out block by block, the first blocks of all first. Those that have read the same so far,
and read the same block next, are one step: steps are carried out in one packed forward, and their contexts
are one object from then on. A group of samples of one prompt thus holds the prompt once. What was read is
found again as long as somebody holds a context that goes on from it, and is freed with the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from threading import Lock
from weakref import WeakKeyDictionary, WeakValueDictionary

from PIL import Image

from realign.model.bagel import Bagel
from realign.model.config import BagelConfig
from realign.runtime.attention import Backend, pack_rows
from realign.runtime.context import (
    Block,
    TextBlock,
    build_text_block,
    build_vae_blocks,
    build_vit_blocks,
    extend,
    split_text_block,
)
from realign.runtime.kv import Context, join_runs
from realign.runtime.prepare import PreparedPicture
from realign.runtime.request import ImagePart, Part, TextPart
from realign.runtime.text import Written

# The least tokens of a run: fewer are as cheap to hold for each row as to attend to apart.
RUN_TOKENS = 256

# ("text", its ids), ("vae", digest of the picture) or ("vit", the same)
BlockName = tuple[str, str | tuple[int, ...]]
Step = tuple[Context, BlockName]
Way = tuple[Context, tuple[BlockName, ...]]
TEXTS_KEPT = 1024


@dataclass(frozen=True, eq=False)
class Reading:
    """Parts to read, after what `start` has read."""

    parts: tuple[Part, ...]
    start: Context = field(default_factory=Context)


@dataclass(frozen=True, eq=False)
class MetPicture:
    """A picture as the model sees it, and its blocks by kind once they are built."""

    prepared: PreparedPicture
    blocks: dict[str, Block] = field(default_factory=dict)


class Reader:
    """Reads for one run. Holds no picture and no context itself: what nobody else holds is forgotten.

    Args:
        prepare: how pictures are fitted to the model.
        max_tokens: bound on the padded tokens of one forward; may be set anew between calls.
        backend: of attention.
        run_tokens: the least tokens that are made a run, to be shared.
        has_gradient: what is read while torch has gradients enabled has one, see `extend`; `forget_contexts`
            has to be called between two backward passes.
    """

    def __init__(
        self,
        model: Bagel,
        prepare: Callable[[Image.Image, BagelConfig], PreparedPicture],
        max_tokens: int,
        backend: Backend | None = None,
        run_tokens: int = RUN_TOKENS,
        has_gradient: bool = False,
    ) -> None:
        self.has_gradient = has_gradient
        self.model, self.fit, self.max_tokens, self.backend = model, prepare, max_tokens, backend
        self.run_tokens = run_tokens
        self.start, self.lock = Context(), Lock()
        self.digests: WeakKeyDictionary[ImagePart, str] = WeakKeyDictionary()
        self._forget()
        self.name_text = lru_cache(maxsize=TEXTS_KEPT)(self._name_text)

    def _forget(self) -> None:
        """Begin with nothing read, by the weights that the model has now."""
        self.weights_version = self.model.weights_version
        self.pictures: WeakValueDictionary[str, MetPicture] = WeakValueDictionary()
        self.forget_contexts()

    def forget_contexts(self) -> None:
        """Read everything anew from here on, though somebody may still hold it."""
        self.reached: WeakValueDictionary[Step, Context] = WeakValueDictionary()
        self.shared: WeakValueDictionary[tuple[object, ...], Context] = WeakValueDictionary()

    def read(self, readings: Sequence[Reading]) -> list[Context]:
        """The context that each reading ends with.

        All that it reads before a closing text becomes a run: what branches and samples of a prompt share.
        """
        if self.weights_version != self.model.weights_version:
            self._forget()
        met = {part: self.meet(part) for one in readings for part in one.parts if isinstance(part, ImagePart)}
        names = [tuple(self.name_blocks(reading.parts)) for reading in readings]
        starts = [reading.start if reading.start.length else self.start for reading in readings]
        numbers = [len(own) - (own[-1][0] == "text") if own else 0 for own in names]
        ways = [(start, own[:n]) for start, own, n in zip(starts, names, numbers, strict=True)]
        shared = self._read_shared(list(dict.fromkeys(ways)))
        rests = [(shared[way], own[n:]) for way, own, n in zip(ways, names, numbers, strict=True)]
        ends = self._read_ways(list(dict.fromkeys(rests)))
        del met  # the blocks lived as long as it did
        return [ends[rest] for rest in rests]

    def _read_shared(self, ways: Sequence[Way]) -> dict[Way, Context]:
        """Where each way ends, what was read on it made a run."""
        # A way of no blocks ends where it began: kept, it would keep itself.
        found = {way: self.shared.get(_name_way(way)) if way[1] else way[0] for way in ways}
        new = [way for way, context in found.items() if context is None]
        ends = self._read_ways(new)
        counts = [len(ends[way].tail) for way in new]
        joined = join_runs([ends[way] for way in new], counts, self.run_tokens)
        found.update(zip(new, joined, strict=True))
        self.shared.update({_name_way(way): context for way, context in found.items() if way[1]})
        return found

    def _read_ways(self, ways: Sequence[Way]) -> dict[Way, Context]:
        """Where each way ends: the first blocks of all are read first."""
        places = [self._find_reached(*way) for way in ways]
        contexts, names = [context for context, _ in places], [rest for _, rest in places]
        self._build_blocks(list(dict.fromkeys(name for own in names for name in own)))
        for depth in range(max(map(len, names), default=0)):
            steps = {i: (contexts[i], own[depth]) for i, own in enumerate(names) if depth < len(own)}
            reached = self._extend(list(dict.fromkeys(steps.values())))
            contexts = [reached[steps[i]] if i in steps else context for i, context in enumerate(contexts)]
        return dict(zip(ways, contexts, strict=True))

    def finish(
        self, starts: Sequence[Context], written: Sequence[Written], reads_again: bool = False
    ) -> list[Written]:
        """Let every text that was written be read to its end.

        What was read while writing is kept where the text, encoded again, is the tokens that were written: it
        is then what reading the text gives. Another way to write the same text is read anew; with
        `reads_again` all are.
        """
        tokenizer = self.model.tokenizer
        is_kept = [
            not reads_again and tuple(tokenizer.encode(one.turn.text)) == one.turn.ids for one in written
        ]
        kept = [one for one, keep in zip(written, is_kept, strict=True) if keep]
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

    def meet(self, part: ImagePart) -> MetPicture:
        """The picture as the model sees it; one for all equal pictures, as long as somebody holds it.

        In any thread: while one reads with a picture, no other puts its own in its place.
        """
        digest = self._digest(part)
        met = self.pictures.get(digest)
        if met is None:
            new = MetPicture(self.fit(part.image, self.model.config))
            with self.lock:
                met = self.pictures.setdefault(digest, new)
        return met

    def name_blocks(self, parts: Sequence[Part]) -> list[BlockName]:
        """What is read of the parts, in order; equal names are equal blocks."""
        names: list[BlockName] = []
        for part in parts:
            if isinstance(part, TextPart):
                names += self.name_text(part.text)
            else:
                names += [(kind, self._digest(part)) for kind in ("vae", "vit")]
        return names

    def measure(self, reading: Reading) -> dict[int, int]:
        """Tokens of each block that is to be read, by a number for it and all that was read before it.

        Equal numbers are the same work. (They are hashes; two that meet by chance cost an estimate, no more.)
        """
        place, lengths = id(reading.start) if reading.start.length else 0, {}
        for name in self.name_blocks(reading.parts):
            place = hash((place, name))
            lengths[place] = self._count_tokens(name)
        return lengths

    def count_held(self) -> int:
        """Tokens whose keys and values somebody holds, each once."""
        contexts = [*self.reached.values(), *self.shared.values()]
        return sum(segment.length for segment in {s for context in contexts for s in context.segments})

    def _extend(self, steps: Sequence[Step]) -> dict[Step, Context]:
        """Extend each context by its block, in parts that fit the memory bound."""
        blocks = [self._find_block(name) for _, name in steps]
        lengths = [step[0].length + block.length for step, block in zip(steps, blocks, strict=True)]
        reached = {}
        for pack in pack_rows(lengths, self.max_tokens):
            contexts, read = [steps[row][0] for row in pack], [blocks[row] for row in pack]
            extended = extend(self.model, contexts, read, self.backend, self.has_gradient)
            reached.update(zip((steps[row] for row in pack), extended, strict=True))
        self.reached.update(reached)
        return reached

    def _find_reached(self, context: Context, names: Sequence[BlockName]) -> Way:
        """How far others have read the same already, and what is left."""
        for number, name in enumerate(names):
            further = self.reached.get((context, name))
            if further is None:
                return context, tuple(names[number:])
            context = further
        return context, ()

    def _name_text(self, text: str) -> list[BlockName]:
        """The names of a text's blocks, a long one's pieces in order."""
        return [("text", block.ids) for block in split_text_block(build_text_block(self.model, text))]

    def _digest(self, part: ImagePart) -> str:
        """A digest of the picture's content."""
        digest = self.digests.get(part)
        if digest is None:
            image = part.image
            header = f"{image.mode} {image.size} {image.info.get('transparency')} {image.getpalette()}"
            digest = blake2b(image.tobytes(), key=blake2b(header.encode()).digest()).hexdigest()
            self.digests[part] = digest
        return digest

    def _find_block(self, name: BlockName) -> Block:
        kind, what = name
        return TextBlock(what) if kind == "text" else self.pictures[what].blocks[kind]

    def _count_tokens(self, name: BlockName) -> int:
        """The length of a block, which need not be there yet; its picture must be."""
        kind, what = name
        if kind == "text":
            return len(what)
        config, prepared = self.model.config, self.pictures[what].prepared
        pixels, patch = (
            (prepared.vae_CHW, config.latent_stride)
            if kind == "vae"
            else (prepared.vit_CHW, config.vit.patch_size)
        )
        return (pixels.shape[1] // patch) * (pixels.shape[2] // patch) + 2

    def _build_blocks(self, names: Sequence[BlockName]) -> None:
        """Encode every picture whose block is not there yet, in batches."""
        for kind, build in (("vae", build_vae_blocks), ("vit", build_vit_blocks)):
            own = [self.pictures[digest] for name, digest in names if name == kind]
            new = [met for met in own if kind not in met.blocks]
            built = build(self.model, [getattr(met.prepared, f"{kind}_CHW") for met in new])
            for met, block in zip(new, built, strict=True):
                met.blocks[kind] = block


def _name_way(way: Way) -> tuple[object, ...]:
    """A name that holds no context: where the way ends has a copy of what its start held."""
    start, names = way
    return start.mark, names
