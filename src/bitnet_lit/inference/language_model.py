"""`bitnet_lit.load`: a trained model as an object that generates text.

The signatures here repeat the fields of `EngineConfig` and `GenerationConfig` (config/inference.py), so that editors
complete them and type checkers check them; a test compares the two. What an option means stands with its field.

The native engine needs no torch, and importing torch takes longer than everything else before the first token. So torch
is imported only where it is needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.config import EngineConfig, GenerationConfig, ModelConfig
from bitnet_lit.config.checks import list_of_texts
from bitnet_lit.config.network import import_schemes
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference import forks  # noqa: F401  # keeps torch usable after a fork
from bitnet_lit.inference.damage import find_damage
from bitnet_lit.inference.engines.choose import check_device, choose_engine
from bitnet_lit.inference.generator import Generator, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet_lit.checkpoints.stored_model import StoredModel
    from bitnet_lit.inference.scoring import Scorer
    from bitnet_lit.model import CausalLM
    from bitnet_lit.quant import Scheme

SPARE_ROWS = 512  # embeddings are padded to a round number of rows, by less than this or a twentieth


class LanguageModel:
    """A trained model, opened by `bitnet_lit.load`. Any number of threads may use one at the same time.

    Attributes:
        stored: the model on disk: path, config, quant, tokenizer.
        engine: what computes the logits of generated text; `engine.name` says which engine it is.
    """

    def __init__(
        self,
        path: str | Path | None,
        options: EngineConfig | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
    ) -> None:
        options = options or EngineConfig()
        check_device(options.device, options.engine)
        self._device = options.device
        self.stored = open_stored(find_model(path))
        if tokenizer is not None:
            _take_tokenizer(self.stored, tokenizer)
        self.engine = choose_engine(self.stored, options, lambda: self._network)

    def __repr__(self) -> str:
        stored = self.stored
        return f"<LanguageModel {stored.path}: {stored.config.name}, quant={stored.quant.name}, {self.engine.name}>"

    @cached_property
    def _network(self) -> CausalLM:
        from bitnet_lit.checkpoints.pretrained import build_pretrained

        return build_pretrained(self.stored).model.to(self._device)

    @property
    def config(self) -> ModelConfig:
        """The sizes of the network, by Hugging Face's names."""
        return self.stored.config

    @cached_property
    def generator(self) -> Generator:
        """The generator, which the methods below call with the options as one object.

        Raises:
            UserError: the model has no tokenizer.
        """
        if self.stored.tokenizer is None:
            raise UserError(
                f"{self.stored.path}: has no tokenizer.model: put the one of its data there, or give tokenizer="
            )
        return Generator(self.engine, self.stored.tokenizer, partial(find_damage, self.stored))

    def scorer(self, batch_size: int = 32, dtype: str | None = None) -> Scorer:
        """Return what computes how likely given tokens are (inference/scoring.py).

        The native engine scores where it runs the model. Otherwise PyTorch does, on the device.

        Args:
            batch_size: texts that PyTorch runs together.
            dtype: float32, bfloat16 or float16, of PyTorch's matrix products. None: that of the weights.

        Raises:
            UserError: a dtype that the native engine does not have.
        """
        from bitnet_lit.inference.engines.cpu.engine import CpuEngine
        from bitnet_lit.inference.scoring import NativeScorer, NetworkScorer

        if isinstance(self.engine, CpuEngine):
            if dtype not in (None, "float32"):
                raise UserError(f"dtype={dtype}: the native engine computes in float32: take engine=torch")
            return NativeScorer(self.engine.model)
        import torch

        network = getattr(self.engine, "model", None) or self._network  # PyTorch's engine has it; the CUDA engine not
        autocast = None if dtype is None else getattr(torch, dtype)
        return NetworkScorer(network, self.config.max_position_embeddings, batch_size, autocast)

    @property
    def statistics(self) -> Statistics:
        """Tokens, seconds and the reason of the end, of the text or batch that was begun last."""
        return self.generator.statistics

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        index: int = 0,
    ) -> str:
        """Generate a text.

        Args:
            prompt: the text to go on from. It may be empty: the model then begins by itself.
            max_new_tokens: the most tokens to generate. EOS, a stop text and the end of the context end a text too.
            temperature: divides the logits. 0: always the likeliest token. 1: the model's own distribution.
            top_k: sample from the k likeliest tokens. 0: from all.
            top_p: sample from the fewest likeliest tokens whose probabilities add up to this. 1: from all.
            min_p: leave out tokens whose probability is below this share of the likeliest token's. 0: none.
            repeat_penalty: divide positive logits of recent tokens by this, and multiply negative ones. 1: off.
            repeat_last_n: how many of the last tokens repeat_penalty counts as recent.
            seed: the same seed gives the same text. None: another text each time.
            stop: a text, or several, that end the generated text; they are left out of it.
            index: the number of the text, where several are drawn with one seed: each number gives another text.

        Returns:
            The whole text, the prompt included.

        Raises:
            UserError: a value of the wrong type or beyond its range, or a model without a tokenizer.
            ModelError: the model computes NaN or infinity, or memory ends.
        """
        pieces = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
            stop=stop,
            index=index,
        )
        return prompt + "".join(pieces)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        index: int = 0,
    ) -> Iterator[str]:
        """Generate a text piece by piece; arguments and errors are those of `generate`.

        Returns:
            Pieces of the text as they become final, each of whole characters. The prompt is not among them.
        """
        if not isinstance(prompt, str):
            raise UserError(f"prompt={prompt!r:.100}: must be a text; generate_batch and stream_batch take several")
        pieces = self.stream_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
            stop=stop,
            index=index,
        )
        return (piece for _, piece in pieces)

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        index: int = 0,
    ) -> list[str]:
        """Generate a text from each prompt, all together; arguments and errors are those of `generate`.

        A text is the same as `generate` gives it with `index` plus its number in the list.

        Returns:
            The whole texts in the order of the prompts, each with its prompt.
        """
        texts = list_of_texts("prompts", prompts)
        pieces = self.stream_batch(
            list(texts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
            stop=stop,
            index=index,
        )
        for number, piece in pieces:
            texts[number] += piece
        return texts

    def stream_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        index: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """Generate a text from each prompt, all together; arguments and errors are those of `generate`.

        Returns:
            Pieces of the texts as they become final: (number of the prompt, piece).
        """
        options = GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
            stop=[stop] if isinstance(stop, str) else list_of_texts("stop", stop),
        )
        return self.generator.stream_batch(prompts, options, index)

    def logits(self, ids: Tensor) -> Tensor:
        """Compute the logits of every position. The PyTorch network computes them, whatever `engine` is.

        Args:
            ids: int64 (B, T).

        Returns:
            float32 (B, T, V) on the CPU.

        Raises:
            UserError: ids of another shape or type, beyond the vocabulary, or more than the context.
        """
        import torch

        vocabulary, context = self.config.vocabulary, self.config.max_position_embeddings
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise UserError(f"ids: must be an int64 tensor (B, T), not {got}")
        if not 0 < ids.shape[1] <= context:
            raise UserError(f"ids: {ids.shape[1]} tokens, where the context holds 1 to {context}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise UserError(f"ids: from {int(ids.min())} to {int(ids.max())}, where the vocabulary has {vocabulary}")
        with torch.inference_mode():
            return self._network(ids.to(self._device)).float().cpu()


def _take_tokenizer(stored: StoredModel, given: str | Path | Tokenizer) -> None:
    """Give a model the tokenizer that the user names; one that is not the model's own is refused or warned of."""
    stored.tokenizer = given if isinstance(given, Tokenizer) else open_tokenizer(given)
    stored.check_tokenizer()
    rows, pieces = stored.config.vocabulary, stored.tokenizer.vocab_size
    if rows - pieces >= max(SPARE_ROWS, rows // 20):
        warnings.warn(
            f"tokenizer={given}: has {pieces} pieces, the model {rows} rows: was it trained with another one?",
            stacklevel=4,
        )


def load(
    path: str | Path | None = None,
    *,
    engine: Literal["auto", "cpu", "cuda", "torch"] = "auto",
    device: str = "cpu",
    threads: int | None = None,
    head: Literal["auto", "int8", "int4", "float"] = "auto",
    kv_cache: Literal["half", "float", "int8"] = "half",
    tokenizer: str | Path | Tokenizer | None = None,
    schemes: Sequence[str | type[Scheme]] = (),
) -> LanguageModel:
    """Open a trained model.

    Args:
        path: a run folder, a model folder, llama2.c's .pt or .bin, or a model of the Hugging Face hub (owner/name).
            None: the newest run below outputs/.
        engine: cpu (the native engine: compiled code), cuda (kernels for NVIDIA GPUs), torch, or auto: the engine of
            the device where it can run the model, and PyTorch otherwise, with a warning that says why.
        device: cpu, cuda or mps; cuda:1 is the second GPU. engine="cuda" alone means device="cuda".
        threads: threads of the native engine. None: one on each physical core.
        head: how the engine stores the output head: int8, int4 (native engine), float (as stored; exact and slower), or
            auto.
        kv_cache: how the engine stores keys and values: half (float16), float (float32) or int8 (native engine).
        tokenizer: a SentencePiece model, a tokenizer.json or a `Tokenizer` of your own, for a model that comes without
            a tokenizer.
        schemes: quantization schemes of your own that the model may name: classes, or their names <module>.<class>.
            A scheme that only the folder names is never imported.

    Raises:
        UserError: there is no such model or device, the model is damaged, or the engine cannot run it. The message is
            one line.
    """
    options = EngineConfig(engine=engine, device=device, threads=threads, head=head, kv_cache=kv_cache)
    import_schemes(schemes)
    return LanguageModel(path, options, tokenizer)
