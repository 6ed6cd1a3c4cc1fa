"""Makes mini's tokenizer: Qwen2's byte-level BPE and file layout, its merges learnt on the world's sentences.

    python -m train.tokenizer --out realign/assets/mini

Any text can be encoded (single bytes are tokens); the world's words are one token each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from realign.reasoning.prompts import IC_COT
from realign.reasoning.schemas import format_iccot
from realign.world.tasks import TASKS, sample

MIN_FREQUENCY = 10
# how Qwen2 splits text before merging
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "model_max_length": 32768,
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "errors": "replace",
    "split_special_tokens": False,
}


def world_sentences(num: int) -> Iterator[str]:
    """Instructions and reasoning of the training split."""
    yield from [IC_COT] * MIN_FREQUENCY
    for task in TASKS:
        for index in range(num):
            drawn = sample(task, index)
            yield drawn.text
            yield format_iccot(drawn.iccot)


def train_tokenizer(out: Path, num: int) -> int:
    """Writes vocab.json, merges.txt and tokenizer_config.json. Returns the number of tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=4096, min_frequency=MIN_FREQUENCY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(world_sentences(num), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1))
    return len(vocab)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=3000, help="samples a task")
    args = parser.parse_args()
    print(f"{train_tokenizer(args.out, args.num)} tokens")


if __name__ == "__main__":
    main()
