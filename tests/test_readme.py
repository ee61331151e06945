"""Tests of readme."""

import ast
import baselines
import common
import data
import eval as evaluation
import exercises
import json
import kmeans as km
import numpy as np
import pytest
import re
import runpy
import supmer
import t5 as T
import tasks
import train
from data import VARIANTS
from dataclasses import fields
from pathlib import Path
from supmer import Method
from conftest import HERE, README, REFILL, refilled
MODULES = (supmer, T, km, data, train, evaluation, baselines)
FLOW = (("text", "your files, OpenWebText"), ("data.py", "sentences, token ids"),
        ("t5.py", "sentence vectors"), ("kmeans.py", "clusters of sentences"),
        ("data.py", "meta tasks of five kinds"), ("supmer.py, train.py", "second-order MAML"),
        ("theta, phi", "a prompt and its psi"), ("eval.py", "16 examples a label"),
        ("accuracy", "beside baselines.py"))


def flow():
    """figures/flow.svg: five boxes to the right, four back to the left, an arrow between each."""
    places = [(20 + 190 * (i if i < 5 else 9 - i), 20 if i < 5 else 120) for i in range(9)]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 200" '
             'font-family="sans-serif" text-anchor="middle">',
             '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" '
             'orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
             '<rect width="960" height="200" fill="white"/>']
    for (x, y), (title, what) in zip(places, FLOW):
        fill = "#dbe9f6" if ".py" in title else "#f3f3f3"
        parts += [f'<rect x="{x}" y="{y}" width="160" height="60" rx="6" fill="{fill}" '
                  'stroke="black"/>',
                  f'<text x="{x + 80}" y="{y + 26}" font-size="14" font-weight="bold">{title}'
                  '</text>',
                  f'<text x="{x + 80}" y="{y + 46}" font-size="12">{what}</text>']
    for (x, y), (to_x, to_y) in zip(places, places[1:]):
        line = (x + 160, y + 30, to_x - 2, y + 30) if to_x > x else \
            (x, y + 30, to_x + 162, y + 30) if to_x < x else (x + 80, y + 60, x + 80, to_y - 2)
        parts.append('<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="black" '
                     'marker-end="url(#tip)"/>'.format(*line))
    return "\n".join([*parts, "</svg>", ""])


def tables(heading):
    """The rows of the tables in a section of README.md, each a list of cells, without heads."""
    section = README.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.sub(r"^\|.*\n\|(-+\|)+\n", "", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            for row in rows.splitlines() if row.startswith("|")]


def test_the_reading_order_is_true():
    """Every file stands in README's reading order with its number of lines, every exercise in its
    table; the algorithm there is supmer.py's."""
    assert README.read_text() == refilled(README.read_text()), REFILL
    found = {cells[0].strip("`") for cells in tables("Reading order")}
    assert found == {path.name for path in HERE.glob("*.py")}
    assert [cells[0].strip("`") for cells in tables("Exercises")] == [*exercises.CHECKS]


def test_the_flow_and_the_pictures():
    """figures/flow.svg is flow()'s, its files exist; README's pictures and links do, too."""
    assert (HERE / "figures/flow.svg").read_text() == flow(), REFILL
    readme = README.read_text()
    for name in re.findall(r"[\w/]+\.py", flow()) + re.findall(r"\]\(([\w/.-]+)\)", readme):
        assert (HERE / name).is_file(), name
    assert all(path.stat().st_size <= 150_000 for path in (HERE / "figures").iterdir())
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^#+ (.*)", readme, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", readme)) <= anchors


def test_symbols_have_their_names_and_defaults():
    """Each symbol's name is in the code, or a knob with that default; Table 6 is whole."""
    defaults = {entry.name: entry for cls in (train.Training, Method, supmer.MetaState)
                for entry in fields(cls)}
    known, shown = {*vars(supmer), *vars(data)}, set()
    for function in vars(supmer).values():
        known |= set(getattr(function, "__code__", supmer.meta_step.__code__).co_varnames)
    for _, name, _, default, _ in tables("The algorithm"):
        name = name.strip("`")
        assert default == str(defaults[name].default) if default else name in known, name
        shown.add(name)
    assert {name for name, entry in defaults.items()
            if "Table 6" in entry.metadata.get("help", "")} <= shown


def test_the_ledger_names_functions_that_exist():
    """Whatever the ledger's last column names is in one of the files."""
    rows = tables("The ledger: paper, released code, here")
    assert all(len(cells) == 6 and all(cells) for cells in rows), rows
    names = {name for cells in rows for name in re.findall(r"`(\w+)`", cells[-1])}
    assert all(any(hasattr(module, name) for module in MODULES) for name in names), names


def test_troubleshooting_quotes_what_is_said():
    """Each message in README's troubleshooting occurs in the code, "…" standing for a value."""
    def text(node):
        return node.value if isinstance(node, ast.Constant) else "…"
    said = []
    for module in MODULES:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(map(text, node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    for message, _ in tables("Troubleshooting"):
        assert any(message.strip("`") in one for one in said), message


def test_readme_gives_options_that_exist():
    """Every --option of a command in README is one of train.py, eval.py or the other scripts."""
    code = "".join((HERE / name).read_text() for name in ("train.py", "eval.py", "bench.py",
                                                         "tiny/build.py"))
    known = {entry.name for cls in (train.Training, Method, evaluation.Settings)
             for entry in fields(cls)} | {"nproc_per_node", "no_exact_cosine",
                                          "no_words_only"}
    for option in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README.read_text())):
        assert option.replace("-", "_") in known or f'"--{option}"' in code, option


def test_papers_figures_in_readme():
    """README's rows of the paper are those of results/paper_tables.json."""
    paper = json.loads((HERE / "results/paper_tables.json").read_text())["t5-base"]
    table = README.read_text().partition("| accuracy in %, T5-base")[2].partition("\n\n")[0]
    rows = [re.split(r" *\| *", line)[1:4] for line in table.splitlines()[2:]]
    assert rows == [[name, *(str(paper[method][name][0]) for method in ("supmer", "pt"))]
                    for group in ("all", "dg") for name in tasks.GROUPS[group]]


@pytest.mark.skipif(not (common.TINY / "model.safetensors").is_file(),
                    reason="tiny/ has not been built: python tiny.py")
def test_each_module_shows_its_concept(capsys):
    """Run alone: the second-order gradient is its finite difference and the first-order one is not;
    blanks are filled with words, likeliest first; a task of each variant is text, source -> target;
    inertia falls."""
    shown = {}
    for name in ("supmer.py", "t5.py", "data.py", "kmeans.py"):
        runpy.run_path(str(HERE / name), run_name="__main__")
        shown[name] = capsys.readouterr().out
    table = np.array([line.split() for line in shown["supmer.py"].splitlines()[2:]], dtype=float)
    second, difference, first = table.T
    assert len(table) == 3 and np.allclose(second, difference, rtol=0, atol=1e-7)
    assert (abs(first - difference) > 1e-3).all()
    for line in shown["t5.py"].splitlines():
        *words, _ = re.split(r" 0\.\d\d ?", line.partition("<extra_id_0>. ")[2])
        shares = list(map(float, re.findall(r"0\.\d\d", line)))
        assert len(words) == 5 and all(map(str.isalpha, words))
        assert shares == sorted(shares, reverse=True) and shares[0] > 0.2
    assert shown["t5.py"].count("\n") == 2
    assert all(f"{variant}, anchors of cluster" in shown["data.py"] for variant in VARIANTS)
    assert [shown["data.py"].count(part) for part in (
        "<extra_id_0>", "</s> -> ", "  support: ", "  query: ")] == [20, 20, 15, 5]
    assert "[centroid " in shown["data.py"]
    assert README.read_text() == refilled(README.read_text(), shown["data.py"]), REFILL
    inertia = [float(line.rpartition(" ")[2]) for line in shown["kmeans.py"].splitlines()]
    assert len(inertia) > 3 and all(b < a for a, b in zip(inertia, inertia[1:]))
    assert inertia[-1] == pytest.approx(2, abs=0.05)      # of two unit normals around each centre
