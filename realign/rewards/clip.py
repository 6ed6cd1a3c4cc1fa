"""`clip:MODEL`: the cosine between a picture and its text in a CLIP; `image_similarity:MODEL`: between a
picture and the references. Pictures that lie on the model's device do not leave it. N samples, D numbers.

Source: Re-Align (arXiv 2601.05124) rewards the cosine of a picture and its own `out_caption`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from realign.rewards.base import Reward, Scored
from realign.rewards.clip_models import ClipModel, load_clip
from realign.rewards.pictures import to_array
from realign_kernels import clip_preprocess, clip_score

BATCH_SIZE = 64
CAPTIONS_KEPT = 8192  # embeddings; of ViT-L/14 in bfloat16 12 MB


class ClipEncoder:
    """Pictures and texts to embeddings, through one CLIP; the embeddings of texts are kept.

    Args:
        spec: as `load_clip` takes it.
        device: where the model is; None: cuda where there is one.
        captions_kept: how many texts' embeddings are kept, those used last.

    Attributes:
        num_truncated: captions so far that had more tokens than the model reads.
    """

    def __init__(
        self, spec: str = "mini", device: torch.device | str | None = None, captions_kept: int = CAPTIONS_KEPT
    ) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self.model: ClipModel = load_clip(spec, self.device)
        self.num_truncated = 0
        self._captions_kept = captions_kept
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Image.Image | Tensor]) -> Tensor:
        """[N, D]."""
        batches = [pictures[start : start + BATCH_SIZE] for start in range(0, len(pictures), BATCH_SIZE)]
        return torch.cat([self.model.encode_pictures(self._preprocess(batch)) for batch in batches])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D]; a text that was there before is not encoded again."""
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        found = {text: self._embeddings[text] for text in set(texts) - set(new)}
        for start in range(0, len(new), BATCH_SIZE):
            batch = new[start : start + BATCH_SIZE]
            found.update(zip(batch, self._encode_new(batch), strict=True))
        for text in dict.fromkeys(texts):
            self._embeddings[text] = found[text]
            self._embeddings.move_to_end(text)
        while len(self._embeddings) > self._captions_kept:
            self._embeddings.popitem(last=False)
        return torch.stack([found[text] for text in texts])

    def _encode_new(self, texts: Sequence[str]) -> Tensor:
        ids_NL, is_cut_N = self.model.tokenize(texts)
        num_cut = int(is_cut_N.sum())
        if num_cut:
            self.num_truncated += num_cut
            warnings.warn(
                f"{num_cut} of {len(texts)} captions have more than the {self.model.context_length} tokens "
                f"that the CLIP {self.model.name} reads: what is beyond does not count",
                stacklevel=4,
            )
        return self.model.encode_texts(ids_NL.to(self.device))

    def _preprocess(self, pictures: Sequence[Image.Image | Tensor]) -> Tensor:
        """Pictures of any kinds and sizes to the model's input, in as few calls as there are kinds."""
        tensors = [self._to_tensor(picture) for picture in pictures]
        kinds = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        options = self.model.preprocess
        parts, order = [], []
        for kind in kinds:
            chosen = [index for index, tensor in enumerate(tensors) if tensor.dtype == kind]
            parts.append(clip_preprocess([tensors[i] for i in chosen], dtype=self.model.dtype, **options))
            order += chosen
        pixels = torch.cat(parts)
        return pixels if len(kinds) == 1 else pixels[torch.tensor(order, device=pixels.device).argsort()]

    def _to_tensor(self, picture: Image.Image | Tensor) -> Tensor:
        if isinstance(picture, Image.Image):
            picture = torch.from_numpy(to_array(picture).copy())
        return picture.to(self.device)


class EncoderReward(Reward):
    """A reward of what a CLIP sees.

    Args:
        spec, device: see `ClipEncoder`.
        encoder: one that is there already.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        spec: str = "mini",
        device: torch.device | str | None = None,
        encoder: ClipEncoder | None = None,
    ) -> None:
        self.name = f"{self.kind}:{spec}"
        self.encoder = ClipEncoder(spec, device) if encoder is None else encoder


class ClipReward(EncoderReward):
    """cos(E(picture), T(caption)), from -1 to 1; the caption is the sample's own, or else its prompt.

    A malformed reasoning gives 0, less than any caption near the picture: it is the model's failing, and must
    not be scored by another text.
    """

    kind = "clip"

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """Cosines."""
        numbers = [number for number, sample in enumerate(samples) if not sample.is_malformed]
        score_N = torch.zeros(len(samples))
        if numbers:
            texts = [self._text_of(samples[number]) for number in numbers]
            picture_ND = self.encoder.encode_pictures([samples[number].picture for number in numbers])
            score_N[numbers] = clip_score(picture_ND, self.encoder.encode_texts(texts)).cpu()
        return self.gather(score_N, samples)

    def _text_of(self, sample: Scored) -> str:
        text = sample.prompt if sample.caption is None else sample.caption
        if not text.strip():
            raise self.fail(sample, "has neither a caption nor a text in its prompt to be compared with")
        return text


class ImageSimilarityReward(EncoderReward):
    """Mean over the references of cos(E(picture), E(reference))."""

    kind = "image_similarity"

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """Mean cosines."""
        if not samples:
            return torch.zeros(0)
        for sample in samples:
            if not sample.references:
                raise self.fail(sample, "has no reference pictures to be compared with")
        counts = [len(sample.references) for sample in samples]
        picture_ND = self.encoder.encode_pictures([sample.picture for sample in samples])
        reference_MD = self.encoder.encode_pictures([r for sample in samples for r in sample.references])
        owner_M = torch.repeat_interleave(torch.tensor(counts)).to(picture_ND.device)
        cosine_M = clip_score(picture_ND[owner_M], reference_MD)
        total_N = torch.zeros(len(samples), device=cosine_M.device).index_add_(0, owner_M, cosine_M)
        return self.gather(total_N.cpu() / torch.tensor(counts), samples)
