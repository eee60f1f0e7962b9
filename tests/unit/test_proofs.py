"""Inclusion and consistency proofs: the CT reference vectors, and nothing false is ever shown."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_merkle import LEAVES, ROOTS

from controlplane.merkle import (
    ProofError,
    Tree,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# Nodes of the reference tree of eight leaves, by their place in it
A0, A1, A2, A3, A4, A5, A6, A7 = (leaf_hash(leaf) for leaf in LEAVES)
N01 = bytes.fromhex("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125")
N23 = bytes.fromhex("5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e")
N45 = bytes.fromhex("0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a")
N67 = bytes.fromhex("ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0")
N0123 = bytes.fromhex("d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7")
N4567 = bytes.fromhex("6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4")

INCLUSION = [
    (0, 1, []),
    (0, 8, [A1, N23, N4567]),
    (5, 8, [A4, N67, N0123]),
    (2, 3, [N01]),
    (1, 5, [A0, N23, A4]),
]
CONSISTENCY = [
    (1, 1, []),
    (1, 8, [A1, N23, N4567]),
    (6, 8, [N45, N67, N0123]),
    (2, 5, [N23, A4]),
    (6, 7, [N45, A6, N0123]),
]


def tree_of(size: int) -> Tree:
    tree = Tree()
    for number in range(size):
        tree.append(leaf_hash(number.to_bytes(4)))
    return tree


BIGGEST = 300
TREE = tree_of(BIGGEST)


@pytest.fixture(scope="module")
def reference() -> Tree:
    tree = Tree()
    for leaf in LEAVES:
        tree.append(leaf_hash(leaf))
    return tree


# Reference vectors


@pytest.mark.parametrize(("index", "size", "path"), INCLUSION)
def test_inclusion_as_the_reference(
    reference: Tree, index: int, size: int, path: list[bytes]
) -> None:
    assert reference.inclusion(index, size) == path
    root = bytes.fromhex(ROOTS[size - 1])
    verify_inclusion(leaf_hash(LEAVES[index]), index, size, path, root)


@pytest.mark.parametrize(("first", "second", "path"), CONSISTENCY)
def test_consistency_as_the_reference(
    reference: Tree, first: int, second: int, path: list[bytes]
) -> None:
    assert reference.consistency(first, second) == path
    roots = [bytes.fromhex(ROOTS[size - 1]) for size in (first, second)]
    verify_consistency(first, second, path, *roots)


def test_earlier_roots_are_remembered(reference: Tree) -> None:
    assert [reference.root(size).hex() for size in range(1, 9)] == ROOTS
    assert reference.root(0) == Tree().root()


# The definitions of sections 2.1.1, 2.1.3.1 and 2.1.4.1, word for word


@cache
def mth(start: int, end: int) -> bytes:
    if end - start == 1:
        return TREE.leaf(start)
    middle = start + power_below(end - start)
    return node_hash(mth(start, middle), mth(middle, end))


def power_below(size: int) -> int:
    return max(1 << k for k in range(size.bit_length()) if 1 << k < size)


def path(index: int, start: int, end: int) -> list[bytes]:
    if end - start == 1:
        return []
    middle = start + power_below(end - start)
    if index < middle:
        return [*path(index, start, middle), mth(middle, end)]
    return [*path(index, middle, end), mth(start, middle)]


def subproof(first: int, start: int, end: int, known: bool) -> list[bytes]:
    if first == end - start:
        return [] if known else [mth(start, end)]
    middle = power_below(end - start)
    if first <= middle:
        return [*subproof(first, start, start + middle, known), mth(start + middle, end)]
    rest = subproof(first - middle, start + middle, end, False)
    return [*rest, mth(start, start + middle)]


def test_every_small_proof_is_as_defined_and_verifies() -> None:
    for size in range(1, 71):
        assert TREE.root(size) == mth(0, size)
        for index in range(size):
            proof = TREE.inclusion(index, size)
            assert proof == path(index, 0, size)
            verify_inclusion(TREE.leaf(index), index, size, proof, TREE.root(size))
        for first in range(1, size + 1):
            proof = TREE.consistency(first, size)
            assert proof == subproof(first, 0, size, True)
            verify_consistency(first, size, proof, TREE.root(first), TREE.root(size))


# Nothing false is shown

sizes = st.integers(1, BIGGEST)
pairs = st.tuples(sizes, sizes).map(sorted)


def flipped(value: bytes, bit: int) -> bytes:
    bit %= len(value) * 8
    return value[: bit // 8] + bytes([value[bit // 8] ^ 1 << bit % 8]) + value[bit // 8 + 1 :]


def altered(proof: Sequence[bytes], bit: int) -> list[list[bytes]]:
    """The same with a bit flipped, a hash too few, one too many, and two swapped."""
    wrong = [[*proof, bytes(32)], [bytes(32), *proof], [*proof, *proof[-1:], bytes(32)]]
    if proof:
        whole = flipped(b"".join(proof), bit)
        wrong += [
            [whole[at : at + 32] for at in range(0, len(whole), 32)],
            list(proof[1:]),
            list(proof[:-1]),
        ]
    if len(proof) > 1:
        wrong.append([proof[1], proof[0], *proof[2:]])
    return wrong


@given(pairs, st.integers(0), st.integers(-1, BIGGEST + 1), st.integers(-1, BIGGEST + 1))
def test_inclusion_of_nothing_else(
    pair: list[int], bit: int, other_index: int, other_size: int
) -> None:
    index, size = pair[0] - 1, pair[1]
    leaf, root, proof = TREE.leaf(index), TREE.root(size), TREE.inclusion(index, size)
    verify_inclusion(leaf, index, size, proof, root)
    wrong = [(leaf, index, size, other, root) for other in altered(proof, bit)]
    wrong.append((flipped(leaf, bit), index, size, proof, root))
    wrong.append((leaf, index, size, proof, flipped(root, bit)))
    if other_index != index:
        wrong.append((leaf, other_index, size, proof, root))
    for what in wrong:
        with pytest.raises(ProofError):
            verify_inclusion(*what)
    if other_size != size and 0 <= other_size <= BIGGEST:  # a proof binds a root to its size
        with pytest.raises(ProofError):
            verify_inclusion(leaf, index, other_size, proof, TREE.root(other_size))


@given(pairs, st.integers(0), st.integers(0, BIGGEST), st.integers(0, BIGGEST))
def test_consistency_of_nothing_else(pair: list[int], bit: int, other: int, later: int) -> None:
    first, second = pair
    roots = TREE.root(first), TREE.root(second)
    proof = TREE.consistency(first, second)
    verify_consistency(first, second, proof, *roots)
    wrong = [(first, second, changed, *roots) for changed in altered(proof, bit)]
    wrong.append((first, second, proof, flipped(roots[0], bit), roots[1]))
    wrong.append((first, second, proof, roots[0], flipped(roots[1], bit)))
    if other != first:
        wrong.append((other, second, proof, TREE.root(other), roots[1]))
    if later != second:
        wrong.append((first, later, proof, roots[0], TREE.root(later)))
    for what in wrong:
        with pytest.raises(ProofError):
            verify_consistency(*what)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        *(("inclusion", numbers) for numbers in [(-1, 5), (5, 5), (0, 0), (0, BIGGEST + 1)]),
        *(("consistency", numbers) for numbers in [(0, 5), (6, 5), (1, BIGGEST + 1), (-1, 5)]),
        *(("root", (size,)) for size in (-1, BIGGEST + 1)),
        *(("leaf", (index,)) for index in (-1, BIGGEST)),
    ],
)
def test_what_is_not_in_the_tree(method: str, numbers: tuple[int, ...]) -> None:
    with pytest.raises(IndexError):
        getattr(TREE, method)(*numbers)
