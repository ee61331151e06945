"""tour.py's pictures."""

from types import SimpleNamespace

import pytest

import tour
from common import InputError
from conftest import make_run
from data import load_tokenizer


def test_every_picture_is_drawn(small_world, monkeypatch, tmp_path):
    """From a small world's run, each as a PNG; the log's picture needs to know whose log."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = make_run(small_world, "toured")
    run.step()
    run.log.flush()
    theta, (_, index) = run.state.theta, run.sources[0]
    world = SimpleNamespace(t5=run.t5, index=index, theta=theta, phi=run.state.phi, start=theta,
                            tokenizer=load_tokenizer(small_world[0] / "small", run.t5.config))
    monkeypatch.setattr(tour, "world", lambda: world)
    monkeypatch.setattr(tour, "FOLDER", tmp_path / "pictures")
    with pytest.raises(InputError, match="needs a run's folder"):
        tour.main([])
    assert tour.main(["--run", str(run.folder)]) == 0
    drawn = {path.stem: path.read_bytes()[:4] for path in (tmp_path / "pictures").glob("*.png")}
    assert drawn == dict.fromkeys(tour.PICTURES, b"\x89PNG")
