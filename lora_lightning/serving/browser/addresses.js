// The page at `/docs`: what /openapi.json says, as a person reads it.
async function begin() {
  const { paths } = await (await fetched("openapi.json")).json();
  const all = Object.entries(paths).flatMap(
    ([path, methods]) => Object.entries(methods).map(([method, one]) => section(method.toUpperCase(), path, one)),
  );
  byId("addresses").replaceChildren(...all);
}

function section(method, path, { summary, description, parameters = [], requestBody, responses }) {
  const fields = parameters.map(({ name, description: about = "", schema = {} }) => [name, range(schema), about]);
  const bodies = Object.keys(requestBody?.content ?? {}).map(kind => [kind, requestBody.content[kind].schema.description ?? ""]);
  const answers = Object.entries(responses).map(([status, { description: about }]) => [status, about]);
  return make(
    "section", {}, make("h2", {}, make("code", {}, `${method} ${path}`)),
    make("p", {}, description ?? `${summary}.`),
    ...table("Options", fields), ...table("Body, one of", bodies),
    make("details", {}, make("summary", {}, "Answers and errors"), rowsOf(answers)),
  );
}

function range({ type = "", minimum, maximum, enum: values }) {
  if (values) return values.join(", ");
  return minimum === undefined ? type : `${type}, ${minimum} to ${maximum}`;
}

function table(title, rows) {
  return rows.length ? [make("h3", {}, title), rowsOf(rows)] : [];
}

function rowsOf(rows) {
  const lines = rows.map(cells => make("tr", {}, ...cells.map((cell, i) => make("td", i ? {} : { class: "name" }, cell))));
  return make("div", { class: "wide" }, make("table", {}, make("tbody", {}, ...lines)));
}

withToken(begin);
