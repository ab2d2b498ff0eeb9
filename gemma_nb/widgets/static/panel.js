// @ts-check
// What all panels share. It stands in front of each panel's own code, in one module: a notebook
// cannot follow an import.

/**
 * @typedef {{get(key: string): any, set(key: string, value: any): void, save_changes(): void,
 *   send(content: any): void, on(name: string, f: (...args: any[]) => void): void,
 *   off(name: string, f: (...args: any[]) => void): void}} Model
 */

/**
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `class` and attributes; functions become listeners
 * @param {...(Node|string)} children
 * @returns {any}
 */
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, String(value));
  }
  node.append(...children);
  return node;
}

/** @param {string} text */
const visible = (text) =>
  text.replaceAll("\n", "⏎").replaceAll(" ", "·").replaceAll("\t", "⇥");
