"""What every script needs: errors, files, processes, devices, and settings on the command line.

Nothing here is about SUPMER. Start reading at supmer.py.

    with reading(path, "a prompt"):             # whatever a parser raises becomes one InputError
        tensors = load_file(path)
    with whole_file(path) as file:              # the file appears whole or not at all
        file.write(payload)
    rng(seed, step, i, "partner")               # a named random stream
    ranks.map(function, items)                  # share work between the processes of torchrun
"""

import argparse
import csv
import fcntl
import glob
import hashlib
import json
import lzma
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import field, fields
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import distributed
from tqdm import tqdm

TINY = Path(__file__).resolve().parent / "tiny"     # the embedded model
GIB = 2 ** 30


# ----------------------------------------------------------------------------- errors

class InputError(ValueError):
    """The user's input is wrong. The message says in one line what is wrong and what to do."""

    def __init__(self, message):
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) < 4000 else f"{line[:2000]} ... {line[-1900:]}")


# What the parsers of files from outside raise for a damaged file.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
          RecursionError, MemoryError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError,
          zipfile.BadZipFile, pickle.UnpicklingError, csv.Error, SafetensorError)


def first_line(error):
    """The first line of what an exception says, or its type's name."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@contextmanager
def reading(path, what, *more, remedy="fetch it again"):
    """Turn whatever a parser raises inside the block into one InputError about the file.

    what: what the file should be, such as "a prompt". more: exception types beyond DAMAGE.
    Put only the parsing of that one file into the block: a bug of ours must stay a traceback.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing: it should be {what}") from None
    except (*DAMAGE, *more) as error:
        raise InputError(f"{path} is not {what} ({first_line(error)}): {remedy}") from None


# ------------------------------------------------------------------------------ files

def read_json(path, most=1 << 26):
    """The value of a JSON file. Raises InputError for invalid JSON, and from `most` bytes on."""
    with reading(path, "JSON"):
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
    """Remove the temporary files that a killed process left in a folder, or those of one file.
    Hold the lock."""
    for torn in folder.glob(f".{glob.escape(name)}*.tmp"):
        torn.unlink(missing_ok=True)


@contextmanager
def one_process(path, busy=None):
    """Hold the lock of a folder or file. While another process holds it: InputError, or wait if
    busy() is given, which is called once."""
    from filelock import FileLock, Timeout
    lock = FileLock(path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if busy is None:
            raise InputError(f"another process works on {path}: wait for it, or stop it"
                             ) from None
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


# --------------------------------------------------------------------- random streams

# A stream keeps the draws of one (seed, step, i) apart. The numbers are part of every result.
STREAMS = {"task": 1, "partner": 2, "k-means sample": 2, "validation": 3, "labeled": 4,
           "prompt": 9, "batches": 11, "normal prompt": 12, "prefix": 13, "demonstrations": 15,
           "order": 16}


def rng(seed, step, i, stream):
    """A numpy Generator that is a pure function of its arguments; stream: a name of STREAMS."""
    return np.random.default_rng((seed, step, i, STREAMS[stream]))


# ------------------------------------------------------------------ several processes

class Ranks(NamedTuple):
    """The processes of a run, as torchrun starts them; alone without it. Every process calls the
    same methods in the same order. patient: a process group without a practical timeout."""
    rank: int = 0
    world: int = 1
    patient: object = None

    def share(self, items):
        """This rank's items: every world-th one."""
        return islice(items, self.rank, None, self.world)

    def map(self, function, items):
        """[function(item) for item in items], dealt out over the ranks, in the items' order.
        The number of ranks changes no bit: each result is computed by one rank alone."""
        parts = self.gather([function(item) for item in self.share(items)])
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def gather(self, value):
        """The values of all ranks, in their order."""
        values = [value] * self.world
        if self.world > 1:
            self._together(distributed.all_gather_object, values, value)
        return values

    def wait(self):
        """Barrier without a practical timeout."""
        if self.world > 1:
            self._together(distributed.barrier, self.patient)

    def _together(self, function, *arguments):
        try:
            function(*arguments)
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: another rank stopped or hangs, see its message "
                             f"({first_line(error).split('. ')[0]})") from None

    def all_sum(self, *tensors):        # TO GO: Ranks share tasks, see map()
        if self.world == 1:
            return tensors
        total = torch.cat([x.detach().double().flatten() for x in tensors])
        self._together(distributed.all_reduce, total)
        parts = total.split([x.numel() for x in tensors])
        return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors)]

    def agree(self, value):             # TO GO
        return len(set(self.gather(value))) == 1


SOLO = Ranks()


def join_ranks(device):
    """The Ranks that torchrun started, or SOLO. Only the first rank prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return SOLO
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(minutes=30))
    if rank:
        sys.stdout = open(os.devnull, "w")
    patient = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    return Ranks(rank, world, patient)


def pick_device(name):
    """auto, cpu, cuda, cuda:1, ... -> torch.device. Under torchrun each process on a machine takes
    its own GPU. Raises InputError if the device is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: choose auto, cpu, cuda or cuda:NUMBER")
    with reading(f"--device {name}", "available", AssertionError, remedy="try --device cpu"):
        device = torch.empty(1, device=name).device             # with its number
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def bar(items=None, ranks=SOLO, **how):
    """A progress bar over items, on stderr, of the first rank alone."""
    return tqdm(items, leave=False, dynamic_ncols=True, disable=True if ranks.rank else None, **how)


# ------------------------------------------------------------ settings -> command line

def knob(default, help, zero=False, most=1e30, choices=None, first=False):
    """A dataclass field that becomes an option of the command line.

    help: what it means, and its source. A number must be above 0, or 0 if `zero`, and at most
    `most`. first: --help lists it among the options that people use first.
    """
    return field(default=default, metadata={"help": help, "zero": zero, "most": most,
                                            "choices": choices, "first": first})


def number(kind, zero, most):
    """An argparse type: text -> int or float in a knob's range."""
    def parse(text):
        value = kind(text)
        if not (0 < value <= most or zero and value == 0):
            raise argparse.ArgumentTypeError(
                f"{text} must be {'0 or more' if zero else 'above 0'}, at most {most:,.6g}")
        return value
    parse.__name__ = kind.__name__      # argparse quotes it
    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are an InputError."""

    def error(self, message):
        """Raise InputError."""
        raise InputError(f"{message}; see --help")


def settings_parser(description, classes, tiny):
    """A Parser with one option for each knob of the dataclasses; options that are not given stay
    absent. tiny: {name: (value, why)}, the embedded model's values, for --help."""
    parser = Parser(description=description, allow_abbrev=False, usage="%(prog)s [options]",
                    formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=100))
    groups = {True: parser.add_argument_group("used first"), False: parser.add_argument_group(
        "more (what names no source is ours)")}
    for entry in (entry for cls in classes for entry in fields(cls)):
        many, about = isinstance(entry.default, tuple), entry.metadata
        kind = type(entry.default[0] if many else entry.default)
        if kind in (int, float):
            how = {"type": number(kind, about["zero"], about["most"]), "metavar": "N"}
        else:
            how = {"type": kind, "choices": about["choices"]}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            **how, "nargs": "+" if many else None}
        shown = " ".join(map(str, entry.default)) if many else entry.default
        if entry.name in tiny:
            shown = f"{shown}; tiny: {tiny[entry.name][0]}"
        groups[about["first"]].add_argument(
            "--" + entry.name.replace("_", "-"), default=argparse.SUPPRESS,
            help=f"{about['help']} [{shown}]".replace("%", "%%"), **how)
    return parser


def from_settings(cls, values):
    """The dataclass cls from those of {name: value} that are its fields; lists become tuples."""
    known = {entry.name for entry in fields(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value
                  for name, value in values.items() if name in known})


def run_script(main, stopped):
    """Exit with the status of main(arguments). A user's mistake is one line on stderr and status 2,
    Ctrl-C is the line `stopped` and status 130; a bug of ours is a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")       # for terminals that lack a sign
    try:
        sys.exit(main(sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------- TO GO: what nothing new may use

class Header(tarfile.TarInfo):
    """A member's header: a damaged one is no archive's end, and what is read whole because it is
    no file, such as a long name, is short."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """As TarInfo's; ReadError."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if header.size > 1 << 20 and not header.isfile():
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header



def atomic_write(path, write):
    """Make a file whole or not at all: write(binary file) fills a temporary one, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)        # now the new name is on the disk, too
    os.close(folder)



def sweep(folder):
    """Remove what atomic_write left in a folder when its process was killed."""
    for torn in folder.glob(".*.tmp"):
        try:
            os.kill(int(torn.name.split(".")[-2]), 0)
        except ProcessLookupError:
            torn.unlink(missing_ok=True)
        except (PermissionError, ValueError):       # of another user, who is at work; not ours
            pass



def lock(path, busy):
    """Make path this process's own, until the file returned is closed or the process dies: then the
    kernel gives it free. If another has it busy(its id) is called; unless that raises, wait."""
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        busy(file.read())
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file



LONGEST = 10_000        # vectors of a prompt: a file may claim any number without holding them



def one_line(parser):
    """An ArgumentParser, whose refusals are an InputError, with the valid options for unknown ones,
    in place of its usage."""
    def fail(message):
        if message.startswith("unrecognized"):
            options = re.findall(r"--[a-z-]+", parser.format_usage())
            message += f": the options are {', '.join(options)}"
        raise InputError(f"{message}; see --help")
    parser.error = fail
    return parser



def knob_parser(description, classes, tiny, choices):
    """An ArgumentParser with an option for each knob of the dataclasses; absent ones stay absent.
    Its help shows each one's source, default and tiny's value {name: (value, why)}; choices {name:
    values}. What it refuses is an InputError."""
    parser = one_line(argparse.ArgumentParser(
        description=description, allow_abbrev=False, epilog="What names no source is ours.",
        formatter_class=argparse.RawDescriptionHelpFormatter))
    for entry in (entry for cls in classes for entry in fields(cls)):
        many = isinstance(entry.default, tuple)
        kind = type(entry.default[0] if many else entry.default)
        shown = " ".join(map(str, entry.default)) if many else entry.default
        ours = f"; tiny: {tiny[entry.name][0]}, {tiny[entry.name][1]}" if entry.name in tiny else ""
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": kind, "nargs": "+" if many else None, "choices": choices.get(entry.name)}
        parser.add_argument(
            option(entry.name), default=argparse.SUPPRESS,
            help=f"{entry.metadata['help']} [{shown}{ours}]".replace("%", "%%"), **how)
    return parser



def option(name):
    """How a knob is spelled on the command line: steps_left -> --steps-left"""
    return "--" + name.replace("_", "-")



def check_knob(entry, value):
    """InputError unless a knob's value is of its default's type, and a number in its range; of a
    tuple each part, and none is empty."""
    several = isinstance(entry.default, tuple)
    kind = type(entry.default[0] if several else entry.default)
    zero, most = entry.metadata["zero"], entry.metadata["most"]
    if several and type(value) is not tuple:
        raise InputError(f"{option(entry.name)} {value!r}: it must be a list")
    for x in value if several else [value]:
        if type(x) is not kind:
            raise InputError(f"{option(entry.name)} {x!r}: it must be of type {kind.__name__}")
        if several and x == "":
            raise InputError(f"{option(entry.name)} '': it is empty")
        if kind in (int, float) and not ((x > 0 or x == 0 and zero) and x <= most):
            bound = "0 or more" if zero else "more than 0"
            raise InputError(f"{option(entry.name)} {x}: it must be {bound}, and {most:,.6g} at "
                             "most")

