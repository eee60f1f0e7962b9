"""Policy routing by mark: one rule and one route table per anchor and address family.

A table holds a default route to its anchor and nothing else. Without a mark, which only a live
lease gives, a service address has no route at all.
"""

import errno
import socket

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from upf.config import MARK_BASE, MARK_MASK, GateConfig
from upf.netns import route_socket

FIRST_TABLE = 45_001
RULE_PRIORITY = 4_500
PROTOCOL = 161  # who made a route (rtm_protocol); this number is nobody else's
FAMILIES = (socket.AF_INET, socket.AF_INET6)


class RoutingError(Exception):
    """Policy routing could not be set, or is not what was set."""


def install(netns_path: str, config: GateConfig) -> None:
    """Install a rule and a route for every anchor; read back.

    What is there already and right stays as it is, so that a restart disturbs no packet; what is
    ours and is wanted no more is removed last.
    """
    with route_socket(netns_path) as routes:
        for number in range(len(config.anchors)):
            for family in FAMILIES:
                _check_free(routes, family, FIRST_TABLE + number)
        for number, anchor in enumerate(config.anchors):
            found = routes.link_lookup(ifname=anchor.interface)
            if not found:
                raise RoutingError(f"anchor {anchor.name}: no interface {anchor.interface}")
            for family, gateway in zip(FAMILIES, (anchor.address4, anchor.address6), strict=True):
                routes.route(
                    "replace",
                    family=family,
                    dst="default",
                    gateway=str(gateway),
                    oif=found[0],
                    table=FIRST_TABLE + number,
                    proto=PROTOCOL,
                )
        wanted = {
            (config.mark(anchor.name), FIRST_TABLE + number)
            for number, anchor in enumerate(config.anchors)
        }
        for family in FAMILIES:
            have = _ours(routes, family)
            for mark, table in wanted - have:
                routes.rule("add", family=family, **_rule(mark, table))
            _remove(routes, family, have - wanted)
            _check(routes, family, wanted)


def remove(netns_path: str) -> None:
    """Remove our rules and tables."""
    with route_socket(netns_path) as routes:
        for family in FAMILIES:
            _remove(routes, family, _ours(routes, family))


def _check_free(routes: IPRoute, family: int, table: int) -> None:
    """Raise RoutingError if a table has routes that are not ours."""
    try:
        found = list(routes.get_routes(family=family, table=table))
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise
        return
    if any(route["proto"] != PROTOCOL for route in found):
        raise RoutingError(
            f"route table {table} has routes of somebody else's: tables from {FIRST_TABLE} on, one "
            "for each anchor, have to be free"
        )


def _rule(mark: int, table: int) -> dict[str, int]:
    return {"fwmark": mark, "fwmask": 0xFFFFFFFF, "table": table, "priority": RULE_PRIORITY}


def _ours(routes: IPRoute, family: int) -> set[tuple[int, int]]:
    """Return (mark, table) of every rule of ours."""
    return {
        (rule.get_attr("FRA_FWMARK"), rule.get_attr("FRA_TABLE"))
        for rule in routes.get_rules(family=family)
        if rule.get_attr("FRA_PRIORITY") == RULE_PRIORITY
        and (rule.get_attr("FRA_FWMARK") or 0) & MARK_MASK == MARK_BASE
    }


def _remove(routes: IPRoute, family: int, rules: set[tuple[int, int]]) -> None:
    for mark, table in rules:
        routes.rule("del", family=family, **_rule(mark, table))
        try:
            routes.flush_routes(family=family, table=table)
        except NetlinkError as error:
            if error.code != errno.ENOENT:
                raise


def _check(routes: IPRoute, family: int, wanted: set[tuple[int, int]]) -> None:
    if (found := _ours(routes, family)) != wanted:
        raise RoutingError(f"policy rules read back as {found}, asked for {wanted}")
    for _, table in wanted:
        if not routes.get_routes(family=family, table=table):
            raise RoutingError(f"route table {table} is empty after it was filled")
