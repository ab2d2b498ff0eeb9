// @ts-check
// ChatPanel's front end: one self-contained ES module, no imports, no network. Model text is
// untrusted: it only ever becomes text nodes.

/**
 * A reply's token: id, text, label where it is not the text, position, log-probability before the
 * sampler, probability after it, entropy (nats), rank (0 first), alternatives.
 * @typedef {{id: number, t: string, w?: string, at: number, lp: number|null, p: number|null,
 *   h: number|null, r: number, a: [number, string, number|null, number|null][]}} Token
 * @typedef {{id: number, role: "user"|"model", text?: string, finish?: string, detail?: string,
 *   new?: number, tps?: number, tokens: Token[]}} Turn
 * @typedef {{seq: number, turns: Turn[]}} Transcript
 * @typedef {{seq: number, length: number, at: number, turn: Omit<Turn, "tokens">|null,
 *   start: number, tokens: Token[]}} Delta
 * @typedef {{element: HTMLElement, said: HTMLElement, ended: HTMLElement, count: number,
 *   blank: boolean, spoken: number, head: string}} TurnView
 */

// For each message that it gets the kernel says that it is busy, and then idle, and the notebook
// shows so in several places: that takes longer than a delta itself.
const ACK_EVERY = 8;
const SHOWN_ROWS = 6;
const LOOKING = ["pointerenter", "pointermove", "focusin"];
const SETTINGS = [
  ["temperature", "Temperature", "0.1", "0"],
  ["top_k", "Top-k", "1", "1"],
  ["top_p", "Top-p", "0.05", "0"],
  ["seed", "Seed", "1", "0"],
  ["max_new_tokens", "Max tokens", "1", "1"],
];

/** @param {number|null} logprob */
const probability = (logprob) => (logprob === null ? 0 : Math.exp(logprob));

/** @param {number} p */
function percent(p) {
  if (p >= 0.0995) return `${(p * 100).toFixed(0)} %`;
  if (p >= 0.00095) return `${(p * 100).toFixed(1)} %`;
  return p > 0.00005 ? `${(p * 100).toFixed(2)} %` : "< 0.01 %";
}

/**
 * Applies a delta in place, so that a saved notebook holds what was streamed.
 * @param {Transcript} transcript
 * @param {Delta} delta
 * @returns {boolean} false when a delta before this one is missing
 */
function applyDelta(transcript, delta) {
  if (delta.seq <= transcript.seq) return true;
  const { turns } = transcript;
  if (delta.seq !== transcript.seq + 1 || delta.at > turns.length) return false;
  const tokens = delta.start > 0 ? (turns[delta.at]?.tokens ?? []) : [];
  if (delta.start > tokens.length) return false;
  transcript.seq = delta.seq;
  turns.length = Math.min(turns.length, delta.length);
  if (delta.turn === null) return true;
  tokens.length = delta.start;
  tokens.push(...delta.tokens);
  turns[delta.at] = { ...delta.turn, tokens };
  return true;
}

/** Keeps the model's transcript up to date, views or not. @param {{model: Model}} context */
function initialize({ model }) {
  let asked = false;
  const onDelta = () => {
    const delta = model.get("delta");
    if (!delta.seq) return;
    if (applyDelta(model.get("transcript"), delta)) {
      if (delta.seq < model.get("ack") + ACK_EVERY) return;
      model.set("ack", delta.seq);
      model.save_changes();
    } else if (!asked) {
      asked = true;
      model.send({ kind: "command", request: "resync", name: "resync" });
    }
  };
  const onTranscript = () => {
    asked = false;
  };
  model.on("change:delta", onDelta);
  model.on("change:transcript", onTranscript);
  // What was said since the widget was made, in a cell that is still running for example.
  model.send({ kind: "command", request: "hello", name: "refresh" });
  return () => {
    model.off("change:delta", onDelta);
    model.off("change:transcript", onTranscript);
  };
}

/** Sends commands and waits for their answers. @param {Model} model */
function commander(model) {
  const own = Math.random().toString(36).slice(2);
  /** @type {Map<string, {resolve: (value: any) => void, reject: (error: Error) => void}>} */
  const waiting = new Map();
  let count = 0;
  const onAnswer = (/** @type {any} */ message) => {
    const entry = message?.kind === "answer" ? waiting.get(message.request) : undefined;
    if (!entry) return;
    waiting.delete(message.request);
    if (message.error === undefined) entry.resolve(message.result);
    else entry.reject(new Error(message.error));
  };
  model.on("msg:custom", onAnswer);
  return {
    /** @param {string} name @param {Record<string, any>} [args] @returns {Promise<any>} */
    run(name, args = {}) {
      const request = `${own}-${++count}`;
      return new Promise((resolve, reject) => {
        waiting.set(request, { resolve, reject });
        model.send({ kind: "command", request, name, args });
      });
    },
    close() {
      model.off("msg:custom", onAnswer);
      waiting.clear();
    },
  };
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

/** The card of one token's alternatives. */
function alternativesCard() {
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
      h("span", { class: "gnb-pill" }, chosen ? "chosen" : ""),
    );
  };

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
    },
  };
}

/** @param {{model: Model, el: HTMLElement}} context */
function render({ model, el }) {
  const commands = commander(model);
  const card = alternativesCard();
  /** @type {TurnView[]} */
  const views = [];
  /** @type {{turn: number, token: number}|null} */
  let pinned = null;
  /** @type {{turn: number, token: number}|null} */
  let hovered = null;
  let sending = false;
  let slow = 0;
  let pushTimer = 0;

  // -- elements
  const title = h("b");
  const chips = h("span", { style: "display:contents" });
  const speed = h("span", { class: "gnb-chip", title: "tokens per second, prompt not counted" });
  const fresh = h(
    "button",
    {
      class: "gnb-small",
      type: "button",
      "aria-label": "New conversation",
      title: "Start a new conversation with an empty context",
      click: () => act("new_conversation"),
    },
    "New",
  );
  const alertText = h("span");
  const retry = h(
    "button",
    { class: "gnb-small", type: "button", click: () => act("retry") },
    "Retry",
  );
  const dismiss = h(
    "button",
    { class: "gnb-small", type: "button", click: () => act("dismiss_error") },
    "Dismiss",
  );
  const alert = h("div", { class: "gnb-alert", role: "alert", hidden: true }, alertText);
  alert.append(retry, dismiss);
  const progressText = h("span");
  const progressNumber = h("span");
  const progressBar = h("i");
  const track = h(
    "div",
    { class: "gnb-track", role: "progressbar", "aria-label": "Loading", "aria-valuemax": 100 },
    progressBar,
  );
  const progress = h(
    "div",
    { class: "gnb-progress", hidden: true },
    progressText,
    progressNumber,
    track,
  );
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
  const regenerate = h(
    "button",
    { class: "gnb-small", type: "button", click: () => act("regenerate") },
    "Regenerate",
  );
  const actions = h("div", { class: "gnb-actions" }, regenerate);
  const tint = h("input", {
    type: "checkbox",
    change: () => {
      model.set("show_tint", tint.checked);
      model.save_changes();
    },
  });
  const legend = h(
    "div",
    { class: "gnb-legend" },
    h("label", {}, tint, "Underline surprise"),
    h("span", { "aria-hidden": "true" }, "expected"),
    h("span", { class: "gnb-scale", "aria-hidden": "true" }),
    h("span", {}, "unlikely (1 − probability)"),
  );
  const meterBar = h("i");
  const used = h("span");
  const context = h(
    "div",
    { class: "gnb-context", role: "status", "aria-label": "Context", "aria-live": "off" },
    h("span", {}, "Context"),
    h("div", { class: "gnb-meter", "aria-hidden": "true" }, meterBar),
    used,
  );
  const summary = h("button", {
    class: "gnb-summary gnb-small",
    type: "button",
    "aria-expanded": "false",
    title: "Settings of the sampler",
    click: () => {
      settings.hidden = !settings.hidden;
      summary.setAttribute("aria-expanded", String(!settings.hidden));
    },
  });
  /** @type {Record<string, HTMLInputElement>} */
  const inputs = {};
  const settings = h("div", {
    class: "gnb-settings",
    role: "group",
    "aria-label": "Settings",
    hidden: true,
  });
  for (const [name, label, step, min] of SETTINGS) {
    const free = !["temperature", "max_new_tokens"].includes(name);
    inputs[name] = h("input", {
      type: "number",
      step,
      min,
      placeholder: free ? "off" : "",
      change: () => changeSetting(),
    });
    settings.append(h("label", {}, label, inputs[name]));
  }
  const savedText = h("span");
  const strip = h(
    "button",
    {
      class: "gnb-small",
      type: "button",
      title: "Drops the alternatives from what this notebook saves; the session keeps them",
      click: () => act("strip_evidence"),
    },
    "Strip evidence",
  );
  settings.append(h("div", { class: "gnb-evidence" }, savedText, strip));
  const box = h("textarea", {
    "aria-label": "Message",
    rows: 1,
    placeholder: "Message (Enter sends)",
    title: "Enter sends, Shift+Enter breaks the line, Escape stops the reply",
    input: () => fitBox(),
  });
  const sendButton = h(
    "button",
    { class: "gnb-primary", type: "button", click: () => send() },
    "Send",
  );
  const stopButton = h("button", { type: "button", click: () => stop() }, "Stop");
  const compose = h("div", { class: "gnb-compose" }, box, sendButton, stopButton);
  const note = h("div", { class: "gnb-note", role: "status", hidden: true });

  // -- commands
  const say = (/** @type {string} */ text) => {
    note.textContent = text;
    note.hidden = !text;
  };

  /** @param {string} name @param {Record<string, any>} [args] */
  async function act(name, args = {}) {
    clearTimeout(slow);
    slow = window.setTimeout(
      () => say("Waiting for the kernel: it may be running a cell, or not be connected."),
      2500,
    );
    try {
      const result = await commands.run(name, args);
      say("");
      return { ok: true, result };
    } catch (error) {
      say(/** @type {Error} */ (error).message);
      return { ok: false, result: undefined };
    } finally {
      clearTimeout(slow);
    }
  }

  async function send() {
    const text = box.value;
    if (sending || !text.trim()) return;
    sending = true;
    const { ok } = await act("send_message", { text });
    sending = false;
    // What was typed meanwhile, or a message that was refused, stays.
    if (ok && box.value === text) box.value = "";
    if (ok) pinned = null; // the new reply shows its own evidence
    fitBox();
  }

  async function stop() {
    const phase = model.get("status").phase;
    if (phase !== "generating" && !model.get("waiting")) return;
    const { result } = await act("stop");
    if (result && !box.value) box.value = result;
    fitBox();
  }

  function changeSetting() {
    /** @type {Record<string, number|null>} */
    const next = {};
    for (const [name] of SETTINGS) {
      const value = inputs[name].valueAsNumber;
      next[name] = Number.isNaN(value) ? null : value;
    }
    model.set("settings", next);
    model.save_changes();
  }

  function fitBox() {
    box.style.height = "auto";
    if (!box.value) box.style.height = "38px"; // not as high as the hint would be
    else box.style.height = `${Math.min(140, Math.max(38, box.scrollHeight + 2))}px`;
  }

  // -- conversation
  /** @returns {Turn[]} */
  const turns = () => model.get("transcript")?.turns ?? [];

  /** @param {number} at @param {Turn} turn @returns {TurnView} */
  function addTurn(at, turn) {
    const said = h("div", { class: "gnb-said" });
    const ended = h("div", { class: "gnb-ended", hidden: true });
    const element =
      turn.role === "user"
        ? h("div", { class: "gnb-turn gnb-user" }, said)
        : h("div", { class: "gnb-turn gnb-model" }, h("div", { class: "gnb-who" }, "Gemma"), said);
    if (turn.role === "model") element.append(ended);
    log.insertBefore(element, pending);
    const view = { element, said, ended, count: 0, blank: true, spoken: 0, head: "" };
    views[at] = view;
    return view;
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

  function drawAll() {
    for (const view of views) view?.element.remove();
    views.length = 0;
    turns().forEach((_, at) => drawTurn(at));
    settle();
  }

  /** What depends on which turn is the last one. */
  function settle() {
    const all = turns();
    while (views.length > all.length) views.pop()?.element.remove();
    const waiting = model.get("waiting");
    pending.hidden = !waiting;
    pending.textContent = waiting ? `${waiting}\n(waits until the model is ready)` : "";
    empty.hidden = all.length > 0 || Boolean(waiting);
    const last = all[all.length - 1];
    if (last?.role === "model" && last.finish) {
      views[all.length - 1].element.append(actions);
    } else actions.remove();
    updateStop();
    if (pinned && !tokenAt(pinned)) pinned = null;
    if (hovered && !tokenAt(hovered)) hovered = null;
    if (last?.role === "model" && last.finish && last.tokens.length && !pinned) {
      if (!hovered || hovered.turn !== all.length - 1) showMostSurprising(all.length - 1);
    }
    showSelection();
  }

  function onDelta() {
    const delta = model.get("delta");
    if (!delta.seq) return;
    const near = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    const began = delta.start === 0 && delta.at === delta.length - 1;
    while (views.length > (began ? delta.at : delta.length)) views.pop()?.element.remove();
    if (delta.turn !== null && turns()[delta.at]) drawTurn(delta.at);
    if (began || delta.turn === null || delta.turn.finish) settle();
    if (near || began) log.scrollTop = log.scrollHeight;
  }

  // -- the selected token
  /** @param {{turn: number, token: number}|null} where @returns {Token|null} */
  const tokenAt = (where) => (where ? (turns()[where.turn]?.tokens[where.token] ?? null) : null);

  /** @param {{turn: number, token: number}|null} where @returns {HTMLElement|null} */
  const elementAt = (where) =>
    where ? (views[where.turn]?.said.querySelector(`[data-token-index="${where.token}"]`) ?? null) : null;

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

  /** @param {Element|null} node */
  const whereOf = (node) => {
    const token = /** @type {HTMLElement|null} */ (node?.closest?.(".gnb-tok") ?? null);
    return token
      ? { turn: Number(token.dataset.turnIndex), token: Number(token.dataset.tokenIndex) }
      : null;
  };

  /** @param {{turn: number, token: number}|null} where @param {boolean} pin */
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

  function onKey(/** @type {KeyboardEvent} */ event) {
    // The notebook's own shortcuts must not see what is typed here.
    event.stopPropagation();
    if (event.key === "Escape") stop();
    else if (event.target === box) {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    } else if (!(event.target instanceof HTMLInputElement)) moveFocus(event);
  }
  el.addEventListener("keydown", onKey);

  // -- small state
  function updateStop() {
    const busy = model.get("status").phase === "generating";
    stopButton.disabled = !busy && !model.get("waiting");
    regenerate.disabled = busy;
    fresh.disabled = busy || !turns().length;
  }

  function onStatus() {
    const { phase, fraction, text } = model.get("status");
    const preparing = phase === "loading" || phase === "compiling";
    el.dataset.phase = phase;
    el.setAttribute("aria-busy", String(preparing || phase === "generating"));
    progress.hidden = !preparing;
    progressText.textContent = text;
    progressNumber.textContent = `${Math.round(fraction * 100)} %`;
    progressBar.style.width = `${fraction * 100}%`;
    track.setAttribute("aria-valuenow", String(Math.round(fraction * 100)));
    empty.textContent = preparing
      ? "Type already: a message sent now waits for the model."
      : phase === "error"
        ? "The model could not be loaded."
        : "Write a message below. The model that answers runs here, in this notebook’s kernel.";
    onError();
    updateStop();
    onSpeed();
  }

  function onError() {
    const text = model.get("error");
    alert.hidden = !text;
    alertText.textContent = text;
    retry.hidden = model.get("status").phase !== "error";
  }

  function onAbout() {
    const about = model.get("about");
    title.textContent = about.title ?? "Gemma";
    chips.replaceChildren(
      .../** @type {string[]} */ (about.chips ?? []).map((chip) => h("span", { class: "gnb-chip" }, chip)),
    );
  }

  function onSpeed() {
    const value = model.get("tokens_per_second");
    const { phase, text } = model.get("status");
    speed.textContent = phase === "generating" && !value ? text : `${value.toFixed(value < 10 ? 1 : 0)} tok/s`;
    speed.hidden = !value && phase !== "generating";
  }

  function onCache() {
    const [now, length] = [model.get("cache_used"), model.get("cache_length")];
    used.textContent = length ? `${now.toLocaleString("en")} of ${length.toLocaleString("en")}` : "–";
    meterBar.style.width = `${length ? Math.min(100, (100 * now) / length) : 0}%`;
    context.classList.toggle("gnb-full", length > 0 && now > 0.9 * length);
  }

  function onSettings() {
    const now = model.get("settings");
    for (const [name] of SETTINGS) {
      if (document.activeElement !== inputs[name]) inputs[name].value = now[name] ?? "";
      inputs[name].disabled = now.temperature === undefined;
    }
    const parts = now.temperature === undefined ? ["settings"] : [`temperature ${now.temperature}`];
    if (now.top_k != null) parts.push(`top-k ${now.top_k}`);
    if (now.top_p != null) parts.push(`top-p ${now.top_p}`);
    if (now.seed != null) parts.push(`seed ${now.seed}`);
    summary.textContent = parts.join(" · ");
  }

  function onSaved() {
    const bytes = model.get("saved_bytes");
    savedText.textContent = `A saved notebook holds ${(bytes / 1e6).toFixed(2)} MB of this conversation.`;
    strip.disabled = !bytes;
  }

  function onTint() {
    tint.checked = model.get("show_tint");
    el.classList.toggle("gnb-tinted", tint.checked);
  }

  // What was said elsewhere (a cell's chat.chat) shows as soon as someone looks here.
  let looked = -1e9;
  const onLook = () => {
    const now = performance.now();
    if (now - looked < 1000 || model.get("status").phase === "generating") return;
    looked = now;
    commands.run("refresh").catch(() => {});
  };

  /** @type {[string, () => void][]} */
  const subscriptions = [
    ["change:delta", onDelta],
    ["change:transcript", drawAll],
    ["change:waiting", settle],
    ["change:selected", onSelected],
    ["change:status", onStatus],
    ["change:error", onError],
    ["change:about", onAbout],
    ["change:tokens_per_second", onSpeed],
    ["change:cache_used", onCache],
    ["change:cache_length", onCache],
    ["change:settings", onSettings],
    ["change:saved_bytes", onSaved],
    ["change:show_tint", onTint],
  ];
  for (const [name, listener] of subscriptions) model.on(name, listener);
  for (const name of LOOKING) el.addEventListener(name, onLook);

  el.classList.add("gnb", "gnb-chat");
  el.dataset.lmSuppressShortcuts = "true";
  el.append(
    h("div", { class: "gnb-head" }, title, chips, h("span", { class: "gnb-grow" }), speed, fresh),
    alert,
    progress,
    log,
    live,
    legend,
    card.element,
    h("div", { class: "gnb-foot" }, context, h("span", { class: "gnb-grow" }), summary),
    settings,
    compose,
    note,
  );
  onAbout();
  onStatus();
  onCache();
  onSettings();
  onSaved();
  onTint();
  drawAll();
  onSelected();
  log.scrollTop = log.scrollHeight;

  return () => {
    for (const [name, listener] of subscriptions) model.off(name, listener);
    el.removeEventListener("keydown", onKey);
    for (const name of LOOKING) el.removeEventListener(name, onLook);
    clearTimeout(slow);
    clearTimeout(pushTimer);
    commands.close();
  };
}

export default { initialize, render };
