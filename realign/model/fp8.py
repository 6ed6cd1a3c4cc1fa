"""The generation expert's linears as products of float8_e4m3fn: quantised weights, static scales of inputs.

What a linear reads is quantised where it is made: by the norms, the gated activation, and after attention.
Scales are powers of two, one for a tensor: a float8 has the same relative precision under any scale, so that
others, or one for each channel, would gain range only; and scaling by these is exact. They are found by
running prompts once (`recording_inputs`): the least that holds the largest input seen.

On a GPU of compute capability 8.9 and above the products are torch's own (cuBLAS; scales by row are slower
there). On a CPU they are dequantised and computed in float32, to measure what fp8 costs in quality. The
weights stay beside their float8 copies, for what publishes new ones.

L tokens, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from realign.model.linear import linear_by_rows
from realign_kernels import mot_norm_fp8, quantize_fp8, swiglu_fp8

if TYPE_CHECKING:
    from realign.model.bagel import Bagel

LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
READERS = {"input_norm": "qkv_proj", "post_attention_norm": "gate_up_proj"}  # of what a norm gives
MAX_E4M3 = 448.0
MULTIPLE = 16  # of the sizes that torch's product takes
MIN_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Fp8Scales:
    """Scales of what each layer's generation linears read, by `LINEARS`, and whose they are.

    Attributes:
        model: fingerprint of the checkpoint that they were found with.
    """

    model: str
    layers: tuple[Mapping[str, float], ...]

    @classmethod
    def load(cls, path: str | Path) -> Fp8Scales:
        """Raises: ValueError for a file that is not there, or holds something else."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = tuple({name: float(layer[name]) for name in LINEARS} for layer in found["layers"])
            scales = cls(str(found["model"]), layers)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}): `realign calibrate` makes one"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path} holds no fp8 scales: `realign calibrate` makes them") from None
        if not all(math.isfinite(scale) and scale > 0 for layer in layers for scale in layer.values()):
            raise ValueError(
                f"{path} has a scale that is not a positive number: `realign calibrate` makes them"
            )
        return scales

    def check_model(self, fingerprint: str) -> None:
        """Raises: ValueError where the scales are of another checkpoint."""
        if self.model != fingerprint:
            raise ValueError("the fp8 scales are of another checkpoint: `realign calibrate` makes this one's")

    def save(self, path: str | Path) -> None:
        layers = [dict(layer) for layer in self.layers]
        text = json.dumps({"model": self.model, "layers": layers}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


def find_scale(largest: float) -> float:
    """The least power of two that brings numbers up to `largest` within e4m3's 448; 1 where all are 0.

    Raises: ValueError for a number that is not finite.
    """
    if not math.isfinite(largest):
        raise ValueError(f"the largest number is {largest}: there is no scale for it")
    if largest == 0:
        return 1.0
    fraction, exponent = math.frexp(largest / MAX_E4M3)  # fraction from .5 to below 1
    return 2.0 ** (exponent - 1 if fraction == 0.5 else exponent)


class Fp8Linear:
    """`linear` of quantised inputs, with a float8 copy of its weight."""

    def __init__(self, linear: nn.Linear, input_scale: float) -> None:
        weight_OI = linear.weight
        self.linear, self.input_scale = linear, input_scale
        self.codes_OI = torch.empty(weight_OI.shape, dtype=torch.float8_e4m3fn, device=weight_OI.device)
        self.input_scale_1 = torch.tensor(input_scale, device=weight_OI.device)
        self.weight_scale_1 = torch.ones_like(self.input_scale_1)
        self.requantize()

    @torch.no_grad()
    def requantize(self) -> None:
        """Quantise the weight as it is now, in place: captured products stay valid."""
        weight_OI = self.linear.weight
        scale = find_scale(float(weight_OI.abs().max()))
        self.codes_OI.copy_(quantize_fp8(weight_OI, scale))
        self.weight_scale_1.fill_(scale)

    def __call__(self, codes_LI: Tensor) -> Tensor:
        """[L, O] in the dtype of the layer, from float8 [L, I]."""
        return self.multiply(codes_LI) if codes_LI.is_cuda else self.multiply_dequantised(codes_LI)

    def multiply(self, codes_LI: Tensor) -> Tensor:
        """By torch's product; bfloat16."""
        scales, dtype = (self.input_scale_1, self.weight_scale_1), self.linear.weight.dtype
        return torch._scaled_mm(
            codes_LI, self.codes_OI.t(), *scales, self.linear.bias, out_dtype=dtype, use_fast_accum=True
        )

    def multiply_dequantised(self, codes_LI: Tensor) -> Tensor:
        """In float32, rounded once; a row's bits are its own."""
        bias, dtype = self.linear.bias, self.linear.weight.dtype
        product_LO = linear_by_rows(codes_LI.float(), self.codes_OI.float())
        product_LO = product_LO * (self.input_scale_1 * self.weight_scale_1)
        return (product_LO if bias is None else product_LO + bias.float()).to(dtype)


class Fp8Expert:
    """What a layer's generation expert does with its tokens, on float8 products.

    It has the methods of the expert that a layer calls, and the norm that comes before.
    """

    def __init__(self, expert: nn.Module, scales: Mapping[str, float]) -> None:
        self.linears = {name: Fp8Linear(getattr(expert, name), scales[name]) for name in LINEARS}

    def norm(
        self,
        name: str,
        hidden_LE: Tensor,
        residual_LE: Tensor | None,
        weights: Sequence[Tensor],
        num_und: int,
        eps: float,
    ) -> tuple[Tensor, list[Tensor]]:
        """The residual stream, and what each expert's next linear reads: understanding's first, if any."""
        scale = self.linears[READERS[name]].input_scale
        *normed, total_LE = mot_norm_fp8(hidden_LE, weights, num_und, scale, eps, residual_LE)
        return total_LE, normed if num_und else normed[1:]

    def qkv_proj(self, codes_LI: Tensor) -> Tensor:
        return self.linears["qkv_proj"](codes_LI)

    def o_proj(self, attended_LI: Tensor) -> Tensor:
        linear = self.linears["o_proj"]
        return linear(quantize_fp8(attended_LI, linear.input_scale))

    def mlp(self, codes_LI: Tensor) -> Tensor:
        down = self.linears["down_proj"]
        return down(swiglu_fp8(self.linears["gate_up_proj"](codes_LI), down.input_scale))


def use_fp8(model: Bagel, scales: Fp8Scales) -> None:
    """Switch the generation expert of a model to float8 products, for good; published weights follow.

    Raises: ValueError where the scales are of another model, or the device cannot multiply float8.
    """
    layers = model.decoder.layers
    if len(scales.layers) != len(layers):
        raise ValueError(f"the fp8 scales are of {len(scales.layers)} layers: the model has {len(layers)}")
    check_device(model)
    linears = {}
    for index, (layer, own) in enumerate(zip(layers, scales.layers, strict=True)):
        layer.fp8 = Fp8Expert(layer.gen, own)
        for name, linear in layer.fp8.linears.items():
            linears[f"decoder.layers.{index}.gen.{name}.weight"] = linear
    model.announce_weights(linears.keys())  # what was read before is of other numbers
    model.on_weights_changed.append(build_listener(linears))


def build_listener(linears: Mapping[str, Fp8Linear]) -> Callable[[Collection[str]], None]:
    """Quantises anew what was published, by the names of parameters."""

    def follow(names: Collection[str]) -> None:
        for name in linears.keys() & set(names):
            linears[name].requantize()

    return follow


def check_device(model: Bagel) -> None:
    """Raises: ValueError where the device, dtype or sizes of a model have no float8 product."""
    if model.device.type == "cpu":
        return
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < MIN_CAPABILITY:
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or more: {model.device} is none")
    if model.dtype != torch.bfloat16:
        raise ValueError(f"fp8 on a GPU needs the dtype bfloat16: the model is {model.dtype}")
    for name in LINEARS:
        for size in getattr(model.decoder.layers[0].gen, name).weight.shape:
            if size % MULTIPLE:
                raise ValueError(
                    f"fp8 on a GPU needs sizes that are multiples of {MULTIPLE}: {name} has {size}"
                )


@contextmanager
def recording_inputs(model: Bagel) -> Iterator[Callable[[], tuple[dict[str, float], ...]]]:
    """While it lasts, what the generation linears read is watched; gives what tells the scales for it.

    The largest numbers are kept on the device, in place: steps that are captured tell theirs too.
    """
    handles, largest = [], []
    for layer in model.decoder.layers:
        own = {name: torch.zeros((), device=model.device) for name in LINEARS}
        largest.append(own)
        handles += [getattr(layer.gen, name).register_forward_pre_hook(_watch(own[name])) for name in LINEARS]
    try:
        yield lambda: tuple({name: find_scale(float(own[name])) for name in LINEARS} for own in largest)
    finally:
        for handle in handles:
            handle.remove()


def _watch(largest: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    @torch.no_grad()
    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel():
            torch.maximum(largest, inputs[0].abs().max().float(), out=largest)

    return watch
