"use strict";
// The page contains all numbers. This script draws the charts, and updates what follows the slider.
const by = (id) => document.getElementById(id);
const read = (id) => JSON.parse(by(id).textContent);
const averages = read("averages");
const colours = read("colours");
const edges = read("edges");
const slider = by("slider");
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw(inDark) {
  let text = by("charts").textContent;
  if (inDark) for (const [light, other] of Object.entries(colours)) text = text.replaceAll(light, other);
  for (const [name, chart] of Object.entries(JSON.parse(text))) {
    Plotly.react(by(`${name}-chart`), chart.data, chart.layout, { responsive: true, displayModeBar: false });
  }
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
  const one = averages[index];
  for (const [id, text] of Object.entries(one.texts)) by(id).textContent = text;
  by("is-best").hidden = !one.best;
  slider.setAttribute("aria-valuetext", one.spoken);
  for (const [name, height] of Object.entries(one.heights)) {
    move(name, one.x, { chosen: { x: [one.x], y: [height] } });
  }
  const heights = [...one.steps, 0];
  move("profile", one.since, {
    older: { x: edges.map((edge) => Math.min(edge, one.since)), y: heights },
    newer: { x: edges.map((edge) => Math.max(edge, one.since)), y: heights },
    asked: { x: by("profile-chart").data.find((trace) => trace.uid === "asked").x, y: one.curve },
  });
}

document.body.classList.remove("still");
slider.addEventListener("input", () => show(Number(slider.value)));
dark.addEventListener("change", () => draw(dark.matches));
addEventListener("beforeprint", () => draw(false));
addEventListener("afterprint", () => draw(dark.matches));
draw(dark.matches);
