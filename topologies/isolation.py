"""Ownership of a run by the kernel: everything a run makes dies with the process that started it.

The run is PID 1 of a PID namespace of its own. However the outer process ends, even by SIGKILL,
the kernel kills PID 1, then every process of the namespace, and with them go their network and
mount namespaces, links and files. There is nothing to clean up and nothing to find.
"""

import fcntl
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from topologies import linux

SCRATCH = Path("/run/aipaging/scratch")
OPEN_FILES = 8192
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_outer_pid: int | None = None
_KINDS = {"pid": "PID_NS", "net": "NET_NS", "mnt": "NAMESPACES"}


class IsolationError(Exception):
    """This process cannot start an isolated run. The message says what to do about it."""


def require_isolation() -> None:
    """Raise IsolationError unless this process may make the namespaces a run needs."""
    if os.geteuid() != 0:
        raise IsolationError("an emulated network needs root: run this command with sudo")
    for kind, option in _KINDS.items():
        if not Path(f"/proc/self/ns/{kind}").exists():
            raise IsolationError(
                f"this kernel has no {kind} namespaces: use one built with CONFIG_{option}=y"
            )


def scratch_dir() -> Path:
    """The run's private directory, in memory; it is gone when the run is.

    Raises IsolationError outside a run.
    """
    if os.environ.get("TMPDIR") != str(SCRATCH) or not os.path.ismount(SCRATCH):
        raise IsolationError("there is a scratch directory inside an isolated run only")
    return SCRATCH


def outer_pid() -> int:
    """The pid of a run's PID 1 as its starter sees it. Raises IsolationError outside a run."""
    if _outer_pid is None:
        raise IsolationError("this process is not PID 1 of an isolated run")
    return _outer_pid


def run_isolated(main: Callable[[], int]) -> int:
    """Run `main` in PID, mount and network namespaces of its own; return its exit status.

    SIGTERM, SIGINT and SIGHUP are passed on: the first makes `main` raise (KeyboardInterrupt or
    SystemExit) so that it unwinds, the third kills it. A death by signal n is reported as 128+n.
    Call it from the main thread. Raises IsolationError before anything is made.
    """
    require_isolation()
    SCRATCH.mkdir(mode=0o700, parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    alive_read, alive_write = os.pipe()
    own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    try:
        try:
            linux.unshare(linux.CLONE_NEWPID)
        except OSError as error:
            raise IsolationError(
                f"the kernel refused a new PID namespace ({error}): run as root, outside "
                "containers that lack CAP_SYS_ADMIN"
            ) from error
        child = os.fork()
        if child == 0:
            os.close(alive_write)
            os.close(own_pids)
            _be_the_run(main, alive_read, previous_mask)
        linux.setns(own_pids, linux.CLONE_NEWPID)  # later children of ours stay with us
        return _wait(child, previous_mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        for fd in (alive_read, alive_write, own_pids):
            os.close(fd)


def _wait(child: int, mask: set[int | signal.Signals]) -> int:
    """Pass signals on until the child ends, then give its exit status.

    Signals wake the wait through a pipe: one that comes just before the wait begins, or in another
    thread, is not missed.
    """
    process = os.pidfd_open(child)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous_wake = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, _do_nothing) for number in _FORWARDED}
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    received = 0
    try:
        while process not in select.select([process, woken], [], [])[0]:
            for number in os.read(woken, 64):
                if number in _FORWARDED:
                    received += 1
                    os.kill(child, number if received < 3 else signal.SIGKILL)
    finally:
        signal.set_wakeup_fd(previous_wake)
        for number, handler in previous.items():
            signal.signal(number, handler)
        for fd in (process, woken, wake):
            os.close(fd)
    # Only now is the pid free to be given to a stranger.
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _be_the_run(
    main: Callable[[], int], alive_read: int, mask: set[int | signal.Signals]
) -> NoReturn:
    """The life of PID 1. Never returns into the caller's stack."""
    status = 1
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([alive_read], [], [], 0)[0]:
            os._exit(1)  # the outer process died before it could be watched
        os.close(alive_read)
        os.setpgid(0, 0)  # a terminal's ^C goes to the outer process alone, which passes it on
        _make_private()
        _install_handlers()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = main()
    except SystemExit as leaving:
        match leaving.code:
            case None:
                status = 0
            case int(code):
                status = code
            case text:
                sys.stderr.write(f"{text}\n")
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 1
        os._exit(status)


def _make_private() -> None:
    global _outer_pid
    try:
        # The outer /proc still tells this process its outer pid; the new one will not.
        _outer_pid = int(Path("/proc/self").readlink().name)
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        quiet = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        linux.mount("proc", "/proc", "proc", quiet)
        private = linux.MS_NOSUID | linux.MS_NODEV
        linux.mount("scratch", str(SCRATCH), "tmpfs", private, "mode=0700")
    except OSError as error:
        sys.exit(f"an isolated run cannot start: {error}")
    os.environ["TMPDIR"] = str(SCRATCH)
    _bring_loopback_up()
    tempfile.tempdir = str(SCRATCH)
    # Every host of an emulated network keeps a few descriptors open. No more than needed: mnexec
    # closes as many as the limit allows, one by one, whenever it starts a host.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _bring_loopback_up() -> None:
    set_flags, up = 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, set_flags, struct.pack("16sH14x", b"lo", up))


def _install_handlers() -> None:
    """PID 1 gets no signal without a handler for it. The first one unwinds `main`."""

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in _FORWARDED:
            signal.signal(other, lambda *_: None)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    for number in _FORWARDED:
        signal.signal(number, leave)
