// The merge tree of a request: fills as nodes are done, and shows which tokens each level kept.
// Knows nothing about the document but its length.
"use strict";

const WORKER_COLORS = 6;
const ROW = 24, GAP = 6, GUTTER = 62;
const HOW_TO = "Point at a node, tap it, or walk with the arrow keys to see what became of it.";

const count = new Intl.NumberFormat("en").format;
const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const share = (part, whole) => (whole ? `${(100 * part / whole).toPrecision(3)} %` : "–");

function el(tag, props = {}, ...children) {
  const made = Object.assign(document.createElement(tag), props);
  made.append(...children);
  return made;
}

class MergeTree {
  // An empty tree. `levels` are counts of nodes, from the leaves up; `go` is called with a node that
  // was pressed.
  constructor(levels, contextTokens, go = () => {}) {
    this.total = contextTokens;
    this.go = go;
    this.workers = new Map();
    this.chosen = null;
    this.levels = levels.map((nodes, height) => ({
      nodes: Array.from({ length: nodes }, (_, index) => ({
        height, index, done: false,
        start: Math.round(index * contextTokens / nodes),
        end: Math.round((index + 1) * contextTokens / nodes),
      })),
      layers: null,
    }));
    this.section = this.makeSection();
  }

  // A node is done, as `homer.v1.Progress` or `NodeEvidence` tells it.
  node(told) {
    const node = this.levels[told.height].nodes[told.index];
    Object.assign(node, {
      done: true, start: told.context_start, end: told.context_end, worker: told.worker,
      read: told.context_tokens_in, kept: told.context_tokens_out, seconds: told.seconds,
      runs: told.kept_runs && readRuns(told.kept_runs, told.context_start),
    });
    if (!this.workers.has(told.worker)) this.workers.set(told.worker, this.workers.size);
    this.drawSoon();
  }

  makeSection() {
    this.canvas = el("canvas", { tabIndex: 0, id: "tree" });
    this.canvas.setAttribute("role", "img");
    this.nodeLine = el("p", { className: "node-line", textContent: HOW_TO });
    this.nodeLine.setAttribute("aria-live", "polite");
    this.legend = el("ul", { className: "legend" });
    this.table = el("table", { className: "levels" });
    this.canvas.addEventListener("pointermove", (event) => this.choose(this.nodeAt(event)));
    this.canvas.addEventListener("pointerdown", (event) => this.choose(this.nodeAt(event), true));
    this.canvas.addEventListener("keydown", (event) => this.moveByKey(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    return el("section", { className: "card tree" },
      el("h2", {}, "The merge tree"), this.canvas, this.nodeLine, this.legend,
      el("div", { className: "scroll" }, this.table));
  }

  drawSoon() {
    this.waiting ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.waiting = null;
    const width = this.canvas.clientWidth, height = this.levels.length * (ROW + GAP) - GAP;
    if (width) {
      const scale = devicePixelRatio || 1;
      this.canvas.style.height = `${height}px`;
      this.canvas.width = width * scale;
      this.canvas.height = height * scale;
      const pen = this.canvas.getContext("2d");
      pen.scale(scale, scale);
      const style = getComputedStyle(document.documentElement);
      this.colors = (name) => style.getPropertyValue(name).trim();
      this.levels.forEach((level, h) => this.drawLevel(pen, level, h, width));
    }
    this.fillTable();
  }

  drawLevel(pen, level, h, width) {
    const y = (this.levels.length - 1 - h) * (ROW + GAP), room = width - GUTTER;
    pen.globalAlpha = 1;
    pen.fillStyle = this.colors("--soft");
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    pen.textBaseline = "middle";
    pen.fillText(this.levelName(h), 0, y + ROW / 2);
    const x = (token) => GUTTER + room * token / this.total;
    // Where nodes begin is known when they are done; until then they are drawn as if all were alike.
    for (const node of [...level.nodes].sort((a, b) => a.done - b.done)) {
      const left = x(node.start), wide = x(node.end) - left;
      const shown = Math.max(wide - (wide > 4 ? 1.5 : wide > 2 ? 0.5 : 0), 0.6);
      pen.globalAlpha = node.done ? (node.runs ? 0.28 : 0.75) : 1;
      pen.fillStyle = this.colors(node.done ? this.workerColor(node.worker) : "--empty");
      pen.fillRect(left, y, shown, ROW);
    }
    this.drawKept(pen, level, y, room);
    if (this.chosen?.height === h) {
      const { start, end } = this.chosen;
      pen.globalAlpha = 1;
      pen.strokeStyle = this.colors("--ink");
      pen.lineWidth = 1.5;
      pen.strokeRect(x(start) + 0.75, y + 0.75, Math.max(x(end) - x(start) - 1.5, 1.5), ROW - 1.5);
    }
  }

  // How many of the tokens under each column a level kept.
  drawKept(pen, level, y, room) {
    const columns = Math.max(1, Math.floor(room)), kept = new Float64Array(columns + 1);
    const wide = this.total / columns;
    for (const { runs } of level.nodes) {
      for (const [start, end] of runs ?? []) {
        const from = start / wide, to = end / wide;
        for (let column = Math.floor(from); column < to; column++) {
          kept[column] += Math.min(to, column + 1) - Math.max(from, column);
        }
      }
    }
    pen.fillStyle = this.colors("--kept");
    kept.forEach((part, column) => {
      if (part < 1e-6) return;
      // A single token of a long document must be seen.
      pen.globalAlpha = Math.min(1, 0.35 + 0.65 * part);
      const high = Math.max(3, ROW * Math.min(1, part));
      pen.fillRect(GUTTER + column, y + ROW - high, 1, high);
    });
  }

  levelName(height) {
    if (height === this.levels.length - 1 && height) return "root";
    return height ? `merge ${height}` : "leaves";
  }

  workerColor(worker) {
    return `--w${(this.workers.get(worker) ?? 0) % WORKER_COLORS}`;
  }

  fillTable() {
    this.legend.replaceChildren(...[...this.workers.keys()].sort().map((worker) => {
      const mine = this.levels.flatMap((level) => level.nodes.filter((n) => n.worker === worker));
      const seconds = mine.reduce((sum, node) => sum + node.seconds, 0);
      const dot = el("i");
      dot.style.background = `var(${this.workerColor(worker)})`;
      return el("li", {}, dot, `${worker}: ${counted(mine.length, "node")}, ${seconds.toFixed(2)} s`);
    }));
    if (this.levels[0].layers) {
      const dot = el("i");
      dot.style.background = "var(--kept)";
      this.legend.append(el("li", {}, dot, "tokens that were kept"));
    }
    const head = el("tr", {}, ...["Level", "Nodes done", "Layers", "Tokens read", "Kept", "Of the document"]
      .map((name, i) => el("th", { scope: "col", className: i === 2 || i === 3 ? "wide" : "" }, name)));
    const rows = this.levels.map((level, h) => {
      const done = level.nodes.filter((node) => node.done);
      const kept = done.reduce((sum, node) => sum + node.kept, 0);
      const read = done.reduce((sum, node) => sum + node.read, 0);
      const all = done.length === level.nodes.length;
      const [first, last] = [level.layers?.[0], level.layers?.[1] - 1];
      const layers = !level.layers ? "" : first === last ? first : `${first}–${last}`;
      return el("tr", {}, el("td", {}, this.levelName(h)),
        el("td", {}, all ? count(done.length) : `${count(done.length)} of ${count(level.nodes.length)}`),
        el("td", { className: "wide" }, layers), el("td", { className: "wide" }, count(read)),
        el("td", {}, count(kept)), el("td", {}, all ? share(kept, this.total) : ""));
    });
    this.table.replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
    const done = this.levels.map((level) => level.nodes.filter((node) => node.done).length);
    const nodes = this.levels.map((level) => level.nodes.length);
    const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
    this.canvas.setAttribute("aria-label", `Merge tree of ${nodes.length} levels: ` +
      `${sum(done)} of ${sum(nodes)} nodes are done. Arrow keys move from node to node.`);
    this.canvas.dataset.done = sum(done);
    this.canvas.dataset.nodes = sum(nodes);
  }

  nodeAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / (ROW + GAP));
    const level = this.levels[this.levels.length - 1 - row];
    const token = (event.clientX - box.left - GUTTER) / (box.width - GUTTER) * this.total;
    return level?.nodes.find((node) => node.start <= token && token < node.end) ?? null;
  }

  moveByKey(event) {
    const at = this.chosen ?? this.levels.at(-1).nodes[0];
    const middle = (at.start + at.end) / 2;
    const under = (level) => level?.nodes.find((n) => n.start <= middle && middle < n.end);
    const next = {
      ArrowLeft: () => this.levels[at.height].nodes[at.index - 1],
      ArrowRight: () => this.levels[at.height].nodes[at.index + 1],
      ArrowUp: () => under(this.levels[at.height + 1]),
      ArrowDown: () => (this.chosen ? under(this.levels[at.height - 1]) : at),
      Enter: () => at,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    this.choose(next() ?? at, event.key === "Enter");
  }

  choose(node, go = false) {
    if (node && go) this.go(node);
    if (node === this.chosen) return;
    this.chosen = node;
    this.nodeLine.textContent = !node ? HOW_TO : `${this.levelName(node.height)}, node ` +
      `${count(node.index + 1)} of ${count(this.levels[node.height].nodes.length)}: tokens ${count(node.start)} to ${count(node.end)}, ` +
      (node.done ? `kept ${count(node.kept)} of ${count(node.read)}, on ${node.worker}, ` +
        `${(1000 * node.seconds).toFixed(0)} ms` : "not done yet");
    this.drawSoon();
  }
}

// Runs in turn dropped and kept, as [start, end) of those that were kept.
function readRuns(runs, start) {
  const kept = [];
  let at = start;
  for (let i = 0; i + 1 < runs.length; i += 2) {
    const from = at + runs[i];
    at = from + runs[i + 1];
    kept.push([from, at]);
  }
  return kept;
}
