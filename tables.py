"""Any table of text (CSV, TSV, JSON) -> the values of the columns that you name, row by row.

    for where, values in read_table("mine.csv", ("label", "text"), header=True):
        ...                                     # ("mine.csv, line 2", ["1", "It works."])
"""

import csv
import io
import json
import pickle
import pickletools
from itertools import product
from pathlib import Path

from common import InputError, reading

csv.field_size_limit(1 << 27)           # characters of a text
ENCODING = "mend it, or give --encoding, such as cp1252 or utf-16"


def read_table(path, columns, header=None, encoding="utf-8-sig"):
    """Yield the columns of a file's rows: file and line, [a text of each column]; None if ragged.
    header: whether a user's table begins with its columns' names, or None for a released set, read
    as it is known to be written. Raises InputError if the file cannot be read as its name ends."""
    path = Path(path)
    read = FORMATS.get(path.suffix.lower())
    if not read or read is _pickle_rows and header is not None:
        raise InputError(f"{path}: give {', '.join(filter(None, FORMATS))}")
    with reading(path, "a well quoted table", remedy="mend it, or fetch it again"):
        for line, values in read(path, columns, header, encoding):
            yield f"{path}, line {line}", values


def text_of(path, encoding):
    """A file's text. Raises InputError with the first byte and line that are not of the encoding.
    """
    content = path.read_bytes()
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: byte {content[error.start]:#04x} is not "
                         f"{encoding.removesuffix('-sig')}: {ENCODING}") from None


def check_columns(path, columns, names):
    """Raise InputError unless each of the columns is once among a table's names."""
    if any(list(names).count(name) != 1 for name in columns):
        raise InputError(f"{path} has the columns {', '.join(names)}, and not all of "
                         f"{', '.join(columns)}: name its columns, or give --no-header")


def header_line(path, columns, header, encoding):
    """What a user's labeled table has -> a line to print. Raises InputError for another format, or
    if its header lacks a column; no row is read."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".json"):
        raise InputError(f"{path}: give a .csv, .tsv, .jsonl or .json, which has named columns")
    with reading(path, "a table"), open(path, encoding=encoding, errors="replace") as file:
        if not header or kind.startswith(".json"):
            return f"{path}: columns {', '.join(columns)}"
        line = next(filter(str.strip, file), "")
        if "\ufffd" in line:
            raise InputError(f"{path}, line 1, is not {encoding.removesuffix('-sig')}: {ENCODING}")
        how, names = dialect(path, line, columns, True)
        check_columns(path, columns, names)
    return f"{path}: columns {', '.join(names)}; delimiter {how['delimiter']!r}"


def dialect(path, text, columns, header):
    """How a table is written -> csv.reader's options, its first row. Of a user's table the first
    row has the columns or, without a header, as many, and all rows are as wide, or most. A quote
    may be a character, as in GLUE's .tsv files: if so, more rows are whole."""
    known = ("\t", csv.QUOTE_NONE) if path.suffix == ".tsv" else (",", csv.QUOTE_MINIMAL)
    both, ways = (csv.QUOTE_MINIMAL, csv.QUOTE_NONE), []
    for delimiter, quoting in [known] if header is None else product(",\t;|", both):
        how = {"delimiter": delimiter, "quoting": quoting, "skipinitialspace": header is not None}
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, **how)
        first, score, faults = [], 0, 1
        try:
            first = [name.strip() for name in next(filter(None, lines), [])]
            for line in lines:
                whole = len(line) == len(first)     # alone in its row, a quoted text has lines
                score += 1 + (len(line) == 1) * line[0].count("\n") if whole else -1
                faults += not whole
            faults -= 1
        except csv.Error:               # read_table() says so, unless another way reads more
            pass
        fits = set(columns) <= set(first) if header else len(first) == len(columns)
        ways.append((fits, not faults, score, how, first))
    fits, *_, how, first = max(ways, key=lambda way: way[:3])
    return how, first if fits else max((way[-1] for way in ways), key=len)


def _csv_rows(path, columns, header, encoding):
    """Under a header with the columns' names, or without one, in their order."""
    text = text_of(path, encoding)
    how, names = dialect(path, text, columns, header)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, **how)
    if header:
        check_columns(path, columns, names)
    if header or header is None and set(columns) <= set(names):
        next(filter(None, lines))
    else:
        names = list(columns)
    places = [names.index(name) for name in columns]
    try:
        for line in lines:
            if header is not None and len(line) > len(names):
                raise csv.Error(f"{len(line)} columns, not {len(names)}")
            whole = len(line) == len(names)
            yield lines.line_num, [line[place] for place in places] if whole else None
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.line_num}: {error}: put quotes around texts, and "
                         "double those inside") from None


def _jsonl_rows(path, columns, header, encoding):
    """A JSON object a line, or an array of objects; values are texts, numbers, true and false."""
    text = text_of(path, encoding)
    lines = io.StringIO(text, newline="\n")
    if header is not None and text.startswith("["):
        lines = map(json.dumps, json.loads(text))
    for number, line in enumerate(lines, 1):
        record = None
        try:
            record = json.loads(line, parse_constant=lambda name: None)     # NaN is no text
            values = [record[name] for name in columns]
            "".join(map(str, values)).encode()  # half a pair of surrogates is no text
            whole = all(isinstance(value, str | int | float) for value in values)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if header and isinstance(record, dict):     # the first object's names
            check_columns(path, columns, record)
            header = False
        if line.strip():
            yield number, list(map(str, values)) if whole else None


def _txt_rows(path, columns, header, encoding):
    """A text a line; of a released set text TAB label."""
    if header is not None and len(columns) > 1:
        raise InputError(f"{path}: a .txt is a text a line, no {columns[0]}: give a .csv")
    for number, line in enumerate(io.StringIO(text_of(path, encoding), newline="\n"), 1):
        values = line.rstrip("\r\n").rsplit("\t", len(columns) - 1)[::-1]
        yield number, values if len(values) == len(columns) else None


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, texts and numbers only: nothing that a file names is imported or run."""

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, code that is not run here")


def _pickle_rows(path, columns, header, encoding):
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
