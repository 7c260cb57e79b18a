"use strict";
// The feature browser of the report.
(() => {
  const features = JSON.parse(document.getElementById("feature-data").textContent);
  const cards = document.getElementById("cards");
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const only = document.getElementById("only");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const PAGE = 12;
  let shown = PAGE;

  const haystack = (feature) =>
    [
      "#" + feature.latent, feature.shown, feature.label || "", feature.failure || "",
      ...feature.others.map((other) => other.label || ""),
      ...feature.promoted, ...feature.examples.filter((example) => example.kind !== "near_miss").map((example) => example.tokens.join("")),
    ].join("\n").toLowerCase();
  const index = features.map(haystack);
  const orders = {
    importance: (a, b) => a.rank - b.rank,
    confidence: (a, b) => b.confidence - a.confidence || a.rank - b.rank,
    density: (a, b) => b.density - a.density || a.rank - b.rank,
    latent: (a, b) => a.latent - b.latent,
    review: (a, b) => a.queue - b.queue,
  };

  const draw = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const found = features
      .filter((feature, i) => words.every((word) => index[i].includes(word)))
      .filter((feature) =>
        only.value === "all" ? true
          : only.value === "high" ? feature.high
          : only.value === "failed" ? !feature.is_label
          : feature.is_label && !feature.high)
      .sort(orders[sort.value]);
    cards.replaceChildren(...found.slice(0, shown).map(Cards.card));
    count.textContent = found.length + " of " + features.length + " features";
    more.hidden = found.length <= shown;
  };
  const restart = () => { shown = PAGE; draw(); };
  search.addEventListener("input", restart);
  sort.addEventListener("change", restart);
  only.addEventListener("change", restart);
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== search) {
      event.preventDefault();
      search.focus();
    }
  });
  window.addEventListener("beforeprint", () => { document.querySelectorAll("details.stage").forEach((d) => { d.open = true; }); });
  draw();
})();
