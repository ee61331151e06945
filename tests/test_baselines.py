"""What SUPMER is compared with: baselines.py, and the ablations."""

import math
import re
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import baselines
import data
import estimate
import eval as evaluation
import jobs
import prompts
import supmer
import t5 as T
import tasks
import train
from common import InputError
from conftest import (FILLER, NEGATIVE, PIECES, POSITIVE, SMALL, V11, accuracies, eval_settings,
                      make_run, peak_of, random_t5, random_task, rows_of, small_config,
                      small_examples, small_state, small_t5, write_run)
from data import VARIANTS, TaskIndex, meta_task
from supmer import Method
from t5 import load_t5
from tasks import TASKS, load_test, task_examples

TUNED_BY = ("vocab", "prefix-tuning", "p-tuning-v2", "ft")


# ------------------------------------------------------------------ what learns from few examples

def begin(name, length=8):
    return partial(baselines.BASELINES[name].start, seed=0, length=length)


def wider_t5():
    """A random T5 whose states are rich enough for a tuned prompt to read two words together."""
    t5 = random_t5(32, torch.float32, seed=1, d_kv=8, d_ff=64, vocab_size=len(PIECES))
    return t5._replace(weights={name: w / 0.3 if "relative" in name else w
                                for name, w in t5.weights.items()})


def agreeing_examples(n, seed):
    """A filler, then `good film`, `bad food` (label 1) or `good food`, `bad film` (label 0): every
    word is as frequent in one label as in the other."""
    rng, mask, ids = np.random.default_rng(seed), len(PIECES) - 1, []
    for i in range(n):
        first = int(rng.integers(2))
        second = first if i % 2 else 1 - first
        ids.append([int(rng.integers(16, 26)), (8, 12)[first], (18, 19)[second], mask, 1])
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, 0), torch.arange(n) % 2,
                         [[mask, 6], [mask, 7]])


def accuracy_of(t5, name, kept, examples):
    scores = supmer.score(*baselines.BASELINES[name].model(t5, kept), examples, Method())
    return supmer.measure(scores, examples.labels)["correct"] / len(examples.ids)


@pytest.mark.parametrize("name, rate", [*zip(TUNED_BY, (0.3, 3e-3, 0.1, 3e-3))])
def test_each_method_learns_what_no_word_alone_tells(name, rate):
    """16 examples per label of a task in which every rule on one word stays at chance: each method
    learns it on a frozen random T5 and changes nothing but its parameters."""
    t5 = wider_t5()
    before = {key: w.clone() for key, w in t5.weights.items()}
    new, sample = agreeing_examples(200, 2), (agreeing_examples(32, 0), agreeing_examples(32, 1))
    for token in range(len(PIECES)):
        there = torch.tensor([token in ids for ids in new.ids])
        assert 0.4 < (there.long() == new.labels).float().mean() < 0.6
    best, highest = None, (-1.0, 0.0)
    settings = eval_settings(epochs=60, batch=32, words_only=True, validate_every=20)
    for record, kept in evaluation.tune(t5, name, begin(name), None, sample, 10, rate, settings):
        if (record["accuracy"], -record["loss"]) > highest:
            highest = record["accuracy"], -record["loss"]
            best = {key: x.clone() for key, x in kept.items()}
    untuned = baselines.BASELINES[name].fold(t5, begin(name)(t5))
    assert accuracy_of(t5, name, untuned, new) < 0.65 < 0.68 < accuracy_of(t5, name, best, new)
    assert all(torch.equal(w, before[key]) for key, w in t5.weights.items())
    assert not any(w.requires_grad or w.grad is not None for w in t5.weights.values())


def test_tunable_parameters_are_the_published_ones():
    """PT 76,800 at t5-base (C.1: 77 K); P-Tuning-v2 two vectors a layer and position; Prefix-Tuning
    its MLP's; FT all 222.9 million; on another T5 what each method's start holds."""
    base = baselines.parameters_at(estimate.model_shape("t5-base"), 100)
    m, out = baselines.PREFIX_WIDTH, 24 * 2 * 768
    assert base == {"random": 76_800, "vocab": 76_800, "ft": 222_903_552, "p-tuning-v2": 20 * out,
                    "prefix-tuning": 20 * 768 + 768 * m + m + m * out + out}
    t5 = small_t5()
    for name, number in baselines.parameters_at(t5.config, 3).items():
        one = baselines.BASELINES[name]
        assert number == sum(x.numel() for x in one.start(t5, 0, one.length or 3).values())


def test_the_folded_mlp_is_p_tuning_v2():
    """What Prefix-Tuning keeps has P-Tuning-v2's names and shapes, a prefix in each block of both
    stacks, of the same size at the start. Through the MLP it has the gradients that the chain rule
    makes of P-Tuning-v2's. The MLP's formula is written out for one entry."""
    t5, examples = small_t5(torch.float64), small_examples(6)
    mlp = {key: x.double() for key, x in begin("prefix-tuning", length=5)(t5).items()}
    kept, direct = baselines.fold_prefix(t5, mlp), begin("p-tuning-v2", length=5)(t5)
    assert {key: x.shape for key, x in kept.items()} == {key: x.shape for key, x in direct.items()}
    assert set(kept) == {f"{stack}.block.{i}.layer.0.SelfAttention.prefix"
                         for stack in ("encoder", "decoder") for i in (0, 1)}
    for key in kept:
        assert 0.5 < kept[key].square().mean().sqrt() / direct[key].square().mean().sqrt() < 2
    hidden = torch.tanh(mlp["E"][3] @ mlp["W1"] + mlp["b1"])
    column = (2 * 2 + 1) * 12 + 1 * 6 + 2           # decoder's first block, value, head 1, entry 2
    entry = kept["decoder.block.0.layer.0.SelfAttention.prefix"][1, 1, 3, 2]
    assert torch.allclose(entry, hidden @ mlp["W2"][:, column] + mlp["b2"][column])
    g, g_direct = (baselines.tuning_gradient(t5, baselines.BASELINES[name], parameters, examples,
                                             Method(micro_tokens=40))[0]
                   for name, parameters in (("prefix-tuning", mlp), ("p-tuning-v2", kept)))
    _, pull_back = torch.func.vjp(lambda mlp: baselines.fold_prefix(t5, mlp), mlp)
    chained, = pull_back(g_direct)
    assert all(torch.allclose(g[key], chained[key], rtol=1e-8, atol=1e-14) for key in g)
    assert max(float(x.abs().max()) for x in g.values()) > 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_ft_differentiates_every_weight(tied):
    """FT's gradient is autograd's with respect to all weights, in float64; a tied head is one."""
    t5, examples, one = small_t5(torch.float64), small_examples(6), baselines.BASELINES["ft"]
    if tied:
        t5 = T.T5(small_config(tied=True, scaled=True), {
            **t5.weights, "lm_head.weight": t5.weights["shared.weight"]})
    parameters = {key: x.double() for key, x in one.start(t5, 0, 0).items()}
    assert len(parameters) == len(t5.weights) - tied
    g, _ = baselines.tuning_gradient(t5, one, parameters, examples, Method(micro_tokens=40))
    leaves = {key: x.clone().requires_grad_() for key, x in parameters.items()}
    loss, _ = supmer.set_loss(*one.model(t5, leaves), examples, Method())
    loss.backward()
    assert all(torch.allclose(g[key], leaf.grad, rtol=1e-9, atol=1e-13)
               for key, leaf in leaves.items())


def test_inputs_of_each_kind_literally(place, monkeypatch):
    """Multiple choice; an instruction; an instruction and solved examples, labels in turn, every
    order of the same ones, as many as fit with the row in CONTEXT tokens, not one fewer."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    tokenizer = data.load_tokenizer("small", small_config())
    task = TASKS["planted"]
    rows = [tasks.Row(1, {"text": "nice food"})]
    shown = [tasks.Row(i % 2, {"text": f"{FILLER[i]} {(NEGATIVE, POSITIVE)[i % 2][i // 2]}"})
             for i in range(6)]

    def read(name, seed=0):
        return [tokenizer.decode(posed.ids[0], skip_special_tokens=False) for posed in
                baselines.BASELINES[name].pose(tokenizer, "planted", task, rows, shown, seed)]
    row = "nice food It was <extra_id_0> ? </s>"
    assert read("vocab") == [row] and read("zero-shot") == [f"the film was good ? {row}"]
    assert baselines.as_choice("{a} . {b}", ("yes", "no", "maybe")) == (
        "{a} . {b} ? A. yes B. no C. maybe . Answer: <X>")
    solved = {f"{r.fields['text']} It was {task.words[r.label]} ?" for r in shown}

    def parts(text):
        middle = text.removeprefix("the film was good ? ").removesuffix(row).strip()
        return re.findall(r"\S+ \S+ It was \S+ \?", middle)
    orders = [parts(text) for text in read("few-shot")]
    assert len(orders) == baselines.ORDERS and len({tuple(order) for order in orders}) > 1
    assert all(set(order) == solved and len(order) == 6 for order in orders)
    assert read("few-shot") == read("few-shot") != read("few-shot", 1)
    monkeypatch.setattr(baselines, "CONTEXT", 5 + 7 + 3 * 6)     # instruction, row, three of six
    few = [parts(text) for text in read("few-shot")]
    assert all(len(order) == 3 and set(order) == set(few[0]) for order in few)
    counts = Counter(line.split()[4] for line in few[0])
    assert max(counts.values()) - min(counts.values()) == 1      # labels take turns
    monkeypatch.setattr(baselines, "CONTEXT", 5 + 7 + 3 * 6 - 1)
    assert all(len(parts(text)) == 2 for text in read("few-shot"))
    assert set(TASKS) - {"planted"} <= set(baselines.INSTRUCTIONS)
    with pytest.raises(InputError, match="mine has no instruction"):
        baselines.pose_instructed(tokenizer, "mine", task, rows, shown, 0)


def test_unified_meta_tasks_literally(planted):
    """Unified-PPT's pairs are multiple choice among their words, the same sentences as ever; the
    other variants are as ever."""
    tokenizer, store, plain = planted
    index = TaskIndex(store, tokenizer, recast=baselines.UNIFIED)
    for variant in index.variants:
        unified, task = (meta_task(one, 0, 0, 0, variant=variant) for one in (index, plain))
        assert torch.equal(unified.query.labels, task.query.labels)
        source, target = data.examples_as_text(tokenizer, unified.query, 0)
        usual, word = data.examples_as_text(tokenizer, task.query, 0)
        words = VARIANTS[variant].words
        if words == tuple("ABCD"):
            assert (source, target) == (usual, word)
            continue
        options = " ".join(f"{letter}. {word}" for letter, word in zip("ABC", words))
        texts = usual.removesuffix("</s>").replace(" <extra_id_0>", "")
        assert source == f"{texts} ? {options} . Answer: <extra_id_0></s>"
        assert target == "ABC"[words.index(word)]


# ------------------------------------------------ where a prompt starts: PPT, MetaPT, ablations

def test_ppt_step_by_hand():
    """Three steps of PPT equal Adam on the clipped gradient of the mean loss over all examples of
    the tasks as one set, at the rate prompt_rate / sqrt(t); phi and s stay."""
    method = Method(micro_tokens=24, clip=0.01)
    t5, state = small_state(method)
    phi = {name: x.clone() for name, x in state.phi.items()}
    pairs = [(random_task(1, n=3), None), (random_task(2, n=5), None)]
    theta, m, v = state.theta.clone(), 0.0, 0.0
    for t in (1, 2, 3):
        leaf, losses = theta.clone().requires_grad_(), []
        for part in (part for task, _ in pairs for part in (task.support, task.query)):
            batch = data.collate(part, range(len(part.ids)))
            scores = supmer.word_log_probs(t5, *supmer.encode_with_prompt(t5, leaf, batch),
                                           part.words)
            losses += [-scores[row, label] for row, label in enumerate(part.labels)]
        assert len(losses) == 16
        loss = sum(losses) / 16
        g, = torch.autograd.grad(loss, leaf)
        assert g.norm() > method.clip
        g = g * (method.clip / (g.norm() + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        theta = theta - method.prompt_rate / math.sqrt(t) * (m / (1 - 0.9 ** t)) / (
            (v / (1 - 0.999 ** t)).sqrt() + 1e-8)
        log = baselines.ppt_step(t5, state, pairs, method, 0)
        assert log["query_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(state.theta, theta, rtol=1e-4, atol=1e-5) and state.step == t
    assert state.s == -1 and all(torch.equal(x, phi[name]) for name, x in state.phi.items())


NO_PSI = {"regularizer": "none"}
RECIPES = (     # options; the run's name, steps, examples a step; other settings than SUPMER's
    ("", "supmer", 100_000, 384, {}),
    ("--examples 3840", "supmer", 10, 384, {}),
    ("--method ppt", "ppt", 150_000, 256, NO_PSI),
    ("--method ppt --examples 3840", "ppt", 15, 256, NO_PSI),
    ("--method ppt --steps 7", "ppt", 7, 256, NO_PSI),
    ("--method unified-ppt", "unified-ppt", 150_000, 256, NO_PSI),
    ("--method metapt --labeled sets", "metapt", 150_000, 256, {
        "labeled": "sets", "labeled_share": 1.0, "corpus": (), "inner_rate": 0.08,
        "prompt_rate": 0.025, "patience": 6, "augmentation": False, **NO_PSI}),
    *((f"--ablation only-{kind}", f"only-{kind}", 100_000, 384, {"only": kind})
      for kind in ("sp", "mc", "ss")),
    ("--only mc", "only-mc", 100_000, 384, {"only": "mc"}),
    ("--ablation no-ta", "no-ta", 150_000, 256, {"augmentation": False}),
    ("--ablation no-curriculum", "no-curriculum", 100_000, 384, {"curriculum": False}),
    ("--ablation no-mgr", "no-mgr", 100_000, 384, NO_PSI),
    ("--regularizer none", "no-mgr", 100_000, 384, NO_PSI),
    ("--ablation first-order", "first-order", 100_000, 384, {"first_order": True}),
    ("--first-order", "first-order", 100_000, 384, {"first_order": True}),
    ("--regularizer none --first-order", "variant", 100_000, 384, NO_PSI | {"first_order": True}))


@pytest.mark.parametrize("options, name, steps, per_step, changes", RECIPES)
def test_the_recipes_are_the_papers(options, name, steps, per_step, changes):
    """SUPMER's step of n tasks draws n (support + query) examples and the partners' n query, with
    the paper's sizes 384, 38.4 million in its 100,000 steps; what draws fewer gets more steps.
    MetaPT is C.2's, Table 4's rows leave out what their names say, and nothing else. What is not
    SUPMER has another name, however it was asked for: it is never "newest"."""
    training, method, _, _ = train.parse(["--model", "t5-base", *options.split()])
    found, usual = asdict(training) | asdict(method), asdict(train.Training()) | asdict(Method())
    usual |= {"model": "t5-base", "steps": steps, "method": training.method}
    assert {key: value for key, value in found.items() if value != usual[key]} == changes
    assert (method.steps, baselines.examples_per_step(training, method)) == (steps, per_step)
    assert baselines.name_of(training, method) == name
    assert (usual["prompt_rate"], usual["labeled_clusters"]) == (0.1, 10)


def test_an_ablation_stands_alone():
    """With an option that would undo it, it is refused."""
    for contradiction in ("--method ppt", "--regularizer affine"):
        with pytest.raises(InputError, match="leave those options away"):
            train.parse(["--ablation", "no-mgr", *contradiction.split()])


def test_plain_pretraining_is_chosen_without_an_inner_step(small_world, monkeypatch):
    """PPT's kept prompt is that of the lowest loss before an inner step, SUPMER's after one."""
    for method, kept in (("ppt", "2"), ("supmer", "1")):
        run = make_run(small_world, f"{method}-chosen", method=method)
        losses, run.best = iter([(0.4, 0.1), (0.3, 0.2)]), float("inf")
        with monkeypatch.context() as patch:
            patch.setattr(train, "validate", lambda *_: dict(
                zip(("loss_before", "loss"), next(losses)), step_size=1, queries=1, variants={}))
            for _ in range(2):
                run.step()
                run.validate()
        assert prompts.load_prompt(run.folder)[2]["step"] == kept


def test_only_prompts_follow_the_tables_scale():
    """With a unit of 0 a prompt stays where it is; the other methods' rates have no unit."""
    t5, sample = small_t5(), (small_examples(4), small_examples(4))
    for name in TUNED_BY:
        records = [record["loss"] for record, _ in evaluation.tune(
            t5, name, begin(name), None, sample, 10, 0.01, eval_settings(), 0.0)]
        assert (records[0] == records[-1]) == (name == "vocab")


def test_fts_memory_is_what_it_takes():
    """Tuning all of 12 million weights on short texts, for which activations are nothing: the peak
    of a fresh process grows by what ft_memory says, within a quarter."""
    config = V11._replace(d_model=256, d_kv=64, d_ff=1024, num_heads=4, vocab_size=20_000)
    grown = peak_of(f"""
import baselines, estimate, t5, torch
from eval import Tuning, tune
from functools import partial
from types import SimpleNamespace
frozen = estimate.stand_in(t5.T5Config(*{tuple(config)}), torch.float32, "cpu")
sizes = SimpleNamespace(prompt_length=0, micro_tokens=8)
sample = [estimate.full_task(256, sizes, sizes, 4).support] * 2""", """
begun = partial(baselines.ft_start, seed=0, length=0)
for _, kept in tune(frozen, "ft", begun, None, sample, 0, 1e-5, Tuning(1, 2, 1, False)):
    best = {name: x.clone() for name, x in kept.items()}""", MALLOC_MMAP_THRESHOLD_="65536")
    said = baselines.ft_memory(config) / 2 ** 20
    assert grown - estimate.LIBRARIES / 2 ** 20 < 1.25 * said and grown > 0.75 * said


# -------------------------------------------------------- eval.py: the comparison, on small things


EVERY = ("zero-shot", "few-shot", "vocab", "prefix-tuning", "p-tuning-v2", "ft")


def test_every_method_in_one_table(place, monkeypatch, capsys):
    """One command: a row for each method; zero-shot and few-shot tune nothing; the effect of the
    demonstrations' order is in the rows; done again, nothing is tuned or scored anew; a kept state
    gives the predictions."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    argv, path = [*SMALL, "--prompt", *EVERY, "--predictions"], "runs/eval/small-planted.json"
    evaluation.main(argv)
    printed = capsys.readouterr().out
    for name in EVERY:
        assert f"| {name} | {evaluation.figure(accuracies(path, prompt=name))} |" in printed
    assert {row["prompt"] for row in rows_of(path, split="validation")} == set(EVERY[2:])
    assert {row["prompt"] for row in rows_of(path, split="test", kind="untuned")} == {
        "vocab", "no prompt", "most frequent label"}
    orders = rows_of(path, prompt="few-shot", kind="order")
    assert len(orders) == baselines.ORDERS - 1 and {row["seed"] for row in orders} == {10}
    assert "ft: 0.00 GiB more in each process" in printed
    t5, tokenizer = load_t5(Path("small")), data.load_tokenizer("small", small_config())
    examples = task_examples(tokenizer, TASKS["planted"], load_test(TASKS["planted"], "data"))
    for name in EVERY[2:]:
        tests = rows_of(path, prompt=name, split="test", kind="tuned")
        for row, test in zip(rows_of(path, prompt=name, split="validation", kind="tuned"), tests):
            tensors, about = jobs.read_result(row["file"])
            found = supmer.score(*baselines.BASELINES[name].model(t5, tensors), examples,
                                 supmer.Method()).argmax(-1)
            assert about["baseline"] == name and found.tolist() == test["predictions"]
    for name in ("tune", "score"):
        monkeypatch.setattr(evaluation, name, lambda *_: pytest.fail("done again"))
    evaluation.main(argv)
    assert rows_of(path) == rows_of("runs/eval/small-planted.1.json")


def test_unified_prompts_are_tuned_as_multiple_choice(place, monkeypatch):
    """A prompt that Unified-PPT made meets the task as it met its meta tasks; another does not."""
    for name in ("unified-ppt", "ppt"):
        write_run(f"runs/compared/small-{name}", name=name)
    monkeypatch.setattr(baselines, "LETTERS", ("nice", "warm"))     # pieces of this tokenizer
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (seen.append(a), original(*a))[1])
    evaluation.main([*SMALL, "--prompt", "unified-ppt", "ppt", "--seeds", "10", "--rates", "0.1",
                     "--task", "planted"])
    unified, plain = ([a[4][0] for a in seen if a[1] == name][0] for name in ("unified", "learned"))
    names = ["terrible", "great"], ["nice", "warm"]
    assert [[PIECES[word[1]] for word in one.words] for one in (plain, unified)] == [*names]
    assert all(6 in ids and 7 in ids for ids in unified.ids)        # its words are options there
    assert not any(6 in ids for ids in plain.ids)
