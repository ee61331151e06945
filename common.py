"""What every script needs, and nothing about SUPMER: errors, files, random streams, devices."""

import glob
import hashlib
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tiny"     # the embedded model
GIB = 2 ** 30
# The numbers of the random streams are part of every result.
STREAMS = {
    "task": 1, "partner": 2, "k-means sample": 2, "validation": 3, "labeled": 4,    # meta-training
    "prompt": 9, "normal prompt": 12, "prefix": 13,                                 # starts
    "batches": 11, "demonstrations": 15, "order": 16,               # eval.py; baselines.py
    "world T5": 17, "world task": 18, "world tuning": 19}           # world.py


def rng(seed, step, i, stream):
    """A numpy Generator that is a pure function of its arguments; stream: a name of STREAMS."""
    return np.random.default_rng((seed, step, i, STREAMS[stream]))


class InputError(ValueError):
    """The user's input is wrong. The message says in one line what is wrong and what to do."""

    def __init__(self, message):
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) < 4000 else f"{line[:2000]} ... {line[-1900:]}")


@contextmanager
def reading(path, what, remedy="fetch it again", damage=Exception):
    """Turn what a parser raises for a file that is not `what` into one InputError. Keep the block
    to the parsing of that one file: a bug of ours must stay a traceback."""
    try:
        yield
        return
    except InputError as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
    except FileNotFoundError:
        message = f"{path} is missing: it should be {what}"
    except damage as error:         # each parser raises its own kinds
        message = f"{path} is not {what} ({first_line(error)}): {remedy}"
    raise InputError(message)


def first_line(error):
    """The first line of an exception's message, or the name of its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def read_json(path, remedy="fetch it again"):
    """The value of a JSON file of fewer than 64 MiB. Raises InputError."""
    with reading(path, "JSON", remedy):
        if path.stat().st_size >= 1 << 26:
            raise ValueError("it is too large")
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def whole_file(path):
    """Open a binary file that replaces `path` when the block ends: whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_torn(folder, name=""):
    """Remove what a killed process left of whole_file() in a folder, or of one file in it."""
    for torn in folder.glob(f".{glob.escape(name)}*.tmp"):
        torn.unlink(missing_ok=True)


@contextmanager
def one_process(path, busy=None):
    """Hold a folder's or file's lock. If another process has it: InputError, or busy() and wait."""
    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if busy is None:
            raise InputError(f"another process works on {path}: wait, or stop it") from None
        busy()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fingerprint(files):
    """sha256 over the files' contents, in this order."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def text_sha256(text):
    """hashlib's sha256 of a text in UTF-8; a lone surrogate counts as "?"."""
    return hashlib.sha256(text.encode("utf-8", "replace"))


def pick_device(name):
    """auto, cpu, cuda, cuda:1 -> torch.device. Under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with reading(f"--device {name}", "available", "try --device cpu"):
        torch.zeros(1, device=name).item()
        if name != "cpu":
            torch.cuda.set_device(name)
    return torch.device(name)


def bar(items=None, hidden=False, **how):
    """A progress bar over items, on stderr, unless it is hidden."""
    return tqdm(items, leave=False, dynamic_ncols=True, disable=hidden or None, **how)


def interrupt_after(minutes):
    """Raise KeyboardInterrupt after so many minutes, as Ctrl-C does; 0: never."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def run_script(main, stopped):
    """Exit with main(arguments)'s status. A user's mistake is one line and status 2; Ctrl-C is the
    line `stopped` and status 130; a bug of ours is a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")       # for terminals that lack a sign
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
