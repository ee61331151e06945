"""Any table of text (CSV, TSV, JSON) -> the values of the columns that you name, row by row.

    for where, values in read_table("mine.csv", ("label", "text"), header=True):
        ...                                     # ("mine.csv, line 2", ["1", "It works."])
"""

import csv
import io
import json
import math
import pickle
import pickletools
import re
from collections import Counter
from itertools import chain, product
from pathlib import Path

from common import InputError, reading

csv.field_size_limit(1 << 27)           # characters of a text
ENCODING = "mend it, or give --encoding, such as cp1252, utf-16 or utf-16-le"
TABLES = (".csv", ".tsv", ".jsonl", ".json")        # with named columns
SEPARATOR = re.compile(r"\A\ufeff?sep=.(?=\r?\n)")      # what Excel may write above the header
ALONE = "\x1f"                          # the delimiter of one column: no text has it
# How quotes may be written: what is between those around a text, and csv.reader's options.
QUOTES = {"quotes around texts": (r'[^"]*+(?:""[^"]*+)*+', {}),
          "a backslash before quotes": (r'(?:[^"\\]|""|\\[\s\S])*+', {"escapechar": "\\"}),
          "quotes as characters": (r"(?!)", {"quoting": csv.QUOTE_NONE})}


def read_table(path, columns, header=None, encoding="utf-8-sig", say=lambda line: None):
    """Yield the columns of a file's rows: file and line, [a text of each column]; None if ragged.
    header: whether a user's table begins with its columns' names, or None for a released set, read
    as it is known to be written. How a user's is read is said. Raises InputError if it cannot be
    read as its name ends."""
    path = Path(path)
    read = reader_of(path, columns, header)
    with reading(path, "a whole table", remedy=ENCODING):
        for line, values in read(path, columns, header, encoding, say):
            yield f"{path}, line {line}", values


def reader_of(path, columns, header):
    """The function of FORMATS that reads a table. Raises InputError for a user's table without
    names for its columns."""
    known = FORMATS if header is None else TABLES if len(columns) > 1 else (*TABLES, ".txt")
    if path.suffix.lower() not in known:
        raise InputError(f"{path}: give {', '.join(filter(None, known))}")
    return FORMATS[path.suffix.lower()]


def text_of(path, encoding):
    """A file's text. Raises InputError with the first byte and line that are not of the encoding,
    such as UTF-16's zeros in UTF-8."""
    content = path.read_bytes()
    try:
        text = content.decode(encoding)
        if "\0" not in text:
            return text.removeprefix("\ufeff")
        start = content.index(0)
    except UnicodeDecodeError as error:
        start = error.start
    line = content.count(b"\n", 0, start) + 1
    raise InputError(f"{path}, line {line}: byte {content[start]:#04x} is not "
                     f"{encoding.removesuffix('-sig')}: {ENCODING}")


def lacking(path, columns, names):
    """The InputError for a table without the columns, or with one of them twice."""
    twice = [name for name in columns if names.count(name) > 1]
    if not names or twice:
        return InputError(f"{path} {f'has the column {twice[0]} twice' if twice else 'is empty'}")
    header = ", or give --no-header" * (not path.suffix.lower().startswith(".json"))
    return InputError(f"{path} has the columns {', '.join(names)}, and not all of "
                      f"{', '.join(columns)}: name its columns{header}")


def check_header(path, columns, header, encoding):
    """Raise InputError for a user's table of another format, or whose header lacks a column; no
    row is read."""
    path = Path(path)
    read = reader_of(path, columns, header)
    with reading(path, "a table", remedy=ENCODING), \
            open(path, encoding=encoding, errors="replace") as file:
        if header and read is _csv_rows:
            start = SEPARATOR.sub("", file.read(1 << 16)).removeprefix("\ufeff")
            dialect(path, start.lstrip("\n").partition("\n")[0], columns, True)


def dialect(path, text, columns, header):
    """How a user's table is written -> the text for csv.reader, its options, a line to print.
    The first row has the columns or, without a header, as many; no row has more, all have as many,
    or most. Raises InputError unless one way of writing explains the text."""
    def fits(first, delimiter):
        named = all(first.count(x) == 1 for x in columns) if header else len(first) == len(columns)
        return named and (len(first) > 1) == (delimiter != ALONE)
    ways, names = [], []
    line = text.lstrip("\r\n").partition("\n")[0] if header else text
    delimiters = [mark for mark in ",\t;|" if mark in line] + [ALONE]
    for delimiter, quotes in product(delimiters, QUOTES if '\\"' in text else [*QUOTES][::2]):
        closed, plain, how = unquote(text, delimiter, quotes)
        lines = csv.reader(io.StringIO(plain, newline=""), strict=True, **how)
        rows, first, widths = filter(None, lines), [], Counter()
        try:
            first = [name.strip('" ') for name in next(rows, [])]
            widths.update(map(len, rows) if fits(first, delimiter) else ())
        except csv.Error:
            widths[math.inf] += 1
        names = max(names, first, key=len)
        if fits(first, delimiter):
            n, whole = widths.total(), widths[len(first)]
            score = max(widths, default=0) <= len(first), whole == n, whole < n and 2 * whole - n
            said = (f"{n + (not header):,} rows in {lines.line_num:,} lines; columns "
                    f"{', '.join(first if header else columns)}"
                    + f"; delimiter {delimiter!r}" * (delimiter != ALONE))
            ways.append((closed, score, plain, how, said, f"; {quotes}" * ('"' in text)))
    if not ways:
        raise lacking(path, columns, names)
    # Most texts decide how a delimiter's quotes are written: one bad row changes nothing.
    usual = {way[3]["delimiter"]: way for way in sorted(ways, key=lambda way: way[:2])}
    _, score, plain, how, said, quotes = max(usual.values(), key=lambda way: way[1])
    found = sorted({way[4] for way in ways if way[1] == score and score[1]})
    if how["delimiter"] != ALONE and len(found) > 1:
        raise InputError(f"{path} can be read as {', or as '.join(found)}: write it as .jsonl")
    return plain, how, f"{path}: {said}{quotes}"


def unquote(text, delimiter, quotes):
    """The share of the texts that begin with a quote and close as they should; the text, without
    spaces after closing quotes, and options, for csv.reader."""
    inside, how = QUOTES[quotes]
    ends = f"{re.escape(delimiter)}\r\n"
    field = re.compile(rf'((?:\A|[{ends}]) *)(?:("{inside}") *(?=[{ends}]|\Z)|("[^\r\n]*))')
    closed = [match[2] is not None for match in field.finditer(text)]
    share = sum(closed) / max(len(closed), 1)
    share = 0.49 if "quoting" in how else share         # characters, if most do not close
    plain = field.sub(r"\1\2\3", text)
    if "escapechar" in how:
        others = re.search(r'(?<!\\)"', field.sub("", text)) is not None
        share = (share if closed else not others) - others / 1e6
        # csv.reader drops each backslash that is not doubled.
        plain = re.sub(r'(\\["\\])|\\', lambda match: match[1] or r"\\", plain)
    return share, plain, {"delimiter": delimiter, "skipinitialspace": True, **how}


def _csv_rows(path, columns, header, encoding, say):
    """Under a header with the columns' names, or without one, in their order."""
    text, own = text_of(path, encoding), header is not None
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    if own:
        text = SEPARATOR.sub("", text)
        text, how, said = dialect(path, text, columns, header)
        say(said)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, **how)
    try:
        first = next(filter(None, lines), [])
        names, rows = list(columns), chain(filter(None, [first]), lines)
        if header or not own and set(columns) <= set(first):
            names, rows = [name.strip('" ') for name in first], lines
        places = [names.index(name) for name in columns]
        for line in rows:
            if own and len(line) > len(names):
                raise csv.Error(f"{len(line)} columns, not {len(names)}")
            whole = len(line) > max(places) if own else len(line) == len(names)
            yield lines.line_num, [line[place] for place in places] if whole else None
    except csv.Error as error:
        found = str(error).replace(ALONE, "end of line")
        raise InputError(f"{path}, line {lines.line_num}: {found}: put quotes around texts, and "
                         "double those inside") from None


def _jsonl_rows(path, columns, header, encoding, say):
    """A JSON object a line, or an array of objects; values are texts, numbers, true and false."""
    text = text_of(path, encoding)
    lines, checked = io.StringIO(text, newline=None), header is None
    if not checked and text.lstrip().startswith("["):
        lines = map(json.dumps, json.loads(text))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f"{path}, line {number}", "an object of texts", remedy="mend or drop it"):
            record = {**json.loads(line, parse_constant=lambda name: None)}     # NaN is no text
            values = [record.get(name) for name in columns]
        if not checked and not set(columns) <= set(record):
            raise lacking(path, columns, [*record])
        checked = True                  # the first object's names
        whole = all(isinstance(value, str | int | float) for value in values)
        values = list(map(str, values))
        half = re.search("[\ud800-\udfff]", "".join(values))    # of a pair of surrogates: no text
        yield number, values if whole and not half else None


def _txt_rows(path, columns, header, encoding, say):
    """A text a line; of a released set text TAB label."""
    for number, line in enumerate(io.StringIO(text_of(path, encoding), newline=None), 1):
        values = line.rstrip("\n").rsplit("\t", len(columns) - 1)[::-1]
        yield number, values if len(values) == len(columns) else None


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, texts and numbers only: nothing that a file names is imported or run."""

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, code that is not run here")


def _pickle_rows(path, columns, header, encoding, say):
    """PERL's (texts, labels)."""
    content = path.read_bytes()
    for opcode, argument, _ in pickletools.genops(content):     # no count exceeds the file
        if opcode.name.endswith("PUT") and (argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it has no {argument:,} values")
    texts, labels = PlainUnpickler(io.BytesIO(content)).load()
    "".join(texts).encode()         # half a pair of surrogates is no text
    for number, (label, text) in enumerate(zip(labels, texts, strict=True), 1):
        if type(label) is not int:
            raise TypeError(f"label {number} is no integer")
        yield number, [str(label), text]


FORMATS = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _jsonl_rows,
           ".txt": _txt_rows, "": _pickle_rows}
