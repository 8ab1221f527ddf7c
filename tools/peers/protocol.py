"""How a worker is spoken to: a JSON object a line on its standard input, its answers the same way on standard output.

It first tells {"name": what draws, "versions": {package: version}}. A request is {"latents": the .npy file to begin
with, "picture": the file to write, "arguments": the pipeline's keyword arguments}; its answer is {"denoise": seconds of
the denoise loop, "pipeline": seconds from the text to the bytes of the PNG, "reused": a bool a step}, or {"error": what
went wrong}.
"""

import json
import os
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np


def take_standard_output():
    """Standard output for the answers alone: what libraries print goes to standard error from here on."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def serve(stream, name, versions, draw):
    """Answers requests on the stream until there are no more.

    Args:
        draw: called with the latents (B, tokens, channels) of float32 and the arguments; returns a PIL picture, the
            seconds of the denoise loop and a list of bools, whether each step was reused.
    """

    def say(answer):
        print(json.dumps(answer), file=stream, flush=True)

    say({"name": name, "versions": versions})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(answer(request, draw))
        except Exception as error:  # Who asked decides what to do without this picture.
            say({"error": f"{type(error).__name__}: {error}"})


def answer(request, draw):
    """Draws what is asked for, and writes it once the clock has stopped."""
    latents, data = np.load(request["latents"]), BytesIO()
    begin = time.perf_counter()
    picture, denoise, reused = draw(latents, **request["arguments"])
    picture.save(data, "PNG")
    seconds = time.perf_counter() - begin
    Path(request["picture"]).write_bytes(data.getvalue())
    return {"denoise": denoise, "pipeline": seconds, "reused": reused}
