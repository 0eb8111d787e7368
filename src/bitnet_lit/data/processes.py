"""Processes that start inside `without_main_script` do not run the caller's script again.

With multiprocessing's "spawn", a new process imports the script that its parent runs, so that functions defined there
exist in it, too. A script that does its work without `if __name__ == "__main__":` would then run again in each process,
which would start more processes. Python stops that with an error in the new process, and the parent waits for ever. A
script that came from a pipe, or was typed, cannot be imported at all.

Our processes run functions of this package only. So they are told of no script: Python reads what it would tell them
from two attributes of the module `__main__`, which are taken away while processes start.

A process of joblib has joblib's own start method, of which a new process would be told and which it does not know. So
they are told of "spawn".
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from bitnet_lit.runs.signals import blocked

_HIDING = threading.RLock()  # of two threads, the second would save what the first has hidden


@contextlib.contextmanager
def without_main_script() -> Iterator[None]:
    """Let processes that start inside the block not import the main script.

    What is sent to them (functions, classes of arguments) must not be defined in the script.
    """
    with _HIDING:
        with blocked():
            resource_tracker.ensure_running()
        main = sys.modules["__main__"]
        method = multiprocessing.get_start_method(allow_none=True)
        is_foreign = method is not None and method not in multiprocessing.get_all_start_methods()
        hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
        try:
            if is_foreign:
                multiprocessing.set_start_method("spawn", force=True)
            main.__spec__ = None
            main.__file__ = None
            yield
        finally:
            if is_foreign:
                multiprocessing.set_start_method(method, force=True)
            for name in ("__file__", "__spec__"):
                if name in hidden:
                    setattr(main, name, hidden[name])
                else:
                    delattr(main, name)
