"""Faults of every kind, at every place, on every backend: an exception or the right bytes."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from offload.errors import DeadlineError, StorageError
from offload.native import IoEngine, crc32c
from offload.native.fault_spec import FaultSpec

BLOCK = 64 * 1024
NUM_BLOCKS = 4
NBYTES = NUM_BLOCKS * BLOCK
CREATE = os.O_RDWR | os.O_CREAT


@pytest.fixture
def filled(tmp_path, make_memory):
    path, memory = tmp_path / "f", make_memory(NBYTES, 1)
    path.write_bytes(memory.part(0, NBYTES))
    return str(path), memory


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("nth", range(1, NUM_BLOCKS + 1))
def test_an_error_of_any_block_is_raised(backend, filled, make_memory, operation, code, nth):
    path, memory = filled
    target = make_memory(NBYTES)
    with (
        IoEngine(
            backend=backend, block_bytes=BLOCK, fault=f"op={operation},nth={nth},errno={code}"
        ) as engine,
        engine.open(path, flags=CREATE) as file,
    ):
        start = engine.start_read if operation == "read" else engine.start_write
        address = target.address if operation == "read" else memory.address
        ticket = start(file, 0, address, NBYTES, checksum_seed=0)
        for _ in range(2):  # the same error each time
            with pytest.raises(StorageError) as caught:
                ticket.wait(30)
            error = caught.value
            assert (error.operation, error.path) == (operation, path)
            assert (error.offset, error.nbytes, error.errno) == (0, NBYTES, code)
            assert "in the block at offset" in str(error)
        assert ticket.done()
        assert start(file, 0, address, NBYTES, checksum_seed=0).wait(30) == crc32c(
            memory.address, NBYTES
        )


@pytest.mark.parametrize(
    "fault",
    [
        "nth=1,short=4096",
        "nth=2,count=3,short=512",
        "nth=1,count=2,short=100",
        "nth=1,count=6,errno=4",
        "nth=2,count=5,errno=11",
        "nth=1,delay=30",
    ],
)
def test_short_interrupted_refused_and_slow_calls_end_well(backend, filled, make_memory, fault):
    path, memory = filled
    target = make_memory(NBYTES)
    expected = crc32c(memory.address, NBYTES)
    with (
        IoEngine(
            backend=backend, block_bytes=BLOCK, fault=f"op=read,{fault};op=write,{fault}"
        ) as engine,
        engine.open(path, flags=CREATE | os.O_TRUNC) as file,
    ):
        assert (
            engine.start_write(file, 0, memory.address, NBYTES, checksum_seed=0).wait(30)
            == expected
        )
        assert (
            engine.start_read(file, 0, target.address, NBYTES, checksum_seed=0).wait(30) == expected
        )
        assert (memory.array == target.array).all()


def test_endless_refusal_is_an_error_in_the_end(backend, filled, make_memory):
    with (
        IoEngine(backend=backend, block_bytes=BLOCK, fault="op=read,count=0,errno=11") as engine,
        engine.open(filled[0], flags=os.O_RDONLY) as file,
        pytest.raises(StorageError, match="EAGAIN"),
    ):
        engine.start_read(file, 0, make_memory(BLOCK).address, BLOCK).wait(30)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 100, BLOCK, BLOCK + 4097])
def test_reading_past_the_end_is_an_error(backend, tmp_path, make_memory, direct, size):
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    memory = make_memory(NBYTES)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK) as engine,
        engine.open(str(path), flags=os.O_RDONLY, direct=direct) as file,
    ):
        with pytest.raises(StorageError, match="short, the file ends") as caught:
            engine.start_read(file, 0, memory.address, NBYTES, checksum_seed=0).wait(30)
        assert caught.value.errno == errno.EIO
        if size:
            engine.start_read(file, 0, memory.address, size).wait(30)
            assert memory.part(0, size) == b"x" * size


@pytest.mark.parametrize(("flags", "operation"), [(os.O_RDONLY, "write"), (os.O_WRONLY, "read")])
def test_wrong_access_mode(backend, filled, flags, operation):
    path, memory = filled
    with (
        IoEngine(backend=backend, block_bytes=BLOCK) as engine,
        engine.open(path, flags=flags) as file,
    ):
        start = engine.start_read if operation == "read" else engine.start_write
        with pytest.raises(StorageError, match="EBADF"):
            start(file, 0, memory.address, NBYTES).wait(30)


def test_a_deadline_leaves_the_request_and_its_buffer(backend, filled, make_memory):
    path, memory = filled
    target = make_memory(NBYTES)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK, fault="op=read,nth=2,delay=250") as engine,
        engine.open(path, flags=os.O_RDONLY) as file,
    ):
        ticket = engine.start_read(file, 0, target.address, NBYTES, checksum_seed=0)
        with pytest.raises(DeadlineError, match="still in flight") as caught:
            ticket.wait(0.02)
        assert (caught.value.operation, caught.value.path) == ("read", path)
        assert not ticket.done()
        assert ticket.wait(30) == crc32c(memory.address, NBYTES)


def test_a_failed_request_reports_after_its_last_block(backend, filled, make_memory):
    """Block 1 fails at once, block 2 is slow: its buffer must not be given back before."""
    path, _ = filled
    target = make_memory(NBYTES)
    with (
        IoEngine(
            backend=backend,
            block_bytes=BLOCK,
            threads=2,
            fault="op=read,nth=2,errno=5;op=read,nth=1,delay=200",
        ) as engine,
        engine.open(path, flags=os.O_RDONLY) as file,
    ):
        ticket = engine.start_read(file, 0, target.address, 2 * BLOCK)
        with pytest.raises(DeadlineError):
            ticket.wait(0.05)
        with pytest.raises(StorageError) as caught:
            ticket.wait(30)
        assert caught.value.errno == errno.EIO
        target.array[:] = 0
        gc.collect()
        assert not target.array.any()


@pytest.mark.parametrize("action", ["corrupt=1", "lost=1", f"misdirect={BLOCK}"])
@pytest.mark.parametrize("operation", ["read", "write"])
def test_checksums_see_silent_faults(backend, tmp_path, make_memory, action, operation):
    memory, target = make_memory(NBYTES, 2), make_memory(NBYTES)
    path = tmp_path / "f"
    path.write_bytes(bytes(2 * NBYTES))
    with (
        IoEngine(
            backend=backend, block_bytes=BLOCK, fault=f"op={operation},nth=2,{action}"
        ) as engine,
        engine.open(str(path), flags=CREATE) as file,
    ):
        wrote = engine.start_write(file, 0, memory.address, NBYTES, checksum_seed=0).wait(30)
        assert wrote == crc32c(memory.address, NBYTES)
        read = engine.start_read(file, 0, target.address, NBYTES, checksum_seed=0).wait(30)
        assert read != wrote
        assert read == crc32c(target.address, NBYTES)


def test_a_copy_can_fail_and_be_late(backend, make_memory):
    memory = make_memory(BLOCK, 3)
    with IoEngine(
        backend=backend, fault="op=copy,nth=1,errno=14;op=copy,nth=2,delay=150"
    ) as engine:
        copy = (memory.address + BLOCK // 2, memory.address, BLOCK // 4)
        with pytest.raises(StorageError, match="copy h2d of memory"):
            engine.start_copy(*copy, lane="h2d").wait(30)
        ticket = engine.start_copy(*copy, lane="d2h")
        with pytest.raises(DeadlineError):
            ticket.wait(0.02)
        ticket.wait(30)


def test_fsync_fails_once_and_is_not_repeated(backend, filled):
    with (
        IoEngine(backend=backend, fault="op=fsync,nth=1,errno=5") as engine,
        engine.open(filled[0], flags=CREATE) as file,
    ):
        with pytest.raises(StorageError, match=r"fsync of .*\[EIO\]"):
            engine.fsync(file)
        engine.fsync(file)


@pytest.fixture
def file_size_limit():
    """RLIMIT_FSIZE: the kernel itself writes short, then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = BLOCK + 8192
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_is_an_error(backend, tmp_path, make_memory, file_size_limit, direct):
    memory = make_memory(NBYTES, 4)
    with (
        IoEngine(backend=backend, block_bytes=BLOCK) as engine,
        engine.open(str(tmp_path / "f"), flags=CREATE, direct=direct) as file,
    ):
        with pytest.raises(StorageError) as caught:
            engine.start_write(file, 0, memory.address, NBYTES, checksum_seed=0).wait(30)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
        assert engine.start_write(file, 0, memory.address, BLOCK, checksum_seed=0).wait(
            30
        ) == crc32c(memory.address, BLOCK)


def test_a_device_that_is_full(backend, make_memory):
    if backend == "libaio":
        pytest.skip("kernel AIO takes no character devices")
    with (
        IoEngine(backend=backend) as engine,
        engine.open("/dev/full", flags=os.O_WRONLY) as file,
        pytest.raises(StorageError, match="ENOSPC"),
    ):
        engine.start_write(file, 0, make_memory(BLOCK, 1).address, BLOCK).wait(30)


@pytest.mark.parametrize(
    "text", ["op=erase,errno=5", "nth=1", "errno=x", "errno=5,short=1", "nth=0,errno=5", "errno"]
)
def test_both_sides_refuse_the_same_specifications(backend, text):
    with pytest.raises(ValueError, match="fault"):
        FaultSpec(text)
    with pytest.raises(ValueError, match="fault"):
        IoEngine(backend=backend, fault=text)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_a_lost_completion_hangs_neither_wait_nor_exit(backend, tmp_path):
    code = """
        import ctypes, mmap, os, sys
        from offload.native import IoEngine
        from offload.errors import DeadlineError
        memory = mmap.mmap(-1, 65536)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        engine = IoEngine(backend=sys.argv[1], fault="op=write,drop=1")
        file = engine.open(sys.argv[2], flags=os.O_RDWR | os.O_CREAT)
        ticket = engine.start_write(file, 0, address, 65536)
        for call in (ticket.wait, engine.close):
            try:
                call(0.05)
            except DeadlineError:
                print("deadline")
        # The process ends with the request in flight.
        """
    result = run_python(code, backend, str(tmp_path / "f"))
    assert (result.returncode, result.stdout) == (0, "deadline\ndeadline\n"), result.stderr


FORK = """
    import ctypes, gc, mmap, os, sys
    from offload.native import IoEngine, crc32c
    from offload.errors import EngineStateError
    memory = mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[:] = os.urandom(1 << 20)
    engine = IoEngine(backend=sys.argv[1], block_bytes=65536, fault="op=write,nth=3,delay=200")
    file = engine.open(sys.argv[2], flags=os.O_RDWR | os.O_CREAT)
    ticket = engine.start_write(file, 0, address, 1 << 20, checksum_seed=0)
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (
            lambda: ticket.wait(1),
            lambda: engine.start_write(file, 0, address, 4096),
            lambda: engine.start_copy(address, address + 8192, 4096, lane="h2d"),
            lambda: engine.fsync(file),
            lambda: engine.lanes(),
        ):
            try:
                call()
            except EngineStateError:
                refused += 1
        assert not ticket.done()
        engine.close()
        file.close()
        del ticket, engine, file
        gc.collect()
        os._exit(10 + refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 15
    assert ticket.wait(30) == crc32c(address, 1 << 20)
    assert engine.start_read(file, 0, address, 1 << 20, checksum_seed=0).wait(30) == ticket.wait()
    engine.close()
    print("ok")
    """


def test_a_forked_child_changes_nothing(backend, tmp_path):
    result = run_python(FORK, backend, str(tmp_path / "f"))
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


SECCOMP = """
    import ctypes, errno, os, struct, sys
    BLOCKED = {"io_uring": (425, 426, 427), "libaio": (206, 209), "enter": (426,)}
    numbers = [n for name in sys.argv[2].split(",") for n in BLOCKED[name]]
    action = 0x00050000 | getattr(errno, sys.argv[3])
    # BPF: load the system call's number; equal -> refuse with the errno; else allow.
    code = struct.pack("HBBI", 0x20, 0, 0, 0)
    for i, number in enumerate(numbers):
        code += struct.pack("HBBI", 0x15, len(numbers) - i, 0, number)
    code += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000) + struct.pack("HBBI", 0x06, 0, 0, action)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0, ctypes.get_errno()

    import mmap
    from offload.errors import UnsupportedPlatformError
    from offload.native import IoEngine
    memory = mmap.mmap(-1, 65536)
    memory[:] = os.urandom(65536)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        IoEngine(backend="io_uring")
    except UnsupportedPlatformError as error:
        assert IoEngine.probe()["io_uring"] != "ok"
        print(error, file=sys.stderr)
    else:
        raise SystemExit("io_uring was not refused")
    with IoEngine() as engine, engine.open(sys.argv[1], flags=os.O_RDWR | os.O_CREAT) as file:
        engine.start_write(file, 0, address, 65536).wait(30)
        print(engine.backend)
    assert open(sys.argv[1], "rb").read() == memory[:]
    """


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system call numbers are x86-64's")
@pytest.mark.parametrize("code", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize(
    ("blocked", "expected"),
    [("io_uring", "libaio"), ("enter", "libaio"), ("io_uring,libaio", "threads")],
)
def test_auto_takes_what_the_sandbox_allows(tmp_path, code, blocked, expected):
    if IoEngine.probe()[expected] != "ok":
        pytest.skip(f"{expected} does not work here anyway")
    result = run_python(SECCOMP, str(tmp_path / "f"), blocked, code)
    assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr


def test_ctrl_c_ends_a_wait(backend, tmp_path):
    code = """
        import ctypes, mmap, os, signal, sys, threading
        from offload.native import IoEngine
        memory = mmap.mmap(-1, 4096)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        engine = IoEngine(backend=sys.argv[1], fault="op=write,delay=1500")
        file = engine.open(sys.argv[2], flags=os.O_RDWR | os.O_CREAT)
        ticket = engine.start_write(file, 0, address, 4096)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            ticket.wait()
        except KeyboardInterrupt:
            print("interrupted", ticket.done())
        """
    result = run_python(code, backend, str(tmp_path / "f"))
    assert (result.returncode, result.stdout) == (0, "interrupted False\n"), result.stderr


def test_address_of_a_ctypes_buffer_is_what_the_tests_assume(make_memory):
    memory = make_memory(4096, 1)
    assert ctypes.string_at(memory.address, 4096) == memory.part(0, 4096)
