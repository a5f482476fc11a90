// A slider for the score that a box must have: what is less sure goes, and what is missed comes; also for those who
// have the pictures read to them.
(() => {
  const place = document.currentScript.previousElementSibling, within = document.currentScript.parentElement;
  const label = place.querySelector("label"), input = label.querySelector("input");
  const output = label.querySelector("output"), steps = JSON.parse(place.querySelector("script").textContent);
  label.hidden = false;
  input.addEventListener("input", () => {
    const threshold = Number(input.value);
    output.textContent = threshold.toFixed(2);
    const show = (box, on) => { box.classList.toggle("off", !on); box.ariaHidden = on ? null : "true"; };
    for (const box of within.querySelectorAll("[data-score]")) show(box, Number(box.dataset.score) >= threshold);
    for (const box of within.querySelectorAll("[data-above]")) show(box, Number(box.dataset.above) < threshold);
    for (const picture of within.querySelectorAll("svg.boxes:has([data-score], [data-above])")) {
      const count = kind => picture.querySelectorAll(`.${kind}:not(.off) rect`).length;
      const name = picture.ariaLabel.split(": ")[0];
      picture.ariaLabel = `${name}: ${count("right")} right, ${count("wrong")} false, ${count("missed")} missed`;
    }
    for (const row of place.querySelectorAll("[data-state]"))
      steps[row.dataset.state][Math.round(threshold * 100)].forEach((n, i) => { row.cells[i + 1].textContent = n; });
  });
})();
