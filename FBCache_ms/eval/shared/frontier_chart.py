"""The frontier as one picture: nearness to the uncached pictures over three costs."""

from FBCache_ms.cache.gates import deciding, plan, refreshed_steps
from FBCache_ms.config import CacheConfig
from FBCache_ms.eval.shared.published import ATLAS, SHAPES, best, predict
from FBCache_ms.predict.roofline import WHOLE_LOOP

COSTS = {
    "flux_dev_tflops": "operations of FLUX.1-dev, 10^12",
    "flux_dev_seconds": "predicted seconds of FLUX.1-dev, Atlas 800T A2",
    "seconds": "seconds of the embedded checkpoint, this CPU",
}
"""A cell's cost and what the axis says: 1024 x 1024 for FLUX.1-dev, with as many computed steps as here."""

LINES = {"fewer steps": "#7a8794", "FBCache": "#2f7ed8", "learnt": "#e0630f", "fitted": "#2b9348"}
"""The families that are lines, and their colours; all others are dots."""

OTHERS = "#c9d1d9"
HEIGHT = 420


def add_costs(cells, branches):
    """Writes into each cell what FLUX.1-dev takes with as many computed steps, each of so many branches."""
    device = best(ATLAS).device
    for cell in cells:
        config, steps = CacheConfig.named(cell["cache"]), cell["steps"]
        computed = min(round(cell["computed_steps"]), steps)
        cell["flux_dev_tflops"] = branches * tflops(config, steps, cell["computed_steps"], SHAPES.costs)
        gates = len(deciding(plan(config)))
        cell["flux_dev_seconds"] = branches * predict(device, WHOLE_LOOP, config, steps, gates * (computed,))


def tflops(config, steps, computed, costs):
    """The 10^12 operations of a generation that computed so many of its steps, each of these StepCosts."""
    saved = -refreshed_steps(config, steps) * costs.refresh
    for gate in plan(config):
        skipped = costs.total if gate.whole_model else costs.of_blocks(*gate.span(costs.doubles, costs.singles))
        saved += (steps - computed) * skipped
    return (steps * costs.total - saved) / 1e12


def chart_page(title, cells):
    """The page's text: a chart for each cost, PSNR upwards."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(COSTS), shared_yaxes=True, horizontal_spacing=0.03)
    names = dict.fromkeys(cell["case"] for cell in cells if cell["case"] not in LINES)
    dots = [cell for cell in cells if cell["case"] in names]
    for column, (cost, text) in enumerate(COSTS.items(), 1):

        def add(name, chosen, colour, mode):
            chosen = sorted((cell for cell in chosen if cell["psnr"] != float("inf")), key=lambda cell: cell[cost])
            trace = graph_objects.Scatter(
                name=name,
                x=[cell[cost] for cell in chosen],
                y=[cell["psnr"] for cell in chosen],
                text=[cell["name"] for cell in chosen],
                mode=mode,
                line_color=colour,
                marker_size=7,
                showlegend=column == 1,
            )
            figure.add_trace(trace, 1, column)

        add("all others", dots, OTHERS, "markers")
        for name, colour in LINES.items():
            add(name, [cell for cell in cells if cell["case"] == name], colour, "lines+markers")
        figure.update_xaxes(title_text=text, rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title_text="PSNR (dB)", row=1, col=1)
    figure.update_layout(
        title=title,
        template="plotly_white",
        height=HEIGHT,
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": -0.2},
    )
    config = {"displayModeBar": False, "responsive": True}
    return figure.to_html(include_plotlyjs=True, div_id="frontier", default_height=HEIGHT, config=config)
