"""CLIP cosines of pictures with texts, by a CLIP in transformers' layout on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from realign.libraries import mend_torchvision
from realign_kernels import clip_preprocess, clip_score


class ClipScorer:
    """Scores pictures with a CLIP folder (`config.json`, `model.safetensors`, tokenizer files).

    Raises: ValueError for a folder that is none.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        mend_torchvision()
        from transformers import CLIPModel, CLIPTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise ValueError(
                f"{folder} has no config.json: give a folder with a CLIP in transformers' layout"
            )
        try:
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except OSError as error:
            raise ValueError(f"{folder} is no CLIP that can be read: {error}") from error
        self.model = self.model.to(device).eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The cosine of each picture with its text, which is cut where the CLIP's positions end."""
        device = self.model.device
        pictures = [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]
        pixels_BCHW = clip_preprocess(pictures, self.model.config.vision_config.image_size).to(device)
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        image_BD = self._project("visual_projection", self.model.vision_model(pixels_BCHW))
        text_BD = self._project("text_projection", self.model.text_model(**tokens.to(device)))
        return clip_score(image_BD, text_BD).tolist()

    def _project(self, name: str, output: object) -> torch.Tensor:
        return getattr(self.model, name)(output.pooler_output)
