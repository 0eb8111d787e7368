"""The lm-evaluation-harness asks models three things, and a model of this project answers them here.

    loglikelihood          how likely a continuation is behind a context: multiple choice
    loglikelihood_rolling  how likely a whole text is: perplexity
    generate_until         a continuation, up to a stop text

The harness has a backend `hf`, and figures are compared across papers because they come from it. So what is asked of
the tokenizer, and which tokens count, is the same here, surprises included: a context and its continuation are encoded
together, and the continuation is what comes behind as many tokens as the context has alone; a text that is too long
loses its beginning; and in `loglikelihood_rolling` BOS itself is a token to predict, from BOS (add_bos_token=false
leaves that out). The answers are equal but for float rounding: tests/inference/test_lm_eval.py compares them.

(`lm_eval` is EleutherAI's package: https://github.com/EleutherAI/lm-evaluation-harness.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bitnet_lit.config import GenerationConfig
from bitnet_lit.config.checks import SIZE, Range, one_of
from bitnet_lit.errors import UserError, nearest
from bitnet_lit.inference.language_model import load
from bitnet_lit.inference.scoring import Window

AUTO_BATCH_SIZE = 32
HARNESS_DEVICE = "cuda:0"
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""The names of sampling options, in the tasks and here. With `do_sample` top_k is 50 where the task does not give it,
as in `transformers`."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


@register_model("bitnet_lit")
class BitnetLit(TemplateLM):
    """Is a model of this project in the lm-evaluation-harness: `--model bitnet_lit --model_args checkpoint=...`.

    Args:
        checkpoint: what `bitnet_lit.load` takes. None: the newest run below outputs/.
        engine, threads, tokenizer: as for `bitnet_lit.load`. On a CPU the native engine scores and generates. On a GPU
            the PyTorch network scores, and the CUDA engine generates where it can run the model.
        head, kv_cache: as for `bitnet_lit.load`. None: float in the native engine, which is exact.
        device: cpu, cuda, cuda:1, mps. None, and the harness's own default cuda:0: a GPU where there is one.
        batch_size: texts that PyTorch scores together, or auto, which is 32.
        max_length: tokens that the model reads at most. None: its context.
        max_gen_toks: tokens to generate where a task does not say how many.
        dtype: of PyTorch's matrix products (autocast); auto: float32.
        add_bos_token: whether BOS stands in front of a context. None: as the tokenizer has it, which is yes.
        prefix_token_id: the token in front of a text without a context. None: BOS.
        max_batch_size: the harness gives it to every model; it has no effect here.

    Raises:
        UserError: there is no such model, device or option. The message is one line.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        engine: Literal["auto", "cpu", "cuda", "torch"] = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "auto",
        threads: int | None = None,
        head: Literal["auto", "int8", "int4", "float"] | None = None,
        kv_cache: Literal["half", "float", "int8"] | None = None,
        tokenizer: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for key, value in unknown.items():
            known = [name for name in BitnetLit.__init__.__annotations__ if name not in ("unknown", "return")]
            near = nearest(key, known)
            raise UserError(
                f"model_args {key}={value}: no such option"
                + (f": did you mean {near}?" if near else f": take one of {', '.join(known)}")
            )
        one_of("dtype", dtype, DTYPES)
        SIZE.check("max_gen_toks", max_gen_toks)
        self._batch_size = _batch_size(batch_size)
        device = "cpu" if engine == "cpu" else _device(device)
        native = device == "cpu" and engine != "torch"
        self._model = load(
            checkpoint,
            engine=engine,
            device=device,
            threads=threads,
            head=head or ("float" if native else "auto"),
            kv_cache=kv_cache or ("float" if native else "half"),
            tokenizer=tokenizer,
        )
        context = self._model.config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        Range(1, context, must=f"be 1 to {context}, the model's context").check("max_length", self.max_length)
        self.max_gen_toks = max_gen_toks
        self._scorer = self._model.scorer(self._batch_size, None if dtype == "auto" else dtype)
        self._tokenizer = self._model.generator.tokenizer
        self._add_bos, self._prefix_token_id = add_bos_token, prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: EOS, or BOS where there is no EOS."""
        tokenizer = self._tokenizer
        return tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.bos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text that has no context."""
        return self._tokenizer.bos_id if self._prefix_token_id is None else self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """The harness stores requests by it."""
        return self._tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids; with BOS in front unless it is turned off here or by `add_bos_token`."""
        bos = self._add_bos if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode(string, bos=bos is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation: (texts, ids of the context, of the continuation).

        Raises:
            UserError: a continuation is longer than the context of the model.
        """
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        answers = [(0.0, False)] * len(requests)
        with _progress(len(requests), "loglikelihood", disable_tqdm) as progress:
            for number, scores in self._scorer.found(windows):
                answers[number] = -float(scores.losses.sum(dtype=np.float64)), bool(scores.hits.all())
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                progress.update()
        return answers

    def _window(self, context: Sequence[int], continuation: Sequence[int]) -> Window:
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens: the model reads {self.max_length} at most: leave the "
                "task out, or take a model with a longer context"
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]  # the last one is predicted and not read
        return Window(ids, len(ids) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows that do not share what they score."""
        windows, of_request = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append(self._window(*make_disjoint_window(pair)))
                of_request.append(number)
        losses: list[list[float]] = [[] for _ in requests]
        waiting = Counter(of_request)  # windows of each text that are not scored yet
        totals = [0.0] * len(requests)
        with _progress(len(windows), "loglikelihood_rolling", disable_tqdm) as progress:
            for at, scores in self._scorer.found(windows):
                number = of_request[at]
                losses[number].append(float(scores.losses.sum(dtype=np.float64)))
                waiting[number] -= 1
                if not waiting[number]:
                    totals[number] = -math.fsum(losses[number])  # whatever their order
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, totals[number])
                progress.update()
        return totals

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuse `--apply_chat_template`: models of this project have no chat template."""
        raise UserError("--apply_chat_template: models of this project have no chat template: leave it out")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, without the stop text."""
        prompts, options = zip(*(self._prompt(*request.args) for request in requests), strict=True)
        texts = [""] * len(requests)
        with _progress(len(requests), "generate_until", disable_tqdm) as progress:
            for batch in self._batches(options):
                found = self._model.generator.continue_ids([prompts[i] for i in batch], options[batch[0]], batch[0])
                for number, text in zip(batch, found, strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                progress.update(len(batch))
        return texts

    def _batches(self, options: Sequence[GenerationConfig]) -> Iterable[list[int]]:
        """Yield numbers of requests, those of equal options together."""
        size = max(self._batch_size, self._model.engine.texts_at_once)
        waiting = list(range(len(options)))
        while waiting:
            same = [number for number in waiting if options[number] == options[waiting[0]]][:size]
            waiting = [number for number in waiting if number not in set(same)]
            yield same

    def _prompt(self, context: str, given: dict[str, Any]) -> tuple[list[int], GenerationConfig]:
        """Return the ids of a context that leave room for the continuation, and how to generate it.

        Raises:
            UserError: there is no room, or an option that this project does not have.
        """
        import torch

        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        new_tokens, until, samples = options.pop("max_gen_toks"), options.pop("until"), options.pop("do_sample")
        if new_tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks={new_tokens}: leaves no room for a prompt, the model reads {self.max_length} tokens: "
                "give --gen_kwargs max_gen_toks=<fewer>"
            )
        chosen = {SAMPLING[key]: options.pop(key) for key in SAMPLING if key in options}
        if options:
            raise UserError(
                f"gen_kwargs {', '.join(options)}: not known here: take {', '.join(SAMPLING)}, do_sample, until, "
                "max_gen_toks"
            )
        if samples:
            chosen = {"top_k": 50, "top_p": 1.0, "temperature": 1.0, **chosen}
        else:
            chosen = {"temperature": 0.0}
        ids = self.tok_encode(context)[-(self.max_length - new_tokens) :]
        # The harness seeds torch with its --seed.
        config = GenerationConfig(max_new_tokens=new_tokens, stop=until, seed=torch.initial_seed(), **chosen)
        return ids, config


def _progress(total: int, kind: str, is_hidden: bool) -> tqdm:
    """Return a progress bar of requests, named as the harness names its own."""
    return tqdm(total=total, disable=is_hidden, desc=f"Running {kind} requests")


def _device(given: str | None) -> str:
    """Return the device that the harness's --device means; it gives `HARNESS_DEVICE` where the user gave none."""
    import torch

    if given not in (None, HARNESS_DEVICE) or torch.cuda.is_available():
        return given or "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _batch_size(given: int | str | None) -> int:
    """Return the number that the harness's --batch_size means: 8, "8", "auto" or "auto:4"."""
    if given is None or str(given).startswith("auto"):
        return AUTO_BATCH_SIZE
    if not str(given).isdecimal() or int(given) < 1:
        raise UserError(f"batch_size={given}: must be a number from 1 on, or auto")
    return int(given)
