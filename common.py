"""What every script needs, and nothing about SUPMER: errors, files, processes, settings."""

import argparse
import csv
import glob
import hashlib
import json
import lzma
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import distributed
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tiny"     # the embedded model
GIB = 2 ** 30
# What the parsers of files from outside raise for a damaged file.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
          MemoryError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError, csv.Error,
          zipfile.BadZipFile, pickle.UnpicklingError, SafetensorError)
# The numbers of the random streams are part of every result.
STREAMS = {"task": 1, "partner": 2, "k-means sample": 2, "validation": 3, "labeled": 4,
           "prompt": 9, "batches": 11, "normal prompt": 12, "prefix": 13, "demonstrations": 15,
           "order": 16, "world T5": 17, "world task": 18, "world tuning": 19}


def rng(seed, step, i, stream):
    """A numpy Generator that is a pure function of its arguments; stream: a name of STREAMS."""
    return np.random.default_rng((seed, step, i, STREAMS[stream]))


class InputError(ValueError):
    """The user's input is wrong. The message says in one line what is wrong and what to do."""

    def __init__(self, message):
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) < 4000 else f"{line[:2000]} ... {line[-1900:]}")


@contextmanager
def reading(path, what, *more, remedy="fetch it again"):
    """Turn what a parser raises for a file that is not `what` into one InputError. Keep the block
    to the parsing of that one file: a bug of ours must stay a traceback. more: beyond DAMAGE."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{path} is missing: it should be {what}") from None
    except (*DAMAGE, *more) as error:
        raise InputError(f"{path} is not {what} ({first_line(error)}): {remedy}") from None


def first_line(error):
    """The first line of an exception's message, or the name of its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def read_json(path, most=1 << 26, remedy="fetch it again"):
    """The value of a JSON file of fewer than `most` bytes. Raises InputError."""
    with reading(path, "JSON", remedy=remedy):
        if path.stat().st_size >= most:
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


class Ranks(NamedTuple):
    """The processes of a run, as torchrun starts them: all call the same methods in one order."""
    rank: int = 0
    world: int = 1

    def share(self, items):
        """This rank's items: every world-th one."""
        return (item for i, item in enumerate(items) if i % self.world == self.rank)

    def map(self, function, items):
        """[function(item) for item in items]; their number changes no bit of it."""
        parts = self.gather([function(item) for item in self.share(items)])
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def gather(self, value):
        """The values of all ranks, in their order; also a barrier."""
        values = [value] * self.world
        try:
            if self.world > 1:
                distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: another rank stopped ({first_line(error)})"
                             ) from None
        return values


SOLO = Ranks()


def join_ranks(device):
    """The Ranks that torchrun started, or SOLO. Only the first rank prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return SOLO
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=7))  # rank 0 reads the corpus
    if rank:
        sys.stdout = open(os.devnull, "w")
    return Ranks(rank, world)


def pick_device(name):
    """auto, cpu, cuda, cuda:1 -> torch.device. Under torchrun each process takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with reading(f"--device {name}", "available", AssertionError, remedy="try --device cpu"):
        torch.zeros(1, device=name).item()
        if name != "cpu":
            torch.cuda.set_device(name)
    return torch.device(name)


def bar(items=None, ranks=SOLO, **how):
    """A progress bar over items, on stderr, of the first rank alone."""
    return tqdm(items, leave=False, dynamic_ncols=True, disable=True if ranks.rank else None, **how)


def knob(default, help, zero=False, most=1e30, choices=None, first=False):
    """A dataclass field that becomes an option; a number is above 0 (or 0 if `zero`), at most
    `most`. first: --help lists it first."""
    return field(default=default, metadata={"help": help, "zero": zero, "most": most,
                                            "choices": choices, "first": first})


def number(kind, zero, most):
    """An argparse type: text -> int or float, above 0 or, if `zero`, 0; at most `most`."""
    def parse(text):
        value = kind(text)
        if not (0 < value <= most or zero and value == 0):
            lowest = "0 or more" if zero else "above 0"
            raise argparse.ArgumentTypeError(f"{text} must be {lowest}, at most {most:,.6g}")
        return value
    parse.__name__ = kind.__name__      # argparse quotes it
    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are an InputError."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def settings_parser(description, classes, tiny):
    """A Parser with an option for each knob of the dataclasses; one that is not given is absent.
    tiny: {name: (value, why)}, the embedded model's values, which --help shows, too."""
    parser = Parser(description=description, allow_abbrev=False, usage="%(prog)s [options]",
                    formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=100))
    used_first, more = map(parser.add_argument_group, ("used first", "more"))
    for entry in (entry for cls in classes for entry in fields(cls)):
        default, about = entry.default, entry.metadata
        many = isinstance(default, tuple)
        kind = type(default[0] if many else default)
        how = {"type": kind, "choices": about["choices"], "nargs": "+" if many else None}
        if kind in (int, float):
            how |= {"type": number(kind, about["zero"], about["most"]), "metavar": "N"}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        shown = " ".join(map(str, default)) if many else str(default)
        if entry.name in tiny:
            shown += f"; tiny: {tiny[entry.name][0]}"
        (used_first if about["first"] else more).add_argument(
            "--" + entry.name.replace("_", "-"), default=argparse.SUPPRESS,
            help=f"{about['help']} [{shown}]".replace("%", "%%"), **how)
    return parser


def from_settings(cls, values):
    """The dataclass cls from those of {name: value} that are its fields; lists become tuples."""
    tuples = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return cls(**{entry.name: tuples[entry.name] for entry in fields(cls) if entry.name in tuples})


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
