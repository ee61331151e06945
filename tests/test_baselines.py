"""What SUPMER is compared with: baselines.py, and the ablations."""

import math
import re
from collections import Counter
from dataclasses import asdict
from functools import partial

import pytest
import torch

import baselines
import data
import estimate
import eval as evaluation
import jobs
import measure
import prompts
import report
import supmer
import t5 as T
import tasks
import templates
import train
from common import InputError
from conftest import (FILLER, NEGATIVE, PIECES, POSITIVE, SMALL, accuracies, eval_settings,
                      make_run, random_task, rows_of, small_config, small_examples, small_state,
                      small_t5, write_run)
from data import VARIANTS, TaskIndex, meta_task
from supmer import Method
from tasks import TASKS, load_test, task_examples


# ------------------------------------------------------------------ what learns from few examples

def begin(name, length=8):
    return partial(baselines.BASELINES[name].start, seed=0, length=length)


@pytest.mark.parametrize("name, rate", [("vocab", 0.3), ("prefix-tuning", 3e-3),
                                        ("p-tuning-v2", 0.1), ("ft", 1e-2)])
def test_each_method_learns_a_planted_task(name, rate):
    """16 examples a label teach each method to classify new sentences on a frozen random T5; it
    changes nothing but its parameters. Only a prompt's rate is in units of the table."""
    t5, new, best = small_t5(seed=1), small_examples(200, 2), None
    before = {key: w.clone() for key, w in t5.weights.items()}
    arguments = name, begin(name), None, (small_examples(32), small_examples(32, 1)), 10, rate
    for record, kept in evaluation.tune(t5, *arguments, eval_settings(
            epochs=40, batch=32, words_only=True, validate_every=5)):
        if not best or evaluation.preference(record) < evaluation.preference(best[0]):
            best = record, {key: x.clone() for key, x in kept.items()}
    untuned = baselines.BASELINES[name].fold(t5, begin(name)(t5))
    model = baselines.BASELINES[name].model
    right = [measure.measure(measure.score(*model(t5, kept), new, Method()), new.labels)["correct"]
             for kept in (untuned, best[1])]
    assert right[0] < 115 < 130 < right[1], right       # 100 is chance, 7 its error
    assert all(torch.equal(w, before[key]) for key, w in t5.weights.items())
    assert not any(w.requires_grad or w.grad is not None for w in t5.weights.values())
    losses = [record["loss"] for record, _ in evaluation.tune(t5, *arguments, eval_settings(), 0.0)]
    assert (losses[0] == losses[-1]) == (name == "vocab")


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


@pytest.mark.parametrize("name, tied", [("vocab", False), ("prefix-tuning", False),
                                        ("p-tuning-v2", True), ("ft", False), ("ft", True)])
def test_the_gradient_is_autograds(name, tied):
    """Of every parameter, in float64, in micro-batches: through the MLP, in both stacks, of all
    weights; a tied head is one with the embedding."""
    t5, examples, one = small_t5(torch.float64), small_examples(6), baselines.BASELINES[name]
    if tied:
        t5 = T.T5(small_config(tied=True, scaled=True), {
            **t5.weights, "lm_head.weight": t5.weights["shared.weight"]})
    parameters = {key: x.double() for key, x in begin(name, 5)(t5).items()}
    assert name != "ft" or len(parameters) == len(t5.weights) - tied
    g, _ = baselines.tuning_gradient(t5, one, parameters, examples, Method(micro_tokens=40))
    leaves = {key: x.clone().requires_grad_() for key, x in parameters.items()}
    loss, _ = supmer.set_loss(*one.model(t5, one.fold(t5, leaves)), examples, Method())
    loss.backward()
    for key, leaf in leaves.items():
        assert torch.allclose(g[key], leaf.grad, rtol=1e-8, atol=1e-13) and leaf.grad.any(), key


def test_the_folded_mlp_is_p_tuning_v2():
    """What Prefix-Tuning keeps has P-Tuning-v2's names and shapes, a prefix in each block of both
    stacks, of the same size at the start. The MLP's formula is written out for one entry."""
    t5 = small_t5(torch.float64)
    mlp = {key: x.double() for key, x in begin("prefix-tuning", length=5)(t5).items()}
    mlp["b2"] += 0.1
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


def test_inputs_of_each_kind_literally(place, monkeypatch):
    """Multiple choice; an instruction; an instruction and solved examples, labels in turn, every
    order of the same ones, as many as fit with the row in CONTEXT tokens, not one fewer."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    tokenizer, task = templates.load_tokenizer("small", small_config()), TASKS["planted"]
    rows = [tasks.Row(1, {"text": "nice food"})]
    shown = [tasks.Row(i % 2, {"text": f"{FILLER[i]} {(NEGATIVE, POSITIVE)[i % 2][i // 2]}"})
             for i in range(6)]

    def read(name, seed=0):
        return [tokenizer.decode(posed.ids[0], skip_special_tokens=False) for posed in
                baselines.BASELINES[name].pose(tokenizer, "planted", task, rows, shown, seed)]

    def solved(text):
        middle = text.removeprefix("the film was good ? ").removesuffix(row).strip()
        return re.findall(r"\S+ \S+ It was \S+ \?", middle)
    row = "nice food It was <extra_id_0> ? </s>"
    assert read("vocab") == [row] and read("zero-shot") == [f"the film was good ? {row}"]
    assert baselines.as_choice("{a} . {b}", ("yes", "no", "maybe")) == (
        "{a} . {b} ? A. yes B. no C. maybe . Answer: <X>")
    orders = [solved(text) for text in read("few-shot")]
    assert len(orders) == baselines.ORDERS and len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == sorted(f"{r.fields['text']} It was {task.words[r.label]} ?"
                                       for r in shown) for order in orders)
    assert read("few-shot") == read("few-shot") != read("few-shot", 1)
    for room, most in ((0, 3), (1, 2)):             # of six, beside instruction and row
        monkeypatch.setattr(baselines, "CONTEXT", 5 + 7 + 3 * 6 - room)
        few = [solved(text) for text in read("few-shot")]
        assert all(len(order) == most and set(order) == set(few[0]) for order in few)
        counts = Counter(line.split()[4] for line in few[0])
        assert max(counts.values()) - min(counts.values()) == most - 2      # labels take turns
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
        source, target = templates.examples_as_text(tokenizer, unified.query, 0)
        usual, word = templates.examples_as_text(tokenizer, task.query, 0)
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
    ("--method unified-ppt", "unified-ppt", 150_000, 256, NO_PSI),
    ("--method metapt --labeled sets", "metapt", 150_000, 256, {
        "labeled": "sets", "labeled_share": 1.0, "corpus": (), "inner_rate": 0.08,
        "prompt_rate": 0.025, "patience": 6, "augmentation": False, **NO_PSI}),
    *((f"{option} {name}", "only-mc", 100_000, 384, {"variants": ("mc-next", "mc-cluster")})
      for option, name in (("--ablation", "only-mc"), ("--variants", "mc-next mc-cluster"))),
    ("--ablation no-mgr --regularizer affine", "no-mgr", 100_000, 384, NO_PSI),
    ("--ablation no-ta", "no-ta", 150_000, 256, {"augmentation": False}),
    ("--ablation no-curriculum", "no-curriculum", 100_000, 384, {"curriculum": False}),
    ("--ablation no-mgr", "no-mgr", 100_000, 384, NO_PSI),
    ("--regularizer none", "no-mgr", 100_000, 384, NO_PSI),
    ("--ablation first-order", "first-order", 100_000, 384, {"first_order": True}),
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


# -------------------------------------------------------- eval.py: the comparison, on small things

EVERY = ("zero-shot", "few-shot", "vocab", "prefix-tuning", "p-tuning-v2", "ft")


def test_every_method_in_one_table(place, monkeypatch, capsys):
    """One command: a row for each method; zero-shot and few-shot tune nothing; the effect of the
    demonstrations' order is in the rows; a kept state gives the predictions."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    evaluation.main([*SMALL, "--prompt", *EVERY, "--predictions"])
    path, printed = "runs/eval/small-planted.json", capsys.readouterr().out
    for name in EVERY:
        assert f"| {name} | {report.figure(accuracies(path, prompt=name))} |" in printed
    assert {row["prompt"] for row in rows_of(path, split="validation")} == set(EVERY[2:])
    assert {row["prompt"] for row in rows_of(path, split="test", kind="untuned")} == {
        "vocab", "no prompt", "most frequent label"}
    orders = rows_of(path, prompt="few-shot", kind="order")
    assert len(orders) == baselines.ORDERS - 1 and {row["seed"] for row in orders} == {10}
    assert "ft: 0.00 GiB more in each process" in printed
    t5, tokenizer = T.load_t5("small"), templates.load_tokenizer("small", small_config())
    examples = task_examples(tokenizer, TASKS["planted"], load_test(TASKS["planted"], "data"))
    for name in EVERY[2:]:
        tests = rows_of(path, prompt=name, split="test", kind="tuned")
        for row, test in zip(rows_of(path, prompt=name, split="validation", kind="tuned"), tests):
            tensors, about = jobs.read_result(row["file"])
            found = measure.score(*baselines.BASELINES[name].model(t5, tensors), examples, Method())
            assert about["baseline"] == name and found.argmax(-1).tolist() == test["predictions"]


def test_unified_prompts_are_tuned_as_multiple_choice(place, monkeypatch):
    """A prompt that Unified-PPT made meets the task as it met its meta tasks; another does not."""
    for name in ("unified-ppt", "ppt"):
        write_run(f"runs/compared/small-{name}", name=name)
    monkeypatch.setattr(baselines, "LETTERS", ("nice", "warm"))     # pieces of this tokenizer
    seen, original = {}, evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (
        seen.setdefault(a[1], a[4][0]), original(*a))[1])
    evaluation.main([*SMALL, "--prompt", "unified-ppt", "ppt", "--seeds", "10", "--rates", "0.1"])
    names = [[PIECES[word[1]] for word in seen[one].words] for one in ("learned", "unified")]
    assert names == [["terrible", "great"], ["nice", "warm"]]
    for name in ("learned", "unified"):             # its words are options there
        assert all({6, 7} <= set(ids) for ids in seen[name].ids) == (name == "unified")
