"""Kill any command at any moment: the same command then ends as if nothing had happened.

    python tests/test_kills.py 20       # 20 kills of each command, and a table; minutes
"""

import contextlib
import http.server
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, NamedTuple

import huggingface_hub
import numpy as np
import pytest

import common
import corpus
import eval as evaluation
import hub
import tasks
import train
from conftest import (ANY, COMMIT, PLANTED, SMALL, V11, Files, Hub, contents, ended, forked,
                      hub_files, outcome_of, rows_of, run_with_prompt, save_model, small_config,
                      write_place, write_small_world)
from data import load_tokenizer
from t5 import load_t5


class Command(NamedTuple):
    """begin(place, options) does it in the working directory, or resumes it; result() is what must
    not differ from an unbroken one's."""
    name: str
    begin: Callable
    result: Callable


def begin_training(place, options):
    if not Path("run/run.json").exists():
        train.main([*options, "--run", "run", "--save-seconds", "0"])
    elif not common.read_json(Path("run/run.json"))["finished"]:
        train.main(["--resume", "run"])


def trained():
    return outcome_of(Path("run")), contents(Path("run"), ".tmp")


def begin_store(place, options):
    t5 = load_t5(place / "model")
    tokenizer = load_tokenizer(place / "model", t5.config)
    corpus.build_store(Path("cache"), [place / "corpus.jsonl"], tokenizer, t5, 6, 0,
                       model=place / "model")


def begin_evaluation(place, options):
    evaluation.main([*SMALL, "--data", str(place / "data"), "--model", str(place / "small"),
                     "--prompt", "vocab", "--out", "out.json"])


def evaluated():
    return rows_of("out.json"), contents(Path(), ".tmp"), Path("out.md").read_bytes()


def begin_export(place, options):
    if not Path("adapter").exists():
        train.main(["--export-peft", str(place / "exported"), "adapter"])


def begin_download(place, options):
    hub.model_folder(ANY)
    tasks.locate(tasks.TASKS["kitchen"], "test", "none")


def downloaded():
    return (contents(Path("hub"), "config.json", ".safetensors"),
            contents(Path("cache"), "test"))


COMMANDS = (
    Command("meta-training of 6 steps", begin_training, trained),
    Command("building a store", begin_store, lambda: contents(Path("cache"), ".bin", ".npy")),
    Command("evaluation of two seeds and two rates", begin_evaluation, evaluated),
    Command("export for PEFT", begin_export, lambda: contents(Path())),
    Command("download of a model and a task's file", begin_download, downloaded))


def survives(command, place, options, kills, rng):
    """Kill the command so often, resume it, compare the result with an unbroken run's; once with
    too small a disk (a limit on a file's size) and in a read-only folder, which end with status 2.
    -> equal results, of how many."""
    folder, equal = place / "work", []

    def start(before=lambda: None):
        return forked(lambda: command.begin(place, options), before)

    def empty():
        os.chdir(place)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)

    def resume():
        equal.append(ended(start()) == 0 and command.result() == whole)
        empty()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    def read_only():
        os.getuid() or os.setuid(65534)         # root may write anywhere
    empty()
    began = time.monotonic()
    assert ended(start()) == 0
    whole, seconds = command.result(), time.monotonic() - began
    largest = max(map(len, contents(Path()).values()))
    empty()
    while kills:
        pid = start()
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL), status
        kills -= status != 0
        if status == 0 or not kills:
            resume()
    assert ended(start(full)) == 2
    resume()
    folder.chmod(0o555)
    assert ended(start(read_only)) == 2 and not contents(Path())
    folder.chmod(0o755)
    return sum(equal), len(equal)


@contextlib.contextmanager
def prepared(place):
    """Models, data and servers for the COMMANDS in a folder -> train.py's options."""
    with contextlib.ExitStack() as stack:
        place.chmod(0o755)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Hub, Files)]
        for server in servers:
            server.asked, server.cut, server.handle_error = [], None, lambda *_: None
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
        models, files = servers
        folder = save_model(place / "large", V11._replace(vocab_size=9000, d_model=64))
        models.repos = {ANY: {"main": (COMMIT, hub_files(folder, "config.json",
                                                         "model.safetensors"))}}
        files.files = {"/test": bytes(4_000_000)}
        constants, url = huggingface_hub.constants, f"http://127.0.0.1:{models.server_port}"
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_CACHE", "hub")
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                      url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setitem(tasks.TASKS, "kitchen", tasks.TASKS["kitchen"]._replace(
            urls=(f"http://127.0.0.1:{files.server_port}/test",)))
        patch.setattr(train, "prepare", lambda _, method, *rest: method)
        patch.setattr(corpus, "CHUNK", 256)         # so that a small store is saved in parts, too
        patch.setitem(tasks.TASKS, "planted", PLANTED)
        write_place(place)
        _, options = write_small_world(place)
        run_with_prompt(place / "exported", small_config(), place / "small")
        stack.enter_context(contextlib.chdir(place))
        yield [str(place / word) if word in ("model", "corpus.jsonl") else word for word in options]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_killed_command_resumes(command, tmp_path):
    """Each command, killed at a random moment, on a full disk and in a read-only folder: nothing is
    torn, and the same command ends with what an unbroken one has, bit by bit."""
    with prepared(tmp_path) as options:
        equal, of = survives(command, tmp_path, options, 1, np.random.default_rng(0))
    assert equal == of


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, prepared(Path(place)) as options:
        print("| command | kills | equal to an unbroken one | of | seconds |\n|---|---|---|---|---|")
        for command in COMMANDS:
            began, kills = time.monotonic(), int(sys.argv[1])
            equal, of = survives(command, Path(place), options, kills, np.random.default_rng(0))
            print(f"| {command.name} | {kills} | {equal} | {of} | {time.monotonic() - began:.0f} |",
                  flush=True)
