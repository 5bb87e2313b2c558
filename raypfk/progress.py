"""What a command says while it works: bars with rates in a terminal, one plain line per event elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

PLAIN_EVERY_S = 15.0


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        unit = task.fields["unit"]
        return Text("" if not task.speed else f"{task.speed:,.0f} {unit}/s", style="cyan")


class Progress:
    """One per command. `say` prints a line; `bar` counts work."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(text, markup=False)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Counts to `total`; yields advance(n). unit: plural, as in 'images'."""
        meter = self._rich_bar if self.console.is_terminal else self._plain_bar
        with meter(name, total, unit) as advance:
            yield advance

    @contextmanager
    def _rich_bar(self, name: str, total: int, unit: str):
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), _Rate(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=total, unit=unit)
            yield lambda n: bars.advance(task, n)

    @contextmanager
    def _plain_bar(self, name: str, total: int, unit: str):
        last = time.monotonic()
        begun, before, done = None, 0, 0

        def advance(n: int) -> None:
            nonlocal begun, before, done, last
            done, now = done + n, time.monotonic()
            if begun is None:
                begun, before = now, done  # the first piece waited for processes to start: it tells no rate
            elif now - last >= PLAIN_EVERY_S and done > before:  # a piece may be none
                rate = (done - before) / max(now - begun, 1e-9)
                self.say(f"{name}: {done:,} of {total:,} {unit}, {rate:,.3g}/s, {(total - done) / rate:,.0f} s left")
                last = now

        yield advance


_current = Progress()


def current() -> Progress:
    """This process's voice; worker processes have their own, which nobody hears."""
    return _current
