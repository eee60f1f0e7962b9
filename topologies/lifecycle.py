"""`aipaging up`, `down` and `shell`: an emulated network that runs in the background.

Such a network is an isolated run with a registration (`topologies.registry`). A process is only
ever signalled through a pidfd whose process is the one registered, so never a stranger's.
"""

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from topologies import linux
from topologies.isolation import outer_pid, require_isolation, run_isolated
from topologies.network import Network
from topologies.registry import REGISTRY, HostSummary, LifecycleError, Registration, sweep
from topologies.spec import TopologySpec

_START_DEADLINE_S = 120.0
_STOP_DEADLINE_S = 10.0
_CHECK_INTERVAL_S = 1.0


Furnish = Callable[[Network], contextlib.AbstractContextManager[object]]


def up(
    spec: TopologySpec, furnish: Furnish = contextlib.nullcontext, registry: Path = REGISTRY
) -> Registration:
    """Start the network in the background; return when it is ready. Raises LifecycleError.

    `furnish` puts programs on it: entered when the network is built, left before it goes.
    """
    require_isolation()
    registry.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(registry):
        for other in sweep(registry):
            raise LifecycleError(
                f"network {other.topology} (run {other.run_id}) is up already: "
                "stop it first with 'aipaging down'"
            )
        return _start(spec, furnish, registry)


def down(registry: Path = REGISTRY) -> list[Registration]:
    """Stop every background network; return what was stopped. Raises LifecycleError."""
    stopped = sweep(registry)
    for registration in stopped:
        _end(registration)
    for left in sweep(registry):
        raise LifecycleError(f"run {left.run_id} (pid {left.pid}) does not end")
    return stopped


def shell(host: str, argv: Sequence[str] = (), registry: Path = REGISTRY) -> int:
    """Run a command (or $SHELL) in a host of the running network; return its exit status.

    Raises LifecycleError if no network is up or it has no such host.
    """
    live = sweep(registry)
    if not live:
        raise LifecycleError("no network is up: start one with 'aipaging up'")
    found = [(run, known) for run in live for known in run.hosts if known.name == host]
    if not found:
        names = ", ".join(known.name for run in live for known in run.hosts)
        raise LifecycleError(f"there is no host {host}; there are {names}")
    registration, summary = found[0]
    command = list(argv) or [os.environ.get("SHELL", "/bin/sh")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _enter_and_run(registration.init_pid, summary.pid, command)
    # A terminal's ^C is the command's business.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        signal.signal(signal.SIGINT, previous)
    return code if code >= 0 else 128 - code


def _enter_and_run(init_pid: int, host_pid: int, command: list[str]) -> NoReturn:
    """In a process of its own: enter the host's namespaces, run the command, exit like it."""
    status = 1
    try:
        entered = [(f"/proc/{init_pid}/ns/pid", linux.CLONE_NEWPID)]
        inside = f"/proc/{init_pid}/root/proc/{host_pid}/ns"
        entered += [(f"{inside}/net", linux.CLONE_NEWNET), (f"{inside}/mnt", linux.CLONE_NEWNS)]
        # All are opened before any is entered: a mount namespace changes what paths mean.
        fds = [(os.open(path, os.O_RDONLY | os.O_CLOEXEC), kind) for path, kind in entered]
        here = Path.cwd()
        for fd, kind in fds:
            linux.setns(fd, kind)
        with contextlib.suppress(OSError):
            os.chdir(here)
        child = os.fork()  # the first process in the PID namespace
        if child == 0:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            os.execvp(command[0], command)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = code if code >= 0 else 128 - code
    except FileNotFoundError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        status = 127
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error}\n")
        status = 126
    finally:
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def _only_one(registry: Path) -> Iterator[None]:
    """Hold a lock, so that of two simultaneous starts the second sees the first."""
    with (registry / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # not inherited by the background process
        yield


def _start(spec: TopologySpec, furnish: Furnish, registry: Path) -> Registration:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _be_the_daemon(spec, furnish, registry, write)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as answers:
        if not select.select([answers], [], [], _START_DEADLINE_S)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise LifecycleError(f"the network was not ready within {_START_DEADLINE_S:g} s")
        answer = json.loads(answers.readline() or '{"error": "it ended while it was built"}')
    if "error" in answer:
        os.waitpid(child, 0)
        raise LifecycleError(f"the network did not start: {answer['error']}")
    return Registration.model_validate(answer)


def _be_the_daemon(spec: TopologySpec, furnish: Furnish, registry: Path, answer: int) -> NoReturn:
    """The life of the outer process. It answers with one line: a registration or an error."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        owner = (os.getpid(), linux.process_start_ticks(os.getpid()) or 0)
        path = registry / f"{run_id}.json"
        try:
            status = run_isolated(lambda: _serve(spec, furnish, run_id, owner, path, answer))
        finally:
            path.unlink(missing_ok=True)
    except BaseException as error:
        _say(answer, json.dumps({"error": str(error)}))
    finally:
        os._exit(status)


def _serve(
    spec: TopologySpec,
    furnish: Furnish,
    run_id: str,
    owner: tuple[int, int],
    path: Path,
    answer: int,
) -> int:
    """Inside the run: build the network, register it, and keep it until told to end."""
    try:
        with Network(spec) as network, furnish(network):
            registration = Registration(
                run_id=run_id,
                topology=spec.name,
                pid=owner[0],
                start_ticks=owner[1],
                init_pid=outer_pid(),
                hosts=[HostSummary.of(host) for host in network.hosts],
                delays=network.measure_delays(),
            )
            text = registration.model_dump_json()
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)
            _say(answer, text)
            while True:  # until a signal raises
                time.sleep(_CHECK_INTERVAL_S)
                network.check_alive()
    except Exception as error:  # of the network or of what furnishes it: the starter reports it
        _say(answer, json.dumps({"error": str(error)}))
        return 1


def _say(answer: int, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(answer, f"{line}\n".encode())


def _end(registration: Registration) -> None:
    """SIGTERM, and SIGKILL when that does not end it in time."""
    try:
        process = os.pidfd_open(registration.pid)
    except ProcessLookupError:
        return
    try:
        if not registration.alive():
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], _STOP_DEADLINE_S)[0]:
                return
    except ProcessLookupError:
        return
    finally:
        os.close(process)
