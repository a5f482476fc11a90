// The page at `/`: a file, and an answer to it in each column.
const MOST = 3;  // columns
const SOUND = "transcribe";
const TITLES = { classify: "Classes of pictures", detect: "Objects in pictures", segment: "Areas of pictures",
  transcribe: "What is said" };
const state = { kind: "", names: [], file: null, url: "" };
const columns = [], player = byId("player");

async function begin() {
  const { data } = await (await fetched("v1/models")).json();
  state.names = data.map(model => model.id);
  byId("names").replaceChildren(...state.names.map(name => make("option", { value: name })));
  if (state.kind) return;
  state.kind = data[0].kind;
  const sound = state.kind === SOUND, adapters = data.length - 1;
  byId("what").textContent = `${TITLES[state.kind]}: ${adapters} adapter${adapters === 1 ? "" : "s"} of one base.`;
  document.querySelectorAll("[data-for]").forEach(node => {
    node.hidden = !node.dataset.for.split(" ").includes(state.kind);
  });
  byId("file").accept = sound ? "audio/*" : "image/*";
  byId("can").textContent = sound ? "a sound" : "a picture";
  if (sound && !navigator.mediaDevices) {
    byId("record").disabled = true;
    byId("note").textContent = "Browsers record on pages of https or of this machine alone.";
  }
  byId("work").hidden = false;
  addColumn();
}

function addColumn() {
  const used = columns.map(column => column.adapter);
  const [base, ...adapters] = state.names;
  const column = new Column([...adapters, base].find(name => !used.includes(name)) ?? base);
  columns.push(column);
  byId("columns").append(column.node);
  arrange();
  column.ask();
  return column;
}

function arrange() {
  columns.forEach((column, i) => column.named(i + 1, columns.length > 1));
  byId("columns").dataset.count = columns.length;
  byId("compare").disabled = columns.length === MOST;
}

class Column {
  constructor(adapter) {
    this.adapter = adapter;
    // a browser offers what fits the text that is there
    const clear = () => { if (this.field.value === this.adapter) this.field.value = ""; };
    this.field = make("input", {
      list: "names", autocomplete: "off", spellcheck: "false", value: adapter, placeholder: adapter,
      onfocus: clear, onclick: clear,
      onblur: () => { this.field.value = this.adapter; },
      oninput: event => { if (event.inputType === "insertReplacementText") this.choose(); },  // from the list
      onchange: () => this.choose(),
    });
    this.away = make("button", { type: "button", class: "away", onclick: () => this.leave() }, "×");
    this.status = make("p", { role: "status", class: "soft" });
    this.answer = make("div", { class: "answer" });
    this.node = make("section", {}, make("div", { class: "head" }, this.field, this.away), this.status, this.answer);
  }

  choose() {
    const name = this.field.value.trim();
    this.field.select();
    if (!name || name === this.adapter) return;
    this.adapter = this.field.placeholder = name;
    this.ask();
  }

  named(number, many) {
    this.node.setAttribute("aria-label", `Answer ${number}`);
    this.field.setAttribute("aria-label", `Adapter of answer ${number}`);
    this.away.setAttribute("aria-label", `Remove answer ${number}`);
    this.away.hidden = !many;
  }

  leave() {
    this.asked?.abort();
    columns.splice(columns.indexOf(this), 1);
    this.node.remove();
    arrange();
    byId("compare").focus();
  }

  async ask() {
    this.asked?.abort();
    if (!state.file) return;
    const asked = this.asked = new AbortController(), begun = performance.now();
    this.status.textContent = "…";
    this.status.className = "soft";
    this.answer.replaceChildren();
    try {
      const answer = await this.answered(asked.signal);
      const nodes = await this.drawn(answer);
      if (asked.signal.aborted) return;
      this.answer.replaceChildren(...nodes);
      this.status.textContent = `${((performance.now() - begun) / 1000).toFixed(2)} s`;
    } catch (error) {
      if (asked.signal.aborted) return;
      this.answer.replaceChildren();
      this.status.className = "wrong";
      this.status.textContent = error.message;
    }
  }

  async answered(signal) {
    const options = { adapter: this.adapter };
    for (const field of document.querySelectorAll("[data-option]"))
      if (!field.parentElement.hidden && field.value !== "") options[field.dataset.option] = field.value;
    if (state.kind !== SOUND) return answered(state.kind, state.file, options, signal);
    const told = one => { if (!signal.aborted) this.answer.append(segment(one, player)); };
    const file = state.file;
    try {
      return await answered(SOUND, file, options, signal, told);
    } catch (error) {
      if (error.status !== 415) throw error;
      const made = await (file.made ??= asWav(file, "sound.wav").catch(() => null));  // once for all columns
      if (!made) throw error;
      return answered(SOUND, made, options, signal, told);
    }
  }

  async drawn(answer) {
    if (state.kind === "classify") return [classes(answer)];
    if (state.kind === "detect") return boxes(answer, state.url);
    if (state.kind === "segment") return masks(answer, state.url);
    if (!answer.segments.length) return [make("p", { class: "soft" }, "Nothing is said.")];
    return answer.segments.map(one => segment(one, player));
  }
}

function choose(file) {
  if (!file) return;
  URL.revokeObjectURL(state.url);
  Object.assign(state, { file, url: URL.createObjectURL(file) });
  byId("name").textContent = `${short(file.name)}, ${size(file.size)}`;
  byId("note").textContent = "";
  if (state.kind === SOUND) {
    player.src = state.url;
    player.hidden = false;
  } else {
    byId("shown").replaceChildren(picture(state.url, "The picture", shown => {
      shown.remove();
      byId("note").textContent = "The browser cannot show this file.";
    }));
  }
  columns.forEach(column => column.ask());
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1000))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

async function record() {
  const button = byId("record");
  if (state.recorder) return state.recorder.stop();
  const done = () => { state.recorder = null; button.textContent = "Record"; clearInterval(ticking); };
  let ticking;
  try {
    state.recorder = await recording(file => { done(); choose(file); });
  } catch (error) {
    done();
    byId("note").textContent = `The microphone cannot be had: ${error.message}`;
    return;
  }
  const begun = Date.now(), tick = () => { button.textContent = `Stop, ${clock((Date.now() - begun) / 1000)}`; };
  tick();
  ticking = setInterval(tick, 100);
}

for (const id of ["file", "camera"]) {
  byId(id).addEventListener("change", event => {
    choose(event.target.files[0]);
    event.target.value = "";  // the same file again is another change
  });
}
byId("compare").addEventListener("click", () => addColumn().field.focus());
byId("record").addEventListener("click", record);
for (const field of document.querySelectorAll("[data-option]"))
  field.addEventListener("change", () => columns.forEach(column => column.ask()));
byId("shade").addEventListener("input", ({ target }) => {
  byId("columns").style.setProperty("--shade", target.value);
});
document.addEventListener("dragover", event => { event.preventDefault(); byId("drop").classList.add("over"); });
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", event => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (state.kind) choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", event => { if (state.kind) choose(event.clipboardData.files[0]); });
window.addEventListener("focus", () => { if (state.kind) begin().catch(() => {}); });  // adapters that came since
followed(player);
withToken(begin);
