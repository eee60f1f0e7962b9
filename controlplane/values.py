"""Value types that are made by the thousand a second.

To make a frozen dataclass takes up to three times as long as to make another, since it assigns its
own fields through a guard. `value(frozen=True, ...)` is `dataclass` to the type checker, which
refuses assignments; at run time there is no guard.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:
    from dataclasses import dataclass

    def value(*, frozen, slots, kw_only=False):
        """Return the decorator: a dataclass that compares and hashes as a frozen one does."""
        assert frozen
        return dataclass(unsafe_hash=True, slots=slots, kw_only=kw_only)


__all__ = ["value"]
