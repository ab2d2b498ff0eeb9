"""Changes of a stream that happen as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class WholeChanges:
    """Changes after which a stream is as it should be, or starts over.

    A step is given the cache, so where one fails what is left cannot be trusted.  That is noted
    before anything is changed, since an interrupt may end the handling of an exception, too.
    """

    def __init__(self, start_over: Callable[[], None]) -> None:
        """Nothing has failed yet; `start_over` is called where something did."""
        self._start_over, self._is_torn = start_over, False

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """One change, in the block."""
        self.check()
        self._is_torn = True
        try:
            yield
        except BaseException:
            self.check()
            raise
        self._is_torn = False

    def check(self) -> None:
        """Start over if the last change was not completed."""
        if self._is_torn:
            self._start_over()
            self._is_torn = False
