"""Text to token ids and back: Qwen2's byte-level BPE, or a sentencepiece model where a checkpoint ships one.

There is no chat template: callers put `bos_id` and `eos_id` around the ids of a prompt themselves.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

BOS = "<|im_start|>"
EOS = "<|im_end|>"
IMAGE_START = "<|vision_start|>"
IMAGE_END = "<|vision_end|>"

# Qwen2's pre-tokenizer (arXiv 2407.10671): contractions, letters with one leading other character, single digits,
# punctuation with a leading space, line breaks, spaces apart from the one before a word.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerError(ValueError):
    """Tokenizer files that cannot be used, or a text that cannot be encoded; the message names the file or text."""


class Tokenizer:
    """Turn text into token ids and back.

    Attributes: `bos_id`, `eos_id`, `image_start_id`, `image_end_id` (ids of `<|im_start|>`, `<|im_end|>`,
    `<|vision_start|>`, `<|vision_end|>`), `special_ids` (string to id of every added token), `vocab_size` (one more
    than the largest id) and `files` (the files it was read from).
    """

    def __init__(self, core: _ByteLevelBPE | _SentencePiece, files: tuple[Path, ...]):
        self._core = core
        self.files = files
        self.special_ids: dict[str, int] = core.special_ids
        self.vocab_size: int = core.vocab_size
        self.bos_id, self.eos_id = self._special_id(BOS), self._special_id(EOS)
        self.image_start_id, self.image_end_id = self._special_id(IMAGE_START), self._special_id(IMAGE_END)

    def _special_id(self, token: str) -> int:
        if token not in self.special_ids:
            raise TokenizerError(
                f"{' and '.join(map(str, self.files))}: the special token {token} is missing, but BAGEL needs it; "
                "take the tokenizer files of the checkpoint's own repository"
            )
        return self.special_ids[token]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        `vocab.json`, `merges.txt` and `tokenizer_config.json` come first, as in the official code; `tokenizer.json`
        (with the added tokens of `tokenizer_config.json`, if any) is read where one of them is missing or lists no
        added tokens; a sentencepiece `*.model` where neither layout is there.

        Raises TokenizerError that names the file which is missing, malformed or lacks a special token.
        """
        folder = Path(folder)
        parts = [folder / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
        missing = [path.name for path in parts if not path.is_file()]
        whole, config = folder / "tokenizer.json", parts[2]
        if whole.is_file() and (missing or not _added_tokens(config)):
            files = [whole] if config.name in missing else [whole, config]
            return cls(_ByteLevelBPE(_read_whole(*files), whole), tuple(files))
        if not missing:
            return cls(_ByteLevelBPE(_read_parts(*parts), parts[0]), tuple(parts))
        pieces = sorted(folder.glob("*.model"))
        if len(pieces) == 1:
            return cls(_SentencePiece(pieces[0]), tuple(pieces))
        if pieces:
            raise TokenizerError(
                f"{folder}: one sentencepiece model is wanted, got {', '.join(p.name for p in pieces)}"
            )
        raise TokenizerError(
            f"{folder}: no tokenizer here, missing {', '.join(missing)}; tokenizer.json or a sentencepiece *.model "
            "would do as well"
        )

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Return the ids of a text, without bos and eos.

        A string that spells an added token (`special_ids`) becomes that token; with `allow_special=False` it is
        ordinary text and no such id can come out, whatever the text.

        Raises TokenizerError for a lone surrogate, which has no UTF-8 form.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text holds a lone surrogate, {text[error.start]!a} at position {error.start}, and is no valid "
                "Unicode; remove or replace it"
            ) from None
        return self._core.encode(text, allow_special=allow_special)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids: special tokens are kept, bytes that are no UTF-8 become U+FFFD.

        Ids outside the vocabulary, which a model may emit since its table has more rows, decode to nothing.
        """
        stream = TextStream(self)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()


class TextStream:
    """Decode token ids as they come; all pieces joined are `Tokenizer.decode` of all ids. Time per id is constant."""

    def __init__(self, tokenizer: Tokenizer):
        self._core = tokenizer._core
        self._special = frozenset(tokenizer.special_ids.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True  # the next ordinary token opens a text: the stream's start, or after a special token

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, perhaps empty; a character is never split."""
        token_id = int(token_id)
        if not 0 <= token_id < self._core.vocab_size:
            return ""
        spelled = self._core.spell(token_id, first=self._first)
        if spelled is None:
            return ""
        self._first = token_id in self._special
        return self._utf8.decode(spelled)

    def flush(self) -> str:
        """Return what is left, an unfinished character as U+FFFD; the stream then starts afresh."""
        self._first = True
        return self._utf8.decode(b"", final=True)


# Byte-level BPE -------------------------------------------------------------------------------------------------------


def _byte_of_char() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class _ByteLevelBPE:
    """A byte-level BPE of the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: Path):
        self._byte_of_char = _byte_of_char()
        unspelled = [byte for char, byte in self._byte_of_char.items() if tokenizer.token_to_id(char) is None]
        if unspelled:
            raise TokenizerError(
                f"{source}: not a byte-level vocabulary, {len(unspelled)} of 256 bytes have no token "
                f"(the first is 0x{min(unspelled):02X}); such texts could not be encoded"
            )
        self._tokenizer = tokenizer
        self._plain = tokenizers.Tokenizer(tokenizer.model)  # the same model, shared, without added tokens
        self._plain.normalizer, self._plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: token_id for token_id, token in sorted(added.items())}
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._added = frozenset(added)
        for content in self.special_ids:
            if not self._added.isdisjoint(self.encode(content, allow_special=False)):
                raise TokenizerError(f"{source}: merges of ordinary text must not spell the special token {content}")

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        tokenizer = self._tokenizer if allow_special else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    def spell(self, token_id: int, *, first: bool) -> bytes | None:
        """Return the bytes of a token, None for an id that is not used; `first` makes no difference here."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        if token_id in self._added or not all(char in self._byte_of_char for char in token):
            return token.encode()
        return bytes(self._byte_of_char[char] for char in token)


def _read_parts(vocab_file: Path, merges_file: Path, config_file: Path) -> tokenizers.Tokenizer:
    added = _added_tokens(config_file)
    vocab = _read_vocab(vocab_file)
    taken = {token_id: token for token, token_id in vocab.items()}
    for token_id, token in added.items():
        if taken.get(token_id, token.content) != token.content or vocab.get(token.content, token_id) != token_id:
            raise TokenizerError(
                f"{config_file}: added token {token.content} has id {token_id}, but {vocab_file.name} says "
                f"{vocab.get(token.content, taken.get(token_id))!r}"
            )
    # In the model's vocabulary an added token keeps its id, gaps or not; no merge leads to it.
    vocab |= {token.content: token_id for token_id, token in added.items()}
    try:
        model = models.BPE(vocab=vocab, merges=_read_merges(merges_file))
    except TokenizerError:
        raise
    except Exception as error:  # the library's only type
        raise TokenizerError(f"{merges_file}: the merges do not fit {vocab_file.name} ({error})") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added.values()))
    return tokenizer


def _read_whole(file: Path, config_file: Path | None = None) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library's only type, beside OSError and UnicodeDecodeError
        raise TokenizerError(f"{file}: cannot be read as a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token_id, token in (_added_tokens(config_file) if config_file else {}).items():
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise TokenizerError(
                f"{config_file}: added token {token.content} has id {token_id}, but with {file.name} it would be "
                f"{tokenizer.token_to_id(token.content)}"
            )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, got a {type(content).__name__}")
    return content


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    for token, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise TokenizerError(f"{path}: token {token!r} must have an id of 0 or more, got {token_id!r}")
    if len(set(vocab.values())) != len(vocab):
        raise TokenizerError(f"{path}: {len(vocab) - len(set(vocab.values()))} tokens share the id of another")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a token may hold other line breaks
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise TokenizerError(f"{path}: line {number} must hold two tokens with a space between, got {line!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _added_tokens(config_file: Path) -> dict[int, AddedToken]:
    """Return the added tokens of a `tokenizer_config.json` by id, in rising order; none if there is no such file."""
    if not config_file.is_file():
        return {}
    entries = _read_json(config_file).get("added_tokens_decoder", {})
    try:
        tokens = {
            int(token_id): AddedToken(entry["content"], **{k: entry[k] for k in ADDED_TOKEN_FLAGS if k in entry})
            for token_id, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{config_file}: added_tokens_decoder is malformed ({error!r})") from error
    return dict(sorted(tokens.items()))


# sentencepiece --------------------------------------------------------------------------------------------------------

SPACE = "▁"
CONTROL, USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type


class _SentencePiece:
    """A sentencepiece model; its special tokens are the control and user-defined pieces.

    Pieces of one character or with spaces, which some models define to spell code, count as ordinary text. A text is
    split at special tokens and the parts are encoded one by one. The library may put a space before each part;
    decoding takes it away.
    """

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor  # only for the checkpoints that need it

        try:
            model = path.read_bytes()
            self._model = SentencePieceProcessor(model_proto=model)
        except Exception as error:  # the library raises RuntimeError and others
            raise TokenizerError(f"{path}: cannot be read as a sentencepiece model ({error})") from error
        kinds = _piece_kinds(model)
        pieces = [self._model.id_to_piece(i) for i in range(len(kinds))]
        self.special_ids = {
            piece: i
            for i, piece in enumerate(pieces)
            if kinds[i] in (CONTROL, USER_DEFINED) and len(piece) > 1 and SPACE not in piece
        }
        self.vocab_size = len(pieces)
        self._pieces = pieces
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._special = {i: piece for piece, i in self.special_ids.items()}
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._adds_space = self._model.encode("a", out_type=str)[0].startswith(SPACE)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        if not allow_special:
            # The library itself recognises user-defined pieces, also in forms that its normalisation maps to them:
            # they are replaced afterwards.
            ids = self._model.encode(text)
            return [i for token_id in ids for i in self._as_ordinary(token_id)]
        ids: list[int] = []
        for part in self._split.split(text):
            ids += [self.special_ids[part]] if part in self.special_ids else self._model.encode(part)
        return ids

    def _as_ordinary(self, token_id: int) -> list[int]:
        if token_id not in self._special:
            return [token_id]
        return [i for char in self._special[token_id] for i in self._char_ids(char)]

    def _char_ids(self, char: str) -> list[int]:
        if char in self._ids:
            return [self._ids[char]]
        unknown = self._model.unk_id()
        return [self._ids.get(f"<0x{byte:02X}>", unknown) for byte in char.encode()]

    def spell(self, token_id: int, *, first: bool) -> bytes:
        """Return the bytes of a token; the first of a text loses the space that encoding put there."""
        piece = self._pieces[token_id]
        if token_id in self._special:
            return piece.encode()
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return "\N{REPLACEMENT CHARACTER}".encode()
        text = piece.replace(SPACE, " ")
        return (text.removeprefix(" ") if first and self._adds_space else text).encode()


def _piece_kinds(model: bytes) -> list[int | bytes | None]:
    """Return the type of every piece of a sentencepiece file (None: normal), which its Python interface does not tell.

    The file is a protocol buffer: field 1 of the message, repeated, is a piece; field 3 of a piece is its type.
    """
    pieces = [piece for number, piece in _fields(model) if number == 1 and isinstance(piece, bytes)]
    return [
        next((kind for number, kind in _fields(piece) if number == 3 and isinstance(kind, int)), 1) for piece in pieces
    ]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
