"""The work of requests that are made as one batch, by phase."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bench.generate.baseline import list_steps
from bench.generate.flops import count_autoencoder, count_decoder, count_vit
from bench.generate.models import RandomTokenizer
from bench.generate.workloads import CHAIN_TOKENS
from bench.roofline.chips import BYTES, Chip, Phase
from realign.model.config import BagelConfig, LLMConfig
from realign.reasoning.programs import PROGRAMS
from realign.runtime.prepare import resized_size
from realign.runtime.request import ImagePart, Part, Request, TextPart

GENERATION = ("reading", "reasoning", "denoising", "autoencoder")
PHASES = (*GENERATION, "rewards", "replay", "publishing")


@dataclass(frozen=True)
class Rows:
    """Rows of one forward that are alike: each reads `num_new` tokens after `num_past` others.

    `num_shared` of the past are read from memory once for all of them.
    """

    count: int
    num_new: int
    num_past: int
    num_shared: int


def count_heads(llm: LLMConfig) -> tuple[int, int]:
    """Numbers of a token's query, and of its key."""
    return llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim


def count_layer_weights(llm: LLMConfig) -> int:
    """Of one expert."""
    heads, kv_heads = count_heads(llm)
    return llm.hidden_size * (2 * heads + 2 * kv_heads + 3 * llm.intermediate_size)


@dataclass
class Estimate:
    """The work of a workload, by phase.

    Attributes:
        lengths: of what was read already, by what was read.
        steps: of denoising, the rows of each.
    """

    config: BagelConfig
    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in PHASES})
    lengths: dict[tuple, int] = field(default_factory=dict)
    steps: list[list[Rows]] = field(default_factory=list)

    @classmethod
    def of(cls, config: BagelConfig, requests: Sequence[Request]) -> Estimate:
        """Requests that are made as one batch; a chain that is written has `CHAIN_TOKENS`."""
        estimate = cls(config)
        written = [estimate._add_prompt(request) for request in requests]
        estimate._add_chains([lengths["conditional"] for lengths in written], requests)
        estimate._add_pictures(written, requests)
        return estimate

    def seconds(self, chip: Chip, is_fp8: bool = False) -> dict[str, float]:
        """By phase."""
        return {name: phase.seconds(chip, is_fp8) for name, phase in self.phases.items()}

    def _add_prompt(self, request: Request) -> dict[str, int]:
        """Reads what each branch reads, unless it was read before; the tokens of each."""
        reads = PROGRAMS[request.settings.reasoning].read_by_branch(request)
        return {kind: self._read(parts) for kind, parts in reads.items()}

    def _read(self, parts: Iterable[Part]) -> int:
        name: tuple = ()
        length = 0
        for part in parts:
            name = (*name, part.text if isinstance(part, TextPart) else id(part.image))
            if name not in self.lengths:
                self.lengths[name] = self._read_part(part, length)
            length = self.lengths[name]
        return length

    def _read_part(self, part: Part, length: int) -> int:
        reading = self.phases["reading"]
        if isinstance(part, ImagePart):
            return self._read_picture(part, length)
        count = len(RandomTokenizer(self.config.llm.vocab_size).encode(part.text)) + 2
        self.add_forward(reading, [Rows(1, count, length, length)], is_gen=False, is_causal=True)
        return length + count

    def _read_picture(self, part: ImagePart, length: int) -> int:
        config, reading = self.config, self.phases["reading"]
        for_vae = resized_size(part.image.size, config.vae_resize)
        width, height = resized_size(for_vae, config.vit_resize)
        patches = (width // config.vit.patch_size) * (height // config.vit.patch_size)
        latents = for_vae[0] * for_vae[1] // config.latent_stride**2
        encode = count_autoencoder(config.autoencoder, for_vae[1], for_vae[0], False)
        self.phases["autoencoder"].product_flops += encode
        reading.product_flops += count_vit(config.vit, config.llm.hidden_size, patches)
        for count, is_gen in ((latents + 2, True), (patches + 2, False)):
            self.add_forward(reading, [Rows(1, count, length, length)], is_gen)
            length += count
        return length

    def _add_chains(self, lengths: Sequence[int], requests: Sequence[Request]) -> None:
        """All chains together, a token of each in a step."""
        if not PROGRAMS[requests[0].settings.reasoning].does_reason:
            return
        llm, phase, count = self.config.llm, self.phases["reasoning"], len(requests)
        for step in range(CHAIN_TOKENS):
            rows = Rows(count, 1, lengths[0] + step, lengths[0])
            self.add_forward(phase, [rows], is_gen=False)
            phase.product_flops += 2 * count * llm.hidden_size * llm.vocab_size
            phase.product_bytes += BYTES * llm.hidden_size * llm.vocab_size

    def _add_pictures(self, written: Sequence[dict[str, int]], requests: Sequence[Request]) -> None:
        """All pictures together, the branches of all in a step; requests are alike but for their seed."""
        request, config = requests[0], self.config
        settings = request.settings
        size = (settings.height, settings.width) if settings.height else config.default_image_size
        num_new = size[0] * size[1] // config.latent_stride**2 + 2
        alone = CHAIN_TOKENS + 2 if PROGRAMS[settings.reasoning].does_reason else 0
        branches = {
            kind: Rows(len(requests), num_new, past + (alone if kind == "conditional" else 0), past)
            for kind, past in written[0].items()
        }
        for _, _, is_guided in list_steps(settings):
            kinds = branches if is_guided else ("conditional",)
            self.steps.append([branches[kind] for kind in kinds])
            self.add_forward(self.phases["denoising"], self.steps[-1], is_gen=True)
        decode = count_autoencoder(config.autoencoder, *size, True)
        self.phases["autoencoder"].product_flops += len(requests) * decode

    def add_forward(self, phase: Phase, rows: Sequence[Rows], is_gen: bool, is_causal: bool = False) -> None:
        """One forward; the understanding expert reads a picture's markers in any case."""
        llm = self.config.llm
        heads, kv_heads = count_heads(llm)
        weights = count_layer_weights(llm)
        num_tokens = sum(some.count * some.num_new for some in rows)
        total = sum(some.count * count_decoder(llm, some.num_new, some.num_past, is_causal) for some in rows)
        products = 2 * llm.num_hidden_layers * num_tokens * weights
        phase.product_flops += products
        phase.gen_flops += products if is_gen else 0
        phase.attention_flops += total - products
        of_layer = llm.num_hidden_layers * BYTES
        qkv, inner = heads + 2 * kv_heads, llm.intermediate_size
        per_token = 4 * llm.hidden_size + qkv + heads + 3 * inner
        phase.product_bytes += of_layer * ((1 + is_gen) * weights + num_tokens * per_token)
        # A part of the past that rows share counts once, the largest of those that are read here.
        held = max(some.num_shared for some in rows)
        held += sum(some.count * (some.num_past - some.num_shared + some.num_new) for some in rows)
        phase.attention_bytes += of_layer * (2 * kv_heads * held + 2 * heads * num_tokens)
        # Two norms with the residual, both ways; queries and keys turned; gate and up to their product.
        per_token = 8 * llm.hidden_size + 2 * (heads + kv_heads) + 3 * inner
        phase.element_bytes += of_layer * num_tokens * per_token
