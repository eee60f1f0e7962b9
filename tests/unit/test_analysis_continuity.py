"""What clients saw of a relocation, counted from made-up records."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from scripts.analysis import analyse
from scripts.records import (
    MANIFEST_FILE,
    Episode,
    StreamRequest,
    Token,
    write_episodes,
    write_json,
    write_streams,
)
from scripts.report import build_report

MS = 1_000_000
T0 = 1_760_000_000_000 * MS


class Run:
    """A run of two clients, with streams of four tokens 10 ms apart."""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []
        self.requests: list[StreamRequest] = []
        self.tokens: list[Token] = []

    def episode(self, arm: str) -> None:
        number = len(self.episodes)
        start_ns = T0 + number * 10_000 * MS
        flip_ns = 0 if arm == "none" else start_ns + 60 * MS
        self.episodes.append(
            Episode(
                episode=number,
                arm=arm,
                ue="ue1",
                source="edge1",
                target="edge1" if arm == "none" else "edge2",
                start_ns=start_ns,
                end_ns=start_ns + 5_000 * MS,
                kernel_ack_ns=flip_ns,
            )
        )

    def stream(
        self,
        client: str,
        request: int,
        begin_ms: int,
        *,
        anchor: str = "edge1",
        port: int = 1,
        tokens: tuple[int, ...] = (0, 1, 2, 3),
        **changes: Any,
    ) -> None:
        episode = self.episodes[-1]
        start_ns = episode.start_ns + begin_ms * MS
        key = {"episode": episode.episode, "client": client, "request": request}
        made = StreamRequest(
            **key,
            started_ns=start_ns,
            ended_ns=start_ns + 45 * MS,
            status=200,
            anchor=anchor,
            http_version="1.1",
            local_port=port,
            complete=True,
            ending="",
            error="",
        )
        self.requests.append(dataclasses.replace(made, **changes))
        self.tokens += [
            Token(**key, number=number, at_ns=start_ns + (place + 1) * 10 * MS)
            for place, number in enumerate(tokens)
        ]

    def analysed(self, folder: Path) -> dict[str, Any]:
        write_json(
            folder / MANIFEST_FILE,
            {"experiment": "continuity", "seed": 1, "options": {"tokens": 4}},
        )
        write_episodes(folder, self.episodes)
        write_streams(folder, self.requests, self.tokens)
        summary = analyse(folder)
        assert build_report(folder).exists()
        return summary


@pytest.fixture
def run() -> Run:
    made = Run()
    made.episode("none")
    for client in ("a", "b"):
        made.stream(client, 0, 0)
        made.stream(client, 1, 50)
    made.episode("drain")
    for client in ("a", "b"):
        made.stream(client, 0, 0)
        made.stream(client, 1, 50)  # across the flip, at 60
        made.stream(client, 2, 100, anchor="edge2", port=2)
    made.episode("bbm")
    made.stream("a", 0, 0)
    made.stream("a", 1, 50, tokens=(0,), complete=False, ending="timeout")
    made.stream("b", 0, 30, tokens=(0, 2, 1, 1), complete=False, ending="reset")
    return made


def test_a_sound_run(run: Run, tmp_path: Path) -> None:
    summary = run.analysed(tmp_path)
    row = summary["arms"]["drain"]["a"]
    assert (row["requests"], row["failed"], row["crossing"], row["tokens"]) == (3, 0, 1, 12)
    assert (row["tokens_lost"], row["tokens_repeated"], row["tokens_reordered"]) == (0, 0, 0)
    assert row["connections"] == {"opened": 2, "requests_on_kept": 1}
    assert row["served_by"] == {"edge1": 2, "edge2": 1}
    assert row["moved_after_ms"]["max"] == 35
    assert row["last_begun_after_ms"]["max"] == 0
    assert row["any_failure_probability_ci95"] == [0, 0.95]
    assert summary["arms"]["none"]["all"]["relocations"] == 0
    assert summary["problems"] == []


def test_what_breaks_is_counted_by_how_it_ended(run: Run, tmp_path: Path) -> None:
    arms = run.analysed(tmp_path)["arms"]["bbm"]
    assert (arms["a"]["failed"], arms["a"]["reset"], arms["a"]["tokens_lost"]) == (1, 0, 3)
    assert arms["a"]["failed_by_ending"] == {"timeout": 1}
    assert (arms["b"]["failed"], arms["b"]["reset"], arms["b"]["tokens_lost"]) == (1, 1, 1)
    assert (arms["b"]["tokens_repeated"], arms["b"]["tokens_reordered"]) == (1, 1)
    assert arms["all"]["relocations_with_failure"] == 1
    assert arms["a"]["moved_after_ms"]["max"] == 0  # what failed has not moved by itself


def test_a_blind_control_and_a_noisy_floor_are_named(run: Run, tmp_path: Path) -> None:
    run.requests = [
        dataclasses.replace(each, complete=True, ending="") if each.client == "b" else each
        for each in run.requests
    ]
    run.requests[0] = dataclasses.replace(run.requests[0], status=503)
    problems = run.analysed(tmp_path)["problems"]
    assert any("broke no stream" in problem for problem in problems)
    assert any("1 requests failed while nothing" in problem for problem in problems)
