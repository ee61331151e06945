"""Tests of kills."""

import common
import contextlib
import corpus as corpus_module
import eval as evaluation
import http.server
import hub as hubs
import huggingface_hub
import importlib
import numpy as np
import os
import prompts
import pytest
import resource
import shutil
import signal
import tasks
import tempfile
import threading
import time
import train
from data import load_tokenizer
from pathlib import Path
from t5 import load_t5
from conftest import (ANY, COMMIT, Files, Hub, PLANTED, SMALL, V11, contents, ended, forked,
    hub_files, log_without_times, rows_of, run_with_prompt, save_model, small_config,
    write_place, write_small_world)


class Killable:
    """A program to be killed: it works in `folder`, begin() does it or goes on with it, result() is
    what must be equal, bit by bit, whatever was killed."""

    def __init__(self, place, options):
        self.folder, self.place, self.options = place / type(self).__name__, place, options


    def tidy(self):
        """An empty folder, the working directory."""
        os.chdir(self.place)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        os.chdir(self.folder)


class Training(Killable):
    """Meta-training, 6 steps. Saved after each."""

    def begin(self):
        if not Path("run/run.json").exists():
            train.main([*self.options, "--run", "run", "--save-seconds", "0"])
        elif not common.read_run(Path("run"))["finished"]:
            train.main(["--resume", "run"])

    def result(self):
        files = [prompts._read_safetensors(Path("run") / f"{name}.safetensors")
                 for name in ("state", "prompt")]       # a file's metadata have no fixed order
        return log_without_times(Path("run")), contents(Path("run"), ".tmp"), [
            ({name: x.numpy().tobytes() for name, x in tensors.items()}, metadata)
            for tensors, metadata in files]


class Corpus(Killable):
    """Corpus building."""

    def begin(self):
        t5 = load_t5(self.place / "model")
        corpus_module.build_store(Path("cache"), [self.place / "corpus.jsonl"], load_tokenizer(
            self.place / "model", t5.config), t5, 6, 0, model=self.place / "model")

    def result(self):
        return contents(Path("cache"))


class Evaluation(Killable):
    """Evaluation of two seeds and two rates."""

    def begin(self):
        evaluation.main([*SMALL, "--data", str(self.place / "data"), "--model",
                         str(self.place / "small"), "--prompt", "vocab", "--out", "out.json"])

    def result(self):
        return rows_of("out.json"), contents(Path(), ".tmp"), Path("out.md").read_bytes()


class Export(Killable):
    """Export for PEFT."""

    def begin(self):
        if not Path("adapter").exists():
            train.main(["--export-peft", str(self.place / "exported"), "adapter"])

    def result(self):
        return contents(Path())


class Download(Killable):
    """Download of a model and a task's file."""

    def begin(self):
        hubs.model_folder(ANY)
        tasks.locate(tasks.TASKS["kitchen"], "test", "none")

    def result(self):
        return contents(Path("hub"), "config.json", ".safetensors"), contents(
            Path("cache"), "test")


def survives(program, kills, rng):
    """Kill a program at so many random moments, go on with it, and hold what it has in the end
    against what an unbroken run has; once with too small a disk (a limit on a file's size) and once
    in a read-only folder, which must end with status 2 -> ends that were equal, of how many."""
    program.tidy()
    began, equal = time.monotonic(), []
    assert ended(forked(program.begin)) == 0
    whole, seconds = program.result(), time.monotonic() - began
    largest = max(map(len, contents(Path()).values()))

    def go_on():
        equal.append(ended(forked(program.begin)) == 0 and program.result() == whole)
        program.tidy()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    def read_only():
        os.getuid() or os.setuid(65534)         # root may write anywhere
    program.tidy()
    while kills:
        pid = forked(program.begin)
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL), status
        kills -= status != 0
        if status == 0 or not kills:
            go_on()
    assert ended(forked(program.begin, full)) == 2
    go_on()
    program.folder.chmod(0o555)
    assert ended(forked(program.begin, read_only)) == 2 and not contents(Path())
    program.folder.chmod(0o755)
    go_on()
    return sum(equal), len(equal)


PROGRAMS = (Training, Corpus, Evaluation, Export, Download)


@contextlib.contextmanager
def killable(place):
    """The PROGRAMS, ready to be begun in folders of a place."""
    importlib.import_module("torch._dynamo")    # torch would do it in each process
    with contextlib.ExitStack() as stack:
        place.chmod(0o755)
        hub, files = (stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind))
                      for kind in (Hub, Files))
        for server in (hub, files):
            server.asked, server.cut, server.handle_error = [], None, lambda *_: None
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
        folder = save_model(place / "large", V11._replace(vocab_size=9000, d_model=64))
        hub.repos = {ANY: {"main": (COMMIT, hub_files(folder, "config.json", "model.safetensors"))}}
        files.files = {"/test": bytes(4_000_000)}
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        constants, url = huggingface_hub.constants, f"http://127.0.0.1:{hub.server_port}"
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_CACHE", "hub")
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                      url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setitem(tasks.TASKS, "kitchen", tasks.TASKS["kitchen"]._replace(
            urls=(f"http://127.0.0.1:{files.server_port}/test",)))
        patch.setattr(corpus_module, "CHUNK", 256)           # so that a small store is saved in parts, too
        patch.setitem(tasks.TASKS, "planted", PLANTED)
        write_place(place)
        _, options = write_small_world(place)
        options = [str(place / word) if word in ("model", "corpus.jsonl") else word
                   for word in options]
        run_with_prompt(place / "exported", small_config(), place / "small")
        stack.enter_context(contextlib.chdir(place))
        yield [program(place, options) for program in PROGRAMS]


def test_what_is_killed_goes_on(tmp_path):
    """Corpus building, evaluation, export and download, each killed at a random moment, on a full
    disk and in a read-only folder: nothing is torn, and the same command ends with what
    an unbroken run has, bit by bit."""
    rng = np.random.default_rng(0)
    with killable(tmp_path) as programs:
        for program in programs[1:]:        # meta-training has tests of its own
            equal, of = survives(program, 1, rng)
            assert equal == of, program


def kill_all(kills):
    """python test_supmer.py kills: print how each program survives so many of them."""
    with tempfile.TemporaryDirectory() as new, killable(Path(new)) as programs:
        rng = np.random.default_rng(0)
        print("| program | kills | ends equal to an unbroken one's | of | seconds |\n"
              "| --- | --- | --- | --- | --- |")
        for program in programs:
            began = time.monotonic()
            equal, of = survives(program, kills, rng)
            print(f"| {type(program).__doc__.partition('.')[0]} | {kills} | {equal} | {of} | "
                  f"{time.monotonic() - began:.0f} |", flush=True)
