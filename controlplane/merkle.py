"""Merkle trees as RFC 9162, section 2.1, defines them: roots, proofs, and their verification.

`Tree` keeps the hash of every perfect subtree, so that any root or proof of any size that it ever
had takes O(log n) of them: 64 bytes an entry. The `verify_` functions need no tree; they are what
a third party runs.
"""

import hashlib
from collections.abc import Sequence

HASH_BYTES = 32


class ProofError(Exception):
    """A proof does not show what it is said to show."""


def leaf_hash(entry: bytes) -> bytes:
    """Return MTH({entry}) = SHA-256(0x00 || entry)."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Tree:
    """A tree that grows leaf by leaf. Entries are numbered from 0."""

    def __init__(self) -> None:
        self._levels: list[bytearray] = [bytearray()]  # of 2**k leaves each, one after the other

    @property
    def size(self) -> int:
        """Number of leaves."""
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        node, number = leaf, self.size  # of the node on its level
        for level in self._levels:
            level += node
            if number % 2 == 0:
                return
            node = hashlib.sha256(b"\1" + level[-2 * HASH_BYTES :]).digest()  # node_hash of both
            number //= 2
        self._levels.append(bytearray(node))

    def leaf(self, index: int) -> bytes:
        """Return a leaf's hash. IndexError if there is none."""
        if not 0 <= index < self.size:
            raise IndexError(f"there is no leaf {index} among {self.size}")
        return self._perfect(0, index)

    def root(self, size: int | None = None) -> bytes:
        """Return the root, now or when the tree had `size` leaves; of none, SHA-256 of nothing.

        IndexError if it never had so many.
        """
        size = self.size if size is None else size
        self._check(0 <= size <= self.size)
        return self._range(0, size) if size else hashlib.sha256(b"").digest()

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return PATH(index, D_size) of section 2.1.3.1, the hash nearest the leaf first.

        IndexError unless 0 <= index < size <= the size of the tree.
        """
        self._check(0 <= index < size <= self.size)
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return path[::-1]

    def consistency(self, first: int, second: int) -> list[bytes]:
        """Return PROOF(first, D_second) of section 2.1.4.1; empty if the sizes are equal.

        IndexError unless 0 < first <= second <= the size of the tree.
        """
        self._check(0 < first <= second <= self.size)
        path: list[bytes] = []
        start, end = 0, second
        while end != first:
            middle = start + _split(end - start)
            if first <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        if start > 0:  # else the verifier has this one: it is the first root
            path.append(self._range(start, end))
        return path[::-1]

    def _range(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]), where `start` is where such a subtree can start."""
        parts = []
        while start < end:
            level = (end - start).bit_length() - 1
            parts.append(self._perfect(level, start >> level))
            start += 1 << level
        node = parts.pop()
        while parts:
            node = node_hash(parts.pop(), node)
        return node

    def _perfect(self, level: int, number: int) -> bytes:
        at = number * HASH_BYTES
        return bytes(self._levels[level][at : at + HASH_BYTES])

    def _check(self, possible: bool) -> None:
        if not possible:
            raise IndexError(f"not within this tree of {self.size} leaves")


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes
) -> None:
    """Check that `leaf` is number `index` of the `size` under `root` (section 2.1.3.2).

    Raises ProofError.
    """
    if not 0 <= index < size:
        raise ProofError(f"there is no leaf {index} among {size}")
    at, last, node = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise ProofError("the path is too long")
        if at % 2 or at == last:
            node = node_hash(sibling, node)
            while at % 2 == 0 and at:
                at, last = at >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        at, last = at >> 1, last >> 1
    if last:
        raise ProofError("the path is too short")
    if node != root:
        raise ProofError("the path does not lead to the root")


def verify_consistency(
    first: int, second: int, path: Sequence[bytes], first_root: bytes, second_root: bytes
) -> None:
    """Check that the tree of size `second` begins with that of size `first` (section 2.1.4.2).

    Raises ProofError.
    """
    if not 0 < first <= second:
        raise ProofError(f"nothing is to be shown from {first} to {second} leaves")
    if first == second:
        if path or first_root != second_root:
            raise ProofError("two trees of one size are not the same")
        return
    if not path:
        raise ProofError("the path is too short")
    nodes = list(path)
    if first.bit_count() == 1:
        nodes.insert(0, first_root)
    at, last = first - 1, second - 1
    while at % 2:
        at, last = at >> 1, last >> 1
    old = new = nodes[0]
    for node in nodes[1:]:
        if last == 0:
            raise ProofError("the path is too long")
        if at % 2 or at == last:
            old, new = node_hash(node, old), node_hash(node, new)
            while at % 2 == 0 and at:
                at, last = at >> 1, last >> 1
        else:
            new = node_hash(new, node)
        at, last = at >> 1, last >> 1
    if last:
        raise ProofError("the path is too short")
    if old != first_root:
        raise ProofError("the path does not lead to the first root")
    if new != second_root:
        raise ProofError("the path does not lead to the second root")


def _split(size: int) -> int:
    """Return the largest power of two below `size`: how many leaves are on the left."""
    return 1 << ((size - 1).bit_length() - 1)
