"""Traffic that tells what it lost: numbers out and back, one a millisecond, until it is stopped."""

import contextlib
import socket
import struct
import threading

SO_RCVBUFFORCE, BUFFER_BYTES = 33, 64 << 20
QUIET_S = 0.2
PERIOD_S = 0.001
NUMBER, NO_NUMBER = struct.Struct("!Q"), b"?"
PATH_TRIES = 25
TCP_INFO_RETRANSMITS = struct.Struct("=100xI")  # tcpi_total_retrans in linux/tcp.h


class Echoes:
    """Sends from `near` to `far`, which sends everything back; a context manager.

    Datagram sockets, `near` with an `address` to send to; or the two ends of a connection. What
    is no number of ours is not echoed.
    """

    def __init__(
        self,
        near: socket.socket,
        far: socket.socket,
        address: tuple[str, int] | None = None,
        size_bytes: int = NUMBER.size,
    ) -> None:
        self._near, self._far, self._address = near, far, address
        self._padding = bytes(size_bytes - NUMBER.size)
        near.settimeout(None)  # where a buffer is full, it waits
        far.settimeout(QUIET_S)
        for end in (near, far):
            end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._send, self._return)]
        self.sent = 0

    def find_path(self) -> None:
        """Send datagrams until one has come back, and count none of them.

        The first of all may be lost: its neighbours are new, and IPv6 may not be ready to ask.
        """
        self._near.settimeout(QUIET_S)
        for _ in range(PATH_TRIES):
            with contextlib.suppress(TimeoutError):
                self._near.sendto(NO_NUMBER, self._address or ("", 0))
                self._far.sendto(NO_NUMBER, self._far.recvfrom(2_000)[1])
                self._near.recv(2_000)
                self._near.settimeout(None)
                return
        raise AssertionError(f"nothing comes back from {self._address}")

    def __enter__(self) -> "Echoes":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._over.wait(PERIOD_S):
            data = NUMBER.pack(self.sent) + self._padding
            self.sent += 1
            if self._address is None:
                self._near.sendall(data)
            else:
                self._near.sendto(data, self._address)

    def _return(self) -> None:
        size = NUMBER.size + len(self._padding)
        while True:
            try:
                data, source = self._far.recvfrom(2_000)
            except TimeoutError:
                if self._over.is_set():
                    return
                continue
            if self._address is None:
                self._far.sendall(data)
            elif len(data) == size:
                self._far.sendto(data, source)

    def lost(self) -> int:
        """Return how many of all that were sent did not come back; TCP: or were sent again."""
        if self._address is None:
            wanted = self.sent * (NUMBER.size + len(self._padding))
            received = b"".join(self._received())
            again = self._near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            return wanted - len(received) + TCP_INFO_RETRANSMITS.unpack(again)[0]
        found = [data for data in self._received() if data != NO_NUMBER]
        numbers = {NUMBER.unpack_from(data)[0] for data in found}
        return len(set(range(self.sent)) - numbers)

    def _received(self) -> list[bytes]:
        found = []
        self._near.settimeout(QUIET_S)
        try:
            while data := self._near.recv(65_536):
                found.append(data)
        except TimeoutError:
            pass
        return found
