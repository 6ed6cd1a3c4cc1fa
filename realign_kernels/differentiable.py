"""Torch custom ops with a gradient, as those of the model are: for each path one forward and one backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from realign_kernels import native


@dataclass(frozen=True)
class Signature:
    """One side of an op, forward or backward: its schema, and what makes its results uncomputed."""

    arguments: str
    results: str
    allocate: Callable

    def define(self, name: str, run: Callable) -> Any:
        """The custom op `realign_kernels::name` that runs `run`."""
        schema = f"({self.arguments}) -> {self.results}"
        op = torch.library.custom_op(f"realign_kernels::{name}", run, mutates_args=(), schema=schema)
        op.register_fake(self.allocate)
        return op


class DifferentiableOp:
    """An op that takes positional arguments, and its gradient, an op of its own.

    Called from eager code on plain tensors both run at once: the way through torch's dispatcher and back into
    Python takes longer than a small op. The compiler, and whatever else watches, sees the custom ops.
    """

    def __init__(
        self,
        name: str,
        forward: tuple[Signature, Callable],
        backward: tuple[Signature, Callable],
        save: Callable,
        differentiate: Callable,
    ) -> None:
        """Define `realign_kernels::name` and `realign_kernels::name_backward`.

        Args:
            forward, backward: signature of each, and what runs.
            save: `setup_context(ctx, inputs, output)` of `torch.autograd.Function`.
            differentiate: from a function like that of `backward`, the saved context and the gradients of the
                results to the gradients of the arguments.
        """
        (signature, self._run), (backward_signature, run_backward) = forward, backward
        self._op = signature.define(name, self._run)
        backward_op = backward_signature.define(f"{name}_backward", run_backward)
        self._op.register_autograd(
            lambda ctx, *grads: differentiate(backward_op, ctx, *grads), setup_context=save
        )
        self._function = _build_function(name, (self._run, run_backward), save, differentiate)

    def __call__(self, *arguments: Any) -> Any:
        if native._is_watched(arguments):
            return self._op(*arguments)
        if torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        ):
            return self._function.apply(*arguments)
        return self._run(*arguments)


def _build_function(
    name: str, passes: tuple[Callable, Callable], save: Callable, differentiate: Callable
) -> type[torch.autograd.Function]:
    """The eager gradient. It saves in `forward`: a `setup_context` of its own takes torch twice as long."""
    run, run_backward = passes

    def forward(ctx, *arguments):
        results = run(*arguments)
        save(ctx, arguments, results)
        return results

    @once_differentiable
    def backward(ctx, *grads):
        return differentiate(run_backward, ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)
