"""Tests of eval.py, jobs.py, predict.py and studies.py on a small world."""

import csv
import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import baselines
import candidates
import eval as evaluation
import jobs
import measure
import report
import run_folder
import supmer
import t5 as T
import tasks
import templates
from common import InputError
from conftest import (Dies, FILLER, PIECES, SMALL, eval_settings, rows_of, small_config,
                      small_examples, write_rows, write_run)

SHORT = [*SMALL, "--seeds", "10", "--rates", "0.1", "--prompt", "vocab"]


def small_group(monkeypatch, *names):
    """Let planted's files stand for these tasks of the real names; the others cannot be had."""
    for name, task in tasks.TASKS.items():
        stands_in = tasks.TASKS["planted"] if name in names else task._replace(urls=(), hub=())
        monkeypatch.setitem(tasks.TASKS, name, stands_in)


def test_prompts_by_default(place):
    """The SUPMER run of this model that finished last, else a shipped prompt or the authors'. A new
    run has the first free number."""
    assert evaluation.parse([])[0].prompt == ("shipped", "random")
    assert evaluation.parse(["--model", "t5-base"])[0].prompt == ("released", "random")
    quick, why = evaluation.parse(["--quick", "--epochs", "9", "--shots", "4"])
    assert quick.prompt == ("shipped", "shipped-ppt", "vocab", "random")
    assert (quick.task, quick.shots, quick.rates, quick.epochs) == (("source",), (4,), (0.1,), 9)
    assert why["prompt_length"].startswith("100 vectors") and why["epochs"] == "given"
    for name, ended, more in (("b", 20.0, {}), ("a", 30.0, {}), ("z", 10.0, {}),
                              ("y", 99.0, {"model": "other"}), ("w", 99.0, {"name": "no-mgr"}),
                              ("x", 0.0, {"finished": False}), ("small-1", 1.0, {})):
        write_run(f"runs/{name}", ended=ended, **more)
    assert candidates.newest_run("small") == "runs/a"
    assert candidates.newest_run("elsewhere/other") == "runs/y"
    assert run_folder.next_free("elsewhere/small", "supmer") == Path("runs/small-2")


def test_rows_are_complete(place, capsys):
    """A seed's choice is the best of its validations, is tested once, and is in the table."""
    write_run("runs/small-1")
    evaluation.main(SMALL)          # the newest finished run, and random
    path, printed = "runs/eval/small-planted.json", capsys.readouterr().out
    about = json.loads(Path(path).read_text())["prompts"]["runs/small-1"]
    assert about["model_sha256"] == T.model_fingerprint("small")
    for name, starts in (("runs/small-1", [None]), ("random", [10, 20])):
        validations = rows_of(path, prompt=name, split="validation")
        assert [(row["seed"], row["rate"], row["step"]) for row in validations] == [
            (seed, rate, step) for seed in (10, 20) for rate in (0.1, 0.3) for step in (0, 2, 3)]
        tested = rows_of(path, prompt=name, split="test", kind="tuned")
        for test, ours in zip(tested, (validations[:6], validations[6:]), strict=True):
            best = min(ours, key=evaluation.preference)
            assert [row for row in ours if row["kind"] == "tuned"] == [best]
            assert all(test[key] == best[key] for key in ("seed", "rate", "step"))
            assert (test["rows"], test["of"], best["examples"]) == (40, 40, 8)
        assert f"| {name} | {report.figure([row['accuracy'] for row in tested])} |" in printed
        untuned = rows_of(path, prompt=name, split="test", kind="untuned")
        assert [row["seed"] for row in untuned] == starts
    assert "| most frequent label | 50.0 |" in printed and "| no prompt | " in printed


def test_first_test_rows_are_fixed(place, monkeypatch):
    """--test-rows takes the same rows whatever the file's order; --dtype is the frozen T5's."""
    rows = tasks.load_test(tasks.TASKS["planted"], "data")
    first = tasks.first_rows(rows, 7)
    assert len(first) == 7 and first == tasks.first_rows(rows[::-1], 7) != rows[:7]
    loaded = []
    monkeypatch.setattr(evaluation, "load_t5", lambda *a, **how: (
        loaded.append(a[1]), T.load_t5(*a, **how))[1])
    evaluation.main([*SHORT, "--test-rows", "7", "--out", "out.json", "--dtype", "bfloat16"])
    assert loaded == [torch.bfloat16]
    assert {(row["rows"], row["of"]) for row in rows_of("out.json", split="test")} == {(7, 40)}


def test_the_papers_figures_are_those_of_the_same_backbone():
    """Another model has PT and SUPMER alone, so named; another task or number of shots nothing."""
    def lines(targets, shots, model, layers=12, not_run=()):
        rows = [{"task": task, "target": task, "shots": shots, "prompt": "random", "split": "test",
                 "kind": "tuned", "accuracy": percent} for task in targets for percent in (60, 80)]
        written = {"rows": rows, "not_run": dict.fromkeys(not_run, "why")}
        settings = eval_settings(model=model, prompt=("random",))
        config = small_config(d_model=768, num_layers=layers)
        return report.table(written, settings, config).splitlines()
    beside = lines(["sst2", "mr"], 16, "google-t5/t5-base", not_run=["trec"])
    assert len(beside) == 2 + 1 + 8
    assert beside[0] == "| accuracy in % | sst2 | mr | trec | mean of 2 |"
    assert beside[2] == "| random | 70.0 ± 14.1 | 70.0 ± 14.1 | not run | 70.0 |"
    assert beside[-1].endswith("t5-base: supmer | 87.3 ± 0.5 | 84.0 ± 0.6 | 80.2 ± 0.9 | 85.7 |")
    for model, layers in (("tiny", 12), ("models/t5-base", 2)):
        assert lines(["sst2"], 16, model, layers)[3:] == [
            "| the paper's T5-base, another model: pt | 71.9 ± 3.4 |",
            "| the paper's T5-base, another model: supmer | 87.3 ± 0.5 |"]
    assert len(lines(["movie"], 16, "t5-base")) == len(lines(["sst2"], 8, "t5-base")) == 3


def test_number_of_processes_changes_nothing(place, monkeypatch):
    """Two processes compute what one computes, bit by bit; one that dies is an InputError."""
    made, original = [], evaluation.make_job
    monkeypatch.setattr(evaluation, "make_job",
                        lambda *a, **how: made.append(original(*a, **how)) or made[-1])
    evaluation.main([*SHORT, "--rates", "0.1", "0.3"])
    alone = [job.path.read_bytes() for job in made]
    shutil.rmtree(jobs.TUNED)
    load = partial(T.load_t5, "small", torch.float32)
    with pytest.raises(InputError, match="a process ended .* Try fewer --jobs than 2"):
        with jobs.workers(load, "cpu", 2) as (_, work):
            work(made, "")
            assert [job.path.read_bytes() for job in made] == alone and len(made) == 5
            work([jobs.Job(Path("x"), Dies(), {})], "")


def test_an_interrupted_evaluation_resumes(place, monkeypatch):
    """The same command makes the missing runs alone; once more, and it tunes and scores nothing."""
    command, calls = [*SMALL, "--prompt", "vocab", "--out", "out.json"], []
    original = evaluation.tune

    def third_stops(*arguments):
        calls.append(arguments[5:7])                # seed, rate
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(evaluation, "tune", third_stops)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    evaluation.main(command)
    assert calls == [(10, 0.1), (10, 0.3), (20, 0.1), (20, 0.1), (20, 0.3)]
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored again"))
    evaluation.main(command)
    assert len(calls) == 5 and rows_of("out.json") == rows_of("out.1.json")


def test_a_stop_tests_what_is_tuned(place, monkeypatch, capsys):
    """--max-minutes ends while the second prompt is tuned: the first is tested and drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small_group(monkeypatch, "sst2", "mr")
    original = evaluation.tune_job

    def second_stops(t5, baseline, **arguments):
        if baseline == "random":
            signal.raise_signal(signal.SIGALRM)
        return original(t5, baseline, **arguments)
    monkeypatch.setattr(evaluation, "tune_job", second_stops)
    evaluation.main([*SHORT, "--prompt", "vocab", "random", "--task", "sst2", "mr", "--study",
                     "shots", "--shots", "2", "4", "--out", "out.json", "--max-minutes", "9"])
    printed = capsys.readouterr().out
    assert "| random | not run | not run | not run | not run |" in printed
    assert re.search(r"\| vocab \| \d+\.\d \| not run \|", printed)
    assert printed.count(", 2 shots |") == printed.count(", 4 shots |") == 2
    assert "the same command resumes" in printed and Path("out.png").exists()


def test_a_result_depends_on_all_that_made_it():
    """Another model, start, sample, seed or function is another file; equal ones are one."""
    def start(theta, function=baselines.given_prompt):
        return partial(function, theta=theta)

    def path(made_of="model", function=evaluation.tune_job, **changes):
        arguments = {"start": start(torch.ones(3, 16)), "seed": 10, "psi": None, **changes}
        return jobs.make_job(made_of, "a/b c", function, **arguments).path
    assert path() == path() and path().name.startswith("a_b_c-")
    other = [path("code"), path(function=evaluation.score_job), path(seed=20),
             path(start=start(torch.zeros(3, 16))),
             path(start=start(torch.ones(3, 16).view(torch.int))),      # the same bytes
             path(start=start(torch.ones(3, 16), baselines.normal_prompt)),
             path(sample=small_examples(4)), path(sample=small_examples(4, 1)),
             path(psi=partial(supmer.regularize, {"A": torch.ones(1)}))]
    assert len({path(), *other}) == 10


def test_groups_and_the_curve_over_steps(place, monkeypatch, capsys):
    """`all` names absent tasks; `dg` tunes once for all domains; a curve tests each validation."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small_group(monkeypatch, "sst2", "airlines")
    write_rows(place / "data/books.csv", 30, 3)
    monkeypatch.setitem(tasks.TASKS, "books", tasks.LabeledTask("absent.csv", "books.csv"))
    evaluation.main([*SHORT, "--study", "steps", "--task", "all", "dg", "--out", "out.json"])
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    curve = rows_of("out.json", split="test", rate=0.1)
    assert sorted((row["task"], row["target"], row["of"], row["step"]) for row in curve) == [
        (*target, step) for target in (("dg", "airlines", 40), ("dg", "books", 30),
                                       ("sst2", "sst2", 40)) for step in (0, 2, 3)]
    assert len(list(jobs.TUNED.glob("dg-vocab-*"))) == 1
    assert len(rows_of("out.json", split="test", kind="tuned")) == 3
    not_run, printed = json.loads(Path("out.json").read_text())["not_run"], capsys.readouterr().out
    assert set(not_run) == {*tasks.GROUPS["all"], *tasks.GROUPS["dg"]} - {
        "sst2", "airlines", "books"}
    assert "trec: not run; original/trec/train.csv is not in data" in printed
    with pytest.raises(InputError, match="no task can be run; trec: .*give --data FOLDER"):
        evaluation.main([*SHORT, "--task", "trec"])


OWN = ["--template", "{text} It was <X> ?", "--model", "small", "--prompt-length", "3", "--epochs",
       "2", "--seeds", "10", "--rates", "0.1", "--prompt", "vocab", "--shots", "2", "--jobs", "1"]


@pytest.mark.parametrize("header", ["label,id,text\n", ""])
def test_a_task_of_ones_own_and_its_labels(place, capsys, header):
    """A CSV file is tuned and tested; the prompt labels texts as it does, with probabilities."""
    lines = [f"{label},{'7,' * bool(header)}{word} {a} {b}"
             for label, word in (("x", "bad"), ("y", "good"), ("z", "warm"))
             for a in FILLER[:3] for b in FILLER[3:6]]
    Path("my.csv").write_text(header + "\n".join(lines) + "\n")
    evaluation.main(["--data", "my.csv", "--words", "x=terrible, y=great,z=good warm", *OWN,
                     "--header" if header else "--no-header"])
    printed = capsys.readouterr().out
    assert "[12] test rows, by seed, are left out" in printed
    assert "9 rows of label z: warm the food It was <extra_id_0> ?</s> -> good warm\n" in printed
    path = rows_of("runs/eval/small-my.json", split="validation", kind="tuned")[0]["file"]
    Path("new.txt").write_text("a good film\n" + "very dull food " * 99 + "\n")
    label = ["--model", "small", "--predict", "new.txt", "--prompt", path]
    evaluation.main([*label, "--out", "labels.csv"])
    kept, about = jobs.read_result(path)
    steps = kept | {"0:theta": kept["theta"] + 1}           # as --study steps keeps them
    save_file(steps, path, {"result": json.dumps(about)})
    evaluation.main(label)
    out, said = capsys.readouterr()
    assert out == Path("labels.csv").read_text() and "of 2 texts 1 are cut to 256 tokens" in said
    with pytest.raises(InputError, match="would replace the input"):
        evaluation.main([*label, "--out", "new.txt"])
    found, _ = csv.DictReader(open("labels.csv"))
    t5, (mask, good, warm) = T.load_t5("small"), map(PIECES.index, ("<extra_id_0>", "good", "warm"))
    tokenizer = templates.load_tokenizer("small", t5.config)
    ids = tokenizer.encode("a good film It was <extra_id_0> ?").ids
    examples = small_examples(1)._replace(
        ids=[[*ids, 1]], words=[[mask, 6], [mask, 7], [mask, good, warm]])
    chances = measure.score(t5, kept["theta"], examples, supmer.Method()).softmax(-1)[0]
    assert found["text"] == "a good film" and found["label"] == "xyz"[int(chances.argmax())]
    assert [float(found[word]) for word in ("terrible", "great", "good warm")] == pytest.approx(
        chances.tolist(), abs=1e-4)


def test_labels_need_the_prompt_of_this_model(place, capsys):
    """A tuned file of another model or shape is refused; rows all sampled are not tested."""
    Path("my.csv").write_text("label,text\n0,bad film film\n0,dull food\n"
                              "1,good film\n1,warm food\n")
    evaluation.main(["--words", "terrible,great", *OWN, "--data", "my.csv", "--max-tokens", "7"])
    printed = capsys.readouterr().out
    assert "it is tuned, not tested" in printed and "of 4 texts 1 are cut to 7 tokens" in printed
    path = rows_of("runs/eval/small-my.json", kind="tuned")[0]["file"]
    kept, result = jobs.read_result(path)
    theta, other = kept["theta"], "does not hold what was tuned"
    Path("new.txt").write_text("a good film\n")
    for tensors, changes, said in (
            ({"theta": theta[:, :-1].contiguous()}, {}, other), ({}, {}, other),
            ({"theta": theta * float("nan")}, {}, other),
            (kept, {"model_sha256": "0"}, "was tuned on another model, small"),
            (kept, {"task": result["task"] | {"words": ["a"]}}, "is not a tuned prompt")):
        save_file(tensors, path, {"result": json.dumps(result | changes)})
        with pytest.raises(InputError, match=f"{path} {said}"):
            evaluation.main(["--model", "small", "--predict", "new.txt", "--prompt", path])
    assert capsys.readouterr().out == ""


def test_in_the_spread_only_the_starts_differ(place, monkeypatch):
    """Figure 1a's seeds have the same examples and batches."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: seen.append(a[2:6]) or original(*a))
    evaluation.main([*SHORT, "--study", "spread", "--task", "planted", "--seeds", "10", "20"])
    (one, _, sample, seed), (two, _, same, again) = seen
    assert sample[0].ids == same[0].ids and sample[1].ids == same[1].ids and seed == again == 10
    assert one.keywords != two.keywords


def test_a_study_makes_the_runs_that_are_missing(place, monkeypatch, capsys):
    """A run is resumed or begun; one that train.py refuses, or that is stopped, is "not run"."""
    called, sent = [], []
    waits = iter([lambda: shutil.copytree("made", "runs/compared/small-ppt", dirs_exist_ok=True),
                  lambda: 2, lambda: signal.raise_signal(signal.SIGALRM), lambda: 0])

    def process(argv):
        called.append(argv[2:])
        return SimpleNamespace(wait=lambda: next(waits)(), send_signal=sent.append)
    monkeypatch.setattr(candidates.subprocess, "Popen", process)
    write_run("made", name="ppt")
    write_run("runs/compared/small-ppt", name="ppt", finished=False)
    asked = ["ppt", "metapt", "vocab", "supmer"]
    evaluation.main([*SHORT, "--study", "comparison", "--prompt", *asked])
    new = [["--model", "small", "--method", name, "--run", f"runs/compared/small-{name}"]
           for name in ("metapt", "supmer")]
    assert called == [["--resume", "runs/compared/small-ppt"], [*new[0], "--labeled", ""], new[1]]
    assert sent == [signal.SIGINT]
    prompts = json.loads(Path("runs/eval/small-comparison.json").read_text())["prompts"]
    assert "train.py refused" in prompts["metapt"]["not_run"]
    assert prompts["ppt"]["file"] == "runs/compared/small-ppt"
    printed = capsys.readouterr().out
    assert "| metapt | not run |" in printed and "| supmer | not run |" in printed
    assert re.search(r"\| ppt \| \d+", printed) and re.search(r"\| vocab \| \d+", printed)
    assert "the same command resumes" in printed
