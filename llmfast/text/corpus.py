"""Texts from files: loaded, cleaned, each once, split, tokenised, packed."""

import json
import re
import unicodedata
import zlib
from pathlib import Path

import torch

END = "<|endoftext|>"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]")


def load(path) -> list[str]:
    """One text a line of .txt, the field "text" of each line of .jsonl, the first column of .tsv; cleaned, none empty.

    Raises ValueError that names the file and the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl", ".tsv"):
        raise ValueError(f"{path}: expected .txt, .jsonl or .tsv")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: not UTF-8 (byte {problem.start})") from None
    texts = [_text(line, path.suffix, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    texts = [t for t in map(clean, texts) if t]
    if not texts:
        raise ValueError(f"{path}: holds no text")
    return texts


def _text(line, suffix, where):
    if suffix == ".txt":
        return line
    if suffix == ".tsv":
        return line.split("\t")[0]
    try:
        found = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{where}: not JSON ({problem.msg})") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise ValueError(f'{where}: expected an object with a string "text"')
    return found["text"]


def clean(text: str) -> str:
    """Unicode NFC, no control characters, the marker of a text's end not among the words."""
    return CONTROL.sub("", unicodedata.normalize("NFC", text).replace(END, " ")).strip()


def distinct(texts: list[str], near: float = 0.9) -> list[str]:
    """Each text once; also without those whose character 5-grams are shared to `near` (Jaccard) with an earlier one.

    Only texts that share a 5-gram are compared, the rarest first, so that most pairs are never looked at.
    """
    kept, grams_of, index = [], [], {}
    for text in dict.fromkeys(texts):
        plain = re.sub(r"\s+", " ", text.casefold())
        grams = {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}
        allowed = int((1 - near) * len(grams)) + 1  # near alike: one of any so many grams is shared
        rare = sorted(grams, key=lambda g: len(index.get(g, ())))[:allowed]
        others = {j for g in rare for j in index.get(g, ())}
        if any(len(grams & grams_of[j]) >= near * len(grams | grams_of[j]) for j in others):
            continue
        for g in grams:
            index.setdefault(g, []).append(len(kept))
        kept.append(text)
        grams_of.append(grams)
    return kept


def split(texts: list[str], held_out: float = 0.1, name: str = "") -> tuple[list[str], list[str]]:
    """(training, held out): a text's side depends on it and on name alone, whatever file or order it comes in."""
    sides = ([], [])
    for text in texts:
        sides[zlib.crc32((text + name).encode()) % 1000 < held_out * 1000].append(text)
    if not all(sides):
        raise ValueError(f"{len(texts)} texts are too few to hold {held_out:.0%} out")
    return sides


def train_tokenizer(texts: list[str], vocab_size: int):
    """Byte-level BPE, Chinese and English alike: any text is decoded exactly as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(folder):
    """The tokenizer.json of a model's folder."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as problem:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({problem})") from None


def sequences(texts: list[str], tokenizer, max_length: int) -> list[list[int]]:
    """Token ids of each text between two ends, in pieces of at most max_length + 1 that overlap by one."""
    end = tokenizer.token_to_id(END)
    out = []
    for encoding in tokenizer.encode_batch(texts):
        ids = [end, *encoding.ids, end]
        out += [ids[i : i + max_length + 1] for i in range(0, len(ids) - 1, max_length)]
    return out


def packed(pieces: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (T,), target (T,) and cu_seqlens (pieces + 1,): each token and the one after it, without padding."""
    ids = torch.tensor([t for p in pieces for t in p[:-1]])
    target = torch.tensor([t for p in pieces for t in p[1:]])
    return ids, target, torch.tensor([0] + [len(p) - 1 for p in pieces]).cumsum(0).int()


def batches(pieces: list[list[int]], tokens: int, epoch: int, seed: int) -> list[list[list[int]]]:
    """An epoch's batches of about so many tokens, in an order that follows from seed and epoch alone."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    out, size = [[]], 0
    for i in torch.randperm(len(pieces), generator=g).tolist():
        if size and size + len(pieces[i]) > tokens:
            out.append([])
            size = 0
        out[-1].append(pieces[i])
        size += len(pieces[i])
    return out
