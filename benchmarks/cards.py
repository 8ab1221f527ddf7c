"""What fits on which card: bytes of FLUX.1-dev's weights and caches, counted, and of what a step and a decoder work in.

    .venv/bin/python benchmarks/cards.py

Weights are counted on mindone's own models, made without memory. Nothing runs, and nothing is measured.
"""

import sys

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.models.flux_costs import PUBLISHED
from FBCache_ms.predict.memory import cache_bytes

CARDS = {"910B, 64 GB": 64e9, "32 GB": 32e9}
SIDES, BATCHES, TEXT = (1024, 2048), (1, 4), 512
CACHE = CacheConfig(0.08, 1)
WAYS = {
    "bfloat16": ((), True),
    "bfloat16, text encoders released": ((), False),
    "int8 transformer": (("transformer",), True),
    "int8 transformer and T5": (("transformer", "text_encoder_2"), True),
    "int8 transformer, text encoders released": (("transformer",), False),
}
"""Which components are int8, and whether the text encoders stay."""

STREAMS = 20
"""Streams (B, T + S, D) that a single block works in: its input, normed, queries, keys and values, what attention
gives, four of the MLP before and behind its activation, both side by side, the projection and its sum."""

PICTURES = 640
"""Channels of the picture's size that the decoder's last stage works in: 256 that come in, and three of 128."""

TILE = 1024
"""A tile's side with enable_vae_tiling(): FLUX.1-dev's autoencoder's sample_size."""

TRANSFORMER, CLIP, T5, VAE = "transformer", "text_encoder", "text_encoder_2", "vae"


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "cards", description=__doc__)
    add_save_path(parser.add_argument, "./results/cards", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def components():
    """FLUX.1-dev's models as published, {name: cell}; their weights have no memory."""
    from mindone.diffusers import AutoencoderKL, FluxTransformer2DModel
    from mindone.transformers import CLIPTextModel, T5EncoderModel
    from transformers import CLIPTextConfig, T5Config

    from mindspore.nn.utils import no_init_parameters

    from FBCache_ms.runtime.device import prepare_device

    prepare_device()
    kept = {name: value for name, value in vars(PUBLISHED).items() if name != "_class_name"}
    wide = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    stage = {"down_block_types": 4 * ("DownEncoderBlock2D",), "up_block_types": 4 * ("UpDecoderBlock2D",)}
    quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    with no_init_parameters():
        return {
            TRANSFORMER: FluxTransformer2DModel(**kept),
            CLIP: CLIPTextModel(CLIPTextConfig(vocab_size=49408, **clip)),
            T5: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **wide)),
            VAE: AutoencoderKL(**stage, **quant, **sizes),
        }


def weight_bytes(models):
    """{(component, whether it is int8): bytes}, what is not int8 in bfloat16."""
    from FBCache_ms.runtime.quantize import QuantizeConfig, linear_layers

    found = {}
    for name, model in models.items():
        total = sum(parameter.size for parameter in model.get_parameters())
        shapes = {each: parameter.shape for each, parameter in model.parameters_and_names()}
        rounded = [shapes[f"{layer}.weight"] for layer in linear_layers(model, QuantizeConfig())]
        found[name, False] = 2 * total
        # A byte less for each weight, and a scale in bfloat16 for each row.
        found[name, True] = 2 * total + sum(2 * rows - rows * columns for rows, columns in rounded)
    return found


def working_bytes(side, batch, tiled):
    """What a computed step, and what the decoder works in, the greater of the two."""
    tokens = (side // 16) ** 2
    width = PUBLISHED.num_attention_heads * PUBLISHED.attention_head_dim
    step = STREAMS * batch * (tokens + TEXT) * width * 2
    pixels = TILE**2 if tiled else batch * side**2
    return max(step, PICTURES * pixels * 2)


def rows_of(weights):
    """A row for each way to keep the weights and each size and batch."""
    width = PUBLISHED.num_attention_heads * PUBLISHED.attention_head_dim
    for way, (rounded, stay) in WAYS.items():
        left = (TRANSFORMER, VAE, *((CLIP, T5) if stay else ()))
        held = sum(weights[name, name in rounded] for name in left)
        for side in SIDES:
            for batch in BATCHES:
                cache = cache_bytes(CACHE, batch, (side // 16) ** 2, width, TEXT)
                whole, tiled = (held + cache + working_bytes(side, batch, each) for each in (False, True))
                yield {
                    "way": way,
                    "side": side,
                    "batch": batch,
                    "weights": held,
                    "cache": cache,
                    "whole": whole,
                    "tiled": tiled,
                }


def fits(row, room):
    """Whether a row fits, in words."""
    return "yes" if row["whole"] <= room else "with tiles" if row["tiled"] <= room else "no"


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        weights = weight_bytes(components())
        rows = list(rows_of(weights))
        table = [
            {
                "Weights": row["way"],
                "Picture": f"{row['side']} x {row['side']}",
                "Batch": row["batch"],
                "Weights (GB)": f"{row['weights'] / 1e9:.1f}",
                "Cache (GB)": f"{row['cache'] / 1e9:.2f}",
                "All (GB)": f"{row['whole'] / 1e9:.1f}",
                "All, decoded in tiles (GB)": f"{row['tiled'] / 1e9:.1f}",
                **{card: fits(row, room) for card, room in CARDS.items()},
            }
            for row in rows
        ]
        parts = [
            {
                "Component": name,
                "bfloat16 (GB)": f"{weights[name, False] / 1e9:.2f}",
                "int8 (GB)": f"{weights[name, True] / 1e9:.2f}" if name != VAE else "-",
            }
            for name in (TRANSFORMER, CLIP, T5, VAE)
        ]
        publish(args.save_path, "cards", f"{markdown(parts)}\n{markdown(table)}", table, rows, args.into)

    return exit_status("cards", work)


if __name__ == "__main__":
    sys.exit(main())
