import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from FBCache_ms.eval import quality
from FBCache_ms.eval.quality import METRICS_PYTHON, TINY_CLIP, ClipScore, list_pictures, prompt_score, summary
from FBCache_ms.eval.shared.metrics import cosine_similarity, frechet_distance, psnr, read_picture
from FBCache_ms.eval.shared.scenes import draw, held_out_captions, parse_caption

TOOLS = Path(__file__).parents[2] / "tools" / "metrics"
CAPTIONS = held_out_captions(20)

needs_torch = pytest.mark.skipif(
    not METRICS_PYTHON.is_file(), reason=f"{METRICS_PYTHON} is not there; tools/metrics/score.py says how it is made"
)


def scene(caption, size=64):
    return np.asarray(draw(parse_caption(caption), size)) / 255


def save(path, picture):
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path)


def noisy(picture, sigma):
    return np.clip(picture + np.random.default_rng(0).normal(0, sigma, picture.shape), 0, 1)


@pytest.fixture
def folders(tmp_path):
    """Three scenes with their prompts, in a, and the same with more and more noise, in b."""
    for index, caption in enumerate(CAPTIONS[:3]):
        for name, picture in (("a", scene(caption)), ("b", noisy(scene(caption), 0.02 * (index + 1)))):
            (tmp_path / name).mkdir(exist_ok=True)
            save(tmp_path / name / f"{index:05d}.png", picture)
        (tmp_path / "a" / f"{index:05d}.json").write_text(json.dumps({"prompt": caption}))
    return tmp_path


@pytest.fixture(scope="module")
def clip():
    return ClipScore(TINY_CLIP)


def run(folders, *options):
    out = folders / "out" / "quality.json"
    assert quality.main([*options, "--save_path", str(out)]) == 0
    return json.loads(out.read_text())


def error_of(options, capfd):
    try:
        status = quality.main(options)
    except SystemExit as exit:
        status = exit.code
    lines = capfd.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("quality: error: ")
    return lines[0]


def test_psnr_is_that_of_the_squared_error_in_float():
    zeros, grey = np.zeros((8, 8, 3)), np.full((8, 8, 3), 0.1)
    assert psnr(zeros, grey) == pytest.approx(20)
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (256, 256, 3)).astype(np.uint8)
    noise = np.clip((levels + rng.normal(0, 20, levels.shape)).round(), 0, 255).astype(np.uint8)
    # Bytes would wrap around when subtracted and squared, and give 28.8 whatever the noise.
    assert psnr(levels / 255, noise / 255) == pytest.approx(22.5, abs=0.1)


@pytest.mark.parametrize("name, whole", [("cut.png", 0.5), ("cut.jpg", 0.5), ("empty.png", 0), ("text.jpg", None)])
def test_a_damaged_picture_is_named(name, whole, tmp_path):
    path = tmp_path / name
    save(path, noisy(scene(CAPTIONS[0]), 0.1))
    path.write_bytes(b"no picture" if whole is None else path.read_bytes()[: int(path.stat().st_size * whole)])
    with pytest.raises(OSError, match=f"picture .*{name} cannot be read: "):
        read_picture(path)


def test_a_picture_is_read_as_floats_whatever_its_mode(tmp_path):
    Image.new("L", (3, 2), 51).save(tmp_path / "grey.png")
    picture = read_picture(tmp_path / "grey.png")
    assert picture.shape == (2, 3, 3) and picture.dtype == np.float64 and np.all(picture == 0.2)


@pytest.mark.parametrize(
    "case, expected, digits",
    [
        ((500, 300, 16), 156.1491835605285, 1e-12),
        ((40, 30, 100), 11947.666312900983, 1e-7),
        ((2, 2, 3), 31.365143359978617, 1e-8),
    ],
)
def test_the_frechet_distance_is_torch_fidelitys(case, expected, digits):
    # torch-fidelity 0.4.0, printed by tools/metrics/frechet.py; with fewer features than dimensions its eigenvalues of
    # a singular matrix are right to these digits alone.
    first, second = runpy.run_path(str(TOOLS / "frechet.py"))["draw"](*case)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=digits)


def test_the_frechet_distance_of_a_set_to_itself_is_0_and_to_a_shifted_one_the_shift():
    features = np.random.default_rng(0).normal(size=(10, 30))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(features, features + 2) == pytest.approx(30 * 4)


@pytest.mark.parametrize("shapes", [((1, 4), (5, 4)), ((5, 4), (1, 4)), ((5, 4), (5, 3)), ((5,), (5,))])
def test_a_frechet_distance_needs_two_sets_of_one_dimension(shapes):
    with pytest.raises(ValueError, match="2 pictures or more"):
        frechet_distance(*map(np.ones, shapes))


def test_the_cosine_is_that_of_the_angle():
    cosines = cosine_similarity(np.array([[1.0, 0], [2, 2], [3, 4]]), np.array([[0, 5.0], [1, 1], [-3, -4]]))
    assert cosines == pytest.approx([0, 1, -1]) and abs(cosines).max() <= 1


def test_a_summary_counts_the_finite_numbers():
    assert summary([1.0, 3.0, np.inf]) == {"mean": 2, "std": pytest.approx(2**0.5), "min": 1, "max": 3, "pictures": 2}
    assert summary([4.0])["std"] is None
    assert (summary([np.inf] * 2)["mean"], summary([np.inf] * 2)["pictures"]) == (np.inf, 2)


def test_the_prompt_score_is_the_share_of_right_attributes():
    caption = "a big red circle in the center, blue background"
    assert prompt_score(scene(caption), caption) == 1
    assert prompt_score(scene(caption), caption.replace("red", "green")) == pytest.approx(4 / 5)
    assert prompt_score(scene(caption), "an old tram in Lisbon") is None


def test_clip_prefers_a_pictures_own_caption(clip):
    pictures = [scene(caption, 64 + 8 * (index % 3)) for index, caption in enumerate(CAPTIONS)]
    own, others = clip(iter(pictures), CAPTIONS), clip(pictures, CAPTIONS[1:] + CAPTIONS[:1])
    assert len(own) == len(CAPTIONS) and all(-1 <= score <= 1 for score in own + others)
    assert sum(mine > other for mine, other in zip(own, others)) >= 0.9 * len(CAPTIONS)


def test_clips_numbers_do_not_depend_on_how_many_pictures_there_are(clip):
    pictures = [scene(caption) for caption in CAPTIONS]
    assert np.array_equal(clip.image_features(pictures)[:2], clip.image_features(pictures[:2]))
    assert np.array_equal(clip.text_features(CAPTIONS)[:2], clip.text_features(CAPTIONS[:2]))


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors, which is not there"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_a_clip_that_is_not_whole_is_named(spoil, named, tmp_path):
    for path in TINY_CLIP.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(OSError, match=f"CLIP {tmp_path}.*{named}"):
        ClipScore(tmp_path)


def test_pictures_are_compared_with_their_references(folders, capsys):
    page = folders / "page.md"
    report = run(folders, str(folders / "b"), "--reference", str(folders / "a"), "--into", str(page))
    assert list(report["metrics"]) == ["psnr", "ssim"]
    rows = report["per_picture"]
    assert [row["picture"] for row in rows] == ["00000.png", "00001.png", "00002.png"]
    for index, row in enumerate(rows):
        pair = [read_picture(folders / name / row["picture"]) for name in "ab"]
        assert row["psnr"] == psnr(*pair) and 33 - 10 * index < row["psnr"] < 40 - 5 * index
    assert report["metrics"]["psnr"]["mean"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    text = capsys.readouterr().out
    assert page.read_text().split("\n\n", 2)[2] == text
    table = text.splitlines()
    assert table[0] == "| metric | mean | std | min | max | pictures |"
    assert table[2].startswith(f"| psnr | {report['metrics']['psnr']['mean']:.4f} |") and table[2].endswith(" 3 |")


def test_equal_pictures_have_no_finite_psnr(folders, capsys):
    report = run(folders, str(folders / "a"), "--reference", str(folders / "a"), "--metrics", "psnr", "--limit", "2")
    assert [row["psnr"] for row in report["per_picture"]] == [None, None]
    assert "| psnr | inf | - | inf | inf | 2 |" in capsys.readouterr().out


def test_scenes_are_scored_by_their_prompts(folders):
    report = run(folders, str(folders / "a"))
    assert set(report["metrics"]) == {"clip_score", "prompt_score"} and report["clip"] == TINY_CLIP.name
    assert [row["prompt"] for row in report["per_picture"]] == CAPTIONS[:3]
    assert report["metrics"]["prompt_score"]["mean"] == 1


def test_prompts_of_a_file_go_with_the_pictures_in_their_order(folders):
    prompts = folders / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS[2::-1]))
    options = ["--prompts", str(prompts), "--metrics", "prompt_score"]
    scores = [row["prompt_score"] for row in run(folders, str(folders / "a"), *options)["per_picture"]]
    assert scores[1] == 1 and scores[0] < 1 and scores[2] < 1


def test_other_pictures_are_compared_as_a_set(folders):
    for index, path in enumerate(list_pictures(folders / "b")):
        Image.open(path).resize((40 + 20 * index, 70)).save(folders / "b" / f"other{index}.jpg")
        path.unlink()
    report = run(folders, str(folders / "a"), "--reference", str(folders / "b"))
    assert set(report["metrics"]) == {"clip_score", "prompt_score", "clip_frechet"}
    assert report["metrics"]["clip_frechet"]["mean"] > 0
    report = run(folders, str(folders / "a"), "--reference", str(folders / "a"), "--metrics", "clip_frechet")
    assert report["metrics"]["clip_frechet"]["mean"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    "options, named",
    [
        (["a", "--metrics", "psnr"], "psnr needs --reference FOLDER"),
        (["a", "--metrics", "beauty"], "beauty"),
        (["b"], "give --reference FOLDER or --prompts FILE"),
        (["b", "--metrics", "prompt_score"], "00000.json"),
        (["b", "--metrics", "clip_score", "--prompts", "strange.txt"], "clip-vit-large-patch14"),
        (["b", "--metrics", "prompt_score", "--prompts", "strange.txt"], "'a tram'"),
        (["b", "--prompts", "short.txt"], "short.txt holds 1 prompts for 3 pictures"),
        (["b", "--prompts", "none.txt"], "none.txt"),
        (["a", "--clip", "b"], "b/config.json, which is not there"),
        (["b", "--reference", "a", "--metrics", "lpips"], "alexnet-owt-7be5be79.pth"),
        (["a", "--reference", "a", "--metrics", "fid"], "weights-inception-2015-12-05-6726825d.pth"),
        (["a", "--metrics", "image_reward"], "https://huggingface.co/THUDM/ImageReward"),
        (["a", "--image_reward", "b"], "ImageReward.pt, which is not there"),
        (["b", "--reference", "a", "--lpips", "short.txt", "--metrics_python", "none/python"], "python -m venv"),
        (["a", "--reference", "a", "--limit", "1", "--metrics", "clip_frechet"], "2 pictures or more"),
        (["a", "--limit", "0"], "--limit"),
        (["a", "--save_path", "b"], "b is a folder"),
        (["a", "--into", "nowhere/page.md"], "--into nowhere/page.md: there is no folder nowhere"),
        (["none"], "none is not a folder"),
        (["empty"], "empty holds no picture"),
        (["damaged"], "00001.png cannot be read"),
        (["a", "--reference", "damaged"], "00001.png cannot be read"),
        (["a", "--reference", "small"], "00002.png is 64x64, but its reference"),
        (["tiny", "--reference", "tiny"], "tiny/00000.png is 10x10; ssim needs 11 pixels or more"),
        (["a", "--reference", "fewer"], "fewer/00002.png"),
        (["unread"], 'unread/00001.json is not a JSON object with a "prompt"'),
    ],
)
def test_what_cannot_be_scored_ends_with_2_and_one_line(options, named, folders, capfd, monkeypatch):
    monkeypatch.chdir(folders)
    Path("empty").mkdir()
    Path("short.txt").write_text(CAPTIONS[0])
    Path("strange.txt").write_text("a tram\n" * 3)
    for name in ("damaged", "small", "fewer", "unread"):
        Path(name).mkdir()
        for path in Path("a").iterdir():
            (Path(name) / path.name).write_bytes(path.read_bytes())
    Path("damaged/00001.png").write_bytes(Path("a/00001.png").read_bytes()[:150])
    save(Path("small/00002.png"), scene(CAPTIONS[2], 32))
    Path("fewer/00002.png").unlink()
    Path("tiny").mkdir()
    save(Path("tiny/00000.png"), scene(CAPTIONS[0])[:10, :10])
    Path("unread/00001.json").write_text("[]")
    assert named in error_of(options, capfd)


def test_scikit_image_is_named_where_it_is_missing(folders, capfd, monkeypatch):
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    options = [str(folders / "b"), "--reference", str(folders / "a"), "--metrics", "ssim"]
    assert "pip install FBCache_ms[eval]" in error_of(options, capfd)


def test_a_python_without_torch_is_named(folders, capfd):
    options = [str(folders / "b"), "--reference", str(folders / "a"), "--metrics", "lpips"]
    weights = ["--lpips", str(folders / "a" / "00000.json"), "--metrics_python", sys.executable]
    message = error_of([*options, *weights], capfd)
    assert "lpips needs torch" in message and sys.executable in message


def test_what_fid_lacks_can_be_asked_before(tmp_path):
    assert "weights-inception" in quality.fid_lacks(None)
    weights = tmp_path / "weights.pth"
    assert f"{weights}, which is not there" in quality.fid_lacks(weights)
    weights.touch()
    assert "none/python is not there" in quality.fid_lacks(weights, Path("none/python"))
    assert quality.fid_lacks(weights, sys.executable) is None


def test_errors_are_told_before_mindspore_is_imported():
    script = (
        "import sys; from FBCache_ms.eval import quality\n"
        "try: quality.main(['none'])\n"
        "except SystemExit: print('mindspore' in sys.modules, 'skimage' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([METRICS_PYTHON, TOOLS / "random_weights.py", folder, "lpips", "fid"], check=True)
    return folder


def test_lpips_names_pictures_of_other_sizes(tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (8, 16)]
    for path, side in zip(paths, (8, 16)):
        Image.new("RGB", (side, side)).save(path)
    with pytest.raises(ValueError, match="8x8, but its reference"):
        quality.lpips(paths[:1], paths[1:], tmp_path / "weights.pth")


@needs_torch
def test_lpips_grows_with_the_noise_and_is_0_without(folders, random_weights):
    for index in range(3):
        save(folders / "a" / f"{index:05d}.png", scene(CAPTIONS[0]))
        save(folders / "b" / f"{index:05d}.png", noisy(scene(CAPTIONS[0]), 0.05 * index))
    options = ["--reference", str(folders / "a"), "--lpips", str(random_weights / "lpips.pth"), "--metrics", "lpips"]
    values = [row["lpips"] for row in run(folders, str(folders / "b"), *options)["per_picture"]]
    assert values[0] == 0 and 0 < values[1] < values[2]


@needs_torch
def test_fid_compares_sets_of_any_sizes(folders, random_weights):
    for index, path in enumerate(list_pictures(folders / "b")):
        Image.open(path).convert("L").resize((90, 40 + 30 * index)).save(folders / "b" / f"other{index}.jpg")
        path.unlink()
    options = ["--inception", str(random_weights / "fid.pth"), "--metrics", "fid", "--reference"]
    values = [run(folders, str(folders / "a"), *options, str(folders / name)) for name in "ab"]
    own, other = (value["metrics"]["fid"]["mean"] for value in values)
    assert abs(own) < 0.05 * other


@needs_torch
@pytest.mark.parametrize("metric, option", [("lpips", "--lpips"), ("fid", "--inception")])
def test_weights_that_are_none_are_named(metric, option, folders, capfd):
    weights = folders / "a" / "00000.json"
    options = [str(folders / "b"), "--reference", str(folders / "a"), "--metrics", metric, option, str(weights)]
    assert f"weights {weights} are no torch file" in error_of(options, capfd)


@needs_torch
def test_clips_embeddings_are_torchs(clip):
    script = (
        "import json, sys, torch, transformers as t; from PIL import Image; folder, *paths = sys.argv[1:]\n"
        "m, p, k = (c.from_pretrained(folder) for c in (t.CLIPModel, t.CLIPImageProcessor, t.CLIPTokenizer))\n"
        "texts = k(json.load(sys.stdin), padding=True, return_tensors='pt')\n"
        "pixels = p([Image.open(path) for path in paths], return_tensors='pt')\n"
        "with torch.no_grad(): both = m.get_image_features(**pixels), m.get_text_features(**texts)\n"
        "print(json.dumps([part.tolist() for part in both]))"
    )
    paths = sorted(Path(__file__).parents[2].glob("docs/*.png"))
    done = subprocess.run(
        [METRICS_PYTHON, "-c", script, TINY_CLIP, *paths],
        input=json.dumps(CAPTIONS),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    images, texts = map(np.array, json.loads(done.stdout))
    assert clip.image_features(map(read_picture, paths)) == pytest.approx(images, abs=1e-4)
    assert clip.text_features(CAPTIONS) == pytest.approx(texts, abs=1e-4)
