"""Counts the bytes that caches take on FLUX.1-dev, or on another model; allocates none of them."""

import sys
from pathlib import Path

from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.models import costs_of
from FBCache_ms.predict.memory import cache_bytes
from FBCache_ms.runtime.checkpoint import block_counts, image_unit, transformer_config

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
WIDTH, BLOCKS, PIXELS, CHANNELS = 3072, (19, 38), 16, 64
"""FLUX.1-dev's: of the transformer, how many of either kind it has, of a token's side, and of the latents."""

ROWS = (
    *((f"First-Block Cache, order {order}", f"F1B0_W0_T{min(order, 1)}O{order}_R0.12", 1) for order in range(4)),
    ("First-Block Cache, order 1, differences in float32", "F1B0_W0_T1O1_R0.12,derivatives_dtype=float32", 1),
    ("First-Block Cache, true CFG", "F1B0_W0_R0.12", 2),
    ("First-Block Cache, order 1, true CFG", "F1B0_W0_T1O1_R0.12", 2),
    ("DBCache, last blocks run", "F8B8_W0_R0.12", 1),
    ("DBCache, last blocks run, order 1", "F8B8_W0_T1O1_R0.12", 1),
    ("double gate", "double_gate", 1),
    ("double gate, order 1", "F1B0_W0_T1O1_R0.09,span=stacks,residual_diff_threshold_single=0.12", 1),
    ("TeaCache", "teacache", 1),
    ("First-Block Cache and TeaCache", "F1B0_W0_R0.12,gate=fbcache_and_teacache", 1),
    ("CG-Taylor", "cg_taylor", 1),
    ("DiCache", "dicache", 1),
    ("TaylorSeer, no gate", "taylorseer", 1),
    ("FORA, no gate", "fora", 1),
)
"""(name, tag or preset, guidance branches) of the table's rows."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "memory", description=__doc__)
    parser.add_argument("--cache", nargs="+", default=[], metavar="TAG|PRESET", help="rows beside the table's own")
    add = parser.add_argument_group("shapes").add_argument
    add("--sides", nargs="+", type=int, default=[1024, 2048], metavar="PIXELS", help="of a square")
    add("--batch_sizes", nargs="+", type=int, default=[1, 4], metavar="N", help="pictures a call")
    add("--text_len", type=int, default=512, metavar="N", help="text tokens")
    add("--ckpt", type=Path, metavar="FOLDER", help="a checkpoint of another model (default: FLUX.1-dev's shapes)")
    add("--inner_dim", type=int, metavar="N", help=f"the transformer's width (default: the model's, {WIDTH})")
    add("--dtype", choices=tuple(ITEMSIZES), default="bfloat16", help="the model's")
    add = parser.add_argument_group("output").add_argument
    add_save_path(add, "./results/memory", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        for name in ("sides", "batch_sizes"):
            for value in getattr(args, name):
                check_range(name, value, 1)
        width, blocks, args.pixels, args.channels = WIDTH, BLOCKS, PIXELS, CHANNELS
        if args.ckpt is not None:
            config, blocks, args.pixels = transformer_config(args.ckpt), block_counts(args.ckpt), image_unit(args.ckpt)
            width, args.channels = costs_of(config).width(config), costs_of(config).channels(config)
        args.stacks = blocks
        args.inner_dim = width if args.inner_dim is None else args.inner_dim
        for name in ("text_len", "inner_dim"):
            check_range(name, getattr(args, name), 1)
        if any(side % args.pixels for side in args.sides):
            raise ValueError(f"--sides must be multiples of {args.pixels}, not {' '.join(map(str, args.sides))}")
        own = [("--cache", tag, 1) for tag in args.cache]
        for _, tag, _ in own:
            CacheConfig.named(tag).check_blocks(*blocks)
        args.rows = [row for row in ROWS if fits(CacheConfig.named(row[1]), blocks)] + own
        args.configs = [CacheConfig.named(tag) for _, tag, _ in args.rows]
        check_into(args.into)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def fits(config, blocks):
    """Whether a transformer with so many blocks of either kind can have a cache."""
    try:
        config.check_blocks(*blocks)
    except ValueError:
        return False
    return True


def count(args):
    """A list of {column: value}, a row each: name, tag, and the bytes at each side and batch size."""
    rows = []
    for (name, tag, branches), config in zip(args.rows, args.configs):
        row = {"Cache": name, "`--cache`": f"`{tag}`"}
        for side in args.sides:
            for batch in args.batch_sizes:
                shape = batch, (side // args.pixels) ** 2, args.inner_dim, args.text_len, branches
                row[f"{side} x {side}, batch {batch}"] = cache_bytes(
                    config, *shape, ITEMSIZES[args.dtype], args.channels, args.stacks
                )
        rows.append(row)
    return rows


def table_of(rows):
    """The rows as a Markdown table, in megabytes."""

    def cell(column, value):
        return (column, value) if isinstance(value, str) else (f"{column} (MB)", f"{value / 1e6:.1f}")

    return markdown([dict(cell(*item) for item in row.items()) for row in rows])


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        rows = count(args)
        text = table_of(rows)
        shapes = {name: getattr(args, name) for name in ("sides", "batch_sizes", "text_len", "inner_dim", "dtype")}
        publish(args.save_path, "memory", text, rows, {**shapes, "bytes": rows}, args.into)

    return exit_status("memory", work)


if __name__ == "__main__":
    sys.exit(main())
