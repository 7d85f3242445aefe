"""A byte-pair tokenizer in CLIP's format (Radford et al. 2021) with 2,008 instead of 49,408 tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
# CLIP's rules: contractions, runs of letters, single digits, runs of anything else.
WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path) -> CLIPTokenizer:
    """Learn merges from `texts` and save a tokenizer that transformers loads as CLIPTokenizer.

    Every byte is a token, inside a word and at its end, so every text can be tokenized.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [BEGIN, END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(alphabet) - len(specials),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]

    tokens = dict(learned["vocab"])
    for token in [*(character + "</w>" for character in alphabet), *specials]:
        tokens.setdefault(token, len(tokens))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_LENGTH).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
