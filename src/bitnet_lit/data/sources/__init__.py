"""Sources give stories, and know nothing of tokens. `source.py` says what a source is; each has a file here."""

from __future__ import annotations

from collections.abc import Callable

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.sources.demo import demo_source
from bitnet_lit.data.sources.files import files_source
from bitnet_lit.data.sources.source import Source
from bitnet_lit.data.sources.tinystories import tinystories_source
from bitnet_lit.errors import UserError

BUILT_IN: dict[str, Callable[[PrepareConfig], Source]] = {"demo": demo_source, "tinystories": tinystories_source}


def open_source(config: PrepareConfig) -> Source:
    """Find the text that `source=` means: a built-in source by its name, or else files, folders or globs.

    Raises:
        UserError: there is no such text, it cannot be read, or it cannot be downloaded; one line.
    """
    if len(config.source) == 1 and config.source[0] in BUILT_IN:
        return BUILT_IN[config.source[0]](config)
    if built_in := [source for source in config.source if source in BUILT_IN]:
        raise UserError(
            f"{config.typed_source}: {built_in[0]} is a built-in source, which is not joined: give it alone"
        )
    return files_source(config.source, list(BUILT_IN), config.column)
