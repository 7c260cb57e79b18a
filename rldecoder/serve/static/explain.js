"use strict";
// Both methods' explanation of the prediction after a token.
const Explain = (() => {
  const { at, element, ask, complain } = Bench;
  const box = at("explanation");

  const reset = (place) => {
    box.replaceChildren(element("p", "note", "Claims about single features, each tested by taking the feature out of the frozen model; the decoder’s own effect stands beside it."));
    at("explain").disabled = place === 0;
  };
  const run = async () => {
    const { position, prompt } = Trace.state;
    // A late answer must not stand under another text or token.
    const here = () => prompt === Trace.state.prompt && position === Trace.state.position;
    box.replaceChildren(element("p", "note", "testing claims …"));
    at("explain").disabled = true;
    try {
      const found = await ask("/api/explain", { prompt, position });
      if (here()) box.replaceChildren(...explanation(found));
    } catch (error) {
      if (here()) box.replaceChildren();
      complain(error);
    } finally { at("explain").disabled = Trace.state.position === 0; }
  };

  const tagged = (tag, text) => {
    const line = element("p");
    line.append(element("span", "tag", tag), text);
    return line;
  };
  const ranking = (rows) => {
    if (!rows.length) return tagged("A", "No feature is active here.");
    const table = Parts.table("ranking cells", [{ text: "active here" }, { text: "of its usual high", num: true }, { text: "what it is" }],
      rows.map(([feature, high, what]) => [element("span", "mono", feature), high, what]));
    const part = element("div");
    part.append(tagged("A", "Active here, strongest first:"), table);
    return part;
  };
  const claims = (list, first) => {
    const box = element("ul", "claims");
    list.forEach((claim, place) => {
      const item = element("li");
      const words = element("div");
      words.append(element("span", "tag", "B" + (first + place)), claim.sentence);
      const measure = element("div", "measure");
      measure.append(element("span", "chip " + claim.css, claim.verdict), element("br"), "frozen model: " + claim.measured);
      item.append(words, measure);
      box.append(item);
    });
    return box;
  };
  const explanation = (found) => {
    const parts = [ranking(found.active), tagged("B", found.says)];
    if (!found.claims.length) return parts;
    parts.push(claims(found.claims, 1));
    if (found.more_claims.length) {
      const rest = element("details", "fold");
      rest.append(element("summary", "", found.more_claims.length + " more"), claims(found.more_claims, found.claims.length + 1));
      parts.push(rest);
    }
    parts.push(element("p", "note", found.tested));
    return parts;
  };
  at("explain").addEventListener("click", run);
  return { reset };
})();
