"use strict";
// Feature cards, for the report and for the server. Text from models and corpora only ever
// becomes textContent.
const Cards = (() => {
  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

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
    const interval = feature.confidence_low === undefined ? ""
      : " [" + number(feature.confidence_low, 2) + ", " + number(feature.confidence_high, 2) + "]";
    const facts = [
      "importance rank " + feature.rank,
      "confidence " + number(feature.confidence, 2) + interval + (feature.high ? " (high)" : ""),
      "detection " + number(feature.detection, 2),
      "fuzzing " + number(feature.fuzzing, 2),
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
  return { element, number, effects, card };
})();
