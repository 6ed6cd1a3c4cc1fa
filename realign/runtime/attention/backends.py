"""Attention of packed sequences, by whichever library is there: one interface, `(out, log-sum-exp)`.

L packed queries, S packed keys, H query heads, K key-value heads, G = H / K, D head dim, R rows.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from realign.runtime.attention.rows import group_rows
from realign.runtime.attention.spans import Spans

OutAndLse = tuple[Tensor, Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor, Spans, bool], OutAndLse]


class Backend:
    """`softmax(q k / sqrt(D)) v` of packed sequences, and the log of the sum that it divides by.

    `is_padded`: rows of a batch are padded to one shape for it, not packed.
    """

    name: str
    is_padded = False

    def find_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here on a device, with tensors of a dtype; None if it can."""
        raise NotImplementedError

    def attend(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool = False
    ) -> OutAndLse:
        """Each sequence's queries to its keys. Keys are never repeated for their query heads.

        Args:
            is_causal: the last query sees all keys, every one before it one less.

        Returns: [L, H, D] in the dtype of the queries, and float32 [L, H].
        """
        raise NotImplementedError


class Reference(Backend):
    """Plain torch, sequence by sequence, in float32: what the others are tested against."""

    name = "reference"

    def find_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def attend(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool = False
    ) -> OutAndLse:
        queries = query_LHD.split(spans.q_lengths)
        keys, values = (_split_keys(t, spans) for t in (key_SKD, value_SKD))
        parts = [_attend_one(*given, is_causal) for given in zip(queries, keys, values, strict=True)]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs).to(query_LHD.dtype), torch.cat(lses)


def _split_keys(tensor_SKD: Tensor, spans: Spans) -> list[Tensor]:
    """The keys, or values, of each sequence."""
    if spans.is_shared:
        return [tensor_SKD] * len(spans.q_lengths)
    return list(tensor_SKD.split(spans.k_lengths))


def _attend_one(query_QHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, is_causal: bool) -> OutAndLse:
    groups = query_QHD.shape[1] // key_SKD.shape[1]
    wide = torch.promote_types(query_QHD.dtype, torch.float32)
    query_QKGD = query_QHD.to(wide).unflatten(1, (-1, groups))
    score_QKGS = torch.einsum("qkgd,skd->qkgs", query_QKGD, key_SKD.to(wide)) / query_QHD.shape[-1] ** 0.5
    if is_causal:
        hidden_QS = torch.ones(len(query_QHD), len(key_SKD), dtype=torch.bool, device=query_QHD.device)
        hidden_QS = hidden_QS.triu(len(key_SKD) - len(query_QHD) + 1)
        score_QKGS = score_QKGS.masked_fill(hidden_QS[:, None, None], float("-inf"))
    out_QKGD = torch.einsum("qkgs,skd->qkgd", score_QKGS.softmax(-1), value_SKD.to(wide))
    return out_QKGD.flatten(1, 2), score_QKGS.logsumexp(-1).flatten(1)


class Sdpa(Backend):
    """torch's fused attention on a CPU: rows of equal shape in one call, each row with its own bits."""

    name = "sdpa"
    is_padded = True

    def find_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" else "it gives no log-sum-exp of grouped heads but on a CPU"

    def attend(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool = False
    ) -> OutAndLse:
        queries = query_LHD.split(spans.q_lengths)
        keys, values = (_split_keys(t, spans) for t in (key_SKD, value_SKD))
        parts: dict[int, OutAndLse] = {}
        for rows in group_rows([(len(q), len(k)) for q, k in zip(queries, keys, strict=True)]):
            query_RQHD = torch.stack([queries[row] for row in rows])
            key_RKSD, value_RKSD = (self._stack(some, rows, spans.is_shared) for some in (keys, values))
            mask = _causal_mask(query_RQHD, key_RKSD) if is_causal else None
            outs = attend_grouped(query_RQHD, key_RKSD, value_RKSD, mask)
            parts.update(zip(rows, zip(*outs, strict=True), strict=True))
        outs, lses = zip(*(parts[row] for row in range(len(queries))), strict=True)
        return torch.cat(outs), torch.cat(lses)

    @staticmethod
    def _stack(keys: list[Tensor], rows: list[int], is_shared: bool) -> Tensor:
        """[R, K, S, D]; shared keys are not copied."""
        if is_shared:
            return keys[0].transpose(0, 1).expand(len(rows), -1, -1, -1)
        return torch.stack([keys[row] for row in rows]).transpose(1, 2)


def _causal_mask(query_RQHD: Tensor, key_RKSD: Tensor) -> Tensor:
    """[1, 1, G * Q, S], added to the scores."""
    num_new, num_keys = query_RQHD.shape[1], key_RKSD.shape[2]
    groups = query_RQHD.shape[2] // key_RKSD.shape[1]
    mask_QS = query_RQHD.new_full((num_new, num_keys), float("-inf")).triu(num_keys - num_new + 1)
    return mask_QS.repeat(groups, 1)[None, None]


def attend_grouped(
    query_RQHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, mask: Tensor | None
) -> OutAndLse:
    """`softmax(q k / sqrt(D) + mask) v` of rows of one shape, on a CPU.

    The query heads of one key-value head are laid along the query axis, so that keys and values are not
    repeated. The op is the one that `scaled_dot_product_attention` takes on a CPU; called by its name it
    gives the log-sum-exp too.

    Returns: [R, Q, H, D] and float32 [R, Q, H].
    """
    num_rows, num_new, num_heads, dim = query_RQHD.shape
    kv_heads = key_RKSD.shape[1]
    query = query_RQHD.view(num_rows, num_new, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(num_rows, kv_heads, -1, dim)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(query, key_RKSD, value_RKSD, attn_mask=mask)
    out = out.view(num_rows, kv_heads, -1, num_new, dim).permute(0, 3, 1, 2, 4)
    lse = lse.view(num_rows, kv_heads, -1, num_new).permute(0, 3, 1, 2)
    return out.reshape(query_RQHD.shape), lse.reshape(num_rows, num_new, num_heads)


NOT_INSTALLED = "{} is not installed"


class GpuBackend(Backend):
    """A library's kernel for packed sequences on a CUDA device."""

    module: str

    def find_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return "it runs on CUDA devices alone"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
        return None if _has_module(self.module) else NOT_INSTALLED.format(self.module.partition(".")[0])


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class Varlen(GpuBackend):
    """torch's `varlen_attn`, without splits over the keys, so that a sequence's bits are its own."""

    name, module = "varlen", "torch.nn.attention.varlen"

    def attend(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool = False
    ) -> OutAndLse:
        return attend_by_heads(_varlen_kernel(), query_LHD, key_SKD, value_SKD, spans, is_causal)


class FlashAttention(GpuBackend):
    """flash-attn 2, or 3 where that is installed."""

    name, module = "flash-attn", "flash_attn"

    def find_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        obstacle = super().find_obstacle(device, dtype)
        is_third = device.type == "cuda" and _has_module("flash_attn_interface")
        return None if obstacle == NOT_INSTALLED.format(self.module) and is_third else obstacle

    def attend(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool = False
    ) -> OutAndLse:
        name = "flash_attn_interface" if _has_module("flash_attn_interface") else "flash_attn"
        attend = importlib.import_module(name).flash_attn_varlen_func
        # Early releases of the third give the log-sum-exp unasked.
        is_asked = "return_attn_probs" in inspect.signature(attend).parameters
        asked = {"return_attn_probs": True} if is_asked else {}
        out, lse, *_ = attend(
            query_LHD,
            key_SKD,
            value_SKD,
            cu_seqlens_q=spans.cu_q,
            cu_seqlens_k=spans.cu_k,
            max_seqlen_q=spans.max_q,
            max_seqlen_k=spans.max_k,
            causal=is_causal,
            **asked,
        )
        return out, lse.transpose(0, 1)


class Xformers(GpuBackend):
    """xformers' memory-efficient attention."""

    name, module = "xformers", "xformers.ops.fmha"

    def attend(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool = False
    ) -> OutAndLse:
        fmha = importlib.import_module(self.module)
        bias = spans.remember((self.name, is_causal), lambda: self._build_bias(fmha, spans, is_causal))
        kv_heads = key_SKD.shape[1]
        query = query_LHD.unflatten(1, (kv_heads, -1))[None]
        groups = query.shape[3]
        key, value = (t[None, :, :, None].expand(-1, -1, -1, groups, -1) for t in (key_SKD, value_SKD))
        out, lse = fmha.memory_efficient_attention_partial(
            query, key, value, attn_bias=bias, output_dtype=query.dtype
        )
        return out[0].flatten(1, 2), lse[0].flatten(0, 1).transpose(0, 1)

    @staticmethod
    def _build_bias(fmha: ModuleType, spans: Spans, is_causal: bool) -> Any:
        """It is made on the host: once for all layers and steps."""
        kinds = fmha.attn_bias
        kind = kinds.BlockDiagonalCausalFromBottomRightMask if is_causal else kinds.BlockDiagonalMask
        q_lengths = (spans.max_q,) if spans.is_shared else spans.q_lengths
        return kind.from_seqlens(list(q_lengths), list(spans.k_lengths), device=spans.device)


def attend_by_heads(
    kernel: Callable[..., OutAndLse],
    query_LHD: Tensor,
    key_SKD: Tensor,
    value_SKD: Tensor,
    spans: Spans,
    is_causal: bool,
) -> OutAndLse:
    """Calls a kernel; one that knows no grouped heads is called so that it need not.

    `kernel(query, key, value, spans, is_causal)`, with the attribute `has_grouped_heads`. Without a mask the
    G queries of a key-value head are G queries one after the other; with one they are G calls.
    """
    num_heads, kv_heads = query_LHD.shape[1], key_SKD.shape[1]
    groups = num_heads // kv_heads
    if kernel.has_grouped_heads or groups == 1:
        return kernel(query_LHD, key_SKD, value_SKD, spans, is_causal)
    query_LKGD = query_LHD.unflatten(1, (kv_heads, groups))
    if is_causal:
        parts = [
            kernel(query_LKGD[:, :, group].contiguous(), key_SKD, value_SKD, spans, True)
            for group in range(groups)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.stack(outs, dim=2).flatten(1, 2), torch.stack(lses, dim=2).flatten(1, 2)
    query = query_LKGD.transpose(1, 2).reshape(-1, kv_heads, query_LHD.shape[2])
    out, lse = kernel(query, key_SKD, value_SKD, spans.repeat_queries(groups), False)
    out = out.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)
    return out, lse.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)


class VarlenKernel:
    """`torch.nn.attention.varlen.varlen_attn` of whichever release is installed.

    2.11 documents neither grouped heads nor the number of splits; 2.13 has both.
    """

    def __init__(self) -> None:
        varlen = importlib.import_module("torch.nn.attention.varlen")
        self.function, self.request = varlen.varlen_attn, varlen.AuxRequest
        known = inspect.signature(self.function).parameters
        self.has_grouped_heads = "enable_gqa" in known
        self.has_windows = "window_size" in known
        self.options: dict[str, Any] = {"num_splits": 1} if "num_splits" in known else {}

    def __call__(
        self, query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, spans: Spans, is_causal: bool
    ) -> OutAndLse:
        options = dict(self.options)
        if self.has_grouped_heads:
            options["enable_gqa"] = True
        if is_causal:
            options |= {"window_size": (-1, 0)} if self.has_windows else {"is_causal": True}
        places = (spans.cu_q, spans.cu_k, spans.max_q, spans.max_k)
        aux = self.request(lse=True)
        out, lse = self.function(query_LHD, key_SKD, value_SKD, *places, return_aux=aux, **options)
        return out, lse if self.is_query_first(query_LHD.device) else lse.transpose(0, 1)

    @cache  # noqa: B019, there is one kernel, for ever
    def is_query_first(self, device: torch.device) -> bool:
        """Whether log-sum-exps are [L, H]; some releases give [H, L]: two heads of one query tell."""
        one = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=device)
        spans = Spans((1,), (1,), device)
        _, lse = self.function(one, one, one, spans.cu_q, spans.cu_k, 1, 1, return_aux=self.request(lse=True))
        return tuple(lse.shape) == (1, 2)


@cache
def _varlen_kernel() -> VarlenKernel:
    return VarlenKernel()


BACKENDS = {
    backend.name: backend for backend in (Varlen(), FlashAttention(), Xformers(), Sdpa(), Reference())
}


def find_backend(device: torch.device, dtype: torch.dtype, name: str = "auto") -> Backend:
    """A backend by name; "auto" is sdpa on a CPU, on a GPU varlen, or where that does not take the dtype
    (float32) reference.

    Raises: ValueError for a name that is none, or one that cannot run here.
    """
    if name == "auto":
        names = ("sdpa",) if device.type == "cpu" else ("varlen", "reference")
        return next(one for one in map(BACKENDS.get, names) if one.find_obstacle(device, dtype) is None)
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"attention is {name!r}: must be one of {known}")
    obstacle = BACKENDS[name].find_obstacle(device, dtype)
    if obstacle:
        raise ValueError(f"attention {name!r} cannot be used on {device.type}: {obstacle}: take auto")
    return BACKENDS[name]
