"""What a client may ask for, and what it is told of anything else."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fakes import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from FBCache_ms.config import PRESETS, CacheConfig
from FBCache_ms.serve import settings as limits
from FBCache_ms.serve.api import KeptJobs
from FBCache_ms.serve.errors import ApiError
from FBCache_ms.serve.jobs import SUCCEEDED, Job
from FBCache_ms.serve.requests import FBCacheFields, ImageFields, checked, ordered, parse


def drawings(settings=SETTINGS, **found):
    """The Drawings of a request."""
    fields = checked({"prompt": "a big red circle", **found})
    return ordered(fields, settings, fields.stream).drawings


def refusal(settings=SETTINGS, **found):
    """(status, param, code, message) of a request that is refused."""
    with pytest.raises(ApiError) as refused:
        drawings(settings, **found)
    error = refused.value
    return error.status, error.param, error.code, error.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"prompt"',
        b'{"guidance_scale": NaN}',
        b'{"guidance_scale": Infinity}',
        b'{"guidance_scale": 1e400}',
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"prompt": "\xff"}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"fbcache": ' + b'{"a":' * 100_000,
        b'{"n": 1, "n": 2}',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as refused:
        parse(body)
    assert refused.value.status == 400 and len(refused.value.message) < 200


def test_null_stands_for_what_is_left_out():
    assert parse(b'{"prompt": "x", "n": null}') == {"prompt": "x"}


@pytest.mark.parametrize(
    "found, param",
    [
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "1"}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**39}, "seed"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
        ({"size": "64"}, "size"),
        ({"size": "128x128"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"guidance_scale": 10**30}, "guidance_scale"),
        ({"negative_prompt": "blue"}, "negative_prompt"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale"),
        ({"cache": "balancd"}, "cache"),
        ({"cache": "/etc/passwd"}, "cache"),
        ({"cache": "preset.json"}, "cache"),
        ({"cache": "F9B9_W0_R0.1"}, "cache"),
        ({"cache": "taylorseer"}, "cache"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"fbcache": {"progress": True}}, "fbcache.progress"),
        ({"fbcache": {"progress": 1}}, "fbcache.progress"),
        ({"fbcache": {"threshold": -0.1}}, "fbcache.threshold"),
        ({"fbcache": {"start": 1.5}}, "fbcache.start"),
        ({"fbcache": {"start": 0.5, "end": 0.25}}, "fbcache.start"),
        ({"fbcache": {"max_consecutive_cache_hits": -2}}, "fbcache.max_consecutive_cache_hits"),
        ({"cache": "none", "fbcache": {"end": 0.5}}, "fbcache.end"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_names_its_field(found, param):
    status, named, _, message = refusal(**found)
    assert (status, named) == (400, param) and param.split(".")[-1] in message


@pytest.mark.parametrize(
    "found, param, hint",
    [
        ({"sized": "64x64"}, "sized", "did you mean size?"),
        ({"path": "/etc"}, "path", ""),
        ({"user": "me"}, "user", ""),
        ({"fbcache": {"stat": True}}, "fbcache.stat", "did you mean stats?"),
    ],
    ids=str,
)
def test_an_unknown_field_is_named(found, param, hint):
    status, named, code, message = refusal(**found)
    assert (status, named, code) == (400, param, "unknown_field") and hint in message


def test_a_prompt_is_needed():
    with pytest.raises(ApiError) as refused:
        checked({})
    assert refused.value.param == "prompt"


def test_another_model_is_not_found():
    assert refusal(model="dall-e-2")[:3] == (404, "model", "model_not_found")


def test_a_size_that_is_not_compiled_is_refused_with_those_that_are():
    assert "64x64, 96x64" in refusal(size="1024x1024")[3]


def test_a_structure_that_is_not_compiled_is_refused_with_those_that_are():
    message = refusal(cache="taylorseer")[3]
    assert "balanced, teacache" in message and "conservative" in message


def test_a_plain_request_takes_every_default():
    (only,) = drawings()
    assert (only.width, only.height, only.steps) == (64, 64, 28) and only.tag == PRESETS["balanced"]
    assert only.scales == {"guidance_scale": 3.5, "true_cfg_scale": 1.0} and not only.watched


def test_every_picture_has_a_seed_of_its_own():
    assert [each.seed for each in drawings(n=3, seed=7)] == [7, 8, 9]
    assert drawings()[0].seed != drawings()[0].seed


def test_a_tag_of_a_compiled_structure_is_drawn():
    assert drawings(cache="F1B0_W0M0MC0_T0O0_R0.3")[0].tag == "F1B0_W0M0MC0_T0O0_R0.3"


def test_numbers_of_the_cache_are_in_place_of_the_presets():
    numbers = {"threshold": 0.2, "start": 0.25, "end": 0.75, "max_consecutive_cache_hits": 2}
    config = CacheConfig.preset("balanced").changed(
        residual_diff_threshold=0.2, start=0.25, end=0.75, max_consecutive_cache_hits=2
    )
    assert drawings(fbcache=numbers)[0].tag == str(config)
    teacache = CacheConfig.preset("teacache").changed(teacache_threshold=0.2)
    assert drawings(cache="teacache", fbcache={"threshold": 0.2})[0].tag == str(teacache)


def test_a_threshold_without_a_gate_is_refused():
    fora = CacheConfig.preset("fora")
    settings = replace(SETTINGS, presets={"fora": fora})
    assert refusal(settings, fbcache={"threshold": 0.2})[:2] == (400, "fbcache.threshold")


@pytest.mark.parametrize("found", [{"cache": "none"}, {"num_inference_steps": 4}], ids=str)
def test_no_cache_is_the_same_structure_switched_off(found):
    config = CacheConfig.from_tag(drawings(**found)[0].tag)
    assert config == CacheConfig.preset("balanced").switched_off()


def test_no_cache_asks_for_no_number_of_steps():
    settings = replace(SETTINGS, presets={"fitted": CacheConfig.preset("fitted_8_of_28")})
    tag = drawings(settings, cache="none", num_inference_steps=20)[0].tag
    assert tag == str(CacheConfig.preset("fitted_8_of_28").switched_off())
    assert refusal(settings, num_inference_steps=20)[:2] == (400, "cache")


def test_of_finished_jobs_the_last_to_end_are_kept(monkeypatch):
    monkeypatch.setattr(limits, "KEPT_PICTURES", 2)
    kept = KeptJobs()
    first, second, third, waiting = (Job(SimpleNamespace(drawings=(None,))) for _ in range(4))
    for job in (third, second, first, waiting):
        kept.add(job)
    for job in (first, second, third):
        job.created -= 2 * limits.KEPT_SECONDS
        job.results = [None]
        job.finish(SUCCEEDED)
    kept.add(Job(waiting.order))
    assert [kept.get(job.id) for job in (first, second, third, waiting)] == [None, second, third, waiting]
    second.finished_at -= 2 * limits.KEPT_SECONDS
    kept.add(Job(waiting.order))
    assert [kept.get(job.id) for job in (second, third, waiting)] == [None, third, waiting]


def test_a_comparison_is_a_twin_of_the_same_seed_without_the_cache():
    cached, twin = drawings(fbcache={"compare": True})
    assert replace(twin, tag=cached.tag) == cached
    assert CacheConfig.from_tag(twin.tag) == CacheConfig.from_tag(cached.tag).switched_off()


def test_negative_prompts_are_drawn_where_they_are_compiled():
    settings = replace(SETTINGS, negative_prompts=True)
    (only,) = drawings(settings, negative_prompt="blue", true_cfg_scale=2.0)
    assert only.negative_prompt == "blue" and only.scales["true_cfg_scale"] == 2.0
    assert refusal(settings, negative_prompt="blue")[1] == "true_cfg_scale"
    assert refusal(settings, true_cfg_scale=2.0)[1] == "true_cfg_scale"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([*PRESETS, "64x64"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)
NAMES = st.sampled_from([*ImageFields.model_fields, *FBCacheFields.model_fields, "any"])
OWN = st.fixed_dictionaries({}, optional=dict.fromkeys(FBCacheFields.model_fields, st.booleans() | VALUES))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4), OWN, st.booleans())
def test_whatever_is_asked_for_is_drawn_or_refused(found, own, with_own):
    body = {"prompt": "x", **found, **({"fbcache": own} if with_own else {})}
    try:
        fields = checked(parse(json.dumps(body).encode()))
        order = ordered(fields, SETTINGS, fields.stream)
    except ApiError as error:
        assert error.status in (400, 404) and error.body()["error"]["message"]
    else:
        assert len(order.drawings) == fields.n * (2 if fields.fbcache.compare else 1)


def test_what_openai_writes_is_what_is_parsed():
    assert parse(json.dumps({"prompt": "é猫🙂"}).encode()) == {"prompt": "é猫🙂"}
