"""Multiplies matrices with torch, as protocol.py asks it to: what no transformer of their sizes can go below.

benchmarks/growth_against_torch.py starts it beside worker.py. Its "arguments" have ``layers``, [[rows, inputs,
outputs], ...], ``dtype`` and ``threads``; the weights of each layer are its own, as they are in a model.
"""

import time

import torch
from PIL import Image
from protocol import serve, take_standard_output


def main():
    """Answers until there are no more requests."""
    stream = take_standard_output()
    made = {}

    def draw(latents, layers, dtype, threads):
        torch.set_num_threads(threads)
        key = dtype, str(layers)
        if key not in made:
            kind = getattr(torch, dtype)
            made.clear()
            made[key] = [(torch.randn(r, i, dtype=kind), torch.randn(o, i, dtype=kind)) for r, i, o in layers]
        begin = time.perf_counter()
        for rows, weight in made[key]:
            torch.nn.functional.linear(rows, weight)
        return Image.new("RGB", (1, 1)), time.perf_counter() - begin, []

    serve(stream, "plain products", {"torch": torch.__version__}, draw)


if __name__ == "__main__":
    main()
