"""Texts from files: loaded, cleaned, each once, split, tokenised, packed."""

import json
import math
import re
import sys
import unicodedata
import zlib
from pathlib import Path

import torch

END = "<|endoftext|>"
NAMES = {2: (("text", "label"), ("source", "target")), 3: (("question", "context", "answer"),)}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]")


def load(path, columns: int = 1) -> list[tuple[str, ...]]:
    """Rows of so many texts, cleaned, none empty but a question's context.

    A line of .txt is one text; of .tsv, texts between tabs; of .jsonl, an object with "text", with the NAMES of so many
    columns, or with as many texts of other names, in order. Raises ValueError that names the file and the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl", ".tsv"):
        raise ValueError(f"{path}: expected .txt, .jsonl or .tsv")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: not UTF-8 (byte {problem.start})") from None
    rows = [_row(line, path.suffix, columns, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    rows = [tuple(map(clean, row)) for row in rows]
    full = [row for row in rows if all(text or (columns, i) == (3, 1) for i, text in enumerate(row))]
    if not full:
        raise ValueError(f"{path}: holds no text")
    if len(full) < len(rows):
        print(f"{path}: {len(rows) - len(full)} rows with an empty text are left out", file=sys.stderr)
    return full


def _row(line, suffix, columns, where):
    if suffix == ".jsonl":
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"{where}: not JSON ({problem})") from None
        if columns == 1 and (not isinstance(found, dict) or not isinstance(found.get("text"), str)):
            raise ValueError(f'{where}: expected an object with a string "text"')
        row = [found["text"]] if columns == 1 else _named(found, columns, where) if isinstance(found, dict) else []
    else:
        row = [line] if suffix == ".txt" else line.split("\t")
    if len(row) < columns or not all(isinstance(text, str) for text in row[:columns]):
        raise ValueError(f"{where}: expected {columns} texts, got {len(row)}")
    return row[:columns]


def _named(found, columns, where):
    """The texts of an object by their names, whatever their order; by their order where it has none of these names."""
    for names in NAMES[columns]:
        if found.keys() == set(names):
            return [found[name] for name in names]
    if len(found) > columns or any(name in found for names in NAMES[columns] for name in names):
        expected = ", or ".join(" and ".join(f'"{name}"' for name in names) for names in NAMES[columns])
        raise ValueError(f"{where}: expected {expected}, got {', '.join(found)}")
    return list(found.values())


def clean(text: str) -> str:
    """Unicode NFC, no control characters, the marker of a text's end not among the words."""
    return unicodedata.normalize("NFC", CONTROL.sub("", text)).replace(END, " ").strip()


def chinese(text: str) -> bool:
    """Whether some character is Chinese."""
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def distinct(rows: list[tuple[str, ...]], near: float = 0.8) -> list[tuple[str, ...]]:
    """Each row's first text once; also without those whose character 5-grams are shared to `near` (Jaccard) with an
    earlier one.

    Only texts that share a 5-gram are compared, the rarest first, so that most pairs are never looked at.
    """
    kept, grams_of, index, first = [], [], {}, {}
    for row in rows:
        first.setdefault(row[0], row)
    for row in first.values():
        plain = re.sub(r"\s+", " ", row[0].casefold())
        grams = {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}
        allowed = len(grams) - math.ceil(near * len(grams)) + 1  # near alike: one of any so many grams is shared
        rare = sorted(grams, key=lambda g: len(index.get(g, ())))[:allowed]
        others = {j for g in rare for j in index.get(g, ())}
        if any(len(grams & grams_of[j]) >= near * len(grams | grams_of[j]) for j in others):
            continue
        for g in grams:
            index.setdefault(g, []).append(len(kept))
        kept.append(row)
        grams_of.append(grams)
    return kept


def split(rows: list[tuple[str, ...]], held_out: float = 0.1, name: str = "") -> tuple[list, list]:
    """(training, held out): a row's side depends on its first text and on name alone, whatever file it comes in."""
    sides = ([], [])
    for row in rows:
        sides[zlib.crc32((row[0] + name).encode()) % 1000 < held_out * 1000].append(row)
    if not all(sides):
        raise ValueError(f"{len(rows)} texts are too few to hold {held_out:.0%} out")
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


def joined(sequences: list[list[int]], device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """ids (T,) one sequence behind another, and cu_seqlens (B + 1,)."""
    ids = torch.tensor([t for s in sequences for t in s])
    return ids.to(device), torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).int().to(device)


def packed(pieces: list[list[int]], device="cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (T,), target (T,) and cu_seqlens (pieces + 1,): each token and the one after it, without padding."""
    ids, cu = joined([p[:-1] for p in pieces], device)
    return ids, torch.tensor([t for p in pieces for t in p[1:]], device=device), cu


def in_order(pieces: list, tokens: int, size=len) -> list[list]:
    """Batches of about so many tokens, in the order given."""
    out, total = [[]], 0
    for piece in pieces:
        if total and total + size(piece) > tokens:
            out.append([])
            total = 0
        out[-1].append(piece)
        total += size(piece)
    return out


def batches(pieces: list, tokens: int, epoch: int, seed: int, size=len) -> list[list]:
    """An epoch's batches of about so many tokens, in an order that follows from seed and epoch alone."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return in_order([pieces[i] for i in torch.randperm(len(pieces), generator=g).tolist()], tokens, size)


def words(text: str) -> list[tuple[str, str]]:
    """Words and their parts of speech ("n", "v", ...), by jieba; English words are "eng"."""
    import logging

    import jieba.posseg

    jieba.setLogLevel(logging.WARNING)
    return [(w.word, w.flag) for w in jieba.posseg.cut(text) if w.word.strip()]
