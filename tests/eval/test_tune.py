import json
import math

import pytest
from narrow import make_narrow

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval import tune
from FBCache_ms.eval.tune import Search, Wish, best, leave_one_out

FAMILIES = {"slow": ("F1B0_W0_R{:g}", tuple(range(20))), "quick": ("F1B0_W1_R{:g}", tuple(range(20)))}


def figures(psnr, speedup, prompts=1):
    """Figures as measure.Judge gives them, the same for every prompt; ``psnr`` may list one a prompt."""
    psnrs = psnr if isinstance(psnr, list) else [psnr] * prompts
    names = ("computed_steps", "skipped", "tflops", "ssim", "prompt_score", "clip_score")
    entries = [
        {**dict.fromkeys(names, 0.0), "index": index, "seconds": 1 / speedup, "psnr": value}
        for index, value in enumerate(psnrs)
    ]
    mean = sum(psnrs) / len(psnrs)
    return {"psnr": mean, "speedup": speedup, "clip_score": 0.0, "uncached_seconds": 1.0, "pictures": entries}


def world(row):
    """A world in which daring is fast and bad, and one family better than the other by 0.2x."""
    if row is tune.BASELINE:
        return figures(math.inf, 1)
    return figures(50 - row.threshold, 1 + 0.1 * row.threshold + 0.2 * (row.case == "quick"))


@pytest.mark.parametrize(
    "wish, name, tried",
    [
        (Wish(min_psnr=35), "quick: 15", 10),
        (Wish(min_psnr=50), "quick: 0", 10),
        (Wish(min_psnr=1), "quick: 19", 10),
        (Wish(min_speedup=2), "quick: 8", 10),
        (Wish(min_speedup=2, min_psnr=41), "quick: 8", 10),
        (Wish(min_speedup=2, min_psnr=43), None, 10),
        (Wish(min_speedup=9), None, 10),
    ],
)
def test_the_search_finds_the_best_of_every_family_without_trying_all(wish, name, tried):
    search = Search(lambda rows, left: [world(row) for row in rows], wish, FAMILIES)
    chosen = best(search.run(), search.uncached, wish)
    assert (chosen and chosen.name) == name
    assert len(search.found) <= tried


@pytest.mark.parametrize("option", ["--min_psnr", "--max_clip_score_loss", "--min_speedup"])
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_a_wish_that_is_none_is_refused(option, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune.parse_arguments([option, value, "--save_path", str(tmp_path)])
    assert f"{option} must be" in capsys.readouterr().err


def test_a_lost_clip_score_is_a_share_of_the_uncached_one():
    wish, uncached = Wish(max_clip_score_loss=0.005), {"clip_score": 0.4}
    assert wish.good({"clip_score": 0.398}, uncached) and not wish.good({"clip_score": 0.3979}, uncached)


def test_leaving_a_prompt_out_shows_a_choice_that_hangs_on_one():
    careful, daring = tune.Row("a", "careful", ""), tune.Row("a", "daring", "")
    found = {careful: figures([36, 36, 36], 1.5), daring: figures([30, 30, 46], 2)}
    uncached, wish = figures(math.inf, 1, 3), Wish(min_psnr=35)
    assert best(found, uncached, wish) is daring
    # Without the third prompt the daring one falls short; without either other one it is chosen and keeps 30 dB only.
    assert leave_one_out(found, uncached, wish, daring) == (2, 1, 3, 30)


def test_a_recommendation_is_a_preset_file_that_cache_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "FAMILIES", {"FBCache": ("F1B0_W0_R{:g}", (0.1, 1))})
    ckpt = make_narrow(tmp_path / "narrow")
    options = ["--ckpt", str(ckpt), "--image_size", "32", "32", "--num_inference_steps", "3", "--limit", "2"]
    prompts, page = tmp_path / "prompts.txt", tmp_path / "page.md"
    prompts.write_text("a cat\ntwo dogs")
    options += ["--prompts", str(prompts), "--save_path", str(tmp_path / "out"), "--into", str(page)]
    assert tune.main([*options, "--min_psnr", "5"]) == 0
    preset, text = tmp_path / "out" / "best.json", capsys.readouterr().out
    assert f"use it: --cache {preset}" in text
    made = page.read_text()
    assert made.split("\n\n", 2)[2] == "".join(f"    {line}\n" for line in text.splitlines())
    assert json.loads(preset.read_text())["left_one_out"]["prompts"] == 2
    assert CacheConfig.named(str(preset)) in (CacheConfig(0.1), CacheConfig(1))
    assert (tmp_path / "out" / "sweep.json").is_file()

    assert tune.main([*options, "--min_psnr", "500", "--min_speedup", "100"]) == 2
    assert "none of 1 configurations keeps PSNR at least 500 dB" in capsys.readouterr().err
    assert page.read_text() == made


@pytest.mark.parametrize("text", ["", "[]", '{"config": 3}', '{"config": "fastest"}'])
def test_another_file_is_no_preset(text, tmp_path):
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(ValueError, match="cache"):
        CacheConfig.named(str(tmp_path / "best.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        CacheConfig.named(str(tmp_path / "none.json"))
