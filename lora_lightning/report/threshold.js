// A slider for the score that a box must have: what is less sure goes, and what is missed comes.
(() => {
  const place = document.currentScript.previousElementSibling, within = document.currentScript.parentElement;
  const label = place.querySelector("label"), input = label.querySelector("input");
  const output = label.querySelector("output"), steps = JSON.parse(place.querySelector("script").textContent);
  label.hidden = false;
  input.addEventListener("input", () => {
    const threshold = Number(input.value);
    output.textContent = threshold.toFixed(2);
    for (const box of within.querySelectorAll("[data-score]"))
      box.classList.toggle("off", Number(box.dataset.score) < threshold);
    for (const box of within.querySelectorAll("[data-above]"))
      box.classList.toggle("off", Number(box.dataset.above) >= threshold);
    for (const row of place.querySelectorAll("[data-state]"))
      steps[row.dataset.state][Math.round(threshold * 100)].forEach((n, i) => { row.cells[i + 1].textContent = n; });
  });
})();
