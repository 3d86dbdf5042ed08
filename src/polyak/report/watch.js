"use strict";
// Draws the charts of polyak watch, in the colours that the reader prefers.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const colours = read("colours");
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw(inDark) {
  let text = JSON.stringify(read("charts"));
  if (inDark) for (const [light, other] of Object.entries(colours)) text = text.replaceAll(light, other);
  const charts = JSON.parse(text);
  for (const div of document.querySelectorAll(".chart")) {
    const chart = charts[div.id.replace(/-chart$/, "")];
    Plotly.react(div, chart.data, chart.layout, { responsive: true, displayModeBar: false });
  }
}

dark.addEventListener("change", () => draw(dark.matches));
addEventListener("beforeprint", () => draw(false));
addEventListener("afterprint", () => draw(dark.matches));
draw(dark.matches);
