import numpy as np
import pytest

from FBCache_ms.eval.shared.scenes import (
    Scene,
    Thing,
    draw,
    find_scene,
    held_out_captions,
    is_held_out,
    parse_caption,
    random_scene,
    score_picture,
)

TWO = "a small green square on the left and a big yellow triangle on the right, black background"


def test_a_caption_names_its_scene_and_the_scene_gives_the_caption_back():
    scene = parse_caption(TWO)
    assert scene.background == "black"
    assert scene.things[1] == Thing("big", "yellow", "triangle", "on the right")
    assert str(scene) == TWO


@pytest.mark.parametrize(
    "caption, named",
    [
        ("a big red circle in the center", "background"),
        ("a big red circle in the center, pink background", "background"),
        ("a huge red circle in the center, blue background", "huge"),
        ("a big red circle in the corner, blue background", "corner"),
        (" and ".join(["a big red circle in the center"] * 3) + ", blue background", "3 objects"),
        ("", "background"),
    ],
)
def test_a_caption_outside_the_grammar_is_refused_by_name(caption, named):
    with pytest.raises(ValueError, match=named):
        parse_caption(caption)


def test_what_is_drawn_is_found_again():
    rng = np.random.default_rng(0)
    right = []
    for _ in range(60):
        scene = random_scene(rng)
        right += [ok for _, ok in score_picture(draw(scene, 64, rng), scene)]
    assert np.mean(right) > 0.99


def test_other_sizes_are_scored_too():
    scene = parse_caption(TWO)
    assert all(ok for _, ok in score_picture(draw(scene, 128), scene))


def test_each_wrong_attribute_counts_once():
    picture = draw(parse_caption("a big red circle in the center, blue background"))
    wrong = parse_caption("a small red square in the center, blue background")
    assert dict(score_picture(picture, wrong)) == {
        "background": True,
        "colour": True,
        "place": True,
        "shape": False,
        "size": False,
    }


def test_an_object_that_is_missing_is_wrong_in_all():
    scene = parse_caption(TWO)
    score = score_picture(draw(Scene(scene.things[:1], "black")), scene)
    assert sum(ok for _, ok in score) == 5 and len(score) == 9


def test_an_empty_picture_shows_a_background():
    assert find_scene(draw(Scene((), "white"))) == Scene((), "white")


def test_held_out_captions_are_reproducible_and_held_out():
    captions = held_out_captions(50)
    assert captions == held_out_captions(50) and len(set(captions)) == 50
    assert all(map(is_held_out, captions))
