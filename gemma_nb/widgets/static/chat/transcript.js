// @ts-check
// The conversation as Python sends it, kept in the widget's model. Model text is untrusted: it only
// ever becomes text nodes.

/**
 * A reply's token: id, text, label where it is not the text, position, log-probability before the
 * sampler, probability after it, entropy (nats), rank (0 first), alternatives.
 * @typedef {{id: number, t: string, w?: string, at: number, lp: number|null, p: number|null,
 *   h: number|null, r: number, a: [number, string, number|null, number|null][]}} Token
 * @typedef {{id: number, role: "user"|"model", text?: string, finish?: string, detail?: string,
 *   new?: number, tps?: number, beside?: number[], tokens: Token[]}} Turn  `beside`: the ids of all
 *   that were tried in its place, its own among them
 * @typedef {{seq: number, turns: Turn[]}} Transcript
 * @typedef {{seq: number, length: number, at: number, turn: Omit<Turn, "tokens">|null,
 *   start: number, tokens: Token[]}} Delta
 */

// For each message that it gets the kernel says that it is busy, and then idle, and the notebook
// shows so in several places: that takes longer than a delta itself.
const ACK_EVERY = 8;

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
