// @ts-check
// Heatmaps on canvases. Labels are untrusted: they only ever become text nodes or canvas text.

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
