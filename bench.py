"""How fast the method runs, and in how much memory, beside the usual libraries in one run.

    python bench.py             # t5-base's width, 6 + 6 layers, one thread: 25 minutes
    python bench.py --quick     # a small shape, in 3 minutes; its ratios are rough
    python bench.py --json result.json --threads 2 --device cuda

It prints the machine and the sizes; this machine's rate at matrix products, and which part of it a
step reaches; one line for each contender (median seconds of all repetitions, their spread, peak
memory above what was there once model and data were loaded); the ratios between them beside what
they should be at most; and how an exact step's cost grows. Each contender runs in a process of
its own, and they take turns, so that a noisy machine is unfair to none. One that fails, or whose
library (transformers, peft, scikit-learn, faiss) is not installed, is "not run", and why. Weights
and token ids are random; the tokenizer reads tiny/'s corpus.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import corpus
import data
import t5 as T
from kmeans import kmeans
from supmer import (Method, gradient_and_hessian, init_phi, init_prompt, inner_step, meta_gradient, mix,
    pool, prompt_gradient)
from common import one_line, pick_device, run_script
from estimate import stand_in

RATE, LAM = 50.0, 0.3               # an inner rate at which the second-order part is not noise


@dataclass(frozen=True)
class Sizes:
    """What a contender is given. A row is a support, a query or a partner's query example."""
    layers: int = 6                 # of the encoder, and of the decoder
    d: int = 768
    ff: int = 3072
    heads: int = 12
    support: int = 8
    query: int = 8
    shortest: int = 64              # tokens of a text, uniform between the two
    longest: int = 192
    padded: int = 412               # to which the released code pads
    prompt: int = 100
    tasks: int = 1
    micro_tokens: int = 512
    batch: int = 32                 # few-shot examples, of a quarter of the tokens
    sentences: int = 96             # of 25 tokens on average, embedded by twice the layers
    points: int = 50_000
    clusters: int = 250
    documents: int = 100            # of tiny/'s corpus, tokenized
    dtype: str = "float32"
    device: str = "cpu"


WARM = dict(layers=1, d=64, ff=64, heads=1, support=2, query=2, shortest=12, longest=20, padded=22,
            prompt=2, batch=2, sentences=4, points=100, clusters=4, documents=1)
QUICK = Sizes(layers=2, d=512, ff=2048, heads=8, support=4, query=4, shortest=32, longest=96,
              padded=206, prompt=50, micro_tokens=256, batch=16, points=10_000, clusters=64,
              documents=20)


# ---------------------------------------------------------------- what all contenders are given

def shape(s):
    """A T5Config of v1.0."""
    return T.T5Config(d_model=s.d, d_kv=64, d_ff=s.ff, num_layers=s.layers,
                      num_decoder_layers=s.layers, num_heads=s.heads, vocab_size=32128, gated=False,
                      tied=True, scaled=True)


def random_t5(s):
    """A T5 with random weights of a size at which activations stay of order 1."""
    config, generator = shape(s), torch.Generator().manual_seed(0)
    weights = {name: torch.ones(shape) if "norm" in name else
               torch.randn(shape, generator=generator) * (0.7 * shape[-1] ** -0.5)
               for name, shape in T.expected_shapes(config).items()}
    weights = {name: w.to(s.device, getattr(torch, s.dtype)) for name, w in weights.items()}
    return T.T5(config, {"lm_head.weight": weights["shared.weight"], **weights})


def random_examples(n, seed, s, share=1.0):
    """n texts of s.shortest .. s.longest tokens, times share, with two label words of T5's."""
    rng = np.random.default_rng(seed)
    lengths = (rng.integers(s.shortest, s.longest + 1, n) * share).astype(int)
    ids = [rng.integers(3, 32_000, length).tolist() for length in lengths]
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, s.d), torch.arange(n) % 2,
                         [[32099, 4273], [32099, 150]])


def random_pairs(s):
    """s.tasks pairs (task, partner)."""
    sets = [[random_examples(n, (i, j), s) for j, n in enumerate((s.support, s.query, s.query))]
            for i in range(s.tasks)]
    return [(data.Task("sp-cluster", (0,), a, b), data.Task("sp-cluster", (0,), a, c))
            for a, b, c in sets]


def hf_model(t5):
    """transformers' T5, frozen, with eager attention and these weights."""
    from transformers import T5Config, T5ForConditionalGeneration
    c, table = t5.config, t5.weights["shared.weight"]
    model = T5ForConditionalGeneration(T5Config(
        d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_layers=c.num_layers,
        num_decoder_layers=c.num_decoder_layers, num_heads=c.num_heads, vocab_size=c.vocab_size,
        relative_attention_num_buckets=c.num_buckets, dropout_rate=0.0, decoder_start_token_id=0,
        relative_attention_max_distance=c.max_distance, tie_word_embeddings=c.tied,
        feed_forward_proj="gated-gelu" if c.gated else "relu", attn_implementation="eager"))
    found = model.load_state_dict(t5.weights, strict=False)         # it has the table three times
    if found.unexpected_keys or not set(found.missing_keys) <= set(T.ALIASES[1:3]):
        raise T.InputError(f"transformers' T5 has other tensors than ours: {found}")
    return model.to(table.device, table.dtype).eval().requires_grad_(False)


def hf_meta_gradient(model, theta, phi, task, partner, lam, method, padded=0):
    """meta_gradient without L_reg by autograd through transformers: create_graph, the whole batch
    at once, padded to its longest text, or to `padded` tokens -> d theta, d phi."""
    theta = theta.detach().requires_grad_()
    phi = {name: x.detach().requires_grad_() for name, x in phi.items()}

    def states(theta, examples):
        batch = data.collate(examples, range(len(examples.ids)), theta.device)
        ids, mask = (F.pad(x, (0, max(0, padded - x.shape[1]))) for x in (batch.ids, batch.mask))
        text = model.get_input_embeddings()(ids)
        x = torch.cat([theta.to(text.dtype).expand(len(ids), -1, -1), text], 1)
        mask = F.pad(mask, (len(theta), 0), value=True)
        return model.encoder(inputs_embeds=x, attention_mask=mask)[0], mask, \
            batch.targets.to(theta.dtype)

    def loss(examples, H, mask, Y):
        start = torch.tensor([[T.PAD, examples.words[0][0]]], device=H.device).expand(len(H), -1)
        logits = model(encoder_outputs=(H.to(model.dtype),), attention_mask=mask,
                       decoder_input_ids=start).logits[:, 1]
        log_p = torch.log_softmax(logits.to(theta.dtype), -1)[:, [w[1] for w in examples.words]]
        return -(Y * log_p).sum() / len(Y)

    support = states(theta, task.support)
    g, = torch.autograd.grad(loss(task.support, *support), theta,
                             create_graph=not method.first_order)
    pooled = pool(support[0], support[1]).mean(0).detach().to(theta.dtype)
    adapted = inner_step(theta, phi, g, pooled, method)
    mixed = mix(*states(adapted, task.query), *states(adapted, partner.query), lam)
    d_theta, *d_phi = torch.autograd.grad(loss(task.query, *mixed), [theta, *phi.values()])
    return d_theta, dict(zip(phi, d_phi))


# ---------------------------------------------- the contenders: sizes -> a function to measure

def step(s, hf=False, padded=False, **how):
    """An exact step by this repository, or by transformers and autograd; with first_order and
    padded as the released code does it."""
    t5, pairs = random_t5(s), random_pairs(s)
    theta, method = init_prompt(t5, s.prompt, 0), Method(inner_rate=RATE, micro_tokens=s.micro_tokens, **how)
    phi = init_phi(theta, method)
    if not hf:
        return lambda: [meta_gradient(t5, theta, phi, *pair, LAM, 0.5, method) for pair in pairs]
    model, length = hf_model(t5), s.padded if padded else 0
    return lambda: [hf_meta_gradient(model, theta, phi, *pair, LAM, method, length)
                    for pair in pairs]


def embedding(s, hf=False):
    """Random sentences in the batches of the corpus's own pass, or sorted by length, 32 at a time.
    """
    t5, lengths = random_t5(s), np.random.default_rng(5).poisson(25, s.sentences).clip(3)
    offsets = np.concatenate([[0], lengths.cumsum()])                       # (n + 1,)
    tokens = np.random.default_rng(6).integers(3, 32_000, offsets[-1]).astype(np.uint16)
    if not hf:
        return lambda: [H for _, H in corpus._embedded(
            tokens, offsets, np.arange(s.sentences),
            lambda ids, mask: corpus.embed_sentences(t5, ids, mask), corpus.BATCH_TOKENS[s.device[:4]])]
    model = hf_model(t5).encoder
    texts = sorted((torch.from_numpy(part.astype(np.int64))
                    for part in np.split(tokens, offsets[1:-1])), key=len)

    @torch.no_grad()
    def run():
        for start in range(0, len(texts), 32):
            ids = torch.nn.utils.rnn.pad_sequence(texts[start:start + 32], batch_first=True)
            ids = ids.to(model.device)
            mask = (ids > 0)[..., None]                                     # (32, T, 1)
            (model(input_ids=ids, attention_mask=mask[..., 0])[0] * mask).sum(1) / mask.sum(1)
    return run


def tuning(s, peft=False):
    """A step of few-shot prompt tuning, ours or PEFT's, which pads the batch to its longest text:
    gradient, clip, AdamW."""
    t5, examples = random_t5(s), random_examples(s.batch, 7, s, 0.25)
    if peft:
        from peft import PromptTuningConfig, get_peft_model
        model = get_peft_model(hf_model(t5), PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=s.prompt))
        batch = data.collate(examples, range(s.batch), s.device)
        labels = torch.tensor(examples.words, device=s.device)[examples.labels]
        parameters = [x for x in model.parameters() if x.requires_grad]

        def gradient():
            model(input_ids=batch.ids, attention_mask=batch.mask.long(),
                  labels=labels).loss.backward()
    else:
        parameters, method = [init_prompt(t5, s.prompt, 0)], Method()

        def gradient():
            parameters[0].grad, _, _ = prompt_gradient(t5, *parameters, examples, method)
    optimizer = torch.optim.AdamW(parameters, 0.1)

    def run():
        gradient()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return run


def clustering(s, by=""):
    """10 of Lloyd's iterations on points around s.clusters centers, from the first of them -> the
    inertia; by scikit-learn ("sklearn") or "faiss", which counts its last assignment apart."""
    rng = np.random.default_rng(8)
    centers = rng.standard_normal((s.clusters, s.d), dtype=np.float32)
    points = centers[rng.integers(0, s.clusters, s.points)]
    points += 2 * rng.standard_normal(points.shape, dtype=np.float32)
    start = points[:s.clusters].copy()
    if by == "sklearn":
        from sklearn.cluster import KMeans
        one = KMeans(s.clusters, init=start, n_init=1, max_iter=10, tol=0)
        return lambda: one.fit(points).inertia_
    if by == "faiss":
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())

        def run():
            found = faiss.Kmeans(s.d, s.clusters, niter=10, max_points_per_centroid=s.points)
            found.train(points, init_centroids=start)
            return float(found.index.search(points, 1)[0].astype(np.float64).sum())
        return run
    points, start = (torch.from_numpy(x).to(s.device) for x in (points, start))
    return lambda: kmeans(points, s.clusters, 0, 10, centroids=start).inertia[-1]


def token_ids(s, library=False):
    """The sentences of tiny/'s first documents to token ids, as the corpus gets them, or by one
    call of the tokenizers library's own."""
    tokenizer = data.load_tokenizer(common.TINY, T.read_config(common.TINY))
    documents = corpus.documents([common.TINY / "corpus.jsonl.gz"])
    texts = [sentence for _, document in zip(range(s.documents), documents)
             for paragraph in document for sentence in corpus.split_sentences(paragraph)]
    if library:
        return lambda: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return lambda: data.tokenize(tokenizer, texts)


# ------------------------------------------------------------------------------------- measuring

def groups(s):
    """Who is measured beside whom: lists of {label: (contender, its sizes)}; "once": repeated 1."""
    half, deep = replace(s, dtype="bfloat16"), replace(s, layers=2 * s.layers)
    small, kept = replace(s, layers=1), partial(step, keep_graphs=1000)
    hf_step = partial(step, hf=True)
    return [
        {"exact, recomputed": (step, s), "exact, graphs kept": (kept, s),
         "first order": (partial(step, first_order=True), s),
         "transformers, create_graph": (hf_step, s),
         "transformers, first order, padded": (partial(hf_step, padded=True, first_order=True), s)},
        {"bf16 exact, graphs kept": (kept, half),
         "bf16 transformers, create_graph": (hf_step, half)},
        {"twice the layers (once)": (step, deep),
         "transformers, twice the layers (once)": (hf_step, deep),
         "four times the support (once)": (step, replace(s, support=4 * s.support))},
        {"embedding": (embedding, deep),
         "transformers' encoder": (partial(embedding, hf=True), deep)},
        {"few-shot step": (tuning, s), "PEFT's few-shot step": (partial(tuning, peft=True), s)},
        {"k-means": (clustering, s), "scikit-learn": (partial(clustering, by="sklearn"), s),
         "faiss": (partial(clustering, by="faiss"), s)},
        {"tokens to ids": (token_ids, s), "tokenizers": (partial(token_ids, library=True), s)},
        {"1 layer": (step, small), "1 layer, 2 x tasks": (step, replace(small, tasks=2)),
         "1 layer, 2 x support": (step, replace(small, support=2 * s.support)),
         "1 layer, 2 x text": (step, replace(small, shortest=2 * s.shortest,
                                                  longest=2 * s.longest)),
         "1 layer, 2 x prompt": (step, replace(small, prompt=2 * s.prompt))}]


EXACT, KEPT, HF, GROWN = ("exact, recomputed", "exact, graphs kept", "transformers, create_graph",
                          "1 layer, 2 x ")
# label, against, what is compared, at most (at the full sizes)
RATIOS = [
    (EXACT, "first order", "seconds", 1.9), (KEPT, "first order", "seconds", 1.55),
    (EXACT, HF, "seconds", 0.55), (KEPT, HF, "seconds", 0.45), (EXACT, HF, "MB", 0.40),
    ("twice the layers (once)", "transformers, twice the layers (once)", "MB", 0.25),
    ("four times the support (once)", EXACT, "MB", 1.1),
    (EXACT, "transformers, first order, padded", "seconds", 0.35),
    ("bf16 exact, graphs kept", "bf16 transformers, create_graph", "seconds", 0.9),
    ("bf16 exact, graphs kept", "bf16 transformers, create_graph", "MB", 0.9),
    ("embedding", "transformers' encoder", "seconds", 0.40),
    ("k-means", "scikit-learn", "seconds", 0.55), ("k-means", "faiss", "seconds", 0.70),
    ("tokens to ids", "tokenizers", "seconds", 1.1),
    ("few-shot step", "PEFT's few-shot step", "seconds", 0.6),
    *((GROWN + what, "1 layer", "half the seconds", 1.1)
      for what in ("tasks", "support", "text", "prompt"))]


def peak_bytes(device, reset=False):
    """The most memory that this process held since the last reset."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


READY = []          # in a contender's process: the function to measure, the bytes held before it


def measure(contender, s, threads):
    """In a contender's process, which ends with its parent: run it -> (seconds, peak MB, value)."""
    if not READY:
        threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                         daemon=True).start()
        torch.set_num_threads(threads)
        contender(replace(s, **WARM))()         # libraries load parts of themselves at first use
        READY.extend((contender(s), peak_bytes(s.device, reset=True)))
    (run, loaded), began = READY, time.perf_counter()
    value = run()
    if s.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return (seconds, (peak_bytes(s.device) - loaded) / 2 ** 20,
            value if isinstance(value, float) else None)


def measure_group(group, repetitions, threads):
    """Let the contenders of a group take turns -> {label: [(seconds, MB, value)]}, [] if not run;
    {label: why it was not}."""
    found, failed = {label: [] for label in group}, {}
    with ExitStack() as stack:
        pools = {label: stack.enter_context(ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"))) for label in group}
        for repetition in range(repetitions):
            for label, pool in pools.items():
                if label in failed or repetition > 0 and "(once)" in label:
                    continue
                try:
                    found[label].append(pool.submit(measure, *group[label], threads).result())
                except Exception as error:      # of whatever kind a library raises; or it died
                    found[label], failed[label] = [], f"{type(error).__name__}: {error}"
    return found, failed


def summary(runs):
    """[(seconds, MB, value)] -> median seconds, their spread (largest - smallest) / median, the
    most MB, the last value."""
    seconds = [run[0] for run in runs]
    middle = statistics.median(seconds)
    return middle, (max(seconds) - min(seconds)) / middle, max(run[1] for run in runs), runs[-1][2]


def ratios(found):
    """{label: [(seconds, MB, value)]} -> [(label, against, what, ratio or None, at most)]."""
    rows = []
    for label, against, what, most in RATIOS:
        ratio = None
        if found.get(label) and found.get(against):
            a, b = (summary(found[name])[2 if what == "MB" else 0] for name in (label, against))
            ratio = a / b / (2 if what.startswith("half") else 1)
        rows.append((label, against, what, ratio, most))
    return rows


def product_rates(s):
    """This machine's 1e9 operations a second in products of (1024, 768) and (3072, 768), the
    better of 9 runs in the middle -> by F.linear, by t5.linear."""
    x, w = (torch.randn(n, 768, device=s.device, dtype=getattr(torch, s.dtype))
            for n in (1024, 3072))
    times = {F.linear: [], T.linear: []}
    for _ in range(9):
        for function, taken in times.items():
            began = time.perf_counter()
            function(x, w)[0, 0].item()
            taken.append(time.perf_counter() - began)
    return [2e-9 * 1024 * 768 * 3072 / statistics.median(taken) for taken in times.values()]


def operations(s):
    """Those of an exact step's products, counted on meta tensors."""
    (task, partner), = random_pairs(replace(s, tasks=1))
    t5 = stand_in(shape(s), torch.float32, "meta")
    theta, method = torch.empty(s.prompt, s.d, device="meta"), Method(micro_tokens=s.micro_tokens)
    with FlopCounterMode(display=False) as counter:
        prompt_gradient(t5, theta, task.query, method, partner.query, LAM)
        gradient_and_hessian(t5, theta, task.support, method)[3](theta)
    return counter.get_total_flops()


def machine(threads, s):
    """One line: processor, threads, versions."""
    cpu = Path("/proc/cpuinfo")
    name = cpu.read_text().partition("model name")[2].partition("\n")[0].lstrip("\t: ") \
        if cpu.exists() else ""
    name = torch.cuda.get_device_name() if s.device.startswith("cuda") else name
    return f"{name or platform.processor()}, {threads} threads, torch {torch.__version__}"


def main(argv):
    """Parse, measure group by group, print as it goes -> exit status 0."""
    parser = one_line(argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--quick", action="store_true", help="a small shape, 2 repetitions, not 5")
    parser.add_argument("--threads", type=int, default=1, help="of each process [1]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    given = parser.parse_args(argv)
    if not 1 <= given.threads <= os.cpu_count():
        raise T.InputError(f"--threads {given.threads}: 1 or more, at most {os.cpu_count()} here")
    folder = given.json and f"{given.json.absolute().parent}/"
    if folder and (given.json.is_dir() or not os.access(folder, os.W_OK)):
        raise T.InputError(f"--json {given.json}: no such folder to write a file to; name another")
    s = replace(QUICK if given.quick else Sizes(), device=str(pick_device(given.device)))
    os.environ["OMP_NUM_THREADS"] = str(given.threads)      # of scikit-learn's and faiss's, too
    torch.set_num_threads(given.threads)
    print(machine(given.threads, s))
    print("sizes:", ", ".join(f"{name} {value}" for name, value in asdict(s).items()))
    repetitions, rates, found = 2 if given.quick else 5, product_rates(s), {}
    print(f"products of matrices: F.linear {rates[0]:.0f}, t5.linear {rates[1]:.0f} GFLOP/s\n\n"
          f"{'median of ' + str(repetitions):40}{'seconds':>10}{'spread':>8}{'peak MB':>9}")
    for group in groups(s):
        runs, failed = measure_group(group, repetitions, given.threads)
        found |= runs
        for label in group:
            if label in failed:
                print(f"{label:40}   not run: {failed[label].splitlines()[0]}", flush=True)
                continue
            seconds, spread, mb, value = summary(found[label])
            print(f"{label:40}{seconds:10.3f}{spread:8.0%}{mb:9.0f}"
                  + (f"  inertia {value:.7g}" if value else ""), flush=True)
    print("\n| what | against | of | ratio | at most |\n| --- | --- | --- | --- | --- |")
    rows, share = ratios(found), None
    for label, against, what, ratio, most in rows:
        print(f"| {label} | {against} | {what} | "
              f"{'not run' if ratio is None else f'{ratio:.2f}'} | {most} |")
    if found[EXACT]:
        share = operations(s) * 1e-9 / summary(found[EXACT])[0] / max(rates)
        print(f"\nThe exact step's products alone would take {share:.0%} of its time at that rate.")
    if given.json:
        values = {"machine": machine(given.threads, s), "sizes": asdict(s), "gflops": rates,
                  "share": share, "runs": found, "ratios": rows}
        text = json.dumps(values, indent=1)
        common.atomic_write(given.json, lambda file: file.write(text.encode()))
    return 0


if __name__ == "__main__":
    run_script(main, "stopped; nothing is kept of it")
