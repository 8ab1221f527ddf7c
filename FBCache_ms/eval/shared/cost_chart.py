"""The chart of the cost model's predictions: one HTML page that needs no network."""

PUBLISHED, PREDICTED, OURS, REUSED = "#7a8794", "#2f7ed8", "#2b9348", "#e0630f"
COLUMNS, HEIGHT = 2, 1100
"""Charts beside each other, and the page's height in pixels; as wide as the window."""


def chart_page(title, rows, parts, growth):
    """The page's text.

    Args:
        title: of the page.
        rows: {"published", "predicted" or "ours, predicted": {row: seconds}}.
        parts: {part: predicted seconds of a reused step}.
        growth: a list of dictionaries as cost_model.growth gives it.
    """
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    kinds = list(dict.fromkeys(row["grows"] for row in growth))
    titles = ["Published and predicted", "A reused step of ours, predicted", *(f"Predicted: {kind}" for kind in kinds)]
    figure = make_subplots(3, COLUMNS, subplot_titles=titles, vertical_spacing=0.09, horizontal_spacing=0.17)
    for (name, seconds), colour in zip(rows.items(), (PUBLISHED, PREDICTED, OURS)):
        bars = graph_objects.Bar(name=name, x=list(seconds), y=list(seconds.values()), marker_color=colour)
        figure.add_trace(bars, 1, 1)
    milliseconds = [1000 * value for value in parts.values()]
    pieces = graph_objects.Bar(
        name="a reused step, predicted",
        x=milliseconds,
        y=list(parts),
        orientation="h",
        marker_color=REUSED,
        showlegend=False,
    )
    figure.add_trace(pieces, 1, 2)
    figure.update_yaxes(rangemode="tozero", title_text="seconds")
    figure.update_yaxes(autorange="reversed", title_text="", row=1, col=2)
    figure.update_xaxes(title_text="milliseconds", row=1, col=2)
    for place, kind in enumerate(kinds, 2):
        here = {"row": place // COLUMNS + 1, "col": place % COLUMNS + 1}
        points = [row for row in growth if row["grows"] == kind]
        curves = {
            "no cache, predicted": (PREDICTED, [row["predicted_uncached"] for row in points]),
            "cached, predicted": (OURS, [row["predicted_cached"] for row in points]),
        }
        if kind == "order":
            reused = [1000 * row["predicted_reused_step"] for row in points]
            curves = {"a reused step, predicted": (REUSED, reused)}
            figure.update_yaxes(title_text="milliseconds", **here)
        for name, (colour, values) in curves.items():
            line = graph_objects.Scatter(
                name=name,
                x=[row["value"] for row in points],
                y=values,
                mode="lines+markers",
                line_color=colour,
                showlegend=place == 2 or kind == "order",
            )
            figure.add_trace(line, **here)
        figure.update_xaxes(tickvals=[row["value"] for row in points], **here)
    figure.update_layout(
        title=title,
        template="plotly_white",
        barmode="group",
        height=HEIGHT,
        margin={"l": 60, "r": 30},
        legend={"orientation": "h", "y": -0.05},
    )
    config = {"displayModeBar": False, "responsive": True}
    return figure.to_html(include_plotlyjs=True, div_id="predicted", default_height=HEIGHT, config=config)
