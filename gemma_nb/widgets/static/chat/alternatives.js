// @ts-check
// What else the model considered in the place of one token.

const SHOWN_ROWS = 6;

/** @param {number|null} logprob */
const probability = (logprob) => (logprob === null ? 0 : Math.exp(logprob));

/** @param {number} p */
function percent(p) {
  if (p >= 0.0995) return `${(p * 100).toFixed(0)} %`;
  if (p >= 0.00095) return `${(p * 100).toFixed(1)} %`;
  return p > 0.00005 ? `${(p * 100).toFixed(2)} %` : "< 0.01 %";
}

/** The last whole tokens before number `index`, some 28 characters. @param {Token[]} tokens */
function tailBefore(tokens, /** @type {number} */ index) {
  let tail = "";
  let from = index;
  while (from > 0 && (!tail || tail.length + tokens[from - 1].t.length <= 28)) {
    from -= 1;
    tail = tokens[from].t + tail;
  }
  return (from > 0 ? "…" : "") + tail.trim().replaceAll("\n", "⏎");
}

/**
 * The card of one token's alternatives.
 * @param {(tokenId: number) => void} branch puts another token there
 * @param {() => void} leave gives the focus back to the token
 */
function alternativesCard(branch, leave) {
  let all = false;
  const head = h("div", { class: "gnb-alts-head" });
  const rows = h("div", { role: "list", "aria-label": "Alternatives" });
  const more = h("button", { class: "gnb-small", type: "button", click: () => expand(!all) });
  const note = h(
    "div",
    { class: "gnb-alts-note", hidden: true },
    h("span", {}, "bar: the model’s probability · tick: after the sampler"),
    more,
  );
  const element = h(
    "section",
    { class: "gnb-alts", role: "region", "aria-label": "Token alternatives" },
    head,
    rows,
    note,
  );

  const expand = (/** @type {boolean} */ value) => {
    all = value;
    more.textContent = all ? "Fewer" : `All ${rows.children.length}`;
    more.setAttribute("aria-expanded", String(all));
    more.hidden = rows.children.length <= SHOWN_ROWS;
    let shown = 0;
    for (const row of rows.children) {
      const keep = row.classList.contains("gnb-chosen");
      row.hidden = !all && !keep && shown >= SHOWN_ROWS;
      if (!row.hidden && !keep) shown += 1;
    }
  };

  /** @param {[number, string, number|null, number|null]} other @param {boolean} chosen */
  const rowOf = ([id, text, logprob, after], chosen) => {
    const pill = chosen
      ? h("span", { class: "gnb-pill" }, "chosen")
      : h(
          "button",
          {
            class: "gnb-small gnb-branch",
            type: "button",
            tabindex: -1,
            "aria-label": `Branch with “${visible(text)}”`,
            title: "Put this token there, and let the reply go on from it",
            click: () => branch(id),
          },
          "branch",
        );
    const p = probability(logprob);
    const bar = h("i");
    bar.style.width = `${p * 100}%`;
    const tick = h("u");
    tick.style.left = `${Math.min(99.5, Math.max(0.5, (after ?? 0) * 100))}%`;
    const said = `${visible(text)}, ${percent(p)}, after the sampler ${percent(after ?? 0)}`;
    return h(
      "div",
      {
        class: chosen ? "gnb-row gnb-chosen" : "gnb-row",
        role: "listitem",
        title: `${visible(text)}\nbefore the sampler ${p.toPrecision(4)}\nafter it ${after ?? 0}`,
        "aria-label": chosen ? `${said}, chosen` : said,
        "data-token-id": id,
        "data-probability": p,
        "data-probability-after": after ?? 0,
      },
      h("code", {}, visible(text)),
      h("div", { class: "gnb-bar" }, bar, tick),
      h("span", { class: "gnb-num" }, percent(p)),
      pill,
    );
  };

  // One tab stop for all rows, arrow keys between them.
  element.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape") leave();
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = /** @type {HTMLElement[]} */ ([
      ...element.querySelectorAll(".gnb-row:not([hidden]) button"),
    ]);
    const now = buttons.indexOf(/** @type {HTMLElement} */ (event.target));
    if (!step || now < 0) return;
    event.preventDefault();
    const next = buttons[now + step];
    if (!next) return;
    buttons[now].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  return {
    element,
    /** @param {Token|null} token @param {string} tail the text that came right before it */
    show(token, tail) {
      head.replaceChildren();
      rows.replaceChildren();
      note.hidden = token === null;
      if (token === null) {
        const hint = "Hover or focus a token of a reply to see what else the model considered.";
        head.append(h("span", {}, hint));
        return;
      }
      const facts = `entropy ${(token.h ?? 0).toFixed(2)} nats · chosen rank ${token.r + 1}`;
      head.append(
        h("b", {}, tail ? `After “${tail}”` : "First token of the reply"),
        h("span", {}, facts),
      );
      let found = false;
      for (const other of token.a) {
        const chosen = other[0] === token.id;
        found ||= chosen;
        rows.append(rowOf(other, chosen));
      }
      if (!found) {
        const row = rowOf([token.id, token.w ?? token.t, token.lp, token.p], true);
        row.classList.add("gnb-outside");
        rows.append(row);
      }
      expand(all);
      const first = /** @type {HTMLElement|null} */ (rows.querySelector("button"));
      if (first) first.tabIndex = 0;
    },
  };
}
