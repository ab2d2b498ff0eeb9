// @ts-check
// AttentionPanel's view: the overview of all heads, one head's map, its table.

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
  const table = keyTable(model, { run: (name, args) => run(name, args), row });
  const tools = h(
    "div",
    { class: "gnb-tools" },
    layerSelect,
    headSelect,
    h("label", {}, hide, "hide BOS sink"),
    h("span", { class: "gnb-grow" }),
    whole,
    table.button,
    png,
  );
  const right = h("div", { style: "min-width:0" }, tools, map, readout, caption, table.element);
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

  function onAnswer(/** @type {any} */ message) {
    if (message?.kind !== "answer") return;
    if (message.error !== undefined) state.textContent = message.error;
    else if (message.result?.rows) table.take(message.result);
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
    table.forget();
  }

  function onSelected() {
    schedule();
    table.fill();
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
