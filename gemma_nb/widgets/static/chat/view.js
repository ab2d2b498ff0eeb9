// @ts-check
// ChatPanel's view: what the other files make, put together.

const LOOKING = ["pointerenter", "pointermove", "focusin"];

/** @param {{model: Model, el: HTMLElement}} context */
function render({ model, el }) {
  const commands = commander(model);
  const card = alternativesCard(
    (tokenId) => fork(tokenId),
    () => conversation.elementAt(selection.place())?.focus(),
  );
  const conversation = conversationLog(model, act);
  const { log, live, empty, pending, turns } = conversation;
  const selection = tokenSelection(model, conversation, card);
  const settings = settingsForm(model, () => act("strip_evidence"));
  let sending = false;
  let slow = 0;

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
  const regenerate = h(
    "button",
    { class: "gnb-small", type: "button", click: () => act("regenerate") },
    "Regenerate",
  );
  const onwards = h(
    "button",
    {
      class: "gnb-small",
      type: "button",
      title: "Keeps the reply up to the selected token, and draws another end of it",
      click: () => fork(null),
    },
    "Branch from here",
  );
  const undo = h(
    "button",
    {
      class: "gnb-small",
      type: "button",
      title: "Takes the last message and its reply back",
      click: () => act("undo"),
    },
    "Undo",
  );
  const actions = h("div", { class: "gnb-actions" }, regenerate, onwards, undo);
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
    if (ok) selection.unpin(); // the new reply shows its own evidence
    fitBox();
  }

  /** Another end of the reply that the selected token is in. @param {number|null} tokenId */
  async function fork(tokenId) {
    const place = selection.place();
    if (!place) return;
    const turn = turns()[place.turn].id;
    const { ok } = await act("fork", { turn, token: place.token, with_token: tokenId });
    if (ok) selection.unpin();
  }

  async function stop() {
    const phase = model.get("status").phase;
    if (phase !== "generating" && !model.get("waiting")) return;
    const { result } = await act("stop");
    if (result && !box.value) box.value = result;
    fitBox();
  }

  function fitBox() {
    box.style.height = "auto";
    if (!box.value) box.style.height = "38px"; // not as high as the hint would be
    else box.style.height = `${Math.min(140, Math.max(38, box.scrollHeight + 2))}px`;
  }

  function drawAll() {
    conversation.trim(0);
    turns().forEach((_, at) => conversation.drawTurn(at));
    settle();
  }

  /** What depends on which turn is the last one. */
  function settle() {
    const all = turns();
    conversation.trim(all.length);
    const waiting = model.get("waiting");
    pending.hidden = !waiting;
    pending.textContent = waiting ? `${waiting}\n(waits until the model is ready)` : "";
    empty.hidden = all.length > 0 || Boolean(waiting);
    const last = all[all.length - 1];
    if (last?.role === "model" && last.finish) {
      conversation.views[all.length - 1].element.append(actions);
    } else actions.remove();
    updateStop();
    selection.settle();
  }

  function onDelta() {
    const delta = model.get("delta");
    if (!delta.seq) return;
    const near = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    const began = delta.start === 0 && delta.at === delta.length - 1;
    conversation.trim(began ? delta.at : delta.length);
    if (delta.turn !== null && turns()[delta.at]) conversation.drawTurn(delta.at);
    if (began || delta.turn === null || delta.turn.finish) settle();
    if (near || began) log.scrollTop = log.scrollHeight;
  }

  function onKey(/** @type {KeyboardEvent} */ event) {
    // The notebook's own shortcuts must not see what is typed here.
    event.stopPropagation();
    if (event.key === "Escape") stop();
    else if (event.target === box) {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    } else if (!(event.target instanceof HTMLInputElement)) conversation.moveFocus(event);
  }
  el.addEventListener("keydown", onKey);

  // -- small state
  function updateStop() {
    const busy = model.get("status").phase === "generating";
    stopButton.disabled = !busy && !model.get("waiting");
    for (const button of [regenerate, onwards, undo]) button.disabled = busy;
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
    const full = length > 0 && now > 0.8 * length;
    const count = `${now.toLocaleString("en")} of ${length.toLocaleString("en")}`;
    used.textContent = length ? `${count}${full ? ", nearly full" : ""}` : "–";
    meterBar.style.width = `${length ? Math.min(100, (100 * now) / length) : 0}%`;
    context.classList.toggle("gnb-full", full);
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
    ["change:selected", selection.onSelected],
    ["change:status", onStatus],
    ["change:error", onError],
    ["change:about", onAbout],
    ["change:tokens_per_second", onSpeed],
    ["change:cache_used", onCache],
    ["change:cache_length", onCache],
    ["change:settings", settings.onSettings],
    ["change:saved_bytes", settings.onSaved],
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
    h("div", { class: "gnb-foot" }, context, h("span", { class: "gnb-grow" }), settings.summary),
    settings.element,
    compose,
    note,
  );
  onAbout();
  onStatus();
  onCache();
  settings.onSettings();
  settings.onSaved();
  onTint();
  drawAll();
  selection.onSelected();
  log.scrollTop = log.scrollHeight;

  return () => {
    for (const [name, listener] of subscriptions) model.off(name, listener);
    el.removeEventListener("keydown", onKey);
    for (const name of LOOKING) el.removeEventListener(name, onLook);
    clearTimeout(slow);
    selection.close();
    commands.close();
  };
}

export default { initialize, render };
