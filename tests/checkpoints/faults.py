"""Faults at exactly one system call: the process dies there, or the call fails.

A profile function sees every call into C before it is made, so nothing of the code under test is
replaced, and what `shutil` or `pathlib` call is seen too.
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist

CALLS = {
    *("open", "write", "flush", "close", "fsync", "rename", "replace", "unlink", "remove"),
    *("rmdir", "mkdir", "open_code"),
    "serialize_file",  # safetensors
}
# What needs space on the disk.
WRITES = {"open", "write", "flush", "close", "fsync", "rename", "replace", "mkdir"}
WRITES |= {"serialize_file"}


def _profile(act: Callable[[str, int], None], names: set[str]) -> Callable[..., None]:
    count = 0

    def profile(_frame: Any, event: str, function: Any) -> None:
        nonlocal count
        if event != "c_call" or function.__name__ not in names:
            return
        owner = function.__self__  # of `os.replace` a module, of `write` a file; not a string
        if isinstance(owner, (ModuleType, io.IOBase)):
            count += 1
            act(function.__name__, count)

    return profile


def calls_of(action: Callable[[], Any], names: set[str] = CALLS) -> list[str]:
    """Names of the calls that `action` makes, in order."""
    seen: list[str] = []
    sys.setprofile(_profile(lambda name, _: seen.append(name), names))
    try:
        action()
    finally:
        sys.setprofile(None)
    return seen


def die_at(action: Callable[[], Any], number: int) -> bool:
    """Run `action` in a fork that dies just before its call of this number.

    Returns:
        Whether it died there; it had fewer calls otherwise.
    """

    def act(_name: str, count: int) -> None:
        if count == number:
            os._exit(9)

    if dist.is_initialized():  # by an earlier test, with threads that a fork does not have
        dist.destroy_process_group()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.setprofile(_profile(act, CALLS))
            action()
            sys.setprofile(None)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


def fail_at(action: Callable[[], Any], number: int) -> BaseException | None:
    """Run `action` with no space left from its call of this number on.

    Returns:
        What it raised.
    """

    def act(_name: str, count: int) -> None:
        if count == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.setprofile(_profile(act, WRITES))
    try:
        action()
    except BaseException as error:
        return error
    finally:
        sys.setprofile(None)
    return None
