"""Fixtures and small worlds that several test files share."""

import os
os.environ.setdefault("OMP_NUM_THREADS", "1")       # small tensors: a second thread costs time

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import math
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import urllib.parse
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import baselines
import common
import corpus as corpus_module
import data
import eval as evaluation
import jobs
import prompts
import supmer
import t5 as T
import tasks
import train
from common import InputError
from data import TaskIndex, load_tokenizer, meta_task
from supmer import Method
from t5 import read_config
from tasks import TASKS


try:
    import transformers
except ImportError:
    transformers = None
try:
    import peft
except ImportError:
    peft = None
try:
    import sklearn.cluster
except ImportError:
    sklearn = None


def pytest_runtest_logreport(report):
    """Append what is skipped to the file that SKIPPED names: .ci/run gives it another run."""
    if report.skipped and "SKIPPED" in os.environ:
        with open(os.environ["SKIPPED"], "a") as file:
            file.write(f"{report.nodeid}\n")


needs_transformers = pytest.mark.skipif(
    transformers is None, reason="transformers is not installed: pip install transformers")
needs_sklearn = pytest.mark.skipif(
    sklearn is None, reason="scikit-learn is not installed: pip install scikit-learn")
needs_data = pytest.mark.skipif(
    not os.environ.get("SUPMER_DATA"), reason="SUPMER_DATA does not name the folder of real data")

# A T5 that fits a screen, in both families. Inner width 2 x 4 is not d_model; 8 buckets up to 16.
V10 = T.T5Config(6, 4, 10, 2, 2, 2, 11, gated=False, tied=True, scaled=True, num_buckets=8,
                 max_distance=16, eps=1e-6)
V11 = V10._replace(gated=True, tied=False, scaled=False)
BOTH = pytest.mark.parametrize("config", [V10, V11], ids=["v1.0", "v1.1"])


def relative(a, b):
    """max|a - b| / max|b|, which is what every "relative" in this file means."""
    return ((a - b).abs().max() / b.abs().max()).item()


def formula(config):
    """Weights from no random generator: element i of all tensors, by sorted name, is 0.7 sin(1.3
    i^1.5), + 1 in norms."""
    weights, count = {}, 0
    for name, shape in sorted(T.expected_shapes(config).items()):
        i = np.arange(count, count + math.prod(shape), dtype=np.float64)
        values = torch.from_numpy(0.7 * np.sin(1.3 * i ** 1.5)).view(shape)
        weights[name] = values + 1 if "layer_norm" in name else values
        count += math.prod(shape)
    return weights


def model(config, dtype=torch.float64):
    """The T5 of these weights, without a file."""
    weights = {name: w.to(dtype) for name, w in formula(config).items()}
    return T.T5(config, {"lm_head.weight": weights["shared.weight"], **weights})


def batch(config):
    """Literal inputs: x (2, 24, d), mask (the second example has 9 positions), ids (2, 7)."""
    x = torch.sin(2.1 * torch.arange(2 * 24 * config.d_model, dtype=torch.float64) ** 1.5)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 9:] = False
    ids = torch.tensor([[0, 10, 3, 7, 1, 2, 9], [0, 5, 5, 8, 4, 6, 1]])
    return x.view(2, 24, config.d_model), mask, ids


def logits(t5, x, mask, ids):
    return T.next_token_logits(t5, T.decode(t5, ids, T.encode(t5, x, mask), mask))


# ----------------------------------------------------------------------------- against transformers

KINDS = {"v1.0": dict(feed_forward_proj="relu", num_heads=4, d_kv=16),
         "v1.1": dict(feed_forward_proj="gated-gelu", num_heads=4, d_kv=16),
         "3 heads x 24 for d 64": dict(feed_forward_proj="gated-gelu", num_heads=3, d_kv=24)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A random model of transformers, and what load_t5 makes of the folder that it saves."""
    if transformers is None:
        pytest.skip("transformers is not installed: pip install transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_ff=96, num_layers=3, num_decoder_layers=2, vocab_size=120, dropout_rate=0.,
        tie_word_embeddings=request.param == "v1.0", **KINDS[request.param])
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    if request.param != "v1.0":         # transformers 5 ties the head whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(120, 64) * 0.3)
    with torch.no_grad():
        for parameter in theirs.parameters():   # at 0.1 the float32 of both is 1.6e-5 off
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, T.load_t5(folder)


# --------------------------------------------------------------------------------------- the loader

def save_model(folder, config, weights=None, **changes):
    """A model folder as a user has it; changes: keys of config.json, None drops one."""
    values = dict(config._asdict(), model_type="t5",
                  feed_forward_proj="gated-gelu" if config.gated else "relu",
                  tie_word_embeddings=config.tied, layer_norm_epsilon=config.eps,
                  relative_attention_num_buckets=config.num_buckets,
                  relative_attention_max_distance=config.max_distance)
    for key in ("gated", "tied", "scaled", "num_buckets", "max_distance", "eps"):
        del values[key]
    folder.mkdir(exist_ok=True)
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(formula(config) if weights is None else weights, folder / "model.safetensors")
    return folder


def refused(folder, *fragments):
    """load_t5 raises InputError in one line that holds the fragments; the line is returned."""
    with pytest.raises(common.InputError) as caught:
        T.load_t5(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for fragment in fragments:
        assert fragment in message, (fragment, message)
    return message


def peak_of(before, code, **environment):
    """By how many MiB the peak of a fresh process grows through the code (Linux's count)."""
    script = f"""import re, sys
{before}
def MiB(key):
    return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
start = MiB('VmRSS')
{code}
print(MiB('VmHWM') - start)"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                                cwd=Path(T.__file__).parent, env=os.environ | environment,
                                check=True).stdout)


# ------------------------------------------------------------------------- the method: small worlds

def affine_start(d, dtype=torch.float32):
    """phi at the start of meta-training, where psi is the identity."""
    return {name: x.to(dtype) for name, x in supmer.init_affine(1, d).items()}



def random_t5(d=8, gated=True, dtype=torch.float64, vocabulary=40, seed=0, scale=0.3):
    """A T5 of two tiny blocks a stack with random weights, heads x d_kv != d_model."""
    config = T.T5Config(
        d_model=d,
        d_kv=6,
        d_ff=12,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        vocab_size=vocabulary,
        gated=gated,
        tied=False,
        scaled=False,
        num_buckets=32,
        max_distance=128,
        eps=1e-6,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (1.0 if "layer_norm" in name else 0.0)
        + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in T.expected_shapes(config).items()
    }
    return T.T5(config, {name: w.to(dtype) for name, w in weights.items()})


SENTINEL, WORDS = 39, [[39, 5], [39, 6], [39, 7]]


def random_examples(n, seed, d=8, slots=0, shortest=3, longest=9, words=WORDS):
    """n examples of unequal length, labels in turn; with slots, vectors stand at positions
    1..slots.
    """
    rng = np.random.default_rng(seed)
    ids = [
        [*rng.integers(8, 38, rng.integers(max(shortest, slots + 1), longest)), SENTINEL, 1]
        for _ in range(n)
    ]
    return data.Examples(
        [list(map(int, row)) for row in ids],
        [list(range(1, slots + 1))] * n,
        torch.from_numpy(rng.normal(size=(n, slots, d))).float(),
        torch.arange(n) % len(words),
        words,
    )


def random_task(seed, n=5, **options):
    return data.Task(
        "sp-next",
        (0,),
        random_examples(n, seed, **options),
        random_examples(n, seed + 100, **options),
    )


@pytest.fixture(scope="module")
def world():
    """A gated float64 T5, a prompt, a phi away from its start, a task and a partner, lambda, b and
    a large a1.
    """
    generator = torch.Generator().manual_seed(3)
    d, P = 8, 3
    phi = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in affine_start(d, torch.float64).items()
    }
    return SimpleNamespace(
        t5=random_t5(d),
        theta=torch.randn(P, d, generator=generator, dtype=torch.float64),
        phi=phi,
        task=random_task(1),
        partner=random_task(2),
        lam=0.3,
        b=0.4,
        method=Method(inner_rate=20.0, micro_tokens=24, gate_weight=0.7),
    )


# -------------------------------------------------------------------------- the method: whole steps


def small_state(method, dtype=torch.float32, P=3, d=8):
    t5 = random_t5(d, dtype=dtype)
    return t5, supmer.init_state(supmer.init_prompt(t5, P, 0), method)


SUPMER_DATA = os.environ.get("SUPMER_DATA")


# ------------------------------------------------------------------------------ data: a small world

def write_model(folder, words):
    """A model folder with a tokenizer of one piece a word, weights never read -> both."""
    pieces = ["<pad>", "</s>", "<unk>", *dict.fromkeys(words),
              *(f"<extra_id_{i}>" for i in range(9, -1, -1))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {piece for piece in pieces if piece[0] == "<"} - {"<unk>"}
    tokenizer.add_special_tokens(sorted(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    config = SimpleNamespace(vocab_size=len(pieces))
    return folder, data.load_tokenizer(folder, config)


TEMPLATE_WORDS = [".", "?", "A.", "B.", "C.", "D.", "Answer:", "yes", "no", "maybe", "A", "B", "C",
                  "D"]
TEMPLATE_WORDS += [word for entry in data.VARIANTS.values() for word in (
    *re.sub(r"\{\w+\}|<X>", "", entry.template).split(), *entry.words)]


def sentence(document, number):
    """A sentence of the planted corpus; its first word is its topic, one of five."""
    return f"T{(7 * document + number) % 5} d{document} s{number} end."


def by_topic(tokenizer):
    """An embedding that tells only topics apart: (B, 5), one-hot of the sentence's first word."""
    first = tokenizer.token_to_id("T0")
    return lambda ids, mask: torch.eye(5)[ids[:, 0] - first]


def planted_paths(folder, documents=280, length=40):
    path = folder / "corpus.jsonl"
    lines = [json.dumps({"text": " ".join(sentence(d, s) for s in range(length))})
             for d in range(documents)]
    path.write_text("\n".join(lines))
    return [path]


def held_out_documents(store):
    return np.flatnonzero(store.held_out[store.first]).tolist()


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """280 documents of 40 sentences on five topics -> (tokenizer, store, index)."""
    folder = tmp_path_factory.mktemp("planted")
    words = [*(f"T{i}" for i in range(5)), *(f"d{i}" for i in range(280)),
             *(f"s{i}" for i in range(40)), "end."]
    model, tokenizer = write_model(folder / "model", words + TEMPLATE_WORDS)
    store = corpus_module.build_store(folder / "store", planted_paths(folder), tokenizer, None, 5, 0,
                             model=model,
                             embed=by_topic(tokenizer))
    return tokenizer, store, TaskIndex(store, tokenizer, variants=data.VARIANTS)


# ---------------------------------------------------------------------------------- data: documents

def tar_of(members):
    """A tar {name: bytes}, as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def openwebtext_tar(path, parts):
    """A tar of .xz files, each a tar.xz of documents, as the subsets of OpenWebText are."""
    with tarfile.open(path, "w") as outer:
        for i, texts in enumerate(parts):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w:xz") as inner:
                for j, text in enumerate(texts):
                    member = tarfile.TarInfo(f"{j:07}-abc.txt")
                    member.size = len(text)
                    inner.addfile(member, io.BytesIO(text))
            member = tarfile.TarInfo(f"openwebtext/urlsf_subset00-{i}_data.xz")
            member.size = inner_file.tell()
            inner_file.seek(0)
            outer.addfile(member, inner_file)


# --------------------------------------------------------------------------------- data: meta tasks

def parsed(source):
    """The planted sentences of a source as (topic, document, number), in order."""
    return [tuple(map(int, found)) for found in re.findall(r"T(\d) d(\d+) s(\d+) end\.", source)]


# A file of each format, by its task: what is written, what is read.
FORMATS = {
    "sst5": ('4,"so ""good"" ."\n0,bad\n', [(4, {"text": 'so "good" .'}), (0, {"text": "bad"})]),
    "cr": ("1,good\n0, \n1,\n", [(1, {"text": "good"}), (0, {"text": " "})]),
    "trec": ("3,Who is he ?\n5,How many ?\n",
             [(3, {"text": "Who is he ?"}), (5, {"text": "How many ?"})]),
    "cb": ('{"premise": "It rains, he said.", "hypothesis": "it rains?!", "label": "neutral"}\n',
           [(2, {"hypothesis": "it rains", "premise": "It rains, he said."})]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n7\tA \"dog\" ran.\tIt ran.\tnot_entailment\n",
            [(1, {"hypothesis": "It ran", "premise": 'A "dog" ran.'})]),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tentailment\n",
             [(0, {"sentence": "He did.", "question": "Who?"})]),
    "wic": ('{"word": "bed", "sentence1": "A bed.", "sentence2": "Go to bed.", "idx": 0, "label": '
            'true, "start1": 2}\n',
            [(1, {"sentence1": "A bed.", "sentence2": "Go to bed.", "word": "bed"})]),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\tHe \"ran .\tNo .\n",
             [(1, {"a": 'He "ran .', "b": "No ."})]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n"
            "1\t3\t4\tWhat\n2\t5\t6\tWho?\t\t1\n", [(0, {"a": "Why?", "b": "How?"})]),
    "kitchen": (pickle.dumps((["A pan.\n\tGood.", "Rust."], [1, 0]), 3),
                [(1, {"text": "A pan.\n\tGood."}), (0, {"text": "Rust."})]),
    "restaurants": ("Wow... \"Loved it.\t1\nNo.\t0\n",
                    [(1, {"text": 'Wow... "Loved it.'}), (0, {"text": "No."})]),
}


def write_task(folder, name, train, test=None):
    for file, content in ((TASKS[name].train, train), (TASKS[name].test, test)):
        if content is not None:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content if type(content) is bytes else content.encode())


class Evil:
    """Unpickled without care it makes a file."""

    def __init__(self, path=Path("executed")):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# --------------------------------------------------------------------- data: where tasks come from

def zip_of(members):
    """A zip {name: bytes}, as bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `files` {path: bytes}; `cut`: the line goes dead after so many bytes."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Not on the test's output."""

    def do_GET(self):
        """A file, or 404."""
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[:self.server.cut])
        self.close_connection = True


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A server of archives that stands in for the real ones, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.asked, server.cut = {}, [], None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    for name, task in TASKS.items():
        urls = tuple(url + place.rpartition("/")[2] for place in task.urls)
        monkeypatch.setitem(TASKS, name, task._replace(urls=urls, sha256=("", "")))
    yield server
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------- data: what is fetched

class Hub(http.server.BaseHTTPRequestHandler):
    """A model hub on this machine: as much of its protocol as the client asks for. Its server has
    repos {name: {revision: (commit, {file: bytes})}}, `asked` (method, repository, file) and `cut`:
    after how many bytes of a file the line goes dead."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Not on the test's output."""

    def do_HEAD(self):
        """Headers only."""
        self.do_GET()

    def do_GET(self):
        """A file (/owner/name/resolve/revision/file), or a revision's commit, or its files."""
        hub, path = self.server, urllib.parse.unquote(self.path).split("?")[0]
        if path.startswith("/api/models/"):
            return self.answer_api(path.removeprefix("/api/models/"))
        repo, _, rest = path[1:].partition("/resolve/")
        for revision, (commit, files) in hub.repos.get(repo, {}).items():
            for name in (revision, commit):
                if rest.startswith(name + "/"):
                    file = rest[len(name) + 1:]
                    hub.asked.append((self.command, repo, file))
                    if file not in files:
                        return self.send(404, "", ("X-Error-Code", "EntryNotFound"),
                                         ("X-Repo-Commit", commit))
                    return self.send(200, files[file], ("X-Repo-Commit", commit), (
                        "ETag", f'"{hashlib.sha256(files[file]).hexdigest()}"'))
        self.send(404, "", ("X-Error-Code", "RevisionNotFound" if repo in hub.repos
                            else "RepoNotFound"))

    def answer_api(self, path):
        """OWNER/NAME/revision/REVISION -> its commit; OWNER/NAME/tree/COMMIT -> its files."""
        owner, name, kind, wanted = path.split("/", 3)
        revisions = self.server.repos.get(f"{owner}/{name}", {})
        for revision, (commit, files) in revisions.items():
            if wanted in (revision, commit):
                tree = [{"type": "file", "path": file, "size": len(content), "oid": commit}
                        for file, content in files.items()]
                about = {"id": f"{owner}/{name}", "sha": commit, "siblings": []}
                return self.send(200, json.dumps(tree if kind == "tree" else about))
        self.send(404, "", ("X-Error-Code", "RevisionNotFound" if revisions else "RepoNotFound"))

    def send(self, status, body, *headers):
        """Answer; the body may break off."""
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:self.server.cut])
            if self.server.cut is not None and len(body) > self.server.cut:
                self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the client takes for the real one, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked, server.cut = {}, [], None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def hub_files(folder, *names):
    """{name: contents} of a folder."""
    return {name: (folder / name).read_bytes() for name in names}


def save_shards(folder, config):
    """A model of a config in two shards and an index, in place of its single file."""
    save_model(folder, config)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
        name: file for file, part in parts.items() for name in part}}))
    return folder


ANY = "x/model"
COMMIT = "c" * 40


def by_hand():
    """d = 2, one row: A a quarter turn, the gate half open, theta (1, 1), g (3, 4)."""
    turn = torch.tensor([[0., -1.], [1., 0.]])
    phi = {**affine_start(2), "A": turn}
    return torch.ones(1, 2), phi, torch.tensor([[3., 4.]]), torch.zeros(2), Method()


def posed(w, variant):
    """An example of the planted corpus with s for each sentence, and the task's label words."""
    tokenizer, _, index = w.planted
    task = meta_task(index, 0, 0, 0, variant=variant)
    source, _ = data.examples_as_text(tokenizer, task.support, 0)
    words = (tokenizer.decode(word[1:]) for word in task.support.words)
    return re.sub(r"T\d d\d+ s\d+ end\.", "s", source), *words


# -------------------------------------------------------- exercises.py: solutions, right and wrong

def inner(support, psi, rate):
    return lambda theta: theta - rate * psi(torch.func.grad(support)(theta))


grad = torch.func.grad


# ------------------------------------------------------------------ eval.py: few-shot prompt tuning


POSITIVE, NEGATIVE = "good fine nice warm".split(), "bad poor dull cold".split()
FILLER = "the a film food day place and with of very".split()
PIECES = [
    "<pad>",
    "</s>",
    "<unk>",
    "It",
    "was",
    "?",
    "terrible",
    "great",
    *POSITIVE,
    *NEGATIVE,
    *FILLER,
    "<extra_id_0>",
]


def small_config(**changes):
    config = T.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        vocab_size=len(PIECES),
        gated=True,
        tied=False,
        scaled=False,
        num_buckets=32,
        max_distance=128,
        eps=1e-6,
    )
    return config._replace(**changes)


def small_t5(dtype=torch.float32, seed=0, scale=0.4):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (1.0 if "layer_norm" in name else 0.0)
        + scale * torch.randn(shape, generator=generator)
        for name, shape in T.expected_shapes(small_config()).items()
    }
    return T.T5(small_config(), {name: w.to(dtype) for name, w in weights.items()})


def small_examples(n, seed=0):
    """n sentences of three words; the label, which word of two classes is among them, in turn."""
    rng, mask = np.random.default_rng(seed), len(PIECES) - 1
    ids = [
        [
            int(rng.integers(16, 26)),
            int(rng.integers(8, 12) + 4 * (1 - i % 2)),
            int(rng.integers(16, 26)),
            3,
            4,
            mask,
            5,
            1,
        ][i % 3 == 0 :]
        for i in range(n)
    ]
    return data.Examples(
        ids, [[]] * n, torch.zeros(n, 0, 0), torch.arange(n) % 2, [[mask, 6], [mask, 7]]
    )


def tune(t5, start, *rest):
    """eval.tune() of a prompt from start (P, d) -> its records, theta at each (n, P, d)."""
    found = [(record, kept["theta"].clone()) for record, kept in evaluation.tune(
        t5, "learned", partial(baselines.given_prompt, theta=start), *rest)]
    records, thetas = zip(*found)
    return list(records), torch.stack(thetas)


def eval_settings(**changes):
    return evaluation.Settings(**{"epochs": 2, "batch": 4, "prompt_length": 3, **changes})


def write_rows(path, n, seed, flip=False):
    """n distinct labeled sentences as a CSV file of label,text."""
    rng, lines = np.random.default_rng(seed), set()
    while len(lines) < n:
        label = int(len(lines) % 2)
        words = [*rng.choice(FILLER, 5), str(rng.choice((NEGATIVE, POSITIVE)[label]))]
        lines.add(f"{label ^ flip},{' '.join(rng.permutation(words))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sorted(lines)) + "\n")


def write_place(tmp_path):
    """Into a folder: a model folder `small`, a labeled task `planted` in `data`."""
    t5 = small_t5()
    folder = tmp_path / "small"
    folder.mkdir()
    c = t5.config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "t5",
                "d_model": c.d_model,
                "d_kv": c.d_kv,
                "d_ff": c.d_ff,
                "num_layers": c.num_layers,
                "num_decoder_layers": c.num_decoder_layers,
                "num_heads": c.num_heads,
                "vocab_size": c.vocab_size,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            }
        )
    )
    save_file(
        {name: w.contiguous() for name, w in t5.weights.items()}, folder / "model.safetensors"
    )
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_rows(tmp_path / "data/planted/train.csv", 60, 1)
    write_rows(tmp_path / "data/planted/test.csv", 40, 2)


PLANTED = tasks.LabeledTask("planted/train.csv", "planted/test.csv")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, with what write_place puts there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "planted", PLANTED)
    write_place(tmp_path)
    return tmp_path


SMALL = (
    "--data data --model small --task planted --prompt-length 3 --shots 4 --batch 8 --epochs 3 "
    "--validate-every 2 "
    "--seeds 10 20 --rates 0.1 0.3 --jobs 1"
).split()


def run_script(argv, monkeypatch):
    """python eval.py ARGV, in this process -> its exit status."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    try:
        runpy.run_path(str(Path(evaluation.__file__)), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def write_run(folder, model="small", finished=True, ended=1.0, P=3, d=16, name="supmer"):
    """A run's folder as train.py leaves it."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "run.json").write_text(
        json.dumps(
            {
                "model": model,
                "name": name,
                "training": {},
                "method": {},
                "finished": finished,
                "ended": ended if finished else None,
            }
        )
    )
    generator = torch.Generator().manual_seed(1)
    phi = {
        k: v + 0.2 * torch.randn(v.shape, generator=generator)
        for k, v in affine_start(d).items()
    }
    prompts.save_prompt(
        Path(folder) / "prompt.safetensors",
        torch.randn(P, d, generator=generator),
        phi,
        {
            "model": model,
            "method": name,
            "corpus": "embedded",
            "step": "7",
            "steps": "9",
            "seed": "0",
            "model_sha256": T.model_fingerprint(model) if Path(model).is_dir() else "another",
        },
    )


def rows_of(path, **wanted):
    """The rows of an evaluation's JSON file with these values."""
    rows = json.loads(Path(path).read_text())["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def accuracies(path, **wanted):
    """The accuracies of the rows of a JSON file that are tests of what was tuned."""
    wanted = {"split": "test", "kind": "tuned", **wanted}
    return [row["accuracy"] for row in rows_of(path, **wanted)]


# ------------------------------------------------------------ the test set is not seen while tuning


@contextlib.contextmanager
def context(t5, choices):
    """A Context in this process, with no results from before."""
    shutil.rmtree(jobs.TUNED, ignore_errors=True)
    with jobs.workers(t5, None, ["cpu"], 1) as work:
        yield evaluation.Context(choices, data.load_tokenizer("small", t5.config), work,
                                 {"model": "this"}, 1.0)


# --------------------------------------------------------------- groups, own tasks, labels, studies


def small_group(monkeypatch, *names):
    """Let planted's files stand for these tasks of the real names; the others are not to be had."""
    for name, task in TASKS.items():
        stands_in = TASKS["planted"] if name in names else task._replace(urls=(), hub=())
        monkeypatch.setitem(tasks.TASKS, name, stands_in)


# ---------------------------------------------------------------------------- train.py: a whole run


HERE = Path(train.__file__).parent


def write_small_world(folder):
    """Write a random T5 `model` of one piece a word, and a corpus of 60 planted documents ->
    folder, options of train.py."""
    words = [*(f"T{i}" for i in range(5)), *(f"d{i}" for i in range(60)),
             *(f"s{i}" for i in range(30)), "end."]
    model, tokenizer = write_model(folder / "model", words + TEMPLATE_WORDS)
    t5 = random_t5(16, dtype=torch.float32, vocabulary=tokenizer.get_vocab_size())
    names = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
    config = {name: getattr(t5.config, name) for name in names}
    config |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    save_file(t5.weights, model / "model.safetensors")
    planted_paths(folder, documents=60, length=30)
    options = ("--model model --corpus corpus.jsonl --clusters 6 --prompt-length 4 --tasks 2 "
               "--support 4 --query 4 --validation-tasks 1 --validate-every 2 --steps 6 "
               "--relative-step 0.05 --device cpu --yes")   # a busy machine may look like hours
    return folder, options.split()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A small world to train in; its store is made once."""
    return write_small_world(tmp_path_factory.mktemp("train"))


def log_without_times(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"}
            for line in lines]


def exact(value):
    """A nest of dicts and lists, its tensors as bytes: two are equal if every bit is."""
    if isinstance(value, dict):
        return {name: exact(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(x) for x in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def outcome_of(run):
    """All that a run leaves, to the bit: the state, the prompt, what is said of it, the log."""
    path = run / "prompt.safetensors"
    state = torch.load(run / "state.pt", weights_only=True)
    return (exact(state), exact(load_file(path)), prompts.prompt_metadata(path),
            log_without_times(run))


def make_run(small_world, name, ranks=common.SOLO, **changes):
    """A train.Run in this process, in the folder `name`."""
    folder, options = small_world
    training, method, _, _ = train.parse(options)
    training = replace(training, model=str(folder / "model"),
                       corpus=(str(folder / "corpus.jsonl"),), **changes)
    with contextlib.chdir(folder):
        t5 = T.load_t5("model")
        tokenizer = data.load_tokenizer("model", t5.config)
        sources, made_of = train.open_sources(training, method, Path("model"), tokenizer, t5)
        (folder / name).mkdir(exist_ok=True)
        return train.Run(folder / name, training, method, t5, sources, made_of, ranks)


def run_train(folder, *argv):
    """train.py's script in this process -> exit status, what it wrote to stdout and stderr."""
    said = io.TextIOWrapper(io.BytesIO(), write_through=True)
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), \
            contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        patch.setattr(train, "prepare", lambda _, method, *rest: method)    # takes a second
        with pytest.raises(SystemExit) as ended:
            common.run_script(train.main, "stopped")
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return ended.value.code, said.buffer.getvalue().decode()


def start_train(folder, *argv, before=lambda: None):
    """Fork a process that runs train.py's script -> its id. It writes what it prints into `said`;
    a new Python would take seconds to import torch."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        before()
        status, said = run_train(folder, *argv)
        Path(folder, "said").write_text(said)
    finally:
        os._exit(status)


def wait_for_steps(run, steps):
    """Wait until the run's log has so many steps."""
    deadline, log = time.monotonic() + 60, run / "log.jsonl"
    while not (log.exists() and log.read_text().count('"query_loss"') >= steps):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def released_files(folder, name, d):
    """The authors' two files for a T5 of width d, with random numbers and NaN in the buffers that
    are not used, as theirs."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(100, d, generator=generator)
    phi = {name: torch.randn(x.shape, generator=generator) / 9
           for name, x in prompts.init_released(100, d).items()}
    buffers = {"grad_mean": torch.full((d,), math.nan), "grad_std": torch.full((d,), math.nan),
               "grad_s": torch.zeros(d), "k": torch.zeros(1)}
    folder.mkdir(exist_ok=True)
    torch.save(theta, folder / f"prompt_{name}.pt")
    torch.save(phi | buffers, folder / f"gradient_edit_{name}.pt")
    return theta, phi


def run_with_prompt(folder, config, model):
    """A run's folder as train.py leaves it, with a random prompt of 5 vectors -> theta."""
    theta = torch.randn(5, config.d_model, generator=torch.Generator().manual_seed(6))
    folder.mkdir()
    prompts.save_prompt(folder / "prompt.safetensors", theta,
                       affine_start(config.d_model), {"model": str(model)})
    return theta


def begin(name, seed=0, length=8):
    return partial(baselines.BASELINES[name].start, seed=seed, length=length)


class Dies:
    """What reads this from a pickle, as a contender's process does, ends."""
    def __reduce__(self):
        return os._exit, (1,)


TINY = Path(__file__).resolve().parent / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, read_config(TINY))


def corpus():
    with gzip.open(TINY / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Five steps of Alg. 1 on random tasks: s, the query loss, the length of theta after it.
GOLDEN_RUN = [(-0.057357, 4.838695, 1.171528), (0.043455, 4.777033, 1.321654),
              (0.026119, 4.092736, 1.422618), (-0.048968, 5.018450, 1.485282),
              (-0.014996, 4.081985, 1.545177)]


# ---------------------------------------------------- a kill at any moment: tests/test_kills.py

def forked(work, before=lambda: None):
    """Begin work() in a process of its own, which has all modules loaded -> its id. It ends with 0,
    with 2 for what a user would be told, with 1 for anything else, which it shows."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status, said = 1, io.StringIO()
    try:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            before()
            work()
            status = 0
    except (InputError, OSError):
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid):
    """Wait for a process -> its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder, *ends):
    """{path in the folder: bytes} of all files, or of those that end so."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name.endswith(ends or "")}


def on_ranks(monkeypatch, world, work):
    """work(ranks) on each of `world` ranks, threads here -> what each returns or raises. What
    torch.distributed does between processes is done between the threads."""
    slots, barrier, found = [None] * world, threading.Barrier(world), [None] * world
    mine = threading.local()

    def gather(values, value):
        slots[mine.rank] = value
        barrier.wait(20)
        values[:] = slots
        barrier.wait(20)

    def run(rank):
        mine.rank = rank
        try:
            found[rank] = work(common.Ranks(rank, world))
        except InputError as error:
            found[rank] = error
    monkeypatch.setattr(common, "distributed", SimpleNamespace(
        all_gather_object=gather, barrier=lambda group: barrier.wait(20)))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
