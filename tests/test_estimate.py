"""Memory, time and disk of a run, estimated before it starts."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import estimate
import hub as hubs
import shapes
import supmer
import t5 as T
import train
from common import InputError
from conftest import SUPMER_DATA, V11, needs_data, peak_of
from supmer import Method

MiB = 2 ** 20
SMALL = V11._replace(d_model=64, d_ff=96, num_layers=1, num_decoder_layers=1)


def test_official_shapes_have_the_published_sizes():
    """The known shapes have as many parameters as the model cards say."""
    counts = {"t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096,
              "t5-3b": 2_851_598_336}
    for size, count in (("small", 76_961_152), ("base", 247_577_856), ("large", 783_150_080),
                        ("xl", 2_849_757_184), ("xxl", 11_135_332_352)):
        for family in ("t5-v1_1-{}", "t5-{}-lm-adapt", "flan-t5-{}"):
            counts[family.format(size)] = count
    found = {name: T.count_weights(estimate.model_shape(name)) for name in shapes.SHAPES}
    assert found == counts and counts.keys() == hubs.MODELS.keys()


@needs_data
@pytest.mark.parametrize("name", ["t5-small", "t5-base", "t5-large"])
def test_published_configs_have_these_shapes(name, tmp_path):
    """The real config.json is read as the shape that is known without it."""
    source = Path(SUPMER_DATA) / "t5_tokenizer" / "configs" / f"{name}.config.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    assert T.read_config(tmp_path) == estimate.model_shape(name)


def test_live_bytes_by_hand():
    """Views are free, a tensor that is dropped is no longer counted, the peak stays."""
    with estimate.LiveBytes() as live:
        x = torch.empty(1000, device="meta")                # 4,000 bytes
        y = x + 1                                           # 8,000
        half, _ = x.view(10, 100).split(5)
        y = y * 2                                           # 12,000 until the old y is gone
        assert live.bytes == 8000
        del x, y
        assert live.bytes == 4000 and live.peak == 12_000   # `half` is a part of x
        del half, _
        assert live.bytes == 0


def test_memory_does_not_grow_with_the_support_set():
    """Kept graphs take more, each the bytes that micro_batch_bytes() counts."""
    training, method = train.Training(prompt_length=20, max_tokens=60), Method(micro_tokens=160)
    support = estimate.full_task(64, training, replace(method, micro_tokens=320), 60).support
    assert len(support.ids) == 4

    def peak_and_kept(examples, graphs):
        part = support._replace(ids=support.ids[:examples], labels=support.labels[:examples])
        with estimate.LiveBytes() as live:
            t5 = estimate.stand_in(SMALL, torch.float32, "meta")
            theta, before = torch.empty(20, 64, device="meta"), live.bytes
            keeping = replace(method, keep_graphs=graphs)
            *_, hessian = supmer.gradient_and_hessian(t5, theta, part, keeping)
            kept = live.bytes - before
            hessian(theta)
        return live.peak - before, kept
    again, _ = peak_and_kept(4, 0)
    most, two = peak_and_kept(4, 2)
    *_, graph = estimate.micro_batch_bytes(SMALL, training, replace(method, keep_graphs=1))
    assert again == pytest.approx(peak_and_kept(2, 0)[0], rel=0.01)
    assert most > 1.5 * again and two == pytest.approx(2 * graph, rel=0.02)


@pytest.mark.parametrize("positions, given, gib, kept", [
    (160, 99, 80, 16), (120, 99, 80, 32), (40, 99, 80, 32), (100, None, 80, 32),
    (100, None, 60, 0), (100, 0, 80, 0)])
def test_kept_graphs_are_those_that_there_are_and_that_fit(
        monkeypatch, positions, given, gib, kept):
    """Of 32 texts of 80 positions; without a number, all where half of the memory holds them."""
    monkeypatch.setattr(estimate, "micro_batch_bytes", lambda *_: (1, 1, 1 << 30))
    monkeypatch.setattr(estimate, "model_shape", lambda _: SMALL)
    monkeypatch.setattr(hubs, "fetch_list", lambda _: [])
    monkeypatch.setattr(estimate, "print_time", lambda *_: 0)
    monkeypatch.setattr(estimate, "free_bytes", lambda _: gib << 30)
    training = train.Training(model="m", prompt_length=20, max_tokens=60, support=32, corpus=())
    method = Method(micro_tokens=positions, keep_graphs=given or 0)
    choice = {} if given is None else {"keep_graphs": given}
    control = SimpleNamespace(dry_run=False, resume="", micro_tokens=positions, yes=True, **choice)
    method = estimate.prepare(training, method, torch.device("cpu"), control)
    assert f"{kept} kept graphs" in estimate.memory_needed(SMALL, training, method)


@pytest.mark.parametrize("layers, tokens", [(1, 412), pytest.param(12, 90, marks=needs_data)])
def test_the_memory_estimate_is_what_a_step_takes(layers, tokens):
    """An exact step at t5-base's widths takes within 15 % of it, in a fresh process."""
    method = Method(micro_tokens=100 + tokens)
    training = train.Training(model="t5-base", max_tokens=tokens, tasks=1)
    config = estimate.model_shape("t5-base")._replace(num_layers=layers, num_decoder_layers=layers)
    parts = estimate.memory_needed(config, training, method)
    assert parts["weights"] == 4 * T.count_weights(config)
    said = sum(parts.values()) - parts["weights"] - parts["program"] + estimate.LIBRARIES
    assert parts["micro-batch"] > said / 2
    grown = peak_of(f"""
import estimate, supmer, t5, torch
from types import SimpleNamespace
theirs = estimate.stand_in(t5.T5Config(*{tuple(config)}), torch.float32, "cpu")
method = supmer.Method(micro_tokens={100 + tokens})
task = estimate.full_task(768, SimpleNamespace(prompt_length=100), method, {tokens})
assert len(task.query.ids) == 1""", """
theta = supmer.init_prompt(theirs, 100, 0)
phi = supmer.init_state(theta, method).phi
supmer.meta_gradient(theirs, theta, phi, task, task, 0.5, 0.5, method)""",
                    MALLOC_MMAP_THRESHOLD_="65536")
    assert grown * MiB == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize("gib, advice", [(21, ""), (16, "--micro-tokens 1792"), (
    11, "--micro-tokens 512"), (10, "--dtype bfloat16 or a smaller model")])
def test_missing_memory_is_refused_with_what_would_fit(monkeypatch, gib, advice):
    """The micro-batch that would fit, or other advice."""
    parts = {"weights": 8 << 30, "micro-batch": 12 << 30, "program": 1 << 30}
    monkeypatch.setattr(estimate, "memory_needed", lambda *_: parts)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": MiB, "SC_PHYS_PAGES": gib << 10}.get)
    _, lacking = estimate.memory_line(None, train.Training(model="m"), Method(micro_tokens=3072),
                                      torch.device("cpu"))
    assert lacking == (advice and "m needs 21.0 GiB with micro-batches of 3072 positions, cpu has "
                       f"{gib}.0: try {advice}")


def test_the_time_is_that_of_the_methods_own_step(monkeypatch, small_world):
    """PPT's two gradients are a first-order step's; MetaPT's has no partner, SUPMER's has one."""
    t5, seen = estimate.stand_in(V11, torch.float32, "cpu"), []
    monkeypatch.setattr(supmer, "meta_gradient", lambda *a: seen.append((a[5], a[7].first_order)))
    for name, augmentation, own in (("ppt", True, (0.0, True)), ("metapt", False, (0.0, False)),
                                    ("supmer", True, (0.5, False))):
        training = train.Training(method=name, corpus=(str(small_world[0] / "corpus.jsonl"),))
        estimate.print_time(t5, training, Method(augmentation=augmentation))
        assert seen == [own, own]
        seen.clear()


def test_a_long_run_needs_a_gpu_or_yes(monkeypatch, capsys):
    """What it needs is printed; hours on a CPU, or a web corpus, are refused without --yes."""
    monkeypatch.setattr(estimate, "micro_batch_bytes", lambda *_: (MiB, 99 * MiB, MiB))
    monkeypatch.setattr(estimate, "model_shape", lambda _: V11)
    monkeypatch.setattr(hubs, "fetch_list", lambda _: ["download: 242 MB of t5-small"])
    control = SimpleNamespace(dry_run=False, yes=False, resume="")

    def prepare(*corpus):
        training = train.Training(model="t5-small", corpus=corpus, bytes=10 ** 9)
        estimate.prepare(training, Method(), torch.device("cpu"), control)
    with pytest.raises(InputError, match="no GPU here: add --yes"):
        prepare("openwebtext")
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed if line[0] != " "] == [
        "micro-batches", "graphs", "memory", "download", "time", "disk", "download"]
    for hours, refused in ((1.1, True), (0.9, False)):
        monkeypatch.setattr(estimate, "print_time", lambda *_: hours)
        with pytest.raises(InputError) if refused else contextlib.nullcontext():
            prepare("my.txt")
    control.yes = True
    prepare("openwebtext")
    control.yes, control.dry_run = False, True
    prepare("openwebtext")
    monkeypatch.setattr(estimate, "free_bytes", lambda _: MiB)
    prepare("openwebtext")
    assert "t5-small\ntime:     cannot be" in capsys.readouterr().out
    control.dry_run = False
    with pytest.raises(InputError, match="t5-small needs .* cpu has 0.0"):
        prepare("my.txt")
