"""What sharing a picture among several Ascend NPUs is expected to give: FLUX.1-dev, predicted; nothing is measured.

    .venv/bin/python benchmarks/sharing_predicted.py

The device is the Atlas 800T A2 that fits mindone's published times. Exchanges are not overlapped with computing. Links
are taken once as measured by others and once as specified. With two cards and no cache cache-dit has published 16.13 s
on one Atlas 800I A2 card and 11.45 s on two, by Ulysses.
"""

import sys
from dataclasses import replace
from itertools import product

from FBCache_ms.eval.shared.arguments import Parser, add_into_option, add_save_path, exit_status, reason
from FBCache_ms.eval.shared.files import check_folder, check_into
from FBCache_ms.eval.shared.published import ATLAS, PLAIN, SHAPES, best
from FBCache_ms.eval.shared.tables import markdown, publish
from FBCache_ms.predict.roofline import WHOLE_LOOP
from FBCache_ms.predict.sharing import SCHEMES, Links, shared_step_seconds

LINKS = Links("19.3 GB/s, measured", 19.3e9), Links("56 GB/s, specified", 56e9)
SIDES, RANKS, STEPS = (1024, 2048), (1, 2, 4, 8), 28
PUBLISHED = 16.13 / 11.45
"""cache-dit's gain on two cards."""


def parse_arguments(argv=None):
    """The command line."""
    parser = Parser(__name__, "sharing_predicted", description=__doc__)
    add_save_path(parser.add_argument, "./results/sharing_predicted", "the tables")
    add_into_option(parser)
    args = parser.parse_args(argv)
    try:
        check_folder(args.save_path)
        check_into(args.into)
    except (OSError, ValueError) as error:
        parser.error(reason(error))
    return args


def run_seconds(fit, links, shapes, config, reuses, ranks=1, scheme=SCHEMES[0]):
    """Of a generation with so many reused steps."""

    def once(reused=()):
        return shared_step_seconds(fit.device, WHOLE_LOOP, links, shapes, config, ranks, reused, scheme)

    return (STEPS - reuses) * once() + reuses * once(("fbcache",)) if reuses else STEPS * once()


def rows_of(fit):
    """A row for each side, kind of links, number of cards and scheme."""
    runs = (PLAIN, 0), (ATLAS.configs[-1], fit.reused[-1])
    for side, links, ranks, scheme in product(SIDES, LINKS, RANKS, SCHEMES):
        if ranks == 1 and scheme != SCHEMES[0]:
            continue
        shapes = replace(SHAPES, image_tokens=(side // 16) ** 2)
        times = [run_seconds(fit, links, shapes, *run, ranks, scheme) for run in runs]
        one = [run_seconds(fit, links, shapes, *run) for run in runs]
        yield {"side": side, "links": links.name, "cards": ranks, "scheme": scheme, "seconds": times, "one": one}


def main(argv=None):
    """The program; returns its exit status."""
    args = parse_arguments(argv)

    def work():
        fit = best(ATLAS)
        rows = list(rows_of(fit))
        table = [
            {
                "Picture": f"{row['side']} x {row['side']}",
                "Links": row["links"],
                "Cards": row["cards"],
                "Scheme": row["scheme"] if row["cards"] > 1 else "",
                "Uncached, predicted (s)": f"{row['seconds'][0]:.2f}",
                "Gain": f"{row['one'][0] / row['seconds'][0]:.2f}x",
                "Cached at 0.12, predicted (s)": f"{row['seconds'][1]:.2f}",
                "Gain of the cards": f"{row['one'][1] / row['seconds'][1]:.2f}x",
                "Gain of both": f"{row['one'][0] / row['seconds'][1]:.2f}x",
            }
            for row in rows
        ]
        text = f"{markdown(table)}\nOn two cards without a cache cache-dit has published {PUBLISHED:.2f}x (Ulysses).\n"
        publish(args.save_path, "sharing_predicted", text, table, rows, args.into)

    return exit_status("sharing_predicted", work)


if __name__ == "__main__":
    sys.exit(main())
