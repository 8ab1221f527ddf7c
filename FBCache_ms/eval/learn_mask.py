"""Learns which steps to compute, and what is added at the others, so that the final latents stay near the uncached."""

import math
import shlex
import sys
import textwrap
from functools import partial
from zlib import crc32

import numpy as np

from FBCache_ms.config import OPTIONS, CacheConfig
from FBCache_ms.eval.shared.arguments import (
    Parser,
    add_clip_option,
    add_drawing_options,
    add_into_option,
    branches_of,
    check_cache,
    check_model_and_size,
    check_range,
    exit_status,
    reason,
)
from FBCache_ms.eval.shared.cases import BASELINE, Row
from FBCache_ms.eval.shared.closed_loop import ClosedLoop, Ledger
from FBCache_ms.eval.shared.drawing import Setting, draw_missing, session, wait_for_all
from FBCache_ms.eval.shared.files import check_folder, check_into, json_bytes, put_into, say_written, write_file
from FBCache_ms.eval.shared.fitting import Factors, levenberg_marquardt, stepwise_weights
from FBCache_ms.eval.shared.masks import Estimate, ShortestPath, anneal, starts
from FBCache_ms.eval.shared.measure import Judge, cell_of, clip_folder, means, write_sweep
from FBCache_ms.eval.shared.prompts import choose_prompts
from FBCache_ms.eval.shared.published import ATLAS, best, predict
from FBCache_ms.eval.shared.tables import KINDS
from FBCache_ms.predict.roofline import WHOLE_LOOP
from FBCache_ms.rules.forecasts import FORECASTS, MEANCACHE

TABLE = "F0B0_W0M0MC0_T1O2_R0.12,gate=static,schedule=taylorseer,forecast=table"
"""What is learnt for: weights of the residual, its slope and its curvature."""

SEARCHES = "error", "path"
"""What a mask is found by: the error at the end of the generation, or MeanCache's shortest path."""

FITS = "loop", "step"
"""What a table's weights are fitted by: the error at the end of the generation, or each step's own."""

FITTED, ITERATIONS = 12, 4
"""How many masks are given an iteration of the fit, and the best of them in all."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "learn_mask", description=__doc__)
    add = parser.add_argument_group("what is learnt").add_argument
    add(
        "--cache",
        default=TABLE,
        metavar="TAG|PRESET",
        help="the forecast and the span that are learnt for; its gate and its schedule do not matter. The weights of "
        "forecast=table are fitted, any other one has its own (default: %(default)s)",
    )
    add(
        "--computed",
        type=int,
        nargs="+",
        default=[6, 8, 10],
        metavar="K",
        help="how many steps are computed, a mask each",
    )
    add(
        "--search",
        choices=SEARCHES,
        default=SEARCHES[0],
        help="what a mask is found by: the error at the end of the generation, or MeanCache's shortest path through "
        "the uncached run, for forecast=meancache (default: %(default)s)",
    )
    add("--evaluations", type=int, default=60, metavar="E", help="masks tried for each of them, by their error")
    add(
        "--learn_from",
        type=int,
        default=4,
        metavar="L",
        help="learn from so many of the prompts; the others tell what the masks are worth",
    )
    add(
        "--batch_size", type=int, metavar="B", help="draw so many of them in a call (default: all that are learnt from)"
    )
    add(
        "--fit",
        choices=FITS,
        help=f"what a table's weights are fitted by: the error at the end of the generation, or each step's own, as in "
        f"L2P (default: {FITS[0]}; forecast=table)",
    )
    add("--fitted", type=int, metavar="F", help=f"masks that weights are fitted to (default: {FITTED}; forecast=table)")
    add(
        "--iterations",
        type=int,
        metavar="I",
        help=f"of the fit to the best of these masks (default: {ITERATIONS}; forecast=table)",
    )
    add_drawing_options(parser, limit=14, save_path="./results/learn_mask", context_parallel=False)
    add_clip_option(parser)
    add_into_option(parser)
    args = parser.parse_args(argv)
    args.command = f"{parser.prog} {shlex.join(parser.given)}"
    try:
        check_into(args.into)
        check_model_and_size(args)
        for computed in args.computed:
            check_range("computed", computed, 2, args.num_inference_steps - 1)
            mask = next(iter(starts(args.num_inference_steps, computed)))
            check_cache(configured(CacheConfig.named(args.cache), mask), args.ckpt, args.num_inference_steps)
        check_range("evaluations", args.evaluations, 1)
        if args.search == SEARCHES[1] and CacheConfig.named(args.cache).forecast != MEANCACHE.name:
            raise ValueError(f"--search {args.search} is for a --cache with forecast={MEANCACHE.name}")
        check_range("learn_from", args.learn_from, 1)
        args.batch_size = args.learn_from if args.batch_size is None else args.batch_size
        check_range("batch_size", args.batch_size, 1)
        for name, default in {"fit": FITS[0], "fitted": FITTED, "iterations": ITERATIONS}.items():
            value = getattr(args, name)
            if value is not None and not has_table(CacheConfig.named(args.cache)):
                raise ValueError(f"--{name} is for a --cache with a forecast whose weights are fitted, as {TABLE}")
            if name != "fit" and value is not None and args.fit != FITS[0]:
                raise ValueError(f"--{name} is for --fit {FITS[0]}; one step's weights have a closed form")
            setattr(args, name, default if value is None else value)
        check_range("fitted", args.fitted, 1)
        check_range("iterations", args.iterations, 1)
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


def with_mask(config, mask, **changes):
    """The CacheConfig that computes a mask's steps alone, with the forecast and over the span of another one."""
    kept = {name: getattr(config, name) for name, option in OPTIONS.items() if option.group in ("forecast", "span")}
    return CacheConfig(gate="static", steps_computation_mask=mask, **{**kept, **changes})


def configured(config, mask, factors=None):
    """The same, with weights by these factors where the forecast has a table; by TaylorSeer's of order 1 for none."""
    if not has_table(config):
        return with_mask(config, mask)
    table = Factors(mask, config.taylorseer_derivative + 1)
    return with_mask(config, mask, forecast_weights=table.weights(table.start if factors is None else factors))


def has_table(config):
    """Whether a configuration's forecast has weights that are fitted."""
    return "forecast_weights" in FORECASTS[config.forecast].options


class Search:
    """The search for a mask, and for its weights where the forecast has a table of them.

    Args:
        args: the program's arguments.
        loop: the ClosedLoop of the prompts that are learnt from.
        ledger: the Ledger of what has been found.
    """

    def __init__(self, args, loop, ledger):
        self.args, self.loop, self.ledger = args, loop, ledger
        self.config = CacheConfig.named(args.cache)
        self.fitted = has_table(self.config)
        self.runs = {}

    def estimate(self):
        """The Estimate of a mask's error, from the uncached run."""
        by_sigma, order = self.config.by_noise, self.config.taylorseer_derivative
        # Before a fit the forecast is a straight line.
        return Estimate(self.loop.path, self.loop.sigmas, 1 if self.fitted else order, by_sigma)

    def error(self, mask):
        """A mask's error before any fit."""

        def measure():
            return self.loop.error(self.loop.latents(configured(self.config, mask)))

        self.runs[name_of(mask)] = 1
        return number(self.ledger.found(name_of(mask), measure))

    def fit(self, mask, iterations):
        """The factors of a mask, its error and the iterations done: so many, or up to one that has gained nothing."""
        table = Factors(mask, self.config.taylorseer_derivative + 1)
        factors, error = table.start, self.error(mask)
        for iteration in range(iterations):
            name = f"{name_of(mask)}_fit_{iteration}"
            moved = [factors, *(factors + step for step in np.diag(table.widths))]
            tries = self._drawn(f"{name}_slopes", mask, moved, partial(self._tries, factors, table.widths))
            self.runs[name] = len(moved) + len(tries)
            errors = list(map(number, self._drawn(name, mask, tries, partial(map, self.loop.error))))
            if not errors or min(errors) >= error:
                break
            error = min(errors)
            factors = np.array(tries[errors.index(error)])
        return factors, error, iteration + 1

    @property
    def pictures(self):
        """How many pictures the last search takes, with those of the uncached run."""
        return (1 + sum(self.runs.values())) * self.args.learn_from

    def _drawn(self, name, mask, points, make):
        """What ``make`` finds, a list, in the final latents at each of some factors."""
        configs = [configured(self.config, mask, np.array(factors)) for factors in points]
        return self.ledger.drawn(name, self.loop.latents, configs, lambda latents: list(make(latents)))

    def _tries(self, factors, widths, latents):
        """What to try next; nothing where a forecast ran away."""
        deviations = np.array(latents) - self.loop.uncached
        # So that the sum of the squares falls as the geometric mean over the pictures does.
        deviations /= np.sqrt(self.loop.errors(latents[0]))[:, None, None]
        if not np.isfinite(deviations).all():
            return []
        tries = levenberg_marquardt(deviations.reshape(len(deviations), -1).astype(float), factors, widths)
        return [each.tolist() for each in tries]

    def learn(self, computed):
        """The best configuration found for a number of computed steps, and the evidence, a dictionary.

        The search begins from the mask of the least Estimate, or from an evenly spaced one where that is better. An
        iteration of the fit is then a mask's error, in a search that begins from the best ones.
        """
        args, self.runs = self.args, {}
        if args.search == SEARCHES[1]:
            return self.along_shortest_path(computed)
        begin = {self.estimate().best(computed), *starts(args.num_inference_steps, computed)}
        errors = self._anneal(self.error, begin, args.evaluations, f"{computed} of {args.num_inference_steps} steps")
        best = min(errors, key=errors.get)
        evidence = {
            "computed": computed,
            "latent_mse": errors[best],
            "latent_mse_at_the_start": min(errors[mask] for mask in begin),
            "evaluations": len(errors),
            "seed": args.seed,
            "pictures": self.pictures,
        }
        if not self.fitted:
            return configured(self.config, best), evidence
        if args.fit == FITS[1]:
            return self.stepwise(best), {**evidence, "pictures": self.pictures, "fit": args.fit}
        nearest = sorted(errors, key=errors.get)[: max(args.fitted // 3, 1)]
        fits = self._anneal(lambda mask: self.fit(mask, 1)[1], nearest, args.fitted, "fits")
        best = min(fits, key=fits.get)
        factors, error, iterations = self.fit(best, args.iterations)
        fit = {"latent_mse_before_the_fit": errors.get(best, self.error(best)), "latent_mse": error}
        return configured(self.config, best, factors), {
            **evidence,
            **fit,
            "pictures": self.pictures,
            "fit": args.fit,
            "factors": len(factors),
            "fitted_masks": len(fits),
            "iterations": iterations,
        }

    def along_shortest_path(self, computed):
        """The CacheConfig of MeanCache's schedule, and the evidence."""
        most = self.config.taylorseer_derivative + 1
        mask, spans = ShortestPath(self.loop.path, self.loop.sigmas, most).best(computed)
        config = with_mask(self.config, mask, **({"meancache_steps": spans} if spans else {}))
        name = f"path_{name_of(mask)}"
        error = number(self.ledger.found(name, lambda: self.loop.error(self.loop.latents(config))))
        self.runs[name] = 1
        evidence = {"computed": computed, "latent_mse": error, "evaluations": 1, "search": self.args.search}
        return config, {**evidence, "latent_mse_at_the_start": error, "pictures": self.pictures}

    def stepwise(self, mask):
        """The CacheConfig of a mask and of the weights that are best for each step on its own."""

        def measure():
            steps = self.args.num_inference_steps
            return self.loop.products(with_mask(self.config, (1,) * steps)).tolist()

        self.runs["products"] = 1
        products = np.array(self.ledger.found("products", measure))
        weights = stepwise_weights(products, mask, self.config.taylorseer_derivative + 1)
        return with_mask(self.config, mask, forecast_weights=weights)

    def _anneal(self, error, begin, evaluations, what):
        from tqdm import tqdm

        with tqdm(total=evaluations, desc=what) as bar:

            def counted(mask):
                bar.update()
                return error(mask)

            return anneal(counted, begin, evaluations, self.args.seed)


def name_of(mask):
    """A mask as text."""
    return "".join(map(str, mask))


def number(error):
    """An error from JSON."""
    return math.inf if error is None else error


def split(figures, learnt_from):
    """The figures of the pictures that were learnt from, and those of the others."""
    parts = figures["pictures"][:learnt_from], figures["pictures"][learnt_from:]
    return [means(entries, [figures["uncached_seconds"]]) for entries in parts]


def preset_of(args, painter, figures, search):
    """What a preset file says of a mask: the tag, and what it is worth."""
    learnt, others = split(figures, args.learn_from)
    return {
        "config": figures["config"],
        "command": args.command,
        "search": {**search, "prompts": args.prompts[: args.learn_from]},
        "figures_of_the_prompts_learnt_from": learnt,
        "figures": others,
        "lowest_psnr": min(entry["psnr"] for entry in figures["pictures"][args.learn_from :]),
        "prompts": args.prompts[args.learn_from :],
        "settings": {**painter.common, "steps": args.num_inference_steps},
    }


def fit_lines(search):
    """What a person wants to know of a fit."""
    before, masks = search["latent_mse_before_the_fit"], search["fitted_masks"]
    return [f"  {search['factors']} factors fitted, from {before:.3g} on; {masks} masks were fitted to"]


def hours_of_flux_dev(cache, steps, loops):
    """Predicted hours of so many denoise loops, of one branch each."""
    config = CacheConfig.named(cache)
    computed = (sum(config.steps_computation_mask),)
    return loops * predict(best(ATLAS).device, WHOLE_LOOP, config, steps, computed) / 3600


def text_of(args, preset, path):
    """What a person wants to know of a mask: what it is worth, and the line to use it."""
    search, learnt, others = (preset[name] for name in ("search", "figures_of_the_prompts_learnt_from", "figures"))
    loops = branches_of(args) * search["pictures"]
    hours = hours_of_flux_dev(preset["config"], args.num_inference_steps, loops)
    return "\n".join(
        [
            f"{others['computed_steps']:g} of {args.num_inference_steps} steps: {preset['config']}",
            f"  error of the latents {search['latent_mse']:.3g}, {search['latent_mse_at_the_start']:.3g} at the start; "
            f"{search['evaluations']} masks tried on {args.learn_from} prompts",
            *(fit_lines(search) if "factors" in search else []),
            f"  {search['pictures']} pictures were drawn for it; FLUX.1-dev at 1024 x 1024 is predicted to take "
            f"{hours:.1f} h for as many on one NPU of an {ATLAS.device.name}",
            f"  PSNR {learnt['psnr']:.1f} dB on these, {others['psnr']:.1f} dB on {len(preset['prompts'])} others "
            f"(worst prompt {preset['lowest_psnr']:.1f}); {others['speedup']:.2f}x ({others['seconds']:.3f} s against "
            f"{others['uncached_seconds']:.3f} s)",
            f"use it: --cache {path}",
            "",
        ]
    )


def ledger_of(args, painter, ranks):
    """The Ledger of searches with the same model, prompts, forecast and span."""
    same = {**painter.common, "prompts": args.prompts[: args.learn_from], "steps": args.num_inference_steps}
    config = with_mask(CacheConfig.named(args.cache), (1,) * args.num_inference_steps)
    key = crc32(json_bytes({**same, "config": str(config)}))
    return Ledger(args.save_path / f"search_{key:08x}", ranks)


def run(args):
    """Learns the masks, draws all prompts with them and, on the first rank, writes sweep.json and preset files."""
    with session(args) as (painter, ranks):
        steps, number = args.num_inference_steps, len(args.prompts)
        loop = ClosedLoop(painter, args.prompts[: args.learn_from], steps, args.batch_size)
        search, searches = Search(args, loop, ledger_of(args, painter, ranks)), {}
        for computed in args.computed:
            config, evidence = search.learn(computed)
            searches[Row("learnt", f"learnt, {computed} steps", str(config))] = evidence

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
        for row, evidence in searches.items():
            preset = preset_of(args, painter, cells[row], evidence)
            kind = {None: "mask", FITS[0]: "fitted", FITS[1]: "stepwise"}[evidence.get("fit")]
            kind = evidence.get("search", kind)
            file = args.save_path / f"{kind}_{evidence['computed']}_of_{steps}.json"
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
