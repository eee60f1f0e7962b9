"""The command line: help teaches, bad input is code 2, expected errors have no traceback."""

import json
import subprocess
import sys

import click
import pytest

from controlplane.configfile import ConfigError
from scripts import cli, doctor
from scripts.errors import UserError, require_root
from upf.features import Features


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help() -> None:
    result = run("--help")
    assert result.returncode == 0
    for word in ("intent", "run relocation", "Exit codes", "doctor"):
        assert word in result.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("aipaging, version ")


@pytest.mark.parametrize("arguments", [["nothing"], ["--nothing"], ["doctor", "--nothing"]])
def test_bad_option(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Error: No such" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.help


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("net.yaml:3: unknown key x"), 2, "error: net.yaml:3: unknown key x\n"),
        (UserError("no result there", 2), 2, "error: no result there\n"),
        (UserError("the run failed"), 1, "error: the run failed\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_expected_errors(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == text


def test_root_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(UserError, match="sudo"):
        require_root("run relocation")


def test_doctor_knows_every_feature() -> None:
    found = set(Features.__dataclass_fields__) - {"kernel", "reasons"}
    assert found == set(doctor.KERNEL)


def test_doctor_without_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = Features(kernel="0", reasons={"veth": "not in this kernel"})
    monkeypatch.setattr(doctor, "probe", lambda: lacking)
    with pytest.raises(SystemExit) as ended:
        doctor.command.main(["--json"], standalone_mode=False)
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["can_run"] is False
    veth = next(check for check in report["checks"] if check["name"] == "veth pairs")
    assert (veth["ok"], veth["found"]) == (False, "no: not in this kernel")
