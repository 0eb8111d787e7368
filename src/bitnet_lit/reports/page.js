"use strict";
// Draws the plots of a report from the JSON in #data, with plotly.js. Each plot is drawn anew when a switch changes.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows, runs = data.runs;
const narrow = () => window.innerWidth < 640;
// A touch screen has no hovering: the buttons of a plot stay, above it. Dragging scrolls the page until one is chosen.
const isTouch = window.matchMedia("(pointer: coarse)").matches;

const TOP = isTouch ? 36 : 12;

// Plotly reads <b> and %{x} in texts. Names are shown as they are.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/%\{/g, "%&#123;");

// ---- Colours: Okabe and Ito's, which colour-blind people can tell apart. A quant has one colour everywhere. ----

const COLOURS = {
  light: { none: "#6b6e73", b158: "#0072b2", b1: "#d55e00", b158_row: "#009e73", b158_group: "#b5609a" },
  dark: { none: "#a9adb4", b158: "#56b4e9", b1: "#f2894a", b158_row: "#35c79b", b158_group: "#e09bc6" },
};
const FURTHER = { light: ["#c98b00", "#4a9cc9", "#7a5195", "#8c6d31"], dark: ["#f0c04a", "#9ad0f5", "#b79ad8", "#c9a96a"] };
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star"];

const unique = (values) => [...new Set(values)];
const quants = unique(rows.map((row) => row.quant));
const rests = unique(rows.map((row) => row.rest));
const unknown = quants.filter((quant) => !(quant in COLOURS.light));
const theme = () => document.documentElement.dataset.theme;

function colour(row) {
  const known = COLOURS[theme()], further = FURTHER[theme()];
  if (quants.length < 2 && rows.length > 1) {  // the quant does not tell the rows apart
    const all = [...Object.values(known), ...further];
    return all[(rows.indexOf(row) + 1) % all.length];
  }
  return known[row.quant] || further[unknown.indexOf(row.quant) % further.length];
}
// Where the quants differ, dashes and symbols tell the rest of the keys apart.
const variant = (row) => (quants.length < 2 ? 0 : rests.indexOf(row.rest));
const dash = (row) => DASHES[variant(row) % DASHES.length];
const symbol = (row) => SYMBOLS[variant(row) % SYMBOLS.length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const fade = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

// ---- Switches ----

const state = {};

// Adds a row of buttons. `options` are [value, text]; one that does not apply is left out by the caller.
function addSwitch(place, key, title, options, onChange) {
  state[key] = options[0] && options[0][0];
  if (options.length < 2) return;
  const field = document.createElement("div"), group = document.createElement("span");
  field.className = "field";
  field.append(title, group);
  group.className = "switch";
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", title || key);
  for (const [value, text] of options) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.dataset.value = value;
    button.setAttribute("aria-pressed", String(value === state[key]));
    button.onclick = () => {
      state[key] = value;
      for (const each of group.children) each.setAttribute("aria-pressed", String(each === button));
      onChange();
    };
    group.append(button);
  }
  place.append(field);
}

function addSelect(place, key, title, names, onChange) {
  state[key] = 0;
  if (names.length < 2) return;
  const label = document.createElement("label"), select = document.createElement("select");
  label.className = "field";
  label.append(title, select);
  names.forEach((name, i) => select.append(new Option(name, i)));
  select.onchange = () => { state[key] = Number(select.value); onChange(); };
  place.append(label);
}

const switchesOf = (id) => document.querySelector(`#${id} .switches`);
const plotOf = (id) => document.querySelector(`#${id} .plot`);

// ---- Drawing ----

function axis(title, more) {
  return {
    title: { text: title, font: { size: 12, color: css("--quiet") }, standoff: 8 }, gridcolor: css("--grid"),
    linecolor: css("--line"), zerolinecolor: css("--line"), tickfont: { size: 11, color: css("--quiet") }, automargin: true, ...more,
  };
}

function draw(place, traces, layout) {
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: narrow() ? 320 : 400, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, color: css("--text"), size: 12 },
    margin: { l: 56, r: 12, t: TOP, b: 44 }, showlegend: false, dragmode: isTouch ? false : "zoom",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text"), size: 12 }, align: "left" },
    legend: { orientation: "h", y: -0.18, yanchor: "top", font: { size: 11 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--accent") },
  };
  return Plotly.react(place, traces, { ...base, ...layout }, {
    responsive: true, displaylogo: false, doubleClick: "reset",
    displayModeBar: isTouch ? true : "hover",
    modeBarButtons: [["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"], ...(isTouch ? [] : [["toImage"]])],
  });
}

const lossName = (name) => ({ "val/loss": "validation loss (nats per token)", "train/loss": "training loss (nats per token)",
  "val/bits_per_byte": "bits per byte", "val/perplexity": "perplexity", "val/accuracy": "accuracy" }[name] || plain(name));

// Seconds, minutes or hours, by the longest run.
function timeUnit() {
  const most = Math.max(0, ...runs.map((run) => run.seconds || 0));
  return most > 7200 ? [3600, "hours"] : most > 180 ? [60, "minutes"] : [1, "seconds"];
}

const X_TITLES = { tokens: () => "tokens", steps: () => "optimizer steps", seconds: () => `training time (${timeUnit()[1]})` };

// The points of a curve on the chosen x axis; null where the run does not say.
function points(curve, tokensPerStep, x) {
  if (!curve) return null;
  if (x === "steps") return { x: curve.steps, y: curve.values };
  if (x === "tokens") return tokensPerStep ? { x: curve.steps.map((step) => step * tokensPerStep), y: curve.values } : null;
  return curve.seconds ? { x: curve.seconds.map((second) => second / timeUnit()[0]), y: curve.values } : null;
}

function valueAt(line, x) {
  let i = line.x.findIndex((each) => each >= x);
  if (i === 0 || line.x[i] === x) return line.y[i];
  const share = (x - line.x[i - 1]) / (line.x[i] - line.x[i - 1]);
  return line.y[i - 1] + share * (line.y[i] - line.y[i - 1]);
}

// The mean of several curves where all of them are, at the points of the first, with the least and the largest value.
function meanOf(lines) {
  const whole = lines.map((line) => {
    const kept = line.y.map((y, i) => (y === null ? -1 : i)).filter((i) => i >= 0);
    return { x: kept.map((i) => line.x[i]), y: kept.map((i) => line.y[i]) };
  }).filter((line) => line.x.length);
  if (!whole.length) return null;
  const start = Math.max(...whole.map((line) => line.x[0])), end = Math.min(...whole.map((line) => line.x.at(-1)));
  const x = unique([start, ...whole[0].x.filter((each) => each > start && each < end), end]).filter((each) => each <= end);
  const values = x.map((each) => whole.map((line) => valueAt(line, each)));
  return { x, y: values.map((v) => v.reduce((a, b) => a + b, 0) / v.length), low: values.map((v) => Math.min(...v)), high: values.map((v) => Math.max(...v)) };
}

// Texts at the ends of the lines, moved apart where they would overlap.
function endLabels(ends, range, pixels, value) {
  const perPixel = (range[1] - range[0]) / pixels;
  let last = -Infinity;
  return [...ends].sort((a, b) => a.y - b.y).map((end) => {
    const wanted = value(end.y) / perPixel, at = Math.max(wanted, last + 15);
    last = at;
    return { x: 1, xref: "paper", xanchor: "left", xshift: 8, y: value(end.y), yref: "y", yanchor: "middle", yshift: at - wanted, text: plain(end.row.name),
      showarrow: false, font: { size: 12, color: colour(end.row) } };
  });
}

function drawCurves() {
  const metric = state.split, x = state.x, isMean = state.lines === "mean", traces = [], ends = [];
  const y = { low: Infinity, high: -Infinity };
  for (const row of rows) {
    const index = rows.indexOf(row);
    const lines = runs.filter((run) => run.row === index).map((run) => [run, points(run.curves[metric], run.tokensPerStep, x)]).filter(([, line]) => line);
    if (!lines.length) continue;
    const style = { color: colour(row), width: 2, dash: dash(row) };
    const hover = `<b>${plain(row.name)}</b>`;
    const mean = isMean && lines.length > 1 ? meanOf(lines.map(([, line]) => line)) : null;
    const marks = metric === "train/loss" ? "lines" : "lines+markers";
    const shown = mean ? [["mean of " + lines.length, mean]] : lines.map(([run, line]) => [run.label, line]);
    if (mean) {
      traces.push({ x: [...mean.x, ...[...mean.x].reverse()], y: [...mean.high, ...[...mean.low].reverse()], fill: "toself",
        fillcolor: fade(style.color, 0.15), line: { width: 0 }, mode: "lines", hoverinfo: "skip", showlegend: false });
    }
    shown.forEach(([label, line], i) => {
      traces.push({ x: line.x, y: line.y, mode: marks, line: { ...style, width: mean || lines.length === 1 ? 2 : 1.3 },
        marker: { size: line.x.length > 1 ? 4 : 9, symbol: symbol(row) }, name: plain(row.name), legendgroup: String(index), showlegend: i === 0,
        text: line.x.map(() => `${hover} ${plain(label)}`), hovertemplate: "%{text}<br>%{x:.4s}: %{y:.4f}<extra></extra>" });
      for (const each of line.y) if (each !== null) { y.low = Math.min(y.low, each); y.high = Math.max(y.high, each); }
    });
    const last = shown[0][1].y.filter((each) => each !== null).at(-1);
    if (last !== undefined) ends.push({ row, y: last });
  }
  const direct = !narrow() && ends.length <= 10, isLog = state.y === "log";
  const longest = Math.max(0, ...ends.map((end) => end.row.name.length));
  const height = narrow() ? 340 : 420, value = (each) => (isLog ? Math.log10(each) : each);
  if (isLog && y.low <= 0) y.low = y.high / 1e3;
  if (!(y.high > -Infinity)) y.low = y.high = 1;  // no run has the curve on this axis
  const space = 0.05 * (value(y.high) - value(y.low)) || 0.1, range = [value(y.low) - space, value(y.high) + space];
  draw(plotOf("curves"), traces, {
    height, xaxis: axis(X_TITLES[x](), { rangemode: "tozero" }), yaxis: axis(lossName(metric), { range, ...(isLog ? { type: "log", tickvals: logTicks(10 ** range[0], 10 ** range[1]) } : { type: "linear" }) }),
    showlegend: !direct && ends.length > 1 && ends.length <= 24,
    margin: { l: 56, r: direct ? Math.min(230, 24 + 7 * longest) : 12, t: TOP, b: 44 },
    annotations: direct ? endLabels(ends, range, height - TOP - 44, value) : [],
  });
}

// Ticks of a logarithmic axis at 1, 2, 5, 10, ..., or at fewer of them where there is little room.
function logTicks(low, high) {
  if (!(low > 0 && high < Infinity)) return [];
  const all = [[1, 2, 5], [1, 3], [1]].map((digits) => {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of digits) if (digit * 10 ** power >= low && digit * 10 ** power <= high) ticks.push(digit * 10 ** power);
    }
    return ticks;
  });
  return all.find((ticks) => ticks.length <= (narrow() ? 5 : 10)) || all[2];
}

// A place for the text of each dot, above or beside it, where it covers no other text and no dot. Lengths are in pixels.
function placed(dots, height) {
  const taken = dots.map((dot) => ({ x: dot.left, y: dot.top, width: 12, height: 12 }));
  const isFree = (box) => taken.every((other) => Math.abs(box.x - other.x) * 2 >= box.width + other.width || Math.abs(box.y - other.y) * 2 >= box.height + other.height);
  return dots.map((dot) => {
    const side = dot.width / 2 + 14;
    const places = [[0, 17], [0, -17], [side, 0], [-side, 0], [0, 34], [0, -34], [side, 17], [-side, -17]];
    const [dx, dy] = places.find(([x, y]) => isFree({ x: dot.left + x, y: dot.top + y, width: dot.width, height })) || places[0];
    taken.push({ x: dot.left + dx, y: dot.top + dy, width: dot.width, height });
    return [dot, dx, dy];
  });
}

const FINALS = {
  bytes: ["bytes of weights", (row) => row.bytes], bits: ["bits per weight of the projections", (row) => row.bits],
  seconds: [() => `training time (${timeUnit()[1]})`, (row) => row.seconds / timeUnit()[0]], parameters: ["parameters", (row) => row.parameters],
};

function drawFinal() {
  const [title, xOf] = FINALS[state.against], traces = [], annotations = [];
  const isLog = state.against !== "seconds";
  const shown = rows.filter((row) => row.loss && xOf(row));
  for (const quant of state.against === "bytes" || state.against === "parameters" ? quants : []) {
    const same = shown.filter((row) => row.quant === quant).sort((a, b) => xOf(a) - xOf(b));
    if (quants.length > 1 && unique(same.map(xOf)).length > 1 && unique(same.map(xOf)).length === same.length) {
      traces.push({ x: same.map(xOf), y: same.map((row) => row.loss[0]), mode: "lines", line: { color: fade(colour(same[0]), 0.45), width: 1.5 }, hoverinfo: "skip" });
    }
  }
  for (const row of shown) {
    const own = runs.filter((run) => run.row === rows.indexOf(row) && run.final !== null);
    const x = own.map((run) => (state.against === "seconds" ? (run.seconds || 0) / timeUnit()[0] : xOf(row)));
    traces.push({ x, y: own.map((run) => run.final), mode: "markers", marker: { color: fade(colour(row), 0.45), size: 6, symbol: symbol(row) },
      text: own.map((run) => `<b>${plain(row.name)}</b> ${plain(run.label)}`), hovertemplate: "%{text}<br>%{x:.4s}: %{y:.4f}<extra></extra>" });
    const [mean, half, count] = row.loss;
    const interval = half === null ? "" : ` ± ${half.toFixed(4)} (95 %)`;
    traces.push({ x: [xOf(row)], y: [mean], mode: "markers", marker: { color: colour(row), size: 12, symbol: symbol(row) },
      text: [`<b>${plain(row.name)}</b> mean of ${count}<br>${mean.toFixed(4)}${interval}`], hovertemplate: "%{text}<br>%{x:.4s}<extra></extra>" });
  }
  const ticks = state.against === "bits" ? { tickvals: [1, 1.58, 2, 4, 8, 16, 32], ticktext: ["1", "1.58", "2", "4", "8", "16", "32"] } : {};
  const units = state.against === "bytes" ? { tickformat: "~s", ticksuffix: "B" } : { tickformat: "~s" };
  const xs = shown.map(xOf), low = isLog ? Math.min(...xs) / 1.6 : 0, high = Math.max(...xs) * (isLog ? 1.6 : 1.15);
  const range = isLog ? [Math.log10(low), Math.log10(high)] : [low, high];
  const ys = runs.filter((run) => shown.includes(rows[run.row]) && run.final !== null).map((run) => run.final);
  const space = 0.12 * (Math.max(...ys) - Math.min(...ys)) || 0.1, yRange = [Math.min(...ys) - space, Math.max(...ys) + space];
  const place = plotOf("final"), height = narrow() ? 320 : 400, size = narrow() ? 10 : 12;
  const across = (place.clientWidth - 76) / (range[1] - range[0]), up = (height - TOP - 44) / (yRange[1] - yRange[0]);
  const dots = shown.map((row) => {
    const x = isLog ? Math.log10(xOf(row)) : xOf(row);
    return { row, x, y: row.loss[0], left: (x - range[0]) * across, top: (row.loss[0] - yRange[0]) * up, width: 0.58 * size * row.name.length };
  });
  if (shown.length <= 12) {
    placed(dots, size + 4).forEach(([dot, dx, dy]) => annotations.push({ x: dot.x, y: dot.y, text: plain(dot.row.name), showarrow: false,
      xshift: dx, yshift: dy, font: { size, color: colour(dot.row) } }));
  }
  draw(place, traces, {
    height, annotations, xaxis: axis(typeof title === "function" ? title() : title, { type: isLog ? "log" : "linear", range, ...units, ...(isLog ? { tickvals: logTicks(low, high) } : {}), ...ticks }),
    yaxis: axis(lossName(data.metric), { range: yRange }),
  });
}

function drawGaps() {
  const shown = rows.filter((row) => row[state.gap].estimate).reverse();
  const means = shown.map((row) => row[state.gap].estimate[0]);
  const halves = shown.map((row) => row[state.gap].estimate[1] || 0);
  const names = shown.map((row) => plain(row.name));
  draw(plotOf("gaps"), shown.map((row, i) => ({
    x: [means[i]], y: [names[i]], mode: "markers", marker: { color: colour(row), size: 11, symbol: symbol(row) },
    error_x: { type: "data", array: [halves[i]], color: colour(row), thickness: 2, width: 6 },
    text: [`<b>${names[i]}</b><br>${means[i].toFixed(4)}${halves[i] ? ` ± ${halves[i].toFixed(4)} (95 %)` : ""}, ${row[state.gap].estimate[2]} pairs`],
    hovertemplate: "%{text}<extra></extra>",
  })), {
    height: 110 + 34 * shown.length, xaxis: axis(data.metric.endsWith("loss") ? "difference in loss (nats per token)" : `difference in ${lossName(data.metric)}`, { rangemode: "tozero", zeroline: true, zerolinecolor: css("--quiet"), zerolinewidth: 1 }),
    yaxis: axis("", { type: "category", showgrid: false, tickfont: { size: 12, color: css("--text") } }),
  });
}

const SHARES = [["minus", "−1", { light: "#0072b2", dark: "#56b4e9" }], ["zero", "0", { light: "#c9ccd1", dark: "#4b4f57" }], ["plus", "+1", { light: "#e69f00", dark: "#e0a93b" }]];
const MATRICES = { weight_scale: ["scale of the weights", ".3e"], zero: ["share of zeros", ".3f"], flip_rate: ["share of codes that flipped since the last validation", ".4f"] };

function drawHealth() {
  const health = data.health[state.run];
  const x = health.tokensPerStep ? "tokens" : "steps", xaxis = () => axis(x === "tokens" ? "tokens" : "optimizer steps");
  const of = (figure) => points(health[figure], health.tokensPerStep, x) || { x: [], y: [] };
  const height = narrow() ? 250 : 280;
  draw(document.getElementById("shares"), SHARES.map(([figure, name, colours]) => ({
    ...of(figure), name, stackgroup: "codes", mode: health.zero.steps.length > 1 ? "lines" : "lines+markers", line: { width: 0.5, color: colours[theme()] }, fillcolor: colours[theme()],
    hovertemplate: `code ${name}: %{y:.3f}<extra></extra>`,
  })), { height, hovermode: "x", xaxis: xaxis(), yaxis: axis("share of the codes", { range: [0, 1] }), showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, margin: { l: 56, r: 12, t: TOP + 20, b: 44 } });
  document.getElementById("flips").hidden = !of("flip_rate").x.length;  // the first validation has none
  draw(document.getElementById("flips"), [{ ...of("flip_rate"), mode: "lines+markers", line: { color: css("--accent"), width: 2 }, marker: { size: 5 },
    hovertemplate: "%{x:.4s}: %{y:.4f}<extra></extra>" }],
    { height, xaxis: xaxis(), yaxis: axis("flips since the last validation", { rangemode: "tozero" }), margin: { l: 56, r: 12, t: TOP + 20, b: 44 } });
  const matrices = health.matrices, place = document.getElementById("matrices");
  place.hidden = document.getElementById("matrix-switches").hidden = !matrices;
  if (!matrices) return;
  const [title, format] = MATRICES[state.matrix], names = matrices.names.map(plain);
  const at = health.tokensPerStep ? matrices.steps.map((step) => step * health.tokensPerStep) : matrices.steps;
  draw(place, [{ type: "heatmap", x: at, y: names, z: matrices[state.matrix], colorscale: "Cividis", hoverongaps: false,
    colorbar: { thickness: 10, tickfont: { size: 10, color: css("--quiet") }, outlinewidth: 0, tickformat: "~g" },
    hovertemplate: `%{y}<br>%{x:.4s}: %{z:${format}}<extra></extra>` }],
    { height: Math.min(900, Math.max(260, 90 + 13 * names.length)), xaxis: xaxis(),
      yaxis: axis("", { type: "category", autorange: "reversed", tickfont: { size: 10, color: css("--quiet") }, showgrid: false }),
      title: { text: `${title}, one line for each matrix`, font: { size: 13 }, x: 0, xanchor: "left", pad: { l: 4 } }, margin: { l: 56, r: 12, t: TOP + 26, b: 44 } });
}

// ---- The page ----

const has = (test) => runs.some(test);
const drawn = [];

function show(id, isThere, drawIt) {
  document.getElementById(id).hidden = !isThere;
  if (isThere) drawn.push(drawIt);
}

const metrics = unique([data.metric, "train/loss"]).filter((name) => has((run) => run.curves[name]));
const shortName = (name) => ({ "val/loss": "validation", "train/loss": "training" }[name] || name);
addSwitch(switchesOf("curves"), "split", "", metrics.map((name) => [name, shortName(name)]), drawCurves);
const anyCurve = (run) => Object.values(run.curves);
addSwitch(switchesOf("curves"), "x", "against", [
  ...(has((run) => run.tokensPerStep) ? [["tokens", "tokens"]] : []), ["steps", "steps"],
  ...(has((run) => anyCurve(run).some((curve) => curve.seconds)) ? [["seconds", "time"]] : [])], drawCurves);
const several = rows.some((row, i) => runs.filter((run) => run.row === i).length > 1);
addSwitch(switchesOf("curves"), "lines", "", several ? [["mean", "mean of runs"], ["runs", "every run"]] : [["runs", ""]], drawCurves);
addSwitch(switchesOf("curves"), "y", "scale", [["linear", "linear"], ["log", "log"]], drawCurves);
show("curves", metrics.length > 0, drawCurves);

const finals = [["bytes", "bytes"], ["bits", "bits per weight"], ["seconds", "time"], ["parameters", "parameters"]].filter(([key]) => rows.some((row) => row.loss && FINALS[key][1](row)));
addSwitch(switchesOf("final"), "against", "against", finals, drawFinal);
show("final", finals.length > 0, drawFinal);

const gaps = [["tokensGap", "at equal tokens"], ["bytesGap", "at equal bytes"]].filter(([key]) => rows.some((row) => row[key].estimate));
addSwitch(switchesOf("gaps"), "gap", "", gaps, drawGaps);
show("gaps", gaps.length > 0, drawGaps);

addSelect(switchesOf("health"), "run", "run of", data.health.map((each) => each.name), drawHealth);
addSwitch(document.getElementById("matrix-switches"), "matrix", "", [["weight_scale", "scale"], ["zero", "zeros"], ["flip_rate", "flips"]], drawHealth);
show("health", data.health.length > 0, drawHealth);

function applyTheme() {
  const isDark = state.theme === "dark" || (state.theme === "system" && dark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  document.querySelectorAll("#rows tbody .mark").forEach((mark, i) => { mark.style.background = colour(rows[i]); });
  drawn.forEach((drawIt) => drawIt());
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
addSwitch(document.getElementById("theme"), "theme", "", [["system", "System"], ["light", "Light"], ["dark", "Dark"]], applyTheme);
dark.addEventListener("change", applyTheme);
let wasNarrow = narrow();
window.addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); drawn.forEach((drawIt) => drawIt()); } });
applyTheme();
