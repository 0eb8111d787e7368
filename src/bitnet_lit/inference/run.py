"""What `python -m bitnet_lit.infer` does: tell one story, several, or one per prompt that is typed.

Stdout gets the text and nothing else. On a terminal the prompt is dimmed and a line of statistics goes to stderr; when
stdout is no terminal, or with quiet=true, not even that.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

from bitnet_lit.config import InferConfig
from bitnet_lit.inference.load import LanguageModel, load

DIM, PLAIN = "\033[2m", "\033[0m"


def _tell(model: LanguageModel, config: InferConfig, prompt: str, index: int, fancy: bool) -> str:
    """Write one text to stdout as it comes; returns it, prompt included."""
    text = prompt
    sys.stdout.write(f"{DIM}{prompt}{PLAIN}" if fancy else prompt)
    pieces = model.stream(
        prompt,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        index=index,
        stop=list(config.stop),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repeat_penalty=config.repeat_penalty,
        repeat_last_n=config.repeat_last_n,
    )
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if fancy:
        print(f"{DIM}{model.generator.statistics}{PLAIN}", file=sys.stderr)
    return text


def _typed_prompts() -> Iterator[str]:
    """Lines from stdin until an empty one, the end of input, or Ctrl-C."""
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not prompt:
            return
        yield prompt


def infer(config: InferConfig) -> list[str]:
    """Write texts to stdout; returns them, prompts included.

    Raises:
        UserError: no model, no tokenizer, or no such device.
    """
    fancy = sys.stdout.isatty() and not config.quiet
    # One line, not Python's file, line and source, for the notice about long prompts.
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    model = load(config.checkpoint, config.device, config.tokenizer, config.engine, config.threads, config.head)
    if fancy:
        print(
            f"{DIM}{model.source.path}, {model.config.name}, {model.source.quant.name}, {model.engine.name}{PLAIN}",
            file=sys.stderr,
        )
    texts = []
    try:
        if config.interactive:
            for prompt in _typed_prompts():
                try:
                    texts.append(_tell(model, config, prompt, 0, fancy))
                except KeyboardInterrupt:
                    continue  # ends this text only
            return texts
        for index in range(config.num_samples):
            if index:
                print("---")
            texts.append(_tell(model, config, config.prompt, index, fancy))
    except BrokenPipeError:
        # The reader went away (infer | head): leave, and keep Python from failing again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return texts
