"""Any text file -> its documents, each a list of paragraphs.

    for paragraphs in documents(Path("my.txt")): ...

SHAPES are the ways to separate a text's documents; a line of JSON is always one document. Nothing
is unpacked to the disk, and at most LONGEST bytes of a document are held at a time.
"""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from functools import partial
from itertools import chain, groupby
from pathlib import Path

from common import InputError, reading

LONGEST = 1 << 24           # bytes of a document or line that are held at a time
SHAPES = ("blank-lines", "lines", "files")
JSON = "lines of JSON"
# How a file's name ends, and its documents unless a shape is asked for. A .tar holds .txt files.
KINDS = {".txt": "blank-lines", ".txt.gz": "blank-lines", ".jsonl": JSON, ".jsonl.gz": JSON,
         ".json.gz": JSON, ".tar": "files", ".tar.xz": "files", ".md": "files", ".json": JSON}
ABOUT = (".md", ".json")    # corpus_files skips these in a folder that has other text
STOPS = ".!?…。！？।॥۔؟"


def corpus_files(paths):
    """Files and folders -> corpus files; of a folder, sorted, those whose ends KINDS knows.
    Raises InputError for a path without any."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in inside if file.is_file() and end_of(file)]
        if not found:
            what = "no text found" if path.exists() else "is missing"
            raise InputError(f"{path}: {what}; give files, or folders of files, that end in "
                             f"{', '.join(KINDS)} (of parquet, pandas makes .jsonl)")
        files += [file for file in found if end_of(file) not in ABOUT] or found
    return files


def unread_files(paths, files):
    """The names of what else is in the folders among the paths."""
    inside = chain.from_iterable(Path(path).rglob("*") for path in paths)
    return sorted(file.name for file in {*filter(Path.is_file, inside)} - {*files})


def ends_fingerprint(files):
    """sha256 over each file's size and its first and last megabyte."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            whole.update(b"%d " % size + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            whole.update(file.read())
    return whole.hexdigest()


def end_of(path):
    """Which of KINDS a file's name ends in, in capitals or not; "" if in none."""
    return next((end for end in KINDS if path.name.lower().endswith(end)), "")


def shape_of(path, shape=""):
    """What parts a file's documents, if `shape` is asked for: one of SHAPES, or JSON."""
    kind = KINDS[end_of(path)]
    return kind if kind == JSON else shape or kind


def documents(path, counts=None, shape="", field=""):
    """Yield the documents of one corpus file as lists of paragraphs.

    Text: shape_of() parts it. A line is a paragraph, unless the lines are wrapped: see _wrapped.
    JSON: `field` of a line, or `paragraphs` or `text`: a list, or a text with such lines.
    .tar(.xz): OpenWebText's, .txt files, or .xz files that each are a tar of them.
    a file "It rained.\\nWe left.\\n\\nI sat." -> ["It rained.", "We left."], ["I sat."]
    counts: a Counter, receives "bytes", "broken UTF-8", lines that U+FFFD had to mend, "texts of
    wrapped lines", and "long documents parted", the parts by LONGEST. A null text is an empty one.
    Raises InputError for damage, and for a line that is not a document.
    """
    counts, kind = Counter() if counts is None else counts, shape_of(path, shape)
    with reading(path, "readable text"), open(path, "rb", 1 << 16) as file:
        content = gzip.open(file) if end_of(path).endswith(".gz") else file
        if ".tar" in end_of(path):
            found = _read_tar(content, path, kind, counts)
        elif kind == JSON:
            found = _read_json(content, path, field, counts)
        else:
            found = _read_text(content, kind, counts)
        for paragraphs in found:
            raw = [p.encode("utf-8", "replace") for p in paragraphs]    # JSON's lone surrogates
            counts["bytes"] += sum(map(len, raw))
            yield [p.decode() for p in raw]


def _decode(raw, counts):
    text = raw.decode("utf-8-sig", errors="replace")
    counts["broken UTF-8"] += "\0" in text or "\ufffd" in text and "\ufffd".encode() not in raw
    return text.replace("\0", "\ufffd")


def _begin(file):
    """A file, and its first 64 KiB as text. Raises ValueError for UTF-16."""
    file = io.BufferedReader(file, 1 << 16)         # a packed file alone would show less
    start = file.peek(1 << 16)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or 4 * start.count(0) > len(start):
        raise ValueError("UTF-16, or zeros; make it UTF-8: iconv -f UTF-16 -t UTF-8")
    return file, start.decode("utf-8", errors="replace")


def _wrapped(text):
    """Are lines broken within sentences? Then there are stops, but few of them at the lines' ends.
    "The cat\nsat. It\nran." -> True; "the cat sat\nit ran", "It sat.\nIt ran." -> False"""
    lines = [line.strip() for line in text.split("\n")]
    before_others = [line for line, following in zip(lines, lines[1:]) if line and following]
    ending = sum(not {*STOPS}.isdisjoint(line[-3:]) for line in before_others)    # ." too
    stops = len(re.findall(rf"[{STOPS}]\s", text + "\n"))
    return 2 * ending < len(before_others) < 8 * stops


def _paragraphs(lines, wrapped):
    """Stripped lines -> paragraphs. In a wrapped text lines between blank ones are one paragraph,
    if in most there is no place for the next one's first word: not in lists, verse, headings."""
    for block in (list(block) for filled, block in groupby(lines, bool) if filled):
        width = max(map(len, block))
        full = sum(len(line) + 1 + len(following.split()[0]) > width
                   for line, following in zip(block, block[1:]))
        joined = wrapped and 2 * full > len(block) - 1
        yield from [" ".join(block)] if joined else block


def _read_text(file, shape, counts):
    file, start = _begin(file)
    wrapped, lines, size = _wrapped(start), [], 0
    counts["texts of wrapped lines"] += wrapped
    for raw in chain(iter(partial(file.readline, LONGEST), b""), [b""]):
        lines.append(_decode(raw, counts).strip())
        size += len(raw)
        parted = size >= LONGEST
        counts["long documents parted"] += parted
        ends = shape == "lines" or shape == "blank-lines" and not lines[-1]
        if parted or ends or not raw:
            if any(lines):
                yield list(_paragraphs(lines, wrapped))
            lines, size = [], 0


def _read_json(file, path, field, counts):
    names = [field] if field else ["paragraphs", "text"]
    file, _ = _begin(file)
    for number, raw in enumerate(iter(partial(file.readline, LONGEST), b""), 1):
        with reading(f"{path}, line {number}", "a document", remedy="mend or drop it"):
            if len(raw) == LONGEST:
                raise ValueError(f"{LONGEST:,} bytes or more; give a document a line")
            line = _decode(raw, counts)
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict):
                raise TypeError("not an object; give one a line, as jq -c '.[]' writes an array's")
            given = [record[name] for name in names if name in record]
            if not given:
                raise LookupError(f"no {' or '.join(names)}; choose --field of {', '.join(record)}")
            texts = next((value for value in given if value is not None), "")
            if isinstance(texts, str):
                wrapped, lines = _wrapped(texts), [line.strip() for line in texts.split("\n")]
                counts["texts of wrapped lines"] += wrapped
                texts = list(_paragraphs(lines, wrapped))
            if not isinstance(texts, list) or not all(isinstance(p, str) for p in texts):
                raise TypeError(f"{' or '.join(names)} must be a text or a list of texts")
        yield texts


class Header(tarfile.TarInfo):
    """A member's header. A damaged one is not the archive's end, and one that is read whole, such
    as a long name, is short."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        """As TarInfo's; raises ReadError."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if header.size > 1 << 20 and not header.isfile():
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _read_tar(file, where, shape, counts):
    known = False
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            content, name = archive.extractfile(member), f"{where}, {member.name}"
            end = Path(member.name.lower()).suffix
            known |= end in (".xz", ".txt")
            if end == ".xz":
                with reading(name, "a tar of text"):
                    yield from _read_tar(content, name, shape, counts)
            elif end == ".txt":
                yield from _read_text(content, shape, counts)
            else:
                counts["files of another kind, not read"] += 1
    if not known:
        raise ValueError("no .txt inside, and no .xz tar of .txt")
