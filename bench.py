"""How fast the method runs, and in how much memory, beside the usual libraries in one run.

    python bench.py             # t5-base's width, 3 + 3 layers, one thread: 15 minutes with AVX-512
    python bench.py --quick     # a small shape, in 3 minutes (AVX2: 6); rough ratios
    python bench.py --only step --micro-tokens 1024         # one group of contenders
    python bench.py --json result.json --threads 2 --device cuda --micro-tokens 2048

It prints the machine; its rate at matrix products, forward and backward; a line for each contender:
median and shortest seconds, their spread, peak memory above that of the loaded model and data; the
ratios between them, beside the largest that is wanted; with the group step also ratios of
operations, which hold on any machine. Each contender runs in a process of its own, and they take
turns, so that a noisy machine is unfair to none. On a busy one trust the shortest times: noise only
adds. A contender that fails, or whose library is not installed, is "not run", with the reason.
"""

import json
import os
import platform
import statistics
import time
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
import settings
import t5 as T
from contenders import (LAM, QUICK, WARM, Sizes, clustering, embedding, hf_meta_gradient, hf_model,
                        random_pairs, shape, step, tuning)
from shapes import stand_in
from supmer import Method, gradient_and_hessian, init_state, prompt_gradient


# ------------------------------------------------------------------------------------- measuring

def groups(s):
    """Who is measured beside whom -> {group: {label: (contender, its sizes)}}; "(once)": in one
    repetition only."""
    half, deep = replace(s, dtype="bfloat16"), replace(s, layers=2 * s.layers)
    kept, hf_step = partial(step, keep_graphs=1000), partial(step, hf=True)
    padded = partial(hf_step, padded=True, first_order=True)
    return {
        "step": {
            "exact, recomputed": (step, s), "exact, graphs kept": (kept, s),
            "first order": (partial(step, first_order=True), s),
            "transformers, create_graph": (hf_step, s),
            "transformers, first order, padded": (padded, s)},
        "bfloat16": {
            "bf16 exact, graphs kept": (kept, half),
            "bf16 transformers, create_graph": (hf_step, half)},
        "memory": {
            "twice the layers (once)": (step, deep),
            "transformers, twice the layers (once)": (hf_step, deep),
            "four times the support (once)": (step, replace(s, support=4 * s.support))},
        "embedding": {
            "embedding": (embedding, deep),
            "transformers' encoder": (partial(embedding, hf=True), deep)},
        "few-shot": {
            "few-shot step": (tuning, s), "PEFT's few-shot step": (partial(tuning, peft=True), s)},
        "k-means": {
            "k-means": (clustering, s), "scikit-learn": (partial(clustering, sklearn=True), s)}}


EXACT, KEPT, HF = "exact, recomputed", "exact, graphs kept", "transformers, create_graph"
# label, against, what is compared, at most (at the full sizes); operations hold on any machine
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
    ("few-shot step", "PEFT's few-shot step", "seconds", 1.0),
    (EXACT, "first order", "operations", 1.9), (KEPT, "first order", "operations", 1.55),
    (EXACT, HF, "operations", 1.0), (KEPT, HF, "operations", 0.80)]


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
    """[(seconds, MB, value)] -> median and shortest seconds, their spread (largest - smallest) /
    median, the most MB, the last value."""
    seconds, megabytes, values = zip(*runs)
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / middle
    return middle, min(seconds), spread, max(megabytes), values[-1]


def ratios(found, counts):
    """{label: [(seconds, MB, value)]}, {label: operations} -> [(label, against, what, ratio or
    None, at most)], for the labels that were to be measured."""
    measured = {label: summary(runs) for label, runs in found.items() if runs}
    figures = {"seconds": {label: one[0] for label, one in measured.items()},
               "shortest": {label: one[1] for label, one in measured.items()},
               "MB": {label: one[3] for label, one in measured.items()}, "operations": counts}
    rows = []
    for label, against, what, most in RATIOS:
        if not {label, against} <= found.keys():
            continue
        for kind in ("seconds", "shortest") if what == "seconds" else (what,):
            ours, theirs = (figures[kind].get(name) for name in (label, against))
            ratio = ours / theirs if ours and theirs else None  # no memory where none is counted
            rows.append((label, against, kind, ratio, most))
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


def share_of_rate(found, counts, rates, s):
    """The share of the exact step's shortest time that its products would take at the best of the
    rates; None if it did not run."""
    if not found.get(EXACT):
        return None
    best = max(rate for paths in rates.values() for rate in paths.values())
    return s.tasks * counts[EXACT] * 1e-9 / summary(found[EXACT])[1] / best


def machine(threads, s):
    """One line: processor, its instructions, threads, version."""
    cpu, name = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        name = cpu.read_text().partition("model name")[2].partition("\n")[0].lstrip("\t: ")
    name = torch.cuda.get_device_name() if s.device.startswith("cuda") else name
    features = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {features}, {threads} threads, torch {torch.__version__}"


# -------------------------------------------------------------------------------------- printing

COLUMNS = f"{'seconds':>10}{'shortest':>10}{'spread':>8}{'peak MB':>9}"


def print_group(group, found, failed):
    """A line for each contender."""
    for label in group:
        if label in failed:
            print(f"{label:40}   not run: {failed[label]}", flush=True)
            continue
        seconds, shortest, spread, megabytes, value = summary(found[label])
        inertia = f"  inertia {value:.7g}" if value else ""
        print(f"{label:40}{seconds:10.3f}{shortest:10.3f}{spread:8.0%}{megabytes:9.0f}{inertia}",
              flush=True)


def print_ratios(rows):
    """The table of ratios."""
    print("\n| what | against | of | ratio | at most |\n| --- | --- | --- | --- | --- |")
    for label, against, what, ratio, most in rows:
        shown = "not run" if ratio is None else f"{ratio:.2f}"
        print(f"| {label} | {against} | {what} | {shown} | {most} |")


def main(argv):
    """Parse, measure group by group, print as it goes -> exit status 0."""
    parser = settings.Parser(description=__doc__, allow_abbrev=False,
                             formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, 2 repetitions, not 5")
    parser.add_argument("--only", nargs="+", choices=groups(QUICK), default=[*groups(QUICK)],
                        help="groups of contenders; one of memory's ratios needs step, too [all]")
    parser.add_argument("--micro-tokens", type=settings.number(int),
                        help="positions that our meta-steps compute together [512, as train.py on "
                        "a CPU; with --quick 256]")
    parser.add_argument("--threads", type=settings.number(int), default=1,
                        help="of each process [1]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    given = parser.parse_args(argv)
    if given.json:
        given.json.touch()                                  # better an error now than after all
    s = replace(QUICK if given.quick else Sizes(), device=str(common.pick_device(given.device)))
    s = replace(s, micro_tokens=given.micro_tokens or s.micro_tokens)
    os.environ["OMP_NUM_THREADS"] = str(given.threads)      # of scikit-learn's and faiss's, too
    torch.set_num_threads(given.threads)
    print(machine(given.threads, s))
    print("sizes:", ", ".join(f"{name} {value}" for name, value in asdict(s).items()))
    rates = product_rates(s)
    for direction, paths in rates.items():
        shown = ", ".join(f"{name} {rate:.0f}" for name, rate in paths.items())
        print(f"products of matrices, {direction}: {shown} GFLOP/s")
    repetitions, found = 2 if given.quick else 5, {}
    print(f"\n{f'median of {repetitions}':40}" + COLUMNS)
    for group in map(groups(s).get, given.only):
        runs, failed = measure_group(group, repetitions, given.threads)
        print_group(group, runs, failed)
        found |= runs
    counts = operations(s) if EXACT in found else {}
    rows, share = ratios(found, counts), share_of_rate(found, counts, rates, s)
    print_ratios(rows)
    if share:
        print("\nAt the best of those rates the exact step's products alone would take "
              f"{share:.0%} of its shortest time.")
    if given.json:
        values = {"machine": machine(given.threads, s), "sizes": asdict(s), "gflops": rates,
                  "share": share, "operations": counts, "runs": found, "ratios": rows}
        with common.whole_file(given.json) as file:
            file.write(json.dumps(values, indent=1).encode())
    return 0


if __name__ == "__main__":
    common.run_script(main, "stopped; nothing is kept of it")
