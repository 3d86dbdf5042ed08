"use strict";
// All that the page shows of each average is computed beforehand; this only puts it in place.
const averages = JSON.parse(document.getElementById("averages").textContent);
const slider = document.getElementById("slider");
const by = (id) => document.getElementById(id);
const put = (id, attributes) => {
  const element = by(id);
  if (element) for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
};

function show(index) {
  const one = averages[index];
  for (const [id, text] of Object.entries(one.texts)) by(id).textContent = text;
  by("is-best").hidden = !one.best;
  for (const [id, d] of Object.entries(one.paths)) put(id, { d });
  for (const name of ["metric", "error", "distance"]) {
    put(`${name}-cursor`, { x1: one.x, x2: one.x });
    const y = one.heights[name];
    put(`${name}-here`, { cx: one.x, cy: y ?? "0%", visibility: y === null ? "hidden" : "visible" });
  }
  put("since", { x1: one.since, x2: one.since });
  slider.setAttribute("aria-valuetext", one.spoken);
}

document.body.classList.remove("still");
slider.addEventListener("input", () => show(Number(slider.value)));
show(Number(slider.value));
