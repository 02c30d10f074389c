"""A request to stop from outside, noticed between two steps."""

import signal
import threading
from types import FrameType
from typing import Any

_STOPPING = ("SIGTERM", "SIGINT", "SIGHUP")


class StopRequest:
    """Within a `with` block turns SIGTERM, SIGINT and SIGHUP into a flag; a second SIGINT acts at once.

    Outside the main thread, where Python takes no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in _STOPPING:
                number = getattr(signal, name, None)
                # What is ignored on purpose (nohup) stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
