"""Learns which steps to compute: the masks whose final latents stay nearest to the uncached ones."""

import math
import random
import sys
import textwrap
from functools import lru_cache

import numpy as np

from FBCache_ms.config import OPTIONS, CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import BASELINE, UNCACHED, Row
from FBCache_ms.eval.shared.drawing import Setting, draw_missing, session, wait_for_all
from FBCache_ms.eval.shared.files import check_folder, check_into, json_bytes, put_into, say_written, write_file
from FBCache_ms.eval.shared.measure import Judge, cell_of, clip_folder, means, write_sweep
from FBCache_ms.eval.shared.prompts import choose_prompts
from FBCache_ms.eval.shared.tables import KINDS

HEAT = 0.3
"""At the beginning a move that makes the error greater by this, in its logarithm, is accepted once in e times."""

TRIES = 20
"""So many moves are tried for each evaluation, since a move may lead to a mask that has been evaluated."""

POWERS = (0.8, 1, 1.4)
"""Masks to begin with have steps at i^p: below 1 the end of the sampling gets more of them, above 1 its beginning."""

POWER = 1.5
"""Of Estimate. On the embedded checkpoint the logarithms of estimate and error correlate by 0.91 over 78 masks of 6 to
12 computed steps. With 2 they do by 0.92, but the masks of the least estimate are worse: 10 of 28 steps gave 52.0 dB
over three prompts, with 1.5 60.1 dB."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "learn_mask", description=__doc__)
    add = parser.add_argument_group("what is learnt").add_argument
    add(
        "--cache",
        default="taylorseer",
        metavar="TAG|PRESET",
        help="the forecast and the span that the masks are for; its gate and its schedule do not matter",
    )
    add(
        "--computed",
        type=int,
        nargs="+",
        default=[6, 8, 10],
        metavar="K",
        help="how many steps are computed, a mask each",
    )
    add("--evaluations", type=int, default=60, metavar="E", help="masks tried for each of them")
    add(
        "--learn_from",
        type=int,
        default=4,
        metavar="L",
        help="learn from so many of the prompts, all drawn in one call; the others tell what the masks are worth",
    )
    add_drawing_options(parser, limit=14, save_path="./results/learn_mask")
    add_clip_option(parser)
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_into(args.into)
        check_model_and_size(args)
        for computed in args.computed:
            check_range("computed", computed, 2, args.num_inference_steps - 1)
            mask = next(iter(starts(args.num_inference_steps, computed)))
            check_cache(with_mask(CacheConfig.named(args.cache), mask), args.ckpt, args.num_inference_steps)
        check_range("evaluations", args.evaluations, 1)
        check_range("learn_from", args.learn_from, 1)
        args.prompts = choose_prompts(args)
        if len(args.prompts) <= args.learn_from:
            raise ValueError(
                f"--learn_from {args.learn_from} leaves none of {len(args.prompts)} prompts to tell what a mask is "
                "worth; raise --limit"
            )
        args.clip = clip_folder(args)
        check_folder(args.save_path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(reason(error))
    return args


def with_mask(config, mask):
    """The CacheConfig that computes a mask's steps alone, with the forecast and over the span of another one."""
    kept = {name: getattr(config, name) for name, option in OPTIONS.items() if option.group in ("forecast", "span")}
    return CacheConfig(gate="static", steps_computation_mask=mask, **kept)


def starts(steps, computed):
    """Masks to begin with, a set: the computed steps at equal distances of i^p, the last step among them or not."""
    masks = set()
    for power in POWERS:
        for last in (steps - 1, steps * (computed - 1) / computed):
            places = np.round(last * np.linspace(0, 1, computed) ** power).astype(int)
            # Steps that fall together move apart, and none beyond the end.
            order = np.arange(computed)
            places = np.maximum.accumulate(places - order) + order
            places = np.minimum(places, steps - computed + order)
            masks.add(tuple(np.isin(np.arange(steps), places).astype(int).tolist()))
    return masks


def moved(mask, rng):
    """The mask with one of its computed steps elsewhere, a near place likelier than a far one; never the first step."""
    step = rng.choice([place for place, computed in enumerate(mask) if computed and place > 0])
    free = [place for place, computed in enumerate(mask) if not computed]
    (place,) = rng.choices(free, [1 / (place - step) ** 2 for place in free])
    changed = list(mask)
    changed[step], changed[place] = 0, 1
    return tuple(changed)


def anneal(error, masks, evaluations, seed=0):
    """Simulated annealing on the logarithm of an error: {mask: its error} of all masks that were tried.

    Args:
        error: a function of a mask, a tuple of 0 and 1; its value is positive, infinite at worst.
        masks: those to begin with, all of the same number of computed steps.
        evaluations: how many masks are tried; those to begin with are in any case.
        seed: of the moves.
    """
    rng, errors = random.Random(seed), {}

    def measured(mask):
        if mask not in errors:
            errors[mask] = error(mask)
        return errors[mask]

    current = min(sorted(masks), key=measured)
    for _ in range(TRIES * evaluations):
        if len(errors) >= evaluations:
            break
        heat = HEAT * (1 - len(errors) / evaluations)
        candidate = moved(current, rng)
        if measured(candidate) <= measured(current) * math.exp(heat * rng.expovariate(1)):
            current = candidate
    return errors


class LatentError:
    """How far a mask's final latents lie from the uncached ones: the mean squared error over prompts and elements.

    Args:
        painter: the drawing.Painter.
        prompts: list of texts; all are drawn in one call, each from the noise that the Painter gives it.
        config: a CacheConfig, for its forecast and its span.
        steps: N.
    """

    def __init__(self, painter, prompts, config, steps):
        from mindspore import ops

        self.pipe, self.config = painter.pipe, config
        each = [painter.arguments(index, prompt, steps) for index, prompt in enumerate(prompts)]
        embeds = {name: ops.cat([one[name] for one in each]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        noise, _ = self.pipe.prepare_latents(
            len(prompts),
            self.pipe.transformer.config.in_channels // 4,
            *painter.image_size,
            embeds["prompt_embeds"].dtype,
            [one["generator"] for one in each],
        )
        self.arguments = {**each[0], **embeds, "latents": noise, "generator": None, "output_type": "latent"}
        self.path = [to_numpy(noise)]
        self.uncached = self.latents(CacheConfig.named(UNCACHED), callback_on_step_end=self._keep)

    def _keep(self, pipe, step, timestep, tensors):
        self.path.append(to_numpy(tensors["latents"]))
        return {}

    def latents(self, config, **more):
        """The final latents (B, S, C) under a CacheConfig."""
        return to_numpy(self.pipe(**self.arguments, **more, cache_config=config)[0])

    def estimate(self):
        """The Estimate of the same error, from the uncached run."""
        sigmas = self.pipe.scheduler.sigmas.asnumpy()
        by_sigma = self.config.forecast_coordinate == "sigma"
        return Estimate(np.array(self.path), sigmas, self.config.taylorseer_derivative, by_sigma)

    def __call__(self, mask):
        """The error; infinite where the forecast ran away."""
        error = float(np.square(self.latents(with_mask(self.config, mask)) - self.uncached).mean())
        return error if math.isfinite(error) else math.inf


def to_numpy(tensor):
    """A tensor as a NumPy array of float32."""
    return tensor.float().asnumpy()


class Estimate:
    """What a mask is worth, without drawing: from the velocities of the uncached run.

    A reused step's velocity is taken to be the polynomial through the last computed ones. The estimate is the sum of
    the norms of what it is off by, each weighted with the step's stride in the noise level sigma and with
    (1 - sigma)^POWER: the earlier a deviation comes in, the more of it the model takes back. Since it is a sum over
    the steps, dynamic programming finds its minimum.

    Args:
        path: (N + 1, ...), the latents before, between and behind the uncached run's steps.
        sigmas: (N + 1,), the noise levels.
        order: of the polynomials; above 2 they are taken to be parabolas, for the time it takes.
        by_sigma: whether they are in the noise level, not in the step.
    """

    def __init__(self, path, sigmas, order, by_sigma=False):
        strides = np.diff(sigmas)
        velocities = np.diff(path.reshape(len(path), -1).astype(float), axis=0) / strides[:, None]
        self.products = velocities @ velocities.T / velocities.shape[1]
        self.weights, self.order = np.abs(strides) * (1 - sigmas[1:]) ** POWER, min(order, 2)
        self.coordinates = (sigmas[:-1] if by_sigma else np.arange(len(strides))).tolist()

    def costs(self, nodes):
        """The estimate up to each step behind the last of the computed steps ``nodes``, none behind it computed."""
        costs = [0.0]
        for step in range(nodes[-1] + 1, len(self.weights)):
            places = [*nodes, step]
            off = [*lagrange([self.coordinates[node] for node in nodes], self.coordinates[step]), -1]
            square = off @ self.products[np.ix_(places, places)] @ off
            costs.append(costs[-1] + self.weights[step] * math.sqrt(max(square, 0)))
        return costs

    def best(self, computed):
        """The mask of the least estimate with so many computed steps, the first one among them."""
        steps, costs = len(self.weights), lru_cache(None)(self.costs)

        @lru_cache(None)
        def rest(nodes, left):
            """The least estimate behind the computed steps ``nodes``, and the ``left`` computed steps that give it."""
            here = costs(nodes)
            if left == 0:
                return here[-1], ()
            tails = {
                step: rest((*nodes, step)[-self.order - 1 :], left - 1)
                for step in range(nodes[-1] + 1, steps - left + 1)
            }
            step = min(tails, key=lambda step: here[step - nodes[-1] - 1] + tails[step][0])
            return here[step - nodes[-1] - 1] + tails[step][0], (step, *tails[step][1])

        places = (0, *rest((0,), computed - 1)[1])
        return tuple(int(step in places) for step in range(steps))


def lagrange(nodes, x):
    """The weights of the values at ``nodes`` in the polynomial through them, at x."""
    return [math.prod((x - other) / (node - other) for other in nodes if other != node) for node in nodes]


def learn(error, steps, computed, evaluations, seed):
    """The best mask found for a number of computed steps, and the evidence of the search, a dictionary.

    The search begins from the mask of the least Estimate, or from an evenly spaced one where that is better.
    """
    from tqdm import tqdm

    begin = {error.estimate().best(computed), *starts(steps, computed)}
    with tqdm(total=evaluations, desc=f"{computed} of {steps} steps") as bar:

        def counted(mask):
            bar.update()
            return error(mask)

        errors = anneal(counted, begin, evaluations, seed)
    best = min(errors, key=errors.get)
    return best, {
        "latent_mse": errors[best],
        "latent_mse_at_the_start": min(errors[mask] for mask in begin),
        "evaluations": len(errors),
        "seed": seed,
    }


def split(figures, learnt_from):
    """The figures of the pictures that were learnt from, and those of the others."""
    parts = figures["pictures"][:learnt_from], figures["pictures"][learnt_from:]
    return [means(entries, [figures["uncached_seconds"]]) for entries in parts]


def preset_of(args, painter, figures, search):
    """What a preset file says of a mask: the tag, and what it is worth."""
    learnt, others = split(figures, args.learn_from)
    return {
        "config": figures["config"],
        "search": {**search, "prompts": args.prompts[: args.learn_from]},
        "figures_of_the_prompts_learnt_from": learnt,
        "figures": others,
        "lowest_psnr": min(entry["psnr"] for entry in figures["pictures"][args.learn_from :]),
        "prompts": args.prompts[args.learn_from :],
        "settings": {**painter.common, "steps": args.num_inference_steps},
    }


def text_of(args, preset, path):
    """What a person wants to know of a mask: what it is worth, and the line to use it."""
    search, learnt, others = (preset[name] for name in ("search", "figures_of_the_prompts_learnt_from", "figures"))
    return "\n".join(
        [
            f"{others['computed_steps']:g} of {args.num_inference_steps} steps: {preset['config']}",
            f"  error of the latents {search['latent_mse']:.3g}, {search['latent_mse_at_the_start']:.3g} at the start; "
            f"{search['evaluations']} masks tried on {args.learn_from} prompts",
            f"  PSNR {learnt['psnr']:.1f} dB on these, {others['psnr']:.1f} dB on {len(preset['prompts'])} others "
            f"(worst prompt {preset['lowest_psnr']:.1f}); {others['speedup']:.2f}x ({others['seconds']:.3f} s against "
            f"{others['uncached_seconds']:.3f} s)",
            f"use it: --cache {path}",
            "",
        ]
    )


def run(args):
    """Learns the masks, draws all prompts with them and, on the first rank, writes sweep.json and preset files."""
    with session(args) as (painter, ranks):
        steps, number = args.num_inference_steps, len(args.prompts)
        config = CacheConfig.named(args.cache)
        error = LatentError(painter, args.prompts[: args.learn_from], config, steps)
        searches = {}
        for computed in args.computed:
            mask, search = learn(error, steps, computed, args.evaluations, args.seed)
            searches[Row("learnt", f"learnt, {computed} steps", str(with_mask(config, mask)))] = search

        settings = {row: Setting.named(row.cache, steps) for row in (BASELINE, *searches)}
        path = args.save_path / "pictures"
        folders = {setting: painter.folder(path, setting) for setting in settings.values()}
        draw_missing(painter, folders, args.prompts, ranks)
        if ranks[0] != 0:
            return
        wait_for_all(folders, number)
        judge = Judge(args.prompts, folders[settings[BASELINE]], args.clip)
        cells = {
            row: cell_of(row, setting, folders[setting], args.save_path, judge) for row, setting in settings.items()
        }
        write_sweep(args.save_path, {**painter.common, "steps": steps}, args.prompts, list(cells.values()))
        written, texts = [*(f"sweep.{kind}" for kind in KINDS), "pictures"], []
        for row, search in searches.items():
            preset = preset_of(args, painter, cells[row], search)
            file = args.save_path / f"mask_{sum(CacheConfig.named(row.cache).steps_computation_mask)}_of_{steps}.json"
            write_file(file, lambda stream: stream.write(json_bytes(preset)))
            texts.append(text_of(args, preset, file))
            print(texts[-1], end="")
            written.append(file.name)
        put_into(args.into, textwrap.indent("".join(texts), "    "))
        say_written(args.save_path, *written)


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)
    return exit_status("learn_mask", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
