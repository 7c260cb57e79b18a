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

  const KINDS = { quantile: "weaker: ", near_miss: "silent here: " };
  const context = (example) => {
    const row = element("p", "context");
    if (KINDS[example.kind]) row.append(element("em", "", KINDS[example.kind]));
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
  // Names of scores as people read them, in the order of a card; docs/metrics.md has formulas.
  const SCORES = [
    ["detection", "detection"], ["detection_hard", "detection on near misses"],
    ["fuzzing", "fuzzing"], ["fuzzing_hard", "fuzzing on near misses"],
    ["intruder", "intruder"], ["simulation", "simulation r"],
    ["precision", "precision"], ["recall", "recall"], ["f1", "F1"], ["auprc", "AUPRC"],
    ["window_precision", "precision over windows"], ["window_recall", "recall over windows"],
    ["window_f1", "F1 over windows"],
  ];
  const line = (name, facts) => {
    const row = element("div", name);
    facts.forEach((fact) => row.append(element("span", "", fact)));
    return row;
  };
  const scored = (scores) => SCORES.filter(([key]) => key in scores)
    .map(([key, name]) => name + " " + number(scores[key], 2));
  const other = (label) => {
    const box = element("div", "other");
    box.append(element("p", "", label.label === null ? "failed: " + label.failure : label.label));
    const asked = label.scores;
    const sure = label.confidence;
    const confidence = sure === null ? "no confidence: " + label.no_confidence
      : "confidence " + number(sure[0], 2) + " [" + number(sure[1], 2) + ", " + number(sure[2], 2) + "]";
    const facts = ["by " + label.labeler + ", " + label.model, confidence, ...scored(asked)];
    if (asked.failures) facts.push(asked.failures + " of " + asked.questions + " answers missing");
    facts.push("judged by " + label.judge + (label.trusted ? "" : ", which is not trusted: do not believe these scores"));
    box.append(line("meta", facts));
    return box;
  };
  const ids = (latents) => latents.map((latent) => "#" + latent).join(", ");
  const relations = (found) => {
    const facts = [];
    if (found.alias_of !== undefined) facts.push("alias of #" + found.alias_of);
    if (found.cluster) facts.push("cluster of " + found.cluster.size + ": " + ids(found.cluster.members));
    if (found.absorbed_by) facts.push("absorbed by " + ids(found.absorbed_by));
    if (found.absorbs) facts.push("absorbs " + ids(found.absorbs));
    if (found.flags) facts.push("flagged: " + found.flags.join(", "));
    return facts;
  };
  const reviewText = (review) =>
    review.reviewer
    + (review.accept === true ? " accepted it" : review.accept === false ? " rejected it" : "")
    + (review.label ? " and gave “" + review.label + "”" : "")
    + (review.note ? " (" + review.note + ")" : "")
    + (review.at ? ", " + review.at.replace("T", " ").replace("+00:00", " UTC") : "");
  // A label below the bar of confidence is a guess, and says so wherever it stands.
  // What passed no test is no label: what is known stands there, and says that it is a description.
  const name = (feature) => (feature.is_label && !feature.high ? "unsure: " : "") + feature.shown;
  const card = (feature) => {
    const box = element("article", "panel card");
    box.append(element("h4", "", "#" + feature.latent + "  " + name(feature)));
    const interval = feature.confidence_low === undefined ? ""
      : " [" + number(feature.confidence_low, 2) + ", " + number(feature.confidence_high, 2) + "]";
    const facts = [
      "importance rank " + feature.rank,
      "confidence " + number(feature.confidence, 2) + interval + (feature.high ? " (high)" : ""),
      "fires on " + (feature.density * 100).toFixed(2) + " %",
      "place " + feature.queue + " of the review queue",
      "by " + feature.labeler,
    ];
    box.append(line("meta", facts), line("meta scores", scored(feature.scores)));
    const related = relations(feature.relations || {});
    if (related.length) box.append(line("meta", related));
    feature.tried.forEach((tried) => box.append(line("meta", tried)));
    if (feature.predicate) box.append(element("p", "meta predicate", feature.predicate));
    feature.others.forEach((label) => box.append(other(label)));
    feature.examples.forEach((example) => box.append(context(example)));
    if (feature.promoted.length) box.append(effects("raises", feature.promoted));
    if (feature.suppressed.length) box.append(effects("lowers", feature.suppressed));
    (feature.reviews || []).forEach((review) => box.append(element("p", "note", reviewText(review))));
    return box;
  };
  return { element, number, effects, card, reviewText };
})();
