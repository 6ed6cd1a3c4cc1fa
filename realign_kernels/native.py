"""The compiled extension `realign_kernels._C`, as torch custom ops.

`csrc` knows nothing of torch: it takes addresses and counts. The ops here check nothing (the `api.py` of each
op has); they allocate the result, make tensors contiguous, fill the parameters and launch. Arguments have the
names of the parameters in `csrc`. L packed tokens, C channels, B samples.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load_extension(name: str, present: str, absent: str) -> tuple[ModuleType | None, str]:
    try:
        extension = importlib.import_module(f"realign_kernels.{name}")
    except ImportError as error:
        return None, f"{absent} ({error})"
    return extension, f"{present}: {extension.__file__}"


_C, _STATE = _load_extension(
    "_C", "compiled extension", "no compiled extension, plain torch runs in its place"
)
_C_CUDA, _CUDA_STATE = _load_extension("_C_cuda", "compiled CUDA kernels", "no compiled CUDA kernels")


def is_available() -> bool:
    """True if the compiled extension was built and loads."""
    return _C is not None


def describe() -> str:
    """One line: where the extension is, or why it is not."""
    return _STATE


def has_cuda() -> bool:
    """True if the CUDA kernels were built and load; they do so without a GPU too."""
    return _C_CUDA is not None


def describe_cuda() -> str:
    """One line: where the CUDA kernels are, or why they are not."""
    return _CUDA_STATE


def _launch(run: Callable, params: Any, cu_seqlens: Tensor, num_channels: int, **arguments: Any) -> None:
    """Fill the parameters of an op on packed samples and run it; None leaves a parameter as it is."""
    params.num_channels = num_channels
    params.num_samples = cu_seqlens.shape[0] - 1
    params.num_threads = torch.get_num_threads()
    arguments["cu_seqlens"] = cu_seqlens
    alive = []
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            argument = argument.contiguous()
            alive.append(argument)
            argument = argument.data_ptr()
        if argument is not None:
            setattr(params, name, argument)
    run(params)


def _allocate_step(sample_LC: Tensor, logprob_weight_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The next sample, and the log-prob of each sample: none if it is not asked for."""
    next_LC = torch.empty(sample_LC.shape, dtype=sample_LC.dtype, device=sample_LC.device)
    num_samples = 0 if logprob_weight_B is None else logprob_weight_B.shape[0]
    return next_LC, torch.empty(num_samples, dtype=torch.float32, device=sample_LC.device)


def _allocate_logprob(constant_B: Tensor, bias_weight_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The log-prob of each sample, and its bias: none if it is not asked for."""
    num_samples = constant_B.shape[0]
    logprob_B = torch.empty(num_samples, dtype=torch.float32, device=constant_B.device)
    num_biases = 0 if bias_weight_B is None else num_samples
    return logprob_B, torch.empty(num_biases, dtype=torch.float32, device=constant_B.device)


_GUIDANCE = {
    "cond": "Tensor",
    "text_uncond": "Tensor?",
    "image_uncond": "Tensor?",
    "cu_seqlens": "Tensor",
    "text_scale": "Tensor",
    "image_scale": "Tensor?",
    "renorm": "Tensor",
    "renorm_min": "Tensor?",
}
_STEP = {
    "a": "Tensor",
    "b": "Tensor",
    "std": "Tensor?",
    "noise": "Tensor?",
    "noise_key": "Tensor?",
    "noise_step": "Tensor?",
    "logprob_weight": "Tensor?",
    "logprob_constant": "Tensor?",
    "reduce_sum": "bool",
}


def _define(name: str, types: dict[str, str], returns: str) -> Callable:
    """Make a CPU op of a function that takes named arguments. The op takes them by name or in this order."""
    arguments = ", ".join(f"{type_} {argument}" for argument, type_ in types.items())

    def decorate(run: Callable) -> Callable:
        return torch.library.custom_op(
            f"realign_kernels::{name}",
            lambda *values: run(**dict(zip(types, values, strict=True))),
            mutates_args=(),
            device_types="cpu",
            schema=f"({arguments}) -> {returns}",
        )

    return decorate


@_define("guided_velocity", {**_GUIDANCE, "out_dtype": "ScalarType"}, "Tensor")
def guided_velocity_cpp(*, cond: Tensor, out_dtype: torch.dtype, **arguments: Tensor | None) -> Tensor:
    """`guided_velocity` on the CPU; renorm as int32 indexes into `RENORMS`."""
    out_LC = torch.empty(cond.shape, dtype=out_dtype)
    params = _C.FlowParams()
    params.velocity_dtype = DTYPE_CODES[cond.dtype]
    params.out_dtype = DTYPE_CODES[out_dtype]
    _launch(_C.guided_flow_step, params, num_channels=cond.shape[1], cond=cond, out=out_LC, **arguments)
    return out_LC


@guided_velocity_cpp.register_fake
def _(cond, *rest):
    return torch.empty(cond.shape, dtype=rest[-1], device=cond.device)


def _run_step(
    *, sample: Tensor, cond: Tensor, logprob_weight: Tensor | None, **arguments: Tensor | bool | None
) -> tuple[Tensor, Tensor]:
    next_LC, logprob_B = _allocate_step(sample, logprob_weight)
    params = _C.FlowParams()
    params.velocity_dtype = DTYPE_CODES[cond.dtype]
    params.sample_dtype = params.out_dtype = DTYPE_CODES[sample.dtype]
    if logprob_weight is not None:
        arguments |= {"logprob_weight": logprob_weight, "logprob": logprob_B}
    fields = {"sample": sample, "cond": cond, "out": next_LC}
    _launch(_C.guided_flow_step, params, num_channels=sample.shape[1], **fields, **arguments)
    return next_LC, logprob_B


@_define("guided_flow_step", {"sample": "Tensor", **_GUIDANCE, **_STEP}, "(Tensor, Tensor)")
def guided_flow_step_cpp(**arguments: Tensor | bool | None) -> tuple[Tensor, Tensor]:
    """`guided_flow_step` on the CPU: the next sample, and the log-probs if they have a weight."""
    return _run_step(**arguments)


@_define(
    "flow_step",
    {"sample": "Tensor", "velocity": "Tensor", "cu_seqlens": "Tensor", **_STEP},
    "(Tensor, Tensor)",
)
def flow_step_cpp(*, velocity: Tensor, **arguments: Tensor | bool | None) -> tuple[Tensor, Tensor]:
    """`flow_step` on the CPU: the guided step without guidance."""
    return _run_step(cond=velocity, **arguments)


@flow_step_cpp.register_fake
@guided_flow_step_cpp.register_fake
def _(sample, *rest):
    return _allocate_step(sample, rest[-3])


_LOGPROB = {
    "sample": "Tensor",
    "velocity": "Tensor",
    "next_sample": "Tensor",
    "cu_seqlens": "Tensor",
    "a": "Tensor",
    "b": "Tensor",
    "weight": "Tensor",
    "constant": "Tensor",
    "reduce_sum": "bool",
    "old_velocity": "Tensor?",
    "bias_weight": "Tensor?",
}


@_define("sde_logprob", _LOGPROB, "(Tensor, Tensor)")
def sde_logprob_cpp(
    *, old_velocity: Tensor | None, bias_weight: Tensor | None, **arguments: Tensor | bool
) -> tuple[Tensor, Tensor]:
    """`sde_logprob` on the CPU: the log-probs, and the biases if they have a weight."""
    logprob_B, bias_B = _allocate_logprob(arguments["constant"], bias_weight)
    params = _C.LogProbParams()
    params.sample_dtype = DTYPE_CODES[arguments["sample"].dtype]
    params.velocity_dtype = DTYPE_CODES[arguments["velocity"].dtype]
    if bias_weight is not None:
        params.old_velocity_dtype = DTYPE_CODES[old_velocity.dtype]
        arguments |= {"old_velocity": old_velocity, "bias_weight": bias_weight, "bias": bias_B}
    num_channels = arguments["sample"].shape[1]
    _launch(_C.sde_logprob, params, num_channels=num_channels, logprob=logprob_B, **arguments)
    return logprob_B, bias_B


@sde_logprob_cpp.register_fake
def _(*values):
    arguments = dict(zip(_LOGPROB, values, strict=True))
    return _allocate_logprob(arguments["constant"], arguments["bias_weight"])


_NORMAL = {
    "key": "Tensor",
    "step": "Tensor",
    "cu_seqlens": "Tensor",
    "num_tokens": "int",
    "num_channels": "int",
}


@_define("philox_normal", _NORMAL, "Tensor")
def philox_normal_cpp(*, num_tokens: int, num_channels: int, **arguments: Tensor) -> Tensor:
    """`philox_normal` on the CPU."""
    out_LC = torch.empty(num_tokens, num_channels, dtype=torch.float32)
    _launch(_C.philox_normal, _C.NormalParams(), num_channels=num_channels, out=out_LC, **arguments)
    return out_LC


@philox_normal_cpp.register_fake
def _(key, step, cu_seqlens, num_tokens, num_channels):
    return torch.empty(num_tokens, num_channels, dtype=torch.float32, device=key.device)
