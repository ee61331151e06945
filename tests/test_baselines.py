"""What SUPMER is compared with: baselines.py, and the ablations."""

import math
import re
from collections import Counter
from dataclasses import asdict
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
from conftest import (FILLER, NEGATIVE, PIECES, POSITIVE, SMALL, V11, accuracies, begin,
                      eval_settings, make_run, peak_of, random_task, relative, rows_of,
                      small_config, small_examples, small_state, small_t5, write_run)
from data import VARIANTS, TaskIndex, meta_task
from supmer import Method
from t5 import load_t5
from tasks import TASKS, load_test, task_examples

TUNED_BY = ("vocab", "prefix-tuning", "p-tuning-v2", "ft")


# ------------------------------------------------------------------ what learns from few examples

def wider_t5(d=32, scale=0.3, seed=3):
    """A random T5 whose states are rich enough for a tuned prompt to read two words together."""
    config = small_config(d_model=d, d_kv=8, d_ff=2 * d)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in T.expected_shapes(config).items():
        size = 1.0 if "relative" in name else scale
        mean = 1.0 if "layer_norm" in name else 0.0
        weights[name] = mean + size * torch.randn(shape, generator=generator)
    return T.T5(config, weights)


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
    settings = eval_settings(epochs=80, batch=32, words_only=True, validate_every=20)
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


def test_a_prefix_is_keys_and_values_put_in_by_hand():
    """Self-attention of both stacks with a prefix equals softmax over prefix keys (no position) and
    own keys (the stack's bias), written out head by head; another prefix gives something else."""
    t5 = small_t5(torch.float64)
    made = begin("p-tuning-v2", length=5)(t5)
    generator = torch.Generator().manual_seed(1)
    prefixes = {key: torch.randn(x.shape, generator=generator, dtype=torch.float64)
                for key, x in made.items()}
    assert set(prefixes) == {f"{stack}.block.{i}.layer.0.SelfAttention.prefix" for stack, i in (
        ("encoder", 0), ("encoder", 1), ("decoder", 0))}
    prefixed, theta = baselines.with_prefix(t5, prefixes)
    assert theta.shape == (0, 16) and set(t5.weights) == set(prefixed.weights) - set(prefixes)
    x = torch.randn(2, 6, 16, generator=generator, dtype=torch.float64)
    for stack in ("encoder", "decoder"):
        layer, w = f"{stack}.block.0.layer.0", t5.weights
        bias = T.position_bias(t5, stack, 6)
        found = T.self_attention(prefixed, layer, x, bias)
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        normed = normed * w[f"{layer}.layer_norm.weight"]
        heads = []
        for h in range(4):
            q, k, v = (normed @ w[f"{layer}.SelfAttention.{part}.weight"][4 * h:4 * h + 4].T
                       for part in "qkv")                                           # (2, 6, 4)
            pk, pv = prefixes[f"{layer}.SelfAttention.prefix"][:, h]                # (5, 4)
            scores = torch.cat([q @ pk.T, q @ k.mT + bias[0, h]], -1)               # (2, 6, 11)
            heads.append(scores.softmax(-1) @ torch.cat([pv.expand(2, 5, 4), v], 1))
        by_hand = torch.cat(heads, -1) @ w[f"{layer}.SelfAttention.o.weight"].T
        assert torch.allclose(found, by_hand, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(T.self_attention(t5, layer, x, bias), by_hand, rtol=1e-3)


def test_the_folded_mlp_is_p_tuning_v2():
    """What Prefix-Tuning keeps has P-Tuning-v2's names and shapes, keys and values of the same size
    at the start, and gives the same scores and, through the MLP, gradients: those by the chain rule
    from P-Tuning-v2's. The MLP's formula is written out for one entry."""
    t5, examples = small_t5(torch.float64), small_examples(6)
    mlp = {key: x.double() for key, x in begin("prefix-tuning", length=5)(t5).items()}
    kept = baselines.fold_prefix(t5, mlp)
    direct = begin("p-tuning-v2", length=5)(t5)
    assert {key: x.shape for key, x in kept.items()} == {key: x.shape for key, x in direct.items()}
    for key in kept:
        assert 0.5 < kept[key].square().mean().sqrt() / direct[key].square().mean().sqrt() < 2
    hidden = torch.tanh(mlp["E"][3] @ mlp["W1"] + mlp["b1"])
    column = (2 * 2 + 1) * 16 + 2 * 4 + 1           # decoder's block, value, head 2, entry 1
    last = kept["decoder.block.0.layer.0.SelfAttention.prefix"]
    assert torch.allclose(last[1, 2, 3, 1], hidden @ mlp["W2"][:, column] + mlp["b2"][column])
    method = supmer.Method(micro_tokens=40)
    g, _ = baselines.tuning_gradient(t5, baselines.BASELINES["prefix-tuning"], mlp, examples,
                                     method)
    g_direct, _ = baselines.tuning_gradient(t5, baselines.BASELINES["p-tuning-v2"], kept,
                                               examples, method)
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


def test_prompts_gradient_is_the_kernels():
    """For a prompt, tuning_gradient is supmer.prompt_gradient, up to the rounding of its sum."""
    t5, examples = small_t5(), small_examples(10)
    theta = baselines.normal_prompt(t5, 1, 3)["theta"]
    g, H = baselines.tuning_gradient(t5, baselines.BASELINES["random"], {"theta": theta}, examples,
                                     supmer.Method(micro_tokens=40))
    expected = supmer.prompt_gradient(t5, theta, examples, supmer.Method(micro_tokens=40))
    for one, other in zip((g["theta"], H), expected):
        assert relative(one, other) < 1e-6


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


def test_ppt_step_stops_on_numbers_that_are_not_finite():
    """A NaN in the weights stops the step with its number and a remedy, and changes nothing."""
    t5, state = small_state(Method())
    t5.weights["lm_head.weight"][0, 0] = float("nan")
    before = state.theta.clone()
    with pytest.raises(InputError, match="step 0: the loss is nan.*smaller prompt_rate"):
        baselines.ppt_step(t5, state, [(random_task(1), random_task(1))], Method(), 0)
    assert torch.equal(state.theta, before) and state.step == 0


def test_plain_pretraining_lowers_the_loss():
    """Forty steps on one batch of tasks lower its loss by a tenth."""
    method, pairs = Method(prompt_rate=0.3), [(random_task(1), None), (random_task(2), None)]
    t5, state = small_state(method)
    losses = [baselines.ppt_step(t5, state, pairs, method, 0)["query_loss"] for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0] and state.step == 40


METAPT = ["--method", "metapt", "--labeled", "sets"]


def test_every_method_draws_as_many_examples():
    """SUPMER's step of n tasks draws n (support + query) examples and the partners' n query: 384
    with the paper's sizes, 38.4 million in its 100,000 steps; PPT, Unified-PPT and MetaPT, of 256 a
    step, get 150,000 steps; --examples sets any method's steps; with --steps they are as given."""
    base = ["--model", "t5-base"]
    for argv, steps, per_step in (
            ([], 100_000, 384), (["--method", "ppt"], 150_000, 256),
            (["--method", "unified-ppt"], 150_000, 256), (METAPT, 150_000, 256),
            (["--ablation", "no-ta"], 150_000, 256), (["--ablation", "no-mgr"], 100_000, 384),
            (["--examples", "3840"], 10, 384), (["--method", "ppt", "--examples", "3840"], 15, 256),
            (["--method", "ppt", "--steps", "7"], 7, 256)):
        training, method, _, _ = train.parse([*base, *argv])
        assert method.steps == steps
        assert baselines.examples_per_step(training, method) == per_step


def test_the_recipes_are_the_papers():
    """MetaPT: inner 0.08, outer 0.025, patience 6, no regularizer, no augmentation (C.2); PPT: rate
    0.1; Table 4's rows, and first-order, leave out what their names say, and nothing else."""
    def recipe(*argv):
        training, method, _, control = train.parse(["--model", "t5-base", *argv])
        return asdict(training) | asdict(method), control
    usual, _ = recipe()

    def differs(*argv):
        found, _ = recipe(*argv)
        return {key: value for key, value in found.items() if value != usual[key]}
    metapt = differs(*METAPT)
    assert metapt.items() >= {
        "method": "metapt", "inner_rate": 0.08, "prompt_rate": 0.025, "patience": 6,
        "regularizer": "none", "augmentation": False, "steps": 150_000, "corpus": (),
        "labeled_share": 1.0}.items() and usual["labeled_clusters"] == 10
    assert differs("--method", "ppt") == {"method": "ppt", "regularizer": "none",
                                          "steps": 150_000}
    assert {name: differs("--ablation", name) for name in baselines.ABLATIONS} == {
        "only-sp": {"only": "sp"}, "only-mc": {"only": "mc"}, "only-ss": {"only": "ss"},
        "no-ta": {"augmentation": False, "steps": 150_000},
        "no-curriculum": {"curriculum": False}, "no-mgr": {"regularizer": "none"},
        "first-order": {"first_order": True}}
    assert usual["prompt_rate"] == 0.1
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
        assert prompts.prompt_metadata(run.folder / "prompt.safetensors")["step"] == kept


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
for _, kept in tune(frozen, "ft", begun, None, sample, 0, 1e-5, Tuning(4, 2, 2, False)):
    best = {name: x.clone() for name, x in kept.items()}""", MALLOC_MMAP_THRESHOLD_="65536")
    said = baselines.ft_memory(config) / 2 ** 20
    assert grown - estimate.LIBRARIES / 2 ** 20 < 1.25 * said and grown > 0.75 * said


@pytest.mark.parametrize("options, name", [
    ([], "supmer"), (["--method", "ppt"], "ppt"), (["--ablation", "no-mgr"], "no-mgr"),
    (["--regularizer", "none"], "no-mgr"), (["--only", "mc"], "only-mc"),
    (["--first-order"], "first-order"), (["--regularizer", "none", "--first-order"], "variant"),
    (["--regularizer", "none", "--no-curriculum"], "variant")])
def test_what_is_not_supmer_is_not_called_so(options, name):
    """A run without a part has the ablation's name, however it was asked for; none is "newest"."""
    training, method, _, _ = train.parse(options)
    assert baselines.name_of(training, method) == name


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
