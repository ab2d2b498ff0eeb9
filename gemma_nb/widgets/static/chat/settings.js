// @ts-check
// The sampler's settings, and what a saved notebook holds of the conversation.

const SETTINGS = [
  ["temperature", "Temperature", "0.1", "0"],
  ["top_k", "Top-k", "1", "1"],
  ["top_p", "Top-p", "0.05", "0"],
  ["seed", "Seed", "1", "0"],
  ["max_new_tokens", "Max tokens", "1", "1"],
];

/**
 * @param {Model} model
 * @param {() => void} stripEvidence
 */
function settingsForm(model, stripEvidence) {
  const summary = h("button", {
    class: "gnb-summary gnb-small",
    type: "button",
    "aria-expanded": "false",
    title: "Settings of the sampler",
    click: () => {
      element.hidden = !element.hidden;
      summary.setAttribute("aria-expanded", String(!element.hidden));
    },
  });
  /** @type {Record<string, HTMLInputElement>} */
  const inputs = {};
  const element = h("div", {
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
    element.append(h("label", {}, label, inputs[name]));
  }
  const savedText = h("span");
  const strip = h(
    "button",
    {
      class: "gnb-small",
      type: "button",
      title: "Drops the alternatives from what this notebook saves; the session keeps them",
      click: () => stripEvidence(),
    },
    "Strip evidence",
  );
  element.append(h("div", { class: "gnb-evidence" }, savedText, strip));

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


  return { summary, element, onSettings, onSaved };
}
