// What was found in a picture, drawn: classes as bars, boxes and masks over it.
const COLOURS = ["#5aa9ff", "#ffb020", "#3ddc84", "#e58bff", "#ff8577", "#36d3e6", "#e6d24a", "#b8c4cf"];
const FONT = "600 12px system-ui, sans-serif", LETTER = 17;  // of a label, and its height
const LARGEST = 1600;  // pixels of a mask's longer side on the screen
const TALLEST = 32;  // rem, of a picture
const colours = new Map();  // of classes: the same in every column
const pen = document.createElement("canvas").getContext("2d");

function colourOf(label) {
  if (!colours.has(label)) colours.set(label, COLOURS[colours.size % COLOURS.length]);
  return colours.get(label);
}

const percent = share => `${(100 * share).toFixed(1)} %`;

// {predictions: [{label, probability}]}, or {value}
function classes(answer) {
  if ("value" in answer) return make("p", { class: "headline" }, make("b", {}, Number(answer.value.toPrecision(5))));
  if (!answer.predictions.length) return make("p", { class: "soft" }, "No class is likely enough.");
  return make("ol", { class: "classes" }, ...answer.predictions.map(({ label, probability }) => {
    const bar = make("b");
    bar.style.width = `${100 * probability}%`;
    return make("li", {}, make("span", {}, short(label, 80)), make("em", {}, percent(probability)), make("i", {}, bar));
  }));
}

// A picture, small ones by their pixels; `failed` is called with it where the browser cannot show it, as the
// server knows more formats.
function picture(url, told, failed) {
  return make("img", {
    src: url, alt: told, onerror: ({ target }) => failed(target),
    onload: ({ target }) => target.classList.toggle("small", target.naturalWidth <= 64),
  });
}

// The picture with something over it.
function view(answer, url, told, ...over) {
  const place = make("div", { class: "view" }, picture(url, told, shown => shown.remove()), ...over);
  place.style.aspectRatio = `${answer.width} / ${answer.height}`;
  place.style.width = `min(100%, ${TALLEST * answer.width / answer.height}rem)`;
  return place;
}

// {width, height, predictions: [{label, score, box}]}
function boxes(answer, url) {
  const found = answer.predictions, svg = drawing("svg", { "aria-hidden": "true" });
  const told = `The picture with ${found.length} object${found.length === 1 ? "" : "s"}`;
  const place = view(answer, url, told, svg);
  const mark = number => () => svg.querySelectorAll("[data-number]").forEach(node => {
    node.classList.toggle("off", number !== null && node.dataset.number !== String(number));
  });
  new ResizeObserver(() => drawBoxes(svg, answer, place.clientWidth)).observe(place);
  if (!found.length) return [place, make("p", { class: "soft" }, "Nothing is sure enough.")];
  const rows = found.map(({ label, score, box }, i) => make(
    "li", { tabindex: "0", onpointerenter: mark(i), onpointerleave: mark(null), onfocus: mark(i), onblur: mark(null) },
    swatch(colourOf(label)), make("span", {}, short(label)), make("em", {}, score.toFixed(2)),
    make("small", {}, `${Math.round(box[2] - box[0])} × ${Math.round(box[3] - box[1])} px`),
  ));
  return [place, make("ul", { class: "found", "aria-label": "Objects" }, ...rows)];
}

function drawBoxes(svg, answer, width) {
  const scale = width / answer.width, height = answer.height * scale;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  pen.font = FONT;
  const rects = answer.predictions.map(({ box }) => box.map(value => value * scale));
  const names = answer.predictions.map(({ label, score }) => `${short(label, 30)} ${score.toFixed(2)}`);
  const sizes = names.map(name => [Math.ceil(pen.measureText(name).width) + 8, LETTER]);
  const nodes = rects.map(([left, top, right, bottom], i) => {
    const at = { x: left, y: top, width: Math.max(1, right - left), height: Math.max(1, bottom - top) };
    const node = drawing("g", { "data-number": i, color: colourOf(answer.predictions[i].label) });
    node.append(drawing("rect", { ...at, class: "under" }), drawing("rect", at));
    return node;
  });
  placed(rects, sizes, width, height).forEach((place, i) => {
    if (!place) return;  // no room: the list beneath has it
    const [left, top, right, bottom] = place;
    const node = drawing("g", { "data-number": i, color: colourOf(answer.predictions[i].label), class: "name" });
    node.append(
      drawing("rect", { x: left, y: top, width: right - left, height: bottom - top }),
      drawing("text", { x: left + 4, y: bottom - 4.5 }, names[i]),
    );
    nodes.push(node);
  });
  svg.replaceChildren(...nodes);
}

// {width, height, classes: [{label, value, share}], mask}
async function masks(answer, url) {
  const shown = answer.classes.filter(one => one.share > 0).sort((one, other) => other.share - one.share);
  const mask = new Image();
  mask.src = `data:image/png;base64,${answer.mask}`;
  await mask.decode();
  const scale = Math.min(1, LARGEST / Math.max(mask.naturalWidth, mask.naturalHeight));
  const canvas = make("canvas", { class: "mask", role: "img", "aria-label": "Which class each pixel has" });
  canvas.width = Math.max(1, Math.round(mask.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(mask.naturalHeight * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(mask, 0, 0, canvas.width, canvas.height);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height), { data } = pixels;
  for (let i = 0; i < data.length; i += 4) if (!(data[i] || data[i + 1] || data[i + 2])) data[i + 3] = 0;  // the ground
  context.putImageData(pixels, 0, 0);
  const palette = paletteOf(answer.mask);
  const rows = shown.map(({ label, value, share }) => make(
    "li", { class: "share" }, swatch(palette[value]), make("span", {}, short(label)), make("em", {}, percent(share)),
  ));
  return [
    view(answer, url, "The picture, its classes laid over it", canvas),
    make("ul", { class: "found", "aria-label": "Classes" }, ...rows),
  ];
}

// The colours of a PNG's palette, as CSS has them.
function paletteOf(png) {
  const bytes = Uint8Array.from(atob(png), c => c.charCodeAt(0)), numbers = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; at += 12 + numbers.getUint32(at)) {
    if (String.fromCharCode(...bytes.subarray(at + 4, at + 8)) !== "PLTE") continue;
    const colour = i => `rgb(${bytes.subarray(at + 8 + 3 * i, at + 11 + 3 * i).join(" ")})`;
    return Array.from({ length: numbers.getUint32(at) / 3 }, (_, i) => colour(i));
  }
  return [];
}

function swatch(colour) {
  const node = make("i", { "aria-hidden": "true" });
  node.style.background = colour ?? "transparent";
  return node;
}
