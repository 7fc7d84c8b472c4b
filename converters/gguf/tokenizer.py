"""A Hugging Face tokenizer's files as GGUF keys.

Two kinds are known: byte-level BPE (GPT-2 and its descendants), which llama.cpp runs as `gpt2` with a pre-tokenizer
named in `tokenizer.ggml.pre`, and SentencePiece-style BPE with byte fallback (Llama 2, Mistral, Gemma, Phi-3), which
it runs as `llama`. A pre-tokenizer is recognised by what tokenizer.json says, so that one that llama.cpp does not have
is an error here rather than wrong tokens there. (Of gpt-4o's it has all but combining marks within words.)

Source: llama.cpp, conversion/base.py (get_vocab_base, _create_vocab_sentencepiece) and src/llama-vocab.cpp (the
expressions behind each name of pre-tokenizer).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from converters import settings
from converters.families import NotKnownHere
from converters.gguf import sentencepiece
from converters.settings import Settings
from oneround.errors import BadModel

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORD_START, _WORD_END = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_WORD_START}*{_WORD_END}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_WORD_START}+{_WORD_END}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"  # each digit alone

# Steps before byte-level BPE, and whether merges are ignored for a word that is a token -> llama.cpp's name.
_PRE = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_GPT4O,), False): "gpt-4o",
}
# Ways to split that keep what the expression matches as pieces; it matches everything.
_KEEPS = (("Isolated", False), ("Removed", True))
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = (int(kind) for kind in gguf.TokenType)
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


@dataclass
class _Vocabulary:
    """Pieces, their types, and scores where the kind of tokenizer has them, by token id."""

    tokens: list[bytes]
    types: list[int]
    scores: list[float]

    @staticmethod
    def unused(size: int) -> _Vocabulary:
        return _Vocabulary([f"[PAD{n}]".encode() for n in range(size)], [_UNUSED] * size, [-10000.0] * size)

    def put(self, number: int, token: str, kind: int, score: float = 0.0) -> None:
        self.tokens[number], self.types[number], self.scores[number] = _utf8(token), kind, score

    def check_unique(self, folder: Path) -> None:
        """llama.cpp aborts the process over two tokens with one text."""
        if len(set(self.tokens)) != len(self.tokens):
            (twice, count), *_ = Counter(self.tokens).most_common(1)
            raise BadModel(f"{folder}: {count} tokens of the tokenizer have the text {twice[:40]!r}")

    def put_added(self, number: int, token: str, special: bool) -> None:
        if special or _LOOKS_SPECIAL.fullmatch(token):
            self.put(number, token, _CONTROL, -1000.0)
        else:
            self.put(number, token.replace("▁", " "), _USER_DEFINED, -1000.0)  # llama.cpp wants them normalised


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add a folder's tokenizer, padded to `vocab_size` tokens, to a GGUF's keys.

    Raises:
        BadModel: no tokenizer, one that is not sound, or one that llama.cpp does not have.
    """
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and not (folder / "tokenizer.model").is_file():
        raise BadModel(f"{folder} has no tokenizer, neither tokenizer.json nor tokenizer.model")
    config, source = _settings(folder / "tokenizer_config.json"), _settings(folder / "tokenizer.json")
    if any(step.get("type") == "ByteLevel" for step in _steps(source, "pre_tokenizer", "pretokenizers")):
        model, pre = "gpt2", _pre_tokenizer(source)
        vocabulary = _byte_level(source, vocab_size)
    else:
        model, pre = "llama", "default"
        if (folder / "tokenizer.model").is_file():
            vocabulary = _sentencepiece(folder, config, vocab_size)
            # Where transformers 5 saved the tokenizer, only tokenizer.json lists what is added.
            plain = (_UNUSED,) if config.get("added_tokens_decoder") else (_UNUSED, _NORMAL)
            for token, number, special in _added(source):
                if number < vocab_size and vocabulary.types[number] in plain:
                    vocabulary.put_added(number, token, special)
            prepends = sentencepiece.prepends_space(folder / "tokenizer.model")
        else:
            vocabulary = _with_byte_fallback(source, vocab_size)
            prepends = _prepends_space(source)
        if not prepends or config.get("add_prefix_space") is not None:
            writer.add_add_space_prefix(prepends and config.flag("add_prefix_space"))
    vocabulary.check_unique(folder)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    if model == "llama":
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of what the lines below settle
    try:
        special = gguf.SpecialVocab(folder, load_merges=model == "gpt2", n_vocab=vocab_size)
        # A tokenizer.json says what it adds; without one, transformers makes a LlamaTokenizer, which adds BOS.
        special.add_special_token.setdefault("bos", not has_json)
        special.add_to_gguf(writer, quiet=True)
    except Exception as error:  # gguf reads these files without checking them
        raise BadModel(f"{folder}: the tokenizer's special tokens are not understood: {error}") from error


def _byte_level(source: Settings, vocab_size: int) -> _Vocabulary:
    vocabulary = _Vocabulary.unused(vocab_size)
    for token, number in _pieces(source):
        vocabulary.put(_checked(source, token, number, vocab_size), token, _NORMAL)
    for token, number, special in _added(source):
        vocabulary.put_added(_checked(source, token, number, vocab_size), token, special)
    return vocabulary


def _checked(source: Settings, token: str, number: int, vocab_size: int) -> int:
    if number >= vocab_size:
        raise source.bad(f"the token {token[:40]!r} is number {number}, the model has {vocab_size}")
    return number


def _with_byte_fallback(source: Settings, vocab_size: int) -> _Vocabulary:
    """SentencePiece-style BPE from tokenizer.json: a score is a merge's rank, as SentencePiece's own BPE scores are."""
    model = source.table("model")
    if model.text("type", "") != "BPE" or not model.flag("byte_fallback"):
        raise NotKnownHere(f"{source.source}: this kind of tokenizer is not supported yet")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.items("merges")):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise source.bad(f"merge {rank} is not a pair of tokens")
        ranks.setdefault("".join(parts), rank)
    unknown = model.get("unk_token")
    vocabulary = _Vocabulary.unused(vocab_size)
    for token, number in _pieces(source):
        if number < vocab_size:  # Gemma 3's has one that only its models for images have
            is_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token)
            vocabulary.put(number, token, _BYTE if is_byte else _NORMAL, -float(ranks.get(token, len(ranks))))
    for token, number, special in _added(source):
        if number < vocab_size:
            vocabulary.put_added(number, token, special)
            if token == unknown:
                vocabulary.put(number, token, _UNKNOWN)
    return vocabulary


def _sentencepiece(folder: Path, config: Settings, vocab_size: int) -> _Vocabulary:
    """tokenizer.model, and the tokens that added_tokens.json and tokenizer_config.json add to it."""
    vocabulary = _Vocabulary.unused(vocab_size)
    for number, (token, score, kind) in enumerate(sentencepiece.pieces(folder / "tokenizer.model")):
        if number < vocab_size:
            # A user-defined piece of the model is an ordinary one, as in llama.cpp's converter.
            vocabulary.put(number, token, _NORMAL if kind == _USER_DEFINED else kind, score)
    if (folder / "added_tokens.json").is_file():
        for token, number in settings.read(folder / "added_tokens.json", BadModel).values.items():
            if not isinstance(number, int) or number < 0:
                raise BadModel(f"{folder / 'added_tokens.json'}: the token {token!r} has no number")
            if number < vocab_size:
                vocabulary.put(number, token, _USER_DEFINED, -1000.0)
    decoder = config.table("added_tokens_decoder")
    for key in decoder.values:
        if not key.isdecimal():
            raise decoder.bad(f"{key!r} is not a token's number")
        entry = decoder.table(key)
        if int(key) < vocab_size:
            vocabulary.put_added(int(key), entry.text("content"), entry.flag("special"))
    return vocabulary


def _pieces(source: Settings) -> Iterator[tuple[str, int]]:
    """The model's vocabulary."""
    vocabulary = source.table("model").table("vocab")
    for token in vocabulary.values:
        yield token, vocabulary.integer(token, low=0)


def _added(source: Settings) -> Iterator[tuple[str, int, bool]]:
    for entry in source.items("added_tokens"):
        token = Settings(entry if isinstance(entry, dict) else {}, f"{source.source}: added_tokens", BadModel)
        yield token.text("content"), token.integer("id", low=0), token.flag("special")


def _pre_tokenizer(source: Settings) -> str:
    """llama.cpp's name for what tokenizer.json does before byte-level BPE."""
    model = source.table("model")
    steps: list[str] = []
    understood = model.text("type", "BPE") == "BPE" and not model.get("end_of_word_suffix")
    for step in _steps(source, "normalizer", "normalizers"):
        understood &= step.get("type") == "NFC"  # llama.cpp has none, which matters to few texts
    for step in _steps(source, "pre_tokenizer", "pretokenizers"):
        pattern = step.get("pattern")
        match step.get("type"):
            case "Digits" if step.get("individual_digits"):
                steps.append(_DIGITS)
            case "Split" if isinstance(pattern, dict) and (step.get("behavior"), bool(step.get("invert"))) in _KEEPS:
                steps.append(str(pattern.get("Regex")))
            case "ByteLevel" if not step.get("add_prefix_space"):
                steps += [_GPT2] if step.get("use_regex", True) else []
            case _:
                understood = False
    pre = _PRE.get((tuple(steps), model.flag("ignore_merges")))
    if pre is None or not understood:
        raise NotKnownHere(f"{source.source}: llama.cpp has no pre-tokenizer known here that does {steps}")
    return pre


def _steps(source: Settings, key: str, inner: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer as a list of steps, whether it is one, several or none."""
    outer = source.table(key)
    steps = outer.items(inner) if outer.get("type") == "Sequence" else [outer.values] if outer.values else []
    return [step if isinstance(step, dict) else {} for step in steps]


def _prepends_space(source: Settings) -> bool:
    if any(step.get("type") == "Prepend" for step in _steps(source, "normalizer", "normalizers")):
        return True
    steps = _steps(source, "pre_tokenizer", "pretokenizers")
    return any(s.get("type") == "Metaspace" and s.get("prepend_scheme", "always") != "never" for s in steps)


def _utf8(token: str) -> bytes:
    try:
        return token.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair
        raise BadModel(f"the token {token!r} is not text: {error}") from error


def _settings(path: Path) -> Settings:
    return settings.read(path, BadModel) if path.is_file() else Settings({}, str(path), BadModel)
