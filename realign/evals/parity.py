"""Checks this implementation against recorded outputs of the reference one.

A golden folder holds a small checkpoint and what BAGEL's own code computed with it in float32 on a CPU (its
README says how): `checkpoint/`, `cases.json` (settings, layouts, token ids), `cases.safetensors` (inputs and
outputs). Nothing about its sizes is assumed. An error is the largest absolute difference relative to the
largest value of the recorded tensor, so that a tolerance means the same for every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from realign.evals.golden import CaseResult, Record, parse_part, read_cases, read_tensors, relative_error
from realign.evals.rl import RLGolden
from realign.model.bagel import Bagel, patchify_latent
from realign.model.config import ResizeRule
from realign.model.embeddings import flattened_position_ids
from realign.model.training import PackedBatch, PackedLosses, packed_losses
from realign.model.weights import list_parts
from realign.reasoning.programs import PROGRAMS, ReasoningProgram
from realign.runtime.context import (
    Context,
    build_text_block,
    build_vae_blocks,
    build_vit_blocks,
    extend,
    latent_position_ids,
)
from realign.runtime.engine import Engine
from realign.runtime.guidance import Branch
from realign.runtime.operations import Draw, Operation
from realign.runtime.pictures import decode_pictures
from realign.runtime.prepare import PreparedPicture, crop_picture, resized_size
from realign.runtime.request import ImagePart, Prompt, Request, Sample, TextPart
from realign.runtime.sampler import DenoiseJob, denoise
from realign.runtime.schedule import Schedule, shift_time
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from realign.runtime.text import TextDecoder

RESIZE_RULES = {"vae": ResizeRule(1024, 512, 16), "vit": ResizeRule(980, 224, 14)}
BRANCH_KINDS = {"conditional": "conditional", "text_unconditional": "text", "image_unconditional": "image"}
TOKEN_NAMES = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "start_of_image": "start_of_image",
    "end_of_image": "end_of_image",
}
# A gradient that is zero but for rounding has no scale of its own: that of the largest one, times this.
GRAD_FLOOR = 1e-3


@dataclass(frozen=True)
class Tolerances:
    """Largest error that passes, relative (`image`: in levels of 255).

    Attributes:
        tensor: what one pass through (part of) the model gives.
        sampled: what a whole denoising loop gives.
        image: decoded pictures.
        grad: gradient norms.
        is_exact: greedy text must be equal; else each token must be as likely as the recorded one, within
            `tensor`.
    """

    tensor: float
    sampled: float
    image: float
    grad: float
    is_exact: bool


# float32 is the promise. In bfloat16 every rounding is up to 0.004: the bounds are about twice the largest
# errors measured on a CPU, on bagel-tiny and two folders of other sizes (0.045, 0.047, 13 levels, 0.041).
TOLERANCES = {
    torch.float32: Tolerances(1e-4, 1e-4, 1.0, 1e-4, is_exact=True),
    torch.bfloat16: Tolerances(0.1, 0.1, 24.0, 0.1, is_exact=False),
}


def check_golden(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> list[CaseResult]:
    """Compute every case of a golden folder, and compare.

    Raises: ValueError where the folder is not a golden folder, or is damaged.
    """
    golden = Golden(folder, device, dtype)
    return [result for name in golden.groups() for result in golden.check(name)]


class Golden:
    """A golden folder, and its model on a device in a dtype."""

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in TOLERANCES:
            raise ValueError(f"no tolerances for {dtype}: must be one of {', '.join(map(str, TOLERANCES))}")
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.tolerances = TOLERANCES[dtype]
        self.file = read_cases(self.folder / "cases.json")
        self.cases: Record = self.file["cases"]
        self.tensors = read_tensors(self.folder / "cases.safetensors")
        self._contexts: dict[str, Context] = {}

    def groups(self) -> list[str]:
        """Names of the groups of cases that the folder holds."""
        found = {
            "tokens": True,
            "vit": "vit.hidden" in self.tensors,
            "vae": "vae.pixels" in self.tensors,
            "time": "time.t" in self.tensors,
            "contexts": bool(self._names("context.")),
            "text": "text.logits" in self.tensors,
            "flow": bool(self._names("flow.")),
            "batch": "batch" in self.cases,
            "train": "train" in self.cases,
            "interleave": "interleave" in self.cases and self.tolerances.is_exact,
            "resize": "resize" in self.file,
            "rl": (self.folder / "rl.safetensors").exists(),
        }
        return [name for name, is_there in found.items() if is_there]

    def check(self, group: str) -> list[CaseResult]:
        """Compute and compare the cases of one group; float32 is exact float32, never TF32."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return getattr(self, f"_check_{group}")()

    @cached_property
    def model(self) -> Bagel:
        """The folder's checkpoint."""
        return Bagel.from_pretrained(self.folder / "checkpoint", device=self.device, dtype=self.dtype)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The recorded reference pictures, by their numbers."""
        names = sorted(self._tensor_names("image."), key=lambda name: int(name.removeprefix("image.")))
        return [Image.fromarray(self.tensors[name].numpy()) for name in names]

    @cached_property
    def pictures(self) -> list[PreparedPicture]:
        """The same as the model sees them; the reference run did not resize them."""
        return [crop_picture(image, self.model.config) for image in self.images]

    # -- cases, one method a group ---------------------------------------------------------------------

    def _check_tokens(self) -> list[CaseResult]:
        tokenizer = self.model.tokenizer
        wrong = sum(
            getattr(tokenizer, ours) != self.file["token_ids"][name] for name, ours in TOKEN_NAMES.items()
        )
        for text, ids in zip(self.file["texts"], self.file["text_ids"], strict=True):
            wrong += list(build_text_block(self.model, text).ids) != ids
        return [CaseResult("tokens", wrong, 0)]

    def _check_rl(self) -> list[CaseResult]:
        return RLGolden(self.folder, self.device).check()

    @torch.no_grad()
    def _check_vit(self) -> list[CaseResult]:
        packed = [self._input(f"vit.{name}") for name in ("patches", "position_ids", "cu_seqlens")]
        hidden, tokens = self.model.vit(*packed), self.model.embed_vit(*packed)
        return [self._compare("vit.hidden", hidden), self._compare("vit.tokens", tokens)]

    @torch.no_grad()
    def _check_vae(self) -> list[CaseResult]:
        autoencoder = self.model.autoencoder
        latent = autoencoder.encode(self._input("vae.pixels").to(self.dtype))
        decoded = autoencoder.decode(self._input("vae.latent").to(self.dtype))
        return [self._compare("vae.latent", latent), self._compare("vae.decoded", decoded)]

    @torch.no_grad()
    def _check_time(self) -> list[CaseResult]:
        return [self._compare("time.embedding", self.model.time_embedder(self._input("time.t")))]

    def _check_contexts(self) -> list[CaseResult]:
        return [self._check_context(name) for name in self._names("context.")]

    def _check_context(self, name: str) -> CaseResult:
        case, context = self.cases[name], self._context(name)
        if (context.length, context.next_position) != (case["kv_len"], case["rope"]):
            return CaseResult(name, math.inf, self.tolerances.tensor)
        layers = range(self.model.config.llm.num_hidden_layers)
        errors = [self._error(f"{name}.key.{layer}", context.key(layer)) for layer in layers]
        errors += [self._error(f"{name}.value.{layer}", context.value(layer)) for layer in layers]
        return CaseResult(name, _worst(errors), self.tolerances.tensor)

    def _check_text(self) -> list[CaseResult]:
        """Along the recorded tokens: the greedy choices there are equal if and only if free ones are."""
        recorded = self._tensor("text.tokens")
        decoder = TextDecoder(self.model, [self._context("context.full")])
        logits = torch.cat([decoder.step(token.view(1)) for token in recorded]).cpu()
        chosen = logits.argmax(dim=-1)
        if self.tolerances.is_exact:
            begins_right = recorded[0] == self.model.tokenizer.bos
            wrong = int((chosen[:-1] != recorded[1:]).sum()) + (not begins_right)
            tokens = CaseResult("text.tokens", wrong, 0)
        else:
            golden = self._tensor("text.logits")
            gap = golden.max(dim=-1).values - golden.gather(1, chosen[:, None])[:, 0]
            tokens = CaseResult("text.tokens", float(gap.max() / golden.abs().max()), self.tolerances.tensor)
        return [tokens, self._compare("text.logits", logits)]

    def _check_flow(self) -> list[CaseResult]:
        """All settings in one batch."""
        flow = self.cases["flow"]
        results = []
        if "flow.position_ids" in self.tensors:
            ours = latent_position_ids(self.model, flow["height"], flow["width"]).cpu()
            is_same = torch.equal(ours, self._tensor("flow.position_ids"))
            results.append(CaseResult("flow.position_ids", 0 if is_same else math.inf, 0))
        names = self._names("flow.")
        jobs = [self._flow_job(flow, self.cases[name]) for name in names]
        for name, job, latent in zip(names, jobs, denoise(self.model, jobs), strict=True):
            results.append(self._compare(f"{name}.latent", latent, self.tolerances.sampled))
            if f"{name}.image" in self.tensors:
                (image,) = decode_pictures(self.model, [job], [latent])
                results.append(self._compare_image(f"{name}.image", image))
        return results

    def _flow_job(self, flow: Record, case: Record) -> DenoiseJob:
        scales = {
            "conditional": 1.0,
            "text_unconditional": case["cfg_text_scale"],
            "image_unconditional": case["cfg_img_scale"],
        }
        branches = tuple(
            Branch(self._context(context), scales[name], BRANCH_KINDS[name])
            for name, context in flow["branches"].items()
        )
        schedule = Schedule.build(case["num_timesteps"], case["timestep_shift"])
        noise = self._tensor("flow.noise")
        size = (flow["height"], flow["width"])
        return DenoiseJob(branches, *size, schedule, _guidance(case), noise_LC=noise)

    def _check_batch(self) -> list[CaseResult]:
        case = self.cases["batch"]
        blocks = [build_text_block(self.model, text) for text in case["texts"]]
        contexts = extend(self.model, [Context()] * len(blocks), blocks)
        schedule = Schedule.build(case["num_timesteps"], case["timestep_shift"])
        stride = self.model.config.latent_stride
        noises = self._tensor("batch.noise").split([h // stride * (w // stride) for h, w in case["sizes"]])
        jobs = [
            DenoiseJob((Branch(context),), height, width, schedule, noise_LC=noise)
            for context, (height, width), noise in zip(contexts, case["sizes"], noises, strict=True)
        ]
        return [
            self._compare(f"batch.latent.{number}", latent, self.tolerances.sampled)
            for number, latent in enumerate(denoise(self.model, jobs))
        ]

    def _check_train(self) -> list[CaseResult]:
        losses = packed_losses(self.model, self._train_batch())
        results = [
            self._compare("train.ce", losses.ce.detach()),
            self._compare("train.mse", losses.mse.detach()),
        ]
        return [*results, self._check_gradients(losses)]

    def _train_batch(self) -> PackedBatch:
        case, config = self.cases["train"], self.model.config
        latents, positions = [], []
        for latent_CHW, (height, width) in zip(
            self._input("train.latent"), case["latent_shapes"], strict=True
        ):
            patch = config.latent_patch_size
            latents.append(patchify_latent(latent_CHW[:, : height * patch, : width * patch], patch))
            positions.append(
                flattened_position_ids(height, width, config.max_latent_size, config.interpolate_pos)
            )
        even = torch.sigmoid(self._input("train.timestep_logits"))
        names = {"text_ids": "text_ids", "text_index": "text_indexes", "position_ids": "position_ids"}
        names |= {"vit_index": "vit_indexes", "latent_index": "vae_indexes", "noise": "noise"}
        names |= {"ce_index": "ce_indexes", "labels": "labels", "mse_index": "mse_indexes"}
        return PackedBatch(
            splits=[(sample["splits"], sample["modes"]) for sample in case["layout"]],
            vit_patches=self._input("vit.patches"),
            vit_position=self._input("vit.position_ids"),
            vit_cu_seqlens=self._input("vit.cu_seqlens"),
            latent=torch.cat(latents),
            latent_position=torch.cat(positions).to(self.device),
            timestep=shift_time(even, case["timestep_shift"]),
            **{ours: self._input(f"train.{name}") for ours, name in names.items()},
        )

    def _check_gradients(self, losses: PackedLosses) -> CaseResult:
        self.model.zero_grad()
        (losses.ce.mean() + losses.mse.mean()).backward()
        named = self.model.named_parameters()
        grads = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
        norms = {
            name: float(part.of(grads).float().norm())
            for name, part in list_parts(self.model).items()
            if part.parameter in grads
        }
        self.model.zero_grad()
        golden: dict[str, float] = self.cases["train"]["grad_norms"]
        floor = GRAD_FLOOR * max(golden.values())
        errors = [abs(norms.get(name, math.inf) - norm) / max(norm, floor) for name, norm in golden.items()]
        return CaseResult("train.grad_norms", _worst(errors), self.tolerances.grad)

    def _check_interleave(self) -> list[CaseResult]:
        """The whole call, through the engine."""
        case = self.cases["interleave"]
        program = PROGRAMS["none"]
        if case["think"]:
            program = replace(PROGRAMS["think"], system_text=case["system_prompt"])
        height, width = self._tensor("interleave.image").shape[:2]
        settings = Settings(
            height,
            width,
            num_timesteps=case["num_timesteps"],
            timestep_shift=case["timestep_shift"],
            guidance=replace(_guidance(case), for_text_prompts=True),
            # The reference counts bos.
            text=TextSettings(max_tokens=case.get("max_think_tokens", 2) - 1),
        )
        prompt = Prompt(tuple(self._part(name) for name in case["inputs"]))
        programs = {"none": _with_noise(program, self._tensor("interleave.noise"))}
        engine = Engine(self.model, programs, prepare=crop_picture)
        (sample,) = engine.run([Request("golden", prompt, settings=settings)])
        results = [self._compare_image("interleave.image", sample.image)]
        if case["think"]:
            results.insert(0, CaseResult("interleave.text", sample.reasoning.text != case["text"], 0))
        return results

    def _check_resize(self) -> list[CaseResult]:
        wrong = sum(
            resized_size(tuple(row["size"]), RESIZE_RULES[row["transform"]]) != tuple(row["resized"])
            for row in self.file["resize"]
        )
        return [CaseResult("resize", wrong, 0)]

    # -- what the cases are made of --------------------------------------------------------------------

    def _context(self, name: str) -> Context:
        if name not in self._contexts:
            context = Context()
            for kind, number, views in self._layout(name):
                context = self._read(context, kind, number, views)
            self._contexts[name] = context
        return self._contexts[name]

    def _layout(self, name: str) -> list[tuple[str, int, list[str]]]:
        """(text | image, number, views) of each part; `no_text` lacks the last text, `no_image` images."""
        layout = self.cases[name].get("layout") or self.cases["context.full"]["layout"]
        parts = [parse_part(part) for part in layout]
        if "layout" in self.cases[name]:
            return parts
        if name.endswith("no_image"):
            return [part for part in parts if part[0] == "text"]
        return parts[: max(index for index, part in enumerate(parts) if part[0] == "text")]

    def _read(self, context: Context, kind: str, number: int, views: Sequence[str]) -> Context:
        if kind == "text":
            blocks = [build_text_block(self.model, self.file["texts"][number])]
            return extend(self.model, [context], blocks)[0]
        for view in views:
            build = {"vae": build_vae_blocks, "vit": build_vit_blocks}[view]
            blocks = build(self.model, [getattr(self.pictures[number], f"{view}_CHW")])
            (context,) = extend(self.model, [context], blocks)
        return context

    def _part(self, name: str) -> TextPart | ImagePart:
        kind, number, _ = parse_part(name)
        return TextPart(self.file["texts"][number]) if kind == "text" else ImagePart(self.images[number])

    def _names(self, prefix: str) -> list[str]:
        return [name for name in self.cases if name.startswith(prefix)]

    def _tensor_names(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.folder / 'cases.safetensors'}: the tensor {name!r} is missing")
        return self.tensors[name]

    def _input(self, name: str) -> Tensor:
        return self._tensor(name).to(self.device)

    def _compare(self, name: str, ours: Tensor, tolerance: float | None = None) -> CaseResult:
        return CaseResult(name, self._error(name, ours), tolerance or self.tolerances.tensor)

    def _compare_image(self, name: str, ours: Image.Image) -> CaseResult:
        levels = torch.tensor(list(ours.tobytes())).view(ours.height, ours.width, -1)
        golden = self._tensor(name).long()
        error = math.inf if levels.shape != golden.shape else float((levels - golden).abs().max())
        return CaseResult(name, error, self.tolerances.image)

    def _error(self, name: str, ours: Tensor) -> float:
        return relative_error(ours, self._tensor(name))


def _guidance(case: Record) -> GuidanceSettings:
    """Guidance of a case; what it does not say is the reference's default."""
    return GuidanceSettings(
        text_scale=case["cfg_text_scale"],
        image_scale=case["cfg_img_scale"],
        interval=tuple(case.get("cfg_interval", (0.0, 1.0))),
        renorm=case.get("cfg_renorm_type", "global"),
        renorm_min=case.get("cfg_renorm_min", 0.0),
    )


def _with_noise(
    program: ReasoningProgram, noise_LC: Tensor
) -> Callable[[Request], Generator[Operation, Any, Sample]]:
    """The program, drawing from given noise."""

    def run(request: Request) -> Generator[Operation, Any, Sample]:
        inner, result = program(request), None
        while True:
            try:
                operation = inner.send(result)
            except StopIteration as end:
                return end.value
            result = yield (
                replace(operation, noise_LC=noise_LC) if isinstance(operation, Draw) else operation
            )

    return run


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN if there is one."""
    return float(torch.tensor(errors, dtype=torch.float64).max())
