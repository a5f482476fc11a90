// Draws each chart of a page: a Vega-Lite specification beside the place where it goes.
(() => {
  const ink = "var(--ink)", soft = "var(--soft)", line = "var(--line)", now = "var(--now)";
  const colours = [1, 2, 3, 4, 5, 6, 7, 8].map(i => `var(--c${i})`);
  const marks = ["bar", "point", "circle", "square", "line", "area", "rect", "tick", "arc", "trail", "rule"];
  const font = "system-ui,-apple-system,sans-serif";
  const config = {
    background: null, font, view: { stroke: null }, range: { category: colours },
    axis: {
      labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
      titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11, labelLimit: 160,
    },
    legend: {
      labelColor: ink, titleColor: soft, titleFontWeight: "normal", orient: "top", labelFontSize: 11, columns: 4,
      labelLimit: 200,
    },
    header: { labelColor: ink, titleColor: soft }, title: { color: ink, subtitleColor: soft, anchor: "start", fontSize: 12 },
    text: { color: ink },
    ...Object.fromEntries(marks.map(mark => [mark, { color: mark === "rule" ? soft : now }])),
  };

  /** Rows, which the page holds by columns. */
  const rows = ({ columns, length }) =>
    Array.from({ length }, (_, i) => Object.fromEntries(Object.entries(columns).map(([k, v]) => [k, v[i]])));

  const expand = part => {
    if (!part || typeof part !== "object") return part;
    if (Array.isArray(part)) return part.map(expand);
    if (part.columns && "length" in part) return { values: rows(part) };
    return Object.fromEntries(Object.entries(part).map(([k, v]) => [k, k === "values" ? v : expand(v)]));
  };

  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;

  const say = (handler, event, item, value) => {
    tip.hidden = value == null || value === "";
    if (tip.hidden) return;
    const entries = typeof value === "object" ? Object.entries(value) : [["", value]];
    tip.replaceChildren(...entries.map(([name, one]) => {
      const row = document.createElement("div"), title = document.createElement("b");
      title.textContent = name;
      row.append(title, String(one));
      return row;
    }));
    const { width, height } = tip.getBoundingClientRect(), { clientX: x, clientY: y } = event;
    tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - width - 4))}px`;
    tip.style.top = `${y + 16 + height > innerHeight ? Math.max(4, y - height - 10) : y + 16}px`;
  };

  const first = part => {  // the first rows that a specification has
    if (!part || typeof part !== "object") return null;
    if (part.data && Array.isArray(part.data.values)) return part.data.values;
    for (const key of ["layer", "concat", "hconcat", "vconcat"])
      for (const one of part[key] || []) { const found = first(one); if (found) return found; }
    return part.spec ? first(part.spec) : null;
  };

  const listed = (spec, most = 1000) => {
    const values = first(spec) || [], names = Object.keys(values[0] || {});
    const wide = document.createElement("div"), table = document.createElement("table");
    wide.className = "wide";
    const add = (kind, cells) => {
      const row = table.insertRow();
      for (const cell of cells) {
        const one = row.appendChild(document.createElement(kind));
        one.textContent = typeof cell === "number" ? Number(cell.toPrecision(6)) : cell ?? "–";
      }
    };
    add("th", names);
    values.slice(0, most).forEach(value => add("td", names.map(name => value[name])));
    wide.append(table);
    if (values.length > most) wide.append(`the first ${most} of ${values.length}`);
    return wide;
  };

  const logger = vega.logger(vega.Warn), { warn } = logger;
  // Vega-Lite says so of every chart that is as wide as its place and as high as its rows, as it should be.
  logger.warn = (...said) => String(said[0]).startsWith('Dropping "fit') ? logger : warn.apply(logger, said);

  const draw = figure => {
    const plot = figure.querySelector(".plot");
    if (figure.dataset.drawn || !plot.clientWidth) return;
    figure.dataset.drawn = "yes";
    const spec = expand(JSON.parse(figure.querySelector("script").textContent));
    const alone = spec.mark || spec.layer;  // several beside each other have widths of their own
    const fitting = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
    const placed = alone && !("width" in spec) ? { ...fitting, ...spec } : spec;
    const { spec: whole } = vegaLite.compile(placed, { config, logger });
    const label = plot.textContent;
    plot.replaceChildren();
    try {
      const view = new vega.View(vega.parse(whole), { renderer: "svg", hover: true, logLevel: vega.Warn });
      view.tooltip(say).initialize(plot).run();
    } catch (error) {
      plot.textContent = label;
      throw error;
    }
    const details = figure.querySelector("details");
    if (!first(spec)?.length) details?.remove();
    details?.addEventListener("toggle", () => details.append(listed(spec)), { once: true });
  };

  const all = () => document.querySelectorAll("figure.chart").forEach(draw);
  document.body.append(tip);
  addEventListener("toggle", all, true);  // what was folded away has no width before
  addEventListener("scroll", () => { tip.hidden = true; }, true);
  addEventListener("resize", all);
  all();
})();
