"use strict";
// Two prompts, each at one token: features that differ, predictions that differ.
const Compare = (() => {
  const { at, ask, complain, element } = Bench;
  const state = { found: null, asked: null, strips: [], key: "" };
  let last = 0;

  const COLUMNS = [{ text: "feature" }, { text: "first", num: true }, { text: "second", num: true },
    { text: "difference, of its usual high", num: true }];
  const draw = () => {
    const found = state.found;
    const places = [["compare-first", found.tokens, 0], ["compare-second", found.other_tokens, 1]];
    state.strips = places.map(([id, tokens, side]) => {
      const strip = Parts.strip(at(id), tokens, (place) => run(side ? [state.asked.at[0], place] : [place, state.asked.at[1]]));
      strip.select(found.at[side], true);
      return strip;
    });
    at("compare-where").textContent = "First: after “" + found.tokens[found.at[0]] + "” (token " + found.at[0] + "). Second: after “"
      + found.other_tokens[found.at[1]] + "” (token " + found.at[1] + "). Choose other tokens in the texts above.";
    const side = (title, change) => {
      const box = element("div");
      box.append(Parts.shifts(title, change, "first", "second"), element("p", "note", "KL(first || second) " + change.kl.toFixed(3) + " nats"));
      return box;
    };
    at("compare-predictions").replaceChildren(side("frozen model", found.frozen), side("decoder", found.decoder));
    at("compare-features").replaceChildren(Parts.table("cells", COLUMNS, found.features.map((one) => [
      Parts.named(one), one.act.toFixed(2), one.other_act.toFixed(2), Parts.moved(Parts.nats(one.difference), one.difference, 0.05)])));
    at("compared").hidden = false;
  };

  // `places`: the tokens to look at, null the last ones.
  const run = async (places = null) => {
    const [prompt, other] = [at("prompt").value, at("other").value];
    for (const [id, text] of [["prompt", prompt], ["other", other]]) {
      if (!text.trim()) { complain(new Error("Write both texts first.")); at(id).focus(); return; }
    }
    const mine = last += 1;
    const [position, other_position] = places || [null, null];
    at("compare-state").textContent = "comparing …";
    try {
      const found = await ask("/api/compare", { prompt, other, position, other_position });
      if (mine !== last) return;
      Object.assign(state, { found, asked: { prompt, other, at: found.at } });
      State.set({ change: null, prompt, other, at: found.at[0], otherat: found.at[1] });
      state.key = key();
      draw();
    } catch (error) { complain(error); } finally { if (mine === last) at("compare-state").textContent = ""; }
  };

  const key = () => ["prompt", "other", "at", "otherat"].map(State.get).join("\n");

  Sheet.bar(at("compare-export"), () => {
    const found = state.found;
    const predicted = (name, change) => ({ name, columns: ["token", "p first", "p second"], rows: change.shifts.map((s) => [s.token, s.before, s.after]) });
    return {
      name: "compare", title: "Two prompts, " + document.title, facts: [at("compare-where").textContent], tokens: [],
      blocks: [{ title: "first", text: state.asked.prompt }, { title: "second", text: state.asked.other }],
      tables: [predicted("frozen model", found.frozen), predicted("decoder", found.decoder),
        { name: "features", columns: ["latent", "said", "first", "second", "difference"],
          rows: found.features.map((f) => [f.latent, Parts.labelText(f), f.act, f.other_act, f.difference]) }],
      question: state.asked, answers: found, code: found.code,
    };
  });
  at("compare-form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  return { run, state, key };
})();
