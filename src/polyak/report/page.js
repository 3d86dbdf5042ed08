"use strict";
// The page contains all numbers. This script draws the charts, and updates what follows the slider and the lists.
const by = (id) => document.getElementById(id);
const read = (id) => JSON.parse(by(id).textContent);
const sweeps = read("sweeps");
const colours = read("colours");
const slider = by("slider");
const dark = matchMedia("(prefers-color-scheme: dark)");
// The lists are there only if there is a choice.
const list = (name) => document.getElementById(`pick-${name}`);
const picked = (name, otherwise) => list(name)?.value ?? otherwise;
const sweep = () => sweeps[Number(picked("sweep", 0))];
const metric = () => picked("metric", "metric");
const keyOf = (name) => (name === "metric" ? metric() : name);
const clickable = ["metric", "error", "distance"];

function draw(inDark) {
  let text = JSON.stringify(sweep().charts);
  if (inDark) for (const [light, other] of Object.entries(colours)) text = text.replaceAll(light, other);
  const charts = JSON.parse(text);
  for (const div of document.querySelectorAll(".chart")) {
    const name = div.id.replace(/-chart$/, "");
    const chart = charts[keyOf(name)];
    if (name === "metric") scaled(chart);
    Plotly.react(div, chart.data, chart.layout, { responsive: true, displayModeBar: false });
    if (clickable.includes(name) && !div.listens) {
      div.on("plotly_click", (event) => choose(event.points[0].x));
      div.listens = true;
    }
  }
  show(Number(slider.value));
}

// Set the axis of the metric to the chosen scale, or to the nearest one that this metric has.
function scaled(chart) {
  const scales = sweep().scales[metric()];
  const wanted = picked("scale", "near");
  for (const option of list("scale")?.options ?? []) option.disabled = scales[option.value] === null;
  const scale = scales[wanted] === null ? "all" : wanted;
  Object.assign(chart.layout.yaxis, { type: scale === "log" ? "log" : "linear", range: scales[scale] });
  if (list("scale")) list("scale").value = scale;
}

// Move the slider to the average nearest to a half-life.
function choose(x) {
  const far = sweep().averages.map((one) => Math.abs(Math.log(one.x / x)));
  slider.value = far.indexOf(Math.min(...far));
  show(Number(slider.value));
}

// Give traces, by uid, new data, and move the vertical line.
function move(name, cursor, traces) {
  const chart = by(`${name}-chart`);
  const indices = Object.keys(traces).map((uid) => chart.data.findIndex((trace) => trace.uid === uid));
  const data = { x: Object.values(traces).map((one) => one.x), y: Object.values(traces).map((one) => one.y) };
  Plotly.update(chart, data, { "shapes[0].x0": cursor, "shapes[0].x1": cursor }, indices);
}

function show(index) {
  const one = sweep().averages[index];
  for (const [id, text] of Object.entries(one.texts)) by(id).textContent = text;
  by("is-best").hidden = !one.best;
  slider.setAttribute("aria-valuetext", one.spoken);
  for (const name of clickable) {
    move(name, one.x, { chosen: { x: [one.x], y: [one.heights[keyOf(name)]] } });
  }
  const heights = [...one.steps, 0];
  const edges = sweep().edges;
  move("profile", one.since, {
    older: { x: edges.map((edge) => Math.min(edge, one.since)), y: heights },
    newer: { x: edges.map((edge) => Math.max(edge, one.since)), y: heights },
    asked: { x: by("profile-chart").data.find((trace) => trace.uid === "asked").x, y: one.curve },
  });
}

document.body.classList.remove("still");
slider.addEventListener("input", () => show(Number(slider.value)));
list("sweep")?.addEventListener("change", () => {
  slider.max = sweep().averages.length - 1;
  slider.value = sweep().best;
  draw(dark.matches);
});
list("metric")?.addEventListener("change", () => {
  by("metric-heading").textContent = `${list("metric").selectedOptions[0].text} against half-life`;
  if (list("scale")) list("scale").value = "near";
  draw(dark.matches);
});
list("scale")?.addEventListener("change", () => draw(dark.matches));
dark.addEventListener("change", () => draw(dark.matches));
addEventListener("beforeprint", () => draw(false));
addEventListener("afterprint", () => draw(dark.matches));
draw(dark.matches);
