import csv
import json
import shutil
from argparse import Namespace
from pathlib import Path

import frontier
import pytest

from FBCache_ms.eval import ascend_acceptance, benchmark, learn_mask, sweep, tune
from FBCache_ms.eval.shared.prompts import OWN_PROMPTS, choose_prompts, coco_captions, read_prompts
from FBCache_ms.eval.shared.scenes import parse_caption
from FBCache_ms.runtime.checkpoint import TINY_FLUX

COCO = {
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [
        {"id": 5, "image_id": 9, "caption": "two\n dogs "},
        {"id": 2, "image_id": 3, "caption": "a cat"},
        {"id": 1, "image_id": 9, "caption": "dogs"},
    ],
}


@pytest.mark.parametrize(
    "name, text, prompts",
    [
        ("a.txt", "\ufeffa cat\n\n  two dogs  \r\n", ["a cat", "two dogs"]),
        ("a.json", '["a cat", "two dogs"]', ["a cat", "two dogs"]),
        ("a.json", '[{"prompt": "a cat", "id": 3}, {"Prompt": "two dogs"}]', ["a cat", "two dogs"]),
        ("a.json", '{"prompts": ["a cat"]}', ["a cat"]),
        ("a.jsonl", '{"caption": "a cat"}\n\n"two dogs"\n', ["a cat", "two dogs"]),
        ("captions_val2017.json", json.dumps(COCO), ["a cat", "dogs"]),
        ("drawbench.csv", 'Prompts,Category\n"A cat, red.",Colors\nTwo dogs,Counting\n', ["A cat, red.", "Two dogs"]),
        ("PARTI.TSV", 'Prompt\tCategory\n"a cat\tAnimals\n', ['"a cat']),
        ("DRAWBENCH.CSV", "Prompts,Category\na cat,Animals\n", ["a cat"]),
        ("breaks.csv", 'caption\n"a cat\nsitting"\n', ["a cat sitting"]),
        ("parti.tsv", 'Prompt\tCategory\n"a cat\tAnimals\ntwo "dogs"\tAnimals\n', ['"a cat', 'two "dogs"']),
    ],
)
def test_prompts_are_read_as_they_are_published(name, text, prompts, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", b"a \xff", "UTF-8"),
        ("a.json", b'["a"', "is not JSON"),
        ("a.json", b'{"words": ["a"]}', "another shape"),
        ("a.json", b"[1, 2]", "another shape"),
        ("a.json", b'{"annotations": [{"image_id": 3}]}', "MSCOCO's captions"),
        ("a.json", b'{"annotations": 7}', "MSCOCO's captions"),
        ("a.json", b'{"annotations": [{"image_id": 1, "id": 1, "caption": 3}]}', "MSCOCO's captions"),
        ("a.json", b'{"annotations": [{"image_id": "x", "id": 1, "caption": "a"}]}', "MSCOCO's captions"),
        ("a.csv", b"number,colour\n1,red\n", "no column"),
    ],
)
def test_a_file_of_another_shape_is_named(name, content, named, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_table_whose_quote_never_ends_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('caption\n"' + 2000 * "a")
    before = csv.field_size_limit(1000)
    try:
        with pytest.raises(ValueError, match="a.csv is no table"):
            read_prompts(tmp_path / "a.csv")
    finally:
        csv.field_size_limit(before)


def test_mscoco_gives_the_first_caption_of_each_image(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    assert coco_captions(tmp_path / "a.json") == ({3: "a cat", 9: "dogs"}, {3: "a.jpg", 9: "b.jpg"})


def test_without_a_file_the_prompts_are_our_own(tmp_path):
    args = Namespace(prompts=None, limit=3, seed=0, ckpt=TINY_FLUX)
    assert len([parse_caption(prompt) for prompt in choose_prompts(args)]) == 3
    vocabulary = Path("tokenizer_2") / "tokenizer.json"
    (tmp_path / "made" / "tokenizer_2").mkdir(parents=True)
    (tmp_path / "made" / vocabulary).write_bytes((TINY_FLUX / vocabulary).read_bytes())
    args.ckpt = tmp_path / "made"
    assert len([parse_caption(prompt) for prompt in choose_prompts(args)]) == 3
    args.ckpt = tmp_path
    assert choose_prompts(args) == list(OWN_PROMPTS[:3])
    args.limit = len(OWN_PROMPTS) + 1
    with pytest.raises(ValueError, match="--prompts"):
        choose_prompts(args)
    assert len(set(OWN_PROMPTS)) == len(OWN_PROMPTS)


@pytest.mark.parametrize("program", [ascend_acceptance, benchmark, frontier, learn_mask, sweep, tune])
def test_our_own_prompts_are_as_many_as_a_program_draws_when_it_is_not_told(program, tmp_path):
    shutil.copytree(TINY_FLUX, tmp_path / "other")
    vocabulary = tmp_path / "other" / "tokenizer_2" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    options = ["--ckpt", str(tmp_path / "other"), "--save_path", str(tmp_path / "results")]
    options += ["--min_speedup", "2"] if program is tune else []
    assert set(program.parse_arguments(options).prompts) <= set(OWN_PROMPTS)
