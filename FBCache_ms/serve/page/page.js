// The page: asks the server what it serves, has it draw, and shows what comes. It stores nothing.

const part = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let served = null;
let running = null; // the AbortController of the request that is drawn
let seed = null;

const png = (base64) => `data:image/png;base64,${base64}`;

function headers() {
  const key = part("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

class Refused extends Error {}

// The answer, or an error with the server's own words.
async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (answer.ok) return answer;
  if (answer.status === 401) part("key-part").hidden = false;
  const body = await answer.json().catch(() => null);
  throw new Refused(body ? body.error.message : `the server answers ${answer.status}`);
}

// Server-sent events, each as its data.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const line = block.split("\n").find((each) => each.startsWith("data: "));
      if (!line) continue;
      const data = JSON.parse(line.slice(6));
      // A seed may be more than a number of JavaScript's can tell: it is kept as it is written.
      yield { ...data, seed_text: line.match(/"seed": (\d+)/)?.[1] };
    }
  }
}

function fill(select, names) {
  select.replaceChildren(...names.map((name) => new Option(name, name)));
}

async function learnWhatIsServed() {
  const model = (await (await ask("v1/models")).json()).data[0];
  served = model.fbcache;
  part("model").textContent = `draws with ${model.id}`;
  fill(part("size"), served.sizes);
  fill(part("preset"), [...Object.keys(served.presets), "none"]);
  part("steps").max = served.limits.num_inference_steps;
  part("steps").value = served.num_inference_steps;
  showTag();
}

function showTag() {
  const name = part("preset").value;
  part("tag").textContent = name === "none" ? "every step is computed" : served.presets[name];
}

function busy(is) {
  part("draw").disabled = is;
  part("cancel").disabled = !is;
  part("progress").hidden = !is;
}

function clear() {
  for (const id of ["uncached", "divider", "slider-part", "facts", "actions", "map-part"]) part(id).hidden = true;
  part("picture").style.clipPath = "";
  part("problem").textContent = "";
}

function show(id, base64, text) {
  const image = part(id);
  image.src = png(base64);
  image.alt = text;
  image.hidden = false;
  part("stage").classList.remove("empty");
}

async function draw(event) {
  event.preventDefault();
  if (running) return;
  clear();
  try {
    if (!served) await learnWhatIsServed();
    const prompt = part("prompt").value;
    // See events: a seed is put into the text as it is written.
    const body = JSON.stringify({
      prompt,
      size: part("size").value,
      num_inference_steps: part("steps").valueAsNumber,
      cache: part("preset").value,
      stream: true,
      fbcache: { progress: true, stats: true, compare: part("compare").checked },
    });
    const digits = part("seed").value.trim().replace(/^0+(?=\d)/, "");
    running = new AbortController();
    busy(true);
    part("progress").removeAttribute("value");
    part("status").textContent = "Waiting for the server.";
    const [width, height] = part("size").value.split("x");
    part("stage").style.aspectRatio = `${width} / ${height}`;
    const text = digits ? `${body.slice(0, -1)},"seed":${digits}}` : body;
    const answer = await ask("v1/images/generations", { method: "POST", body: text, signal: running.signal });
    for await (const data of events(answer)) take(data, prompt);
  } catch (error) {
    const cancelled = error.name === "AbortError";
    part("status").textContent = cancelled ? "Cancelled." : "";
    if (!cancelled) part("problem").textContent = error instanceof Refused ? error.message : "The server cannot be reached.";
  } finally {
    running = null;
    busy(false);
  }
}

// What one event tells.
function take(data, prompt) {
  if (data.error) throw new Refused(data.error.message);
  if (data.type === "fbcache.step") {
    const twins = part("compare").checked ? 2 : 1;
    const done = (data.uncached ? data.steps : 0) + data.step;
    part("progress").value = done / (data.steps * twins);
    if (data.b64_json && !data.uncached) {
      show("picture", data.b64_json, `Preview: ${prompt}`);
      part("picture").classList.add("preview");
    }
    if (!data.uncached) showDecisions(data);
    // A screen reader is told the first step and every quarter.
    if (data.step === 1 || data.step % Math.max(Math.ceil(data.steps / 4), 1) === 0)
      part("status").textContent = `${data.uncached ? "Uncached, step" : "Step"} ${data.step} of ${data.steps}.`;
  } else if (data.type === "image_generation.completed") {
    finish(data, prompt);
  }
}

function finish(data, prompt) {
  const { stats, compare } = data.fbcache;
  part("picture").classList.remove("preview");
  show("picture", data.b64_json, prompt);
  part("save").href = png(data.b64_json);
  part("actions").hidden = false;
  seed = data.seed_text;
  const facts = {
    Seed: seed,
    Reused: `${stats.cached_steps.length} of ${stats.cached_steps.length + stats.computed_steps.length} steps`,
    Skipped: stats.skipped === null ? "unknown" : `${(100 * stats.skipped).toFixed(1)} % of operations`,
  };
  if (compare) {
    show("uncached", compare.b64_json, `Without the cache: ${prompt}`);
    for (const id of ["divider", "slider-part"]) part(id).hidden = false;
    slide();
    facts.PSNR = compare.psnr === null ? "the same picture" : `${compare.psnr.toFixed(1)} dB`;
  }
  part("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => {
      const pair = document.createElement("div");
      for (const [tag, text] of [["dt", name], ["dd", value]]) {
        pair.append(Object.assign(document.createElement(tag), { textContent: text }));
      }
      return pair;
    }),
  );
  part("facts").hidden = false;
  const computed = new Set(stats.computed_steps);
  const steps = stats.residual_diffs.length;
  const reused = Array.from({ length: steps }, (_, step) => !computed.has(step));
  showDecisions({ steps, reused, residual_diffs: stats.residual_diffs, threshold: stats.threshold });
  part("status").textContent = `Done: ${facts.Reused} reused${compare ? `, ${facts.PSNR}` : ""}.`;
}

// The decision map: a bar a step, as high as its difference, and the threshold.
function showDecisions({ steps, reused, residual_diffs: diffs, threshold }) {
  const shape = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  // Far outliers, such as the first difference, may be cut: the table tells them.
  const known = diffs.filter((each) => each !== null).sort((a, b) => a - b);
  const usual = known.length ? known[Math.floor(0.9 * (known.length - 1))] : 1;
  const top = 1.15 * Math.max(usual, threshold ?? 0, 1e-9);
  const high = (value) => 98 * Math.min(value / top, 1);
  const bars = reused.map((each, step) => {
    const height = diffs[step] === null ? 3 : Math.max(high(diffs[step]), 1.5);
    const place = { x: step * 10 + 1, width: 8, y: 99 - height, height };
    return shape("rect", { class: each ? "reused" : "computed", ...place });
  });
  const lines = [shape("line", { class: "ground", x1: 0, x2: steps * 10, y1: 99.5, y2: 99.5 })];
  if (threshold !== null) {
    const y = 99 - high(threshold);
    lines.push(shape("line", { class: "limit", x1: 0, x2: steps * 10, y1: y, y2: y }));
  }
  const map = part("map");
  map.setAttribute("viewBox", `0 0 ${steps * 10} 100`);
  const count = reused.filter(Boolean).length;
  const limit = threshold === null ? "" : `; the threshold is ${threshold}`;
  map.setAttribute("aria-label", `${count} of ${reused.length} steps reused${limit}`);
  map.replaceChildren(...bars, ...lines);
  part("rows").replaceChildren(
    ...reused.map((each, step) => {
      const row = document.createElement("tr");
      const difference = diffs[step] === null ? "not compared" : diffs[step].toFixed(3);
      for (const text of [step + 1, each ? "reused" : "computed", difference]) row.insertCell().textContent = text;
      return row;
    }),
  );
  part("map-part").hidden = false;
}

function slide() {
  const share = part("slider").value;
  part("picture").style.clipPath = `inset(0 ${100 - share}% 0 0)`;
  part("divider").style.left = `${share}%`;
  part("slider").setAttribute("aria-valuetext", `${share} % with the cache`);
}

part("form").addEventListener("submit", draw);
part("cancel").addEventListener("click", () => running?.abort());
part("preset").addEventListener("change", showTag);
part("slider").addEventListener("input", slide);
part("again").addEventListener("click", () => {
  part("seed").value = seed;
  part("seed").focus();
});
part("key").addEventListener("change", () => learnWhatIsServed().catch(() => {}));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("form").requestSubmit();
});
learnWhatIsServed().catch((error) => {
  part("model").textContent = error instanceof Refused ? error.message : "the server cannot be reached";
});
