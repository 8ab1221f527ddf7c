"""benchmarks/products.py: which products it times, its verdict, and what it refuses."""

import products
import pytest
from mindone.diffusers.models.transformers import transformer_flux

SMALL = products.Case(width=16, head=8, tokens=5)


@pytest.mark.parametrize("kind", products.KINDS)
def test_the_products_are_those_of_all_layers_and_of_attention(kind):
    block = getattr(transformer_flux, products.KINDS[kind])(16, 2, 8)
    layers, every = products.layers_of(kind, block), SMALL.tokens + products.TEXT
    names = {id(layer.weight) for layer, _ in layers}
    others = [each for each in block.get_parameters() if each.ndim == 2 and id(each) not in names]
    assert all("norm" in each.name for each in others)
    tokens = {"image": SMALL.tokens, "text": products.TEXT, "both": every}
    of_layers = sum(2 * tokens[stream] * layer.in_features * layer.out_features for layer, stream in layers)
    of_attention = 2 * 2 * every**2 * SMALL.width
    assert products.operations(SMALL) == of_layers + of_attention


@pytest.mark.parametrize("kind", products.KINDS)
def test_a_block_and_its_products_are_run_in_turn(kind):
    seconds = products.measure(products.graphs_of(kind, SMALL), 2)
    assert [len(each) for each in seconds] == [2, 2] and min(map(min, seconds)) > 0


@pytest.mark.parametrize("ratio, status", [(products.MOST + 0.1, 1), (products.MOST - 0.1, 0)])
def test_the_exit_status_is_of_the_median_ratio(ratio, status, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "graphs_of", lambda kind, case: ())
    monkeypatch.setattr(products, "measure", lambda graphs, runs: [[ratio, ratio, 9], [1, 1, 1]])
    assert products.main(["--cases", products.BOUND, "--save_path", str(tmp_path)]) == status


@pytest.mark.parametrize("options", [["--cases", "none"], ["--runs", "0"], ["--into", "no-such-folder/products.md"]])
def test_what_cannot_be_run_is_said_at_once(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        products.parse_arguments([*options, "--save_path", str(tmp_path)])
    assert ended.value.code == 2 and "products: error" in capsys.readouterr().err
