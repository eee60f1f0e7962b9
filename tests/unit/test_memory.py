"""The collector still finds cycles, and does not look at what has survived it."""

import subprocess
import sys

PROGRAM = """
import gc, weakref
from controlplane import memory

class Node: pass

memory.settle()
frozen = gc.get_freeze_count()
kept = [[number] for number in range(10_000)]
node = Node()
node.itself, died = node, []
weakref.finalize(node, died.append, True)
del node
for _ in range(4):  # passes of the collector's own, young to full
    more = [[] for _ in range(memory.THRESHOLDS[0])]
assert died, "a cycle was not found"
assert gc.get_freeze_count() - frozen >= len(kept), "what is kept would be looked at again"
"""


def test_settled() -> None:
    """In a process of its own: it is the collector of all of it."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
