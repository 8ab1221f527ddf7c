"""Times a block's kernel on the CPU against the matrix products that it is made of.

    .venv/bin/python benchmarks/products.py

Blocks of Flux, randomly initialised, each the only operator of a graph. The products are those of its linear layers
with all tokens, and the two of its attention with every head, from weights and inputs that are there, a graph too. Both
are run in turn; every turn gives its own ratio. What a block takes beyond them are its norms, GELU, softmax, rotary
embedding and gates.

The cases: the embedded checkpoint's block; a block 512 wide; one 1,536 wide and one of FLUX.1's 3,072; and one with
FLUX.1's 4,096 image tokens, whose attention takes most of the time. Ends with status 1 if a block that is 1,536 wide
takes more than 1.2 of its products.
"""

import statistics
import sys
import time
from dataclasses import dataclass

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, check_range, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.machine import machine
from FBCache_ms.eval.shared.tables import markdown, publish, spread

MOST = 1.2
TEXT = 32
KINDS = {"double": "FluxTransformerBlock", "single": "FluxSingleTransformerBlock"}


@dataclass(frozen=True)
class Case:
    """A block's width, that of a head, and how many image tokens it is given."""

    width: int
    head: int
    tokens: int


CASES = {
    "embedded": Case(128, 32, 64),
    "512": Case(512, 64, 256),
    "1536": Case(1536, 128, 1024),
    "3072": Case(3072, 128, 1024),
    "long": Case(256, 128, 4096),
}
BOUND = "1536"
"""The case that must not take more than MOST."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "products", description=__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="NAME", help="which")
    add("--runs", type=int, default=15, metavar="N", help="turns")
    add_save_path(add, "./results/speed", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_range("runs", args.runs, 1)
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def operations(case):
    """Floating-point operations of a block's products: either kind has layers of 12 D^2 weights for each token."""
    tokens = case.tokens + TEXT
    return 2 * 12 * tokens * case.width**2 + 4 * tokens**2 * case.width


def graphs_of(kind, case):
    """A block and its products, each as a function without arguments that runs a graph."""
    import numpy as np
    from mindone.diffusers.models.transformers import transformer_flux

    import mindspore as ms
    from mindspore import nn, ops

    width, every = case.width, case.tokens + TEXT
    heads, rng = width // case.head, np.random.default_rng(0)

    def normal(*shape):
        return ms.Tensor(rng.standard_normal(shape, np.float32))

    class Block(nn.Cell):
        def __init__(self):
            super().__init__()
            self.block = getattr(transformer_flux, KINDS[kind])(width, heads, case.head)

        def construct(self, image, text, condition, cosine, sine):
            return self.block(image, text, condition, (cosine, sine))

    block = Block()
    layers = layers_of(kind, block.block)

    class Products(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers = ms.ParameterTuple([layer.weight for layer, _ in layers])

        def construct(self, query, key, scores, value, *inputs):
            multiply, outputs = ops.MatMul(transpose_b=True), ()
            for x, weight in zip(inputs, self.layers):
                outputs = outputs + (multiply(x, weight),)
            return outputs + (ops.BatchMatMul(transpose_b=True)(query, key), ops.BatchMatMul()(scores, value))

    lengths = {"image": case.tokens, "text": TEXT, "both": every}
    inputs = [normal(lengths[stream], layer.in_features) for layer, stream in layers]
    attention = [normal(heads, every, size) for size in (case.head, case.head, every, case.head)]
    streams = normal(1, case.tokens, width), normal(1, TEXT, width), normal(1, width)
    rotary = normal(every, case.head), normal(every, case.head)
    products = Products()
    return lambda: block(*streams, *rotary)[1].asnumpy(), lambda: products(*attention, *inputs)[-1].asnumpy()


def layers_of(kind, block):
    """A block's linear layers but for the modulation's, each with the name of the tokens that it is given."""
    attn = block.attn
    if kind == "single":
        return [(layer, "both") for layer in (attn.to_q, attn.to_k, attn.to_v, block.proj_mlp, block.proj_out)]
    image = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], block.ff.net[0].proj, block.ff.net[2]
    text = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_add_out
    text += block.ff_context.net[0].proj, block.ff_context.net[2]
    return [(layer, "image") for layer in image] + [(layer, "text") for layer in text]


def measure(graphs, runs):
    """The seconds of each graph in each run, all run in turn after a first time."""
    for graph in graphs:
        graph()
    seconds = [[] for _ in graphs]
    for _ in range(runs):
        for each, graph in zip(seconds, graphs):
            begin = time.perf_counter()
            graph()
            each.append(time.perf_counter() - begin)
    return seconds


def row_of(figures):
    """A row of the table."""
    case = CASES[figures["case"]]
    speed = operations(case) / statistics.median(figures["products"]) / 1e9
    return {
        "Block": figures["kind"],
        "Width": case.width,
        "Image Tokens": case.tokens,
        "Block (ms)": spread([1000 * seconds for seconds in figures["block"]], 2),
        "Its Products (ms)": spread([1000 * seconds for seconds in figures["products"]], 2),
        "Ratio": spread(figures["ratios"], 2),
        "Products (GFLOP/s)": f"{speed:.0f}",
    }


def main(argv=None):
    """The program; returns its exit status, 1 where a block takes too long."""
    args = parse_arguments(argv)
    over = []

    def work():
        from tqdm import tqdm

        import mindspore as ms

        from FBCache_ms.runtime.device import choose_device, prepare_device

        choose_device("CPU")
        prepare_device()
        ms.set_context(mode=ms.GRAPH_MODE)
        measured = []
        for name, kind in tqdm([(name, kind) for name in args.cases for kind in KINDS], desc="blocks"):
            block, products = measure(graphs_of(kind, CASES[name]), args.runs)
            ratios = [whole / part for whole, part in zip(block, products)]
            measured.append({"case": name, "kind": kind, "block": block, "products": products, "ratios": ratios})
        rows = list(map(row_of, measured))
        data = {"settings": {**machine(), "runs": args.runs, "text_tokens": TEXT}, "blocks": measured}
        publish(args.save_path, "products", markdown(rows), rows, data, args.into)
        over.extend(each for each in measured if each["case"] == BOUND and statistics.median(each["ratios"]) > MOST)

    return exit_status("products", work) or int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
