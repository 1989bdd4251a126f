"""What the kernel refuses a grading process, whatever an answer makes it do: memory, time, files, programs, sockets."""

import ctypes
import errno
import os
import platform
import resource
import struct
import time

LIFETIME_S = 4 * 3600  # processor seconds of a worker; the answer that meets the end is graded again by a new one
# socket, socketpair, clone, (fork, vfork,) execve, execveat, io_uring_setup, clone3, behind the number of the machine
_CALLS = {
    "x86_64": (0xC000003E, (41, 53, 56, 57, 58, 59, 322, 425, 435)),
    "aarch64": (0xC00000B7, (198, 199, 220, 221, 281, 425, 435)),
}


# Python's audit events for what would change the disk, or reach past Python to do so
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.ch", "shutil.", "ctypes.")


def restrict(memory_bytes: int) -> list[str]:
    """Limit this process for the rest of its life; the limits that this system does not have."""
    sizes = {"CORE": 0, "FSIZE": 0, "NPROC": 0, "CPU": LIFETIME_S, "AS": memory_bytes}
    lacking = []
    for name, size in sizes.items():
        try:
            kind = getattr(resource, f"RLIMIT_{name}")
            before = resource.getrlimit(kind)[1]
            limit = size if before == resource.RLIM_INFINITY else min(size, before)
            resource.setrlimit(kind, (limit, limit))
        except (AttributeError, ValueError, OSError):  # macOS refuses AS; there the deadline is the only bound
            lacking.append(f"RLIMIT_{name}")
    return lacking if _refuse_calls() else [*lacking, "system calls"]


def refuse_changes(event: str, args: tuple) -> None:
    """Python's audit hook of this process: scorers of others may evaluate an answer, and the disk shall not change."""
    opens = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if opens or event.startswith(_CHANGES):
        raise PermissionError(f"{event} is refused here")


def allow_seconds(deadline_s: float) -> None:
    """Processor time until the kernel ends this process (SIGXCPU), should an answer outlive its deadline."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time() + deadline_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _refuse_calls() -> bool:
    """No new process, program or connection from here on, by a seccomp filter, which needs no privilege and holds for
    root too (RLIMIT_NPROC does not); False where there is none."""
    if platform.system() != "Linux" or platform.machine() not in _CALLS:
        return False
    architecture, calls = _CALLS[platform.machine()]
    load, equal, not_below, give, n = 0x20, 0x15, 0x35, 0x06, len(calls)  # jumps count instructions: if true, if false
    program = [(load, 0, 0, 4), (equal, 0, n + 3, architecture), (load, 0, 0, 0), (not_below, n + 1, 0, 2**30)]
    program += [(equal, n - i, 0, number) for i, number in enumerate(calls)]
    program += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x50000 | errno.EPERM)]  # allowed; refused
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = struct.pack("HP", len(program), ctypes.addressof(code))
    prctl = ctypes.CDLL(None).prctl
    return prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, filter_) == 0  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
