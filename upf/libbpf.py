"""The few calls of libbpf that a BPF object of ours needs: load it, attach it, change its maps.

libbpf is called through ctypes with the interpreter's lock held: a call takes about a microsecond.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

LIBRARY = "libbpf.so.1"
BATCH = 4_096  # entries read with one call
MAX_MAPS = 16  # of a program
MAX_PROGRAMS = 64  # of an interface
TCX_INGRESS = 46  # enum bpf_attach_type
INFO_BYTES = 80  # of bpf_prog_info and bpf_map_info: as much of them as is read here
_PROG_MAPS = struct.Struct("=52xIQ")  # struct bpf_prog_info: nr_map_ids, map_ids
_MAP_SIZES = struct.Struct("=8xII")  # struct bpf_map_info: key_size, value_size
_MAP_NAME, _PROGRAM_NAME = slice(24, 40), slice(64, 80)
_BATCH_OPTS = struct.Struct("=QQQ")  # struct bpf_map_batch_opts

_POINTER, _INT, _U32, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64
_BYTES = ctypes.c_char_p
_U32_AT = ctypes.POINTER(ctypes.c_uint32)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # function -> result, arguments
    "bpf_object__open_file": (_POINTER, _BYTES, _POINTER),
    "bpf_object__load": (_INT, _POINTER),
    "bpf_object__close": (None, _POINTER),
    "bpf_object__find_map_by_name": (_POINTER, _POINTER, _BYTES),
    "bpf_object__find_program_by_name": (_POINTER, _POINTER, _BYTES),
    "bpf_program__fd": (_INT, _POINTER),
    "bpf_map__set_max_entries": (_INT, _POINTER, _U32),
    "bpf_map__set_initial_value": (_INT, _POINTER, _BYTES, ctypes.c_size_t),
    "bpf_map_update_elem": (_INT, _INT, _BYTES, _BYTES, _U64),
    "bpf_map_lookup_elem": (_INT, _INT, _BYTES, _POINTER),
    "bpf_map_lookup_and_delete_elem": (_INT, _INT, _BYTES, _POINTER),
    "bpf_map_lookup_batch": (
        _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _U32_AT, _BYTES,
    ),
    "bpf_prog_attach": (_INT, _INT, _INT, _INT, _U32),
    "bpf_prog_detach2": (_INT, _INT, _INT, _INT),
    "bpf_prog_query": (_INT, _INT, _INT, _U32, _POINTER, _U32_AT, _U32_AT),
    "bpf_prog_get_fd_by_id": (_INT, _U32),
    "bpf_map_get_fd_by_id": (_INT, _U32),
    "bpf_obj_get_info_by_fd": (_INT, _INT, _POINTER, _U32_AT),
}  # fmt: skip


class BpfError(OSError):
    """The kernel, or libbpf, refused something."""


class NoLibraryError(BpfError):
    """There is no libbpf on this machine."""


_loaded: Any = None


def _library() -> Any:
    """Return libbpf. Raises BpfError where there is none."""
    global _loaded
    if _loaded is None:
        try:
            library = ctypes.PyDLL(LIBRARY)
            for name, (result, *arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            library.libbpf_set_print(None)  # what the verifier says is not for the user
        except (OSError, AttributeError) as error:
            raise NoLibraryError(errno.ENOENT, f"{LIBRARY} cannot be used: {error}") from error
        _loaded = library
    return _loaded


def _check(result: int, what: str) -> int:
    if result < 0:
        raise BpfError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Map:
    """A map of a loaded program. Keys and values are packed as its C structures are."""

    def __init__(self, fd: int) -> None:
        """Take over a file descriptor."""
        self._library = _library()
        self.fd = fd
        info = _info(fd)
        self.key_bytes, self.value_bytes = _MAP_SIZES.unpack_from(info)
        self.name = info[_MAP_NAME].rstrip(b"\0").decode()
        self._value = ctypes.create_string_buffer(self.value_bytes)

    def close(self) -> None:
        """Let go of the map; it lives on while a program uses it."""
        os.close(self.fd)

    def put(self, key: bytes, value: bytes) -> None:
        """Set an entry, in one step for whoever reads it. Raises BpfError (E2BIG: it is full)."""
        result = self._library.bpf_map_update_elem(self.fd, key, value, 0)
        if result:
            _check(result, f"cannot set an entry of {self.name}")

    def get(self, key: bytes) -> bytes | None:
        """Return an entry's value; None if there is none."""
        if self._library.bpf_map_lookup_elem(self.fd, key, self._value):
            return None
        return self._value.raw

    def take(self, key: bytes) -> bytes | None:
        """Delete an entry of a hash; return the value it had at last, None if there was none."""
        if self._library.bpf_map_lookup_and_delete_elem(self.fd, key, self._value):
            return None
        return self._value.raw

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Read all entries."""
        keys = ctypes.create_string_buffer(BATCH * self.key_bytes)
        values = ctypes.create_string_buffer(BATCH * self.value_bytes)
        place = ctypes.create_string_buffer(max(self.key_bytes, 8))
        options = _BATCH_OPTS.pack(_BATCH_OPTS.size, 0, 0)
        begun = False
        while True:
            count = ctypes.c_uint32(BATCH)
            result = self._library.bpf_map_lookup_batch(
                self.fd, place if begun else None, place, keys, values, count, options
            )
            if result not in (0, -errno.ENOENT):
                _check(result, f"cannot read {self.name}")
            yield from zip(
                _pieces(keys.raw, self.key_bytes, count.value),
                _pieces(values.raw, self.value_bytes, count.value),
                strict=True,
            )
            if result:
                return
            begun = True


def _pieces(data: bytes, size: int, count: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, size * count, size))


class Object:
    """A compiled file of programs and maps, to be loaded and attached."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises BpfError."""
        self._library = _library()
        self._object = self._library.bpf_object__open_file(os.fsencode(path), None)
        if not self._object:
            raise BpfError(errno.ENOENT, f"{path} cannot be opened as a BPF object")

    def close(self) -> None:
        """Let go. What is attached stays, and so do its maps."""
        self._library.bpf_object__close(self._object)

    def size(self, name: str, entries: int) -> None:
        """Say how many entries a map may have; before `load`."""
        found = self._map(name)
        _check(self._library.bpf_map__set_max_entries(found, entries), f"cannot size {name}")

    def set_constants(self, value: bytes) -> None:
        """Set the constants (section .rodata); before `load`."""
        result = self._library.bpf_map__set_initial_value(self._map(".rodata"), value, len(value))
        _check(result, "cannot set the constants")

    def load(self) -> None:
        """Have the kernel verify and keep it. Raises BpfError."""
        _check(self._library.bpf_object__load(self._object), "the kernel refuses the program")

    def program(self, name: str) -> "Program":
        """Return a loaded program, which is open as long as this is."""
        found = self._library.bpf_object__find_program_by_name(self._object, name.encode())
        if not found:
            raise BpfError(errno.ENOENT, f"the object has no program {name}")
        fd = _check(self._library.bpf_program__fd(found), f"program {name} is not loaded")
        return Program(fd)

    def _map(self, name: str) -> int:
        found = self._library.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise BpfError(errno.ENOENT, f"the object has no map {name}")
        return int(found)


class Program:
    """A program in the kernel; it lives as long as it is attached, or open."""

    def __init__(self, fd: int) -> None:
        """Take a file descriptor, and close it only in `close`."""
        self._library = _library()
        self.fd = fd
        self.name = _info(fd)[_PROGRAM_NAME].rstrip(b"\0").decode()

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)

    def attach(self, index: int) -> None:
        """Attach it at tc ingress (tcx) of an interface of this thread's network namespace."""
        result = self._library.bpf_prog_attach(self.fd, index, TCX_INGRESS, 0)
        _check(result, f"{self.name} cannot be attached to interface {index}")

    def detach(self, index: int) -> None:
        """Take it away there."""
        result = self._library.bpf_prog_detach2(self.fd, index, TCX_INGRESS)
        _check(result, f"{self.name} cannot be taken from interface {index}")

    def maps(self) -> dict[str, Map]:
        """Open the maps that it uses, by name. Raises BpfError."""
        numbers = (ctypes.c_uint32 * MAX_MAPS)()
        request = bytearray(INFO_BYTES)
        _PROG_MAPS.pack_into(request, 0, MAX_MAPS, ctypes.addressof(numbers))
        count, _ = _PROG_MAPS.unpack_from(_info(self.fd, request))
        found: dict[str, Map] = {}
        with ExitStack() as undo:
            for number in numbers[:count]:
                fd = self._library.bpf_map_get_fd_by_id(number)
                opened = Map(_check(fd, f"there is no map {number}"))
                undo.callback(opened.close)
                found[opened.name] = opened
            undo.pop_all()
        return found


def attached(index: int) -> list[Program]:
    """Open the programs at tc ingress (tcx) of an interface of this thread's network namespace."""
    library = _library()
    numbers = (ctypes.c_uint32 * MAX_PROGRAMS)()
    count = ctypes.c_uint32(MAX_PROGRAMS)
    result = library.bpf_prog_query(index, TCX_INGRESS, 0, None, numbers, count)
    if result in (-errno.EINVAL, -errno.ENODEV):  # before Linux 6.6; the interface went
        return []
    _check(result, f"the programs of interface {index} cannot be read")
    found = []
    for number in numbers[: count.value]:
        fd = library.bpf_prog_get_fd_by_id(number)
        if fd != -errno.ENOENT:  # it went meanwhile
            found.append(Program(_check(fd, f"program {number} cannot be opened")))
    return found


def _info(fd: int, request: bytes | bytearray = bytes(INFO_BYTES)) -> bytes:
    """Return what the kernel says of a program or map, as far as is read here."""
    buffer = ctypes.create_string_buffer(bytes(request), INFO_BYTES)
    length = ctypes.c_uint32(INFO_BYTES)
    _check(_library().bpf_obj_get_info_by_fd(fd, buffer, length), "a BPF object tells nothing")
    return buffer.raw
