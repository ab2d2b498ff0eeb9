// @ts-check
// Commands to the kernel, and their answers.

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
