// Additions to a page that is complete without them: sorting, copying, values under the pointer,
// and the place in the contents. Scale of counts and theme are CSS alone.
"use strict";
document.documentElement.classList.add("script");

// -- sorting ------------------------------------------------------------------------------------

const table = document.getElementById("layer-table");
const headers = [...table.tHead.rows[0].cells];

function key(row, column) {
  const value = row.cells[column].dataset.v;
  return value === "" || Number.isNaN(Number(value)) ? value : Number(value);
}

function sort(column) {
  const up = headers[column].getAttribute("aria-sort") !== "ascending";
  const sign = up ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const x = key(a, column), y = key(b, column);
    if (x === "" || y === "") return (x === "") - (y === "");  // what has no value stays last
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
  headers.forEach((h, i) => h.setAttribute("aria-sort", i !== column ? "none" : up ? "ascending" : "descending"));
  table.tBodies[0].append(...rows);
}

headers.forEach((header, i) => header.firstElementChild.addEventListener("click", () => sort(i)));

// -- copying ------------------------------------------------------------------------------------

// The clipboard interface is missing on some file:// pages; a selection to copy never is.
async function copy(source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    return true;
  } catch {
    const range = document.createRange();
    range.selectNodeContents(source);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    return document.execCommand("copy");
  }
}

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const done = await copy(document.getElementById(button.dataset.copy));
    button.textContent = done ? "Copied" : "Selected";
    document.getElementById("status").textContent = done ? "Copied to the clipboard" : "Text selected, copy it from the keyboard";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

// -- values under the pointer -------------------------------------------------------------------

const tooltip = document.getElementById("tooltip");
const unpack = (text) => text.split(",").map(Number);
const number = (x) => {
  const text = x !== 0 && (Math.abs(x) < 1e-4 || Math.abs(x) >= 1e6) ? x.toExponential(2) : String(Number(x.toPrecision(3)));
  return text.replace("-", "\u2212");
};
const whole = (x) => (Number.isInteger(x) ? x : Number(x.toFixed(1))).toLocaleString("en");

// Each takes the plot's data and a place from 0 to 1, and returns the lines to show, or nothing.
const readings = {
  histogram(data, at) {
    const before = unpack(data.before), after = unpack(data.after), n = before.length;
    const i = Math.floor(n * (at - data.first) / (data.last - data.first));
    if (i < 0 || i >= n) return null;
    const width = (data.high - data.low) / n, low = Number(data.low) + i * width;
    return [`${number(low)} to ${number(low + width)}`, `float: ${whole(before[i])}`, `quantized: ${whole(after[i])}`];
  },
  codes(data, at) {
    const total = Number(data.total), i = Math.min(total - 1, Math.floor(total * at));
    const code = i + Number(data.start), count = unpack(data.counts)[code - Number(data.first)];
    const times = count === undefined ? "out of reach: the layer's clamp excludes it" : count === 0 ? "never used" : `${whole(count)} times`;
    return [`code ${number(code)}`, times];
  },
  channels(data, at) {
    const lows = unpack(data.lows), highs = unpack(data.highs);
    const i = Math.min(lows.length - 1, Math.floor(lows.length * at));
    return [`channel ${i}`, `${number(lows[i])} to ${number(highs[i])}`];
  },
};

function hide(cursor) {
  tooltip.hidden = true;
  cursor.hidden = true;
}

function show(event, figure, plot, cursor) {
  const box = plot.getBoundingClientRect();
  const at = (event.clientX - box.left) / box.width;
  const lines = at >= 0 && at < 1 ? readings[figure.className](figure.dataset, at) : null;
  if (!lines) return hide(cursor);
  cursor.hidden = false;
  cursor.style.left = `${100 * at}%`;
  tooltip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("span"), { textContent: line })));
  tooltip.hidden = false;
  const left = Math.min(event.clientX + 14, innerWidth - tooltip.offsetWidth - 8);
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${Math.max(8, event.clientY - tooltip.offsetHeight - 12)}px`;
}

for (const figure of document.querySelectorAll(".histogram, .codes, .channels")) {
  const plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor");
  for (const kind of ["pointermove", "pointerdown"]) {
    plot.addEventListener(kind, (event) => show(event, figure, plot, cursor));
  }
  plot.addEventListener("pointerleave", () => hide(cursor));
}

// -- the place in the contents ------------------------------------------------------------------

const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
const seen = new Set();
let current = null;
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
  const first = [...links.keys()].find((id) => seen.has(id));
  if (!first || first === current) return;
  if (current) links.get(current).removeAttribute("aria-current");
  current = first;
  const link = links.get(first), list = link.closest("ul");
  link.setAttribute("aria-current", "location");
  // Move the list alone: scrollIntoView would move the page as well.
  list.scrollTop = link.offsetTop - list.clientHeight / 2;
  list.scrollLeft = link.offsetLeft - list.clientWidth / 2 + link.offsetWidth / 2;
}, { rootMargin: "-15% 0px -60% 0px" });
for (const id of links.keys()) observer.observe(document.getElementById(id));
