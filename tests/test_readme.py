"""What README.md and docs/ name exists: commands, options, files, functions and links."""

import importlib
import re
import runpy
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest

import exercises
import supmer
from data import PAPER_VARIANTS

HERE = Path(supmer.__file__).resolve().parent
MODULES = sorted(path.stem for path in HERE.glob("*.py")
                 if not path.stem.startswith(("test_", "conftest")))
PAGES = [HERE / "README.md", *sorted(HERE.glob("docs/*.md")), HERE / "tiny/README.md"]
CODE = [HERE / f"{name}.py" for name in MODULES] + [*HERE.glob("tiny/*.py")]
FOREIGN = {"nproc_per_node", "nnodes"}                # torchrun's


def options():
    """The options of all scripts: knobs of their dataclasses, and literal ones."""
    found = {name for path in CODE for name in re.findall(r'"--([a-z-]+)"', path.read_text())}
    for module in map(importlib.import_module, MODULES):
        for cls in filter(is_dataclass, vars(module).values()):
            names = {entry.name.replace("_", "-") for entry in fields(cls)}
            found |= names | {f"no-{name}" for name in names}
    return found | {"help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_what_a_page_names_exists(page):
    """Each `python FILE` is a file, each --option one of the scripts' or torchrun's; each
    `path/file.py`, and each `module.name` of ours, in backticks exists; each relative link is a
    file, each anchor a heading of it."""
    text = page.read_text()
    for script in re.findall(r"python (?:-m )?([\w/]+\.py)", text):
        assert (HERE / script).is_file(), script
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - FOREIGN <= options()
    for name in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w/]+\.(py|md|svg|json)", name):
            inside = name.startswith(("runs", "cache", "tiny", "out"))
            assert inside or (HERE / name).is_file() or list(HERE.glob(f"*/{name}")), name
        match = re.match(r"(\w+)\.(\w+)(\(|$)", name)
        if match and match[1] in MODULES and match[2] not in ("py", "json"):
            assert hasattr(importlib.import_module(match[1]), match[2]), name
    for link, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
                                        for title in titles}, anchor


def test_every_module_and_exercise_is_listed():
    """README's reading order names each module, its exercises are those of exercises.py; what the
    last column of the ledger's tables names is in one of the modules."""
    text = PAGES[0].read_text()
    for name in MODULES:
        assert f"`{name}.py`" in text, name
    for name in exercises.CHECKS:
        assert f"`{name}`" in text or name in (HERE / "docs/extending.md").read_text(), name
    modules = [importlib.import_module(name) for name in MODULES]
    rows = [row for row in (HERE / "docs/ledger.md").read_text().splitlines()
            if row.count("|") == 7]
    for name in {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[-2])}:
        assert any(hasattr(module, name) for module in modules), name


def test_each_module_shows_its_concept(capsys, monkeypatch):
    """Run alone: the second-order gradient is its finite difference, the first-order one is not;
    blanks are filled with words, likeliest first; each variant is shown as text; inertia falls."""
    shown = {}
    for name in ("supmer", "t5", "data", "kmeans"):
        monkeypatch.setattr("sys.argv", [f"{name}.py"])
        try:
            runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code
        shown[name] = capsys.readouterr().out
    rows = [line.split() for line in shown["supmer"].splitlines()[2:]]
    second, difference, first = np.array(rows, dtype=float).T
    assert np.allclose(second, difference, rtol=0, atol=1e-7)
    assert (abs(first - difference) > 1e-3).all()
    for line in shown["t5"].splitlines():
        shares = [float(share) for share in re.findall(r"0\.\d\d", line)]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and shares[0] > 0.2
    assert all(f"{variant}, anchors of cluster" in shown["data"] for variant in PAPER_VARIANTS)
    assert shown["data"].count("</s> -> ") == 4 * len(PAPER_VARIANTS)
    assert "[centroid " in shown["data"]
    inertia = [float(line.rpartition(" ")[2]) for line in shown["kmeans"].splitlines()]
    assert len(inertia) > 3 and all(later < earlier for earlier, later in zip(inertia, inertia[1:]))
    assert inertia[-1] == pytest.approx(2, abs=0.05)      # of two unit normals around each centre
