"""Progress of a long pass over a data set (a bar on a terminal, plain lines elsewhere), and formatted durations."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], Any]]:
    """Show images done, images/s and the time left; yield a function to call with the number of images just done.

    Args:
        what: the label in front, such as "decoding".
        total: number of images in all.
        done: number of images that were done before.
    """
    if sys.stdout.isatty():
        with tqdm(total=total, initial=done, desc=what, unit="img", unit_scale=True, dynamic_ncols=True) as bar:
            yield bar.update
        return
    first, started, printed = done, time.perf_counter(), -1

    def update(count: int) -> None:
        nonlocal done, printed
        done += count
        if 10 * done // total == printed and done < total:  # one line per tenth
            return
        printed = 10 * done // total
        rate = (done - first) / max(1e-9, time.perf_counter() - started)
        left = (total - done) / rate if rate else 0.0
        print(f"{what} {done:,} of {total:,} images  {rate:,.0f} images/s  ETA {left:.0f} s", flush=True)

    yield update


def span(seconds: float) -> str:
    """Format a duration in seconds as 0.4 s, 12 s, 3.5 min or 7.2 h."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 9.5 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
