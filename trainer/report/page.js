"use strict";
// The page is whole without this: it sorts the table, shows one run at a time, points out a variant in every figure, and saves figures.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // A click on a column's title sorts by it, a second one the other way round; cells without a number stay last.
  const body = document.querySelector("#table tbody");
  const titles = [...document.querySelectorAll("#table th")];
  titles.forEach((title, column) => {
    title.querySelector("button").addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      titles.forEach(t => t.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const order = title.dataset.text ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });

  // One run at a time.
  const select = document.getElementById("run");
  const runs = [...document.querySelectorAll(".run")];
  const show = () => runs.forEach(run => { run.hidden = run.id !== select.value; });
  if (runs.length > 1) {
    document.querySelector(".choice").hidden = false;
    select.addEventListener("change", show);
    show();
  }

  // The variant under the pointer, in the table or a legend, stands out in the figures of all runs.
  const marked = [...document.querySelectorAll("#all [data-v]")];
  const point = variant => marked.forEach(e => e.classList.toggle("dim", variant !== null && e.dataset.v !== variant));
  for (const e of [...body.rows, ...document.querySelectorAll("#all .key")]) {
    if (e.dataset.v === undefined) continue;  // a line of several variants
    e.addEventListener("mouseenter", () => point(e.dataset.v));
    e.addEventListener("mouseleave", () => point(null));
  }

  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  for (const figure of document.querySelectorAll("figure")) {
    const tools = figure.querySelector(".tools");
    const add = (label, action) => {
      const button = document.createElement("button");
      button.textContent = label;
      button.addEventListener("click", action);
      tools.append(" ", button);
    };
    add("SVG", () => {
      const svg = figure.querySelector("svg").cloneNode(true);
      svg.querySelectorAll(".dim").forEach(e => e.classList.remove("dim"));
      const [, , width, height] = svg.getAttribute("viewBox").split(" ");
      svg.setAttribute("width", width);
      svg.setAttribute("height", height);
      const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
      style.textContent = data.figure_style;
      svg.prepend(style);
      save(figure.id + ".svg", "image/svg+xml", new XMLSerializer().serializeToString(svg));
    });
    add("CSV", () => save(figure.id + ".csv", "text/csv", data.csv[figure.id]));
  }
})();
