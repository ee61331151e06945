"""Tests of eval.py, jobs.py, predict.py and studies.py on a small world."""

import baselines
import candidates
import csv
import data
import eval as evaluation
import jobs
import json
import predict
import pytest
import re
import report
import shutil
import signal
import studies
import supmer
import t5 as T
import tasks
import templates
import torch
from common import InputError
from conftest import (Dies, FILLER, PIECES, SMALL, accuracies, eval_settings, rows_of, small_config,
                      small_examples, write_rows, write_run)
from functools import partial
from pathlib import Path
from safetensors.torch import save_file
from t5 import load_t5

SHORT = [*SMALL, "--seeds", "10", "--rates", "0.1", "--prompt", "vocab"]


def small_group(monkeypatch, *names):
    """Let planted's files stand for these tasks of the real names; the others cannot be had."""
    for name, task in tasks.TASKS.items():
        stands_in = tasks.TASKS["planted"] if name in names else task._replace(urls=(), hub=())
        monkeypatch.setitem(tasks.TASKS, name, stands_in)


# ---------------------------------------------------------------------- what comes out of a call

def test_prompts_by_default(place):
    """Without a run tiny's own prompt, or the authors'; else this model's SUPMER run that finished
    last, whatever its folder's name. What is given stands above the presets of --quick."""
    assert evaluation.parse([])[0].prompt == ("shipped", "random")
    assert evaluation.parse(["--model", "t5-base"])[0].prompt == ("released", "random")
    write_run("runs/tiny-1", model="tiny")
    quick, why = evaluation.parse(["--quick", "--epochs", "9", "--shots", "4"])
    assert quick.prompt == ("shipped", "shipped-ppt", "vocab", "random")
    assert (quick.task, quick.shots, quick.rates, quick.epochs) == (("source",), (4,), (0.1,), 9)
    assert why["prompt_length"].startswith("100 vectors") and why["epochs"] == "given"
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
    assert written["prompts"]["runs/small-1"]["model_sha256"] == T.model_fingerprint("small")
    for name in ("runs/small-1", "random"):
        validations = rows_of(path, prompt=name, split="validation")
        assert [(row["seed"], row["rate"], row["step"]) for row in validations] == [
            (seed, rate, step) for seed in (10, 20) for rate in (0.1, 0.3) for step in (0, 2, 3)]
        chosen = [row for row in validations if row["kind"] == "tuned"]
        tested = rows_of(path, prompt=name, split="test", kind="tuned")
        for seed, choice, test in zip((10, 20), chosen, tested, strict=True):
            ours = [row for row in validations if row["seed"] == seed]
            assert choice == min(ours, key=evaluation.preference)
            assert all(test[key] == choice[key] for key in ("seed", "rate", "step"))
            assert (test["rows"], test["of"], choice["examples"]) == (40, 40, 8)
        assert f"| {name} | {report.figure([row['accuracy'] for row in tested])} |" in printed
        untuned = rows_of(path, prompt=name, split="test", kind="untuned")
        assert [row["seed"] for row in untuned] == ([None] if name != "random" else [10, 20])
    assert "| most frequent label | 50.0 |" in printed and "| no prompt | " in printed


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
    usual, = accuracies("one.json", prompt="most frequent label", kind="untuned")
    assert usual == pytest.approx(100 * max(row["labels"].count(label) for label in (0, 1)) / 7)


def shown(rows, model="t5-base", config=None, not_run=()):
    """The cells of a table, a list for each line. rows: (task, prompt, shots, accuracy)."""
    rows = [{"task": task, "target": task, "shots": shots, "prompt": prompt, "split": "test",
             "kind": "untuned" if prompt == "no prompt" else "tuned", "accuracy": accuracy}
            for task, prompt, shots, accuracy in rows]
    text = report.table({"rows": rows, "not_run": dict.fromkeys(not_run, "why")},
                         eval_settings(model=model, prompt=("random",)),
                         config or small_config(d_model=768, num_layers=12, gated=False))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_papers_figures_are_those_of_the_same_backbone():
    """Under t5-base all of Table 1's methods; under another model, also one in a folder of that
    name, PT and SUPMER, named as another model's; beside a task that the table lacks, or other
    numbers of shots, nothing. The mean is over what was run."""
    rows = [(task, prompt, 16, accuracy) for task in ("sst2", "mr")
            for prompt, accuracy in (("random", 60), ("random", 80), ("no prompt", 50))]
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
    for other in ("movie", 16), ("sst2", 8):
        assert "paper" not in str(shown([(other[0], "random", other[1], 60)]))


# ------------------------------------------------------------- jobs: processes, interruptions

def test_number_of_processes_changes_nothing(place, monkeypatch):
    """Two processes compute what one computes, bit by bit. One that the system ends is an
    InputError that names --jobs."""
    made, original = [], evaluation.make_job
    monkeypatch.setattr(evaluation, "make_job",
                        lambda *a, **how: made.append(original(*a, **how)) or made[-1])
    evaluation.main([*SHORT, "--rates", "0.1", "0.3"])
    alone = [job.path.read_bytes() for job in made]
    shutil.rmtree(jobs.TUNED)
    load = partial(load_t5, "small", torch.float32)
    with pytest.raises(InputError, match="a process ended .* Try fewer --jobs than 2"):
        with jobs.workers(load, "cpu", 2) as (_, work):
            work(made, "")
            assert [job.path.read_bytes() for job in made] == alone and len(made) == 5
            work([jobs.Job(Path("x"), Dies(), {})], "")


def test_an_interrupted_evaluation_resumes(place, monkeypatch):
    """Stopped in its third tuning run, the same command makes the missing runs alone; once more,
    and it tunes and scores nothing."""
    command = [*SMALL, "--prompt", "vocab", "--out", "out.json"]
    calls, original = [], evaluation.tune

    def tune(*arguments):
        calls.append(arguments[5:7])                # seed, rate
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(evaluation, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    assert not Path("out.json").exists()
    evaluation.main(command)
    assert calls == [(10, 0.1), (10, 0.3), (20, 0.1), (20, 0.1), (20, 0.3)]
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored again"))
    evaluation.main(command)
    assert len(calls) == 5 and rows_of("out.json") == rows_of("out.1.json")


@pytest.mark.parametrize("stop", ["Ctrl-C", "time"])
def test_a_stop_tests_what_is_tuned(place, monkeypatch, capsys, stop):
    """Ctrl-C or the end of --max-minutes while the second prompt is tuned: the first one is tested,
    the table says "not run" for the second one and the second task, and a study is drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small_group(monkeypatch, "sst2", "mr")
    original = evaluation.tune_job

    def second_stops(t5, baseline, **arguments):
        if baseline == "random":
            if stop == "Ctrl-C":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGALRM)
        return original(t5, baseline, **arguments)
    monkeypatch.setattr(evaluation, "tune_job", second_stops)
    evaluation.main([*SHORT, "--prompt", "vocab", "random", "--task", "sst2", "mr", "--study",
                     "shots", "--shots", "2", "4", "--out", "out.json", "--max-minutes", "9"])
    printed = capsys.readouterr().out
    assert "| random | not run | not run | not run | not run |" in printed
    assert printed.count(", 2 shots |") == printed.count(", 4 shots |") == 2
    assert re.search(r"\| vocab \| \d+\.\d \| not run \|", printed)
    assert "the same command resumes" in printed and Path("out.png").exists()


def test_a_result_depends_on_all_that_made_it():
    """Another model, start, sample, rate or function is another file; equal ones are one."""
    def start(theta, function=baselines.given_prompt):
        return partial(function, theta=theta)

    def path(made_of="model", function=evaluation.tune_job, **changes):
        arguments = {"start": start(torch.ones(3, 16)), "seed": 10, "psi": None, **changes}
        return jobs.make_job(made_of, "a/b c", function, **arguments).path
    assert path() == path() and path().name.startswith("a_b_c-")
    other = [path("code"), path(function=evaluation.score_job), path(seed=20),
             path(start=start(torch.zeros(3, 16))), path(start=start(torch.ones(3, 16).double())),
             path(start=start(torch.ones(3, 16), baselines.normal_prompt)),
             path(sample=small_examples(4)), path(sample=small_examples(4, 1)),
             path(psi=partial(supmer.regularize, {"A": torch.ones(1)}))]
    assert len({path(), *other}) == 10


# ---------------------------------------------------------- groups, own tasks, labels, studies

def test_what_a_group_lacks_is_not_run(place, monkeypatch, capsys):
    """`all`: absent tasks are named, with where to put them, and stand in the table as not run;
    where nothing is left, it is an error."""
    small_group(monkeypatch, "sst2", "mr")
    evaluation.main([*SHORT, "--task", "all", "--out", "all.json"])
    not_run, printed = json.loads(Path("all.json").read_text())["not_run"], capsys.readouterr().out
    assert {row["task"] for row in rows_of("all.json")} == {"sst2", "mr"}
    assert set(not_run) == set(tasks.GROUPS["all"]) - {"sst2", "mr"}
    assert "trec: not run; original/trec/train.csv is not in data" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| vocab |"))
    assert row.count("not run") == 10 and "mean of 2" in printed
    Path("empty").mkdir()
    for argv, said in ((["trec"], "trec: .*is not in data.*give --data FOLDER"),
                       (["all", "--data", "empty"], "no task can be run; sst2: planted")):
        with pytest.raises(InputError, match=said):
            evaluation.main([*SHORT, "--task", *argv])


def test_domain_generalization_tunes_on_airlines_alone(place, monkeypatch):
    """`dg`: one tuning for all domains, whose training files are not needed; each is tested."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small_group(monkeypatch, "airlines")
    for name, seed in (("books", 3), ("kitchen", 4)):
        write_rows(place / f"data/{name}.csv", 30, seed)
        monkeypatch.setitem(tasks.TASKS, name, tasks.LabeledTask("absent.csv", f"{name}.csv"))
    evaluation.main([*SHORT, "--study", "dg", "--task", "dg", "--out", "dg.json"])
    assert Path("dg.png").read_bytes().startswith(b"\x89PNG")
    tested = rows_of("dg.json", split="test", kind="tuned")
    assert [(row["task"], row["target"], row["of"]) for row in tested] == [
        ("dg", "airlines", 40), ("dg", "books", 30), ("dg", "kitchen", 30)]
    assert len(list(jobs.TUNED.glob("dg-vocab-*"))) == 1


OWN = ["--template", "{text} It was <X> ?", "--model", "small", "--prompt-length", "3", "--epochs",
       "2", "--seeds", "10", "--rates", "0.1", "--prompt", "vocab", "--shots", "2", "--jobs", "1"]


@pytest.mark.parametrize("header", ["label,id,text\n", ""])
def test_a_task_of_ones_own_and_its_labels(place, capsys, header):
    """A CSV file with a header or without, three labels by name, a label word of two
    pieces: tuned, tested on the rows that were not sampled. The tuned prompt then labels texts,
    with probabilities over the three; those of the two pieces are multiplied."""
    labels = {"bad": "terrible", "good": "great", "warm": "good warm"}
    lines = [f"{label},{'7,' * bool(header)}{word} {a} {b}" for word, label in labels.items()
             for a in FILLER[:3] for b in FILLER[3:6]]
    Path("my.csv").write_text(header + "\n".join(lines) + "\n")
    evaluation.main(["--data", "my.csv", "--words", "terrible, great,good warm", *OWN,
                     "--header" if header else "--no-header"])
    printed = capsys.readouterr().out
    for said in ("[12] test rows, by seed, are left out",
                 "  9 rows of label good warm: warm the food It was <extra_id_0> ?</s> -> good"
                 " warm\n"):
        assert said in printed
    record, = rows_of("runs/eval/small-my.json", split="validation", kind="tuned")
    assert record["examples"] == 6
    Path("new.txt").write_text("a good film\n" + "very dull food " * 99 + "\n")
    predict = ["--model", "small", "--predict", "new.txt", "--prompt", record["file"]]
    evaluation.main([*predict, "--out", "labels.csv"])
    evaluation.main(predict)
    out, said = capsys.readouterr()
    assert out == Path("labels.csv").read_text() and "of 2 texts 1 are cut to 256 tokens" in said
    with pytest.raises(InputError, match="would replace the input"):
        evaluation.main([*predict, "--out", "new.txt"])
    found, _ = csv.DictReader(open("labels.csv"))
    t5, good, warm = load_t5(Path("small")), PIECES.index("good"), PIECES.index("warm")
    tokenizer = templates.load_tokenizer("small", t5.config)
    ids = tokenizer.encode("a good film It was <extra_id_0> ?").ids
    theta, examples = jobs.read_result(record["file"])[0]["theta"], small_examples(1)
    batch = data.collate(examples._replace(ids=[[*ids, 1]]), [0])
    H, mask = supmer.encode_with_prompt(t5, theta, batch)
    decoded = T.decode(t5, torch.tensor([[0, len(PIECES) - 1, good]]), H, mask)
    p = torch.log_softmax(T.next_token_logits(t5, decoded)[0], -1)
    sums = torch.stack([p[1, 6], p[1, 7], p[1, good] + p[2, warm]]).softmax(-1)
    words = ["terrible", "great", "good warm"]
    assert found["text"] == "a good film" and found["label"] == words[int(sums.argmax())]
    assert [float(found[word]) for word in words] == pytest.approx(sums.tolist(), abs=1e-4)


def test_a_prediction_is_the_users_own_label():
    """spam and ham stand for bad and good: the file says spam; the words head their chances."""
    task = tasks.LabeledTask("a.csv", "a.csv", words=("bad", "good"), labels=("spam", "ham"))
    found = predict.as_csv(task, [tasks.Row(0, {"text": "win, now"})], torch.tensor([[0.75, 0.25]]))
    assert found == 'text,label,bad,good\n"win, now",spam,0.7500,0.2500\n'


def test_labels_need_the_prompt_of_this_model(place, capsys):
    """A tuned file of another model or shape, or with numbers that are not finite, is refused by
    name, before any label. Rows that are all sampled are tuned, not tested."""
    Path("my.csv").write_text("label,text\n0,bad film film\n0,dull food\n"
                              "1,good film\n1,warm food\n")
    evaluation.main(["--words", "terrible,great", *OWN, "--data", "my.csv", "--max-tokens", "7"])
    printed = capsys.readouterr().out
    for said in ("it is tuned, not tested", "of 4 texts 1 are cut to 7 tokens",
                 "a label has only 1 examples"):
        assert said in printed
    path = rows_of("runs/eval/small-my.json", kind="tuned")[0]["file"]
    kept, result = jobs.read_result(path)
    theta = kept["theta"]
    Path("new.txt").write_text("a good film\n")
    for tensors, changes, said in (
            *(({"theta": wrong}, {}, "does not hold what was tuned") for wrong in (
                theta[:, :-1].contiguous(), theta * float("nan"), theta.long(), theta[:0])),
            ({}, {}, "does not hold what was tuned"),
            (kept, {"model_sha256": "0"}, "was tuned on another model, small, than small is"),
            (kept, {"task": result["task"] | {"words": ["a"]}}, "is not a tuned prompt")):
        save_file(tensors, path, {"result": json.dumps(result | changes)})
        with pytest.raises(InputError, match=f"{path} {said}"):
            evaluation.main(["--model", "small", "--predict", "new.txt", "--prompt", path])
    assert capsys.readouterr().out == ""


def test_a_label_that_only_the_test_file_has_costs_no_tuning(place, monkeypatch):
    """It is found after tuning, since no row of the test file is read before; once the rows are
    mended, where True is 1, the same command tests what is tuned."""
    Path("my.csv").write_text("label,text\n0,bad film\n0,dull food\n1,good film\n1,warm food\n")
    Path("test.csv").write_text("label,text\n0.0,bad\n2,odd\nTrue,good\n2,odd\n")
    command = [*OWN, "--words", "terrible,great", "--data", "my.csv", "test.csv"]
    with pytest.raises(InputError, match="test.csv, line 3: .'2', 'odd'.*mend 2 row"):
        evaluation.main(command)
    Path("test.csv").write_text("label,text\n0.0,bad\nTrue,good\n")
    monkeypatch.setattr(evaluation, "tune", lambda *_: pytest.fail("tuned again"))
    evaluation.main(command)
    assert rows_of("runs/eval/small-my.json", split="test", kind="tuned")[0]["of"] == 2


@pytest.mark.parametrize("study", ["steps", "shots", "spread"])
def test_each_figure_is_one_command(place, monkeypatch, study):
    """JSON and PNG: a test at every validation for steps, for each number of shots, or
    start; in the spread only the starts differ, not the examples."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = studies.STUDIES[study]["task"]
    small_group(monkeypatch, *names)
    seeds = [10, 20] if study == "spread" else [10]
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (seen.append(a), original(*a))[1])
    evaluation.main([*SHORT, "--seeds", *map(str, seeds), "--prompt", "vocab", "random", "--study",
                     study, "--task", *names, "--shots", *(["2"] * (study == "shots")), "4"])
    path = f"runs/eval/small-{study}.json"
    assert Path(path).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    tested = rows_of(path, split="test", kind="tuned")
    assert [(row["shots"], row["target"], row["prompt"], row["seed"]) for row in tested] == [
        (n, name, prompt, seed) for n in ((2, 4) if study == "shots" else (4,)) for name in names
        for prompt in ("vocab", "random") for seed in seeds]
    curve = rows_of(path, split="test", prompt="vocab", rate=0.1, target=names[0], seed=10)
    assert [row["step"] for row in curve] == [0, 2, 3] or study != "steps"
    if study == "spread":
        samples = {json.dumps(a[4], default=lambda x: x.tolist()) for a in seen
                   if a[1:2] == ("vocab",)}
        starts = {json.dumps(a[2].keywords) for a in seen}
        assert len(samples) == 1 and len(starts) == 2 and {a[5] for a in seen} == {10}


FAKE_TRAIN = """
import json, os, pathlib, shutil, signal, sys, time
argv = sys.argv[1:]
with open("called.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
if "metapt" in argv:
    sys.exit(2)
folder = pathlib.Path(argv[argv.index("--resume" if "--resume" in argv else "--run") + 1])
shutil.copytree("made", folder, dirs_exist_ok=True)
if "supmer" in argv:
    (folder / "run.json").write_text(
        '{"finished": false, "name": "supmer", "model": "small"}')
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background has none
    try:
        os.kill(os.getppid(), signal.SIGALRM)           # the end of eval.py's --max-minutes
        time.sleep(20)
    except KeyboardInterrupt:
        pathlib.Path("interrupted").touch()
"""


def test_a_study_makes_the_runs_that_are_missing(place, monkeypatch, capsys):
    """A method is trained after the others are tuned, all with the same numbers, or resumed,
    whatever other runs there are; what train.py refuses is "not run"; where one is stopped, the
    others are tested. eval.py itself never imports train.py."""
    Path("train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(candidates, "TRAIN", Path("train.py"))
    write_run("made", name="ppt")
    write_run("runs/compared/small-ppt", name="ppt", finished=False)
    study = [*SHORT, "--study", "comparison", "--prompt"]
    evaluation.main([*study, "ppt", "metapt", "vocab"])
    called = [json.loads(line) for line in Path("called.jsonl").read_text().splitlines()]
    assert called == [["--resume", "runs/compared/small-ppt"], [
        "--model", "small", "--method", "metapt", "--run", "runs/compared/small-metapt",
        "--labeled", ""]]
    prompts = json.loads(Path("runs/eval/small-comparison.json").read_text())["prompts"]
    assert "train.py refused" in prompts["metapt"]["not_run"]
    assert prompts["ppt"]["file"] == "runs/compared/small-ppt"
    evaluation.main([*study, "vocab", "supmer", "random", "--max-minutes", "9"])
    assert Path("interrupted").exists()
    printed = capsys.readouterr().out
    assert "| metapt | not run |" in printed
    assert "| supmer | not run |" in printed and "the same command resumes" in printed
    assert re.search(r"\| vocab \| \d+", printed) and re.search(r"\| random \| \d+", printed)
    assert "import train" not in Path(evaluation.__file__).read_text()
