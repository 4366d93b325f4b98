"""A lock for which nobody waits without an end."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from typing import Any

_POLL = 0.05  # seconds between two looks at who waits for whom
_waits: dict[threading.Thread, weakref.ref[Turn]] = {}


class Mutex:
    """A lock that one thread at a time holds, as many times as it likes.

    It differs from :class:`threading.RLock` in what ends a wait. Any thread may give the lock back,
    since a generator may be closed or collected anywhere. It is given back when the turn that holds
    it is collected, whatever interrupted its exit, and when its thread has ended or, in a fork, was
    left behind. Threads that wait in a circle get an error.

    Arguments:
        name: What the lock protects, for messages.

    Example:
        >>> mutex = Mutex("a model")
        >>> with mutex.turn(), mutex.turn():
        ...     pass
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # In order. The first that still counts holds the lock. Each change is one atomic call.
        self._turns: list[weakref.ref[Turn]] = []

    def turn(self, thread: threading.Thread | None = None) -> Turn:
        """Returns a context in which a thread holds the lock.

        Arguments:
            thread: The thread, the present one by default.
        """
        return Turn(self, thread or threading.current_thread())

    def holder(self) -> Turn | None:
        """Returns the turn that holds the lock, if there is one."""
        while True:
            try:
                reference = self._turns[0]
            except IndexError:
                return None
            turn = reference()
            if turn is not None and turn.counts():
                return turn
            with suppress(ValueError):  # another thread may have removed it
                self._turns.remove(reference)

    def take(self, turn: Turn) -> None:
        """Waits until a turn holds the lock.

        Arguments:
            turn: The turn.

        Raises:
            RuntimeError: If threads wait for each other in a circle.
        """
        own = turn.own
        if not self._turns:  # as it almost always is
            self._turns.append(own)
            if self._turns[0] is own:
                return
            self._turns.remove(own)
        while (holder := self.holder()) is not None and holder.thread is turn.thread:
            self._turns.insert(0, own)
            if not holder.done:
                return
            self._turns.remove(own)  # another thread ended the outer turn meanwhile
        self._turns.append(own)
        if self.holder() is not turn:
            self._wait(turn)

    def end(self, turn: Turn) -> None:
        """Takes a turn away, and wakes the thread whose turn it is then.

        Arguments:
            turn: The turn.
        """
        with suppress(ValueError):  # it may have been taken away as one that does not count
            self._turns.remove(turn.own)
        following = self.holder() if self._turns else None
        if following is not None and following.awake is not None:
            following.awake.set()

    def _wait(self, turn: Turn) -> None:
        turn.awake = threading.Event()
        _waits[turn.thread] = turn.own
        try:
            while self.holder() is not turn:
                _check(turn)
                turn.awake.wait(_POLL)
        finally:
            _waits.pop(turn.thread, None)


class Turn:
    """One stay of a thread at a lock.

    Arguments:
        mutex: The lock.
        thread: The thread.
    """

    __slots__ = ("__weakref__", "awake", "done", "mutex", "own", "thread")

    def __init__(self, mutex: Mutex, thread: threading.Thread) -> None:
        self.mutex, self.thread, self.done = mutex, thread, False
        self.own = weakref.ref(self)
        self.awake: threading.Event | None = None

    def counts(self) -> bool:
        """Tells whether the turn has not ended, nor its thread."""
        if self.done:
            return False
        return self.thread is threading.current_thread() or self.thread.is_alive()

    def __enter__(self) -> None:
        try:
            self.mutex.take(self)
        except BaseException:
            self.done = True
            raise

    def __exit__(self, *_: Any) -> None:
        self.done = True
        self.mutex.end(self)


def _check(turn: Turn) -> None:
    """Raises an error if a turn waits for itself, in the last of the threads that do."""
    circle = [turn]
    while True:
        holder = circle[-1].mutex.holder()
        waiting = None if holder is None else _waits.get(holder.thread)
        following = None if waiting is None else waiting()
        if following is None or following.mutex.holder() is following:
            return
        if following is turn:
            break
        if following in circle:
            return
        circle.append(following)
    if turn is not max(circle, key=lambda waiting: id(waiting.thread)):
        return
    waits = "; ".join(f"thread '{t.thread.name}' waits for {t.mutex.name}" for t in circle)
    raise RuntimeError(
        "Expected all threads to open contexts of several models in the same order; got threads"
        f" that wait for each other's: {waits}. Open the contexts in one order, or give each"
        " thread a copy of the models."
    )
