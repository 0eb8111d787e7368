"""Generation: positions, ends, stops, streaming; the engine against the whole forward pass."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.config import GenerationConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator
from bitnet_lit.inference.stop_texts import StopFilter
from bitnet_lit.quant import PackedBitLinear
from tests.support import tiny_model

GREEDY = {"temperature": 0.0}


def stream(generator, prompt, index=0, **options):
    return (piece for _, piece in generator.stream_batch([prompt], GenerationConfig(**options), index))


def generate_batch(generator, prompts, index=0, **options):
    return generator.generate_batch(prompts, GenerationConfig(**options), index)


def generate(generator, prompt, index=0, **options):
    return generate_batch(generator, [prompt], index, **options)[0]


class Scripted:
    """An engine that continues with given tokens, whatever it is asked."""

    max_length = 64

    class Cache:
        length = step = 0

        def fork(self):
            return copy.copy(self)

    def __init__(self, script, vocab_size=512):
        self.script, self.vocab_size = script, vocab_size
        self.given = []

    def new_cache(self):
        return self.Cache()

    def forward(self, ids, caches):
        self.given += ids
        logits = np.zeros((len(ids), self.vocab_size), dtype=np.float32)
        for row, text, cache in zip(logits, ids, caches, strict=True):
            row[self.script[min(cache.step, len(self.script) - 1)]] = 10.0
            cache.length += len(text)
            cache.step += 1
        return logits


@pytest.mark.parametrize("quant", ["b158", "b1", "none"])
@pytest.mark.parametrize("prompt_length", [1, 2, 9])
def test_greedy_with_the_cache_is_greedy_without(quant, prompt_length, tokenizer):
    model = tiny_model(quant, num_key_value_heads=2)
    prompt = [tokenizer.bos_id, *range(300, 299 + prompt_length)]
    engine = TorchEngine(model)
    cache, ids, new = engine.new_cache(), list(prompt), prompt
    for _ in range(30):
        token = int(engine.forward([new], [cache])[0].argmax())
        new = [token]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        # The whole pass and the cached step differ by float rounding: the same choice, unless two are equal to 2e-2.
        assert logits[token] >= logits.max() - 2e-2
        ids.append(token)


def test_the_packed_engine_computes_the_models_logits_exactly():
    model = tiny_model("b158")
    engine = TorchEngine(model)
    assert any(isinstance(module, PackedBitLinear) for module in engine.model.modules())
    assert not any(isinstance(module, PackedBitLinear) for module in model.modules())
    ids = list(range(20))
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0, -1]
    # the integers are the same; the head multiplies one row here and twenty there
    found = torch.from_numpy(engine.forward([ids], [engine.new_cache()])[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", [True, False])
def test_an_engine_computes_in_the_dtype_of_the_model(dtype, pack):
    model = tiny_model("b158").to(dtype)
    engine = TorchEngine(model, pack)
    cache = engine.new_cache()
    engine.forward([[1, 2, 3]], [cache])
    found = torch.from_numpy(engine.forward([[4]], [cache])[0])
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3, 4]]))[0, -1].float()
    # A packed layer rounds its output, and a latent one its sum as well, so that codes of activations change.
    assert (found - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("quant", ["b158", "b158_row"])
def test_pytorch_runs_a_model_whose_rows_fill_no_bytes(quant):
    model = tiny_model(quant, intermediate_size=66, head_dim=6, num_key_value_heads=1)
    engine = TorchEngine(model)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]]))[0, -1]
    found = torch.from_numpy(engine.forward([[1, 2, 3]], [engine.new_cache()])[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_engine_on_a_model_in_training_leaves_it_in_training(tokenizer):
    model = tiny_model("b158", dropout=0.5).train()
    engine = TorchEngine(model, pack=False)
    first = engine.forward([[1, 2, 3]], [engine.new_cache()])
    assert np.array_equal(engine.forward([[1, 2, 3]], [engine.new_cache()]), first)
    assert model.training


def test_ends(tokenizer):
    word = tokenizer.encode("Lily", bos=False)[0]
    for script, options, reason, count in (
        ([word, word, tokenizer.eos_id], {}, "eos", 3),
        ([word, tokenizer.bos_id], {}, "eos", 2),
        ([word], {"max_new_tokens": 5}, "max_new_tokens", 5),
        ([word], {"max_new_tokens": 1000}, "context", 64),  # the last one is drawn, not fed
    ):
        generator = Generator(Scripted(script), tokenizer)
        list(stream(generator, "", **GREEDY, **options))
        statistics = generator.statistics
        assert (statistics.reason, statistics.new_tokens) == (reason, count)
        assert statistics.prompt_tokens == 1


def test_a_long_prompt_keeps_its_last_tokens_and_says_so(tokenizer):
    generator = Generator(TorchEngine(tiny_model(max_position_embeddings=16)), tokenizer)
    with pytest.warns(UserWarning, match=r"the prompt has \d+ tokens and the context 16: kept the last 15"):
        text = generate(generator, "Once upon a time, there was a girl. " * 4, **GREEDY)
    assert text.startswith("Once upon a time")
    assert generator.statistics.prompt_tokens == 15 and generator.statistics.new_tokens == 2


def test_stop_texts_never_show_even_across_pieces(tokenizer):
    script = [*tokenizer.encode("Lily went home and ate a cake.", bos=False), tokenizer.eos_id]
    text = tokenizer.decode(script[:-1])
    for stop in ("home and", "e and a", "cake", "."):
        generator = Generator(Scripted(script), tokenizer)
        pieces = list(stream(generator, "", stop=[stop], **GREEDY))
        assert "".join(pieces) == text[: text.index(stop)]
        assert generator.statistics.reason == "stop"
    generator = Generator(Scripted(script), tokenizer)
    assert "".join(stream(generator, "", stop=["cake. And", "xyz"], **GREEDY)) == text


def test_streamed_characters_are_whole(tokenizer):
    script = [*tokenizer.encode("a 😀 b", bos=False), tokenizer.eos_id]
    pieces = list(stream(Generator(Scripted(script), tokenizer), "", **GREEDY))
    assert "".join(pieces) == "a 😀 b" and "😀" in pieces


def test_the_text_goes_on_from_the_prompt(tokenizer):
    script = [*tokenizer.encode("went home", bos=False), tokenizer.eos_id]
    assert generate(Generator(Scripted(script), tokenizer), "Lily", **GREEDY) == "Lily went home"
    assert generate(Generator(Scripted(script), tokenizer), "", **GREEDY) == "went home"


def test_the_same_seed_gives_the_same_text(tokenizer):
    generator = Generator(TorchEngine(tiny_model()), tokenizer)
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0}
    first = generate(generator, "Lily", seed=3, **options)
    assert generate(generator, "Lily", seed=3, **options) == first
    assert generate(generator, "Lily", seed=3, index=1, **options) != first


def test_texts_of_a_batch_are_those_of_each_alone(tokenizer):
    generator = Generator(TorchEngine(tiny_model(max_position_embeddings=40)), tokenizer)
    prompts = ["Lily", "", "Lily", "Once upon a time, there was a boy", "Lily"]
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 3}
    alone = [generate(generator, prompt, index=i, **options) for i, prompt in enumerate(prompts)]
    assert generate_batch(generator, prompts, **options) == alone
    assert len(set(alone)) == 5
    statistics = generator.statistics
    assert statistics.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in set(prompts))
    assert "context" in statistics.reason


def test_rows_of_a_padded_vocabulary_are_never_drawn(tokenizer):
    """A model may have more rows than the tokenizer has pieces; the likeliest here is such a row."""
    for temperature in (0.0, 1.0):
        padded = Scripted([tokenizer.vocab_size + 3], vocab_size=tokenizer.vocab_size + 8)
        list(stream(Generator(padded, tokenizer), "Once", max_new_tokens=20, temperature=temperature, seed=1))
        drawn = [token for (token,) in padded.given[1:]]  # behind the prompt
        assert len(drawn) == 19 and max(drawn) < tokenizer.vocab_size  # the last one is not fed


def test_a_context_of_one_token_gives_one(tokenizer):
    generator = Generator(TorchEngine(tiny_model(max_position_embeddings=1)), tokenizer)
    for prompt in ("", "Once"):
        with contextlib.nullcontext() if not prompt else pytest.warns(UserWarning, match="kept the last 1"):
            list(stream(generator, prompt, **GREEDY))
        assert (generator.statistics.prompt_tokens, generator.statistics.new_tokens) == (1, 1)


def test_no_prompts_give_no_texts(tokenizer):
    assert generate_batch(Generator(TorchEngine(tiny_model()), tokenizer), []) == []


@pytest.mark.parametrize(
    "options",
    [
        *({"max_new_tokens": value} for value in (-1, 1.5)),
        *({"seed": value} for value in (1.5, True)),
        {"index": -1},
        *({"stop": value} for value in ([1], b"x")),
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_options_are_refused_when_a_text_is_asked_for(options, tokenizer):
    generator = Generator(Scripted([5]), tokenizer)
    ((key, _),) = options.items()
    with pytest.raises(UserError, match=f"{key}="):
        stream(generator, "Once", **options)  # not only when its first piece is read
    with pytest.raises(UserError, match="prompts="):
        generator.stream_batch("Once", GenerationConfig())


def test_a_stop_text_may_be_anything(tokenizer):
    script = [*tokenizer.encode("One\nday aab", bos=False), tokenizer.eos_id]
    text = tokenizer.decode(script[:-1])
    ends = {
        "": text,
        "\n": "One",  # a byte token
        "x" * 1_000_000: text,
        text + "!": text,
        "ab": "One\nday a",  # its first letter comes twice
        "aab": "One\nday ",
        "O": "",
    }
    for stop, expected in ends.items():
        for stops in ([stop], (stop, stop)):
            pieces = stream(Generator(Scripted(script), tokenizer), "", stop=stops, **GREEDY)
            assert "".join(pieces) == expected, stop[:20]


def test_thousands_of_stop_texts(tokenizer):
    """It would take longer than a test may, if each token were compared with every beginning of every stop text."""
    script = [*tokenizer.encode("Lily went home and ate a cake.", bos=False), tokenizer.eos_id]
    stops = [f"{word} {i}" for i in range(2000) for word in ("went", "ate a cak", "cake. And so they all ran " * 20)]
    text = "".join(stream(Generator(Scripted(script), tokenizer), "", stop=[*stops, "a cake"], **GREEDY))
    assert text == "Lily went home and ate "


def test_the_stop_text_that_is_complete_first_ends_a_text_in_whatever_pieces_it_comes():
    text = "say abcd now"
    for size in (1, 2, 3, len(text)):
        stops = StopFilter(["abcd", "bc", "xyz"])
        passed = ""
        for at in range(0, len(text), size):
            passed += stops.feed(text[at : at + size])
            if stops.stopped:
                break
        assert passed == "say a"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    cut=st.integers(1, 5),
)
def test_stop_texts_are_those_found_by_looking_at_every_end(text, stops, cut):
    ends = [(end, stop) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: first - max(len(stop) for end, stop in ends if end == first)]
    found, filtered = "", StopFilter(stops)
    for at in range(0, len(text), cut):
        found += filtered.feed(text[at : at + cut])
        if filtered.stopped:
            break
    assert filtered.stopped == (first is not None)
    assert found + ("" if filtered.stopped else filtered.flush()) == expected


def test_streams_read_in_turns_are_those_read_alone(tokenizer):
    generator = Generator(TorchEngine(tiny_model()), tokenizer)
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    prompts = ["Lily", "Once upon a time", ""]
    alone = ["".join(stream(generator, prompt, **options)) for prompt in prompts]
    streams = [stream(generator, prompt, **options) for prompt in prompts]
    together = [""] * 3
    for _ in range(20):
        for number, pieces in enumerate(streams):
            together[number] += next(pieces, "")
    assert together == alone


def test_statistics_are_of_the_text_that_was_begun_last(tokenizer):
    generator = Generator(TorchEngine(tiny_model()), tokenizer)
    first = stream(generator, "Lily went home", max_new_tokens=20, seed=1)
    next(first)
    list(stream(generator, "", max_new_tokens=3, seed=1))
    assert (generator.statistics.prompt_tokens, generator.statistics.new_tokens) == (1, 3)
    list(first)
    assert (generator.statistics.prompt_tokens, generator.statistics.new_tokens) == (1, 3)


def test_a_stream_that_is_closed_half_way_leaves_the_engine_as_it_was(tokenizer):
    generator = Generator(TorchEngine(tiny_model()), tokenizer)
    whole = generate(generator, "Lily", max_new_tokens=20, seed=1)
    half = stream(generator, "Lily", max_new_tokens=20, seed=1)
    next(half)
    half.close()
    assert generate(generator, "Lily", max_new_tokens=20, seed=1) == whole
