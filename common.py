"""What every file needs: errors, files, ranks, devices, settings -> command line."""

import argparse
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import tarfile
import zipfile
import zlib
from dataclasses import field, fields
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed
from tqdm import tqdm



class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, and what to do about it, in one
    line of bounded length, whatever stands in the files that it quotes."""

    def __init__(self, message):
        line = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(line if len(line) < 4000 else f"{line[:2000]} ... {line[-1900:]}")


def read_json(path):
    """What a JSON file holds. InputError if it is none, is too deep, or has 64 MB."""
    try:
        if path.stat().st_size >= 1 << 26:
            raise ValueError("it is too large")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): fetch it again") from None


def knob(default, source, zero=False, most=1e30):
    """A dataclass field whose meaning and source the command line shows as its help. Its numbers
    are above 0, or `zero` is allowed, too, and at most `most`."""
    return field(default=default, metadata={"help": source, "zero": zero, "most": most})

TINY = Path(__file__).resolve().parent / "tiny"
# What is raised for an archive that is not whole.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, gzip.BadGzipFile,
          zipfile.BadZipFile)


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


# --------------------------------------------------------------------------- several processes
class Ranks(NamedTuple):
    """The processes that share a run's work, as torchrun starts them; without it this one alone.
    All call the same methods in the same order. patient: a process group whose barrier may take
    hours; the others give up after torch.distributed's time limit, with an InputError."""
    rank: int = 0
    world: int = 1
    patient: object = None

    def share(self, items):
        """This rank's of the items: every world-th one."""
        return islice(items, self.rank, None, self.world)

    def all_sum(self, *tensors):
        """Each tensor's sum over the ranks, added up in float64."""
        if self.world == 1:
            return tensors
        total = torch.cat([x.detach().double().flatten() for x in tensors])
        self._together(distributed.all_reduce, total)
        parts = total.split([x.numel() for x in tensors])
        return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors)]

    def gather(self, value):
        """What each rank calls this with, in their order."""
        values = [value] * self.world
        if self.world > 1:
            self._together(distributed.all_gather_object, values, value)
        return values

    def agree(self, value):
        """Whether all call this with the same."""
        return len(set(self.gather(value))) == 1

    def wait(self):
        """Until all have come here, however long one of them works alone."""
        if self.world > 1:
            self._together(distributed.barrier, self.patient)

    def _together(self, function, *arguments):
        try:
            function(*arguments)
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: another rank ended or hangs, see what it said "
                             f"({str(error).strip().splitlines()[0].split('. ')[0]})") from None


SOLO = Ranks()


# --------------------------------------------------------------------------- files
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


def fingerprint(files):
    """sha256 over the files' contents, in this order."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


LONGEST = 10_000        # vectors of a prompt: a file may claim any number without holding them


def bar(items, ranks, **how):
    """A progress bar over items, of the first rank alone."""
    return tqdm(items, leave=False, dynamic_ncols=True, disable=True if ranks.rank else None, **how)


def read_run(folder):
    """run.json of a folder -> dict. Raises InputError if train.py did not make the folder."""
    try:
        values = read_json(folder / "run.json")
        values["training"] | values["method"] | values.get("made_of", {}), values["finished"]
        values.get("model", "") + "", (values["ended"] or 0) + 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no run ({error!r}): name a folder that train.py made, "
                         "such as runs/tiny-1") from None
    return values


def read_log(folder):
    """Yield the lines of a run's log.jsonl as (bytes, {name: value}), but not a last one that a
    kill tore or that is still on its way. InputError for other damage."""
    path = folder / "log.jsonl"
    for number, line in enumerate(path.read_bytes().splitlines(True) if path.exists() else [], 1):
        if line.endswith(b"\n"):
            try:
                entry = json.loads(line)
                entry["step"] + 0
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: no line of a run's log ({error!r}): drop "
                                 "it") from None
            yield line, entry


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
GIB = 2 ** 30


# ------------------------------------------------------------------- devices, ranks, PEFT, pictures

def pick_device(name):
    """auto, cpu, cuda, cuda:1, ... -> torch.device; a GPU becomes the current one. Raises
    InputError if it is not there. Each of torchrun's processes on a machine takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: choose auto, cpu, cuda or a numbered one, as cuda:1")
    try:
        device = torch.empty(1, device=name).device             # with its number
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not to be had here ({str(error).splitlines()[0]}): "
                         "try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def join_ranks(device):
    """The Ranks that torchrun started, or SOLO. Only the first one's stdout is kept."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return SOLO
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                   timeout=timedelta(minutes=30))
    if rank:
        sys.stdout = open(os.devnull, "w")
    return Ranks(rank, world, distributed.new_group(backend="gloo", timeout=timedelta(days=7)))


def run_script(main, stopped):
    """End this process with main(arguments)'s status. What a user got wrong, and a Ctrl-C, is one
    line on stderr and no traceback. What the terminal's encoding lacks is escaped."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if broken := [word for word in sys.argv[1:] if re.search("[\ud800-\udfff]", word)]:
            raise InputError(f"{broken} are not UTF-8: rename those files or folders")
        sys.exit(main(sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
