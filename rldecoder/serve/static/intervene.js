"use strict";
// Features changed at a token, from it on, or everywhere: what both models predict before and after.
const Intervene = (() => {
  const { at, element, ask, complain, button } = Bench;
  const { nats } = Parts;
  const body = at("change-body");
  const hint = "Take a feature out, or amplify it, in the list below, or add one here. Both models are run again.";
  let last = 0;
  let answer = null;

  const editor = Changes.editor(at("change-editor"), "change", () => {
    State.set({ change: editor.text() });
    if (editor.list.length) run();
    else reset();
  });
  const changed = () => editor.list.length > 0;

  const reset = () => {
    last += 1;
    answer = null;
    body.replaceChildren(element("p", "note", hint));
  };
  const forget = () => { editor.clear(); reset(); };

  const side = (title, change) => {
    const box = element("div");
    box.append(Parts.shifts(title, change, "before", "after"),
      element("p", "note", answer.about + " " + nats(change.target[0]) + " → " + nats(change.target[1]) + ", changed by "
        + nats(-change.effect) + " nats; moved by KL " + change.moved[answer.at - answer.first].toFixed(3)));
    return box;
  };
  const laterWords = ({ frozen, decoder }) => {
    const most = (moved) => Math.max(...moved.slice(1)).toFixed(3);
    return "The frozen model’s later predictions move by up to " + most(frozen.moved) + " nats (coloured above)"
      // A decoder with blocks looks back; the server leaves later positions out for one without.
      + (decoder.moved.length > 1
        ? ", the decoder’s by up to " + most(decoder.moved) + " nats."
        : ". The linear decoder reads one token, so that its later ones stay.");
  };
  const places = { here: (place) => "at token " + place, from: (place) => "from token " + place + " on", all: () => "at every token" };

  const run = async () => {
    const { prompt, position, target } = Trace.state;
    const where = at("change-where").value;
    if (!changed()) { complain(new Error("Add a feature first.")); return; }
    const mine = last += 1;
    answer = null;  // what is taken along meanwhile holds no change, not the one before
    const changes = editor.list.map((one) => ({ ...one }));
    body.replaceChildren(element("p", "note", "running both models again …"));
    try {
      const found = await ask("/api/intervene", { prompt, position, where, changes, target });
      if (mine !== last) return;
      answer = { ...found, changes, where };
      const title = element("p", "", changes.map(Changes.words).join(", ") + " " + places[where](position) + ": activation "
        + found.act.toFixed(2) + " → " + found.new_act.toFixed(2) + (where === "here" ? "" : " in all; predictions after the last token"));
      const both = element("div", "pair wide");
      both.append(side("frozen model", found.frozen), side("decoder", found.decoder));
      const parts = [title, both];
      if (where === "here" && found.frozen.moved.length > 1) parts.push(element("p", "note", laterWords(found)));
      const row = element("div", "row");
      row.append(button("Back to unchanged", () => { forget(); State.set({ change: null }); Trace.paintDistance(); }),
        button("Steer with these", () => Steer.take(changes)));
      body.replaceChildren(...parts, row);
      Trace.paint(found.frozen.moved, "colour: how far the frozen model’s prediction moved, KL", found.first);
    } catch (error) {
      if (mine !== last) return;
      reset();
      complain(error);
    }
  };
  // From a row of the list: one more feature, scaled.
  const scale = (feature, factor) => {
    if (!(Math.abs(factor) <= 20)) {
      complain(new Error("Amplify by a number from -20 to 20."));
      at("factor").focus();
      return;
    }
    editor.know(feature.latent, Parts.labelText(feature));
    editor.put({ latent: feature.latent, how: "scale", value: factor, high: null });
  };

  const shown = () => {
    if (!answer) return null;
    const table = (name, change) => ({ name, columns: ["token", "p before", "p after"], rows: change.shifts.map((s) => [s.token, s.before, s.after]) });
    return {
      answer, question: { changes: answer.changes, where: answer.where },
      tables: [table("frozen model, " + answer.changes.map(Changes.words).join(", "), answer.frozen), table("decoder, the same", answer.decoder)],
    };
  };

  at("change-where").addEventListener("change", () => {
    State.set({ where: at("change-where").value });
    if (changed()) run();
  });
  return { run, reset, forget, scale, shown, changed, editor };
})();
