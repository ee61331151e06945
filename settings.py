"""Settings as dataclasses: their command line, and what is printed of them.

    settings_parser(__doc__, [Method], {}).parse_args(["--steps", "9"])     # Namespace(steps=9)
"""

import argparse
import math
from collections import defaultdict
from dataclasses import field, fields
from functools import partial

from common import InputError


def knob(default, help, zero=False, choices=None, first=False):
    """A dataclass field that becomes an option. A number is above 0, with zero also 0.
    first: --help lists it first."""
    return field(default=default, metadata={"help": help, "zero": zero, "choices": choices,
                                            "first": first})


def number(kind, zero=False):
    """An argparse type: text -> a finite int or float above 0, with zero also 0."""
    def parse(text):
        value = kind(text)
        if not (0 < value < math.inf or zero and value == 0):
            raise argparse.ArgumentTypeError(f"{text} must be {'0 or more' if zero else 'above 0'}")
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
            how |= {"type": number(kind, about["zero"]), "metavar": "N"}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        shown = as_text(default)
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


def as_text(value):
    """A setting as the command line has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def show_settings(settings, whys, everything=False):
    """Print what is not the paper's, grouped by reason, or each setting with its meaning.
    settings: dataclasses; whys: {name: why it has another value}."""
    changed = defaultdict(list)
    for entry, value in ((x, getattr(part, x.name)) for part in settings for x in fields(part)):
        if everything:
            why = whys.get(entry.name, entry.metadata["help"])
            print(f"  {entry.name:17} {as_text(value):12} {why}")
        elif entry.name in whys:
            changed[whys[entry.name]].append(f"{entry.name} {as_text(value)}")
    if changed:
        print("settings other than the paper's:")
    for why, names in changed.items():
        print(f"  {', '.join(names)}: {why}")
