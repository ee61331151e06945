"""Tests of eval."""

import baselines
import common
import csv
import data
import eval as evaluation
import json
import numpy as np
import os
import pytest
import shutil
import statistics
import studies
import supmer
import t5 as T
import tasks
import torch
from common import InputError
from pathlib import Path
from safetensors.torch import save
from t5 import load_t5
from conftest import (Dies, FILLER, PIECES, SMALL, eval_settings, first_result, needs_data, run_script,
    small_config, small_examples, small_group, small_t5, tune, tuning_record,
    without_times, write_rows, write_run)


# -------------------------------------------------------------------------- what comes out of a run


def test_without_a_run_the_released_prompt_is_taken(place):
    """`python eval.py` is worth running on a fresh clone: beside random, tiny's released prompt
    stands in for a run of one's own, once."""
    assert evaluation.parse([])[0].prompt == ("released", "random")
    assert evaluation.parse(["--quick"])[0].prompt == ("random", "vocab", "released")
    write_run("runs/small-1")
    with pytest.raises(InputError, match="given twice"):        # a run of one's own is no stand-in
        evaluation.parse(["--model", "small", "--prompt", "newest", "runs/small-1", "released"])


def test_json_is_complete(place, capsys):
    """The JSON file holds each seed, rate and validation, and what was chosen is the best of the
    seed's validations; the test results are one per seed; the learned prompt's metadata stand
    there; and the printed table agrees.
    """
    write_run("runs/small-1")
    evaluation.main(SMALL)  # the newest finished run, and random
    written = json.loads(Path("runs/eval/small-planted.json").read_text())
    assert set(written) == {"command", "settings", "prompts", "not_run", "results"}
    assert written["prompts"]["runs/small-1"] == {
        "method": "supmer",
        "file": "runs/small-1",
        "model": "small",
        "corpus": "embedded",
        "step": "7",
        "steps": "9",
        "seed": "0",
        "model_sha256": T.model_fingerprint("small"),
        "regularizer": "affine",
    }
    result = written["results"][0]
    tests = result["test"]["planted"]["prompts"]
    for name in ("runs/small-1", "random"):
        records, tested = result["tuning"][name], tests[name]
        assert [record["seed"] for record in records] == [10, 20] and len(tested["tuned"]) == 2
        for record in records:
            assert [[(e["rate"], e["step"]) for e in curve] for curve in record["validations"]] == [
                [(rate, step) for step in (0, 2, 3)] for rate in (0.1, 0.3)
            ]
            assert record["best"] == min(sum(record["validations"], []), key=evaluation.rank)
        assert tested["mean"] == pytest.approx(np.mean(tested["tuned"]))
        assert tested["sample_std"] == pytest.approx(np.std(tested["tuned"], ddof=1))
    assert len(tests["runs/small-1"]["untuned"]) == 1  # one prompt, whatever the seed
    printed = capsys.readouterr().out
    for name, found in tests.items():
        assert f"| {name} | {found['mean']:.1f} ± {found['sample_std']:.1f} |" in printed
        assert f"| {name}, untuned | {statistics.mean(found['untuned']):.1f}" in printed
    assert "40 of 40 test rows of planted" in printed
    assert "| most frequent label | 50.0 |" in printed
    assert "the paper" not in printed.split("seconds of tuning")[-1]
    assert "file runs/small-1" in printed and "embedded" in printed
    table = Path("runs/eval/small-planted.md").read_text()
    assert table in printed and table.startswith("| accuracy in % | planted |\n| --- | --- |\n")


def test_first_test_rows_are_fixed(place):
    """--test-rows takes the same rows whatever the file's order; --predictions adds what was
    predicted for each."""
    path = Path("data/planted/test.csv")
    for name in ("one", "two"):
        evaluation.main([*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1",
                         "--test-rows", "7", "--predictions", "--out", f"{name}.json"])
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    one, two = (first_result(f"{name}.json")["test"]["planted"] for name in ("one", "two"))
    assert one == two and (one["rows"], one["of"], len(one["labels"])) == (7, 40, 7)
    predicted, = one["prompts"]["vocab"]["predictions"]
    right = sum(a == b for a, b in zip(predicted, one["labels"], strict=True))
    assert one["prompts"]["vocab"]["tuned"] == [pytest.approx(100 * right / 7)]


def test_papers_figures_are_those_of_the_same_backbone():
    """Under t5-base itself all of Table 1's methods stand; under the embedded model, or a small
    model in a folder that is called t5-base, PT and SUPMER, as another model's; beside a task that
    the table has not, or other numbers of shots, nothing. The mean is over what was run."""
    tested = {"untuned": [50.0], "tuned": [60.0, 80.0], "mean": 70.0}
    test = {"no_prompt": 50.0, "majority": 55.0, "prompts": {"random": tested}}
    base = small_config(d_model=768, num_layers=12, gated=False)

    def shown(tasks, model, config, shots=(16,)):
        written = {"not_run": {"trec": "why"} if len(tasks) > 1 else {}, "results": [
            {"task": task, "shots": n, "test": {task: test}} for n in shots for task in tasks]}
        text = evaluation.table(written, config, eval_settings(
            model=model, prompt=("random",), shots=shots))
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]

    beside = shown(("sst2", "mr"), "google-t5/t5-base", base)
    assert beside[0] == ["accuracy in %", "sst2", "mr", "trec", "mean of 2"]
    assert ["random", "70.0 ± 14.1", "70.0 ± 14.1", "not run", "70.0"] in beside
    assert beside[-1] == ["the paper's t5-base: supmer", "87.3 ± 0.5", "84.0 ± 0.6",
                          "80.2 ± 0.9", "85.7"]
    assert len(beside) == 2 + 4 + 8
    for model, config in (("tiny", base), ("models/t5-base", small_config())):
        rows = shown(("sst2",), model, config)
        assert rows[-2:] == [["the paper's T5-base, another model: pt", "71.9 ± 3.4"],
                             ["the paper's T5-base, another model: supmer", "87.3 ± 0.5"]]
        assert len(rows) == 2 + 4 + 2
    for task, shots in (("movie", (16,)), ("sst2", (8,))):
        assert "paper" not in str(shown((task,), "t5-base", base, shots))
    several = shown(("sst2",), "t5-base", base, (8, 16))
    assert several[0] == ["accuracy in %", "sst2, 8 shots", "sst2, 16 shots"]
    assert several[-1] == ["the paper's t5-base: supmer", "", "87.3 ± 0.5"]


def test_a_stop_leaves_out_of_a_study_what_was_not_done(tmp_path):
    """Of Fig. 4 stopped in its second task: a column "not run" for each number of shots that is
    missing, a picture of what there is."""
    tested = {"tuned": [60.0], "mean": 60.0}
    test = {"no_prompt": 50.0, "majority": 55.0, "prompts": {"vocab": tested, "random": tested}}
    half = test | {"prompts": {"vocab": tested}}
    written = {"not_run": {"subj": "stopped", "sst5": "stopped"}, "results": [
        {"task": "sst5", "shots": n, "test": {"sst5": x}} for n, x in ((4, test), (8, half))]}
    shots = eval_settings(study="shots", shots=(4, 8, 16), prompt=("vocab", "random"))
    rows = [line.split(" | ") for line in
            evaluation.table(written, small_config(), shots).splitlines()]
    assert rows[0][1:] == ["sst5, 4 shots", "sst5, 8 shots", "subj, 4 shots", "subj, 8 shots",
                           "subj, 16 shots", "sst5, 16 shots |"]
    assert rows[3] == ["| random", "60.0", *["not run"] * 4, "not run |"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    studies.draw(written, shots, tmp_path / "half.png")
    assert (tmp_path / "half.png").read_bytes().startswith(b"\x89PNG")


def test_newest_finished_run(place):
    """Of the runs under runs/ the one of this model that finished last is taken: not an unfinished
    or a newer one of another model, whatever the folders' names and order.
    """
    write_run("runs/b", ended=20.0)
    write_run("runs/a", ended=30.0)
    write_run("runs/z", ended=10.0)
    write_run("runs/y", ended=99.0, model="other")
    write_run("runs/x", finished=False)
    assert evaluation.newest_run("small") == "runs/a"
    chosen, sources = evaluation.parse(SMALL)
    assert chosen.prompt == ("runs/a", "random")
    assert evaluation.newest_run("elsewhere/other") == "runs/y"


def test_quick_is_short_for_its_options(place):
    """--quick sets one seed, one rate, some 60 steps, 300 test rows and four prompts, and says so
    in its help.
    """
    write_run("runs/tiny-1", model="tiny")
    chosen, sources = evaluation.parse(["--quick"])
    assert (chosen.seeds, chosen.rates, chosen.epochs, chosen.test_rows) == ((10,), (0.2,), 60, 300)
    assert chosen.prompt == ("random", "vocab", "runs/tiny-1", "released") and chosen.task == (
        "movie",
    )
    assert chosen.prompt_length == 20 and chosen.rate_scale == "rms"
    assert evaluation.parse(["--quick", "--prompt", "random"])[0].prompt == ("random",)


def test_protocol_estimate_by_hand():
    """A demonstration of 60 s of tuning (60 epochs, 1 rate, 1 seed) and 6 s of testing 300 of 3,000
    rows: the protocol takes 60 * 200/60 * 3 * 5 = 3,000 s and 6 * 10 * 5 = 300 s, 55 minutes; what
    was cut and the command are told.
    """
    record = {"validations": [[{"step": 0}, {"step": 60}]], "time": {"seconds": 30.0}}
    result = {
        "tuning": {"random": [record], "vocab": [record]},
        "task": "movie",
        "test": {"movie": {"rows": 300, "of": 3000}},
        "test_seconds": 6.0,
        "processes": 1,
    }
    quick = eval_settings(epochs=60, task=("movie",), prompt=("random", "vocab"))
    said = evaluation.protocol(["--quick", "--dtype", "bfloat16"], result, quick)
    assert (
        "not the protocol" in said
        and "60 steps of 200" in said
        and "300 test rows of 3,000" in said
    )
    assert said.endswith(
        "55 minutes at this speed: python eval.py --task movie --dtype bfloat16 "
        "--prompt random vocab"
    )


# ------------------------------------------------------- independent work: processes, interruptions


def test_number_of_processes_changes_nothing(place):
    """Two processes and one give the same records and accuracies, bit for bit."""
    found = []
    for jobs in ("1", "2"):
        shutil.rmtree(evaluation.TUNED, ignore_errors=True)
        evaluation.main([*SMALL, "--prompt", "vocab", "--rates", "0.1", "--jobs", jobs, "--out",
                         "out.json"])
        result = first_result("out.json")
        found.append([without_times(result["tuning"]), result["test"]])
    assert found[0] == found[1]


def test_an_interrupted_evaluation_goes_on(place, monkeypatch):
    """Stopped in its third tuning run, the same command makes the runs that are missing, reads the
    other two, and ends with the record of a run that was never stopped; done once more it tunes and
    scores nothing."""
    command = [*SMALL, "--prompt", "vocab", "--out", "out.json"]
    calls, original, scored = [], evaluation.tune, evaluation.score

    def tune(*arguments):
        calls.append(arguments[5:7])                # seed, rate
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(evaluation, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    assert not Path("out.json").exists() and len(list(evaluation.TUNED.glob("*.s*"))) == 2
    evaluation.main(command)
    assert calls == [(10, 0.1), (10, 0.3), (20, 0.1), (20, 0.1), (20, 0.3)]
    record = tuning_record("out.json")
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored again"))
    evaluation.main(command)
    assert len(calls) == 5 and tuning_record("out.json") == record
    monkeypatch.setattr(evaluation, "score", scored)
    shutil.rmtree(evaluation.TUNED)
    evaluation.main([*command[:-1], "whole.json"])
    assert tuning_record("whole.json") == record


def test_a_result_depends_on_all_that_made_it():
    """Another model, start, sample, rate or function is another file, the same ones the same."""
    def path(made_of="model", function=evaluation.tune_job, **changes):
        arguments = {"start": torch.ones(3, 16), "phi": None, "sample": [small_examples(4)] * 2,
                     "seed": 10, "rate": 0.1, **changes}
        return evaluation.make_job(made_of, "a/b c", function, **arguments).path
    assert path() == path() and path().name.startswith("a_b_c-")
    other = [path("code"), path(function=evaluation.score_job), path(start=torch.ones(4, 16)),
             path(start=torch.zeros(3, 16)), path(start=torch.ones(3, 16).double()),
             path(sample=[small_examples(4), small_examples(4, 1)]), path(seed=20), path(rate=0.2),
             path(phi={"A": torch.ones(1)})]
    assert len({path(), *other}) == 10


def test_a_damaged_result_is_refused(place, monkeypatch, capsys):
    """Cut or of something else: one line that says to delete it."""
    argv = [*SMALL, "--prompt", "vocab"]
    evaluation.main(argv)
    path = next(evaluation.TUNED.glob("planted-vocab-4-10-0.1-*"))
    path.write_bytes(path.read_bytes()[:-9])
    assert run_script(argv, monkeypatch) == 2
    assert f"{path} is no result" in capsys.readouterr().err


def test_what_a_group_lacks_is_told_and_the_rest_is_run(place, monkeypatch, capsys):
    """`all`: absent tasks are named, with where to put them, and stand in the table as not run; one
    that is asked for by its name is an error."""
    small_group(monkeypatch, "sst2", "mr")
    short = [*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1", "--task"]
    evaluation.main([*short, "all", "--out", "all.json"])
    written, printed = json.loads(Path("all.json").read_text()), capsys.readouterr().out
    assert [result["task"] for result in written["results"]] == ["sst2", "mr"]
    assert set(written["not_run"]) == set(tasks.GROUPS["all"]) - {"sst2", "mr"}
    assert "trec: not run; original/trec/train.csv is not in data" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| vocab |"))
    assert row.count("not run") == 10 and "mean of 2" in printed
    for name in ("trec", "dg"):
        with pytest.raises(InputError, match="is not in data.*give --data FOLDER"):
            evaluation.main([*short, name])
    with pytest.raises(InputError, match="--data empty: there is no such folder"):
        evaluation.main([*short, "all", "--data", "empty"])
    Path("empty").mkdir()
    with pytest.raises(InputError, match="none of these tasks is at hand, see above"):
        evaluation.main([*short, "all", "--data", "empty"])


def test_domain_generalization_tunes_on_airlines_alone(place, monkeypatch, capsys):
    """`dg`: one tuning for all domains, whose training files are not needed; each domain is tested
    with the same prompts."""
    small_group(monkeypatch, "airlines")
    for name, seed in (("books", 3), ("kitchen", 4)):
        write_rows(place / f"data/{name}.csv", 30, seed)
        monkeypatch.setitem(tasks.TASKS, name, tasks.LabeledTask("absent.csv", f"{name}.csv"))
    argv = "--task dg --prompt vocab --rates 0.1 --out dg.json".split()
    evaluation.main([*SMALL, *argv])
    written = json.loads(Path("dg.json").read_text())
    result, = written["results"]
    assert list(result["test"]) == ["airlines", "books", "kitchen"] and len(result["tuning"]) == 1
    assert set(written["not_run"]) == {"dvd", "electronics", "restaurants"}
    assert [test["of"] for test in result["test"].values()] == [40, 30, 30]
    assert len(list(evaluation.TUNED.glob("dg-vocab-*"))) == 2


OWN = ["--template", "{text} It was <X> ?", "--model", "small", "--prompt-length", "3", "--epochs",
       "2", "--seeds", "10", "--rates", "0.1", "--prompt", "vocab", "--shots", "2", "--jobs", "1"]


@pytest.mark.parametrize("header", ["label,id,text\n", "text,label\n", ""])
def test_a_task_of_ones_own_and_its_labels(place, monkeypatch, capsys, header):
    """A CSV file with a header or without, three labels as words or numbers, a label word of two
    pieces: tuned, tested on the rows that were not sampled. The tuned prompt then labels texts,
    with probabilities over the three; those of the two pieces are multiplied."""
    labels = {"bad": "terrible", "good": "1", "warm": "good warm"}
    rows = [(f"{word} {a} {b}", label) for word, label in labels.items()
            for a in FILLER[:3] for b in FILLER[3:6]]
    written = {"label,id,text\n": [f"{label},7,{text}" for text, label in rows],
               "text,label\n": [f"{text},{label}" for text, label in rows],
               "": [f"{label},{text}" for text, label in rows]}[header]
    Path("my.csv").write_text(header + "\n".join(written) + "\n")
    argv = ["--data", "my.csv", "--words", "terrible, great,good warm", *OWN]
    evaluation.main(argv)
    result = first_result("runs/eval/small-my.json")
    test, record = result["test"]["my"], result["tuning"]["vocab"][0]
    assert (test["of"], test["left_out"], record["examples"]) == (27, [12], 6)
    Path("new.txt").write_text("a good film\nvery dull food\n")
    capsys.readouterr()
    predict = ["--model", "small", "--predict", "new.txt", "--prompt", record["file"]]
    evaluation.main([*predict, "--out", "labels.csv"])
    evaluation.main(predict)
    assert capsys.readouterr().out == Path("labels.csv").read_text()
    found = list(csv.DictReader(open("labels.csv")))
    assert [line["text"] for line in found] == ["a good film", "very dull food"]
    t5 = load_t5(Path("small"))
    tokenizer = data.load_tokenizer("small", t5.config)
    theta = evaluation.read_result(record["file"])[0]["theta"]
    ids = tokenizer.encode("a good film It was <extra_id_0> ?").ids + [1]
    H, mask = supmer.encode_with_prompt(t5, theta, data.Batch(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=bool), torch.zeros(1, 0, dtype=int),
        torch.zeros(1, 0, 16), None))
    good, warm = (tokenizer.token_to_id(word) for word in ("good", "warm"))
    decoded = T.decode(t5, torch.tensor([[0, len(PIECES) - 1, good]]), H, mask)
    p = torch.log_softmax(T.next_token_logits(t5, decoded)[0], -1)
    sums = torch.stack([p[1, 6], p[1, 7], p[1, good] + p[2, warm]]).softmax(-1)
    words = ["terrible", "great", "good warm"]
    assert [float(found[0][word]) for word in words] == pytest.approx(sums.tolist(), abs=1e-4)
    assert found[0]["label"] == words[int(sums.argmax())]


@pytest.mark.parametrize("damage", [
    lambda kept: {"theta": kept["theta"][:, :-1].contiguous()},
    lambda kept: {"theta": kept["theta"] * float("nan")},
    lambda kept: {"theta": kept["theta"].long()},
    lambda kept: {"theta": torch.zeros(0, 16)},
    lambda kept: {"theta": torch.zeros(())},
    lambda kept: {"theta": torch.zeros(common.LONGEST + 1, 16)},
    lambda kept: {**kept, "more": torch.zeros(1)},
    lambda kept: {},
], ids=["width", "nan", "integers", "empty", "number", "long", "more", "none"])
def test_labels_are_not_made_with_a_damaged_tuned_prompt(place, capsys, damage):
    """A tuned file whose tensors are not what was tuned is refused by name, before any label; of
    one that is whole, what other steps left in it does no harm."""
    Path("my.csv").write_text("0,bad film\n0,dull food\n1,good film\n1,warm food\n")
    evaluation.main(["--words", "terrible,great", *OWN, "--data", "my.csv"])
    path = first_result("runs/eval/small-my.json")["tuning"]["vocab"][0]["file"]
    kept, result = evaluation.read_result(path)
    Path("new.txt").write_text("a good film\n")
    predict = ["--model", "small", "--predict", "new.txt", "--prompt", path, "--out", "labels.csv"]
    common.atomic_write(path, lambda file: file.write(save(
        {**kept, "10:theta": kept["theta"].clone()}, {"result": json.dumps(result)})))
    evaluation.main(predict)
    Path("labels.csv").unlink()
    common.atomic_write(path, lambda file: file.write(save(
        damage(kept), {"result": json.dumps(result)})))
    with pytest.raises(InputError, match=f"{path} does not hold what was tuned"):
        evaluation.main(predict)
    for other, says in (({"model_sha256": "0"}, "was tuned on another model, small, than small is"),
                        ({"task": result["task"] | {"words": ["a"]}}, "is no tuned prompt")):
        common.atomic_write(path, lambda file: file.write(save(
            kept, {"result": json.dumps(result | other)})))
        with pytest.raises(InputError, match=f"{path} {says}"):
            evaluation.main(predict)
    assert not Path("labels.csv").exists()


def test_workers_that_memory_does_not_allow(place, monkeypatch):
    """Too many bytes for one are told beforehand; one that dies, with what to try."""
    monkeypatch.setattr(evaluation, "ft_memory", lambda _: 10 ** 18)
    with pytest.raises(InputError, match="a process needs some .* GiB, there are"):
        evaluation.processes(evaluation.Settings(prompt=("ft",)), ["cpu"], Path("small"))
    with pytest.raises(InputError, match="a process ended .* Try fewer --jobs than 2"):
        with evaluation.workers(None, "small", torch.float32, ["cpu"], 2) as work:
            work([evaluation.Job(Path("x"), Dies(), {})], "")


def test_own_rows_that_are_all_sampled_are_tuned_not_tested(place, capsys):
    """Two rows a label leave nothing to test on: said, and the tuned prompt is there all the same;
    with a file to test on behind it, it is tested."""
    Path("my.csv").write_text("0,bad film\n0,dull food\n1,good film\n1,warm food\n")
    argv = ["--words", "terrible,great", *OWN, "--data", "my.csv"]
    evaluation.main(argv)
    printed = capsys.readouterr().out
    for said in ("it is tuned, not tested", "[1, 1] examples by label instead of 2"):
        assert said in printed
    assert Path(first_result("runs/eval/small-my.json")["tuning"]["vocab"][0]["file"]).exists()
    evaluation.main([*argv, "data/planted/test.csv"])
    assert first_result("runs/eval/small-my.json")["test"]["my"]["rows"] == 40


@pytest.mark.parametrize("study", ["steps", "shots", "dg", "spread"])
def test_each_study_is_one_command(place, monkeypatch, study):
    """JSON and PNG: accuracy at every validation for steps, for each number of shots, domain, or
    start; in the spread only the starts differ, not the examples."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small_group(monkeypatch, "cb", "mrpc", "sst5", "subj", *tasks.GROUPS["dg"])
    settings = [word for word in SMALL if word not in ("--task", "planted")]
    wanted = ["--prompt", "vocab", "random"] + ["--shots", "2", "4"] * (study == "shots")
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (seen.append(a), original(*a))[1])
    evaluation.main([*settings, *wanted, "--study", study, "--rates", "0.1"])
    written = json.loads(Path(f"runs/eval/small-{study}.json").read_text())
    assert Path(f"runs/eval/small-{study}.png").read_bytes().startswith(b"\x89PNG")
    shown = [(result["shots"], name) for result in written["results"] for name in result["test"]]
    assert shown == {"steps": [(4, "cb"), (4, "mrpc")], "dg": [(4, n) for n in tasks.GROUPS["dg"]],
                     "shots": [(n, task) for n in (2, 4) for task in ("sst5", "subj")],
                     "spread": [(4, "mrpc"), (4, "cb"), (4, "subj")]}[study]
    for result in written["results"]:
        for test in result["test"].values():
            for name, found in test["prompts"].items():
                if study == "steps":
                    curves = [r["validations"][0] for r in result["tuning"][name]]
                    best = [curve.index(r["best"]) for curve, r in
                            zip(curves, result["tuning"][name])]
                    assert [len(c) for c in found["steps"]] == [len(c) for c in curves] == [3, 3]
                    assert found["tuned"] == [c[i] for c, i in zip(found["steps"], best)]
    samples = {json.dumps(a[4], default=lambda x: x.tolist()) for a in seen if a[5] == seen[0][5]}
    starts = {a[2](small_t5())["theta"].numpy().tobytes() for a in seen}
    assert len(starts) == 4 and (len({a[5] for a in seen}) == 1) == (study == "spread")
    assert study != "spread" or len(samples) == 1


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--task", "sst3"], "sst2"),
        (["--prompt", "random", "random"], "twice"),
        (["--prompt", "random", "--seeds", "10", "10"], "twice"),
        (["--prompt", "random", "--shots", "0"], "it must be more than 0"),
        (["--prompt", "random", "--rates", "nan"], "--rates nan: it must be 0 or more"),
        (["--prompt", "random", "--seeds", "-1"], "--seeds -1: it must be 0 or more"),
        (["--epochs", "many"], "invalid int"),
        (["--dtype", "float16"], "bfloat16"),
        (["--quick", "--epochs", "60"], "sets --epochs"),
        (["--quick", "--seeds=20"], "sets --seeds"),
        (["--nonsense"], "--nonsense"),
        (["--model", "elsewhere"], "RUN|released|random|vocab"),  # no finished run
        ([*SMALL, "--prompt", "released"], "RUN|random|vocab"),
        ([*SMALL, "--prompt", "runs/none"], "runs/none"),
        ([*SMALL, "--prompt", "runs/other"], "other"),
        ([*SMALL, "--prompt", "runs/long"], "--prompt-length 5"),
        ([*SMALL, "--prompt", "runs/wide"], "width 16"),
        ([*SMALL, "--prompt", "random", "--data", "nowhere"], "nowhere"),
        ([*SMALL, "--prompt", "random", "--data", "a", "b"], "--template and --words"),
        (["--task", "sst3"], "Without a network: movie, amazon, nyt, tweets"),
        (["--task", "dg", "books"], "leave their names away"),
        (["--study", "depth"], "spread"),
        (["--quick", "--study", "steps"], "sets --study"),
        (["--quick", "--prompt", "ft"], "leave ft away"),
        (["--study", "steps", "--prompt", "vocab", "few-shot"], "leave few-shot away"),
        ([*OWN, "--data", "my.csv", "--words", "a,b", "--prompt", "zero-shot"], "leave them out"),
        ([*OWN, "--data", "my.csv"], "--words"),
        ([*OWN, "--data", "my.csv", "--words", "bad"], "two or more"),
        ([*OWN, "--data", "my.csv", "--words", "bad,bad"], "two or more"),
        ([*OWN, "--data", "none.csv", "--words", "bad,good"], "none.csv"),
        ([*OWN, "--data", "small", "--words", "bad,good"], ".jsonl"),
        ([*OWN, "--data", "my.csv", "--words", "bad,good", "--task", "mr"], "leave them away"),
        ([*OWN, "--data", "my.csv", "--words", "bad,good"], "my.csv, line 3"),
        ([*OWN, "--data", "one.csv", "--words", "bad,good"], "one.csv: label 1 has 0 different"),
        ([*OWN, "--data", "few.csv", "--words", "bad,good"], "few.csv: label 1 has 1 different"),
        ([*OWN, "--data", "latin.csv", "--words", "bad,good"], "latin.csv must be UTF-8"),
        ([*OWN, "--data", "few.csv", "--words", "bad,good", "--template", "It was"], "<X>"),
        (["--predict", "few.csv"], "one tuned --prompt"),
        (["--predict", "few.csv", "--prompt", "few.csv"], "no result of eval.py"),
        ([*SMALL, "--prompt", "random", "--rates", "1e39"], "and 1e+30 at most"),
        ([*SMALL, "--prompt", "random", "--prompt-length", "10001"], "and 10,000 at most"),
        ([*SMALL, "--prompt", "random", "--model", "no_such_model"], "no_such_model"),
        (["--prompt", "randm", "--model", "none"], "randm is missing: give RUN, newest, released, "
         "random, vocab, prefix-tuning, p-tuning-v2, ft, zero-shot, few-shot, supmer, ppt, "),
        ([*SMALL, "--prompt", "random", "--device", "gpu", "--task", "sst2"], "--device gpu: choo"),
        (["--prompt", "random", "--predict", ""], "predict '': it is empty"),
        (["--prompt", "random", "--data", ""], "data '': it is empty"),
        (["--prompt", "random", "--rates", "0", "0.1"], "0 is each method's own"),
        (["--prompt", "random", "--labeled", "small"], "--labeled small: give a folder, with"),
        (["--prompt", "metapt", "--labeled", "none"], "--labeled none: give a folder"),
        (["--prompt", "random", "metapt"], "metapt learns from labeled sentiment"),
        (["--prompt", "random", "--out", "small"], "--out small: name a .json file"),
        (["--prompt", "random", "--out", "my.md"], "--out my.md: name a .json file"),
        (["--prompt", "random", "--out", "folder.json"], "folder.json: it would replace what is"),
        (["--predict", "my.csv", "--prompt", "one.csv", "--out", "my.csv"], "it would replace"),
        (["--predict", "my.csv", "--prompt", "one.csv", "--out", "one.csv"], "it would replace"),
        (["--prompt", "random", "--model", "caf\udce9"], r"['caf\udce9'] are not UTF-8"),
    ],
)
def test_mistakes_end_in_one_line(place, monkeypatch, capsys, argv, said):
    """What the user got wrong is told in one line on stderr that names it, with exit status 2."""
    write_run("runs/other", model="other", finished=False)
    write_run("runs/long", finished=False, P=5)
    write_run("runs/wide", finished=False, d=24)
    Path("folder.json").mkdir()
    for name, content in (("my", b"0,a\n1,b\n2,c\n"), ("one", b"0,a\n0,b\n"),
                          ("few", b"0,a\n0,b\n1,c\n"), ("latin", b"0,caf\xe9\n1,b\n")):
        Path(f"{name}.csv").write_bytes(content)
    assert run_script(argv, monkeypatch) == 2
    error = capsys.readouterr().err.split("\r")[-1]
    line = error[error.index("error: ") :]
    assert line.count("\n") == 1 and said in line


def test_a_folder_that_cannot_be_written_to_is_told_before_tuning(place, monkeypatch):
    """--out in a read-only folder, as it looks to a user who is not root."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "ro" and access(
        path, mode))
    monkeypatch.setattr(evaluation, "tune", lambda *_: pytest.fail("it tunes"))
    with pytest.raises(InputError, match="ro cannot be written to: give another --out"):
        evaluation.main([*SMALL, "--prompt", "vocab", "--out", "ro/out.json"])


def test_loss_that_is_not_finite_is_told(monkeypatch):
    """A loss that is not finite, at once or through a gradient of a later step, stops tuning and
    names step and rate.
    """
    sample, start = (small_examples(4), small_examples(4)), torch.ones(3, 16)
    broken = small_t5()
    broken.weights["lm_head.weight"][0] = float("nan")
    with pytest.raises(InputError, match=r"nan at step 0, rate 0\.1, seed 10.*--rates"):
        tune(broken, start, None, sample, 10, 0.1, eval_settings())
    monkeypatch.setattr(
        evaluation,
        "tuning_gradient",
        lambda t5, baseline, parameters, *_: (
            {"theta": parameters["theta"] * float("nan")},
            None,
        ),
    )
    with pytest.raises(InputError, match=r"nan at step 2, rate 0\.1"):
        tune(small_t5(), start, None, sample, 10, 0.1, eval_settings(validate_every=2))


def test_interrupt_is_one_line(place, monkeypatch, capsys):
    """Ctrl-C while tuning: one line, exit status 130, no file."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "tuning_gradient", interrupt)
    assert run_script([*SMALL, "--prompt", "random"], monkeypatch) == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in place.glob("runs/eval/**/[!.]*")] == ["tuned"]


@needs_data
def test_real_sst2(place):
    """A micro evaluation on the real SST-2: its 872 test sentences, of which 444 are positive."""
    argv = "--task sst2 --prompt random vocab --seeds 10 --rates 0.1 --epochs 2".split()
    evaluation.main([*SMALL, *argv, "--data", os.environ["SUPMER_DATA"], "--out", "sst2.json"])
    test = first_result("sst2.json")["test"]["sst2"]
    assert (test["rows"], test["of"]) == (872, 872) and test["majority"] == pytest.approx(
        100 * 444 / 872
    )
