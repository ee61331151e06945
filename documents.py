"""Any file of text, as people have them -> documents, as lists of paragraphs.

    for paragraphs in documents(path): ...

Nothing is unpacked to the disk, and no more than LONGEST bytes of a document are held at a time.
"""

import gzip
import json
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

from common import InputError, reading

LONGEST = 1 << 24           # bytes of a document or line that are held at a time


def corpus_files(paths):
    """Files and folders -> corpus files; of a folder, sorted, those whose ends READERS knows.
    Raises InputError for a path without any."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in inside if file.is_file() and file.name.endswith(tuple(READERS))]
        if not found:
            raise InputError(f"{path}: no text found; give files, or folders of files, that end in "
                             f"{', '.join(READERS)} (of parquet, pandas makes .jsonl)")
        files += found
    return files


def unread_files(paths, files):
    """The names of what else is in the folders among the paths."""
    inside = chain.from_iterable(Path(path).rglob("*") for path in paths)
    return sorted(file.name for file in {*filter(Path.is_file, inside)} - {*files})


def documents(path, counts=None):
    """Yield the documents of one corpus file as lists of paragraphs.

    .txt: blank lines part documents, one paragraph each. .jsonl(.gz), .json.gz (C4's): a document a
    line, with `paragraphs` (a list) or `text` (a paragraph a line). .tar(.xz): OpenWebText's, .txt
    documents, or .xz files that each are a tar of them. Nothing is unpacked to the disk.
    a file "It rained.\\nWe left.\\n\\nThe sun rose." -> ["It rained. We left."], ["The sun rose."]
    counts: a Counter, receives "bytes", "broken UTF-8", lines that U+FFFD had to mend, and "long
    documents parted", texts that LONGEST made two or more of.
    Raises InputError for damage, and for a line that is not a document.
    """
    counts = Counter() if counts is None else counts
    read = next(READERS[end] for end in READERS if path.name.endswith(end))
    with reading(path, "readable text"), open(path, "rb") as file:
        for paragraphs in read(file, path, counts):
            raw = [p.encode("utf-8", "replace") for p in paragraphs]    # JSON's lone surrogates
            counts["bytes"] += sum(map(len, raw))
            yield [p.decode() for p in raw]


def _decode(raw, counts):
    text = raw.decode("utf-8-sig", errors="replace")
    counts["broken UTF-8"] += "\0" in text or "\ufffd" in text and "\ufffd".encode() not in raw
    return text.replace("\0", "\ufffd")


def _read_txt(file, path, counts):
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("UTF-16; give UTF-8")
    lines, size = [], 0
    while raw := file.readline(LONGEST):
        line = _decode(raw, counts).strip()
        size += len(raw)
        counts["long documents parted"] += size >= LONGEST
        if line:
            lines.append(line)
        if size >= LONGEST or lines and not line:
            yield [" ".join(lines)]
            lines = []
        size *= bool(lines)
    if lines:
        yield [" ".join(lines)]


def _read_jsonl(file, path, counts):
    file = gzip.open(file) if path.suffix == ".gz" else file
    for number, raw in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
        with reading(f"{path}, line {number}", "a document", remedy="mend or drop it"):
            if len(raw) == LONGEST:
                raise ValueError(f"{LONGEST:,} bytes or more; give a document a line")
            line = _decode(raw, counts)
            if not line.strip():
                continue
            record = json.loads(line)
            paragraphs = record.get("paragraphs")
            if paragraphs is None:
                paragraphs = record["text"].split("\n")
            if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
                raise TypeError("`paragraphs` must be a list of texts")
        yield paragraphs


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


def _read_tar(file, where, counts):
    known = False
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Header) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            content, name = archive.extractfile(member), f"{where}, {member.name}"
            known |= member.name.endswith((".xz", ".txt"))
            if member.name.endswith(".xz"):
                with reading(name, "a tar of text"):
                    yield from _read_tar(content, name, counts)
            elif member.name.endswith(".txt"):
                for part, raw in enumerate(iter(lambda: content.read(LONGEST), b"")):
                    counts["long documents parted"] += part > 0
                    yield _decode(raw, counts).split("\n")
    if not known:
        raise ValueError("no .txt inside, and no .xz tar of .txt")


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl,
           ".json.gz": _read_jsonl, ".tar": _read_tar, ".tar.xz": _read_tar}
