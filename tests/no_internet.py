"""A process that dies at its first internet socket: what a test starts a command in.

The kernel's own filter (seccomp) watches, so that native threads are seen too, and a name server
is not needed. Linux on x86-64 and aarch64.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import struct
import sys

KILLED = -signal.SIGSYS if hasattr(signal, "SIGSYS") else None
"""Return code of a process that asked for an internet socket."""

_SOCKET = {"x86_64": 41, "aarch64": 198}.get(platform.machine())
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: word at offset, jump if equal, return
_NUMBER, _FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_INET, _INET6 = 2, 10
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


def forbidden() -> bool:
    """Whether this system can forbid sockets at all."""
    return sys.platform == "linux" and _SOCKET is not None


def forbid_internet() -> None:
    """Kill this process, or what it becomes by exec, when it makes an internet socket.

    To be given to subprocess as ``preexec_fn``. Raises OSError where the kernel refuses.
    """
    steps = [
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 4, _SOCKET),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, _INET),
        (_EQUAL, 0, 1, _INET6),
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, program, 0, 0)):
        if libc.prctl(*call) != 0:
            number = ctypes.get_errno()
            raise OSError(number, "the kernel takes no seccomp filter")
