"""The scripts in examples/ run, with the commands that they name, on checkpoints of tools/tiny_family."""

import importlib.util
import shlex
from pathlib import Path

import numpy as np
import pytest
from make_family import make, make_lora
from narrow import make_narrow
from PIL import Image

import FBCache_ms

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the commands run: a narrow embedded checkpoint, and others as in docs/pipelines.md."""
    folder = tmp_path_factory.mktemp("examples")
    narrow = make_narrow(folder / "narrow")
    for layout in ("controlnet", "fill", "kontext"):
        make(folder / "results" / "family" / layout, layout, narrow)
    make_lora(folder / "results" / "family" / "lora", source=narrow)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(folder / "text_to_image.png")
    return folder


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_draws_with_the_cache(folder, name, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(FBCache_ms, "TINY_FLUX", folder / "narrow", raising=False)
    example = load(name)
    command = example.__doc__.partition(f"python examples/{name}.py")[2]
    arguments = shlex.split(command.replace("\\\n", ""))
    given = Image.open("text_to_image.png")
    output = folder / "out" / (name if name == "lora" else f"{name}.png")
    output.parent.mkdir(exist_ok=True)
    example.main([*arguments, "--output", str(output)])
    assert "of the operations skipped" in capsys.readouterr().out
    pictures = {path.stem: np.asarray(Image.open(path)) for path in output.parent.rglob("*.png") if name in str(path)}
    assert pictures and all(
        picture.shape == np.asarray(given).shape and picture.std() > 5 for picture in pictures.values()
    )
    if name == "lora":
        np.testing.assert_array_equal(pictures["without_again"], pictures["without"])
        assert not np.array_equal(pictures["with"], pictures["without"])
        assert not np.array_equal(pictures["half"], pictures["with"])
