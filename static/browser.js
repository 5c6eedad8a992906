// Helps with what the browser offers: elements, announcements, storage and time.
// Texts become text nodes or attributes; nothing on this page parses HTML.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...content);
  return element;
}

export function button(words, act) {
  const made = make("button", { type: "button", class: "plain" }, words);
  made.addEventListener("click", () => act(made));
  return made;
}

/** Has a screen reader say the words, even if they are what it said last. */
export function say(words) {
  $("announcer").textContent = "";
  $("announcer").textContent = words;
}

/** This is session storage, or where it is forbidden, what lasts until the page is left. */
export const store = (() => {
  const memory = new Map();
  try {
    return sessionStorage;
  } catch {
    return {
      getItem: (name) => memory.get(name),
      setItem: (name, text) => memory.set(name, text),
      removeItem: (name) => memory.delete(name),
    };
  }
})();

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Reads JSON text, and gives null if it is none. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
