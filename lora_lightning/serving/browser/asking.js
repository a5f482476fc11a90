// What is asked of the server, with the token where it wants one, and its errors: one line each.
const KEPT = "lora-lightning-token";  // in the session's storage: gone with the tab

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function fetched(address, options = {}) {
  const token = sessionStorage.getItem(KEPT);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(address, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server does not answer: is it still running?", 0);
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => null);
  throw new Refused(content?.error?.message ?? `the server answers with ${response.status}.`, response.status);
}

// The answer of a kind to a file; `told` is called with each segment of a sound as it is heard.
async function answered(kind, file, options, signal, told) {
  const query = new URLSearchParams({ ...options, ...(told ? { stream: "true" } : {}) });
  const headers = { "Content-Type": "application/octet-stream" };
  const response = await fetched(`v1/${kind}?${query}`, { method: "POST", body: file, headers, signal });
  if (!told) return response.json();
  let answer = null;
  for await (const [event, content] of eventsOf(response.body)) {
    if (event === "part") told(content.segment);
    if (event === "answer") answer = content;
    if (event === "error") throw new Refused(content.message, response.status);
  }
  if (!answer) throw new Refused("the answer was broken off: ask again.", 0);
  return answer;
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const [event, data] = block.split("\n");
      yield [event.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

// Calls `begin` until it ends well: once, and again with each token that is typed.
function withToken(begin) {
  const form = byId("token"), field = form.querySelector("input"), problem = byId("problem");
  const tried = async () => {
    problem.textContent = "";
    try {
      await begin();
      form.hidden = true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const asked = sessionStorage.getItem(KEPT) !== null;
      form.hidden = error.status !== 401;
      problem.textContent = error.status !== 401 ? error.message : asked ? "This is not the token." : "";
      if (!form.hidden) field.focus();
    }
  };
  form.addEventListener("submit", event => {
    event.preventDefault();
    sessionStorage.setItem(KEPT, field.value.trim());
    tried();
  });
  return tried();
}
