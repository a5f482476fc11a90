// Where the labels of boxes go, so that none covers another: `placed` of report/labels.py, for which see there.
const STEPS = 9;

// boxes: [left, top, right, bottom]; sizes: [width, height] of the labels; of each its rectangle, or null.
function placed(boxes, sizes, width, height) {
  const taken = [];
  return boxes.map((box, i) => {
    const [wide, high] = sizes[i];
    if (wide > width || high > height) return null;
    for (const [x, y] of around(box, wide, high)) {
      const left = Math.min(Math.max(x, 0), width - wide), top = Math.min(Math.max(y, 0), height - high);
      const place = [left, top, left + wide, top + high];
      if (meet(place, box, -1) && !taken.some(other => meet(place, other, 1e-9))) {
        taken.push(place);
        return place;
      }
    }
    return null;
  });
}

// The best first: on the upper edge from its left end, on the lower one, within, beside.
function around([left, top, right, bottom], wide, high) {
  const along = right - left > wide ? steps(left, right - wide) : [left, right - wide];
  const beside = bottom - top > high ? steps(top, bottom - high) : [top, bottom - high];
  return [
    ...[top - high, bottom, top, bottom - high].flatMap(y => along.map(x => [x, y])),
    ...[right, left - wide].flatMap(x => beside.map(y => [x, y])),
    ...[top - high, bottom].flatMap(y => [left - wide, right].map(x => [x, y])),
  ];
}

function steps(from, to) {
  return Array.from({ length: STEPS }, (_, i) => from + (i * (to - from)) / (STEPS - 1));
}

// Whether two overlap by more than `least`, which may be negative: then they may lie so far apart.
function meet(one, other, least) {
  return Math.min(one[2], other[2]) - Math.max(one[0], other[0]) > least
    && Math.min(one[3], other[3]) - Math.max(one[1], other[1]) > least;
}
