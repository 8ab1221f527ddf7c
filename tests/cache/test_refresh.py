"""A refresh is what the authors of ToCa and DuCa describe: here once more, the blocks in NumPy and in float64."""

from types import SimpleNamespace

import mindone.diffusers
import numpy as np
import pytest
from mindone.diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from narrow import make_narrow, run_step
from small_models import flux2_transformer, qwen_transformer

import mindspore as ms
from mindspore import mint

from FBCache_ms import CacheConfig, CacheContext, FluxPipeline, apply_cache_on_pipe, remove_cache_from_pipe
from FBCache_ms.models.gathered import GatheredJoint, Ranks
from FBCache_ms.pipelines.cached_transformer import CachedStep, check_structure
from FBCache_ms.rules.refresh import orders, streams
from FBCache_ms.runtime.device import graph_mode

STEPS, DOUBLES, SINGLES = 12, 2, 2


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class Authors:
    """In a transformer's place, with plain lists for caches."""

    def __init__(self, transformer, schedule, interval, branches):
        self.transformer, self.schedule, self.interval = transformer, schedule, interval
        self.weights = {each.name: each.asnumpy().astype(float) for each in transformer.get_parameters()}
        self.calls, self.states = 0, [{"refreshes": 0, "kinds": ""} for _ in range(branches)]

    def __getattr__(self, name):
        return getattr(self.transformer, name)

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def modulation(self, name, temb, number):
        return np.split(self.linear(f"{name}.linear", temb / (1 + np.exp(-temb)))[:, None], number, -1)

    def heads(self, name, norm, x):
        x = x.reshape(*x.shape[:2], self.transformer.config.num_attention_heads, -1)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.weights[f"{name}.{norm}.weight"]

    def turned(self, x):
        cos, sin = (part[:, None] for part in self.rotary)
        crossed = np.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
        return x * cos + crossed * sin

    def attention(self, q, k, v):
        q, k, v = (each.transpose(0, 2, 1, 3) for each in (self.turned(q), self.turned(k), v))
        scores = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]))
        found = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
        return found.reshape(*found.shape[:2], -1)

    def qkv(self, name, x, layers, norms):
        q, k, v = (self.linear(f"{name}.{layer}", x) for layer in layers)
        return (
            self.heads(name, norms[0], q),
            self.heads(name, norms[1], k),
            v.reshape(self.heads(name, norms[0], q).shape),
        )

    def kind(self, step):
        """F, T or A."""
        if step < 3 or (step - 2) % self.interval == 0:
            return "F"
        behind = step - 2 if step < 2 + self.interval else (step - 2) % self.interval
        return "T" if self.schedule == "toca" or behind % 2 == 0 else "A"

    def tokens(self, layer, stream, weight, tokens):
        """Those that this refresh chooses."""
        k = max(int(np.floor(0.1 * (1.5 - layer / 27) * weight * tokens)), 1)
        order = self.order[stream]
        assert sorted(order) == list(range(tokens))
        return np.roll(order, -(self.state["refreshes"] - 1) * k)[:k]

    def double(self, layer, image, text, temb):
        name, kept, text_len = f"transformer_blocks.{layer}", self.state.setdefault(layer, {}), text.shape[1]
        image_vectors, text_vectors = (
            self.modulation(f"{name}.{norm}", temb, 6) for norm in ("norm1", "norm1_context")
        )
        if self.state["kinds"][-1] == "F":
            parts = [
                (text, text_vectors, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
                (image, image_vectors, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
            ]
            both = [
                self.qkv(f"{name}.attn", normed(x) * (1 + scale) + shift, layers, norms)
                for x, (shift, scale, *_), layers, norms in parts
            ]
            attended = self.attention(*(np.concatenate(pair, 1) for pair in zip(*both)))
            kept["text"] = self.linear(f"{name}.attn.to_add_out", attended[:, :text_len])
            kept["image"] = self.linear(f"{name}.attn.to_out.0", attended[:, text_len:])
        found = []
        for place, (what, x, vectors) in enumerate((("text", text, text_vectors), ("image", image, image_vectors))):
            _, _, gate, shift, scale, mlp_gate = vectors
            x = x + gate * kept[what]
            if self.state["kinds"][-1] == "F":
                chosen = np.arange(x.shape[1])
                kept[f"{what}_mlp"] = np.zeros_like(x)
            else:
                chosen = self.tokens(layer, 2 * layer + place, 0.4, x.shape[1])
            mlp = f"{name}.ff_context.net" if what == "text" else f"{name}.ff.net"
            some = normed(x[:, chosen]) * (1 + scale) + shift
            kept[f"{what}_mlp"][:, chosen] = self.linear(f"{mlp}.2", gelu(self.linear(f"{mlp}.0.proj", some)))
            found.append(x + mlp_gate * kept[f"{what}_mlp"])
        return found[1], found[0]

    def single(self, layer, x, temb):
        name, kept = f"single_transformer_blocks.{layer}", self.state.setdefault(("single", layer), {})
        shift, scale, gate = self.modulation(f"{name}.norm", temb, 3)
        chosen = np.arange(x.shape[1])
        if self.state["kinds"][-1] == "F":
            ready = normed(x) * (1 + scale) + shift
            parts = self.qkv(f"{name}.attn", ready, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
            kept["attention"], kept["total"] = self.attention(*parts), np.zeros_like(x)
        else:
            chosen = self.tokens(layer, 2 * DOUBLES + layer, 1.6, x.shape[1])
        mlp = gelu(self.linear(f"{name}.proj_mlp", normed(x[:, chosen]) * (1 + scale) + shift))
        both = np.concatenate((kept["attention"][:, chosen], mlp), -1)
        kept["total"][:, chosen] = self.linear(f"{name}.proj_out", both)
        return x + gate * kept["total"]

    def __call__(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, **ignored
    ):
        transformer = self.transformer
        self.state = self.states[self.calls % len(self.states)]
        self.state["kinds"] += self.kind(self.calls // len(self.states))
        self.calls += 1
        temb = transformer.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        if self.state["kinds"][-1] != "A":
            self.state["refreshes"] += self.state["kinds"][-1] == "T"
            image = transformer.x_embedder(hidden_states).asnumpy().astype(float)
            text = transformer.context_embedder(encoder_hidden_states).asnumpy().astype(float)
            self.rotary = [part.asnumpy() for part in transformer.pos_embed(mint.cat((txt_ids, img_ids)))]
            sizes = [text.shape[1], image.shape[1]] * DOUBLES + [text.shape[1] + image.shape[1]] * SINGLES
            table = orders(streams(DOUBLES, SINGLES, text.shape[1], image.shape[1]))
            self.order = np.split(table, np.cumsum(sizes)[:-1])
            vector = temb.asnumpy().astype(float)
            for layer in range(DOUBLES):
                image, text = self.double(layer, image, text, vector)
            stream = np.concatenate((text, image), 1)
            for layer in range(SINGLES):
                stream = self.single(layer, stream, vector)
            self.state["last"] = stream[:, text.shape[1] :]
        last = ms.Tensor(self.state["last"], ms.float32)
        return (transformer.proj_out(transformer.norm_out(last, temb)),)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Our own pipeline, mindone's, and the embeddings of a prompt and of a negative one."""
    folder = make_narrow(tmp_path_factory.mktemp("refresh") / "narrow", DOUBLES, SINGLES)
    whole = FluxPipeline.from_pretrained(str(folder))
    stepwise = mindone.diffusers.FluxPipeline(**whole.components)
    prompts = [whole.encode_prompt(text, max_sequence_length=32)[:2] for text in ("a red circle", "a blue square")]
    for pipe in (whole, stepwise):
        pipe.set_progress_bar_config(disable=True)
    return whole, stepwise, prompts


def draw(pipe, prompts, guided, **arguments):
    (embeds, pooled), (negative, negative_pooled) = prompts
    if guided:
        arguments.update(negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled)
        arguments.update(true_cfg_scale=2.0)
    return pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=64,
        width=64,
        num_inference_steps=STEPS,
        generator=np.random.default_rng(1),
        output_type="latent",
        **arguments,
    )[0].asnumpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, interval, guided, kinds",
    [
        ("duca", 6, False, "FFFATATAFATA"),
        ("toca", 5, False, "FFFTTTTFTTTT"),
        ("duca", 4, True, "FFFATAFATAFA"),
    ],
)
def test_the_graph_is_its_authors(pipelines, schedule, interval, guided, kinds):
    whole, stepwise, prompts = pipelines
    transformer = stepwise.transformer
    authors = Authors(transformer, schedule, interval, 1 + guided)
    stepwise.__dict__["transformer"] = authors
    with graph_mode(False):
        expected = draw(stepwise, prompts, guided)
    stepwise.__dict__["transformer"] = transformer
    assert {state["kinds"] for state in authors.states} == {kinds}
    config = CacheConfig(gate="refresh", schedule=schedule, schedule_interval=interval)
    for pipe in (whole, stepwise):
        apply_cache_on_pipe(pipe, config)
        got = draw(pipe, prompts, guided)
        stats = pipe.cache_stats if pipe is whole else pipe.transformer.cache_stats
        for branch in (stats, stats.uncond) if guided else (stats,):
            assert branch.computed_steps == [step for step in range(STEPS) if kinds[step] == "F"]
            assert branch.gates[0].refreshed_steps == tuple(step for step in range(STEPS) if kinds[step] == "T")
        np.testing.assert_allclose(got, expected, atol=1e-5)
    remove_cache_from_pipe(stepwise)


def controlled_call(transformer, seed=0):
    """The arguments of a call with a ControlNet's residuals, but for the timestep."""
    rng, config = np.random.default_rng(seed), transformer.config

    def tensor(*shape):
        return ms.Tensor(rng.normal(size=shape), ms.float32)

    residuals = tuple(tensor(1, 16, transformer.inner_dim) for _ in range(2))
    return {
        "hidden_states": tensor(1, 16, config.in_channels),
        "encoder_hidden_states": tensor(1, 8, config.joint_attention_dim),
        "pooled_projections": tensor(1, config.pooled_projection_dim),
        "img_ids": tensor(16, 3),
        "txt_ids": tensor(8, 3),
        "guidance": tensor(1),
        "controlnet_block_samples": residuals,
        "controlnet_single_block_samples": residuals[:1],
    }


@pytest.mark.slow
def test_a_refresh_of_the_same_call_is_the_full_step_with_a_controlnet_too(pipelines):
    transformer = pipelines[1].transformer
    call, time = controlled_call(transformer), ms.Tensor([0.5], ms.float32)
    with graph_mode(False):
        expected = transformer(**call, timestep=time)[0].asnumpy()
    config = CacheConfig.preset("toca")
    contexts = [CacheContext(1, 16, transformer.inner_dim, config=config, text_len=8, stacks=(2, 2)) for _ in range(2)]
    first, other = (CachedStep(transformer, context) for context in contexts)
    with graph_mode(True):
        drawn = [run_step(first, timestep=time, **call) for _ in range(5)]
        # What goes on without what was kept computes, though its schedule says that it refreshes.
        contexts[1].go_on(contexts[0].trace())
        drawn += [run_step(other, timestep=time, **call) for _ in range(2)]
    for each in drawn:
        np.testing.assert_allclose(each, expected, atol=1e-5)
    (trace,) = contexts[1].stats().gates
    assert trace.computed_steps == [0, 1, 2, 5] and trace.refreshed_steps == (3, 4, 6)


@pytest.mark.parametrize("make", [lambda: qwen_transformer(2), lambda: flux2_transformer(1, 1)])
def test_another_family_is_refused_by_name(make):
    transformer = make()
    with pytest.raises(ValueError, match=f"gate 'refresh' .*{type(transformer).__name__} has no block that does"):
        apply_cache_on_pipe(SimpleNamespace(transformer=transformer), CacheConfig.preset("duca"))


def test_blocks_whose_parts_are_not_kept_are_refused_by_name(pipelines, monkeypatch):
    transformer, config = pipelines[1].transformer, CacheConfig.preset("toca")
    check_structure(config, transformer)
    for processor, reason in (
        (FluxIPAdapterAttnProcessor(8, 8), "what an IP adapter adds is not kept"),
        (GatheredJoint(Ranks(1, 0, None), None), "several devices share a picture's tokens"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(transformer), "attn_processors", {"": processor})
            with pytest.raises(ValueError, match=reason):
                check_structure(config, transformer)
    monkeypatch.setattr(transformer.transformer_blocks[1], "ff", mint.nn.Identity())
    with pytest.raises(ValueError, match="block FluxTransformerBlock is not mindone's as it is there"):
        check_structure(config, transformer)
