"""Reads one token a row and step, for many rows at once, and scores what follows.

Every row has a slot: its tail's keys and values, and room for those of the tokens that it reads here. Runs
that rows share are not copied: all their rows attend to them together. Nothing in a step waits for the
device.

N layers, R rows, S places of a slot, H query heads, K key-value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.mot import Route
from realign.runtime.attention import Backend, find_backend
from realign.runtime.attention.backends import OutAndLse
from realign.runtime.attention.plan import Place, SharedRun, add_runs, group_by_run
from realign.runtime.kv import Context, Segment, copy_tail
from realign_kernels import decode_attention

MIN_ROOM = 64


class TextDecoder:
    """Rows after their contexts.

    Args:
        room: tokens that each row can read before the slots must grow.
        backend: of attention to shared runs.
    """

    def __init__(
        self,
        model: Bagel,
        contexts: Sequence[Context],
        room: int = MIN_ROOM,
        backend: Backend | None = None,
    ) -> None:
        self.model, self.backend = model, backend or find_backend(model.device, model.dtype)
        self.contexts = list(contexts)
        self.lengths = [context.tail_length for context in contexts]
        self.key_NRSKD, self.value_NRSKD = self._make_slots(max(self.lengths) + room)
        for row, context in enumerate(contexts):
            copy_tail(context, self.key_NRSKD[:, row], self.value_NRSKD[:, row])
        self.length_R = torch.tensor(self.lengths, device=model.device)
        self.position_R = torch.tensor([context.next_position for context in contexts], device=model.device)
        self._lay_out()

    def step(self, token_R: Tensor) -> Tensor:
        """Tokens int64 [R] to the scores of what follows them, float32 [R, V]."""
        self.make_room()
        return self.score(token_R)

    def make_room(self) -> None:
        """See that every row can read one more token: slots grow where one is full."""
        self.lengths = [length + 1 for length in self.lengths]
        size = self.key_NRSKD.shape[2]
        if max(self.lengths) > size:
            extra = max(MIN_ROOM, size // 4)
            self.key_NRSKD, self.value_NRSKD = (
                torch.nn.functional.pad(t, (0, 0, 0, 0, 0, extra)) for t in (self.key_NRSKD, self.value_NRSKD)
            )
            self._lay_out()

    @torch.no_grad()
    def score(self, token_R: Tensor) -> Tensor:
        """`step` after `make_room`: all on the device, in the same tensors every time."""
        torch.add(self.start_R, self.length_R, out=self.place_R)
        self.length_R += 1
        hidden_RE = self.model.decoder(
            self.model.embed_text(token_R.to(self.model.device)), self.position_R, self.route, self._attend
        )
        self.position_R += 1
        return self.model.logits(hidden_RE).float()

    def segment(self, row: int, num_tokens: int) -> Segment:
        """The first tokens that a row has read here."""
        start = self.contexts[row].tail_length
        key_NLKD, value_NLKD = (
            t[:, row, start : start + num_tokens].clone() for t in (self.key_NRSKD, self.value_NRSKD)
        )
        return Segment(key_NLKD, value_NLKD)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, which stay in their order; the slots of the others are left empty."""
        assert list(rows) == sorted(rows)
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        self.contexts = [self.contexts[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        for slots_NRSKD in (self.key_NRSKD, self.value_NRSKD):
            for new, old in enumerate(rows):
                if new != old:  # never over one that is still to be moved
                    used = self.lengths[new]
                    slots_NRSKD[:, new, :used] = slots_NRSKD[:, old, :used]
        self.key_NRSKD, self.value_NRSKD = (t[:, : len(rows)] for t in (self.key_NRSKD, self.value_NRSKD))
        self.length_R, self.position_R = self.length_R[index], self.position_R[index]
        self._lay_out()

    def replace(self, rows: Sequence[int], contexts: Sequence[Context]) -> bool:
        """Let other contexts take the places of rows; their tails must leave room in the slots.

        Returns: whether other runs are attended to from now on. If not, all tensors that a step reads are the
        same as before.
        """
        runs = [context.runs for context in self.contexts]
        for row, context in zip(rows, contexts, strict=True):
            assert context.tail_length < self.key_NRSKD.shape[2]
            self.contexts[row] = context
            copy_tail(context, self.key_NRSKD[:, row], self.value_NRSKD[:, row])
        self.rewind(rows)
        is_other = runs != [context.runs for context in self.contexts]
        if is_other:
            self._lay_out_runs()
        return is_other

    def rewind(self, rows: Sequence[int]) -> None:
        """Let rows forget what they have read here."""
        contexts = [self.contexts[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        lengths = [context.tail_length for context in contexts]
        self.length_R[index] = torch.tensor(lengths).to(self.length_R)
        self.position_R[index] = torch.tensor([context.next_position for context in contexts]).to(index)
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length

    def _make_slots(self, size: int) -> tuple[Tensor, Tensor]:
        llm, model = self.model.config.llm, self.model
        shape = (llm.num_hidden_layers, len(self.contexts), size, llm.num_key_value_heads, llm.head_dim)
        key, value = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        return key, value

    def _lay_out(self) -> None:
        """All that follows from the rows."""
        num_rows, size = self.key_NRSKD.shape[1:3]
        everywhere = torch.arange(num_rows, device=self.model.device)
        self.start_R = everywhere * size
        self.place_R = torch.empty_like(self.start_R)
        self.route = Route(everywhere, everywhere[:0])
        self._lay_out_runs()

    def _lay_out_runs(self) -> None:
        kind = RunSlots if self.backend.is_padded else SharedRun
        self.shared: list[tuple[Place, RunSlots | SharedRun]] = [
            (self._find_place(rows), kind(self.backend, run, [1] * len(rows)))
            for run, rows in group_by_run(self.contexts).items()
        ]

    def _find_place(self, rows: Sequence[int]) -> Place:
        if len(rows) == len(self.contexts):
            return None
        return torch.tensor(rows, device=self.model.device)

    def _attend(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor) -> Tensor:
        key_RSKD, value_RSKD = self.key_NRSKD[layer], self.value_NRSKD[layer]
        key_RSKD.flatten(0, 1).index_copy_(0, self.place_R, key_RKD.to(key_RSKD.dtype))
        value_RSKD.flatten(0, 1).index_copy_(0, self.place_R, value_RKD.to(key_RSKD.dtype))
        query_RHD = query_RHD.to(key_RSKD.dtype)
        slots = (key_RSKD.transpose(1, 2), value_RSKD.transpose(1, 2))
        own = decode_attention(query_RHD, *slots, self.length_R)
        return add_runs(own, self.shared, layer, query_RHD)


class RunSlots(SharedRun):
    """Rows with one query each that attend to one run: it is the slot of every row."""

    def __init__(self, backend: Backend, run: Segment, lengths: Sequence[int]) -> None:
        super().__init__(backend, run, lengths)
        self.length_R = torch.full((len(lengths),), run.length, device=run.key_NLKD.device)

    def attend(self, layer: int, query_RHD: Tensor) -> OutAndLse:
        """The rows' new tokens to the run."""
        slots = (self.run.key_NLKD[layer], self.run.value_NLKD[layer])
        key_RKSD, value_RKSD = (t.transpose(0, 1).expand(len(query_RHD), -1, -1, -1) for t in slots)
        return decode_attention(query_RHD, key_RKSD, value_RKSD, self.length_R)
