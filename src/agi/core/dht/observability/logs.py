"""The logs of a node's process: one event a line, on stderr."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str, form: str) -> None:
    """Logs from this level on (`debug` to `error`), as `json`, for people (`console`), or whichever fits (`auto`).

    They go to stderr: stdout carries the announcement of the process alone.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso")
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    render: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
    ]
    structlog.configure(
        processors=[structlog.processors.add_log_level, stamp, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What the client, the transports and other libraries say by `logging` comes out in the same form.
    foreign = logging.StreamHandler(sys.stderr)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, stamp],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[foreign], force=True)


class Throttle:
    """Lets a few lines through in each second: a fault that meets every request must not become a flood of lines.

    >>> throttle = Throttle(per_second=2)
    >>> [throttle.pass_(0.0), throttle.pass_(0.1), throttle.pass_(0.2), throttle.pass_(1.5)]
    [True, True, False, True]
    """

    __slots__ = ("_left", "_per_second", "_second", "suppressed")

    def __init__(self, per_second: int = 10) -> None:
        self._per_second = per_second
        self._second = -1
        self._left = 0
        self.suppressed = 0
        """Lines that were held back since the last that passed; whoever logs says so and sets it to 0."""

    def pass_(self, now: float) -> bool:
        second = int(now)
        if second != self._second:
            self._second, self._left = second, self._per_second
        if self._left:
            self._left -= 1
            return True
        self.suppressed += 1
        return False
