// @ts-check
// The turns as they are read, token by token; new tokens are appended, what is drawn stays.

/**
 * @typedef {{element: HTMLElement, who: HTMLElement, said: HTMLElement, ended: HTMLElement,
 *   count: number, blank: boolean, spoken: number, shown: string}} TurnView
 * @typedef {{turn: number, token: number}} Place  numbers in the transcript, not ids
 */

/**
 * @param {Model} model
 * @param {(name: string, args: Record<string, any>) => Promise<{ok: boolean}>} act
 */
function conversationLog(model, act) {
  /** @type {TurnView[]} */
  const views = [];
  const empty = h("div", { class: "gnb-empty" });
  const pending = h("div", { class: "gnb-turn gnb-user gnb-pending", hidden: true });
  const log = h(
    "div",
    // Said sentence by sentence in `live`; a token at a time nobody could listen to.
    { class: "gnb-log", role: "log", "aria-label": "Conversation", "aria-live": "off" },
    empty,
    pending,
  );
  const live = h("div", { class: "gnb-hidden-text", "aria-live": "polite" });

  /** @returns {Turn[]} */
  const turns = () => model.get("transcript")?.turns ?? [];

  /** @param {number} at @param {Turn} turn @returns {TurnView} */
  function addTurn(at, turn) {
    const said = h("div", { class: "gnb-said" });
    const ended = h("div", { class: "gnb-ended", hidden: true });
    const who = h("div", { class: "gnb-who" });
    const kind = turn.role === "user" ? "gnb-user" : "gnb-model";
    const element = h("div", { class: `gnb-turn ${kind}` }, who, said, ended);
    log.insertBefore(element, pending);
    const view = { element, who, said, ended, count: 0, blank: true, spoken: 0, shown: "" };
    views[at] = view;
    return view;
  }

  /** Who said it, which of several branches it is, and for a message that it can be edited. */
  function drawWho(/** @type {Turn} */ turn, /** @type {TurnView} */ view) {
    const beside = turn.beside ?? [];
    const shown = `${turn.id}/${beside.join()}`;
    if (view.shown === shown) return;
    view.shown = shown;
    view.who.replaceChildren(turn.role === "user" ? "You" : "Gemma");
    const now = beside.indexOf(turn.id);
    const step = (/** @type {number} */ to, /** @type {string} */ sign, /** @type {string} */ name) =>
      h(
        "button",
        {
          class: "gnb-small gnb-step",
          type: "button",
          "aria-label": name,
          title: name,
          disabled: beside[to] === undefined,
          click: () => act("select", { turn: beside[to] }),
        },
        sign,
      );
    if (now >= 0) {
      view.who.append(
        h("span", {}, `branch ${now + 1} of ${beside.length}`),
        step(now - 1, "‹", "Previous branch"),
        step(now + 1, "›", "Next branch"),
      );
    }
    if (turn.role === "user" && turn.id >= 0) {
      const title = "Say something else here, on a branch of its own";
      const click = () => edit(turn, view);
      view.who.append(h("button", { class: "gnb-small gnb-edit", type: "button", title, click }, "Edit"));
    }
  }

  /** A box in the place of a message: Enter sends it again, Escape leaves it as it was. */
  function edit(/** @type {Turn} */ turn, /** @type {TurnView} */ view) {
    const leave = () => {
      box.replaceWith(view.said);
      view.who.hidden = false;
      /** @type {HTMLElement|null} */ (view.who.querySelector(".gnb-edit"))?.focus();
    };
    const box = h("textarea", {
      class: "gnb-editing",
      "aria-label": "Edit message",
      title: "Enter sends it again, Escape leaves it as it was",
      rows: Math.min(8, (turn.text ?? "").split("\n").length + 1),
      keydown: async (/** @type {KeyboardEvent} */ event) => {
        event.stopPropagation();
        if (event.key === "Escape") leave();
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        if ((await act("edit", { turn: turn.id, text: box.value })).ok && box.isConnected) leave();
      },
    });
    box.value = turn.text ?? "";
    view.said.replaceWith(box);
    view.who.hidden = true;
    box.focus();
  }

  /** @param {Turn} turn @param {number} at @param {number} index @param {TurnView} view */
  function tokenElement(turn, at, index, view) {
    const token = turn.tokens[index];
    // A reply's first space is how its first word is spelt as a token: trimmed for the eye only.
    const text = view.blank ? token.t.trimStart() : token.t;
    view.blank &&= !text;
    const node = h("span", {
      class: text ? "gnb-tok" : "gnb-tok gnb-mark gnb-part",
      tabindex: -1,
      "data-token-index": index,
      "data-turn-index": at,
      "data-token-id": token.id,
    });
    node.textContent = text;
    node.style.setProperty("--gnb-surprise", (1 - probability(token.lp)).toFixed(3));
    if (!text) node.title = visible(token.w ?? token.t) || "an empty token";
    return node;
  }

  /** Brings what is shown of turn `at` up to date; new tokens only, where there are some. */
  function drawTurn(/** @type {number} */ at) {
    const turn = turns()[at];
    const kind = turn.role === "user" ? "gnb-user" : "gnb-model";
    let view = views[at];
    if (view && (turn.tokens.length < view.count || !view.element.classList.contains(kind))) {
      view.element.remove();
      delete views[at];
      view = /** @type {any} */ (undefined);
    }
    view ??= addTurn(at, turn);
    drawWho(turn, view);
    if (turn.role === "user" || (turn.finish && !turn.tokens.length)) {
      view.said.textContent = turn.text ?? "";
      if (turn.role === "user") return;
    }
    if (turn.tokens.length && !view.count) view.said.replaceChildren();
    for (; view.count < turn.tokens.length; view.count += 1) {
      view.said.append(tokenElement(turn, at, view.count, view));
    }
    if (!turn.tokens.length && !turn.finish) view.said.textContent = "…";
    if (turn.finish) markEnd(turn, view);
    speak(turn, view);
  }

  /** @param {Turn} turn @param {TurnView} view */
  function markEnd(turn, view) {
    const last = /** @type {HTMLElement|null} */ (view.said.lastElementChild);
    if (last?.classList.contains("gnb-part")) {
      const token = turn.tokens[turn.tokens.length - 1];
      last.classList.remove("gnb-part");
      last.textContent = visible(token.w ?? token.t).slice(0, 16) || "end";
      last.title = "the token that ended the reply";
    }
    view.ended.hidden = turn.finish === "stop" || !turn.detail;
    view.ended.textContent = turn.detail ?? "";
  }

  /** Hands finished sentences of a new reply to screen readers. */
  function speak(/** @type {Turn} */ turn, /** @type {TurnView} */ view) {
    const text = view.said.textContent ?? "";
    if (text === "…") return;
    const rest = text.slice(view.spoken);
    const end = turn.finish ? rest.length : (rest.match(/^[\s\S]*[.!?…](?=\s)|^[\s\S]*\n/)?.[0].length ?? 0);
    if (!end) return;
    view.spoken += end;
    if (model.get("status").phase === "generating") live.textContent = rest.slice(0, end);
  }

  /** Takes away the turns from number `length` on. */
  function trim(/** @type {number} */ length) {
    while (views.length > length) views.pop()?.element.remove();
  }

  /** @param {Place|null} where @returns {Token|null} */
  const tokenAt = (where) => (where ? (turns()[where.turn]?.tokens[where.token] ?? null) : null);

  /** @param {Place|null} where @returns {HTMLElement|null} */
  const elementAt = (where) =>
    where ? (views[where.turn]?.said.querySelector(`[data-token-index="${where.token}"]`) ?? null) : null;

  /** @param {Element|null} node */
  const whereOf = (node) => {
    const token = /** @type {HTMLElement|null} */ (node?.closest?.(".gnb-tok") ?? null);
    return token
      ? { turn: Number(token.dataset.turnIndex), token: Number(token.dataset.tokenIndex) }
      : null;
  };

  /** Arrow keys, Home and End: between tokens, and between turns. */
  function moveFocus(/** @type {KeyboardEvent} */ event) {
    const all = /** @type {HTMLElement[]} */ ([...log.querySelectorAll(".gnb-tok")]);
    const now = all.indexOf(/** @type {HTMLElement} */ (event.target));
    if (now < 0) return;
    const turnOf = (/** @type {number} */ i) => all[i]?.dataset.turnIndex;
    let next = now;
    if (event.key === "ArrowRight") next = now + 1;
    else if (event.key === "ArrowLeft") next = now - 1;
    else if (event.key === "Home") next = all.findIndex((_, i) => turnOf(i) === turnOf(now));
    else if (event.key === "End") next = all.findLastIndex((_, i) => turnOf(i) === turnOf(now));
    else if (event.key === "ArrowDown") next = all.findIndex((_, i) => i > now && turnOf(i) !== turnOf(now));
    else if (event.key === "ArrowUp") next = all.findLastIndex((_, i) => i < now && turnOf(i) !== turnOf(now));
    else return;
    event.preventDefault();
    all[next]?.focus();
  }

  return {
    log,
    live,
    empty,
    pending,
    views,
    turns,
    drawTurn,
    trim,
    tokenAt,
    elementAt,
    whereOf,
    moveFocus,
  };
}
