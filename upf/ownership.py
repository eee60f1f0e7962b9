"""What somebody else put on an interface is not ours to take away."""

from collections.abc import Iterable
from typing import Any

from pyroute2 import IPRoute

from upf.netns import route_socket
from upf.qos import ROOT

AT_ROOT = 0xFFFF_FFFF


class OwnershipError(Exception):
    """Something is in the way that is not ours. The message says what to do."""


def claim_qdiscs(netns_path: str, interfaces: Iterable[str], *, replace: bool) -> None:
    """Make sure that there is no qdisc of somebody else's at the root of these interfaces.

    Those that the kernel made by itself (handle 0) are nobody's. `replace` removes others, else
    they raise OwnershipError.
    """
    with route_socket(netns_path) as routes:
        for name in interfaces:
            for index in routes.link_lookup(ifname=name):
                _claim(routes, name, index, replace)


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
