"""What somebody else put on this machine is not ours to take away."""

import contextlib
from collections.abc import Iterable
from typing import Any

from pyroute2 import IPRoute

from upf.htb import ROOT
from upf.messages import SIGNATURE, TABLE
from upf.netns import route_socket
from upf.nft_socket import NftSocket
from upf.readback import table_comments

AT_ROOT = 0xFFFF_FFFF


class OwnershipError(Exception):
    """Something is in the way that is not ours. The message says what to do."""


def claim_tables(netns_path: str) -> None:
    """Raise OwnershipError if an nftables table of our name was made by somebody else."""
    with contextlib.closing(NftSocket(netns_path, in_place_renewal=False)) as handle:
        comments = table_comments(handle).values()
    if not all(comment.startswith(SIGNATURE) for comment in comments):
        raise OwnershipError(
            f"there is an nftables table {TABLE} of somebody else's: rename it, or delete it"
        )


def claim_qdiscs(netns_path: str, interfaces: Iterable[str], *, replace: bool) -> None:
    """Make sure that there is no qdisc of somebody else's at the root of these interfaces.

    Those that the kernel made by itself (handle 0) are nobody's. `replace` removes others, else
    they raise OwnershipError.
    """
    with route_socket(netns_path) as routes:
        for name in interfaces:
            found = routes.link_lookup(ifname=name)
            if not found:
                raise OwnershipError(f"there is no interface {name}")
            _claim(routes, name, found[0], replace)


def _claim(routes: IPRoute, name: str, index: int, replace: bool) -> None:
    for qdisc in routes.get_qdiscs():
        at_root = qdisc["index"] == index and qdisc["parent"] == AT_ROOT
        if not at_root or qdisc["handle"] in (0, ROOT):
            continue
        if not replace:
            raise OwnershipError(
                f"{name} has a qdisc already ({_words(qdisc)}): remove it with 'tc qdisc del dev "
                f"{name} root', or say replace_qdiscs: true"
            )
        routes.tc("del", index=index, handle=qdisc["handle"], root=True)


def _words(qdisc: Any) -> str:
    return f"{qdisc.get_attr('TCA_KIND')} {qdisc['handle'] >> 16:x}:"
