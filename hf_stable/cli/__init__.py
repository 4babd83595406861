"""The command line `hf-stable`."""

import errno
import os
import sys
from collections.abc import Sequence

from hf_stable import __version__, garbage
from hf_stable.background import is_work_left
from hf_stable.cli import streams
from hf_stable.cli.commands import COMMANDS
from hf_stable.cli.parsers import parse
from hf_stable.errors import DivergedError, UserError

# Without it, the order of MKL's sums depends on memory alignment, so that a resumed run could
# differ in the last bits. MKL reads the variable at its first product; processes inherit it.
os.environ.setdefault("MKL_CBWR", "AUTO")

# The system names no file for these errors.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code (listed in `--help`); errors go to stderr.

    Args:
        arguments: Arguments of the command; those of the process unless given. Only in the latter
            case are the process's streams prepared.

    Returns:
        Exit code.
    """
    if arguments is None:
        streams.prepare()
        garbage.defer()
        arguments = sys.argv[1:]
    if not sys.stderr.isatty():  # a log gets plain lines from the libraries too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        parsed = parse(__version__, arguments)
        status = COMMANDS[parsed.subcommand](parsed)
        sys.stdout.flush()
    except (UserError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, DivergedError) else 2
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        what = error.filename or "a file could not be written"
        print(f"error: {what}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; the same command resumes from the newest checkpoint"
        print("interrupted" + (more if "train" in arguments[:1] else ""), file=sys.stderr)
        if is_work_left():
            sys.stdout.flush()
            os._exit(130)
        return 130  # EXIT_INTERRUPTED, whose module would slow down help
    return status or 0
