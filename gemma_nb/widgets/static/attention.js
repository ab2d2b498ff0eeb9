// @ts-check
// AttentionPanel's front end: one self-contained ES module, no imports, no network. Labels are
// untrusted: they only ever become text nodes or canvas text.

/**
 * What `head_map` holds: rows and columns `first` to `first + size` of `length` positions.
 * @typedef {{layer: number, head: number, first: number, size: number, length: number,
 *   hide_bos: boolean, limit: number}} View
 * @typedef {{layers: string[], windows: number[], heads: number, kv_heads: number}} Shape
 * @typedef {{heat: string, warm: string, line: string, fg: string, dim: string, bg: string,
 *   accent: string}} Colours
 * Where things are in the heatmap's canvas, in CSS pixels; `before` is the width of the column
 * that stands for earlier positions.
 * @typedef {{cell: number, left: number, top: number, before: number, width: number,
 *   height: number}} Geometry
 */

const MONO = "ui-monospace, monospace";
const LABEL_LEFT = 84;
const LABEL_TOP = 78;

/** @param {string} text @param {number} most */
const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

/** Binary traits arrive as DataViews. @param {any} view @returns {Uint8Array} */
function bytes(view) {
  if (!view || !view.byteLength) return new Uint8Array(0);
  return new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);
}

/** Undoes the quantisation: round(255 sqrt(w)). @param {number} byte */
const weight = (byte) => (byte / 255) ** 2;

/** @param {number} w */
const number = (w) => (w >= 0.0995 ? w.toFixed(2) : w >= 0.001 ? w.toFixed(3) : w.toExponential(0));

/** @param {Element} element @returns {Colours} */
function coloursOf(element) {
  // The custom properties hold expressions; a probe's computed colour is what they come to.
  const probe = h("span", { hidden: true });
  element.append(probe);
  const style = getComputedStyle(probe);
  const read = (/** @type {string} */ name) => {
    probe.style.color = `var(--gnb-${name})`;
    return style.color;
  };
  const raw = (/** @type {string} */ name) => style.getPropertyValue(`--gnb-${name}`).trim();
  const colours = {
    heat: raw("heat"),
    warm: `rgb(${raw("warm")})`,
    line: read("line"),
    fg: read("fg"),
    dim: read("dim"),
    bg: read("bg"),
    accent: read("accent"),
  };
  probe.remove();
  return colours;
}

/**
 * Sizes a canvas for the screen's pixels and clears it.
 * @param {HTMLCanvasElement} canvas @param {number} width @param {number} height
 * @param {string} background
 * @returns {CanvasRenderingContext2D}
 */
function prepare(canvas, width, height, background) {
  const ratio = Math.max(2, window.devicePixelRatio || 1);
  canvas.width = Math.ceil(width * ratio);
  canvas.height = Math.ceil(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(ratio, ratio);
  context.fillStyle = background;
  context.fillRect(0, 0, width, height);
  return context;
}

/**
 * The overview: a thumbnail per layer and head.
 * @param {HTMLCanvasElement} canvas @param {Shape} shape @param {Uint8Array} atlas
 * @param {number} side @param {{layer: number, head: number}} chosen @param {Colours} colours
 * @returns {{cell: [number, number], left: number, top: number}} for hit tests
 */
function drawOverview(canvas, shape, atlas, side, chosen, colours) {
  const layers = shape.layers.length;
  const wide = shape.heads <= 8;
  const [w, t] = wide ? [28, 20] : [16, 13];
  const [left, top] = [22, 16];
  const context = prepare(canvas, left + shape.heads * w + 16, top + layers * t + 2, colours.bg);
  context.font = `10px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const image = document.createElement("canvas");
  image.width = image.height = Math.max(1, side);
  const pixels = /** @type {CanvasRenderingContext2D} */ (image.getContext("2d"));
  const rgb = colours.heat.split(",").map(Number);
  context.fillStyle = colours.dim;
  context.textAlign = "center";
  for (let n = 0; n < shape.heads; n += wide ? 1 : 2) {
    context.fillText(String(n), left + n * w + w / 2, 7);
  }
  for (let l = 0; l < layers; l += 1) {
    const y = top + l * t;
    context.fillStyle = colours.dim;
    context.textAlign = "right";
    context.fillText(String(l), left - 5, y + t / 2);
    for (let n = 0; n < shape.heads; n += 1) {
      const x = left + n * w;
      context.fillStyle = `rgba(${colours.heat}, 0.08)`;
      context.fillRect(x + 1, y + 1, w - 2, t - 2);
      const from = (l * shape.heads + n) * side * side;
      if (atlas.length < from + side * side || !side) continue;
      const map = atlas.subarray(from, from + side * side);
      const strongest = Math.max(64, map.reduce((a, b) => Math.max(a, b), 0));
      const data = pixels.createImageData(side, side);
      map.forEach((byte, i) => {
        data.data.set([rgb[0], rgb[1], rgb[2], Math.min(255, (255 * byte) / strongest)], 4 * i);
      });
      pixels.putImageData(data, 0, 0);
      context.drawImage(image, x + 1, y + 1, w - 2, t - 2);
    }
    drawKind(context, shape.windows[l], left + shape.heads * w + 8, y + t / 2, colours);
  }
  context.strokeStyle = colours.accent;
  context.lineWidth = 2;
  context.beginPath();
  context.roundRect(left + chosen.head * w, top + chosen.layer * t, w, t, 3);
  context.stroke();
  return { cell: [w, t], left, top };
}

/** Global layers: a filled square. Sliding ones: a circle. */
function drawKind(
  /** @type {CanvasRenderingContext2D} */ context,
  /** @type {number} */ window,
  /** @type {number} */ x,
  /** @type {number} */ y,
  /** @type {Colours} */ colours,
) {
  context.beginPath();
  if (window) {
    context.arc(x, y, 3.2, 0, 7);
    context.strokeStyle = colours.dim;
    context.lineWidth = 1.2;
    context.stroke();
  } else {
    context.roundRect(x - 4, y - 4, 8, 8, 2);
    context.fillStyle = colours.warm;
    context.fill();
  }
}

/** @param {View} view @param {number} available @returns {Geometry} */
function geometryOf(view, available) {
  const room = available - LABEL_LEFT - (view.first ? 12 : 0) - 2;
  const cell = Math.max(3, Math.min(18, Math.floor((room / view.size) * 2) / 2));
  const before = view.first ? Math.max(8, cell) + 4 : 0;
  const [left, top] = [LABEL_LEFT, LABEL_TOP];
  return {
    cell,
    left,
    top,
    before,
    width: left + before + view.size * cell + 2,
    height: top + view.size * cell + 2,
  };
}

/** The columns that query `q` can never attend to, as [from, to) inside the window. */
function hidden(/** @type {View} */ view, /** @type {number} */ q, /** @type {number} */ window) {
  const past = window ? Math.max(0, q - window + 1 - view.first) : 0;
  return [
    [0, Math.min(past, view.size)],
    [q + 1 - view.first, view.size],
  ];
}

/**
 * @param {HTMLCanvasElement} canvas @param {View} view @param {Uint8Array} map
 * @param {Uint8Array} before @param {string[]} labels @param {number} window
 * @param {number} row the framed query position @param {{q: number, k: number}|null} cursor
 * @param {Geometry} geometry @param {Colours} colours
 * @returns {number} the weight that has the full colour
 */
function drawMap(canvas, view, map, before, labels, window, row, cursor, geometry, colours) {
  const { cell, left, top } = geometry;
  const context = prepare(canvas, geometry.width, geometry.height, colours.bg);
  const n = view.size;
  const x0 = left + geometry.before;
  const gap = cell >= 6 ? 1 : 0;
  let strongest = 26; // never stretch what is nearly nothing to the full colour
  for (const byte of map) strongest = Math.max(strongest, byte);

  const hatched = new Path2D();
  for (let a = 0; a < n; a += 1) {
    for (const [from, to] of hidden(view, view.first + a, window)) {
      if (to > from) hatched.rect(x0 + from * cell, top + a * cell, (to - from) * cell, cell);
    }
    for (let b = 0; b <= a; b += 1) {
      const byte = map[a * n + b];
      context.fillStyle = `rgba(${colours.heat}, ${0.04 + (0.96 * byte) / strongest})`;
      context.fillRect(x0 + b * cell, top + a * cell, cell - gap, cell - gap);
    }
    if (geometry.before) {
      const share = Math.min(1, before[a] / strongest);
      context.fillStyle = `rgba(${colours.heat}, ${0.04 + 0.96 * share})`;
      context.fillRect(left, top + a * cell, geometry.before - 4, cell - gap);
    }
  }
  drawHatching(context, hatched, x0, top, n * cell, colours);
  drawLabels(context, labels, row - view.first, geometry, colours, view);
  context.lineWidth = 1.5;
  context.strokeStyle = colours.warm;
  const at = row - view.first;
  if (at >= 0 && at < n) {
    context.strokeRect(left - 0.5, top + at * cell - 0.75, geometry.before + n * cell + 0.5, cell + 0.5);
  }
  if (cursor) {
    const [x, y] = [x0 + (cursor.k - view.first) * cell, top + (cursor.q - view.first) * cell];
    context.strokeStyle = colours.accent;
    context.strokeRect(x - 0.75, y - 0.75, cell + 0.5, cell + 0.5);
  }
  return weight(strongest);
}

/**
 * @param {CanvasRenderingContext2D} context @param {Path2D} region @param {number} x0
 * @param {number} top @param {number} size @param {Colours} colours
 */
function drawHatching(context, region, x0, top, size, colours) {
  context.save();
  context.clip(region);
  context.fillStyle = colours.bg;
  context.fillRect(x0, top, size, size);
  context.strokeStyle = colours.line;
  context.lineWidth = 0.7;
  context.beginPath();
  for (let d = 0; d < 2 * size; d += 9) {
    context.moveTo(x0 + d, top);
    context.lineTo(x0 + d - size, top + size);
  }
  context.stroke();
  context.restore();
}

/**
 * @param {CanvasRenderingContext2D} context @param {string[]} labels @param {number} framed
 * @param {Geometry} geometry @param {Colours} colours @param {View} view
 */
function drawLabels(context, labels, framed, geometry, colours, view) {
  const { cell, left, top, before } = geometry;
  const size = Math.max(8, Math.min(10.5, cell - 0.5));
  const step = Math.ceil((size - 0.5) / cell);
  context.font = `${size}px ${MONO}`;
  context.textBaseline = "middle";
  const label = (/** @type {string} */ text, /** @type {number} */ x, /** @type {number} */ y, /** @type {boolean} */ up) => {
    context.save();
    context.translate(x, y);
    if (up) context.rotate(-Math.PI / 2);
    context.textAlign = up ? "left" : "right";
    context.fillText(short(visible(text), 13), 0, 0);
    context.restore();
  };
  labels.forEach((text, i) => {
    const near = Math.abs(i - framed) < step && i !== framed;
    if (i % step === 0) {
      context.fillStyle = colours.dim;
      label(text, left + before + i * cell + cell / 2, top - 6, true);
    }
    if (i === framed || (i % step === 0 && !near)) {
      context.fillStyle = i === framed ? colours.warm : colours.dim;
      label(text, left - 6, top + i * cell + cell / 2, false);
    }
  });
  if (before) {
    context.fillStyle = colours.dim;
    label(`${view.first} earlier`, left + (before - 4) / 2, top - 6, true);
  }
}

/** @param {{model: Model, el: HTMLElement}} context */
function render({ model, el }) {
  /** @type {{q: number, k: number}|null} */
  let cursor = null;
  /** @type {Geometry|null} */
  let geometry = null;
  let overviewAt = { cell: /** @type {[number, number]} */ ([1, 1]), left: 0, top: 0 };
  let frame = 0;
  let lastRefresh = -1e9;
  let requests = 0;
  let scroll = true;
  /** @type {{query: number, layer: number, head: number, rows: {key: number, token: string, weight: number}[]}|null} */
  let exact = null;

  // -- elements
  const alertText = h("span");
  const dismiss = h("button", { type: "button", click: () => run("dismiss_error") }, "Dismiss");
  const alert = h("div", { class: "gnb-alert", role: "alert", hidden: true }, alertText, dismiss);
  const state = h("span", { class: "gnb-dim", role: "status" });
  const blank = h("div", { class: "gnb-blank" });
  const overview = h("canvas", {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "overview of all heads",
    click: (/** @type {MouseEvent} */ event) => pickHead(event),
    keydown: (/** @type {KeyboardEvent} */ event) => moveHead(event),
  });
  const slidingText = h("span");
  const left = h(
    "div",
    { class: "gnb-overview" },
    overview,
    h(
      "div",
      { class: "gnb-keys" },
      h("span", {}, "layer × head"),
      h("span", {}, h("i", { class: "gnb-global" }), "global"),
      h("span", {}, h("i", { class: "gnb-sliding" }), slidingText),
    ),
  );
  const layerSelect = h("select", { "aria-label": "Layer", change: () => choose() });
  const headSelect = h("select", { "aria-label": "Head", change: () => choose() });
  const hide = h("input", { type: "checkbox", change: () => put("hide_bos", hide.checked) });
  const whole = h(
    "button",
    { type: "button", click: () => put("show_all", !model.get("show_all")) },
    "Show all",
  );
  const tableButton = h(
    "button",
    { type: "button", "aria-pressed": "false", click: () => toggleTable() },
    "Table",
  );
  const png = h("button", { type: "button", title: "Save this picture", click: () => savePicture() }, "PNG");
  const canvas = h("canvas", {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "heatmap",
    mousemove: (/** @type {MouseEvent} */ event) => pointAt(event),
    mouseleave: () => setCursor(null),
    click: (/** @type {MouseEvent} */ event) => pickRow(event),
    keydown: (/** @type {KeyboardEvent} */ event) => moveCursor(event),
  });
  const map = h("div", { class: "gnb-map" }, canvas);
  const readout = h("div", { class: "gnb-readout", "aria-live": "polite" });
  const caption = h("div", { class: "gnb-caption" });
  const data = h("div", { class: "gnb-data", hidden: true, tabindex: 0 });
  const tools = h(
    "div",
    { class: "gnb-tools" },
    layerSelect,
    headSelect,
    h("label", {}, hide, "hide BOS sink"),
    h("span", { class: "gnb-grow" }),
    whole,
    tableButton,
    png,
  );
  const right = h("div", { style: "min-width:0" }, tools, map, readout, caption, data);
  const body = h("div", { class: "gnb-body" }, left, right);

  // -- model
  const run = (/** @type {string} */ name, args = {}) => {
    model.send({ kind: "command", request: `a${++requests}`, name, args });
  };
  const put = (/** @type {string} */ name, /** @type {any} */ value) => {
    model.set(name, value);
    model.save_changes();
  };
  /** @returns {View} */
  const viewOf = () => model.get("view");
  const ready = () => Boolean(viewOf().size);
  const windowOf = () => model.get("shape").windows?.[viewOf().layer] ?? 0;

  /** The query position that chose the selected token; without a selection the last one. */
  function row() {
    const { position } = model.get("selected");
    const last = viewOf().length - 1;
    return position === undefined ? last : Math.max(0, Math.min(position - 1, last));
  }

  function choose() {
    model.set("layer", Number(layerSelect.value));
    model.set("head", Number(headSelect.value));
    model.save_changes();
  }

  function refresh() {
    const now = performance.now();
    if (now - lastRefresh < 1000) return;
    lastRefresh = now;
    run("refresh");
  }

  // -- drawing
  function schedule() {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(draw);
  }

  /** Brings the framed row into a map that is larger than its box. */
  function scrollToRow() {
    if (!geometry || !ready()) return;
    const y = geometry.top + (row() - viewOf().first + 0.5) * geometry.cell;
    map.scrollTop = y - map.clientHeight / 2;
    if (map.scrollTop > 0) map.scrollLeft = map.scrollWidth;
  }

  function draw() {
    if (!el.isConnected || !el.clientWidth) return;
    const colours = coloursOf(el);
    /** @type {Shape} */
    const shape = model.get("shape");
    if (shape.layers) {
      const chosen = { layer: model.get("layer"), head: model.get("head") };
      overviewAt = drawOverview(
        overview,
        shape,
        bytes(model.get("atlas")),
        model.get("atlas_side"),
        chosen,
        colours,
      );
    }
    if (!ready()) return;
    const view = viewOf();
    geometry = geometryOf(view, map.clientWidth);
    const full = drawMap(
      canvas,
      view,
      bytes(model.get("head_map")),
      bytes(model.get("before")),
      model.get("labels"),
      windowOf(),
      row(),
      cursor,
      geometry,
      colours,
    );
    if (scroll) scrollToRow();
    scroll = false;
    describe(full);
  }

  function describe(/** @type {number} */ full) {
    const view = viewOf();
    const labels = model.get("labels");
    const chosen = model.get("selected");
    const parts = [];
    if (chosen.position !== undefined && chosen.position - 1 === row()) {
      const text = chosen.text ?? "";
      parts.push(`Row: the query position that chose “${text.trim() || visible(text)}”.`);
    } else parts.push(`Row: query position ${row()}.`);
    parts.push("Hatched: can never be attended.");
    parts.push(`Colour: square root of weight, full at ${number(full)}.`);
    if (view.hide_bos) parts.push("Position 0 (the sink) is taken out.");
    if (view.first) {
      parts.push(
        `The ${view.first} positions before “${visible(labels[0])}” are collapsed into one column.`,
      );
    }
    const after = view.length - view.first - view.size;
    if (after > 0) parts.push(`The last ${after} positions are not shown.`);
    caption.textContent = parts.join(" ");
    const name = `Layer ${view.layer}, head ${view.head}`;
    canvas.setAttribute("aria-label", `${name}: queries down, keys across. Arrow keys move.`);
  }

  function onState() {
    const { phase, text } = model.get("status");
    const show = ready();
    body.hidden = !show;
    blank.hidden = show;
    blank.textContent = phase === "idle" ? "Send a message: the attention behind the reply appears here." : text;
    state.textContent = show && phase !== "ready" ? text : "";
    map.classList.toggle("gnb-stale", show && phase === "tracing");
    const error = model.get("error");
    alert.hidden = !error;
    alertText.textContent = error;
    schedule();
  }

  function onShape() {
    /** @type {Shape} */
    const shape = model.get("shape");
    if (!shape.layers) return;
    const group = shape.heads / shape.kv_heads;
    const option = (/** @type {number} */ value, /** @type {string} */ text) => h("option", { value }, text);
    layerSelect.replaceChildren(...shape.layers.map((kind, l) => option(l, `Layer ${l} · ${kind}`)));
    const heads = Array.from({ length: shape.heads }, (_, n) => n);
    headSelect.replaceChildren(
      ...heads.map((n) => option(n, `Head ${n} · KV group ${Math.floor(n / group)}`)),
    );
    slidingText.textContent = shape.layers.find((_, l) => shape.windows[l]) ?? "sliding";
    onChoice();
  }

  function onChoice() {
    layerSelect.value = String(model.get("layer"));
    headSelect.value = String(model.get("head"));
    const chosen = `Overview. Chosen: layer ${model.get("layer")}, head ${model.get("head")}.`;
    overview.setAttribute("aria-label", `${chosen} Arrow keys choose another.`);
    schedule();
  }

  function onView() {
    const view = viewOf();
    hide.checked = model.get("hide_bos");
    const all = model.get("show_all");
    whole.hidden = !ready() || (!all && view.size >= view.length);
    whole.textContent = all ? "Show the end" : `Show all ${Math.min(view.length, view.limit)}`;
    if (cursor && !inside(cursor.q, cursor.k)) cursor = null;
    scroll = true;
    onState();
    fillTable();
  }

  function onSelected() {
    schedule();
    fillTable();
  }

  // -- cursor and choices
  const inside = (/** @type {number} */ q, /** @type {number} */ k) => {
    const { first, size } = viewOf();
    return q >= first && q < first + size && k >= first && k <= q;
  };

  function cellAt(/** @type {MouseEvent} */ event) {
    if (!geometry || !ready()) return null;
    const k = Math.floor((event.offsetX - geometry.left - geometry.before) / geometry.cell);
    const q = Math.floor((event.offsetY - geometry.top) / geometry.cell);
    return { q: q + viewOf().first, k: k + viewOf().first };
  }

  function setCursor(/** @type {{q: number, k: number}|null} */ next) {
    cursor = next && inside(next.q, next.k) ? next : null;
    readout.textContent = cursor ? readoutOf(cursor) : "";
    schedule();
  }

  function readoutOf(/** @type {{q: number, k: number}} */ { q, k }) {
    const view = viewOf();
    const labels = model.get("labels");
    const pair = `${visible(labels[q - view.first])} (${q}) → ${visible(labels[k - view.first])} (${k})`;
    const window = windowOf();
    if (window && q - k >= window) return `${pair}  outside the window`;
    if (k === 0 && view.hide_bos) return `${pair}  taken out`;
    const at = (q - view.first) * view.size + (k - view.first);
    return `${pair}  ${number(weight(bytes(model.get("head_map"))[at]))}`;
  }

  const pointAt = (/** @type {MouseEvent} */ event) => setCursor(cellAt(event));

  function pickRow(/** @type {MouseEvent} */ event) {
    const at = cellAt(event);
    const view = viewOf();
    if (!at || at.q < view.first || at.q >= view.first + view.size) return;
    selectRow(at.q);
  }

  /** Frames query `q`; the chat selects the token that it chose, where that is in a reply. */
  function selectRow(/** @type {number} */ q) {
    const view = viewOf();
    const text = model.get("labels")[q + 1 - view.first] ?? "";
    put("selected", { position: q + 1, text });
  }

  function moveCursor(/** @type {KeyboardEvent} */ event) {
    if (!ready()) return;
    const at = cursor ?? { q: row(), k: row() };
    /** @type {Record<string, [number, number]>} */
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (event.key === "Enter" || event.key === " ") selectRow(at.q);
    else if (!step) return;
    event.preventDefault();
    if (!step) return;
    const next = { q: at.q + step[0], k: at.k + step[1] };
    if (!inside(next.q, next.k)) next.k = Math.min(next.k, next.q);
    if (inside(next.q, next.k)) setCursor(next);
  }

  function pickHead(/** @type {MouseEvent} */ event) {
    const { cell, left: x, top: y } = overviewAt;
    chooseAt(Math.floor((event.offsetY - y) / cell[1]), Math.floor((event.offsetX - x) / cell[0]));
  }

  function chooseAt(/** @type {number} */ layer, /** @type {number} */ head) {
    const { layers, heads } = model.get("shape");
    if (layer < 0 || head < 0 || layer >= layers.length || head >= heads) return;
    model.set("layer", layer);
    model.set("head", head);
    model.save_changes();
  }

  function moveHead(/** @type {KeyboardEvent} */ event) {
    const [layer, head] = [model.get("layer"), model.get("head")];
    if (event.key === "ArrowUp") chooseAt(layer - 1, head);
    else if (event.key === "ArrowDown") chooseAt(layer + 1, head);
    else if (event.key === "ArrowLeft") chooseAt(layer, head - 1);
    else if (event.key === "ArrowRight") chooseAt(layer, head + 1);
    else return;
    event.preventDefault();
  }

  // -- the table beside the picture
  function toggleTable() {
    data.hidden = !data.hidden;
    tableButton.setAttribute("aria-pressed", String(!data.hidden));
    fillTable();
  }

  function fillTable() {
    if (data.hidden || !ready()) return;
    const [query, view] = [row(), viewOf()];
    const known = exact?.query === query && exact.layer === view.layer && exact.head === view.head;
    const rows = known && exact ? exact.rows : quantisedRow(query);
    if (!known) run("row", { query });
    const tokens = model.get("labels");
    const from = visible(tokens[query - view.first] ?? "");
    const table = h(
      "table",
      {},
      h("caption", {}, `Strongest keys of query ${query} “${from}”, layer ${view.layer}, head ${view.head}`),
      h("thead", {}, h("tr", {}, ...["key", "token", "weight"].map((name) => h("th", { scope: "col" }, name)))),
      h(
        "tbody",
        {},
        ...rows.map(({ key, token, weight: w }) =>
          h(
            "tr",
            {},
            h("td", { class: "gnb-num" }, String(key)),
            h("td", {}, visible(token)),
            h("td", { class: "gnb-num", "data-weight": w }, w.toFixed(known ? 5 : 3)),
          ),
        ),
      ),
    );
    data.replaceChildren(table);
  }

  /** What the picture itself knows of a row, until Python's exact numbers come. */
  function quantisedRow(/** @type {number} */ query) {
    const view = viewOf();
    const from = (query - view.first) * view.size;
    if (from < 0) return [];
    const labels = model.get("labels");
    return Array.from(bytes(model.get("head_map")).subarray(from, from + view.size))
      .map((byte, i) => ({ key: view.first + i, token: labels[i], weight: weight(byte) }))
      .filter(({ key }) => key <= query && !(key === 0 && view.hide_bos))
      .sort((a, b) => b.weight - a.weight)
      .slice(0, 24);
  }

  function onAnswer(/** @type {any} */ message) {
    if (message?.kind !== "answer") return;
    if (message.error !== undefined) {
      state.textContent = message.error;
    } else if (message.result?.rows) {
      exact = message.result;
      const asked = exact && exact.query === row() && exact.layer === viewOf().layer;
      if (asked && exact?.head === viewOf().head) fillTable();
    }
  }

  function savePicture() {
    const { layer, head } = viewOf();
    canvas.toBlob((/** @type {Blob|null} */ blob) => {
      if (!blob) return;
      const url = URL.createObjectURL(blob);
      h("a", { href: url, download: `attention_layer${layer}_head${head}.png` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 1000);
    });
  }

  // -- life
  const onKey = (/** @type {KeyboardEvent} */ event) => event.stopPropagation();
  /** @type {[string, () => void][]} */
  const subscriptions = [
    ["change:status", onState],
    ["change:error", onState],
    ["change:shape", onShape],
    ["change:layer", onChoice],
    ["change:head", onChoice],
    ["change:view", onView],
    ["change:head_map", schedule],
    ["change:atlas", schedule],
    ["change:hide_bos", onView],
    ["change:show_all", onView],
    ["change:selected", onSelected],
    ["msg:custom", /** @type {any} */ (onAnswer)],
  ];
  for (const [name, listener] of subscriptions) model.on(name, listener);
  el.addEventListener("keydown", onKey);
  el.addEventListener("pointerenter", refresh);

  el.classList.add("gnb", "gnb-attention");
  el.dataset.lmSuppressShortcuts = "true";
  el.setAttribute("role", "region");
  el.setAttribute("aria-label", "Attention");
  el.append(
    h("div", { class: "gnb-head" }, h("b", {}, "Attention"), h("span", { class: "gnb-grow" }), state),
    alert,
    blank,
    body,
  );
  // Notebooks blank canvases that scroll away, and themes change: draw again.
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    schedule();
    refresh();
  });
  const sized = new ResizeObserver(schedule);
  const themed = new MutationObserver(schedule);
  seen.observe(el);
  sized.observe(el);
  for (const root of [document.body, document.documentElement]) {
    themed.observe(root, { attributes: true, attributeFilter: ["class", "data-jp-theme-light", "data-jp-theme-name", "theme"] });
  }
  onShape();
  onView();

  return () => {
    for (const [name, listener] of subscriptions) model.off(name, listener);
    el.removeEventListener("keydown", onKey);
    el.removeEventListener("pointerenter", refresh);
    seen.disconnect();
    sized.disconnect();
    themed.disconnect();
    cancelAnimationFrame(frame);
  };
}

export default { render };
