// @ts-check
// The strongest keys of the framed row, as a table beside the picture.

/**
 * @typedef {{query: number, layer: number, head: number,
 *   rows: {key: number, token: string, weight: number}[]}} ExactRow
 * @param {Model} model
 * @param {{run: (name: string, args?: Record<string, any>) => void, row: () => number}} panel
 */
function keyTable(model, { run, row }) {
  /** @type {ExactRow|null} */
  let exact = null;
  const element = h("div", { class: "gnb-data", hidden: true, tabindex: 0 });
  const button = h(
    "button",
    { type: "button", "aria-pressed": "false", click: () => toggleTable() },
    "Table",
  );

  function toggleTable() {
    element.hidden = !element.hidden;
    button.setAttribute("aria-pressed", String(!element.hidden));
    fill();
  }

  function fill() {
    if (element.hidden || !model.get("view").size) return;
    const [query, view] = [row(), model.get("view")];
    const known = exact?.query === query && exact.layer === view.layer && exact.head === view.head;
    const rows = known && exact ? exact.rows : quantisedRow(query);
    if (!known) run("row", { query });
    const tokens = model.get("labels");
    const from = visible(tokens[query - view.first] ?? "");
    const filled = h(
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
    element.replaceChildren(filled);
  }

  /** What the picture itself knows of a row, until Python's exact numbers come. */
  function quantisedRow(/** @type {number} */ query) {
    const view = model.get("view");
    const from = (query - view.first) * view.size;
    if (from < 0) return [];
    const labels = model.get("labels");
    return Array.from(bytes(model.get("head_map")).subarray(from, from + view.size))
      .map((byte, i) => ({ key: view.first + i, token: labels[i], weight: weight(byte) }))
      .filter(({ key }) => key <= query && !(key === 0 && view.hide_bos))
      .sort((a, b) => b.weight - a.weight)
      .slice(0, 24);
  }

  /** Python's exact weights of a row have come. */
  function take(/** @type {ExactRow} */ answer) {
    exact = answer;
    const view = model.get("view");
    if (answer.query !== row() || answer.layer !== view.layer || answer.head !== view.head) return;
    fill();
  }

  /** Another map is shown: what was exact is so no longer. */
  function forget() {
    exact = null;
    fill();
  }

  return { element, button, fill, take, forget };
}
