import json
from itertools import product

import numpy as np
import pytest
from make_models import make

import mindspore as ms

from FBCache_ms import CacheConfig, CacheContext
from FBCache_ms.eval import memory
from FBCache_ms.predict.memory import cache_bytes, cache_parts
from FBCache_ms.rules.when import GATES
from FBCache_ms.runtime.checkpoint import TINY_FLUX, image_unit, transformer_config

SPANS = ({}, {"Bn_compute_blocks": 2}, {"span": "stacks"}, {"span": "single"}, {"span": "model"})
FORECASTS = ("taylor", "hicache", "newton", "dicache")


def structures(gate):
    """Every structure of a gate that CacheConfig lets pass, up to order 3."""
    schedule = {"schedule": "fora"} if GATES[gate].is_there and not GATES[gate].rules else {}
    for span, order, forecast, dtype, factor in product(SPANS, range(4), FORECASTS, ("model", "float32"), (1, 2)):
        try:
            yield CacheConfig(
                taylorseer_derivative=order,
                gate=gate,
                downsample_factor=factor,
                forecast=forecast,
                derivatives_dtype=dtype,
                **span,
                **schedule,
            )
        except ValueError:
            continue


@pytest.mark.parametrize("gate", GATES)
def test_the_formula_is_what_is_allocated_for_every_structure(gate):
    rng, configs = np.random.default_rng(list(GATES).index(gate)), list(structures(gate))
    # A gate before the embedding or that verifies has one span, one that refreshes has one span and one order.
    fewer = {GATES[gate].refreshes: 0, GATES[gate].verifies: 15, GATES[gate].before_embedding: 30}
    assert len(configs) > fewer.get(True, 50)
    for config in configs:
        batch, tokens, width, text, channels = rng.integers(1, 6, 5).tolist()
        branches, dtype = int(rng.integers(1, 3)), ms.bfloat16 if rng.integers(2) else ms.float32
        sizes = {"channels": channels, "stacks": (2, 3)}
        context = CacheContext(batch, tokens, width, None, branches, dtype, config, text, 8, **sizes)
        itemsize = 2 if dtype == ms.bfloat16 else 4
        assert cache_bytes(config, batch, tokens, width, text, branches, itemsize, **sizes) == context.nbytes, str(
            config
        )


def test_a_table_takes_a_row_for_each_step_that_there_may_be():
    settings = {"taylorseer_derivative": 2, "gate": "static", "schedule": "fora", "schedule_interval": 2}
    config = CacheConfig(forecast="table", forecast_weights=range(12), **settings)
    context = CacheContext(1, 4, 8, config=config, steps=8)
    assert cache_bytes(config, 1, 4, 8, itemsize=4) == context.nbytes
    assert context.nbytes - cache_bytes(CacheConfig(**settings), 1, 4, 8, itemsize=4) == 3 * 1000 * 4


def test_parts_of_flux_dev_are_counted_by_hand():
    """1024 x 1024, bfloat16: a tensor of the image stream takes 25 MB, one of the text stream 3 MB."""
    image, text = 4096 * 3072 * 2, 512 * 3072 * 2
    parts = cache_parts(CacheConfig(taylorseer_derivative=2, Bn_compute_blocks=1), 1, 4096, 3072, 512)
    assert parts["differences"] == 3 * (image + text) and parts["references"] == image
    assert parts["probe differences"] == 0 and parts["trace"] + parts["numbers"] < 30_000
    wide = CacheConfig(taylorseer_derivative=2, derivatives_dtype="float32")
    assert cache_parts(wide, 1, 4096, 3072)["differences"] == 3 * 2 * image
    # EasyCache's tensors are of the latents' 64 channels: the residual, the latents before, and two in float32.
    easy = cache_parts(CacheConfig.preset("easycache"), 1, 4096, 3072)
    latents = 4096 * 64
    assert [easy[name] for name in ("differences", "references", "state")] == [
        2 * latents,
        2 * latents,
        8 * latents + 8,
    ]
    # ToCa and DuCa keep two tensors of both streams for each of 57 blocks.
    kept = cache_parts(CacheConfig.preset("duca"), 1, 4096, 3072, 512, stacks=(19, 38))["blocks"]
    assert kept == 57 * 2 * (image + text) and round(kept / 1e9, 2) == 3.23
    assert cache_parts(CacheConfig(gate="none"), 1, 4096, 3072, branches=2)["differences"] == 0


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"branches": 3}, "branches"),
        ({"config": CacheConfig(span="stacks")}, "text_len"),
        ({"config": CacheConfig.preset("duca"), "text_len": 2}, "stacks must have 1 block or more"),
        ({"config": CacheConfig.preset("duca"), "stacks": (1, 1)}, "text_len"),
    ],
)
def test_a_shape_that_no_context_can_have_has_no_bytes(arguments, named):
    with pytest.raises(ValueError, match=named):
        cache_bytes(**{"config": CacheConfig(), "batch_size": 1, "seq_len": 4, "inner_dim": 8, **arguments})


def test_the_program_puts_its_table_where_it_is_told(tmp_path, capsys):
    page = tmp_path / "page.md"
    arguments = ["--sides", "1024", "--batch_sizes", "1", "--cache", "fora", "--save_path", str(tmp_path)]
    assert memory.main([*arguments, "--into", str(page)]) == 0
    assert "| First-Block Cache, order 0 | `F1B0_W0_T0O0_R0.12` | 50.4 |" in page.read_text()
    assert page.read_text().split("\n\n", 2)[2] == capsys.readouterr().out
    assert json.loads((tmp_path / "memory.json").read_text())["bytes"][-1]["1024 x 1024, batch 1"] == cache_bytes(
        CacheConfig.preset("fora"), 1, 4096, 3072
    )


def test_the_program_counts_for_another_model(tmp_path):
    ckpt = make(tmp_path / "qwenimage", "qwenimage")
    options = ["--ckpt", str(ckpt), "--sides", "64", "--batch_sizes", "1", "--text_len", "8"]
    assert memory.main([*options, "--save_path", str(tmp_path / "out")]) == 0
    rows = {row["Cache"]: row for row in json.loads((tmp_path / "out" / "memory.json").read_text())["bytes"]}
    width = json.loads((ckpt / "transformer" / "config.json").read_text())
    width = width["num_attention_heads"] * width["attention_head_dim"]
    counted = rows["First-Block Cache, order 0"]["64 x 64, batch 1"]
    assert counted == cache_bytes(CacheConfig.named("F1B0_W0_T0O0_R0.12"), 1, 16, width, 8, 1, 2)
    # It has one stack, and fewer blocks than that.
    assert "double gate" not in rows and "DBCache, last blocks run" not in rows
    with pytest.raises(SystemExit):
        memory.main([*options, "--cache", "double_gate", "--save_path", str(tmp_path / "out")])


def test_the_program_counts_the_models_own_channels(tmp_path):
    options = ["--ckpt", str(TINY_FLUX), "--sides", "64", "--batch_sizes", "1", "--text_len", "8"]
    assert memory.main([*options, "--cache", "easycache", "--save_path", str(tmp_path)]) == 0
    counted = json.loads((tmp_path / "memory.json").read_text())["bytes"][-1]["64 x 64, batch 1"]
    config, tokens = transformer_config(TINY_FLUX), (64 // image_unit(TINY_FLUX)) ** 2
    width = config.num_attention_heads * config.attention_head_dim
    shape = 1, tokens, width, 8, 1, 2
    assert counted == cache_bytes(CacheConfig.preset("easycache"), *shape, channels=config.in_channels)
    assert counted < cache_bytes(CacheConfig.preset("easycache"), *shape, channels=64)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--sides", "1000"], "--sides must be multiples of 16, not 1000"),
        (["--batch_sizes", "0"], "--batch_sizes must be 1 or more, not 0"),
        (["--cache", "F0"], "must read like"),
        (["--into", "tests"], "--into: tests is a folder, not a file"),
        (["--into", "nowhere/page.md"], "--into nowhere/page.md: there is no folder nowhere"),
    ],
)
def test_the_program_refuses_with_one_line(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        memory.main([*arguments, "--save_path", str(tmp_path)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
