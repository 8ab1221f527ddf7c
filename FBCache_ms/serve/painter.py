"""The drawing process: loads a model, compiles every graph that is served, and draws one picture after the other.

    python -m FBCache_ms.serve.painter FD

is started by the web process, with one end of a socket. Messages are tuples.

| from the web process | |
|---|---|
| Settings.for_painter() | once, first |
| ("draw", number, Drawings) | draw these at once; numbers rise |
| ("cancel", number) | stop drawing it |

| to the web process | |
|---|---|
| ("compiled", done, graphs, compilations) | that many of the graphs are compiled |
| ("ready", facts) | every graph is compiled and has drawn once |
| ("failed", text) | the model cannot be served; the process ends |
| ("step", number, facts) | a step is done: "step", "preview", and what the cache has decided so far |
| ("alive", number) | once a second, while steps are made that are not reported |
| ("drawn", number, pictures, facts) | a picture of each, (H, W, 3) of uint8 |
| ("cancelled", number) | it was stopped |
| ("refused", number, which, text) | the model says that this one of them cannot be drawn |
| ("error", number, text) | drawing it failed, in words for the client |
"""

import os
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np

# MindSpore reads the imports of the file that was started, and cannot follow relative ones.
from FBCache_ms.config import CacheConfig
from FBCache_ms.serve.drawing import Drawing
from FBCache_ms.serve.pictures import Preview
from FBCache_ms.serve.settings import MOST_GRAPHS

WARM_UP = (
    "a big red circle on the left and a small blue square at the top, yellow background",
    "a big green square in the center, purple background",
    "a small orange diamond on the right, black background",
    "a big blue triangle at the bottom and a small black circle at the top, white background",
)
"""Drawn while compiling, in many colours, so that there is enough to learn the preview from."""

WARM_UP_STEPS = 8


class Cancelled(Exception):
    """Ends a drawing that nobody waits for any more."""


class NotANumber(ArithmeticError):
    """What was drawn cannot be shown: a model or a forecast has overflowed."""

    def __init__(self):
        super().__init__("what was drawn is not a number: another preset, or a server of another --dtype, may help")


class Painter:
    """Draws, in the thread that made it; another one listens for cancellations.

    Args:
        connection: to the web process.
        settings: what Settings.for_painter gives.
    """

    def __init__(self, connection, settings):
        self.connection, self.settings = connection, settings
        self.waiting, self.number, self.cancelled = SimpleQueue(), None, None
        self.preview, self.said = Preview(), time.monotonic()
        threading.Thread(target=self.listen, daemon=True).start()
        self.pipe = self.load()

    def listen(self):
        """Takes messages; ends the process when the web process is gone."""
        try:
            while True:
                kind, number, *rest = self.connection.recv()
                if kind == "cancel":
                    self.cancelled = number
                else:
                    self.waiting.put((number, *rest))
        except (EOFError, OSError):
            os._exit(0)

    def load(self):
        """The pipeline. Raises OSError or ValueError for one that cannot be served."""
        from FBCache_ms.eval.shared.arguments import device_of
        from FBCache_ms.runtime.imports import quick_imports

        with quick_imports():
            from mindone.diffusers.utils import logging

            import FBCache_ms

            model, kind = self.settings["model"], getattr(FBCache_ms, self.settings["pipeline"])
            device = device_of(model)
        # mindone's warnings show what of a prompt was cut.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        pipe = kind.from_pretrained(str(model.ckpt), device=device, quantize_config=model.quantize)
        reason = pipe.why_not_cached()
        if reason:
            raise ValueError(f"checkpoint {model.ckpt} cannot run with the cache: {reason}")
        # A bar of one's own is what makes the loop run in pieces.
        pipe.progress_bar = self.bar
        return pipe

    def warm_up(self):
        """Compiles each graph and draws with it, so that nothing that is served compiles.

        Raises ValueError for too many graphs, NotANumber for a model that draws none.
        """
        served, scales = self.settings, self.settings["guidance"]
        tags = [
            (str(CacheConfig.from_tag(tag).switched_off()), batch) for tag, sizes in served["tags"] for batch in sizes
        ]
        graphs = list(product(served["sizes"], tags, served["branches"], self.texts()))
        if len(graphs) > MOST_GRAPHS:
            raise ValueError(
                f"{len(graphs)} graphs are needed, and {MOST_GRAPHS} are kept: name fewer --sizes or --presets, or "
                "fewer --prompt_tokens"
            )
        for done, ((width, height), (tag, batch), branches, text) in enumerate(graphs):
            own = {**scales, "true_cfg_scale": float(branches)} if "true_cfg_scale" in scales else scales
            negative = "" if branches == 2 else None
            drawing = Drawing(text, negative, width, height, WARM_UP_STEPS, own, 0, tag)
            self.draw(batch * (drawing,))
            for prompt in WARM_UP if done == 0 else ():
                seen = []
                (pixels,) = self.draw([replace(drawing, prompt=prompt)], lambda *step: seen.append(tokens_of(step[2])))
                self.preview.learn(seen[-1], pixels)
            self.connection.send(("compiled", done + 1, len(graphs), self.pipe.graph_compilations))

    def texts(self):
        """A prompt of each length that has a graph of its own, up to the longest that is served."""
        found, words, longest = [WARM_UP[0]], [], self.longest
        lengths = self.pipe.text_lengths
        for shorter in (length for length in lengths[:-1] if length < longest):
            while self.count_tokens(" ".join(words)) <= shorter:
                words.append("red")
            found.append(" ".join(words))
        return found

    @property
    def longest(self):
        """Tokens that a prompt may have."""
        return min(self.settings["prompt_tokens"] or self.pipe.text_length, self.pipe.text_length)

    def serve(self):
        """Draws what comes, for as long as the web process is there."""
        while True:
            number, drawings = self.waiting.get()
            self.connection.send(self.answer(number, drawings))

    def answer(self, number, drawings):
        """The message that ends a drawing."""
        self.number, which = number, 0
        try:
            for which, drawing in enumerate(drawings):
                self.check_length("prompt", drawing.prompt)
                self.check_length("negative_prompt", drawing.negative_prompt or "")
            pictures = self.draw(drawings, self.reporter(drawings[0]) if drawings[0].watched else None)
        except Cancelled:
            return "cancelled", number
        except ValueError as error:
            return "refused", number, which, str(error)
        except Exception as error:
            # Of the kind alone: a message may tell the prompt.
            lines = traceback.extract_tb(error.__traceback__)[-1]
            print(f"drawing failed: {type(error).__name__} in {lines.filename}:{lines.lineno}", file=sys.stderr)
            return "error", number, str(error) if isinstance(error, NotANumber) else "drawing this failed"
        stats, seconds = self.pipe.cache_stats, self.pipe.seconds
        facts = {
            "computed_steps": stats.computed_steps,
            "cached_steps": stats.cached_steps,
            "residual_diffs": [None if each is None else float(each) for each in stats.residual_diffs],
            "skipped": stats.skipped,
            "seconds": {name: seconds[name] for name in ("encode", "denoise", "decode", "total")},
            "compilations": self.pipe.graph_compilations,
        }
        return "drawn", number, pictures, facts

    def check_length(self, name, text):
        """Raises ValueError for a text that the model would cut."""
        tokens = self.count_tokens(text)
        if tokens > self.longest:
            raise ValueError(f"{name} has {tokens} tokens; at most {self.longest} are read")

    def count_tokens(self, text):
        """How many tokens a text has, without what a template may put around it."""
        tokenizer = getattr(self.pipe, "tokenizer_2", None) or self.pipe.tokenizer
        # FLUX.2's is a processor, which has the tokenizer in it.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return len(tokenizer(text)["input_ids"])

    def draw(self, drawings, report=None):
        """The pixels of each of some Drawings that differ in prompts and seeds alone, (H, W, 3) of uint8.

        Calls ``report(pipe, step, latents)`` after each step. Raises NotANumber where one of them cannot be shown.
        """
        drawing, watch = drawings[0], {}
        if report is not None:

            def after_step(pipe, step, timestep, tensors):
                report(pipe, step, tensors["latents"])
                self.stop_if_cancelled()
                return {}

            watch = {"callback_on_step_end": after_step, "callback_on_step_end_tensor_inputs": ["latents"]}
        negative = (
            {} if drawing.negative_prompt is None else {"negative_prompt": [each.negative_prompt for each in drawings]}
        )
        pictures = self.pipe(
            prompt=[each.prompt for each in drawings],
            **negative,
            **drawing.scales,
            height=drawing.height,
            width=drawing.width,
            num_inference_steps=drawing.steps,
            generator=[np.random.default_rng(each.seed) for each in drawings],
            output_type="np",
            cache_config=CacheConfig.from_tag(drawing.tag),
            **watch,
        )[0]
        if not self.pipe.finite:
            raise NotANumber
        return list((pictures * 255).round().astype(np.uint8))

    def reporter(self, drawing):
        """What tells the web process of each step of a Drawing."""
        before = []

        def report(pipe, step, latents):
            now, sigmas = tokens_of(latents), pipe.scheduler.sigmas.asnumpy()
            facts = {"step": step + 1, "preview": None}
            if before:
                # Where the step's velocity leads: x - sigma v.
                velocity = (now - before.pop()) / (sigmas[step + 1] - sigmas[step])
                shown = now - sigmas[step + 1] * velocity
                facts["preview"] = self.preview.show(shown, drawing.width, drawing.height)
            before.append(now)
            gate = pipe.cache_context.traces()[0][0]
            facts["reused"] = [bool(each) for each in gate.reused]
            facts["residual_diffs"] = [None if each is None else float(each) for each in gate.residual_diffs]
            self.connection.send(("step", self.number, facts))

        return report

    @contextmanager
    def bar(self, iterable=None, total=None):
        """Stands for mindone's progress bar, which is told of each piece of the loop."""
        yield self

    def update(self):
        """A step is done."""
        self.stop_if_cancelled()
        if time.monotonic() > self.said + 1:
            self.said = time.monotonic()
            self.connection.send(("alive", self.number))

    def stop_if_cancelled(self):
        """Raises Cancelled between two steps; the next generation begins anew whatever this one has left."""
        if self.cancelled is not None and self.cancelled == self.number:
            raise Cancelled


def tokens_of(latents):
    """The first picture's latents, (S, C) of float32."""
    return latents[0].float().asnumpy()


def main(fd):
    """The process."""
    from FBCache_ms.eval.shared.arguments import one_line, quiet, reason

    quiet()
    connection = Connection(fd)
    try:
        painter = Painter(connection, connection.recv())
        painter.warm_up()
    except (NotANumber, OSError, TypeError, ValueError) as error:
        connection.send(("failed", one_line(reason(error))))
        return
    connection.send(("ready", {"compilations": painter.pipe.graph_compilations}))
    painter.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
