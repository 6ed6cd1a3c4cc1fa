"""`python -m bench.roofline`: how fast a chip could make a workload, from FLOPs and bytes alone.

Each phase has products (at the chip's matrix rate, or waiting for weights), attention, and work per element
(at its bandwidth); they follow each other within a layer, so that their times add up. What requests have in
common is done once, all rows of a step are one forward, and nothing is waited for: a runtime can come near
these times and not pass them. The rates are what large products and copies reach, not data sheets' peaks:
measure your own and give them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from bench.generate.__main__ import print_table
from bench.generate.baseline import list_steps
from bench.generate.flops import count_autoencoder, count_decoder, count_vit
from bench.generate.models import BAGEL_7B, RandomTokenizer
from bench.generate.workloads import BUILDERS, CHAIN_TOKENS, Sizes, Workload, build_workloads
from realign.model.config import BagelConfig
from realign.reasoning.programs import PROGRAMS
from realign.runtime.prepare import resized_size
from realign.runtime.request import ImagePart, Part, Request, TextPart

BYTES = 2  # of a number in bf16
PHASES = ("reading", "reasoning", "denoising", "autoencoder")


@dataclass(frozen=True)
class Chip:
    """What a GPU reaches: dense bf16 products in TFLOP/s, attention as a share of that, memory in TB/s.

    `fp8_factor`: how many times faster products of e4m3 numbers are.
    """

    name: str
    matrix_tflops: float
    bandwidth_tbs: float
    attention_share: float = 0.75
    fp8_factor: float = 1.9


# 790 and 148 TFLOP/s are what others measured of large bf16 products on an H200 and an H20; an H100 has the
# same processors as the H200; the B200's is 80% of its peak, as theirs are. Bandwidths: 90% of the peaks.
CHIPS = {
    "h20": Chip("H20", 148, 3.6, attention_share=0.85),
    "h100": Chip("H100", 790, 3.0),
    "h200": Chip("H200", 790, 4.3),
    "b200": Chip("B200", 1800, 7.2),
}


@dataclass
class Phase:
    """Operations and bytes of one phase; `gen_flops` of its products are the generation expert's."""

    product_flops: float = 0.0
    gen_flops: float = 0.0
    product_bytes: float = 0.0
    attention_flops: float = 0.0
    attention_bytes: float = 0.0
    element_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops

    def seconds(self, chip: Chip, is_fp8: bool = False) -> float:
        """The least time; with `is_fp8` the generation expert's products are e4m3's."""
        rate, bandwidth = chip.matrix_tflops * 1e12, chip.bandwidth_tbs * 1e12
        saved = self.gen_flops * (1 - 1 / chip.fp8_factor) if is_fp8 else 0.0
        products = max((self.product_flops - saved) / rate, self.product_bytes / bandwidth)
        attention_rate = chip.attention_share * rate
        attention = max(self.attention_flops / attention_rate, self.attention_bytes / bandwidth)
        return products + attention + self.element_bytes / bandwidth


@dataclass(frozen=True)
class Rows:
    """Rows of one forward that are alike: each reads `num_new` tokens after `num_past` others.

    `num_shared` of the past are read from memory once for all of them.
    """

    count: int
    num_new: int
    num_past: int
    num_shared: int


@dataclass
class Estimate:
    """The work of a workload, by phase.

    Attributes:
        lengths: of what was read already, by what was read.
    """

    config: BagelConfig
    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in PHASES})
    lengths: dict[tuple, int] = field(default_factory=dict)

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
        self._add_forward(reading, [Rows(1, count, length, length)], is_gen=False, is_causal=True)
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
            self._add_forward(reading, [Rows(1, count, length, length)], is_gen)
            length += count
        return length

    def _add_chains(self, lengths: Sequence[int], requests: Sequence[Request]) -> None:
        """All chains together, a token of each in a step."""
        if not PROGRAMS[requests[0].settings.reasoning].does_reason:
            return
        llm, phase, count = self.config.llm, self.phases["reasoning"], len(requests)
        for step in range(CHAIN_TOKENS):
            rows = Rows(count, 1, lengths[0] + step, lengths[0])
            self._add_forward(phase, [rows], is_gen=False)
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
            self._add_forward(self.phases["denoising"], [branches[kind] for kind in kinds], is_gen=True)
        decode = count_autoencoder(config.autoencoder, *size, True)
        self.phases["autoencoder"].product_flops += len(requests) * decode

    def _add_forward(self, phase: Phase, rows: Sequence[Rows], is_gen: bool, is_causal: bool = False) -> None:
        """One forward; the understanding expert reads a picture's markers in any case."""
        llm = self.config.llm
        heads, kv_heads = (n * llm.head_dim for n in (llm.num_attention_heads, llm.num_key_value_heads))
        weights = llm.hidden_size * (2 * heads + 2 * kv_heads + 3 * llm.intermediate_size)
        num_tokens = sum(some.count * some.num_new for some in rows)
        total = sum(some.count * count_decoder(llm, some.num_new, some.num_past, is_causal) for some in rows)
        products = 2 * llm.num_hidden_layers * num_tokens * weights
        phase.product_flops += products
        phase.gen_flops += products if is_gen else 0
        phase.attention_flops += total - products
        of_layer = llm.num_hidden_layers * BYTES
        qkv, inner = heads + 2 * kv_heads, llm.intermediate_size
        per_token = 3 * llm.hidden_size + qkv + heads + 3 * inner
        phase.product_bytes += of_layer * ((1 + is_gen) * weights + num_tokens * per_token)
        # A part of the past that rows share counts once, the largest of those that are read here.
        held = max(some.num_shared for some in rows)
        held += sum(some.count * (some.num_past - some.num_shared + some.num_new) for some in rows)
        phase.attention_bytes += of_layer * (2 * kv_heads * held + 2 * heads * num_tokens)
        # Two norms with the residual, both ways; queries and keys turned; gate and up to their product.
        per_token = 8 * llm.hidden_size + 2 * (heads + kv_heads) + 3 * inner
        phase.element_bytes += of_layer * num_tokens * per_token


def describe(workload: Workload, chip: Chip, estimate: Estimate) -> tuple[str, ...]:
    """A line of the table: operations, seconds by phase, images a second in bf16 and with fp8."""
    seconds, fast = estimate.seconds(chip), estimate.seconds(chip, is_fp8=True)
    count, whole = len(workload.requests), sum(seconds.values())
    phases = list(estimate.phases.values())
    attention = sum(phase.attention_flops for phase in phases) / sum(phase.flops for phase in phases)
    return (
        f"{workload.name} {workload.variant}",
        f"{sum(phase.flops for phase in phases) / 1e15:.3g}",
        f"{attention:.0%}",
        *(f"{seconds[name]:.3g}" if seconds[name] else "" for name in PHASES),
        f"{whole / count:.3g}",
        f"{count / whole:.3g}",
        f"{count / sum(fast.values()):.3g}",
    )


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.roofline`."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument(
        "--chip", nargs="+", choices=CHIPS, default=["h200"], metavar="C", help=" ".join(CHIPS)
    )
    parser.add_argument("--matrix-tflops", type=float, help="what the chip's large bf16 products reach")
    parser.add_argument("--bandwidth-tbs", type=float, help="what its copies reach, in TB/s")
    names = " ".join(BUILDERS)
    parser.add_argument(
        "--workload", nargs="+", choices=BUILDERS, default=list(BUILDERS), metavar="W", help=names
    )
    parser.add_argument("--large", type=int, default=1024, help="side of W1's pictures in pixels (1024)")
    parser.add_argument("--small", type=int, default=512, help="side of all others' (512)")
    parser.add_argument("--reference", type=int, default=512, help="side of references (512)")
    return parser


def choose_chips(options: argparse.Namespace) -> list[Chip]:
    """The chips, with the rates that were given instead of theirs. Exits with 2 for one that is no rate."""
    given = {name: getattr(options, name) for name in ("matrix_tflops", "bandwidth_tbs")}
    for name, value in given.items():
        if value is not None and not value > 0:
            sys.exit(_refuse(f"--{name.replace('_', '-')} {value:g}: give a number above 0"))
    own = {name: value for name, value in given.items() if value is not None}
    return [replace(CHIPS[name], **own) for name in options.chip]


def _refuse(message: str) -> int:
    print(f"bench.roofline: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    chips = choose_chips(options)
    for name in ("large", "small", "reference"):
        side, stride = getattr(options, name), BAGEL_7B.latent_stride
        if side < stride or side % stride:
            return _refuse(f"--{name} {side}: give a multiple of {stride}")
    sizes = Sizes(options.large, options.small, options.reference)
    workloads = [one for name in options.workload for one in build_workloads(BAGEL_7B, name, sizes=sizes)]
    estimates = [Estimate.of(BAGEL_7B, workload.requests) for workload in workloads]
    columns = ("", "PFLOP", "attention", *PHASES, "s/image", "images/s", "fp8")
    for chip in chips:
        print(f"{chip.name}: {chip.matrix_tflops:g} TFLOP/s, {chip.bandwidth_tbs:g} TB/s; seconds by phase")
        pairs = zip(workloads, estimates, strict=True)
        print_table(columns, [describe(workload, chip, estimate) for workload, estimate in pairs])
    return 0


if __name__ == "__main__":
    sys.exit(main())
