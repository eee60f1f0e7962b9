"""The garbage collector in a process that keeps much, and for long.

What a session consists of goes when nothing refers to it any more; the collector is needed for
cycles alone, and transactions make none. Each pass takes some 100 ns an object, so with 100,000
sessions a full one would stop everything for most of a second. Here, what survives a pass is not
looked at again: each object is looked at once, and no pass grows with the number of sessions.
"""

import gc
from typing import Any

# A pass for every so many new objects: a millisecond or two. What is left of them is permanent
# then, so that the passes over older generations find no more than that.
THRESHOLDS = (20_000, 0, 0)


def settle() -> None:
    """Take all that is there now for permanent, and from now on what survives."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    if _freeze not in gc.callbacks:
        gc.callbacks.append(_freeze)


def _freeze(phase: str, info: dict[str, Any]) -> None:
    if phase == "stop":
        gc.freeze()
