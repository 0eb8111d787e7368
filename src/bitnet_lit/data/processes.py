"""Starting processes that do not run the caller's script again.

A new process of multiprocessing's "spawn" imports the script that its parent runs, so that functions defined there
exist in it too. A script that does its work without an `if __name__ == "__main__":` around it would then start all
over in every process, each of which would start more; Python stops that with an error in the new process, for which
the parent waits for ever. A script that came from a pipe, or was typed, cannot be imported at all.

The functions that our processes run are this package's own. So the new process is told of no script: what it would
be told is read from two attributes of the module `__main__`, which are taken away while processes start.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_HIDING = threading.RLock()  # of two threads, one would note what the other has hidden


@contextlib.contextmanager
def without_main_script() -> Iterator[None]:
    """Processes that multiprocessing starts in this block do not import the main script.

    What is sent to them (functions, classes of arguments) must not be defined in it.
    """
    with _HIDING:
        main = sys.modules["__main__"]
        hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
        try:
            main.__spec__ = None
            main.__file__ = None
            yield
        finally:
            for name in ("__file__", "__spec__"):
                if name in hidden:
                    setattr(main, name, hidden[name])
                else:
                    delattr(main, name)
