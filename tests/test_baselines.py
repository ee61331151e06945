"""What SUPMER is compared with: baselines.py, and the ablations."""

import math
import re
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
import report
import supmer
import t5 as T
import tasks
import templates
import train
from common import InputError
from conftest import (FILLER, NEGATIVE, PIECES, POSITIVE, SMALL, accuracies, eval_settings,
                      random_task, rows_of, small_config, small_examples, small_state, small_t5,
                      write_run)
from data import VARIANTS, TaskIndex, meta_task
from supmer import Method
from tasks import TASKS, load_test, task_examples


def begin(name, length=8):
    return partial(baselines.BASELINES[name].start, seed=0, length=length)


@pytest.mark.parametrize("name, rate", [("vocab", 0.3), ("prefix-tuning", 3e-3),
                                        ("p-tuning-v2", 0.1), ("ft", 1e-2)])
def test_each_method_learns_a_planted_task(name, rate):
    """16 examples a label teach each method new sentences; it changes its parameters alone."""
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
    # only a prompt's rate is in units of the table
    losses = [record["loss"] for record, _ in evaluation.tune(t5, *arguments, eval_settings(), 0.0)]
    assert (losses[0] == losses[-1]) == (name == "vocab")


def test_tunable_parameters_are_the_published_ones():
    """PT 76,800 at t5-base (C.1: 77 K); of P-Tuning-v2 two vectors a layer and position. The MLP of
    Prefix-Tuning makes as many, which begin at the same size."""
    m, out = baselines.PREFIX_WIDTH, 24 * 2 * 768
    assert baselines.parameters_at(estimate.model_shape("t5-base"), 100) == {
        "random": 76_800, "vocab": 76_800, "ft": 222_903_552, "p-tuning-v2": 20 * out,
        "prefix-tuning": 20 * 768 + 768 * m + m + m * out + out}
    t5 = small_t5()
    made, direct = (torch.stack([*baselines.BASELINES[name].fold(t5, begin(name)(t5)).values()])
                    for name in ("prefix-tuning", "p-tuning-v2"))
    assert made.shape == direct.shape and 0.8 < made.std() / direct.std() < 1.25


@pytest.mark.parametrize("name, tied", [("vocab", False), ("prefix-tuning", False),
                                        ("p-tuning-v2", True), ("ft", False), ("ft", True)])
def test_the_gradient_is_autograds(name, tied):
    """Of every parameter, in float64, in micro-batches; a tied head is the embedding's."""
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


def test_inputs_of_each_kind_literally(place, monkeypatch):
    """Multiple choice; an instruction; orders of as many solved examples as fit in CONTEXT."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    tokenizer, task = templates.load_tokenizer("small", small_config()), TASKS["planted"]
    rows = [tasks.Row(1, {"text": "nice food"})]
    shown = [tasks.Row(i % 2, {"text": f"{FILLER[i]} {(NEGATIVE, POSITIVE)[i % 2][i // 2]}"})
             for i in range(6)]
    solved = [f"{row.fields['text']} It was {task.words[row.label]} ?" for row in shown]
    row = "nice food It was <extra_id_0> ? </s>"

    def read(name, seed=0):
        return [tokenizer.decode(posed.ids[0], skip_special_tokens=False) for posed in
                baselines.BASELINES[name].pose(tokenizer, "planted", task, rows, shown, seed)]

    def few(seed=0):
        """The solved examples of each order."""
        orders = [re.fullmatch(rf"the film was good \? (.*) {re.escape(row)}", text)[1]
                  for text in read("few-shot", seed)]
        return [re.findall(r"\S+ \S+ It was \S+ \?", order) for order in orders]
    assert read("vocab") == [row] and read("zero-shot") == [f"the film was good ? {row}"]
    assert baselines.as_choice("{a} . {b}", ("yes", "no", "maybe")) == (
        "{a} . {b} ? A. yes B. no C. maybe . Answer: <X>")
    assert len(few()) == baselines.ORDERS and len(set(map(tuple, few()))) > 1
    assert all(sorted(order) == sorted(solved) for order in few()) and few() == few() != few(1)
    for room, most in ((0, 3), (1, 2)):             # of six, beside instruction and row
        monkeypatch.setattr(baselines, "CONTEXT", 5 + 7 + 3 * 6 - room)
        labels = [solved.index(text) % 2 for text in few()[0]]
        assert len(labels) == most and abs(sum(labels) - most / 2) < 1      # labels take turns
        assert all(set(order) == set(few()[0]) for order in few())
    assert set(TASKS) - {"planted"} <= set(baselines.INSTRUCTIONS)
    with pytest.raises(InputError, match="mine has no instruction"):
        baselines.pose_instructed(tokenizer, "mine", task, rows, shown, 0)


def test_unified_meta_tasks_literally(planted):
    """Unified-PPT's pairs are multiple choice among their words; all else is as ever."""
    tokenizer, store, plain = planted
    index = TaskIndex(store, tokenizer, recast=baselines.UNIFIED)
    for variant in index.variants:
        (source, target), (usual, word) = (
            templates.examples_as_text(tokenizer, meta_task(one, 0, 0, 0, variant=variant).query, 0)
            for one in (index, plain))
        words = VARIANTS[variant].words
        if words != tuple("ABCD"):
            texts = usual.removesuffix("</s>").replace(" <extra_id_0>", "")
            options = " ".join(f"{letter}. {word}" for letter, word in zip("ABC", words))
            usual = f"{texts} ? {options} . Answer: <extra_id_0></s>"
            word = "ABC"[words.index(word)]
        assert (source, target) == (usual, word)


def test_ppt_step_by_hand():
    """Three steps equal torch's Adam on the mean over all examples, at the rate / sqrt(t)."""
    method = Method(micro_tokens=24, clip=0.01)
    t5, state = small_state(method)
    phi = {name: x.clone() for name, x in state.phi.items()}
    pairs = [(random_task(1, n=3), None), (random_task(2, n=5), None)]
    theta = state.theta.clone().requires_grad_()
    adam = torch.optim.Adam([theta])
    for t in (1, 2, 3):
        losses = []
        for part in (part for task, _ in pairs for part in (task.support, task.query)):
            batch = data.collate(part, range(len(part.ids)))
            states = supmer.encode_with_prompt(t5, theta, batch)
            scores = supmer.word_log_probs(t5, *states, part.words)
            losses += [-scores[row, label] for row, label in enumerate(part.labels)]
        loss = sum(losses) / 16
        theta.grad, = torch.autograd.grad(loss, theta)
        assert torch.nn.utils.clip_grad_norm_([theta], 0.01) > 0.01
        adam.param_groups[0]["lr"] = method.prompt_rate / math.sqrt(t)
        adam.step()
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
    """Each method's settings and examples (C.2, Table 4); what is not SUPMER has another name."""
    training, method, _, _ = train.parse(["--model", "t5-base", *options.split()])
    found, usual = asdict(training) | asdict(method), asdict(train.Training()) | asdict(Method())
    usual |= {"model": "t5-base", "steps": steps, "method": training.method}
    assert {key: value for key, value in found.items() if value != usual[key]} == changes
    assert (method.steps, baselines.examples_per_step(training, method)) == (steps, per_step)
    assert baselines.name_of(training, method) == name
    assert (usual["prompt_rate"], usual["labeled_clusters"]) == (0.1, 10)


EVERY = ("zero-shot", "few-shot", "vocab", "prefix-tuning", "p-tuning-v2", "ft")


def test_every_method_in_one_table(place, monkeypatch, capsys):
    """A row for each method, and for orders of demonstrations; a kept state gives predictions."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    evaluation.main([*SMALL, "--prompt", *EVERY, "--predictions"])
    path, printed = "runs/eval/small-planted.json", capsys.readouterr().out
    for name in EVERY:
        assert f"| {name} | {report.figure(accuracies(path, prompt=name))} |" in printed
    assert {row["prompt"] for row in rows_of(path, split="validation")} == set(EVERY[2:])
    orders = rows_of(path, prompt="few-shot", kind="order")
    assert len(orders) == baselines.ORDERS - 1 and {row["seed"] for row in orders} == {10}
    t5, tokenizer = T.load_t5("small"), templates.load_tokenizer("small", small_config())
    examples = task_examples(tokenizer, TASKS["planted"], load_test(TASKS["planted"], "data"))
    for row in rows_of(path, split="validation", kind="tuned"):
        tensors, about = jobs.read_result(row["file"])
        kept = baselines.BASELINES[about["baseline"]].model(t5, tensors)
        found = measure.score(*kept, examples, Method()).argmax(-1)
        test, = rows_of(path, prompt=row["prompt"], seed=row["seed"], split="test", kind="tuned")
        assert about["baseline"] == row["prompt"] and found.tolist() == test["predictions"]


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
