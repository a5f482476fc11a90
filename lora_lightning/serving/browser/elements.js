// Elements are made here alone, and texts are texts: no name of a class or of a file is ever read as HTML.
const byId = id => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.map(child => (child instanceof Node ? child : String(child))));
  return node;
}

function drawing(tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

// A name in one line, shortened in its middle: names come from files and may hold anything.
function short(name, longest = 60) {
  const plain = String(name).replace(/\p{C}/gu, "\ufffd");
  const third = Math.floor(longest / 3);
  return plain.length <= longest ? plain : `${plain.slice(0, longest - third - 1)}…${plain.slice(-third)}`;
}
