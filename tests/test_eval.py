"""Tests of eval.py, jobs.py, candidates.py, predict.py and studies.py on a small world."""

import baselines
import candidates
import csv
import data
import eval as evaluation
import jobs
import json
import numpy as np
import os
import pytest
import re
import shutil
import studies
import supmer
import t5 as T
import tasks
import torch
from common import InputError
from conftest import (Dies, FILLER, PIECES, SMALL, accuracies, eval_settings, needs_data, rows_of,
                      run_script, small_config, small_examples, small_group, small_t5, tune,
                      write_rows, write_run)
from functools import partial
from pathlib import Path
from safetensors.torch import save_file
from t5 import load_t5

SHORT = [*SMALL, "--seeds", "10", "--rates", "0.1", "--prompt", "vocab"]


# ---------------------------------------------------------------------- what comes out of a call

def test_prompts_by_default(place):
    """On a fresh clone tiny's own prompt stands in for a run; the authors' for t5-base. --quick has
    both, one seed and rate; what is given stands above presets."""
    assert evaluation.parse([])[0].prompt == ("shipped", "random")
    assert evaluation.parse(["--model", "t5-base"])[0].prompt == ("released", "random")
    assert evaluation.parse(["--quick"])[0].prompt == ("random", "vocab", "shipped")
    write_run("runs/tiny-1", model="tiny")
    quick, why = evaluation.parse(["--quick", "--epochs", "9"])
    assert quick.prompt == ("random", "vocab", "runs/tiny-1", "shipped")
    assert (quick.seeds, quick.rates, quick.epochs, quick.test_rows) == ((10,), (0.2,), 9, 300)
    assert (quick.prompt_length, quick.rate_scale) == (20, "rms") and quick.task == ("movie",)
    assert any("prompt_length 20: its texts" in line for line in why) and len(why) <= 12
    assert evaluation.parse(["--seeds", "10", "20", "10"])[0].seeds == (10, 20)


def test_newest_finished_run(place):
    """The run of this model under runs/ that finished last: no unfinished one, no newer one of
    another model or of an ablation, whatever the folders' names and order."""
    for name, ended, more in (("b", 20.0, {}), ("a", 30.0, {}), ("z", 10.0, {}),
                              ("y", 99.0, {"model": "other"}), ("w", 99.0, {"name": "no-mgr"}),
                              ("x", 0.0, {"finished": False})):
        write_run(f"runs/{name}", ended=ended, **more)
    assert candidates.newest_run("small") == "runs/a"
    assert candidates.newest_run("elsewhere/other") == "runs/y"


def test_rows_are_complete(place, capsys):
    """The JSON file has a row for each seed, rate and validation, and for each test; a seed's
    choice is the best of its validations, is tested once, and the table shows those tests."""
    write_run("runs/small-1")
    evaluation.main(SMALL)          # the newest finished run, and random
    path = "runs/eval/small-planted.json"
    written, printed = json.loads(Path(path).read_text()), capsys.readouterr().out
    assert set(written) == {"command", "settings", "prompts", "not_run", "rows"}
    about = written["prompts"]["runs/small-1"]
    assert about["model_sha256"] == T.model_fingerprint("small") and about["step"] == "7"
    for name in ("runs/small-1", "random"):
        validations = rows_of(path, prompt=name, split="validation")
        assert [(row["seed"], row["rate"], row["step"]) for row in validations] == [
            (seed, rate, step) for seed in (10, 20) for rate in (0.1, 0.3) for step in (0, 2, 3)]
        chosen = [row for row in validations if row["kind"] == "tuned"]
        tested = rows_of(path, prompt=name, split="test", kind="tuned")
        for seed, choice, test in zip((10, 20), chosen, tested, strict=True):
            ours = [row for row in validations if row["seed"] == seed]
            assert choice == min(ours, key=evaluation.preference)
            assert [test[key] for key in ("seed", "rate", "step")] == [
                choice[key] for key in ("seed", "rate", "step")]
            assert (test["rows"], test["of"], choice["examples"]) == (40, 40, 8)
        shown = evaluation.figure([row["accuracy"] for row in tested])
        assert f"| {name} | {shown} |" in printed and choice["file"] in Path(path).read_text()
        untuned = rows_of(path, prompt=name, split="test", kind="untuned")
        assert [row["seed"] for row in untuned] == ([None] if name != "random" else [10, 20])
    assert "| most frequent label | 50.0 |" in printed and "| no prompt | " in printed
    assert Path("runs/eval/small-planted.md").read_text() in printed
    assert "the paper's" not in printed.split("| accuracy")[1]


def test_first_test_rows_are_fixed(place):
    """--test-rows takes the same rows whatever the file's order; --predictions adds what was
    predicted for each."""
    path = Path("data/planted/test.csv")
    for name in ("one", "two"):
        evaluation.main([*SHORT, "--test-rows", "7", "--predictions", "--out", f"{name}.json"])
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert rows_of("one.json") == rows_of("two.json")
    row, = rows_of("one.json", split="test", kind="tuned")
    right = sum(a == b for a, b in zip(row["predictions"], row["labels"], strict=True))
    assert (row["rows"], row["of"], len(row["labels"])) == (7, 40, 7)
    assert row["accuracy"] == pytest.approx(100 * right / 7)


def a_test(task, prompt, accuracy, shots=16, kind="tuned"):
    return {"task": task, "target": task, "shots": shots, "prompt": prompt, "split": "test",
            "kind": kind, "accuracy": accuracy, "step": 9}


def shown(rows, model="t5-base", config=None, not_run=(), **changes):
    """The cells of a table, a list for each line."""
    settings = eval_settings(model=model, **{"prompt": ("random",), **changes})
    text = evaluation.table({"rows": rows, "not_run": dict.fromkeys(not_run, "why")}, settings,
                            config or small_config(d_model=768, num_layers=12, gated=False))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_papers_figures_are_those_of_the_same_backbone():
    """Under t5-base all of Table 1's methods; under another model, also one in a folder that is
    called t5-base, PT and SUPMER, named as another model's; beside a task that the table lacks, or
    other numbers of shots, nothing. The mean is over what was run."""
    rows = [a_test(task, "random", accuracy) for task in ("sst2", "mr") for accuracy in (60, 80)]
    rows += [a_test(task, "no prompt", 50, kind="untuned") for task in ("sst2", "mr")]
    beside = shown(rows, "google-t5/t5-base", not_run=["trec"])
    assert beside[0] == ["accuracy in %", "sst2", "mr", "trec", "mean of 2"]
    assert beside[2] == ["random", "70.0 ± 14.1", "70.0 ± 14.1", "not run", "70.0"]
    assert beside[-1] == ["the paper's t5-base: supmer", "87.3 ± 0.5", "84.0 ± 0.6", "80.2 ± 0.9",
                          "85.7"]
    assert len(beside) == 2 + 2 + 8
    for model, config in (("tiny", None), ("models/t5-base", small_config())):
        assert shown(rows[:2], model, config)[-2:] == [
            ["the paper's T5-base, another model: pt", "71.9 ± 3.4"],
            ["the paper's T5-base, another model: supmer", "87.3 ± 0.5"]]
    assert "paper" not in str(shown([a_test("movie", "random", 60)]))
    assert "paper" not in str(shown([a_test("sst2", "random", 60, shots=8)], shots=(8,)))


def test_a_stop_leaves_out_what_was_not_done(tmp_path):
    """Fig. 4, stopped in its second task: a column "not run" for each number of shots that is
    missing, a picture of the rest."""
    rows = [a_test("sst5", "vocab", 60, 4), a_test("sst5", "random", 60, 4),
            a_test("sst5", "vocab", 70, 8)]
    how = {"shots": (4, 8), "prompt": ("vocab", "random"), "study": "shots"}
    cells = shown(rows, not_run=["subj", "sst5"], **how)
    assert cells[0][1:] == ["sst5, 4 shots", "sst5, 8 shots", "subj, 4 shots", "subj, 8 shots"]
    assert cells[3] == ["random", "60.0", *["not run"] * 3]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    studies.draw(rows, eval_settings(**how), tmp_path / "half.png")
    assert (tmp_path / "half.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------- jobs: processes, interruptions

def test_number_of_processes_changes_nothing(place, monkeypatch):
    """Two processes compute what one computes, bit by bit. One that the system ends is an
    InputError that names --jobs."""
    made, original = [], evaluation.make_job
    monkeypatch.setattr(evaluation, "make_job",
                        lambda *a, **how: made.append(original(*a, **how)) or made[-1])
    evaluation.main([*SHORT, "--rates", "0.1", "0.3"])

    def results():
        found = [jobs.read_result(job.path) for job in made]
        return [({name: x.tolist() for name, x in tensors.items()}, [
            {**record, "seconds": 0} for record in values.get("validations", [])])
            for tensors, values in found]
    alone = results()
    shutil.rmtree(jobs.TUNED)
    load = partial(load_t5, "small", torch.float32)
    with pytest.raises(InputError, match="a process ended .* Try fewer --jobs than 2"):
        with jobs.workers(None, load, ["cpu"], 2) as work:
            work(made, "")
            assert results() == alone and len(made) == 5
            work([jobs.Job(Path("x"), Dies(), {})], "")


def test_an_interrupted_evaluation_resumes(place, monkeypatch):
    """Stopped in its third tuning run, the same command makes the missing runs, reads the other
    two, and ends with the rows of a call that was never stopped; once more, and it computes
    nothing."""
    command = [*SMALL, "--prompt", "vocab", "--out", "out.json"]
    calls, original, score = [], evaluation.tune, evaluation.score

    def tune(*arguments):
        calls.append(arguments[5:7])                # seed, rate
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(evaluation, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    assert not Path("out.json").exists() and len(list(jobs.TUNED.glob("*.safetensors"))) == 2
    evaluation.main(command)
    assert calls == [(10, 0.1), (10, 0.3), (20, 0.1), (20, 0.1), (20, 0.3)]
    rows = rows_of("out.json")
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored again"))
    evaluation.main(command)
    assert len(calls) == 5 and rows_of("out.json") == rows == rows_of("out.1.json")
    monkeypatch.setattr(evaluation, "score", score)
    shutil.rmtree(jobs.TUNED)
    evaluation.main([*command[:-1], "whole.json"])
    assert rows_of("whole.json") == rows


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), InputError("refused")])
def test_only_a_stop_tests_what_is_tuned(place, monkeypatch, capsys, stop):
    """Ctrl-C while the second prompt is tuned: the first one is tested, the table says "not run"
    for the second one and the second task. An error ends the call, nothing is written."""
    small_group(monkeypatch, "sst2", "mr")
    original = evaluation.tune_candidate

    def second_fails(context, plan, candidate, samples):
        if candidate.name == "random":
            raise stop
        return original(context, plan, candidate, samples)
    monkeypatch.setattr(evaluation, "tune_candidate", second_fails)
    argv = [*SHORT, "--prompt", "vocab", "random", "--task", "sst2", "mr", "--out", "out.json"]
    if isinstance(stop, InputError):
        with pytest.raises(InputError, match="refused"):
            evaluation.main(argv)
        assert not Path("out.json").exists()
        return
    evaluation.main(argv)
    assert {row["prompt"] for row in rows_of("out.json", split="test", kind="tuned")} == {"vocab"}
    printed = capsys.readouterr().out
    assert "| random | not run | not run |" in printed and "the same command resumes" in printed
    assert re.search(r"\| vocab \| \d+\.\d \| not run \|", printed)


def test_the_end_of_the_time_is_a_stop(place, monkeypatch):
    """--max-minutes, over while the second prompt is tuned: the first one's rows are there."""
    original = evaluation.tune_candidate

    def slow(context, plan, candidate, samples):
        if candidate.name == "random":
            evaluation.time.sleep(60)
        return original(context, plan, candidate, samples)
    monkeypatch.setattr(evaluation, "tune_candidate", slow)
    argv = [*SHORT, "--prompt", "vocab", "random", "--out", "out.json"]
    evaluation.main([*argv, "--prompt", "vocab"])           # so that only the sleep takes time
    evaluation.main([*argv, "--max-minutes", "0.03"])
    assert {row["prompt"] for row in rows_of("out.json", split="validation")} == {"vocab"}


def test_a_result_depends_on_all_that_made_it():
    """Another model, start, sample, rate or function is another file; equal ones are one."""
    def path(made_of="model", function=evaluation.tune_job, **changes):
        arguments = {"start": partial(baselines.given_prompt, theta=torch.ones(3, 16)), "seed": 10,
                     "sample": [small_examples(4)] * 2, "rate": 0.1, "psi": None, **changes}
        return jobs.make_job(made_of, "a/b c", function, **arguments).path
    assert path() == path() and path().name.startswith("a_b_c-")
    other = [path("code"), path(function=evaluation.score_job), path(seed=20), path(rate=0.2),
             path(start=partial(baselines.given_prompt, theta=torch.zeros(3, 16))),
             path(start=partial(baselines.given_prompt, theta=torch.ones(3, 16).double())),
             path(start=partial(baselines.normal_prompt, theta=torch.ones(3, 16))),
             path(sample=[small_examples(4), small_examples(4, 1)]),
             path(psi=partial(supmer.regularize, {"A": torch.ones(1)}))]
    assert len({path(), *other}) == 10


# ---------------------------------------------------------- groups, own tasks, labels, studies

def test_what_a_group_lacks_is_not_run(place, monkeypatch, capsys):
    """`all`: absent tasks are named, with where to put them, and stand in the table as not run; one
    that is asked for by its name is an error."""
    small_group(monkeypatch, "sst2", "mr")
    evaluation.main([*SHORT, "--task", "all", "--out", "all.json"])
    written, printed = json.loads(Path("all.json").read_text()), capsys.readouterr().out
    assert {row["task"] for row in written["rows"]} == {"sst2", "mr"}
    assert set(written["not_run"]) == set(tasks.GROUPS["all"]) - {"sst2", "mr"}
    assert "trec: not run; original/trec/train.csv is not in data" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| vocab |"))
    assert row.count("not run") == 10 and "mean of 2" in printed
    Path("empty").mkdir()
    for argv, said in ((["trec"], "is not in data.*give --data FOLDER"),
                       (["all", "--data", "empty"], "none of these tasks can be run")):
        with pytest.raises(InputError, match=said):
            evaluation.main([*SHORT, "--task", *argv])


def test_domain_generalization_tunes_on_airlines_alone(place, monkeypatch):
    """`dg`: one tuning for all domains, whose training files are not needed; each is tested."""
    small_group(monkeypatch, "airlines")
    for name, seed in (("books", 3), ("kitchen", 4)):
        write_rows(place / f"data/{name}.csv", 30, seed)
        monkeypatch.setitem(tasks.TASKS, name, tasks.LabeledTask("absent.csv", f"{name}.csv"))
    evaluation.main([*SHORT, "--task", "dg", "--out", "dg.json"])
    tested = rows_of("dg.json", split="test", kind="tuned")
    assert [(row["target"], row["of"]) for row in tested] == [
        ("airlines", 40), ("books", 30), ("kitchen", 30)]
    assert {row["task"] for row in rows_of("dg.json")} == {"dg"}
    assert set(json.loads(Path("dg.json").read_text())["not_run"]) == {
        "dvd", "electronics", "restaurants"}
    assert len(list(jobs.TUNED.glob("dg-vocab-*"))) == 1


OWN = ["--template", "{text} It was <X> ?", "--model", "small", "--prompt-length", "3", "--epochs",
       "2", "--seeds", "10", "--rates", "0.1", "--prompt", "vocab", "--shots", "2", "--jobs", "1"]


@pytest.mark.parametrize("header", ["label,id,text\n", ""])
def test_a_task_of_ones_own_and_its_labels(place, capsys, header):
    """A CSV file with a header or without, three labels as words or numbers, a label word of two
    pieces: tuned, tested on the rows that were not sampled. The tuned prompt then labels texts,
    with probabilities over the three; those of the two pieces are multiplied."""
    labels = {"bad": "terrible", "good": "1", "warm": "good warm"}
    more = "7," if header else ""
    lines = [f"{label},{more}{word} {a} {b}" for word, label in labels.items()
             for a in FILLER[:3] for b in FILLER[3:6]]
    Path("my.csv").write_text(header + "\n".join(lines) + "\n")
    evaluation.main(["--data", "my.csv", "--words", "terrible, great,good warm", *OWN])
    assert "[12] test rows, by seed, are left out" in capsys.readouterr().out
    record, = rows_of("runs/eval/small-my.json", split="validation", kind="tuned")
    assert record["examples"] == 6
    assert {row["of"] for row in rows_of("runs/eval/small-my.json", split="test")} == {27}
    Path("new.txt").write_text("a good film\nvery dull food\n")
    predict = ["--model", "small", "--predict", "new.txt", "--prompt", record["file"]]
    evaluation.main([*predict, "--out", "labels.csv"])
    evaluation.main(predict)
    assert capsys.readouterr().out == Path("labels.csv").read_text()
    with pytest.raises(InputError, match="would replace the input"):
        evaluation.main([*predict, "--out", "new.txt"])
    found = list(csv.DictReader(open("labels.csv")))
    assert [line["text"] for line in found] == ["a good film", "very dull food"]
    t5 = load_t5(Path("small"))
    ids = data.load_tokenizer("small", t5.config).encode("a good film It was <extra_id_0> ?").ids
    theta = jobs.read_result(record["file"])[0]["theta"]
    H, mask = supmer.encode_with_prompt(t5, theta, data.Batch(
        torch.tensor([[*ids, 1]]), torch.ones(1, len(ids) + 1, dtype=bool),
        torch.zeros(1, 0, dtype=int), torch.zeros(1, 0, 16), None))
    good, warm = (PIECES.index(word) for word in ("good", "warm"))
    decoded = T.decode(t5, torch.tensor([[0, len(PIECES) - 1, good]]), H, mask)
    p = torch.log_softmax(T.next_token_logits(t5, decoded)[0], -1)
    sums = torch.stack([p[1, 6], p[1, 7], p[1, good] + p[2, warm]]).softmax(-1)
    words = ["terrible", "great", "good warm"]
    assert [float(found[0][word]) for word in words] == pytest.approx(sums.tolist(), abs=1e-4)
    assert found[0]["label"] == words[int(sums.argmax())]


def test_labels_need_the_prompt_of_this_model(place, capsys):
    """A tuned file of another model or shape, or with numbers that are not finite, is refused by
    name, before any label. Rows that are all sampled are tuned, not tested."""
    Path("my.csv").write_text("0,bad film\n0,dull food\n1,good film\n1,warm food\n")
    evaluation.main(["--words", "terrible,great", *OWN, "--data", "my.csv"])
    printed = capsys.readouterr().out
    for said in ("it is tuned, not tested", "[1, 1] examples by label instead of 2"):
        assert said in printed
    path = rows_of("runs/eval/small-my.json", kind="tuned")[0]["file"]
    kept, result = jobs.read_result(path)
    theta = kept["theta"]
    Path("new.txt").write_text("a good film\n")
    refusal = "does not hold what was tuned"
    for tensors, changes, said in (
            ({"theta": theta[:, :-1].contiguous()}, {}, refusal),
            ({"theta": theta * float("nan")}, {}, refusal), ({"theta": theta.long()}, {}, refusal),
            ({"theta": torch.zeros(0, 16)}, {}, refusal), ({}, {}, refusal),
            ({"theta": torch.zeros(())}, {}, refusal),
            ({**kept, "more": torch.zeros(1)}, {}, refusal),
            (kept, {"model_sha256": "0"}, "was tuned on another model, small, than small is"),
            (kept, {"task": result["task"] | {"words": ["a"]}}, "is not a tuned prompt")):
        save_file(tensors, path, {"result": json.dumps(result | changes)})
        with pytest.raises(InputError, match=f"{path} {said}"):
            evaluation.main(["--model", "small", "--predict", "new.txt", "--prompt", path])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("study", ["steps", "shots", "dg", "spread"])
def test_each_figure_is_one_command(place, monkeypatch, study):
    """JSON and PNG: a test at every validation for steps, for each number of shots, domain, or
    start; in the spread only the starts differ, not the examples."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = [name for group in studies.STUDIES[study]["task"]
             for name in tasks.GROUPS.get(group, (group,))]
    small_group(monkeypatch, *names)
    argv = [word for word in SMALL if word not in ("--task", "planted", "0.3")]
    argv += ["--prompt", "vocab", "random"] + ["--shots", "2", "4"] * (study == "shots")
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (seen.append(a), original(*a))[1])
    evaluation.main([*argv, "--study", study])
    path = f"runs/eval/small-{study}.json"
    assert Path(path).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    tested = rows_of(path, split="test", kind="tuned")
    shots = (2, 4) if study == "shots" else (4,)
    assert [(row["shots"], row["target"], row["prompt"], row["seed"]) for row in tested] == [
        (n, name, prompt, seed) for n in shots for name in names for prompt in ("vocab", "random")
        for seed in (10, 20)]
    if study == "steps":
        curves = [row["step"] for row in rows_of(path, split="test", prompt="vocab", task="cb")
                  if row["kind"] in ("tuned", "step")]
        assert curves == [0, 2, 3] * 2
    samples = {json.dumps(a[4], default=lambda x: x.tolist()) for a in seen if a[5] == seen[0][5]}
    starts = {a[2](small_t5())["theta"].numpy().tobytes() for a in seen}
    assert len(starts) == 4 and (len({a[5] for a in seen}) == 1) == (study == "spread")
    assert study != "spread" or len(samples) == 1


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_presets_of_studies_are_settings(place, study):
    """Each one parses, its tasks and prompts are known, and what is given stands above it."""
    found, why = evaluation.parse(["--study", study, "--epochs", "7", "--prompt", "random"])
    for name, value in (studies.STUDIES[study] | {"prompt": ("random",), "epochs": 7}).items():
        assert getattr(found, name) == value
    assert evaluation.parse(["--study", study])[0].prompt == studies.STUDIES[study].get(
        "prompt", ("shipped", "random"))


FAKE_TRAIN = """
import json, pathlib, shutil, sys
argv = sys.argv[1:]
with open("called.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
if "metapt" in argv:
    sys.exit(2)
folder = pathlib.Path(argv[argv.index("--resume" if "--resume" in argv else "--run") + 1])
shutil.copytree("made", folder, dirs_exist_ok=True)
if "supmer" in argv:
    (folder / "run.json").write_text('{"finished": false}')
"""


def test_a_study_makes_the_runs_that_are_missing(place, monkeypatch, capsys):
    """A method of the comparison is trained at its turn, all with the same numbers, or resumed,
    whatever other runs there are; what train.py refuses is "not run"; where one is stopped, those
    before it are tested and the others are not run. eval.py itself never imports train.py."""
    Path("train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(studies, "TRAIN", Path("train.py"))
    write_run("made", name="ppt")
    write_run("runs/by-hand", name="ppt")
    write_run("runs/compared/small-ppt", name="ppt", finished=False)
    study = [*SHORT, "--study", "comparison", "--prompt"]
    evaluation.main([*study, "ppt", "metapt", "vocab", "--max-minutes", "5"])
    called = [json.loads(line) for line in Path("called.jsonl").read_text().splitlines()]
    left = [float(argv[-1]) for argv in called]
    assert 3 < left[1] <= left[0] <= 5
    assert [argv[:-2] for argv in called] == [["--resume", "runs/compared/small-ppt"], [
        "--model", "small", "--method", "metapt", "--run", "runs/compared/small-metapt",
        "--labeled", ""]]
    written = json.loads(Path("runs/eval/small-comparison.json").read_text())
    assert "train.py refused" in written["prompts"]["metapt"]["not_run"]
    assert "| metapt | not run |" in capsys.readouterr().out
    assert written["prompts"]["ppt"]["file"] == "runs/compared/small-ppt"
    evaluation.main([*study, "vocab", "supmer", "random"])          # supmer is stopped at once
    printed = capsys.readouterr().out
    assert "| supmer | not run |" in printed and "| random | not run |" in printed
    assert re.search(r"\| vocab \| \d+", printed) and "the same command resumes" in printed
    with pytest.raises(InputError, match="train.py refused"):       # by its name alone: an error
        evaluation.main([*SMALL, "--prompt", "metapt", "--labeled", "small"])
    assert "import train" not in Path(evaluation.__file__).read_text()


# ------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("argv, said", [
    (["--task", "sst3"], "no task sst3: there are movie, "),
    (["--shots", "0"], "must be above 0"),
    (["--study", "depth"], "spread"),
    (["--nonsense"], "--nonsense"),
    (["--model", "elsewhere"], "RUN|released|random|vocab"),            # no finished run
    (["--prompt", "randm"], "randm is missing: give RUN, newest, shipped, released, supmer, ppt"),
    ([*SMALL, "--prompt", "released"], "released prompts for t5-base and flan-t5-xl only"),
    ([*SMALL, "--prompt", "runs/other"], "was learned on another other than small"),
    ([*SMALL, "--prompt", "runs/long"], "--prompt-length 5"),
    ([*SMALL, "--prompt", "runs/wide"], "width 16"),
    ([*SMALL, "--data", "nowhere", "--prompt", "vocab"], "there is no such folder"),
    ([*OWN, "--data", "my.csv", "--words", "bad,bad"], "two or more that differ"),
    ([*OWN, "--data", "none.csv", "--words", "bad,good"], "none.csv"),
    ([*OWN, "--data", "my.csv", "--words", "bad,good"], "my.csv, line 3"),
    ([*OWN, "--data", "few.csv", "--words", "bad,good"], "few.csv: label 1 has 1 different"),
    (["--predict", "few.csv", "--prompt", "few.csv"], "few.csv is not a result of eval.py"),
    (["--predict", "few.csv"], "newest is missing"),
    ([*SMALL, "--prompt", "random", "--device", "gpu"], "--device gpu")])
def test_mistakes_end_in_one_line(place, monkeypatch, capsys, argv, said):
    """What the user got wrong is one line on stderr that names it, with exit status 2."""
    write_run("runs/other", model="other", finished=False)
    write_run("runs/long", finished=False, P=5)
    write_run("runs/wide", finished=False, d=24)
    Path("my.csv").write_bytes(b"0,a\n1,b\n2,c\n")
    Path("few.csv").write_bytes(b"0,a\n0,b\n1,c\n")
    assert run_script(argv, monkeypatch) == 2
    error = capsys.readouterr().err.split("\r")[-1]
    line = error[error.index("error: "):]
    assert line.count("\n") == 1 and said in line


def test_loss_that_is_not_finite(monkeypatch):
    """A loss that is not finite, at once or through a gradient of a later step, stops tuning and
    names step and rate."""
    sample, start = (small_examples(4), small_examples(4)), torch.ones(3, 16)
    broken = small_t5()
    broken.weights["lm_head.weight"][0] = float("nan")
    with pytest.raises(InputError, match=r"nan at step 0, rate 0\.1, seed 10.*--rates"):
        tune(broken, start, None, sample, 10, 0.1, eval_settings())
    monkeypatch.setattr(evaluation, "tuning_gradient", lambda t5, baseline, parameters, *_: (
        {"theta": parameters["theta"] * float("nan")}, None))
    with pytest.raises(InputError, match=r"nan at step 2, rate 0\.1"):
        tune(small_t5(), start, None, sample, 10, 0.1, eval_settings(validate_every=2))


def test_interrupt_is_one_line(place, monkeypatch, capsys):
    """Ctrl-C before anything is tuned: one line, exit status 130, no file."""
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(baselines, "tuning_gradient", interrupt)
    assert run_script(SHORT, monkeypatch) == 130
    assert "stopped" in capsys.readouterr().err and not [*place.glob("runs/eval/*.json")]


@needs_data
def test_real_sst2(place):
    """A micro evaluation on the real SST-2: its 872 test sentences, of which 444 are positive."""
    evaluation.main([*SHORT, "--task", "sst2", "--data", os.environ["SUPMER_DATA"], "--out", "a"])
    assert rows_of("a.json", kind="tuned", split="test")[0]["of"] == 872
    usual, = accuracies("a.json", prompt="most frequent label", kind="untuned")
    assert usual == pytest.approx(100 * 444 / 872)
    assert np.isfinite(accuracies("a.json")).all()
