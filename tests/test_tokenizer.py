"""The tokenizer: the reference ids, both file layouts, round trips on any text, streams and broken files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from conftest import REFERENCE, golden_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as RawTokenizer

from bagel.tokenizer import TextStream, Tokenizer, TokenizerError

CHECKPOINT = REFERENCE / "tiny" / "checkpoint"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
# Characters unknown to this Python have no settled normal form.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")))
TEXT_WITH_SPECIALS = st.lists(
    st.one_of(TEXT, st.sampled_from(["<|im_start|>", "<|im_end|>", "<tool_call>", "<|", "im_end|>"]))
).map("".join)
SENTENCES = ["the red circle on a blue background", "hello world, a cat sat there", "naïve café"] * 20


@cache
def tiny() -> Tokenizer:
    return Tokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the small checkpoint's tokenizer files, to be damaged."""
    for name in FILES:
        shutil.copy(CHECKPOINT / name, tmp_path)
    return tmp_path


def save_whole(folder: Path) -> None:
    """Replace the three files by one tokenizer.json."""
    Tokenizer.from_pretrained(folder)._core._tokenizer.save(str(folder / "tokenizer.json"))
    for name in FILES:
        (folder / name).unlink()


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The reference ------------------------------------------------------------------------------------------------------


def test_encode_gives_the_reference_ids(variant):
    tokenizer = Tokenizer.from_pretrained(REFERENCE / variant / "checkpoint")
    for case in golden_json(variant, "tokenizer"):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_decode_gives_the_reference_text(variant):
    tokenizer = Tokenizer.from_pretrained(REFERENCE / variant / "checkpoint")
    for case in golden_json(variant, "tokenizer"):
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_special_ids_are_those_of_the_files():
    tokenizer = tiny()
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_start_id, tokenizer.image_end_id)
    assert ids == (421, 422, 429, 430)
    assert tokenizer.special_ids["<tool_call>"] == 434
    assert len(tokenizer.special_ids) == 22
    assert tokenizer.vocab_size == 442
    assert tokenizer.files == tuple(CHECKPOINT / name for name in FILES)


def test_text_is_cut_as_qwen2_cuts_it():
    pieces = tiny()._core._tokenizer.pre_tokenizer.pre_tokenize_str("IT'SO we'll  12 !?\n (x")
    wanted = ["IT", "'S", "O", "Ġwe", "'ll", "Ġ", "Ġ", "1", "2", "Ġ!?Ċ", "Ġ(", "x"]
    assert [piece for piece, _ in pieces] == wanted


# Layouts --------------------------------------------------------------------------------------------------------------


def test_tokenizer_json_gives_the_same_ids(folder):
    save_whole(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.files == (folder / "tokenizer.json",)
    assert tokenizer.special_ids == tiny().special_ids
    for case in golden_json("tiny", "tokenizer"):
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.encode(case["text"], allow_special=False) == tiny().encode(case["text"], allow_special=False)
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_merges_without_version_line_give_the_same_ids(folder):
    merges = folder / "merges.txt"
    version, rest = merges.read_text().split("\n", 1)
    assert version.startswith("#version")
    merges.write_text(rest)
    tokenizer = Tokenizer.from_pretrained(folder)
    for case in golden_json("tiny", "tokenizer"):
        assert tokenizer.encode(case["text"]) == case["ids"]


def test_tokenizer_json_takes_added_tokens_of_the_config(folder):
    config = (folder / "tokenizer_config.json").read_text()
    save_whole(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"] = whole["added_tokens"][:-1]
    del whole["model"]["vocab"]["<|file_sep|>"]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(config)
    assert Tokenizer.from_pretrained(folder).special_ids == tiny().special_ids


def test_three_files_win_over_tokenizer_json(folder):
    (folder / "tokenizer.json").write_text("not read")
    assert Tokenizer.from_pretrained(folder).files == tuple(folder / name for name in FILES)


def test_tokenizer_json_wins_over_files_without_added_tokens(folder):
    tiny()._core._tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})
    assert Tokenizer.from_pretrained(folder).special_ids == tiny().special_ids


def test_tokenizer_json_never_truncates_or_pads(folder):
    save_whole(folder)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.save(str(folder / "tokenizer.json"))
    text = "a red circle on a blue background"
    assert Tokenizer.from_pretrained(folder).encode(text) == tiny().encode(text)


def test_added_tokens_keep_their_ids_across_gaps(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["900"] = {"content": "<|far|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("a<|far|>a") == [64, 900, 64]
    assert tokenizer.vocab_size == 901
    assert tokenizer.decode([64, 899, 900]) == "a<|far|>"


# Special tokens in a text ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(TEXT_WITH_SPECIALS)
def test_no_special_id_comes_out_of_ordinary_text(text):
    assert set(tiny().encode(text, allow_special=False)).isdisjoint(tiny().special_ids.values())


@pytest.mark.parametrize("token", ["<|im_start|>", "<|vision_end|>", "<tool_call>", "<|file_sep|>"])
def test_every_added_token_is_ordinary_on_request(token):
    ids = tiny().encode(f"a{token}b", allow_special=False)
    assert tiny().special_ids[token] not in ids
    assert tiny().decode(ids) == f"a{token}b"
    assert tiny().encode(f"a{token}b") == [64, tiny().special_ids[token], 65]


# Round trips and streams ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(TEXT_WITH_SPECIALS, st.booleans())
def test_decode_undoes_encode_on_any_composed_text(text, allow_special):
    composed = unicodedata.normalize("NFC", text)
    assert tiny().decode(tiny().encode(composed, allow_special=allow_special)) == composed


@settings(deadline=None)
@given(st.lists(st.integers(-3, 460)))
def test_decode_agrees_with_the_library_on_any_ids(ids):
    raw = tiny()._core._tokenizer
    tokens = [raw.id_to_token(i) for i in ids if 0 <= i < 442]
    assert tiny().decode(ids) == (decoders.ByteLevel().decode(tokens) if tokens else "")


BYTES_OF_EMOJI = (172, 253, 248, 222)  # the rocket, U+1F680, one byte a token


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(-3, 460), st.sampled_from(BYTES_OF_EMOJI))))
def test_stream_pieces_join_to_the_decoded_text(ids):
    raw = tiny()._core._tokenizer
    stream = TextStream(tiny())
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    tokens = [raw.id_to_token(i) for i in ids if 0 <= i < 442]
    assert "".join(pieces) == tiny().decode(ids) == (decoders.ByteLevel().decode(tokens) if tokens else "")


def test_stream_never_splits_a_character():
    stream = TextStream(tiny())
    assert [stream.push(i) for i in (*BYTES_OF_EMOJI, 64)] == ["", "", "", "🚀", "a"]
    assert stream.flush() == ""


def test_stream_flush_gives_the_broken_rest_and_starts_afresh():
    stream = TextStream(tiny())
    assert [stream.push(i) for i in BYTES_OF_EMOJI[:3]] == ["", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push(64) == "a"


def test_stream_replaces_a_character_broken_by_a_special_token():
    stream = TextStream(tiny())
    pieces = [stream.push(i) for i in (BYTES_OF_EMOJI[0], 422, 64)]
    assert pieces == ["", "\N{REPLACEMENT CHARACTER}<|im_end|>", "a"]


@pytest.mark.parametrize("unknown", [-1, 442, 447, 10**12])
def test_unknown_ids_decode_to_nothing(unknown):
    assert tiny().decode([64, unknown, 65]) == "ab"


def test_lone_surrogate_is_an_error():
    with pytest.raises(TokenizerError, match="lone surrogate, '\\\\ud83d' at position 2"):
        tiny().encode("ab\ud83d")


def test_very_long_text_round_trips():
    text = "a red circle, 雪山; " * 20_000 + "x" * 100_000
    assert tiny().decode(tiny().encode(text)) == text


# Broken files ---------------------------------------------------------------------------------------------------------


def test_empty_folder_names_what_is_wanted(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"missing vocab\.json, merges\.txt, tokenizer_config\.json; tokenizer\.json"
    ):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(TokenizerError, match=f"missing {name};"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"])
def test_missing_special_token_is_named_with_its_file(folder, token):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {i: entry for i, entry in config["added_tokens_decoder"].items() if entry["content"] != token}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.from_pretrained(folder)
    assert token in str(error.value)
    assert str(folder / "tokenizer_config.json") in str(error.value)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1, 2]", b"\xff\xfe", b"[" * 100_000], ids=range(5))
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json"])
def test_malformed_json_names_the_file(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=f"{name}: (cannot be read as JSON|must hold a JSON object)"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}', "[1]"])
def test_malformed_tokenizer_json_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad_id", [None, "7", 1.5, -1, True])
def test_vocabulary_with_a_bad_id_names_the_token(folder, bad_id):
    edit_json(folder / "vocab.json", a=bad_id)
    with pytest.raises(TokenizerError, match=r"vocab\.json: token 'a' must have an id of 0 or more"):
        Tokenizer.from_pretrained(folder)


def test_two_tokens_of_one_id_are_an_error(folder):
    edit_json(folder / "vocab.json", a=65)
    with pytest.raises(TokenizerError, match=r"vocab\.json: 1 tokens share the id of another"):
        Tokenizer.from_pretrained(folder)


def test_vocabulary_without_a_byte_is_an_error(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["zzz"] = vocab.pop("ÿ")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(TokenizerError, match=r"vocab\.json: not a byte-level vocabulary, 1 of 256 .*0xFF"):
        Tokenizer.from_pretrained(folder)


def test_added_token_on_the_id_of_another_is_an_error(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["64"] = {"content": "<|clash|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added token <\|clash\|> has id 64, .* says 'a'"):
        Tokenizer.from_pretrained(folder)


def test_config_that_contradicts_tokenizer_json_is_an_error(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    save_whole(folder)
    config["added_tokens_decoder"] = {"433": config["added_tokens_decoder"]["422"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"added token <\|im_end\|> has id 433, but with tokenizer.json .* 422"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("entry", [3, {}, {"content": 5}, {"content": "x", "special": []}])
def test_malformed_added_token_names_the_file(folder, entry):
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"420": entry})
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added_tokens_decoder is malformed"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("line", "complaint"), [("one", "line 2 must hold two tokens"), ("zz qq", "merges do not fit vocab.json")]
)
def test_bad_merges_name_the_file(folder, line, complaint):
    (folder / "merges.txt").write_text(f"#version: 0.2\n{line}\n")
    with pytest.raises(TokenizerError, match=rf"merges\.txt: .*{complaint}"):
        Tokenizer.from_pretrained(folder)


def test_merges_that_spell_a_special_token_are_an_error(folder):
    save_whole(folder)
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_tokens([AddedToken("th")])
    raw.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: merges .* spell the special token th"):
        Tokenizer.from_pretrained(folder)


# sentencepiece --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pieces(request, tmp_path_factory) -> Path:
    """A folder with a small sentencepiece model: two user-defined and two control special tokens."""
    import sentencepiece

    folder = tmp_path_factory.mktemp(request.param)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        model_type=request.param,
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["<|im_start|>", "<|vision_start|>", "é"],
        control_symbols=["<|im_end|>", "<|vision_end|>"],
        minloglevel=3,
    )
    return folder


def test_sentencepiece_special_ids_are_control_and_user_defined(pieces):
    tokenizer = Tokenizer.from_pretrained(pieces)
    named = {"<|im_start|>", "<|vision_start|>", "<|im_end|>", "<|vision_end|>", "<s>", "</s>"}
    assert set(tokenizer.special_ids) == named
    assert tokenizer.encode("<|im_start|>") == [tokenizer.bos_id]
    assert tokenizer.encode("<|im_end|><|vision_end|>") == [tokenizer.eos_id, tokenizer.image_end_id]
    assert tokenizer.files == (pieces / "tokenizer.model",)


def test_sentencepiece_encodes_text_as_the_library(pieces):
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    tokenizer = Tokenizer.from_pretrained(pieces)
    for text in ["", "the red circle", "hello, café 雪山 🚀", "circle the"]:
        assert tokenizer.encode(text) == tokenizer.encode(text, allow_special=False) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["<|im_start|>the cat<|im_end|>", "a<|vision_start|><|vision_end|>red", "<s>hello</s>"]
)
@pytest.mark.parametrize("allow_special", [True, False])
def test_sentencepiece_round_trips_special_tokens(pieces, text, allow_special):
    tokenizer = Tokenizer.from_pretrained(pieces)
    ids = tokenizer.encode(text, allow_special=allow_special)
    assert tokenizer.decode(ids) == text
    assert set(ids).isdisjoint(tokenizer.special_ids.values()) is not allow_special


def test_sentencepiece_normalised_spelling_is_ordinary_on_request(pieces):
    tokenizer = Tokenizer.from_pretrained(pieces)
    ids = tokenizer.encode("＜|im_start|＞", allow_special=False)  # full-width brackets, which become plain ones
    assert set(ids).isdisjoint(tokenizer.special_ids.values())


def test_sentencepiece_stream_joins_to_the_decoded_text(pieces):
    tokenizer = Tokenizer.from_pretrained(pieces)
    ids = [*tokenizer.encode("<|im_start|>hello 🚀 the cat<|im_end|>"), -1, 10**9, tokenizer.encode("🚀")[-1], 0]
    stream = TextStream(tokenizer)
    text = "".join([stream.push(i) for i in ids]) + stream.flush()
    assert text == tokenizer.decode(ids) == "<|im_start|>hello 🚀 the cat<|im_end|>\ufffd\ufffd"


def test_broken_sentencepiece_model_names_the_file(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(TokenizerError, match=r"spiece\.model: cannot be read as a sentencepiece model"):
        Tokenizer.from_pretrained(tmp_path)


def test_two_sentencepiece_models_are_an_error(tmp_path):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"one sentencepiece model is wanted, got a\.model, b\.model"):
        Tokenizer.from_pretrained(tmp_path)


def test_sentencepiece_is_imported_only_when_needed():
    code = (
        "import sys; from bagel.tokenizer import Tokenizer; Tokenizer.from_pretrained(sys.argv[1]); "
        "sys.exit('sentencepiece' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(CHECKPOINT)], cwd=root, check=False).returncode == 0
