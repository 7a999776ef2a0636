// What the page asks of the server. Where the server wants a key, the page asks for it once and keeps it in this tab.

const KEY = "transformerlm.key";
let asking = null;

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Return the response to a request; with a body it is a POST of JSON. Throws ApiError.
export async function ask(path, { body, signal, anyStatus = false } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { Accept: "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer.", "unreachable");
    }
    if (response.status === 401) {
      await newKey(key);
      continue;
    }
    if (response.ok || anyStatus) return response;
    const told = (await response.json().catch(() => null))?.error;
    throw new ApiError(response.status, told?.message ?? `The server answered ${response.status}.`, told?.code);
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

// Yield the events of a stream as {event, data}, data parsed.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const fields = Object.fromEntries(part.split("\n").map((line) => {
          const colon = line.indexOf(":");
          return [line.slice(0, colon), line.slice(colon + 1).trim()];
        }));
        if (fields.data === "[DONE]") continue;
        if (fields.data) yield { event: fields.event, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Wait for a key that is not the one that was refused; all requests share one dialog.
function newKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return Promise.resolve();
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    if (refused) document.getElementById("key-status").textContent = "The server refused this key.";
    const use = (event) => {
      event.preventDefault();
      const typed = field.value.trim();
      if (!/^[\x20-\x7e]+$/.test(typed)) {
        // No header can hold it, and no server's key is like that: a blank of no width, or a curly quotation mark.
        document.getElementById("key-status").textContent = "A key has letters, digits and signs of ASCII alone.";
        return;
      }
      sessionStorage.setItem(KEY, typed);
      field.value = "";
      document.getElementById("key-form").removeEventListener("submit", use);
      dialog.close();
      asking = null;
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
    // A second Escape closes it in Chromium whatever is prevented; without a key the page is of no use.
    dialog.onclose = () => {
      if (asking && !dialog.open) dialog.showModal();
    };
    document.getElementById("key-form").addEventListener("submit", use);
    dialog.showModal();
  });
  return asking;
}
