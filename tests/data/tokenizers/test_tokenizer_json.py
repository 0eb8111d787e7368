"""tokenizer.json in its two spellings of bytes: ids, text, BOS and EOS, and text that arrives token by token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.shards import open_shards
from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers import find_tokenizer, open_tokenizer
from bitnet_lit.data.tokenizers.tokenizer_json import JsonTokenizer
from bitnet_lit.errors import UserError

TEXTS = [*demo_stories(60), "naïve café — 日本語 🙂🙃 \t\n  two  spaces", "don't 12345"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(template=True):
    """GPT-2's, Llama 3's and Qwen's kind; with a template a text begins with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    return tokenizer, {"bos_token": "<|begin|>" if template else None, "eos_token": "<|end|>"}


def metaspace(**before):
    """Llama 2's kind: a space before the first word, bytes of characters that no piece covers."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    before = before or {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])}
    for part, value in before.items():
        setattr(tokenizer, part, value)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    # As Llama 2's file has it: byte pieces are part of the vocabulary and not special.
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}


def metaspace_of_the_library():
    """The same by `Metaspace`, which newer files name; its decoder takes every space of the first piece away."""
    tokenizer, names = metaspace(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer, names


KINDS = {
    "byte level": byte_level,
    "byte level, no BOS": lambda: byte_level(template=False),
    "metaspace": metaspace,
    "Metaspace": metaspace_of_the_library,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each kind as the library's own object and as ours."""
    found = {}
    for kind, build in KINDS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        theirs, names = build()
        theirs.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        found[kind] = theirs, open_tokenizer(find_tokenizer(folder))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_the_librarys(opened, kind):
    theirs, ours = opened[kind]
    assert isinstance(ours, JsonTokenizer) and ours.vocab_size == theirs.get_vocab_size()
    bos, eos = ("<s>", "</s>") if "etaspace" in kind else ("<|begin|>", "<|end|>")
    bos = eos if "no BOS" in kind else bos  # Qwen: the end of one text begins the next
    assert (ours.bos_id, ours.eos_id) == (theirs.token_to_id(bos), theirs.token_to_id(eos))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
        ids = ours.encode(text)
        assert (ids[0] == ours.bos_id) == ("no BOS" not in kind)
        assert ours.decode(ids) == text == ours.decode(ours.encode(text, bos=False))
        assert ours.decode([*ids, ours.eos_id]) == text  # special tokens are silent
    assert ours.encode("") == [ours.bos_id] and ours.encode("", bos=False) == []
    assert ours.piece_bytes(ours.bos_id) == ours.piece_bytes(ours.eos_id) == b""


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(KINDS)), st.text(max_size=40))
def test_any_text_comes_back(opened, kind, text):
    _, ours = opened[kind]
    decoded = ours.decode(ours.encode(text))
    expected = text
    if "etaspace" in kind:
        expected = expected.replace("▁", " ")  # its sign for a space
    if kind == "Metaspace" and text[:1] in (" ", "▁"):
        expected = expected[1:]  # no second space is put before one, and decoding takes the first away
    assert decoded == expected


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(KINDS)), st.text(max_size=30), st.text(max_size=30))
def test_pieces_joined_are_the_text(opened, kind, prompt, text):
    _, ours = opened[kind]
    decoder = ours.stream_decoder()
    ids = ours.encode(text)
    pieces = [decoder.feed(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == ours.decode(ids)

    # After a prompt, whose last character is whole.
    prompt_ids = ours.encode(prompt)
    more = ours.encode(text, bos=False)
    decoder = ours.stream_decoder(prompt_ids)
    joined = "".join(decoder.feed(token) for token in more) + decoder.flush()
    assert ours.decode(prompt_ids) + joined == ours.decode([*prompt_ids, *more])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(KINDS)), st.data())
def test_any_tokens_give_text(opened, kind, data):
    """What an untrained model says: bytes that are no UTF-8, special tokens in the middle."""
    _, ours = opened[kind]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    decoder = ours.stream_decoder()
    pieces = [decoder.feed(token) for token in ids]
    joined = "".join(pieces) + decoder.flush()
    joined.encode("utf-8")
    decoded = ours.decode(ids)
    assert ("\ufffd" in joined) == ("\ufffd" in decoded)
    if "\ufffd" not in decoded:
        assert joined == decoded
    elif "etaspace" not in kind:
        # How many U+FFFD a broken character becomes, each library says in its own way; the rest is the same text. (Byte
        # fallback gives up a whole run of bytes, whole characters among them, which a stream cannot know in time.)
        assert joined.replace("\ufffd", "") == decoded.replace("\ufffd", "")


def test_a_broken_character_holds_nothing_back(opened):
    """Each piece of text is there with its token, whatever stands before it."""
    _, ours = opened["byte level"]
    token = {
        byte: ours._tokenizer.token_to_id(character) for byte, character in ((0xE6, "æ"), (0xC2, "Â"), (0x21, "!"))
    }
    decoder = ours.stream_decoder()
    said = [decoder.feed(token[byte]) for byte in (0xE6, 0x21, 0x21, 0xC2, 0xC2, 0x21, 0xE6)]
    assert said == ["", "\ufffd!", "!", "", "\ufffd", "\ufffd!", ""] and decoder.flush() == "\ufffd"


def test_bytes_of_pieces(opened):
    _, ours = opened["byte level"]
    assert ours.piece_bytes(ours._tokenizer.token_to_id("Ġthe")) == b" the"
    assert ours.piece_bytes(ours._tokenizer.token_to_id("<think>")) == b"<think>"
    assert b"".join(ours.piece_bytes(token) for token in ours.encode("日本 🙂\n")) == "日本 🙂\n".encode()
    _, ours = opened["metaspace"]
    assert b"".join(ours.piece_bytes(token) for token in ours.encode("日本 🙂\n")) == " 日本 🙂\n".encode()
    assert ours.piece_bytes(ours.vocab_size + 5) == b""  # an embedding may have more rows than the vocabulary


def test_half_of_a_character_pair_is_no_crash(opened):
    for _, ours in opened.values():
        assert ours.decode(ours.encode("a\ud83db")) == "a\ufffdb"


def test_a_copy_knows_its_bos_and_eos(opened, tmp_path):
    for kind, (_, ours) in opened.items():
        folder = tmp_path / kind
        folder.mkdir()
        ours.copy_to(folder)
        copied = open_tokenizer(find_tokenizer(folder))
        assert (copied.bos_id, copied.eos_id, copied.sha256) == (ours.bos_id, ours.eos_id, ours.sha256)


@pytest.mark.parametrize(
    ("beside", "bos", "eos"),
    [
        ({"config.json": {"bos_token_id": 0, "eos_token_id": [1, 5]}}, 0, 1),
        ({"config.json": {"eos_token_id": 1}}, 1, 1),
        ({"tokenizer_config.json": {"bos_token": "<|begin|>"}}, 0, 0),
        ({"tokenizer_config.json": {"bos_token": "<|nowhere|>"}, "config.json": {"bos_token_id": 1}}, 1, 1),
        ({"tokenizer_config.json": {"bos_token": None}, "config.json": {"bos_token_id": 0}}, 0, 0),
    ],
)
def test_where_bos_and_eos_are_named(tmp_path, beside, bos, eos):
    byte_level()[0].save(str(tmp_path / "tokenizer.json"))
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)


@pytest.mark.parametrize(
    "config",
    [{}, {"bos_token_id": 10**9}, {"bos_token_id": -1}, {"eos_token_id": []}],
    ids=str,
)
def test_neither_bos_nor_eos_is_refused(tmp_path, config):
    byte_level()[0].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names a BOS or EOS token"):
        open_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100000])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    with pytest.raises(UserError, match="not a tokenizer.json") as error:
        open_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        open_tokenizer(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"bos_token_id": "x"}', 'config.json: bos_token_id: must be an id or a list of ids, not "x"'),
        ("config.json", b'"text"', 'config.json: must be an object, not "text": mend it, or take it away'),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: must be an object, not a list of 0"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token: must be text, or an object with its content, not 5"),
        ("tokenizer_config.json", b'{"bos_token": {"content": null}}', "bos_token: must be text"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud83d"}', "half of a surrogate pair"),
        ("tokenizer_config.json", b'{"x": ' + b"[" * 10_000, "nested more than 64 deep"),
        ("tokenizer_config.json", b"\xff\xfe", "UTF-16"),
    ],
)
def test_damaged_files_beside_it_are_named(tmp_path, name, content, message):
    byte_level()[0].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokenizer(tmp_path / "tokenizer.json")
    assert message in str(error.value) and "\n" not in str(error.value)


def with_gaps(top_id):
    """A tokenizer.json whose ids leave numbers out: models whose vocabulary was cut, or has reserved rows."""
    raw = json.loads(byte_level()[0].to_str())
    vocabulary = raw["model"]["vocab"]
    added = {token["content"] for token in raw["added_tokens"]}
    last = next(piece for piece, id_ in vocabulary.items() if id_ == len(vocabulary) - 1)
    assert last not in added
    vocabulary[last] = top_id
    return json.dumps(raw)


def test_ids_with_gaps_count_to_the_largest(tmp_path):
    (tmp_path / "tokenizer.json").write_text(with_gaps(70_000))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.piece_bytes(70_000) and tokenizer.piece_bytes(69_999) == b""
    ids = np.array(tokenizer.encode("Once upon a time"))
    assert tokenizer.text_bytes(ids[:-1], ids[1:]) == len("Once upon a time")
    options = {"source": "demo", "num_stories": 20, "tokenizer": str(tokenizer.path), "out": str(tmp_path / "out")}
    prepare(PrepareConfig(**options, num_workers=1))
    assert open_shards(tmp_path / "out").dtype == np.uint32 and open_shards(tmp_path / "out").vocab_size == 70_001
    (tmp_path / "tokenizer.json").write_text(with_gaps(2**32 - 1))
    with pytest.raises(UserError, match=r"ids from 0 to 4294967295, at most 4194304 fit"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_cuts_its_models_batches_cuts_no_text(tmp_path):
    theirs, names = byte_level()
    theirs.enable_truncation(max_length=5)
    theirs.enable_padding(length=50, pad_token="<|end|>")
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_a_character_without_a_piece_is_one_line(tmp_path):
    raw = {"a": 0, "b": 1}
    Tokenizer(models.WordLevel(raw, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    with pytest.raises(UserError, match=r"cannot encode a text \(WordLevel error: Missing"):
        open_tokenizer(tmp_path / "tokenizer.json").encode("c")


def test_a_copy_is_the_file_that_was_opened(tmp_path):
    theirs, names = byte_level()
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    for path in list(tmp_path.iterdir()):
        path.unlink()
    tokenizer.copy_to(tmp_path)
    assert open_tokenizer(tmp_path / "tokenizer.json").sha256 == tokenizer.sha256
