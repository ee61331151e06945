"""How fast the method runs, and in how much memory, beside the usual libraries in one run.

    python bench.py             # t5-base's width, 3 + 3 layers, one thread: 15 minutes
    python bench.py --quick     # a small shape, in 3 minutes; its ratios are rough
    python bench.py --json result.json --threads 2 --device cuda

It prints the machine; its rate at matrix products, forward and backward; a line for each contender:
median seconds, their spread, peak memory above that of the loaded model and data; the ratios
between them, beside the largest that is wanted; ratios of operations, which hold on any machine.
Each contender runs in a process of its own, and they take turns, so that a noisy machine is unfair
to none. One that fails, or whose library is not installed, is "not run", with the reason. Weights
and token ids are random.
"""

import json
import os
import platform
import statistics
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import corpus
import data
import t5 as T
from estimate import stand_in
from kmeans import kmeans
from supmer import (Method, gradient_and_hessian, init_prompt, init_state, inner_step,
                    meta_gradient, mix, pool, prompt_gradient)

RATE, LAM = 50.0, 0.3               # an inner rate at which the second-order part is not noise


@dataclass(frozen=True)
class Sizes:
    """What a contender is given. A row is a support, a query or a partner's query example."""
    layers: int = 3                 # of the encoder, and of the decoder
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
    micro_tokens: int = 1024
    batch: int = 32                 # few-shot examples, of a quarter of the tokens
    sentences: int = 96             # of 25 tokens on average, embedded by twice the layers
    points: int = 50_000
    clusters: int = 250
    dtype: str = "float32"
    device: str = "cpu"


WARM = dict(layers=1, d=64, ff=64, heads=1, support=2, query=2, shortest=12, longest=20, padded=22,
            prompt=2, batch=2, sentences=4, points=100, clusters=4)
QUICK = Sizes(layers=2, d=512, ff=2048, heads=8, support=4, query=4, shortest=32, longest=96,
              padded=206, prompt=50, micro_tokens=256, batch=16, points=10_000, clusters=64)


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
    pairs = []
    for i in range(s.tasks):
        support = random_examples(s.support, (i, 0), s)
        pairs.append([data.Task("sp-cluster", (0,), support, random_examples(s.query, (i, j), s))
                      for j in (1, 2)])
    return pairs


def hf_model(t5):
    """transformers' T5, frozen, with eager attention and these weights, unless on "meta"."""
    from transformers import T5Config, T5ForConditionalGeneration
    c, table = t5.config, t5.weights["shared.weight"]
    with torch.device("meta" if table.is_meta else "cpu"):
        model = T5ForConditionalGeneration(T5Config(
            d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_layers=c.num_layers,
            num_decoder_layers=c.num_decoder_layers, num_heads=c.num_heads, dropout_rate=0.0,
            vocab_size=c.vocab_size, relative_attention_num_buckets=c.num_buckets,
            relative_attention_max_distance=c.max_distance, tie_word_embeddings=c.tied,
            decoder_start_token_id=0, feed_forward_proj="gated-gelu" if c.gated else "relu",
            attn_implementation="eager"))
    if not table.is_meta:
        found = model.load_state_dict(t5.weights, strict=False)     # it has the table three times
        if found.unexpected_keys or not set(found.missing_keys) <= set(T.ALIASES[1:3]):
            raise common.InputError(f"transformers' T5 has other tensors than ours: {found}")
    return model.to(table.device, table.dtype).eval().requires_grad_(False)


def hf_states(model, theta, examples, padded):
    """The encoder's last hidden states of [theta ; text], mask, labels, padded to that length."""
    batch = data.collate(examples, range(len(examples.ids)), theta.device)
    extra = max(0, padded - batch.ids.shape[1])
    text = model.get_input_embeddings()(F.pad(batch.ids, (0, extra)))
    x = torch.cat([theta.to(text.dtype).expand(len(text), -1, -1), text], 1)
    mask = F.pad(F.pad(batch.mask, (0, extra)), (len(theta), 0), value=True)
    H = model.encoder(inputs_embeds=x, attention_mask=additive(mask, model.dtype))[0]
    return H, mask, batch.targets.to(theta.dtype)


def additive(mask, dtype):
    """What transformers makes of a mask (B, S), whose values it reads: "meta" has none."""
    return (~mask[:, None, None]).to(dtype) * torch.finfo(dtype).min


def hf_loss(model, words, H, mask, Y):
    """The mean loss over the full vocabulary (Eq. 1)."""
    start = torch.tensor([[T.PAD, words[0][0]]], device=H.device).expand(len(H), -1)
    logits = model(encoder_outputs=(H.to(model.dtype),), decoder_input_ids=start,
                   attention_mask=additive(mask, model.dtype)).logits[:, 1]
    log_p = torch.log_softmax(logits.to(Y.dtype), -1)[:, [word[1] for word in words]]
    return -(Y * log_p).sum() / len(Y)


def hf_meta_gradient(model, theta, phi, task, partner, lam, method, padded=0):
    """meta_gradient without L_reg by autograd through transformers: create_graph, the whole batch
    at once, padded to its longest text, or to `padded` tokens -> d theta, d phi."""
    theta = theta.detach().requires_grad_()
    phi = {name: x.detach().requires_grad_() for name, x in phi.items()}
    H, mask, Y = hf_states(model, theta, task.support, padded)
    loss = hf_loss(model, task.support.words, H, mask, Y)
    g, = torch.autograd.grad(loss, theta, create_graph=not method.first_order)
    pooled = pool(H, mask).mean(0).detach().to(theta.dtype)
    adapted = inner_step(theta, phi, g, pooled, method)
    mixed = mix(*hf_states(model, adapted, task.query, padded),
                *hf_states(model, adapted, partner.query, padded), lam)
    loss = hf_loss(model, task.query.words, *mixed)
    d_theta, *d_phi = torch.autograd.grad(loss, [theta, *phi.values()])
    return d_theta, dict(zip(phi, d_phi))


# ---------------------------------------------- the contenders: sizes -> a function to measure

def step(s, hf=False, padded=False, **how):
    """An exact step by this repository, or by transformers and autograd; with first_order and
    padded as the released code does it."""
    t5, pairs = random_t5(s), random_pairs(s)
    method = Method(inner_rate=RATE, micro_tokens=s.micro_tokens, **how)
    state = init_state(init_prompt(t5, s.prompt, 0), method)
    if hf:
        one, model = partial(hf_meta_gradient, padded=s.padded if padded else 0), hf_model(t5)
        return lambda: [one(model, state.theta, state.phi, *pair, LAM, method) for pair in pairs]
    return lambda: [meta_gradient(t5, state.theta, state.phi, *pair, LAM, 0.5, method)
                    for pair in pairs]


def embedding(s, hf=False):
    """Random sentences in the batches of the corpus's own pass, or sorted by length, 32 at a time.
    """
    t5, lengths = random_t5(s), np.random.default_rng(5).poisson(25, s.sentences).clip(3)
    offsets = np.concatenate([[0], lengths.cumsum()])                       # (n + 1,)
    tokens = np.random.default_rng(6).integers(3, 32_000, offsets[-1]).astype(np.uint16)
    if not hf:
        embed, at_once = partial(corpus.embed_sentences, t5), corpus.BATCH_TOKENS[s.device[:4]]
        return lambda: corpus.embed_rows(tokens, offsets, embed, at_once, np.arange(s.sentences))
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


def clustering(s, sklearn=False):
    """10 of Lloyd's iterations on points around s.clusters centers, from the first of them -> the
    inertia."""
    rng = np.random.default_rng(8)
    centers = rng.standard_normal((s.clusters, s.d), dtype=np.float32)
    points = centers[rng.integers(0, s.clusters, s.points)]
    points += 2 * rng.standard_normal(points.shape, dtype=np.float32)
    start = points[:s.clusters].copy()
    if sklearn:
        from sklearn.cluster import KMeans
        one = KMeans(s.clusters, init=start, n_init=1, max_iter=10, tol=0)
        return lambda: one.fit(points).inertia_
    points, start = (torch.from_numpy(x).to(s.device) for x in (points, start))
    return lambda: kmeans(points, s.clusters, 0, 10, centroids=start).inertia[-1]


# ------------------------------------------------------------------------------------- measuring

def groups(s):
    """Who is measured beside whom: lists of {label: (contender, its sizes)}; "once": repeated 1."""
    half, deep = replace(s, dtype="bfloat16"), replace(s, layers=2 * s.layers)
    kept, hf_step = partial(step, keep_graphs=1000), partial(step, hf=True)
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
        {"k-means": (clustering, s), "scikit-learn": (partial(clustering, sklearn=True), s)}]


EXACT, KEPT, HF = "exact, recomputed", "exact, graphs kept", "transformers, create_graph"
# label, against, operations at most: figures that do not depend on the machine
FLOPS = [(EXACT, "first order", 1.9), (KEPT, "first order", 1.55), (EXACT, HF, 1.0),
         (KEPT, HF, 0.80)]
# label, against, what is compared, at most (at the full sizes)
RATIOS = [
    (EXACT, "first order", "seconds", 1.9), (KEPT, "first order", "seconds", 1.55),
    (EXACT, HF, "seconds", 1.0), (KEPT, HF, "seconds", 0.85), (EXACT, HF, "MB", 0.25),
    ("twice the layers (once)", "transformers, twice the layers (once)", "MB", 0.25),
    ("four times the support (once)", EXACT, "MB", 1.1),
    (EXACT, "transformers, first order, padded", "seconds", 1.0),
    ("bf16 exact, graphs kept", "bf16 transformers, create_graph", "seconds", 0.9),
    ("bf16 exact, graphs kept", "bf16 transformers, create_graph", "MB", 0.9),
    ("embedding", "transformers' encoder", "seconds", 0.80),
    ("k-means", "scikit-learn", "seconds", 1.0),
    ("few-shot step", "PEFT's few-shot step", "seconds", 1.0)]


def peak_bytes(device, reset=False):
    """The most memory that this process held since the last reset; on a CPU only Linux counts."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


READY = []          # in a contender's process: the function to measure, the bytes held before it


def measure(contender, s, threads):
    """In a contender's process: run it -> seconds, peak MB, its value if that is a number."""
    if not READY:
        torch.set_num_threads(threads)
        contender(replace(s, **WARM))()         # libraries load parts of themselves at first use
        READY.extend((contender(s), peak_bytes(s.device, reset=True)))
    run, loaded = READY
    began = time.perf_counter()
    value = run()
    if s.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    megabytes = (peak_bytes(s.device) - loaded) / 2 ** 20
    return seconds, megabytes, value if isinstance(value, float) else None


def measure_group(group, repetitions, threads):
    """Let the contenders of a group take turns -> {label: [(seconds, MB, value)]}, [] if not run;
    {label: why it was not}."""
    found, failed = {label: [] for label in group}, {}
    with ExitStack() as stack:
        pools = {label: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
                 for label in group}
        for repetition in range(repetitions):
            for label, pool in pools.items():
                if label in failed or repetition > 0 and "(once)" in label:
                    continue
                try:
                    found[label].append(pool.submit(measure, *group[label], threads).result())
                except Exception as error:      # of whatever kind a library raises; or it died
                    found[label], failed[label] = [], common.first_line(error)
    return found, failed


def summary(runs):
    """[(seconds, MB, value)] -> median seconds, their spread (largest - smallest) / median, the
    most MB, the last value."""
    seconds, megabytes, values = zip(*runs)
    middle = statistics.median(seconds)
    return middle, (max(seconds) - min(seconds)) / middle, max(megabytes), values[-1]


def ratios(found):
    """{label: [(seconds, MB, value)]} -> [(label, against, what, ratio or None, at most)]."""
    rows = []
    for label, against, what, most in RATIOS:
        ratio, place = None, 2 if what == "MB" else 0
        if found.get(label) and found.get(against):
            ours, theirs = (summary(found[name])[place] for name in (label, against))
            ratio = ours / theirs if theirs else None       # no memory where none is counted
        rows.append((label, against, what, ratio, most))
    return rows


# ------------------------------------------------------------- what the machine and the method do

def product_rates(s):
    """1e9 operations a second in products of 1,024 rows with a frozen weight (3072, 768), and with
    it transposed, as the backward pass does, median of 9 -> {direction: {path: rate}}."""
    make = partial(torch.randn, device=s.device, dtype=getattr(torch, s.dtype))
    weight, rates = make(3072, 768), {}
    for direction, w in (("forward", weight), ("backward", weight.T)):
        x, times = make(1024, w.shape[1]), {"F.linear": [], "t5.linear": []}
        for _ in range(9):
            for (name, taken), function in zip(times.items(), (F.linear, T.linear)):
                began = time.perf_counter()
                function(x, w)[0, 0].item()
                taken.append(time.perf_counter() - began)
        rates[direction] = {name: 2e-9 * 1024 * weight.numel() / statistics.median(taken)
                            for name, taken in times.items()}
    return rates


def operations(s):
    """Those of the products of one task's step, counted on meta tensors -> {label: number}."""
    (task, partner), = random_pairs(replace(s, tasks=1))
    t5 = stand_in(shape(s), torch.float32, "meta")
    theta, counts = torch.empty(s.prompt, s.d, device="meta"), {}

    def ours(method):
        prompt_gradient(t5, theta, task.query, method, partner.query, LAM)
        *_, hessian = gradient_and_hessian(t5, theta, task.support, method)
        if not method.first_order:
            hessian(theta)

    def theirs(method):
        phi = init_state(theta, method).phi
        hf_meta_gradient(hf_model(t5), theta, phi, task, partner, LAM, method)

    whole = Method(micro_tokens=s.micro_tokens)
    for label, count, method in (
            (EXACT, ours, whole), (KEPT, ours, replace(whole, keep_graphs=1000)),
            ("first order", ours, replace(whole, first_order=True)), (HF, theirs, whole)):
        with suppress(ImportError), FlopCounterMode(display=False) as counter:
            count(method)               # fails without transformers, which is not run then
            counts[label] = counter.get_total_flops()
    return counts


def machine(threads, s):
    """One line: processor, its instructions, threads, version."""
    cpu, name = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        name = cpu.read_text().partition("model name")[2].partition("\n")[0].lstrip("\t: ")
    name = torch.cuda.get_device_name() if s.device.startswith("cuda") else name
    features = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {features}, {threads} threads, torch {torch.__version__}"


# -------------------------------------------------------------------------------------- printing

def print_group(group, found, failed):
    """A line for each contender."""
    for label in group:
        if label in failed:
            print(f"{label:40}   not run: {failed[label]}", flush=True)
            continue
        seconds, spread, megabytes, value = summary(found[label])
        inertia = f"  inertia {value:.7g}" if value else ""
        print(f"{label:40}{seconds:10.3f}{spread:8.0%}{megabytes:9.0f}{inertia}", flush=True)


def print_ratios(rows, counts):
    """The tables of measured ratios and of operations."""
    print("\n| what | against | of | ratio | at most |\n| --- | --- | --- | --- | --- |")
    for label, against, what, ratio, most in rows:
        shown = "not run" if ratio is None else f"{ratio:.2f}"
        print(f"| {label} | {against} | {what} | {shown} | {most} |")
    for label, against, most in FLOPS:
        shown = f"{counts[label] / counts[against]:.2f}" if against in counts else "not run"
        print(f"| {label} | {against} | operations | {shown} | {most} |")


def main(argv):
    """Parse, measure group by group, print as it goes -> exit status 0."""
    parser = common.Parser(description=__doc__, allow_abbrev=False,
                           formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, 2 repetitions, not 5")
    parser.add_argument("--threads", type=common.number(int, False, os.cpu_count()), default=1,
                        help="of each process [1]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    given = parser.parse_args(argv)
    if given.json:
        given.json.touch()                                  # better an error now than after all
    s = replace(QUICK if given.quick else Sizes(), device=str(common.pick_device(given.device)))
    os.environ["OMP_NUM_THREADS"] = str(given.threads)      # of scikit-learn's and faiss's, too
    torch.set_num_threads(given.threads)
    print(machine(given.threads, s))
    print("sizes:", ", ".join(f"{name} {value}" for name, value in asdict(s).items()))
    rates = product_rates(s)
    for direction, paths in rates.items():
        shown = ", ".join(f"{name} {rate:.0f}" for name, rate in paths.items())
        print(f"products of matrices, {direction}: {shown} GFLOP/s")
    repetitions, found = 2 if given.quick else 5, {}
    print(f"\n{f'median of {repetitions}':40}{'seconds':>10}{'spread':>8}{'peak MB':>9}")
    for group in groups(s):
        runs, failed = measure_group(group, repetitions, given.threads)
        print_group(group, runs, failed)
        found |= runs
    rows, counts, share = ratios(found), operations(s), None
    print_ratios(rows, counts)
    if found[EXACT]:
        best = max(rate for paths in rates.values() for rate in paths.values())
        share = s.tasks * counts[EXACT] * 1e-9 / summary(found[EXACT])[0] / best
        print(f"\nThe exact step's products alone would take {share:.0%} of its time at that rate.")
    if given.json:
        values = {"machine": machine(given.threads, s), "sizes": asdict(s), "gflops": rates,
                  "share": share, "operations": counts, "runs": found, "ratios": rows}
        with common.whole_file(given.json) as file:
            file.write(json.dumps(values, indent=1).encode())
    return 0


if __name__ == "__main__":
    common.run_script(main, "stopped; nothing is kept of it")
