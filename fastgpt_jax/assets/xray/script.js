"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const [NAME, RESULTS, OPERANDS, PARAMS, SOURCE, MADE, GONE, PREPARED, FLOPS, BYTES, BOUND, DEPTH] = Array(12).keys();
const ROW = 24, TIMES = 30, GRAPH = 96, COLORS = 12;
let stageIndex = D.shown, showsQuiet = false, picked = null;

// ---------------------------------------------------------------------------------------------------- small helpers
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") for (const [name, text] of Object.entries(value)) node.style.setProperty(name, text);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
}
function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
function scaled(number, base, units) {
  let i = 0;
  while (Math.abs(number) >= 0.9995 * base && i < units.length - 1) { number /= base; i += 1; }
  return (i === 0 ? String(Math.round(number)) : String(Number(number.toPrecision(3)))) + (units[i] ? " " + units[i] : "");
}
const bytes = n => scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const count = n => scaled(n, 1000, ["", "K", "M", "G", "T", "P"]);
function seconds(s) {
  if (s <= 0) return "0";
  const [factor, unit] = s >= 1 ? [1, "s"] : s >= 1e-3 ? [1e3, "ms"] : s >= 1e-6 ? [1e6, "µs"] : [1e9, "ns"];
  return Number((s * factor).toPrecision(3)) + " " + unit;
}
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const firstOf = new Map([...D.stages.entries()].reverse().map(([i, stage]) => [stage.name, i]));  // a pass that runs twice has one colour
const color = made => { const i = firstOf.get(D.stages[made].name); return `var(--p${i === 0 ? 0 : 1 + (i - 1) % (COLORS - 1)})`; };
const fileName = path => path.split("/").pop();
const shortPath = path => path.split("/").slice(-3).join("/");
const leastTime = row => Math.max(row[FLOPS] / D.machine.flops_per_s, row[BYTES] / D.machine.bytes_per_s);
const isQuiet = row => row[PREPARED] || (!row[FLOPS] && !row[BYTES] && row[BOUND] === "free" && !["scan", "while", "cond"].includes(row[NAME]));

// ---------------------------------------------------------------------------------------------------- the head
function drawHead() {
  const last = D.stages[D.stages.length - 1];
  const tiles = [];
  const tile = (value, label) => tiles.push(el("div", {class: "tile"}, el("b", {}, value), el("span", {}, label)));
  if (D.num_params !== null) tile(count(D.num_params), "parameters");
  tile(bytes(D.bytes_per_token), "of cache a token");
  if (D.bytes_per_request) tile(bytes(D.bytes_per_request), "carried a request");
  if (D.compiled) {
    tile(count(D.compiled.flops), "FLOPs a step, compiled");
    tile(bytes(D.compiled.nbytes), "read and written a step, compiled");
    tile(seconds(D.compiled.seconds), `at least a step, waiting for ${D.compiled.bound === "compute" ? "arithmetic" : "memory"}`);
  } else if (last) {
    tile(count(last.flops), "FLOPs a step");
    tile(bytes(last.nbytes), "read and written a step");
    if (last.listing) {
      const memory = 100 * share(last.listing, row => row[BOUND] === "memory");
      tile(seconds(last.listing.seconds), `at least a step, ${memory > 99.9 ? "all" : Math.round(memory) + " %"} of it waiting for memory`);
    }
  }
  document.title = `X-ray of ${D.name}`;
  document.getElementById("head").append(
    el("h1", {}, D.name),
    el("p", {class: "soft"}, `X-ray of the step ${D.step}, derived for ${plural(D.capacity, "token")}`),
    el("div", {class: "tiles"}, tiles));
}
function copiesOf(listing) {
  const copies = new Array(listing.rows.length).fill(1);
  for (const [start, length, times] of listing.repeats) copies.fill(times, start, start + length);
  return copies;
}
function share(listing, test) {
  const copies = copiesOf(listing);
  let part = 0, all = 0;
  listing.rows.forEach((row, i) => { const t = leastTime(row) * copies[i]; all += t; if (test(row)) part += t; });
  return all ? part / all : 0;
}

// ---------------------------------------------------------------------------------------------------- the passes
function drawPasses() {
  const steps = D.stages.flatMap((stage, i) => {
    const before = i ? D.stages[i - 1] : null;
    const change = before && before.num_ops !== stage.num_ops ? ` (${stage.num_ops > before.num_ops ? "+" : "−"}${Math.abs(stage.num_ops - before.num_ops)})` : "";
    const facts = i ? `${stage.matched} matched, ${stage.missed.length} missed` : "before any pass";
    const button = el("button", {
      class: "step", role: "tab", "aria-selected": String(i === stageIndex), style: {"--c": color(i)},
      title: i ? `${stage.numerics}, ${seconds(stage.seconds)}; ${count(stage.flops)} FLOPs and ${bytes(stage.nbytes)} after it` : "",
      onclick: () => { stageIndex = i; picked = null; drawPasses(); drawProgram(); },
    }, el("b", {}, stage.name), el("span", {}, plural(stage.num_ops, "operation") + change), el("span", {}, facts));
    return i ? [el("span", {class: "arrow"}, "→"), button] : [button];
  });
  document.getElementById("passes").replaceChildren(
    el("h2", {}, "The decode step, pass by pass"), el("div", {class: "steps", role: "tablist"}, steps));
}

// ---------------------------------------------------------------------------------------------------- the program
function drawProgram() {
  const place = document.getElementById("program");
  const stage = D.stages[stageIndex], listing = stage && stage.listing;
  if (!listing) {
    const why = stage && stage.is_left_out ? "This program is left out to keep the page small; --after shows it." : "An artifact holds counts and no program: inspect the model that it was compiled from.";
    place.replaceChildren(el("div", {class: "card none"}, why));
    return;
  }
  const view = layOut(listing);
  place.replaceChildren(el("div", {class: "card split"}, drawSources(listing, view), drawGraph(listing, view)));
}
// Which rows are shown, where, and by which shown rows the operands of each are made.
function layOut(listing) {
  const shown = [], tops = [], boxes = [];
  const starts = new Map(listing.repeats.map(repeat => [repeat[0], repeat]));
  let y = 0, open = null;
  listing.rows.forEach((row, i) => {
    if (open && i === open.end) { boxes.push({...open, bottom: y}); y += 8; open = null; }
    const isShown = k => showsQuiet || !isQuiet(listing.rows[k]);
    if (starts.has(i) && listing.rows.slice(i, i + starts.get(i)[1]).some((_, k) => isShown(i + k))) {
      const [start, length, times] = starts.get(i);
      open = {top: y, end: start + length, times};
      y += TIMES;
    }
    if (isShown(i)) { shown.push(i); tops[i] = y; y += ROW; }
  });
  if (open) boxes.push({...open, bottom: y});
  const maker = new Map();
  listing.rows.forEach((row, i) => row[RESULTS].forEach(([number]) => maker.set(number, i)));
  const memo = new Map();
  const seen = number => {  // rows shown that a value is made by, through rows that are not
    const i = maker.get(number);
    if (i === undefined) return [];
    if (tops[i] !== undefined) return [i];
    if (!memo.has(i)) {
      memo.set(i, []);
      const rows = listing.rows[i][OPERANDS].flatMap(x => typeof x === "number" ? seen(x) : []);
      memo.set(i, [...new Set(rows)]);
    }
    return memo.get(i);
  };
  const edges = [];
  for (const i of shown) {
    const from = new Set(listing.rows[i][OPERANDS].flatMap(x => typeof x === "number" ? seen(x) : []));
    for (const j of from) if (j !== i) edges.push([j, i]);
  }
  return {shown, tops, boxes, edges, height: y};
}
function drawGraph(listing, view) {
  const inputs = new Map(listing.inputs.map(([number, kind, name]) => [number, name]));
  const types = new Map(listing.inputs.map(([number, kind]) => [number, kind]));
  const makers = new Map();
  listing.rows.forEach(row => row[RESULTS].forEach(([number, kind]) => { types.set(number, kind); makers.set(number, row[NAME]); }));
  const longest = Math.max(...listing.rows.map(leastTime), 1e-30);
  const lines = [];
  const graph = svg("svg", {width: GRAPH, height: view.height});
  const middle = i => view.tops[i] + ROW / 2, paths = [];
  for (const [from, to] of view.edges) {
    const a = middle(from), b = middle(to), far = Math.min(GRAPH - 12, 5 + 13 * Math.log2(1 + Math.abs(b - a) / ROW));
    const path = svg("path", {d: `M${GRAPH - 8} ${a}C${GRAPH - 8 - far * 1.3} ${a} ${GRAPH - 8 - far * 1.3} ${b} ${GRAPH - 8} ${b}`});
    if (b - a > 12 * ROW) path.classList.add("far");
    paths.push([from, to, path]);
    graph.append(path);
  }
  const boxes = view.boxes.map(box => el("div", {class: "box", style: {top: box.top + "px", height: box.bottom - box.top + "px"}}));
  const rows = new Map(), tops = new Map(view.boxes.map(box => [box.top, box]));
  let y = 0;
  for (const i of view.shown) {
    const row = listing.rows[i], made = row[MADE];
    if (view.tops[i] !== y) {
      const box = view.boxes.find(b => b.top >= y && b.top < view.tops[i] && !b.drawn);
      if (box) {
        box.drawn = true;
        if (box.top > y) lines.push(el("div", {style: {height: box.top - y + "px"}}));
        lines.push(el("div", {class: "times"}, el("b", {}, `${box.times} times`), "one behind the other; the first is shown"));
        y = box.top + TIMES;
      }
      if (view.tops[i] > y) lines.push(el("div", {style: {height: view.tops[i] - y + "px"}}));
    }
    y = view.tops[i] + ROW;
    graph.append(svg("circle", {cx: GRAPH - 8, cy: middle(i), r: 3, style: `--c:${color(made)}`}));
    const kinds = row[RESULTS].map(([, kind]) => kind).join(", ");
    const args = row[OPERANDS].map(x => typeof x === "string" ? x : inputs.get(x) || makers.get(x) || "loop input").join(", ");
    const kindsRead = row[OPERANDS].map(x => typeof x === "string" ? x : `${inputs.get(x) || makers.get(x) || "loop input"} ${types.get(x) || ""}`.trim()).join(", ");
    const where = row[SOURCE] ? `${fileName(D.sources[row[SOURCE][0]].path)}:${row[SOURCE][1]}` : "no line of the model";
    const title = [`${row[NAME]}${row[PARAMS] ? `[${row[PARAMS]}]` : ""}`, `gives ${kinds}`, `reads ${kindsRead}`, where,
      made ? `made or changed by ${D.stages[made].name}` : "made by the derivation",
      row[GONE] ? "the next pass takes it away" : "", row[PREPARED] ? "known from the parameters alone: prepared once, offline" : ""].filter(Boolean).join("\n");
    const time = leastTime(row);
    const cost = row[PREPARED] ? [el("em", {}, "prepared")] : time === 0 ? [] : [
      el("i", {style: {width: `${Math.max(1.5, 44 * time / longest)}px`, "--b": `var(--${row[BOUND]})`}}), el("em", {}, row[BOUND])];
    const node = el("div", {
      class: ["op", isQuiet(row) ? "quiet" : "", row[GONE] ? "gone" : ""].join(" "), title, style: {"--c": made ? color(made) : "var(--ink)"},
      onmouseenter: () => light(i, true), onmouseleave: () => light(i, false),
    }, el("span"), el("span", {style: {"padding-left": `${14 * row[DEPTH]}px`}}, el("span", {class: "name"}, row[NAME]), el("span", {class: "kind"}, " " + kinds)),
      el("span", {class: "args"}, args), el("span", {class: "num"}, row[FLOPS] ? count(row[FLOPS]) : ""),
      el("span", {class: "num"}, row[BYTES] ? bytes(row[BYTES]) : ""), el("span", {class: "cost"}, cost));
    rows.set(i, node);
    lines.push(node);
  }
  function light(i, on) {
    for (const [from, to, path] of paths) {
      if (from !== i && to !== i) continue;
      path.classList.toggle("lit", on);
      rows.get(from === i ? to : from).classList.toggle("lit", on);
    }
    const source = listing.rows[i][SOURCE];
    const line = source && document.getElementById(`line-${source[0]}-${source[1]}`);
    if (line) line.classList.toggle("lit", on);
  }
  view.rows = rows;
  const box = el("input", {type: "checkbox", onchange: event => { showsQuiet = event.target.checked; drawProgram(); }});
  box.checked = showsQuiet;
  const hidden = listing.rows.filter(isQuiet).length;
  const head = el("div", {class: "op heads"}, el("span"), el("span", {}, "operation and result"), el("span", {}, "reads"),
    el("span", {class: "num"}, "FLOPs"), el("span", {class: "num"}, "bytes"), el("span", {}, "least time"));
  return el("div", {class: "pane"},
    el("div", {class: "bar"}, el("h2", {}, stageIndex ? `Program after ${D.stages[stageIndex].name}` : "Program as derived"),
      el("label", {}, box, `show ${plural(hidden, "operation")} that cost a step nothing`)),
    head, el("div", {class: "graph"}, graph, boxes, lines));
}

// ---------------------------------------------------------------------------------------------------- the sources
function drawSources(listing, view) {
  const copies = copiesOf(listing), times = new Map(), rowsOf = new Map();
  let all = 0;
  listing.rows.forEach((row, i) => {
    if (!row[SOURCE]) return;
    const key = row[SOURCE].join("-");
    times.set(key, (times.get(key) || 0) + leastTime(row) * copies[i]);
    all += leastTime(row) * copies[i];
    rowsOf.set(key, [...(rowsOf.get(key) || []), i]);
  });
  const heaviest = Math.max(...times.values(), 1e-30);
  const files = D.sources.map((source, number) => {
    const used = [...rowsOf.keys()].some(key => key.startsWith(`${number}-`));
    if (!used) return null;
    let previous = null;
    const lines = source.lines.flatMap(([line, text]) => {
      const key = `${number}-${line}`, rows = rowsOf.get(key) || [], time = times.get(key) || 0;
      if (!rows.length && !text.trim()) { previous = previous === line - 1 ? line : previous; return []; }
      const node = el("div", {
        class: rows.length ? "code has" : "code", id: `line-${key}`,
        title: rows.length ? `${plural(rows.length, "operation")}, ${Math.round(1000 * time / (all || 1)) / 10} % of the least time` : "",
        onclick: rows.length ? () => pick(node, rows, view) : () => {},
      }, el("i", {style: {"--heat": String(time ? 0.15 + 0.85 * time / heaviest : 0)}}, String(line)), el("span", {}, text));
      const gap = previous !== null && line > previous + 1 ? [el("div", {class: "gap"}, "⋮")] : [];
      previous = line;
      return [...gap, node];
    });
    const note = source.lines.length ? lines : [el("p", {class: "faint"}, "its lines cannot be read here")];
    return el("div", {class: "file"}, el("p", {title: source.path}, shortPath(source.path)), note);
  });
  return el("div", {class: "pane source"}, el("div", {class: "bar"}, el("h2", {}, "The lines it came from")), files);
}
// A line picked shows its operations and dims the others; picked again, all are shown.
function pick(node, rows, view) {
  const isSame = picked === node;
  if (picked) picked.classList.remove("picked");
  picked = isSame ? null : node;
  if (picked) picked.classList.add("picked");
  const wanted = new Set(rows);
  for (const [i, line] of view.rows) {
    line.classList.toggle("dim", !isSame && !wanted.has(i));
    line.classList.toggle("picked", !isSame && wanted.has(i));
  }
  const first = rows.find(i => view.rows.has(i));
  if (!isSame && first !== undefined) view.rows.get(first).scrollIntoView({block: "center"});
}

// ---------------------------------------------------------------------------------------------------- cache and masks
function drawMemory() {
  const groups = new Map();
  for (const entry of D.cache.entries) {
    const key = JSON.stringify([entry.kind, entry.shape, entry.dtype, entry.source]);
    groups.set(key, [...(groups.get(key) || []), entry]);
  }
  const rows = [...groups.values()].map(entries => {
    const first = entries[0], last = entries[entries.length - 1], layers = entries.reduce((n, e) => n + e.layers, 0);
    const unit = first.kind === "kv" ? "a token" : "a request";
    const names = entries.length === 1 ? first.name : entries.length === 2 ? `${first.name}, ${last.name}` : `${first.name} … ${last.name}`;
    return el("tr", {}, el("td", {}, names), el("td", {class: "mono"}, `${first.dtype}[${first.shape.join(", ")}]`), el("td", {class: "num"}, String(layers)),
      el("td", {class: "num"}, `${entries.reduce((n, e) => n + e.nbytes, 0).toLocaleString("en")} B ${unit}`), el("td", {class: "mono soft"}, first.source));
  });
  const head = el("tr", {}, ["cached value", "row"].map(text => el("th", {}, text)), el("th", {class: "num"}, "layers"), el("th", {class: "num"}, "size"), el("th", {}, "line"));
  const cache = el("div", {class: "card"}, el("h2", {}, "Derived cache"), el("table", {}, head, rows),
    el("p", {class: "notes"}, `${D.bytes_per_token.toLocaleString("en")} bytes a token: ${bytes(D.bytes_per_token * D.capacity)} for ${plural(D.capacity, "token")}`));
  const figures = D.masks.pictures.map(picture => {
    const heads = picture.num_heads > 1 ? `; ${picture.num_heads} heads differ, the first is shown` : "";
    return el("figure", {}, drawMask(picture), el("figcaption", {}, el("b", {}, picture.layer_text), el("span", {class: "soft"},
      ` ${picture.origin} at ${picture.source}, ${plural(picture.num_tokens, "token")}${heads}`)));
  });
  const notes = D.masks.notes.map(note => el("p", {}, note));
  const hint = figures.length ? [el("p", {}, "Rows are queries from the first token down, columns are keys; what is filled is seen.")] : [];
  const masks = el("div", {class: "card"}, el("h2", {}, "Masks"), el("div", {class: "masks"}, figures), el("div", {class: "notes"}, notes, hint));
  document.getElementById("memory").append(el("div", {class: "pair"}, cache, masks));
}
function drawMask(picture) {
  const size = picture.rows.length, canvas = el("canvas", {width: size, height: size});
  const paint = () => {
    const context = canvas.getContext("2d"), rgb = getComputedStyle(document.documentElement).getPropertyValue("--mask");
    context.clearRect(0, 0, size, size);
    picture.rows.forEach((row, y) => [...row].forEach((digit, x) => {
      const level = parseInt(digit, 16) / 15;
      if (level) { context.fillStyle = `rgba(${rgb}, ${0.12 + 0.78 * level})`; context.fillRect(x, y, 1, 1); }
    }));
  };
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  return canvas;
}

// ---------------------------------------------------------------------------------------------------- remarks
function drawRemarks() {
  const lines = (texts, i, name) => texts.map(text => el("li", {}, el("span", {class: "dot", style: {"--c": color(i)}}), el("span", {class: "soft"}, name), el("span", {}, text)));
  const made = D.stages.flatMap((stage, i) => lines(stage.made.map(([text, n]) => n > 1 ? `${text}, ${n} times` : text), i, stage.name));
  const missed = D.stages.flatMap((stage, i) => lines(stage.missed, i, stage.name));
  const card = (title, items, none) => el("div", {class: "card"}, el("h2", {}, title),
    items.length ? el("ul", {class: "list"}, items) : el("p", {class: "soft"}, none));
  document.getElementById("remarks").append(el("div", {class: "pair"},
    card("Rewrites made", made, "No pass of this pipeline names its rewrites one by one."),
    card("Nearly made, and why not", missed, "Nothing came close and failed.")));
}
function drawFoot() {
  const m = D.machine;
  document.getElementById("foot").append(
    el("p", {}, `Least time: the larger of FLOPs at ${count(m.flops_per_s)}FLOP/s and bytes at ${count(m.bytes_per_s)}B/s, as stated for ${m.name}. An operation of fewer than ${Math.round(m.balance)} FLOPs a byte waits for memory.`),
    el("p", {}, "Bytes are what each operation reads and writes by itself, with nothing fused. FLOPs and bytes of an operation are of one copy; of a loop's body, of all its turns. An operation struck through is taken away by the next pass; its colour is that of the pass that made or changed it."));
}

drawHead(); drawPasses(); drawProgram(); drawMemory(); drawRemarks(); drawFoot();
