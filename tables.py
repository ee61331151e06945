"""Tables of text, as people have them: any file of rows -> the columns that are asked for.

    for where, values in read_table("mine.csv", ("label", "text")):
        ...                                     # ("mine.csv, line 2", ["1", "It works."])
"""

import csv
import io
import json
import pickle
import pickletools
from itertools import chain
from pathlib import Path

from common import InputError, reading

csv.field_size_limit(1 << 27)           # characters of a text


def read_table(path, columns, header="known", encoding="utf-8-sig"):
    """Yield the columns of a file's rows: file and line, [a text of each column]; None if ragged.
    A .csv `text,label`, `ok,1`; columns ("label", "text") -> ("my.csv, line 2", ["1", "ok"])
    header: "known", as the released sets are written, or own_task's, for which the delimiter is
    found. Raises InputError if the file cannot be read as its name's end says."""
    path = Path(path)
    read = FORMATS.get(path.suffix.lower())
    if not read:
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
        raise InputError(f"{path}, line {line}: byte {content[error.start]:#04x} is not {encoding}:"
                         " mend it, or give its encoding, such as cp1252 or utf-16") from None


def _csv_rows(path, columns, header, encoding):
    """Under a header with the columns' names, or without one, in their order."""
    text, tabs = text_of(path, encoding), path.suffix.lower() == ".tsv"
    how = {"delimiter": "\t" if tabs else ",",     # in GLUE's .tsv a quote is a character
           "quoting": csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL}
    if header != "known":
        how = _dialect(text, columns, header, how)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, **how)
    first = next(lines, [])
    named = header != "no" and set(columns) <= set(first)
    if header == "yes" and not named:
        raise InputError(f"{path} has the columns {', '.join(first)}, and not all of "
                         f"{', '.join(columns)}: name its columns; or say that it has no header")
    names = first if named else list(columns)
    places = [names.index(name) for name in columns]
    for line in lines if named or not first else chain([first], lines):
        whole = len(line) == len(names)
        yield lines.line_num, [line[place] for place in places] if whole else None


def _dialect(text, columns, header, usual):
    """How a user's table is written: the delimiter and quoting whose first row gives the columns,
    and with which most rows are as wide as the first; the usual ones before others."""
    fits = []
    for delimiter in (usual["delimiter"], *",;|\t"):
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            how = {"delimiter": delimiter, "quoting": quoting}
            try:
                lines = csv.reader(io.StringIO(text, newline=""), strict=True, **how)
                first = next(lines, [])
                widths = [len(line) for line in lines if line]
            except csv.Error:
                continue
            named = header != "no" and set(columns) <= set(first)
            if named or header != "yes" and len(first) == len(columns):
                fits.append((widths.count(len(first)) / max(1, len(widths)), how))
    return max(fits, key=lambda fit: fit[0], default=(0, usual))[1]


def _jsonl_rows(path, columns, header, encoding):
    """A JSON object a line; labels may be true, false and numbers, as Python writes them."""
    for number, line in enumerate(io.StringIO(text_of(path, encoding), newline="\n"), 1):
        try:
            record = json.loads(line)
            values = [record[name] for name in columns]
            "".join(map(str, values)).encode()  # half a pair of surrogates is no text
            whole = all(isinstance(value, str | int | float) for value in values)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if line.strip():
            yield number, list(map(str, values)) if whole else None


def _txt_rows(path, columns, header, encoding):
    """UCI's text TAB label; without a label a line is a text."""
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
