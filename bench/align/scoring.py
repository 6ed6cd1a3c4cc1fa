"""CLIP rewards as the reference trainers have them: open_clip's transform of a PIL picture, one at a time."""

from __future__ import annotations

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from bench.generate.baseline import Made
from realign.libraries import import_open_clip
from realign.reasoning.schemas import parse_iccot
from realign.rewards.clip_models import find_mini
from realign.runtime.request import Request, TextPart


class OneByOne:
    """The cosine of a picture and its caption, each encoded by itself.

    Args:
        spec: "mini", a folder of open_clip's, or "NAME:FILE".
        device: where the model is; pictures come from the host.
        dtype: of its weights.
    """

    def __init__(self, spec: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        open_clip = import_open_clip()
        name, _, weights = spec.partition(":")
        if not weights:
            name = f"local-dir:{find_mini() if spec == 'mini' else spec}"
        model, self.transform = open_clip.create_model_from_pretrained(name, pretrained=weights or None)
        self.model = model.to(device, dtype).eval()
        self.tokenize = open_clip.get_tokenizer(name)
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def score(self, picture: Image.Image, text: str) -> float:
        """One picture."""
        pixels_1CHW = self.transform(picture)[None].to(self.device, self.dtype)
        picture_1D = self.model.encode_image(pixels_1CHW)
        text_1D = self.model.encode_text(self.tokenize([text]).to(self.device))
        return float(cosine_similarity(picture_1D.float(), text_1D.float()))

    def __call__(self, request: Request, made: Made) -> float:
        """A sample by the caption that it wrote, 0 for an IC-CoT that cannot be read; else by its prompt."""
        text = "\n".join(part.text for part in request.prompt.parts if isinstance(part, TextPart))
        if made.turn is not None and request.settings.reasoning == "ic-cot":
            try:
                text = parse_iccot(made.turn.text, len(request.prompt.pictures)).caption
            except ValueError:
                return 0.0
        return self.score(made.image, text)
