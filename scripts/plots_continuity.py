"""Plots of the continuity experiment."""

from __future__ import annotations

from pathlib import Path

from scripts.analysis_continuity import Stream, moved_ms
from scripts.plots import GRID, INK, LOST, arm_colour, drawing, ecdf

_AT = {"source": arm_colour("none", ()), "target": arm_colour("mbb", ())}


def moved(path: Path, streams: list[Stream]) -> None:
    """How long after the flip a client's last stream from the old anchor ended, a client a line."""
    clients = sorted({stream.request.client for stream in streams})
    with drawing(path, 9.6, 3.0) as figure:
        place = figure.subplots()
        for order, client in enumerate(clients):
            values = moved_ms(each for each in streams if each.request.client == client)
            ecdf(place, values, client, arm_colour(client, clients), order)
        place.set_xlabel("from the flip to the end of the last stream from the old anchor, ms")
        place.set_ylabel("share of relocations")
        place.legend(loc="lower right")


def timeline(path: Path, streams: list[Stream]) -> None:
    """The streams of one episode: a client a row, a token a stroke, its colour the anchor's."""
    clients = sorted({stream.request.client for stream in streams})
    episode = streams[0].episode
    zero_ns = episode.kernel_ack_ns or episode.start_ns
    with drawing(path, 9.6, 0.6 + 0.45 * len(clients)) as figure:
        place = figure.subplots()
        for stream in streams:
            row = clients.index(stream.request.client)
            at = "source" if stream.request.anchor == episode.source else "target"
            begin = (stream.request.started_ns - zero_ns) / 1e6
            end = (stream.request.ended_ns - zero_ns) / 1e6
            place.barh(row, end - begin, left=begin, height=0.7, color=GRID, edgecolor="white")
            times = [(token.at_ns - zero_ns) / 1e6 for token in stream.report.tokens]
            place.vlines(times, row - 0.3, row + 0.3, color=_AT[at], lw=1)
            if not stream.report.complete:
                place.plot(end, row, "x", color=LOST, ms=7, mew=2)
        place.axvline(0, color=INK, lw=1)
        place.set_yticks(range(len(clients)), clients)
        place.invert_yaxis()
        place.grid(axis="y", visible=False)
        place.set_xlabel("ms from the flip" if episode.kernel_ack_ns else "ms")
