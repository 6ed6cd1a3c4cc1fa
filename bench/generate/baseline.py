"""The reference's inference as it stands: one request at a time, one branch after the other, token by token.

What is done, in which order, is ByteDance-Seed/Bagel's `inferencer.py` and `modeling/bagel/bagel.py`: each
part of a prompt is read in a forward of its own, a branch begins as a copy of what was read so far, each step
of a picture is a forward for every branch, a text that was written is read again. What a request asks for
(reasoning, branches, noise by name) is ours, so that the pictures are the engine's. The weights, the ViT and
the autoencoder are our model's own; the autoencoder is called as the engine calls it.

L tokens, C numbers of a latent token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from bench.generate.clock import Clock, NoClock
from bench.generate.forward import Cache, as_linear, lay_out_picture, run_decoder
from bench.generate.reading import ContextReader
from realign.model.bagel import Bagel, unpatchify_latent
from realign.model.config import BagelConfig
from realign.reasoning.programs import PROGRAMS
from realign.runtime.noise import NoiseKey, normal
from realign.runtime.prepare import PreparedPicture, fit_picture, to_picture
from realign.runtime.request import Request, TextPart, TextTurn
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from realign_kernels.philox_normal.reference import MASK, philox

Prepare = Callable[[Image.Image, BagelConfig], PreparedPicture]
# Of the number of a step, the latents before it and their velocity: the latents after it.
Advance = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Made:
    """What came of a request: the text before the picture or None, final latents [L, C], the picture."""

    turn: TextTurn | None
    latent_LC: Tensor
    image: Image.Image


@dataclass(eq=False)
class Branches:
    """What each branch has read; those that guidance does not use are None."""

    conditional: Cache
    text: Cache | None = None
    image: Cache | None = None


class Flow:
    """The velocities of a picture whose branches were read."""

    def __init__(
        self, reader: ContextReader, branches: Branches, size: tuple[int, int], guidance: GuidanceSettings
    ) -> None:
        self.model, self.reader, self.guidance = reader.model, reader, guidance
        self.caches = {name: cache for name, cache in vars(branches).items() if cache is not None}
        self.place_L = reader.find_places(*size)
        num_tokens = len(self.place_L) + 2
        self.layouts = {
            name: lay_out_picture(cache, num_tokens, self.model.device, is_latent=True)
            for name, cache in self.caches.items()
        }

    def velocity(self, sample_LC: Tensor, time: float, is_guided: bool) -> Tensor:
        """The guided velocity, [L, C]: the branches that guide one after the other."""
        time_L = torch.full((len(sample_LC),), time, device=self.model.device)
        framed_LE = self.reader.embed_latent(sample_LC, time_L, self.place_L)
        names = [name for name in self.caches if name == "conditional" or is_guided]
        return guide([self._run_branch(framed_LE, name) for name in names], self.guidance)

    def _run_branch(self, framed_LE: Tensor, name: str) -> Tensor:
        layout = self.layouts[name]
        hidden_LE = run_decoder(self.model, framed_LE, layout, self.caches[name])
        return as_linear(self.model.llm2vae)(hidden_LE)[layout.latent_index_L]


class Baseline:
    """Makes the picture of a request, as `Engine` does of many.

    Args:
        prepare: how reference pictures are fitted to the model.
        clock: is told the phases.
    """

    def __init__(
        self, model: Bagel, prepare: Prepare = fit_picture, clock: Clock | NoClock | None = None
    ) -> None:
        self.model, self.prepare, self.clock = model, prepare, clock or NoClock()
        self.reader = ContextReader(model, self.clock)

    @torch.no_grad()
    def run(self, request: Request, advance: Advance | None = None) -> Made:
        """One request from its prompt to its picture; `advance` as for `draw`."""
        with self.clock.phase("other"):
            settings, turn = request.settings, None
            with self.clock.phase("reading"):
                branches, (height, width) = self.read_prompt(request)
            if PROGRAMS[settings.reasoning].does_reason:
                key = NoiseKey(request.seed, request.id, stream="text")
                with self.clock.phase("reasoning"):
                    turn = self.write_text(branches.conditional.copy(), settings.text, key)
                with self.clock.phase("rereading"):
                    self.reader.read_text(branches.conditional, turn.text)
            with self.clock.phase("denoising"):
                noise_LC = self._make_noise(request, height, width)
                latent_LC = self.draw(branches, height, width, settings, noise_LC, advance)
            with self.clock.phase("autoencoder"):
                return Made(turn, latent_LC, self.decode(latent_LC, height, width))

    def read_prompt(self, request: Request) -> tuple[Branches, tuple[int, int]]:
        """What the branches read before any reasoning, and the picture's height and width."""
        settings, config = request.settings, self.model.config
        program = PROGRAMS[settings.reasoning]
        wanted = program.read_by_branch(request)
        branches = Branches(Cache(), None, Cache() if "image" in wanted else None)
        size = config.default_image_size
        system = () if program.system_text is None else (TextPart(program.system_text),)
        for part in (*system, *request.prompt.parts):
            if isinstance(part, TextPart):
                branches.text = branches.conditional.copy() if "text" in wanted else None
                self._read_text_in_branches(branches, part.text)
                continue
            picture = self.prepare(part.image, config)
            self.reader.read_picture(branches.conditional, picture)
            branches.text = branches.conditional.copy() if "text" in wanted else None
            if config.size_follows_picture:
                size = picture.height, picture.width
        return branches, size if settings.height is None else (settings.height, settings.width)

    def _read_text_in_branches(self, branches: Branches, text: str) -> None:
        for cache in (branches.conditional, branches.image):
            if cache is not None:
                self.reader.read_text(cache, text)

    def write_text(self, cache: Cache, settings: TextSettings, key: NoiseKey) -> TextTurn:
        """A text after a context, which it is added to: a forward for each token.

        Raises: ValueError for top-p, which the reference does not have.
        """
        if settings.top_p < 1:
            raise ValueError(f"top_p is {settings.top_p}: the reference has no top-p, so it must be 1")
        tokenizer, ids, stopped = self.model.tokenizer, [], False
        uniforms = draw_uniforms(key, settings.max_tokens) if settings.temperature > 0 else None
        token = tokenizer.bos
        while len(ids) < settings.max_tokens and not stopped:
            logits_V = self.reader.score_next(cache, token)
            token = choose_token(logits_V, settings.temperature, uniforms[len(ids)] if uniforms else None)
            stopped = token == tokenizer.eos
            ids += [] if stopped else [token]
        spoken = ids[: ids.index(tokenizer.bos)] if tokenizer.bos in ids else ids
        return TextTurn(tuple(ids), tokenizer.decode(spoken), stopped)

    @torch.no_grad()
    def draw(
        self,
        branches: Branches,
        height: int,
        width: int,
        settings: Settings,
        noise_LC: Tensor,
        advance: Advance | None = None,
    ) -> Tensor:
        """Noise to final latents [L, C], step by step; `advance` takes a step, by default Euler's."""
        flow = Flow(self.reader, branches, (height, width), settings.guidance)
        advance, sample_LC = advance or build_euler(settings), noise_LC
        for number, (time, _, is_guided) in enumerate(list_steps(settings)):
            sample_LC = advance(number, sample_LC, flow.velocity(sample_LC, time, is_guided))
        return sample_LC

    def decode(self, latent_LC: Tensor, height: int, width: int) -> Image.Image:
        """Latents to a picture."""
        config = self.model.config
        grid = (height // config.latent_stride, width // config.latent_stride)
        latent_CHW = unpatchify_latent(latent_LC, *grid, config.latent_patch_size)
        latent_1CHW = latent_CHW[None].to(self.model.dtype, memory_format=torch.channels_last)
        return to_picture(self.model.autoencoder.decode(latent_1CHW)[0])

    def _make_noise(self, request: Request, height: int, width: int) -> Tensor:
        stride, channels = self.model.config.latent_stride, self.model.config.latent_dim
        shape = (height // stride * (width // stride), channels)
        return normal(NoiseKey(request.seed, request.id), shape).to(self.model.device)


def list_steps(settings: Settings) -> list[tuple[float, float, bool]]:
    """Of every step its time, how far it goes, and whether guidance is on; in float32, as the reference's."""
    time_S = torch.linspace(1, 0, settings.num_timesteps)
    time_S = settings.timestep_shift * time_S / (1 + (settings.timestep_shift - 1) * time_S)
    low, high = settings.guidance.interval
    is_guided_S = (time_S > low) & (time_S <= high) & (settings.guidance.text_scale > 1)
    steps = (time_S[:-1], time_S[:-1] - time_S[1:], is_guided_S[:-1])
    return list(zip(*(numbers.tolist() for numbers in steps), strict=True))


def build_euler(settings: Settings) -> Advance:
    """Steps of the ODE."""
    steps = list_steps(settings)
    return lambda number, sample_LC, velocity_LC: sample_LC - velocity_LC * steps[number][1]


def choose_token(logits_V: Tensor, temperature: float, uniform: float | None) -> int:
    """The likeliest, or that at a uniform number of the cumulative distribution, in the order of the ids."""
    if uniform is None:
        return int(logits_V.argmax())
    total_V = torch.softmax(logits_V.double() / temperature, dim=-1).cumsum(dim=-1)
    return int(torch.searchsorted(total_V, uniform * total_V[-1], right=True))


def draw_uniforms(key: NoiseKey, count: int) -> list[float]:
    """The uniforms of a text's first tokens, as `token_uniforms` has them; all in one call."""
    number = key.number()
    key_N2 = torch.tensor([[number & MASK, (number >> 32) & MASK]]).expand(count, 2)
    counter_N4 = torch.zeros(count, 4, dtype=torch.int64)
    counter_N4[:, 1] = torch.arange(count)
    return ((philox(counter_N4, key_N2)[:, 0] >> 8).float() * 2.0**-24).tolist()


def guide(velocities: Sequence[Tensor], guidance: GuidanceSettings) -> Tensor:
    """The guided velocity of one sample, from the conditional one and those of the branches that act."""
    cond_LC = velocities[0]
    if len(velocities) == 1:
        return cond_LC
    guided_LC = velocities[1] + guidance.text_scale * (cond_LC - velocities[1])
    if guidance.renorm == "text_channel":
        guided_LC = guided_LC * _renorm(cond_LC, guided_LC, guidance)
    if len(velocities) == 3:
        guided_LC = velocities[2] + guidance.image_scale * (guided_LC - velocities[2])
    if guidance.renorm in ("global", "channel"):
        guided_LC = guided_LC * _renorm(cond_LC, guided_LC, guidance)
    return guided_LC


def _renorm(cond_LC: Tensor, guided_LC: Tensor, guidance: GuidanceSettings) -> Tensor:
    dim = None if guidance.renorm == "global" else -1
    cond, guided = (torch.linalg.vector_norm(v, dim=dim, keepdim=True) for v in (cond_LC, guided_LC))
    return (cond / (guided + 1e-8)).clamp(min=guidance.renorm_min, max=1.0)
