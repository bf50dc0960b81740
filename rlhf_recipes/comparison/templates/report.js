"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const buttons = [...document.querySelectorAll("[data-group]")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");

// The style sheet holds the colours of both schemes. A variable in a figure becomes the value that holds now.
function coloured(figure) {
  const values = getComputedStyle(document.documentElement);
  const text = JSON.stringify(figure).replace(/"var\((--[a-z0-9]+)\)"/g, (_, name) => JSON.stringify(values.getPropertyValue(name).trim()));
  return JSON.parse(text);
}

function layout(own) {
  const axis = { gridcolor: "var(--line)", linecolor: "var(--grid)", zeroline: false, automargin: true, fixedrange: narrow.matches };
  return {
    autosize: true,
    showlegend: false,
    hovermode: "closest",
    dragmode: narrow.matches ? false : "zoom", // a finger scrolls the page
    uirevision: "same", // a redrawn figure keeps its zoom
    margin: { l: 8, r: 12, t: narrow.matches ? 8 : 30, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: "var(--ink)", size: 12, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: "var(--card)", bordercolor: "var(--quiet)", font: { color: "var(--ink)" }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "var(--quiet)", activecolor: "var(--accent)" },
    ...own,
    xaxis: { ...axis, ...own.xaxis },
    yaxis: { ...axis, ...own.yaxis },
  };
}

function draw() {
  const off = new Set(buttons.filter((button) => button.ariaPressed === "false").map((button) => Number(button.dataset.group)));
  figures.forEach((figure, number) => {
    const data = figure.data.map((trace) => ({ ...trace, visible: !off.has(trace.meta.group) }));
    const drawn = coloured({ data, layout: layout(figure.layout) });
    const options = {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false, // by default plotly.js offers to upload the figure
      plotlyServerURL: "",
      displayModeBar: narrow.matches ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: figure.title },
    };
    Plotly.react(`figure${number}`, drawn.data, drawn.layout, options);
  });
}

function press(chosen, on) {
  for (const button of chosen) button.ariaPressed = String(on);
  draw();
}

for (const button of buttons) button.addEventListener("click", () => press([button], button.ariaPressed === "false"));
for (const [id, on] of [["all", true], ["none", false]]) {
  document.getElementById(id)?.addEventListener("click", () => press(buttons, on));
}
for (const media of [dark, narrow, matchMedia("print")]) media.addEventListener("change", draw);
draw();
