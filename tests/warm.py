"""Python processes that have torch when they start, since importing it takes most of their time.

One process imports torch and what belongs to it; the others are forked from it, and import
Transformers and this package themselves. `python()` is an executable for the place of
`sys.executable` in a command. Its stdin, stdout, stderr, environment, folder and exit code are its
caller's, but its pid is another's than that of what it runs, and what torch reads from the
environment when it is imported is as in pytest: a test of signals, or of such a variable, takes
`sys.executable`.
"""

import array
import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]
# What Transformers and this package import of torch, and of others that read no setting of theirs.
PRELOADED = (
    *("torch", "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op", "torch.export"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "scipy.optimize"),
    *("torch.distributed.tensor", "torch.nn.attention.flex_attention", "sympy", "jinja2"),
    *("PIL.Image", "psutil", "pyarrow", "pydantic.dataclasses", "regex", "rich.progress", "yaml"),
)
_CLIENT = """#!{python} -SEs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
socket.send_fds(server, [b"!"], [0, 1, 2])
server.sendall(json.dumps(asked).encode() + b"\\n")
answer = server.makefile().readline()
if not answer:
    sys.exit("the process that has imported torch is gone")
code = os.waitstatus_to_exitcode(int(answer))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def python() -> str:
    """The executable; `sys.executable` where the system cannot do it."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    client, address = folder / "python", str(folder / "socket")
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)  # whoever asks before torch is imported waits
        # It ends when its stdin does: with this process, however that ends.
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    atexit.register(server.communicate)
    return str(client)


def warm(patch: "pytest.MonkeyPatch", module: types.ModuleType) -> None:
    """Have a module start such processes: it uses nothing of `sys` but `sys.executable`."""
    patch.setattr(module, "sys", types.SimpleNamespace(executable=python()))


def ranks(count: int, *command: str | Path, timeout: float = 300) -> str:
    """Run torchrun on this machine; raises unless all processes end well.

    Args:
        command: what follows torchrun's options, such as "-m", MODULE, ARGUMENT.

    Returns:
        What they wrote to stdout.
    """
    launcher = [python(), "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": python()}
    finished = subprocess.run(
        [*launcher, "--standalone", *map(str, command)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"exit code {finished.returncode}: {finished.stderr}")
    return finished.stdout


def _serve(listener: socket.socket) -> list[str]:
    """Fork a process for every request; returns in each of them, with its arguments."""
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        return _fork_and_wait(connection)
    os._exit(0)


def _fork_and_wait(connection: socket.socket) -> list[str]:
    """In the forked process return; wait for it here, and end it when nobody waits any more."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    asked = json.loads(connection.makefile().readline())
    process = os.fork()
    if process == 0:
        connection.close()
        _take_over(asked, descriptors)
        return asked["arguments"]
    for descriptor in descriptors:
        os.close(descriptor)
    ended = os.pidfd_open(process)
    if ended not in select.select([connection, ended], [], [])[0]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _take_over(asked: dict[str, Any], descriptors: array.array) -> None:
    """Be where the caller is, with its environment and its streams."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A stream asks once whether its file can seek, and these are other files now.
    options: Any = {"encoding": "utf-8", "closefd": False}
    sys.stdin = open(0, errors="surrogateescape", **options)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, **options)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", **options)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    if "PYTHONUNBUFFERED" in os.environ:
        _unbuffer()


def _unbuffer() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]


def _run(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does: options -u and -W, then -c, -m or a file."""
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-u":
            _unbuffer()
        else:
            warnings.simplefilter(arguments.pop(0))  # pyright: ignore[reportArgumentType]
    place = str(Path(arguments[0]).resolve().parent) if arguments[0][0] != "-" else os.getcwd()
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in [place, *named] if path]
    first, *rest = arguments
    if first not in ("-c", "-m"):
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
        return
    sys.argv = [first, *rest[1:]]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(rest[0], "<string>", "exec"), module.__dict__)


def _end(run: Callable[[], None]) -> None:
    """End as the interpreter does after `run`, without taking torch apart, which takes a second."""
    code = 0
    try:
        run()
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    gc.set_threshold(100_000, 20, 50)  # imports create objects that stay
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # a collection in a forked process would copy all that it looks at
    sys.path.pop(0)  # the folder of this file
    asked_for = _serve(socket.socket(fileno=int(sys.argv[1])))
    _end(lambda: _run(asked_for))
