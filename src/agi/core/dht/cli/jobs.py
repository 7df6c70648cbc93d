"""A command that runs with all that it starts in a process group of its own, so that all of it can be ended at once.

As a shell does it, but the terminal stays with our own group until the command asks for it: signals of its keys come to
us, and are passed on, so that neither the script around us nor the pager behind us loses it for nothing. A command that
reads from it, or sets its modes, is stopped by the kernel (SIGTTIN, SIGTTOU); then it is handed over, and taken back at
the end. Where the command is stopped by Ctrl-Z we stop too, so that the shell notices, and go on together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agi.core.dht.cli import output

LOOK_S = 0.05
"""How often it is looked whether the command may still run, and whether it was stopped."""
KILLED_S = 1.0
"""After SIGKILL the group is waited for so long; zombies that nobody collects would stay for ever."""
PASSED_ON = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP,
)  # fmt: skip
_WANT_TERMINAL = (signal.SIGTTIN, signal.SIGTTOU)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    allowed: Callable[[], bool],
    forbidden: Callable[[], object],
    grace_s: float,
) -> int:
    """Runs it; returns its exit code, -N where signal N ended it. Signals that come meanwhile are its group's.

    Once `allowed` is false `forbidden` is called and the group gets SIGTERM, and SIGKILL `grace_s` later if anything of
    it is left; this returns when nothing is. What has left the group is out of reach. Raises OSError.
    """
    group = _Group()
    with group.passed_on():
        child = subprocess.Popen(command, env=environment, process_group=0)
        group.begin(child.pid)
        terminal = _Terminal(group)
        kill_at: float | None = None
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
                if kill_at is None and not allowed():
                    forbidden()
                    group.send(signal.SIGTERM)
                    kill_at = time.monotonic() + grace_s
                if child.returncode is not None:
                    break
                if kill_at is None:
                    terminal.follow(child.pid, allowed)
                elif time.monotonic() >= kill_at:
                    group.send(signal.SIGKILL)
                    kill_at = float("inf")
            if kill_at is not None and not group.ended_by(kill_at):
                group.send(signal.SIGKILL)
                group.ended_by(time.monotonic() + KILLED_S)
        finally:
            terminal.close()
    assert child.returncode is not None
    return child.returncode


class _Group:
    """The command and what it started."""

    def __init__(self) -> None:
        self.number = 0
        self._early: list[int] = []

    def begin(self, number: int) -> None:
        self.number = number
        while self._early:
            self.send(self._early.pop(0))

    def send(self, number: int) -> None:
        try:
            os.killpg(self.number, number)
        except ProcessLookupError:
            return  # all of it has ended
        except PermissionError as error:
            output.note(f"error: the command gets no {signal.Signals(number).name}: {error.strerror}")

    def ended_by(self, deadline: float) -> bool:
        """Waits until nothing of it is left."""
        pause = threading.Event()
        while True:
            try:
                os.killpg(self.number, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                return False  # another user's by now: no signal will end it
            if time.monotonic() >= deadline:
                return False
            pause.wait(LOOK_S)

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """Signals to this process go to the group, but for those that are ignored here, as by nohup."""
        if not _in_main_thread():
            yield
            return

        def forward(number: int, _frame: Any) -> None:
            if self.number:
                self.send(number)
            else:
                self._early.append(number)

        before = {number: signal.getsignal(number) for number in PASSED_ON}
        caught = [number for number in PASSED_ON if before[number] not in (signal.SIG_IGN, None)]
        for number in caught:
            signal.signal(number, forward)
        try:
            yield
        finally:
            for number in caught:
                signal.signal(number, before[number])


class _Terminal:
    """Who has the terminal, if there is one."""

    def __init__(self, group: _Group) -> None:
        self._group = group
        self._file: int | None = None
        self._given = False

    def follow(self, leader: int, allowed: Callable[[], bool]) -> None:
        """Does what a stop of the command calls for, if it was stopped."""
        if not _in_main_thread():
            return
        with contextlib.suppress(ChildProcessError):  # it has ended
            found = os.waitid(os.P_PID, leader, os.WSTOPPED | os.WNOHANG)
            if found is not None and found.si_status != signal.SIGSTOP:  # whoever sends that goes on to SIGCONT
                self._stopped(found.si_status, allowed)

    def _stopped(self, number: int, allowed: Callable[[], bool]) -> None:
        wanted = number in _WANT_TERMINAL
        if not (wanted and self._give()):
            wanted = wanted or self._given
            self._take_back()
            _stop_here(number)
            if not allowed():
                return  # it was not while we slept; who is stopped does no harm, and is killed in its sleep
            if wanted:
                self._give()
        self._group.send(signal.SIGCONT)

    def _give(self) -> bool:
        """Hands it over, if it is ours."""
        if self._file is None:
            with contextlib.suppress(OSError):  # there is none
                self._file = os.open("/dev/tty", os.O_RDWR)
        with contextlib.suppress(OSError):  # it was hung up
            if self._file is not None and os.tcgetpgrp(self._file) == os.getpgrp():
                os.tcsetpgrp(self._file, self._group.number)
                self._given = True
                return True
        return False

    def close(self) -> None:
        self._take_back()
        if self._file is not None:
            os.close(self._file)

    def _take_back(self) -> None:
        if self._given and self._file is not None:
            # who sets it from the background would be stopped
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            try:
                with contextlib.suppress(OSError):  # it was hung up
                    os.tcsetpgrp(self._file, os.getpgrp())
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._given = False


def _stop_here(number: int) -> None:
    """Stops this process until SIGCONT; nothing happens where no shell would notice (an orphaned process group)."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        # to this very thread: it must not go on and wake the command before the whole process is stopped
        signal.pthread_kill(threading.get_ident(), number)
    finally:
        signal.signal(number, before)


def _in_main_thread() -> bool:
    """Where alone signals can be handled."""
    return threading.current_thread() is threading.main_thread()
