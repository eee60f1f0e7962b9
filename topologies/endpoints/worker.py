"""An anchor's worker that takes datagrams: what a UE's packets reach, once it has started.

It opens its sockets, then says that it is ready (`GET /ready`), and prints a line. When it is ended
it prints what it got, as the kernel stamped it. A careless one says so before its sockets are open.

    python -m topologies.endpoints.worker --own 10.47.1.2 --port 8000 --service 198.18.0.1
"""

import argparse
import json
import select
import signal
import socket
import struct
import time

SO_TIMESTAMPNS, SO_RCVBUFFORCE = 35, 33
BUFFER_BYTES = 16 << 20
NUMBER = struct.Struct("!QQ")  # episode, sequence number
TIMESPEC = struct.Struct("@ll")
READY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def datagrams(address: str, port: int) -> socket.socket:
    """Open a socket whose packets are stamped by the kernel."""
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    made.bind((address, port))
    return made


def take(handle: socket.socket, got: list[tuple[int, int, int]]) -> None:
    """Receive all there is: episode, sequence number, and when it came (Unix ns)."""
    while True:
        try:
            data, stamps, _, _ = handle.recvmsg(64, 64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        seconds, ns = TIMESPEC.unpack(stamps[0][2])
        got.append((*NUMBER.unpack(data), seconds * 1_000_000_000 + ns))


def main() -> None:
    """Serve until SIGTERM, then print what came as JSON."""
    parser = argparse.ArgumentParser(prog="worker", description="takes datagrams")
    parser.add_argument("--own", required=True, help="the anchor's own address: /ready is there")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--service", nargs="+", required=True, help="service addresses")
    parser.add_argument("--careless-ms", type=int, default=0, help="ready so long before it is")
    options = parser.parse_args()
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    asked = socket.create_server((options.own, options.port))
    open_at = time.monotonic() + options.careless_ms / 1000
    sockets: list[socket.socket] = []
    if not options.careless_ms:
        sockets = [datagrams(address, options.port) for address in options.service]
    print("ready", flush=True)
    got: list[tuple[int, int, int]] = []
    while not stopping:
        for handle in select.select([asked, *sockets], [], [], 0.005)[0]:
            if handle is asked:
                connection, _ = asked.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(READY)
            else:
                take(handle, got)
        if not sockets and time.monotonic() >= open_at:
            sockets = [datagrams(address, options.port) for address in options.service]
    for handle in sockets:
        take(handle, got)
    print(json.dumps(got), flush=True)


if __name__ == "__main__":
    main()
