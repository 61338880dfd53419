"""Ctrl-C where it would do harm: heard later, or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising; yield a function that says whether it came. The second one raises."""
    noted = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield noted.is_set  # only the main thread may install a handler; ignored, as in a script's background, it stays
        return

    def note(*_: object) -> None:
        noted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


@contextmanager
def interrupt_blocked() -> Iterator[None]:
    """Processes started here never see Ctrl-C, not even while they import: the parent hears of it, and decides.

    The parent may hear of it in here, by a thread of another library's.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which the first process would start first of all, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
