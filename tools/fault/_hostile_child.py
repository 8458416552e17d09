"""A tiny training in a process of its own, on a machine that refuses it something.

Argument: a JSON object, see `Job`. Prints a JSON object a line: {"ready": true} where it waits for
a line of input before it goes on, and at the end what became of it, see `main`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SECCOMP_RET_ERRNO, _SECCOMP_RET_ALLOW = 0x00050000, 0x7FFF0000
_BPF_LOAD_WORD, _BPF_JUMP_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06


@dataclass
class Job:
    """Where the training has its files, and what it is refused.

    `refused_calls` end with `errno`; `pause_before` names a stage of `main`,
    and means the first one of that name.
    """

    nvme: str
    checkpoints: str
    home: str = "nvme"
    io: dict[str, Any] = field(default_factory=dict)
    refused_calls: list[int] = field(default_factory=list)
    errno: int = 1
    max_files: int = 0
    max_file_bytes: int = 0
    pause_before: str = ""


def refuse_calls(numbers: list[int], code: int) -> None:
    """Let system calls of this thread, and of those it starts, fail with an errno.

    Source: seccomp(2), linux/filter.h; the number of the call is the first word of its data.
    """
    program = [(_BPF_LOAD_WORD, 0, 0, 0)]
    for place, number in enumerate(numbers):
        program.append((_BPF_JUMP_EQUAL, len(numbers) - place, 0, number))
    program.append((_BPF_RETURN, 0, 0, _SECCOMP_RET_ALLOW))
    program.append((_BPF_RETURN, 0, 0, _SECCOMP_RET_ERRNO | code))
    code_bytes = b"".join(struct.pack("HBBI", *line) for line in program)
    filters = ctypes.create_string_buffer(code_bytes)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header)
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Train three steps with a save after the second; load in a new engine and train the third.

    The last line has "bits", "backend", "errors", "close_seconds" and "warnings". Each error has
    its stage: build, step, save, load; training goes on after a save that failed.
    """
    job = Job(**json.loads(sys.argv[1]))
    if job.refused_calls:
        refuse_calls(job.refused_calls, job.errno)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    from fault._hostile_teeth import break_as_told
    from fault._hostile_training import Training

    break_as_told()

    torch.set_num_threads(1)
    if job.max_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (job.max_files, job.max_files))
    if job.max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.max_file_bytes, job.max_file_bytes))

    def pause(stage: str) -> None:
        if stage == job.pause_before:
            job.pause_before = ""
            print(json.dumps({"ready": True}), flush=True)
            sys.stdin.readline()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training = Training(Path(job.nvme), Path(job.checkpoints), job.home, job.io, pause)
        training.run()
    result = {
        "bits": training.bits,
        "backend": training.backend,
        "errors": training.errors,
        "close_seconds": training.close_seconds,
        "warnings": [str(each.message) for each in caught],
    }
    print(json.dumps(result), flush=True)
    # What hangs in the kernel ends with the process, or when the disk is back.
    os._exit(0)


if __name__ == "__main__":
    main()
