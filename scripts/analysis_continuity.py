"""The continuity experiment's figures: what each client saw in each arm.

A request fails if it does not end as it should, whatever the reason. Tokens are counted against the
numbers that were asked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scripts.analysis_relocation import CONTROL_ARM, NEGATIVE_CONTROL_ARM
from scripts.records import Episode, ResultFolder, StreamRequest
from scripts.statistics import binomial_interval, quantiles
from topologies.endpoints.ue import StreamReport, TokenArrival, analyse

ALL = "all"  # clients together
ARMS = (CONTROL_ARM, "drain", NEGATIVE_CONTROL_ARM)


@dataclass(frozen=True, slots=True)
class Stream:
    """One request with its episode and what its tokens tell."""

    episode: Episode
    request: StreamRequest
    report: StreamReport

    @property
    def crosses(self) -> bool:
        """Whether it was under way when the anchors were switched."""
        flip_ns = self.episode.kernel_ack_ns
        return bool(flip_ns) and self.request.started_ns < flip_ns <= self.request.ended_ns


def streams_of(results: ResultFolder) -> list[Stream]:
    """Every request of a run, with its tokens."""
    expected = int(results.manifest["options"]["tokens"])
    episodes = {episode.episode: episode for episode in results.episodes()}
    tokens: defaultdict[tuple[int, str, int], list[TokenArrival]] = defaultdict(list)
    for token in results.tokens():
        arrival = TokenArrival(number=token.number, at_ns=token.at_ns, anchor="")
        tokens[token.episode, token.client, token.request].append(arrival)
    return [
        Stream(
            episodes[each.episode],
            each,
            analyse(
                tokens[each.episode, each.client, each.request],
                expected,
                complete=each.complete and each.status == 200 and not each.ending,
            ),
        )
        for each in results.streams()
    ]


def continuity_summary(results: ResultFolder) -> dict[str, Any]:
    """`arms`, `controls` and `problems` of the summary."""
    streams = streams_of(results)
    arms: dict[str, Any] = {}
    for arm in ARMS:
        mine = [stream for stream in streams if stream.episode.arm == arm]
        if mine:
            clients = sorted({stream.request.client for stream in mine})
            arms[arm] = {
                client: _figures([each for each in mine if each.request.client == client])
                for client in clients
            }
            arms[arm][ALL] = _figures(mine)
    control, negative = arms.get(CONTROL_ARM), arms.get(NEGATIVE_CONTROL_ARM)
    controls = {
        "bbm_breaks_streams": None if negative is None else _breaks(negative),
        "none_failed": None if control is None else control[ALL]["failed"],
    }
    problems = []
    if controls["bbm_breaks_streams"] is False:
        problems.append("break before make broke no stream of some client, where it must")
    if controls["none_failed"]:
        problems.append(f"{controls['none_failed']} requests failed while nothing was relocated")
    return {"arms": arms, "controls": controls, "problems": problems}


def _breaks(figures: dict[str, Any]) -> bool:
    """Whether in the negative control every client had a stream that broke."""
    return all(row["failed"] for row in figures.values())


def _figures(streams: list[Stream]) -> dict[str, Any]:
    reports = [stream.report for stream in streams]
    failed = [stream for stream in streams if not stream.report.complete]
    endings = Counter(stream.request.ending or "incomplete" for stream in failed)
    relocated = {stream.episode.episode for stream in streams if stream.episode.kernel_ack_ns}
    broken = {stream.episode.episode for stream in failed} & relocated
    stalls = [each.longest_stall_ms for each in reports if each.longest_stall_ms is not None]
    return {
        "relocations": len(relocated),
        "relocations_with_failure": len(broken),
        "any_failure_probability_ci95": binomial_interval(len(broken), len(relocated)),
        "requests": len(streams),
        "failed": len(failed),
        "failed_by_ending": dict(endings),
        "reset": endings["reset"] + endings["closed"],
        "crossing": sum(stream.crosses for stream in streams),
        "tokens": sum(len(each.tokens) for each in reports),
        "tokens_lost": sum(each.lost for each in reports),
        "tokens_repeated": sum(each.repeated for each in reports),
        "tokens_reordered": sum(each.reordered for each in reports),
        "longest_stall_ms": quantiles(stalls),
        "connections": _connections(streams),
        "served_by": dict(Counter(stream.request.anchor for stream in streams)),
        "moved_after_ms": quantiles(moved_ms(streams)),
        "last_begun_after_ms": quantiles(moved_ms(streams, begun=True)),
    }


def _by_client(streams: Iterable[Stream]) -> dict[tuple[int, str], list[Stream]]:
    """Streams by episode and client."""
    found: defaultdict[tuple[int, str], list[Stream]] = defaultdict(list)
    for stream in streams:
        found[stream.episode.episode, stream.request.client].append(stream)
    return found


def _connections(streams: list[Stream]) -> dict[str, int]:
    """How many connections there were, and how many requests went over one that was there."""
    opened = kept = 0
    for of_one in _by_client(streams).values():
        ports = [stream.request.local_port for stream in of_one if stream.request.local_port]
        opened += len(set(ports))
        kept += len(ports) - len(set(ports))
    return {"opened": opened, "requests_on_kept": kept}


def moved_ms(streams: Iterable[Stream], *, begun: bool = False) -> list[float]:
    """From the flip to the end of a client's last stream from the old anchor; 0: none after it.

    One value for each client and relocation. `begun`: to the first token of that stream instead.
    """
    moved = []
    for of_one in _by_client(streams).values():
        episode = of_one[0].episode
        if not episode.kernel_ack_ns:
            continue
        last_ns = episode.kernel_ack_ns
        for stream in of_one:
            if stream.request.anchor == episode.source and stream.report.complete:
                tokens = stream.report.tokens
                last_ns = max(last_ns, tokens[0].at_ns if begun else stream.request.ended_ns)
        moved.append((last_ns - episode.kernel_ack_ns) / 1e6)
    return moved
