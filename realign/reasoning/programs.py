"""The reasoning modes as programs: what each reads and writes, and which contexts guide the picture.

All of them read [system text], the prompt, [the reasoning, a text turn of its own], and draw. Their branches
are BAGEL's (arXiv 2505.14683, `InterleaveInferencer`):

- conditional: all of that;
- text-unconditional: the system text and the prompt up to its closing text, without the reasoning;
- image-unconditional: the system text and the prompt's texts, without the reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from realign.model.config import BagelConfig
from realign.reasoning.prompts import SYSTEM_TEXTS
from realign.reasoning.schemas import ICCoT, parse_iccot
from realign.runtime.guidance import Branch
from realign.runtime.operations import Draw, Operation, Read, Write
from realign.runtime.reader import Reading
from realign.runtime.request import Part, Prompt, Reasoning, Request, Sample, TextPart, TextTurn, Trajectory
from realign.runtime.settings import GuidanceSettings

ParseReasoning = Callable[[str, int], ICCoT]


@dataclass(frozen=True)
class ReasoningProgram:
    """Reads a prompt, perhaps thinks, draws one picture.

    Attributes:
        mode: the name that users give.
        system_text: read before the prompt; None: nothing.
        does_reason: whether the model writes a text before the picture.
        parse: reads what was written, given the number of references; None: it is free text.
    """

    mode: str
    system_text: str | None = None
    does_reason: bool = False
    parse: ParseReasoning | None = None

    def __call__(self, request: Request) -> Generator[Operation, Any, Sample]:
        """The program, for `Engine`."""
        conditional, *others = yield Read(tuple(map(Reading, self.read_by_branch(request).values())))
        turns = request.turns if self.does_reason else ()
        if turns:
            text = TextPart(turns[0].text)
            (conditional,) = yield Read((Reading((text,), conditional),))
        elif self.does_reason:
            written = yield Write(conditional)
            turns, conditional = (written.turn,), written.context
        kinds = tuple(self.read_by_branch(request))
        scales = [_scale(request.settings.guidance, kind) for kind in kinds]
        drawn = yield Draw(tuple(map(Branch, (conditional, *others), scales, kinds)))
        reasoning = self._reasoning(turns, len(request.prompt.pictures))
        trajectory = Trajectory(turns, drawn.noise_key, drawn.latent_LC, drawn.steps, drawn.recording)
        return Sample(request, drawn.picture, reasoning, trajectory)

    def read_by_branch(self, request: Request) -> dict[str, tuple[Part, ...]]:
        """What each branch that the settings call for reads, before any reasoning; "conditional" first."""
        system = () if self.system_text is None else (TextPart(self.system_text),)
        prompt, guidance = request.prompt, request.settings.guidance
        reads = {"conditional": (*system, *prompt.parts)}
        if guidance.text_scale > 1:
            reads["text"] = (*system, *without_closing_text(prompt))
            if guidance.image_scale > 1 and (prompt.pictures or guidance.for_text_prompts):
                reads["image"] = (*system, *(part for part in prompt.parts if isinstance(part, TextPart)))
        return reads

    def _reasoning(self, turns: tuple[TextTurn, ...], num_references: int) -> Reasoning | None:
        if not turns:
            return None
        text = turns[0].text
        if self.parse is None:
            return Reasoning(self.mode, text)
        try:
            iccot = self.parse(text, num_references)
        except ValueError as error:
            return Reasoning(self.mode, text, error=str(error))
        return Reasoning(self.mode, text, iccot.caption, iccot.relations)


def without_closing_text(prompt: Prompt) -> tuple[Part, ...]:
    """The prompt before its last text; a prompt that ends with a picture stays whole, as in BAGEL."""
    return prompt.parts[:-1] if isinstance(prompt.parts[-1], TextPart) else prompt.parts


def _scale(guidance: GuidanceSettings, kind: str) -> float:
    return {"conditional": 1.0, "text": guidance.text_scale, "image": guidance.image_scale}[kind]


PROGRAMS = {
    "none": ReasoningProgram("none"),
    "think": ReasoningProgram("think", SYSTEM_TEXTS["think"], does_reason=True),
    "ic-cot": ReasoningProgram("ic-cot", SYSTEM_TEXTS["ic-cot"], does_reason=True, parse=parse_iccot),
}


def describe_untrained(config: BagelConfig, mode: str) -> str | None:
    """A warning for a reasoning mode that a model was not trained for, or None."""
    if mode in config.reasoning_modes:
        return None
    known = ", ".join(config.reasoning_modes)
    return f"{config.name} was not trained for reasoning {mode!r} (it was for {known}): expect little of it"
