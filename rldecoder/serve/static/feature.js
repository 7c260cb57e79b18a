"use strict";
// The page of a feature, any latent: where it fires, what it does, what its label is worth.
const Feature = (() => {
  const { at, element, get, complain, button } = Bench;
  let last = 0;
  let shown = null;

  const mark = (text, good) => element("span", "chip " + (good ? "supported" : "unknown"), text);
  const heading = (text, chip) => {
    const head = element("h4", "", text + " ");
    if (chip) head.append(chip);
    return head;
  };
  const KINDS = { input: "label: what it fires on", output: "label: what it raises", both: "label: what it fires on, what it raises" };
  const fold = (title, content) => {
    const box = element("details", "fold");
    box.append(element("summary", "", title), content);
    return box;
  };
  const list = (lines) => {
    const box = element("ul", "plain");
    lines.forEach((line) => box.append(element("li", "", line)));
    return box;
  };
  const ids = (latents) => {
    const box = element("span");
    latents.forEach((latent) => box.append(button("#" + latent, () => Bench.showFeature(latent), "feature-name", "feature " + latent + ", its page"), " "));
    return box;
  };
  const relations = (found) => {
    const rows = [["alias of", found.alias_of === undefined ? null : [found.alias_of]], ["in a cluster with", found.cluster && found.cluster.members],
      ["absorbed by", found.absorbed_by], ["absorbs", found.absorbs]].filter(([, latents]) => latents);
    return [...rows.map(([name, latents]) => {
      const line = element("p", "note", name + " ");
      line.append(ids(latents));
      return line;
    }), ...(found.flags ? [element("p", "note", "flagged: " + found.flags.join(", "))] : [])];
  };

  const draw = (page) => {
    const title = at("feature-title");
    title.textContent = "#" + page.latent + "  " + (page.is_label && !page.sure ? "unsure: " : "") + page.shown;
    const kind = element("p");
    kind.append(mark(page.is_label ? (KINDS[page.kind] || "label by a person") : "description, no label", page.is_label && page.sure), " ", page.kind_words);
    const contexts = element("div");
    contexts.id = "unseen";
    contexts.append(heading("Where it fires", mark("text never used for its label", true)), element("p", "note", "reading …"));
    const parts = [kind, list(page.worth), contexts];
    if (page.examples.length) {
      const used = element("div");
      used.append(heading("Where it fires", mark("text its label was made from", false)), ...page.examples.map(Parts.context));
      parts.push(used);
    }
    const does = element("div");
    does.append(heading("What it does"), Cards.effects("the decoder’s row raises", page.promoted), Cards.effects("and lowers", page.suppressed));
    if (page.raised.length) does.append(Cards.effects("in the frozen model, by ablation, it raises", page.raised));
    if (page.lowered.length) does.append(Cards.effects("and lowers", page.lowered));
    parts.push(does, ...relations(page.relations));
    if (page.tried.length) parts.push(fold("Both labels that were tried", list(page.tried.map((row) => row.join(" · ")))));
    if (page.numbers.length) parts.push(fold("All numbers", Parts.table("numbers-table", [{ text: "measure" }, { text: "value", num: true }], page.numbers)));
    page.reviews.forEach((review) => parts.push(element("p", "note", Cards.reviewText(review))));
    const row = element("div", "row");
    row.append(button("Steer with it", () => Steer.take([{ latent: page.latent, how: "set", value: Number((page.usual || 1).toPrecision(3)), high: null }])),
      element("span", "note", page.usual ? "set to its usual high, " + page.usual.toFixed(2) : "it never fired in the text of the labels"));
    parts.push(row);
    at("feature-body").replaceChildren(...parts);
  };
  const drawContexts = (found) => {
    const box = at("unseen");
    const said = found.firings ? "Fires on " + found.firings.toLocaleString("en") + " of " + found.tokens.toLocaleString("en") + " tokens; the strongest:"
      : "Fires on none of " + found.tokens.toLocaleString("en") + " tokens.";
    box.replaceChildren(box.firstChild, element("p", "note", said), ...found.contexts.map(Parts.context));
  };

  const open = async (latent) => {
    const mine = last += 1;
    shown = null;
    at("feature-title").textContent = "#" + latent;
    at("feature-body").replaceChildren(element("p", "note", "reading …"));
    at("feature-export").hidden = true;
    try {
      const page = await get("/api/features/" + latent);
      if (mine !== last) return;
      draw(page);
      shown = { page, contexts: null };
      at("feature-export").hidden = false;
    } catch (error) {
      if (mine === last) at("feature-body").replaceChildren();
      complain(error);
      return;
    }
    try {
      const found = await get("/api/features/" + latent + "/contexts");
      if (mine !== last) return;
      shown.contexts = found;
      drawContexts(found);
    } catch (error) {
      // A release has no text: that is no fault of the page.
      if (mine === last) at("unseen").lastChild.textContent = error.message;
    }
  };

  Sheet.bar(at("feature-export"), () => {
    const { page, contexts } = shown;
    const windows = [...(contexts ? contexts.contexts : []), ...page.examples];
    return {
      name: "feature-" + page.latent, title: "#" + page.latent + "  " + page.shown, facts: [page.kind_words, ...page.worth], tokens: [], blocks: [],
      tables: [
        { name: "contexts", columns: ["text", "activation", "used for the label"],
          rows: windows.map((one) => [one.tokens.join(""), one.act, one.kind === "unseen" ? "no" : "yes"]) },
        { name: "raised by the decoder", columns: ["token"], rows: page.promoted.map((t) => [t]) },
        { name: "lowered by the decoder", columns: ["token"], rows: page.suppressed.map((t) => [t]) },
        { name: "numbers", columns: ["measure", "value"], rows: page.numbers },
      ],
      question: { latent: page.latent }, answers: { page, contexts }, code: page.code,
    };
  });
  at("feature-back").addEventListener("click", () => State.set({ view: "features", feature: null }, true));
  return { open };
})();
