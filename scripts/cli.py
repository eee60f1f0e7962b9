"""The command line `aipaging`: which commands there are, and how errors end them.

A command's module is imported only when that command is used, so that `--help` answers at once.
"""

import importlib
import os
import sys
from typing import NoReturn

import click

from controlplane.configfile import ConfigError
from controlplane.enforcement import EnforcementError
from scripts.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, UserError
from topologies.errors import TopologyError
from topologies.isolation import IsolationError
from topologies.registry import LifecycleError

# group or command -> (where it is, its line in the help)
COMMANDS = {
    "run": (
        "scripts.experiments.commands:run",
        "Run an experiment and report what packets did.",
    ),
    "report": (
        "scripts.experiments.commands:report",
        "Make summary and report again from a run's raw records.",
    ),
    "evidence": (
        "scripts.evidence:group",
        "Verify a run's evidence log offline, or read it.",
    ),
    "up": (
        "scripts.background:up",
        "Start a network in the background, for hands-on use.",
    ),
    "shell": (
        "scripts.background:shell",
        "Run a command in a host of that network.",
    ),
    "page": (
        "scripts.background:page",
        "Be a UE: ask by intent, then read tokens from the anchor.",
    ),
    "sessions": (
        "scripts.operator:sessions",
        "Show live sessions, of that network or of a daemon.",
    ),
    "anchors": (
        "scripts.operator:anchors",
        "Show anchors and how they are.",
    ),
    "watch": (
        "scripts.watch:command",
        "Follow what happens, as it happens.",
    ),
    "relocate": (
        "scripts.operator:relocate",
        "Move a session to another anchor, make-before-break.",
    ),
    "drain": (
        "scripts.operator:drain",
        "Move all sessions away from an anchor.",
    ),
    "down": (
        "scripts.background:down",
        "Stop that network.",
    ),
    "serve": (
        "scripts.serve:command",
        "Serve the control plane as a daemon, on any Linux router.",
    ),
    "upf": (
        "scripts.upf:command",
        "Run the user plane alone, for a control plane beside it.",
    ),
    "client-secret": (
        "scripts.client_secret:command",
        "Make a secret for a client of the daemon's API.",
    ),
    "bench": (
        "scripts.bench.commands:group",
        "Measure what gate and control plane cost.",
    ),
    "doctor": (
        "scripts.doctor:command",
        "Say what this machine has and lacks.",
    ),
}

HELP = """AI-Paging: ask the network for an AI service by intent, and it finds the place to run it.

A lease in the kernel, which expires by itself, lets your packets reach that place and no other.

\b
A first experiment (as root; every command here is sudo ./scripts/aipaging ...):
  aipaging doctor           can this machine run it?
  aipaging run relocation --arms none,mbb,bbm --relocations 30 --out results/first
                            moves live traffic between two anchors: make-before-break (mbb)
                            loses nothing, break-before-make (bbm) does
  aipaging report results/first
                            makes summary and report again from the raw data

\b
Exit codes: 0 done; 1 it failed, or the machine lacks something; 2 bad option or file;
130 interrupted.
"""


class LazyGroup(click.Group):
    """A group whose commands are imported on use; `commands_at` is a table like COMMANDS."""

    def __init__(
        self, *args: object, commands_at: dict[str, tuple[str, str]], **options: object
    ) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._commands_at = commands_at

    def list_commands(self, context: click.Context) -> list[str]:
        """Names in the order of the table, which is the order in which one needs them."""
        return list(self._commands_at)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in self._commands_at:
            return None
        module, _, attribute = self._commands_at[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._commands_at.items()])


@click.group(cls=LazyGroup, commands_at=COMMANDS, help=HELP)
@click.version_option(package_name="ai-paging", prog_name="aipaging")
def cli() -> None:
    """Group of everything; the help text is HELP."""


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        sys.exit(cli.main(prog_name="aipaging", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ConfigError as error:
        _end(str(error), EXIT_BAD_INPUT)
    except UserError as error:
        _end(str(error), error.exit_code)
    except (TopologyError, IsolationError, LifecycleError, EnforcementError) as error:
        _end(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def _end(message: str, exit_code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
