"use strict";

const { settings, prompts, cells, images } = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#2f7ed8", "#e0630f", "#2b9348", "#c8408f", "#8a63d2", "#0d98a8", "#b58900", "#d64545", "#7a8794"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon"];
const NARROW = matchMedia("(max-width: 40rem)");
const DARK = matchMedia("(prefers-color-scheme: dark)");
const COARSE = matchMedia("(pointer: coarse)");
const collator = new Intl.Collator("en", { numeric: true });

const fixed = (digits) => (value) => (Number.isFinite(value) ? value.toFixed(digits) : "∞");
const decibels = (value) => (Number.isFinite(value) ? `${value.toFixed(1)} dB` : "equal");
const times = (value) => `${value.toFixed(2)}×`;
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const SCORES = [
  { key: "psnr", title: "PSNR, dB", show: fixed(1) },
  { key: "ssim", title: "SSIM", show: fixed(4) },
  { key: "prompt_score", title: "prompt score", show: percent },
  { key: "clip_score", title: "CLIP score", show: fixed(4) },
];
const FIGURES = [
  { key: "uncached_seconds", title: "seconds uncached", show: fixed(3) },
  { key: "seconds", title: "seconds", show: fixed(3) },
  { key: "speedup", title: "speed-up", show: times },
  ...SCORES,
  { key: "steps", title: "steps", show: String },
  { key: "computed_steps", title: "computed steps", show: fixed(1) },
  { key: "skipped", title: "operations skipped", show: percent },
  { key: "tflops", title: "TFLOPs", show: (value) => String(+value.toPrecision(4)) },
  { key: "threshold", title: "threshold", show: String },
];

for (const figures of cells.flatMap((cell) => [cell, ...cell.pictures])) figures.psnr ??= Infinity;
const front = paretoFront();
let chosen = cells.indexOf(front[front.length >> 1]);

const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Plotly reads a few tags in texts; names must show as they are.
function plotText(text, longest = NARROW.matches ? 18 : 48) {
  const letters = [...text];
  const short = letters.length > longest ? [...letters.slice(0, longest - 1), "…"] : letters;
  return short.join("").replace(/&/g, "&amp;").replace(/</g, "&lt;");
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function plot(id, height, traces, layout) {
  const [back, text, line] = ["back", "text", "line"].map(colour);
  const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true };
  byId(id).style.height = `${height}px`;
  Plotly.react(
    id,
    traces,
    {
      paper_bgcolor: back,
      plot_bgcolor: back,
      font: { color: text, family: "system-ui, sans-serif", size: NARROW.matches ? 11 : 13 },
      hoverlabel: { bgcolor: back, bordercolor: line, font: { color: text }, align: "left" },
      margin: { l: 10, r: 10, t: 10, b: 10 },
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom" },
      uirevision: id,
      // A finger that moves over the plot must scroll the page.
      dragmode: COARSE.matches ? false : "zoom",
      ...layout,
      autosize: true,
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    },
    { responsive: true, displayModeBar: false },
  );
}

function paretoFront() {
  const front = [];
  for (const cell of [...cells].sort((a, b) => b.speedup - a.speedup || compare(b.psnr, a.psnr, 1))) {
    if (!front.length || cell.psnr > front[0].psnr) front.unshift(cell);
  }
  return front;
}

function drawTradeoff() {
  const finite = cells.map((cell) => cell.psnr).filter(Number.isFinite);
  const low = finite.length ? Math.min(...finite) : 40;
  const high = Math.max(...finite, low + 5);
  const tick = [1, 2, 5, 10, 20].find((step) => (high - low) / step <= 8) ?? 50;
  const first = Math.floor(low / tick) * tick;
  const ticks = [];
  for (let value = first; value < high + tick / 2; value += tick) ticks.push(value);
  // Pictures equal to the uncached ones lie one tick above all others.
  const top = ticks[ticks.length - 1] + tick;
  const height = (cell) => Math.min(cell.psnr, top);

  const cases = [...new Set(cells.map((cell) => cell.case))];
  const traces = cases.map((name, number) => {
    const members = cells.filter((cell) => cell.case === name);
    return {
      name: plotText(name, 24),
      mode: "markers",
      x: members.map((cell) => cell.speedup),
      y: members.map(height),
      customdata: members.map((cell) => cells.indexOf(cell)),
      text: members.map((cell) => `${plotText(cell.name)}<br>${times(cell.speedup)}, ${decibels(cell.psnr)}`),
      hovertemplate: "%{text}<extra></extra>",
      cliponaxis: false,
      marker: {
        color: COLOURS[number % COLOURS.length],
        symbol: SYMBOLS[number % SYMBOLS.length],
        opacity: 1,
        size: members.map((cell) => (cells[chosen] === cell ? 18 : 10)),
        line: { color: colour("text"), width: members.map((cell) => (cells[chosen] === cell ? 3 : 0)) },
      },
    };
  });

  let labelled = Infinity;
  const labels = front.map((cell) => {
    if (NARROW.matches || labelled - height(cell) < (top - first) / 25) return "";
    labelled = height(cell);
    return `\u2003${plotText(cell.name, 28)}`;
  });
  const fastest = Math.max(...cells.map((cell) => cell.speedup));
  const slowest = Math.min(...cells.map((cell) => cell.speedup));
  const width = Math.max(fastest - slowest, 0.1);
  plot(
    "tradeoff-plot",
    NARROW.matches ? 540 : 600,
    [
      {
        name: "Pareto front",
        mode: "lines+text",
        x: front.map((cell) => cell.speedup),
        y: front.map(height),
        text: labels,
        textposition: "top right",
        textfont: { color: colour("text"), size: 12 },
        line: { shape: "vh", dash: "dot", width: 1.5, color: colour("faint") },
        hoverinfo: "skip",
      },
      ...traces,
    ],
    {
      hovermode: "closest",
      xaxis: {
        title: { text: "speed-up", standoff: 10 },
        ticksuffix: "×",
        range: [slowest - 0.06 * width, fastest + (NARROW.matches ? 0.06 : 0.25) * width],
      },
      yaxis: {
        title: { text: NARROW.matches ? "PSNR, dB" : "PSNR against the uncached picture, dB" },
        tickvals: [...ticks, top],
        ticktext: [...ticks.map(String), "∞ equal"],
        range: [first - tick / 4, top + tick / 2],
      },
    },
  );
}

function drawDecisions() {
  const prompt = byId("decisions-prompt").value;
  const steps = Math.max(...cells.map((cell) => cell.steps));
  const share = (cell, step) => {
    if (step >= cell.steps) return null;
    const pictures = prompt === "" ? cell.pictures : [cell.pictures[prompt]];
    return pictures.filter((picture) => picture.reused[step] === "1").length / pictures.length;
  };
  const z = cells.map((cell) => Array.from({ length: steps }, (_, step) => share(cell, step)));
  const rows = cells.map((_, row) => row);
  plot(
    "decisions-plot",
    130 + 20 * cells.length,
    [
      {
        type: "heatmap",
        z,
        text: z.map((values, row) =>
          values.map((value, step) =>
            value === null ? "" : `${plotText(cells[row].name)}<br>step ${step}: reused ${percent(value)}`,
          ),
        ),
        hovertemplate: "%{text}<extra></extra>",
        hoverongaps: false,
        zmin: 0,
        zmax: 1,
        xgap: 1,
        ygap: 1,
        colorscale: [[0, colour("computed")], [1, colour("reused")]],
        colorbar: {
          orientation: "h",
          len: NARROW.matches ? 0.9 : 0.4,
          lenmode: "fraction",
          thickness: 12,
          x: 0,
          xanchor: "left",
          y: 1,
          yanchor: "bottom",
          tickvals: [0, 0.5, 1],
          ticktext: ["computed", prompt === "" ? "half" : "", "reused"],
          tickangle: 0,
        },
      },
    ],
    {
      margin: { l: 10, r: 10, t: 10, b: 60 },
      xaxis: { title: { text: "step" }, showgrid: false },
      yaxis: {
        tickvals: rows,
        ticktext: cells.map((cell) => plotText(cell.name)),
        range: [cells.length - 0.5, -0.5],
        showgrid: false,
      },
    },
  );
}

const deciding = cells.filter((cell) =>
  cell.pictures.some((picture) => picture.residual_diffs.some((value) => value !== null)),
);

function drawDifferences() {
  const prompt = +byId("differences-prompt").value;
  const boxes = [...byId("differences-cells").querySelectorAll("input")];
  const traces = deciding.flatMap((cell, number) => {
    if (!boxes[number].checked) return [];
    const own = COLOURS[number % COLOURS.length];
    const { residual_diffs, reused } = cell.pictures[prompt];
    const curve = {
      name: plotText(cell.name),
      legendgroup: number,
      mode: "lines+markers",
      y: residual_diffs,
      text: residual_diffs.map((value, step) => (reused[step] === "1" ? "reused" : "computed")),
      hovertemplate: "step %{x}: %{y}, %{text}",
      line: { color: own },
      marker: {
        size: 8,
        color: [...reused].map((value) => (value === "1" ? colour("back") : own)),
        line: { color: own, width: 1.5 },
      },
    };
    const threshold = {
      name: "threshold",
      legendgroup: number,
      showlegend: false,
      mode: "lines",
      x: [0, cell.steps - 1],
      y: [cell.difference_limit, cell.difference_limit],
      line: { color: own, dash: "dash", width: 1.5 },
      hoverinfo: "skip",
    };
    return cell.difference_limit === null ? [curve] : [curve, threshold];
  });
  plot("differences-plot", 420, traces, {
    showlegend: true,
    xaxis: { title: { text: "step", standoff: 10 } },
    yaxis: { title: { text: "relative difference" }, rangemode: "tozero" },
  });
}

function picture(index, alt) {
  const image = element("img", { src: images[index].shown, alt, decoding: "async" });
  // Large pictures come as WebP; enlarged small ones show their pixels.
  if (image.src.startsWith("data:image/webp")) image.className = "smooth";
  return image;
}

function enlarging(views, number) {
  const { index, title } = views[number];
  const button = element("button", { type: "button", className: "enlarge", title: "Enlarge" }, picture(index, title));
  button.onclick = () => enlarge(views, number);
  return button;
}

// A picture in its full size, in the place of the other one of its pair, so that turning over shows what differs.
function enlarge(views, number) {
  const { index, title } = views[number];
  const image = picture(index, title);
  const { full, shown } = images[index];
  const note = byId("enlarged-note");
  note.textContent = "";
  if (full !== null) {
    image.src = full;
    image.onerror = () => {
      image.onerror = null;
      image.src = shown;
      note.textContent = `Reduced: ${full} is not beside this page.`;
    };
  }
  image.onload = () => {
    // Small pictures by a whole factor, so that their pixels stay squares.
    const factor = Math.max(1, Math.floor(Math.min(innerWidth, innerHeight) * 0.7 / image.naturalHeight));
    image.width = image.naturalWidth * factor;
  };
  byId("enlarged-title").textContent = title;
  byId("enlarged-picture").replaceChildren(image);
  byId("enlarged-other").onclick = () => enlarge(views, 1 - number);
  byId("enlarged-other").textContent = number ? "See it without the cache" : "See it with this configuration";
  if (!byId("enlarged").open) byId("enlarged").showModal();
}

function pairs(cell, caption) {
  return element(
    "div",
    { className: "pairs" },
    ...cell.images.map((image, index) =>
      element(
        "figure",
        {},
        ...[0, 1].map((number) => enlarging(views(cell, index, image), number)),
        element("figcaption", {}, `${caption(index)}: ${decibels(cell.pictures[index].psnr)}`),
      ),
    ),
  );
}

// A prompt's picture without the cache, and under a configuration.
function views(cell, index, image) {
  const distance = decibels(cell.pictures[index].psnr);
  return [
    { index: cells[0].images[index], title: `uncached: ${prompts[index]}` },
    { index: image, title: `${cell.name} (${distance}): ${prompts[index]}` },
  ];
}

function definitions(entries) {
  return entries.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value)));
}

function drawChosen() {
  const cell = cells[chosen];
  const shown = FIGURES.filter(({ key }) => cell[key] !== null);
  const steps = cell.steps === cells[0].steps ? "" : ` --num_inference_steps ${cell.steps}`;
  byId("choice").value = chosen;
  byId("chosen").replaceChildren(
    element("h3", {}, cell.name),
    element("p", {}, element("code", {}, `--cache ${cell.cache}${steps}`)),
    element("dl", { className: "figures" }, ...definitions(shown.map((f) => [f.title, f.show(cell[f.key])]))),
    element("p", {}, "Left without the cache, right with this configuration:"),
    pairs(cell, (index) => prompts[index]),
  );
  byId("prompts-title").textContent = `${cell.name}, prompt by prompt`;
  table(
    "prompts-table",
    [
      { key: "index", title: "prompt", text: true, show: (index) => `${index}: ${prompts[index]}` },
      ...SCORES,
      { key: "computed", title: "computed steps", show: String },
      { key: "seconds", title: "seconds", show: fixed(3) },
    ],
    cell.pictures.map((figures) => ({ ...figures, computed: figures.reused.split("0").length - 1 })),
  );
}

function choose(index) {
  chosen = index;
  drawChosen();
  drawTradeoff();
}

function table(id, columns, rows) {
  const used = columns.filter(({ key }) => rows.some((row) => row[key] !== null));
  const lines = rows.map((row) => {
    const line = used.map(({ key, show, text }) => {
      const content = row[key] === null ? "" : show(row[key], row);
      return element("td", { className: text ? "text" : "" }, content);
    });
    return { row, node: element("tr", {}, ...line) };
  });
  const body = element("tbody", {}, ...lines.map(({ node }) => node));
  const heads = used.map(({ key, title, text }) => {
    const button = element("button", { type: "button" }, title);
    const head = element("th", { className: text ? "text" : "", scope: "col" }, button);
    button.onclick = () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      lines.sort((a, b) => compare(a.row[key], b.row[key], direction));
      body.append(...lines.map(({ node }) => node));
    };
    return head;
  });
  byId(id).replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
}

// Rows without a figure stay last in both directions.
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  return direction * (typeof a === "string" ? collator.compare(a, b) : a < b ? -1 : a > b ? 1 : 0);
}

function settingText(value) {
  if (Array.isArray(value)) return value.join(" × ");
  return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
}

function start() {
  byId("settings").append(
    ...definitions(
      Object.entries(settings)
        .filter(([, value]) => value !== null && String(value) !== "")
        .map(([name, value]) => [name.replace(/_/g, " "), settingText(value)]),
    ),
  );
  byId("enlarged-close").onclick = () => byId("enlarged").close();
  byId("enlarged").onclick = ({ target }) => target === byId("enlarged") && byId("enlarged").close();
  byId("enlarged").onkeydown = ({ key }) => {
    if (key === "ArrowLeft" || key === "ArrowRight") byId("enlarged-other").click();
  };
  for (const name of new Set(cells.map((cell) => cell.case))) {
    const group = element("optgroup", { label: name });
    cells.forEach((cell, value) => cell.case === name && group.append(element("option", { value }, cell.name)));
    byId("choice").append(group);
  }
  const options = () => prompts.map((prompt, value) => element("option", { value }, `${value}: ${prompt}`));
  byId("decisions-prompt").append(element("option", { value: "" }, "all (share of reuses)"), ...options());
  byId("differences-prompt").append(...options());
  byId("differences-cells").append(
    ...deciding.map((cell, number) =>
      element("label", {}, element("input", { type: "checkbox", checked: number < 3 }), ` ${cell.name}`),
    ),
  );
  byId("prompts").append(...cells[0].images.map((_, index) => element("li", {}, prompts[index])));
  byId("grid").append(
    ...cells.slice(1).map((cell) =>
      element(
        "article",
        {},
        element("h3", {}, `${cell.name}: ${times(cell.speedup)}, ${decibels(cell.psnr)}`),
        pairs(cell, String),
      ),
    ),
  );
  const link = (name, cell) => element("a", { href: "#tradeoff", onclick: () => choose(cells.indexOf(cell)) }, name);
  table(
    "cells-table",
    [
      { key: "name", title: "configuration", text: true, show: link },
      { key: "case", title: "case", text: true, show: String },
      ...FIGURES,
      { key: "cache", title: "--cache", text: true, show: String },
      { key: "config", title: "in full", text: true, show: String },
    ],
    cells,
  );

  const drawAll = () => {
    drawTradeoff();
    drawDecisions();
    drawDifferences();
  };
  drawChosen();
  drawAll();
  byId("choice").onchange = () => choose(+byId("choice").value);
  byId("tradeoff-plot").on("plotly_click", ({ points }) => choose(points[0].customdata));
  byId("decisions-prompt").onchange = drawDecisions;
  byId("differences").onchange = drawDifferences;
  for (const media of [NARROW, DARK]) media.onchange = drawAll;
}

start();
