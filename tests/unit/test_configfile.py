"""Every complaint about a file names file and line, and none is a traceback."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.configfile import ConfigError, ConfigModel, load_yaml, parse_yaml


class Link(ConfigModel):
    rate_mbps: int
    delay_ms: float = 0


class Net(ConfigModel):
    name: str
    links: tuple[Link, ...] = ()


GOOD = "name: a\nlinks:\n  - rate_mbps: 10\n    delay_ms: 1.5\n"


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, Net, "net.yaml")
    return str(caught.value)


def test_good() -> None:
    assert parse_yaml(GOOD, Net, "net.yaml").links == (Link(rate_mbps=10, delay_ms=1.5),)


@pytest.mark.parametrize(
    ("text", "start", "words"),
    [
        ("name: a\nlinks:\n  - rate_mbps: 1\n    colour: red\n", "net.yaml:4: ", "unknown key"),
        ("name: a\nlinks:\n  - rate_mbps: fast\n", "net.yaml:3: ", "links.0.rate_mbps"),
        ("name: a\nlinks:\n  - delay_ms: 1\n", "net.yaml:3: ", "rate_mbps is missing"),
        ("name: a\nlinks: []\nname: b\n", "net.yaml:3: ", "given twice"),
        ("name: a\nlinks: [\n", "net.yaml:3: ", ""),
        ("name: a\n? [1, 2]\n: x\n", "net.yaml:2: ", "key"),
        ("name: &n a\nlinks:\n  - *n\n", "net.yaml:3: ", "aliases"),
        ("name: a\nlinks: &l\n  - *l\n", "net.yaml:3: ", "aliases"),
        ("&r\nname: *r\n", "net.yaml:2: ", "aliases"),
        ("name: a\n---\nname: b\n", "net.yaml:2: ", ""),
        ("name: !!python/object:os.system a\n", "net.yaml:1: ", ""),
        ("", "net.yaml:1: ", "empty"),
        ("- a\n", "net.yaml:1: ", ""),
        ("name: 2024-99-99\n", "net.yaml:1: ", ""),
        ("name: a\x00b\n", "net.yaml:1: ", "not YAML"),
        ("[" * 5000, "net.yaml:1: ", "deep"),
    ],
)
def test_complaint_names_file_and_line(text: str, start: str, words: str) -> None:
    message = complaint(text)
    assert message.startswith(start)
    assert words in message


def test_every_complaint_is_reported() -> None:
    message = complaint("name: a\nlinks:\n  - rate_mbps: x\n  - rate_mbps: y\n")
    assert [line.split(": ")[0] for line in message.splitlines()] == ["net.yaml:3", "net.yaml:4"]


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_yaml(tmp_path / "absent.yaml", Net)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_yaml(binary, Net)


@given(st.text(alphabet=st.sampled_from("ab:-[]{}*&!|>'\"#%?, \n0129."), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_yaml(text, Net, "net.yaml")
    except ConfigError as error:
        assert str(error).startswith("net.yaml:")
