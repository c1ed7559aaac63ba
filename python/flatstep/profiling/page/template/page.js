"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const choices = ["system", "light", "dark"];
  let choice = "system";

  const shown = () => (choice === "system" ? (system.matches ? "dark" : "light") : choice);

  const signs = { diamond: "◆", square: "■", "triangle-up": "▲", cross: "✚" };

  function legend(place, traces) {
    const list = place.previousElementSibling;
    list.replaceChildren();
    const rank = (trace) => trace.legendrank ?? traces.length;
    const named = traces.filter((trace) => trace.meta).sort((a, b) => rank(a) - rank(b));
    for (const { meta, mode, line, marker } of named) {
      const item = document.createElement("li");
      const sign = document.createElement("span");
      sign.textContent = mode === "lines" ? "┄" : (signs[marker.symbol] ?? "●");
      sign.style.color = mode === "lines" ? line.color : marker.color;
      item.append(sign, meta);
      list.append(item);
    }
  }

  function draw() {
    if (choice === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    button.querySelector("span").textContent = choice;
    for (const place of document.querySelectorAll(".chart")) {
      const figure = structuredClone(figures[place.dataset.chart][shown()]);
      legend(place, figure.data);
      Plotly.react(place, figure.data, figure.layout, { displayModeBar: false, responsive: true });
    }
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    choice = choices[(choices.indexOf(choice) + 1) % choices.length];
    draw();
  });
  system.addEventListener("change", draw);
  draw();

  function compare(a, b) {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  }

  for (const header of document.querySelectorAll("th")) {
    header.querySelector("button").addEventListener("click", () => {
      const column = header.cellIndex;
      const body = header.closest("table").tBodies[0];
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        const empty = (value(a) === undefined) - (value(b) === undefined);
        return empty || (down ? -1 : 1) * compare(value(a), value(b));
      });
      body.append(...rows);
    });
  }
})();
