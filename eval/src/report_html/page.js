// Filters of the samples. Without this script the page shows all samples.
(() => {
  "use strict";
  const form = document.getElementById("filters");
  if (!form) return;
  const page = 10;
  const { model, outcome, text } = form.elements;
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const samples = [...document.querySelectorAll(".sample")].map((element) => ({
    element,
    answers: [...element.querySelectorAll(".answer")],
    text: element.textContent.toLowerCase(),
  }));
  let limit = page;

  // Returns whether a sample is shown, by the verdicts on its visible answers.
  const matches = (answers) => {
    const any = (wanted) => answers.some((answer) => answer.dataset.outcome === wanted);
    switch (outcome.value) {
      case "right": return any("right");
      case "wrong": return any("wrong");
      case "differ": return any("right") && any("wrong");
      default: return true;
    }
  };

  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const sample of samples) {
      const answers = sample.answers.filter((a) => !model.value || a.dataset.model === model.value);
      for (const answer of sample.answers) answer.hidden = !answers.includes(answer);
      const hit = answers.length > 0 && matches(answers) && words.every((word) => sample.text.includes(word));
      found += hit ? 1 : 0;
      sample.element.hidden = !hit || found > limit;
    }
    const shown = Math.min(found, limit);
    count.value = found === 0
      ? `No sample matches, of ${samples.length}.`
      : `${shown} shown of ${found} that match, of ${samples.length}.`;
    more.hidden = found <= limit;
  };

  // The filter is part of the address, so that a link keeps the selection.
  const read = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const field of [model, outcome, text]) {
      field.value = state.get(field.name) ?? "";
      if (field.selectedIndex === -1) field.value = "";
    }
  };
  const write = () => {
    const state = new URLSearchParams();
    for (const field of [model, outcome, text]) if (field.value) state.set(field.name, field.value);
    history.replaceState(null, "", `#${state}`);
  };

  form.addEventListener("input", () => { limit = page; write(); show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { limit += page; show(); });
  window.addEventListener("hashchange", () => { limit = page; read(); show(); });
  form.hidden = false;
  read();
  show();
})();
