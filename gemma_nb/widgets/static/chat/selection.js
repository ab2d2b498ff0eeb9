// @ts-check
// One token is selected: hovered, or pinned by a click or the keyboard.

/**
 * @param {Model} model
 * @param {ReturnType<typeof conversationLog>} conversation
 * @param {ReturnType<typeof alternativesCard>} card
 */
function tokenSelection(model, conversation, card) {
  const { log, turns, tokenAt, elementAt, whereOf } = conversation;
  /** @type {Place|null} */
  let pinned = null;
  /** @type {Place|null} */
  let hovered = null;
  let pushTimer = 0;

  function showSelection() {
    const where = hovered ?? pinned;
    const token = tokenAt(where);
    for (const node of log.querySelectorAll(".gnb-on")) node.classList.remove("gnb-on");
    card.show(token, where && token ? tailBefore(turns()[where.turn].tokens, where.token) : "");
    elementAt(where)?.classList.add("gnb-on");
    // One tab stop for all tokens: the selected one, else the last.
    for (const node of log.querySelectorAll('.gnb-tok[tabindex="0"]')) node.tabIndex = -1;
    const all = log.querySelectorAll(".gnb-tok");
    const stopAt = elementAt(pinned ?? hovered) ?? all[all.length - 1];
    if (stopAt) stopAt.tabIndex = 0;
  }

  /** Shares the selection with the other panels; not for every token the pointer crosses. */
  function push() {
    clearTimeout(pushTimer);
    pushTimer = window.setTimeout(() => {
      const where = hovered ?? pinned;
      const token = tokenAt(where);
      if (!where || !token) return;
      const next = {
        turn: turns()[where.turn].id,
        token: where.token,
        position: token.at,
        text: token.w ?? token.t,
      };
      const now = model.get("selected");
      if (now.turn === next.turn && now.token === next.token) return;
      model.set("selected", next);
      model.save_changes();
    }, 80);
  }

  /** @param {Place|null} where @param {boolean} pin */
  function select(where, pin) {
    if (pin) {
      pinned = where;
      hovered = null;
    } else hovered = where;
    showSelection();
    push();
  }

  function showMostSurprising(/** @type {number} */ at) {
    const { tokens } = turns()[at];
    let best = 0;
    tokens.forEach((token, index) => {
      if (token.t.trim() && (token.lp ?? 0) < (tokens[best].lp ?? 0)) best = index;
    });
    hovered = { turn: at, token: best };
    push();
  }

  function onSelected() {
    const selected = model.get("selected");
    const all = turns();
    for (let turn = all.length - 1; turn >= 0; turn -= 1) {
      const token = all[turn].tokens.findIndex((other) => other.at === selected.position);
      if (token < 0) continue;
      const shown = hovered ?? pinned;
      if (shown?.turn === turn && shown.token === token) return;
      pinned = { turn, token };
      hovered = null;
      showSelection();
      return;
    }
  }

  log.addEventListener("mouseover", (/** @type {MouseEvent} */ event) => {
    const where = whereOf(/** @type {Element} */ (event.target));
    if (where) select(where, false);
  });
  log.addEventListener("mouseleave", () => {
    if (!pinned) return;
    hovered = null;
    showSelection();
    push();
  });
  log.addEventListener("click", (/** @type {MouseEvent} */ event) => {
    const where = whereOf(/** @type {Element} */ (event.target));
    if (where) select(where, true);
  });
  log.addEventListener("focusin", (/** @type {FocusEvent} */ event) => {
    const where = whereOf(/** @type {Element} */ (event.target));
    if (where) select(where, true);
  });

  /** After the turns changed: what is gone is not selected, and a new reply shows its evidence. */
  function settle() {
    const all = turns();
    const last = all[all.length - 1];
    if (pinned && !tokenAt(pinned)) pinned = null;
    if (hovered && !tokenAt(hovered)) hovered = null;
    if (last?.role === "model" && last.finish && last.tokens.length && !pinned) {
      if (!hovered || hovered.turn !== all.length - 1) showMostSurprising(all.length - 1);
    }
    showSelection();
  }

  return {
    settle,
    onSelected,
    /** @returns {Place|null} */
    place: () => hovered ?? pinned,
    /** Lets a new reply show its own evidence. */
    unpin() {
      pinned = null;
    },
    close: () => clearTimeout(pushTimer),
  };
}
