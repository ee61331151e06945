"""What README.md and docs/ name exists: commands, options, files, functions and links."""

import importlib
import re
import runpy
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import exercises
import supmer

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
    """Files, options, names in backticks, relative links and their anchors."""
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
    """README names each module and exercise; what the ledger names is in one of the modules."""
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


@pytest.mark.parametrize("name", ["supmer", "t5", "data", "kmeans"])
def test_a_module_shows_its_concept(name, capsys, monkeypatch):
    """Run alone it prints figures; supmer's exact gradient is the finite difference beside it."""
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and len(lines) > 1
    for second, difference, first in (map(float, line.split()) for line in lines[2:]
                                      if name == "supmer"):
        assert abs(second - difference) < 1e-7 and abs(first - difference) > 1e-3
