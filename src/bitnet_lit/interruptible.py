"""A call into C++ that takes long runs in a thread of its own, so that Ctrl-C and SIGTERM are answered meanwhile.

Python handles a signal in the main thread, between two steps of Python code. While that thread is inside C++, a signal
waits for the end of the call. The C++ itself cannot be stopped: it goes on until the process ends. Then the process
must end without the destructors of C++, which would take away what the call still uses (`entry_point.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

NAME = "bitnet_lit.interruptible"


def interruptible(call: Callable[[], None]) -> None:
    """Make a call in another thread, and wait for it.

    Raises:
        BaseException: what the call raises.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name=NAME, daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def is_running() -> bool:
    """Return whether such a call goes on."""
    return any(thread.name == NAME for thread in threading.enumerate())
