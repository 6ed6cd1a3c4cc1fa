"""The compiled extension `realign_kernels._C`, as torch custom ops.

`csrc` knows nothing of torch: it takes addresses and counts. The ops here check nothing (the `api.py` of each
op has); they allocate the result, make tensors contiguous, fill the parameters and launch. Arguments have the
names of the parameters in `csrc`. L packed tokens, C channels, B samples.
"""

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN_TYPES = {Tensor, torch.nn.Parameter, torch.dtype, bool, int, float, type(None)}
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


class CPUOp:
    """A torch custom op for CPU tensors that takes named arguments.

    Called from eager code on plain tensors it runs at once: the way through torch's dispatcher and back into
    Python takes longer than a small step. Where tensors are traced, faked or wrapped it goes that way.
    """

    def __init__(self, name: str, arguments: str, results: str, run: Callable, allocate: Callable):
        """Define `realign_kernels::name`.

        Args:
            arguments, results: its schema's two sides.
            run: from a dict of the arguments, which it may change, to the results.
            allocate: the same, but the results are not computed.
        """
        self._names = [argument.split()[-1].partition("=")[0] for argument in arguments.split(", ")]
        self._run = run
        self._op = torch.library.custom_op(
            f"realign_kernels::{name}",
            lambda *values: run(self._name(values)),
            mutates_args=(),
            device_types="cpu",
            schema=f"({arguments}) -> {results}",
        )
        self._op.register_fake(lambda *values: allocate(self._name(values)))

    def __call__(self, **arguments: Any) -> Any:
        return self._op(**arguments) if _is_watched(arguments.values()) else self._run(arguments)

    def _name(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Torch leaves out what has its default value."""
        return dict(zip(self._names, values, strict=False))


def _is_watched(arguments: Iterable[Any]) -> bool:
    """True if the compiler, a dispatch mode or a subclass of Tensor wants to see the call."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return not _PLAIN_TYPES.issuperset(map(type, arguments))


def _launch(run: Callable, like_LC: Tensor, arguments: dict[str, Any]) -> None:
    """Run an op on packed samples of so many channels; None is no argument."""
    arguments["num_channels"] = like_LC.shape[1]
    arguments["num_samples"] = arguments["cu_seqlens"].shape[0] - 1
    arguments["num_threads"] = torch.get_num_threads()
    run(arguments)


def _allocate_velocity(arguments: dict[str, Any]) -> Tensor:
    cond = arguments["cond"]
    return torch.empty(cond.shape, dtype=arguments["out_dtype"], device=cond.device)


def _allocate_step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The next sample, and the log-prob of each sample: none if it is not asked for."""
    return (
        torch.empty_like(arguments["sample"], memory_format=torch.contiguous_format),
        _allocate_numbers(arguments["logprob_weight"], arguments["sample"]),
    )


def _allocate_logprob(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The log-prob of each sample, and its bias: none if it is not asked for."""
    sample = arguments["sample"]
    return (
        _allocate_numbers(arguments["constant"], sample),
        _allocate_numbers(arguments["bias_weight"], sample),
    )


def _allocate_numbers(like_B: Tensor | None, first: Tensor) -> Tensor:
    num_samples = 0 if like_B is None else like_B.shape[0]
    return torch.empty(num_samples, dtype=torch.float32, device=first.device)


def _allocate_normals(arguments: dict[str, Any]) -> Tensor:
    shape = arguments["num_tokens"], arguments["num_channels"]
    return torch.empty(shape, dtype=torch.float32, device=arguments["key"].device)


def _run_velocity(arguments: dict[str, Any]) -> Tensor:
    out_LC = arguments["out"] = _allocate_velocity(arguments)
    arguments["velocity_dtype"] = DTYPE_CODES[arguments["cond"].dtype]
    arguments["out_dtype"] = DTYPE_CODES[out_LC.dtype]
    _launch(_C.guided_flow_step, out_LC, arguments)
    return out_LC


def _run_step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """With guidance, or without it where there are no scales."""
    next_LC, logprob_B = _allocate_step(arguments)
    arguments["out"] = next_LC
    if arguments["logprob_weight"] is not None:
        arguments["logprob"] = logprob_B
    arguments["velocity_dtype"] = DTYPE_CODES[arguments["cond"].dtype]
    arguments["sample_dtype"] = arguments["out_dtype"] = DTYPE_CODES[next_LC.dtype]
    _launch(_C.guided_flow_step, next_LC, arguments)
    return next_LC, logprob_B


def _run_unguided_step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    arguments["cond"] = arguments.pop("velocity")
    return _run_step(arguments)


def _run_logprob(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    logprob_B, bias_B = _allocate_logprob(arguments)
    arguments["logprob"] = logprob_B
    arguments["sample_dtype"] = DTYPE_CODES[arguments["sample"].dtype]
    arguments["velocity_dtype"] = DTYPE_CODES[arguments["velocity"].dtype]
    if arguments["bias_weight"] is not None:
        arguments["bias"] = bias_B
        arguments["old_velocity_dtype"] = DTYPE_CODES[arguments["old_velocity"].dtype]
    _launch(_C.sde_logprob, arguments["sample"], arguments)
    return logprob_B, bias_B


def _run_normal(arguments: dict[str, Any]) -> Tensor:
    out_LC = arguments["out"] = _allocate_normals(arguments)
    del arguments["num_tokens"]
    _launch(_C.philox_normal, out_LC, arguments)
    return out_LC


_GUIDANCE = (
    "Tensor cond, Tensor? text_uncond, Tensor? image_uncond, Tensor cu_seqlens, Tensor text_scale, "
    "Tensor? image_scale, Tensor? renorm, Tensor? renorm_min, int common_renorm=0"
)
_STEP = (
    "Tensor a, Tensor b, Tensor? std, Tensor? noise, Tensor? noise_key, Tensor? noise_step, "
    "Tensor? logprob_weight, Tensor? logprob_constant, bool reduce_sum"
)
_LOGPROB = (
    "Tensor sample, Tensor velocity, Tensor next_sample, Tensor cu_seqlens, Tensor a, Tensor b, "
    "Tensor weight, Tensor constant, bool reduce_sum, Tensor? old_velocity, Tensor? bias_weight"
)

# renorm: int32, indexes into RENORMS; None is common_renorm for all. The second result of a step is its
# log-prob, and of sde_logprob its bias: without numbers if that has no weight.
guided_velocity_cpp = CPUOp(
    "guided_velocity", f"ScalarType out_dtype, {_GUIDANCE}", "Tensor", _run_velocity, _allocate_velocity
)
flow_step_cpp = CPUOp(
    "flow_step",
    f"Tensor sample, Tensor velocity, Tensor cu_seqlens, {_STEP}",
    "(Tensor, Tensor)",
    _run_unguided_step,
    _allocate_step,
)
guided_flow_step_cpp = CPUOp(
    "guided_flow_step",
    f"Tensor sample, {_STEP}, {_GUIDANCE}",
    "(Tensor, Tensor)",
    _run_step,
    _allocate_step,
)
sde_logprob_cpp = CPUOp("sde_logprob", _LOGPROB, "(Tensor, Tensor)", _run_logprob, _allocate_logprob)
philox_normal_cpp = CPUOp(
    "philox_normal",
    "Tensor key, Tensor step, Tensor cu_seqlens, int num_tokens, int num_channels",
    "Tensor",
    _run_normal,
    _allocate_normals,
)
