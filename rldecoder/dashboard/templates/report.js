"use strict";
// The feature browser. Text from models and corpora only ever becomes textContent.
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

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  const haystack = (feature) =>
    [
      "#" + feature.latent, feature.label || "", feature.failure || "",
      ...feature.promoted, ...feature.examples.map((example) => example.tokens.join("")),
    ].join("\n").toLowerCase();
  const index = features.map(haystack);
  const orders = {
    importance: (a, b) => a.rank - b.rank,
    confidence: (a, b) => b.confidence - a.confidence || a.rank - b.rank,
    density: (a, b) => b.density - a.density || a.rank - b.rank,
    latent: (a, b) => a.latent - b.latent,
  };

  const context = (example) => {
    const row = element("p", "context");
    example.tokens.forEach((token, position) => {
      const span = element("span", position === example.focus ? "focus" : "", token);
      if (example.heat[position] > 0) {
        span.style.setProperty("--h", String(example.heat[position]));
        span.title = "activation " + (example.heat[position] * 100).toFixed(0) + " % of this window's highest";
      }
      row.append(span);
    });
    return row;
  };
  const effects = (name, tokens) => {
    const row = element("div", "effects", name + " ");
    tokens.forEach((token) => row.append(element("span", "tok", token)));
    return row;
  };
  const card = (feature) => {
    const box = element("article", "panel card");
    box.append(element("h4", "", "#" + feature.latent + "  " + (feature.label || "no label: " + feature.failure)));
    const meta = element("div", "meta");
    const facts = [
      "importance rank " + feature.rank,
      "confidence " + number(feature.confidence, 2) + (feature.high ? " (high)" : ""),
      "detection " + number(feature.detection, 2),
      "F1 " + number(feature.f1, 2),
      "fires on " + (feature.density * 100).toFixed(2) + " %",
    ];
    facts.forEach((fact) => meta.append(element("span", "", fact)));
    box.append(meta);
    feature.examples.forEach((example) => box.append(context(example)));
    if (feature.promoted.length) box.append(effects("raises", feature.promoted));
    if (feature.suppressed.length) box.append(effects("lowers", feature.suppressed));
    if (feature.predicate) box.title = feature.predicate;
    return box;
  };

  const draw = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const found = features
      .filter((feature, i) => words.every((word) => index[i].includes(word)))
      .filter((feature) =>
        only.value === "all" ? true
          : only.value === "high" ? feature.high
          : only.value === "failed" ? feature.label === null
          : feature.label !== null && !feature.high)
      .sort(orders[sort.value]);
    cards.replaceChildren(...found.slice(0, shown).map(card));
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
