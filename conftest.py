"""Fixtures and the one small world that the test files share."""

import os
os.environ.setdefault("OMP_NUM_THREADS", "1")       # small tensors: a second thread costs time

import contextlib
import hashlib
import http.server
import importlib
import io
import json
import math
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import threading
import traceback
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
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
import corpus
import data
import eval as evaluation
import prompts
import ranks as ranks_module
import released
import supmer
import t5 as T
import tasks
import train
from common import InputError
from ranks import SOLO, Ranks
from tasks import TASKS
from templates import load_tokenizer


def optional(name):
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


transformers, peft, sklearn = map(optional, ("transformers", "peft", "sklearn"))
optional("sklearn.cluster")


def pytest_runtest_logreport(report):
    """Append what is skipped to the file that SKIPPED names: .ci/run gives it another run."""
    if report.skipped and "SKIPPED" in os.environ:
        with open(os.environ["SKIPPED"], "a") as file:
            file.write(f"{report.nodeid}\n")


SUPMER_DATA = os.environ.get("SUPMER_DATA")
needs_transformers = pytest.mark.skipif(not transformers, reason="pip install transformers")
needs_sklearn = pytest.mark.skipif(not sklearn, reason="pip install scikit-learn")
needs_data = pytest.mark.skipif(not SUPMER_DATA, reason="SUPMER_DATA names no folder of real data")
HERE = Path(train.__file__).resolve().parent
TINY = HERE / "tiny"


def relative(a, b):
    """max|a - b| / max|b|, which is what every "relative" in the tests means."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ----------------------------------------------------------------------------------- T5s, models

# A T5 that fits a screen, in both families. Inner width 2 x 4 is not d_model; 8 buckets up to 16.
V10 = T.T5Config(6, 4, 10, 2, 2, 2, 11, gated=False, tied=True, scaled=True, num_buckets=8,
                 max_distance=16, eps=1e-6)
V11 = V10._replace(gated=True, tied=False, scaled=False)
BOTH = pytest.mark.parametrize("config", [V10, V11], ids=["v1.0", "v1.1"])
TOY = V11._replace(d_model=8, d_kv=6, d_ff=12, vocab_size=40, num_buckets=32, max_distance=128)


def formula(config):
    """Element i of all weights, by sorted name, is 0.7 sin(1.3 i^1.5), + 1 in norms."""
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


def random_t5(d=8, dtype=torch.float64, seed=0, scale=0.3, **changes):
    """TOY or another config with random weights."""
    config = TOY._replace(d_model=d, **changes)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in T.expected_shapes(config).items():
        x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = (x + 1 if "layer_norm" in name else x).to(dtype)
    return T.T5(config, weights)


SENTINEL, WORDS = 39, [[39, 5], [39, 6], [39, 7]]


def random_examples(n, seed, d=8, slots=0, shortest=3, longest=9, words=WORDS):
    """n examples for TOY of unequal length, labels in turn; vectors at positions 1..slots."""
    rng = np.random.default_rng(seed)
    ids = [[*map(int, rng.integers(8, 38, rng.integers(max(shortest, slots + 1), longest))),
            SENTINEL, 1] for _ in range(n)]
    return data.Examples(ids, [list(range(1, slots + 1))] * n,
                         torch.from_numpy(rng.normal(size=(n, slots, d))).float(),
                         torch.arange(n) % len(words), words)


def random_task(seed, n=5, **options):
    return data.Task("sp-next", (0,), random_examples(n, seed, **options),
                     random_examples(n, seed + 100, **options))


def logits(t5, x, mask, ids):
    return T.next_token_logits(t5, T.decode(t5, ids, T.encode(t5, x, mask), mask))


def affine_start(d, dtype=torch.float32):
    """phi at the start of meta-training, where psi is the identity."""
    return {name: x.to(dtype) for name, x in supmer.init_affine(1, d).items()}


def nudged(phi, size, generator):
    """phi away from its start, by normal numbers of this size."""
    return {name: x + size * torch.randn(x.shape, generator=generator) for name, x in phi.items()}


def small_state(method, P=3):
    """A float32 T5, and the state of step 0."""
    t5 = random_t5(dtype=torch.float32)
    return t5, supmer.init_state(supmer.init_prompt(t5, P, 0), method)


def save_model(folder, config, weights=None, **changes):
    """A model folder as a user has it; changes: keys of config.json, None drops one."""
    values = config._asdict() | {
        "model_type": "t5", "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied, "layer_norm_epsilon": config.eps,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        key: value for key, value in values.items() if value is not None and key not in
        ("gated", "tied", "scaled", "num_buckets", "max_distance", "eps")}))
    save_file(formula(config) if weights is None else weights, folder / "model.safetensors")
    return folder


def save_shards(folder, config):
    """A model of a config in two shards and an index, in place of its single file."""
    save_model(folder, config).joinpath(T.SINGLE).unlink()
    weights, files = formula(config), {}
    for i in (1, 2):
        part = sorted(weights)[i - 1::2]
        files |= dict.fromkeys(part, f"model-0000{i}-of-00002.safetensors")
        save_file({name: weights[name] for name in part}, folder / files[part[0]])
    (folder / T.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def peak_of(before, code, **environment):
    """By how many MiB the peak of a fresh process grows through the code (Linux's count)."""
    script = f"""import re
{before}
def MiB(key):
    return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
start = MiB('VmRSS')
{code}
print(MiB('VmHWM') - start)"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                                cwd=HERE, env=os.environ | environment, check=True).stdout)


# ------------------------------------- one small world: words, a T5, a planted corpus and task

POSITIVE, NEGATIVE = "good fine nice warm".split(), "bad poor dull cold".split()
FILLER = "the a film food day place and with of very".split()
VOCABULARY = ["It", "was", "?", "terrible", "great", *POSITIVE, *NEGATIVE, *FILLER]
VOCABULARY += [f"{kind}{i}" for kind, n in (("T", 5), ("d", 280), ("s", 40)) for i in range(n)]
VOCABULARY += ["end.", ".", "A.", "B.", "C.", "D.", "Answer:", "yes", "no", "maybe", *"ABCD"]
VOCABULARY += [word for entry in data.VARIANTS.values() for word in (
    *re.sub(r"\{\w+\}|<X>", "", entry.template).split(), *entry.words)]


def pieces_of(words):
    """The vocabulary of a tokenizer that has one piece a word."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(10))]
    return ["<pad>", "</s>", "<unk>", *dict.fromkeys(words), *sentinels]


PIECES = pieces_of(VOCABULARY)


def small_config(**changes):
    return TOY._replace(**{"d_model": 16, "d_ff": 32, "vocab_size": len(PIECES), **changes})


def small_t5(dtype=torch.float32, seed=0, **changes):
    return random_t5(dtype=dtype, seed=seed, scale=0.4, **{
        "d": 16, "d_ff": 32, "vocab_size": len(PIECES), **changes})


def write_model(folder, words=VOCABULARY):
    """A model folder whose tokenizer has one piece a word -> folder, tokenizer."""
    pieces = pieces_of(words)
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([piece for piece in pieces if piece[0] == "<"])
    t5 = small_t5(vocab_size=len(pieces))
    save_model(folder, t5.config, t5.weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, load_tokenizer(folder, t5.config)


def sentence(document, number):
    """A sentence of the planted corpus; its first word is its topic, one of five."""
    return f"T{(7 * document + number) % 5} d{document} s{number} end."


def parsed(source):
    """The planted sentences of a source as (topic, document, number), in order."""
    return [tuple(map(int, found)) for found in re.findall(r"T(\d) d(\d+) s(\d+) end\.", source)]


def planted_paths(folder, documents=280, length=40):
    lines = [json.dumps({"text": " ".join(sentence(d, s) for s in range(length))})
             for d in range(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return [folder / "corpus.jsonl"]


def by_topic(tokenizer):
    """An embedding that knows only topics: (B, 5), one-hot of the sentence's first word."""
    first = tokenizer.token_to_id("T0")
    return lambda ids, mask: torch.eye(5)[ids[:, 0] - first]


def held_out_documents(store):
    return np.flatnonzero(store.held_out[store.first]).tolist()


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """280 documents of 40 sentences on five topics -> (tokenizer, store, index)."""
    folder = tmp_path_factory.mktemp("planted")
    model, tokenizer = write_model(folder / "model")
    store = corpus.build_store(folder / "store", planted_paths(folder), tokenizer, None, 5, 0,
                               model=model, embed=by_topic(tokenizer))
    return tokenizer, store, data.TaskIndex(store, tokenizer, variants=data.VARIANTS)


def write_rows(path, n, seed, flip=False):
    """n distinct labeled sentences as a CSV file of label,text."""
    rng, lines = np.random.default_rng(seed), set()
    while len(lines) < n:
        label = int(len(lines) % 2)
        words = [*rng.choice(FILLER, 5), str(rng.choice((NEGATIVE, POSITIVE)[label]))]
        lines.add(f"{label ^ flip},{' '.join(rng.permutation(words))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sorted(lines)) + "\n")


def small_examples(n, seed=0):
    """n sentences of three words; the label, which word of two classes is among them, in turn."""
    rng, mask, ids = np.random.default_rng(seed), len(PIECES) - 1, []
    for i in range(n):
        words = (rng.integers(16, 26), rng.integers(8, 12) + 4 * (1 - i % 2), rng.integers(16, 26))
        ids.append([*map(int, words), 3, 4, mask, 5, 1][i % 3 == 0:])
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, 0), torch.arange(n) % 2,
                         [[mask, 6], [mask, 7]])


PLANTED = tasks.LabeledTask("planted/train.csv", "planted/test.csv")
SMALL = ("--data data --model small --task planted --prompt-length 3 --shots 4 --batch 8 "
         "--epochs 3 --validate-every 2 --seeds 10 20 --rates 0.1 0.3 --jobs 1").split()
# of train.py; a busy machine may look like hours
OPTIONS = ("--model small --corpus corpus.jsonl --clusters 5 --prompt-length 4 --tasks 2 "
           "--support 4 --query 4 --validation-tasks 1 --validate-every 2 --steps 6 "
           "--relative-step 0.05 --device cpu --yes").split()


def write_world(folder):
    """A model `small`, a corpus of 60 planted documents, a labeled task in `data`."""
    write_model(folder / "small")
    planted_paths(folder, documents=60, length=30)
    write_rows(folder / "data/planted/train.csv", 60, 1)
    write_rows(folder / "data/planted/test.csv", 40, 2)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A small world to evaluate in: the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "planted", PLANTED)
    return write_world(tmp_path)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A small world to train in, whose store is made once -> folder, options."""
    return write_world(tmp_path_factory.mktemp("train")), OPTIONS


# ----------------------------------------------------------------- train.py: runs, also of others

def make_run(small_world, name, ranks=SOLO, **changes):
    """A train.Run in this process, in the folder `name`."""
    folder, options = small_world
    training, method, _, _ = train.parse(options)
    training = replace(training, model=str(folder / "small"),
                       corpus=(str(folder / "corpus.jsonl"),), **changes)
    with contextlib.chdir(folder):
        t5 = T.load_t5("small")
        tokenizer = load_tokenizer("small", t5.config)
        sources, made_of = train.open_sources(training, method, Path("small"), tokenizer, t5)
        (folder / name).mkdir(exist_ok=True)
        return train.Run(folder / name, training, method, t5, sources, made_of, ranks)


def run_script(script, *argv, folder="."):
    """A script in this process -> exit status, what it wrote to stdout and stderr."""
    said = io.TextIOWrapper(io.BytesIO(), write_through=True)
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), \
            contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
        patch.setattr(train, "prepare", lambda _, method, *rest: method)    # takes a second
        with pytest.raises(SystemExit) as stop:
            common.run_script(script.main, "stopped")
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code, said.buffer.getvalue().decode()


def forked(work, before=lambda: None):
    """Begin work() in a process -> its id; status 2: a user's mistake, 1: a bug, shown."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status, said = 1, io.StringIO()
    try:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            before()
            status = work() or 0
    except (InputError, OSError):
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def start_train(folder, *argv, before=lambda: None):
    """Fork a process that runs train.py's script -> its id. What it prints is in `said`."""
    def work():
        status, said = run_script(train, *argv, folder=folder)
        Path(folder, "said").write_text(said)
        return status
    return forked(work, before)


def ended(pid):
    """Wait for a process -> its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_ranks(monkeypatch, world, work):
    """work(ranks) on each of `world` ranks, threads here -> what each returns or raises."""
    slots, barrier, mine = [None] * world, threading.Barrier(world), threading.local()

    def gather(values, value):
        slots[mine.rank] = pickle.dumps(value)
        barrier.wait(20)
        values[:] = map(pickle.loads, slots)
        barrier.wait(20)

    def run(rank):
        mine.rank = rank
        try:
            return work(Ranks(rank, world))
        except InputError as error:
            return error
    monkeypatch.setattr(ranks_module, "distributed", SimpleNamespace(all_gather_object=gather))
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def contents(folder, *ends):
    """{path in the folder: bytes} of all files, or of those that end so."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name.endswith(ends or "")}


def log_without_times(run):
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


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
    return (exact(state), exact(load_file(path)), prompts.load_prompt(path)[2],
            log_without_times(run))


def write_run(folder, model="small", finished=True, ended=1.0, P=3, d=16, name="supmer"):
    """A run's folder as train.py leaves it -> theta."""
    folder, generator = Path(folder), torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({
        "model": str(model), "name": name, "training": {}, "method": {}, "finished": finished,
        "ended": ended if finished else None}))
    phi = nudged(affine_start(d), 0.2, generator)
    theta = torch.randn(P, d, generator=generator)
    prompts.save_prompt(folder / "prompt.safetensors", theta, phi, {
        "model": str(model), "method": name, "corpus": "embedded", "step": "7", "steps": "9",
        "seed": "0",
        "model_sha256": T.model_fingerprint(model) if Path(model).is_dir() else "another"})
    return theta


def released_files(folder, name, d):
    """The authors' two files for a T5 of width d, with NaN in the buffers that are not used."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(100, d, generator=generator)
    phi = {name: torch.randn(x.shape, generator=generator) / 9
           for name, x in released.init_released(100, d).items()}
    buffers = {"grad_mean": torch.full((d,), math.nan), "grad_std": torch.full((d,), math.nan),
               "grad_s": torch.zeros(d), "k": torch.zeros(1)}
    folder.mkdir(exist_ok=True)
    torch.save(theta, folder / f"prompt_{name}.pt")
    torch.save(phi | buffers, folder / f"gradient_edit_{name}.pt")
    return theta, phi


# ---------------------------------------------------------------------------- eval.py: its results

def eval_settings(**changes):
    return evaluation.Settings(**{"epochs": 2, "batch": 4, "prompt_length": 3, **changes})


def tune(t5, start, *rest):
    """eval.tune() of a prompt from start (P, d) -> its records, theta at each (n, P, d)."""
    found = [(record, kept["theta"].clone()) for record, kept in evaluation.tune(
        t5, "learned", partial(baselines.given_prompt, theta=start), *rest)]
    records, thetas = zip(*found)
    return list(records), torch.stack(thetas)


def rows_of(path, **wanted):
    """The rows of an evaluation's JSON file with these values."""
    rows = json.loads(Path(path).read_text())["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def accuracies(path, **wanted):
    """The accuracies of the rows of a JSON file that are tests of what was tuned."""
    wanted = {"split": "test", "kind": "tuned", **wanted}
    return [row["accuracy"] for row in rows_of(path, **wanted)]


# ------------------------------------------------------------- files of others, and their servers

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
    """Unpickled without care it makes a file, or calls another function."""

    def __init__(self, argument=Path("executed"), function=Path.touch):
        self.called = function, (argument,)

    def __reduce__(self):
        return self.called


Dies = partial(Evil, 1, os._exit)       # ends the process of a pool that reads it


def tar_of(members):
    """A tar {name: bytes}, as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


ANY, COMMIT = "x/model", "c" * 40


class Server(http.server.BaseHTTPRequestHandler):
    """Files on this machine, and as much of a model hub as its client asks for. The server has
    files {path: bytes}, repos {name: {revision: (commit, {file: bytes})}}, `asked` (paths, or of
    the hub: method, file) and `cut`: the line goes dead after so many bytes."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Not on the test's output."""

    def do_GET(self):
        """A file; or of a repository's revision its commit, the list of its files, or one file."""
        server, path = self.server, urllib.parse.unquote(self.path).split("?")[0]
        hub = re.fullmatch(r"/(?:api/models/)?(.+)/(revision|tree|resolve)/(.+)", path)
        if not hub:
            server.asked += [path] * (path.count("/") == 1)
            return self.send(server.files.get(path))
        (repo, kind, wanted), file = hub.groups(), None
        if kind == "resolve":
            wanted, _, file = wanted.rpartition("/")
            server.asked.append((self.command, file))
        revisions = server.repos.get(repo, {})
        found = {name: entry for key, entry in revisions.items() for name in (key, entry[0])}
        if wanted not in found:
            missing = "RevisionNotFound" if revisions else "RepoNotFound"
            return self.send(None, X_Error_Code=missing)
        commit, files = found[wanted]
        if kind == "resolve":
            tag = hashlib.sha256(files.get(file, b"")).hexdigest()
            return self.send(files.get(file), X_Repo_Commit=commit, ETag=f'"{tag}"',
                             X_Error_Code="EntryNotFound")
        answer = {"id": repo, "sha": commit, "siblings": []} if kind == "revision" else [
            {"type": "file", "path": file, "size": len(content), "oid": commit}
            for file, content in files.items()]
        self.send(json.dumps(answer).encode())

    do_HEAD = do_GET

    def send(self, body, **headers):
        """Answer; there may be no body, or it may break off."""
        self.send_response(404 if body is None else 200)
        headers["Content-Length"] = str(len(body or b""))
        for name, value in headers.items():
            if name != "X_Error_Code" or body is None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body[:self.server.cut])
            self.close_connection = len(body) > (self.server.cut or len(body))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Server in place of all archives and of the hub, with an empty cache; a new folder."""
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.repos, server.asked, server.cut = {}, {}, [], None
    server.handle_error = lambda *_: None               # of a client that was killed
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, task in TASKS.items():
        urls = tuple(f"{url}/{place.rpartition('/')[2]}" for place in task.urls)
        monkeypatch.setitem(TASKS, name, task._replace(urls=urls, sha256=("", "")))
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "hub")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, T.read_config(TINY))
