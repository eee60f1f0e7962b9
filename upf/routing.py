"""Policy routing by mark: one rule and one route table per anchor and address family.

A table holds a default route to its anchor and nothing else. Without a mark, which only a live
lease gives, a service address has no route at all.
"""

import errno
import socket
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from upf.config import MARK_BASE, MARK_MASK, GateConfig
from upf.netns import route_socket

FIRST_TABLE = 45_001
RULE_PRIORITY = 4_500
FAMILIES = (socket.AF_INET, socket.AF_INET6)


class RoutingError(Exception):
    """Policy routing could not be set, or is not what was set."""


def install(netns_path: str, config: GateConfig) -> None:
    """Install rules and tables for every anchor, replacing ours of an earlier run; read back."""
    with route_socket(netns_path) as routes:
        _remove(routes)
        for number, anchor in enumerate(config.anchors):
            found = routes.link_lookup(ifname=anchor.interface)
            if not found:
                raise RoutingError(f"anchor {anchor.name}: no interface {anchor.interface}")
            for family, gateway in zip(FAMILIES, (anchor.address4, anchor.address6), strict=True):
                table = FIRST_TABLE + number
                routes.route(
                    "replace",
                    family=family,
                    dst="default",
                    gateway=str(gateway),
                    oif=found[0],
                    table=table,
                )
                routes.rule(
                    "add",
                    family=family,
                    fwmark=config.mark(anchor.name),
                    fwmask=0xFFFFFFFF,
                    table=table,
                    priority=RULE_PRIORITY,
                )
        _check(routes, config)


def remove(netns_path: str) -> None:
    """Remove our rules and tables."""
    with route_socket(netns_path) as routes:
        _remove(routes)


def _ours(routes: IPRoute, family: int) -> list[Any]:
    return [
        rule
        for rule in routes.get_rules(family=family)
        if rule.get_attr("FRA_PRIORITY") == RULE_PRIORITY
        and (rule.get_attr("FRA_FWMARK") or 0) & MARK_MASK == MARK_BASE
    ]


def _remove(routes: IPRoute) -> None:
    for family in FAMILIES:
        for rule in _ours(routes, family):
            table = rule.get_attr("FRA_TABLE")
            routes.rule(
                "del",
                family=family,
                priority=RULE_PRIORITY,
                fwmark=rule.get_attr("FRA_FWMARK"),
                fwmask=rule.get_attr("FRA_FWMASK"),
                table=table,
            )
            try:
                routes.flush_routes(family=family, table=table)
            except NetlinkError as error:
                if error.code != errno.ENOENT:
                    raise


def _check(routes: IPRoute, config: GateConfig) -> None:
    wanted = {
        (config.mark(anchor.name), FIRST_TABLE + number)
        for number, anchor in enumerate(config.anchors)
    }
    for family in FAMILIES:
        found = {
            (rule.get_attr("FRA_FWMARK"), rule.get_attr("FRA_TABLE"))
            for rule in _ours(routes, family)
        }
        if found != wanted:
            raise RoutingError(f"policy rules read back as {found}, asked for {wanted}")
        for _, table in wanted:
            if not routes.get_routes(family=family, table=table):
                raise RoutingError(f"route table {table} is empty after it was filled")
