"""Where Flux runs and how it is compiled there, and the folder of compiled graphs."""

import errno
import json
import os
import subprocess
import sys
from itertools import repeat
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindone.diffusers import FluxTransformer2DModel
from mindone.diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformerBlock
from narrow import WEIGHTS, make_narrow
from safetensors.numpy import load_file, save_file

import mindspore as ms
from mindspore import mint, mutable, nn
from mindspore.train.mind_ir_pb2 import ModelProto

import FBCache_ms
from FBCache_ms import CacheConfig, CacheContext, Device, FluxDenoiseLoop, choose_device
from FBCache_ms.eval import run_flux_withFBCache_pipeline as fbcache_flux
from FBCache_ms.eval import sweep
from FBCache_ms.eval.shared.arguments import device_of
from FBCache_ms.models.gathered import GatheredJoint, Ranks
from FBCache_ms.runtime import compile_cache
from FBCache_ms.runtime.compile_cache import CompileCache, files_checksum, graph_key, sources_checksum, users_folder
from FBCache_ms.runtime.cpu import kernels as cpu_kernels
from FBCache_ms.runtime.device import api, default_dtype, default_jit_level


def test_a_device_and_a_dtype_of_their_own_are_found_where_nothing_is_said():
    assert choose_device() == Device("CPU", "float32")
    assert (default_dtype("Ascend"), default_jit_level("Ascend")) == ("bfloat16", "O1")


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"name": "GPU"}, "--device must be one of auto, Ascend, CPU, not 'GPU'"),
        ({"name": "Ascend"}, "--device Ascend: there is no Ascend NPU here"),
        ({"dtype": "float16"}, "--dtype float16 is not supported on CPU"),
        ({"dtype": "int8"}, "--dtype must be one of auto, bfloat16"),
        ({"jit_level": "O3"}, "--jit_level must be one of auto, O0, O1, not 'O3'"),
        ({"lazy_inline": True}, "--lazy_inline is not supported on CPU"),
    ],
)
def test_what_cannot_be_is_named(choice, message):
    with pytest.raises(ValueError, match=message):
        choose_device(**choice)


def test_a_compile_cache_of_mindspores_own_is_refused_beside_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    with pytest.raises(ValueError, match="MS_COMPILER_CACHE_ENABLE"):
        choose_device(compile_cache=tmp_path)


@pytest.mark.parametrize("before, told", [("OFF", [True]), ("ON", [])])
def test_deterministic_reaches_mindspore_once_a_process(monkeypatch, before, told):
    seen = []
    get_context = ms.get_context
    monkeypatch.setattr(ms, "get_context", lambda key: before if key == "deterministic" else get_context(key))
    monkeypatch.setattr(ms, "set_deterministic", seen.append)
    choose_device()
    assert seen == []
    assert choose_device(deterministic=True).deterministic and seen == told


def small_transformer(width=4, blocks=(1, 2)):
    """mindone's, of so many double and single blocks."""
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=width,
        num_attention_heads=1,
        joint_attention_dim=4,
        pooled_projection_dim=4,
        guidance_embeds=False,
        axes_dims_rope=(0, width // 2, width // 2),
    )


def key_of(
    tag="F1B0_W0_R0.12",
    transformer=None,
    width=4,
    blocks=(1, 2),
    tokens=3,
    dtype=ms.float32,
    branches=1,
    **compilation,
):
    """The graph_key of a loop."""
    config = CacheConfig.from_tag(tag)
    transformer = transformer or small_transformer(width, blocks)
    cache = CacheContext(1, tokens, 4, branches=branches, mindspore_dtype=dtype, config=config, text_len=2, steps=8)
    loop = FluxDenoiseLoop(transformer, cache)
    inputs = (ms.Tensor(np.zeros((1, tokens, 4)), dtype), None)
    options = {"device": "CPU", "jit_level": None, "lazy_inline": False, "deterministic": False, **compilation}
    return graph_key(loop, inputs, transformer, structure=config.structure, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"width": 8},
        {"blocks": (2, 1)},
        {"blocks": (1, 3)},
        {"tokens": 5},
        {"branches": 2},
        {"dtype": ms.bfloat16},
        {"device": "Ascend"},
        {"jit_level": "O1"},
        {"lazy_inline": True},
        {"deterministic": True},
        {"tag": "F1B0_W0_T1O1_R0.12"},
        {"tag": "F2B0_W0_R0.12"},
        {"tag": "F1B1_W0_R0.12"},
        {"tag": "F1B0_W0_R0.12,span=stacks"},
        {"tag": "F1B0_W0_R0.12,gate=fbcache_or_teacache"},
    ],
    ids=str,
)
def test_whatever_shapes_a_graph_gives_it_a_folder_of_its_own(change, tmp_path):
    cache = CompileCache(tmp_path)
    assert cache.path(key_of(), 0) != cache.path(key_of(**change), 0)
    assert cache.path(key_of(**change), 0) == cache.path(key_of(**change), 0) != cache.path(key_of(**change), 1)


@pytest.mark.parametrize("name, value", [("__version__", "2.8.0"), ("get_context", lambda name: "other")])
def test_another_version_or_syntax_level_is_another_graph(monkeypatch, name, value):
    before = key_of()
    monkeypatch.setattr(ms, name, value)
    assert key_of() != before


@pytest.mark.parametrize(
    "place, name, value",
    [
        ("transformer_blocks.0.norm2", "eps", 1e-3),
        ("transformer_blocks.0.attn", "inner_kv_dim", 3),
        ("single_transformer_blocks.1.act_mlp", "approximate", "none"),
        ("single_transformer_blocks.1.act_mlp", "table", ms.Tensor([1.0])),
        ("single_transformer_blocks.1", "act_mlp", mint.nn.ReLU()),
    ],
)
def test_a_changed_attribute_is_another_graph(place, name, value):
    changed = small_transformer()
    setattr(dict(changed.cells_and_names())[place], name, value)
    assert key_of(transformer=changed) != key_of()


class Own(FluxTransformerBlock):
    def construct(self, *args, **kwargs):
        return super().construct(*args, **kwargs)


class OwnProcessor(FluxAttnProcessor):
    pass


def hook(*_):
    return None


OWN = {
    "a construct of an object's own": lambda block: setattr(block, "construct", lambda *_, **__: None),
    "a bound construct": lambda block: setattr(block.ff, "construct", MethodType(hook, block.ff)),
    "a hook": lambda block: block.register_forward_hook(hook),
    "a hook before": lambda block: block.ff.register_forward_pre_hook(hook),
    "a class": lambda block: setattr(block, "__class__", Own),
    "a processor": lambda block: setattr(block.attn, "processor", OwnProcessor()),
    "a function": lambda block: setattr(block.attn, "helper", hook),
}


@pytest.mark.parametrize("own", OWN)
def test_what_is_not_mindones_own_is_compiled_without_the_folder(own):
    transformer = small_transformer()
    OWN[own](transformer.transformer_blocks[0])
    with pytest.raises(TypeError, match="not mindone's"):
        key_of(transformer=transformer)


@pytest.mark.parametrize("kind", [FluxTransformerBlock, FluxAttnProcessor, mint.nn.Linear])
def test_a_method_put_into_mindones_class_is_compiled_without_the_folder(kind, monkeypatch):
    name = "construct" if hasattr(kind, "construct") else "__call__"
    monkeypatch.setattr(kind, name, lambda *_, **__: None)
    with pytest.raises(TypeError, match="not mindone's"):
        key_of()


def test_a_model_without_a_key_is_compiled(monkeypatch, tmp_path):
    class Compiled(nn.Cell):
        compiled = 0

        def compile(self, *inputs):
            self.compiled += 1

    monkeypatch.setattr(api, "entry_script_path", __file__)
    model, device = Compiled(), Device("CPU", "float32", compile_cache=tmp_path)
    assert not device.compile(model, (), model)
    assert model.compiled == 1 and list(tmp_path.iterdir()) == []


NUMBERS = {"residual_diff_threshold": 0.3, "warmup_steps": 3, "max_cached_steps": 5, "start": 0.2}


@settings(max_examples=10, deadline=None)
@given(st.dictionaries(st.sampled_from(list(NUMBERS)), st.none()))
def test_numbers_share_the_graph_whose_inputs_they_are(names):
    config = CacheConfig().changed(**{name: NUMBERS[name] for name in names})
    assert key_of(str(config)) == key_of()


DRAW = """
import json, sys
import numpy as np
from FBCache_ms import CacheConfig, FluxPipeline, choose_device

ckpt, folder, out, *tags = sys.argv[1:]
pipe = FluxPipeline.from_pretrained(ckpt, device=choose_device(compile_cache=folder))
pipe.set_progress_bar_config(disable=True)
pictures, reused = [], []
for tag in tags:
    config = CacheConfig.from_tag(tag)
    picture = pipe("a red circle", num_inference_steps=6, generator=np.random.default_rng(0), output_type="np",
                   cache_config=config)[0]
    pictures.append(picture)
    reused.append([pipe.graphs_from_cache, pipe.cache_stats.cached_steps])
np.save(out, pictures)
print(json.dumps(reused))
"""


def test_a_prompt_is_in_no_key():
    """The loop's inputs are a dictionary of tensors."""

    def key(value, text_len=2):
        transformer = small_transformer()
        cache = CacheContext(1, 3, 4, config=CacheConfig(), text_len=text_len, steps=8)
        inputs = {"encoder_hidden_states": np.full((1, text_len, 4), value), "guidance": np.full(1, value)}
        inputs = mutable({name: ms.Tensor(each, ms.float32) for name, each in inputs.items()})
        return graph_key(FluxDenoiseLoop(transformer, cache), (None, inputs), transformer)

    assert key(1.0) == key(2.0)
    assert key(1.0) != key(1.0, text_len=3)


def test_another_group_of_devices_is_another_graph():
    def key(group):
        transformer = small_transformer()
        block = transformer.transformer_blocks[0]
        block.attn.processor = GatheredJoint(Ranks(1, 0, group), block.attn.processor)
        return key_of(transformer=transformer)

    assert key("fbcache_0_1_2_3") != key("fbcache_4_5_6_7")


def draw(ckpt, folder, out, *tags):
    """The pictures that another process draws, one a tag, and what it says of each."""
    script = out.with_suffix(".py")
    script.write_text(DRAW)
    command = [sys.executable, str(script), str(ckpt), str(folder), str(out), *tags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out), json.loads(done.stdout.splitlines()[-1])


def halve(file, name):
    """Half of a tensor, in the weights' file."""
    tensors = load_file(file)
    tensors[name] = tensors[name] * 0.5
    file.chmod(0o644)
    save_file(tensors, file, metadata={"format": "np"})


@pytest.mark.slow
def test_a_second_process_starts_from_the_folder_with_its_own_numbers_and_weights(tmp_path):
    ckpt, folder, out = make_narrow(tmp_path / "narrow"), tmp_path / "graphs", tmp_path / "pictures.npy"
    plain, order = "F1B0_W0_R0.9", "F1B0_W0_T1O1_R0.9"
    first, said = draw(ckpt, folder, out, plain, order)
    assert [number for number, _ in said] == [0, 0]
    kept = sorted(path.name for path in folder.iterdir())
    kinds = [(name.split("-")[0], int(name.split("-")[-1])) for name in kept]
    assert sorted(kinds, key=lambda kind: kind[1]) == [
        ("CLIPTextModel", 0),
        ("T5EncoderModel", 1),
        ("DenoiseLoop", 2),
        ("Decoder", 3),
        ("DenoiseLoop", 4),
    ]

    again, said_again = draw(ckpt, folder, out, plain, order)
    assert [number for number, _ in said_again] == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == kept
    np.testing.assert_array_equal(again, first)

    # The other order, an uncached threshold, and other weights: nothing of the first runs may show.
    halve(ckpt / WEIGHTS, "proj_out.weight")
    halve(ckpt / "text_encoder" / "model.safetensors", "text_model.final_layer_norm.weight")
    halve(ckpt / "text_encoder_2" / "model.safetensors", "encoder.final_layer_norm.weight")
    halve(ckpt / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.weight")
    never = "F1B0_W0_R0"
    changed, said_changed = draw(ckpt, folder, out, order, never)
    fresh, _ = draw(ckpt, tmp_path / "others", out, order, never)
    np.testing.assert_array_equal(changed, fresh)
    assert np.abs(changed[0] - first[1]).max() > 0.01
    assert said_changed[1][1] == [] and said[0][1] != []


def test_other_sources_are_another_graph(tmp_path):
    file = tmp_path / "layer.py"
    file.write_text("SCALE = 1")
    before = files_checksum([file])
    file.write_text("SCALE = 2")
    assert files_checksum([file]) != before
    assert json.loads(key_of())["FBCache_ms"] == sources_checksum()
    package = Path(FBCache_ms.__file__).parent
    names_only = "__init__.py", "__main__.py", "utils.py", "memory.py", "pipeline_flux.py"
    assert sources_checksum() == files_checksum(
        file
        for pattern in ("*.py", "*.cc")
        for file in package.rglob(pattern)
        if file.relative_to(package).parts[0] not in ("eval", "comfyui", "predict", "serve", *names_only)
    )


def test_a_folder_keeps_the_graphs_used_last(tmp_path, monkeypatch):
    class Compiled:
        def compile(self):
            pass

    monkeypatch.setattr(compile_cache, "KEPT_ON_DISK", 2)
    monkeypatch.setattr(compile_cache, "_NUMBERS", repeat(0))
    for name in "abac":
        CompileCache(tmp_path).compile(Compiled(), (), json.dumps({"cell": name}))
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["a", "c"]


class Interrupted:
    """A cell whose compilation is disturbed."""

    def __init__(self, disturb):
        self.disturb = disturb

    def compile(self):
        self.disturb()


def test_two_processes_that_compile_one_graph_both_have_it(tmp_path):
    cache, key = CompileCache(tmp_path), json.dumps({"cell": "a"})

    def other_process():
        (kept,) = tmp_path.iterdir()
        kept = kept.with_suffix("")
        kept.mkdir()
        (kept / "graph.json").write_text("theirs")

    assert not cache.compile(Interrupted(other_process), (), key)
    (kept,) = tmp_path.iterdir()
    assert (kept / "graph.json").read_text() == "theirs"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Graph:
    """A cell whose compilation writes what MindSpore does, or a part of it, unless it finds it."""

    whole = ModelProto(ir_version="1", mind_ir_version=3).SerializeToString()

    def __init__(self, content=whole):
        self.content, self.compilations = content, 0

    def compile(self):
        file = Path(os.environ["MS_COMPILER_CACHE_PATH"]) / "rank_0" / "graph_cache" / "compile_cache_0.mindir"
        if not file.is_file() or file.read_bytes() != self.whole:
            self.compilations += 1
            write(file, self.content)


@pytest.fixture
def one_graph(tmp_path, monkeypatch):
    """compile(cell), as if each time in another process, and the graph's folder."""
    monkeypatch.setattr(compile_cache, "_NUMBERS", repeat(0))
    cache, key = CompileCache(tmp_path / "graphs"), json.dumps({"cell": "a"})
    return lambda cell: cache.compile(cell, (), key), cache.path(key, 0)


def test_a_whole_graph_is_found_again(one_graph):
    compile, kept = one_graph
    assert [compile(Graph()) for _ in range(3)] == [False, True, True]
    assert json.loads((kept / "graph.json").read_text())["cell"] == "a"


@pytest.mark.parametrize("end", [0, 1, len(Graph.whole) - 2, len(Graph.whole) - 1])
def test_a_graph_that_a_full_disk_cut_short_is_not_kept(one_graph, end, monkeypatch):
    said = []
    monkeypatch.setattr(compile_cache, "_warn", said.append)
    compile, kept = one_graph
    compile(Graph(Graph.whole[:end]))
    assert not kept.exists() and list(kept.parent.iterdir()) == []
    assert len(said) == 1 and str(kept.parent) in said[0] and "not kept" in said[0]
    assert [compile(Graph()) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("file", ["graph.json", "rank_0/graph_cache/compile_cache_0.mindir"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"\0"])
def test_a_graph_that_was_damaged_later_is_compiled_anew(one_graph, file, damage):
    compile, kept = one_graph
    compile(Graph())
    (kept / file).write_bytes(damage((kept / file).read_bytes()))
    cell = Graph()
    assert not compile(cell) and cell.compilations == 1
    assert compile(Graph())


def test_a_kept_graph_that_mindspore_cannot_use_and_writes_half_is_dropped(one_graph):
    compile, kept = one_graph
    compile(Graph())

    class Refusing(Graph):
        whole = b"another"

    assert not compile(Refusing(b"half"))
    assert not kept.exists()


def test_where_nothing_can_be_written_graphs_are_compiled_with_a_warning(one_graph, monkeypatch):
    said = []
    monkeypatch.setattr(compile_cache, "_warn", said.append)
    compile, kept = one_graph
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Permission denied")):
        monkeypatch.setattr(compile_cache.tempfile, "mkdtemp", raising(error))
        calls = []
        assert not compile(Interrupted(lambda: calls.append(None)))
        assert len(calls) == 1 and said.pop() == f"compiled graphs are not kept in {kept.parent}: {error.strerror}"


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize("name", ["a:b", "with space", "Jürgen", "100%", "$HOME", "new\nline", "x" * 200])
def test_any_folder_can_keep_graphs(name, tmp_path, monkeypatch):
    shown = []

    class Told(Graph):
        def compile(self):
            shown.append(os.environ["MS_COMPILER_CACHE_PATH"])
            super().compile()

    cache = CompileCache(tmp_path / name)
    monkeypatch.setattr(compile_cache, "_NUMBERS", repeat(0))
    assert [cache.compile(Told(), (), json.dumps({"cell": "a"})) for _ in range(2)] == [False, True]
    assert not any(name in path for path in shown)


def test_a_users_folder_with_a_colon_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a:b"))
    assert users_folder() == tmp_path / "home" / ".cache" / "FBCache_ms"
    monkeypatch.setenv("HOME", str(tmp_path / "c:d"))
    assert users_folder() == tmp_path / "a:b" / "FBCache_ms"


def test_kernels_are_in_no_folder_with_a_colon(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(cpu_kernels.logger, "warning", said.append)
    assert cpu_kernels.compiled("g++", tmp_path / "a:b") is None
    assert len(said) == 1 and "colon" in said[0] and str(tmp_path / "a:b") in said[0]


def test_what_a_killed_process_left_is_no_other_ones_graph(tmp_path, monkeypatch):
    cache, key = CompileCache(tmp_path), json.dumps({"cell": "a"})
    monkeypatch.setattr(compile_cache, "_NUMBERS", repeat(0))
    left = tmp_path / f"{cache.path(key, 0).name}.{os.getpid()}"
    left.mkdir()
    (left / "half.mindir").write_text("half")
    cache.compile(Interrupted(lambda: None), (), key)
    assert not (cache.path(key, 0) / "half.mindir").exists() and left.exists()
    os.utime(left, (0, 0))
    cache.compile(Interrupted(lambda: None), (), json.dumps({"cell": "b"}))
    assert not left.exists() and cache.path(key, 0).exists()


def chosen(program, *options):
    """The Device that a program's options give."""
    return device_of(program.parse_arguments(options))


def test_fbcache_flux_keeps_a_cpus_graphs_in_the_users_folder(monkeypatch, tmp_path):
    options = "--save_path", str(tmp_path / "results")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert chosen(fbcache_flux, *options).compile_cache == tmp_path / "cache" / "FBCache_ms"
    assert chosen(fbcache_flux, *options, "--compile_cache", str(tmp_path / "own")).compile_cache == tmp_path / "own"
    assert chosen(fbcache_flux, *options, "--no-compile_cache").compile_cache is None
    assert chosen(sweep, *options).compile_cache is None


def test_without_a_folder_of_the_users_fbcache_flux_keeps_no_graphs(monkeypatch, tmp_path):
    options = "--save_path", str(tmp_path / "results")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chosen(fbcache_flux, *options).compile_cache is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    assert chosen(fbcache_flux, *options).compile_cache is None
    with pytest.raises(OSError, match="--compile_cache"):
        chosen(fbcache_flux, *options, "--compile_cache", str(tmp_path / "file"))
